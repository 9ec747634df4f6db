"""What cases do: break one sync, and tell what the trainer saw of it."""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from faults.engines import NEW, OLD, FaultEngine
from faults.spoilers import Pairs, Spoil
from faults.trainer import TrainerProcess
from faults.triggers import FaultySource, InjectedFault, PhasedRemote, Trigger
from qerl_sync import SyncError, SyncSession

# An order of the source, kept, in which the query parts of all layers come before the rest of them.
SEVERAL_OPEN: dict[str, Any] = {"policy": "warn", "source_order": "size"}


@dataclass
class Injection:
    """A sync that was broken, as its trainer saw it.

    Attributes:
        pids: processes that were started for it.
    """

    error: BaseException | str | None = None
    detection_seconds: float | None = None
    note: str = ""
    pids: tuple[int, ...] = ()


def push(
    engine: FaultEngine,
    trigger: Trigger | None = None,
    pairs: Pairs | None = None,
    spoil: Spoil | None = None,
    *,
    open_at: str | None = None,
    **options: Any,
) -> Injection:
    """Sync NEW with a fault in it.

    Args:
        pairs: what is sent; None: the checkpoint as it is.
        open_at: the tensor that it is about, where the case says that several layers are open then.
    """
    trigger = trigger or Trigger()
    source = FaultySource(engine.pairs if pairs is None else pairs, trigger, spoil)
    session = engine.session(source, trigger, **options)
    injection = _attempt(session.push, trigger, session.close)
    if open_at is not None:
        _require_several_open(session, open_at)
    return injection


def _attempt(act: Callable[[], Any], trigger: Trigger, close: Callable[[], None]) -> Injection:
    begun = time.monotonic()
    try:
        act()
    except Exception as exc:
        known = trigger.detected_at or time.monotonic()
        return Injection(exc, known - (trigger.fired_at or begun))
    finally:
        close()
    return Injection()


def _require_several_open(session: SyncSession, name: str) -> None:
    """Raise where the case is not what its name says."""
    steps = session.plan.predicted.steps if session.plan is not None else ()
    found = next((step.open_layers for step in steps if step.name == name), 0)
    if found < 2:
        raise AssertionError(
            f"{found} layers are open when {name} comes, not several; choose another source_order "
            "or tensor for this model"
        )


def at_phase(phase: str, do: Callable[[PhasedRemote], None], engine: FaultEngine) -> Injection:
    trigger = Trigger(phase)
    session = engine.session(FaultySource(engine.pairs, trigger), trigger)
    transport: Any = session._transport
    trigger.action = lambda: do(transport)
    return _attempt(session.push, trigger, session.close)


# ------------------------------------------------------------------------------ the processes


def kill_worker(phase: str, engine: FaultEngine) -> Injection:
    return at_phase(phase, lambda t: os.kill(t.pids()[-1], signal.SIGKILL), engine)


def stop_worker(phase: str, engine: FaultEngine) -> Injection:
    stopped: list[int] = []

    def stop(transport: PhasedRemote) -> None:
        stopped.append(transport.pids()[-1])
        os.kill(stopped[0], signal.SIGSTOP)

    try:
        return at_phase(phase, stop, engine)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def cut(phase: str, engine: FaultEngine) -> Injection:
    return at_phase(phase, PhasedRemote.cut, engine)


def fail_trainer(phase: str, engine: FaultEngine) -> Injection:
    def fail(_: object) -> None:
        raise InjectedFault("the trainer failed")

    return at_phase(phase, fail, engine)


def signal_trainer(phase: str, action: str, engine: FaultEngine) -> Injection:
    trainer = TrainerProcess(engine.client(), engine.paths[NEW], phase, action)
    trainer.run()
    fault = trainer.ended_at if action == "kill" else trainer.fired_at
    seconds = None
    # With "" nothing was to be noticed; before the fault no call was open that it could end.
    if trainer.error != "" and trainer.freed_at and fault and trainer.freed_at > fault - 0.05:
        seconds = trainer.freed_at - fault
    note = "" if trainer.error is None else "the trainer went on"
    return Injection(trainer.error or None, seconds, note, (trainer.pid,))


def no_shared_memory(engine: FaultEngine) -> Injection:
    """The kernel refuses the memory of the slots: no file of this process may become so large."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    smaller_than_any_slot = 4096

    def forbid(_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (smaller_than_any_slot, hard))

    try:
        return at_phase("before start", forbid, engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --------------------------------------------------------------------------------- the loader


def broken_loader(
    engine: FaultEngine, rank: int = -1, layer: str = "", **options: Any
) -> Injection:
    """vLLM fails when it processes a layer; see `WorkerExtension.break_loader`."""
    engine.rpc("break_loader", rank, layer)
    try:
        return push(engine, **options)
    finally:
        with suppress(Exception):
            engine.rpc("mend_loader")


def broken_loader_with_several_open(engine: FaultEngine) -> Injection:
    injection = broken_loader(engine, layer="layers.0.self_attn.qkv_proj", **SEVERAL_OPEN)
    others = re.search(r"(\d+) other layers have begun", str(injection.error))
    if others is None or others[1] == "0":  # as the worker counted them
        raise AssertionError(f"no other layer was open on the worker: {injection.error}")
    return injection


# ---------------------------------------------------------------------------- wrong use of us


def doubled_start(engine: FaultEngine) -> Injection:
    """A second sync while one is open: refused, and the first one goes on."""
    refused: list[SyncError] = []

    def again() -> None:
        try:
            engine.push(OLD)
        except SyncError as exc:
            refused.append(exc)

    injection = push(engine, Trigger("in a chunk", again))
    if injection.error is None:
        injection.error = refused[0] if refused else None
    injection.detection_seconds = None
    return injection


def finish_without_start(engine: FaultEngine) -> Injection:
    transport = engine.transport(Trigger())
    return _attempt(transport.finish, Trigger(), transport.close)


def two_trainers(engine: FaultEngine) -> Injection:
    """The second is turned away; the first pushes again."""
    with engine.session(FaultySource(engine.tensors[OLD])) as first:
        first.push()
        injection = push(engine)
        first.push()
    return injection
