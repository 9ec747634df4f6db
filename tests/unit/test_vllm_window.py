"""Which versions of vLLM are taken, and how what one of them lacks is told."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from qerl_sync.errors import CompatError
from qerl_sync.worker.compat import coupling

ROOT = Path(__file__).resolve().parents[2]
NEEDED = [name for name, feature in coupling.FEATURES.items() if feature.needed]


class AnyName(ModuleType):
    """A module that has every name, and those of `lacks` not."""

    lacks: frozenset[str] = frozenset()

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or name in self.lacks:
            raise AttributeError(name)
        return Anything()


class Anything:
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


@pytest.fixture
def vllm(monkeypatch):
    """`vllm(version, lacks)`: stands for a vLLM and a TRL that have all that is looked up."""

    def install(version: str, lacks: str = "") -> None:
        for feature in coupling.FEATURES.values():
            for name in feature.names:
                module = AnyName(name)
                module.lacks = frozenset(lacks.split())
                monkeypatch.setitem(sys.modules, name, module)
        sys.modules["vllm"].__version__ = version

    return install


def test_the_window_is_that_of_the_project_file():
    wished = re.findall(r'"(vllm[<>=][^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert wished == [coupling.WINDOW]
    assert f"`{coupling.WINDOW}`" in (ROOT / "docs/install.md").read_text()


@pytest.mark.parametrize("version", ["0.24.9", "0.22.0", "0.9.2+cpu", "0.24.1rc1.dev3+gabc"])
@pytest.mark.parametrize("feature", NEEDED)
def test_an_older_one_is_refused(vllm, version, feature):
    vllm(version)
    with pytest.raises(CompatError) as error:
        coupling.require(feature)
    assert (error.value.version, error.value.window) == (version, coupling.WINDOW)
    assert f"pip install '{coupling.WINDOW}'" in str(error.value)


@pytest.mark.parametrize("version", ["0.25.0", "0.31.0+cpu", "0.33.1", "1.0", "0.1.dev1+g1", "dev"])
def test_others_are_asked_for_what_they_have(vllm, version):
    vllm(version)
    for feature in coupling.FEATURES:
        coupling.require(feature)
    vllm(version, "is_deferred_attention_layer")
    assert "has_device_tensors" in coupling.lookup("layerwise reload").values()
    coupling.require("layerwise reload")
    vllm(version, "_layerwise_process")
    with pytest.raises(CompatError) as error:
        coupling.require("layerwise reload")
    (missing,) = error.value.missing
    assert missing.endswith("reload.layerwise._layerwise_process")
    assert error.value.version == version


@pytest.mark.parametrize(
    ("version", "lacks", "code", "says"),
    [
        ("0.33.0", "", 0, "vLLM 0.33.0"),
        ("0.33.0", "has_device_tensors", 0, "present"),
        ("0.33.0", "SKIP_LOAD_TENSORS", 0, "replaced by SKIP_TENSORS"),
        ("0.33.0", "WeightTransferEngine", 1, "base.WeightTransferEngine"),
        ("0.33.0", "initialize_model", 0, "absent       vllm.model_executor.model_loader.utils."),
        ("0.24.0", "", 1, "older"),
    ],
)
def test_the_script_fails_if_a_sync_cannot_work(vllm, capsys, version, lacks, code, says):
    vllm(version, lacks)
    run = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "vllm-features")))
    assert run.main() == code
    assert says in capsys.readouterr().out


@pytest.mark.vllm
def test_the_installed_one_has_what_a_sync_needs():
    for feature in NEEDED:
        coupling.require(feature)


@pytest.mark.vllm
def test_native_engines_of_another_contract_are_refused_when_they_are_made(monkeypatch):
    """vLLM 0.25 has both engines, but not the trainer's side that ours stand in front of."""
    from vllm.distributed.weight_transfer import nccl_engine

    from qerl_sync.worker.protocol import native

    monkeypatch.delattr(nccl_engine, "NCCLTrainerInitInfo", raising=False)
    for engine in (native.QerlNCCLWeightTransferEngine, native.QerlIPCWeightTransferEngine):
        with pytest.raises(CompatError) as error:
            engine(None, None, None, None)
        assert any(name.endswith(".NCCLTrainerInitInfo") for name in error.value.missing)
