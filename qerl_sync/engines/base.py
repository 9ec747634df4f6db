"""The control plane that a transport needs of a vLLM engine."""

from __future__ import annotations

import inspect
import math
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

from qerl_sync.errors import (
    ConfigError,
    PeerLostError,
    PoisonedError,
    SyncError,
    TransportError,
    TransportTimeout,
)
from qerl_sync.worker.compat.coupling import lacking, vllm_version

if TYPE_CHECKING:
    from qerl_sync.engines.ray_actor import RayActorClient

PauseMode = Literal["keep", "wait", "abort"]

# How often to ask, during a call, whether its engine still lives.
POLL_SECONDS = 0.2
# The name, in errors, of an engine that is driven by calls in Python.
ENGINE = "the vLLM engine"


class WeightSyncClient(Protocol):
    """vLLM's `VLLMWeightSyncClient`: its four methods, of the same meaning.

    `update_weights` is a whole sync, and may take longer than any single call should: no timeout
    of the client ends it. The transport, which talks to the workers meanwhile, has one for each
    wait.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class EngineClient(ABC):
    """The control plane of a vLLM engine. What a subclass leaves out the engine cannot do.

    All methods block until the engine has answered, on all its ranks. They raise PeerLostError if
    the engine cannot be reached or dies, TransportTimeout if it takes longer than the client's own
    timeout, TransportError if it refuses. Where the engine runs in this process, its own SyncErrors
    arrive as they are.

    Attributes:
        resets_connector: after `reset_caches`, or by the caller's care where the client does not
            empty caches, no KV connector keeps work of old weights.
        store: hands objects of Ray's store to the engine's workers; None: it has no such store.
    """

    resets_connector = True
    store: RayActorClient | None = None

    @abstractmethod
    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Do as vLLM's method, like the next three. See `WeightSyncClient`."""

    @abstractmethod
    def start_weight_update(self) -> None: ...

    @abstractmethod
    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    @abstractmethod
    def finish_weight_update(self, weight_version: str | None = None) -> None: ...

    def pause(self, mode: PauseMode) -> None:  # noqa: B027  the caller pauses such an engine
        """Stop scheduling; caches stay. `keep`: requests in flight wait and go on after `resume`;
        `wait`: until they have finished; `abort`: they end now."""

    def resume(self) -> None:  # noqa: B027
        """Schedule again."""

    def reset_caches(self, *, running: bool) -> bool | None:
        """Empty every cache that holds results of old weights.

        These are the prefix, encoder and multimodal caches, and the KV connector's external store.
        `running`: requests in flight drop their keys and values too, and recompute them with the
        new weights.

        Returns:
            False if not all are empty: requests in flight hold on to their blocks, and vLLM then
            keeps the whole prefix cache; or the KV connector did not empty its own. Later requests
            with the same prefix would reuse what is left. None if the engine does not say.
        """
        return True

    def refuse(self, reason: str) -> None:  # noqa: B027
        """Refuse requests with `reason` from here on, instead of letting them wait: by
        PoisonedError, over HTTP by status 503. Called after a failure. Raises nothing."""

    def admit(self) -> None:  # noqa: B027
        """Take requests again. Idempotent."""

    def world_size(self) -> int | None:
        """Count the workers that `update_weights` reaches, with those of all data parallel
        replicas. None: it is not known; a replica that does not connect then goes unnoticed where
        its engine does not tell either."""
        return None

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-probability of each token but the first, given those before it. The
        engine must not be paused.

        Raises:
            ConfigError: the engine cannot be asked.
        """
        raise ConfigError(
            f"sync.verify: full asks the engine for log-probabilities, and {type(self).__name__} "
            "has no prompt_logprobs; choose verify: checksum"
        )


class MethodClient(EngineClient):
    """Drive an object with methods of vLLM's names. A subclass defines how one is called."""

    def __init__(self, target: Any, timeout_seconds: float = math.inf) -> None:
        self._target, self.timeout_seconds = target, timeout_seconds

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", self._request("init_info", init_info))

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("update_weights", self._request("update_info", update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        # It takes no version in vLLM 0.25, and with clients that were written for it.
        takes_version = inspect.signature(self._target.finish_weight_update).parameters
        self._call("finish_weight_update", *[weight_version][: len(takes_version)])

    def weight_version(self) -> str:
        """Return the version passed with the last finished update; `default` before the first.

        Raises:
            CompatError: this vLLM keeps no version (0.25).
        """
        if not hasattr(self._target, "get_weight_version"):
            raise lacking("weight versions", vllm_version(), ("get_weight_version",))
        return str(self._call("get_weight_version"))

    @abstractmethod
    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the target. Raise as `EngineClient` says."""

    def _request(self, name: str, info: dict[str, Any]) -> Any:
        """Return the argument by which the target takes `info` as its field `name`."""
        return info

    def _seconds(self, method: str) -> float | None:
        """Return how long a call may take; None: any time."""
        # It takes as long as the whole sync, which has timeouts of its own.
        return None if method == "update_weights" else self.timeout_seconds


class FourMethodClient(MethodClient):
    """An object with vLLM's four methods only, such as `RayVLLMWeightSyncClient`. Its caller pauses
    the engine and empties its caches. Foreign errors are translated."""

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        with translating(method):
            # vLLM's client for Ray waits without end for an actor that hangs.
            answer = in_thread(
                method, partial(getattr(self._target, method), *arguments, **options)
            )
            if ends_within(answer, self._seconds(method)):
                return answer.result()
            raise timed_out(ENGINE, method, self.timeout_seconds)


def vllm_request(name: str, info: dict[str, Any]) -> Any:
    """Return vLLM's request object with `info` as its field `name`. Raises ImportError."""
    from vllm.distributed.weight_transfer import base

    kinds = {
        "init_info": base.WeightTransferInitRequest,
        "update_info": base.WeightTransferUpdateRequest,
    }
    return kinds[name](**{name: info})


def as_engine_client(client: WeightSyncClient, timeout_seconds: float = 300) -> EngineClient:
    """Return `client`, adapted if it has vLLM's four methods only.

    Args:
        timeout_seconds: of each of these methods but `update_weights`, when called by the adapter.

    Raises:
        ConfigError: it has others of EngineClient's and does not declare them by inheriting it.
            They would not be called: the engine would keep work of old weights, for instance.
    """
    if isinstance(client, EngineClient):
        return client
    required = EngineClient.__abstractmethods__
    for name, method in vars(EngineClient).items():
        if inspect.isfunction(method) and name not in required and hasattr(client, name):
            raise ConfigError(
                f"{type(client).__name__} has {name}, and is no EngineClient: inherit "
                "qerl_sync.engines.base.EngineClient, so that it is called"
            )
    return FourMethodClient(client, timeout_seconds)


# Sampling parameters of a request that asks for nothing but the prompt's log-probabilities.
PROBING: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}


def num_workers(engine: Any) -> int:
    """Count the workers behind an `LLMEngine` or `AsyncLLM`.

    It drives one engine core for each data parallel replica, and of a deployment on several nodes
    perhaps only its own: `world_size_across_dp` would count the others too.
    """
    replicas = len(getattr(engine.engine_core, "core_engines", [None]))
    return int(engine.vllm_config.parallel_config.world_size) * replicas


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
    """Return a function that refuses a request, which a paused engine would let wait."""

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise PoisonedError(why_refused(reason))

    return refuse


def why_refused(reason: str) -> str:
    """Return the error text for a request that a paused engine would let wait."""
    return (
        f"this engine does not generate: {reason}. Its weights may be a mix of two versions, "
        "and it is paused; run a full sync (`session.push()`) to make them right"
    )


def in_thread(what: str, function: Callable[[], Any]) -> Future[Any]:
    """Run `function` in a thread of its own, which dies with the process, whatever the engine does.
    vLLM leaves calls unanswered in which its engine dies."""
    answer: Future[Any] = Future()

    def run() -> None:
        try:
            answer.set_result(function())
        except BaseException as exc:
            answer.set_exception(exc)

    threading.Thread(target=run, name=f"qerl-sync {what}", daemon=True).start()
    return answer


def ends_within(
    answer: Future[Any],
    timeout_seconds: float | None,
    check_alive: Callable[[], None] = lambda: None,
    poll_seconds: float = POLL_SECONDS,
) -> bool:
    """Return whether a call that another thread makes ends, well or badly, within this time.

    Args:
        timeout_seconds: None: it may take any time.
        check_alive: called every `poll_seconds`; raises if waiting has become pointless.
    """
    deadline = time.monotonic() + (math.inf if timeout_seconds is None else timeout_seconds)
    while (left := deadline - time.monotonic()) > 0:
        if wait([answer], min(poll_seconds, left)).done:
            return True
        check_alive()
    return answer.done()


def require_alive(engine: Any, method: str) -> None:
    """Raise PeerLostError if the process of an `LLMEngine` or `AsyncLLM` has died.

    vLLM's client notices the death, but tells only the next caller.
    """
    core = engine.engine_core
    if core.resources.engine_dead:
        # The threads of calls that it left unanswered would wait for them without end.
        for unanswered in list(getattr(core, "utility_results", {}).values()):
            if isinstance(unanswered, Future):
                with suppress(InvalidStateError):  # it has its answer
                    unanswered.set_exception(lost(ENGINE, method))
        raise lost(ENGINE, method)


def timed_out(engine: str, method: str, seconds: float) -> TransportTimeout:
    return TransportTimeout(
        f"{method}: {engine} did not answer within {seconds:g} s; look at its log, or give the "
        "client a longer timeout_seconds"
    )


@contextmanager
def translating(method: str) -> Iterator[None]:
    """Raise errors of ours for those that a call of vLLM in Python raises."""
    try:
        yield
    except SyncError:
        raise
    except Exception as exc:
        raise translated(exc, ENGINE, method) from exc


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
