"""`qerl-sync train` as a user runs it: a short real run, its files, its resumption, its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.ports import free_port
from support.prometheus import PROMETHEUS, Prometheus, needs_prometheus

from qerl_sync import load_config
from qerl_sync.training.directory import RunDirectory

ROOT = Path(__file__).parents[2]
CONFIG = "configs/grpo_cpu.yaml"
SUMMARY = {
    "reward_first",
    "reward_last",
    "num_syncs",
    "sync_time_share",
    "peak_buffered_bytes_predicted",
    "peak_buffered_bytes_measured",
    "peak_pinned_bytes_measured",
    "max_open_layers",
    "logprob_gap_max",
    "wall_seconds",
    "versions",
}


def qerl_sync(*arguments: str | Path, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qerl_sync.cli", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six steps in a bad order, only warned of; a Prometheus that scraped it meanwhile, or None."""
    directory = tmp_path_factory.mktemp("run")
    port = free_port()
    prometheus = PROMETHEUS and Prometheus(tmp_path_factory.mktemp("prometheus"), run=port)
    short = ["trainer.max_steps=6", "trainer.save_steps=3", "warmup.trainer.max_steps=12"]
    options = [*short, f"sync.metrics_port={port}", "--output-dir", directory, "--trace", "2"]
    done = qerl_sync("train", "configs/grpo_cpu_out_of_order.yaml", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    yield directory, done.stdout + done.stderr, prometheus
    if prometheus:
        prometheus.close()


@pytest.mark.vllm
@pytest.mark.slow
class TestRun:
    def test_summary(self, run):
        summary = json.loads((run[0] / "summary.json").read_text())
        assert summary.keys() >= SUMMARY
        assert summary["versions"].keys() >= {"torch", "vllm", "trl"}
        assert summary["num_syncs"] == 6
        assert 0 < summary["reward_first"] <= 1
        assert 0 < summary["logprob_gap_max"] <= 1e-5
        assert summary["max_open_layers"] > 1
        predicted = summary["peak_buffered_bytes_predicted"]
        assert summary["peak_buffered_bytes_measured"] == predicted > 0
        assert 0 < summary["sync_time_share"] < 1

    def test_a_line_for_each_sync(self, run):
        lines = (run[0] / "syncs.jsonl").read_text().splitlines()
        reports = [json.loads(line) for line in lines]
        assert [report["version"] for report in reports] == [1, 2, 3, 4, 5, 6]
        assert all(report["prediction_exact"] for report in reports)

    @needs_prometheus
    def test_a_prometheus_saw_what_the_summary_says(self, run):
        summary = json.loads((run[0] / "summary.json").read_text())
        held = {
            "max_over_time(qerl_sync_syncs_total[10m])": summary["num_syncs"],
            "max_over_time(qerl_sync_open_layers[10m])": summary["max_open_layers"],
            "max_over_time(qerl_sync_peak_buffered_bytes[10m])": summary[
                "peak_buffered_bytes_measured"
            ],
            "min_over_time(qerl_sync_prediction_exact[10m])": 1,
        }
        found = {what: [float(one["value"][1]) for one in run[2].ask(what)] for what in held}
        assert found == {what: [value] for what, value in held.items()}

    def test_pictures(self, run):
        for name in ("reward.png", "buffers.png"):
            assert (run[0] / name).read_bytes().startswith(b"\x89PNG")

    def test_what_is_left_to_look_at(self, run):
        """The page of the run, what explain says, and the spans of one sync."""
        directory = run[0]
        assert qerl_sync("report", directory).returncode == 0
        page = (directory / "report.html").read_text(encoding="utf-8")
        assert page.count("<option ") == 6
        assert page.count("data-figure=") == 1, "six equal syncs"
        assert "<h3>Reward</h3>" in page
        findings = json.loads(qerl_sync("explain", directory, "--json").stdout)
        assert "failed" not in {finding["kind"] for finding in findings}
        (advice,) = [one for one in findings if "policy: reorder" in one["change"]]
        assert any("gate_up_proj" in layer for layer in advice["layers"])
        (path,) = directory.glob("trace-*.json")
        assert path.name == "trace-2.json"
        events = json.loads(path.read_text())["traceEvents"]
        processed = {e["name"].split()[-1] for e in events if e.get("cat") == "process"}
        assert {"model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.down_proj"} <= processed
        load = next(e for e in events if e["name"] == "load")
        assert all(
            load["ts"] <= e["ts"] <= load["ts"] + load["dur"]
            for e in events
            if e["name"] == "process model.layers.0.mlp.gate_up_proj"
        )

    def test_what_a_person_reads(self, run):
        _, text, _ = run
        assert text.count("parent layers at once") == 1
        assert "policy: reorder" in text
        for words in ("reward, first", "syncs", "peak buffered", "largest logprob gap", "exact"):
            assert words in text

    def test_nothing_looks_like_a_failure(self, run):
        directory, text, _ = run
        assert "Triton" not in text
        assert not list(directory.rglob("README.md")), "TRL's card: a fine-tuned version of None"

    def test_the_recorded_run_holds_against_its_plan(self, run):
        held = qerl_sync("plan", run[0] / "model", "--compare", run[0])
        assert held.returncode == 0, held.stdout + held.stderr

    def test_resumes_where_it_was(self, run):
        directory = run[0]
        more = ["trainer.max_steps=8", "trainer.save_steps=3", "warmup.trainer.max_steps=12"]
        config = "configs/grpo_cpu_out_of_order.yaml"
        done = qerl_sync("train", config, *more, "--output-dir", directory, "--resume")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "going on from step 6" in done.stdout + done.stderr
        lines = (directory / "syncs.jsonl").read_text().splitlines()
        reports = [json.loads(line) for line in lines]
        assert [report["step"] for report in reports] == [0, 1, 2, 3, 4, 5, 6, 7]
        assert [report["version"] for report in reports] == [1, 2, 3, 4, 5, 6, 7, 8]

    def test_a_checkpoint_that_cannot_be_read_is_named(self, run):
        """Whole by its table of contents: only transformers finds out."""
        directory = run[0]
        last = max(directory.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        optimizer = last / "optimizer.pt"
        whole = optimizer.read_bytes()
        torch.save({"state": "another program's"}, optimizer)
        config = "configs/grpo_cpu_out_of_order.yaml"
        more = ["trainer.max_steps=20", "warmup.trainer.max_steps=12"]
        done = qerl_sync("train", config, *more, "--output-dir", directory, "--resume")
        optimizer.write_bytes(whole)
        said = done.stdout + done.stderr
        assert done.returncode == 2, said
        assert f"cannot go on from {last}: " in "".join(said.splitlines())


@pytest.mark.vllm
@pytest.mark.slow
def test_the_summary_counts_what_training_waited_for_syncs(tmp_path):
    """With `when: eager` they run beside the trainer."""
    options = ["sync.when=eager", "trainer.max_steps=6", "warmup.trainer.max_steps=2"]
    done = qerl_sync("train", CONFIG, *options, "--output-dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "syncs.jsonl").read_text().splitlines()
    took = sum(json.loads(line)["seconds"]["total"] for line in lines)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 < summary["sync_seconds"] < 0.99 * took


WRONG = {
    "typo": (["sync.polcy=reorder"], ["sync.polcy", "did you mean 'policy'"]),
    "several at once": (
        ["trainer.max_stepz=3", "rollout.engine.dtyp=x", "sync.chunk_bytes=12 bananas"],
        ["max_stepz", "'max_steps'", "dtyp", "'dtype'", "12 bananas"],
    ),
    "our own key": (["trainer.use_vllm=false"], ["trainer.use_vllm", "is ours"]),
    "unknown order": (["sync.source_order=sorted"], ["sync.source_order", "interleaved:N"]),
    "unknown reward": (["reward=exact_mach"], ["exact_mach", "exact_match"]),
    "missing reward module": (["reward=no_such.module:f"], ["no_such.module"]),
    "no answer column": (["data.task=null", "data.path={rows}"], ["answer"]),
    "a file in place of a directory": (["--output-dir={rows}"], ["{rows}: File exists"]),
    "a full disk": (["--output-dir={full}"], ["{full}: No space left on device"]),
    "nothing to go on from": (["--output-dir={begun}", "--resume"], ["has no checkpoint yet"]),
    "an adapter": (["model.tiny=null", "model.path={adapter}"], ["{adapter} is a PEFT adapter"]),
    "an argument of the trainer": (["trainer.peft_config.r=8"], ["an argument of GRPOTrainer"]),
    "a kernel that a CPU lacks": (
        ["rollout.engine.quantization=fp8", "rollout.engine.dtype=bfloat16", "warmup=null"],
        ["TRL, PEFT or vLLM refuses this run", "`rollout.engine`"],
    ),
    "no tokenizer": (["model.tiny=null", "model.path={model}"], ["tokenizer", "{model}"]),
}


# The commands one after the other in one process: most of the time is imports.
IN_TURNS = """
import json, sys
from typer.testing import CliRunner
from qerl_sync.cli.main import app
for line in sys.stdin:
    result = CliRunner().invoke(app, json.loads(line))
    print(json.dumps([result.exit_code, result.output]), flush=True)
"""


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """What each wrong input ends with: exit code and output. And the places named in them."""
    directory = tmp_path_factory.mktemp("wrong")
    (directory / "rows.jsonl").write_text('{"prompt": "1+1="}\n' * 8)
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    for name in ("adapter", "full", "begun"):
        (directory / name).mkdir()
    (directory / "adapter" / "adapter_config.json").write_text("{}")
    (directory / "full" / "config.json").symlink_to("/dev/full")
    RunDirectory(directory / "begun").start(load_config(ROOT / CONFIG, check_foreign=False))
    places = {path.stem: str(path) for path in directory.iterdir()}
    commands = [
        ["train", CONFIG, "--output-dir", f"{directory}/out", *(t.format(**places) for t in texts)]
        for texts, _ in WRONG.values()
    ]
    done = subprocess.run(
        [sys.executable, "-c", IN_TURNS],
        input="".join(json.dumps(command) + "\n" for command in commands),
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    return dict(zip(WRONG, map(json.loads, lines), strict=True)), places


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_error_without_a_traceback(wrong, case):
    found, places = wrong
    code, output = found[case]
    assert code == 2, output
    said = "".join(output.split())  # rich folds lines: compare without white space
    assert "Traceback" not in said.partition("error:")[2]  # before it is what vLLM itself logs
    for word in WRONG[case][1]:
        assert "".join(word.format(**places).split()) in said, output


def test_a_missing_file_is_named_with_what_is_there():
    done = qerl_sync("train", "configs/grpo_gpu.yaml")
    assert done.returncode == 2
    assert "grpo_cpu.yaml" in done.stdout + done.stderr


def test_help_and_a_mistyped_path_need_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from qerl_sync.cli.main import app;"
        "r = CliRunner().invoke(app, ['--help']); assert r.exit_code == 0, r.output;"
        "assert 'train' in r.output and 'plan' in r.output;"
        "r = CliRunner().invoke(app, ['train', 'no.yaml']); assert r.exit_code == 2, r.output;"
        "assert not {'torch', 'vllm', 'trl', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)
