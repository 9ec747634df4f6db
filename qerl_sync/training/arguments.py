"""Build the arguments of TRL, vLLM and the worker pool from their YAML sections."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qerl_sync.config import TrainConfig
from qerl_sync.errors import ConfigError
from qerl_sync.training.environment import ENGINE_VARIABLES, QUIET_VARIABLES

if TYPE_CHECKING:
    from peft import LoraConfig
    from trl import GRPOConfig, SFTConfig

# The variables of a run that engines read. Actors on other nodes do not inherit them.
HANDED_ON = (*ENGINE_VARIABLES, *QUIET_VARIABLES, "OMP_NUM_THREADS", "HF_HUB_OFFLINE")


def grpo_arguments(config: TrainConfig) -> GRPOConfig:
    """Return TRL's arguments from the section `trainer`, and those that this program sets."""
    from trl import GRPOConfig

    ours = {
        "output_dir": config.output_dir,
        "seed": config.seed,
        "use_vllm": True,
        # A colocated engine in a process of its own is the same to TRL.
        "vllm_mode": "server" if config.rollout.mode == "server" else "colocate",
    }
    given = {"disable_tqdm": True, **config.trainer}
    made: GRPOConfig = _make(GRPOConfig, "trainer", "TRL", {**given, **ours})
    # After TRL has parsed it: it may be null, or a text with JSON.
    made.model_init_kwargs = {"dtype": config.model.dtype, **(made.model_init_kwargs or {})}
    return made


def sft_arguments(config: TrainConfig) -> SFTConfig | None:
    """Return TRL's arguments from the section `warmup.trainer`; None if there is no warm-up."""
    from trl import SFTConfig

    if config.warmup is None:
        return None
    given = {"disable_tqdm": True, "save_strategy": "no", **config.warmup.trainer}
    ours = {"output_dir": config.output_dir, "seed": config.seed}
    return _make(SFTConfig, "warmup.trainer", "TRL", {**given, **ours})


def lora_arguments(config: TrainConfig) -> LoraConfig | None:
    """Return PEFT's arguments from the section `peft`; None if all weights are trained."""
    if config.peft is None:
        return None
    from peft import LoraConfig

    return _make(LoraConfig, "peft", "PEFT", {"task_type": "CAUSAL_LM", **config.peft})


def engine_options(config: TrainConfig, rank: int = 0) -> dict[str, Any]:
    """Return vLLM's engine arguments: the section `rollout.engine` over our defaults.

    Args:
        rank: the trainer rank whose engine it is, where each has one. Engines of one seed would
            sample the same completions of the same prompt. Ranks that have one engine together
            (`vllm_tensor_parallel_size`) must sample the same: they have one seed.
    """
    engine = rank // int(config.trainer.get("vllm_tensor_parallel_size", 1))
    defaults = {
        "dtype": config.model.dtype,
        "seed": config.seed + engine,
        "use_tqdm_on_load": False,
    }
    return {**defaults, **config.rollout.engine}


def pool_arguments(config: TrainConfig) -> dict[str, Any]:
    """Return the arguments of `WorkerPool.start` for a run's rollout actors."""
    from qerl_sync.integrations.ray.actors import RolloutActor
    from qerl_sync.integrations.ray.in_flight import AsyncRolloutActor

    environment = {name: os.environ[name] for name in HANDED_ON if name in os.environ}
    if has_engine_processes(config):
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    return {
        "actor": AsyncRolloutActor if config.rollout.async_engine else RolloutActor,
        "max_restarts": config.rollout.max_restarts,
        "start_seconds": config.rollout.start_timeout_seconds,
        "generate_seconds": config.rollout.generate_timeout_seconds,
        "options": config.ray.rollout,
        "environment": environment,
    }


def has_engine_processes(config: TrainConfig) -> bool:
    """Return whether an actor's engine runs in processes of its own, which Ray's object store does
    not reach."""
    from qerl_sync.integrations.ray.actors import world_size

    return config.rollout.async_engine or world_size(config.rollout.engine) > 1


def _make(kind: Any, section: str, library: str, arguments: Mapping[str, Any]) -> Any:
    """Raise ConfigError if the library refuses a value or a combination of values."""
    try:
        return kind(**arguments)
    except (TypeError, ValueError, ImportError) as exc:
        raise ConfigError(
            f"{section}: {library}'s {kind.__name__} refuses it: {exc}", place=section
        ) from exc
