"""`qerl-sync plan` as a user runs it, on a small mixture of experts, from the map cache."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
from support.layer_maps import MOE, keep_recorded_maps
from typer.testing import CliRunner

from qerl_sync.cli.main import app
from qerl_sync.cli.plan.input import read_input
from qerl_sync.cli.plan.run import execute
from qerl_sync.cli.plan.table import OVER, scenario_table
from qerl_sync.config import SyncConfig
from qerl_sync.meta import format_bytes
from qerl_sync.offline import layer_map as offline
from qerl_sync.offline.layer_map import offline_map
from qerl_sync.plan.checkpoint import read_checkpoint
from qerl_sync.plan.orders import parse_order
from qerl_sync.plan.record import SyncRecord, write_record
from qerl_sync.plan.sync_plan import build_plan
from qerl_sync.training.directory import RunDirectory

LAYER_BYTES = 8 * 3 * 64 * 32 * 2  # the experts of one block, in bf16
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def cached_maps(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keep_recorded_maps()


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "small-moe.json"
    path.write_text(json.dumps(MOE))
    return path


def run(*arguments, code=0):
    """Run the command; returns what it wrote to standard output and to standard error."""
    words = ["plan", *map(str, arguments)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "80", "TERM": "dumb"})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stdout, result.stderr


def run_json(*arguments, code=0):
    return json.loads(run(*arguments, "--json", code=code)[0])


def by_line(found):
    return {(s["order"], s["policy"]): s for s in found["scenarios"]}


def test_the_table_shows_every_order_under_every_policy(model):
    shown, _ = run(model)
    for order in ("hf", "safetensors:5GB", "alphabetical", "size", "optimizer", "random:0"):
        assert re.search(rf"^{order} +warn +\d+ +[\d.]+ KiB", shown, re.M), order
    assert shown.count("reorder") >= 7
    assert "Layer map observed earlier from vLLM" in shown
    assert "out of order: the tensors of a parent layer do not arrive next to" in shown
    assert "model.layers.0.mlp.experts.routed_experts" in shown
    assert "Cure: let `sync.policy: reorder`" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 80


def test_json_has_the_figures_and_nothing_else_is_on_standard_output(model):
    found = run_json(model)
    assert found["layer_map"]["origin"] == "cache"
    assert found["num_tensors"] == 3 * (8 * 3 + 9) + 3
    assert found["layer_map"]["largest"]["held_bytes"] == LAYER_BYTES
    lines = by_line(found)
    assert len(lines) == 14
    ordered = [s for (_, policy), s in lines.items() if policy == "reorder"]
    assert {s["max_open_layers"] for s in ordered} == {1}
    assert {s["peak_buffered_bytes"] for s in ordered} == {LAYER_BYTES}
    worst = lines["random:0", "warn"]
    assert worst["max_open_layers"] > 3
    assert worst["causes"] == ["out_of_order"]
    largest = worst["most_buffered"]["largest"]
    assert [x["held_bytes"] for x in largest] == sorted(
        (x["held_bytes"] for x in largest), reverse=True
    )


def test_orders_and_policies_can_be_chosen(model, tmp_path):
    names = tmp_path / "names.txt"
    run(model, "--names", names, "--order", "random:5")
    lines = by_line(
        run_json(model, "--order", f"file:{names}", "--order", "random:5", "--policy", "warn")
    )
    assert set(lines) == {(f"file:{names}", "warn"), ("random:5", "warn")}
    figures = [{**s, "order": None} for s in lines.values()]
    assert figures[0] == figures[1]


def test_a_float32_trainer_holds_twice_as_much(model):
    found = run_json(model, "--dtype", "float32", "--order", "hf", "--policy", "warn")
    assert found["scenarios"][0]["peak_buffered_bytes"] == 2 * LAYER_BYTES


def test_chunks_pin_more_than_is_buffered(model):
    lines = by_line(run_json(model, "--chunk-bytes", "64KiB", "--order", "hf"))
    given, ordered = lines["hf", "warn"], lines["hf", "reorder"]
    assert given["peak_pinned_bytes"] > given["peak_buffered_bytes"] == LAYER_BYTES
    assert given["peak_receive_bytes"] >= given["peak_pinned_bytes"]
    assert "pinned_views" in given["causes"]
    assert ordered["peak_pinned_bytes"] < given["peak_pinned_bytes"]
    packed = ["--chunk-bytes", "64KiB", "--order", "hf", "--packing"]
    streams = by_line(run_json(model, *packed, "stream"))
    assert streams["hf", "reorder"]["peak_pinned_bytes"] == given["peak_pinned_bytes"]
    assert "receiving" in run(model, *packed, "auto")[0]


def test_a_budget_is_a_policy_of_its_own(model):
    found = run_json(model, "--budget", "200KiB", "--order", "random:0")
    lines = by_line(found)
    assert {policy for _, policy in lines} == {"warn", "reorder", "reorder_in_budget"}
    assert lines["random:0", "warn"]["within_budget"] is False
    kept = lines["random:0", "reorder_in_budget"]
    assert kept["within_budget"] is True
    assert LAYER_BYTES <= kept["peak_pinned_bytes"] <= 200 * 1024


def test_what_keeps_the_budget_is_neither_red_nor_in_need_of_a_cure(model):
    """The budget limits what is pinned: receive buffers are not red, and open layers are fine."""
    packed = ["--budget", "120KiB", "--chunk-bytes", "100KiB", "--order", "random:0"]
    lines = by_line(run_json(model, *packed))
    kept = lines["random:0", "reorder_in_budget"]
    assert kept["within_budget"]
    assert kept["peak_receive_bytes"] > 120 * 1024
    assert kept["causes"] == []
    assert lines["random:0", "warn"]["causes"]
    roomy = by_line(run_json(model, "--budget", "1MiB", "--order", "random:0"))
    assert roomy["random:0", "warn"]["within_budget"]
    assert {tuple(line["causes"]) for line in roomy.values()} == {()}

    asked = {"orders": ["random:0"], "budget": "120KiB", "chunk_bytes": "100KiB"}
    found = execute(model, lambda text: nullcontext(), **asked)
    by_policy = {scenario.policy: i for i, scenario in enumerate(found.scenarios)}
    table = scenario_table(found.scenarios)
    red = {
        (column.header, policy)
        for column in table.columns[:-1]
        for policy, i in by_policy.items()
        if getattr([*column.cells][i], "style", "") == OVER
    }
    assert red == {("pinned", "warn")}


def test_spill_is_shown_where_it_is_asked_for(model):
    order = ["--chunk-bytes", "4KiB", "--order", "random:0"]
    assert "staged" not in run(model, *order)[0]
    shown, _ = run(model, *order, "--policy", "warn", "--policy", "spill")
    assert re.search(r"staged.*\n.*\n.* warn .*\n +spill +1 +96.0 KiB", shown)
    lines = by_line(run_json(model, *order, "--policy", "warn", "--policy", "spill"))
    assert lines["random:0", "warn"]["peak_staged_bytes"] == 0
    staged = lines["random:0", "spill"]["peak_staged_bytes"]
    assert staged > 0
    guard = ["--policy", "spill", "--assert"]
    run(model, *order, *guard, f"peak_staged_bytes={staged}")
    _, said = run(model, *order, *guard, f"peak_staged_bytes={staged - 1}", code=1)
    assert "staged in host memory: random:0, spill:" in said


def test_a_budget_that_cannot_be_met_is_refused_after_the_figures(model):
    shown, said = run(model, "--budget", "90KiB", "--order", "hf", code=2)
    assert re.search(r"^hf +warn +1 +96.0 KiB", shown, re.M)
    assert "model.layers.0.mlp.experts.routed_experts" in said
    assert run_json(model, "--budget", "90KiB", code=2)["refused"]


def test_assertions_that_hold(model):
    run(model, "--assert", "max_open_layers=1", "--assert", "peak_buffered_bytes=2GiB")
    found = run_json(model, "--assert", "max_open_layers=1")
    assert [(s["order"], s["policy"]) for s in found["scenarios"]] == [("hf", "reorder")]
    assert found["assertions"] == [
        {"field": "max_open_layers", "limit": 1, "holds": True, "failures": []}
    ]


def test_assertions_that_do_not_hold_say_why(model):
    arguments = ["--order", "random:0", "--assert", "max_open_layers=1"]
    _, said = run(model, *arguments, "--assert", "peak_buffered_bytes=1KiB", code=1)
    assert "at most 1 parent layers open at once: random:0, warn:" in said
    assert "at most 1.0 KiB buffered: random:0, reorder: 96.0 KiB" in said
    found = run_json(model, *arguments, code=1)
    assert [a["holds"] for a in found["assertions"]] == [False]


@pytest.mark.slow
def test_pictures(model, tmp_path):
    pytest.importorskip("matplotlib")
    png, html = tmp_path / "plan", tmp_path / "plan.html"  # PNG, whatever it is called
    _, said = run(model, "--png", png, "--html", html, "--budget", "200KiB", "--json")
    assert png.read_bytes().startswith(PNG_SIGNATURE)
    assert f"page written to {html}" in said
    page = html.read_text(encoding="utf-8")
    assert "small-moe Qwen3MoeForCausalLM" in page
    assert "prefers-color-scheme: dark" in page
    assert "within the budget" in page
    assert "{{" not in page
    assert not re.search(r"(src|href|url)\s*[=(]|https?://|@import", page)


def test_pictures_show_what_is_staged(model, tmp_path):
    pytest.importorskip("matplotlib")
    html = tmp_path / "plan.html"
    spilled = ["--order", "random:0", "--policy", "spill", "--chunk-bytes", "4KiB"]
    staged = run_json(model, *spilled)["scenarios"][0]["peak_staged_bytes"]
    run(model, *spilled, "--html", html, "--png", tmp_path / "plan.png")
    page = html.read_text(encoding="utf-8")
    assert f'<td class="number">{format_bytes(staged)}</td>' in page
    (left, width) = re.findall(r'<i class="staged" style="left:([\d.]+)%;width:([\d.]+)%', page)[0]
    assert float(width) / float(left) == pytest.approx(staged / LAYER_BYTES, rel=0.01)


def test_a_training_yaml_plans_what_its_run_would_do(tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "train.yaml"
    path.write_text(
        """
        output_dir: out
        model:
          tiny: {architecture: qwen3, config: {hidden_size: 64, intermediate_size: 96,
                 num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2,
                 head_dim: 16, tie_word_embeddings: true}}
        data: {task: addition}
        reward: exact_match
        sync: {policy: warn, source_order: "random:3"}
        """
    )
    keep_recorded_maps(read_input(path).engine)
    found = run_json(path, "--assert", "max_open_layers=1", code=1)
    assert found["architecture"] == "Qwen3ForCausalLM"
    assert found["dtypes"] == "float32"
    assert [(s["order"], s["policy"]) for s in found["scenarios"]] == [("random:3", "warn")]
    path.write_text(path.read_text().replace("policy: warn", "policy: spill"))
    found = run_json(path, "--assert", "max_open_layers=1")
    assert [(s["order"], s["policy"]) for s in found["scenarios"]] == [("random:3", "spill")]
    rest = "source_order: hf, ignore_names: [a.*], allow_incomplete: [b]"
    path.write_text(path.read_text().replace('source_order: "random:3"', rest))
    asked = read_input(path)
    assert (asked.ignore_names, asked.allow_incomplete) == (("a.*",), ("b",))


@pytest.fixture
def recorded(model, tmp_path):
    """A run that measured exactly what was planned, and the parts that it was made of."""
    found = offline_map(read_checkpoint(model))
    metas = parse_order("random:1")(found.metas)
    plan = build_plan(metas, found.layer_map, "warn")
    directory = tmp_path / "run"
    write_record(directory, SyncRecord(plan, plan.predicted, "random:1"))
    return directory, plan


def test_a_run_that_went_as_planned_is_equal(model, recorded):
    directory, plan = recorded
    shown, _ = run(model, "--compare", directory)
    assert f"Equal, tensor by tensor: the recorded sync of {len(plan.metas)}" in " ".join(
        shown.split()
    )
    found = run_json(model, "--compare", directory, "--order", f"run:{directory}")
    assert found["compare"][0]["equal"] is True
    given = by_line(found)[f"run:{directory}", "warn"]
    assert given["peak_buffered_bytes"] == plan.predicted.peak_buffered_bytes


def test_a_comparison_shows_the_line_that_the_run_has_run(model, recorded):
    found = run_json(model, "--compare", recorded[0])
    assert [(s["order"], s["policy"]) for s in found["scenarios"]] == [("random:1", "warn")]
    assert found["scenarios"][0]["peak_buffered_bytes"] == recorded[1].predicted.peak_buffered_bytes


def test_a_comparison_takes_the_budget_and_the_chunks_of_the_run(model, tmp_path):
    """A transport's own chunk size changes the order within a budget."""
    found = offline_map(read_checkpoint(model))
    metas = parse_order("interleaved:4")(found.metas)
    options = {"chunk_bytes": 100 << 10, "budget_bytes": 200 << 10}
    plan = build_plan(metas, found.layer_map, "reorder", **options)
    assert plan.metas != build_plan(metas, found.layer_map, "reorder", budget_bytes=200 << 10).metas

    class Session:
        last_trace, chunk_bytes = plan.predicted, options["chunk_bytes"]

        def __init__(self):
            self.plan = plan

        def storages(self):
            return {}

    RunDirectory(tmp_path / "run").record_plan(Session(), SyncConfig.of(source_order="size"))
    found = run_json(model, "--compare", tmp_path / "run")
    assert found["compare"][0]["equal"]
    assert found["budget_bytes"] == 200 << 10
    assert [(s["order"], s["policy"]) for s in found["scenarios"]] == [
        ("size", "reorder_in_budget")
    ]


