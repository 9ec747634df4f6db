"""What tests ask of a vLLM worker in another process, over vLLM's own `collective_rpc`."""

from __future__ import annotations

from typing import Any

from qerl_sync.faults.extension import fresh_model
from support.fingerprint import fingerprint

NAME = f"{__name__}.WorkerExtension"


async def ask_every_worker(engine: Any, method: str, *arguments: str) -> list[Any]:
    """Call a method of `WorkerExtension` on all data parallel replicas of an `AsyncLLM`, whose own
    `collective_rpc` returns what the first one answers."""
    core = engine.engine_core
    told = ("collective_rpc", method, None, list(arguments), {})
    return [
        answer
        for replica in core.core_engines
        for answer in await core._call_utility_async(*told, engine=replica)
    ]


class WorkerExtension:
    """A base that vLLM gives to its worker class (`worker_extension_cls`)."""

    model_runner: Any
    vllm_config: Any

    def held_weights(self) -> dict[str, str]:
        """What this rank's kernels hold."""
        return fingerprint(self.model_runner.model)

    def fresh_weights(self, path: str) -> dict[str, str]:
        """What they would hold, had this rank been started with the checkpoint at `path`."""
        return fingerprint(fresh_model(self.vllm_config, path))
