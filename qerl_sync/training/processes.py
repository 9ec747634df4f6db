"""Several trainer processes, as torchrun and `accelerate launch` start them.

Each process runs the whole program. Rank 0 alone prints, and reads and writes the files of the run;
the other ranks get from it what it has read.
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
        self._ranks = ranks
        self.rank = ranks.rank if ranks else 0

    def of_leader(self, what: str, find: Callable[[], Found]) -> Found:
        """Return what `find` returns on rank 0, which must fit into JSON. All raise its error."""
        if self._ranks is None:
            return find()
        with self._ranks.together():
            found: Found = self._ranks.of_leader(what, find)
        return found

    def any(self, what: str, said: bool) -> bool:
        """Return whether any rank says True."""
        return any(self._ranks.meet(what, said)) if self._ranks else said


def started_ranks() -> int:
    """Return how many trainer processes this one was started with."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(config: TrainConfig) -> Processes:
    """Return the run's processes, which have agreed that they run the same configuration.

    Call it after making TRL's arguments, which initialize torch.distributed.

    Raises:
        AgreementError: on every rank; with the rank and the first setting that differ.
    """
    if started_ranks() == 1:
        return Processes()
    ranks = TrainerRanks(config.sync.timeout_seconds, num_ranks=started_ranks())
    with ranks.together():
        settings = list(_settings(config.model_dump(mode="json")))
        ranks.require_same("the configuration", json.dumps(settings), lambda: settings)
    return Processes(ranks)


def _settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield `section.key=value` of each value."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={value}"


@contextmanager
def sharding_on_cpus() -> Iterator[None]:
    """Have a trainer that is built in this context shard with FSDP2 or DeepSpeed on CPUs too.

    Enter it when the trainer's arguments have been made.

    accelerate takes its plugins for both on GPUs only. On CPUs it drops them without a word, and
    each process trains a copy of the whole model. All that follows (wrapping over gloo, the
    optimizer's parameters, checkpoints) needs no GPU.

    Raises:
        ConfigError: DeepSpeed is asked for in one process, or would look for a GPU; or FSDP1 is
            asked for, which accelerate itself cannot do there.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from transformers.integrations.deepspeed import deepspeed_config

    if deepspeed_config() is not None:
        started = PartialState()
        if started.distributed_type != DistributedType.DEEPSPEED:
            _initialize_deepspeed_on_cpus(started.num_processes)
    init = AcceleratorState.__init__

    def init_and_shard(state: Any, *given: Any, **options: Any) -> None:
        init(state, *given, **options)
        deepspeed, fsdp = options.get("deepspeed_plugin"), options.get("fsdp_plugin")
        if deepspeed is not None and state.distributed_type != DistributedType.DEEPSPEED:
            # As AcceleratorState.__init__ does for GPUs.
            deepspeed.set_mixed_precision(state._mixed_precision)
            deepspeed.select(_from_accelerator_state=True)
            state.deepspeed_plugins = deepspeed
            state._mixed_precision = "no"  # DeepSpeed's own configuration has it
            state.distributed_type = DistributedType.DEEPSPEED
        elif fsdp is not None and state.distributed_type == DistributedType.MULTI_CPU:
            if fsdp.fsdp_version != 2:
                raise ConfigError(
                    f"accelerate wraps no model on CPUs with FSDP of version {fsdp.fsdp_version}; "
                    "set version: 2 in `trainer.fsdp_config`, or fsdp_version: 2 in accelerate's "
                    "configuration"
                )
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = fsdp
        PartialState._shared_state["distributed_type"] = state.distributed_type

    AcceleratorState.__init__ = init_and_shard
    try:
        yield
    finally:
        AcceleratorState.__init__ = init


def _initialize_deepspeed_on_cpus(num_processes: int) -> None:
    if num_processes == 1:
        raise ConfigError(
            "on CPUs DeepSpeed is for several processes, and this run has one; start it with "
            "torchrun --nproc_per_node 2, or leave trainer.deepspeed out",
            sharding="DeepSpeed",
        )
    import deepspeed

    name = deepspeed.accelerator.get_accelerator().device_name()
    if name != "cpu":
        raise ConfigError(
            f"this run trains on CPUs, and DeepSpeed has chosen {name!r}; set DS_ACCELERATOR=cpu",
            sharding="DeepSpeed",
        )
    # It would compile an operator of its own for the collectives, for minutes; gloo has them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Its own module must know the ranks before the model is loaded, which partitions it.
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)


@contextmanager
def whole_models() -> Iterator[None]:
    """Have a trainer in this context keep its model whole, and the next one decide anew.

    accelerate decides once for a process how models are sharded; transformers partitions with
    DeepSpeed what is loaded once any arguments have asked for it.
    """
    from accelerate.state import AcceleratorState
    from transformers.integrations import deepspeed

    asked = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        with changed_environment({n: "false" for n in SHARDING_VARIABLES if n in os.environ}):
            yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = asked
    if started_ranks() > 1:
        AcceleratorState._reset_state()
