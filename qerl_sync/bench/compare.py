"""`qerl-sync bench compare`: every way to bring a trainer's weights to a vLLM engine, side by side.

The ways take turns in one run, on the same bytes. Before each, the trainer's weights change sign.
After each, outside of the timed part, what the engine's kernels hold is compared with a fresh
engine's, loaded from a checkpoint of those weights.
"""

from __future__ import annotations

import gc
import os
import platform
import socket
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from qerl_sync.bench.engines import CALL_SECONDS, in_actor, served
from qerl_sync.bench.extension import KERNELS_VARIABLE, gloo_group, use_plain_kernels
from qerl_sync.bench.transport import (
    Results,
    Rounds,
    Target,
    copy_seconds,
    make_model,
    save,
    start_engine,
)
from qerl_sync.build import make_session
from qerl_sync.config import SyncConfig
from qerl_sync.errors import SyncError
from qerl_sync.meta import metas_to_json
from qerl_sync.plan.staging import offsets
from qerl_sync.report.summary import versions
from qerl_sync.session import SyncSession
from qerl_sync.sources.hf import HFSource
from qerl_sync.sources.shared_memory import share_parameters
from qerl_sync.wire.segments import DIRECTORY, PrivateMemory, SharedSegment

Kernels = Literal["packed", "plain"]
# Where the engine runs. OVER_TCP: as if it were on another machine. SHARED: with the trainer's
# parameters in shared memory.
COLOCATE, OWN_PROCESS = "colocate", "own process"
OVER_TCP, SHARED = "own process, over TCP", "own process, shared parameters"
SERVER, ACTOR = "server", "Ray actor"
MEMCPY, LOAD_ALONE = "memcpy", "vLLM's load alone, bytes already there"
OURS, SHM, TCP = "qerl-sync", "qerl-sync, shm", "qerl-sync, tcp"
GLOO = "torch.distributed broadcast (Gloo) of each tensor, into vLLM's reload"
FILE = "safetensors in shared memory, vLLM's reload_weights"
STORE = "tensors in Ray's object store, into vLLM's reload"
# Ratios to reach, by engine, way and what it is divided by.
LIMITS: dict[Kernels, dict[tuple[str, str, str], float]] = {
    "plain": {
        (COLOCATE, OURS, MEMCPY): 1.4,
        (SHARED, SHM, MEMCPY): 1.4,
        (OWN_PROCESS, SHM, MEMCPY): 2.3,
    },
    "packed": {(COLOCATE, OURS, LOAD_ALONE): 1.1, (OWN_PROCESS, SHM, LOAD_ALONE): 1.25},
}


@dataclass
class Compared(Results):
    """Results of `qerl-sync bench compare`.

    Attributes:
        kernels: see `measure`.
        rows: for each way, what the engine held afterwards.
        machine: what it ran on, with versions and the load before and after.
    """

    kernels: Kernels = "packed"
    rows: list[Row] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def targets(self) -> list[Target]:
        """Return the ratios that this project wants to reach, of the engines measured."""
        limits = {
            f"{engine}: {way} / {to}": limit
            for (engine, way, to), limit in LIMITS[self.kernels].items()
        }
        ratios = self.ratios
        return [Target(n, ratios[n], limit, True) for n, limit in limits.items() if n in ratios]

    def cells(self, row: Row) -> list[str]:
        """Return milliseconds, ratios to memcpy and to the load alone, and what was wrong."""
        seconds = self.seconds.get(row.name)
        ratios = [self.ratios.get(f"{row.name} / {to}") for to in (MEMCPY, LOAD_ALONE)]
        return [
            "-" if seconds is None else f"{1000 * seconds:.0f}",
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            "" if row.way == MEMCPY else row.wrong or "right",
        ]


class _Trainer:
    """A model that has one of two versions of weights, of opposite signs.

    Attributes:
        checkpoints: the directory of each version.
        memory: what the parameters lie in, where that is shared.
    """

    memory: SharedSegment | None = None

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.version = model, 0
        self.checkpoints: dict[int, str] = {}
        self.source = HFSource(model)
        self.metas = self.source.metadata()

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.neg_()
        self.version = 1 - self.version

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.source.materialize([meta.name for meta in self.metas])


