"""The flight recorder: a line for each sync, and what the last and the unusual ones held.

syncs.jsonl       a report a line    failures.jsonl    an error a line
traces/           sync-TIME.json: one sync, and which traces its workers had, by file
                  trace-HASH.json.gz: one trace, shared by all syncs in which it was the same
trace-N.json      spans of one sync, in Chrome's trace event format (`sync.trace`)
"""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import FileError, SyncError
from qerl_sync.plan.policies import by_parent_layer
from qerl_sync.plan.simulator import open_layers_at, replay
from qerl_sync.plan.sync_plan import SyncPlan
from qerl_sync.stopwatch import Span
from qerl_sync.telemetry.files import (
    FAILURES,
    SYNCS,
    TRACES,
    append_line,
    read_json,
    read_lines,
    write_json,
)
from qerl_sync.telemetry.observers import Push
from qerl_sync.transports.base import WorkerReport

# Syncs of which traces are kept: the last ones, and the last of those that were unusual.
RECENT, UNUSUAL = 16, 32
# Workers of a sync of which traces are kept: the one that held most, then those that differ.
WORKERS = 4
REMEMBERED = 6
SHOWN_LAYERS = 20
# A sync is slow if it takes so many times the median of the last ones, and so much more.
SLOW, SLOW_SECONDS, COMPARED = 3.0, 0.5, 20


