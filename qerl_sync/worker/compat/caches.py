"""The caches in which an engine keeps what weights have computed, and what a reset reaches.

`coupling` lists the names of vLLM's classes. Besides, of vLLM's configuration:
`kv_transfer_config` (with the key `secondary_tiers` of its OffloadingConnector) and
`ec_transfer_config`; and of an `AsyncLLM` `engine_core.core_engines`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def forget_caches(call: Callable[..., Any], *, running: bool) -> bool | None:
    """Empty every cache of an engine that holds work of old weights.

    Args:
        call: calls a method of the engine by its name in vLLM, with keyword arguments.
        running: requests in flight forget their keys and values too.

    Returns:
        Whether the prefix cache and what a KV connector keeps are empty; None where it is not said,
        as by the HTTP server of vLLM 0.25.
    """
    # With the connector always: vLLM reports success where there is none, and without this an
    # external cache hands blocks of the old weights to requests with the same prefix.
    done = call("reset_prefix_cache", reset_running_requests=running, reset_connector=True)
    # Also if requests in flight keep theirs: a later request with the same image would otherwise
    # get the old vision tower's embeddings.
    call("reset_encoder_cache")
    # vLLM's own pause empties it with the others. It clears the API side before the engine's side,
    # so that neither believes that the other has an item which it has not.
    call("reset_mm_cache")
    return None if done is None else bool(done)


def ask_every_replica(engine: Any) -> None:
    """Have `reset_prefix_cache` of this `AsyncLLM` answer for every data parallel replica.

    vLLM's own asks all of them and returns what the first one answers: a replica whose requests
    hold their blocks would keep keys and values of old weights unnoticed. Idempotent.
    """
    core: Any = getattr(engine, "engine_core", None)
    if not (hasattr(core, "core_engines") and hasattr(core, "_call_utility_async")):
        return

    async def reset(reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        asked = ("reset_prefix_cache", reset_running_requests, reset_connector)
        replicas = list(core.core_engines)  # now: their number may change
        answers = await asyncio.gather(
            *(core._call_utility_async(*asked, engine=replica) for replica in replicas)
        )
        kept = [
            int.from_bytes(replica, "little")
            for replica, emptied in zip(replicas, answers, strict=True)
            if not emptied
        ]
        if kept and len(replicas) > 1:
            logger.warning("data parallel replicas %s keep their prefix cache", kept)
        return not kept

    engine.reset_prefix_cache = reset  # of this object alone


def llm_method(llm: Any, name: str) -> Callable[..., Any]:
    """Return that method of a `vllm.LLM` or, where it has none, of its engine."""
    found: Callable[..., Any] = getattr(llm if hasattr(llm, name) else llm.llm_engine, name)
    return found


def connector_of(vllm_config: Any) -> tuple[str, str]:
    """Return the engine's cache connector, and why a sync cannot empty what it keeps.

    Each is empty where there is none. vLLM cannot be asked: `reset_prefix_cache` reports success
    for a connector that does not implement the reset, and for tiers that it leaves alone.
    """
    encoder_cache = getattr(vllm_config, "ec_transfer_config", None)
    if encoder_cache is not None and encoder_cache.ec_connector is not None:
        name = str(encoder_cache.ec_connector)
        return name, "it keeps embeddings of images, and vLLM has no call that removes them"
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    if transfer is None or transfer.kv_connector is None:
        return "", ""
    return transfer.kv_connector, _why_it_keeps(vllm_config)


def _why_it_keeps(vllm_config: Any) -> str:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    transfer = vllm_config.kv_transfer_config
    kind = KVConnectorFactory.get_connector_class(transfer)
    if hasattr(kind, "_get_connector_classes_and_configs"):  # it combines several
        children = kind._get_connector_classes_and_configs(vllm_config)
        reasons = [_why_it_keeps(config) for _, config in children]
        return next((reason for reason in reasons if reason), "")
    base = getattr(KVConnectorBase_V1, "reset_cache", None)
    if getattr(kind, "reset_cache", base) is base:
        return f"{kind.__name__} does not implement reset_cache()"
    if transfer.kv_connector_extra_config.get("secondary_tiers"):
        return f"{kind.__name__} does not empty its secondary_tiers"
    return ""
