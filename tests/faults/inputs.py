"""Bad inputs: what a source can get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from faults.triggers import InjectedFault, Named, Stream, Trigger

if TYPE_CHECKING:
    import torch

Spoil = Callable[[Stream, Trigger], Iterator[Named]]
Pairs = list[Named]


def victim_of(names: list[str], part: str = "gate_proj.weight", layer: int = 1) -> str:
    """The tensor that the fault is about: of a layer with several parts, in the middle."""
    return next(n for n in names if f".layers.{layer}." in n and n.endswith(part))


# ------------------------------------------------------------ the metadata say it beforehand


def without(pairs: Pairs, victim: str) -> Pairs:
    return [(n, t) for n, t in pairs if n != victim]


def without_its_decoder_layer(pairs: Pairs, victim: str) -> Pairs:
    layer = ".layers."
    number = victim.partition(layer)[2].partition(".")[0]
    return [(n, t) for n, t in pairs if f"{layer}{number}." not in n]


def twice(pairs: Pairs, victim: str) -> Pairs:
    return [*pairs, next((n, t) for n, t in pairs if n == victim)]


def with_unknown(pairs: Pairs, victim: str) -> Pairs:
    return [*pairs, (victim.replace("gate_proj", "gait_proj"), dict(pairs)[victim])]


def transposed(pairs: Pairs, victim: str) -> Pairs:
    return _changed(pairs, victim, lambda t: _turned(t).contiguous())


def _turned(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.T.shape == tensor.shape:
        raise AssertionError(
            f"a tensor of shape {list(tensor.shape)} keeps its shape when it is transposed; take "
            "another victim, or a model in which it is not square"
        )
    return tensor.T


def as_fp8(pairs: Pairs, victim: str) -> Pairs:
    import torch

    return _changed(pairs, victim, lambda t: t.to(torch.float8_e4m3fn))


def as_int64(pairs: Pairs, victim: str) -> Pairs:
    import torch

    return _changed(pairs, victim, lambda t: (t * 100).to(torch.int64))


def as_float64(pairs: Pairs, victim: str) -> Pairs:
    """No fault: vLLM casts it, and it reaches further than any dtype that an engine computes in."""
    return _changed(pairs, victim, lambda t: t.double())


def _changed(pairs: Pairs, victim: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Pairs:
    return [(n, change(t) if n == victim else t) for n, t in pairs]


ANNOUNCED: dict[str, Callable[[Pairs, str], Pairs]] = {
    "missing tensor": without,
    "missing decoder layer": without_its_decoder_layer,
    "doubled tensor": twice,
    "unexpected tensor": with_unknown,
    "wrong shape": transposed,
    "fp8 bytes for a float parameter": as_fp8,
    "int64 for a float parameter": as_int64,
}


# ------------------------------------------------------- the stream differs from the metadata


def _at(victim: str, change: Callable[[str, torch.Tensor], Iterator[Named]]) -> Spoil:
    def spoil(stream: Stream, trigger: Trigger) -> Iterator[Named]:
        for name, tensor in stream:
            if name != victim:
                yield name, tensor
                continue
            trigger.mark()
            yield from change(name, tensor)

    return spoil


def dropped(victim: str) -> Spoil:
    return _at(victim, lambda n, t: iter(()))


def doubled(victim: str) -> Spoil:
    return _at(victim, lambda n, t: iter([(n, t), (n, t)]))


def renamed(victim: str) -> Spoil:
    return _at(victim, lambda n, t: iter([(n.replace("gate", "gait"), t)]))


def reshaped(victim: str) -> Spoil:
    return _at(victim, lambda n, t: iter([(n, _turned(t))]))


def recast(victim: str) -> Spoil:
    import torch

    return _at(victim, lambda n, t: iter([(n, t.to(torch.float8_e4m3fn))]))


def spoiled_with(value: float) -> Callable[[str], Spoil]:
    def change(name: str, tensor: torch.Tensor) -> Iterator[Named]:
        tensor = tensor.clone()
        tensor.view(-1)[7] = value
        yield name, tensor

    return lambda victim: _at(victim, change)


LATE: dict[str, Callable[[str], Spoil]] = {
    "missing in the stream": dropped,
    "doubled in the stream": doubled,
    "renamed in the stream": renamed,
    "wrong shape in the stream": reshaped,
    "fp8 bytes in the stream": recast,
    "NaN": spoiled_with(math.nan),
    "infinity": spoiled_with(math.inf),
}


def raising_at(index: int, total: int) -> Spoil:
    """An exception instead of tensor `index` of the sync, in sending order."""
    seen = [0]

    def spoil(stream: Stream, trigger: Trigger) -> Iterator[Named]:
        for name, tensor in stream:
            if seen[0] == index % total:
                trigger.mark()
                raise InjectedFault("the source failed")
            seen[0] += 1
            yield name, tensor

    return spoil


def raising_before(victim: str) -> Spoil:
    def spoil(stream: Stream, trigger: Trigger) -> Iterator[Named]:
        for name, tensor in stream:
            if name == victim:
                trigger.mark()
                raise InjectedFault("the source failed")
            yield name, tensor

    return spoil


def reusing_its_buffer(stream: Stream, trigger: Trigger) -> Iterator[Named]:
    """Every tensor lies in the same memory, which the next one overwrites."""
    import torch

    buffer = torch.empty(0)
    for name, tensor in stream:
        if buffer.numel() < tensor.numel():
            buffer = torch.empty(1 << 20)
        trigger.mark()
        # Not through autograd's counting of changes: a network card does not take part in it.
        lent = buffer[: tensor.numel()].view(tensor.shape)
        lent.data.copy_(tensor)
        yield name, lent
