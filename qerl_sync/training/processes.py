"""Several trainer processes, as torchrun and `accelerate launch` start them.

Each process runs the whole program. Rank 0 alone prints and writes the files of the run; what it
finds there it tells the others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from qerl_sync.config import TrainConfig
from qerl_sync.engines.environment import changed_environment
from qerl_sync.errors import ConfigError
from qerl_sync.transports.joint import TrainerRanks

Found = TypeVar("Found")

# By these accelerate reads what to shard by from its own configuration file.
SHARDING_VARIABLES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


class Processes:
    """The trainer processes of this run, of which there may be one.

    Args:
        ranks: all of them, where there are several. Every rank makes the same calls.
    """

    def __init__(self, ranks: TrainerRanks | None = None) -> None:
        self.ranks = ranks

    @property
    def rank(self) -> int:
        return self.ranks.rank if self.ranks else 0

    @property
    def leads(self) -> bool:
        """Return whether this process prints and writes the run's files."""
        return self.rank == 0

    def of_leader(self, what: str, find: Callable[[], Found]) -> Found:
        """Return what `find` returns on rank 0, which must fit into JSON. All raise its error."""
        if self.ranks is None:
            return find()
        with self.ranks.together():
            found: Found = self.ranks.of_leader(what, find)
        return found

    def any(self, what: str, said: bool) -> bool:
        """Return whether any rank says True."""
        return any(self.ranks.meet(what, said)) if self.ranks else said


def started_ranks() -> int:
    """Return how many trainer processes this one was started with."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(config: TrainConfig) -> Processes:
    """Return the run's processes, which have agreed that they run the same configuration.

    Call it when TRL's arguments have been made, which initializes torch.distributed.

    Raises:
        AgreementError: on every rank; with the rank and the first setting that differ.
    """
    if started_ranks() == 1:
        return Processes()
    ranks = TrainerRanks(config.sync.timeout_seconds, num_ranks=started_ranks())
    with ranks.together():
        settings = [
            f"{place}={value}" for place, value in _settings(config.model_dump(mode="json"))
        ]
        ranks.require_same("the configuration", json.dumps(settings), lambda: settings)
    return Processes(ranks)


def _settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@contextmanager
def sharding_on_cpus() -> Iterator[None]:
    """Have an Accelerator that is made in this context shard with FSDP2 on CPUs too.

    accelerate takes its FSDP plugin on GPUs only. On CPUs it drops it without a word, and each
    process trains a copy of the whole model. All that follows (`fully_shard` over gloo, the
    optimizer's parameters, checkpoints) needs no GPU.

    Raises:
        ConfigError: the plugin is of version 1, which is not synced; or it is DeepSpeed's, which
            accelerate drops likewise.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    init = AcceleratorState.__init__

    def init_and_shard(state: Any, *given: Any, **options: Any) -> None:
        init(state, *given, **options)
        asked = options.get("deepspeed_plugin") is not None
        if asked and state.distributed_type != DistributedType.DEEPSPEED:
            raise ConfigError(
                "accelerate runs DeepSpeed on GPUs only, and would leave it out here without a "
                "word, each process training a copy of the whole model; shard with FSDP2 "
                "(trainer.fsdp: true and trainer.fsdp_config: {version: 2}), or train on GPUs",
                sharding="DeepSpeed",
            )
        plugin = options.get("fsdp_plugin")
        if plugin is None or state.distributed_type != DistributedType.MULTI_CPU:
            return
        if plugin.fsdp_version != 2:
            raise ConfigError(
                f"FSDP of version {plugin.fsdp_version} is not synced; set version: 2 in "
                "`trainer.fsdp_config`, or fsdp_version: 2 in accelerate's configuration"
            )
        # As AcceleratorState.__init__ does for GPUs.
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = plugin
        PartialState._shared_state["distributed_type"] = state.distributed_type

    AcceleratorState.__init__ = init_and_shard
    try:
        yield
    finally:
        AcceleratorState.__init__ = init


@contextmanager
def whole_models() -> Iterator[None]:
    """Have a trainer in this context keep its model whole, and the next one decide anew.

    accelerate decides once for a process how models are sharded.
    """
    from accelerate.state import AcceleratorState

    with changed_environment({n: "false" for n in SHARDING_VARIABLES if n in os.environ}):
        yield
    if started_ranks() > 1:
        AcceleratorState._reset_state()