def test_a_run_that_went_otherwise_shows_the_first_difference(model, recorded):
    directory, plan = recorded
    steps = list(plan.predicted.steps)
    steps[7] = steps[7]._replace(buffered_bytes=steps[7].buffered_bytes + 2)
    measured = type(plan.predicted)(tuple(steps))
    write_record(directory, SyncRecord(plan, measured, "random:1"))
    _, said = run(model, "--compare", directory, code=1)
    assert f"tensor 7 ({steps[7].name}): buffered_bytes predicted" in said


def test_a_run_of_another_model_is_different(model, recorded, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**MOE, "num_hidden_layers": 2}))
    _, said = run(other, "--compare", recorded[0], code=1)
    assert "the recorded run: the model has no 'model.layers.2." in said
    _, said = run(model, "--compare", recorded[0], "--dtype", "float32", code=1)
    assert re.search(r"tensor 0 is .* \(float32, .* in the plan and .* \(bfloat16, ", said)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--budget", "12 bananas"], "'12 bananas' is not a number of bytes"),
        (["--chunk-bytes", "-1"], "'-1' is not a number of bytes"),
        (["--order", "sideways"], "unknown order 'sideways'"),
        (["--order", "file:/none/such"], "the order file /none/such cannot be read"),
        (["--order", "run:/none/such"], "/none/such holds no recorded sync"),
        (["--order", "safetensors"], "needs the checkpoint's .safetensors files"),
        (["--policy", "war"], "unknown policy 'war'; did you mean 'warn'?"),
        (["--policy", "reorder_in_budget"], "needs a budget: --budget 2GiB"),
        (["--assert", "open_layers=1"], "did you mean 'max_open_layers'?"),
        (["--assert", "bananas=1"], "nothing is called 'bananas'; choose one of max_open_layers"),
        (["--assert", "max_open_layers"], "has no limit"),
        (["--assert", "max_open_layers=one"], "'one' is no whole number"),
        (["--assert", "peak_buffered_bytes=12 bananas"], "is not a number of bytes"),
        (["--dtype", "half"], "unknown dtype 'half'"),
        (["--compare", "/none/such"], "/none/such holds no recorded sync"),
        (["--png", "/dev/full"], "/dev/full: No space left on device"),
        (["--html", "/dev/full"], "/dev/full: No space left on device"),
        (["--names", "/none/such/names"], "/none/such/names: No such file"),
    ],
)
def test_bad_input_is_one_error(model, arguments, complaint):
    _, said = run(model, *arguments, code=2)
    assert complaint in said
    assert "written to" not in said
    assert said.count("error:") == 1


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(
            {"architectures": ["BananaForCausalLM"], "model_type": "banana"},
            "banana",
            marks=pytest.mark.vllm,
        ),
        ({"weight_map": {}}, "weight_map"),
        ("{", "small-moe.json"),
    ],
)
def test_a_bad_model_is_one_error(model, content, complaint):
    model.write_text(content if isinstance(content, str) else json.dumps(content))
    _, said = run(model, code=2)
    assert complaint in said
    assert said.count("error:") == 1


