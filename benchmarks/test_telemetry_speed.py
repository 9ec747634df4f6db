"""What recording a sync and counting it costs, beside the sync: a Qwen3-0.6B shape (1.1 GiB) in a
real engine of this process.

scripts/bench benchmarks/test_telemetry_speed.py
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from support.engines import start_engine

from qerl_sync import HFSource, InProcessTransport, SyncConfig, SyncSession
from qerl_sync.telemetry.observers import Push
from qerl_sync.telemetry.prometheus import MetricsServer
from qerl_sync.telemetry.recorder import FlightRecorder

SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
SYNCS = 12


class Clocked:
    """An observer, and the seconds that each push cost it."""

    def __init__(self, observer: Callable[[Push], None]) -> None:
        self._observer, self.seconds = observer, list[float]()

    def __call__(self, push: Push) -> None:
        start = time.perf_counter()
        self._observer(push)
        self.seconds.append(time.perf_counter() - start)

    def close(self) -> None:
        self._observer.close()


def test_recorder_and_metrics_cost_little_beside_the_sync(tmp_path: Path) -> None:
    config = tf.Qwen3Config(**SHAPE, architectures=["Qwen3ForCausalLM"], dtype="bfloat16")
    config.save_pretrained(tmp_path / "model")
    llm = start_engine(tmp_path / "model", load_format="dummy", dtype="bfloat16", max_num_seqs=1)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    recorder = Clocked(FlightRecorder(tmp_path / "run"))
    metrics = Clocked(MetricsServer("127.0.0.1", port))
    with SyncSession(
        HFSource(model),
        InProcessTransport(llm),
        SyncConfig(policy="reorder"),
        observers=[recorder, metrics],
    ) as session:
        totals = []
        for step in range(SYNCS):
            with torch.no_grad():  # each brings something new, in every tensor
                for parameter in model.parameters():
                    parameter.add_(1e-3)
            totals.append(session.push(step=step + 1).seconds["total"])
    assert len((tmp_path / "run" / "syncs.jsonl").read_text().splitlines()) == SYNCS
    # The first one writes the traces, which all others share.
    sync = statistics.median(totals[1:])
    shares = [statistics.median(one.seconds[1:]) / sync for one in (recorder, metrics)]
    print(
        f"\nsync of {session.plan.nbytes / 2**30:.2f} GiB: {sync:.3f} s; recorder {shares[0]:.2%}, "
        f"metrics {shares[1]:.3%}; the first sync: {recorder.seconds[0] / totals[0]:.2%}"
    )
    assert sum(shares) <= 0.01
