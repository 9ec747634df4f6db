"""Every fault, where it makes sense, and how it may end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from faults import injectors, spoilers
from faults.engines import CALL_SECONDS, TIMEOUT_SECONDS, FaultEngine, Spec
from faults.injectors import Injection
from faults.outcomes import GONE, HOLDS_NEW, HOLDS_OLD, LIMIT_SECONDS, POISONED
from faults.spoilers import Pairs, Spoil, victim_of
from faults.triggers import PHASES

REMOTE = ("own process", "server", "tensor parallel", "data parallel")
EVERYWHERE = ("in process", *REMOTE)
ALLOWED_BY_TIMEOUT = TIMEOUT_SECONDS + LIMIT_SECONDS

# What a bad input is: the tensors as the metadata tell them, and what spoils the stream after that.
Input = Callable[[FaultEngine], tuple[Pairs, "Spoil | None"]]


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        group: what schedules leave out is left out by group.
        inject: breaks a sync of version NEW and comes back.
        expected: how it may end.
        engines, models, kernels: on which it makes sense; no models: on all.
        allowed_seconds: see `Outcome`.
        stock: the input with which vLLM's own reload meets the same fault; None where it has
            nothing of the kind.
    """

    name: str
    group: str
    inject: Callable[[FaultEngine], Injection]
    expected: tuple[str, ...] = (POISONED,)
    engines: tuple[str, ...] = EVERYWHERE
    allowed_seconds: float = LIMIT_SECONDS
    stock: Input | None = None
    models: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ("stock", "plain")

    def suits(self, spec: Spec) -> bool:
        return (
            spec.engine in self.engines
            and (not self.models or spec.model in self.models)
            and spec.kernels in self.kernels
        )


@cache
def all_cases() -> dict[str, Case]:
    """By name, in the order of tables."""
    found = [*_inputs(), *_with_several_layers_open(), *_rolled_back(), *_others(), *_images()]
    return {case.name: case for case in found}


# ------------------------------------------------------------------------------- bad inputs


def _announced(change: Callable[[Pairs, str], Pairs], part: str = "gate_proj.weight") -> Input:
    return lambda engine: (change(engine.pairs, victim_of(engine.tensors[0], part)), None)


def _late(change: Any, part: str = "gate_proj.weight", layer: int = 1) -> Input:
    return lambda engine: (
        engine.pairs,
        spoilers.replaced(victim_of(engine.tensors[0], part, layer), change),
    )


def _failing(place: Callable[[int], int]) -> Input:
    """`place` chooses a tensor, given how many there are."""
    return lambda engine: (engine.pairs, spoilers.failing_at(place(len(engine.pairs))))


def _beyond_range(engine: FaultEngine) -> tuple[Pairs, Spoil]:
    """float64 is no fault, vLLM casts it; it reaches further than what engines compute in."""
    pairs, _ = _announced(spoilers.changed(lambda t: t.double()))(engine)
    huge = spoilers.with_value(1e39)
    return pairs, spoilers.replaced(victim_of(engine.tensors[0]), lambda n, t: [(n, huge(t))])


def _spoiled(given: Input, engine: FaultEngine, **options: Any) -> Injection:
    pairs, spoil = given(engine)
    return injectors.push(engine, pairs=pairs, spoil=spoil, **options)


