"""Send a third party's iterator of tensors, in its own order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from qerl_sync.errors import CoverageError
from qerl_sync.meta import ParamMeta
from qerl_sync.sources.base import Source
from qerl_sync.verify.stream import as_planned

if TYPE_CHECKING:
    import torch


class StreamSource(Source):
    """Yields what a stream yields, as it comes. For policies that leave the order alone.

    Example:
        metas = [ParamMeta(n, "bfloat16", tuple(t.shape)) for n, t in exporter.stream()]
        source = StreamSource(metas, open_stream=exporter.stream)
        with SyncSession(source, transport, SyncConfig(policy="spill")) as session:
            session.push(step=1)

    A sync goes through one stream, once, over all its chunks; the next one, also after a sync that
    failed in the middle, opens another.

    Args:
        metadata: everything that a stream will yield, in that order; or a function that tells it
            before each sync.
        open_stream: makes a stream of (checkpoint name, tensor). Each tensor must stay as it is
            until the chunk that it is in has been sent: yield new tensors, not the same buffer.
        held_names: of several trainer ranks, what this one's streams yield; None: all.
    """

    any_order = False

    def __init__(
        self,
        metadata: Sequence[ParamMeta] | Callable[[], Sequence[ParamMeta]],
        open_stream: Callable[[], Iterable[tuple[str, torch.Tensor]]],
        *,
        held_names: Collection[str] | None = None,
    ) -> None:
        self._metadata = metadata
        self._open_stream = open_stream
        self._held = None if held_names is None else frozenset(held_names)
        self._left: dict[str, ParamMeta] = {}  # what the stream has yet to yield, in its order
        self._stream = self._checked()

    def metadata(self) -> list[ParamMeta]:
        """Return the metadata. Call it before every sync: the next `materialize` then opens a new
        stream.
        """
        self._stream.close()
        metas = self._metadata() if callable(self._metadata) else self._metadata
        held = self._held
        self._left = {m.name: m for m in metas if held is None or m.name in held}
        self._stream = self._checked()
        return list(metas)

    def held_names(self) -> Collection[str] | None:
        return self._held

    def end_sync(self) -> None:
        # Names that are not asked for (`sync.ignore_names`) may be the last ones.
        self._stream.close()

    def materialize(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield as `Source.materialize` does; skip names that are never asked for.

        Raises:
            CoverageError: the stream is not what its metadata says (see `as_planned`), or `names`
                are not in its order.
        """
        for name in names:
            # Else the search below would read, and drop, all that is left of the stream.
            if name not in self._left:
                raise CoverageError(
                    f"{name!r} is not among what the stream has left; it yields in its own order, "
                    "and each name once in a sync"
                )
            yield next(item for item in self._stream if item[0] == name)
        if names and not self._left:
            next(self._stream, None)  # raises if the stream goes on

    def _checked(self) -> Generator[tuple[str, torch.Tensor]]:
        """Yield what a new stream yields. Close it in the end, so that generators run their
        `finally` blocks."""
        stream = iter(self._open_stream())
        try:
            for meta, tensor in as_planned(list(self._left.values()), stream):
                del self._left[meta.name]
                yield meta.name, tensor
        finally:
            self._left.clear()
            if hasattr(stream, "close"):
                stream.close()