class FlightRecorder:
    """Write each push of a session into a directory, in addition to what is there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._traces = directory / TRACES
        self._files: dict[Trace, str] = {}  # of those that were written last
        self._layers: tuple[str, dict[str, Any]] = ("", {})
        self._totals: deque[float] = deque(maxlen=COMPARED)
        # By record: whether its sync was unusual, and the traces that it refers to.
        self._kept: dict[Path, tuple[bool, set[str]]] = {}
        for path in sorted(self._traces.glob("sync-*.json")):
            # A file that is damaged, or that something else has written, stays there.
            with suppress(FileError, KeyError):
                record = read_json(path)
                self._kept[path] = (bool(record["unusual"]), set(_files_of(record)))

    def __call__(self, push: Push) -> None:
        line: dict[str, Any] = {"time": push.started}
        if push.report is not None:
            append_line(self._directory / SYNCS, {**push.report, **line})
        unusual = self._unusual(push)
        if push.error is not None:
            failure = _failure(push.error, push.started, push)
            append_line(self._directory / FAILURES, failure)
            line |= {"failure": failure}
        self._keep(push, unusual, line)
        if push.spans:
            path = self._directory / f"trace-{push.number}.json"
            write_json(path, chrome_trace(push.spans, push.workers))

    def close(self) -> None:
        pass

    def _unusual(self, push: Push) -> list[str]:
        """Return why the traces of this sync are kept for longer."""
        if push.report is None:
            return ["failed"]
        report, total = push.report, push.seconds["total"]
        # The first syncs make plans and fill caches: nothing is usual before the fifth.
        usual = median(self._totals) if len(self._totals) >= 5 else total
        self._totals.append(total)
        budget, pinned = report["budget_bytes"], report["peak_pinned_bytes_measured"]
        reasons = {
            "not as predicted": not report["prediction_exact"],
            "over the budget": budget is not None and pinned > budget,
            "workers lost": bool(report["lost"]),
            "changes not delivered": bool(report["undelivered"]),
            "slow": total > SLOW * usual and total - usual > SLOW_SECONDS,
        }
        return [reason for reason, applies in reasons.items() if applies]

    def _keep(self, push: Push, unusual: list[str], line: dict[str, Any]) -> None:
        plan = push.plan
        fullest = sorted(push.workers, key=lambda worker: -worker.trace.peak_pinned_bytes)
        differing = [worker for worker in fullest[1:] if worker.trace != worker.predicted]
        record = {
            **line,
            "step": push.step,
            "version": push.version,
            "unusual": unusual,
            "seconds": dict(push.seconds),
            "source_order": push.source_order,
            "workers": [
                {
                    "worker": worker.worker,
                    "predicted": self._file_of(worker.predicted),
                    "measured": self._file_of(worker.trace),
                }
                for worker in [*fullest[:1], *differing][:WORKERS]
            ],
        }
        if plan is not None and push.layer_map is not None:
            if self._layers[0] != plan.digest:
                self._layers = (plan.digest, _layers_of(plan, push))
            record |= {
                "policy": plan.policy,
                "plan_digest": plan.digest,
                "budget_bytes": plan.budget_bytes,
                "planned": self._file_of(plan.predicted),
                "as_given": self._file_of(plan.as_given),
                **self._layers[1],
            }
        path = self._traces / f"sync-{int(1000 * push.started):015d}.json"
        write_json(path, record)
        self._kept[path] = (bool(unusual), set(_files_of(record)))
        self._forget()

    def _forget(self) -> None:
        """Remove the records that are too many, and traces that no record refers to."""
        of_interest = [path for path, (unusual, _) in self._kept.items() if unusual]
        wanted = {*list(self._kept)[-RECENT:], *of_interest[-UNUSUAL:]}
        gone = [path for path in self._kept if path not in wanted]
        files = {name for path in gone for name in self._kept.pop(path)[1]}
        files -= {name for _, names in self._kept.values() for name in names}
        for path in [*gone, *(self._traces / name for name in files)]:
            path.unlink(missing_ok=True)
        self._files = {trace: name for trace, name in self._files.items() if name not in files}

    def _file_of(self, trace: Trace) -> str:
        """Return the name of the file that has this trace; write it if there is none."""
        if trace not in self._files:
            content = trace.to_json()
            digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
            name = f"trace-{digest[:16]}.json.gz"
            if not (self._traces / name).exists():
                write_json(self._traces / name, content)
            self._files[trace] = name
            # A trace takes as much memory as a plan: no more than a few are remembered.
            while len(self._files) > REMEMBERED:
                del self._files[next(iter(self._files))]
        return self._files[trace]


@contextmanager
def run_errors_recorded(directory: Path) -> Iterator[None]:
    """Record an error of ours that leaves this context, unless a sync has failed with it."""
    try:
        yield
    except SyncError as exc:
        path = directory / FAILURES
        last = read_lines(path)[-1:]
        if not last or last[0]["message"] != str(exc):
            append_line(path, _failure(exc, time.time()))
        raise


def _failure(error: BaseException, started: float, push: Push | None = None) -> dict[str, Any]:
    """Return what is known of an error, for `qerl-sync explain`. `push`: the one that failed."""
    facts, cause = vars(error).items(), error.__cause__
    return {
        "error": type(error).__name__,
        # Without BaseException and object, which are bases of all.
        "classes": [base.__name__ for base in type(error).__mro__[:-2]],
        "message": str(error),
        "facts": {k: v for k, v in facts if isinstance(v, int | float | str | list | tuple)},
        "cause": "" if cause is None else traceback.format_exception_only(cause)[-1].strip(),
        "time": started,
        "step": push.step if push else None,
        "version": push.version if push else None,
        "phase": push.failed_in if push else "",
        "sent": push is not None and push.plan is not None,
        "num_poisoned": push.num_poisoned if push else 0,
        "seconds": dict(push.seconds) if push else {},
    }


def chrome_trace(spans: Sequence[Span], workers: Sequence[WorkerReport]) -> dict[str, Any]:
    """Return spans of trainer and workers in Chrome's trace event format, a process each.

    Clocks of several hosts are taken as they are.
    """
    events: list[dict[str, Any]] = []
    tracks = [("trainer", spans), *((w.worker, w.spans) for w in workers)]
    starts = [span.start for _, track in tracks for span in track]
    zero = min(starts, default=0.0)
    for pid, (name, track) in enumerate(tracks):
        events.append(
            {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": name}}
        )
        # A thread for each worker writes; spans of one thread lie within each other.
        receivers = [s.detail.partition(" to ")[2] if s.name == "write" else "" for s in track]
        threads = {name: tid for tid, name in enumerate(dict.fromkeys(["", *receivers]))}
        events += [
            {
                "name": f"{span.name} {span.detail}".strip(),
                "cat": span.name,
                "ph": "X",
                "pid": pid,
                "tid": threads[receiver],
                "ts": round(1e6 * (span.start - zero), 1),
                "dur": round(1e6 * span.seconds, 1),
            }
            for span, receiver in zip(track, receivers, strict=True)
        ]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _files_of(record: dict[str, Any]) -> Iterator[str]:
    yield from (record[name] for name in ("planned", "as_given") if name in record)
    for worker in record["workers"]:
        yield from (worker["predicted"], worker["measured"])


def _layers_of(plan: SyncPlan, push: Push) -> dict[str, Any]:
    """Return the largest parent layers, and those that are open when most is buffered."""
    assert push.layer_map is not None
    sizes: Counter[str] = Counter()
    for meta in plan.base_metas:
        for c in push.layer_map.contributions[meta.name]:
            sizes[c.parent_layer] += c.held_bytes
    metas, trace = plan.load_metas, plan.predicted
    at_peak = open_layers_at(trace.peak_index, metas, push.layer_map) if metas else []
    at_peak = sorted(at_peak, key=lambda layer: -layer.buffered_bytes)
    reordered = {}
    if trace.max_open_layers > 1:  # what `policy: reorder` would buffer and open
        other = replay(by_parent_layer(plan.base_metas, push.layer_map), push.layer_map)
        reordered = {"reordered": [other.peak_buffered_bytes, other.max_open_layers]}
    return {
        "num_layers": len(sizes),
        "largest_layers": sizes.most_common(SHOWN_LAYERS),
        "open_at_peak": [
            [layer.name, layer.buffered_bytes, layer.loaded_numel, layer.total_numel]
            for layer in at_peak[:SHOWN_LAYERS]
        ],
        "num_open_at_peak": len(at_peak),
        **reordered,
    }
