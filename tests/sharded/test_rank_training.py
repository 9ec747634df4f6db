"""`qerl-sync train` in two processes that torchrun starts: one sharded model, one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from support.ranks import import_path

pytestmark = [pytest.mark.dist, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
CONFIG = "configs/grpo_cpu_fsdp2.yaml"
SHORT = ["trainer.save_steps=2", "warmup.trainer.max_steps=4", "data.size=512"]
# The last word differs between the ranks: $RANK is set for each.
DIFFER = f"exec {sys.executable} -m qerl_sync.cli train {CONFIG} trainer.max_steps=$((3+RANK))"


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc_per_node", "2", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": import_path(), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=540,
    )


def train(directory: Path, *words: str) -> str:
    program = ["-m", "qerl_sync.cli", "train", CONFIG, *SHORT, "--output-dir", str(directory)]
    done = torchrun(*program, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_train_one_sharded_model(tmp_path):
    said = train(tmp_path, "trainer.max_steps=4")
    assert said.count("vLLM engine started") == 1
    assert said.count("report written to") == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["num_steps"] == summary["num_syncs"] == 4
    assert summary["prediction_exact"]
    assert 0 < summary["logprob_gap_max"] <= 1e-5
    syncs = [json.loads(line) for line in (tmp_path / "syncs.jsonl").read_text().splitlines()]
    assert [sync["step"] for sync in syncs] == [0, 1, 2, 3]
    # accelerate writes this file of a model that it has sharded, and no other.
    assert (tmp_path / "checkpoint-4" / "pytorch_model_fsdp.bin").exists()
    # Whole; a tied head is written beside the embeddings.
    assert shapes(tmp_path / "model").items() <= shapes(tmp_path / "trained").items()

    train(tmp_path, "trainer.max_steps=6", "--resume")
    syncs = [json.loads(line) for line in (tmp_path / "syncs.jsonl").read_text().splitlines()]
    assert [sync["step"] for sync in syncs] == [0, 1, 2, 3, 4, 5]
    assert [sync["version"] for sync in syncs] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "summary.json").read_text())["logprob_gap_max"] <= 1e-5


def shapes(directory: Path) -> dict[str, list[int]]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def test_processes_of_different_configurations_are_refused_once(tmp_path):
    command = f"{DIFFER} --output-dir {tmp_path / 'run'}"
    done = torchrun("--no-python", "bash", "-c", command)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert "trainer.max_steps=4" in errors[0]
    assert not (tmp_path / "run").exists()
