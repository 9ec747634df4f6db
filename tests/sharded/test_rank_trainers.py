"""WeightSyncCallback in two processes of an unmodified GRPOTrainer, sharded in `train()`."""

from __future__ import annotations

import pytest
from support.ranks import run_ranks
from support.trainers import save_policy

from qerl_sync.serving.command import ServerSpec
from qerl_sync.serving.server import ServerProcess

pytestmark = [pytest.mark.dist, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

SERVED = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 64,
    "num_gpu_blocks_override": 64,
}


def assert_synced(told):
    for rank, one in enumerate(told):
        assert one["steps"] == [0, 1]
        assert one["versions"] == [1, 2]
        assert one["recorded"] == ([1, 2] if rank == 0 else [])
        assert one["exact"]
        assert one["sharded"]
        assert one["versions after"] == [1, 2, 3]
    assert told[0]["logged"] == [1, 2]
    assert told[0]["gap"] <= 1e-5
    assert told[0]["alone"] == "SyncError"


def test_each_process_syncs_its_colocated_engine(tmp_path):
    save_policy(tmp_path / "policy")
    run = tmp_path / "run"
    run.mkdir()
    told = run_ranks("support.rank_trainers", 2, run, "colocate", seconds=540)
    assert_synced(told)
    assert [one["differs"] for one in told] == [[], []]


def test_the_main_process_syncs_a_server_for_all(tmp_path):
    policy = save_policy(tmp_path / "policy")
    run = tmp_path / "run"
    run.mkdir()
    spec = ServerSpec(str(policy), engine=SERVED)
    with ServerProcess(spec, log=tmp_path / "server.log") as server:
        told = run_ranks("support.rank_trainers", 2, run, "server", server.url, seconds=400)
    assert_synced(told)
    assert "alone" not in told[1]
