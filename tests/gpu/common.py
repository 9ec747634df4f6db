"""What the proofs on a GPU share: models that its kernels like, engine arguments, facts.

A part is a module with `CASES`, functions by name that run one case in this process and return a
dictionary for JSON, and `COST`, what each takes: (GiB of the card's memory, seconds). `run.py` runs
each case in a process of its own, several at once. Everything runs without a GPU, too, smaller.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from math import inf, isfinite
from pathlib import Path
from typing import Any

Case = Callable[[], dict[str, Any]]
Cost = tuple[float, float]

ROOT = Path(__file__).parents[2]
DTYPE = "bfloat16"
OLD, NEW = 0, 1  # seeds of the two versions of a model
# The longer ones fill whole blocks, which vLLM's prefix cache would keep from the old weights.
PROMPTS = [[(i * 7 + length) % 1000 for i in range(length)] for length in (5, 19, 48, 90)]
KV_CACHE_BYTES = 64 * 2**20

# Heads, matrices and experts have sizes that Triton's and CUTLASS's kernels take as they are.
_COMMON: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,  # greedy tokens that are no coin tosses
}
_MOE: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "mlp_only_layers": [],
}
KINDS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "dense": ("Qwen3Config", {}),
    "bias": ("Qwen2Config", {"hidden_size": 512, "intermediate_size": 768}),  # heads of 64
    "tied": ("Qwen3Config", {"tie_word_embeddings": True}),
    "moe": ("Qwen3MoeConfig", _MOE),
}

# How the engine runs the model. "compiled" is vLLM's own default: Inductor, and graphs in pieces
# beside whole ones. "graphs" captures the same kernels as "eager", and starts sooner.
MODES: Mapping[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graphs": {
        "enforce_eager": False,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4],
        },
    },
    "compiled": {
        "enforce_eager": False,
        "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4]},
    },
}


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def config(kind: str, **changes: Any) -> Any:
    """Return the transformers configuration of a kind of model."""
    import transformers

    name, own = KINDS[kind]
    return getattr(transformers, name)(**{**_COMMON, **own, **changes})


def model(kind: str, seed: int, **changes: Any) -> Any:
    """Return that kind of model as a trainer on the card has it; weights are the seed's."""
    from support.models import random_model

    return random_model(config(kind, **changes), seed, DTYPE).to(device())


def engine_arguments(mode: str, quantization: str | None = None, **more: Any) -> dict[str, Any]:
    """Return arguments of a `LLM`, or a server, that starts soon and shares the card with others.

    With `kv_cache_memory_bytes` vLLM does not measure what is free, which would fail where another
    process takes or frees memory meanwhile. It still asks for `gpu_memory_utilization` to be free.
    """
    arguments = {
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "dtype": DTYPE,
        "disable_log_stats": True,
        **MODES[mode],
    }
    if quantization is not None:
        arguments["quantization"] = quantization
    if device() == "cuda":
        arguments |= {"gpu_memory_utilization": 0.01, "kv_cache_memory_bytes": KV_CACHE_BYTES}
    else:
        arguments["num_gpu_blocks_override"] = 64
    return {**arguments, **more}


def gap(one: Any, other: Any) -> float:
    """Return the largest difference of two numbers at the same place of two nested lists; infinite
    where the nests differ, as where tokens do. It tells rounding from weights."""
    if isinstance(one, dict):
        return gap(list(one.items()), list(other.items()))
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=False)
        return max((gap(a, b) for a, b in pairs), default=0.0) if len(one) == len(other) else inf
    if isinstance(one, float) and isfinite(one - other):
        return abs(one - other)
    return 0.0 if one == other else inf


def prepare() -> None:
    """Set what vLLM reads when it is imported, in this process and in those that it starts.

    Where the package is not installed (a checkout on PYTHONPATH) vLLM would not find the plugin.
    """
    import logging

    import support.environment  # noqa: F401

    logging.getLogger("qerl_sync").setLevel(logging.ERROR)  # orders are bad on purpose
    os.environ.setdefault("VLLM_DEEP_GEMM_WARMUP", "skip")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    paths = [str(ROOT), str(ROOT / "tests")]
    if not any(one.name == "qerl_sync" for one in entry_points(group="vllm.general_plugins")):
        paths.append(_entry_point())
    sys.path[:0] = [path for path in paths if path not in sys.path]
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([inherited] if inherited else [])])


def _entry_point() -> str:
    """Return a directory for PYTHONPATH that has nothing but the package's entry points."""
    import atexit
    import shutil

    directory = tempfile.mkdtemp(prefix="qerl-sync-entry-point-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    home = Path(directory, "qerl_sync-0.dist-info")
    home.mkdir()
    home.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: qerl-sync\nVersion: 0\n")
    home.joinpath("entry_points.txt").write_text(
        "[vllm.general_plugins]\nqerl_sync = qerl_sync.worker.protocol.plugin:register\n"
    )
    return directory


def facts() -> dict[str, Any]:
    """Return what a result needs to be understood later: versions and the card."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {
        name: str(getattr(sys.modules[name], "__version__", "?"))
        for name in ("vllm", "transformers", "trl")
        if name in sys.modules
    }
    if torch.cuda.is_available():
        found |= {
            "device": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "capability": list(torch.cuda.get_device_capability()),
        }
    return {**found, "device": found.get("device", "cpu")}
