"""Runs the proofs on a GPU: each case in a process of its own, several at once, within a time.

    python tests/gpu/run.py --out DIR [--parts exact,memory] [--seconds 400] [PART/CASE ...]

One case of `exact` comes first, alone; then what must have the card for itself, `memory` and
`speed`; then all others, side by side. What has not ended in time is ended, and what there is by
then is written: `results.json`, `results.md`, `memory.png`, and all output in `logs.txt.gz`.

A part is a module beside this one with `CASES`, functions by name that run one case in this process
and return a dictionary for JSON, and perhaps `COST`: (GiB of the card's memory, seconds) for each.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
# A script's own directory comes first on the path, and one of the parts is called as a package is.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from gpu import report  # noqa: E402

PARTS = ("memory", "speed", "exact", "apart", "faults", "trl")
ALONE = ("memory", "speed")
DEFAULT_COST = (4.0, 90.0)
CONTEXT_GIB = 1.0  # what CUDA and a process's libraries take of the card beside its tensors
LOG_LINES = 60
LOG_BYTES = 4 * 2**20  # of one case's log; all of them are returned in one file
POLL_SECONDS = 0.1
# For writing the results, once the time is up.
LAST_SECONDS = 5.0


@dataclass
class Case:
    """One case: where its output is, and what became of it."""

    part: str
    name: str
    gib: float
    limit: float
    directory: Path
    status: str = "not started"
    seconds: float = 0.0
    started: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def log(self) -> Path:
        return self.directory / f"{self.part}.{self.name.replace('/', '_')}.log"

    @property
    def file(self) -> Path:
        return self.log.with_suffix(".json")

    @property
    def tail(self) -> list[str]:
        if not self.log.exists():
            return []
        return self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]

    def to_json(self) -> dict[str, Any]:
        found = {key: getattr(self, key) for key in ("part", "name", "status", "seconds", "facts")}
        if self.status in ("failed", "ended"):
            found |= {"error": self.error, "log": self.tail}
        return found

    def start(self) -> None:
        command = [sys.executable, str(HERE / "run.py"), "--one", self.part, self.name]
        environment = {**os.environ, report.PARTIAL: str(self.file.with_suffix(".partial"))}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, str(self.file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        self.started, self.status = time.monotonic(), "running"

    def poll(self, deadline: float) -> bool:
        """Return whether it has ended, by itself or because its time is up."""
        assert self.process is not None
        now = time.monotonic()
        if self.process.poll() is None and now < min(self.started + self.limit, deadline):
            return False
        self.end()
        return True

    def end(self) -> None:
        """End what is left of it, and read what it found."""
        assert self.process is not None
        self.seconds = round(time.monotonic() - self.started, 1)
        in_time = self.process.poll() is not None
        # An engine's process outlives the case that raised.
        _kill_group(self.process, patience=0.0 if in_time else 2.0)
        found = _read(self.file) or _read(self.file.with_suffix(".partial")) or {}
        self.facts, self.error = found.get("facts", {}), found.get("error", "")
        if not in_time:
            self.status, self.error = "ended", f"ended after {self.seconds} s"
        elif self.error or not self.file.exists() or self.facts.get("passed") is False:
            self.status = "failed"
            found_wrong = self.facts.get("deviations") or [f"status {self.process.returncode}"]
            self.error = self.error or str(found_wrong[0])
        else:
            self.status = "passed"


def _kill_group(process: subprocess.Popen[bytes], patience: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        if patience:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found


def run_one(part: str, name: str, file: Path) -> int:
    """Run one case in this process."""
    start = time.perf_counter()
    try:
        facts = importlib.import_module(f"gpu.{part}").CASES[name]()
        found = {"facts": facts}
    except BaseException as exc:
        traceback.print_exc()
        found = {"error": f"{type(exc).__name__}: {str(exc)[:2000]}"}
        found["facts"] = (_read(Path(os.environ.get(report.PARTIAL, ""))) or {}).get("facts", {})
    found["case_seconds"] = round(time.perf_counter() - start, 2)
    report.write(file, json.dumps(found, default=str))
    sys.stdout.flush()
    sys.stderr.flush()
    # Engines and their threads may not want to end, and have nothing to add.
    os._exit(1 if "error" in found else 0)


def collect(
    parts: Sequence[str], wanted: Sequence[str], directory: Path
) -> tuple[list[Case], dict[str, str]]:
    """Return the cases of these parts, and the parts that cannot be imported."""
    cases, missing = [], {}
    for part in parts:
        try:
            module = importlib.import_module(f"gpu.{part}")
        except Exception as exc:
            missing[part] = f"{type(exc).__name__}: {exc}"
            continue
        costs = getattr(module, "COST", {})
        for name in module.CASES:
            if not wanted or part in wanted or f"{part}/{name}" in wanted:
                gib, seconds = costs.get(name, DEFAULT_COST)
                limit = max(1.5 * seconds, 60.0) * (1 if has_gpu() else 5)
                cases.append(Case(part, name, gib + CONTEXT_GIB, limit, directory))
    return cases, missing


def stages(cases: Sequence[Case]) -> Iterator[tuple[list[Case], bool]]:
    """Yield what to run one after the other (True) or side by side (False), by its value."""
    exact = [case for case in cases if case.part == "exact"]
    yield exact[:1], True
    yield [case for part in ALONE for case in cases if case.part == part], True
    # The longest first, then by turns, so that each part has something to show.
    parts = [[c for c in cases if c.part == "trl"], exact[1:]]
    parts += [[c for c in cases if c.part == part] for part in ("apart", "faults")]
    turns = range(max(map(len, parts), default=0))
    yield [part[turn] for turn in turns for part in parts if turn < len(part)], False


def run_side_by_side(
    cases: Sequence[Case], at_once: int, gib: float, deadline: float, ended: Any
) -> None:
    """Run the cases, as many at once as there may be and as the card has memory for."""
    waiting, running = list(cases), list[Case]()
    try:
        while running or (waiting and time.monotonic() < deadline):
            for case in [case for case in running if case.poll(deadline)]:
                running.remove(case)
                ended(case)
            while waiting and len(running) < at_once and time.monotonic() < deadline:
                free = gib - sum(case.gib for case in running)
                # One that asks for more than there is runs alone, and shows whether it does.
                fitting = [case for case in waiting if case.gib <= free or not running]
                if not fitting:
                    break
                waiting.remove(fitting[0])
                fitting[0].start()
                running.append(fitting[0])
            time.sleep(POLL_SECONDS)
    finally:
        for case in running:
            case.end()


def has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


def card_gib() -> float:
    """Return most of the card's memory."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return 0.9 * float(pynvml.nvmlDeviceGetMemoryInfo(handle).total) / 2**30
    except Exception:  # without the package, or without a card
        return 60.0 if has_gpu() else 1e9