def _inputs() -> Iterator[Case]:
    def case(name: str, given: Input, *expected: str, group: str = "input", **more: Any) -> Case:
        return Case(name, group, partial(_spoiled, given), expected, stock=given, **more)

    for name, change in spoilers.ANNOUNCED.items():
        yield case(name, _announced(change), HOLDS_OLD)
    norm, bias = "post_attention_layernorm.weight", "q_proj.bias"
    yield case("missing norm", _announced(spoilers.without, norm), HOLDS_OLD)
    yield case("missing bias", _announced(spoilers.without, bias), HOLDS_OLD, models=("bias",))
    for name, replacement in spoilers.LATE.items():
        yield case(name, _late(replacement), POISONED)
    yield case("beyond the range of the engine's dtype", _beyond_range, POISONED)
    # Where tensors are staged the memory is the source's again with the next tensor.
    yield case(
        "receive buffer used again",
        lambda engine: (engine.pairs, spoilers.reusing_its_buffer),
        POISONED,
        HOLDS_NEW,
    )
    # To engines elsewhere a chunk travels whole: nothing has left.
    yield case("exception: first tensor", _failing(lambda total: 0), HOLDS_OLD, POISONED)
    for where, given in {
        "middle tensor": _failing(lambda total: total // 2),
        "last tensor": _failing(lambda total: total - 1),
        "inside an open layer": _late(spoilers.fail, "k_proj.weight"),
        "on a layer's boundary": _late(spoilers.fail, "o_proj.weight"),
    }.items():
        yield case(f"exception: {where}", given, POISONED)


def _with_several_layers_open() -> Iterator[Case]:
    """To engines elsewhere a chunk travels whole, and it ends where no layer is open: what its
    source gets wrong is found before the worker opens a layer. It is NaN and the loader's exception
    that find several open there too. With plain kernels parent layers are written straight to
    their live storage, and none is ever open."""

    def inject(change: Any, engine: FaultEngine) -> Injection:
        # All query parts have come by then, and no layer's attention is whole.
        victim = victim_of(engine.tensors[0], "v_proj.weight", 0)
        spoil = spoilers.replaced(victim, change)
        return injectors.push(engine, spoil=spoil, open_at=victim, **injectors.SEVERAL_OPEN)

    for name, change in {
        "exception: several layers open": spoilers.fail,
        "missing in the stream, several layers open": spoilers.LATE["missing in the stream"],
        "NaN, several layers open": spoilers.LATE["NaN"],
    }.items():
        yield Case(name, "several open", partial(inject, change), kernels=("stock",))
    yield Case(
        "exception in a loader, several layers open",
        "several open",
        injectors.broken_loader_with_several_open,
        kernels=("stock",),
    )


def _rolled_back() -> Iterator[Case]:
    for name, given in {
        "NaN": _late(spoilers.LATE["NaN"]),
        "exception: last tensor": _failing(lambda total: total - 1),
        "exception: inside an open layer": _late(spoilers.fail, "k_proj.weight"),
    }.items():
        inject = partial(_spoiled, given, on_failure="rollback")
        yield Case(f"{name}, rolled back", "rollback", inject, (HOLDS_OLD,))


# ------------------------------------------------------------------- processes, and wrong use


def _others() -> Iterator[Case]:
    yield Case("exception in a loader", "vLLM", injectors.broken_loader)
    one_rank = partial(injectors.broken_loader, rank=1)
    yield Case("exception in one rank's loader", "vLLM", one_rank, engines=("tensor parallel",))
    yield Case(
        "no room for shared memory", "memory", injectors.no_shared_memory, (HOLDS_OLD,), REMOTE
    )
    # Only where connections are plain does the harness know how to lie about hosts and tokens.
    on_the_network, in_memory = injectors.damaged_on_the_network, injectors.damaged_in_shared_memory
    apart = ("own process", "tensor parallel")
    yield Case("bit flipped on the network", "damage", on_the_network, engines=apart)
    yield Case("bit flipped in shared memory", "damage", in_memory, engines=REMOTE)
    for phase in PHASES:
        yield from _killed_and_cut(phase)
    for phase in PHASES:
        yield from _stopped(phase)
    for phase in PHASES:
        yield Case(
            f"trainer fails {phase}",
            "exception",
            partial(injectors.fail_trainer, phase),
            (HOLDS_OLD,) if phase == "before start" else (POISONED,),
            EVERYWHERE if phase != "before commit" else REMOTE,
        )
    twice = injectors.doubled_start
    yield Case("doubled start", "use", twice, (HOLDS_NEW,), ("in process",))
    # Its engine is busy with the first one, which waits for the second: both give up.
    yield Case("second sync in the middle", "use", twice, (HOLDS_NEW, POISONED), REMOTE)
    yield Case("finish without start", "use", injectors.finish_without_start, (HOLDS_OLD,))
    yield Case("two trainers at once", "use", injectors.two_trainers, (HOLDS_OLD,), REMOTE)
    second = injectors.second_live_trainer
    yield Case("second trainer in another process", "use", second, (HOLDS_NEW,), REMOTE)
    yield Case("buffer lost its parameter", "vLLM", injectors.lost_view, (HOLDS_NEW,), REMOTE)
    stale = injectors.stale_connector
    yield Case("KV connector keeps its cache", "vLLM", stale, engines=("KV connector",))


def _images() -> Iterator[Case]:
    """In the embeddings of an image, which the engine keeps, no two towers may meet."""

    def case(name: str, inject: Callable[[FaultEngine], Injection], *expected: str) -> Case:
        return Case(name, "images", inject, expected, ("multimodal",))

    yield case("only the vision tower changes", injectors.push, HOLDS_NEW)
    part, layer = "mlp.fc1.weight", 0
    nan = partial(_spoiled, _late(spoilers.LATE["NaN"], part, layer))
    broken = partial(_spoiled, _late(spoilers.fail, part, layer))
    back = {"on_failure": "rollback"}
    yield case("NaN in the vision tower", nan, POISONED)
    yield case("exception in the vision tower", broken, POISONED)
    yield case("exception in the vision tower, rolled back", partial(broken, **back), HOLDS_OLD)
    yield case("encoder cache is not emptied", injectors.stale_embeddings, POISONED)


def _killed_and_cut(phase: str) -> Iterator[Case]:
    before = phase == "before start"
    ends = (HOLDS_OLD,) if before else (POISONED,)
    trainer = partial(injectors.signal_trainer, phase, "kill")
    yield Case(f"trainer killed {phase}", "SIGKILL", trainer, ends, REMOTE)
    forked = partial(injectors.signal_trainer, phase, "orphan")
    name = f"trainer killed {phase}, its forked child alive"
    yield Case(name, "SIGKILL", forked, ends, REMOTE)
    worker = partial(injectors.kill_worker, phase)
    yield Case(f"worker killed {phase}", "SIGKILL", worker, (GONE,), REMOTE)
    # Before the start it may connect anew and go on.
    ends = (HOLDS_OLD, HOLDS_NEW) if before else (POISONED,)
    yield Case(f"connection cut {phase}", "cut", partial(injectors.cut, phase), ends, REMOTE)


def _stopped(phase: str) -> Iterator[Case]:
    before = phase == "before start"
    yield Case(
        f"trainer stopped {phase}",
        "SIGSTOP",
        partial(injectors.signal_trainer, phase, "stop"),
        (HOLDS_NEW,) if before else (POISONED,),  # nobody waits for it yet
        REMOTE,
        ALLOWED_BY_TIMEOUT,
    )
    yield Case(
        f"worker stopped {phase}",
        "SIGSTOP",
        partial(injectors.stop_worker, phase),
        # A worker that reads its messages late reads them all the same.
        (HOLDS_OLD, POISONED) if before else (POISONED,),
        REMOTE,
        # Pausing an engine asks its workers too: the client's timeout, not the channel's.
        CALL_SECONDS + LIMIT_SECONDS if before else ALLOWED_BY_TIMEOUT,
    )
