"""Sync weights whose parts are held by several trainer actors."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch

from qerl_sync.errors import CoverageError, PeerLostError, SyncError, TransportTimeout
from qerl_sync.integrations.ray.cluster import require_ray
from qerl_sync.meta import ParamMeta
from qerl_sync.sources.base import Source
from qerl_sync.wire.segments import read_only_view

# Names this process among all that Ray starts for one actor.
_PROCESS = secrets.token_hex(8)


class Part:
    """Serve one actor's part of the weights to the actor that syncs. See `TrainerActor.hold`."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def process(self) -> str:
        return _PROCESS

    def metadata(self) -> list[ParamMeta]:
        held = self._source.held_names()
        return [meta for meta in self._source.metadata() if held is None or meta.name in held]

    def checks_finite(self) -> bool:
        return self._source.checks_finite

    def check_finite(self, names: Collection[str]) -> None:
        self._source.check_finite(names)

    def require_unwritten(self) -> None:
        self._source.require_unwritten()

    def tensors(self, names: Sequence[str]) -> list[Any]:
        """Return the tensors' bytes as arrays, which Ray brings to the reader without a copy."""
        return [as_bytes(tensor) for _, tensor in self._source.materialize(names)]


class JoinedSource(Source):
    """Join the parts of several actors into one source.

    Each chunk's tensors are requested when the chunk is due, from all actors at the same time. They
    arrive through Ray's object store.

    Args:
        own: this process's part.
        others: handles of actors that have called `TrainerActor.hold`. They answer between their
            own calls.
        timeout_seconds: how long one may take to answer.
    """

    def __init__(self, own: Source, others: Sequence[Any], timeout_seconds: float = 300.0) -> None:
        self._own = own
        self._others = list(others)
        self._timeout_seconds = timeout_seconds
        self._processes: list[str] = []  # of `others`, when they were first asked
        self._metas: dict[str, ParamMeta] = {}
        self._holder: dict[str, Any] = {}

    def metadata(self) -> list[ParamMeta]:
        """Return the metadata of all parts. If several hold a tensor, the first part counts.

        Raises:
            CoverageError: two parts have a tensor of one name and different dtypes or shapes.
            PeerLostError: Ray has restarted one of the actors.
        """
        processes = self._ask_all("process")
        self._processes = self._processes or processes
        for other, first, now in zip(self._others, self._processes, processes, strict=True):
            if now != first:
                # Its weights would be mixed with the trained ones of the others.
                raise PeerLostError(
                    f"{other}, which holds a part of the weights, was restarted by Ray, and may "
                    "hold those that it began with. Have it load what the others hold, and call "
                    "sync_to again"
                )
        self._metas, self._holder = {}, {}
        self._take(None, Part(self._own).metadata())
        for other, metas in zip(self._others, self._ask_all("metadata"), strict=True):
            self._take(other, metas)
        self.checks_finite = self._own.checks_finite and all(self._ask_all("checks_finite"))
        return list(self._metas.values())

    def check_finite(self, names: Collection[str] | None = None, *, alone: bool = True) -> None:
        """Have all actors that hold some of the names look at the same time."""
        shares = self._shares(self._holder if names is None else names)
        own = shares.pop(None, [])
        asked = {other: other.held.remote("check_finite", share) for other, share in shares.items()}
        self._own.check_finite(own, alone=alone)
        for other, answer in asked.items():
            self._answer(other, answer)

    def materialize(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        shares = self._shares(names)
        streams = {
            holder: self._own.materialize(share)
            if holder is None
            else self._coming(holder, share, holder.held.remote("tensors", share))
            for holder, share in shares.items()
        }
        for name in names:
            yield next(streams[self._holder[name]])

    def end_sync(self) -> None:
        self._own.end_sync()

    def require_unwritten(self) -> None:
        # An actor that is told to train meanwhile does so between two chunks.
        self._own.require_unwritten()
        self._ask_all("require_unwritten")

    def _shares(self, names: Iterable[str]) -> dict[Any, list[str]]:
        """Divide names by holder; None is this process."""
        shares: dict[Any, list[str]] = {}
        for name in names:
            shares.setdefault(self._holder[name], []).append(name)
        return shares

    def _take(self, holder: Any, metas: Sequence[ParamMeta]) -> None:
        for meta in metas:
            known = self._metas.setdefault(meta.name, meta)
            self._holder.setdefault(meta.name, holder)
            if known != meta:
                raise CoverageError(
                    f"{meta.name} is {known.dtype} {known.shape} on one trainer actor and "
                    f"{meta.dtype} {meta.shape} on {holder}; each must hold whole tensors of one "
                    "model, with its own names (`Source.held_names`)"
                )

    def _coming(
        self, other: Any, names: Sequence[str], answer: Any
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, raw in zip(names, self._answer(other, answer), strict=True):
            meta = self._metas[name]
            yield name, read_only_view(raw, 0, meta.shape, getattr(torch, meta.dtype))

    def _ask_all(self, what: str) -> list[Any]:
        answers = [other.held.remote(what) for other in self._others]
        return [self._answer(*pair) for pair in zip(self._others, answers, strict=True)]

    def _answer(self, other: Any, answer: Any) -> Any:
        ray = require_ray()
        try:
            return ray.get(answer, timeout=self._timeout_seconds)
        except ray.exceptions.GetTimeoutError as exc:
            raise TransportTimeout(
                f"{other} did not say what it holds within {self._timeout_seconds:g} s; it answers "
                "between its own calls: is it in one, or is sync.timeout_seconds too short?"
            ) from exc
        except ray.exceptions.RayTaskError as exc:
            if isinstance(exc.cause, SyncError):
                raise exc.cause from exc
            raise
        except ray.exceptions.RayError as exc:
            raise PeerLostError(
                f"{other}, which holds a part of the weights, was lost: {exc}. Start it anew, and "
                "call sync_to with its handle"
            ) from exc


def as_bytes(tensor: torch.Tensor) -> Any:
    """Return the tensor's bytes as an array, without a copy where it is contiguous on the host."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
