"""Two ranks that hold a model in shards: engines are what one process would have made of them."""

from __future__ import annotations

import pytest
from support.models import CONFIGS
from support.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    return run_ranks("support.rank_syncs", 2, directory, seconds=540)


def test_every_architecture_is_gathered_to_the_bit(told):
    assert [one["streams"] for one in told] == [dict.fromkeys(CONFIGS, True)] * 2


@pytest.mark.parametrize("way", ["joint", "shm", "tcp", "ddp"])
def test_engines_equal_freshly_loaded_ones(told, way):
    for one in [of_rank[way] for of_rank in told]:
        assert one["different before"] > 0
        assert one["exact"]
        assert one["version"] == told[0][way]["version"]
        assert one["digest"] == told[0][way]["digest"]
        # Where rank 0 sends for all, the other rank's engine keeps what it had.
        assert (one["different after"] == 0) == one["mine"] == one["generates"]


@pytest.mark.parametrize("way", ["joint", "shm", "tcp"])
def test_a_rank_holds_no_more_than_the_chunks_in_flight(told, way):
    for one in [of_rank[way] for of_rank in told]:
        assert one["chunks"] > 2
        assert one["gathers"] > one["chunks"]
        in_flight = 2 if way == "tcp" else 1
        assert 0 < one["peak"] <= in_flight * one["largest chunk"]
        assert one["left"] == 0


def test_all_ranks_engines_get_the_same_noise(told):
    """Each rank adds it to what it gathers, for its own engine."""
    assert told[0]["noise"] == told[1]["noise"]
    assert told[0]["noise"]["held"]
    # Nothing but the norms differs from what is without noise.
    assert told[0]["noise"]["different"] == told[0]["noise"]["names"] > 0
