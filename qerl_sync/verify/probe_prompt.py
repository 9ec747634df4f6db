"""Compare trainer and engine on a fixed prompt, within the tolerance that rounding allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qerl_sync.errors import ConfigError

# The largest difference of a log-probability that rounding explains, by the dtype that the engine
# computes in. float32: kernels that add up in another order part by less than 1e-5. bfloat16: by
# 1e-3 to 4e-2 in what we measured; a stale head or layer parts by 0.3 and more.
TOLERANCES = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.15}

NUM_TOKENS = 24


@dataclass(frozen=True)
class Probe:
    """The trainer model's answer to a fixed prompt.

    Attributes:
        token_ids: of the prompt.
        logprobs: of each of its tokens but the first, given those before it, with the trainer's
            present weights. Called on every trainer rank.
        noisy: the same, by (token_ids, noise, stored=None): with the tensors of `noise` added to
            the weights of these checkpoint names, and with weights as the engine stores them
            (`verify.stored`), for the moment of the call. `sync.noise` needs it.
    """

    token_ids: tuple[int, ...]
    logprobs: Callable[[Sequence[int]], Sequence[float]]
    noisy: Callable[..., Sequence[float]] | None = None


def spread_tokens(vocab_size: int) -> tuple[int, ...]:
    """Return token ids spread over the vocabulary, always the same."""
    return tuple((1 + 7919 * i) % vocab_size for i in range(NUM_TOKENS))


def shortened(token_ids: tuple[int, ...], context_tokens: int) -> tuple[int, ...]:
    """Return the part of the prompt that leaves room for one token more, of 0 for no limit.

    Raises:
        ConfigError: too little to tell anything.
    """
    if not context_tokens:
        return token_ids
    taken = token_ids[: context_tokens - 1]
    if len(taken) < 2:
        raise ConfigError(
            f"the engine's max_model_len is {context_tokens}, and sync.verify: full asks it a "
            "prompt of at least 2 tokens, for one more; raise it, or choose verify: checksum"
        )
    return taken


def tolerance(dtype: str, quantization: str | None, asked: float | None) -> float:
    """Return the tolerance. Raise ConfigError if it cannot be known beforehand."""
    if asked is not None:
        return asked
    if quantization is not None or dtype not in TOLERANCES:
        raise ConfigError(
            f"an engine that computes in {quantization or dtype} parts from the trainer by more "
            "than rounding; say by how much with sync.verify_tolerance, or choose verify: checksum"
        )
    return TOLERANCES[dtype]


def largest_gap(trainer: Sequence[float], engine: Sequence[float]) -> float:
    """Return the largest gap. NaN counts as infinite."""
    gaps = [abs(a - b) for a, b in zip(trainer, engine, strict=True)]
    return max(gap if gap == gap else float("inf") for gap in gaps)
