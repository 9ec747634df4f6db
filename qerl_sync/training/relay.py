"""Carry a run's progress from the actor that trains to the terminal that started the run."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import Any

from rich.console import Console

from qerl_sync.training.display import Display, Phase, Steps

logger = logging.getLogger(__name__)

Event = tuple[Any, ...]

# How long an event may take to the board and back. A run goes on without what is not shown.
BOARD_SECONDS = 10.0


class Board:
    """Queue events in order between the trainer's actor and the terminal, and hold the stop
    flag.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stop = False

    def tell(self, event: Event) -> bool:
        """Add events. Return whether to stop."""
        self._events.append(event)
        return self._stop

    def take(self) -> list[Event]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        self._stop = True


class RelayDisplay(Display):
    """Send to the board, from the actor, what a `Display` would show.

    The run does not depend on it. Events that do not arrive in time are lost, and all events once
    the board is dead for good.
    """

    def __init__(self, board: Any) -> None:
        super().__init__(_RelayConsole(self._tell))
        self._board = board
        self._stop = False

    @contextmanager
    def phase(self, doing: str, done: str) -> Iterator[Phase]:
        self._tell("phase", doing, done)
        yield _RelayPhase(self._tell)
        self._tell("end")

    @contextmanager
    def steps(self, what: str, done: str) -> Iterator[Steps]:
        self._tell("steps", what, done)
        yield _RelaySteps(self._tell)
        self._tell("end")

    def _tell(self, *event: Any) -> bool:
        """Send events. Return whether to stop, as far as is known."""
        if self._board is not None:
            answer, dead = _asked(self._board.tell, event)
            self._stop = bool(self._stop if answer is None else answer)
            self._board = None if dead else self._board
        return self._stop


def _asked(method: Any, *arguments: Any) -> tuple[Any, bool]:
    """Return what a method of the board returns, None if it does not; and whether the board is
    dead.
    """
    import ray

    try:
        return ray.get(method.remote(*arguments), timeout=BOARD_SECONDS), False
    except ray.exceptions.RayError as exc:
        logger.warning(
            "the display's actor did not answer within %g s (%s); the run goes on",
            *(BOARD_SECONDS, type(exc).__name__),
        )
        return None, isinstance(exc, ray.exceptions.ActorDiedError)


class _RelayConsole(Console):
    def __init__(self, tell: Callable[..., bool]) -> None:
        super().__init__(quiet=True)
        self._tell = tell

    def print(self, *objects: Any, **options: Any) -> None:
        self._tell("print", " ".join(map(str, objects)))


class _RelayPhase(Phase):
    def __init__(self, tell: Callable[..., bool]) -> None:
        self._tell = tell

    def progress(self, seconds: float, text: str) -> None:
        self._tell("progress", seconds, text)


class _RelaySteps(Steps):
    def __init__(self, tell: Callable[..., bool]) -> None:
        self._tell = tell
        self._stop = False

    def advance(self, done: int, total: int) -> None:
        self._stop = self._tell("advance", done, total)

    def note(self, done: int, total: int, text: str) -> None:
        self._tell("note", done, total, text)

    def say(self, text: str) -> None:
        self._tell("say", text)

    def asked_to_stop(self) -> bool:
        return self._stop


class Replay:
    """Show the board's events on a real display, at the terminal."""

    def __init__(self, display: Display, board: Any) -> None:
        self._display = display
        self._board = board
        self._open: AbstractContextManager[Any] | None = None
        self._shown: Any = None
        self._stopping = False

    def show(self) -> None:
        """Show the events since the last call, unless the board is gone."""
        if self._board is None:
            return
        events, dead = _asked(self._board.take)
        for kind, *arguments in events or ():
            self._show(kind, arguments)
        if dead:
            self._board = None
            self._display.console.print(
                "[yellow]the display's actor has died: the run goes on without being shown[/]"
            )

    def close(self) -> None:
        """Remove a bar or spinner that has not ended."""
        if self._open is not None:
            with suppress(_Unfinished):
                self._open.__exit__(_Unfinished, _Unfinished(), None)
            self._open = None

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Stop the run after its step on Ctrl-C in this context; raise on a second one.

        Must be used in the main thread.
        """
        before = signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._stopping:
            raise KeyboardInterrupt
        self._stopping = True
        self._display.console.print("[yellow]stopping after this step[/] (Ctrl-C again: at once)")
        if self._board is not None:
            self._board.stop.remote()

    def _show(self, kind: str, arguments: list[Any]) -> None:
        if kind in ("phase", "steps"):
            self.close()  # where its end was lost on the way
            self._open = getattr(self._display, kind)(*arguments)
            self._shown = self._open.__enter__()
        elif kind == "end" and self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None
        elif kind == "print":
            self._display.console.print(*arguments, highlight=False)
        elif self._open is not None:
            getattr(self._shown, kind)(*arguments)


class _Unfinished(Exception):
    """End a phase without its last line."""
