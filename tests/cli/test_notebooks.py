"""The notebooks: the one for a CPU is run as it stands, the other names what there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "examples" / "notebooks"
# In a process of its own, as Jupyter's kernels are: the engine and the trainer are in the kernel.
RUN = """
import sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": "."}}).execute()
nbformat.write(notebook, "run.ipynb")
"""


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_for_a_cpu_runs(tmp_path):
    pytest.importorskip("nbclient")
    # Under pytest ipykernel gives sys.stdout no file descriptor, which vLLM wants.
    kept = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    environment = {**kept, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path / "ipython")}
    command = [sys.executable, "-c", RUN, str(NOTEBOOKS / "cpu.ipynb")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=590
    )
    assert done.returncode == 0, done.stderr[-4000:]
    cells = json.loads((tmp_path / "run.ipynb").read_text())["cells"]
    said = [
        "".join(line for o in c.get("outputs", ()) for line in o.get("text", ())) for c in cells
    ]
    (syncs,) = (text for text in said if text.startswith("version 1:"))
    assert syncs.count("exact: True") == len(syncs.splitlines()) >= 10
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_notebooks_have_no_output_and_say_what_was_not_run():
    for path in NOTEBOOKS.glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        assert not any(cell.get("outputs") for cell in cells)
        assert ("not run on a GPU" in "".join(cells[0]["source"])) == (path.stem == "gpu")
