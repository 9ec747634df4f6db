"""The control plane of an engine that lives in a Ray actor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qerl_sync.clients.base import PauseMode, timed_out, translated
from qerl_sync.errors import ConfigError, PeerLostError, SyncError, TransportError
from qerl_sync.meta import format_bytes

if TYPE_CHECKING:
    import torch

# The actor's concurrency group of calls that do not wait for the engine.
CONTROL = "control"


class RayActorClient:
    """An actor with the methods of `integrations.ray.RolloutActor` as an EngineClient.

    For actors that have vLLM's four methods only, vLLM's `RayVLLMWeightSyncClient` serves as well.

    Args:
        handle: of the actor.
        name: of the actor, for error messages.
        timeout_seconds: how long one call but `update_weights` may take. One that takes longer goes
            on in the actor.
    """

    def __init__(self, handle: Any, name: str, timeout_seconds: float = 300) -> None:
        self.handle = handle
        self.name = name
        self.timeout_seconds = timeout_seconds

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # It takes as long as the whole sync, which has timeouts of its own.
        answer = self.handle.update_weights.remote({"update_info": update_info})
        self._answer("update_weights", answer, None)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update", weight_version)

    def pause(self, mode: PauseMode) -> None:
        self._call("pause", mode)

    def resume(self) -> None:
        self._call("resume")

    def reset_caches(self, *, running: bool) -> bool:
        return bool(self._call("reset_caches", running))

    def put(self, chunk: torch.Tensor) -> Any:
        import ray

        try:
            return ray.put(chunk.numpy())
        except ray.exceptions.RayError as exc:
            raise TransportError(
                f"Ray's object store does not take a chunk of {chunk.nbytes:,} bytes: {exc}; start "
                "Ray with a larger object_store_memory, or take smaller sync.chunk_bytes"
            ) from exc

    def require_store(self, nbytes: int) -> None:
        require_object_store(nbytes)

    def deliver(self, key: str, index: int, stored: Any) -> None:
        # As an argument of its own, not in a list: Ray then brings it to the node first.
        self._deliver(key, index, stored)

    def require_box(self, key: str) -> None:
        if not self._answer("deliver", self._deliver(key, -1, None), self.timeout_seconds):
            raise TransportError(
                f"the worker of {self.name} is not in the actor's own process, which is where Ray "
                "hands out objects"
            )

    def _deliver(self, key: str, index: int, stored: Any) -> Any:
        method = self.handle.deliver.options(concurrency_group=CONTROL)
        return method.remote(key, index, stored)

    def _call(self, method: str, *arguments: Any) -> Any:
        answer = getattr(self.handle, method).remote(*arguments)
        return self._answer(method, answer, self.timeout_seconds)

    def _answer(self, method: str, answer: Any, timeout_seconds: float | None) -> Any:
        import ray

        try:
            return ray.get(answer, timeout=timeout_seconds)
        except ray.exceptions.GetTimeoutError as exc:
            raise timed_out(f"actor {self.name}", method, self.timeout_seconds) from exc
        except ray.exceptions.RayActorError as exc:
            raise self._lost(method) from exc
        except ray.exceptions.RayTaskError as exc:
            cause = exc.cause if isinstance(exc.cause, Exception) else exc
            raise self._told(cause, method) from exc

    def _lost(self, method: str) -> PeerLostError:
        return PeerLostError(
            f"{method}: actor {self.name} died; where it may restart, it gets a full sync when it "
            "is back. The cause stands in its log"
        )

    def _told(self, cause: Exception, method: str) -> SyncError:
        return translated(cause, f"the engine in actor {self.name}", method)


def require_object_store(nbytes: int) -> None:
    """Raises ConfigError if a node's object store is smaller than that."""
    import ray

    for node in ray.nodes():
        room = int(node["Resources"].get("object_store_memory", 0))
        if node["Alive"] and room < nbytes:
            raise ConfigError(
                f"the object store of node {node['NodeManagerAddress']} has {format_bytes(room)}, "
                f"and the chunks in flight need {format_bytes(nbytes)}; start Ray with a larger "
                "object_store_memory, or take smaller sync.chunk_bytes or fewer "
                "sync.chunks_in_flight"
            )
