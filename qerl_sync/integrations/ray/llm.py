"""A pool of rollout actors in the place of the `LLM` that TRL generates with."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from qerl_sync.integrations.ray.pool import Batch, WorkerPool
from qerl_sync.integrations.ray.rollouts import Rollout

Key = tuple[tuple[int, ...], ...]


class PooledLLM:
    """What TRL's colocated generation uses of a `vllm.LLM`, done by all workers of a pool.

    Args:
        max_model_len: of the workers' engines.
        max_staleness: how many versions completions may be behind the newest. With more than 0,
            batches that were announced by `expect` are generated ahead, from when the batch before
            them has been handed out.

    Attributes:
        last: what `generate` returned last, with versions and workers.
    """

    def __init__(
        self, pool: WorkerPool, *, max_model_len: int | None = None, max_staleness: int = 0
    ) -> None:
        self.pool = pool
        self.max_staleness = max_staleness
        self.last: list[Rollout] = []
        self._coming: deque[list[list[int]]] = deque()
        self._begun: dict[Key, Batch] = {}
        config = SimpleNamespace(max_model_len=max_model_len)
        self.llm_engine = SimpleNamespace(model_config=config)

    def expect(self, prompts: list[list[int]]) -> None:
        """A later call of `generate` will be for exactly these."""
        self._coming.append(prompts)

    def generate(
        self, prompts: Sequence[Any], sampling_params: Any, use_tqdm: bool = False
    ) -> list[Any]:
        """As `vllm.LLM.generate`, of the outputs what TRL reads."""
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        key, newest = _key(ids), self.pool.newest_version
        batch = self._begun.pop(key, None) or self.pool.submit(ids, sampling_params)
        self.last = batch.result(newest - self.max_staleness)
        self._begin_next(sampling_params, key)
        return [_as_output(rollout) for rollout in self.last]

    def _begin_next(self, sampling: Any, done: Key) -> None:
        """Generate ahead with the weights as they are now."""
        if self._coming and _key(self._coming[0]) == done:
            self._coming.popleft()
        for prompts in list(self._coming)[: self.max_staleness]:
            key = _key(prompts)
            if key not in self._begun:
                self._begun[key] = self.pool.submit(prompts, sampling)


class Announcing:
    """A data loader that tells of the batches to come, `ahead` of them, before it yields one.

    Args:
        expect: called once with each batch out of which completions will be generated.
        every: so many batches in a row share their completions.
    """

    def __init__(self, loader: Any, expect: Any, *, ahead: int, every: int) -> None:
        self._loader = loader
        self._expect = expect
        self._ahead = ahead * every
        self._every = every

    def __iter__(self) -> Any:
        waiting: deque[Any] = deque()
        for index, batch in enumerate(self._loader):
            if index % self._every == 0:
                self._expect(batch)
            waiting.append(batch)
            if len(waiting) > self._ahead:
                yield waiting.popleft()
        yield from waiting

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _key(prompts: Sequence[Sequence[int]]) -> Key:
    return tuple(tuple(ids) for ids in prompts)


def _as_output(rollout: Rollout) -> Any:
    logprobs = [
        {token: SimpleNamespace(logprob=logprob, rank=1)}
        for token, logprob in zip(rollout.completion_ids, rollout.logprobs, strict=True)
    ]
    completion = SimpleNamespace(token_ids=rollout.completion_ids, logprobs=logprobs)
    return SimpleNamespace(prompt_token_ids=rollout.prompt_ids, outputs=[completion])
