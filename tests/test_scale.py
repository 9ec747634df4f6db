"""The formula of docs/scale.md, held against a simulation of the same sync."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from qerl_sync.plan.scale import MODELS, WORKERS, Rates, Setting, estimate, simulate

ROOT = Path(__file__).parent.parent
RATES = {
    "as measured": Rates(),
    "slow network": Rates(link=1.2e9),
    "fast loaders": Rates(load=50e9),
    "slow trainer": Rates(gather=0.5e9),
}


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
@pytest.mark.parametrize(("nbytes", "workers"), list(product(MODELS.values(), WORKERS)))
def test_formula_and_simulation_agree(rates: Rates, nbytes: float, workers: int):
    setting = Setting(nbytes, workers)
    assert estimate(setting, rates) == pytest.approx(simulate(setting, rates), rel=0.15)


def test_one_node_one_chunk_is_the_sum_of_its_parts():
    rates = Rates(gather=2.0, put=4.0, link=8.0, load=16.0, message_seconds=0.5)
    setting = Setting(16.0, workers=1, chunk_bytes=16.0)
    assert simulate(setting, rates) == estimate(setting, rates) == 8 + 4 + 0.5 + 2 + 1


def test_more_workers_cost_rounds_and_messages_and_not_copies():
    few, many = (Setting(MODELS["30B"], workers) for workers in (8, 512))
    silent = Rates(message_seconds=0.0)
    assert simulate(many, silent) < 2 * simulate(few, silent)
    assert many.store_bytes == few.store_bytes


def test_the_page_shows_what_the_command_prints():
    script, page = ROOT / "scripts" / "doc-examples", ROOT / "docs" / "scale.md"
    done = subprocess.run([sys.executable, str(script), str(page)], capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
