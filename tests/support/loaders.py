"""Workers without vLLM: what they are told goes through the real connection, session and
transports, into a model that is a dictionary."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from qerl_sync import Source, SyncConfig, SyncError, SyncSession, __version__
from qerl_sync.buffers.trace import Trace
from qerl_sync.build import remote_transport
from qerl_sync.meta import ParamMeta
from qerl_sync.options import MapOptions, SyncOptions
from qerl_sync.plan.layer_map import Contribution, LayerMap, ParentLayer
from qerl_sync.plan.simulator import replay
from qerl_sync.plan.sync_plan import Chunk, SyncPlan
from qerl_sync.verify.checksum import checksum
from qerl_sync.wire import messages as say
from qerl_sync.wire.endpoints import Listener, connect
from qerl_sync.wire.host import host_id
from qerl_sync.worker.load.footprint import LoadCosts
from qerl_sync.worker.protocol.session import WorkerSession

CPU = torch.device("cpu")
# No test waits for it: what it would end is noticed long before.
TIMEOUT_SECONDS = 20.0
# What a first call says of its trainer (`wire.messages.TrainerSession`).
CALLER = {"id": "a", "host": "here", "pid": 1, "since": "2026-01-01T00:00:00+00:00"}


def tensors(version: int, count: int = 6, numel: int = 100) -> dict[str, torch.Tensor]:
    """Odd sizes: nothing is aligned by itself."""
    generator = torch.Generator().manual_seed(version)
    return {f"layer.{i}.weight": torch.randn(numel + i, generator=generator) for i in range(count)}


OLD, NEW = tensors(0), tensors(1)


class TensorSource(Source):
    """A dictionary of tensors."""

    def __init__(self, held: Mapping[str, torch.Tensor]) -> None:
        self.held = dict(held)

    def metadata(self) -> list[ParamMeta]:
        return [
            ParamMeta(n, str(t.dtype).removeprefix("torch."), tuple(t.shape))
            for n, t in self.held.items()
        ]

    def materialize(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, self.held[name]) for name in names)


class HashedSource(TensorSource):
    """One that says which of them have changed."""

    stamps_content = True

    def content_stamps(self) -> dict[str, int]:
        return {name: checksum(tensor) for name, tensor in self.held.items()}


class KeepingLoader:
    """A worker.protocol.session.Loader. Each tensor is a parent layer of its own."""

    def __init__(self, held: Mapping[str, torch.Tensor]) -> None:
        self.serving = dict(held)
        self.version = 0
        self.poisoned: str | None = None
        self.costs = LoadCosts()
        self.quantisation = {}
        self.before_load = lambda: None
        self.started = 0

    def layer_map(self, metas: Sequence[ParamMeta], options: MapOptions) -> LayerMap:
        layers = {m.name: ParentLayer(m.name, "Linear", m.numel, m.numel) for m in metas}
        given = {m.name: (Contribution(m.name, "w", m.numel, m.nbytes, True),) for m in metas}
        return LayerMap(layers, given)

    def free_bytes(self) -> int:
        return 1 << 30

    def start(
        self, plan: SyncPlan, layer_map: LayerMap, options: SyncOptions, *, borrowed: bool
    ) -> None:
        self.started += 1
        self.options = options
        self.poisoned = "a sync is in progress"
        self._plan, self._layer_map = plan, layer_map
        self._arrived: dict[str, torch.Tensor] = {}

    def receive(self, chunk: Chunk, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.before_load()
        self._arrived |= {name: tensor.clone() for name, tensor in tensors}

    def finish(self) -> Trace:
        self.serving = self._arrived
        return replay(self._plan.metas, self._layer_map)

    def commit(self, version: int, *, keep_old: bool) -> bool:
        if version <= self.version:
            reason = f"version {version} was to follow {self.version}"
            self.abort(reason, keep_old=keep_old)
            raise SyncError(reason)
        self.version, self.poisoned = version, None
        return False

    def abort(self, reason: str, *, keep_old: bool = True) -> None:
        if self.poisoned is not None:
            self.poisoned = reason

    def poison(self, reason: str) -> None:
        self.poisoned = reason

    def has(self, wanted: Mapping[str, torch.Tensor]) -> bool:
        """Equal to the bit, and serving."""
        same = all(self.serving[name].equal(tensor) for name, tensor in wanted.items())
        return same and self.poisoned is None and len(self.serving) == len(wanted)


class Workers:
    """An engine of as many ranks as there are loaders, and its client.

    It runs each call on all ranks at once and raises what the last one raises, as vLLM would.
    """

    def __init__(self, *loaders: KeepingLoader, **said: Any) -> None:
        self.loaders = loaders
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._said = said
        self._pool = ThreadPoolExecutor()
        self.connections = [
            WorkerSession(loader, CPU, self._hello(rank)) for rank, loader in enumerate(loaders)
        ]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append(("init", init_info))
        self._on_all("open", init_info)

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.calls.append(("update", update_info))
        self._on_all("serve", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        self._pool.shutdown()

    def calls_of(self, what: str) -> list[dict[str, Any]]:
        """What was said in each call of that kind."""
        return [said for kind, said in self.calls if kind == what]

    def _on_all(self, method: str, info: dict[str, Any]) -> None:
        # JSON in between, as over HTTP.
        futures = [
            self._pool.submit(getattr(connection, method), dict(info))
            for connection in self.connections
        ]
        errors = [future.exception() for future in futures]
        if errors[-1] is not None:
            raise errors[-1]

    def _hello(self, rank: int) -> Any:
        def hello() -> say.Hello:
            loader = self.loaders[rank]
            reported: dict[str, Any] = {
                "protocol": say.PROTOCOL,
                "packages": {"qerl-sync": __version__, "torch": str(torch.__version__)},
                "engine": "test",
                "rank": rank,
                "world_size": len(self.loaders),
                "layout": {"tensor_parallel_size": len(self.loaders)},
                "model": "Dictionary",
                "dtype": "float32",
                "quantization": None,
                "host": host_id(),
                "pid": os.getpid(),
                "version": loader.version,
                "poisoned": loader.poisoned,
                "update_open": False,
            }
            own = self._said.get(f"rank{rank}", {})
            return say.Hello(**{**reported, **own})

        return hello


def session(engine: Any, held: Mapping[str, torch.Tensor] = NEW, **options: Any) -> SyncSession:
    """A session that sends `held` to the engine, a tensor a chunk."""
    sync = SyncConfig.of(**{"chunk_bytes": 500, "timeout_seconds": TIMEOUT_SECONDS, **options})
    return SyncSession(TensorSource(held), remote_transport(sync, engine), sync)


def serves(engine: Workers, version: Mapping[str, torch.Tensor]) -> bool:
    return all(loader.has(version) for loader in engine.loaders)


def lets_in(listener: Listener) -> bool:
    """Whether a worker that knows the token gets in."""
    with connect("127.0.0.1", listener.port, "secret", 5) as worker:
        trainer = listener.accept(5)
        assert trainer is not None
        with trainer:
            worker.send(say.End(), 5)
            return isinstance(trainer.receive(5, "a word"), say.End)


def threads() -> set[str]:
    """Names of this process's threads that belong to qerl-sync."""
    return {t.name for t in threading.enumerate() if t.name.startswith("qerl-sync")}
