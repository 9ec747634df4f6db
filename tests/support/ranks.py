"""Programs that run as several trainer ranks, each in a process of its own on this machine."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from support.forks import import_path, start_program
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


def run_ranks(
    program: str, num_ranks: int, directory: Path, *arguments: str, seconds: float = 240
) -> list[dict[str, Any]]:
    """Run `program DIRECTORY ARGUMENTS...` so often, as torchrun would, without its agent: that
    ends the ranks that are left when one dies. Return what each rank has reported; none may run
    longer than `seconds`."""
    common = {**os.environ, **surroundings(num_ranks)}
    started = [
        start_program(
            program,
            str(directory),
            *arguments,
            log=directory / f"rank-{rank}.log",
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(num_ranks)
    ]
    deadline = time.monotonic() + seconds
    try:
        while any(process.is_alive() for process in started):
            if any(process.exitcode for process in started):
                break  # the others would wait for it
            if time.monotonic() > deadline:
                raise RankFailed(f"a rank hangs:\n{logs(directory)}")
            time.sleep(0.1)
        failed = any(process.exitcode for process in started)
    finally:
        for process in started:
            process.kill()
            process.join()
    if failed:
        raise RankFailed(logs(directory))
    return [read(directory, rank) for rank in range(num_ranks)]


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
