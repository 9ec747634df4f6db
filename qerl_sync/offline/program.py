"""Observe a layer map without an engine: the program that `offline.layer_map.run_probe` starts.

It is a process of its own, since vLLM's models need process groups and a current configuration, and
a caller may have its own or none. It reads a pickled request from standard input and writes the
pickled answer to the file that its argument names; vLLM writes on standard output and error.
"""

from __future__ import annotations

import gc
import itertools
import json
import pickle
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qerl_sync.errors import ConfigError, LayerMapError, SyncError
from qerl_sync.meta import not_ignored
from qerl_sync.plan.checkpoint import Checkpoint, Expected
from qerl_sync.plan.offline_map import OfflineMap
from qerl_sync.plan.recorded_map import recorded_maps

if TYPE_CHECKING:
    import torch

    from qerl_sync.meta import ParamMeta
    from qerl_sync.plan.layer_map import LayerMap


def main() -> None:
    (out,) = sys.argv[1:]
    gc.disable()  # a short life: walking all of vLLM for garbage would be a fifth of it
    request = pickle.load(sys.stdin.buffer)
    answer: OfflineMap | SyncError
    try:
        answer = observe(request)
    except SyncError as exc:
        answer = exc
    Path(out).write_bytes(pickle.dumps(answer))


def observe(request: Mapping[str, Any]) -> OfflineMap:
    """Observe the layer map of a model, and the stream it holds for.

    May be called more than once in a process that has no process group.

    Args:
        request: `checkpoint`, a `Checkpoint`; `engine`, vLLM's arguments; `dtype` that the trainer
            loads the model in, None for `Checkpoint.dtype`. Where they are there: `ignore_names`
            and `allow_incomplete`, patterns; `recorded`, an architecture, for its recorded patterns
            in place of vLLM.

    Raises:
        SyncError: as `offline_map` does.
    """
    seconds: dict[str, float] = {}
    engine = request["engine"]
    checkpoint: Checkpoint = request["checkpoint"]
    dtype = request["dtype"] or checkpoint.dtype
    with _model_directory(checkpoint) as directory:
        # First, since vLLM puts configuration classes of its own in transformers' place.
        with _timed(seconds, "imports"):
            import qerl_sync.sources.hf  # noqa: F401  its time is an import's

            build = trainer_model(directory, dtype, trust=bool(engine.get("trust_remote_code")))
        with _timed(seconds, "names"):
            streams = [
                one._replace(metas=not_ignored(one.metas, request.get("ignore_names", ())))
                for one in possible_streams(build(), checkpoint)
            ]
        if architecture := request.get("recorded"):
            version, maps = recorded_maps()
            expected, layer_map = _first_that_lands(streams, maps[architecture].layer_map)
            return OfflineMap(
                expected.metas, layer_map, "recorded", version, expected.note, seconds
            )
        with _timed(seconds, "imports"):
            from qerl_sync.worker.compat import offline as compat_offline
            from qerl_sync.worker.load.observe import observe_layer_map

            architectures = (checkpoint.config or {}).get("architectures") or []
            version = compat_offline.import_vllm_models(architectures)
        with _timed(seconds, "config"):
            config = compat_offline.engine_config(directory, engine)
        with _timed(seconds, "build"), compat_offline.meta_model(config) as parts:
            built = time.perf_counter()
            observed = partial(
                observe_layer_map,
                parts.model,
                parts.vllm_config,
                allow_incomplete=request.get("allow_incomplete", ()),
            )
            expected, layer_map = _first_that_lands(streams, observed)
            seconds["probe"] = time.perf_counter() - built
    seconds["build"] -= seconds["probe"]
    return OfflineMap(expected.metas, layer_map, "probe", version, expected.note, seconds)


@contextmanager
def _model_directory(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a directory that vLLM and transformers read the configuration from."""
    if checkpoint.directory is not None:
        yield str(checkpoint.directory)
        return
    with tempfile.TemporaryDirectory(prefix="qerl-sync-") as directory:
        Path(directory, "config.json").write_text(json.dumps(checkpoint.config), encoding="utf-8")
        yield directory


def trainer_model(
    directory: str, dtype: str | None, *, trust: bool
) -> Callable[[], torch.nn.Module]:
    """Return a function that builds, on the meta device, the model that a trainer would load.

    Args:
        dtype: as for `from_pretrained`; None: that of the config.
        trust: may code that comes with the model run?
    """
    import torch
    import transformers

    from qerl_sync.worker.compat.meta_values import meta_device

    with _of_transformers(directory):
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust)
        family = getattr(transformers, (config.architectures or ("",))[0], None)
        auto = partial(transformers.AutoModelForCausalLM.from_config, trust_remote_code=trust)
        from_config = family._from_config if family is not None else auto

    def build() -> torch.nn.Module:
        with _of_transformers(directory), meta_device():
            model: torch.nn.Module = from_config(
                config, dtype=getattr(torch, dtype) if dtype else config.dtype
            )
            # Building a model from its configuration casts everything to one dtype;
            # `from_pretrained` would keep some in float32, such as router corrections.
            plan: dict[str, Any] = getattr(model, "_get_dtype_plan", lambda dtype: {})(model.dtype)
            patterns = [re.compile(pattern.replace("*", ".*")) for pattern in plan]
            for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
                if any(pattern.search(name) for pattern in patterns):
                    tensor.data = tensor.data.float()
            return model

    return build


def possible_streams(model: torch.nn.Module, checkpoint: Checkpoint) -> list[Expected]:
    """Return what a trainer of this model may send, as far as the files agree.

    transformers writes a prefix before some names (`vision_model` in LLaVA's tower) only if the
    files that it loaded had it. Without files it may be either.

    Raises:
        ConfigError: the files agree with neither.
    """
    from qerl_sync.sources.hf import HFSource

    streams = [HFSource(model).metadata()]
    with suppress(ImportError):  # transformers 4 keeps parameters as they are in checkpoints
        from transformers.conversion_mapping import get_model_conversion_mapping

        model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
        if (other := HFSource(model).metadata()) != streams[0]:
            streams.append(other)
    found, errors = [], []
    for metas in streams:
        try:
            found.append(checkpoint.held_against(metas))
        except ConfigError as exc:  # noqa: PERF203  two at most
            errors.append(exc)
    if not found:
        raise errors[0]
    return found


def _first_that_lands(
    streams: Sequence[Expected], layer_map: Callable[[list[ParamMeta]], LayerMap]
) -> tuple[Expected, LayerMap]:
    """Return the first stream that the model takes, with its layer map. Raises LayerMapError."""
    errors = []
    for stream in streams:
        try:
            return stream, layer_map(stream.metas)
        except LayerMapError as exc:  # noqa: PERF203  two at most
            errors.append(exc)
    raise errors[0]


@contextmanager
def _of_transformers(directory: str) -> Iterator[None]:
    import transformers

    try:
        yield
    except Exception as exc:
        raise ConfigError(
            f"transformers {transformers.__version__} cannot build the trainer's model of "
            f"{directory}: {exc}"
        ) from exc


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - start
