"""Runs of any size as the flight recorder leaves them, without a trainer or an engine."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import NoRoomError
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.layer_map import Contribution, LayerMap, ParentLayer
from qerl_sync.plan.sync_plan import build_plan
from qerl_sync.session import PHASES, SyncReport
from qerl_sync.stopwatch import Span
from qerl_sync.telemetry.files import LOG, append_line
from qerl_sync.telemetry.observers import Push
from qerl_sync.telemetry.recorder import FlightRecorder
from qerl_sync.transports.base import WorkerReport

START = 1_700_000_000.0


def record_run(
    directory: Path,
    *,
    num_syncs: int,
    num_layers: int,
    parts: int = 3,
    unusual: Collection[int] = (),
    failed: Collection[int] = (),
    num_workers: int = 1,
    budget_bytes: int | None = None,
) -> None:
    """Record syncs of a model of `num_layers` layers of `parts` tensors, in a bad order.

    Args:
        unusual: the syncs, from 0, whose measured trace is another than predicted.
        failed: the syncs that fail for want of shared memory.
    """
    names = [
        (f"model.layers.{layer}.self_attn.qkv_proj", part)
        for part in range(parts)
        for layer in range(num_layers)
    ]
    metas = [ParamMeta(f"{layer}.{part}.weight", "bfloat16", (64, 64)) for layer, part in names]
    layer_map = LayerMap(
        {n: ParentLayer(n, "QKVParallelLinear", parts * 4096, parts * 4096) for n, _ in names},
        {
            meta.name: (Contribution(layer, "weight", meta.numel, meta.nbytes, True),)
            for meta, (layer, _) in zip(metas, names, strict=True)
        },
    )
    plan = build_plan(metas, layer_map, "warn", budget_bytes=budget_bytes)
    recorder = FlightRecorder(directory)
    columns = plan.predicted.to_json()
    version = 0
    for number in range(num_syncs):
        measured = plan.predicted
        if number in unusual:
            held = [nbytes + number * 1000 for nbytes in columns["buffered_bytes"]]
            measured = Trace.of_columns(
                columns["name"], held, columns["pinned_bytes"], columns["open_layers"]
            )
        layer = metas[number % num_layers].name.rpartition(".")[0]
        workers = [
            WorkerReport(
                f"worker {rank}",
                measured,
                plan.predicted,
                {"wait": 0.01, "load": 0.2 + rank / 100, "finish": 0.01, "verify": 0.0},
                spans=[Span("process", layer.rpartition(".")[0], START, 0.01)],
            )
            for rank in range(num_workers)
        ]
        seconds = dict.fromkeys(PHASES, 0.05) | {"load": 0.2 + number % 7 / 50, "total": 0.5}
        error = None
        if number in failed:
            error = NoRoomError("/dev/shm has no room", needed_bytes=2**27, free_bytes=2**26)
        version += error is None
        report = _report(version, number, plan, measured, seconds, workers)
        recorder(
            Push(
                number=number + 1,
                step=number,
                version=version,
                started=START + number,
                seconds=seconds,
                failed_in="start" if error else "",
                plan=plan,
                layer_map=layer_map,
                source_order="interleaved:3",
                report=None if error else report.to_json(),
                error=error,
                workers=[] if error else workers,
                spans=[],
                versions={},
                num_poisoned=0,
            )
        )
        reward = number / num_syncs
        append_line(directory / LOG, {"step": number, "reward": reward, "step_time": 2.0})
    sync = {"chunks_in_flight": 2, "verify": "coverage", "policy": "warn"}
    (directory / "config.json").write_text(
        json.dumps({"model": {"path": "Qwen/Qwen3"}, "sync": sync})
    )


def _report(version, number, plan, measured, seconds, workers) -> SyncReport:
    predicted = plan.predicted
    return SyncReport(
        version=version,
        step=number,
        policy=plan.policy,
        plan_digest=plan.digest,
        num_tensors=len(plan.metas),
        num_chunks=len(plan.chunks),
        sent_bytes=plan.nbytes,
        seconds=seconds,
        peak_buffered_bytes_predicted=predicted.peak_buffered_bytes,
        peak_buffered_bytes_measured=measured.peak_buffered_bytes,
        peak_pinned_bytes_predicted=predicted.peak_pinned_bytes,
        peak_pinned_bytes_measured=measured.peak_pinned_bytes,
        max_open_layers_predicted=predicted.max_open_layers,
        max_open_layers_measured=measured.max_open_layers,
        prediction_exact=measured == predicted,
        first_difference=None if measured == predicted else predicted.first_difference(measured),
        budget_bytes=plan.budget_bytes,
        transport="shm: on this host",
        workers=[worker.to_json() for worker in workers],
    )
