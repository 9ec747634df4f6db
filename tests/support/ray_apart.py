"""Rollout actors whose engines have processes of their own, with a look at what those hold."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from qerl_sync.integrations.ray.actors import RolloutActor
from qerl_sync.integrations.ray.in_flight import AsyncRolloutActor
from support.worker_extension import ask_every_worker


class Parallel(RolloutActor):
    """A `LLM` with tensor parallel ranks."""

    def rpc(self, method: str, *arguments: str) -> list[dict[str, str]]:
        return list(self.llm.collective_rpc(method, args=arguments))


class InFlight(AsyncRolloutActor):
    """An `AsyncLLM`."""

    STALLED_SECONDS: ClassVar[float] = 1.0

    def rpc(self, method: str, *arguments: str) -> list[dict[str, str]]:
        asked = ask_every_worker(self.llm, method, *arguments)
        return list(asyncio.run_coroutine_threadsafe(asked, self._loop).result(60))

    def in_flight(self) -> int:
        """How many requests."""
        return len(self.llm.output_processor.request_states)

    def core_pid(self) -> int:
        """The process of the engine."""
        return int(self.llm.engine_core.resources.engine_manager.processes[0].pid)
