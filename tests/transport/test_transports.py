"""Every way to a vLLM worker: after a sync it is what a fresh engine would be, and it cost what was
said before."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import requests
import torch
from support.engines import NEW, OLD
from support.models import make_model, save_model
from support.remote import (
    ENGINES,
    SERVED,
    completion_request,
    gap,
    of_choice,
    own_segments,
    push,
    session,
    wait_for,
)

import qerl_sync
from qerl_sync import (
    HFSource,
    InProcessTransport,
    RemoteTransport,
    Source,
    SyncConfig,
    SyncSession,
    TransportError,
    share_parameters,
)
from qerl_sync.engines.http import HTTPClient
from qerl_sync.errors import AgreementError, CoverageError, EngineTakenError, LayerMapError
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.joint_map import joint_map
from qerl_sync.plan.layer_map import Contribution, LayerMap, ParentLayer
from qerl_sync.serving.command import ServerSpec
from qerl_sync.serving.server import ServerProcess
from qerl_sync.transports.remote import compatibility as agreement
from qerl_sync.wire import host, segments
from qerl_sync.wire.tokens import TOKEN_VARIABLE
from qerl_sync.worker.compat import caches

pytestmark = pytest.mark.vllm

IN_PROCESS, OWN, STAGES = "in process", "own process", "pipeline parallel"
CARRIERS = ["shm", "tcp"]
# What different thread counts and shards do to the last bits of a logprob.
ROUNDING = 1e-5


class Watched(Source):
    """`inner`, which calls `asked(number of the chunk)` whenever a chunk is gathered."""

    def __init__(self, inner, asked):
        self._inner, self._asked, self.chunks = inner, asked, 0

    def metadata(self) -> list[ParamMeta]:
        return self._inner.metadata()

    def materialize(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        self._asked(self.chunks)
        self.chunks += 1
        yield from self._inner.materialize(names)


class Changing(Source):
    """Several sources of the same model, one for each sync."""

    def __init__(self, *sources):
        self.sources = list(sources)

    def metadata(self):
        return self.sources[0].metadata()

    def materialize(self, names):
        return self.sources[0].materialize(names)


def is_right(engine, version) -> bool:
    """Weights to the bit. Generations too, unless shards add up in another order."""
    same = engine.num_workers > 1 or engine.generates_as(version)
    return engine.wrong_weights(version) == [] and same and engine.gap(version) <= ROUNDING


# ------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("name", [IN_PROCESS, *(n for n in ENGINES if n != STAGES)])
def test_equals_a_fresh_engine(remote, name, carrier):
    engine = remote(name)
    assert not is_right(engine, NEW)
    with session(engine, HFSource(engine.trainers[NEW]), transport=carrier) as sync:
        for version in (1, 2):
            report = sync.push(step=version)
            assert is_right(engine, NEW)
            assert report.version >= version
            assert report.prediction_exact, report.first_difference
            assert report.transport == f"{carrier}: sync.transport says so"
            assert len(report.workers) == engine.num_workers
            assert all(worker["prediction_exact"] for worker in report.workers)
    push(engine, OLD, transport=carrier)
    assert engine.wrong_weights(OLD) == []
    assert engine.generates_as(OLD)


def test_any_replica_that_keeps_its_prefix_cache_is_told(remote, monkeypatch):
    """vLLM returns the first one's answer, which has emptied its own."""
    said: list[str] = []
    monkeypatch.setattr(caches.logger, "warning", lambda text, *values: said.append(text % values))
    engine = remote("data parallel")
    client = engine.client()
    future, grown = engine.stream([1, 2, 3], 400, replica=1)
    wait_for(lambda: grown[0])
    client.pause("keep")
    assert client.reset_caches(running=False) is False
    assert len(said) == 1
    assert "replicas [1] keep" in said[0]
    assert client.reset_caches(running=True) is True
    client.resume()
    assert len(future.result(60)[0]) == 400


