"""Lay out the directory of a run: files, earlier runs, checkpoints, the sync records."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qerl_sync.errors import ConfigError, FileError
from qerl_sync.plan.checkpoint import read_json, require_whole_files
from qerl_sync.plan.record import (
    PLANS,
    SyncRecord,
    has_record,
    shared_storages,
    write_record,
)
from qerl_sync.telemetry.files import LOG, SYNCS, TRACES, keep_lines, line_files, read_lines

if TYPE_CHECKING:
    from qerl_sync.config import SyncConfig, TrainConfig
    from qerl_sync.session import SyncSession

# What a resumed run must have in common with the one it continues.
FIXED_SECTIONS = ("model", "peft", "data", "reward", "warmup", "seed")


class RunDirectory:
    """The files that a run writes, under `root`.

    Attributes:
        model: the policy that the reinforcement learning starts from, if made here.
        log: the scalars that the trainer logs.
        engine_log: what engines log that have processes of their own.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.json"
        self.model = root / "model"
        self.trained = root / "trained"
        self.syncs = root / SYNCS
        self.log = root / LOG
        self.plans = root / PLANS
        self.summary = root / "summary.json"
        self.engine_log = root / "vllm.log"
        self.reward_plot = root / "reward.png"
        self.buffers_plot = root / "buffers.png"

    def engine_log_of(self, rank: int) -> Path:
        """Return the log file of the engine that this trainer rank has for itself."""
        return self.root / f"vllm-{rank}.log" if rank else self.engine_log

    def latest_checkpoint(self) -> Path | None:
        """Return the checkpoint with the highest step that was written completely."""
        steps = self._numbered("checkpoint")
        whole = [step for step in steps if (steps[step] / "trainer_state.json").exists()]
        return steps[max(whole)] if whole else None

    def _numbered(self, name: str) -> dict[int, Path]:
        """Return the directories that are called `name-N`, by N."""
        found = {path.name[len(name) + 1 :]: path for path in self.root.glob(f"{name}-*")}
        return {int(number): path for number, path in found.items() if number.isdecimal()}

    def start(self, config: TrainConfig) -> Path | None:
        """Prepare the directory for a new run. Return where an earlier run was moved, if any.

        Raises:
            FileError: files of something else are in the way, such as the user's model.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        # A model's config.json would be written over, and `model` be taken for this run's policy.
        foreign = None
        if self.config.is_file() and not read_json(self.config).keys() >= {"model", "data"}:
            foreign = self.config
        elif not self.config.exists() and self.model.exists():
            foreign = self.model
        if foreign is not None:
            raise FileError(
                f"{foreign} is not of a run, and a run would write there; choose another "
                "directory (`output_dir`, --output-dir), or move it away",
                path=str(foreign),
            )
        written, aside = self._written(), None
        # A config.json alone is a run that was refused before it began.
        if self.config.exists() and written != [self.config]:
            # One more than the highest: the user may have deleted some of them.
            aside = self.root / f"earlier-{1 + max(self._numbered('earlier'), default=0)}"
            aside.mkdir()
            for path in written:
                path.rename(aside / path.name)
        self._write_config(config)
        return aside

    def resume(self, config: TrainConfig) -> Path:
        """Prepare the directory for resuming. Return the checkpoint to resume from.

        Raises:
            ConfigError: there is no run here, it was one of something else, or it has no checkpoint
                yet.
            FileError: the checkpoint is damaged.
        """
        if not self.config.exists():
            raise FileError(
                f"nothing to resume: {self.root} holds no run; leave --resume away, or name its "
                "directory with --output-dir",
                path=str(self.root),
            )
        before, now = read_json(self.config), config.model_dump(mode="json")
        changed = [name for name in FIXED_SECTIONS if before.get(name) != now[name]]
        if changed:
            raise ConfigError(
                f"cannot resume {self.root}: {', '.join(changed)} changed since it was started "
                f"(compare {self.config}); change it back, or start a new run without --resume",
                changed=tuple(changed),
            )
        checkpoint = self.latest_checkpoint()
        if checkpoint is None:
            raise FileError(
                f"nothing to resume: the run in {self.root} has no checkpoint yet "
                "(trainer.save_steps says when it writes one); leave --resume away to start over",
                path=str(self.root),
            )
        # Files that were cut off or overwritten are found before an engine is started.
        require_whole_files(checkpoint)
        step = step_of(checkpoint)
        for file in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")):
            # As torch.save writes it; its contents stand at its end.
            if not zipfile.is_zipfile(file):
                raise FileError(
                    f"{file} is damaged (it is cut off, or no file of torch's); move {checkpoint} "
                    "away, and --resume goes on from the checkpoint before it",
                    path=str(file),
                )
        # TRL drops its own logs of the steps that this run repeats.
        keep_lines(self.syncs, lambda report: report["step"] < step)
        keep_lines(self.log, lambda entry: entry["step"] <= step)
        self._write_config(config)
        return checkpoint

    def _write_config(self, config: TrainConfig) -> None:
        self.config.write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def _written(self) -> list[Path]:
        """Return the files and directories that a run has left here."""
        files = [self.config, self.model, self.trained, self.plans, self.summary, self.engine_log]
        files += [self.reward_plot, self.buffers_plot]
        files += [self.root / name for name in (TRACES, "report.html", "report.md")]
        patterns = ("checkpoint-*", "trace-*.json", "vllm-*.log")
        numbered = [path for pattern in patterns for path in self.root.glob(pattern)]
        return [*filter(Path.exists, files), *line_files(self.root), *numbered]

    def record_plan(self, session: SyncSession, sync: SyncConfig) -> None:
        """Write the plan of the last sync and its measured trace, once for each distinct plan.
        `qerl-sync plan --compare` reads them."""
        plan, measured = session.plan, session.last_trace
        if plan is None or measured is None or has_record(self.root, plan.digest):
            return
        storages = shared_storages(plan.metas, session.storages())
        record = SyncRecord(plan, measured, sync.source_order, session.chunk_bytes, storages)
        write_record(self.root, record)

    def read_syncs(self) -> list[dict[str, Any]]:
        """Return the reports so far."""
        return read_lines(self.syncs)


def step_of(checkpoint: Path) -> int:
    """Return the global step at which a checkpoint was written."""
    return int(read_json(checkpoint / "trainer_state.json")["global_step"])
