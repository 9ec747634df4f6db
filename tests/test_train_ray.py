"""`qerl-sync train` on Ray, as a user would run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qerl_sync import ConfigError
from qerl_sync.integrations.ray.cluster import connect

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "grpo_ray_cpu.yaml"
SMALL = ("trainer.per_device_train_batch_size=32", "warmup.trainer.max_steps=2")


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
def test_a_run_with_rollouts_ahead_of_the_trainer_until_ctrl_c(tmp_path: Path):
    run = start(
        f"output_dir={tmp_path / 'run'}",
        "trainer.max_steps=1000",
        "trainer.save_steps=1000",
        "rollout.max_staleness=1",
        "sync.verify=full",
        "rollout.engine.max_model_len=32",  # the prompt that engines are asked has 24 tokens
        *SMALL,
    )
    syncs = tmp_path / "run" / "syncs.jsonl"
    try:
        deadline = time.monotonic() + 240
        while not syncs.exists() or len(syncs.read_text().splitlines()) < 5:
            assert run.poll() is None, run.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.5)
        run.send_signal(signal.SIGINT)
        output, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, output
    assert "stopped before the end; --resume goes on from here" in output

    reports = [json.loads(line) for line in syncs.read_text().splitlines()]
    assert [report["version"] for report in reports] == list(range(1, len(reports) + 1))
    for report in reports:
        assert len(report["workers"]) == 2
        assert not report["lost"]
        assert report["probe_gap"] < 1e-4
        assert not report["undelivered"]
    assert all(report["changed_tensors"] for report in reports[2:])
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    staleness = [entry["rollout/staleness/max"] for entry in log]
    assert staleness[0] == 0
    assert set(staleness[1:]) == {1.0}
    assert sum(entry["sync/workers"] for entry in log) == 2 * len(log)
    assert not descendants_named("ray::", str(tmp_path))


def descendants_named(*words: str) -> list[str]:
    """Command lines of processes that have all these words in them."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if all(word in line for word in words)]


def test_no_cluster_at_the_address():
    """Ray itself would try for minutes."""
    with pytest.raises(ConfigError, match=r"no Ray cluster can be reached at '127\.0\.0\.1:1'"):
        connect("127.0.0.1:1")
