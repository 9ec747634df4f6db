"""What rollout actors return."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rollout:
    """One completion.

    Attributes:
        logprobs: of each completion token, under the engine's weights.
        version: of the weights that it was generated with, all of it.
        worker: the actor's name.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    text: str
    version: int
    worker: str
