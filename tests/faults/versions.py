"""Weight versions of a worker only move forwards."""

from __future__ import annotations

from collections.abc import Callable

from faults.subjects import Subject


class VersionWatch:
    """Holds what each rank has committed against what it had when it was last looked at.

    Attributes:
        found: what went wrong, in words.
    """

    def __init__(self, subject: Subject) -> None:
        self.found: list[str] = []
        self._subject = subject
        self.begin()

    def begin(self) -> None:
        """Versions count from here: the engine was started, perhaps in another process."""
        self._last = self._subject.weight_versions()

    def look(self) -> None:
        """None may be lower than before."""
        self._compare("went back", lambda was, now: now >= was)

    def look_after_sync(self) -> None:
        """All must be higher than before, and the same."""
        self._compare("did not rise with a good sync", lambda was, now: now > was)
        if len(set(self._last)) > 1:
            self.found.append(f"ranks are on versions {self._last} after a good sync")

    def _compare(self, what: str, is_right: Callable[[int, int], bool]) -> None:
        now = self._subject.weight_versions()
        for rank, (was, has) in enumerate(zip(self._last, now, strict=True)):
            if not is_right(was, has):
                self.found.append(f"the version of worker {rank} {what}: {was} -> {has}")
        self._last = now
