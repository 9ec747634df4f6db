"""Runs one case on a live engine and says how it ended."""

from __future__ import annotations

import gc
import os
import time
from contextlib import suppress
from typing import Any

from faults import outcomes as end
from faults.acts import Acted
from faults.cases import Case
from faults.extension import own_inventory
from faults.outcomes import Outcome
from faults.subjects import NEW, OLD, Subject
from faults.triggers import InjectedFault
from faults.versions import VersionWatch
from qerl_sync.errors import PoisonedError, SyncError
from qerl_sync.serving.processes import descendants
from qerl_sync.wire import segments

# Sockets and threads of a connection end a moment after it.
SETTLE_SECONDS = 5.0


def run(subject: Subject, case: Case) -> Outcome:
    """Break a sync, look, heal, look again. The engine is on version OLD before and after."""
    outcome = Outcome(
        str(subject.spec),
        case.name,
        expected=case.expected,
        allowed_seconds=case.allowed_seconds,
    )
    before, watch = inventory(subject), VersionWatch(subject)
    acted = case.act(subject)
    outcome.error, outcome.note = _words(acted.error), acted.note
    outcome.detection_seconds = acted.detection_seconds
    outcome.ended, outcome.after = classify(subject, acted, case)
    acted.error = None  # its traceback holds on to what it has seen
    if outcome.ended == end.GONE:
        subject.restart()
        watch.begin()
    watch.look()
    outcome.healed = heals(subject, watch)
    outcome.version_faults = watch.found
    if outcome.ended == end.GONE:  # another process: what it has open is not the old one's
        before = {**before, "worker": inventory(subject)["worker"]}
    outcome.leaks = leaks(subject, before, [os.getpid(), *acted.pids])
    return outcome


def classify(subject: Subject, acted: Acted, case: Case) -> tuple[str, str]:
    """How it ended, and what becomes of requests."""
    try:
        states = subject.state()
    except Exception:
        named = isinstance(acted.error, SyncError)
        return (end.GONE if named and end.GONE in case.expected else end.CRASH), ""
    if not _is_named(acted):
        return end.UNNAMED, ""
    if open_layers := [line for state in states for line in state["unfinished"]]:
        return f"left open: {open_layers[0]}", ""
    poisoned = [bool(state["poisoned"]) for state in states]
    if any(poisoned):  # one rank that does not run keeps all from it
        if not _may_ask(subject, acted):
            return end.POISONED, "waits"
        how, words = subject.answer()
        if how == "waits":
            return end.HANG, how
        said_why = PoisonedError.__name__ in words or "does not generate" in words
        return (end.POISONED if said_why else end.SERVES), how
    return _by_weights(subject)


def heals(subject: Subject, watch: VersionWatch) -> bool:
    """Whether full syncs from here on are exactly right: weights and generations. `watch` looks at
    their versions."""
    for version in (NEW, OLD):
        subject.push(version)
        watch.look_after_sync()
        right = subject.version_held() == version and subject.judge_generation(version)
        if not right or any(s["unfinished"] or s["poisoned"] for s in subject.state()):
            return False
    return True


def inventory(subject: Subject) -> dict[str, Any]:
    """What trainer and workers have open."""
    gc.collect()  # errors and their tracebacks are cycles
    worker = subject.state()
    return {
        "trainer": {**own_inventory(), "processes": len(descendants(os.getpid()))},
        "worker": [{name: state[name] for name in (*own_inventory(), "hooks")} for state in worker],
        "segments": sorted(p.name for p in segments.DIRECTORY.glob(f"*{segments.PREFIX}*")),
    }


def leaks(subject: Subject, before: dict[str, Any], owners: list[int]) -> list[str]:
    """What is there now and was not before, once it had time to go.

    Args:
        owners: processes whose shared memory it may be.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while (found := _grown(before, inventory(subject), owners)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def _grown(before: dict[str, Any], now: dict[str, Any], owners: list[int]) -> list[str]:
    found = [
        f"/dev/shm/{name}"
        for name in now["segments"]
        if name not in before["segments"]
        and any(f"{segments.PREFIX}{pid}-" in name for pid in owners)
    ]
    pairs = [("trainer", before["trainer"], now["trainer"])]
    for rank, (was, has) in enumerate(zip(before["worker"], now["worker"], strict=True)):
        pairs.append((f"worker {rank}", was, has))
    for who, was, has in pairs:
        found += [f"{who}: {n} {was[n]} -> {has[n]}" for n in has if has[n] > was[n]]
    return found


def _by_weights(subject: Subject) -> tuple[str, str]:
    version = subject.version_held()
    if version is None:
        return end.WRONG, ""
    how, words = subject.answer()
    if "does not generate" in words:  # the workers have committed, and the trainer does not know
        return end.POISONED, how
    if how != "answers":
        return f"exact, but {how}: {words[:80]}", how
    if not subject.judge_generation(version):
        return end.WRONG, how
    return (end.NEW if version == NEW else end.OLD), how


def _may_ask(subject: Subject, acted: Acted) -> bool:
    """A paused engine whose trainer is dead lets requests wait, and a `LLM` waits with them."""
    trainer_lives = isinstance(acted.error, BaseException)
    return trainer_lives or subject.outlives_trainers


def _is_named(acted: Acted) -> bool:
    error = acted.error
    return error is None or isinstance(error, str | SyncError | InjectedFault)


def _words(error: BaseException | str | None) -> str:
    if error is None:
        return ""
    with suppress(Exception):
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        return " ".join(text.split())[:300]
    return type(error).__name__
