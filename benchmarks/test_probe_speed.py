"""Layer maps without an engine: what vLLM's own model classes cost on the meta device.

    scripts/bench benchmarks/test_probe_speed.py

Prints a line for each model and asserts the targets. Times are those beyond vLLM's imports and
configuration, which are printed too; memory is that of the whole probing process. A machine that
does other things at the same time is slower: the better of two probes counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import pytest

from qerl_sync.offline.layer_map import offline_map

ROOT = Path(__file__).parent.parent
QWEN3_30B_A3B = ROOT / "configs" / "models" / "qwen3-30b-a3b.json"

# What differs in Qwen3-235B-A22B.
WIDER = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_hidden_layers": 94,
}

# A process that reports the high-water mark of its children, whose memory it waits for.
MEASURED = """
import json, resource, sys
from qerl_sync.offline.layer_map import offline_map
found = offline_map(sys.argv[1], cache=False)
peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
json.dump({"map": found.to_json(), "bytes": peak_kib * 1024}, sys.stdout)
"""

CACHED = """
import sys
from qerl_sync.offline.layer_map import offline_map
found = offline_map(sys.argv[1])
assert found.origin == "cache", found.origin
assert not {"torch", "vllm", "transformers"} & sys.modules.keys()
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("configs")
    config = json.loads(QWEN3_30B_A3B.read_text())
    (directory / "30b.json").write_text(json.dumps(config))
    (directory / "235b.json").write_text(json.dumps(config | WIDER))
    return directory


def python(program: str, *arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return run.stdout


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("size", "num_tensors", "limit_seconds"), [("30b", 18_867, 3), ("235b", 36_945, 10)]
)
def test_probe(models, size, num_tensors, limit_seconds):
    config = str(models / f"{size}.json")
    runs = [json.loads(python(MEASURED, config)) for _ in range(2)]
    seconds = [run["map"]["seconds"] for run in runs]
    ours = [s["names"] + s["build"] + s["probe"] for s in seconds]
    best, peak_bytes = seconds[ours.index(min(ours))], max(run["bytes"] for run in runs)
    parts = ", ".join(f"{part} {best[part]:.2f} s" for part in ("names", "build", "probe"))
    print(
        f"\n{size}: {num_tensors} tensors in {min(ours):.2f} s ({parts}), beyond imports "
        f"{best['imports']:.1f} s and config {best['config']:.2f} s; "
        f"{peak_bytes / 1024**2:.0f} MiB",
        end=" ",
    )
    found = runs[0]["map"]
    assert len(found["metas"]) == num_tensors
    for name, _, shape in found["metas"]:
        ((_, _, loaded_numel, _, aliases),) = found["layer_map"]["contributions"][name]
        assert (loaded_numel, aliases) == (prod(shape), True), name
    assert min(ours) <= limit_seconds
    assert peak_bytes < 1024**3


@pytest.mark.vllm
@pytest.mark.parametrize("size", ["30b", "235b"])
def test_second_time(models, size, tmp_path, monkeypatch):
    """The whole process, interpreter and imports included."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = str(models / f"{size}.json")
    assert offline_map(config).origin == "probe"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        python(CACHED, config)
        seconds.append(time.perf_counter() - start)
    print(f"\n{size}: {min(seconds):.2f} s from the cache", end=" ")
    assert min(seconds) <= 1
