"""A rollout actor whose requests in flight survive a sync: they pause, and continue with the new
weights.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Any, ClassVar

import ray

from qerl_sync.engines.base import PauseMode
from qerl_sync.errors import PoisonedError
from qerl_sync.integrations.ray.actors import Prompts, Rollout, RolloutActor, with_defaults

GENERATION = "generation"
POLL_SECONDS = 0.2


class AsyncRolloutActor(RolloutActor):
    """Generate with an `AsyncLLM`: several calls of `generate` at a time, and syncs beside them.

    Example:
        pool = WorkerPool.start(2, {"model": path}, actor=AsyncRolloutActor)
        batch = pool.submit(prompts, {"max_tokens": 512})
        ray.get(trainer.sync_weights.remote())  # does not wait for the batch
        rollouts = batch.result()

    With `sync.pause_mode: keep` they go on after it with the new weights; a `Rollout` says which
    version it was asked of and which it ended with. With `wait` the sync waits for those that have
    begun. With `abort`, and where a sync fails, they are refused with PoisonedError, and a
    `WorkerPool` has them generated anew.

    The engine has a process of its own, so that chunks do not come by Ray's object store.

    Attributes:
        STALLED_SECONDS: an engine that is paused is in the middle of a sync. One with which nothing
            has been done for so long is not resumed: the sync has failed, or its trainer died.
    """

    CONCURRENCY: ClassVar[Mapping[str, int]] = {**RolloutActor.CONCURRENCY, GENERATION: 64}
    STALLED_SECONDS: ClassVar[float] = 10.0

    def __init__(self, *args: Any, **options: Any) -> None:
        # When a sync last did something with the engine; infinite while it does.
        self._moved = 0.0
        super().__init__(*args, **options)

    @ray.method(concurrency_group=GENERATION)  # type: ignore[untyped-decorator]
    def generate(
        self, prompts: Prompts, sampling: Any = None, required_version: int = 0
    ) -> list[Rollout]:
        """Generate as the base class does, in a separate thread."""
        return super().generate(prompts, sampling, required_version)

    def pause(self, mode: PauseMode) -> None:
        with self._moving():  # `wait`: for as long as requests take
            super().pause(mode)

    def update_weights(self, request: Any) -> None:
        with self._moving():  # a whole sync
            super().update_weights(request)

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """Mark a call that may be slow, so that it does not count as stalled."""
        self._moved = math.inf
        try:
            yield
        finally:
            self._moved = time.monotonic()

    # ---- the engine

    def _is_apart(self, engine: Mapping[str, Any]) -> bool:
        return True

    def _start(self, engine: Mapping[str, Any]) -> Any:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="engine loop", daemon=True).start()
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        async def started() -> Any:  # on the loop that is to run it
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**with_defaults(engine)))

        return asyncio.run_coroutine_threadsafe(started(), self._loop).result()

    def _control(self, llm: Any) -> Any:
        from qerl_sync.engines.async_llm import AsyncLLMClient

        return AsyncLLMClient(llm, self._loop)

    def _core(self, llm: Any) -> Any:
        return llm.engine_core

    # ---- generation

    def _complete(self, prompts: list[Any], sampling: Any) -> list[tuple[Any, int]]:
        from vllm.sampling_params import RequestOutputKind

        sampling = sampling.clone()
        sampling.output_kind = RequestOutputKind.FINAL_ONLY
        answers = asyncio.run_coroutine_threadsafe(self._outputs(prompts, sampling), self._loop)
        while not wait([answers], POLL_SECONDS).done:
            if self._paused and time.monotonic() - self._moved > self.STALLED_SECONDS:
                answers.cancel()  # vLLM then forgets the requests
                raise PoisonedError(
                    f"{self.name} does not go on: it was paused for a sync, which has failed. "
                    "Sync in full, and ask again"
                )
        return answers.result()

    async def _outputs(self, prompts: list[Any], sampling: Any) -> list[tuple[Any, int]]:
        tasks = [asyncio.ensure_future(self._output(prompt, sampling)) for prompt in prompts]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:  # the others would generate for nothing
            for task in tasks:
                task.cancel()
            raise

    async def _output(self, prompt: Any, sampling: Any) -> tuple[Any, int]:
        answers = self.llm.generate(prompt, sampling, uuid.uuid4().hex)
        output = [answer async for answer in answers][-1]
        if any(completion.finish_reason == "abort" for completion in output.outputs):
            raise PoisonedError(
                f"{self.name} has given up what it generated, for a sync (sync.pause_mode: abort); "
                "ask again when that is over"
            )
        return output, self.version
