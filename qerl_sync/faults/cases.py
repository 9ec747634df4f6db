"""Every fault, what it does to a sync, and how it may end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from qerl_sync.errors import SyncError
from qerl_sync.faults import inputs
from qerl_sync.faults.outcomes import GONE, LIMIT_SECONDS, NEW, OLD, POISONED
from qerl_sync.faults.subjects import CALL_SECONDS, TIMEOUT_SECONDS, Spec, Subject
from qerl_sync.faults.subjects import NEW as NEW_VERSION
from qerl_sync.faults.subjects import OLD as OLD_VERSION
from qerl_sync.faults.trainer import TrainerProcess
from qerl_sync.faults.triggers import PHASES, Checkpoint, InjectedFault, PhasedTransport, Trigger

REMOTE = ("own process", "server", "tensor parallel")
EVERYWHERE = ("in process", *REMOTE)


@dataclass
class Acted:
    """What a case has done."""

    error: BaseException | str | None = None
    detection_seconds: float | None = None
    note: str = ""
    pids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        group: where it stands in tables.
        act: breaks a sync of version NEW and comes back.
        expected: how it may end.
        engines: on which it makes sense.
        allowed_seconds: see `Outcome`.
        stock: tensors and spoiling of the stream with which vLLM's own reload meets the same fault;
            None where it has nothing of the kind.
    """

    name: str
    group: str
    act: Callable[[Subject], Acted]
    expected: tuple[str, ...] = (POISONED,)
    engines: tuple[str, ...] = EVERYWHERE
    allowed_seconds: float = LIMIT_SECONDS
    stock: Callable[[Subject], tuple[Any, Any]] | None = None

    def suits(self, spec: Spec) -> bool:
        return spec.engine in self.engines


def push(subject: Subject, source: Checkpoint, trigger: Trigger, **options: Any) -> Acted:
    """One sync with a fault in it."""
    begun = time.monotonic()
    session = subject.session(source, trigger, **options)
    try:
        session.push()
    except Exception as exc:
        known = trigger.detected_at or time.monotonic()
        return Acted(exc, known - (trigger.fired_at or begun))
    finally:
        session.close()
    return Acted()


# ------------------------------------------------------------------------------- bad inputs


def _pairs(subject: Subject) -> list[Any]:
    return list(subject.tensors[NEW_VERSION].items())


def _victim(subject: Subject, part: str = "gate_proj.weight") -> str:
    return inputs.victim_of(list(subject.tensors[NEW_VERSION]), part)


def _announced(change: Any) -> Callable[[Subject], tuple[Any, Any]]:
    return lambda subject: (change(_pairs(subject), _victim(subject)), None)


def _late(spoil: Any) -> Callable[[Subject], tuple[Any, Any]]:
    return lambda subject: (_pairs(subject), spoil(_victim(subject)))


def _raising(index: int) -> Callable[[Subject], tuple[Any, Any]]:
    def make(subject: Subject) -> tuple[Any, Any]:
        pairs = _pairs(subject)
        at = len(pairs) // 2 if index == 1 else index
        return pairs, inputs.raising_at(at, len(pairs))

    return make


def _raising_before(part: str) -> Callable[[Subject], tuple[Any, Any]]:
    return lambda subject: (_pairs(subject), inputs.raising_before(_victim(subject, part)))


def _spoiled(make: Callable[[Subject], tuple[Any, Any]], subject: Subject, **options: Any) -> Acted:
    pairs, spoil = make(subject)
    trigger = Trigger()
    return push(subject, Checkpoint(pairs, trigger, spoil), trigger, **options)


def _input(
    name: str,
    make: Callable[[Subject], tuple[Any, Any]],
    expected: tuple[str, ...] = (POISONED,),
    group: str = "bad input",
    **more: Any,
) -> Case:
    return Case(name, group, partial(_spoiled, make), expected, stock=make, **more)


# ------------------------------------------------------------------------------ the processes


def _at_phase(phase: str, do: Callable[[PhasedTransport], None], subject: Subject) -> Acted:
    trigger = Trigger(phase)
    source = Checkpoint(subject.tensors[NEW_VERSION], trigger)
    session = subject.session(source, trigger)
    transport: Any = session._transport
    trigger.action = lambda: do(transport)
    begun = time.monotonic()
    try:
        session.push()
    except Exception as exc:
        known = trigger.detected_at or time.monotonic()
        return Acted(exc, known - (trigger.fired_at or begun))
    finally:
        session.close()
    return Acted()


def _kill_worker(phase: str, subject: Subject) -> Acted:
    return _at_phase(phase, lambda t: os.kill(t.pids()[-1], signal.SIGKILL), subject)


def _stop_worker(phase: str, subject: Subject) -> Acted:
    stopped: list[int] = []

    def stop(transport: PhasedTransport) -> None:
        stopped.append(transport.pids()[-1])
        os.kill(stopped[0], signal.SIGSTOP)

    try:
        return _at_phase(phase, stop, subject)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def _cut(phase: str, subject: Subject) -> Acted:
    return _at_phase(phase, lambda t: t.cut(), subject)


