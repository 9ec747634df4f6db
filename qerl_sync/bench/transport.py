"""`qerl-sync bench transport`: the cost of syncs between processes, next to that of their parts.

All variants run in turns in one run. Report medians of seconds, and medians of the rounds' ratios.
Check the tensors that were timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qerl_sync.bench.echo import EchoWorker, checksum
from qerl_sync.bench.extension import ENGINE_ARGUMENTS
from qerl_sync.bench.tcp import loopback_tcp_seconds
from qerl_sync.config import SyncConfig
from qerl_sync.errors import SyncError
from qerl_sync.plan.checkpoint import read_json
from qerl_sync.plan.staging import offsets
from qerl_sync.session import SyncReport, SyncSession
from qerl_sync.sources.hf import HFSource
from qerl_sync.sources.shared_memory import share_parameters
from qerl_sync.transports.remote import RemoteTransport
from qerl_sync.wire.segments import PrivateMemory

KINDS = ("shm", "shared parameters", "tcp")
# Where a transport is timed by itself: nobody looks at the weights.
NOT_LOOKED_AT: dict[str, Any] = {"check_finite": False, "on_unchanged": "ignore"}


@dataclass(frozen=True)
class Target:
    """A number to reach: `value` is at most or at least `limit`."""

    name: str
    value: float
    limit: float
    at_most: bool

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit


@dataclass
class Results:
    """Results of one benchmark run.

    Attributes:
        nbytes: bytes of one sync.
        seconds: medians, by what was timed.
        ratios: medians of the rounds' ratios, by what was compared.
    """

    nbytes: int = 0
    rounds: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    @property
    def targets(self) -> list[Target]:
        """Return the numbers that this project promises."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        targets = [{**asdict(target), "met": target.met} for target in self.targets]
        return {**asdict(self), "targets": targets}


@dataclass
class Measured(Results):
    """Results of `qerl-sync bench transport`; `memory`: for each transport the most that the worker
    took on top, measured and predicted."""

    memory: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def targets(self) -> list[Target]:
        found = []
        for kind in ("shm", "shared parameters"):
            load, verify = f"{kind} / load alone", f"verify / sync, {kind}"
            found.append(Target(f"sync / load alone, {kind}", self.ratios[load], 1.25, True))
            found.append(Target(verify, self.ratios[verify], 0.03, True))
        found += [
            Target("shm alone / memcpy, bandwidth", self.ratios["shm alone / memcpy"], 0.6, False),
            Target("tcp alone / raw, bandwidth", self.ratios["tcp alone / raw"], 0.8, False),
        ]
        for kind, memory in self.memory.items():
            off = abs(memory["measured"] / memory["predicted"] - 1)
            found.append(Target(f"memory off its prediction, {kind}", off, 0.05, True))
        return found


class Rounds:
    """Time functions in turns."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def add(self, name: str, seconds: float) -> None:
        self.seconds.setdefault(name, []).append(seconds)

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(found) for name, found in self.seconds.items()}

    def ratio(self, name: str, to: str) -> float:
        """Return the median over the rounds of seconds of `name` divided by seconds of `to`."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return statistics.median(a / b for a, b in pairs)


