"""sync.on_failure: rollback. Whatever fails, the engine is exactly what it was before."""

from __future__ import annotations

from itertools import product

import pytest
from support.engines import NEW, OLD
from support.remote import session as remote_session
from support.syncs import push, session

from qerl_sync import HFSource, SyncError
from qerl_sync.errors import CoverageError, LoadError, PlanError
from qerl_sync.worker.load import memory, refresh

pytestmark = pytest.mark.vllm

KINDS = [*product(["dense", "bias", "tied", "moe"], ["stock", "plain"]), ("dense", "fp8")]


class Cut(HFSource):
    """Dies before the tensor at that share of the stream."""

    share = 0.5

    def materialize(self, names):
        at = round(self.share * (len(names) - 1))
        for i, item in enumerate(super().materialize(names)):
            if i == at:
                raise ConnectionResetError("peer gone")
            yield item


@pytest.mark.parametrize(("kind", "kernels"), KINDS)
def test_a_sync_that_fails_anywhere_leaves_the_old_version(subject, monkeypatch, kind, kernels):
    one = subject(kind, kernels)
    sync = session(one, Cut(one.trainers[NEW]), on_failure="rollback", policy="warn")
    for share in (0.0, 0.5, 1.0):
        Cut.share = share
        with pytest.raises(LoadError, match=r"peer gone.*The worker is back on version"):
            sync.push()
        assert_old(one)

    def fail(model):
        after_reload(model)
        raise RuntimeError("no kernel")

    after_reload = refresh.after_reload
    with monkeypatch.context() as patched:
        patched.setattr(refresh, "after_reload", fail)
        with pytest.raises(LoadError, match="no kernel"):
            push(one, NEW, on_failure="rollback")
    assert_old(one)
    report = push(one, NEW, on_failure="rollback")
    assert report.workers[0]["kept_bytes"] > 0
    assert one.wrong_weights(NEW) == []
    assert one.generates_as(NEW)


def assert_old(one):
    assert one.wrong_weights(OLD) == []
    assert one.generates_as(OLD)


def test_it_costs_as_much_as_the_weights(subject):
    one = subject("dense", "plain")
    report = push(one, NEW, on_failure="rollback")
    assert 0.9 <= report.workers[0]["kept_bytes"] / report.sent_bytes <= 1.1
    assert push(one, NEW).workers[0]["kept_bytes"] == 0


def test_what_was_poisoned_before_stays_so(subject):
    one = subject("dense")
    Cut.share = 0.5
    source = Cut(one.trainers[NEW])
    with pytest.raises(LoadError, match="is poisoned until"):
        session(one, source).push()
    with pytest.raises(LoadError, match="is poisoned until"):
        session(one, source, on_failure="rollback").push()
    push(one, NEW, on_failure="rollback")
    assert one.wrong_weights(NEW) == []
    assert one.generates_as(NEW)


def test_too_little_memory_is_refused_and_nothing_touched(subject, monkeypatch):
    one = subject("dense")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(PlanError, match=r"rollback keeps.*1,000 are free.*on_failure: poison"):
        push(one, NEW, on_failure="rollback")
    assert_old(one)


def test_over_a_connection(remote):
    engine = remote("own process")
    Cut.share = 0.5
    options = {"transport": "shm", "on_failure": "rollback", "chunk_bytes": "1KiB"}

    class CutLater(HFSource):
        chunks = 0

        def materialize(self, names):
            self.chunks += 1
            if self.chunks == 4:
                raise ConnectionResetError("peer gone")
            return super().materialize(names)

    with remote_session(engine, CutLater(engine.trainers[NEW]), **options) as sync:
        with pytest.raises((ConnectionResetError, SyncError), match="peer gone"):
            sync.push()
        assert engine.wrong_weights(OLD) == []
        assert engine.generates_as(OLD), "it goes on without another sync"
        report = sync.push()
    assert report.workers[0]["kept_bytes"] > 0
    assert engine.wrong_weights(NEW) == []
    assert engine.generates_as(NEW)


def test_all_ranks_go_back(remote):
    """One finds bytes that have changed on the way, when the other has loaded them."""
    engine = remote("tensor parallel")

    class Nan(HFSource):
        checks_finite = False

        def materialize(self, names):
            for name, tensor in super().materialize(names):
                yield name, tensor / 0 if name == "model.norm.weight" else tensor

    with (
        remote_session(
            engine, Nan(engine.trainers[NEW]), transport="shm", on_failure="rollback"
        ) as sync,
        pytest.raises(CoverageError, match=r"model\.norm\.weight.*NaN or infinite"),
    ):
        sync.push()
    assert engine.wrong_weights(OLD) == []
    assert engine.generates_as(OLD)
