"""`qerl-sync init`, and the wheel that brings it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qerl_sync import load_config
from qerl_sync.cli.main import app

ROOT = Path(__file__).parents[2]


def init(path: Path, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["init", str(path)])
    assert done.exit_code == code, done.output
    return path.read_text(encoding="utf-8")


def test_what_is_written_is_a_run(tmp_path):
    text = init(tmp_path / "mine.yaml")
    assert f"qerl-sync train {tmp_path / 'mine.yaml'}" in text
    config = load_config(tmp_path / "mine.yaml")
    assert (config.rollout.mode, config.sync.policy) == ("colocate", "reorder")


def test_each_commented_option_is_one(tmp_path):
    """With all of them switched on it is still a configuration, of which only pairs are wrong."""
    text = init(tmp_path / "mine.yaml")
    for option in ("budget_bytes: auto", "verify: full", "metrics_port: 9400"):
        assert f"  # {option}\n" in text
        text = text.replace(f"  # {option}\n", f"  {option}\n")
    text = text.replace("# peft: {", "peft: {")
    (tmp_path / "all.yaml").write_text(text)
    config = load_config(tmp_path / "all.yaml")
    assert (config.sync.budget_bytes, config.sync.metrics_port) == ("auto", 9400)
    assert config.peft is not None


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    assert init(path, code=2) == "mine"
    assert "is there already" in CliRunner().invoke(app, ["init", str(path)]).output


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(tmp_path):
    """In an environment of its own, with the packages of this one and nothing of the checkout."""
    pytest.importorskip("hatchling")
    wheels = tmp_path / "wheels"
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    wheels.mkdir()
    subprocess.run([sys.executable, "-c", build, wheels], cwd=ROOT, check=True, timeout=120)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if name.startswith(("tests/", "configs/"))]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}

    def command(*arguments: str) -> str:
        # -P: not the working directory either.
        call = [sys.executable, "-P", "-m", "qerl_sync.cli", *arguments]
        done = subprocess.run(
            call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    place = [sys.executable, "-P", "-c", "import qerl_sync; print(qerl_sync.__file__)"]
    used = subprocess.check_output(place, cwd=tmp_path, env=environment, text=True)
    assert used.startswith(str(tmp_path))
    command("init", "run.yaml")
    command("doctor", "--quick")
    sync = (
        "from support.recorded_runs import record_run; from pathlib import Path;"
        "record_run(Path('run'), num_syncs=3, num_layers=2)"
    )
    environment["PYTHONPATH"] += f":{ROOT / 'tests'}"
    subprocess.run(
        [sys.executable, "-P", "-c", sync], cwd=tmp_path, env=environment, check=True, timeout=120
    )
    command("report", "run")
    assert "policy: reorder" in command("explain", "run")
    assert (tmp_path / "run/report.html").stat().st_size > 10_000
