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

from faults.subjects import NEW as NEW_VERSION
from faults.subjects import OLD as OLD_VERSION
from faults.subjects import Subject
from faults.trainer import TrainerProcess
from faults.triggers import Checkpoint, InjectedFault, PhasedTransport, Trigger
from qerl_sync.errors import SyncError
from qerl_sync.session import SyncSession

# An order of the source, kept, in which the query parts of all layers come before the rest of them.
SEVERAL_OPEN: dict[str, Any] = {"policy": "warn", "source_order": "size"}
# Smaller than any slot.
SMALLEST_FILE_BYTES = 4096


@dataclass
class Acted:
    """What a case has done."""

    error: BaseException | str | None = None
    detection_seconds: float | None = None
    note: str = ""
    pids: tuple[int, ...] = ()


def push(
    subject: Subject,
    source: Checkpoint,
    trigger: Trigger,
    *,
    open_at: str | None = None,
    **options: Any,
) -> Acted:
    """One sync with a fault in it.

    Args:
        open_at: the tensor that it is about, where the case says that several layers are open then.
    """
    session = subject.session(source, trigger, **options)
    acted = _attempt(session, trigger)
    if open_at is not None:
        _require_several_open(session, open_at)
    return acted


def at_phase(phase: str, do: Callable[[PhasedTransport], None], subject: Subject) -> Acted:
    trigger = Trigger(phase)
    session = subject.session(Checkpoint(subject.tensors[NEW_VERSION], trigger), trigger)
    transport: Any = session._transport
    trigger.action = lambda: do(transport)
    return _attempt(session, trigger)


def _attempt(session: SyncSession, trigger: Trigger) -> Acted:
    begun = time.monotonic()
    try:
        session.push()
    except Exception as exc:
        known = trigger.detected_at or time.monotonic()
        return Acted(exc, known - (trigger.fired_at or begun))
    finally:
        session.close()
    return Acted()


def _require_several_open(session: SyncSession, name: str) -> None:
    """The case would not be what its name says."""
    plan = session.plan
    steps = plan.predicted.steps if plan is not None else ()
    found = next((step.open_layers for step in steps if step.name == name), 0)
    if found < 2:
        raise AssertionError(
            f"{found} layers are open when {name} comes, not several; choose another source_order "
            "or tensor for this model"
        )


# ------------------------------------------------------------------------------ the processes


def kill_worker(phase: str, subject: Subject) -> Acted:
    return at_phase(phase, lambda t: os.kill(t.pids()[-1], signal.SIGKILL), subject)


def stop_worker(phase: str, subject: Subject) -> Acted:
    stopped: list[int] = []

    def stop(transport: PhasedTransport) -> None:
        stopped.append(transport.pids()[-1])
        os.kill(stopped[0], signal.SIGSTOP)

    try:
        return at_phase(phase, stop, subject)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def cut(phase: str, subject: Subject) -> Acted:
    return at_phase(phase, lambda t: t.cut(), subject)


def fault_in_transport(phase: str, subject: Subject) -> Acted:
    def fail(_: object) -> None:
        raise InjectedFault("the trainer failed")

    return at_phase(phase, fail, subject)


def trainer(phase: str, action: str, subject: Subject) -> Acted:
    path = subject.paths[NEW_VERSION]
    trainer = TrainerProcess(subject.client(), path, phase, action)
    trainer.run()
    fault = trainer.ended_at if action == "kill" else trainer.fired_at
    open_then = trainer.freed_at and fault and trainer.freed_at > fault - 0.05
    seconds = trainer.freed_at - fault if open_then and trainer.freed_at and fault else None
    if trainer.error == "":  # nothing was to be noticed
        seconds = None
    note = "" if trainer.error is None else "the trainer went on"
    return Acted(trainer.error or None, seconds, note, (trainer.pid,))


def no_shared_memory(subject: Subject) -> Acted:
    """The kernel refuses the memory of the slots: no file of this process may become so large."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def forbid(_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALLEST_FILE_BYTES, hard))

    try:
        return at_phase("before start", forbid, subject)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --------------------------------------------------------------------------------- the loader


def broken_loader(subject: Subject, rank: int = -1, layer: str = "", **options: Any) -> Acted:
    """vLLM fails when it processes a layer.

    Args:
        rank: the one that fails; -1: all.
        layer: its end of the path; "": one in the middle.
    """
    subject.ask("fault_break", rank, layer)
    try:
        trigger = Trigger()
        source = Checkpoint(subject.tensors[NEW_VERSION], trigger)
        return push(subject, source, trigger, **options)
    finally:
        with suppress(Exception):
            subject.ask("fault_mend")


def broken_loader_with_several_open(subject: Subject) -> Acted:
    acted = broken_loader(subject, layer="layers.0.self_attn.qkv_proj", **SEVERAL_OPEN)
    others = re.search(r"(\d+) other layers have begun", str(acted.error))
    if others is None or others[1] == "0":  # as the worker counted them
        raise AssertionError(f"no other layer was open on the worker: {acted.error}")
    return acted


# ---------------------------------------------------------------------------- wrong use of us


def doubled_start(subject: Subject) -> Acted:
    """A second sync while one is open: refused, and the first one goes on."""
    refused: list[SyncError] = []

    def again() -> None:
        with subject.session(Checkpoint(subject.tensors[OLD_VERSION])) as second:
            try:
                second.push()
            except SyncError as exc:
                refused.append(exc)

    trigger = Trigger("in a chunk", again)
    acted = push(subject, Checkpoint(subject.tensors[NEW_VERSION], trigger), trigger)
    if acted.error is None:
        acted.error = refused[0] if refused else None
    acted.detection_seconds = None
    return acted


def finish_without_start(subject: Subject) -> Acted:
    transport = subject.transport(Trigger())
    begun = time.monotonic()
    try:
        transport.finish()
    except Exception as exc:
        return Acted(exc, time.monotonic() - begun)
    finally:
        transport.close()
    return Acted()


def two_trainers(subject: Subject) -> Acted:
    """The second is turned away; the first pushes again."""
    with subject.session(Checkpoint(subject.tensors[OLD_VERSION])) as first:
        first.push()
        trigger = Trigger()
        acted = push(subject, Checkpoint(subject.tensors[NEW_VERSION], trigger), trigger)
        first.push()
    return acted
