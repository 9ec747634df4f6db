"""Two ranks, each with one of the two tensor parallel workers of an engine in its own process."""

from __future__ import annotations

import pytest
from support.rank_shared_engine import TIMEOUT_SECONDS, VARIANTS
from support.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

EXACT = 1e-5


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    return run_ranks("support.rank_shared_engine", 2, directory, seconds=840)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("source", ["ShardedSource", "HFSource"])
def test_each_worker_equals_that_of_a_freshly_loaded_engine(told, name, source):
    first = told[0][name][source]
    for one in [of_rank[name][source] for of_rank in told]:
        assert one["different before"] > 0
        assert one["different after"] == 0
        assert one["generates"]
        assert one["gap"] < EXACT
        assert one["exact"], one["difference"]
        assert (one["version"], one["digest"]) == (first["version"], first["digest"])


def test_workers_may_hold_other_parts_of_the_model(told):
    for name in VARIANTS:
        maps = {of_rank[name]["HFSource"]["map"] for of_rank in told}
        assert len(maps) == (1 if name == "moe" else 2), name


@pytest.mark.parametrize("way", ["adapter", "merge"])
def test_the_engine_serves_what_is_trained(told, way):
    for of_rank in told:
        for one in of_rank["lora"][way]:
            assert one["exact"]
            assert one["before"] > 0.1
            assert one["gap"] < EXACT
            assert one["lora"]["mode"] == way
        first, *later = of_rank["lora"][way]
        assert all(one["sent"] < first["sent"] for one in later)


@pytest.mark.parametrize("at", ["send", "finish", "probe"])
def test_a_rank_that_fails_stops_the_whole_engine_until_the_next_sync(told, at):
    errors = set()
    for of_rank in told:
        one = of_rank["failures"][at]
        errors.add(tuple(one["error"]))
        assert one["seconds"] < TIMEOUT_SECONDS
        assert one["refuses"]
        assert one["probe gap"] < EXACT
        assert one["gap after"] < EXACT
    assert len(errors) == 1
    assert errors.pop()[1] == 1
