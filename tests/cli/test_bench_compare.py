"""`qerl-sync bench compare`: what it times is what it checks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.forks import import_path

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(600)  # five engines
def test_tells_ways_that_leave_other_weights_from_those_that_do_not(tmp_path):
    """A CPU kernel's packed copy of a tied head is what vLLM's own ways forget."""
    config, picture, page = tmp_path / "tiny.json", tmp_path / "c.png", tmp_path / "c.md"
    config.write_text(json.dumps(TINY))
    command = [sys.executable, "-m", "qerl_sync.cli", "bench", "compare", str(config)]
    options = ["--rounds", "1", "--json", "--png", str(picture), "--markdown", str(page)]
    done = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        timeout=580,
        env={**os.environ, "PYTHONPATH": import_path()},
    )
    found = json.loads(done.stdout)
    assert done.returncode == (0 if all(target["met"] for target in found["targets"]) else 1)
    wrong = {(row["engine"], row["way"]): row["wrong"] for row in found["rows"]}
    ours = {key: text for key, text in wrong.items() if key[1].startswith("qerl-sync")}
    assert len(ours) == 8
    assert set(ours.values()) == {""}
    assert wrong["colocate", "vLLM's layerwise reload from memory"]
    for (engine, way), text in wrong.items():  # what raised was not timed
        assert ("Error" in text) == (f"{engine}: {way}" not in found["seconds"])
    assert picture.stat().st_size > 10_000
    assert page.read_text().count("| right |") == list(wrong.values()).count("") - 6
