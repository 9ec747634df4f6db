"""Configuration into objects: the one place that decides which transport leads to an engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from qerl_sync.config import SyncConfig
from qerl_sync.engines.base import WeightSyncClient
from qerl_sync.engines.http import HTTPClient
from qerl_sync.engines.llm import LLMClient
from qerl_sync.errors import CompatError, ConfigError, CoverageError
from qerl_sync.session import SyncSession, Trained
from qerl_sync.sources.base import Source
from qerl_sync.sources.hf import HFSource
from qerl_sync.sources.lora import AdapterSource
from qerl_sync.sources.peft import PEFTSource
from qerl_sync.transports.base import Transport
from qerl_sync.transports.inproc import InProcessTransport
from qerl_sync.transports.joint import JointTransport, LedTransport, TrainerRanks
from qerl_sync.transports.remote import RemoteTransport
from qerl_sync.verify.probe_prompt import Probe
from qerl_sync.worker.compat.lora import smallest_max_rank

BACKEND = "qerl"


def make_session(
    source: Any,
    sync: SyncConfig,
    *,
    llm: Any = None,
    server_url: str | None = None,
    ranks: TrainerRanks | None = None,
    version: int = 0,
    root: Callable[[], Any] | None = None,
    trained: Trained | None = None,
    probe: Probe | None = None,
) -> SyncSession:
    """Return a session from `source` to that engine; see `make_transport`. Close it at the end.

    Args:
        source: a Source, or the trainer's model; see `make_source`.
        ranks: all trainer ranks, where there are several and all of them call this: each with an
            `llm` of its own, or with the `server_url` to which rank 0 sends for all.
        root: see `ShardedSource`.
    """
    transport: Transport
    if ranks is None:
        transport = make_transport(sync, llm=llm, server_url=server_url)
    elif llm is not None:
        transport = JointTransport(make_transport(sync, llm=llm), ranks)
    else:
        own = make_transport(sync, server_url=server_url) if ranks.rank == 0 else None
        transport = LedTransport(own, ranks)
    try:
        if not isinstance(source, Source):
            source = make_source(
                source, sync, transport, several_ranks=ranks is not None, root=root
            )
        return SyncSession(source, transport, sync, version=version, trained=trained, probe=probe)
    except BaseException:
        transport.close()
        raise


def make_source(
    model: Any,
    sync: SyncConfig,
    transport: Transport | None = None,
    *,
    several_ranks: bool = False,
    root: Callable[[], Any] | None = None,
) -> Source:
    """Return the source of a Hugging Face model, with or without PEFT's adapters.

    Args:
        transport: leads to all engines, which are asked whether they can serve the adapter; None:
            it is merged.
        several_ranks: each trainer rank calls this; the model may be, or become, sharded.
        root: see `ShardedSource`.

    Raises:
        ConfigError: the model is sharded, or its adapters can be sent in no way that `sync.lora`
            allows.
        CompatError, CoverageError: with `sync.lora: adapter`, the engines cannot serve it.
    """
    whole, adapter, merged = _sources(several_ranks, root)
    if not hasattr(model, "peft_config"):
        return whole(model)
    asked, reason = sync.lora == "adapter", "asked for"
    if sync.lora != "merge":
        try:
            if transport is None:
                raise ConfigError(
                    "several trainer ranks, each with a part of the model, send it merged; choose "
                    "sync.lora: merge"
                )
            as_it_is = reason if asked else "the engine serves it exactly as it is"
            served = adapter(model, reason=as_it_is)
            transport.require_adapter(served.adapter())
            return served
        except (ConfigError, CompatError, CoverageError) as exc:
            if asked:
                raise
            reason = str(exc)
    source = merged(model)
    source.lora = {"mode": "merge", "reason": reason}
    return source


def _sources(
    several_ranks: bool, root: Callable[[], Any] | None = None
) -> tuple[Callable[..., HFSource], Callable[..., AdapterSource], Callable[..., PEFTSource]]:
    """Return what makes the source of a whole model, of an adapter, and of a merged one."""
    if not several_ranks:
        return HFSource, AdapterSource, PEFTSource
    from qerl_sync.sources import sharded  # torch's FSDP takes 2 s to import

    return (
        partial(sharded.ShardedSource, root=root),
        partial(sharded.ShardedAdapterSource, root=root),
        partial(sharded.ShardedPEFTSource, root=root),
    )


def adapter_arguments(
    model: Any, sync: SyncConfig, *, several_ranks: bool = False
) -> dict[str, Any]:
    """Return what an engine must be started with to serve the adapter of a trainer's model; nothing
    where it has none, or none that is served as it is."""
    if not hasattr(model, "peft_config") or sync.lora == "merge":
        return {}
    try:
        _, adapter, _ = _sources(several_ranks)
        rank = adapter(model).adapter().rank
    except ConfigError:
        if sync.lora == "adapter":
            raise
        return {}
    return {"enable_lora": True, "max_lora_rank": smallest_max_rank(rank)}


def make_transport(
    sync: SyncConfig, *, llm: Any = None, server_url: str | None = None
) -> Transport:
    """Return the transport to an engine, as `sync.transport` and the engine's place demand.

    Opens nothing yet. By reference to an engine in this process; over shared memory or TCP, which
    the workers then find out, to one in another.

    Args:
        llm: a `vllm.LLM`, its engine in this process or in its own, or
        server_url: the address of a vLLM server: one of both.

    Raises:
        ConfigError: `sync.transport` does not lead there, or the engine cannot be reached so.
        CompatError: the installed vLLM lacks what it takes.
    """
    if (llm is None) == (server_url is None):
        raise ConfigError("a transport leads to one engine; give either llm or server_url")
    if server_url is not None:
        _refuse_inproc(sync, f"is a server ({server_url})")
        return remote_transport(sync, HTTPClient(server_url, sync.timeout_seconds))
    client = LLMClient(llm, sync.timeout_seconds)
    if client.in_process and sync.transport in ("auto", "inproc"):
        return InProcessTransport(llm)
    if not client.in_process:
        _refuse_inproc(sync, "has a process of its own")
    _require_backend(sync, llm, in_process=client.in_process)
    return remote_transport(sync, client)


def remote_transport(
    sync: SyncConfig, client: WeightSyncClient | None, **options: Any
) -> RemoteTransport:
    """Return the transport to the workers of `client`'s engines, as the section `sync` says.

    Args:
        options: more arguments of `RemoteTransport`, as they are.
    """
    given = {**transport_options(sync), **options}
    return RemoteTransport(client, address=sync.trainer_address, port=sync.trainer_port, **given)


def transport_options(sync: SyncConfig) -> dict[str, Any]:
    """Return the arguments of a `RemoteTransport` that the section `sync` decides anywhere."""
    return {
        "transport": sync.transport,
        "chunks_in_flight": sync.chunks_in_flight,
        "timeout_seconds": sync.timeout_seconds,
        "bind": sync.trainer_bind or "",
        "pause_mode": sync.pause_mode,
        "recompute_running": sync.recompute_running,
    }


def _refuse_inproc(sync: SyncConfig, where: str) -> None:
    if sync.transport == "inproc":
        raise ConfigError(
            "sync.transport: 'inproc' hands tensors over within one process, and the engine "
            f"{where}; choose auto, shm or tcp"
        )


def _require_backend(sync: SyncConfig, llm: Any, *, in_process: bool) -> None:
    backend = getattr(llm.llm_engine.vllm_config.weight_transfer_config, "backend", None)
    if backend == BACKEND:
        return
    given = f"weight_transfer_config has the backend {backend!r}" if backend else "it has none"
    otherwise = (
        "choose sync.transport auto or inproc"
        if in_process
        else "have it in this process: VLLM_ENABLE_V1_MULTIPROCESSING=0 before vLLM is imported"
    )
    raise ConfigError(
        f"sync.transport: {sync.transport!r} needs an engine with our weight transfer engine, and "
        f'{given}; make it with LLM(..., weight_transfer_config={{"backend": "{BACKEND}"}}), or '
        f"{otherwise}"
    )
