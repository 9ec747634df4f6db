"""What syncs leave behind: lines, traces, spans, metrics. By sessions without vLLM."""

from __future__ import annotations

import json
import resource
import urllib.request
from pathlib import Path

import pytest
from support.ports import free_port
from support.streams_by_hand import QKV, HandMadeTransport, ListSource, interleave

from qerl_sync import SyncConfig, SyncSession
from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import ConfigError, PlanError
from qerl_sync.telemetry import files, recorder
from qerl_sync.telemetry.prometheus import METRICS


def session_in(directory: Path, **options):
    transport = HandMadeTransport()
    options = {"policy": "warn", "record_directory": str(directory), **options}
    return SyncSession(ListSource(interleave(QKV)), transport, SyncConfig.of(**options)), transport


def records(directory: Path) -> list[dict]:
    return [files.read_json(p) for p in sorted((directory / "traces").glob("sync-*.json"))]


def trace_of(directory: Path, name: str) -> Trace:
    return Trace.from_json(files.read_json(directory / "traces" / name))


def test_each_sync_leaves_a_line_and_its_traces(tmp_path):
    session, _ = session_in(tmp_path)
    reports = [session.push(step=step) for step in range(3)]
    lines = files.read_lines(tmp_path / files.SYNCS)
    assert [{k: v for k, v in line.items() if k != "time"} for line in lines] == [
        json.loads(json.dumps(report.to_json())) for report in reports
    ]
    assert lines[0]["time"] <= lines[1]["time"] <= lines[2]["time"]
    found = records(tmp_path)
    assert [record["version"] for record in found] == [1, 2, 3]
    (worker,) = found[2]["workers"]
    assert trace_of(tmp_path, worker["measured"]) == session.last_trace
    assert trace_of(tmp_path, worker["predicted"]) == session.plan.predicted
    assert found[2]["largest_layers"] == [["a", 48], ["b", 48]]
    assert found[2]["num_open_at_peak"] == 2
    # Three equal syncs have one trace between them, beside that of the source's order: the same.
    assert len(list((tmp_path / "traces").glob("trace-*"))) == 1


def test_what_is_kept_is_bounded_and_the_unusual_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "RECENT", 3)
    monkeypatch.setattr(recorder, "UNUSUAL", 2)
    monkeypatch.setattr(recorder, "SLOW_SECONDS", 1e6)  # other programs want the cores too
    session, transport = session_in(tmp_path)
    for step in range(12):
        transport.miscount = step in (1, 2, 3)
        session.push(step=step)
    kept = [(record["step"], record["unusual"]) for record in records(tmp_path)]
    assert kept == [
        (2, ["not as predicted"]),
        (3, ["not as predicted"]),
        *((step, []) for step in (9, 10, 11)),
    ]
    referred = {name for record in records(tmp_path) for name in recorder._files_of(record)}
    assert {path.name for path in (tmp_path / "traces").glob("trace-*")} == referred
    # Another process goes on with what is there, and forgets as before.
    again, _ = session_in(tmp_path)
    again.push(step=12)
    assert [record["step"] for record in records(tmp_path)] == [2, 3, 10, 11, 12]


def test_a_sync_that_takes_much_longer_than_the_last_ones_is_kept(tmp_path):
    session, transport = session_in(tmp_path)
    for step in range(8):
        session.push(step=step)
    transport.delay_seconds = 4 * recorder.SLOW_SECONDS
    session.push(step=8)
    assert records(tmp_path)[-1]["unusual"] == ["slow"]


def test_lines_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    for number in range(1000):
        files.append_line(tmp_path / "a.jsonl", number)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2100
    left = files.read_lines(tmp_path / "a.jsonl")
    assert left == list(range(left[0], 1000))
    assert len(left) > 100


def test_a_line_that_was_cut_off_does_not_spoil_the_next(tmp_path):
    """By a run that died while it wrote, in a directory that the next run goes on with."""
    path = tmp_path / files.SYNCS
    files.append_line(path, {"version": 1})
    for half in ('{"version": 2, "se', "{"):
        with path.open("a") as lines:
            lines.write(half)
        files.append_line(path, {"version": 2})
    assert files.read_lines(path) == [{"version": 1}, {"version": 2}, {"version": 2}]


def test_a_full_disk_leaves_the_lines_that_were_to_be_dropped(tmp_path):
    """A run that goes on from a checkpoint drops the lines of the steps that it repeats."""
    path = tmp_path / files.SYNCS
    for number in range(100):
        files.append_line(path, number)
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.keep_lines(path, lambda number: number < 99)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_sync_is_recorded(tmp_path):
    session, transport = session_in(tmp_path)
    session.push(step=1)
    transport.fail_at = 3
    with pytest.raises(ConnectionError):
        session.push(step=2)
    (failure,) = files.read_lines(tmp_path / files.FAILURES)
    assert (failure["error"], failure["message"]) == ("ConnectionError", "peer gone")
    assert (failure["step"], failure["version"], failure["phase"]) == (2, 1, "load")
    assert failure["sent"]
    assert len(files.read_lines(tmp_path / files.SYNCS)) == 1
    failed = records(tmp_path)[-1]
    assert failed["unusual"] == ["failed"]
    assert failed["failure"] == failure
    assert trace_of(tmp_path, failed["planned"]) == session.plan.predicted


