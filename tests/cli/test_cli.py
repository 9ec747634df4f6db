"""The command line's own parts: version, errors, warnings, the targets of `bench learning`."""

from __future__ import annotations

import io
import json
import logging

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from qerl_sync import ConfigError, __version__
from qerl_sync.cli.errors import errors_as_text, show_warnings
from qerl_sync.cli.main import app
from qerl_sync.errors import FileError, SyncError
from qerl_sync.report import plots
from qerl_sync.training import trials

runner = CliRunner()


def test_version():
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"qerl-sync {__version__}\n"


@pytest.mark.parametrize("command", [["train"], ["plan"], ["bench"], ["bench", "learning"]])
def test_each_command_has_help(command):
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("sync.policy [x] is wrong"), 2, "error: sync.policy [x] is wrong"),
        (ZeroDivisionError("oh"), 1, "unexpected ZeroDivisionError: oh"),
        (NotADirectoryError(20, "Not a directory", "a/b"), 2, "error: a/b: Not a directory"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (ConnectionRefusedError(111, "refused"), 1, "unexpected ConnectionRefusedError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_end_in_a_text_and_a_code(error, code, words, capsys):
    with pytest.raises(typer.Exit) as ended, errors_as_text(debug=False):
        raise error
    assert ended.value.exit_code == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["init", "{file}"],
        ["report", "{there}", "-o", "{file}"],
        ["bench", "learning", "any.yaml", "--png", "{file}"],
        ["bench", "compare", "--png", "{file}"],
        ["bench", "compare", "--markdown", "{file}"],
    ],
    ids=" ".join,
)
def test_a_missing_directory_is_named_before_the_work(command, tmp_path):
    file = tmp_path / "nowhere" / "file"
    command = [word.format(file=file, there=tmp_path) for word in command]
    result = runner.invoke(app, command)
    assert result.exit_code == 2, result.output
    assert f"there is no directory {file.parent}" in result.output


def test_errors_pass_for_debugging():
    with pytest.raises(ConfigError), errors_as_text(debug=True):
        raise ConfigError("wrong")


def test_warnings_keep_their_lines_and_brackets():
    console = Console(file=io.StringIO(), width=40)
    logger = logging.getLogger("qerl_sync")
    before = logger.handlers, logger.propagate
    try:
        show_warnings(console)
        text = "a line that is longer than the forty columns [/not markup]\n  indented"
        logging.getLogger("qerl_sync.session").warning(text)
    finally:
        logger.handlers, logger.propagate = before
    assert console.file.getvalue() == f"warning: {text}\n"


SUMMARY = {
    "num_steps": 150,
    "reward_first": 0.2,
    "reward_last": 0.9,
    "num_syncs": 150,
    "sync_seconds": 1.0,
    "sync_time_share": 0.05,
    "sent_bytes": 1,
    "peak_buffered_bytes_predicted": 1,
    "peak_buffered_bytes_measured": 1,
    "peak_pinned_bytes_predicted": 1,
    "peak_pinned_bytes_measured": 1,
    "max_open_layers_predicted": 1,
    "max_open_layers": 1,
    "prediction_exact": True,
    "logprob_gap_max": 1e-6,
    "wall_seconds": 60.0,
    "versions": {},
}


@pytest.fixture
def train_command(tmp_path, monkeypatch):
    """A stand-in for the program that `bench learning` starts: writes the summary it is given."""

    def install(**changes):
        summary = json.dumps(SUMMARY | changes)
        program = tmp_path / "python"
        program.write_text(
            '#!/bin/sh\nfor last; do :; done\nmkdir -p "$last"\n'
            f"echo '{summary}' > \"$last/summary.json\"\n"
            """echo '{"seed": 0}' > "$last/config.json"\n"""
            # A first step that depends on what the run was told to change.
            'case "$*" in *learning_rate=0*) reward=0.1;; *) reward=0.9;; esac\n'
            """printf '{"step": 1, "reward": %s}\\n' $reward > "$last/log.jsonl"\n"""
        )
        program.chmod(0o755)
        monkeypatch.setattr(trials.sys, "executable", str(program))
        return ["bench", "learning", "any.yaml", "--output-dir", str(tmp_path / "runs")]

    return install


