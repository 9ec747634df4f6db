"""What `import qerl_sync` gives, and what it must not need."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from importlib import import_module

import pytest

import qerl_sync

PUBLIC = [
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


def test_public_names():
    assert qerl_sync.__all__ == PUBLIC
    assert dir(qerl_sync) == PUBLIC
    for name in PUBLIC:
        assert getattr(qerl_sync, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'WeightSink'"):
        qerl_sync.WeightSink  # noqa: B018


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - {"__version__"}))
def test_each_public_name_has_an_example_that_compiles(name):
    doc = inspect.cleandoc(getattr(qerl_sync, name).__doc__)
    example = re.search(r"^Example:\n((?:    .*\n?|\n(?=    ))+)", doc, re.M)
    assert example, f"{name} has no example"
    code = textwrap.dedent(example[1]).strip()
    assert 3 <= len(code.splitlines()) <= 8
    compile(code, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


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
    modules = _imported_by("from qerl_sync.plan import policies, simulator, sync_plan")
    assert not modules.intersection(("torch", "vllm", "transformers", "numpy"))


def test_every_error_is_documented_in_the_tree():
    errors = import_module("qerl_sync.errors")
    classes = [name for name, value in vars(errors).items() if isinstance(value, type)]
    assert classes
    for name in classes:
        assert issubclass(getattr(errors, name), errors.SyncError)
        assert name in (errors.__doc__ or "")
