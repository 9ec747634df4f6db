"""The table of TRL's trainers, and one of its rows."""

from __future__ import annotations

import json

import pytest

from trainers.__main__ import DATA, PAGE, page, run_row
from trainers.row import REFUSED, TRAINERS, WORKS


def test_the_page_is_that_of_the_results():
    assert PAGE.read_text() == page()
    rows = json.loads(DATA.read_text())
    assert rows.keys() <= TRAINERS.keys()
    assert {row["result"] for row in rows.values()} <= {WORKS, REFUSED}


@pytest.mark.vllm
@pytest.mark.slow
def test_a_trainer_that_no_other_test_builds():
    row = run_row("experimental SDFTTrainer")
    assert (row["result"], row["steps"]) == ("works", [0, 1, 2]), row
