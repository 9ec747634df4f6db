"""Look for NaN in the next chunks while earlier ones are transferred and loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

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
        self._check_finite_ahead = look
        self._chunks = chunks
        self._looked_at = 0
        self._error: BaseException | None = None
        self._left = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="qerl-sync look ahead", daemon=True)

    def await_chunk(self, index: int) -> None:
        """Block until chunk `index` was checked. Raise what was found in it or in any other
        chunk.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or self._looked_at >= min(index + 1, len(self._chunks))
            )
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        if self._chunks:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop checking. After this the weights may change."""
        self._left = True
        if self._chunks:
            self._thread.join()

    def _run(self) -> None:
        for index, names in enumerate(self._chunks):
            if self._left or self._error is not None:
                return
            try:
                self._check_finite_ahead(names, index == 0)
            except BaseException as exc:
                self._error = exc
            with self._changed:
                self._looked_at += 1
                self._changed.notify_all()
