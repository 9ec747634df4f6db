"""Which weights that vLLM skips it was built without, by what is in its model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qerl_sync.plan.layer_map import Contribution
from qerl_sync.worker.load.dry_run import DryRun
from qerl_sync.worker.load.observe import left_out

# What a checkpoint may have more than the engine, which built one layer.
LAYER = {f"model.tower.layers.1.{name}.weight" for name in ("norm", "o_proj")}
UNBUILT = {"model.tower.post.weight", "model.tower.last.weight"}
REFUSED = {
    "extra.weight",
    "model.extra.weight",
    "model.tower.layers.0.o_proj.bias",  # the trainer's model computes with it
    "model.tower.layers.0.extra.weight",
    "model.tower.layers.extra.weight",
}


@pytest.fixture
def run():
    """A dry run that took a vision tower's only layer and the head."""
    layer = torch.nn.ModuleDict(
        {"norm": torch.nn.LayerNorm(4), "o_proj": torch.nn.Linear(4, 4, bias=False)}
    )
    model = torch.nn.Module()
    model.tower = torch.nn.Module()
    model.tower.layers = torch.nn.ModuleList([layer])
    model.tower.post, model.tower.last = None, torch.nn.Identity()
    model.head = torch.nn.Linear(4, 4)
    found = DryRun(model, None)
    for parent in ("tower.layers.0.norm", "tower.layers.0.o_proj", "head"):
        name = f"model.{parent}.weight" if parent != "head" else "head.weight"
        found.contributions[name] = [Contribution(parent, "weight", 4, 16, True)]
    return found


@pytest.mark.parametrize(
    ("num_layers", "gone"),
    [(2, LAYER | UNBUILT), (1, UNBUILT), (3, UNBUILT)],
    ids=["the last layer of two", "a layer that the engine does not know of", "one of two"],
)
def test_a_shorter_list_and_an_empty_place_need_no_weights(run, num_layers, gone):
    config = SimpleNamespace(text=None, vision=SimpleNamespace(num_hidden_layers=num_layers))
    assert left_out(run, LAYER | UNBUILT | REFUSED, config) == gone
    assert left_out(run, set(), config) == set()
