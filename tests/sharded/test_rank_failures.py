"""A rank that raises or dies in the middle of a sync of several ranks: all raise, none hangs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.features import needs_deepspeed
from support.forks import import_path, start_program
from support.rank_failures import LONGEST_SECONDS
from support.ranks import read

pytestmark = [pytest.mark.dist, pytest.mark.slow]

CLASSES = {"load_error": "LoadError", "key_error": "TrainerRankError"}
KILLS = ["kill joint between 2", "kill led between 0", "kill led metadata 1"]
# Of ranks that fail in the middle of a gather, which the program judges itself.
LOOP = "loop 4"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    run_cases(directory, "raise", *KILLS, LOOP)
    return directory


def run_cases(directory: Path, *cases: str, **environment: str) -> None:
    program = start_program(
        "support.rank_failures",
        str(directory),
        *cases,
        log=directory / "log",
        environment={**os.environ, "PYTHONPATH": import_path(), **environment},
    )
    program.join(280)
    program.kill()
    assert program.exitcode == 0, (directory / "log").read_text()[-6000:]


def test_what_one_rank_raises_all_ranks_raise(directory):
    told = [read(directory / "raise", rank) for rank in range(2)]
    differ = [one.pop("differ") for one in told]
    assert len(told[0]) == 17 + 4
    for name in told[0]:
        on_ranks = [of_rank[name] for of_rank in told]
        if name.startswith("after"):
            assert [one.get("version") for one in on_ranks] == [1, 1], (name, on_ranks)
            continue
        rank = int(name[-1])
        error = CLASSES[on_ranks[0]["raised"]]
        found = [(one.get("error"), one.get("rank")) for one in on_ranks]
        assert found == [(error, rank)] * 2, (name, on_ranks)
        assert not any(one["serves_new"] for one in on_ranks), "an engine serves what failed"
    for of_rank in differ:
        for what in ("plan", "tensors"):
            assert (of_rank[what]["error"], of_rank[what]["rank"]) == ("AgreementError", 1), of_rank


@pytest.mark.parametrize("case", KILLS)
def test_a_rank_that_is_killed_is_named_on_all_others(directory, case):
    killed = int(case[-1])
    told = [read(directory / case, rank) for rank in range(3)]
    assert not told.pop(killed)
    for one in told:
        assert (one["error"], one["rank"]) == ("PeerLostError", killed), told


@pytest.mark.parametrize("by", [pytest.param("zero3", marks=needs_deepspeed), "fsdp1"])
def test_a_rank_that_fails_in_a_gather_of_others_is_named_on_all(tmp_path, by):
    cases = {f"kill led-{by} _value 1 5": "PeerLostError"}
    cases |= {f"{what} joint-{by} _value 1 5": error for what, error in CLASSES.items()}
    run_cases(tmp_path, *cases, DS_ACCELERATOR="cpu")
    for case, error in cases.items():
        told = [read(tmp_path / case, rank) for rank in range(3)]
        if "kill" in case:
            assert not told.pop(1)
        assert {(one["error"], one["rank"]) for one in told} == {(error, 1)}, told
        assert max(one["seconds"] for one in told) < LONGEST_SECONDS