@pytest.mark.slow  # transformers is imported twice, in processes of its own
def test_without_vllm_recorded_patterns_answer(model, monkeypatch):
    observed = json.loads(run(model, "--json")[0])
    monkeypatch.setattr(offline, "installed_vllm", lambda: None)
    shown, _ = run(model)
    assert "Layer map recorded from vLLM" in shown
    recorded = json.loads(run(model, "--json", "--tp", "1")[0])
    assert recorded["layer_map"].pop("origin") == "recorded"
    assert observed["layer_map"].pop("origin") == "cache"
    assert recorded == observed


def test_without_vllm_the_error_says_what_to_install(model, monkeypatch):
    monkeypatch.setattr(offline, "installed_vllm", lambda: None)
    shown, said = run(model, "--tp", "2", code=2)
    assert (shown, said.count("error:")) == ("", 1)
    assert "qerl-sync[gpu]" in said


def test_a_names_file_that_does_not_fit_is_refused(model, tmp_path):
    names = tmp_path / "names.txt"
    run(model, "--names", names)
    lines = names.read_text().splitlines()
    names.write_text("\n".join(lines[1:]))
    _, said = run(model, "--order", f"file:{names}", code=2)
    assert f"{lines[0]!r} is missing" in said
    names.write_text("\n".join([*lines, lines[3]]))
    _, said = run(model, "--order", f"file:{names}", code=2)
    assert f"{lines[3]!r} stands there more than once" in said


