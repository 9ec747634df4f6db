"""Changes to TRL, and to vLLM's environment, while a trainer is built.

A trainer calls its callbacks' `on_init_end` before it builds its engine, and hands them neither
itself nor, later, the engine. `calling_trainer` finds the one, `Takeover` waits for the other.
"""

from __future__ import annotations

import inspect
import signal
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import wraps
from importlib.util import find_spec
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import Trainer

from qerl_sync.config.violations import Violation, config_error, nearest
from qerl_sync.engines.environment import changed_environment
from qerl_sync.errors import CompatError
from qerl_sync.worker.compat.coupling import WINDOW

if TYPE_CHECKING:
    from qerl_sync.integrations.trl import WeightSyncCallback

# What makes vLLM give an engine a process of its own. Spawned: a forked one would inherit torch's
# thread pools without their threads.
OWN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


class Takeover:
    """Hand the engine that TRL is going to build for a trainer to a callback of that trainer.

    `VLLMGeneration._init_vllm` is replaced for as long as an engine is awaited, once for all
    trainers: each callback gets its own trainer's engine, in whichever order they are built. Closed
    when the engine is there, and when trainer or callback is collected, for instance because the
    trainer's construction failed.

    Raises:
        CompatError: the installed TRL does not build its engine where this expects it.
    """

    _awaited: ClassVar[list[Takeover]] = []
    _replacement: ClassVar[ExitStack] = ExitStack()

    def __init__(self, trainer: Any, callback: WeightSyncCallback) -> None:
        from trl.generation.vllm_generation import VLLMGeneration

        # Weak, so that a trainer and a callback that are given up are collected all the same.
        self._trainer = weakref.ref(trainer, self.close)
        self._callback = weakref.ref(callback, self.close)
        if not self._awaited:
            awaiting = replaced(VLLMGeneration, "_init_vllm", _taken_over)
            self._replacement.enter_context(awaiting)
        self._awaited.append(self)

    def awaits(self, generation: Any) -> bool:
        """Return whether this `VLLMGeneration` is the trainer's."""
        trainer = self._trainer()
        # Two trainers may share a model, and one may generate with a model that it does not train.
        return (
            trainer is not None
            and generation.accelerator is trainer.accelerator
            and _unwrapped(generation) is _unwrapped(trainer)
        )

    def run(self, generation: Any, init_vllm: Callable[[Any], None]) -> None:
        """Build the engine as the callback wants it, and bind the callback to its trainer."""
        trainer, callback = self._trainer(), self._callback()
        self.close()
        assert trainer is not None
        assert callback is not None
        with callback.connecting():
            init_vllm(generation)
        trainer.vllm_generation = generation  # as TRL does next; `bind` reads it there
        callback.bind(trainer)

    def close(self, collected: object = None) -> None:
        """Await the engine no longer. Put TRL's own method back if this was the last."""
        if self in self._awaited:
            self._awaited.remove(self)
            if not self._awaited:
                self._replacement.close()


def _taken_over(init_vllm: Callable[[Any], None]) -> Callable[[Any], None]:
    @wraps(init_vllm)
    def init_or_take_over(generation: Any) -> None:
        for takeover in Takeover._awaited:
            if takeover.awaits(generation):
                return takeover.run(generation, init_vllm)
        return init_vllm(generation)

    return init_or_take_over


def _unwrapped(owner: Any) -> Any:
    return owner.accelerator.unwrap_model(owner.model)


def calling_trainer(callback: Any) -> Any:
    """Return the trainer that is calling a method of this callback; None if none is.

    transformers hands a callback everything but the trainer, which is `self` where it is called.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        handler = getattr(owner, "callback_handler", None) if isinstance(owner, Trainer) else None
        if handler is not None and callback in handler.callbacks:
            return owner
        frame = frame.f_back
    return None


def known_engine_arguments() -> set[str]:
    """Return the names that a `vllm.LLM` takes; none where vLLM is not installed."""
    if find_spec("vllm") is None:
        return set()
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    of_llm = inspect.signature(LLM).parameters
    names = {name for name, kind in of_llm.items() if kind.kind is not kind.VAR_KEYWORD}
    return names | {field.name for field in fields(EngineArgs)}


def check_engine_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError for names that vLLM's engine does not take, each with the nearest one."""
    known = known_engine_arguments()
    unknown = [
        Violation(f"engine.{name}", f"vLLM's engine has no such argument; {nearest(name, known)}")
        for name in arguments
        if known and name not in known
    ]
    if unknown:
        raise config_error("WeightSyncCallback", unknown)


