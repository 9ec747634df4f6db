"""Check that trainer and workers, and workers among themselves, fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qerl_sync.errors import AgreementError, WorldSizeError
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.wire.messages import PROTOCOL, Hello

# Fields of Hello that must be equal for all workers of a sync.
ALIKE = ("model", "dtype", "quantization", "layout", "packages")


def require_protocol(hello: Hello, own_version: str) -> None:
    """Raise AgreementError if the worker runs another qerl-sync."""
    theirs = hello.packages.get("qerl-sync", "?")
    if hello.protocol != PROTOCOL or theirs != own_version:
        raise AgreementError(
            f"worker {hello.rank} runs qerl-sync {theirs} (protocol {hello.protocol}), the trainer "
            f"{own_version} (protocol {PROTOCOL}); install the same version for both",
            subject="version",
        )


def require_alike(hellos: Sequence[Hello]) -> None:
    """Raise AgreementError, naming the first difference between workers."""
    first = hellos[0]
    for other in hellos[1:]:
        for name in ALIKE:
            mine, theirs = getattr(first, name), getattr(other, name)
            if mine != theirs:
                raise AgreementError(
                    f"{first.worker} has {name} {mine!r}, {other.worker} {theirs!r}; sync them in "
                    "sessions of their own, or start them alike",
                    subject=name,
                )


def require_complete(hellos: Sequence[Hello], world_size: int | None) -> None:
    """Require that every worker of the engines has connected.

    A worker that has not would go on serving old weights as the new version.

    Args:
        world_size: workers in all, with those of all data parallel replicas; None: not known.

    Raises:
        AgreementError: names the ranks that did not connect.
        WorldSizeError: all ranks of the replicas that have connected are there, and the engine
            has another number of workers.
    """
    replicas = {(hello.engine, hello.replica): hello.world_size for hello in hellos}
    for (engine, replica), size in replicas.items():
        present = {h.rank for h in hellos if (h.engine, h.replica) == (engine, replica)}
        missing = sorted(set(range(size)) - present)
        if missing:
            raise AgreementError(
                f"of engine {engine}, replica {replica}, the worker ranks {missing} of {size} did "
                "not connect; look at their log",
                subject="ranks",
                engine=engine,
                replica=replica,
                ranks=missing,
            )
    # A server of a part of the replicas reports the size of the whole deployment.
    partial = any(hello.server_is_partial for hello in hellos)
    if world_size is not None and world_size != len(hellos) and not partial:
        raise WorldSizeError(
            f"{len(hellos)} workers have connected, and the engine has {world_size}: "
            f"{', '.join(hello.worker for hello in hellos)}. A worker that is not connected would "
            "keep its old weights; look at the engine's log",
            connected=len(hellos),
            expected=world_size,
        )


def require_same_map(planned: LayerMap, now: LayerMap) -> None:
    """Raise AgreementError, naming the first difference, if workers load in another way now."""
    if planned.digest == now.digest:
        return
    pairs: tuple[tuple[Mapping[str, object], Mapping[str, object]], ...] = (
        (planned.contributions, now.contributions),
        (planned.layers, now.layers),
    )
    for before, after in pairs:
        for name in [*before, *after]:
            if before.get(name) != after.get(name):
                raise AgreementError(
                    f"the workers are not what the plan was made for: of {name!r} they said "
                    f"{before.get(name)!r}, and now {after.get(name)!r}. Their engine was started "
                    "with another model or layout; close the session and make a new one",
                    subject="layer_map",
                )
