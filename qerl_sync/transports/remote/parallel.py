"""Call several engines at a time, in threads that die with the process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

R = TypeVar("R")


def in_parallel(works: Sequence[Callable[[], R]]) -> list[R | BaseException]:
    """Run all at the same time. Return what each returned or raised, in order."""
    outcomes: list[R | BaseException] = [RuntimeError("it never ran")] * len(works)

    def run(index: int) -> None:
        try:
            outcomes[index] = works[index]()
        except BaseException as exc:
            outcomes[index] = exc

    threads = [
        threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(works))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
