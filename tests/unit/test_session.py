"""The session's decisions, over a source and a transport without vLLM."""

from __future__ import annotations

import logging

import pytest
import torch
from support.errors import raises
from support.streams_by_hand import QKV, HandMadeTransport, ListSource, interleave

from qerl_sync import SyncConfig, SyncSession
from qerl_sync.errors import CoverageError, LayerMapError, PlanError, StaleBaseError
from qerl_sync.options import SyncOptions
from qerl_sync.transports.base import EngineFacts
from qerl_sync.verify.probe_prompt import Probe


def make(policy="reorder", metas=None, **options):
    transport = HandMadeTransport()
    source = ListSource(metas or interleave(QKV))
    return SyncSession(source, transport, SyncConfig.of(policy=policy, **options)), transport


def test_sends_what_the_plan_says_and_commits_a_version():
    session, transport = make("reorder")
    report = session.push(step=7)
    assert transport.received == list(session.plan.order)
    assert session.plan.order != tuple(m.name for m in interleave(QKV))
    assert (report.version, report.step, session.version) == (1, 7, 1)
    assert report.sent_bytes == sum(m.nbytes for m in interleave(QKV))
    assert report.prediction_exact
    assert report.seconds["total"] >= report.seconds["gather"] + report.seconds["load"]


@pytest.mark.parametrize(
    ("wanted", "looks", "finite_check"),
    [(True, True, "source"), (True, False, "worker"), (False, True, "nobody")],
)
def test_the_transport_is_told_what_the_sync_is_asked_for(wanted, looks, finite_check):
    session, transport = make(check_finite=wanted, verify="off", on_failure="rollback")
    session._source.checks_finite, session._source.stable = looks, True
    session.push()
    assert session.push().transport == "by hand"
    assert transport.options == SyncOptions(2, "off", "rollback", finite_check, stable=True)


def test_plans_once_and_again_only_when_the_stream_changes():
    session, transport = make("reorder")
    first = session.push()
    assert session.push().plan_digest == first.plan_digest
    assert transport.probed == 1
    session._source.metas = session._source.metas[:-1]
    assert session.push().plan_digest != first.plan_digest
    assert transport.probed == 2


def test_warns_once_for_each_situation(caplog):
    session, _ = make("warn")
    with caplog.at_level(logging.WARNING, logger="qerl_sync"):
        session.push()
        session.push()
        assert len(caplog.records) == 1
        session._source.metas = session._source.metas[::-1]
        session.push()
        assert len(caplog.records) == 2
        session._source.metas = session._source.metas[::-1]
        session.push()
    assert len(caplog.records) == 2
    assert "2 parent layers at once" in caplog.records[0].getMessage()


def test_reorder_has_nothing_to_warn_of(caplog):
    with caplog.at_level(logging.WARNING, logger="qerl_sync"):
        make("reorder")[0].push()
    assert not caplog.records


def test_policy_error_sends_nothing_and_says_it_every_time():
    session, transport = make("error")
    for _ in range(2):
        with pytest.raises(PlanError):
            session.push()
    assert transport.received == []
    assert session.version == 0


def test_a_failed_sync_is_aborted_and_its_version_not_committed():
    session, transport = make()
    session.push()
    transport.fail_at = 3
    with pytest.raises(ConnectionError):
        session.push()
    assert transport.aborted
    assert session.version == 1
    transport.fail_at = None
    assert session.push().version == 2


def test_a_refused_stream_is_asked_about_again():
    session, transport = make()
    transport.refuse = LayerMapError("no")
    with pytest.raises(LayerMapError):
        session.push()
    transport.refuse = None
    assert session.push().version == 1


def test_ignored_names_are_not_sent():
    session, transport = make(ignore_names=["*.k"])
    session.push()
    assert transport.received
    assert not [name for name in transport.received if name.endswith(".k")]


def test_nan_in_an_ignored_name_is_no_reason_to_refuse_a_sync():
    session, transport = make(ignore_names=["*.k"])
    session._source.tensors["a.k"] = torch.full((4,), float("nan"))
    session.push()
    assert transport.received
    session._source.tensors["a.q"] = torch.full((4,), float("nan"))
    with raises(CoverageError, tensor="a.q"):
        session.push()


def test_the_source_order_is_applied_before_the_policy():
    session, transport = make("warn", source_order="alphabetical")
    session.push()
    assert transport.received == sorted(transport.received)


