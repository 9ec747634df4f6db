"""What follows a commit may fail too: the engine must not go on with what the old weights computed.

Workers without vLLM (`support.loaders`), behind a control plane that can be paused and can fail."""

from __future__ import annotations

import threading
import time

import pytest
from support.loaders import (
    NEW,
    OLD,
    TIMEOUT_SECONDS,
    KeepingLoader,
    TensorSource,
    Workers,
    serves,
    session,
)
from support.servers import wait_until

from qerl_sync import RemoteTransport, SyncConfig, SyncError, SyncSession, TransportError
from qerl_sync.engines.base import EngineClient
from qerl_sync.errors import CoverageError, PeerLostError, StaleCacheError
from qerl_sync.transports.remote import control
from qerl_sync.transports.remote.pool import PoolTransport


class Engine(Workers, EngineClient):
    """With vLLM's update states, pausing and caches; `fails` names a call that raises, once."""

    def __init__(self, *loaders: KeepingLoader) -> None:
        super().__init__(*loaders)
        self.said: list[str] = []
        self.fails = ""
        self.running: bool | None = None
        self.updating = False
        self.empties = True

    def start_weight_update(self) -> None:
        if self.updating:
            raise TransportError("a weight update is already active")
        self._set_updating(True)
        self._note("start")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if not self.updating:
            raise TransportError("finish without a matching start")
        self._note("finish")
        self._set_updating(False)

    def pause(self, mode: str) -> None:
        self._note("pause")

    def resume(self) -> None:
        self._note("resume")

    def reset_caches(self, *, running: bool) -> bool:
        self.running = running
        self._note("reset")
        return self.empties

    def refuse(self, reason: str) -> None:
        self._note("refuse")

    def admit(self) -> None:
        self._note("admit")

    def _note(self, word: str) -> None:
        self.said.append(word)
        if word == self.fails:
            self.fails = ""
            raise TransportError(f"{word} did not work")

    def _set_updating(self, updating: bool) -> None:
        self.updating = updating
        self.says(update_open=updating)

    def says(self, **facts: object) -> None:
        """What its workers say of themselves from here on."""
        for rank in range(len(self.loaders)):
            self._said[f"rank{rank}"] = {**self._said.get(f"rank{rank}", {}), **facts}


@pytest.fixture
def engine():
    one = Engine(KeepingLoader(OLD), KeepingLoader(OLD))
    yield one
    one.close()


@pytest.mark.parametrize("call", ["finish", "reset", "resume"])
def test_an_engine_does_not_resume_on_old_caches(engine, call):
    with session(engine) as sync:
        sync._agree()  # whose own update is not what fails here
        engine.fails = call
        with pytest.raises(SyncError, match=f"{call} did not work"):
            sync.push()
        assert serves(engine, NEW), "it had committed"
        after = engine.said[len(engine.said) - engine.said[::-1].index(call) :]
        assert after == ["refuse"]
        assert sync.version == 0

        engine.said.clear()
        report = sync.push()
        assert report.version == 2, "1 has been used"
        assert engine.said[-3:] == ["reset", "resume", "admit"]


@pytest.mark.parametrize("call", ["finish", "reset", "resume"])
@pytest.mark.parametrize("by", ["the same session", "the next one"])
def test_nor_after_another_sync_that_touches_nothing(engine, call, by):
    """It was committed, and what the old weights have computed may still be there."""
    with session(engine) as sync:
        sync._agree()
        engine.fails = call
        with pytest.raises(SyncError):
            sync.push()
        engine.said.clear()
        if by == "the same session":
            engine.fails = "pause"
            with pytest.raises(SyncError, match="pause did not work"):
                sync.push()
            assert "resume" not in engine.said
            assert engine.said[-1] == "refuse"
    if by == "the next one":
        engine.said.clear()
        with session(engine) as sync:
            engine.fails = "pause"
            with pytest.raises(SyncError, match="pause did not work"):
                sync.push()
        assert engine.said[-3:] == ["reset", "resume", "admit"]


def test_workers_are_poisoned_although_their_connection_was_ended(engine):
    """Another trainer rank has failed its part of a sync that this one has committed."""
    with session(engine) as sync:
        sync.push()
        sync._transport.abort("another rank has failed")
        sync._transport.invalidate("another rank has failed")
        assert [loader.poisoned for loader in engine.loaders] == ["another rank has failed"] * 2
        assert engine.said[-1] == "refuse"
        sync.push()
    assert serves(engine, NEW)


