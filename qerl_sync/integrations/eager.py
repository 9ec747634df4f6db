"""A sync that runs beside its trainer, between an optimizer step and the next completions."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from qerl_sync.errors import ConfigError
from qerl_sync.session import SyncReport


@dataclass(frozen=True)
class _Begun:
    step: int
    clean: bool
    report: Future[SyncReport]


class EagerSync:
    """Begin syncs in a thread, and foresee when the next one will be asked for.

    asked --> asked again, N steps later --> begin N steps after that, and conclude when asked
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qerl-sync-eager")
        self._begun: _Begun | None = None
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

        self._begun = _Begun(step, clean, self._thread.submit(on_device))

    def conclude(self) -> tuple[SyncReport, int, bool] | None:
        """Wait for the sync that was begun, and return its report, step and `clean`; None: none
        was.

        In the report `seconds["waited"]` is how long this call took. The wait ends by the timeouts
        of the sync itself.

        Raises:
            what the sync raised.
        """
        begun = self._begun
        if begun is None:
            return None
        started = time.perf_counter()
        try:
            report = begun.report.result()
        finally:
            # After a Ctrl-C it may still run, and whoever comes next must wait for it too.
            if begun.report.done():
                self._begun = None
        waited = time.perf_counter() - started
        return (
            replace(report, seconds={**report.seconds, "waited": waited}),
            begun.step,
            begun.clean,
        )

    def close(self) -> None:
        """Wait for what was begun, whatever becomes of it."""
        self._thread.shutdown()


def require_eager(*, num_processes: int, sleeps: bool) -> None:
    """Check that a trainer's syncs may begin before TRL asks for them.

    Raises:
        ConfigError: the trainer has several processes, or its engine sleeps.
    """
    reason = ""
    if num_processes > 1:
        # Collectives of a sync and of the trainer would meet in another order on each rank.
        reason = f"this trainer has {num_processes} processes, and it is for one"
    elif sleeps:
        reason = "this engine sleeps (vllm_enable_sleep_mode) until TRL wakes it to generate"
    if reason:
        raise ConfigError(f"sync.when: eager: {reason}; choose sync.when: lazy")