@pytest.mark.slow
@pytest.mark.timeout(600)  # two engines start, one behind the other
def test_every_data_parallel_replica_of_a_server_is_synced_by_one_trainer(tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "that both trainers and the server know")
    trainers = {version: make_model("dense", version) for version in (OLD, NEW)}
    path = save_model(trainers[OLD], tmp_path / "model")
    spec = ServerSpec(str(path), engine={**SERVED, "data_parallel_size": 2})
    with ServerProcess(spec, log=tmp_path / "server.log") as server:

        def gaps(version: int) -> list[float]:
            return [
                gap(
                    trainers[version],
                    [1, 2, 3],
                    of_choice(asked(server.url, path, replica).json()["choices"][0]),
                )
                for replica in range(2)
            ]

        assert max(gaps(OLD)) < ROUNDING < min(gaps(NEW))
        client = HTTPClient(server.url, timeout_seconds=60)
        assert client.world_size() == 2
        first, second = (
            SyncSession(
                HFSource(trainers[v]), RemoteTransport(client, timeout_seconds=60), SyncConfig()
            )
            for v in (NEW, OLD)
        )
        with first, second:
            assert len(first.push().workers) == 2
            assert max(gaps(NEW)) < ROUNDING < min(gaps(OLD))
            with pytest.raises(EngineTakenError) as refused:
                second.push()
            assert refused.value.pid == os.getpid()
            assert max(gaps(NEW)) < ROUNDING
            assert first.push().version == 2
        with asked(server.url, path, 1, 400, stream=True) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith(b"data: ")
            client.pause("keep")
            assert client.reset_caches(running=False) is False, "the first replica's answer is True"
            client.resume()
            assert list(lines)[-2] == b"data: [DONE]"


def asked(url: str, model: Path, replica: int, tokens: int = 8, *, stream: bool = False):
    """The answer of one data parallel replica of a server."""
    request = {**completion_request(str(model), [1, 2, 3], tokens), "stream": stream}
    headers = {"X-data-parallel-rank": str(replica)}
    to = f"{url}/v1/completions"
    answer = requests.post(to, json=request, headers=headers, timeout=60, stream=stream)
    assert answer.status_code == 200, answer.text
    return answer


class Part(HFSource):
    """Lacks one tensor of the second pipeline stage, and has one that no stage knows."""

    lacks, extra = "", ""

    def metadata(self):
        metas = [meta for meta in super().metadata() if meta.name != self.lacks]
        return metas + [replace(metas[0], name=self.extra)] * bool(self.extra)


def test_pipeline_stages_get_their_layers(remote):
    engine = remote(STAGES)
    with session(engine, HFSource(engine.trainers[NEW]), transport="shm") as sync:
        for _ in range(2):
            report = sync.push()
            assert engine.wrong_weights(NEW) == []
            assert report.prediction_exact, report.first_difference
            assert len(report.workers) == 2
    source = Part(engine.trainers[OLD])
    with session(engine, source, transport="shm") as sync:
        Part.lacks = "model.layers.1.mlp.down_proj.weight"
        with pytest.raises(CoverageError, match=r"layers\.1\.mlp\.down_proj"):
            sync.push()
        Part.lacks, Part.extra = "", "model.extra.weight"
        with pytest.raises(LayerMapError, match=r"model\.extra"):
            sync.push()
        assert engine.wrong_weights(NEW) == [], "before the first byte"


def test_what_no_pipeline_stage_takes_is_refused():
    stages = [LayerMap({}, {"a": (), "b": ()}, frozenset(gone)) for gone in ("a", "b", "ab")]
    assert joint_map(stages[:2]).elsewhere == frozenset()
    with pytest.raises(LayerMapError, match="'a'"):
        joint_map([stages[0], stages[2]])


