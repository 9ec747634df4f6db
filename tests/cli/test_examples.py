"""The examples, each run as a user runs it; and the pages show what the examples hold."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qerl_sync.serving.processes import descendants

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("index.md", "ray.md", "recipes.md")),
)
SHARED_MEMORY = Path("/dev/shm")
# Programs that import torch and vLLM several times; other tests may want the same cores.
WAIT_SECONDS = 500.0
SERVER_ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "64")

pytestmark = pytest.mark.timeout(2 * WAIT_SECONDS)


def environment(**more: str) -> dict[str, str]:
    """A user's: nothing of what these tests have set for engines of their own."""
    kept = ("PATH", "HOME", "LANG", "VIRTUAL_ENV")
    named = {name: os.environ[name] for name in kept if name in os.environ}
    # The project itself may not be installed where the tests run from a checkout.
    return {**named, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **more}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer for any text."""
    from qerl_sync.config import TinyModelConfig
    from qerl_sync.training.models import make_tiny

    config = TinyModelConfig(
        vocab_size=300,
        config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
        },
    )
    path = tmp_path_factory.mktemp("model")
    for part in make_tiny(config, "float32", ["1+1=2"], seed=0):
        part.save_pretrained(path)
    return path


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Any:
    """`run(name, *arguments)`: what an example prints, in a directory where nothing else is."""

    def run(name: str, *arguments: str, **variables: str) -> str:
        command = [sys.executable, str(EXAMPLES / f"{name}.py"), str(model), *arguments]
        deadline = time.monotonic() + WAIT_SECONDS
        with subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            # Tests that run at the same time kill trainers, whose memory stays for a while.
            started = {process.pid}
            while process.poll() is None and time.monotonic() < deadline:
                started.update(descendants(process.pid))
                with suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=0.5)
            process.kill()
            output, errors = process.communicate()
        assert process.returncode == 0, output + errors
        left = SHARED_MEMORY.glob("qerl_sync-*")
        owners = {int(path.name.split("-")[1]) for path in left}
        assert [pid for pid in owners & started if not alive(pid)] == []
        return output

    return run


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.vllm
@pytest.mark.slow
def test_session_in_process(run: Any):
    said = run("session_in_process")
    assert said.count(": exact True") == 3
    assert gap_in(said) < 1e-4


@pytest.mark.vllm
@pytest.mark.slow
def test_trl_colocate(run: Any, tmp_path: Path):
    assert "3 syncs, the prediction was exact: True" in run("trl_colocate")
    assert (tmp_path / "runs" / "trl_colocate").is_dir()


def test_few_lines_of_a_trl_script_are_ours():
    """What a script lacks before: the import, the callback, the argument."""
    tree = ast.parse((EXAMPLES / "trl_colocate.py").read_text())
    ours = [
        node
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and node.module == "qerl_sync")
        or (isinstance(node, ast.Assign) and "WeightSyncCallback" in ast.unparse(node.value))
        or (isinstance(node, ast.keyword) and node.arg == "callbacks")
    ]
    assert sum(node.end_lineno - node.lineno + 1 for node in ours) == 3


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that the command line has started, for both examples of one."""
    output = tmp_path_factory.mktemp("server") / "output.txt"
    arguments = ["serve", str(model), "--port", "0", "--", *SERVER_ARGUMENTS]
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "qerl_sync.cli", *arguments],
            cwd=output.parent,
            env=environment(COLUMNS="200"),
            stdout=file,
            stderr=file,
        )
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            found = re.search(r"ready at (http://\S+)", output.read_text())
            if found or process.poll() is not None:
                break
            time.sleep(0.1)
        assert found, output.read_text()
        yield found[1]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.mark.vllm
@pytest.mark.slow
def test_session_to_a_server(run: Any, server: str):
    said = run("session_to_server", server)
    assert said.count(": exact True, shm") == 3
    assert gap_in(said) < 1e-4


@pytest.mark.vllm
@pytest.mark.slow
def test_trl_with_a_server(run: Any, server: str):
    assert "3 syncs, the prediction was exact: True" in run("trl_server", server)


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.slow
def test_ray_actors(run: Any):
    """Ray kills the trainer at its end, without a word; nothing may stay in /dev/shm."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # Ray's sockets need short paths
        said = run("ray_actors", RAY_TMPDIR=short)
    assert "version 1: exact True, shm" in said
    assert set(re.findall(r"rollout-(\d), version 2: \[", said)) == {"0", "1"}


def gap_in(said: str) -> float:
    return float(re.findall(r"log-probabilities: (\S+)", said)[0])


def test_each_example_is_run_and_shown():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    tests = Path(__file__).read_text()
    shown = "".join(page.read_text() for page in PAGES)
    for name in names:
        assert f'"{name}"' in tests
        assert f"examples/{name}.py" in shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_the_pages_is_that_of_the_examples(page: Path):
    sources = [path.read_text() for path in EXAMPLES.glob("*.py")]
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
    assert blocks
    for block in blocks:
        indented = textwrap.indent(block, "    ")
        assert any(block in source or indented in source for source in sources), block
