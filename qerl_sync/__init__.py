"""qerl-sync: weight sync from trainers to vLLM workers, grouped by parent layer.

The names that a training script needs. Every other name is imported from its module; all errors
are in `qerl_sync.errors`. Names are imported when they are first used, so that `import qerl_sync`
needs neither torch nor vLLM, TRL or Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qerl_sync.config import SyncConfig, TrainConfig, load_config
    from qerl_sync.engines.async_llm import AsyncLLMClient
    from qerl_sync.engines.http import HTTPClient
    from qerl_sync.engines.llm import LLMClient
    from qerl_sync.errors import ConfigError, PoisonedError, SyncError, TransportError
    from qerl_sync.integrations.ray.actors import RolloutActor
    from qerl_sync.integrations.ray.in_flight import AsyncRolloutActor
    from qerl_sync.integrations.ray.pool import WorkerPool
    from qerl_sync.integrations.ray.trainer import TrainerActor
    from qerl_sync.integrations.trl import WeightSyncCallback, engine_arguments
    from qerl_sync.published.publisher import Publisher
    from qerl_sync.published.source import PublishedSource
    from qerl_sync.session import SyncReport, SyncSession
    from qerl_sync.sources.base import Source
    from qerl_sync.sources.hf import HFSource
    from qerl_sync.sources.lora import AdapterSource
    from qerl_sync.sources.noise import noise_of
    from qerl_sync.sources.peft import PEFTSource
    from qerl_sync.sources.shared_memory import share_parameters
    from qerl_sync.sources.stream import StreamSource
    from qerl_sync.transports.inproc import InProcessTransport
    from qerl_sync.transports.remote import RemoteTransport

__version__ = "0.1.0"

__all__ = [
    "AdapterSource",
    "AsyncLLMClient",
    "AsyncRolloutActor",
    "ConfigError",
    "HFSource",
    "HTTPClient",
    "InProcessTransport",
    "LLMClient",
    "PEFTSource",
    "PoisonedError",
    "PublishedSource",
    "Publisher",
    "RemoteTransport",
    "RolloutActor",
    "Source",
    "StreamSource",
    "SyncConfig",
    "SyncError",
    "SyncReport",
    "SyncSession",
    "TrainConfig",
    "TrainerActor",
    "TransportError",
    "WeightSyncCallback",
    "WorkerPool",
    "__version__",
    "engine_arguments",
    "load_config",
    "noise_of",
    "share_parameters",
]

_MODULES = {
    "config": ("SyncConfig", "TrainConfig", "load_config"),
    "engines.async_llm": ("AsyncLLMClient",),
    "engines.http": ("HTTPClient",),
    "engines.llm": ("LLMClient",),
    "errors": ("ConfigError", "PoisonedError", "SyncError", "TransportError"),
    "integrations.ray.actors": ("RolloutActor",),
    "integrations.ray.in_flight": ("AsyncRolloutActor",),
    "integrations.ray.pool": ("WorkerPool",),
    "integrations.ray.trainer": ("TrainerActor",),
    "integrations.trl": ("WeightSyncCallback", "engine_arguments"),
    "published.publisher": ("Publisher",),
    "published.source": ("PublishedSource",),
    "session": ("SyncReport", "SyncSession"),
    "sources.base": ("Source",),
    "sources.hf": ("HFSource",),
    "sources.lora": ("AdapterSource",),
    "sources.noise": ("noise_of",),
    "sources.peft": ("PEFTSource",),
    "sources.shared_memory": ("share_parameters",),
    "sources.stream": ("StreamSource",),
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
