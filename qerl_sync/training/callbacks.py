"""Trainer callbacks: a progress bar, and a clean stop on Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState

from qerl_sync.serving.processes import signals_handled
from qerl_sync.training.display import STOPPING, Display, Steps


def quieten(trainer: Any) -> None:
    """Remove what a trainer prints, and the model card that it writes with each checkpoint.

    For a policy that was made here the card says "a fine-tuned version of None". A model that is
    uploaded (`push_to_hub`) keeps its card.
    """
    trainer.remove_callback(PrinterCallback)
    if not trainer.args.push_to_hub:
        trainer.create_model_card = lambda *arguments, **options: None


class ShowProgress(TrainerCallback):
    """Advance the bar at each step; take the note from the last log.

    Attributes:
        begun: training has begun; a checkpoint to go on from has been read.
    """

    begun = False

    def __init__(self, steps: Steps, note: Callable[[dict[str, Any]], str]) -> None:
        self._steps = steps
        self._note = note
        self._last_log: dict[str, Any] = {}

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        self._last_log |= logs or {}
        self._steps.note(state.global_step, state.max_steps, self._note(self._last_log))

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.begun = True
        self._steps.advance(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._steps.advance(state.global_step, state.max_steps)


class StopCleanly(TrainerCallback):
    """Finish the step, write a checkpoint and stop on the first Ctrl-C or SIGTERM; end at once on
    the second.

    torchrun passes on to its processes what it gets itself, and schedulers send SIGTERM before they
    take a machine back.

    Args:
        agree: returns True in all trainer processes if it is given True in one. The signal reaches
            them at different moments, and a process that stopped alone would leave the others
            waiting in a collective.
    """

    def __init__(self, display: Display, agree: Callable[[bool], bool]) -> None:
        self._display = display
        self._agree = agree
        self.stopped = False

    def listening(self) -> AbstractContextManager[None]:
        """Handle Ctrl-C in this context, and SIGTERM unless it has a handler. Main thread only."""
        handled = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # in Ray's actors
        numbers = [signal.SIGINT] if handled else [signal.SIGINT, signal.SIGTERM]
        return signals_handled(self._on_interrupt, *numbers)

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        self._display.console.print(STOPPING)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self.stopped = self._agree(self.stopped or self._display.asked_to_stop())
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True
