"""Engines without vLLM, for all tests of the way to their workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.loaders import OLD, KeepingLoader, Workers

from qerl_sync.wire.endpoints import Listener


@pytest.fixture
def workers() -> Iterator[Callable[..., Workers]]:
    """`workers(number, rank0={...})`: an engine whose ranks hold the old weights."""
    made: list[Workers] = []

    def make(number: int = 1, kind: type[Workers] = Workers, **said: Any) -> Workers:
        made.append(kind(*(KeepingLoader(OLD) for _ in range(number)), **said))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    one = Listener("127.0.0.1", 0, "secret")
    yield one
    one.close()
