"""Plan streams that cannot be reordered: what waits in host memory, and when vLLM gets it.

    arrives    a.q   b.q   a.k   norm   a.v   b.k   b.v
    vLLM gets                    norm   a.q a.k a.v    b.q b.k b.v
    staged     a.q   a.q   a.q   a.q    b.q   b.q
                     b.q   b.q   b.q          b.k
                           a.k   a.k

A group is handed over when its last tensor has arrived; it is what `by_parent_layer` would send in
one piece: the tensors of one parent layer, or of several that share tensors. So the device never
holds more than one open group, and what is too early is held where memory is cheap.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from qerl_sync.errors import PlanError
from qerl_sync.meta import ParamMeta, format_bytes
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.policies import group_labels

# The upper bound of a chunk where none is given. In one chunk for all, nothing would be staged, and
# vLLM would hold everything.
CHUNK_BYTES = 64 << 20


def load_order(metas: Sequence[ParamMeta], layer_map: LayerMap) -> list[ParamMeta]:
    """Return the order in which vLLM gets a stream: each group as soon as it is whole, and tensors
    without a parent layer at once."""
    return [metas[place] for group in _whole_groups(metas, layer_map) for place in group]


@dataclass(frozen=True)
class Spill:
    """The part of a plan that the policy `spill` adds.

    The worker copies what a chunk leaves incomplete into its host memory before it gives the
    chunk's own memory back. What becomes whole within one chunk is loaded from there.

    Attributes:
        load_order: places in the stream, in the order in which vLLM gets its tensors.
        num_loaded: for each chunk, how many of these it gets when that chunk is there.
        budget_bytes: upper bound of the bytes staged at once; None: there is none.
        directory: on the worker, for the files that it stages in; None: it stages in memory.
    """

    load_order: tuple[int, ...]
    num_loaded: tuple[int, ...]
    budget_bytes: int | None = None
    directory: str | None = None

    @property
    def loads(self) -> list[tuple[int, ...]]:
        """Return, for each chunk, the places of the tensors that vLLM gets when it is there."""
        ends = list(accumulate(self.num_loaded, initial=0))
        return [self.load_order[a:b] for a, b in pairwise(ends)]

    def staged_bytes(self, metas: Sequence[ParamMeta], lengths: Sequence[int]) -> list[int]:
        """Return the bytes staged after each chunk, of which each has so many tensors.

        There they are highest: what a chunk completes is loaded, and its memory free, before what
        it leaves is staged.
        """
        arrived = list(accumulate((meta.nbytes for meta in metas), initial=0))
        loaded = list(accumulate((metas[i].nbytes for i in self.load_order), initial=0))
        counts = zip(accumulate(lengths), accumulate(self.num_loaded), strict=True)
        return [arrived[came] - loaded[went] for came, went in counts]

    def staged(self, lengths: Sequence[int]) -> set[int]:
        """Return the places of the tensors that are staged at any time."""
        ends = list(accumulate(lengths))
        return {
            place
            for chunk, places in enumerate(self.loads)
            for place in places
            if bisect_right(ends, place) < chunk
        }

    def require_possible(self, lengths: Sequence[int]) -> None:
        """Raise PlanError if tensors are to be loaded twice, never, or before they arrive."""
        ends = list(accumulate(lengths))
        once = sorted(self.load_order) == list(range(sum(lengths)))
        counted = len(self.num_loaded) == len(ends) and min(self.num_loaded, default=0) >= 0
        arrived = all(
            place < end for places, end in zip(self.loads, ends, strict=False) for place in places
        )
        if not (once and counted and arrived and sum(self.num_loaded) == sum(lengths)):
            raise PlanError(
                "the plan's load order is not one of its stream: tensors would be loaded twice, "
                "never, or before they arrive; make the plan again"
            )

    def require_within_budget(self, metas: Sequence[ParamMeta], lengths: Sequence[int]) -> None:
        """Raise PlanError, naming the bytes and when they are needed, if the budget is smaller."""
        staged = self.staged_bytes(metas, lengths)
        needed = max(staged, default=0)
        if self.budget_bytes is None or needed <= self.budget_bytes:
            return
        last = metas[sum(lengths[: staged.index(needed) + 1]) - 1].name
        raise PlanError(
            f"in the source's order {needed:,} bytes ({format_bytes(needed)}) wait in the worker's "
            f"host memory when {last!r} has arrived, and sync.spill_budget_bytes is "
            f"{self.budget_bytes:,} ({format_bytes(self.budget_bytes)}); raise it to at least "
            f"{needed}, let the source yield the tensors of a layer closer together, or choose "
            "`policy: reorder` if it can",
            needed_bytes=needed,
        )

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Spill:
        places = {name: tuple(data[name]) for name in ("load_order", "num_loaded")}
        return cls(**{**data, **places})


def plan_spill(
    metas: Sequence[ParamMeta],
    layer_map: LayerMap,
    lengths: Sequence[int],
    *,
    budget_bytes: int | None = None,
    directory: str | None = None,
) -> Spill:
    """Plan when each tensor is loaded, if `metas` arrive in chunks of `lengths` tensors.

    Raises:
        PlanError: more than the budget would be staged.
    """
    groups = list(_whole_groups(metas, layer_map))
    ends = list(accumulate(lengths))
    num_loaded = [0] * len(ends)
    for group in groups:
        num_loaded[bisect_right(ends, group[-1])] += len(group)
    order = tuple(place for group in groups for place in group)
    spill = Spill(order, tuple(num_loaded), budget_bytes, directory)
    spill.require_within_budget(metas, lengths)
    return spill


def peak_staged_bytes(metas: Sequence[ParamMeta], layer_map: LayerMap) -> int:
    """Return the most that any cut into chunks can stage: that of chunks of one tensor."""
    lengths = [1] * len(metas)
    spill = plan_spill(metas, layer_map, lengths)
    return max(spill.staged_bytes(metas, lengths), default=0)


def _whole_groups(metas: Sequence[ParamMeta], layer_map: LayerMap) -> Iterator[list[int]]:
    """Yield the places of each group's tensors, in the order in which the groups become whole."""
    labels = group_labels(metas, layer_map)
    sizes = Counter(labels)
    arrived: dict[str | int, list[int]] = defaultdict(list)
    for place, label in enumerate(labels):
        arrived[label].append(place)
        if len(arrived[label]) == sizes[label]:
            yield arrived.pop(label)
