"""Layer maps of small models, recorded from vLLM: planning tests need no probe.

    PYTHONPATH=.:tests python -m support.layer_maps     record them anew, with the installed vLLM

`test_offline_map.py` compares them with the installed vLLM's.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qerl_sync.offline import map_cache
from qerl_sync.offline.layer_map import cache_key, installed_vllm
from qerl_sync.plan.checkpoint import Checkpoint
from qerl_sync.plan.offline_map import OfflineMap

FILE = Path(__file__).with_name("layer_maps.json")

MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "attention_bias": False,
    "tie_word_embeddings": False,
}
DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 258,
    "dtype": "float32",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}

# Configurations, and the trainer's dtype where it is not the configuration's.
MODELS: dict[str, tuple[dict[str, Any], str | None]] = {
    "moe": (MOE, None),
    "moe in float32": (MOE, "float32"),
    "moe of two blocks": ({**MOE, "num_hidden_layers": 2}, None),
    "dense": (DENSE, None),
}


@functools.cache
def recorded() -> dict[str, OfflineMap]:
    content = json.loads(FILE.read_text(encoding="utf-8"))
    return {kind: OfflineMap.from_json(found) for kind, found in content.items()}


def keep_recorded_maps(engine: Mapping[str, Any] | None = None) -> None:
    """Put all recorded maps into the map cache, as if vLLM had been asked earlier.

    Args:
        engine: the engine arguments with which they will be asked for.
    """
    version = installed_vllm()
    assert version is not None
    for kind, (config, dtype) in MODELS.items():
        checkpoint = Checkpoint(Path(kind), config, shards=[], metas=None, names_by_offset=None)
        for told in {dtype, dtype or config["dtype"]}:
            key = cache_key(checkpoint, engine or {}, told, version)
            map_cache.store(map_cache.cache_file(key), recorded()[kind])


def main() -> None:
    from support.probes import observe_all

    observed = observe_all({kind: (c, {}, dtype) for kind, (c, dtype) in MODELS.items()})
    lines = []
    for kind, found in observed.items():
        assert isinstance(found, OfflineMap), found
        content = {**found.to_json(), "seconds": {}}
        lines.append(f"{json.dumps(kind)}:{json.dumps(content, separators=(',', ':'))}")
    FILE.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
