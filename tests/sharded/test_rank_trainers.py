"""WeightSyncCallback in two processes of an unmodified GRPOTrainer, sharded in `train()`."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.features import needs_deepspeed
from support.ranks import run_ranks
from support.trainers import save_policy

from qerl_sync.engines.http import HTTPClient
from qerl_sync.serving.command import ServerSpec
from qerl_sync.serving.server import ServerProcess

pytestmark = [pytest.mark.dist, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

SERVED = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 64,
    "num_gpu_blocks_override": 64,
}


def assert_synced(told, steps=2, sharded=True, before=0):
    """Each step, by an engine that was on the version `before`."""
    for rank, one in enumerate(told):
        versions = list(range(before + 1, before + steps + 1))
        assert one["steps"] == list(range(steps))
        assert one["versions"] == versions
        assert one["recorded"] == (versions if rank == 0 else [])
        assert one["exact"]
        assert one["sharded"] == sharded
        assert one["versions after"] == [*versions, versions[-1] + 1]
    assert told[0]["logged"] == versions
    assert told[0]["gap"] <= 1e-5
    assert told[0]["alone"] == "SyncError"


def _run(tmp_path, place, held):
    save_policy(tmp_path / "policy")
    run = tmp_path / "run"
    run.mkdir()
    lora = held.endswith("lora")
    told = run_ranks("support.rank_trainers", 2, run, place, held, seconds=540)
    sharded = held.startswith(("fsdp", "zero3"))
    assert_synced(told, steps=4 if lora else 2, sharded=sharded)
    for one in told:
        assert one["gap before"] > 1e-3, "the last step came after the last sync"
        assert one["gap after"] <= 1e-5
    if not lora:
        assert [one["differs"] for one in told] == [[], []]


@pytest.mark.parametrize(
    ("place", "held"),
    [
        ("colocate", "fsdp2"),
        ("shared", "fsdp2"),
        ("shared", "ddp"),
        ("shared", "lora"),
        ("colocate", "fsdp1"),
        ("colocate", "fsdp1 lora"),
    ],
)
def test_each_process_syncs_its_colocated_engine(tmp_path, place, held):
    """Its own one, or its worker of a tensor parallel one (`shared`)."""
    _run(tmp_path, place, held)


@needs_deepspeed
@pytest.mark.parametrize(
    ("place", "held"),
    [
        ("colocate", "zero2"),
        ("colocate", "zero3"),
        ("shared", "zero3"),
        ("colocate", "zero3 lora"),
    ],
)
def test_each_process_syncs_what_deepspeed_trains(tmp_path, place, held):
    """accelerate's own DeepSpeed, which `sharding_on_cpus` has it take."""
    _run(tmp_path, place, held)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with a policy, which is beside its log."""
    directory = tmp_path_factory.mktemp("served")
    spec = ServerSpec(str(save_policy(directory / "policy")), engine=SERVED)
    with ServerProcess(spec, log=directory / "server.log") as one:
        yield one


@pytest.mark.parametrize("held", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_the_main_process_syncs_a_server_for_all(server, held):
    version = HTTPClient(server.url).weight_version()
    run = Path(server.spec.model).parent / held
    run.mkdir()
    told = run_ranks("support.rank_trainers", 2, run, server.url, held, seconds=400)
    assert_synced(told, before=int(version) if version.isdecimal() else 0)
    assert "alone" not in told[1]
