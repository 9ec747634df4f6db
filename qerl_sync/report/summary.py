"""Compute a run's numbers from TRL's log and the sync reports alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from statistics import fmean
from typing import Any

# Rewards are averaged over this many logged steps at both ends of a run.
WINDOW = 5
LOGPROB_GAP = "sampling/sampling_logp_difference/max"

Log = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Summary:
    """The numbers that summarize a run.

    Attributes:
        reward_first: mean reward of the first five logged steps; `reward_last`: of the last five.
        sync_seconds: in which training waited for syncs. With `sync.when: eager` less than the
            syncs took; of those before a `--resume`, all that they took.
        sync_time_share: `sync_seconds` over the seconds of the steps.
        logprob_gap_max: the largest |log p(trainer) - log p(vLLM)| of a sampled token in any log.
            TRL averages the maxima of the steps between two logs. None: TRL did not measure it.
        transport: how the weights travelled, and why so.
        prediction_exact: on every sync the predicted trace was the measured one.
        wall_seconds: from the start of the program, engine start and warm-up included.
    """

    num_steps: int
    reward_first: float | None
    reward_last: float | None
    num_syncs: int
    sync_seconds: float
    sync_time_share: float | None
    sent_bytes: int
    peak_buffered_bytes_predicted: int
    peak_buffered_bytes_measured: int
    peak_pinned_bytes_predicted: int
    peak_pinned_bytes_measured: int
    max_open_layers_predicted: int
    max_open_layers: int
    prediction_exact: bool
    logprob_gap_max: float | None
    wall_seconds: float
    versions: Mapping[str, str]
    transport: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(
    log: Log,
    syncs: Sequence[Mapping[str, Any]],
    *,
    wall_seconds: float,
    versions: Mapping[str, str],
) -> Summary:
    """Summarize a run from its TRL log (`trainer.state.log_history`) and its reports."""
    rewards = reward_curve(log)
    gaps = [float(entry[LOGPROB_GAP]) for entry in log if LOGPROB_GAP in entry]
    # A sync that ran beside the trainer (`sync.when: eager`) costs what the trainer waited for it.
    seconds = [report["seconds"] for report in syncs]
    sync_seconds = sum(each.get("waited", each["total"]) for each in seconds)
    step_seconds, last_step = 0.0, 0
    for entry in log:
        if "step_time" in entry:  # TRL logs the mean over the steps since the last log
            step_seconds += float(entry["step_time"]) * (int(entry["step"]) - last_step)
            last_step = int(entry["step"])

    def largest(name: str) -> int:
        return max((int(report[name]) for report in syncs), default=0)

    return Summary(
        num_steps=max((int(entry["step"]) for entry in log), default=0),
        reward_first=fmean(r for _, r in rewards[:WINDOW]) if rewards else None,
        reward_last=fmean(r for _, r in rewards[-WINDOW:]) if rewards else None,
        num_syncs=len(syncs),
        sync_seconds=sync_seconds,
        sync_time_share=sync_seconds / step_seconds if step_seconds else None,
        sent_bytes=sum(int(report["sent_bytes"]) for report in syncs),
        peak_buffered_bytes_predicted=largest("peak_buffered_bytes_predicted"),
        peak_buffered_bytes_measured=largest("peak_buffered_bytes_measured"),
        peak_pinned_bytes_predicted=largest("peak_pinned_bytes_predicted"),
        peak_pinned_bytes_measured=largest("peak_pinned_bytes_measured"),
        max_open_layers_predicted=largest("max_open_layers_predicted"),
        max_open_layers=largest("max_open_layers_measured"),
        prediction_exact=all(report["prediction_exact"] for report in syncs),
        logprob_gap_max=max(gaps, default=None),
        wall_seconds=wall_seconds,
        versions=versions,
        transport="; ".join(dict.fromkeys(report.get("transport", "") for report in syncs)),
    )


def reward_curve(log: Log) -> list[tuple[int, float]]:
    """Return (step, mean reward) of every logged training step."""
    return [(int(entry["step"]), float(entry["reward"])) for entry in log if "reward" in entry]


def versions() -> dict[str, str]:
    """Return the versions of all packages involved. Imports all of them."""
    names = ("torch", "transformers", "trl", "vllm", "qerl_sync")
    return {name: str(import_module(name).__version__) for name in names}
