"""The parts of a training run, without an engine: data, rewards, models, directory, reports."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.errors import raises

from qerl_sync.buffers.trace import Trace, TraceStep
from qerl_sync.config import DataConfig, TinyModelConfig, TrainConfig
from qerl_sync.config.files import file_error, file_errors_explained
from qerl_sync.errors import ConfigError, FileError
from qerl_sync.report.plots import moving_mean, plot_buffers, plot_rewards
from qerl_sync.report.summary import Summary, reward_curve, summarize
from qerl_sync.report.tables import summary_table, trials_table
from qerl_sync.telemetry.files import append_line
from qerl_sync.training.data import addition_rows, load_data
from qerl_sync.training.directory import RunDirectory
from qerl_sync.training.display import Display
from qerl_sync.training.rewards import exact_match, final_number, resolve_reward
from qerl_sync.training.trials import Targets, Trial

# ------------------------------------------------------------------------------------------ data


def test_sums_are_right_have_one_digit_and_follow_the_seed():
    rows = addition_rows(300, seed=1)
    for row in rows:
        a, b = row["prompt"].removesuffix("=").split("+")
        assert row["answer"] == str(int(a) + int(b))
        assert len(row["prompt"]) == 4
        assert len(row["answer"]) == 1
    assert rows == addition_rows(300, seed=1) != addition_rows(300, seed=2)


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"q{i}", "right": i, "level": "easy"} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def columns(path, **changes):
    names = {"prompt_column": "question", "answer_column": "right"}
    return DataConfig(path=str(path), **names | changes)


def test_columns_of_a_file_are_named_as_we_name_them(rows_file):
    train, held_out = load_data(columns(rows_file, eval_size=3), seed=0, needs_answers=True)
    assert len(train) == 7
    assert held_out["prompt"] == ["q0", "q1", "q2"]
    assert train[0] == {"prompt": "q3", "answer": 3, "level": "easy"}


def test_parquet(rows_file, tmp_path):
    rows, _ = load_data(columns(rows_file), seed=0, needs_answers=True)
    rows.to_parquet(tmp_path / "rows.parquet")
    config = DataConfig(path=str(tmp_path / "rows.parquet"))
    again, _ = load_data(config, seed=0, needs_answers=True)
    assert again.to_list() == rows.to_list()


@pytest.mark.parametrize(
    "changes", [{"prompt_column": "questoin"}, {"answer_column": "wrong"}, {"eval_size": 10}]
)
def test_data_that_does_not_fit(rows_file, changes):
    (option,) = changes
    with raises(ConfigError, place=f"data.{option}") as caught:
        load_data(columns(rows_file, **changes), seed=0, needs_answers=True)
    if option == "prompt_column":  # the nearest column
        assert "'question'" in str(caught.value)


def test_answers_are_missed_only_where_they_are_needed(rows_file):
    config = columns(rows_file, answer_column="wrong")
    train, _ = load_data(config, seed=0, needs_answers=False)
    assert "answer" not in train.column_names


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.jsonl", None),
        ("missing/rows", None),
        ("empty.jsonl", ""),
        ("broken.jsonl", "{]"),
        ("cut_off.jsonl", '{"prompt": "a"}\n{"prompt": '),
        ("null.jsonl", '{"prompt": "a"}\n{"prompt": null}\n'),
        ("number.jsonl", '{"prompt": 1}\n'),
        ("binary.parquet", "PAR1, or not"),
        ("no_rows.csv", "prompt,answer\n"),
    ],
)
def test_data_that_is_not_there_empty_or_broken(tmp_path, name, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_data(DataConfig(path=name), seed=0, needs_answers=False)
    if content is None:
        assert str(tmp_path / name) in str(caught.value)
    if isinstance(caught.value, FileError):
        assert caught.value.path == name
    else:
        assert caught.value.place == "data.prompt_column"


# --------------------------------------------------------------------------------------- rewards


def test_the_last_number_of_a_solution_is_its_answer():
    solutions = ["2 * 36 = 72", "<answer> 72.0 </answer>", "about 1,072", "-72", "none"]
    right = ["half of 144 is 72\n#### 72"] * 5
    assert final_number(["p"] * 5, solutions, right) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert final_number(["p"], [[{"role": "assistant", "content": "1,072."}]], [1072]) == [1.0]
    assert final_number(["p"], ["none"], ["none"]) == [0.0]


def test_exact_match_on_texts_numbers_and_chats():
    assert exact_match(["p"] * 3, ["7", " 7\n", "71"], ["7", "7", "7"]) == [1.0, 1.0, 0.0]
    assert exact_match(["p"], ["7"], [7]) == [1.0]
    chat = [{"role": "assistant", "content": "7"}]
    assert exact_match(["p"], [chat], ["7"], other=["column"]) == [1.0]


def test_rewards_by_name(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text("def short(completions, **_): return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    assert resolve_reward("exact_match") is exact_match
    assert resolve_reward("rewards_of_mine:short")(["c"]) == [1.0]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("exact_mach", "'exact_match'"),  # the nearest one
        ("json:lods", "'loads'"),
        ("json:__doc__", "'__doc__'"),
        ("no_such_module:f", "'no_such_module'"),
        (":f", "':f'"),
    ],
)
def test_unknown_rewards(name, shown):
    with raises(ConfigError, place="reward") as caught:
        resolve_reward(name)
    assert shown in str(caught.value)


# ---------------------------------------------------------------------------------------- models


@given(st.text(max_size=30))
def test_byte_tokenizers_spell_anything(text):
    assert _byte_tokenizer().decode(_byte_tokenizer()(text)["input_ids"]) == text


@cache
def _byte_tokenizer():
    from qerl_sync.training.models import train_tokenizer

    return train_tokenizer(["3+4=", "abc abc abc"], 300)


def test_character_tokenizers_have_the_datas_characters():
    from qerl_sync.training.models import train_tokenizer

    tokenizer = train_tokenizer(["3+4=", "7\n"], None)
    assert len(tokenizer) == 3 + 6
    assert tokenizer.decode(tokenizer("43=\n7")["input_ids"]) == "43=\n7"
    assert tokenizer("x")["input_ids"] == [tokenizer.unk_token_id]
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3


TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def test_tiny_models_follow_the_seed_and_the_configuration():
    import torch

    from qerl_sync.training.models import make_tiny

    def make(seed, **changes):
        return make_tiny(TinyModelConfig(config=TINY | changes), "float32", ["3+4="], seed)

    model, tokenizer = make(0)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.dtype == torch.float32
    same, other = make(0)[0], make(1)[0]
    weights = [next(iter(one.parameters())) for one in (model, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert make(0, tie_word_embeddings=True)[0].config.tie_word_embeddings
    with raises(ConfigError, place="model.tiny"):
        make(0, num_attention_heads=0)


def test_model_directories_that_are_none(tmp_path, monkeypatch):
    from qerl_sync.training.models import load_model, load_tokenizer

    monkeypatch.chdir(tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for path in (
        str(tmp_path / "nowhere"),
        "runs/7/nowhere",  # too deep for a hub id
        "adapter/nowhere",
        "some/model",  # might be one
        str(tmp_path),
        "adapter",
    ):
        with pytest.raises(FileError) as caught:
            load_tokenizer(path)
        assert caught.value.path is not None
        assert str(tmp_path / path) in str(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with raises(FileError, path=str(tmp_path)):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(FileError) as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.path == str(tmp_path / "model.safetensors")
    with pytest.raises(FileError):  # safetensors raises an error of its own
        load_model(str(tmp_path), "float32")


def test_trl_refuses_in_our_words():
    from qerl_sync.training.arguments import grpo_arguments

    trainer = {"num_generations": 7, "use_cpu": True, "bf16": False}
    with raises(ConfigError, place="trainer"):
        grpo_arguments(run_config(trainer=trainer))


def test_arguments_of_loading_the_model_may_be_null_or_json():
    from qerl_sync.training.arguments import grpo_arguments

    for written, more in ((None, {}), ('{"revision": "a"}', {"revision": "a"})):
        trainer = {"model_init_kwargs": written, "use_cpu": True, "bf16": False}
        made = grpo_arguments(run_config(trainer=trainer)).model_init_kwargs
        assert made == {"dtype": "float32", **more}


# ------------------------------------------------------------------------------------- directory


def run_config(**changes) -> TrainConfig:
    smallest = {"model": {"path": "m"}, "data": {"task": "addition"}, "reward": "exact_match"}
    return TrainConfig(**{**smallest, "output_dir": "out", **changes})


def checkpoint(directory: RunDirectory, step: int) -> Path:
    path = directory.root / f"checkpoint-{step}"
    path.mkdir()
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


@pytest.fixture
def directory(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    assert directory.start(run_config()) is None
    return directory


def test_an_earlier_run_is_moved_and_nothing_else(directory):
    checkpoint(directory, 5)
    append_line(directory.syncs, {"step": 0})
    (directory.root / "notes.txt").write_text("mine")
    moved = directory.start(run_config(seed=1))
    assert moved == directory.root / "earlier-1"
    assert (moved / "checkpoint-5" / "trainer_state.json").exists()
    assert json.loads((moved / "config.json").read_text())["seed"] == 0
    assert json.loads(directory.config.read_text())["seed"] == 1
    assert (directory.root / "notes.txt").exists()
    assert directory.read_syncs() == []


def test_no_earlier_run_is_written_over_and_every_ranks_log_goes_with_its_run(directory):
    (directory.root / "earlier-2").mkdir()  # the user has deleted earlier-1
    directory.engine_log_of(1).write_text("of rank 1")
    moved = directory.start(run_config())
    assert moved == directory.root / "earlier-3"
    assert (moved / "vllm-1.log").read_text() == "of rank 1"
    assert not directory.engine_log_of(1).exists()


def test_a_run_that_never_began_is_not_kept(directory):
    assert directory.start(run_config()) is None


def test_other_files_in_the_directory_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert RunDirectory(tmp_path).start(run_config()) is None
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", "model/config.json"])
def test_a_directory_with_a_model_of_the_user_is_refused(tmp_path, name):
    """Its config.json would be written over, or its `model` taken for the policy of the run."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"model_type": "qwen3"}')
    with raises(FileError, path=str(tmp_path / name.partition("/")[0])):
        RunDirectory(tmp_path).start(run_config())
    assert file.read_text() == '{"model_type": "qwen3"}'