def test_a_refused_sync_has_no_plan(tmp_path):
    session, _ = session_in(tmp_path, policy="error")
    with pytest.raises(PlanError):
        session.push(step=1)
    (failure,) = files.read_lines(tmp_path / files.FAILURES)
    assert not failure["sent"]
    assert (failure["error"], failure["phase"]) == ("PlanError", "plan")
    assert "planned" not in records(tmp_path)[0]


def test_an_observer_that_fails_does_not_end_the_run(tmp_path, caplog):
    session, _ = session_in(tmp_path)
    (tmp_path / files.SYNCS).mkdir()
    assert [session.push().version, session.push().version] == [1, 2]
    assert sum("FlightRecorder" in record.getMessage() for record in caplog.records) == 1


def test_spans_of_one_sync(tmp_path):
    session, _ = session_in(tmp_path, trace=2, chunk_bytes=48, policy="reorder")
    for _ in range(3):
        report = session.push()
    assert [path.name for path in tmp_path.glob("trace-*.json")] == ["trace-2.json"]
    events = json.loads((tmp_path / "trace-2.json").read_text())["traceEvents"]
    named = [event for event in events if event["ph"] == "M"]
    assert [event["args"]["name"] for event in named] == ["trainer", "worker 0"]
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert {f"send chunk {index}" for index in range(report.num_chunks)} <= spans.keys()
    total, load = spans["total"], spans["load"]
    assert report.num_chunks == 2
    for name in ("start", "load", "finish", "send chunk 1"):
        inner = spans[name]
        assert total["ts"] - 1 <= inner["ts"]
        assert inner["ts"] + inner["dur"] <= total["ts"] + total["dur"] + 1
    assert load["ts"] - 1 <= spans["send chunk 0"]["ts"] < spans["send chunk 1"]["ts"]


def test_a_trace_needs_a_place(tmp_path):
    with pytest.raises(ConfigError, match="record_directory"):
        session_in(tmp_path, record_directory=None, trace=1)


class Metrics:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"

    def read(self) -> dict[str, float]:
        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(self._url, timeout=10) as answer:
            text = answer.read().decode()
        return {
            sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


def test_metrics_are_served_until_the_session_closes(tmp_path):
    pytest.importorskip("prometheus_client")
    port = free_port()
    session, transport = session_in(tmp_path, metrics_port=port)
    metrics = Metrics(port)
    assert set(metrics.read().values()) == {0.0}
    transport.versions_now = {"worker 0": 1, "worker 1": 0}
    report = session.push(step=1)
    transport.fail_at = 3
    for _ in range(2):
        with pytest.raises(ConnectionError):
            session.push(step=2)
    found = metrics.read()
    assert found["qerl_sync_syncs_total"] == 1
    assert found["qerl_sync_failures_total[other]"] == 2
    assert found["qerl_sync_bytes_total"] == report.sent_bytes
    assert found["qerl_sync_open_layers"] == report.max_open_layers_measured == 2
    assert found["qerl_sync_peak_pinned_bytes"] == report.peak_pinned_bytes_measured > 0
    assert found["qerl_sync_seconds[total]"] == report.seconds["total"]
    assert found["qerl_sync_phase_seconds_total[total]"] > report.seconds["total"]
    assert found["qerl_sync_worker_version[worker 1]"] == 0
    assert found["qerl_sync_version_skew"] == 1
    assert found["qerl_sync_weight_version"] == 1
    assert {name.partition("[")[0].removesuffix("_total") for name in found} <= METRICS.keys()
    with pytest.raises(ConfigError, match="metrics_port"):
        session_in(tmp_path, metrics_port=port)
    session.close()
    with pytest.raises(OSError, match="refused"):
        metrics.read()


def test_ray_gets_the_same_numbers(monkeypatch):
    """Ray's own counters and gauges, without a cluster: what they are told."""
    metrics = pytest.importorskip("ray.util.metrics")
    from qerl_sync.integrations.ray.metrics import RayMetrics

    told: dict[str, float] = {}

    def inc(self, value, tags):
        assert value > 0, "Ray refuses it"
        set_to(self, told.get(key(self, tags), 0) + value, tags)

    def set_to(self, value, tags):
        assert tags.keys() == set(self.info["tag_keys"])
        told[key(self, tags)] = value

    def key(metric, tags) -> str:
        return metric.info["name"] + "".join(f"[{value}]" for value in tags.values())

    monkeypatch.setattr(metrics.Counter, "inc", inc)
    monkeypatch.setattr(metrics.Gauge, "set", set_to)
    transport = HandMadeTransport()
    transport.versions_now = {"worker 0": 1, "worker 1": 0}
    source, config = ListSource(interleave(QKV)), SyncConfig.of(policy="warn")
    with SyncSession(source, transport, config, observers=[RayMetrics()]) as session:
        reports = [session.push(step=step) for step in (1, 2)]
        transport.fail_at = 3
        with pytest.raises(ConnectionError):
            session.push(step=3)
    assert told["qerl_sync_syncs_total"] == 2
    assert told["qerl_sync_failures_total[other]"] == 1
    assert told["qerl_sync_bytes_total"] == sum(report.sent_bytes for report in reports)
    assert told["qerl_sync_seconds[total]"] == reports[-1].seconds["total"]
    assert told["qerl_sync_worker_version[worker 1]"] == 0
    assert told["qerl_sync_version_skew"] == 2
    assert "qerl_sync_mismatch" not in "".join(told)