@contextmanager
def engine_arguments(**arguments: Any) -> Iterator[None]:
    """Pass these vLLM engine arguments to the engine that a TRL trainer builds in this context.

    Example:
        callback = WeightSyncCallback(policy="reorder")
        with engine_arguments(dtype="float32", enforce_eager=True):
            trainer = GRPOTrainer(..., callbacks=[callback])

    TRL fixes the arguments of its colocated `LLM` and leaves no way to set `dtype`,
    `enforce_eager`, `quantization` and others. `WeightSyncCallback(engine={...})` does the same for
    the engine of its own trainer.

    Raises:
        ConfigError: vLLM's engine has no such argument.
        CompatError: the installed TRL does not build its engine where this expects it.
    """
    check_engine_arguments(arguments)
    from trl.generation import vllm_generation

    def with_ours(build: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **given: build(**{**given, **arguments})

    with replaced(vllm_generation, "LLM", with_ours):
        yield


@contextmanager
def own_process() -> Iterator[None]:
    """Start a TRL trainer's colocated engine in a separate process in this context.

    SIGINT is blocked there: a terminal sends Ctrl-C to all processes at once, and vLLM's engine
    would end before the trainer had finished its step. The process that started the engine ends it,
    as vLLM's own clients do, with SIGTERM.
    """
    from trl.generation import vllm_generation

    def apart(build: Callable[..., Any]) -> Callable[..., Any]:
        def start(**given: Any) -> Any:
            if given.get("distributed_executor_backend") == "external_launcher":
                given["distributed_executor_backend"] = None  # TRL's own means: in this process
            with changed_environment(OWN_PROCESS), _blocked(signal.SIGINT):
                return build(**given)

        return start

    with replaced(vllm_generation, "LLM", apart):
        yield


@contextmanager
def without_nccl() -> Iterator[None]:
    """Keep a TRL trainer that is built for a server from joining it in an NCCL group.

    TRL does so at once, for the weights, and fails where there is no CUDA; generating does not need
    it. `WeightSyncCallback` opens it for its own trainer.

    Raises:
        CompatError: the installed TRL does not do so where this expects it.
    """
    from trl.generation.vllm_client import VLLMClient

    def skipped(join: Callable[..., Any]) -> Callable[..., Any]:
        return lambda client, device=0: None

    with replaced(VLLMClient, "init_communicator", skipped):
        yield


def require_attributes(owner: Any, names: Sequence[str], trainer: Any) -> None:
    """Check that TRL has the attributes of `owner` that we read, set or call; `owner` belongs to
    `trainer`.

    Raises:
        CompatError: naming what is missing. To set an attribute that TRL has renamed would replace
            nothing, and the engine would keep the weights that it was started with.
    """
    missing = tuple(name for name in names if not hasattr(owner, name))
    if missing:
        import trl

        kind, where = type(trainer).__name__, getattr(owner, "__name__", type(owner).__name__)
        raise CompatError(
            f"{kind} of TRL {trl.__version__} cannot be synced: its {where} has no "
            f"{', '.join(missing)}; install TRL 1.16, with which qerl-sync is tested",
            missing=missing,
            trainer=kind,
            trl=trl.__version__,
        )


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace `owner.name` by the result of `make` in this context."""
    original = getattr(owner, name, None)
    if original is None:
        raise CompatError(
            f"{owner.__name__} has no {name}: vLLM cannot be imported there, or this TRL is built "
            f"differently; install TRL 1.16 and {WINDOW}"
        )
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """Block a signal in this context for the threads and processes that this thread starts."""
    # The first process that is spawned starts Python's resource tracker, which unblocks SIGINT in
    # this thread. So start it before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
