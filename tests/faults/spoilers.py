"""Bad inputs: what a source can get wrong. `victim` is the tensor that the fault is about."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch

from faults.triggers import InjectedFault, Named, Stream, Trigger

Pairs = list[Named]
Spoil = Callable[[Stream, Trigger], Iterator[Named]]


def victim_of(names: Iterable[str], part: str = "gate_proj.weight", layer: int = 1) -> str:
    """By default one of a layer with several parts, in the middle."""
    return next(n for n in names if f".layers.{layer}." in n and n.endswith(part))


def misspelt(name: str) -> str:
    return name.replace("gate", "gait")


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.T.shape == tensor.shape:
        raise AssertionError(
            f"a tensor of shape {list(tensor.shape)} keeps its shape when it is transposed; take "
            "another victim, or a model in which it is not square"
        )
    return tensor.T.contiguous()


def as_fp8(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float8_e4m3fn)


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[7] = value
        return tensor

    return change


# ------------------------------------------------------------ the metadata say it beforehand


def without(pairs: Pairs, victim: str) -> Pairs:
    return [(n, t) for n, t in pairs if n != victim]


def without_its_decoder_layer(pairs: Pairs, victim: str) -> Pairs:
    layer = victim[: victim.index(".", victim.index(".layers.") + len(".layers.")) + 1]
    return [(n, t) for n, t in pairs if not n.startswith(layer)]


def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Pairs, str], Pairs]:
    return lambda pairs, victim: [(n, change(t) if n == victim else t) for n, t in pairs]


ANNOUNCED: dict[str, Callable[[Pairs, str], Pairs]] = {
    "missing tensor": without,
    "missing decoder layer": without_its_decoder_layer,
    "doubled tensor": lambda pairs, victim: [*pairs, (victim, dict(pairs)[victim])],
    "unexpected tensor": lambda pairs, victim: [*pairs, (misspelt(victim), dict(pairs)[victim])],
    "wrong shape": changed(transposed),
    "fp8 bytes for a float parameter": changed(as_fp8),
    "int64 for a float parameter": changed(lambda t: (t * 100).to(torch.int64)),
}


# ------------------------------------------------------- the stream differs from the metadata

# What comes instead of the victim.
LATE: dict[str, Callable[[str, torch.Tensor], list[Named]]] = {
    "missing in the stream": lambda n, t: [],
    "doubled in the stream": lambda n, t: [(n, t), (n, t)],
    "renamed in the stream": lambda n, t: [(misspelt(n), t)],
    "wrong shape in the stream": lambda n, t: [(n, transposed(t))],
    "fp8 bytes in the stream": lambda n, t: [(n, as_fp8(t))],
    "NaN": lambda n, t: [(n, with_value(math.nan)(t))],
    "infinity": lambda n, t: [(n, with_value(math.inf)(t))],
}


def replaced(victim: str, change: Callable[[str, torch.Tensor], Iterable[Named]]) -> Spoil:
    def spoil(stream: Stream, trigger: Trigger) -> Iterator[Named]:
        for name, tensor in stream:
            if name == victim:
                trigger.mark()
                yield from change(name, tensor)
            else:
                yield name, tensor

    return spoil


def fail(name: str, tensor: torch.Tensor) -> list[Named]:
    raise InjectedFault("the source failed")


def failing_at(index: int) -> Spoil:
    """An exception instead of tensor `index` of the sync, in sending order."""
    count = 0

    def spoil(stream: Stream, trigger: Trigger) -> Iterator[Named]:
        nonlocal count
        for name, tensor in stream:
            if count == index:
                trigger.mark()
                fail(name, tensor)
            count += 1
            yield name, tensor

    return spoil


def reusing_its_buffer(stream: Stream, trigger: Trigger) -> Iterator[Named]:
    """Every tensor lies in the same memory, which the next one overwrites."""
    buffer = torch.empty(1 << 20)
    for name, tensor in stream:
        trigger.mark()
        # Not through autograd's counting of changes: a network card does not take part in it.
        in_session = buffer[: tensor.numel()].view(tensor.shape)
        in_session.data.copy_(tensor)
        yield name, in_session
