"""`qerl-sync train` in two processes that torchrun or accelerate starts: one model, one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors import safe_open
from support.features import needs_deepspeed
from support.forks import import_path

from qerl_sync.serving.command import ServerSpec
from qerl_sync.serving.server import ServerProcess

pytestmark = [pytest.mark.dist, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
CONFIG = "configs/grpo_cpu_fsdp2.yaml"
SHORT = ["trainer.save_steps=2", "warmup.trainer.max_steps=4", "data.size=512"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--config_file"]
# Steps that move every weight as far as log-probabilities show.
LONG_STEPS = ["trainer.max_steps=3", "trainer.warmup_steps=0", "trainer.learning_rate=3e-3"]
SERVED = {"dtype": "float32", "enforce_eager": True, "max_model_len": 16}
ZERO3 = [
    "trainer.fsdp=null",
    "trainer.fsdp_config=null",
    "trainer.deepspeed={zero_optimization: {stage: 3}, train_micro_batch_size_per_gpu: auto}",
]
# The last word differs between the ranks: $RANK is set for each.
DIFFER = f"exec {sys.executable} -m qerl_sync.cli train {CONFIG} trainer.max_steps=$((3+RANK))"


def launch(
    launcher: list[str], *words: str, terminate_at: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run it to its end. On the line with `terminate_at` send SIGTERM to the launcher."""
    said = ""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-m", *launcher, *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": import_path(), "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as run,
    ):
        for line in run.stdout:
            if terminate_at and terminate_at in line and terminate_at not in said:
                run.terminate()
            said += line
        code = run.wait()
        errors.seek(0)
        return subprocess.CompletedProcess(run.args, code, said, errors.read())


def torchrun(*words: str, terminate_at: str = "") -> subprocess.CompletedProcess[str]:
    return launch(TORCHRUN, *words, terminate_at=terminate_at)


def train(directory: Path, *words: str, launcher: list[str] = TORCHRUN) -> str:
    program = ["-m", "qerl_sync.cli", "train", CONFIG, *SHORT, "--output-dir", str(directory)]
    done = launch(launcher, *program, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_synced(directory: Path, steps: int, weights: str = "pytorch_model_fsdp.bin") -> None:
    """A whole run of so many steps, in which each sync brought something new to the engines."""
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["num_steps"] == summary["num_syncs"] == steps
    assert summary["prediction_exact"]
    assert 0 < summary["logprob_gap_max"] <= 1e-5
    syncs = [json.loads(line) for line in (directory / "syncs.jsonl").read_text().splitlines()]
    assert [sync["step"] for sync in syncs] == list(range(steps))
    assert all(sync["changed_tensors"] == sync["num_tensors"] for sync in syncs[1:])
    # accelerate writes this of a model that it has sharded, and of no other.
    assert (directory / f"checkpoint-{steps}" / weights).exists()


def test_each_process_generates_with_an_engine_in_another(tmp_path):
    """Started by accelerate, whose file leaves to the run how the model is held."""
    launcher = [*ACCELERATE, "configs/accelerate/cpu.yaml"]
    said = train(
        tmp_path, *LONG_STEPS, "trainer.fsdp=true", "rollout.mode=subprocess", launcher=launcher
    )
    assert said.count("vLLM engine started") == said.count("report written to") == 1
    assert_synced(tmp_path, 3)


def test_all_processes_generate_with_one_server(tmp_path):
    """Which rank 0 starts, or which was there before."""
    own, served = tmp_path / "own", tmp_path / "served"
    said = train(own, *LONG_STEPS, "rollout.mode=server")
    assert said.count("vLLM server started") == 1
    assert_synced(own, 3)
    # With the first run's model: every weight of the second's is another.
    spec = ServerSpec(str(own / "model"), engine=SERVED)
    with ServerProcess(spec, log=tmp_path / "server.log") as server:
        url = f"rollout.server_url={server.url}"
        train(served, *LONG_STEPS, "seed=1", "rollout.mode=server", url, "rollout.engine={}")
    assert_synced(served, 3)


@needs_deepspeed
def test_deepspeed_partitions_the_model_on_cpus_too(tmp_path):
    """ZeRO-3, which `trainer.deepspeed` asks for, resumed; or accelerate's file, with LoRA."""
    own, adapted = tmp_path / "own", tmp_path / "adapted"
    train(own, *LONG_STEPS, *ZERO3)
    assert_synced(own, 3, "global_step3")
    assert "going on from step 3" in train(
        own, *LONG_STEPS, *ZERO3, "trainer.max_steps=4", "--resume"
    )
    resumed = json.loads((own / "summary.json").read_text())
    assert resumed["num_steps"] == 4
    assert 0 < resumed["logprob_gap_max"] <= 1e-5
    launcher = [*ACCELERATE, "configs/accelerate/zero3.yaml"]
    lora = "peft={r: 8, target_modules: all-linear}"
    train(adapted, *ZERO3[:2], "trainer.max_steps=3", lora, launcher=launcher)
    assert (adapted / "checkpoint-3" / "global_step3").exists()
    summary = json.loads((adapted / "summary.json").read_text())
    assert summary["num_syncs"] == 3
    assert summary["prediction_exact"]
    assert summary["logprob_gap_max"] <= 1e-5
    syncs = [json.loads(line) for line in (adapted / "syncs.jsonl").read_text().splitlines()]
    # The base travels once, and then the adapter.
    assert syncs[1]["sent_bytes"] < syncs[0]["sent_bytes"] / 2


def test_two_processes_train_with_one_tensor_parallel_engine(tmp_path):
    """Started by accelerate, whose file says itself that the model is sharded."""
    launcher = [*ACCELERATE, "configs/accelerate/fsdp2.yaml"]
    engine = ["trainer.vllm_tensor_parallel_size=2", "sync.verify=full"]
    train(tmp_path, *LONG_STEPS, "trainer.fsdp=false", *engine, launcher=launcher)
    assert_synced(tmp_path, 3)


def test_two_processes_train_one_sharded_model_and_stop_together(tmp_path):
    said = train(tmp_path, *LONG_STEPS, "trainer.max_steps=4")
    assert said.count("vLLM engine started") == 1
    assert said.count("report written to") == 1
    assert_synced(tmp_path, 4)
    # Whole; a tied head is written beside the embeddings.
    assert shapes(tmp_path / "model").items() <= shapes(tmp_path / "trained").items()

    # torchrun passes SIGTERM on. Both finish the same step and save it, and rank 0 reports.
    program = ["-m", "qerl_sync.cli", "train", CONFIG, *SHORT, "--output-dir", str(tmp_path)]
    more = [*LONG_STEPS, "trainer.max_steps=100", "--resume"]
    done = torchrun(*program, *more, terminate_at="training 10/100")
    assert "stopped before the end; --resume goes on" in done.stdout, done.stdout + done.stderr
    assert "error:" not in done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    last = summary["num_steps"]
    assert 10 <= last < 100
    assert summary["logprob_gap_max"] <= 1e-5
    syncs = [json.loads(line) for line in (tmp_path / "syncs.jsonl").read_text().splitlines()]
    assert [sync["step"] for sync in syncs] == list(range(last))
    assert [sync["version"] for sync in syncs] == list(range(1, last + 1))
    assert (tmp_path / f"checkpoint-{last}" / "pytorch_model_fsdp.bin").exists()


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