def test_debug_shows_the_traceback(model):
    result = CliRunner().invoke(app, ["plan", str(model), "--budget", "12 bananas", "--debug"])
    assert type(result.exception).__name__ == "ConfigError"


def test_neither_torch_nor_vllm_is_imported(model):
    program = (
        "import sys; from qerl_sync.cli.main import app\n"
        f"try: app(['plan', {str(model)!r}, '--json'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'vllm', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.vllm
def test_a_multimodal_model_is_probed_without_its_image_library(tmp_path):
    """vLLM's own class for it, whose file imports torchvision."""
    path = tmp_path / "small-qwen3.5.json"
    text = {
        "model_type": "qwen3_5_moe_text",
        **{name: MOE[name] for name in ("vocab_size", "hidden_size", "num_experts_per_tok")},
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 8,
    }
    vision = {
        "model_type": "qwen3_5_moe_vision",
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 4,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
    }
    content = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "dtype": "bfloat16",
        "text_config": text,
        "vision_config": vision,
    }
    path.write_text(json.dumps(content))
    found = run_json(path, "--order", "hf", "--order", "random:0")
    assert found["layer_map"]["origin"] in ("probe", "cache")
    lines = by_line(found)
    assert lines["random:0", "reorder"]["max_open_layers"] == 1
    worst = lines["random:0", "warn"]
    assert worst["max_open_layers"] > 4
    held = {layer["layer"]: layer["held_bytes"] for layer in worst["most_buffered"]["largest"]}
    experts = [name for name in held if name.endswith("mlp.experts.routed_experts")]
    assert experts
    assert max(held[name] for name in experts) <= LAYER_BYTES
