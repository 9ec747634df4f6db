"""Hypothesis strategies: layer maps and streams of metadata, with all that makes them awkward."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import strategies as st

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
