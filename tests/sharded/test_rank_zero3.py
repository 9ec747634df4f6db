"""DeepSpeed's ZeRO-3 on two ranks, where DeepSpeed is installed (the extra `deepspeed`)."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from support.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_partitioned_parameters_are_gathered_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    told = run_ranks("support.rank_zero3", 2, tmp_path)
    assert told[0] == told[1]
    adapters = told[0].pop("adapters")
    assert adapters == dict.fromkeys(adapters, True)
    for one in told[0].values():
        assert one["metas"]
        assert one["equal"] == one["tensors"]
        assert one["trained"] > one["tensors"] / 2
        assert one["partitioned"] > 0
        assert one["still"]
