"""Predict a sync's extra worker memory from the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.staging import touched_bytes
from qerl_sync.plan.sync_plan import SyncPlan
from qerl_sync.stopwatch import Span


@dataclass
class LoadCosts:
    """Hold what loading one sync takes on the worker."""

    # For each layer, see `compat.working_bytes`; and at the end, when tied heads are packed anew.
    working_bytes: Mapping[str, int] = field(default_factory=dict)
    finishing_bytes: int = 0
    kept_bytes: int = 0  # by the old weights (`on_failure: rollback`)
    peak_staged_bytes: int = 0  # the most that waits in host memory (policy `spill`)
    verify_seconds: float = 0.0  # for checksums (`sync.verify`)
    processed_layers: Sequence[Span] = ()  # when vLLM processed which parent layer


@dataclass(frozen=True)
class Arrivals:
    """How one trainer rank's chunks reach the worker."""

    sizes: Sequence[int]  # bytes of each chunk's part
    chunks_in_flight: int
    standing_bytes: int  # slots of the worker's own, which it holds from sync to sync
    in_place: Sequence[bool]  # for each chunk, whether it is read where the trainer keeps it


def footprint_bytes(
    plan: SyncPlan, layer_map: LayerMap, costs: LoadCosts, arrivals: Sequence[Arrivals]
) -> int:
    """Return the bytes of the old weights that are kept, and the highest sum, over all chunks, of
    the memory that chunks arrive in and of what the largest layer that the chunk completes needs
    while vLLM processes it, or of what is staged.
    """
    received = [
        [a.standing_bytes] * len(a.sizes)
        if a.standing_bytes
        else touched_bytes(a.sizes, a.chunks_in_flight, a.in_place)
        for a in arrivals
    ]
    whole_in: dict[str, int] = {}  # the chunk that completes each layer
    for index, names in enumerate(plan.chunk_loads):
        for name in names:
            whole_in.update(dict.fromkeys(layer_map.parents(name), index))
    working = [0] * len(plan.chunks)
    for layer, index in whole_in.items():
        working[index] = max(working[index], costs.working_bytes.get(layer, 0))
    # What a chunk completes is loaded and released, then what it leaves is staged.
    after = plan.staged_bytes
    own = [max(a + w, b) for a, w, b in zip([0, *after], working, after, strict=False)]
    loading = max((sum(at) for at in zip(*received, own, strict=True)), default=0)
    finishing = sum(touched[-1] for touched in received if touched) + costs.finishing_bytes
    return costs.kept_bytes + max(loading, finishing)
