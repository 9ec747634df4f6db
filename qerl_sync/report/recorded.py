"""Read what a run has left in its directory. No torch, no vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import ConfigError
from qerl_sync.report.summary import reward_curve
from qerl_sync.telemetry.files import FAILURES, LOG, SYNCS, TRACES, read_json, read_lines

CONFIG, SUMMARY = "config.json", "summary.json"


@dataclass(frozen=True)
class RecordedRun:
    """Hold what a run's directory has.

    Attributes:
        config: with its defaults; {} for a session without `qerl-sync train`.
        summary: {} while the run goes on, and if it was ended from outside.
        syncs: a report for each committed sync, the oldest first.
        failures: a record of each error, the oldest first.
        records: of the syncs whose traces were kept (`telemetry.recorder`), the oldest first.
        log: what the trainer logged.
    """

    directory: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    syncs: Sequence[Mapping[str, Any]]
    failures: Sequence[Mapping[str, Any]]
    records: Sequence[Mapping[str, Any]]
    log: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, directory: Path) -> RecordedRun:
        """Read a directory.

        Raises:
            ConfigError: there is none, or nothing was recorded in it.
            FileError: a file in it is damaged.
        """
        run = cls(
            directory,
            _json(directory / CONFIG),
            _json(directory / SUMMARY),
            read_lines(directory / SYNCS),
            read_lines(directory / FAILURES),
            _records(directory / TRACES),
            read_lines(directory / LOG),
        )
        if not (run.syncs or run.failures or run.config):
            raise ConfigError(
                f"{directory} holds no run (no {SYNCS}, {FAILURES} or {CONFIG} in it); give the "
                "output directory of `qerl-sync train`, or the sync.record_directory of a session"
            )
        return run

    @property
    def sync_options(self) -> Mapping[str, Any]:
        """Return the section `sync` of the run, as far as it is known."""
        return self.config.get("sync", {})  # type: ignore[no-any-return]

    @property
    def rewards(self) -> list[tuple[int, float]]:
        """Return (step, mean reward) of each logged step."""
        return reward_curve(self.log)

    def trace(self, name: str) -> Trace | None:
        """Return a trace that a record names; None if it was removed since. Raises FileError."""
        try:
            return _trace(self.directory / TRACES / name)
        except FileNotFoundError:
            return None


def _records(directory: Path) -> list[Any]:
    found = []
    for path in sorted(directory.glob("sync-*.json")):
        with suppress(FileNotFoundError):  # a run that goes on has removed it since
            found.append(read_json(path))
    return found


def _json(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.exists() else {}


@lru_cache(256)  # a page reads each trace twice, and a live one again after each sync
def _trace(path: Path) -> Trace:
    return Trace.from_json(read_json(path))
