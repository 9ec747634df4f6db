"""Connect to a Ray cluster or start one, and check its size before anything else starts."""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qerl_sync.config import SyncConfig
from qerl_sync.engines.ray_actor import require_object_store
from qerl_sync.errors import CompatError, ConfigError
from qerl_sync.transports.base import Transport

CONNECT_SECONDS = 5.0


def require_ray() -> Any:
    """Return the module `ray`. Raise CompatError if it is not installed."""
    try:
        import ray
    except ImportError as exc:
        raise CompatError("Ray is not installed; pip install ray") from exc
    return ray


def connect(address: str | None = None, **options: Any) -> bool:
    """Join the cluster at `address`, or start one on this machine. Do nothing if already connected.

    Args:
        address: `host:port`, `auto` for the one that runs here, None for one of our own.
        options: of `ray.init`.

    Returns:
        Whether this call connected, so that the caller must `ray.shutdown()` in the end.

    Raises:
        ConfigError: no cluster answers there, or it cannot be started as asked.
    """
    ray = require_ray()
    if ray.is_initialized():
        return False
    where = {"address": address} if address else {"include_dashboard": False}
    try:
        # Ray would retry for minutes where nothing listens at `host:port`.
        host, _, port = (address or "").rpartition(":")
        if host and port.isdecimal() and "/" not in host:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(**{**where, **options})
    except Exception as exc:
        raise ConfigError(
            f"no Ray cluster can be reached at {address!r}: {exc}. Start one there (`ray start "
            "--head`), or leave ray.address out to have one started on this machine"
            if address
            else f"Ray does not start on this machine: {exc}"
        ) from exc
    return True


def require_room(bundles: Sequence[Mapping[str, float]], what: str) -> None:
    """Check that the cluster could ever place all `bundles`, each on one node.

    Raises:
        ConfigError: it has too little of something; says of what, how much, and how much there is.
    """
    ray = require_ray()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name in sorted({name for bundle in bundles for name in bundle}):
        wanted = sum(bundle.get(name, 0) for bundle in bundles)
        there = sum(node.get(name, 0) for node in nodes)
        largest = max(bundle.get(name, 0) for bundle in bundles)
        if wanted > there:
            raise ConfigError(
                f"{what} needs {wanted:g} {name} and the cluster has {there:g}; give each actor "
                "less (ray.trainer, ray.rollout), use fewer of them, or add nodes"
            )
        if largest > max(node.get(name, 0) for node in nodes):
            raise ConfigError(
                f"an actor of {what} needs {largest:g} {name} on one node, and no node has as many"
            )


def require_room_for_chunks(config: SyncConfig, nodes: Collection[str]) -> None:
    """Check that these nodes' object stores hold `sync.chunks_in_flight` full chunks.

    Skip the check if chunks travel otherwise. Assume full chunks: their real size is unknown before
    a plan exists.

    Args:
        nodes: of the trainer and the workers, by id.

    Raises:
        ConfigError: one is too small; says which, and what would do.
    """
    stored = config.transport == "ray" or (config.transport == "auto" and len(set(nodes)) > 1)
    chunk_bytes = config.chunk_bytes or Transport.chunk_bytes
    if stored and chunk_bytes:
        require_object_store(config.chunks_in_flight * chunk_bytes, nodes)
