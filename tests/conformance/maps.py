"""`scripts/layer-maps`: record where tensors land (qerl_sync/plan/layer_maps.json).

Each architecture is observed at two sizes. What the smaller one shows becomes patterns, which are
kept if they give the larger one's map.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from conformance.families import architectures, small_config
from conformance.processors import save_processor
from qerl_sync.errors import SyncError
from qerl_sync.plan.checkpoint import read_checkpoint
from qerl_sync.plan.offline_map import OfflineMap
from qerl_sync.plan.recorded_map import (
    FILE,
    VOCABULARY_STEP,
    Landing,
    LayerKind,
    RecordedMap,
    generalised,
)

ENGINE = {"max_model_len": 64, "dtype": "float32"}
LARGER = {
    "vocab_size": 330,  # no multiple of 64: padding shows
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_intermediate_size": 160,
}


def main(names: list[str]) -> int:
    """Record the architectures of these names, or all. Those of others stay as they are."""
    before = json.loads(FILE.read_text("utf-8"))
    recorded: dict[str, Any] = before["architectures"] if names else {}
    version = before["vllm"] if names else ""
    for architecture in names or architectures():
        try:
            small, larger = (observed(architecture, sizes) for sizes in ({}, LARGER))
            found = learnt(small)
            differs = difference(found, larger)
        except Exception as exc:  # transformers and vLLM refuse configurations in many ways
            differs = f"{type(exc).__name__}: {exc}"
        if not differs:
            recorded[architecture], version = found.to_json(), small.vllm_version
        print(f"{architecture}: {differs or 'recorded'}"[:200], file=sys.stderr, flush=True)
    lines = [f"{json.dumps(name)}: {json.dumps(data)}" for name, data in sorted(recorded.items())]
    body = ",\n".join(lines)
    FILE.write_text(f'{{"vllm": "{version}", "architectures": {{\n{body}\n}}}}\n', "utf-8")
    return 0


def observed(architecture: str, sizes: Mapping[str, Any]) -> OfflineMap:
    """Ask vLLM's model class, in this process.

    Raises:
        SyncError: vLLM or transformers does not take it.
    """
    from qerl_sync.offline.program import observe

    config = small_config(architecture, sizes)
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        arguments = {}
        with suppress(ImportError, TypeError):  # of a package that is missing
            arguments = save_processor(config, Path(directory))
        checkpoint = read_checkpoint(directory)
        engine = {**ENGINE, **arguments, "skip_tokenizer_init": True}
        request = {"checkpoint": checkpoint, "engine": engine, "dtype": "float32"}
        return observe(request)


def learnt(seen: OfflineMap) -> RecordedMap:
    """Return the patterns of an observed map.

    Raises:
        SyncError: it has none: a tensor lands in parts, or tensors of one pattern land differently.
    """
    metas = {meta.name: meta for meta in seen.metas}
    tensors: dict[str, tuple[Landing, ...]] = {}
    layers: dict[str, LayerKind] = {}
    for name, contributions in seen.layer_map.contributions.items():
        pattern, numbers = generalised(name)
        landings = []
        for one in contributions:
            layer, own = generalised(one.parent_layer)
            whole = (metas[name].numel, metas[name].nbytes) == (one.loaded_numel, one.held_bytes)
            if own != numbers[: len(own)] or not whole:
                raise SyncError(f"{name} lands in {one}")
            landings.append(Landing(layer, one.parameter, one.aliases_source))
            there = seen.layer_map.layers[one.parent_layer]
            rows = metas[name].shape[0] if metas[name].shape else 0
            padded = there.total_numel != there.expected_numel
            kind = LayerKind(
                there.kind, "Vocab" in there.kind or "LMHead" in there.kind, there.deferred
            )
            if padded and not (kind.padded and rows % VOCABULARY_STEP):
                raise SyncError(f"{there} is padded")
            if layers.setdefault(layer, kind) != kind:
                raise SyncError(f"{layer} is {layers[layer]} and {kind}")
        if tensors.setdefault(pattern, tuple(landings)) != tuple(landings):
            raise SyncError(f"{pattern} lands in {tensors[pattern]} and {landings}")
    return RecordedMap(tensors, layers)


def difference(recorded: RecordedMap, seen: OfflineMap) -> str:
    """Return what a recorded map has otherwise than an observed one; "" if nothing.

    Layers that no tensor lands in are left out: nothing of a sync depends on them.
    """
    made = recorded.layer_map(seen.metas)
    for name, contributions in seen.layer_map.contributions.items():
        if made.contributions[name] != contributions:
            return f"{name}: {made.contributions[name]}, observed {contributions}"
    for layer in made.layers:
        # How often loaders are called matters only where a layer is written in place.
        if made.layers[layer] != replace(seen.layer_map.layers[layer], num_loads=0):
            return f"{made.layers[layer]}, observed {seen.layer_map.layers[layer]}"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
