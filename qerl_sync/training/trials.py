"""Repeat a run over several seeds, each in a process of its own, and compare with targets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qerl_sync.errors import SyncError
from qerl_sync.report.recorded import RecordedRun
from qerl_sync.report.summary import Summary


@dataclass(frozen=True)
class Trial:
    """One run of a variant of a configuration (`""`: the only one) with one seed."""

    variant: str
    seed: int
    summary: Summary
    directory: Path

    @property
    def rewards(self) -> list[tuple[int, float]]:
        """Return (step, mean reward) of each logged step."""
        return RecordedRun.read(self.directory).rewards


@dataclass(frozen=True)
class Targets:
    """Targets that each seed must reach.

    Attributes:
        gain: the reward of the last steps over that of the first.
        reward: the reward of the last steps.
        seconds: wall time at most; `share`: of the step time spent in syncs at most.
        gap: logprob gap at most, in float32.
    """

    gain: float = 2.0
    reward: float = 0.4
    seconds: float = 180.0
    share: float = 0.15
    gap: float = 1e-5

    def missed(self, run: Summary) -> list[str]:
        """Return the targets that a run missed, as text; what was not measured is missed."""
        first, last = run.reward_first, run.reward_last
        share, gap = run.sync_time_share, run.logprob_gap_max
        reached = {
            f"reward at least {self.gain:g} times the first": first is not None
            and last is not None
            and last >= self.gain * first,
            f"reward at least {self.reward:g}": last is not None and last >= self.reward,
            f"at most {self.seconds:g} s": run.wall_seconds <= self.seconds,
            f"sync share at most {self.share:.0%}": share is not None and share <= self.share,
            f"logprob gap at most {self.gap:g}": gap is not None and gap <= self.gap,
            "prediction exact": run.num_syncs > 0 and run.prediction_exact,
        }
        return [target for target, met in reached.items() if not met]


def run_seed(config: Path, overrides: Sequence[str], seed: int, directory: Path) -> Summary:
    """Train `config` with this seed, in a process of its own; its output goes to our terminal.

    Raises:
        SyncError: the run failed.
    """
    command = [sys.executable, "-m", "qerl_sync.cli", "train", str(config), *overrides]
    command += ["--seed", str(seed), "--output-dir", str(directory)]
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise SyncError(f"the run with seed {seed} failed with exit code {code}; see above")
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    return Summary(**summary)
