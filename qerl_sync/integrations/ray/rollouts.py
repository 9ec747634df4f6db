"""The completions that rollout actors return."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rollout:
    """One completion.

    Attributes:
        logprobs: of each completion token, under the engine's weights.
        version: of the weights that the worker had when it was asked: no token is older.
        worker: the actor's name.
        last_version: of the weights that its last token comes from. Larger than `version` only
            where requests in flight go on after a sync (`AsyncRolloutActor`).
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    text: str
    version: int
    worker: str
    last_version: int
