"""Our sources by the `WeightSource` contract of the vLLM that is imported, before 0.33 and since.

QERL_SYNC_VLLM_SOURCES=FOLDER, with `vllm/` of another version's wheel, runs the same against that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.features import needs

from qerl_sync import HFSource
from qerl_sync.errors import PlanError

pytestmark = [pytest.mark.vllm, needs("trainer's side of weight transfer")]

SOURCES = os.environ.get("QERL_SYNC_VLLM_SOURCES", "")


def planned(source: Any) -> Any:
    from qerl_sync.integrations.vllm import PlannedSource
    from qerl_sync.plan.layer_map import Contribution, LayerMap, ParentLayer
    from qerl_sync.plan.sync_plan import build_plan

    metas = source.metadata()
    layers = {m.name: ParentLayer(m.name, "Linear", m.numel, m.numel) for m in metas}
    held = {m.name: (Contribution(m.name, "w", m.numel, m.nbytes, True),) for m in metas}
    return PlannedSource(source, build_plan(metas, LayerMap(layers, held), "reorder"))


def stream_of(source: Any) -> list[Any]:
    return list(source.iter_full() if hasattr(type(source), "owned_names") else source)


def test_both_directions():
    from vllm.distributed.weight_transfer.base import ModuleSource

    from qerl_sync.integrations.vllm import VLLMSource
    from qerl_sync.integrations.weight_source import metas_of

    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5))
    parameters = dict(model.named_parameters())
    ours = VLLMSource(ModuleSource(model))
    assert [meta.name for meta in ours.metadata()] == list(parameters)
    assert ours.held_names() is None
    names = list(reversed(parameters))
    assert all(tensor.equal(parameters[name]) for name, tensor in ours.materialize(names))
    for source in (ours, HFSource(model, convert=False)):
        sent = planned(source)
        stream = stream_of(sent)
        assert [name for name, _ in stream] == [meta.name for meta in metas_of(sent)]
        assert sorted(name for name, _ in stream) == sorted(parameters)
        assert all(tensor.equal(parameters[name]) for name, tensor in stream)
        assert stream_of(sent), "each pass is a fresh one"


def test_a_rank_with_a_part():
    from vllm.distributed.weight_transfer import base

    from qerl_sync.integrations.vllm import VLLMSource
    from qerl_sync.integrations.weight_source import DECLARES_OWNERS, as_declared

    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}

    class Part(base.WeightSource):
        @as_declared
        def metadata(self):
            owners = {"a": {}, "b": {"owners": (0, 1)}, "c": {"owners": (1,)}}
            more = owners if DECLARES_OWNERS else {"a": {}, "b": {}, "c": {}}
            return [base.ParamMeta(n, torch.float32, (2 + (n != "a"),), **more[n]) for n in "abc"]

        def held_names(self):
            return list(tensors)

        def __iter__(self):
            yield from [*tensors.items(), ("c", None)]

        def iter_full(self):
            yield from tensors.items()

    ours = VLLMSource(Part(), rank=0)
    assert ours.held_names() == {"a", "b"}
    assert [name for name, _ in ours.materialize(["a", "b"])] == ["a", "b"]
    ours.end_pass()
    if DECLARES_OWNERS:
        assert VLLMSource(Part(), rank=1).held_names() is None
        assert ours.owners() == {"a": None, "b": (0, 1), "c": (1,)}
        foreign = HFSource(torch.nn.Linear(2, 2), convert=False)
        foreign.held_names = lambda: ["weight"]
        with pytest.raises(PlanError):
            planned(foreign)


@pytest.mark.skipif(not SOURCES, reason="QERL_SYNC_VLLM_SOURCES names no other vLLM")
def test_by_another_vllm():
    environment = {**os.environ, "QERL_SYNC_VLLM_SOURCES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([SOURCES, os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
