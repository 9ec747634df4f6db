"""docs/scale.md: its formula, held against a simulation of the same sync, and its numbers."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCALE = runpy.run_path(str(ROOT / "docs" / "scale.py"))
RATES = {
    "as measured": {},
    "slow network": {"link": 1.2e9},
    "fast loaders": {"load": 50e9},
    "slow trainer": {"gather": 0.5e9},
}


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
@pytest.mark.parametrize("workers", SCALE["WORKERS"])
@pytest.mark.parametrize("nbytes", SCALE["MODELS"].values(), ids=SCALE["MODELS"])
def test_formula_and_simulation_agree(rates, workers: int, nbytes: float):
    sync = SCALE["Setting"](nbytes, workers), SCALE["Rates"](**rates)
    assert SCALE["estimate"](*sync) == pytest.approx(SCALE["simulate"](*sync), rel=0.15)


def test_the_page_shows_what_the_script_prints():
    script, page = ROOT / "scripts" / "doc-examples", ROOT / "docs" / "scale.md"
    done = subprocess.run([sys.executable, str(script), str(page)], capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
