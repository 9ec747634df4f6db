"""The schedule of QeRL's adaptive quantisation noise (arXiv 2510.11696, equation 8)."""

from __future__ import annotations

from dataclasses import dataclass

# (sigma_start, sigma_end): the paper's training scripts, its table of hyperparameters (appendix E),
# and its section 4.1 have a setting each.
PRESETS = {"scripts": (1e-2, 1e-4), "table-4": (1e-2, 5e-4), "section-4.1": (5e-2, 5e-4)}


@dataclass(frozen=True)
class NoiseSchedule:
    """Divide a run into even intervals, of which the first has no noise and each later one less.

    Attributes:
        sigma_start, sigma_end: standard deviations of the first and the last stage.
        intervals: K + 1 of them: the one without noise (stage 0), then the stages k = 1..K.
    """

    sigma_start: float
    sigma_end: float
    intervals: int

    def stage(self, step: int, num_steps: int) -> int:
        """Return the stage of a step of the run, counted from 0. Steps past the end are of the
        last stage."""
        return min(step * self.intervals // num_steps, self.intervals - 1)

    def sigma(self, stage: int) -> float:
        """Return the standard deviation of a stage; 0 for stage 0."""
        if stage == 0:
            return 0.0
        last = self.intervals - 1
        share = (stage - 1) / (last - 1) if last > 1 else 0.0
        return float(self.sigma_start * (self.sigma_end / self.sigma_start) ** share)
