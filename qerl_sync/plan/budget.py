"""An order that stays within a byte budget and follows the source for as long as that is possible.

The budget bounds the *pinned* bytes of the replayed stream: the memory that is really held, each
storage counted once. Where every tensor has a storage of its own and lands in one parent layer,
these are the buffered bytes; vLLM's figure is larger only where it counts one storage twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import PlanError
from qerl_sync.meta import ParamMeta, Storage, format_bytes
from qerl_sync.plan.budget_scheduler import BudgetScheduler, Groups
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.policies import Joined
from qerl_sync.plan.simulator import Simulator


def within_budget(
    metas: Sequence[ParamMeta],
    layer_map: LayerMap,
    budget_bytes: int,
    storages: Mapping[str, Storage] | None = None,
    *,
    chunk_bytes: int | None = None,
) -> list[ParamMeta]:
    """Return the source's order, left only where following it would break the budget.

    The stream follows the source. The source's next tensor is handed over if the rest can then
    still be delivered within the budget, in whatever order; otherwise the open layer that lacks
    the fewest bytes is completed first, its outstanding tensors pulled forward, and so on until the
    next tensor can go. Time is n log n in the number of tensors.

    Guaranteed for every stream:

    - The replayed peak of pinned bytes is at most `budget_bytes`.
    - A source that stays within the budget by itself is returned as it is (with `chunk_bytes`: if
      it can also be cut that fine).
    - Only tensors of open layers are pulled forward, so the first tensors of all layers stay in
      the source's order.

    Guaranteed where each tensor lands in one parent layer, no two layers share a storage and none
    is deferred (the tests hold it against all orders of small streams):

    - The budget is refused only if no order keeps it: if some layer alone needs more.
    - "Wherever it can": no order within the budget follows the source for longer before it first
      leaves it; and later too, the source's next tensor is passed over only if no way to go on
      with it would stay within the budget.

    Not guaranteed: that the fewest tensors are moved. Finding that order is NP-hard
    (it contains caching with pages of different sizes). Over random streams of up to 7 tensors that
    break their budget, the fewest are moved in 9 of 10, and less than 10% more than the fewest in
    sum. Where layers share storages or tensors, what they share is counted for each of them, so
    that more may move than must.

    Args:
        metas: the stream in source order.
        budget_bytes: upper bound of the pinned bytes at any moment.
        storages: the memory behind each tensor; a name that is not in it has a storage of its own.
        chunk_bytes: all layers are closed again before more than this (or than the budget) was
            sent, so that chunks can be cut there; only a single layer may be larger.

    Raises:
        PlanError: a layer alone needs more than the budget; names it and the bytes that it needs.
    """
    simulator = Simulator(metas, layer_map, storages)
    given = simulator.trace()
    order = order_within_budget(metas, layer_map, budget_bytes, chunk_bytes, simulator, given)
    return [metas[place] for place in order]


def order_within_budget(
    metas: Sequence[ParamMeta],
    layer_map: LayerMap,
    budget_bytes: int,
    chunk_bytes: int | None,
    simulator: Simulator,
    given: Trace,
) -> Sequence[int]:
    """Do as `within_budget`, given a trace of the source's order; return places in the source.

    Args:
        simulator: for `metas` and the memory behind them.
        given: its trace of `metas`.
    """
    if chunk_bytes is None and given.peak_pinned_bytes <= budget_bytes:
        return range(len(metas))
    groups = _groups(metas, simulator)
    deferred = _Deferred(groups, simulator)
    for group, total in enumerate(groups.totals):
        if total + deferred.beside_bytes > budget_bytes:
            # Layers that share tensors are not all open to the end.
            groups.totals[group] = simulator.trace(groups.places(group)).peak_pinned_bytes
    largest = max(groups.totals, default=0)
    if largest + deferred.beside_bytes > budget_bytes:
        stream = [metas[place] for place in groups.places(groups.totals.index(largest))]
        raise _refusal(stream, layer_map, largest + deferred.beside_bytes, budget_bytes)
    if deferred.nbytes > budget_bytes:
        raise PlanError(
            f"sync.budget_bytes is {_exactly(budget_bytes)}, but {_exactly(deferred.nbytes)} of "
            "tensors land in deferred layers (attention scales), which vLLM holds to the end of "
            f"the sync.\nRaise sync.budget_bytes to at least {deferred.nbytes}.",
            needed_bytes=deferred.nbytes,
        )
    chunk = min(chunk_bytes, budget_bytes) if chunk_bytes else inf
    if largest + deferred.nbytes <= budget_bytes:
        order = BudgetScheduler(groups, budget_bytes - deferred.nbytes, chunk).follow(
            range(len(metas))
        )
    else:  # what is held to the end comes last
        last = set(deferred.places)
        first = (place for place in range(len(metas)) if place not in last)
        order = BudgetScheduler(groups, budget_bytes - deferred.beside_bytes, chunk).follow(first)
        order += deferred.places
    return order


def _groups(metas: Sequence[ParamMeta], simulator: Simulator) -> Groups:
    """Group tensors by the number of their parent layer, or of one of those that are joined."""
    closes_at = simulator.closes_at
    joined = Joined[int]()
    of: list[int | None] = []
    for lands in simulator.landings:
        layers = [landing[0] for landing in lands if closes_at[landing[0]] < inf]
        joined.join(layers)
        of.append(layers[0] if layers else None)
    if joined:
        of = [None if layer is None else joined.root(layer) for layer in of]
    weights = []
    seen: set[tuple[int | None, int | str]] = set()
    for group, lands in zip(of, simulator.landings, strict=True):
        weight = 0
        for layer, _, _, storage, storage_bytes in lands:
            if storage is None:
                weight += storage_bytes
            elif (group, storage) not in seen and closes_at[layer] < inf:
                seen.add((group, storage))
                weight += storage_bytes
        weights.append(weight)
    return Groups(of, weights, [meta.nbytes for meta in metas], len(closes_at))


class _Deferred:
    """The bytes that deferred layers (attention scales) pin: they stay to the end of the sync.

    Attributes:
        places: of the tensors that land in deferred layers only.
        nbytes: what all deferred layers pin together.
        beside_bytes: the part of it that comes with tensors which other layers wait for.
    """

    def __init__(self, groups: Groups, simulator: Simulator) -> None:
        self.places: list[int] = []
        alone: dict[int | str, int] = {}
        beside: dict[int | str, int] = {}
        for place, (group, landings) in enumerate(zip(groups.of, simulator.landings, strict=True)):
            if group is None and landings:
                self.places.append(place)
            elif len(landings) < 2:
                continue
            for layer, _, _, storage, storage_bytes in landings:
                if simulator.closes_at[layer] == inf:
                    key = simulator.names[place] if storage is None else storage
                    (alone if group is None else beside)[key] = storage_bytes
        self.beside_bytes = sum(beside.values())
        self.nbytes = sum({**alone, **beside}.values())


def _refusal(
    stream: Sequence[ParamMeta], layer_map: LayerMap, needed_bytes: int, budget_bytes: int
) -> PlanError:
    """Return the error that says why a budget cannot be met, and what would help.

    Args:
        stream: the tensors of the layer that needs the most, or of several that share tensors.
    """
    names = list(dict.fromkeys(layer for meta in stream for layer in layer_map.parents(meta.name)))
    contributions = [c for meta in stream for c in layer_map.contributions[meta.name]]
    kind = layer_map.layers[names[0]].kind
    carried = sum(meta.numel for meta in stream)
    loaded = sum(c.loaded_numel for c in contributions)
    nbytes = sum(meta.nbytes for meta in stream)
    others = f" with {len(names) - 1} more that share tensors with it" if len(names) > 1 else ""
    lines = [
        f"sync.budget_bytes is {_exactly(budget_bytes)}, but {names[0]} ({kind}){others} alone "
        f"needs {_exactly(needed_bytes)}: vLLM holds its {len(stream)} tensors until the last one "
        "has arrived, in whatever order they come.",
        f"Raise sync.budget_bytes to at least {needed_bytes}.",
    ]
    if loaded < carried:
        lines.append(
            f"This worker loads {100 * loaded / carried:.0f}% of their elements, but vLLM keeps "
            "tensors whole until their layer is, whatever the rank's share."
        )
    if needed_bytes > nbytes:
        lines.append(
            f"The tensors themselves are {format_bytes(nbytes)}, but they are views that keep "
            "larger storages alive; tensors with memory of their own would need no more than that."
        )
    if any(meta.dtype in ("float32", "float64") for meta in stream):
        lines.append(
            "They are float32; if the engine runs in bfloat16, send them in it: half of that."
        )
    return PlanError("\n".join(lines), needed_bytes=needed_bytes, layer=names[0])


def _exactly(nbytes: int) -> str:
    return f"{format_bytes(nbytes)} ({nbytes} bytes)"
