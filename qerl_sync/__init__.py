"""qerl-sync: weight sync from trainers to vLLM workers, grouped by parent layer.

Names are imported when they are first used, so that `import qerl_sync` needs neither torch nor
vLLM, TRL or Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qerl_sync.buffers.ledger import BufferLedger
    from qerl_sync.buffers.trace import Trace, TraceStep
    from qerl_sync.config import SyncConfig, TrainConfig, load_config
    from qerl_sync.errors import (
        AgreementError,
        CompatError,
        ConfigError,
        CoverageError,
        IntegrityError,
        LayerMapError,
        LoadError,
        NoRoomError,
        PeerLostError,
        PlanError,
        PoisonedError,
        SyncError,
        TransportError,
        TransportTimeout,
        UnchangedError,
    )
    from qerl_sync.integrations.ray.actors import RolloutActor
    from qerl_sync.integrations.ray.in_flight import AsyncRolloutActor
    from qerl_sync.integrations.ray.pool import WorkerPool
    from qerl_sync.integrations.ray.trainer import TrainerActor
    from qerl_sync.integrations.trl import WeightSyncCallback, engine_arguments
    from qerl_sync.meta import ParamMeta, Storage
    from qerl_sync.options import SyncOptions
    from qerl_sync.plan.layer_map import Contribution, LayerMap, ParentLayer
    from qerl_sync.plan.policies import as_given, by_parent_layer
    from qerl_sync.plan.replay import replay
    from qerl_sync.plan.sync_plan import Chunk, SyncPlan, build_plan
    from qerl_sync.session import SyncReport, SyncSession
    from qerl_sync.sources.base import Source
    from qerl_sync.sources.hf import HFSource
    from qerl_sync.sources.shared_memory import share_parameters
    from qerl_sync.sources.stream import StreamSource
    from qerl_sync.transports.base import SyncResult, Transport, WorkerReport
    from qerl_sync.transports.inproc import InProcessTransport
    from qerl_sync.transports.remote import RemoteTransport

__version__ = "0.1.0"

__all__ = [
    "AgreementError",
    "AsyncRolloutActor",
    "BufferLedger",
    "Chunk",
    "CompatError",
    "ConfigError",
    "Contribution",
    "CoverageError",
    "HFSource",
    "InProcessTransport",
    "IntegrityError",
    "LayerMap",
    "LayerMapError",
    "LoadError",
    "NoRoomError",
    "ParamMeta",
    "ParentLayer",
    "PeerLostError",
    "PlanError",
    "PoisonedError",
    "RemoteTransport",
    "RolloutActor",
    "Source",
    "Storage",
    "StreamSource",
    "SyncConfig",
    "SyncError",
    "SyncOptions",
    "SyncPlan",
    "SyncReport",
    "SyncResult",
    "SyncSession",
    "Trace",
    "TraceStep",
    "TrainConfig",
    "TrainerActor",
    "Transport",
    "TransportError",
    "TransportTimeout",
    "UnchangedError",
    "WeightSyncCallback",
    "WorkerPool",
    "WorkerReport",
    "__version__",
    "as_given",
    "build_plan",
    "by_parent_layer",
    "engine_arguments",
    "load_config",
    "replay",
    "share_parameters",
]

_MODULES = {
    "buffers.ledger": ("BufferLedger",),
    "buffers.trace": ("Trace", "TraceStep"),
    "config": ("SyncConfig", "TrainConfig", "load_config"),
    "errors": (
        "AgreementError",
        "CompatError",
        "ConfigError",
        "CoverageError",
        "IntegrityError",
        "LayerMapError",
        "LoadError",
        "NoRoomError",
        "PeerLostError",
        "PlanError",
        "PoisonedError",
        "SyncError",
        "TransportError",
        "TransportTimeout",
        "UnchangedError",
    ),
    "integrations.ray.actors": ("RolloutActor",),
    "integrations.ray.in_flight": ("AsyncRolloutActor",),
    "integrations.ray.pool": ("WorkerPool",),
    "integrations.ray.trainer": ("TrainerActor",),
    "integrations.trl": ("WeightSyncCallback", "engine_arguments"),
    "meta": ("ParamMeta", "Storage"),
    "plan.layer_map": ("Contribution", "LayerMap", "ParentLayer"),
    "plan.policies": ("as_given", "by_parent_layer"),
    "plan.replay": ("replay",),
    "plan.sync_plan": ("Chunk", "SyncPlan", "build_plan"),
    "options": ("SyncOptions",),
    "session": ("SyncReport", "SyncSession"),
    "sources.base": ("Source",),
    "sources.hf": ("HFSource",),
    "sources.shared_memory": ("share_parameters",),
    "sources.stream": ("StreamSource",),
    "transports.base": ("SyncResult", "Transport", "WorkerReport"),
    "transports.inproc": ("InProcessTransport",),
    "transports.remote": ("RemoteTransport",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qerl_sync' has no attribute {name!r}")
    return getattr(import_module(f"qerl_sync.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
