"""Rollout actors on Ray: exact, apart from each other, and never on weights of no version."""

from __future__ import annotations

import os
import runpy
import signal
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import make_policy, step
from support.engines import PROMPTS, SMALL
from support.models import make_model, save_model
from support.ray_cluster import (
    GREEDY,
    START_SECONDS,
    Rollouts,
    start_rollouts,
    status,
    two_nodes,
)
from support.ray_echo import Holder

from qerl_sync import (
    AdapterSource,
    ConfigError,
    HFSource,
    PoisonedError,
    RemoteTransport,
    SyncConfig,
    SyncReport,
    SyncSession,
    TrainerActor,
    TransportError,
    WorkerPool,
    noise_of,
)
from qerl_sync.engines.ray_actor import require_object_store
from qerl_sync.errors import AgreementError, CoverageError
from qerl_sync.integrations.ray.actors import RolloutActor
from qerl_sync.integrations.ray.in_flight import AsyncRolloutActor
from qerl_sync.integrations.ray.pool import start_actor
from qerl_sync.sources.hf import probe_of
from qerl_sync.verify.probe_prompt import Probe

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

CHUNK = "64KiB"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with two_nodes():
        yield


@pytest.fixture(scope="module")
def rollouts(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Rollouts:
    return start_rollouts(tmp_path_factory.mktemp("models"))


@pytest.fixture
def push(rollouts: Rollouts) -> Iterator[Any]:
    """`push(version, ...)`: sync that version of the model to the pool."""
    sessions: list[SyncSession] = []

    def run(
        version: int, source: Any = None, probe: Probe | None = None, **options: Any
    ) -> SyncReport:
        while sessions:
            sessions.pop().close()
        config = SyncConfig.of(**{"chunk_bytes": CHUNK, "timeout_seconds": 60, **options})
        source = source or HFSource(rollouts.trainers[version])
        transport = rollouts.pool.transport(config)
        sessions.append(SyncSession(source, transport, config, probe=probe))
        return sessions[-1].push()

    run.session = lambda: sessions[-1]  # type: ignore[attr-defined]
    yield run
    for session in sessions:
        session.close()
    rollouts.pool.close()


def test_every_actor_holds_what_an_engine_started_with_the_weights_holds(
    rollouts: Rollouts, push: Any
):
    assert rollouts.started_with[0] != rollouts.started_with[1]
    for version in (1, 0):
        report = push(version)
        assert rollouts.fingerprints() == [rollouts.started_with[version]] * 2
        assert report.prediction_exact
        assert len(report.workers) == 2
        assert not report.lost
        assert report.transport.startswith("shm: ")


def test_all_actors_get_the_same_noise(rollouts: Rollouts, push: Any):
    noise = {"preset": "section-4.1", "intervals": 2, "steps": 2}
    push(1, noise=noise)
    assert rollouts.fingerprints() == [rollouts.started_with[1]] * 2
    report = push.session().push(step=1)
    assert report.noise["sigma"] == 5e-2
    noisy, other = rollouts.fingerprints()
    assert noisy == other
    assert noisy != rollouts.started_with[1]
    # The same as what a trainer with such norms would have sent.
    with_noise = deepcopy(rollouts.trainers[1])
    with torch.no_grad():
        for name, drawn in noise_of(report).items():
            with_noise.get_parameter(name).add_(drawn)
    push(1, HFSource(with_noise))
    assert rollouts.fingerprints() == [noisy] * 2


def test_each_rollout_says_which_version_and_which_worker_it_comes_from(
    rollouts: Rollouts, push: Any
):
    report = push(1)
    found = rollouts.pool.generate(PROMPTS, GREEDY)
    assert [one.prompt_ids for one in found] == PROMPTS
    assert {one.version for one in found} == {report.version}
    assert {one.worker for one in found} == {"rollout-0", "rollout-1"}
    assert (
        logprob_gap(found, rollouts.trainers[1]) < 1e-5 < logprob_gap(found, rollouts.trainers[0])
    )
    several = rollouts.pool.generate(PROMPTS, {**GREEDY, "n": 2, "temperature": 1.0})
    assert [one.prompt_ids for one in several] == [p for p in PROMPTS for _ in range(2)]


def test_each_actor_is_asked_whether_it_thinks_as_the_trainer(rollouts: Rollouts, push: Any):
    import ray

    old, new = (rollouts.trainers[version] for version in (0, 1))
    assert 0 < push(1, verify="full", probe=probe_of(new)).probe_gap < 1e-5
    with pytest.raises(CoverageError, match=r"log-probabilities of rollout-\d for a prompt part"):
        push(0, verify="full", probe=probe_of(new))
    for handle in rollouts.pool.handles.values():
        with pytest.raises(PoisonedError, match="does not generate"):
            ray.get(handle.generate.remote(PROMPTS, GREEDY))
    assert push(0, verify="full", probe=probe_of(old)).probe_gap < 1e-5
    assert rollouts.fingerprints() == [rollouts.started_with[0]] * 2


def test_an_actor_that_is_behind_does_not_generate(rollouts: Rollouts, push: Any):
    import ray

    report = push(0)
    handle = rollouts.pool.handles["rollout-0"]
    with pytest.raises(AgreementError, match=f"has weight version {report.version}, and"):
        ray.get(handle.generate.remote(PROMPTS, GREEDY, report.version + 1))
    with pytest.raises(TransportError, match="no worker of the pool has weight version"):
        rollouts.pool.generate(PROMPTS, GREEDY, required_version=report.version + 1)


def test_the_client_of_vllm_drives_an_actor_as_well(rollouts: Rollouts):
    import ray
    from vllm.distributed.weight_transfer.clients import RayVLLMWeightSyncClient

    handle = rollouts.pool.handles["rollout-1"]
    config = SyncConfig.of(chunk_bytes=CHUNK)
    transport = RemoteTransport(RayVLLMWeightSyncClient(handle), timeout_seconds=60)
    with SyncSession(HFSource(rollouts.trainers[0]), transport, config) as session:
        report = session.push()
    assert ray.get(handle.fingerprint.remote()) == rollouts.started_with[0]
    assert status(handle)["version"] == report.version


def test_workers_leave_and_join(rollouts: Rollouts, push: Any):
    push(0)
    handle = rollouts.pool.remove("rollout-1")
    try:
        assert len(push.session().push().workers) == 1
        with pytest.raises(ConfigError, match="has a worker 'rollout-0' already"):
            rollouts.pool.add("rollout-0", handle)
    finally:
        rollouts.pool.add("rollout-1", handle)
    assert rollouts.pool.versions["rollout-1"] == 0
    report = push.session().push()
    assert len(report.workers) == 2
    assert rollouts.pool.versions == dict.fromkeys(("rollout-0", "rollout-1"), report.version)


def test_chunks_cross_nodes_in_the_object_store(rollouts: Rollouts, push: Any):
    report = push(1, transport="ray")
    assert report.transport == "ray: sync.transport says so"
    assert rollouts.fingerprints() == [rollouts.started_with[1]] * 2
    push.session().push()
    assert rollouts.fingerprints() == [rollouts.started_with[1]] * 2


class Treacherous(HFSource):
    """Does something in the middle of a sync."""

    def __init__(self, model: torch.nn.Module, deed: Any) -> None:
        super().__init__(model)
        self.deed, self.left = deed, 4

    def materialize(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        self.left -= 1
        if self.left == 0:
            self.deed()
        return super().materialize(names)


def test_a_stopped_actor_is_told_from_a_dead_one_and_comes_back(rollouts: Rollouts, push: Any):
    pid = rollouts.pid("rollout-1")
    source = Treacherous(rollouts.trainers[1], lambda: os.kill(pid, signal.SIGSTOP))
    try:
        report = push(1, source, timeout_seconds=3)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert "did not answer within 3 s" in report.lost["rollout-1"]
    assert rollouts.pool.versions == {"rollout-0": report.version, "rollout-1": 0}
    again = until_whole(push.session())
    assert rollouts.pid("rollout-1") == pid
    assert rollouts.fingerprints() == [rollouts.started_with[1]] * 2
    assert again.version > report.version


def test_an_actor_killed_in_a_sync_stops_nobody_and_serves_after_a_full_one(
    rollouts: Rollouts, push: Any
):
    import ray

    pid = rollouts.pid("rollout-0")
    killed: list[float] = []
    source = Treacherous(rollouts.trainers[1], lambda: killed.append(rollouts.kill("rollout-0")))
    report = push(1, source, transport="auto")
    assert time.monotonic() - killed[0] < 3
    assert list(report.lost) == ["rollout-0"]
    assert "died" in report.lost["rollout-0"]
    assert {one.worker for one in rollouts.pool.generate(PROMPTS, GREEDY)} == {"rollout-1"}

    back = rollouts.pool.handles["rollout-0"]
    assert status(back)["pid"] != pid
    with pytest.raises(PoisonedError, match="has not been synced since it started"):
        ray.get(back.generate.remote(PROMPTS, GREEDY))
    again = until_whole(push.session())
    assert rollouts.fingerprints() == [rollouts.started_with[1]] * 2
    found = rollouts.pool.generate(PROMPTS, GREEDY)
    assert {one.worker for one in found} == {"rollout-0", "rollout-1"}
    assert {one.version for one in found} == {again.version}


def until_whole(session: SyncSession, seconds: float = 60) -> SyncReport:
    """Push until nobody is left behind."""
    deadline = time.monotonic() + seconds
    while (report := session.push()).lost:
        assert time.monotonic() < deadline, report.lost
        time.sleep(0.5)
    return report


def logprob_gap(rollouts: Any, model: Any) -> float:
    """The largest difference between the actor's and the trainer's logprobs."""
    gap = 0.0
    for one in rollouts:
        ids = torch.tensor([one.prompt_ids + one.completion_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].log_softmax(-1)
        expected = logits.gather(1, ids[0, 1:, None])[len(one.prompt_ids) - 1 :, 0]
        gap = max(gap, (expected - torch.tensor(one.logprobs)).abs().max().item())
    return gap


# ---- the trainer's side


def test_the_example_of_the_page_runs(rollouts: Rollouts):
    """The trainer of docs/ray.md, with a pool that is there already."""
    import ray

    example = runpy.run_path(
        str(ROOT / "examples" / "ray_actors.py"), run_name="__main__ of a user"
    )
    trainer = example["Trainer"].remote(str(rollouts.paths[1]), rollouts.pool)
    try:
        report = ray.get(trainer.sync_weights.remote())
        assert len(report.workers) == 2
        assert rollouts.fingerprints() == [rollouts.started_with[1]] * 2
        with pytest.raises(ConfigError, match="versions only move forwards"):
            ray.get(trainer.sync_weights.remote(report.version))
        later = ray.get(trainer.sync_weights.remote(report.version + 10))
        assert later.version == report.version + 10
        found = ray.get(trainer.step.remote([[1, 2, 3], [1, 2, 4]]))
        assert {one.version for one in found} == {later.version + 1}
        assert rollouts.fingerprints() != [rollouts.started_with[1]] * 2
        ray.get(trainer.end_sync.remote())
    finally:
        ray.kill(trainer)


def test_a_trainer_that_dies_leaves_nobody_on_half_of_the_weights(rollouts: Rollouts, push: Any):
    import ray

    before = push(0).version
    rollouts.pool.close()
    trainer = ray.remote(MortalTrainer).remote(rollouts.pool, str(rollouts.paths[1]))
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(trainer.sync_weights.remote())
    for handle in rollouts.pool.handles.values():
        with pytest.raises(PoisonedError, match="does not generate"):
            ray.get(handle.generate.remote(PROMPTS, GREEDY))
    report = push(1)
    assert not report.lost
    assert report.version > before
    assert rollouts.fingerprints() == [rollouts.started_with[1]] * 2


def test_several_trainers_send_what_each_holds(rollouts: Rollouts):
    """Neighbours go to different trainers: no parent layer lies whole on one of them."""
    import ray

    source = HFSource(rollouts.trainers[1])
    weights = dict(source.materialize([meta.name for meta in source.metadata()]))
    names = list(weights)
    parts = [{name: weights[name].detach().clone() for name in names[i::3]} for i in range(3)]
    trainers = [ray.remote(num_cpus=0)(Holder).remote(part) for part in parts]
    try:
        ray.get(trainers[0].lead.remote(rollouts.pool, trainers[1:], chunk_bytes=CHUNK))
        report = ray.get(trainers[0].sync_weights.remote())
        assert len(report.workers) == 2
        assert report.num_chunks > 1
        assert rollouts.fingerprints() == [rollouts.started_with[1]] * 2
        ray.get(trainers[0].end_sync.remote())
    finally:
        for trainer in trainers:
            ray.kill(trainer)


class MortalTrainer(TrainerActor):
    """Dies in the middle of its first sync."""

    def __init__(self, workers: WorkerPool, path: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path)
        self.sync_to(workers, Treacherous(self.model, lambda: os._exit(1)), chunk_bytes=CHUNK)


# ---- what cannot be right


class NoEngine:
    """An actor with vLLM's four methods and no engine of ours behind them."""

    def init_weight_transfer_engine(self, request: Any) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, request: Any) -> None: ...

    def finish_weight_update(self) -> None: ...


def test_an_actor_without_our_engine_is_named_before_anything_is_sent(rollouts: Rollouts):
    import ray

    handle = ray.remote(NoEngine).remote()
    pool = WorkerPool({**rollouts.pool.handles, "stranger": handle})
    config = SyncConfig.of(timeout_seconds=60)  # the actor has yet to start
    session = SyncSession(HFSource(rollouts.trainers[0]), pool.transport(config), config)
    with session, pytest.raises(TransportError, match="none of its workers connected; was it"):
        session.push()
    ray.kill(handle)


def test_room_that_no_cluster_has(cluster: None):
    with pytest.raises(ConfigError, match="3 rollout actors needs 300 CPU and the cluster has 8"):
        WorkerPool.start(3, {}, options={"num_cpus": 100})
    with pytest.raises(ConfigError, match="needs 5 CPU on one node, and no node has as many"):
        WorkerPool.start(1, {}, options={"num_cpus": 5})
    with pytest.raises(ConfigError, match="needs 1 GPU and the cluster has 0"):
        WorkerPool.start(1, {}, options={"num_gpus": 1})


def test_an_object_store_too_small_for_the_chunks_in_flight(cluster: None):
    with pytest.raises(ConfigError, match="the chunks in flight need 400"):
        require_object_store(400 << 20)
    require_object_store(200 << 20)


def test_an_engine_that_does_not_start_is_told_with_its_reason(rollouts: Rollouts, tmp_path: Path):
    with pytest.raises(ConfigError, match="the name 'rollout-1' is taken in this cluster"):
        WorkerPool.start(1, {}, names="rollout-1")
    with pytest.raises(ConfigError, match="the engine of broken-0 does not start"):
        WorkerPool.start(1, {"model": str(tmp_path)}, max_restarts=0, names="broken-{}")


# ---- LoRA adapters, in engines of their own


def test_an_adapter_reaches_every_kind_of_actor_and_one_that_is_restarted(
    cluster: None, tmp_path: Path
):
    """An `LLM` and an `AsyncLLM` in one pool, started with other base weights than the policy's."""
    policy = make_policy(seed=3)
    adapter_bytes = AdapterSource(policy).adapter().nbytes
    path = str(save_model(make_model("dense", 1), tmp_path / "base"))
    engine = {**SMALL, "model": path, "enable_lora": True, "max_lora_rank": 8}
    handles = {
        "lora": start_actor("lora", engine, RolloutActor),
        "async lora": start_actor("async lora", engine, AsyncRolloutActor),
    }
    pool = WorkerPool(handles)
    pool.wait(START_SECONDS)
    config = SyncConfig.of(chunk_bytes="16KiB", timeout_seconds=60)
    with SyncSession(AdapterSource(policy), pool.transport(config), config) as session:
        assert session.push(1).sent_bytes > adapter_bytes, "the base has travelled too"
        step(policy, 1)
        assert logprob_gap(pool.generate(PROMPTS, GREEDY), policy) > 0.1
        report = session.push(2)
        assert report.sent_bytes == adapter_bytes
        found = pool.generate(PROMPTS, GREEDY)
        assert {one.worker for one in found} == set(handles)
        assert logprob_gap(found, policy) < 1e-5

        os.kill(status(handles["lora"])["pid"], signal.SIGKILL)
        step(policy, 2)
        again = until_whole(session)
        found = pool.generate(PROMPTS, GREEDY)
        assert {one.worker for one in found} == set(handles)
        assert {one.version for one in found} == {again.version}
        assert logprob_gap(found, policy) < 1e-5
    pool.stop()


# ---- last, since nobody waits for the restart


def test_rollouts_of_a_worker_that_dies_are_made_by_the_others(rollouts: Rollouts, push: Any):
    push(0)
    rollouts.kill("rollout-0")
    found = rollouts.pool.generate(PROMPTS, GREEDY)
    assert [one.prompt_ids for one in found] == PROMPTS
    assert {one.worker for one in found} == {"rollout-1"}
