"""Speed of the core on a Qwen3-0.6B shape (0.6B parameters, bf16, random) in a real engine.

scripts/bench benchmarks/test_core_speed.py -s
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from support.engines import start_engine

from qerl_sync import HFSource
from qerl_sync.meta import ParamMeta
from qerl_sync.options import SyncOptions
from qerl_sync.plan.sync_plan import build_plan
from qerl_sync.worker.compat import engine as compat
from qerl_sync.worker.load.monitor import SyncMonitor
from qerl_sync.worker.load.observe import observe_layer_map
from qerl_sync.worker.load.receiver import Receiver

QWEN3_06B = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> compat.EngineParts:
    directory = tmp_path_factory.mktemp("qwen3-0.6b")
    config = tf.Qwen3Config(**QWEN3_06B, architectures=["Qwen3ForCausalLM"], dtype="bfloat16")
    config.save_pretrained(directory)
    return compat.in_process_parts(
        start_engine(directory, load_format="dummy", dtype="bfloat16", max_num_seqs=1)
    )


@pytest.fixture(scope="module")
def metas() -> list[ParamMeta]:
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(
            tf.Qwen3Config(**QWEN3_06B), dtype=torch.bfloat16
        )
    return HFSource(model).metadata()


def median_seconds(run: Callable[[], Any], rounds: int = 5) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def test_probe(parts, metas):
    seconds = median_seconds(lambda: observe_layer_map(parts.model, parts.vllm_config, metas))
    print(f"\nprobe of {len(metas)} tensors: {1000 * seconds:.0f} ms (target 200)")
    assert seconds <= 0.2


class Recorder(SyncMonitor):
    """A monitor that remembers its events and what each cost."""

    seconds = 0.0

    def begin(self, name):
        self._clocked(super().begin, name)

    def held(self, *event):
        self._clocked(super().held, *event)

    def processed(self, layer):
        self._clocked(super().processed, layer)

    def _clocked(self, method, *event):
        start = time.perf_counter()
        method(*event)
        self.seconds += time.perf_counter() - start


def test_ledger_and_detector_cost_little_beside_the_load(parts, metas, monkeypatch):
    """Their own time, clocked inside real loads, against those loads without them: the share can be
    told to a hundredth of a percent, which two noisy load times beside each other cannot."""
    from qerl_sync.worker.load import receiver

    tensors = {m.name: torch.randn(m.shape, dtype=torch.bfloat16) * 0.02 for m in metas}
    layer_map = observe_layer_map(parts.model, parts.vllm_config, metas)
    plan = build_plan(metas, layer_map, "reorder")
    (chunk,) = plan.chunks

    def watched() -> None:
        one = Receiver(parts)
        one.start(plan, layer_map, SyncOptions(finite_check="nobody"))
        one.receive(chunk, ((name, tensors[name]) for name in plan.order))
        assert one.finish() == plan.predicted
        one.commit(1)

    def unwatched() -> None:
        with compat.loading_context(parts.vllm_config):
            compat.begin_reload(parts.model)
            parts.model.load_weights((name, tensors[name]) for name in plan.order)
            compat.finish_reload(parts.model, parts.vllm_config)

    watched(), unwatched()
    recorders: list[Recorder] = []

    def make(*arguments: Any, **options: Any) -> Recorder:
        recorders.append(Recorder(*arguments, **options))
        return recorders[-1]

    rounds = [(median_seconds(unwatched, 1), median_seconds(watched, 1)) for _ in range(7)]
    monkeypatch.setattr(receiver, "SyncMonitor", make)
    for _ in range(3):
        watched()
    load = statistics.median(seconds for seconds, _ in rounds)
    own = statistics.median(recorder.seconds for recorder in recorders)
    ratio = statistics.median(w / u for u, w in rounds)
    print(
        f"\nload of {plan.nbytes / 2**30:.2f} GiB: {load:.2f} s; ledger and detector: "
        f"{1000 * own:.1f} ms = {own / load:.2%} (target 2%); whole receiver against bare load, "
        f"median of {len(rounds)} pairs: x{ratio:.3f}"
    )
    assert own / load <= 0.02


def test_import_is_cheap():
    code = "import time; t = time.perf_counter(); import qerl_sync; print(time.perf_counter() - t)"
    run = [sys.executable, "-c", code]
    seconds = min(float(subprocess.check_output(run, text=True)) for _ in range(5))
    print(f"\nimport qerl_sync: {1000 * seconds:.0f} ms (target 300)")
    assert seconds <= 0.3
