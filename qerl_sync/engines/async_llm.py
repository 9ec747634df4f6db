"""Drive an `AsyncLLM` that runs on another thread's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from qerl_sync.engines.base import (
    ENGINE,
    PROBING,
    MethodClient,
    PauseMode,
    ends_within,
    num_workers,
    read_prompt_logprobs,
    refusal,
    require_alive,
    timed_out,
    translating,
    vllm_request,
)
from qerl_sync.errors import TransportError
from qerl_sync.worker.compat.caches import ask_every_replica, forget_caches


class AsyncLLMClient(MethodClient):
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
        super().__init__(engine, timeout_seconds)
        self.engine, self.loop = engine, loop

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

        # Patches this object alone. Its own `generate` and `encode` would turn what `add_request`
        # raises into an EngineGenerateError without a text.
        vars(self.engine).update(add_request=add_request, generate=refuse, encode=refuse)

    def admit(self) -> None:
        for name in ("add_request", "generate", "encode"):
            vars(self.engine).pop(name, None)

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        answer = self._run("generate", lambda: self._ask(list(token_ids)))
        return read_prompt_logprobs(token_ids, answer.prompt_logprobs)

    async def _ask(self, token_ids: list[int]) -> Any:
        from vllm import SamplingParams

        prompt, asked = {"prompt_token_ids": token_ids}, SamplingParams(**PROBING, detokenize=False)
        name = f"qerl-sync-probe-{uuid.uuid4().hex}"
        return [answer async for answer in self.engine.generate(prompt, asked, name)][-1]

    def world_size(self) -> int:
        """See `EngineClient`."""
        return num_workers(self.engine)

    def _request(self, name: str, info: dict[str, Any]) -> Any:
        return vllm_request(name, info)

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        return self._run(method, lambda: getattr(self.engine, method)(*arguments, **options))

    def _run(self, method: str, start: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
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
            with translating(method):
                check_alive = partial(require_alive, self.engine, method)
                if ends_within(answer, self._seconds(method), check_alive):
                    return answer.result()
                raise timed_out(ENGINE, method, self.timeout_seconds)
        finally:
            answer.cancel()  # nothing, if it has ended
