"""A sync while requests are in flight: they survive, go on with the new weights, and nothing that
was computed with the old ones is served to others."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from support.engines import NEW, OLD
from support.remote import gap, gaps, push, session, wait_for

from qerl_sync import HFSource, Source
from qerl_sync.errors import AgreementError
from qerl_sync.meta import ParamMeta
from qerl_sync.transports.remote.connection import WorkerConnection
from qerl_sync.wire.messages import SyncRequest

pytestmark = pytest.mark.vllm

SERVING = ["async", "server"]
PROMPT = [5, 6, 7, 8]
LENGTH = 300
# vLLM's blocks of cached keys on CPU have 128 tokens: it is whole ones that are shared.
LONG_PROMPT = [i % 250 for i in range(200)]
ROUNDING = 1e-4


class Pausing(Source):
    """`inner`; `pause()` is called before the last tensor: old and new weights are mixed then."""

    def __init__(self, inner, pause):
        self._inner, self._pause = inner, pause

    def metadata(self) -> list[ParamMeta]:
        return self._inner.metadata()

    def materialize(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        last = self.metadata()[-1].name
        for name, tensor in self._inner.materialize(names):
            if name == last:
                self._pause()
            yield name, tensor


def settle(grown: list, seconds: float = 10) -> None:
    """Until it has not grown for a while."""
    deadline, before = time.monotonic() + seconds, -1
    while len(grown) != before and time.monotonic() < deadline:
        before = len(grown)
        time.sleep(0.2)


TRIES = 8


def sync_in_the_middle(engine, *, recompute_running: bool, look=lambda: None):
    """A request of `LENGTH` tokens and a sync when it has some. Returns it, and how many.

    On a busy machine it may have ended before the engine is paused: then once more.
    """
    for _ in range(TRIES):
        generation, counts = _sync_beside(engine, recompute_running, look)
        assert len(generation[0]) == LENGTH, "the request did not survive"
        assert counts[0] == counts[1], "it went on during the sync"
        if 20 < counts[0] < LENGTH - 20:
            return generation, counts[0]
        push(engine, OLD)
    raise AssertionError(f"in {TRIES} tries the sync never came in the middle of a request")


def _sync_beside(engine, recompute_running: bool, look):
    """The generation, and how many tokens it had at two moments of the sync."""
    counts, tokens = [], []  # `tokens` becomes the request's, which grows

    def pause() -> None:
        settle(tokens)  # what was on its way here when the engine was paused
        counts.append(len(tokens))
        look()
        time.sleep(0.3)
        counts.append(len(tokens))

    source = Pausing(HFSource(engine.trainers[NEW]), pause)
    options = {"policy": "warn", "source_order": "hf", "chunk_bytes": "40KiB"}
    with session(engine, source, recompute_running=recompute_running, **options) as sync:
        sync._agree()  # connected before the request, which does not last long
        future, grown = engine.stream(PROMPT, LENGTH)
        tokens = grown[0]
        wait_for(lambda: len(tokens) > 20)
        sync.push()
    return future.result(timeout=120), counts


@pytest.mark.parametrize("name", SERVING)
def test_a_request_goes_on_with_the_new_weights(remote, name):
    """Each logprob is held against the trainer's model of the version that it must come from."""
    engine = remote(name)
    old_tokens, _ = engine.complete(PROMPT, LENGTH)

    (tokens, logprobs), count = sync_in_the_middle(engine, recompute_running=True)

    by_old = gaps(engine.trainers[OLD], PROMPT, (tokens, logprobs))
    by_new = gaps(engine.trainers[NEW], PROMPT, (tokens, logprobs))
    assert max(by_old[:count]) <= ROUNDING
    assert max(by_new[count:]) <= ROUNDING
    assert max(by_new[:count]) > 100 * ROUNDING < max(by_old[count:]), "the test tells nothing"
    assert tokens[:count] == old_tokens[:count]
    assert tokens[count:] != old_tokens[count:]
    assert engine.wrong_weights(NEW) == []
    rest, _ = engine.complete(PROMPT + tokens[:count], LENGTH - count)
    assert tokens[count:] == rest