def test_a_version_that_was_committed_in_a_sync_that_failed_is_not_used_again(engine):
    """Its engine served it, and was restarted since."""
    with session(engine) as sync:
        engine.fails = "admit"
        with pytest.raises(SyncError):
            sync.push()
        for loader in engine.loaders:
            loader.serving, loader.version = OLD, 0
        assert sync.push().version == 2


@pytest.mark.parametrize("late", [False, True])
def test_a_worker_that_dies_while_the_engine_pauses_is_named_at_once(engine, monkeypatch, late):
    """An engine may take long to notice. One that pauses in the end is resumed, and one of which
    that is not known is not."""
    monkeypatch.setattr(control, "GRACE_SECONDS", 0.5)
    paused = threading.Event()

    def pause(mode: str) -> None:
        engine.connections[1].close()
        assert paused.wait(TIMEOUT_SECONDS)
        engine.said.append("pause")

    monkeypatch.setattr(engine, "pause", pause)
    with session(engine) as sync:
        timer = threading.Timer(0.4, paused.set)
        if not late:
            timer.start()
        started = time.monotonic()
        with pytest.raises(PeerLostError, match=r"pausing: worker 1 of 2 .* closed the connection"):
            sync.push()
        assert time.monotonic() - started < 2
        mapped = ["start", "finish"]
        then = ["refuse"] if late else ["pause", "reset", "resume", "admit"]
        assert engine.said == mapped + then
        assert sync.version == 0
        paused.set()
        monkeypatch.undo()
        assert sync.push().version == 1
    assert serves(engine, NEW)


@pytest.mark.parametrize("call", ["start", "finish"])
def test_an_update_whose_state_is_not_known_is_left_before_the_next(engine, call):
    """vLLM did it, and its answer was lost."""
    with session(engine) as sync:
        sync._agree()
        engine.fails = call
        with pytest.raises(SyncError, match=f"{call} did not work"):
            sync.push()
        sync.push()
    assert not engine.updating
    assert serves(engine, NEW)


def test_the_engine_goes_on_where_it_refuses_to_begin(engine):
    with session(engine) as sync:
        sync._agree()
        engine.fails = "start"
        engine.said.clear()
        with pytest.raises(SyncError):
            sync.push()
    assert engine.said[:5] == ["pause", "start", "reset", "resume", "admit"]
    assert serves(engine, OLD)


@pytest.mark.parametrize("overwritten", [False, True])
def test_requests_are_computed_anew_where_the_kv_cache_is_gone(engine, monkeypatch, overwritten):
    """After a recovery, whatever `recompute_running` says."""
    commit = engine.loaders[1].commit
    monkeypatch.setattr(
        engine.loaders[1],
        "commit",
        lambda *given, **options: commit(*given, **options) or overwritten,
    )
    with session(engine, recompute_running=False) as sync:
        sync.push()
    assert engine.running is overwritten


def test_an_engine_that_keeps_its_prefix_cache_without_a_request_stays_paused(engine):
    """Of requests in flight that may keep theirs, a full cache is the user's choice."""
    engine.empties = False
    with session(engine, recompute_running=False) as sync:
        sync.push()
    with session(engine) as sync:
        with pytest.raises(StaleCacheError):
            sync.push()
        assert engine.said[-2:] == ["reset", "refuse"]
        engine.empties = None  # an engine that does not say
        sync.push()
        assert engine.said[-3:] == ["reset", "resume", "admit"]


def test_an_engine_whose_connector_keeps_old_work_stays_paused(engine):
    engine.empties = False
    engine.says(connector="SomeConnector")
    with session(engine, recompute_running=False) as sync:
        with pytest.raises(StaleCacheError) as raised:
            sync.push()
        assert raised.value.connector == "SomeConnector"
        assert engine.said[-2:] == ["reset", "refuse"]
        engine.empties = True
        sync.push()
        assert engine.said[-3:] == ["reset", "resume", "admit"]


def test_a_connector_that_cannot_be_emptied_is_refused_before_anything_is_asked(engine):
    engine.says(connector="SomeConnector", connector_keeps="it does not implement reset_cache()")
    with session(engine) as sync, pytest.raises(StaleCacheError) as raised:
        sync.push()
    assert raised.value.connector == "SomeConnector"
    assert engine.said == []
    assert serves(engine, OLD)


def test_a_version_that_another_trainer_has_used_is_not_used_again(engine):
    with session(engine) as first:
        assert first.push().version == 1
        engine.loaders[0].before_load = lambda: 1 / 0
        with pytest.raises(SyncError):
            first.push()  # and it is no longer connected
        engine.loaders[0].before_load = lambda: None
        with session(engine, OLD) as second:
            assert [second.push().version for _ in range(3)] == [2, 3, 4]
        assert first.push().version == 5


# ---- a pool


