"""vLLM models without an engine: real classes, loaders and kernels, built in this process.

An engine must have been started in it before: vLLM's process groups are that engine's.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qerl_sync import HFSource
from qerl_sync.options import SyncOptions
from qerl_sync.plan.sync_plan import build_plan
from qerl_sync.worker.compat import engine as compat
from qerl_sync.worker.compat import offline as compat_offline
from qerl_sync.worker.load.receiver import Receiver


def load(path: Path, **arguments: Any) -> compat.EngineParts:
    """The model as an engine would have it that was started with the checkpoint at `path`."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    compat_offline.import_vllm_models(
        json.loads((path / "config.json").read_text())["architectures"]
    )
    asked = {"dtype": "float32", "max_model_len": 64, "load_format": "auto", **arguments}
    config = compat_offline.engine_config(str(path), asked)
    with set_current_vllm_config(config):
        return compat.EngineParts(get_model(vllm_config=config), config, torch.device("cpu"))


@contextlib.contextmanager
def started(parts: compat.EngineParts, source: HFSource, **options: Any) -> Iterator[Receiver]:
    """A sync whose last chunk has arrived; what fails in the context ends it."""
    receiver = Receiver(parts)
    metas = source.metadata()
    layer_map = receiver.layer_map(metas)
    plan = build_plan(metas, layer_map, "reorder", chunk_bytes=1 << 16)
    receiver.start(plan, layer_map, SyncOptions(**options))
    try:
        for chunk in plan.chunks:
            receiver.receive(chunk, source.materialize(chunk.names))
        yield receiver
    except Exception as exc:
        receiver.abort(str(exc))
        raise


def sync(parts: compat.EngineParts, trainer: torch.nn.Module, **options: Any) -> None:
    with started(parts, HFSource(trainer), **options) as receiver:
        receiver.finish()
        receiver.commit(receiver.version + 1)
