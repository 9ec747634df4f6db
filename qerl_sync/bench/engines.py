"""Engines behind a server and in a Ray actor, with the `collective_rpc` that a `vllm.LLM` has."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qerl_sync.bench.extension import ENGINE_ARGUMENTS, KERNELS_VARIABLE
from qerl_sync.integrations.ray.actors import RolloutActor
from qerl_sync.integrations.ray.cluster import connect, require_ray
from qerl_sync.integrations.ray.pool import WorkerPool

# The longest wait for the engine, in ways that are not ours.
CALL_SECONDS = 600.0


class ServedEngine:
    """An engine behind a server.

    Attributes:
        url: the server's address.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def collective_rpc(
        self, method: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Call the method on each worker, over vLLM's own route."""
        import requests

        said: Any = {"method": method, "args": list(args), "kwargs": dict(kwargs or {})}
        answer = requests.post(f"{self.url}/collective_rpc", json=said, timeout=CALL_SECONDS)
        answer.raise_for_status()
        return list(answer.json()["results"])


@contextmanager
def served(path: str) -> Iterator[ServedEngine]:
    """Serve the checkpoint at `path` on this machine."""
    from qerl_sync.serving.command import ServerSpec
    from qerl_sync.serving.server import ServerProcess

    with (
        TemporaryDirectory(prefix="qerl_sync-bench-") as directory,
        ServerProcess(
            ServerSpec(path, engine=ENGINE_ARGUMENTS), log=Path(directory) / "server.log"
        ) as server,
    ):
        yield ServedEngine(server.url)


class RPCActor(RolloutActor):
    """A rollout actor that passes on `collective_rpc` to its engine."""

    def call(
        self, method: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> list[Any]:
        return list(self.llm.collective_rpc(method, args=tuple(args), kwargs=kwargs))

    def load(self, tensors: Mapping[str, Any]) -> None:
        self.llm.collective_rpc("bench_load", args=(list(tensors.items()),))


class ActorEngine:
    """An engine in a Ray actor.

    Attributes:
        pool: leads to it alone.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self.pool = pool
        (self._actor,) = pool.handles.values()

    def collective_rpc(
        self, method: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Call the method on each worker."""
        called = self._actor.call.remote(method, args, kwargs)
        return list(require_ray().get(called, timeout=CALL_SECONDS))

    def load(self, tensors: Mapping[str, Any]) -> None:
        """Put the tensors into Ray's object store, from where the actor loads them."""
        ray = require_ray()
        # A view is pickled with all of its storage: an expert with all experts of its layer.
        own = {
            name: tensor if tensor.nbytes == tensor.untyped_storage().nbytes() else tensor.clone()
            for name, tensor in tensors.items()
        }
        ray.get(self._actor.load.remote(ray.put(own)), timeout=CALL_SECONDS)


@contextmanager
def in_actor(path: str, nbytes: int) -> Iterator[ActorEngine]:
    """Start a Ray cluster on this machine, and an actor with an engine. The object store has room
    for `nbytes` twice."""
    # In the actor's process, which gets what is loaded as it is.
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if kernels := os.environ.get(KERNELS_VARIABLE):
        environment[KERNELS_VARIABLE] = kernels
    with ExitStack() as stack:
        # Ray's sockets live under it, and their paths must be short.
        short = stack.enter_context(TemporaryDirectory(prefix="q", dir="/tmp"))
        if connect(
            num_cpus=8,
            object_store_memory=2 * nbytes + (256 << 20),
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=short,
        ):
            stack.callback(require_ray().shutdown)
        engine = {**ENGINE_ARGUMENTS, "model": path}
        pool = WorkerPool.start(1, engine, actor=RPCActor, environment=environment)
        stack.callback(pool.stop)
        yield ActorEngine(pool)
