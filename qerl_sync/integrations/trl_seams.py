"""Changes to TRL, and to vLLM's environment, while a trainer is built."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

from qerl_sync.errors import CompatError
from qerl_sync.worker.compat.coupling import WINDOW

# What makes vLLM give an engine a process of its own. Spawned: a forked one would inherit torch's
# thread pools without their threads.
OWN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


@contextmanager
def engine_arguments(**arguments: Any) -> Iterator[None]:
    """Pass these vLLM engine arguments to the engine that a TRL trainer builds in this context.

    Example:
        callback = WeightSyncCallback(policy="reorder")
        with engine_arguments(dtype="float32", enforce_eager=True):
            trainer = GRPOTrainer(..., callbacks=[callback])
        callback.bind(trainer)

    TRL fixes the arguments of its colocated `LLM` and leaves no way to set `dtype`,
    `enforce_eager`, `quantization` and others. Wrap the construction of the trainer in it; the
    callback itself does not need it.

    Raises:
        CompatError: the installed TRL does not build its engine where this expects it.
    """
    from trl.generation import vllm_generation

    def with_ours(build: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **given: build(**{**given, **arguments})

    with _replaced(vllm_generation, "LLM", with_ours):
        yield


@contextmanager
def own_process() -> Iterator[None]:
    """Start a TRL trainer's colocated engine in a separate process in this context.

    That process does not hear Ctrl-C, which a terminal sends to all at once: vLLM's engine would
    end before the trainer had finished its step. The process that started the engine ends it.

    Raises:
        CompatError: the installed TRL does not build its engine where this expects it.
    """
    from trl.generation import vllm_generation

    def apart(build: Callable[..., Any]) -> Callable[..., Any]:
        def start(**given: Any) -> Any:
            if given.get("distributed_executor_backend") == "external_launcher":
                given["distributed_executor_backend"] = None  # TRL's own means: in this process
            with changed_environment(OWN_PROCESS), _blocked(signal.SIGINT):
                return build(**given)

        return start

    with _replaced(vllm_generation, "LLM", apart):
        yield


@contextmanager
def without_nccl() -> Iterator[None]:
    """Keep a TRL trainer that is built for a server from joining it in an NCCL group.

    TRL does so at once, for the weights, and fails where there is no CUDA; generating does not need
    it. `WeightSyncCallback.connecting` opens it.

    Raises:
        CompatError: the installed TRL does not do so where this expects it.
    """
    from trl.generation.vllm_client import VLLMClient

    def skipped(join: Callable[..., Any]) -> Callable[..., Any]:
        return lambda client, device=0: None

    with _replaced(VLLMClient, "init_communicator", skipped):
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
def _replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
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
def changed_environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Set these environment variables in this context."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """Block a signal in this context for the threads and processes that this thread starts."""
    # Starting it, as the first process that is spawned does, would unblock the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
