"""A rollout actor without an engine, for Ray's part alone: what it does can be told to it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from qerl_sync import PoisonedError, TrainerActor, WorkerPool
from qerl_sync.bench.echo import hello
from qerl_sync.bench.on_ray import EchoActor
from qerl_sync.errors import AgreementError
from qerl_sync.integrations.ray.actors import Rollout
from support.loaders import TensorSource


class EchoRollout(EchoActor):
    """Its sync is real, its completions are not."""

    def __init__(self) -> None:
        super().__init__()
        self.refusals: list[str] = []
        self.version = 0

    def status(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "node": "?", "qerl-sync": hello().packages["qerl-sync"]}

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.version = int(weight_version or self.version)

    def refuse(self, *kinds: str) -> None:
        """So many of the next calls of `generate`, in these ways."""
        self.refusals = list(kinds)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def generate(self, prompts: Sequence[Any], sampling: Any, required: int) -> list[Rollout]:
        if self.refusals:
            kinds = {"poisoned": PoisonedError, "behind": AgreementError, "wrong": ValueError}
            raise kinds[kind := self.refusals.pop(0)](f"told to be {kind}")
        seconds = (sampling or {}).get("seconds", 0.0)
        time.sleep(seconds)
        name = str(os.getpid())
        return [Rollout(list(p), [1], [0.0], "", self.version, name, self.version) for p in prompts]


class Holder(TrainerActor):
    """A trainer with these weights, or a part of them."""

    def __init__(self, weights: Any = None) -> None:
        self.weights = weights
        if weights is not None:
            self.hold(TensorSource(weights))

    def lead(self, workers: WorkerPool, others: list[Any], **options: Any) -> None:
        self.sync_to(workers, TensorSource(self.weights), others=others, **options)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Plain:
    """An actor of one's own, with vLLM's four methods and signatures."""

    def __init__(self) -> None:
        self._echo = EchoActor()
        self.called: list[str] = []

    def init_weight_transfer_engine(self, request: Any) -> None:
        self._echo.init_weight_transfer_engine({"init_info": _of(request, "init_info")})

    def start_weight_update(self) -> None:
        self.called.append("start")

    def update_weights(self, request: Any) -> None:
        self._echo.update_weights({"update_info": _of(request, "update_info")})

    def finish_weight_update(self) -> None:
        self.called.append("finish")

    def reset_prefix_cache(self) -> bool:
        self.called.append("reset")
        return True

    def calls(self) -> list[str]:
        return self.called


def _of(request: Any, name: str) -> dict[str, Any]:
    return dict(request[name] if isinstance(request, dict) else getattr(request, name))
