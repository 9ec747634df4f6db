"""Shared fixtures: one set of real vLLM engines, started when first needed, kept to the end."""

from __future__ import annotations

import support.environment  # noqa: F401  isort:skip  first: it sets what vLLM reads when imported

from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings
from support.engines import EnginePool, Subject

settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked `gpu` says that it was not run, where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def engine_pool(tmp_path_factory: pytest.TempPathFactory) -> EnginePool:
    return EnginePool(tmp_path_factory.mktemp("models"))


@pytest.fixture
def subject(engine_pool: EnginePool) -> Iterator[Callable[..., Subject]]:
    """`subject(kind, kernels)`: a live engine on version 0 of that model, and version 1 to come.

    Whatever a test does to the engine, the next one finds it on version 0 again, or fails.
    """
    used: list[Subject] = []

    def get(kind: str, kernels: str = "stock") -> Subject:
        used.append(engine_pool.subject(kind, kernels))
        used[-1].enter()
        return used[-1]

    yield get
    for one in reversed(used):
        one.leave()
