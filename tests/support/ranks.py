"""Programs that run as several trainer ranks, each in a process of its own on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from support.ports import free_port


class RankFailed(AssertionError):
    pass


def surroundings(num_ranks: int) -> dict[str, str]:
    """Return what torchrun would put into the environment of each rank."""
    return {
        "PYTHONPATH": import_path(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def import_path() -> str:
    tests = Path(__file__).parents[1]
    return os.pathsep.join([str(tests.parent), str(tests)])


def start_ranks(
    program: str, num_ranks: int, directory: Path, *arguments: str
) -> list[subprocess.Popen[bytes]]:
    """Start `python -m program DIRECTORY ARGUMENTS...` so often, as torchrun would, without its
    agent: that ends the ranks that are left when one dies."""
    common = {**os.environ, **surroundings(num_ranks)}
    started = []
    for rank in range(num_ranks):
        with (directory / f"rank-{rank}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", program, str(directory), *arguments],
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return started


def await_ranks(
    started: list[subprocess.Popen[bytes]], directory: Path, seconds: float
) -> list[dict[str, Any]]:
    """Return what each rank has reported. None may run longer; one that was killed has nothing."""
    deadline = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in started):
            if any(process.returncode not in (None, 0, -9) for process in started):
                break  # the others would wait for it
            if time.monotonic() > deadline:
                raise RankFailed(f"a rank hangs:\n{logs(directory)}")
            time.sleep(0.1)
    finally:
        for process in started:
            process.kill()
            process.wait()
    if any(process.returncode not in (0, -9) for process in started):
        raise RankFailed(logs(directory))
    return [read(directory, rank) for rank in range(len(started))]


def run_ranks(
    program: str, num_ranks: int, directory: Path, *arguments: str, seconds: float = 240
) -> list[dict[str, Any]]:
    return await_ranks(start_ranks(program, num_ranks, directory, *arguments), directory, seconds)


def report(directory: str, **said: Any) -> None:
    """Add to what the test is told of this rank."""
    path = Path(directory) / f"rank-{os.environ['RANK']}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **said}))


def read(directory: Path, rank: int) -> dict[str, Any]:
    path = directory / f"rank-{rank}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def logs(directory: Path) -> str:
    return "\n".join(
        f"--- {path.name}\n{path.read_text(errors='replace')[-6000:]}"
        for path in sorted(directory.glob("rank-*.log"))
    )
