"""A source and a transport without vLLM: two layers of three tensors, loaded into nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType

import torch

from qerl_sync import Source
from qerl_sync.buffers.detect import require_finite
from qerl_sync.buffers.ledger import BufferLedger
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.plan.layer_map import Contribution, LayerMap, ParentLayer
from qerl_sync.transports.base import SyncResult, Transport, WorkerReport

QKV = [[ParamMeta(f"{layer}.{part}", "float32", (4,)) for part in "qkv"] for layer in "ab"]


def interleave(layers: Sequence[Sequence[ParamMeta]]) -> list[ParamMeta]:
    return list(chain.from_iterable(zip(*layers, strict=True)))


class ListSource(Source):
    checks_finite = True

    def __init__(self, metas: list[ParamMeta]) -> None:
        self.metas = metas
        self.tensors = {meta.name: torch.zeros(meta.shape) for meta in metas}

    def metadata(self) -> list[ParamMeta]:
        return list(self.metas)

    def check_finite(self, names=None, *, alone=True) -> None:
        for name in self.tensors if names is None else names:
            require_finite(name, self.tensors[name])

    def materialize(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, self.tensors[name]) for name in names)


class HandMadeTransport(Transport):
    """Closes a layer when all its tensors have come; fails where it is told to."""

    by_reference = True
    chunk_bytes = None
    versions_now: Mapping[str, int] = MappingProxyType({})

    @property
    def versions(self) -> Mapping[str, int]:
        return self.versions_now

    def __init__(self) -> None:
        self.received: list[str] = []
        self.probed = 0
        self.started = self.aborted = self.miscount = False
        self.holding = False
        self.fail_at: int | None = None
        self.delay_seconds = 0.0
        self.refuse: Exception | None = None

    def layer_map(self, metas, options=None):
        self.probed += 1
        if self.refuse is not None:
            raise self.refuse
        contributions = {
            m.name: (Contribution(m.name[0], "weight", m.numel, m.nbytes, True),) for m in metas
        }
        numel = {a: sum(m.numel for m in metas if m.name[0] == a) for a in "ab"}
        return LayerMap(
            {a: ParentLayer(a, "Linear", n, n) for a, n in numel.items()}, contributions
        )

    def free_bytes(self) -> int:
        return 1 << 30

    def holds(self, version):
        return self.holding

    def start(self, plan, layer_map, options):
        self.options = options
        self._predicted = plan.predicted
        self.started, self.aborted, self.received = True, False, []
        self._map, self._ledger, self._loaded = layer_map, BufferLedger(), dict.fromkeys("ab", 0)

    def send(self, chunk, tensors):
        time.sleep(self.delay_seconds)
        for i, (name, tensor) in enumerate(tensors):
            if i == self.fail_at:
                raise ConnectionError("peer gone")
            self.received.append(name)
            layer = self._map.layers[name[0]]
            nbytes = tensor.nbytes + self.miscount
            self._ledger.begin(name)
            self._ledger.hold(layer.name, nbytes, [Storage(name, tensor.nbytes)])
            self._loaded[layer.name] += tensor.numel()
            if self._loaded[layer.name] >= layer.total_numel:
                self._ledger.release(layer.name)

    def finish(self) -> SyncResult:
        report = WorkerReport("worker 0", self._ledger.trace(), self._predicted)
        return SyncResult([report], kind="by hand")

    def abort(self, reason: str) -> None:
        self.aborted = True


def stacked_model(num_layers: int, width: int) -> tuple[list[ParamMeta], LayerMap]:
    """q, k, v in one parent layer, gate and up in one, the rest alone; bf16, in layer order."""
    parts = {
        "qkv_proj": {"q": (width, width), "k": (width // 4, width), "v": (width // 4, width)},
        "o_proj": {"o": (width, width)},
        "gate_up_proj": {"gate": (3 * width, width), "up": (3 * width, width)},
        "down_proj": {"down": (width, 3 * width)},
        "norm": {"norm": (width,)},
    }
    metas, contributions, layers = [], {}, {}
    for i in range(num_layers):
        for part, tensors in parts.items():
            layer = f"layers.{i}.{part}"
            for name, shape in tensors.items():
                meta = ParamMeta(f"layers.{i}.{name}.weight", "bfloat16", shape)
                metas.append(meta)
                contributions[meta.name] = (
                    Contribution(layer, "weight", meta.numel, meta.nbytes, True),
                )
            numel = sum(contributions[f"layers.{i}.{n}.weight"][0].loaded_numel for n in tensors)
            layers[layer] = ParentLayer(layer, "Linear", numel, numel)
    return metas, LayerMap(layers, contributions)
