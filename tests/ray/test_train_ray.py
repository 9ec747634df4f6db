"""`qerl-sync train` on Ray, as a user would run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qerl_sync import ConfigError, TrainConfig
from qerl_sync.integrations.ray.cluster import connect
from qerl_sync.serving.processes import descendants
from qerl_sync.training.display import Display
from qerl_sync.training.on_ray import _cluster

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "grpo_ray_cpu.yaml"
SMALL = (
    "trainer.per_device_train_batch_size=128",
    "trainer.max_steps=1000",
    "trainer.save_steps=4",
    "rollout.max_staleness=1",
    "rollout.engine.max_model_len=32",  # the prompt that engines are asked has 24 tokens
    "sync.verify=full",
)


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "qerl_sync.cli", "train", str(CONFIG), *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(600)  # two runs, each of which starts a cluster and two engines
def test_a_run_whose_trainer_is_killed_goes_on_until_ctrl_c(tmp_path: Path):
    """With rollouts ahead of the trainer. After it is resumed requests in flight survive syncs."""
    root = tmp_path / "run"
    run = start(f"output_dir={root}", *SMALL)
    with ended(run):
        wait_for_version(5, run, root)
        trainer = next(p for p in descendants(run.pid) if "::TrainingActor" in command_line(p))
        os.kill(trainer, signal.SIGKILL)
        output, _ = run.communicate(timeout=60)
    assert run.returncode == 2, output
    assert "--resume goes on from the last checkpoint" in " ".join(output.split())
    assert not descendants_named("ray::", str(tmp_path))
    saved = max(int(path.name.partition("-")[2]) for path in root.glob("checkpoint-*"))

    run = start(f"output_dir={root}", *SMALL, "rollout.async_engine=true", "--resume")
    with ended(run):
        wait_for_version(17, run, root)
        run.send_signal(signal.SIGINT)
        output, _ = run.communicate(timeout=60)
    assert run.returncode == 130, output
    assert f"going on from step {saved}" in output
    assert "stopped before the end; --resume goes on from here" in output
    assert not descendants_named("ray::", str(tmp_path))

    reports = syncs_of(root)
    assert [report["version"] for report in reports] == list(range(1, len(reports) + 1))
    for report in reports:
        assert len(report["workers"]) == 2
        assert not report["lost"]
        assert report["probe_gap"] < 1e-4
        assert not report["undelivered"]
    changed = [report["changed_tensors"] for report in reports]
    assert [step for step, count in enumerate(changed) if count is None] == [0, saved]

    log = history(root)
    assert len(log) >= 16
    staleness = [entry["rollout/staleness/max"] for entry in log]
    assert [step for step, behind in enumerate(staleness) if behind == 0] == [0, saved]
    assert set(staleness) == {0.0, 1.0}
    rewards = [entry["reward"] for entry in log]
    assert sum(rewards[-5:]) > 1.2 * sum(rewards[:5])


@contextmanager
def ended(run: subprocess.Popen[str]) -> Iterator[None]:
    """Whatever happens in the block."""
    try:
        yield
    finally:
        run.kill()


def syncs_of(root: Path) -> list[dict[str, Any]]:
    path = root / "syncs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_version(version: int, run: subprocess.Popen[str], root: Path) -> None:
    deadline = time.monotonic() + 240
    while not any(report["version"] >= version for report in syncs_of(root)):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)


def history(root: Path) -> list[dict[str, Any]]:
    """What the last checkpoint has logged, resumed or not."""
    last = max(root.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    return list(json.loads((last / "trainer_state.json").read_text())["log_history"])


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def descendants_named(*words: str) -> list[str]:
    """Command lines of processes that have all these words in them."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if all(word in line for word in words)]


def test_no_cluster_at_the_address():
    """Ray itself would try for minutes."""
    with pytest.raises(ConfigError, match=r"no Ray cluster can be reached at '127\.0\.0\.1:1'"):
        connect("127.0.0.1:1")


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_has_room_for_actors_that_take_parts_of_a_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    config = TrainConfig.of(
        model={"path": "m"},
        data={"path": "d"},
        reward="exact_match",
        output_dir="o",
        rollout={"mode": "ray"},
        ray={"rollout": {"num_cpus": 0.75}, "object_store_bytes": "100MiB"},
    )
    with _cluster(config, Display(Console(quiet=True)), verbose=False):
        pass  # two actors and a trainer: 2.5 CPUs