def measure(
    config: Path,
    *,
    rounds: int = 5,
    chunk_bytes: int | None = None,
    chunks_in_flight: int = 2,
    engine: Mapping[str, Any] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Measure for a model of this shape, with random weights in bfloat16.

    Args:
        config: a transformers `config.json`.
        engine: more vLLM engine arguments.
        note: told what is being done.

    Raises:
        SyncError: a sync failed, or a tensor that was timed is not what it should be.
    """
    sync = {"chunk_bytes": chunk_bytes}
    found = Measured(rounds=rounds)
    with TemporaryDirectory(prefix="qerl_sync-bench-") as directory:
        note("making the model")
        model = make_model(config)
        source = HFSource(model)
        found.nbytes = sum(meta.nbytes for meta in source.metadata())
        model.save_pretrained(directory, max_shard_size="1TB")  # type: ignore[operator]
        clock = Rounds()
        note("transports alone")
        _alone(clock, source, sync, rounds, chunks_in_flight)
        note("starting vLLM")
        llm = start_engine(directory, engine or {})
        note("syncs")
        checkpoint = str(Path(directory) / "model.safetensors")
        _end_to_end(clock, found, llm, model, sync, checkpoint, chunks_in_flight)
    found.seconds = clock.medians()
    for kind in KINDS:
        found.ratios[f"{kind} / load alone"] = clock.ratio(kind, f"load alone beside {kind}")
        found.ratios[f"verify / sync, {kind}"] = clock.ratio(f"verify, {kind}", kind)
        found.ratios[f"{kind} / memcpy"] = found.seconds[kind] / found.seconds["memcpy"]
    found.ratios["shm alone / memcpy"] = clock.ratio("memcpy", "shm alone")
    found.ratios["tcp alone / raw"] = clock.ratio("raw TCP", "tcp alone")
    return found


def make_model(config: Path) -> torch.nn.Module:
    """Make a model of this shape with random weights in bfloat16. Equal calls give equal
    weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    read_json(Path(config))  # transformers would look for a missing or broken one on the hub
    shape = AutoConfig.from_pretrained(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.tie_weights()
    return model  # type: ignore[no-any-return]


def start_engine(path: str, arguments: Mapping[str, Any]) -> Any:
    """Start a vLLM `LLM` whose engine has its own process."""
    from vllm import LLM

    ours = {"model": path, "weight_transfer_config": {"backend": "qerl"}}
    return LLM(**{**ENGINE_ARGUMENTS, **ours, **arguments})


def _alone(
    clock: Rounds,
    source: HFSource,
    sync: Mapping[str, Any],
    rounds: int,
    chunks_in_flight: int,
) -> None:
    """Measure transports without loading at the receiver, and their lower bounds."""
    nbytes = sum(meta.nbytes for meta in source.metadata())
    memory = PrivateMemory(offsets(source.metadata())[1])
    with (
        _echo(source, "shm", sync, chunks_in_flight) as shm,
        _echo(source, "tcp", sync, chunks_in_flight) as tcp,
    ):
        for _ in range(rounds):
            clock.add("memcpy", copy_seconds(source, memory))
            clock.add("shm alone", shm.push().seconds["total"])
            clock.add("raw TCP", loopback_tcp_seconds(nbytes, 64 << 20))
            clock.add("tcp alone", tcp.push().seconds["total"])


@contextmanager
def _echo(
    source: HFSource, kind: str, sync: Mapping[str, Any], chunks_in_flight: int
) -> Iterator[SyncSession]:
    """Yield a warm session with an echo worker whose bytes were checked."""
    with EchoWorker() as worker:
        transport = RemoteTransport(worker, transport=kind, chunks_in_flight=chunks_in_flight)
        with SyncSession(source, transport, SyncConfig.of(**sync, **NOT_LOOKED_AT)) as session:
            worker.check(True)
            session.push()
            names = [meta.name for meta in source.metadata()]
            wanted = {name: checksum(tensor) for name, tensor in source.materialize(names)}
            if worker.checksums() != wanted:
                raise SyncError(f"{kind}: the bytes that arrived are not those that were sent")
            worker.check(False)
            yield session


def copy_seconds(source: HFSource, memory: PrivateMemory) -> float:
    """Return the seconds of one pass over the weights with torch's copy, as the transports use
    it.
    """
    memory.bytes.fill_(1)  # touched before
    started = time.perf_counter()
    metas = source.metadata()
    places, _ = offsets(metas)
    tensors = source.materialize([meta.name for meta in metas])
    for meta, offset, (_, tensor) in zip(metas, places, tensors, strict=True):
        memory.tensor(offset, meta.shape, tensor.dtype).copy_(tensor)
    return time.perf_counter() - started


def _end_to_end(
    clock: Rounds,
    found: Measured,
    llm: Any,
    model: torch.nn.Module,
    sync: Mapping[str, Any],
    checkpoint: str,
    chunks_in_flight: int,
) -> None:
    """Measure whole syncs into a real engine, and vLLM's load from memory that is already there."""
    from qerl_sync.engines.llm import LLMClient

    fresh = llm.collective_rpc("bench_kernels")
    order = [meta.name for meta in HFSource(model).metadata()]
    for kind in ("shm", "tcp", "shared parameters"):
        shared = share_parameters(model) if kind == "shared parameters" else None
        transport = RemoteTransport(
            LLMClient(llm),
            transport="tcp" if kind == "tcp" else "shm",
            chunks_in_flight=chunks_in_flight,
        )
        with SyncSession(HFSource(model), transport, SyncConfig.of(**sync)) as session:
            _check(kind, llm, session, model, fresh)
            reports: list[SyncReport] = []
            for _ in range(found.rounds):
                (alone,) = llm.collective_rpc("bench_load_alone", args=(checkpoint, order))
                clock.add(f"load alone beside {kind}", alone)
                report = session.push()
                clock.add(kind, report.seconds["total"])
                clock.add(f"verify, {kind}", report.seconds["verify"])
                reports.append(report)
            found.memory[kind] = _memory(reports)
        del shared


@torch.no_grad()
def _check(kind: str, llm: Any, session: SyncSession, model: torch.nn.Module, fresh: Any) -> None:
    """Check that other weights change every layer and that the right ones restore a fresh
    engine's.
    """
    for parameter in model.parameters():
        parameter.neg_()
    session.push()
    other = llm.collective_rpc("bench_kernels")
    for parameter in model.parameters():
        parameter.neg_()
    session.push()
    if llm.collective_rpc("bench_kernels") != fresh:
        raise SyncError(f"{kind}: the worker's kernels do not hold the weights that were sent")
    if other == fresh:
        raise SyncError(f"{kind}: other weights left the worker's kernels as they were")


def _memory(reports: Sequence[SyncReport]) -> dict[str, int]:
    """Return medians: a single run depends on when malloc returns memory."""
    workers = [report.workers[0] for report in reports]
    names = {"measured": "peak_extra_bytes", "predicted": "peak_extra_bytes_predicted"}
    return {
        name: round(statistics.median(worker[key] for worker in workers))
        for name, key in names.items()
    }