def _fault_in_transport(phase: str, subject: Subject) -> Acted:
    def fail(_: object) -> None:
        raise InjectedFault("the trainer failed")

    return _at_phase(phase, fail, subject)


def _trainer(phase: str, action: str, subject: Subject) -> Acted:
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


# --------------------------------------------------------------------------------- the loader


def _broken_loader(rank: int, subject: Subject) -> Acted:
    subject.ask("fault_break", rank)
    try:
        trigger = Trigger()
        return push(subject, Checkpoint(subject.tensors[NEW_VERSION], trigger), trigger)
    finally:
        with suppress(Exception):
            subject.ask("fault_mend")


# ---------------------------------------------------------------------------- wrong use of us


def _doubled_start(subject: Subject) -> Acted:
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


def _finish_without_start(subject: Subject) -> Acted:
    transport = subject.transport(Trigger())
    begun = time.monotonic()
    try:
        transport.finish()
    except Exception as exc:
        return Acted(exc, time.monotonic() - begun)
    finally:
        transport.close()
    return Acted()


def _two_trainers(subject: Subject) -> Acted:
    """The second is turned away; the first pushes again."""
    with subject.session(Checkpoint(subject.tensors[OLD_VERSION])) as first:
        first.push()
        trigger = Trigger()
        acted = push(subject, Checkpoint(subject.tensors[NEW_VERSION], trigger), trigger)
        first.push()
    return acted


ALLOWED_BY_TIMEOUT = TIMEOUT_SECONDS + LIMIT_SECONDS


def all_cases() -> dict[str, Case]:
    found = [_input(name, _announced(change), (OLD,)) for name, change in inputs.ANNOUNCED.items()]
    found += [_input(name, _late(spoil)) for name, spoil in inputs.LATE.items()]
    found.append(
        _input(
            "receive buffer used again",
            lambda subject: (_pairs(subject), inputs.reusing_its_buffer),
            # Where tensors are staged the memory is the source's again with the next tensor.
            (POISONED, NEW),
        )
    )
    exceptions = {
        "first tensor": _raising(0),
        "middle tensor": _raising(1),
        "last tensor": _raising(-1),
        "inside an open layer": _raising_before("k_proj.weight"),
        "on a layer's boundary": _raising_before("o_proj.weight"),
    }
    found += [
        _input(f"exception: {where}", make, group="exception in the source")
        for where, make in exceptions.items()
    ]
    found += [
        Case(
            f"{name}, rolled back",
            "rollback",
            partial(_spoiled, make, on_failure="rollback"),
            (OLD,),
        )
        for name, make in {
            "NaN": _late(inputs.LATE["NaN"]),
            "exception: last tensor": _raising(-1),
            "exception: inside an open layer": _raising_before("k_proj.weight"),
        }.items()
    ]
    found.append(Case("exception in a loader", "exception in vLLM", partial(_broken_loader, -1)))
    found.append(
        Case(
            "exception in one rank's loader",
            "exception in vLLM",
            partial(_broken_loader, 1),
            engines=("tensor parallel",),
        )
    )
    for phase in PHASES:
        before = phase == "before start"
        found.append(
            Case(
                f"trainer killed {phase}",
                "SIGKILL",
                partial(_trainer, phase, "kill"),
                (OLD,) if before else (POISONED,),
                REMOTE,
            )
        )
        found.append(
            Case(f"worker killed {phase}", "SIGKILL", partial(_kill_worker, phase), (GONE,), REMOTE)
        )
        found.append(
            Case(
                f"connection cut {phase}",
                "connection cut",
                partial(_cut, phase),
                (OLD, NEW) if before else (POISONED,),  # it may connect anew and go on
                REMOTE,
            )
        )
    for phase in ("before start", "between chunks", "before commit"):
        before = phase == "before start"
        found.append(
            Case(
                f"trainer stopped {phase}",
                "SIGSTOP",
                partial(_trainer, phase, "stop"),
                (NEW,) if before else (POISONED,),
                REMOTE,
                ALLOWED_BY_TIMEOUT,
            )
        )
        found.append(
            Case(
                f"worker stopped {phase}",
                "SIGSTOP",
                partial(_stop_worker, phase),
                # A worker that reads its messages late reads them all the same.
                (OLD, POISONED) if before else (POISONED,),
                REMOTE,
                # Pausing an engine asks its workers too: the client's timeout, not the channel's.
                CALL_SECONDS + LIMIT_SECONDS if before else ALLOWED_BY_TIMEOUT,
            )
        )
    for phase in PHASES:
        found.append(
            Case(
                f"trainer fails {phase}",
                "exception in the source",
                partial(_fault_in_transport, phase),
                (OLD,) if phase == "before start" else (POISONED,),
                EVERYWHERE if phase != "before commit" else REMOTE,
            )
        )
    found += [
        Case("doubled start", "wrong use", _doubled_start, (NEW,), ("in process",)),
        # Its engine is busy with the first one, which waits for the second: both give up.
        Case("second sync in the middle", "wrong use", _doubled_start, (NEW, POISONED), REMOTE),
        Case("finish without start", "wrong use", _finish_without_start, (OLD,)),
        Case("two trainers at once", "wrong use", _two_trainers, (OLD,), REMOTE),
    ]
    return {case.name: case for case in found}
