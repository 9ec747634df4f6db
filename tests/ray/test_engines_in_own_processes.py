"""Rollout actors with engines in processes of their own: `AsyncLLM`, and tensor parallel ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import worker_extension
from support.engines import NEW, OLD, PROMPTS, SMALL
from support.models import make_model, save_model
from support.ray_apart import InFlight, Parallel
from support.ray_cluster import GREEDY, START_SECONDS, one_node, status
from support.remote import gap, gaps, wait_for

from qerl_sync import (
    HFSource,
    PoisonedError,
    SyncConfig,
    SyncReport,
    SyncSession,
    TransportError,
    WorkerPool,
)
from qerl_sync.integrations.ray.pool import start_actor

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

LENGTH = 400
LONG = {"temperature": 0, "max_tokens": LENGTH, "ignore_eos": True, "detokenize": False}
PROMPT = [5, 6, 7, 8]
ROUNDING = 1e-4
TRIES = 8


@dataclass
class Engine:
    """A pool of one actor, and the trainer's models."""

    pool: WorkerPool
    paths: dict[int, Path]
    trainers: dict[int, Any]

    @property
    def handle(self) -> Any:
        return next(iter(self.pool.handles.values()))

    def ask(self, method: str, *arguments: Any) -> Any:
        import ray

        return ray.get(getattr(self.handle, method).remote(*arguments))

    def holds(self, version: int) -> bool:
        """On each rank what it would hold, had it been started with that version."""
        fresh = self.ask("rpc", "fresh_weights", str(self.paths[version]))
        return bool(self.ask("rpc", "held_weights") == fresh)

    def session(self, source: Any, **options: Any) -> SyncSession:
        config = SyncConfig.of(**{"chunk_bytes": "64KiB", "timeout_seconds": 60, **options})
        return SyncSession(source, self.pool.transport(config), config)

    def push(self, version: int, **options: Any) -> SyncReport:
        return self.session(HFSource(self.trainers[version]), **options).push()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Engine]]:
    """`parallel`, `in flight` and `replicas`; they start at the same time."""
    directory = tmp_path_factory.mktemp("models")
    trainers = {version: make_model("dense", version) for version in (OLD, NEW)}
    paths = {v: save_model(model, directory / str(v)) for v, model in trainers.items()}
    arguments = {
        **SMALL,
        "model": str(paths[OLD]),
        "max_model_len": 512,
        "worker_extension_cls": worker_extension.NAME,
    }
    ranks = {**arguments, "tensor_parallel_size": 2}
    apart = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with one_node(num_cpus=6, object_store_memory=100 << 20):
        handles = {
            "parallel": start_actor("parallel", ranks, Parallel, environment=apart),
            "in flight": start_actor("in flight", arguments, InFlight),
            "replicas": start_actor("replicas", {**arguments, "data_parallel_size": 2}, InFlight),
        }
        WorkerPool(handles).wait(START_SECONDS)
        yield {n: Engine(WorkerPool({n: h}), paths, trainers) for n, h in handles.items()}


@pytest.fixture
def in_flight(engines: dict[str, Engine]) -> Iterator[Engine]:
    yield engines["in flight"]
    engines["in flight"].pool.close()


@pytest.mark.parametrize(("name", "ranks"), [("parallel", 2), ("in flight", 1), ("replicas", 2)])
def test_every_rank_holds_what_one_started_with_the_weights_holds(
    engines: dict[str, Engine], name: str, ranks: int
):
    engine = engines[name]
    assert engine.holds(OLD)
    assert not engine.holds(NEW)
    report = engine.push(NEW)
    assert engine.holds(NEW)
    assert report.prediction_exact
    assert len(report.workers) == ranks
    assert report.transport.startswith("shm: ")
    for one in engine.pool.generate(PROMPTS, GREEDY):
        assert (one.version, one.last_version) == (report.version, report.version)
        assert gap(engine.trainers[NEW], one.prompt_ids, spoken(one)) < ROUNDING
    engine.pool.close()


def test_chunks_cannot_come_by_the_object_store(in_flight: Engine):
    with pytest.raises(TransportError, match="is not in the actor's own process"):
        in_flight.push(NEW, transport="ray")


def test_where_memory_is_not_shared_bytes_come_over_tcp(in_flight: Engine):
    report = in_flight.push(OLD, transport="tcp")
    assert report.transport.startswith("tcp: ")
    assert in_flight.holds(OLD)
    in_flight.push(NEW, transport="tcp")
    assert in_flight.holds(NEW)


