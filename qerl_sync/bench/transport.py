"""`qerl-sync bench transport`: the cost of syncs between processes, next to that of their parts.

All variants run in turns in one run. Report medians of seconds, and medians of the rounds' ratios.
Check the tensors that were timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qerl_sync.bench.echo import EchoWorker, checksums
from qerl_sync.bench.extension import ENGINE_ARGUMENTS
from qerl_sync.bench.tcp import loopback_tcp_seconds
from qerl_sync.build import make_session, remote_transport
from qerl_sync.config import SyncConfig
from qerl_sync.errors import SyncError
from qerl_sync.plan.checkpoint import read_json
from qerl_sync.plan.staging import offsets
from qerl_sync.session import SyncSession
from qerl_sync.sources.hf import HFSource
from qerl_sync.sources.shared_memory import share_parameters
from qerl_sync.wire.segments import PrivateMemory

KINDS = ("shm", "shared parameters", "tcp")
# For timing a transport alone: without the session's looks at the weights.
UNCHECKED: dict[str, Any] = {"check_finite": False, "on_unchanged": "ignore"}


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
    note: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Measure for a model of this shape, with random weights in bfloat16.

    Args:
        config: a transformers `config.json`.
        note: told what is being done.

    Raises:
        SyncError: a sync failed, or a tensor that was timed is not what it should be.
    """
    sync = {"chunk_bytes": chunk_bytes, "chunks_in_flight": chunks_in_flight}
    found = Measured(rounds=rounds)
    with TemporaryDirectory(prefix="qerl_sync-bench-") as directory:
        note("making the model")
        model = make_model(config)
        source = HFSource(model)
        found.nbytes = sum(meta.nbytes for meta in source.metadata())
        checkpoint = save(model, directory)
        clock = Rounds()
        note("transports alone")
        _alone(clock, source, sync, rounds)
        note("starting vLLM")
        llm = start_engine(directory)
        note("syncs")
        _end_to_end(clock, found, llm, model, sync, checkpoint)
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


def save(model: torch.nn.Module, directory: str) -> str:
    """Save the model in the directory. Return the one file that has its weights."""
    model.save_pretrained(directory, max_shard_size="1TB")  # type: ignore[operator]
    return f"{directory}/model.safetensors"


def start_engine(path: str) -> Any:
    """Start a vLLM `LLM` that our sessions reach, with the benchmarks' engine arguments."""
    from vllm import LLM

    return LLM(model=path, weight_transfer_config={"backend": "qerl"}, **ENGINE_ARGUMENTS)


def _alone(clock: Rounds, source: HFSource, sync: Mapping[str, Any], rounds: int) -> None:
    """Measure transports without loading at the receiver, and their lower bounds."""
    nbytes = sum(meta.nbytes for meta in source.metadata())
    memory = PrivateMemory(offsets(source.metadata())[1])
    with _echo(source, "shm", sync) as shm, _echo(source, "tcp", sync) as tcp:
        for _ in range(rounds):
            clock.add("memcpy", copy_seconds(source, memory))
            clock.add("shm alone", shm.push().seconds["total"])
            clock.add("raw TCP", loopback_tcp_seconds(nbytes, 64 << 20))
            clock.add("tcp alone", tcp.push().seconds["total"])


@contextmanager
def _echo(source: HFSource, kind: str, sync: Mapping[str, Any]) -> Iterator[SyncSession]:
    """Yield a session with an echo worker, after one sync whose bytes were checked."""
    config = SyncConfig.of(transport=kind, **sync, **UNCHECKED)
    with (
        EchoWorker() as worker,
        SyncSession(source, remote_transport(config, worker), config) as session,
    ):
        worker.check(True)
        session.push()
        if worker.checksums() != checksums(source):
            raise SyncError(f"{kind}: the bytes that arrived are not those that were sent")
        worker.check(False)  # from here on syncs are timed
        yield session


def copy_seconds(source: HFSource, memory: PrivateMemory) -> float:
    """Return the seconds of one pass over the weights with torch's copy, as transports use it."""
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
) -> None:
    """Measure whole syncs into a real engine, and vLLM's load from memory that is already there."""

    kernels = partial(llm.collective_rpc, "bench_kernels")
    fresh = kernels()
    order = [meta.name for meta in HFSource(model).metadata()]
    for kind in ("shm", "tcp", "shared parameters"):
        shared = share_parameters(model) if kind == "shared parameters" else None
        config = SyncConfig.of(transport="tcp" if kind == "tcp" else "shm", **sync)
        with make_session(HFSource(model), config, llm=llm) as session:
            check_kernels(kind, session, model, kernels, fresh)
            workers = []
            for _ in range(found.rounds):
                (alone,) = llm.collective_rpc("bench_load_alone", args=(checkpoint, order))
                clock.add(f"load alone beside {kind}", alone)
                report = session.push()
                clock.add(kind, report.seconds["total"])
                clock.add(f"verify, {kind}", report.seconds["verify"])
                workers += report.workers
        # Medians: a single run depends on when malloc returns memory.
        names = {"measured": "peak_extra_bytes", "predicted": "peak_extra_bytes_predicted"}
        found.memory[kind] = {
            name: round(statistics.median(worker[key] for worker in workers))
            for name, key in names.items()
        }
        del shared


@torch.no_grad()
def check_kernels(
    what: str,
    session: SyncSession,
    model: torch.nn.Module,
    kernels: Callable[[], list[Any]],
    fresh: list[Any],
) -> None:
    """Check that other weights change the kernels, and that the right ones restore `fresh`.

    Args:
        kernels: returns what each worker's hold.

    Raises:
        SyncError: they do not.
    """
    held = []
    for _ in range(2):
        for parameter in model.parameters():
            parameter.neg_()
        session.push()
        held.append(kernels())
    if held[1] != fresh:
        raise SyncError(f"{what}: the kernels do not hold the weights that were sent")
    if any(other == right for other, right in zip(held[0], fresh, strict=True)):
        raise SyncError(f"{what}: other weights left the kernels as they were")
