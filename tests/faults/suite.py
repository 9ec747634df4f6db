"""Runs cases on engines, each engine in a process that may crash and hang."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from faults.cases import all_cases
from faults.outcomes import CRASH, GONE, HANG, Outcome
from faults.subjects import SUBJECTS, Spec, environment_of
from qerl_sync.errors import ConfigError, SyncError
from qerl_sync.serving.guard import kill
from qerl_sync.serving.processes import members

TESTS = Path(__file__).resolve().parents[1]
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


@dataclass
class Suite:
    """What to run.

    Args:
        patterns: fnmatch patterns of cases; none: all.
        log: what engines print.
        note: told of each outcome, and of what happens in between.
    """

    specs: Sequence[Spec] = SPECS
    patterns: Sequence[str] = ()
    stock: bool = False
    log: Path | None = None
    note: Callable[[str], None] = lambda text: None
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self) -> list[Outcome]:
        self._require_sensible()
        for spec in self.specs:
            self._run_on(spec, stock=False)
            if self.stock and spec.engine == "in process":
                self._run_on(spec, stock=True)
        return self.outcomes

    def _require_sensible(self) -> None:
        for spec in self.specs:
            spec.require_possible()
        if not any(self._cases(spec, stock=False) for spec in self.specs):
            raise ConfigError(
                f"no case is called {', '.join(self.patterns)} on these engines; there are "
                + ", ".join(all_cases())
            )

    def _cases(self, spec: Spec, *, stock: bool) -> list[str]:
        return [
            case.name
            for case in all_cases().values()
            if case.suits(spec)
            and (not self.patterns or any(fnmatchcase(case.name, p) for p in self.patterns))
            and (case.stock is not None or not stock)
        ]

    def _run_on(self, spec: Spec, *, stock: bool) -> None:
        left = self._cases(spec, stock=stock)
        while left:
            done = 0
            for outcome in run_host(spec, left, stock=stock, log=self.log, note=self.note):
                self.outcomes.append(outcome)
                self.note(f"{outcome.by}, {spec}: {outcome.case}: {outcome.ended}")
                done += 1
            left = left[done:]


def run_host(
    spec: Spec,
    cases: Sequence[str],
    *,
    stock: bool,
    log: Path | None,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[Outcome]:
    """One engine's outcomes, as far as it gets: at least one.

    Raises:
        SyncError: the engine does not start.
    """
    note(f"starting {spec}")
    told = {"subject": str(spec), "cases": list(cases), "stock": stock, "random": None}
    with Host(spec, told, log) as host:
        host.next(START_SECONDS)
        while line := host.next(START_SECONDS, ends=True):
            case = all_cases()[line["begin"]]
            case_seconds = STOCK_SECONDS if stock else CASE_SECONDS
            if GONE in case.expected:  # it is healed with a new engine
                case_seconds += START_SECONDS
            by = "stock vLLM" if stock else "qerl-sync"
            unknown = Outcome(str(spec), case.name, by, expected=case.expected)
            try:
                found = host.next(case_seconds) or {}
            except TimeoutError:
                unknown.ended, unknown.healed = HANG, False
                yield unknown
                return
            except SyncError as exc:
                unknown.ended, unknown.healed, unknown.error = CRASH, False, str(exc)[:300]
                yield unknown
                return
            yield Outcome.from_json(found["outcome"])


def chosen_specs(wanted: Sequence[str]) -> list[Spec]:
    """Those of `SPECS` on these engines; one that is written in full need not be among them.

    Raises:
        ConfigError: there is none, or one that is written in full is not possible.
    """
    found = [spec for spec in SPECS if not wanted or spec.engine in wanted]
    found += [Spec.parse(text) for text in wanted if text.count("/") == 2]
    if not found:
        raise ConfigError(
            f"there is no engine {', '.join(wanted)}; choose from {', '.join(SUBJECTS)}, or one "
            "such as 'own process/moe/stock'"
        )
    for spec in found:
        spec.require_possible()
    return found


def run_random(spec: Spec, number: int, seed: int, log: Path | None) -> dict[str, Any]:
    """See `random.run_schedules`; in the engine's own process."""
    told = {
        "subject": str(spec),
        "cases": [],
        "stock": False,
        "random": {"number": number, "seed": seed},
    }
    with Host(spec, told, log) as host:
        host.next(START_SECONDS)
        line = host.next(CASE_SECONDS + SCHEDULE_SECONDS * number)
        assert line is not None
        found: dict[str, Any] = line["schedules"]
        return found


def versions() -> str:
    """Of what was broken."""
    from importlib.metadata import version

    from qerl_sync import __version__
    from qerl_sync.worker.compat import vllm_version

    names = [f"{name} {version(name)}" for name in ("torch", "transformers")]
    return ", ".join([f"qerl-sync {__version__}", f"vLLM {vllm_version()}", *names])


class Host:
    """The process of `faults.host`, and all that it starts."""

    def __init__(self, spec: Spec, told: dict[str, Any], log: Path | None) -> None:
        self._read, write = os.pipe()
        self._buffer = b""
        self._spec, self._log = spec, log
        output = log.open("ab") if log is not None else None
        # This package and `support`, for the host and for all processes that it starts.
        path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "faults.host",
                    json.dumps({**told, "output": write}),
                ],
                pass_fds=[write],
                stdin=subprocess.PIPE,  # it ends with us
                stdout=output or subprocess.DEVNULL,
                stderr=output or subprocess.DEVNULL,
                env={**environment_of(spec), "PYTHONPATH": path},
                start_new_session=True,
            )
        finally:
            os.close(write)
            if output is not None:
                output.close()

    def next(self, timeout_seconds: float, *, ends: bool = False) -> dict[str, Any] | None:
        """The next line; None at its end, if it may end there.

        Raises:
            TimeoutError: it says nothing.
            SyncError: it has ended.
        """
        deadline = time.monotonic() + timeout_seconds
        while b"\n" not in self._buffer:
            if not select.select([self._read], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise TimeoutError(f"{self._spec} says nothing for {timeout_seconds:g} s")
            more = os.read(self._read, 1 << 16)
            if not more and ends:
                return None
            if not more:
                raise SyncError(f"the process that breaks {self._spec} ended; {self._last_words()}")
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def _last_words(self) -> str:
        if self._log is None:
            return "run it with --log FILE to see why"
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"the end of {self._log}: {' '.join(lines[-3:])}"

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *exc: object) -> None:
        """It has a moment to stop its engines, then they are stopped."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20 if exc[0] is None else 0.1)
        os.close(self._read)
        assert self._process.stdin is not None
        self._process.stdin.close()
        kill(members(self._process.pid))
        self._process.wait()
