"""The control plane that a transport needs of a vLLM engine."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

from qerl_sync.errors import (
    PeerLostError,
    PoisonedError,
    SyncError,
    TransportError,
    TransportTimeout,
)

if TYPE_CHECKING:
    import torch

PauseMode = Literal["keep", "wait", "abort"]


class EngineClient(Protocol):
    """vLLM's `VLLMWeightSyncClient` (its four methods, of the same meaning) and, where the engine
    has them, pausing and caches.

    An object with only vLLM's four methods serves as well, for instance
    `RayVLLMWeightSyncClient`: the caller then pauses and empties caches itself.

    All methods block until the engine has answered, on all its ranks. They raise PeerLostError if
    the engine cannot be reached or dies, TransportTimeout if it takes longer than the client's own
    timeout, TransportError if it refuses. Where the engine runs in this process, its own SyncErrors
    arrive as they are.

    `update_weights` is a whole sync, and may take longer than any single call should: no timeout
    of the client ends it. Who talks to the workers meanwhile has one for each wait.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class PausableClient(EngineClient, Protocol):
    """An engine that keeps scheduling requests in flight unless it is paused."""

    def pause(self, mode: PauseMode) -> None:
        """Stop scheduling; keep the caches.

        `keep`: requests in flight wait and continue after `resume`. `wait`: let them finish first.
        `abort`: end them now.
        """

    def resume(self) -> None:
        """Schedule again."""

    def reset_caches(self, *, running: bool) -> bool:
        """Empty every cache that holds results of old weights.

        These are the prefix, encoder and multimodal caches, and the KV connector's external store.
        `running`: requests in flight drop their keys and values too, and recompute them with the
        new weights.

        Returns:
            Whether all are empty. False: requests in flight hold on to their blocks, and vLLM then
            keeps the whole prefix cache; or the KV connector did not empty its own. Later requests
            with the same prefix would reuse what is left.
        """


class RefusingClient(EngineClient, Protocol):
    """An engine that can refuse requests with a reason.

    Requests to any other engine wait: after a failed sync it stays paused.
    """

    def refuse(self, reason: str) -> None:
        """Refuse requests with `reason` instead of letting them wait.

        Callers get PoisonedError, or HTTP status 503. This runs after a failure, and raises
        nothing.
        """

    def admit(self) -> None:
        """Accept requests again. Idempotent."""


class CountedClient(EngineClient, Protocol):
    """An engine that reports its number of workers.

    Without it, a data parallel replica that does not connect can go unnoticed.
    """

    def world_size(self) -> int | None:
        """Return the number of workers that `update_weights` reaches, all data parallel replicas
        included.

        None: unknown.
        """


class ProbedClient(EngineClient, Protocol):
    """An engine that returns log-probabilities of a prompt."""

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Return each token's log-probability, from the second on. The engine must not be
        paused.
        """


class StoringClient(EngineClient, Protocol):
    """An engine that takes objects from a store which all nodes of a cluster share."""

    def put(self, chunk: torch.Tensor) -> Any:
        """Put a chunk's bytes into the store, once for all engines. The caller may change them
        afterwards.

        Returns:
            The argument for `deliver`. The object lives as long as this value, or a reader of it.
        """

    def deliver(self, key: str, index: int, stored: Any) -> None:
        """Send an object to the worker that has opened mailbox `key` (`worker.protocol.mailbox`).

        Return at once. A failure shows in the chunk not being loaded.
        """

    def require_store(self, nbytes: int) -> None:
        """Raise ConfigError if the store of some node is smaller than `nbytes`."""

    def require_mailbox(self, key: str) -> None:
        """Raise TransportError if objects do not reach the worker that has opened mailbox `key`."""


# Sampling parameters of a request that asks for nothing but the prompt's log-probabilities.
PROBING: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}


def num_workers(vllm_config: Any, engine_core: Any) -> int:
    """Count the workers behind a client of vLLM's engine core.

    It drives one engine core for each data parallel replica, and of a deployment on several nodes
    perhaps only its own: `world_size_across_dp` would count the others too.
    """
    replicas = len(getattr(engine_core, "core_engines", [None]))
    return int(vllm_config.parallel_config.world_size) * replicas


def read_prompt_logprobs(token_ids: Sequence[int], reported: Sequence[Any]) -> list[float]:
    """Read log-probabilities from vLLM's answer: one table by token id per token, None for the
    first.
    """
    found = []
    for token, table in zip(token_ids[1:], reported[1:], strict=True):
        entry = table[token] if token in table else table[str(token)]
        found.append(float(entry["logprob"] if isinstance(entry, dict) else entry.logprob))
    return found


_WRAPPED = re.compile(r"Worker failed with error '(.*)', please check the stack trace", re.DOTALL)
_CALLED = re.compile(r"^Call to \w+ method failed: ")


def complaint(text: str) -> str:
    """Extract the worker's own error text from the text that vLLM's processes put around it."""
    wrapped = _WRAPPED.search(text)
    return wrapped[1] if wrapped else _CALLED.sub("", text)


def refusal(reason: str) -> Callable[..., NoReturn]:
    """Return a function that refuses a request instead of letting it wait for a paused engine."""

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise PoisonedError(why_refused(reason))

    return refuse


def why_refused(reason: str) -> str:
    """Return the error text for a request that a paused engine would let wait."""
    return (
        f"this engine does not generate: {reason}. Its weights may be a mix of two versions, "
        "and it is paused; run a full sync (`session.push()`) to make them right"
    )


def in_thread(name: str, call: Callable[[], Any]) -> Future[Any]:
    """Make a call in a daemon thread, which ends with the process. See `answers`."""
    answer: Future[Any] = Future()

    def fulfil() -> None:
        try:
            answer.set_result(call())
        except BaseException as exc:
            answer.set_exception(exc)

    threading.Thread(target=fulfil, name=name, daemon=True).start()
    return answer


def answers(
    call: Future[Any],
    timeout_seconds: float | None,
    poll_seconds: float,
    check_alive: Callable[[], None],
) -> bool:
    """Wait for a call that another thread makes. Return whether it ended in time; None waits
    forever.

    Args:
        check_alive: called again and again meanwhile; raises if waiting has become pointless. vLLM
            leaves calls unanswered in which its engine dies.
    """
    deadline = time.monotonic() + (math.inf if timeout_seconds is None else timeout_seconds)
    while (left := deadline - time.monotonic()) > 0:
        if wait([call], min(poll_seconds, left)).done:
            return True
        check_alive()
    return call.done()


def require_alive(engine_core: Any, engine: str, method: str) -> None:
    """Raise PeerLostError if the process of a vLLM engine has died.

    vLLM's client notices the death, but tells only the next caller.
    """
    if getattr(getattr(engine_core, "resources", None), "engine_dead", False):
        raise lost(engine, method)


def timed_out(engine: str, method: str, seconds: float) -> TransportTimeout:
    return TransportTimeout(
        f"{method}: {engine} did not answer within {seconds:g} s; look at its log, or give the "
        "client a longer timeout_seconds"
    )


def translated(exc: Exception, engine: str, method: str) -> SyncError:
    """Return the error to raise for `exc`, which a call of vLLM in Python raised."""
    if isinstance(exc, SyncError):
        return exc
    # By name: the class is in different modules in different versions of vLLM.
    if type(exc).__name__ == "EngineDeadError":
        return lost(engine, method)
    return TransportError(f"{method}: {engine} refuses: {complaint(str(exc))}")


def lost(engine: str, method: str) -> PeerLostError:
    return PeerLostError(
        f"{method}: {engine} is dead; the cause stands in its log. Start it anew and sync in full"
    )