def test_learning_that_reaches_its_targets(train_command):
    result = runner.invoke(app, [*train_command(), "--seeds", "0,7"])
    assert result.exit_code == 0, result.output
    assert result.output.count("reached") == 2


def test_learning_that_misses_one(train_command):
    result = runner.invoke(app, [*train_command(reward_last=0.3), "--seeds", "0"])
    assert result.exit_code == 1
    assert "missed" in result.output


def test_learning_compares_variants_and_draws_them(train_command, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "plot_learning", lambda curves, path: drawn.update(curves))
    # A target that each run misses: variants are held against each other.
    command = [*train_command(reward_last=0.3), "--png", str(tmp_path / "rewards.png")]
    command += ["--variant", "as it is:", "--variant", "no learning: trainer.learning_rate=0"]
    result = runner.invoke(app, [*command, "--seeds", "0,7"])
    assert result.exit_code == 0, result.output
    assert drawn == {"as it is": [[(1, 0.9)]] * 2, "no learning": [[(1, 0.1)]] * 2}
    assert "missed" not in result.output
    assert result.output.count("no learning") == 2


@pytest.mark.parametrize(
    ("variants", "told"),
    [
        (["sync.noise=null"], "names no variant"),
        (["fp8, noise:", "fp8 noise: seed=1"], "name of another variant"),
    ],
)
def test_variants_that_cannot_be_told_apart(train_command, variants, told):
    given = [word for one in variants for word in ("--variant", one)]
    result = runner.invoke(app, [*train_command(), *given])
    assert result.exit_code == 2
    assert told in " ".join(result.output.replace("│", " ").split())


def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(trials.sys, "executable", "/bin/false")
    with pytest.raises(SyncError, match="seed 3 failed with exit code 1"):
        trials.run_seed(tmp_path / "c.yaml", [], 3, tmp_path)


def test_seeds_that_are_none():
    result = runner.invoke(app, ["bench", "learning", "any.yaml", "--seeds", "a,b"])
    assert result.exit_code == 2
    assert "write 0,1,2" in result.output


def test_tables_of_a_benchmark_show_each_number_as_what_it_is():
    from qerl_sync.bench.on_ray import RayMeasured
    from qerl_sync.bench.transport import KINDS, Measured
    from qerl_sync.report.bench_tables import ray_tables, transport_tables

    def shown(tables) -> list[list[list[str]]]:
        return [[list(column.cells) for column in table.columns] for table in tables]

    names = [f"{kind} / load alone" for kind in KINDS] + [
        f"verify / sync, {kind}" for kind in KINDS
    ]
    bandwidths = ["shm alone / memcpy", "tcp alone / raw"]
    ratios = dict.fromkeys([*names, *bandwidths], 1.0)
    _, seconds_over_seconds, _, targets = shown(transport_tables(Measured(8, ratios=ratios)))
    assert seconds_over_seconds[0] == names
    assert {"shm alone / memcpy, bandwidth", "tcp alone / raw, bandwidth"} <= {*targets[0]}
    found = RayMeasured(10**9, seconds={"put and get": 0.5, "kill to commit": 0.5})
    found.ratios["put and get / sync"] = 1.0
    (_, milliseconds, speeds), _ = shown(ray_tables(found))
    assert milliseconds == ["500", "500"]
    assert speeds == ["2.00", ""]


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, "{"])
def test_a_shape_to_measure_with_that_is_none(tmp_path, content):
    from qerl_sync.bench.transport import make_model

    shape = tmp_path / "shape.json"
    if content is not None:
        shape.write_text(content)
    with pytest.raises(FileError) as caught:
        make_model(shape)
    assert caught.value.path == str(shape)
