"""Prepare the process before vLLM is imported, and silence what libraries print."""

from __future__ import annotations

import logging
import os
import warnings
from importlib.util import find_spec

from qerl_sync.engines.environment import ON_SHARED_CORES
from qerl_sync.errors import ConfigError
from qerl_sync.serving.command import QUIET_TRITON

PACKAGES = ("torch", "transformers", "datasets", "trl", "vllm", "matplotlib")

# vLLM reads these when it is imported. What the user has set stays.
ENGINE_VARIABLES = {
    # TRL's colocate mode reaches into the model, so the engine must live in this process.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    **ON_SHARED_CORES,
    "TOKENIZERS_PARALLELISM": "false",
}
QUIET_VARIABLES = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "GLOO_LOG_LEVEL": "ERROR",
    # "Triton not available": true of every machine without a GPU, and of no consequence there.
    "TORCH_LOGS": QUIET_TRITON,
}


def prepare_environment(*, verbose: bool) -> None:
    """Set what vLLM and transformers read at import. Call it before anything imports them."""
    variables = ENGINE_VARIABLES if verbose else {**ENGINE_VARIABLES, **QUIET_VARIABLES}
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    if not verbose:
        warnings.filterwarnings("ignore")
        # vLLM logs while it is imported, before it has read its own level.
        logging.getLogger("vllm").setLevel(logging.ERROR)


def hush() -> None:
    """Silence the output that no environment variable silences. Imports the packages."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for name in ("trl", "accelerate", "vllm"):
        logging.getLogger(name).setLevel(logging.ERROR)


def require_packages() -> None:
    """Raise ConfigError if a package that a run needs is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"not installed: {', '.join(missing)}; `./scripts/setup` in a checkout installs all "
            "that a run needs"
        )
