"""Runs one case on a live engine and says how it ended."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from support.worker_extension import open_resources

from faults import outcomes as end
from faults.cases import Case
from faults.engines import NEW, OLD, FaultEngine
from faults.injectors import Injection
from faults.outcomes import Outcome, one_line
from faults.triggers import InjectedFault
from qerl_sync import PoisonedError, SyncError
from qerl_sync.serving.processes import descendants
from qerl_sync.wire import segments

# Sockets and threads of a connection end a moment after it.
SETTLE_SECONDS = 20.0  # waited for only where something is left


def judge(engine: FaultEngine, case: Case) -> Outcome:
    """Break a sync, look, heal, look again. The engine is on version OLD before and after."""
    outcome = Outcome(
        str(engine.spec), case.name, expected=case.expected, allowed_seconds=case.allowed_seconds
    )
    before, watch = inventory(engine), VersionWatch(engine)
    injection = case.inject(engine)
    try:
        _judge(engine, case, injection, outcome, before, watch)
    finally:
        for pid in injection.survivors:
            os.kill(pid, signal.SIGKILL)
    return outcome


def _judge(
    engine: FaultEngine,
    case: Case,
    injection: Injection,
    outcome: Outcome,
    before: Any,
    watch: VersionWatch,
) -> None:
    outcome.error, outcome.note = one_line(injection.error), injection.note
    outcome.detection_seconds = injection.detection_seconds
    outcome.ended, outcome.after = classify(engine, injection, case)
    injection.error = None  # its traceback holds on to what it has seen
    if outcome.ended == end.GONE:
        engine.restart()
        watch.begin()
    watch.look()
    outcome.healed = heals(engine, watch)
    outcome.version_faults = watch.found
    if outcome.ended == end.GONE:  # another process: what it has open is not the old one's
        now = inventory(engine)
        before |= {who: now[who] for who in before if who.startswith("worker")}
    outcome.leaks = leaks(engine, before, (os.getpid(), *injection.pids))


def classify(engine: FaultEngine, injection: Injection, case: Case) -> tuple[str, str]:
    """How it ended, and what becomes of requests."""
    error = injection.error
    try:
        states = engine.state()
    except Exception:
        reported = isinstance(error, SyncError) and end.GONE in case.expected
        return (end.GONE if reported else end.CRASH), ""
    if not isinstance(error, str | SyncError | InjectedFault | None):
        return end.UNNAMED, ""
    if open_layers := [line for state in states for line in state["unfinished"]]:
        return f"left open: {open_layers[0]}", ""
    if not any(state["poisoned"] for state in states):
        return _by_weights(engine)
    # One rank that does not run keeps all from it.
    if not (isinstance(error, BaseException) or engine.outlives_trainers):
        # A paused engine whose trainer has died lets requests wait, and a `LLM` waits with them.
        return end.POISONED, "waits"
    how, words = engine.answer()
    if how == "waits":
        return end.HANG, how
    said_why = PoisonedError.__name__ in words or "does not generate" in words
    return (end.POISONED if said_why else end.SERVES), how


def _by_weights(engine: FaultEngine) -> tuple[str, str]:
    version = engine.version_held()
    if version is None:
        return end.WRONG, ""
    how, words = engine.answer()
    if "does not generate" in words:  # the workers have committed, and the trainer does not know
        return end.POISONED, how
    if how != "answers":
        return f"exact, but {how}: {words[:80]}", how
    if not engine.generates_as(version):
        return end.WRONG, how
    return (end.HOLDS_NEW if version == NEW else end.HOLDS_OLD), how


def heals(engine: FaultEngine, watch: VersionWatch) -> bool:
    """Return whether full syncs from here on are exactly right: weights and generations. `watch`
    looks at their versions."""
    for version in (NEW, OLD):
        engine.push(version)
        watch.look_after_sync()
        right = engine.version_held() == version and engine.generates_as(version)
        if not right or any(s["unfinished"] or s["poisoned"] for s in engine.state()):
            return False
    return True


class VersionWatch:
    """Holds what each rank has committed against what it had when it was last looked at: weight
    versions only move forwards.

    Attributes:
        found: what went wrong, in words.
    """

    def __init__(self, engine: FaultEngine) -> None:
        self.found: list[str] = []
        self._engine = engine
        self.begin()

    def begin(self) -> None:
        """Count versions from here: the engine was started, perhaps in another process."""
        self._last = [state["version"] for state in self._engine.state()]

    def look(self) -> None:
        """Complain about versions that are lower than before."""
        self._compare("went back", lambda was, now: now >= was)

    def look_after_sync(self) -> None:
        """Complain about versions that are not higher than before, or differ by rank."""
        self._compare("did not rise with a good sync", lambda was, now: now > was)
        if len(set(self._last)) > 1:
            self.found.append(f"ranks are on versions {self._last} after a good sync")

    def _compare(self, what: str, is_right: Callable[[int, int], bool]) -> None:
        before = self._last
        self.begin()
        for rank, (was, has) in enumerate(zip(before, self._last, strict=True)):
            if not is_right(was, has):
                self.found.append(f"the version of worker {rank} {what}: {was} -> {has}")


# -------------------------------------------------------------------------------------- leaks


def inventory(engine: FaultEngine) -> dict[str, dict[str, int]]:
    """What trainer and workers have open, and the shared memory of each process."""
    gc.collect()  # errors and their tracebacks are cycles
    ranks = {f"worker {rank}": state["resources"] for rank, state in enumerate(engine.state())}
    shared = (path.name for path in segments.DIRECTORY.glob(f"*{segments.PREFIX}*"))
    return {
        "trainer": {**open_resources(), "processes": len(descendants(os.getpid()))},
        **ranks,
        "/dev/shm": dict.fromkeys(shared, 1),
    }


def leaks(engine: FaultEngine, before: Any, owners: tuple[int, ...] = ()) -> list[str]:
    """What is there now and was not before, once it had time to go.

    Args:
        owners: processes whose shared memory it may be.
    """
    ours = tuple(f"{segments.PREFIX}{pid}-" for pid in owners)
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        found = [
            f"{who}: {what} {before[who].get(what, 0)} -> {count}"
            for who, counts in inventory(engine).items()
            for what, count in counts.items()
            if count > before[who].get(what, 0)
            and (who != "/dev/shm" or any(prefix in what for prefix in ours))
        ]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)
