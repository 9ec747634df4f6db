"""Drive an engine that lives in a Ray actor."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

from qerl_sync.engines.base import (
    MethodClient,
    PauseMode,
    timed_out,
    translated,
    vllm_request,
)
from qerl_sync.errors import ConfigError, PeerLostError, TransportError
from qerl_sync.meta import format_bytes
from qerl_sync.worker.compat.caches import forget_caches

if TYPE_CHECKING:
    import torch

# The actor's concurrency group of calls that do not wait for the engine.
CONTROL = "control"


class RayActorClient(MethodClient):
    """An actor with the methods of `integrations.ray.RolloutActor` as an EngineClient.

    An actor with vLLM's four methods only is called as vLLM's `RayVLLMWeightSyncClient` calls it,
    with a timeout. What else it lacks is left out: its caller sees to it then that nothing is
    generated during a sync, and that caches are emptied after it.

    Args:
        handle: of the actor.
        name: of the actor, for error messages.
        timeout_seconds: how long one call but `update_weights` may take. One that takes longer goes
            on in the actor.

    Attributes:
        resets_connector: `reset_caches` reaches what a KV connector keeps. The `reset_prefix_cache`
            of an actor that is not a RolloutActor takes no argument that could ask for it.
    """

    def __init__(self, handle: Any, name: str, timeout_seconds: float = 300) -> None:
        super().__init__(handle, timeout_seconds)
        self.handle, self.name = handle, name
        self._ours = self.resets_connector = hasattr(handle, "reset_caches")
        self.store = self
        self._node: str | None = None

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if self._ours:
            self._call("finish_weight_update", weight_version)
            return
        self._call("finish_weight_update")
        if weight_version is not None:
            self._call_if_there("update_weight_version", weight_version)

    def pause(self, mode: PauseMode) -> None:
        self._call_if_there("pause", mode)

    def resume(self) -> None:
        self._call_if_there("resume")

    def reset_caches(self, *, running: bool) -> bool | None:
        if self._ours:
            return cast("bool | None", self._call("reset_caches", running))

        def call(method: str, **options: bool) -> bool:
            return self._call_if_there(method) is not False

        return forget_caches(call, running=running)

    def world_size(self) -> int | None:
        size = self._call_if_there("world_size")
        return None if size is None else int(size)

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        if not hasattr(self.handle, "prompt_logprobs"):
            raise ConfigError(
                f"sync.verify: full asks actor {self.name} what it thinks of a prompt, and it has "
                "no method prompt_logprobs; inherit RolloutActor, or choose verify: checksum"
            )
        return list(self._call("prompt_logprobs", list(token_ids)))

    def put(self, chunk: torch.Tensor) -> Any:
        """Put a chunk's bytes into Ray's store, once for all engines. The caller may change them
        afterwards.

        Returns:
            The argument for `deliver`. The object lives as long as this value, or a reader of it.
        """
        import ray

        try:
            return ray.put(chunk.numpy())
        except ray.exceptions.RayError as exc:
            raise TransportError(
                f"Ray's object store does not take a chunk of {chunk.nbytes:,} bytes: {exc}; start "
                "Ray with a larger object_store_memory, or take smaller sync.chunk_bytes"
            ) from exc

    def require_store(self, nbytes: int) -> None:
        """Raise ConfigError if the store of this node or of the actor's is smaller than that."""
        import ray

        here = ray.get_runtime_context().get_node_id()
        require_object_store(nbytes, {here, self._node or here})

    def deliver(self, key: str, index: int, stored: Any) -> Any:
        """Send an object to the worker that has opened mailbox `key` (`worker.protocol.mailbox`).

        Return at once. A failure shows in the chunk not being loaded.
        """
        method = self.handle.deliver.options(concurrency_group=CONTROL)
        # As an argument of its own, not in a list: Ray then brings it to the node first.
        return method.remote(key, index, stored)

    def require_mailbox(self, key: str) -> None:
        """Raise TransportError if objects do not reach the worker that has opened mailbox `key`."""
        if not hasattr(self.handle, "deliver"):
            raise TransportError(
                f"actor {self.name} has no method `deliver`, by which Ray hands out objects; "
                "inherit RolloutActor, or choose sync.transport: auto, shm or tcp"
            )
        if hasattr(self.handle, "status"):
            status = self.handle.status.options(concurrency_group=CONTROL).remote()
            self._node = self._answer("status", status)["node"]
        if not self._answer("deliver", self.deliver(key, -1, None)):
            raise TransportError(
                f"the worker of {self.name} is not in the actor's own process, which is where Ray "
                "hands out objects"
            )

    def _request(self, name: str, info: dict[str, Any]) -> Any:
        """Return the request in the form that the actor expects.

        A RolloutActor gets plain dictionaries. Others get what vLLM's client sends, if vLLM is
        installed here.
        """
        if self._ours:
            return {name: info}
        try:
            return vllm_request(name, info)
        except ImportError:
            return {name: info}

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            answer = getattr(self.handle, method).remote(*arguments, **options)
        except (AttributeError, TypeError) as exc:
            raise TransportError(
                f"actor {self.name} cannot be asked {method}: {exc}; it needs vLLM's four methods "
                "with vLLM's signatures (docs/ray.md)"
            ) from exc
        return self._answer(method, answer)

    def _call_if_there(self, method: str, *arguments: Any) -> Any:
        return self._call(method, *arguments) if hasattr(self.handle, method) else None

    def _answer(self, method: str, answer: Any) -> Any:
        import ray

        try:
            return ray.get(answer, timeout=self._seconds(method))
        except ray.exceptions.GetTimeoutError as exc:
            raise timed_out(f"actor {self.name}", method, self.timeout_seconds) from exc
        except ray.exceptions.RayActorError as exc:
            raise PeerLostError(f"{method}: actor {self.name} {how_it_was_lost(exc)}") from exc
        except ray.exceptions.RayTaskError as exc:
            cause = exc.cause if isinstance(exc.cause, Exception) else exc
            raise translated(cause, f"the engine in actor {self.name}", method) from exc
        except ray.exceptions.RayError as exc:
            raise TransportError(
                f"{method}: the answer of actor {self.name} was lost: {type(exc).__name__}: {exc}"
            ) from exc


def how_it_was_lost(exc: Exception) -> str:
    """Return what Ray knows of an actor that raised a RayActorError."""
    if is_gone(exc):
        return (
            "died and is not started again (its max_restarts are used up, or it was ended); add "
            "another to the pool. The cause stands in its log"
        )
    return (
        "died, or cannot be reached; Ray restarts it, and it gets a full sync when it is back. The "
        "cause stands in its log"
    )


def is_gone(exc: Exception) -> bool:
    """Return whether the actor that raised this RayActorError is dead for good."""
    import ray

    return not isinstance(exc, ray.exceptions.ActorUnavailableError)


def require_object_store(nbytes: int, nodes: Collection[str] | None = None) -> None:
    """Raise ConfigError if the object store of one of these nodes is smaller than `nbytes`.

    Args:
        nodes: their ids; None: all that are alive.
    """
    import ray

    for node in ray.nodes():
        if not node["Alive"] or (nodes is not None and node["NodeID"] not in nodes):
            continue
        room = int(node["Resources"].get("object_store_memory", 0))
        if room < nbytes:
            raise ConfigError(
                f"the object store of node {node['NodeManagerAddress']} has {format_bytes(room)}, "
                f"and the chunks in flight need {format_bytes(nbytes)}; start Ray with a larger "
                "object_store_memory, or take smaller sync.chunk_bytes or fewer "
                "sync.chunks_in_flight"
            )