def test_resuming_takes_the_last_whole_checkpoint_and_drops_what_is_done_again(directory):
    for step in (2, 10):
        checkpoint(directory, step)
    (directory.root / "checkpoint-12").mkdir()  # died while writing it
    for step in range(12):
        append_line(directory.syncs, {"step": step})
    with directory.syncs.open("a") as lines:
        lines.write('{"step": 1')
    assert directory.resume(run_config(trainer={"max_steps": 20})).name == "checkpoint-10"
    assert [report["step"] for report in directory.read_syncs()] == list(range(10))


def test_adapters_of_another_shape_are_not_taken_for_a_damaged_checkpoint(directory):
    checkpoint(directory, 2)
    with raises(ConfigError, changed=("peft",)):
        directory.resume(run_config(peft={"r": 4}))


def test_resuming_before_the_first_checkpoint_is_refused(directory):
    append_line(directory.syncs, {"step": 0})
    with raises(FileError, path=str(directory.root)):
        directory.resume(run_config())
    assert directory.read_syncs() == [{"step": 0}]


DAMAGED = {
    "optimizer.pt": b"PK\x03\x04 and then it was cut off",
    "scheduler.pt": b"",
    "model.safetensors": b"\xff" * 100,
    "config.json": b"{",
    "trainer_state.json": b'{"global_step"',
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint_is_named_before_anything_is_started(directory, name):
    checkpoint(directory, 2)
    last = checkpoint(directory, 4)
    (last / name).write_bytes(DAMAGED[name])
    with pytest.raises(FileError) as caught:
        directory.resume(run_config())
    assert caught.value.path == str(last / name)
    shutil.rmtree(last)  # as the message says
    assert directory.resume(run_config()).name == "checkpoint-2"


def test_a_run_without_room_or_without_a_directory_is_a_file_error(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").symlink_to("/dev/full")
    wrong = {
        "file": tmp_path / "file",
        "in a file": tmp_path / "file" / "run",
        "not allowed": Path("/sys/run"),
        "full": tmp_path / "full",
    }
    for case, path in wrong.items():
        with pytest.raises(FileError) as caught, file_errors_explained(path):
            RunDirectory(path).start(run_config())
        assert caught.value.path == str(path), case
        assert isinstance(caught.value.__cause__, OSError)


def test_what_rust_and_torch_say_of_a_full_disk_is_understood_and_a_socket_is_no_file(tmp_path):
    full = Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    for error in (full, RuntimeError("PytorchStreamWriter failed writing file data/0")):
        found = file_error(error, tmp_path)
        assert found is not None
        assert found.path == str(tmp_path)
        wrapped = RuntimeError("while saving")
        wrapped.__cause__ = error
        assert file_error(wrapped, tmp_path) is not None
    for error in (PermissionError(errno.EACCES, "bind"), ConnectionRefusedError(111, "refused")):
        assert file_error(error) is None


def test_resuming_what_is_not_there_or_something_else(directory, tmp_path):
    with raises(FileError, path=str(tmp_path / "other")):
        RunDirectory(tmp_path / "other").resume(run_config())
    with raises(ConfigError, changed=("seed",)):
        directory.resume(run_config(seed=1))


# --------------------------------------------------------------------------------------- summary


def sync(step: int, **changes) -> dict:
    sizes = ("peak_buffered_bytes", "peak_pinned_bytes", "max_open_layers")
    report = {f"{size}_{how}": 100 for size in sizes for how in ("predicted", "measured")}
    report |= {"step": step, "sent_bytes": 1000, "seconds": {"total": 0.1}}
    return {**report, "prediction_exact": True, **changes}


def log(rewards: list[float], every: int = 1) -> list[dict]:
    gap = "sampling/sampling_logp_difference/max"
    entries = [
        {"step": (i + 1) * every, "reward": reward, "step_time": 0.5, gap: 1e-7 * (i + 1)}
        for i, reward in enumerate(rewards)
    ]
    return [*entries, {"step": len(rewards) * every, "train_runtime": 3.0}]


def summary_of(entries, syncs) -> Summary:
    return summarize(entries, syncs, wall_seconds=12.0, versions={"torch": "2"})


def test_summary_of_a_run():
    syncs = [sync(0), sync(1, max_open_layers_measured=107, prediction_exact=False)]
    summary = summary_of(log([0.0] * 5 + [0.5] + [1.0] * 5), syncs)
    assert (summary.reward_first, summary.reward_last) == (0.0, 1.0)
    assert summary.num_steps == 11
    assert summary.num_syncs == 2
    assert summary.sent_bytes == 2000
    assert summary.sync_time_share == pytest.approx(0.2 / 5.5)
    assert summary.logprob_gap_max == pytest.approx(11e-7)
    assert summary.max_open_layers == 107
    assert not summary.prediction_exact


def test_the_summary_says_how_the_weights_travelled():
    shm, tcp = "shm: the worker can open it", "tcp: sync.transport says so"
    syncs = [sync(0, transport=shm), sync(1, transport=shm), sync(2, transport=tcp)]
    summary = summary_of(log([0.5] * 3), syncs)
    assert summary.transport == f"{shm}; {tcp}"
    assert summary_of(log([0.5]), [sync(0)]).transport == ""  # written by an earlier version


def test_the_share_counts_the_steps_that_were_not_logged():
    assert summary_of(log([0.5] * 3, every=10), [sync(0)]).sync_time_share == pytest.approx(
        0.1 / 15
    )


def test_summary_of_nothing_says_that_nothing_was_measured():
    summary = summary_of([], [])
    assert summary.reward_first is summary.sync_time_share is summary.logprob_gap_max is None
    assert "not measured" in printed(summary_table(summary))


def printed(table, width=80) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(width):
    summary = summary_of(log([0.1, 0.9]), [sync(0, sent_bytes=10**13)])
    missed = [[], Targets().missed(summary)]
    trials = [Trial("", 0, summary, Path()), Trial("", 10, summary, Path())]
    for table in (summary_table(summary), trials_table(trials, missed)):
        lines = printed(table, width).splitlines()
        assert max(map(len, lines)) <= width
    assert "exact" in printed(summary_table(summary))


def test_targets():
    good = summary_of(log([0.2] * 5 + [0.9] * 5), [sync(0)])
    assert Targets().missed(good) == []
    weak = summary_of(log([0.3] * 10), [sync(0, seconds={"total": 3.0}, prediction_exact=False)])
    assert Targets(seconds=10, gap=1e-8).missed(weak) == [
        "reward at least 2 times the first",
        "reward at least 0.4",
        "at most 10 s",
        "sync share at most 15%",
        "logprob gap at most 1e-08",
        "prediction exact",
    ]
    assert len(Targets().missed(summary_of([], []))) == 5  # unmeasured is missed, only time is not


# ----------------------------------------------------------------------------------------- plots


@given(st.lists(st.floats(0, 1), max_size=40), st.integers(1, 12))
def test_moving_mean(values, window):
    means = moving_mean(values, window)
    assert len(means) == len(values)
    for i, mean in enumerate(means):
        part = values[max(0, i - window + 1) : i + 1]
        assert mean == pytest.approx(sum(part) / len(part))


def pixels(path: Path):
    from matplotlib.image import imread

    return imread(path)


def test_plots_are_drawn_from_what_they_are_given(tmp_path):
    flat = Trace((TraceStep("a", 10, 10, 1), TraceStep("b", 20, 20, 1)))
    high = Trace((TraceStep("a", 10, 10, 1), TraceStep("b", 2**21, 2**21, 5)))
    plan = SimpleNamespace(policy="reorder", predicted=flat, as_given=high)
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    plot_buffers(plan, flat, paths[0])
    plot_buffers(plan, high, paths[1])
    plot_rewards(reward_curve(log([0.1, 0.5, 0.9])), paths[2])
    plot_rewards([], paths[3])
    drawn = [pixels(path) for path in paths]
    assert all(image.min() < 0.5 for image in drawn)  # not blank
    assert (drawn[0] != drawn[1]).any()
    assert (drawn[2] != drawn[3]).any()


# --------------------------------------------------------------------------------------- display


def test_without_a_terminal_progress_is_ten_lines():
    console = Console(file=io.StringIO(), width=80)
    with Display(console).steps("training", "trained") as steps:
        for done in range(1, 201):
            steps.advance(done, 200)
            steps.note(done, 200, f"reward {done / 200:.2f}")
        steps.note(200, 200, "once more")
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "  training 20/200 reward 0.10"
    assert lines[9] == "  training 200/200 reward 1.00"
    assert lines[10].startswith("✓ trained")
    assert len(lines) == 11


def test_a_long_phase_says_without_a_terminal_what_goes_on():
    console = Console(file=io.StringIO(), width=60)
    with Display(console).phase("starting", "started") as phase:
        for seconds in range(1, 25):
            phase.progress(seconds, f"[step {seconds}] " + "x" * 100)
    lines = console.file.getvalue().splitlines()
    assert [line[:30] for line in lines[:-1]] == [
        "  starting ... 10 s [step 10] ",
        "  starting ... 20 s [step 20] ",
    ]
    assert max(map(len, lines)) <= 60
    assert lines[-1].startswith("✓ started")


def test_a_phase_that_fails_claims_no_success():
    console = Console(file=io.StringIO(), width=80)
    with pytest.raises(ValueError, match="no"), Display(console).phase("trying", "done it"):
        raise ValueError("no")
    assert "done it" not in console.file.getvalue()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_after_the_step_and_saves_and_twice_stops_at_once(number):
    from transformers import TrainerControl

    from qerl_sync.training.callbacks import StopCleanly

    console = Console(file=io.StringIO())
    before = signal.getsignal(number)
    display = Display(console)
    with display.steps("training", "trained"):
        stop = StopCleanly(display, bool)
        control = TrainerControl()
        with stop.listening():
            stop.on_step_end(None, None, control)
            assert not control.should_training_stop
            os.kill(os.getpid(), number)
            stop.on_step_end(None, None, control)
            assert control.should_training_stop
            assert control.should_save
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
    assert "stopping after this step" in console.file.getvalue()


def test_deepspeed_in_one_process_of_a_cpu_is_refused(monkeypatch):
    from accelerate.state import PartialState

    from qerl_sync.training.processes import sharding_on_cpus

    asked = {"zero_optimization": {"stage": 3}}
    monkeypatch.setattr("transformers.integrations.deepspeed.deepspeed_config", lambda: asked)
    PartialState._reset_state()
    PartialState(cpu=True)
    try:
        with pytest.raises(ConfigError) as refused, sharding_on_cpus():
            pass
        assert refused.value.sharding == "DeepSpeed"
    finally:
        PartialState._reset_state()
