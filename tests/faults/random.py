"""Random schedules of faults, good syncs and new sessions on one engine: a state machine."""

from __future__ import annotations

from collections import Counter
from typing import Any

from faults import judge
from faults import outcomes as end
from faults.cases import all_cases
from faults.subjects import NEW, OLD, Subject
from faults.triggers import Checkpoint
from faults.versions import VersionWatch
from qerl_sync.errors import ConfigError

STEPS = 8
# Killing and stopping take seconds, and a new engine: not here.
LEFT_OUT = ("SIGKILL", "SIGSTOP")


def run_schedules(subject: Subject, number: int, seed: int) -> dict[str, Any]:
    """Returns what was done, and `failure`: the shortest schedule that broke a promise, or "".

    Raises:
        ConfigError: Hypothesis is not installed.
    """
    try:
        from hypothesis import HealthCheck, settings
        from hypothesis import seed as seeded
        from hypothesis.stateful import run_state_machine_as_test
    except ImportError as exc:
        raise ConfigError("random schedules need Hypothesis: pip install hypothesis") from exc
    counts: Counter[str] = Counter()
    before = judge.inventory(subject)
    machine = seeded(seed)(_machine(subject, counts, VersionWatch(subject)))
    limits = settings(
        max_examples=number,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    failure = ""
    try:
        run_state_machine_as_test(machine, settings=limits)
    except Exception as exc:
        notes = getattr(exc, "__notes__", [])
        failure = "\n".join([f"{type(exc).__name__}: {exc}", *notes])
    if not failure:
        subject.push(OLD)
        failure = "; ".join(judge.leaks(subject, before, []))
    names = ("schedules", "steps", "faults", "syncs")
    return {"seed": seed, "failure": failure, **{name: counts[name] for name in names}}


def _machine(subject: Subject, counts: Counter[str], watch: VersionWatch) -> Any:
    from hypothesis import strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

    cases = [
        name
        for name, case in all_cases().items()
        if case.suits(subject.spec) and case.group not in LEFT_OUT
    ]

    class Syncs(RuleBasedStateMachine):
        """`version` is what must be held; None: poisoned. `watch` looks at weight versions."""

        @initialize()
        def begin(self) -> None:
            counts["schedules"] += 1
            watch.found.clear()
            watch.begin()
            subject.push(OLD)
            watch.look_after_sync()
            self.version: int | None = OLD
            self.session: Any = None
            self.pushing = OLD

        @rule(version=st.sampled_from([OLD, NEW]))
        def push_anew(self, version: int) -> None:
            """A session of its own, beside none."""
            self._close()
            subject.push(version)
            self._synced(version)

        @rule(version=st.sampled_from([OLD, NEW]))
        def open(self, version: int) -> None:
            self._close()
            self.session, self.pushing = (
                subject.session(Checkpoint(subject.tensors[version])),
                version,
            )

        @precondition(lambda self: self.session is not None)
        @rule()
        def push_again(self) -> None:
            """The same session, whatever happened to the engine since."""
            self.session.push()
            self._synced(self.pushing)

        @rule(name=st.sampled_from(cases))
        def fault(self, name: str) -> None:
            if subject.remote:
                self._close()  # two trainers at once are a case of their own
            case = all_cases()[name]
            counts["faults"] += 1
            acted = case.act(subject)
            ended, _ = judge.classify(subject, acted, case)
            if ended == end.OLD and self.version is None:
                raise AssertionError(f"{name}: the engine was poisoned, and serves")
            was_poisoned = self.version is None and ended == end.POISONED
            assert ended in case.expected or was_poisoned or self._is_unchanged(ended, case), (
                f"{name}: {ended} (allowed: {case.expected}); {acted.error!r}"
            )
            self.version = {end.OLD: OLD, end.NEW: NEW}.get(ended)

        @invariant()
        def holds_what_it_should(self) -> None:
            counts["steps"] += 1
            states = subject.state()
            assert not any(state["unfinished"] for state in states)
            watch.look()
            assert not watch.found, "; ".join(watch.found)
            assert {bool(state["poisoned"]) for state in states} == {self.version is None}
            if self.version is not None:
                assert subject.version_held() == self.version

        def teardown(self) -> None:
            self._close()

        def _is_unchanged(self, ended: str, case: Any) -> bool:
            """Refused before the first byte, on an engine that was on NEW."""
            return end.OLD in case.expected and ended == end.NEW and self.version == NEW

        def _synced(self, version: int) -> None:
            counts["syncs"] += 1
            self.version = version
            watch.look_after_sync()
            assert subject.version_held() == version
            assert subject.judge_generation(version)

        def _close(self) -> None:
            if getattr(self, "session", None) is not None:
                self.session.close()
            self.session = None

    return Syncs
