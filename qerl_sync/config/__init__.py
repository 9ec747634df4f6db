"""The configuration of a run: closed pydantic models, and YAML files read into them."""

from qerl_sync.config.load import load_config
from qerl_sync.config.models import (
    DataConfig,
    ModelConfig,
    NoiseConfig,
    RayConfig,
    RolloutConfig,
    SyncConfig,
    TinyModelConfig,
    TrainConfig,
    WarmupConfig,
)

__all__ = [
    "DataConfig",
    "ModelConfig",
    "NoiseConfig",
    "RayConfig",
    "RolloutConfig",
    "SyncConfig",
    "TinyModelConfig",
    "TrainConfig",
    "WarmupConfig",
    "load_config",
]
