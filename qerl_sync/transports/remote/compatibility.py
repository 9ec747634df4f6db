"""Check that trainer and workers, and workers among themselves, fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qerl_sync.errors import AgreementError, LayerMapError, WorldSizeError
from qerl_sync.plan.layer_map import Contribution, LayerMap, Loading, ParentLayer
from qerl_sync.wire.messages import PROTOCOL, Hello

# Of these, all workers of a sync must say the same.
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
    # Such a server reports the size of the whole deployment, whose rest other servers control.
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


def joint_map(maps: Sequence[LayerMap]) -> LayerMap:
    """Return one layer map to plan with, where ranks hold different parts of the model.

    A tensor's parents are those that it has on any rank, with what most elements of it are worth
    on one, so that a plan that holds for the joint map holds for each rank.

    Raises:
        LayerMapError: no rank does anything with a tensor.
    """
    if untaken := frozenset.intersection(*(one.elsewhere for one in maps)):
        raise LayerMapError(
            f"no pipeline stage of the engine does anything with {min(untaken)!r} (and "
            f"{len(untaken) - 1} more); its weights would stay as they are. Do not send it, or, if "
            "that is right, name it in sync.ignore_names"
        )
    if all(other.digest == maps[0].digest for other in maps[1:]):
        return maps[0]
    layers: dict[str, ParentLayer] = {}
    contributions: dict[str, dict[tuple[str, str, int], Contribution]] = {}
    for one in maps:
        for name, layer in one.layers.items():
            known = layers.setdefault(name, layer)
            if layer.expected_numel > known.expected_numel:
                layers[name] = layer
        for name, found in one.contributions.items():
            mine = contributions.setdefault(name, {})
            counted: dict[tuple[str, str], int] = {}
            for c in found:
                place = (c.parent_layer, c.parameter)
                counted[place] = counted.get(place, -1) + 1
                key = (*place, counted[place])
                if key not in mine or c.held_bytes > mine[key].held_bytes:
                    mine[key] = c
    joined = {name: tuple(found.values()) for name, found in contributions.items()}
    # What any rank buffers is planned as buffered.
    loading: dict[str, Loading] = {name: layer.loading for name, layer in layers.items()}
    for one in maps:
        layerwise = (name for name, layer in one.layers.items() if layer.loading == "layerwise")
        loading.update(dict.fromkeys(layerwise, "layerwise"))
    expected: dict[str, int] = dict.fromkeys(layers, 0)
    for found in joined.values():
        for c in found:
            expected[c.parent_layer] += c.loaded_numel
    return LayerMap(
        layers={
            name: ParentLayer(
                name=name,
                kind=layer.kind,
                total_numel=max(layer.total_numel, expected[name]),
                expected_numel=expected[name],
                deferred=layer.deferred,
                loading=loading[name],
                num_loads=layer.num_loads,
            )
            for name, layer in layers.items()
        },
        contributions=joined,
    )
