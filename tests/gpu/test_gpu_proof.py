"""The proofs that run on a GPU run here too, one small case of them, so that they do not rot."""

from __future__ import annotations

import importlib

import pytest

from gpu import common, exact

PARTS = ("exact", "apart", "faults")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_says_what_its_cases_cost(part):
    module = importlib.import_module(f"gpu.{part}")
    assert module.CASES
    assert module.COST.keys() == module.CASES.keys()
    assert all(callable(case) for case in module.CASES.values())


@pytest.mark.vllm
def test_one_case(engine_pool, subject, monkeypatch):
    subject("dense")  # some engine of the pool comes first

    def start(*arguments):
        engine = start_engine(*arguments)
        engine_pool.keep(engine)
        return engine

    start_engine = exact.Proof._start
    monkeypatch.setattr(exact.Proof, "_start", start)
    monkeypatch.setattr(exact, "replays_counted", lambda: [0])
    monkeypatch.setattr(common, "prepare", lambda: None)  # the session's own environment is set
    result = exact.run("dense", "eager", syncs=4)
    assert result["deviations"] == []
    assert result["passed"]
    assert len(result["sync_seconds"]) == 6, "four syncs, and two after failures"
    assert result["different_between_versions"] > 20
    assert result["measured"]["answers_compared"]
