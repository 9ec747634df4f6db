"""`qerl-sync doctor`, on this machine as it is and with what is made wrong."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qerl_sync import load_config
from qerl_sync.cli.doctor import examine

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/grpo_cpu_server.yaml"


def states(*changes: str) -> dict[str, str]:
    verdicts = examine(load_config(CONFIG, changes), quick=True)
    found = {verdict.subject: verdict for verdict in verdicts}
    assert all(v.next_step for v in found.values() if v.state == "bad")
    return {subject: verdict.state for subject, verdict in found.items()}


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qerl_sync.cli", "doctor", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_chunks_that_shared_memory_has_no_room_for():
    assert states()["/dev/shm"] == "ok"
    huge = "sync.chunk_bytes=100TiB"
    assert states(huge)["/dev/shm"] == "warn"  # TCP is there too
    assert states(huge, "sync.transport=shm")["/dev/shm"] == "bad"


def test_ports_that_somebody_has():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        options = [f"{name}={port}" for name in ("sync.metrics_port", "sync.trainer_port")]
        found = states(*options)
        assert (found["metrics_port"], found["trainer_port"]) == ("bad", "bad")
    found = states(*options)
    assert (found["metrics_port"], found["trainer_port"]) == ("ok", "ok")


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    assert states()["devices"] == "ok"
    assert states("sync.transport=cuda_ipc")["devices"] == "bad"


def test_a_directory_that_cannot_be_written_to(tmp_path):
    assert states(f"output_dir={tmp_path}/a/b")["output_dir"] == "ok"
    assert states("output_dir=/proc/run")["output_dir"] == "bad"
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("version", "returned"), [("0.24.1", 1), ("0.31.0", 0), ("0.99.0", 0)])
def test_the_window_of_versions(tmp_path, version, returned):
    """An installed vLLM of another version, as far as is seen without importing it."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("raise ImportError('not to be imported')")
    information = tmp_path / f"vllm-{version}.dist-info"
    information.mkdir()
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    (information / "METADATA").write_text(text)
    done = doctor("--quick", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == returned, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if " vllm: " in line)
    assert version in line
    assert line.split()[0] == {"0.24.1": "bad", "0.31.0": "ok", "0.99.0": "warn"}[version]


@pytest.mark.vllm
@pytest.mark.slow
def test_this_machine_can_sync():
    done = doctor(str(CONFIG))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "layerwise reload: present" in done.stdout
    assert "Triton" not in done.stdout + done.stderr


def test_quick_imports_nothing_heavy():
    code = (
        "import sys; from qerl_sync.cli.doctor import examine; list(examine(None, quick=True));"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)
