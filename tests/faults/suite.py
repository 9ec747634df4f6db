"""Runs cases on engines, each engine in a process that may crash and hang."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from support.remote import import_path

from faults.cases import all_cases
from faults.engines import ENGINES, Spec
from faults.outcomes import CRASH, GONE, HANG, OURS, STOCK, Outcome, one_line
from qerl_sync import ConfigError, SyncError
from qerl_sync.serving.guard import kill
from qerl_sync.serving.processes import members

START_SECONDS = 300.0
CASE_SECONDS = 120.0
STOCK_SECONDS = 30.0
SCHEDULE_SECONDS = 60.0

SPECS = tuple(
    Spec(engine, model, kernels)
    for engine, kernels, models in (
        ("in process", "stock", ("dense", "bias", "tied", "moe", "fp8")),
        ("in process", "plain", ("dense", "bias", "tied", "moe")),
        ("own process", "stock", ("dense", "moe")),
        ("server", "stock", ("dense",)),
        ("tensor parallel", "stock", ("tied",)),
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


@dataclass
class Suite:
    """What to run.

    Args:
        patterns: fnmatch patterns of cases.
        log: what engines print.
        stock: break vLLM's own reload too.
        note: told of each outcome, and of what happens in between.
    """

    specs: Sequence[Spec]
    patterns: Sequence[str]
    log: Path
    stock: bool = False
    note: Callable[[str], None] = lambda text: None

    def run(self) -> Iterator[Outcome]:
        """Raises ConfigError where there is nothing to run."""
        if not any(self._cases(spec, OURS) for spec in self.specs):
            raise ConfigError(
                f"no case is called {', '.join(self.patterns)} on these engines; there are "
                + ", ".join(all_cases())
            )
        for spec in self.specs:
            yield from self._run_on(spec, OURS)
            if self.stock and spec.engine == "in process":
                yield from self._run_on(spec, STOCK)

    def _cases(self, spec: Spec, by: str) -> list[str]:
        return [
            name
            for name, case in all_cases().items()
            if case.suits(spec)
            and any(fnmatchcase(name, pattern) for pattern in self.patterns)
            and (by == OURS or case.stock is not None)
        ]

    def _run_on(self, spec: Spec, by: str) -> Iterator[Outcome]:
        left = self._cases(spec, by)
        while left:  # each time on a new engine, which gets as far as it gets: one case at least
            self.note(f"starting {spec}")
            with Host(spec, self.log, cases=left, by=by) as host:
                for outcome in _outcomes(host, by):
                    left = left[1:]
                    self.note(f"{by}, {spec}: {outcome.case}: {outcome.ended}")
                    yield outcome


def _outcomes(host: Host, by: str) -> Iterator[Outcome]:
    """Those of one engine, to its last case or the first that ends the host."""
    while True:
        try:
            case = all_cases()[host.next(START_SECONDS)]
        except SyncError:  # its end
            return
        seconds = CASE_SECONDS if by == OURS else STOCK_SECONDS
        if GONE in case.expected:  # it is healed with a new engine
            seconds += START_SECONDS
        outcome = Outcome(str(host.spec), case.name, by, expected=case.expected, healed=False)
        try:
            yield host.next(seconds)
            continue
        except TimeoutError:
            outcome.ended = HANG
        except SyncError as exc:
            outcome.ended, outcome.error = CRASH, one_line(exc)
        yield outcome
        return


def run_random(spec: Spec, number: int, seed: int, log: Path) -> dict[str, Any]:
    """See `schedules.run_schedules`; in the engine's own process."""
    with Host(spec, log, number=number, seed=seed) as host:
        return dict(host.next(CASE_SECONDS + SCHEDULE_SECONDS * number))


class Host:
    """The process of `faults.host`, and all that it starts.

    Raises:
        SyncError: the engine does not start.
    """

    def __init__(self, spec: Spec, log: Path, **told: Any) -> None:
        self.spec, self._log = spec, log
        self._pipe, there = Pipe()
        with log.open("ab") as output, there:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "faults.host", str(there.fileno())],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": import_path()},
                start_new_session=True,
            )
        self._pipe.send((spec, told))

    def next(self, timeout_seconds: float) -> Any:
        """What it says next.

        Raises:
            TimeoutError: it says nothing.
            SyncError: it has ended.
        """
        if not self._pipe.poll(timeout_seconds):
            raise TimeoutError(f"{self.spec} says nothing for {timeout_seconds:g} s")
        try:
            return self._pipe.recv()
        except (EOFError, OSError) as exc:
            words = " ".join(self._log.read_text(errors="replace").strip().splitlines()[-3:])
            raise SyncError(
                f"the process that breaks {self.spec} ended; the end of {self._log}: {words}"
            ) from exc

    def __enter__(self) -> Host:
        try:
            self.next(START_SECONDS)
        except BaseException:
            self._end(0)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        # It has a moment to stop its engines.
        self._end(20 if exc[0] is None else 0.1)

    def _end(self, seconds: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        self._pipe.close()
        kill(members(self._process.pid))
        self._process.wait()
