"""On two ranks: torch's FSDP1, and ZeRO-3 where DeepSpeed is installed (`scripts/deepspeed`)."""

from __future__ import annotations

import pytest
from support.features import needs_deepspeed
from support.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.mark.parametrize("by", [pytest.param("zero3", marks=needs_deepspeed), "fsdp1"])
def test_partitioned_parameters_are_gathered_to_the_bit(tmp_path, monkeypatch, by):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    told = run_ranks("support.rank_partitioned", 2, tmp_path, by)
    assert told[0] == told[1]
    if by == "fsdp1":
        assert told[0].pop("without its own") == "FullyShardedDataParallel"
    adapters = told[0].pop("adapters")
    assert adapters == dict.fromkeys(adapters, True)
    for one in told[0].values():
        assert one["metas"]
        assert one["equal"] == one["tensors"]
        assert one["trained"] > one["tensors"] / 2
        assert one["partitioned"] > 0
        assert one["still"]