# Starts an engine with a checkpoint.
Start = Callable[[str], AbstractContextManager[Any]]
# A function that brings the trainer's weights of now to the engine, by the name of the way.
Ways = dict[str, Callable[[], object]]


@dataclass
class Row:
    """One way to one engine.

    Attributes:
        engine: where it runs.
        wrong: what was wrong with the weights that it then held, or the error; empty: nothing.
    """

    engine: str
    way: str
    wrong: str = ""

    @property
    def name(self) -> str:
        return f"{self.engine}: {self.way}"

    def run(
        self, ways: Ways, llm: Any, trainer: _Trainer, fresh: list[Digests], clock: Rounds | None
    ) -> None:
        """Bring new weights in this way, and look at what the engine then holds.

        Args:
            fresh: what a fresh engine holds of each version.
            clock: None: a round that is not counted, in which plans are made.
        """
        trainer.step()
        started = time.perf_counter()
        try:
            seconds = ways[self.way]()
            taken = time.perf_counter() - started
            if clock is not None:  # some time themselves
                clock.add(self.name, seconds if isinstance(seconds, float) else taken)
            self.wrong = "" if self.way == MEMCPY else _difference(llm, fresh[trainer.version])
        except Exception as exc:
            if isinstance(exc, SyncError):
                raise
            # Ray's errors hold the actor's traceback, and what was raised on the last line.
            last = (str(exc).splitlines() or [""])[-1]
            self.wrong = " ".join(f"{type(exc).__name__}: {last}".split())[:200]
        if self.wrong:
            ours = next(way for way in ways if way.startswith(OURS))
            if self.way == ours:
                raise SyncError(f"{self.name}: {self.wrong}")
            ways[ours]()  # what the next way leaves out is right


Digests = dict[str, str]


