"""Look for NaN in the next chunks while earlier ones are transferred and loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from typing_extensions import Self


class FiniteChecker:
    """Check chunk n+1 for NaN while chunk n is transferred; never send an unchecked chunk.

    A thread checks one chunk after the other from `__enter__` on. Sending starts after the first
    chunk's check, not after all. A finding in a later chunk ends the sync at once.

    Args:
        look: raises if one of the tensors of these names must not be sent; with True if nothing is
            loaded meanwhile, so that it may take all cores.
        chunks: the names in each, in the order in which they are sent; of others nothing is known.
    """

    def __init__(
        self, look: Callable[[Sequence[str], bool], None], chunks: Sequence[Sequence[str]]
    ) -> None:
        self._look = look
        self._chunks = chunks
        self._looks: list[Future[None]] = []
        self._error: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qerl-sync look ahead")

    def await_chunk(self, index: int) -> None:
        """Block until chunk `index` was checked. Raise what was found in any chunk so far."""
        if self._looks:
            self._looks[min(index, len(self._looks) - 1)].result()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        self._looks = [
            self._thread.submit(self._check, names, index == 0)
            for index, names in enumerate(self._chunks)
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop checking. After this the weights may change."""
        self._thread.shutdown(cancel_futures=True)

    def _check(self, names: Sequence[str], alone: bool) -> None:
        if self._error is not None:
            return
        try:
            self._look(names, alone)
        except BaseException as exc:
            self._error = exc