def test_a_request_in_flight_goes_on_with_the_new_weights(in_flight: Engine):
    """Each logprob is held against the trainer's model of the version that it must come from."""
    one = in_the_middle_of_a_sync(in_flight)
    assert one.last_version == one.version + 1
    assert len(one.completion_ids) == LENGTH
    old, new = (gaps(in_flight.trainers[v], PROMPT, spoken(one)) for v in (OLD, NEW))
    count = next(i for i, wrong in enumerate(old) if wrong > ROUNDING)
    assert 0 < count < LENGTH
    assert max(new[count:]) <= ROUNDING
    assert max(new[:count]) > 100 * ROUNDING < max(old[count:]), "the test tells nothing"
    assert in_flight.holds(NEW)


def in_the_middle_of_a_sync(engine: Engine) -> Any:
    """A completion that was begun with the old weights and ended with the new ones. On a busy
    machine it may have ended before the sync: then once more."""
    for _ in range(TRIES):
        engine.push(OLD)
        session = engine.session(HFSource(engine.trainers[NEW]))
        batch = begun(engine)
        report = session.push()
        (one,) = batch.result()
        if one.version != one.last_version == report.version:
            return one
    raise AssertionError(f"in {TRIES} tries the sync never came in the middle of a request")


def begun(engine: Engine) -> Any:
    """A batch of one long request, which the engine has begun."""
    batch = engine.pool.submit([PROMPT], LONG)
    wait_for(lambda: engine.ask("in_flight"))
    return batch


def test_a_sync_waits_for_requests_in_flight_where_it_is_told_to(in_flight: Engine):
    """For longer than a sync that stands still is believed to go on. vLLM waits for those that it
    has begun; the others begin with the new weights."""
    in_flight.push(OLD)
    with in_flight.session(HFSource(in_flight.trainers[NEW]), pause_mode="wait") as session:
        session._agree()
        batch = in_flight.pool.submit([PROMPT] * 16, LONG)  # twice as many as it does at a time
        wait_for(lambda: in_flight.ask("in_flight") == 16)
        version = session.push().version
        found = batch.result()
    assert len(found) == 16
    assert {one.version for one in found} == {version - 1}, "some were refused, and made anew"
    assert {one.last_version for one in found} == {version - 1, version}
    assert in_flight.holds(NEW)


def test_one_wrong_request_ends_those_beside_it(in_flight: Engine):
    in_flight.push(OLD)
    with pytest.raises(Exception, match="maximum context length"):
        in_flight.ask("generate", [PROMPT, [1] * 600], LONG)
    wait_for(lambda: not in_flight.ask("in_flight"), seconds=5)


def test_what_a_sync_gives_up_is_generated_anew(in_flight: Engine):
    in_flight.push(OLD)
    session = in_flight.session(HFSource(in_flight.trainers[NEW]), pause_mode="abort")
    batch = begun(in_flight)
    version = session.push().version
    (one,) = batch.result()
    assert len(one.completion_ids) == LENGTH
    assert one.version in (version - 1, version)  # it may have been done before


class Failing(HFSource):
    """Fails in the middle of a sync."""

    def materialize(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        if "model.norm.weight" in names:
            raise OSError("the trainer's disk is full")
        return super().materialize(names)


def test_a_sync_that_fails_leaves_no_request_waiting(in_flight: Engine):
    in_flight.push(OLD)
    session = in_flight.session(Failing(in_flight.trainers[NEW]))
    batch = begun(in_flight)
    with pytest.raises(OSError, match="disk is full"):
        session.push()
    with pytest.raises(TransportError, match="it was paused for a sync, which has failed"):
        batch.result()
    assert in_flight.ask("in_flight") == 0
    with pytest.raises(PoisonedError, match="a sync is under way, or one has failed"):
        in_flight.ask("generate", [PROMPT], LONG)
    version = in_flight.push(NEW).version
    (one,) = batch.result()
    assert (one.version, len(one.completion_ids)) == (version, LENGTH)
    assert in_flight.holds(NEW)


def test_an_actor_ends_with_the_process_of_its_engine(in_flight: Engine):
    """Ray starts both anew; last, since nobody waits for that."""
    import ray

    pid = status(in_flight.handle)["pid"]
    os.kill(in_flight.ask("core_pid"), signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), seconds=20)
    with pytest.raises(ray.exceptions.RayActorError):
        in_flight.ask("in_flight")


def spoken(rollout: Any) -> tuple[list[int], list[float]]:
    return rollout.completion_ids, rollout.logprobs
