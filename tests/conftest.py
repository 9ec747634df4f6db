"""Shared fixtures: one set of real vLLM engines, started when first needed, kept to the end."""

from __future__ import annotations

import support.environment  # noqa: F401  isort:skip  first: it sets what vLLM reads when imported

import gc
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from qerl_sync.serving.processes import descendants

if TYPE_CHECKING:
    from support.engines import EnginePool, Subject
    from support.remote import RemoteEngine, RemotePool

settings.register_profile("default", deadline=None, print_blob=True)
# `scripts/test --fast`: a quarter of the examples, whose drawing is most of what these tests cost.
settings.register_profile("fast", deadline=None, print_blob=True, max_examples=25)
settings.load_profile("default")


# Models are so small that a second thread only waits for its turn on a core that another process
# has, thousands of times in a test. Processes that tests start inherit it. Before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Engines in other processes leave vLLM's state in this one changed when they are shut down, so
# that no MoE engine can be started here any more: they come last.
LAST = ("test_engine_clients", "test_serving", "test_train_server")


ENGINES = re.compile(r"^pytestmark = .*pytest\.mark\.(vllm|ray|gpu|slow)\b", re.MULTILINE)


def is_fast(config: pytest.Config) -> bool:
    return str(config.option.markexpr).startswith("not (vllm or ")


def pytest_configure(config: pytest.Config) -> None:
    if is_fast(config):
        # torch, transformers and vLLM are millions of objects that stay: at the usual threshold,
        # 700 new ones, the collector looks at them again and again, a tenth of the whole run.
        gc.set_threshold(50_000, 50, 100)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A fast run imports no file whose tests all need an engine, nor what those import."""
    return (
        is_fast(config)
        and collection_path.suffix == ".py"
        and (ENGINES.search(collection_path.read_text()) is not None)
    ) or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem in LAST)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked `gpu` says that it was not run, where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def engine_pool(tmp_path_factory: pytest.TempPathFactory) -> EnginePool:
    from support.engines import EnginePool

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


@pytest.fixture(scope="session")
def remote_pool(
    engine_pool: EnginePool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RemotePool]:
    from support.remote import RemotePool

    pool = RemotePool(tmp_path_factory.mktemp("remote"), engine_pool)
    yield pool
    pool.close()


@pytest.fixture
def remote(
    remote_pool: RemotePool, subject: Callable[..., Subject]
) -> Iterator[Callable[..., RemoteEngine]]:
    """`remote(name)`: a live engine of `support.remote.ENGINES`, on version 0, with its own worker.

    `remote("in process", kind, kernels)` is `subject(kind, kernels)`. As for those, the next test
    finds version 0 again; and no shared memory of this process, or it fails.
    """
    used: list[RemoteEngine] = []

    def get(name: str, kind: str = "dense", kernels: str = "stock") -> RemoteEngine:
        if name == "in process":
            subject(kind, kernels)
        used.append(remote_pool.engine(name, kind, kernels))
        return used[-1]

    yield get
    for one in reversed(used):
        one.leave()


@pytest.fixture
def started() -> Callable[[], list[int]]:
    """Pids of the processes that the test has started and that live. The session keeps engines."""
    others = set(descendants(os.getpid()))
    return lambda: [pid for pid in descendants(os.getpid()) if pid not in others]
