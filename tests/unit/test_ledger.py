"""The ledger, held against a naive account that remembers everything and recomputes every sum."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from support.streams import LAYERS, storages, streams

from qerl_sync.buffers.ledger import BufferLedger
from qerl_sync.buffers.trace import Trace, TraceStep
from qerl_sync.meta import Storage
from qerl_sync.plan.simulator import replay

STORAGES = st.builds(lambda key: Storage(key, 100 * (key + 1)), st.integers(0, 3))
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.text("abc", min_size=1, max_size=2)),
        st.tuples(
            st.just("hold"),
            st.sampled_from(LAYERS),
            st.integers(0, 50),
            st.lists(STORAGES, max_size=2),
        ),
        st.tuples(st.just("release"), st.sampled_from(LAYERS)),
    ),
    max_size=40,
)


class NaiveAccount:
    """Every held view in a list; sums from scratch after each event."""

    def __init__(self):
        self.held, self.steps, self.deferred = [], [], set()

    def begin(self, name):
        self.steps.append([name, 0, 0, 0])
        self._raise_high()

    def hold(self, layer, view_bytes, storages, *, deferred=False):
        self.held.append((layer, view_bytes, list(storages)))
        self.deferred |= {layer} if deferred else set()
        self._raise_high()

    def release(self, layer):
        self.held = [h for h in self.held if h[0] != layer]

    def _raise_high(self):
        if self.steps:
            unique = {s.key: s.nbytes for _, _, storages in self.held for s in storages}
            now = (
                sum(view_bytes for _, view_bytes, _ in self.held),
                sum(unique.values()),
                len({layer for layer, _, _ in self.held} - self.deferred),
            )
            self.steps[-1][1:] = map(max, self.steps[-1][1:], now)

    def trace(self):
        return Trace(tuple(TraceStep(*step) for step in self.steps))


@given(EVENTS)
def test_equals_the_naive_account(events):
    ledger, naive = BufferLedger(), NaiveAccount()
    for event, *arguments in events:
        if event == "hold" and not arguments[2]:
            continue  # a view without a storage does not exist
        for account in (ledger, naive):
            getattr(account, event)(*arguments)
    assert ledger.trace() == naive.trace()


@given(EVENTS)
def test_nothing_is_left_when_all_is_released(events):
    ledger = BufferLedger()
    for event, *arguments in events:
        if event != "hold" or arguments[2]:
            getattr(ledger, event)(*arguments)
    for layer in LAYERS:
        ledger.release(layer)
    assert (ledger.buffered_bytes, ledger.pinned_bytes, ledger.open_layers) == (0, 0, 0)


@given(st.data(), streams())
def test_replay_is_the_account_of_its_own_events(data, stream):
    """Aliased views, tied weights, copies, deferred and padded layers: the same events fed to the
    naive account give the trace that `replay` predicts."""
    metas, layer_map = stream
    memory = data.draw(storages(metas))
    naive, loaded, closed = NaiveAccount(), dict.fromkeys(layer_map.layers, 0), set()
    for meta in metas:
        naive.begin(meta.name)
        for i, c in enumerate(layer_map.contributions[meta.name]):
            layer = layer_map.layers[c.parent_layer]
            if layer.name in closed:
                continue
            own = memory.get(meta.name, Storage(meta.name, meta.nbytes))
            storage = own if c.aliases_source else Storage((meta.name, i), c.held_bytes)
            naive.hold(layer.name, c.held_bytes, [storage], deferred=layer.deferred)
            loaded[layer.name] += c.loaded_numel
            if loaded[layer.name] >= layer.expected_numel and not layer.deferred:
                naive.release(layer.name)
                closed.add(layer.name)
    assert replay(metas, layer_map, memory) == naive.trace()


def test_a_small_view_pins_its_whole_chunk():
    ledger = BufferLedger()
    ledger.begin("norm")
    ledger.hold("norm", 2048, [Storage("chunk", 1 << 30)])
    (step,) = ledger.trace().steps
    assert (step.buffered_bytes, step.pinned_bytes) == (2048, 1 << 30)


def test_the_closing_layer_counts_in_the_step_that_closes_it():
    ledger = BufferLedger()
    ledger.begin("a")
    ledger.hold("layer", 8, [Storage(1, 8)])
    ledger.release("layer")
    ledger.begin("b")
    assert ledger.trace().steps == (TraceStep("a", 8, 8, 1), TraceStep("b", 0, 0, 0))
