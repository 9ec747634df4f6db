"""Two ranks that hold a PEFT model in shards: adapters and merged weights are those of one process,
and an engine serves them."""

from __future__ import annotations

import pytest
from support.adapters import make_policy
from support.rank_adapters import VARIANTS
from support.ranks import run_ranks

from qerl_sync import AdapterSource

pytestmark = [pytest.mark.dist, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

EXACT = 1e-5


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    return run_ranks("support.rank_adapters", 2, directory, seconds=540)


def test_what_is_gathered_is_what_one_process_yields_to_the_bit(told):
    for one in told:
        assert one["merged streams"] == dict.fromkeys(VARIANTS, True)
        served = [name for name, (*_, served) in VARIANTS.items() if served]
        assert one["adapter streams"] == dict.fromkeys(served, True)


@pytest.mark.parametrize("way", ["joint", "shm", "merge"])
def test_an_engine_serves_what_is_trained(told, way):
    for rank, of_rank in enumerate(told):
        first, *later = of_rank[way]
        # Where rank 0 sends for all, the other rank's engine keeps what it had.
        mine = rank == 0 or way != "shm"
        for one in of_rank[way]:
            assert one["exact"]
            assert one["before"] > 0.1
            assert (one["gap"] < EXACT) == mine
            assert one["lora"]["mode"] == ("merge" if way == "merge" else "adapter")
        assert all(one["sent"] < first["sent"] for one in later)
        if way != "merge":
            adapter = AdapterSource(make_policy()).adapter()
            assert first["lora"]["base"]
            assert [(one["sent"], one["lora"]["base"]) for one in later] == [
                (adapter.nbytes, "")
            ] * 2


def test_a_rank_that_fails_in_the_adapter_leaves_the_old_one_on_all(told):
    for of_rank in told:
        said = of_rank["failures"]
        assert said["error"] == ["TrainerRankError", 1]
        assert said["old adapter"]
        assert not said["base again"], "no engine's base was touched"
        assert said["gap after"] < EXACT


def test_a_base_that_one_engine_has_lost_travels_to_all(told):
    for of_rank in told:
        said = of_rank["failures"]
        assert said["lost on one"]
        assert said["written on one"]
        assert said["gap at last"] < EXACT