def test_what_one_worker_buffers_is_planned_as_buffered():
    lands = {"a": (Contribution("layer", "weight", 4, 16, True),)}
    direct, layerwise = (
        LayerMap({"layer": ParentLayer("layer", "Linear", 4, 4, loading=loading)}, lands)
        for loading in ("direct", "layerwise")
    )
    assert joint_map([direct, direct]).layers["layer"].loading == "direct"
    assert joint_map([direct, layerwise]).layers["layer"].loading == "layerwise"


def test_a_server_knows_its_version(remote):
    engine = remote("server")
    report = push(engine, NEW)
    assert engine.client().weight_version() == str(report.version)


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize(
    ("kind", "kernels"),
    [("moe", "stock"), ("tied", "stock"), ("bias", "stock"), ("dense", "fp8"), ("dense", "plain")],
)
def test_every_kind_of_model(remote, kind, kernels, carrier):
    engine = remote(IN_PROCESS, kind, kernels)
    for version in (NEW, OLD, NEW):
        report = push(engine, version, transport=carrier, chunk_bytes="40KiB")
        assert engine.wrong_weights(version) == []
        assert report.num_chunks > 2
        assert report.prediction_exact, report.first_difference
    assert engine.generates_as(NEW)


@pytest.mark.parametrize("carrier", [*CARRIERS, "inproc"])
@pytest.mark.parametrize("policy", ["warn", "reorder"])
@pytest.mark.parametrize("order", ["random:0", "interleaved:3"])
def test_every_order(remote, order, policy, carrier):
    engine = remote(IN_PROCESS, "moe")
    options = {"policy": policy, "source_order": order, "chunk_bytes": "20KiB"}
    source = HFSource(engine.trainers[NEW])
    if carrier == "inproc":
        transport = InProcessTransport(engine.subject.engine)
        report = SyncSession(source, transport, SyncConfig.of(**options)).push()
    else:
        report = push(engine, NEW, transport=carrier, **options)
    assert engine.wrong_weights(NEW) == []
    assert report.prediction_exact, report.first_difference
    assert (report.max_open_layers_measured == 1) == (policy == "reorder")


# --------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("chunks_in_flight", [1, 2, 3])
@pytest.mark.parametrize("chunk_bytes", ["1KiB", "70KiB", "1GiB"])
def test_chunks_of_every_size(remote, chunk_bytes, chunks_in_flight, carrier):
    """A layer each, oversized; several layers; everything."""
    engine = remote(IN_PROCESS)
    with session(
        engine,
        HFSource(engine.trainers[NEW]),
        transport=carrier,
        chunk_bytes=chunk_bytes,
        chunks_in_flight=chunks_in_flight,
    ) as sync:
        for _ in range(2):
            report = sync.push()
            assert engine.wrong_weights(NEW) == []
            assert report.prediction_exact, report.first_difference
    assert (report.num_chunks == 1) == (chunk_bytes == "1GiB")


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("chunks_in_flight", [1, 3])
def test_never_more_chunks_ahead_than_asked_for(remote, monkeypatch, chunks_in_flight, carrier):
    engine = remote(IN_PROCESS)
    loaded, ahead = [], []
    load = engine.model.load_weights

    def slowly(stream):
        found = load(stream)
        time.sleep(0.02)
        loaded.append(1)
        return found

    source = Watched(HFSource(engine.trainers[NEW]), lambda i: ahead.append(i - len(loaded)))
    options = {"chunk_bytes": "1KiB", "chunks_in_flight": chunks_in_flight, "transport": carrier}
    with session(engine, source, **options) as sync:
        sync.push()
        loaded.clear()
        ahead.clear()
        source.chunks = 0
        monkeypatch.setattr(engine.model, "load_weights", slowly)
        report = sync.push()
    assert len(loaded) == report.num_chunks > 6, "one call of load_weights a chunk"
    assert max(ahead) == chunks_in_flight - 1  # and the one that is being gathered


