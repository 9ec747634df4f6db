"""Replace the `LLM` that TRL generates with by a pool of rollout actors."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from qerl_sync.errors import ConfigError, TransportError
from qerl_sync.integrations.ray.actors import Rollout
from qerl_sync.integrations.ray.pool import Batch, WorkerPool

logger = logging.getLogger(__name__)

Key = tuple[tuple[int, ...], ...]

# How often one call of `generate` lives through the loss of all workers.
RECOVERIES = 3


class PooledLLM:
    """Offer what TRL's colocated generation uses of a `vllm.LLM`, with all workers of a pool.

    Args:
        max_model_len: of the workers' engines.
        max_staleness: how many versions completions may be behind the newest. With more than 0,
            batches that were announced by `expect` are generated ahead, from when the batch before
            them has been handed out.

    Attributes:
        recover: called when no worker is left that may generate: to wait for one and sync it.
            None: that is an error.
        last: what `generate` returned last, with versions and workers.
    """

    def __init__(
        self, pool: WorkerPool, *, max_model_len: int | None = None, max_staleness: int = 0
    ) -> None:
        self.pool = pool
        self.max_staleness = max_staleness
        self.recover: Callable[[], None] | None = None
        self.last: list[Rollout] = []
        self._coming: deque[Key] = deque()
        self._begun: dict[Key, Batch] = {}
        config = SimpleNamespace(max_model_len=max_model_len)
        self.llm_engine = SimpleNamespace(model_config=config)

    def expect(self, prompts: list[list[int]]) -> None:
        """Announce that a later call of `generate` will have exactly these prompts."""
        self._coming.append(_key(prompts))

    def generate(
        self, prompts: Sequence[Any], sampling_params: Any, use_tqdm: bool = False
    ) -> list[Any]:
        """Generate as `vllm.LLM.generate` does; return the output fields that TRL reads.

        Raises:
            ConfigError: prompts have images or the like, and batches are generated ahead.
        """
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        key = _key(ids)
        # What belongs to a prompt besides its tokens, such as images, goes with it.
        given = [prompt if len(prompt) > 1 else prompt["prompt_token_ids"] for prompt in prompts]
        if self.max_staleness and given != ids:
            extra = sorted({name for prompt in prompts for name in prompt} - {"prompt_token_ids"})
            raise ConfigError(
                f"prompts have {', '.join(extra)}, and batches are announced by their tokens "
                "alone: those generated ahead would be without it; set max_staleness to 0",
                extra=tuple(extra),
            )
        self.last = self._generated(given, sampling_params, key, RECOVERIES)
        self._begin_next(sampling_params, key)
        return [
            SimpleNamespace(
                prompt_token_ids=rollout.prompt_ids,
                outputs=[
                    SimpleNamespace(
                        token_ids=rollout.completion_ids,
                        logprobs=_logprobs(rollout),
                    )
                ],
            )
            for rollout in self.last
        ]

    def _generated(
        self, prompts: list[Any], sampling: Any, key: Key, recoveries: int
    ) -> list[Rollout]:
        try:
            batch = self._begun.pop(key, None) or self.pool.submit(prompts, sampling)
            return batch.result(self.pool.newest_version - self.max_staleness)
        except TransportError as exc:
            if self.recover is None or not recoveries:
                raise
            logger.warning("waiting for a worker, to sync it and go on: %s", exc)
        self.recover()
        return self._generated(prompts, sampling, key, recoveries - 1)

    def _begin_next(self, sampling: Any, done: Key) -> None:
        """Start generating the next batch ahead, with the present weights."""
        # Batches come in the order of their announcement: earlier ones were skipped, and would
        # keep their completions for ever.
        if done in self._coming:
            while (skipped := self._coming.popleft()) != done:
                self._begun.pop(skipped, None)
        for key in list(self._coming)[: self.max_staleness]:
            if key not in self._begun:
                with suppress(TransportError):  # no worker is up: generated when it is asked for
                    self._begun[key] = self.pool.submit([list(ids) for ids in key], sampling)


class Announcer:
    """Read ahead in an epoch's batches and announce the coming ones.

    It reads the iterator that the trainer reads from, whatever loader that belongs to: when a run
    is resumed, it is another loader than `get_train_dataloader` has made.

    Args:
        expect: called once with each batch out of which completions will be generated.
        ahead: the number of batches to announce besides the one that is trained on.
        every: the number of batches in a row that share their completions.
    """

    def __init__(self, expect: Callable[[Any], None], *, ahead: int, every: int) -> None:
        self._expect = expect
        self._ahead = ahead * every
        self._every = every
        self._given: Any = None
        self._announced: Iterator[Any] = iter(())

    def of(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the same batches. A second call with the same iterator goes on with it."""
        if batches is not self._given:
            self._given, self._announced = batches, self._announcing(batches)
        return self._announced

    def _announcing(self, batches: Iterator[Any]) -> Iterator[Any]:
        waiting: deque[Any] = deque()
        for index, batch in enumerate(batches):
            if index % self._every == 0:
                self._expect(batch)
            waiting.append(batch)
            if len(waiting) > self._ahead:
                yield waiting.popleft()
        yield from waiting


def _logprobs(rollout: Rollout) -> list[dict[int, Any]] | None:
    """Return a completion's log-probabilities as vLLM does; None if they were not asked for."""
    if rollout.completion_ids and not rollout.logprobs:
        return None
    pairs = zip(rollout.completion_ids, rollout.logprobs, strict=True)
    return [{token: SimpleNamespace(logprob=logprob, rank=1)} for token, logprob in pairs]


def _key(prompts: Sequence[Sequence[int]]) -> Key:
    return tuple(tuple(ids) for ids in prompts)
