"""Drive an `AsyncLLM` that runs on another thread's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from qerl_sync.engines.base import (
    POLL_SECONDS,
    PROBING,
    EngineClient,
    PauseMode,
    ends_within,
    num_workers,
    read_prompt_logprobs,
    refusal,
    require_alive,
    timed_out,
    translated,
    version_arguments,
)
from qerl_sync.errors import TransportError
from qerl_sync.worker.compat.caches import ask_every_replica, forget_caches
from qerl_sync.worker.compat.coupling import lacking, vllm_version

ENGINE = "the vLLM engine"


class AsyncLLMClient(EngineClient):
    """Drive a `vllm.v1.engine.async_llm.AsyncLLM` with blocking calls.

    After `scale_elastic_ep` sync before the next request: nothing refuses it on replicas that have
    joined, which hold the checkpoint's weights.

    Example:
        engine = AsyncLLM.from_engine_args(arguments)  # in a coroutine
        client = AsyncLLMClient(engine, asyncio.get_running_loop())
        session = SyncSession(source, RemoteTransport(client), config)
        await asyncio.to_thread(session.push, step=1)

    Args:
        engine: with weight_transfer_config={"backend": "qerl"}.
        loop: the running loop on which `engine` was made. Its own thread may not call: it would
            wait for itself, and is refused.
        timeout_seconds: how long one call but `update_weights` may take. It is then cancelled.
    """

    def __init__(
        self, engine: Any, loop: asyncio.AbstractEventLoop, timeout_seconds: float = 300
    ) -> None:
        self.engine = engine
        self.loop = loop
        self.timeout_seconds = timeout_seconds

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self._call("init_weight_transfer_engine", WeightTransferInitRequest(init_info=init_info))

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        # It takes as long as the whole sync, which has timeouts of its own.
        request = WeightTransferUpdateRequest(update_info=update_info)
        self._run("update_weights", lambda: self.engine.update_weights(request), None)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        finish = self.engine.finish_weight_update
        self._call("finish_weight_update", *version_arguments(finish, weight_version))

    def pause(self, mode: PauseMode) -> None:
        # vLLM would empty the caches along with it; `reset_caches` does, when the weights are new.
        self._call("pause_generation", mode=mode, clear_cache=False)

    def resume(self) -> None:
        self._call("resume_generation")

    def reset_caches(self, *, running: bool) -> bool | None:
        ask_every_replica(self.engine)
        return forget_caches(self._call, running=running)

    def refuse(self, reason: str) -> None:
        refuse = refusal(reason)

        async def add_request(*arguments: Any, **options: Any) -> None:
            refuse()

        # Of this object alone. Its own `generate` and `encode` would raise EngineGenerateError,
        # without a text, in place of what `add_request` raises.
        vars(self.engine).update(add_request=add_request, generate=refuse, encode=refuse)

    def admit(self) -> None:
        for name in ("add_request", "generate", "encode"):
            vars(self.engine).pop(name, None)

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        answer = self._run("generate", lambda: self._ask(list(token_ids)), self.timeout_seconds)
        return read_prompt_logprobs(token_ids, answer.prompt_logprobs)

    async def _ask(self, token_ids: list[int]) -> Any:
        from vllm import SamplingParams

        prompt, asked = {"prompt_token_ids": token_ids}, SamplingParams(**PROBING, detokenize=False)
        name = f"qerl-sync-probe-{uuid.uuid4().hex}"
        return [answer async for answer in self.engine.generate(prompt, asked, name)][-1]

    def weight_version(self) -> str:
        """Return the version passed with the last finished update; `default` before the first.

        Raises:
            CompatError: this vLLM keeps no version (0.25).
        """
        if not hasattr(self.engine, "get_weight_version"):
            raise lacking("weight versions", vllm_version(), ("get_weight_version",))
        return str(self._call("get_weight_version"))

    def world_size(self) -> int:
        """See `EngineClient`."""
        return num_workers(self.engine.vllm_config, getattr(self.engine, "engine_core", None))

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        return self._run(
            method,
            lambda: getattr(self.engine, method)(*arguments, **options),
            self.timeout_seconds,
        )

    def _run(
        self,
        method: str,
        start: Callable[[], Coroutine[Any, Any, Any]],
        timeout_seconds: float | None,
    ) -> Any:
        with contextlib.suppress(RuntimeError):  # this thread runs no loop
            if asyncio.get_running_loop() is self.loop:
                raise TransportError(
                    f"{method}: called on the event loop of {ENGINE}, which would wait for itself; "
                    "call from another thread, for instance with asyncio.to_thread"
                )
        call = start()
        try:
            answer = asyncio.run_coroutine_threadsafe(call, self.loop)
        except RuntimeError as exc:
            call.close()
            raise TransportError(f"{method}: the event loop of {ENGINE} is closed") from exc
        try:
            core = getattr(self.engine, "engine_core", None)
            check_alive = partial(require_alive, core, ENGINE, method)
            if ends_within(answer, timeout_seconds, POLL_SECONDS, check_alive):
                return answer.result()
            raise timed_out(ENGINE, method, self.timeout_seconds)
        except Exception as exc:
            answer.cancel()  # nothing, if it has ended
            error = translated(exc, ENGINE, method)
            if error is exc:
                raise
            raise error from exc
