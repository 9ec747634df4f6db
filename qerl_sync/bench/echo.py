"""Run a worker that loads nothing in its own process, to measure a transport alone.

Connection, worker session and chunk receivers are the real ones; only vLLM and its loaders are
missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from typing_extensions import Self

from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import PeerLostError, TransportError
from qerl_sync.meta import ParamMeta
from qerl_sync.options import MapOptions, SyncOptions
from qerl_sync.plan.adapter import Adapter
from qerl_sync.plan.layer_map import Contribution, LayerMap, ParentLayer
from qerl_sync.plan.simulator import replay
from qerl_sync.plan.sync_plan import Chunk, SyncPlan
from qerl_sync.sources.base import Source
from qerl_sync.wire import cuda_memory
from qerl_sync.wire import messages as say
from qerl_sync.wire.host import host_id
from qerl_sync.worker.load.footprint import LoadCosts

CPU = torch.device("cpu")


class EchoLoader:
    """Count tensors and drop them. Implement `Loader`; each tensor is a layer of its own."""

    poisoned = None

    def __init__(self) -> None:
        self.costs = LoadCosts()
        self.quantisation: dict[str, Any] = {}
        self.check = False
        self.checksums: dict[str, int] = {}

    def layer_map(self, metas: Sequence[ParamMeta], options: MapOptions) -> LayerMap:
        return LayerMap(
            {m.name: ParentLayer(m.name, "Echo", m.numel, m.numel) for m in metas},
            {m.name: (Contribution(m.name, "", m.numel, m.nbytes, True),) for m in metas},
        )

    def require_adapter(self, adapter: Adapter) -> None:
        """Do nothing: the echo worker serves no requests."""

    def free_bytes(self) -> int:
        return 1 << 40

    def start(
        self, plan: SyncPlan, layer_map: LayerMap, options: SyncOptions, *, borrowed: bool
    ) -> None:
        self._trace = replay(plan.base_metas, layer_map)
        self.checksums = {}

    def receive(self, chunk: Chunk, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            if self.check:
                self.checksums[name] = checksum(tensor)

    def finish(self) -> Trace:
        return self._trace

    def commit(self, version: int, *, keep_old: bool) -> bool:
        return False

    def poison(self, reason: str) -> None:
        """Do nothing: the echo worker serves no requests."""

    def abort(self, reason: str, *, keep_old: bool) -> None:
        pass


def checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def checksums(source: Source) -> dict[str, int]:
    """Return the checksums that a worker has of all of the source's tensors when they are there."""
    names = [meta.name for meta in source.metadata()]
    return {name: checksum(tensor) for name, tensor in source.materialize(names)}


class EchoWorker:
    """Start the echo worker's process and act as its EngineClient. Leaving the context ends the
    process.

    Args:
        device: that the worker says it is on.
        module: what the process runs.
    """

    def __init__(self, device: str = "cpu", module: str = "qerl_sync.bench.echo") -> None:
        self._command = [sys.executable, "-m", module, device]

    def __enter__(self) -> Self:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True)
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._process.communicate(timeout=10)  # it ends with its input
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("open", init_info)

    def start_weight_update(self) -> None:
        """Do nothing: the echo worker has nothing to prepare."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("serve", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Do nothing: the echo worker has nothing to finish."""

    def check(self, wanted: bool) -> None:
        """Switch the checksums of received tensors on or off."""
        self._call("check", wanted)

    def checksums(self) -> dict[str, int]:
        """Return the checksums of the last sync's tensors."""
        return dict(self._call("checksums", None))

    def kill(self) -> None:
        """End the process as the kernel would when memory is short."""
        self._process.kill()

    def _call(self, method: str, argument: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([method, argument]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise PeerLostError(f"the echo worker (pid {self._process.pid}) died")
        error, result = json.loads(answer)
        if error is not None:
            raise TransportError(f"the echo worker refuses: {error}")
        return result


def main(loader: EchoLoader, device: torch.device) -> None:
    from qerl_sync.worker.protocol.session import WorkerSession

    connection = WorkerSession(loader, device, lambda: hello(device))

    def check(wanted: bool) -> None:
        loader.check = wanted

    methods: dict[str, Callable[[Any], Any]] = {
        "open": connection.open,
        "serve": connection.serve,
        "check": check,
        "checksums": lambda _: loader.checksums,
    }
    for line in sys.stdin:
        method, argument = json.loads(line)
        try:
            answer = [None, methods[method](argument)]
        except Exception as exc:
            answer = [f"{type(exc).__name__}: {exc}", None]
        print(json.dumps(answer), flush=True)


def hello(device: torch.device = CPU) -> say.Hello:
    from qerl_sync import __version__

    return say.Hello(
        protocol=say.PROTOCOL,
        packages={"qerl-sync": __version__},
        engine="echo",
        rank=0,
        world_size=1,
        layout={},
        model="Echo",
        dtype="",
        quantization=None,
        host=host_id(),
        pid=os.getpid(),
        device_uuid=cuda_memory.device_uuid(device),
        version=0,
        poisoned=None,
        update_open=False,
    )


if __name__ == "__main__":
    main(EchoLoader(), torch.device(sys.argv[1]))
