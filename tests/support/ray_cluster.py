"""One Ray cluster of two nodes on this machine, and two rollout actors, for all that need them."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qerl_sync.integrations.ray.actors import RolloutActor
from qerl_sync.integrations.ray.cluster import connect
from qerl_sync.integrations.ray.pool import WorkerPool, start_actor
from support.engines import PROMPTS, SMALL
from support.models import make_model, save_model

GREEDY = {"temperature": 0, "max_tokens": 12, "detokenize": False}
STORE_BYTES = 300 << 20
# Engines of a test start at the same time, each in up to five processes, beside another group.
START_SECONDS = 600.0
# Ray's workers import test helpers and, where the tests run from a checkout, the project itself.
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def two_nodes() -> Iterator[None]:
    """Two raylets on this machine, the second with the resource `second`; gone afterwards."""
    import ray
    from ray.cluster_utils import Cluster

    with environment():
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=4, object_store_memory=STORE_BYTES, include_dashboard=False)
            cluster.add_node(num_cpus=4, object_store_memory=STORE_BYTES, resources={"second": 1})
            assert connect(cluster.address, log_to_driver=False, logging_level="ERROR"), (
                "another test left its cluster"
            )
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()


@contextmanager
def one_node(**options: Any) -> Iterator[None]:
    """A cluster of its own; gone afterwards, whatever fails."""
    import ray

    with environment():
        try:
            assert connect(log_to_driver=False, **options), "another test left its cluster"
            yield
        finally:
            ray.shutdown()


@contextmanager
def environment() -> Iterator[None]:
    """What Ray's processes inherit."""
    # Ray's sockets live under it, and their paths must be short.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp") as short:
        (Path(short) / "ray").mkdir()
        patch.setenv("RAY_TMPDIR", short)
        # Actors import the tests' own classes too.
        paths = [ROOT, ROOT / "tests", ROOT / "tests" / "ray"]
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
        yield


class WatchedActor(RolloutActor):
    """With a look at what the engine's kernels hold."""

    def fingerprint(self) -> dict[str, str]:
        from support.engines import model_of
        from support.fingerprint import fingerprint

        return fingerprint(model_of(self.llm))


@dataclass
class Rollouts:
    """Two actors, on a node each, and the trainer's models.

    `started_with[v]` is what the kernels of an engine hold that was started with version v, and
    `generations[v]` what it generates. Actor v was.
    """

    pool: WorkerPool
    paths: dict[int, Path]
    trainers: dict[int, Any]
    started_with: dict[int, dict[str, str]]

    def fingerprints(self) -> list[dict[str, str]]:
        import ray

        return ray.get([handle.fingerprint.remote() for handle in self.pool.handles.values()])

    def pid(self, name: str) -> int:
        return int(status(self.pool.handles[name])["pid"])

    def kill(self, name: str) -> float:
        """As if the kernel had; returns when."""
        os.kill(self.pid(name), signal.SIGKILL)
        return time.monotonic()


def status(handle: Any) -> dict[str, Any]:
    """As soon as it is up."""
    return WorkerPool({"it": handle}).wait(120)["it"]


def start_rollouts(directory: Path) -> Rollouts:
    import ray

    trainers = {version: make_model("dense", version) for version in (0, 1)}
    paths = {v: save_model(model, directory / str(v)) for v, model in trainers.items()}
    handles = {
        f"rollout-{v}": start_actor(
            f"rollout-{v}",
            {**SMALL, "model": str(path)},
            WatchedActor,
            options={"num_cpus": 1, "resources": {"second": 1} if v else {}},
        )
        for v, path in paths.items()
    }
    pool = WorkerPool(handles)
    pool.wait(START_SECONDS)
    held = ray.get([handle.fingerprint.remote() for handle in handles.values()])
    return Rollouts(pool, paths, trainers, dict(enumerate(held)))


def greedy(pool: WorkerPool, **options: Any) -> list[tuple[list[int], list[float]]]:
    rollouts = pool.generate(PROMPTS, GREEDY, **options)
    return [(one.completion_ids, one.logprobs) for one in rollouts]
