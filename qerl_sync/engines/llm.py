"""Drive a `vllm.LLM`, with its engine in this process or in one of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from qerl_sync.engines.base import (
    ENGINE,
    PROBING,
    MethodClient,
    PauseMode,
    ends_within,
    in_thread,
    num_workers,
    read_prompt_logprobs,
    refusal,
    require_alive,
    timed_out,
    translating,
)
from qerl_sync.errors import TransportError
from qerl_sync.worker.compat.caches import forget_caches, llm_method


class LLMClient(MethodClient):
    """Drive a `vllm.LLM` as an EngineClient.

    Example:
        llm = LLM(path, weight_transfer_config={"backend": "qerl"})
        with SyncSession(source, RemoteTransport(LLMClient(llm)), config) as session:
            session.push(step=1)

    An engine in this process runs within `generate` only, so there pausing has nothing to do, and
    no timeout can end a call. One thread at a time may use `llm`, whether here or by `generate`.

    Args:
        llm: as its user made it, with weight_transfer_config={"backend": "qerl"}.
        timeout_seconds: how long one call but `update_weights` may take where the engine has a
            process of its own. After one that took longer the client refuses all others: the
            engine is lost.
    """

    def __init__(self, llm: Any, timeout_seconds: float = 300) -> None:
        super().__init__(llm, timeout_seconds)
        self.llm = llm
        # vLLM sets it for engines that it runs in this process, and only for them.
        self.in_process = getattr(llm.llm_engine, "model_executor", None) is not None
        self._stuck_in: str | None = None

    def pause(self, mode: PauseMode) -> None:
        if not self.in_process:
            self._call("sleep", level=0, mode=mode)
        elif mode == "abort":
            engine = self.llm.llm_engine
            left = list(engine.output_processor.request_states)
            if left:
                self._run("abort", partial(engine.abort_request, left, internal=True))

    def resume(self) -> None:
        if not self.in_process:
            self._call("wake_up", tags=["scheduling"])

    def reset_caches(self, *, running: bool) -> bool | None:
        return forget_caches(self._call, running=running)

    def refuse(self, reason: str) -> None:
        # Patches this object alone. Every request to a `LLM` goes through it.
        self.llm.llm_engine.add_request = refusal(reason)

    def admit(self) -> None:
        vars(self.llm.llm_engine).pop("add_request", None)

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        from vllm import SamplingParams

        prompt = {"prompt_token_ids": list(token_ids)}
        asked = SamplingParams(**PROBING, detokenize=False)
        (answer,) = self._call("generate", [prompt], asked, use_tqdm=False)
        return read_prompt_logprobs(token_ids, answer.prompt_logprobs)

    def world_size(self) -> int:
        """See `EngineClient`."""
        return num_workers(self.llm.llm_engine)

    def _request(self, name: str, info: dict[str, Any]) -> dict[str, Any]:
        return {name: info}

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        return self._run(method, lambda: llm_method(self.llm, method)(*arguments, **options))

    def _run(self, method: str, call: Callable[[], Any]) -> Any:
        if self._stuck_in is not None:
            raise TransportError(
                f"{method}: {ENGINE} still has not answered {self._stuck_in}; start it anew"
            )
        with translating(method):
            if self.in_process:
                # Kernels run here: on another thread they would start a thread pool of their own.
                return call()
            # vLLM itself waits without end, also for an engine that has died.
            answer = in_thread(method, call)
            check_alive = partial(require_alive, self.llm.llm_engine, method)
            if ends_within(answer, self._seconds(method), check_alive):
                return answer.result()
            self._stuck_in = method
            raise timed_out(ENGINE, method, self.timeout_seconds)