@pytest.fixture
def engines():
    made = [Engine(KeepingLoader(OLD)) for _ in range(2)]
    for number, engine in enumerate(made):
        engine._said["rank0"] = {"engine": f"engine-{number}"}
    yield made
    for engine in made:
        engine.close()


def pool_session(engines: list[Engine], **options) -> SyncSession:
    pool = PoolTransport(timeout_seconds=TIMEOUT_SECONDS)
    for number, engine in enumerate(engines):
        pool.add(f"engine-{number}", engine)
    return SyncSession(TensorSource(NEW), pool, SyncConfig.of(chunk_bytes=500, **options))


def versions(engines: list[Engine]) -> list[int]:
    return [engine.loaders[0].version for engine in engines]


@pytest.mark.parametrize("call", ["finish", "reset", "resume"])
def test_a_pool_whose_engines_all_fail_after_the_commit_goes_on_with_the_next_version(
    engines, call
):
    with pool_session(engines) as sync:
        sync.push()
        for engine in engines:
            engine.fails = call
        with pytest.raises(TransportError):
            sync.push()
        assert versions(engines) == [2, 2], "they had committed"
        assert wait_until(lambda: all(m.idle for m in sync._transport._members.values()))
        report = sync.push()
        assert report.version == 3, "2 has been used"
        assert not report.lost
        assert versions(engines) == [3, 3]


def test_a_pool_waits_for_an_engine_to_be_out_of_the_sync_that_failed_if_it_has_no_other(
    engines, monkeypatch
):
    alone = engines[:1]
    with pool_session(alone) as sync:
        sync.push()
        out = threading.Event()
        monkeypatch.setattr(alone[0], "refuse", lambda reason: out.wait(TIMEOUT_SECONDS))
        alone[0].fails = "resume"
        with pytest.raises(TransportError):
            sync.push()
        threading.Timer(0.5, out.set).start()
        report = sync.push()
        assert (report.version, report.lost) == (3, {})


def test_an_engine_that_comes_back_with_a_newer_version_moves_the_pool_past_it(engines):
    """Another trainer has synced it meanwhile."""
    with pool_session(engines) as sync:
        sync.push()
        sync._transport.forget("engine-1", "it was lent to another trainer")
        assert wait_until(lambda: not sync._transport._members["engine-1"].transport.hellos)
        with session(engines[1]) as other:
            assert [other.push().version for _ in range(9)] == list(range(2, 11))
        report = sync.push()
        assert report.version == 11
        assert not report.lost
        assert versions(engines) == [11, 11]


def test_a_version_that_a_lost_engine_may_have_is_not_given_to_the_others(engines):
    with pool_session(engines) as sync:
        for engine in engines:
            engine.fails = "resume"
        with pytest.raises(TransportError):
            sync.push()
        assert versions(engines) == [1, 1]
        engines.append(restarted := Engine(KeepingLoader(OLD)))
        engines[0].connections, restarted.connections = (
            restarted.connections,
            engines[0].connections,
        )
        sync._transport._members["engine-1"].is_up = lambda: False
        assert sync.push().version == 2


def damaged(engine: Engine) -> None:
    """From here on one value of each chunk arrives as another."""
    (inbox,) = engine.connections[0]._connections
    fetch = inbox.chunk_receiver.fetch

    def damage(chunk, metas):
        first, *rest = fetch(chunk, metas)
        first = first.clone()
        first[0] += 1
        return [first, *rest]

    inbox.chunk_receiver.fetch = damage


def test_damage_on_the_way_to_one_engine_is_its_own(engines):
    with pool_session(engines, verify="checksum") as sync:
        sync.push()
        damaged(engines[1])
        report = sync.push()
        assert report.version == 2
        assert list(report.lost) == ["engine-1"]
        assert versions(engines) == [2, 1]
        assert engines[0].loaders[0].has(NEW)
        assert engines[1].loaders[0].poisoned is not None
        assert sync._transport.versions == {"engine-0": 2, "engine-1": 0}
        assert wait_until(lambda: sync._transport._members["engine-1"].idle)
        assert not sync.push().lost
        assert versions(engines) == [3, 3]


def test_damage_on_the_way_to_all_engines_is_in_what_was_sent(engines):
    with pool_session(engines, verify="checksum") as sync:
        sync.push()
        for engine in engines:
            damaged(engine)
        with pytest.raises(CoverageError):
            sync.push()
        assert versions(engines) == [1, 1]
        assert sync.push().version == 2


def test_ranks_other_than_0_must_know_how_many_workers_there_are():
    with pytest.raises(SyncError, match=r"trainer rank 1 .*give num_workers"):
        RemoteTransport(None, rank=1)