def test_not_finite_is_found_before_the_transport_starts():
    session, transport = make()
    session._source.tensors["a.q"] = torch.full((4,), float("nan"))
    with raises(CoverageError, tensor="a.q", num_bad=4):
        session.push()
    assert not transport.started
    sent, transport = make(check_finite=False)
    sent._source.tensors["a.q"] = torch.full((4,), float("nan"))
    assert sent.push().version == 1


def test_a_difference_between_prediction_and_measurement_is_reported(caplog):
    session, transport = make()
    transport.miscount = True
    with caplog.at_level(logging.WARNING, logger="qerl_sync"):
        report = session.push()
    assert not report.prediction_exact
    assert report.first_difference is not None
    assert report.first_difference.startswith("tensor 0 (a.q): buffered_bytes predicted")
    assert "differs from the predicted" in caplog.text


def test_a_sync_that_finds_its_worker_on_another_version_sends_everything_as_the_next_one(
    monkeypatch,
):
    session, transport = make()
    session._config = session._config.model_copy(update={"delta": "layers"})
    changed = iter(range(10))
    session._source.stamps_content = True
    names = [meta.name for meta in session._source.metadata()]
    session._source.content_stamps = lambda: {
        name: next(changed) if name == names[0] else 0 for name in names
    }
    monkeypatch.setattr(type(transport), "holds", lambda self, version: True)
    start = transport.start

    def refuse_a_part(plan, layer_map, options):
        if options.base is not None:
            raise StaleBaseError("another one has synced it", base=options.base, version=5)
        start(plan, layer_map, options)

    session.push()
    monkeypatch.setattr(transport, "start", refuse_a_part)
    report = session.push()
    assert (report.version, session.version, transport.options.version) == (6, 6, 6)
    assert report.delta["sent"] == "everything"
    assert report.unsent_tensors == 0


def test_no_sync_builds_on_one_that_the_engine_computes_otherwise_with(monkeypatch):
    """Even where the engine could not be told so."""
    transport = HandMadeTransport()
    transport.holding = True
    source = ListSource(interleave(QKV))
    stamps = dict.fromkeys(source.tensors, 0)
    source.unchanging = lambda: dict(list(stamps.items())[1:])
    probe = Probe((1, 2, 3), lambda ids: [0.0] * (len(ids) - 1))
    config = SyncConfig.of(policy="reorder", verify="full")
    session = SyncSession(source, transport, config, probe=probe)
    monkeypatch.setattr(type(transport), "engine_facts", EngineFacts("float32"))
    says = 0.0
    transport.prompt_logprobs = lambda ids: [says] * (len(ids) - 1)
    session.push()
    assert session.push().unsent_tensors == 3
    says = -1.0
    with pytest.raises(CoverageError):
        session.push()
    says = 0.0
    assert session.push().unsent_tensors == 0


class Watching:
    """An observer that keeps the pushes it is told of, or fails."""

    def __init__(self, fails=False):
        self.fails, self.pushes, self.closed = fails, [], 0

    def __call__(self, push):
        self.pushes.append(push)
        if self.fails:
            raise OSError("no space left")

    def close(self):
        self.closed += 1


def test_an_observer_that_fails_is_closed_and_the_others_go_on():
    failing, other = Watching(fails=True), Watching()
    source, transport = ListSource(interleave(QKV)), HandMadeTransport()
    config = SyncConfig.of(policy="reorder")
    with SyncSession(source, transport, config, observers=[failing, other]) as session:
        session.push()
        session.push()
        assert (len(failing.pushes), failing.closed) == (1, 1)
        assert (len(other.pushes), other.closed) == (2, 0)
    assert (failing.closed, other.closed) == (1, 1)


def test_observers_are_closed_where_the_transport_cannot_be(monkeypatch):
    observer, transport = Watching(), HandMadeTransport()
    session = SyncSession(ListSource([]), transport, SyncConfig(), observers=[observer])
    monkeypatch.setattr(transport, "close", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.close()
    assert observer.closed == 1


def test_a_failure_after_a_second_attempt_is_of_the_phase_that_failed(monkeypatch):
    observer, transport = Watching(), HandMadeTransport()
    source = ListSource(interleave(QKV))
    session = SyncSession(source, transport, SyncConfig.of(policy="reorder"), observers=[observer])
    refusals = iter([StaleBaseError("another one has synced it", base=1, version=1)])
    start = transport.start

    def refuse_once(*args):
        for refusal in refusals:
            raise refusal
        start(*args)

    monkeypatch.setattr(transport, "start", refuse_once)
    transport.fail_at = 3
    with pytest.raises(ConnectionError):
        session.push()
    assert observer.pushes[0].failed_in == "load"
