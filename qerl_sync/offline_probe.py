"""The program that observes a layer map without an engine: `python -m qerl_sync.offline_probe OUT`.

A process of its own, since vLLM's models need process groups and a current configuration, and a
caller may have its own or none. It reads a request (JSON) from standard input and writes the answer
to the file OUT; standard output and error are vLLM's to write on.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qerl_sync.errors import ConfigError, SyncError
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.checkpoint import Checkpoint, read_checkpoint
from qerl_sync.plan.offline_map import OfflineMap


def main(arguments: Sequence[str] | None = None) -> None:
    (out,) = sys.argv[1:] if arguments is None else arguments
    request = json.load(sys.stdin)
    try:
        answer = {"map": observe(request).to_json()}
    except SyncError as exc:
        answer = {"error": {"type": type(exc).__name__, "message": str(exc)}}
    Path(out).write_text(json.dumps(answer, separators=(",", ":")), encoding="utf-8")


def observe(request: Mapping[str, Any]) -> OfflineMap:
    """The layer map of a model and the stream it holds for.

    May be called more than once in a process that has no process group.

    Args:
        request: `path` of what `read_checkpoint` takes; `engine`, vLLM's arguments; `dtype` of the
            trainer's tensors, None for the model's own.

    Raises:
        SyncError: as `offline_map` does.
    """
    seconds: dict[str, float] = {}
    engine, dtype = request["engine"], request["dtype"]
    checkpoint = read_checkpoint(request["path"])
    with _model_directory(checkpoint) as directory:
        with _timed(seconds, "imports"):
            from qerl_sync.worker import compat_offline
            from qerl_sync.worker.probe import observe_layer_map

            version = compat_offline.import_vllm_models()
        with _timed(seconds, "config"):
            config = compat_offline.engine_config(directory, engine)
        with _timed(seconds, "names"):
            trust = bool(engine.get("trust_remote_code"))
            named = trainer_metas(directory, dtype, trust_remote_code=trust)
            expected = checkpoint.held_against(named, dtype)
        with _timed(seconds, "build"), compat_offline.meta_model(config) as parts:
            built = time.perf_counter()
            layer_map = observe_layer_map(parts.model, parts.vllm_config, expected.metas)
            seconds["probe"] = time.perf_counter() - built
    seconds["build"] -= seconds["probe"]
    return OfflineMap(expected.metas, layer_map, "probe", version, expected.note, seconds)


@contextmanager
def _model_directory(checkpoint: Checkpoint) -> Iterator[str]:
    """A directory that vLLM and transformers read the configuration from."""
    if checkpoint.directory is not None:
        yield str(checkpoint.directory)
        return
    with tempfile.TemporaryDirectory(prefix="qerl-sync-") as directory:
        Path(directory, "config.json").write_text(json.dumps(checkpoint.config), encoding="utf-8")
        yield directory


def trainer_metas(
    directory: str, dtype: str | None, *, trust_remote_code: bool = False
) -> list[ParamMeta]:
    """What a trainer that holds this model whole would send."""
    import torch
    import transformers

    from qerl_sync.sources.hf import HFSource

    try:
        config = transformers.AutoConfig.from_pretrained(
            directory, trust_remote_code=trust_remote_code
        )
        (architecture, *_) = config.architectures or ("",)
        family = getattr(transformers, architecture, transformers.AutoModelForCausalLM)
        build = getattr(family, "_from_config", None) or family.from_config
        with torch.device("meta"):
            model = build(config, dtype=getattr(torch, dtype) if dtype else config.dtype)
    except Exception as exc:
        raise ConfigError(
            f"transformers {transformers.__version__} cannot build the trainer's model of "
            f"{directory}: {exc}"
        ) from exc
    return HFSource(model).metadata()


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


if __name__ == "__main__":
    main()
