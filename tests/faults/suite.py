"""Runs cases on engines, each engine in a process that may crash and hang."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from support.forks import import_path, start_program

from faults.cases import all_cases
from faults.engines import ENGINES, Spec
from faults.outcomes import CRASH, GONE, HANG, OURS, STOCK, Ended, Outcome, one_line
from qerl_sync import ConfigError, SyncError
from qerl_sync.serving.guard import kill
from qerl_sync.serving.processes import members

START_SECONDS = 600.0
CASE_SECONDS = 120.0
STOCK_SECONDS = 30.0
SCHEDULE_SECONDS = 60.0
# How many times as long a case gets that seemed to hang: on a busy machine it may have been slow.
PATIENCE = 10

SPECS = tuple(
    Spec(engine, model, kernels)
    for engine, kernels, models in (
        ("in process", "stock", ("dense", "bias", "tied", "moe", "fp8")),
        ("in process", "plain", ("dense", "bias", "tied", "moe")),
        ("own process", "stock", ("dense", "moe")),
        ("server", "stock", ("dense",)),
        ("tensor parallel", "stock", ("tied",)),
        ("data parallel", "stock", ("dense",)),
        ("KV connector", "stock", ("dense",)),
        ("multimodal", "stock", ("vision",)),
    )
    for model in models
)


def chosen_specs(wanted: Sequence[str]) -> list[Spec]:
    """Those of `SPECS` on these engines; one that is written in full need not be among them.

    Raises:
        ConfigError: there is none, or one that is written in full is not possible.
    """
    found = [spec for spec in SPECS if not wanted or spec.engine in wanted]
    found += [Spec.parse(text) for text in wanted if text.count("/") == 2]
    if not found:
        raise ConfigError(
            f"there is no engine {', '.join(wanted)}; choose from {', '.join(ENGINES)}, or one "
            "such as 'own process/moe/stock'"
        )
    for spec in found:
        spec.require_possible()
    return found


def run_suite(
    specs: Sequence[Spec],
    patterns: Sequence[str],
    log: Path,
    *,
    stock: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[Outcome]:
    """Run cases on engines, and yield each outcome as it comes.

    Args:
        patterns: fnmatch patterns of cases.
        log: what engines print.
        stock: break vLLM's own reload too, beside ours in process.
        note: told of each outcome, and of what happens in between.

    Raises:
        ConfigError: there is nothing to run.
        SyncError: an engine does not start.
    """
    matching = [c for c in all_cases().values() if any(fnmatchcase(c.name, p) for p in patterns)]
    if not any(case.suits(spec) for spec in specs for case in matching):
        raise ConfigError(
            f"no case is called {', '.join(patterns)} on these engines; there are "
            + ", ".join(all_cases())
        )
    runs = [(spec, by) for spec in specs for by in (OURS, STOCK)]
    for spec, by in runs:
        if by == STOCK and not (stock and spec.engine == "in process"):
            continue
        left = [c.name for c in matching if c.suits(spec) and (by == OURS or c.stock is not None)]
        patience = 1
        while left:  # each time on a new engine, which gets as far as it gets: one case at least
            note(f"starting {spec}")
            with hosted(spec, log, cases=left, by=by) as hear:
                for outcome in _outcomes(spec, by, hear, patience):
                    if outcome.ended == HANG and patience < PATIENCE:
                        note(f"{by}, {spec}: {outcome.case}: no answer; again, with more time")
                        patience = PATIENCE
                        break
                    left = left[1:]
                    note(f"{by}, {spec}: {outcome.case}: {outcome.ended}")
                    yield outcome


def _outcomes(
    spec: Spec, by: str, hear: Callable[[float], Any], patience: int
) -> Iterator[Outcome]:
    """Those of one engine, to its last case or the first that ends its process."""
    while True:
        try:
            case = all_cases()[hear(START_SECONDS)]
        except SyncError:  # its end
            return
        seconds = CASE_SECONDS if by == OURS else STOCK_SECONDS
        if GONE in case.expected:  # it is healed with a new engine
            seconds += START_SECONDS
        outcome = Outcome(str(spec), case.name, by, expected=case.expected, healed=False)
        try:
            yield hear(seconds * patience)
            continue
        except TimeoutError:
            outcome.ended = HANG
        except SyncError as exc:
            outcome.ended, outcome.error = CRASH, one_line(exc)
        yield outcome
        return


def run_random(spec: Spec, number: int, seed: int, log: Path) -> dict[str, Any]:
    """See `schedules.run_schedules`; in the engine's own process."""
    with hosted(spec, log, number=number, seed=seed) as hear:
        return dict(hear(CASE_SECONDS + SCHEDULE_SECONDS * number))


@contextmanager
def hosted(spec: Spec, log: Path, **reported: Any) -> Iterator[Callable[[float], Any]]:
    """Start the process `faults.host` with an engine, and end all that it has started.

    Yields a function that waits so many seconds for what it says next: TimeoutError if it says
    nothing, SyncError if it has ended.
    """
    pipe, there = Pipe()
    with there:
        surroundings = {**os.environ, "PYTHONPATH": import_path()}
        process = start_program("faults.host", there, log=log, environment=surroundings)

    def hear(timeout_seconds: float) -> Any:
        if not pipe.poll(timeout_seconds):
            raise TimeoutError(f"{spec} says nothing for {timeout_seconds:g} s")
        try:
            said = pipe.recv()
        except (EOFError, OSError) as exc:
            words = " ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
            raise SyncError(
                f"the process that breaks {spec} ended; the end of {log}: {words}"
            ) from exc
        if isinstance(said, Ended):
            raise SyncError(f"the process that breaks {spec} ended: {said.error} (see {log})")
        return said

    grace_seconds = 0.1
    try:
        pipe.send((spec, reported))
        hear(START_SECONDS)
        yield hear
        grace_seconds = 20  # to stop its engines
    finally:
        process.join(grace_seconds)
        pipe.close()
        kill(members(process.pid))
        process.join()
