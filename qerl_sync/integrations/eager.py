"""A sync that runs beside its trainer, between an optimizer step and the next completions."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from qerl_sync.errors import ConfigError
from qerl_sync.session import SyncReport


class EagerSync:
    """Begin syncs in a thread, and predict the step at which the trainer asks for the next one.

    asked --> asked again, N steps later --> begin N steps after that, and conclude when asked
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qerl-sync-eager")
        # The sync that was begun, its step, and whether it is without noise.
        self._begun: tuple[Future[SyncReport], int, bool] | None = None
        self._asked_at: int | None = None
        self._every: int | None = None

    def asked(self, step: int) -> None:
        """Record that completions for training are made with the weights of this step."""
        if self._asked_at is not None and step != self._asked_at:
            # A training that begins anew counts from 0 again.
            self._every = step - self._asked_at if step > self._asked_at else None
        self._asked_at = step

    def is_next(self, step: int) -> bool:
        """Return whether the next completions are likely to need the weights of this step."""
        if self._begun is not None or self._asked_at is None or self._every is None:
            return False
        return step == self._asked_at + self._every

    def begin(
        self, push: Callable[[], SyncReport], *, step: int, clean: bool, device: torch.device
    ) -> None:
        """Run `push` in the thread. No weight may change until `conclude` has returned."""
        if device.type != "cpu":
            torch.accelerator.synchronize(device)  # the optimizer's kernels have been launched only

        def on_device() -> SyncReport:
            if device.type != "cpu":
                torch.accelerator.set_device_index(device)  # a setting of each thread
            return push()

        self._begun = self._thread.submit(on_device), step, clean

    def conclude(self) -> tuple[SyncReport, int, bool] | None:
        """Block until the sync that was begun has ended. Return its report, step and `clean`; None
        if none was begun.

        In the report `seconds["waited"]` is how long this call took. The sync's own timeouts bound
        the wait.

        Raises:
            Exception: the error of the sync.
        """
        if self._begun is None:
            return None
        future, step, clean = self._begun
        started = time.perf_counter()
        try:
            report = future.result()
        finally:
            # After a Ctrl-C the sync may still run: then the next call waits for it too, and no
            # weight changes meanwhile.
            if future.done():
                self._begun = None
        waited = time.perf_counter() - started
        return replace(report, seconds={**report.seconds, "waited": waited}), step, clean

    def close(self) -> None:
        """Block until a sync that was begun has ended. Ignore its error."""
        self._thread.shutdown()


def require_eager(*, num_processes: int, sleeps: bool, deepspeed: bool) -> None:
    """Check that a trainer's syncs may begin before TRL asks for them.

    Raises:
        ConfigError: the trainer has several processes or runs DeepSpeed, or its engine sleeps.
    """
    reason = ""
    if num_processes > 1:
        # Collectives of a sync and of the trainer would meet in another order on each rank.
        reason = f"this trainer has {num_processes} processes, and it is for one"
    elif deepspeed:
        # No callback comes before that step: a sync under way would send weights of two steps.
        reason = "DeepSpeed's optimizer steps within the backward pass"
    elif sleeps:
        reason = "this engine sleeps (vllm_enable_sleep_mode) until TRL wakes it to generate"
    if reason:
        raise ConfigError(f"sync.when: eager: {reason}; choose sync.when: lazy")