def measure(
    config: Path,
    *,
    kernels: Kernels = "packed",
    engines: Collection[str],
    rounds: int = 5,
    note: Callable[[str], None] = lambda text: None,
) -> Compared:
    """Measure for a model of this shape, with random weights in bfloat16.

    It changes this process for good: vLLM is started in it, with these kernels.

    Args:
        config: a transformers `config.json`.
        kernels: of vLLM on a CPU; on a GPU it makes no difference. packed: as vLLM starts there,
            with weights packed into handles of its kernels. plain: parameters are used as they are,
            as unquantised GPU kernels do.
        engines: some of process, server, ray and colocate. Without Ray, ray is left out where
            there are others.
        note: told what is being done.

    Raises:
        SyncError: a sync of ours failed, or left other weights.
    """
    if kernels == "plain":
        os.environ[KERNELS_VARIABLE] = kernels
        use_plain_kernels()
    found = Compared(rounds=rounds, kernels=kernels)
    found.machine = {
        "versions": versions(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
    }
    with TemporaryDirectory(prefix="qerl_sync-bench-") as directory:
        note("making the model")
        trainer = _Trainer(make_model(config))
        found.nbytes = sum(meta.nbytes for meta in trainer.metas)
        for version in range(2):  # afterwards the trainer has version 0 again
            path = trainer.checkpoints[version] = f"{directory}/{version}"
            save(trainer.model, path)
            trainer.step()
        comparison = _Comparison(trainer, rounds, note)
        for places, start in _engines(engines, found.nbytes):
            found.rows += comparison.run(places, start)
    found.machine["load_after"] = os.getloadavg()[0]
    clock = comparison.clock
    found.seconds = clock.medians()
    for row in found.rows:
        for to in (MEMCPY, LOAD_ALONE):
            if len(clock.seconds.get(row.name, ())) == rounds:
                ratio = clock.ratio(row.name, f"{row.engine}: {to}")
                found.ratios[f"{row.name} / {to}"] = ratio
    return found


class _Comparison:
    """Measures the ways to one engine after the other, against fresh engines of both versions."""

    def __init__(self, trainer: _Trainer, rounds: int, note: Callable[[str], None]) -> None:
        self.clock = Rounds()
        self._trainer, self._rounds, self._note = trainer, rounds, note
        self._memory = PrivateMemory(offsets(trainer.metas)[1])
        self._fresh: list[Digests] = []

    def run(self, places: Sequence[str], start: Start) -> list[Row]:
        """Return the rows of these places. The engine's memory is free when this returns."""
        trainer, found = self._trainer, list[Row]()
        self._note(f"starting vLLM ({places[0]})")
        if not self._fresh:
            self._fresh = [_digests_of_fresh(start, trainer.checkpoints[1])]
        with start(trainer.checkpoints[0]) as llm:
            self._fresh = [_digests(llm), self._fresh[-1]]
            if trainer.version == 1:
                trainer.step()
            for where in places:
                with ExitStack() as stack:
                    ways: Ways = {
                        MEMCPY: partial(copy_seconds, trainer.source, self._memory),
                        LOAD_ALONE: partial(_load_alone, llm, trainer),
                        **_ways(where, llm, trainer, stack),
                    }
                    rows = [Row(where, way) for way in ways]
                    for number in range(self._rounds + 1):
                        self._note(f"{where}: round {number} of {self._rounds}")
                        for row in rows:
                            clock = self.clock if number else None
                            row.run(ways, llm, trainer, self._fresh, clock)
                found += rows
        return found


def to_markdown(found: Compared) -> str:
    """Return the results as a Markdown table."""
    machine = found.machine
    packages = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"{found.nbytes / 1e9:.2f} GB in bfloat16, {found.kernels} kernels, medians of "
        f"{found.rounds} rounds. {machine['cores']} cores ({machine['platform']}), load "
        f"{machine['load_before']:.1f} before and {machine['load_after']:.1f} after; {packages}.",
        "",
        f"| engine | way | ms | x {MEMCPY} | x load alone | weights afterwards |",
        "|---|---|---:|---:|---:|---|",
    ]
    for row in found.rows:
        cells = (cell.replace("|", "\\|") for cell in found.cells(row))
        lines.append(f"| {row.engine} | {row.way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _colocated(llm: Any, trainer: _Trainer, stack: ExitStack) -> Ways:
    """Return the ways to an engine in this process."""
    from qerl_sync.worker.compat import engine as compat

    parts = compat.in_process_parts(llm)

    def load_weights() -> None:
        with compat.loading_context(parts.vllm_config):
            parts.model.load_weights(trainer.tensors())  # type: ignore[operator]

    def as_trl() -> None:
        # trl.generation.vllm_generation.VLLMGeneration.sync_weights, mode colocate
        for item in trainer.tensors():
            parts.model.load_weights([item])  # type: ignore[operator]
        llm.reset_prefix_cache()

    push = partial(_push, trainer, stack, llm=llm)
    return {
        OURS: push(),
        f"{OURS}, unchecked": push(check_finite=False, on_unchanged="ignore"),
        f"{OURS}, load: layerwise": push(load="layerwise"),
        "vLLM's load_weights, live": load_weights,
        "TRL's colocate sync: load_weights for each tensor": as_trl,
        "vLLM's layerwise reload from memory": lambda: llm.collective_rpc(
            "bench_load", args=(trainer.tensors(),)
        ),
        FILE: _by_file(llm, trainer, stack),
    }


def _ways(where: str, llm: Any, trainer: _Trainer, stack: ExitStack) -> Ways:
    """Return the ways to an engine that runs there."""
    if where == COLOCATE:
        return _colocated(llm, trainer, stack)
    push = partial(_push, trainer, stack, transport="tcp" if where == OVER_TCP else "shm")
    if where == OVER_TCP:
        return {TCP: push(llm=llm)}
    if where == SHARED:
        trainer.memory = share_parameters(trainer.model)  # from here on
        return {SHM: push(llm=llm)}
    if where == ACTOR:
        config = SyncConfig(transport="shm")
        session = SyncSession(trainer.source, llm.pool.transport(config), config)
        return {
            SHM: stack.enter_context(session).push,
            STORE: lambda: llm.load(dict(trainer.tensors())),
        }
    by_file = _by_file(llm, trainer, stack)
    if where == SERVER:
        return {SHM: push(server_url=llm.url), FILE: by_file}
    return {SHM: push(llm=llm), GLOO: _broadcast(llm, trainer, stack), FILE: by_file}


def _engines(wanted: Collection[str], nbytes: int) -> list[tuple[list[str], Start]]:
    """Return the places that each engine serves, and what starts it with a checkpoint."""
    found: dict[str, tuple[list[str], Start]] = {
        "process": ([OWN_PROCESS, OVER_TCP, SHARED], partial(_started, multiprocessing="1")),
        "server": ([SERVER], served),
        "ray": ([ACTOR], partial(in_actor, nbytes=nbytes)),
        # Last: vLLM leaves this process its cache of keys and values, and settings of threads.
        "colocate": ([COLOCATE], partial(_started, multiprocessing="0")),
    }
    if len(wanted) > 1 and find_spec("ray") is None:
        del found["ray"]
    return [engine for name, engine in found.items() if name in wanted]


def _push(
    trainer: _Trainer,
    stack: ExitStack,
    *,
    llm: Any = None,
    server_url: str | None = None,
    **options: Any,
) -> Callable[[], object]:
    """Return the push of a session to that engine, until the end of `stack`."""
    sync = SyncConfig.of(**options)
    session = make_session(trainer.source, sync, llm=llm, server_url=server_url)
    return stack.enter_context(session).push


def _load_alone(llm: Any, trainer: _Trainer) -> float:
    """Have the worker load tensors that lie in its memory. Return its own seconds."""
    checkpoint = f"{trainer.checkpoints[trainer.version]}/model.safetensors"
    order = [meta.name for meta in trainer.metas]
    (seconds,) = llm.collective_rpc("bench_load_alone", args=(checkpoint, order))
    return float(seconds)


def _by_file(llm: Any, trainer: _Trainer, stack: ExitStack) -> Callable[[], None]:
    """Return what writes a checkpoint to shared memory, and has vLLM reload it."""
    from safetensors.torch import save_file

    prefix = "qerl_sync-bench-"
    directory = stack.enter_context(TemporaryDirectory(prefix=prefix, dir=DIRECTORY))

    def by_file() -> None:
        save_file(dict(trainer.tensors()), f"{directory}/model.safetensors")
        llm.collective_rpc("reload_weights", kwargs={"weights_path": directory})

    return by_file


def _broadcast(llm: Any, trainer: _Trainer, stack: ExitStack) -> Callable[[], None]:
    """Return what broadcasts each tensor to the worker by Gloo, as frameworks do by NCCL."""
    # The call waits in vLLM while this thread sends.
    calls = stack.enter_context(ThreadPoolExecutor(1))
    with socket.create_server(("127.0.0.1", 0)) as free:
        host, port = free.getsockname()
    joined = calls.submit(llm.collective_rpc, "bench_join", args=(host, port))
    group = gloo_group(host, port, 0)
    joined.result(CALL_SECONDS)

    def broadcast() -> None:
        metas = metas_to_json(trainer.metas)
        loaded = calls.submit(llm.collective_rpc, "bench_broadcast", args=(metas,))
        for _, tensor in trainer.tensors():
            group.broadcast(tensor, 0).wait()
        loaded.result(CALL_SECONDS)

    return broadcast


def _digests_of_fresh(start: Start, checkpoint: str) -> Digests:
    """Return what a fresh engine holds, and free it: no local of the caller refers to it."""
    with start(checkpoint) as llm:
        return _digests(llm)


def _digests(llm: Any) -> Digests:
    (found,) = llm.collective_rpc("bench_kernels")
    return dict(found)


def _difference(llm: Any, fresh: Digests) -> str:
    held = _digests(llm)
    wrong = [path for path, digest in fresh.items() if held.get(path) != digest]
    return f"{len(wrong)} of {len(fresh)} modules hold other weights: {wrong[0]}" if wrong else ""


@contextmanager
def _started(path: str, *, multiprocessing: str) -> Iterator[Any]:
    gc.collect()  # the engine before, which cycles hold
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = multiprocessing
    llm = start_engine(path)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
