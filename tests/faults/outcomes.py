"""What became of a fault, and whether that is what was promised."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# How a fault may end.
HOLDS_OLD, HOLDS_NEW, POISONED, GONE = "old", "new", "poisoned", "gone"
# How none may.
WRONG, HANG, CRASH, UNNAMED, SERVES = "wrong weights", "hang", "crash", "unnamed error", "serves"

MEANING = {
    HOLDS_OLD: "exactly the old weights, never left or put back; the engine goes on with them",
    HOLDS_NEW: "exactly the new weights",
    POISONED: "refuses to generate, and says why, until the next full sync",
    GONE: "the engine's process was killed; the trainer is told so",
    WRONG: "generates with weights that are neither version's",
    HANG: "does not answer any more",
    CRASH: "the engine or its process ended",
    UNNAMED: "an error that does not say what happened",
    SERVES: "serves although it should not",
}
OURS, STOCK = "qerl-sync", "stock vLLM"
# To notice a fault, beside any timeout.
LIMIT_SECONDS = 2.0


@dataclass
class Outcome:
    """Of one case on one engine.

    Attributes:
        spec: the engine; see `engines.Spec`.
        by: whose reload was broken.
        ended: one of the words above.
        expected: those that the contract allows.
        error: what the trainer was told.
        after: how requests fared then: `answers`, `refuses`, or `waits` for the next sync, as those
            of a `LLM` whose trainer has died.
        healed: whether the next full sync was exactly right; None: not tried.
        leaks: what was left behind after it.
        version_faults: where a worker's version went back, or did not rise with a good sync.
        detection_seconds: from the fault to its being known, and the worker poisoned.
        allowed_seconds: how long that may take: a timeout where only that can tell, and 2 s.
    """

    spec: str
    case: str
    by: str = OURS
    ended: str = CRASH
    expected: tuple[str, ...] = ()
    error: str = ""
    after: str = ""
    healed: bool | None = None
    leaks: list[str] = field(default_factory=list)
    version_faults: list[str] = field(default_factory=list)
    detection_seconds: float | None = None
    allowed_seconds: float = LIMIT_SECONDS
    note: str = ""

    @property
    def is_late(self) -> bool:
        return (self.detection_seconds or 0) > self.allowed_seconds

    @property
    def ok(self) -> bool:
        """Whether it ended as the contract says."""
        as_promised = self.ended in self.expected and self.healed is True
        return as_promised and not (self.leaks or self.version_faults or self.is_late)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}

    @classmethod
    def of_json(cls, written: dict[str, Any]) -> Outcome:
        return cls(**{name: value for name, value in written.items() if name != "ok"})


@dataclass(frozen=True)
class Ended:
    """What the process of an engine sends last, where an error ends it."""

    error: str


def one_line(error: BaseException | str | None) -> str:
    if error is None:
        return ""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]