def test_the_stream_may_change_between_syncs(remote):
    """Experts one by one, then fused: other tensors, other chunks, larger slots."""
    engine = remote(OWN)
    new, old = engine.trainers[NEW], engine.trainers[OLD]
    source = Changing(HFSource(new), HFSource(old, convert=False), HFSource(new, convert=False))
    digests = set()
    with session(engine, source, transport="shm", chunk_bytes="1KiB") as sync:
        for version in (NEW, OLD, NEW):
            report = sync.push()
            assert engine.wrong_weights(version) == []
            assert report.prediction_exact, report.first_difference
            digests.add(report.plan_digest)
            source.sources.pop(0)
    assert len(digests) == 2


# -------------------------------------------------------------------------- where the bytes lie


def test_shared_parameters_are_loaded_where_they_are(remote):
    engine = remote(OWN)
    model = engine.trainers[NEW]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fused = HFSource(model, convert=False)  # what is converted is copied
    parameters = share_parameters(model)
    mapped: list[bool] = []
    pid = 0

    def look(_: int) -> None:
        assert own_segments() == [parameters.name], "a receive buffer was made"
        if pid:
            mapped.append(parameters.name in Path(f"/proc/{pid}/maps").read_text())

    try:
        with session(engine, Watched(fused, look), transport="shm", chunk_bytes="40KiB") as sync:
            report = sync.push()
            pid = int(re.search(r"pid (\d+)", report.workers[0]["worker"])[1])
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(2)
            sync.push()
            assert engine.wrong_weights(NEW), "the trainer's new values did not arrive"
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.div_(2)
            sync.push()
        assert engine.wrong_weights(NEW) == []
        assert any(mapped)
        assert all(parameter.equal(before[name]) for name, parameter in model.named_parameters())
    finally:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        parameters.close()


def test_auto_takes_shared_memory_and_says_why(remote):
    report = push(remote(OWN), NEW, transport="auto")
    assert report.transport == "shm: the worker can open the trainer's shared memory"


def test_auto_takes_tcp_where_shared_memory_is_another(remote, monkeypatch, tmp_path):
    """As in two containers with a /dev/shm each."""
    engine = remote(OWN)
    monkeypatch.setattr(segments, "DIRECTORY", tmp_path)
    report = push(engine, NEW, transport="auto")
    assert report.transport.startswith("tcp: shared memory does not work: worker 0 of 1")
    assert "cannot be opened here" in report.transport
    assert engine.wrong_weights(NEW) == []

    with pytest.raises(TransportError, match=r"use sync\.transport: tcp"):
        push(engine, OLD, transport="shm")
    assert engine.generates_as(NEW)


def test_auto_takes_tcp_between_hosts(remote, monkeypatch, tmp_path):
    engine = remote(OWN)
    (tmp_path / "boot_id").write_text("another")
    monkeypatch.setattr(host, "BOOT_ID", tmp_path / "boot_id")
    report = push(engine, NEW, transport="auto")
    assert report.transport == "tcp: the worker is on another host"
    assert engine.wrong_weights(NEW) == []


# ------------------------------------------------------------------------------------ agreement


def refused(engine, sync, match: str) -> None:
    """Refused in these words, before anything moved."""
    before = engine.rpc("held_weights")
    with pytest.raises(AgreementError, match=match):
        sync.push()
    assert engine.rpc("held_weights") == before
    assert engine.generates_as(OLD), "the engine does not go on with what it has"


@pytest.mark.parametrize(
    ("place", "attribute", "value", "words"),
    [
        (agreement, "PROTOCOL", 99, r"\(protocol \d+\), the trainer .* \(protocol 99\)"),
        (qerl_sync, "__version__", "99.0", r"runs qerl-sync .*, the trainer 99\.0"),
    ],
)
def test_another_version_is_refused(remote, monkeypatch, place, attribute, value, words):
    engine = remote(OWN)
    with session(engine, HFSource(engine.trainers[NEW])) as sync:
        with monkeypatch.context() as patch:
            patch.setattr(place, attribute, value)
            refused(engine, sync, words)
        sync.push()
    assert engine.wrong_weights(NEW) == []
