"""Hypothesis strategies: layer maps and streams of metadata, with all that makes them awkward."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from hypothesis import strategies as st

from qerl_sync.buffers.ledger import BufferLedger
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.plan.layer_map import Contribution, LayerMap, ParentLayer

LAYERS = [f"model.layers.{i}.{part}" for i in range(3) for part in ("qkv_proj", "norm")]


@st.composite
def streams(draw: st.DrawFn, *, shared: bool = True) -> tuple[list[ParamMeta], LayerMap]:
    """A stream in source order and its layer map.

    With `shared`, a tensor may land in several layers or in none, be copied by its loader, and
    layers may be deferred or padded.
    """
    count = draw(st.integers(1, 12))
    metas, contributions = [], {}
    expected: dict[str, int] = defaultdict(int)
    for i in range(count):
        meta = ParamMeta(f"tensor.{i}", "bfloat16", (draw(st.integers(1, 8)),))
        sizes = st.integers(0 if shared else 1, 2 if shared else 1)
        parents = draw(st.permutations(LAYERS))[: draw(sizes)]
        contributions[meta.name] = tuple(
            Contribution(
                layer, "weight", meta.numel, meta.nbytes, not shared or draw(st.booleans())
            )
            for layer in parents
        )
        for layer in parents:
            expected[layer] += meta.numel
        metas.append(meta)
    layers = {
        name: ParentLayer(
            name=name,
            kind="Linear",
            total_numel=expected[name] + (draw(st.integers(0, 3)) if shared else 0),
            expected_numel=expected[name],
            deferred=shared and draw(st.booleans()) and name.endswith("norm"),
        )
        for name in LAYERS
    }
    return metas, LayerMap(layers, contributions)


@st.composite
def storages(draw: st.DrawFn, metas: list[ParamMeta]) -> dict[str, Storage]:
    """Some tensors share a storage, which is larger than any of them; some have their own."""
    chosen = {}
    for meta in metas:
        key = draw(st.one_of(st.none(), st.integers(0, 2)))
        if key is not None:
            chosen[meta.name] = Storage(key, 1000 * (key + 1))
    return chosen


def mixture(count: int, experts: int = 128) -> tuple[list[ParamMeta], LayerMap]:
    """A mixture of experts of about `count` tensors; without experts a dense model."""
    metas: list[ParamMeta] = []
    contributions: dict[str, tuple[Contribution, ...]] = {}
    layers: dict[str, ParentLayer] = {}

    def add(layer: str, kind: str, *tensors: tuple[str, tuple[int, ...]]) -> None:
        for name, shape in tensors:
            meta = ParamMeta(f"{name}.weight", "bfloat16", shape)
            metas.append(meta)
            contributions[meta.name] = (
                Contribution(layer, "weight", meta.numel, meta.nbytes, True),
            )
        total = sum(meta.numel for meta in metas[-len(tensors) :])
        layers[layer] = ParentLayer(layer, kind, total, total)

    block = 0
    while len(metas) < count:
        at = f"model.layers.{block}"
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        block += 1
        rows = {"q": 4096, "k": 512, "v": 512}
        qkv = [(f"{attention}.{one}_proj", (rows[one], 2048)) for one in "qkv"]
        add(f"{at}.input_layernorm", "RMSNorm", (f"{at}.input_layernorm", (2048,)))
        add(f"{attention}.qkv_proj", "QKVParallelLinear", *qkv)
        add(f"{attention}.o_proj", "RowParallelLinear", (f"{attention}.o_proj", (2048, 4096)))
        wide = [f"{mlp}.experts.{e}" for e in range(experts)] or [mlp]
        up = [(f"{one}.{part}_proj", (768, 2048)) for one in wide for part in ("gate", "up")]
        down = [(f"{one}.down_proj", (2048, 768)) for one in wide]
        if experts:
            add(f"{mlp}.experts", "FusedMoE", *up, *down)
        else:
            add(f"{mlp}.gate_up_proj", "MergedColumnParallelLinear", *up)
            add(f"{mlp}.down_proj", "RowParallelLinear", *down)
    return metas, LayerMap(layers, contributions)


class LedgerReplay:
    """Feeds a ledger with what vLLM's layerwise reload would do, event by event.

    The reference for `plan.simulator`, which does the same in one flat loop.
    """

    def __init__(
        self,
        layer_map: LayerMap,
        storages: Mapping[str, Storage],
        ledger: BufferLedger | None = None,
    ) -> None:
        self._map, self._storages = layer_map, storages
        self.ledger = ledger or BufferLedger()
        self.loaded: Counter[str] = Counter()
        self.held: Counter[str] = Counter()  # in the order of opening
        self._closed: set[str] = set()

    def feed(self, meta: ParamMeta, *, release: bool = True) -> None:
        """Hand over one tensor. `release=False` stops before the layers it completes are freed."""
        self.ledger.begin(meta.name)
        source = self._storages.get(meta.name) or Storage(meta.name, meta.nbytes)
        for i, c in enumerate(self._map.contributions[meta.name]):
            if c.parent_layer in self._closed:
                continue  # vLLM drops what arrives for a layer that is done ("excessive loading")
            layer = self._map.layers[c.parent_layer]
            storage = source if c.aliases_source else Storage(f"{meta.name}#{i}", c.held_bytes)
            self.ledger.hold(layer.name, c.held_bytes, (storage,), deferred=layer.deferred)
            self.held[layer.name] += c.held_bytes
            self.loaded[layer.name] += c.loaded_numel
            whole = self.loaded[layer.name] >= layer.closes_at_numel
            if whole and release and not layer.deferred:
                self.ledger.release(layer.name)
                self._closed.add(layer.name)
                del self.held[layer.name]
