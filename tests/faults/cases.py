"""Every fault, where it makes sense, and how it may end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from faults import acts, inputs
from faults.acts import Acted, push
from faults.outcomes import GONE, LIMIT_SECONDS, NEW, OLD, POISONED
from faults.subjects import CALL_SECONDS, TIMEOUT_SECONDS, Spec, Subject
from faults.subjects import NEW as NEW_VERSION
from faults.triggers import PHASES, Checkpoint, Trigger

REMOTE = ("own process", "server", "tensor parallel")
EVERYWHERE = ("in process", *REMOTE)
ALLOWED_BY_TIMEOUT = TIMEOUT_SECONDS + LIMIT_SECONDS

# The tensors of a sync as its metadata tell them, and what spoils the stream after that.
Stream = tuple[Any, Any]


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        group: where it stands in tables.
        act: breaks a sync of version NEW and comes back.
        expected: how it may end.
        engines, models: on which it makes sense; no models: on all.
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
    stock: Callable[[Subject], Stream] | None = None
    models: tuple[str, ...] = ()

    def suits(self, spec: Spec) -> bool:
        return spec.engine in self.engines and (not self.models or spec.model in self.models)


# ------------------------------------------------------------------------------- bad inputs


def _pairs(subject: Subject) -> list[Any]:
    return list(subject.tensors[NEW_VERSION].items())


def _victim(subject: Subject, part: str = "gate_proj.weight", layer: int = 1) -> str:
    return inputs.victim_of(list(subject.tensors[NEW_VERSION]), part, layer)


def _announced(change: Any, part: str = "gate_proj.weight") -> Callable[[Subject], Stream]:
    return lambda subject: (change(_pairs(subject), _victim(subject, part)), None)


def _late(spoil: Any) -> Callable[[Subject], Stream]:
    return lambda subject: (_pairs(subject), spoil(_victim(subject)))


def _beyond_range(subject: Subject) -> Stream:
    victim = _victim(subject)
    return inputs.as_float64(_pairs(subject), victim), inputs.spoiled_with(1e39)(victim)


def _raising(index: int) -> Callable[[Subject], Stream]:
    def make(subject: Subject) -> Stream:
        pairs = _pairs(subject)
        at = len(pairs) // 2 if index == 1 else index
        return pairs, inputs.raising_at(at, len(pairs))

    return make


def _raising_before(part: str) -> Callable[[Subject], Stream]:
    return lambda subject: (_pairs(subject), inputs.raising_before(_victim(subject, part)))


def _spoiled(make: Callable[[Subject], Stream], subject: Subject, **options: Any) -> Acted:
    pairs, spoil = make(subject)
    trigger = Trigger()
    return push(subject, Checkpoint(pairs, trigger, spoil), trigger, **options)


def _spoiled_with_several_open(spoil: Any, subject: Subject) -> Acted:
    # All query parts have come by then, and no layer's attention is whole.
    victim = _victim(subject, "v_proj.weight", 0)
    return _spoiled(
        lambda subject: (_pairs(subject), spoil(victim)),
        subject,
        open_at=victim,
        **acts.SEVERAL_OPEN,
    )


def _input(
    name: str,
    make: Callable[[Subject], Stream],
    expected: tuple[str, ...] = (POISONED,),
    group: str = "bad input",
    **more: Any,
) -> Case:
    return Case(name, group, partial(_spoiled, make), expected, stock=make, **more)


def _bad_inputs() -> list[Case]:
    missing_bias = _announced(inputs.without, "q_proj.bias")
    missing_norm = _announced(inputs.without, "post_attention_layernorm.weight")
    return [
        *(_input(name, _announced(change), (OLD,)) for name, change in inputs.ANNOUNCED.items()),
        _input("missing norm", missing_norm, (OLD,)),
        _input("missing bias", missing_bias, (OLD,), models=("bias",)),
        *(_input(name, _late(spoil)) for name, spoil in inputs.LATE.items()),
        _input("beyond the range of the engine's dtype", _beyond_range),
        _input(
            "receive buffer used again",
            lambda subject: (_pairs(subject), inputs.reusing_its_buffer),
            # Where tensors are staged the memory is the source's again with the next tensor.
            (POISONED, NEW),
        ),
    ]


def _exceptions() -> list[Case]:
    places = {
        "middle tensor": _raising(1),
        "last tensor": _raising(-1),
        "inside an open layer": _raising_before("k_proj.weight"),
        "on a layer's boundary": _raising_before("o_proj.weight"),
    }
    group = "exception in the source"
    # To engines elsewhere a chunk travels whole: nothing has left.
    first = _input("exception: first tensor", _raising(0), (OLD, POISONED), group)
    return [
        first,
        *(_input(f"exception: {where}", make, group=group) for where, make in places.items()),
    ]


def _with_several_layers_open() -> list[Case]:
    """To engines elsewhere a chunk travels whole, and it ends where no layer is open: what its
    source gets wrong is found before the worker opens a layer. It is NaN and the loader's exception
    that find several open there too."""
    spoils = {
        "exception: several layers open": inputs.raising_before,
        "missing in the stream, several layers open": inputs.dropped,
        "NaN, several layers open": inputs.LATE["NaN"],
    }
    group = "several layers open"
    return [
        *(
            Case(name, group, partial(_spoiled_with_several_open, spoil))
            for name, spoil in spoils.items()
        ),
        Case(f"exception in a loader, {group}", group, acts.broken_loader_with_several_open),
    ]


def _rolled_back() -> list[Case]:
    faults = {
        "NaN": _late(inputs.LATE["NaN"]),
        "exception: last tensor": _raising(-1),
        "exception: inside an open layer": _raising_before("k_proj.weight"),
    }
    return [
        Case(
            f"{name}, rolled back",
            "rollback",
            partial(_spoiled, make, on_failure="rollback"),
            (OLD,),
        )
        for name, make in faults.items()
    ]


def _loaders() -> list[Case]:
    group = "exception in vLLM"
    return [
        Case("exception in a loader", group, acts.broken_loader),
        Case(
            "exception in one rank's loader",
            group,
            partial(acts.broken_loader, rank=1),
            engines=("tensor parallel",),
        ),
    ]


# ------------------------------------------------------------------------------ the processes


def _killed_and_cut(phase: str) -> list[Case]:
    before = phase == "before start"
    return [
        Case(
            f"trainer killed {phase}",
            "SIGKILL",
            partial(acts.trainer, phase, "kill"),
            (OLD,) if before else (POISONED,),
            REMOTE,
        ),
        Case(
            f"worker killed {phase}", "SIGKILL", partial(acts.kill_worker, phase), (GONE,), REMOTE
        ),
        Case(
            f"connection cut {phase}",
            "connection cut",
            partial(acts.cut, phase),
            (OLD, NEW) if before else (POISONED,),  # it may connect anew and go on
            REMOTE,
        ),
    ]


def _stopped(phase: str) -> list[Case]:
    before = phase == "before start"
    return [
        Case(
            f"trainer stopped {phase}",
            "SIGSTOP",
            partial(acts.trainer, phase, "stop"),
            (NEW,) if before else (POISONED,),  # nobody waits for it yet
            REMOTE,
            ALLOWED_BY_TIMEOUT,
        ),
        Case(
            f"worker stopped {phase}",
            "SIGSTOP",
            partial(acts.stop_worker, phase),
            # A worker that reads its messages late reads them all the same.
            (OLD, POISONED) if before else (POISONED,),
            REMOTE,
            # Pausing an engine asks its workers too: the client's timeout, not the channel's.
            CALL_SECONDS + LIMIT_SECONDS if before else ALLOWED_BY_TIMEOUT,
        ),
    ]


def _trainer_fails(phase: str) -> Case:
    return Case(
        f"trainer fails {phase}",
        "exception in the source",
        partial(acts.fault_in_transport, phase),
        (OLD,) if phase == "before start" else (POISONED,),
        EVERYWHERE if phase != "before commit" else REMOTE,
    )


def _wrong_use() -> list[Case]:
    group = "wrong use"
    return [
        Case("doubled start", group, acts.doubled_start, (NEW,), ("in process",)),
        # Its engine is busy with the first one, which waits for the second: both give up.
        Case("second sync in the middle", group, acts.doubled_start, (NEW, POISONED), REMOTE),
        Case("finish without start", group, acts.finish_without_start, (OLD,)),
        Case("two trainers at once", group, acts.two_trainers, (OLD,), REMOTE),
    ]


def all_cases() -> dict[str, Case]:
    """By name, in the order of tables."""
    found = [
        *_bad_inputs(),
        *_exceptions(),
        *_with_several_layers_open(),
        *_rolled_back(),
        *_loaders(),
        Case("no room for shared memory", "shared memory", acts.no_shared_memory, (OLD,), REMOTE),
        *(case for phase in PHASES for case in _killed_and_cut(phase)),
        *(case for phase in PHASES for case in _stopped(phase)),
        *(_trainer_fails(phase) for phase in PHASES),
        *_wrong_use(),
    ]
    return {case.name: case for case in found}
