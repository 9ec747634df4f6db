"""Random schedules of faults, good syncs and new sessions on one engine: a state machine."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from faults import oracle
from faults import outcomes as end
from faults.cases import all_cases
from faults.engines import NEW, OLD, FaultEngine
from faults.triggers import FaultySource

STEPS = 8
# Killing and stopping take seconds, and a new engine: not here.
LEFT_OUT = ("SIGKILL", "SIGSTOP")


def run_schedules(engine: FaultEngine, number: int, seed: int) -> dict[str, Any]:
    """Return what was done, and `failure`: the shortest schedule that broke a promise, or ""."""
    counts: Counter[str] = Counter()
    before = oracle.inventory(engine)
    limits = settings(
        max_examples=number,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    failure = ""
    try:
        run_state_machine_as_test(seeded(seed)(_machine(engine, counts)), settings=limits)
    except Exception as exc:
        failure = "\n".join([f"{type(exc).__name__}: {exc}", *getattr(exc, "__notes__", [])])
    if not failure:
        engine.push(OLD)
        failure = "; ".join(oracle.leaks(engine, before))
    names = ("schedules", "steps", "faults", "syncs")
    return {"seed": seed, "failure": failure, **{name: counts[name] for name in names}}


def _machine(engine: FaultEngine, counts: Counter[str]) -> Any:
    cases = {
        name: case
        for name, case in all_cases().items()
        if case.suits(engine.spec) and case.group not in LEFT_OUT
    }
    versions = st.sampled_from([OLD, NEW])

    class Syncs(RuleBasedStateMachine):
        """`version` is what must be held; None: poisoned."""

        session: Any = None

        @initialize()
        def begin(self) -> None:
            counts["schedules"] += 1
            self.watch = oracle.VersionWatch(engine)
            self.push_anew(OLD)

        @rule(version=versions)
        def push_anew(self, version: int) -> None:
            """A session of its own, beside none."""
            self.teardown()
            engine.push(version)
            self.synced(version)

        @rule(version=versions)
        def open(self, version: int) -> None:
            self.teardown()
            self.session = engine.session(FaultySource(engine.tensors[version]))
            self.pushing = version

        @precondition(lambda self: self.session is not None)
        @rule()
        def push_again(self) -> None:
            """The same session, whatever happened to the engine since."""
            self.session.push()
            self.synced(self.pushing)

        @rule(name=st.sampled_from(list(cases)))
        def fault(self, name: str) -> None:
            if not engine.in_process:
                self.teardown()  # two trainers at once are a case of their own
            case = cases[name]
            counts["faults"] += 1
            injection = case.inject(engine)
            ended, _ = oracle.classify(engine, injection, case)
            allowed = {*case.expected}
            if self.version is None:  # it stays poisoned, and may not serve the old weights
                allowed = allowed - {end.HOLDS_OLD} | {end.POISONED}
            if self.version == NEW and end.HOLDS_OLD in allowed:  # refused before the first byte
                allowed.add(end.HOLDS_NEW)
            assert ended in allowed, f"{name}: {ended} (allowed: {allowed}); {injection.error!r}"
            self.version = {end.HOLDS_OLD: OLD, end.HOLDS_NEW: NEW}.get(ended)

        @invariant()
        def holds_what_it_should(self) -> None:
            counts["steps"] += 1
            states = engine.state()
            assert not any(state["unfinished"] for state in states)
            self.watch.look()
            assert not self.watch.found, "; ".join(self.watch.found)
            assert {bool(state["poisoned"]) for state in states} == {self.version is None}
            if self.version is not None:
                assert engine.version_held() == self.version

        def synced(self, version: int) -> None:
            counts["syncs"] += 1
            self.version: int | None = version
            self.watch.look_after_sync()
            assert engine.version_held() == version
            assert engine.generates_as(version)

        def teardown(self) -> None:
            if self.session is not None:
                self.session.close()
            self.session = None

    return Syncs
