"""What docs/plan.md shows is what the commands in it print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.vllm
@pytest.mark.slow
def test_the_whole_page():
    """The layer maps are observed from the installed vLLM, once for each model."""
    command = [sys.executable, "scripts/doc-examples", "docs/plan.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


def test_a_difference_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```console\n$ echo now\nthen\n$ false\n```\n")
    script = str(ROOT / "scripts" / "doc-examples")
    done = subprocess.run([sys.executable, script, str(page)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "-then\n+now\n" in done.stdout
    subprocess.run([sys.executable, script, "--update", str(page)], check=True)
    assert page.read_text() == "```console\n$ echo now\nnow\n$ false\n(exit code 1)\n```\n"
