"""The predicted bytes are the CUDA allocator's own: pinned bytes == memory really allocated."""

from __future__ import annotations

import random

import pytest
import torch
from support.streams_by_hand import stacked_model

from qerl_sync.buffers.detect import is_finite, storages_of
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.plan.policies import by_parent_layer
from qerl_sync.plan.simulator import replay

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def allocated_bytes() -> int:
    """What was asked of the allocator, without the slack of the blocks that it gave."""
    return int(torch.cuda.memory_stats().get("requested_bytes.all.current", 0))


class LayerwiseReceiver:
    """Keeps tensors by reference until their layer is whole, as vLLM's layerwise reload does."""

    def __init__(self, layer_map):
        self._map, self._held = layer_map, {name: [] for name in layer_map.layers}
        self.base, self.steps = allocated_bytes(), []

    def load(self, name, tensor):
        (contribution,) = self._map.contributions[name]
        held = self._held[contribution.parent_layer]
        held.append(tensor)
        self.steps.append(allocated_bytes() - self.base)
        if sum(t.numel() for t in held) == self._map.layers[contribution.parent_layer].total_numel:
            held.clear()


def orders(metas, layer_map):
    shuffled = list(metas)
    random.Random(0).shuffle(shuffled)
    return {"random": shuffled, "reorder": by_parent_layer(shuffled, layer_map)}


@pytest.mark.parametrize("order", ["random", "reorder"])
def test_tensors_of_their_own(order):
    metas, layer_map = stacked_model(num_layers=12, width=512)
    stream = orders(metas, layer_map)[order]
    receiver = LayerwiseReceiver(layer_map)
    for meta in stream:
        receiver.load(meta.name, torch.zeros(meta.shape, dtype=torch.bfloat16, device=CUDA))
    predicted = replay(stream, layer_map)
    assert receiver.steps == [step.pinned_bytes for step in predicted.steps]
    assert predicted.peak_pinned_bytes == predicted.peak_buffered_bytes
    print(f"\n{order}: peak {predicted.peak_pinned_bytes / 2**20:.1f} MiB, as allocated")


@pytest.mark.parametrize("order", ["random", "reorder"])
def test_views_of_packed_chunks_pin_them_whole(order):
    """Sixteen tensors share a chunk, as in a packed transfer: small views keep it all alive."""
    metas, layer_map = stacked_model(num_layers=12, width=512)
    stream = orders(metas, layer_map)[order]
    receiver, storages = LayerwiseReceiver(layer_map), {}
    predicted_at = []
    for start in range(0, len(stream), 16):
        part = stream[start : start + 16]
        nbytes = sum(meta.nbytes for meta in part)
        storages |= {meta.name: Storage(start, nbytes) for meta in part}
    for start in range(0, len(stream), 16):
        part = stream[start : start + 16]
        chunk = torch.zeros(storages[part[0].name].nbytes, dtype=torch.uint8, device=CUDA)
        views = _views(chunk, part)
        del chunk
        while views:
            name, view = views.pop(0)
            receiver.load(name, view)
            del view
        predicted_at.append(start + len(part) - 1)
    trace = replay(stream, layer_map, storages)
    # At the end of a chunk nothing but held views keeps a chunk alive.
    assert [receiver.steps[i] for i in predicted_at] == [
        trace.steps[i].pinned_bytes for i in predicted_at
    ]
    assert trace.peak_pinned_bytes > trace.peak_buffered_bytes
    print(
        f"\n{order}: {trace.peak_buffered_bytes / 2**20:.1f} MiB buffered, "
        f"{trace.peak_pinned_bytes / 2**20:.1f} MiB pinned, as allocated"
    )


def _views(chunk: torch.Tensor, metas: list[ParamMeta]) -> list[tuple[str, torch.Tensor]]:
    views, offset = [], 0
    for meta in metas:
        part = chunk[offset : offset + meta.nbytes]
        views.append((meta.name, part.view(torch.bfloat16).view(meta.shape)))
        offset += meta.nbytes
    return views


def test_the_detector_on_cuda():
    tensor = torch.ones(1024, device=CUDA)
    assert storages_of(tensor[3:5]) == storages_of(tensor)
    assert is_finite(tensor)
    tensor[7] = float("nan")
    assert not is_finite(tensor)
