"""A rank that raises or dies in the middle of a sync of several ranks: all raise, none hangs."""

from __future__ import annotations

import pytest
from support.rank_failures import TIMEOUT_SECONDS
from support.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]

CLASSES = {"load_error": "LoadError", "key_error": "TrainerRankError"}


def test_what_one_rank_raises_all_ranks_raise(tmp_path):
    told = run_ranks("support.rank_failures", 2, tmp_path, "raise")
    assert len(told[0]) == 16 + 4
    for name in told[0]:
        on_ranks = [of_rank[name] for of_rank in told]
        if name.startswith("after"):
            assert [one.get("version") for one in on_ranks] == [1, 1], (name, on_ranks)
            continue
        rank = int(name[-1])
        error = CLASSES[on_ranks[0]["raised"]]
        found = [(one.get("error"), one.get("rank")) for one in on_ranks]
        assert found == [(error, rank)] * 2, (name, on_ranks)


@pytest.mark.parametrize(
    ("kind", "place", "rank"),
    [("joint", "between", 2), ("led", "between", 0), ("led", "metadata", 1)],
)
def test_a_rank_that_is_killed_is_named_on_all_others(tmp_path, kind, place, rank):
    told = run_ranks("support.rank_failures", 3, tmp_path, "kill", kind, place, str(rank))
    assert not told[rank]
    for one in told[:rank] + told[rank + 1 :]:
        assert (one.get("error"), one.get("rank")) == ("PeerLostError", rank), told
        assert one["seconds"] < 4 * TIMEOUT_SECONDS + 5, told