def save(out: Path, cases: Sequence[Case], missing: dict[str, str], seconds: float) -> None:
    """Write what there is."""
    found = {
        "seconds": round(seconds, 1),
        "missing_parts": missing,
        "cases": [case.to_json() for case in cases],
    }
    report.write(out / "results.json", json.dumps(found, indent=1, default=str))
    with contextlib.suppress(Exception):
        report.write(out / "results.md", report.markdown(found))
    logs = []
    for case in cases:
        if case.log.exists():
            text = case.log.read_bytes()
            cut = (
                text if len(text) <= LOG_BYTES else text[: LOG_BYTES // 2] + text[-LOG_BYTES // 2 :]
            )
            logs += [f"\n===== {case.part}/{case.name}: {case.status}\n".encode(), cut]
    (out / "logs.txt.gz").write_bytes(gzip.compress(b"".join(logs), 6))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--one", nargs=3, metavar=("PART", "CASE", "FILE"))
    parser.add_argument("--out", type=Path, default=Path("docs/gpu"))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--at-once", type=int, default=5 if has_gpu() else 1)
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("wanted", nargs="*", metavar="PART/CASE")
    arguments = parser.parse_args()
    if arguments.one:
        part, name, file = arguments.one
        return run_one(part, name, Path(file))

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    start = time.monotonic()
    deadline = start + arguments.seconds - LAST_SECONDS
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qerl-sync-gpu-") as directory:
        asked = [part for part in PARTS if part in arguments.parts.split(",")]
        cases, missing = collect(asked, arguments.wanted, Path(directory))

        def ended(case: Case) -> None:
            print(
                f"{time.monotonic() - start:6.1f} s  {case.status:7} {case.part}/{case.name}",
                flush=True,
            )
            if case.error:
                print(f"          {case.error[:300]}", flush=True)
            save(arguments.out, cases, missing, time.monotonic() - start)

        for part, why in missing.items():
            print(f"{part} cannot be imported: {why}", flush=True)
        try:
            for chosen, alone in stages(cases):
                at_once = 1 if alone else arguments.at_once
                run_side_by_side(chosen, at_once, card_gib(), deadline, ended)
        finally:
            save(arguments.out, cases, missing, time.monotonic() - start)
            with contextlib.suppress(Exception):
                report.draw_memory([case.to_json() for case in cases], arguments.out / "memory.png")
    return 0 if all(case.status == "passed" for case in cases) and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