def test_without_recomputing_a_request_keeps_what_it_had(remote):
    """The new weights attend to the old ones' keys, where no cache of prefixes could serve them to
    others."""
    engine = remote("async")
    generation, count = sync_in_the_middle(engine, recompute_running=False)
    by_old = gaps(engine.trainers[OLD], PROMPT, generation)
    by_new = gaps(engine.trainers[NEW], PROMPT, generation)
    assert max(by_old[:count]) <= ROUNDING
    assert max(by_old[count:]) > 100 * ROUNDING, "it goes on with the old weights"
    assert max(by_new[count:]) > ROUNDING, "it was computed anew, and nobody asked for it"
    assert engine.wrong_weights(NEW) == []


def test_cached_prefixes_are_forgotten(remote):
    engine = remote("server")
    assert gap(engine.trainers[OLD], LONG_PROMPT, engine.complete(LONG_PROMPT, 4)) <= ROUNDING
    push(engine, NEW)
    assert gap(engine.trainers[NEW], LONG_PROMPT, engine.complete(LONG_PROMPT, 4)) <= ROUNDING


def test_cached_prefixes_are_forgotten_also_with_requests_in_flight(remote):
    """These hold on to their blocks, and vLLM then refuses to forget any: they go first."""
    engine = remote("server")
    assert gap(engine.trainers[OLD], LONG_PROMPT, engine.complete(LONG_PROMPT, 4)) <= ROUNDING
    sync_in_the_middle(engine, recompute_running=True)
    assert gap(engine.trainers[NEW], LONG_PROMPT, engine.complete(LONG_PROMPT, 4)) <= ROUNDING


def test_a_cache_that_vllm_keeps_is_told(remote, caplog):
    sync_in_the_middle(remote("server"), recompute_running=False)
    assert "keeps its whole prefix cache" in caplog.text


def test_the_server_answers_health_checks_during_a_sync(remote):
    engine = remote("server")
    client = engine.client()
    healthy = []
    sync_in_the_middle(engine, recompute_running=True, look=lambda: healthy.append(client.health()))
    assert healthy == [True]
    assert client.health()


@pytest.mark.parametrize("name", SERVING)
@pytest.mark.parametrize("mode", ["wait", "abort"])
def test_requests_in_flight_may_be_waited_for_or_ended(remote, name, mode):
    engine = remote(name)
    for _ in range(TRIES):
        with session(engine, HFSource(engine.trainers[NEW]), pause_mode=mode) as sync:
            sync._agree()  # connected before the request, which does not last long
            future, grown = engine.stream(PROMPT, LENGTH)
            wait_for(lambda grown=grown: len(grown[0]) > 20)
            sync.push()
        tokens, logprobs = future.result(timeout=120)
        if mode == "wait" or len(tokens) < LENGTH:
            break
        push(engine, OLD)  # on a busy machine it had ended before: once more
    assert (len(tokens) == LENGTH) == (mode == "wait")
    assert gap(engine.trainers[OLD], PROMPT, (tokens, logprobs)) <= ROUNDING
    assert engine.generates_as(NEW)


@pytest.mark.parametrize("name", SERVING)
def test_a_sync_that_is_refused_lets_requests_go_on(remote, monkeypatch, name):
    engine = remote(name)
    future, grown = engine.stream(PROMPT, LENGTH)
    wait_for(lambda: len(grown[0]) > 20)
    tell = WorkerConnection.tell

    def spoil(peer, message):
        if isinstance(message, SyncRequest):
            message = message.model_copy(update={"layer_map": "another"})
        tell(peer, message)

    monkeypatch.setattr(WorkerConnection, "tell", spoil)
    with pytest.raises(AgreementError, match="another layer map"):
        push(engine, NEW)
    generation = future.result(timeout=120)
    assert len(generation[0]) == LENGTH
    assert gap(engine.trainers[OLD], PROMPT, generation) <= ROUNDING
