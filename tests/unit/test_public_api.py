"""What `import qerl_sync` gives, and what it must not need."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import qerl_sync

PUBLIC = [
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


def test_public_names():
    assert qerl_sync.__all__ == PUBLIC
    assert dir(qerl_sync) == PUBLIC
    for name in PUBLIC:
        assert getattr(qerl_sync, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'WeightSink'"):
        qerl_sync.WeightSink  # noqa: B018


HEAVY = ("torch", "vllm", "trl", "ray", "transformers", "pydantic", "numpy", "typer", "rich")


def _imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    return {module.partition(".")[0] for module in out.split()}


def test_importing_the_package_imports_nothing_heavy():
    assert not _imported_by("import qerl_sync").intersection(HEAVY)


def test_planning_imports_neither_torch_nor_vllm():
    modules = _imported_by("from qerl_sync import build_plan, replay, by_parent_layer, SyncPlan")
    assert not modules.intersection(("torch", "vllm", "transformers", "numpy"))


def test_every_error_is_documented_in_the_tree():
    errors = import_module("qerl_sync.errors")
    classes = [name for name, value in vars(errors).items() if isinstance(value, type)]
    assert classes
    for name in classes:
        assert issubclass(getattr(errors, name), errors.SyncError)
        assert name in (errors.__doc__ or "")
