"""Check that kernels hold what arrived: each layer changed if, and only if, its tensors did."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import xxhash

from qerl_sync.errors import CoverageError
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.verify.changes import some_of
from qerl_sync.verify.checksum import fingerprint
from qerl_sync.worker.compat import engine as compat
from qerl_sync.worker.load import refresh

# A parameter of a parent layer.
Place = tuple[str, str]


@dataclass(frozen=True)
class Held:
    """Hold checksums of what a worker got and has."""

    arrived: Mapping[Place, int]
    rounded: Mapping[Place, int]  # the same, rounded to the dtype that the model computes in
    kernels: Mapping[str, int]  # of each tensor of the model, and of each packed copy
    # Of the tensors that arrived. Fingerprints of two kinds of devices cannot be compared.
    device: str


class KernelCheck:
    """Check one sync: call `arrived` for each tensor, `conclude` when the weights are whole.

    A packed copy that was not made anew although other weights came (a tied head, experts) is
    found, and so is a layer that changed although nothing new came for it. The first sync has
    nothing to be compared with. What a rank has only a part of may rightly stay the same when the
    tensor changes, as may what rounding or quantisation hides.

    Args:
        dtype: that the model computes in.
        before: of the sync that was committed last; None: not known.
        views: buffers that must hold what arrives for a parameter.
        is_part: what does not arrive is what had arrived before, and its kernels must not change.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layer_map: LayerMap,
        dtype: torch.dtype,
        before: Held | None,
        views: Mapping[Place, Place] | None = None,
        *,
        is_part: bool = False,
    ) -> None:
        self._model = model
        self._map = layer_map
        self._dtype = dtype
        self._before = before
        self._views = views or {}
        self._is_part = is_part
        self._packings = compat.packings(model)
        self._arrived: dict[Place, int] = defaultdict(int)
        self._rounded: dict[Place, int] = defaultdict(int)
        self._divided: set[Place] = set()
        self._device = ""

    def arrived(self, name: str, tensor: torch.Tensor) -> None:
        self._device = tensor.device.type
        exact = rounded = fingerprint(tensor)
        if tensor.is_floating_point() and tensor.dtype != self._dtype:
            rounded = fingerprint(tensor.to(self._dtype))
        for given in self._map.contributions.get(name, ()):
            place = (given.parent_layer, given.parameter)
            # Sums: the order in which tensors come does not matter.
            self._arrived[place] += xxhash.xxh3_64_intdigest(name.encode(), exact)
            self._rounded[place] += xxhash.xxh3_64_intdigest(name.encode(), rounded)
            if given.loaded_numel < tensor.numel():
                self._divided.add(place)

    def conclude(self) -> Held:
        """Return what the worker has now. Raise CoverageError, with the layers, if kernels hold
        something else.
        """
        # What shares another layer's parameter, or was a view of it, got what that one got.
        tied = refresh.tied_parameters(self._model)
        sharing = {(path, place[1]): place for path, place in tied.items()} | dict(self._views)
        for place, source in sharing.items():
            for found in (self._arrived, self._rounded):
                if source in found:
                    found[place] = found[source]
            if source in self._divided or (place in self._views and not self._covers(place)):
                self._divided.add(place)
        self._packings_now = compat.packings(self._model)
        _refuse((layer for layer, _ in self._arrived if self._is_unpacked(layer)), NOT_PACKED)
        kernels = kernel_checksums(self._model)
        now = Held(dict(self._arrived), dict(self._rounded), kernels, self._device)
        before = self._before
        if before is not None and before.device == self._device:
            if self._is_part:
                now = replace(
                    now,
                    arrived={**before.arrived, **now.arrived},
                    rounded={**before.rounded, **now.rounded},
                )
            _refuse(self._stale(before, now), STALE)
            _refuse(self._strange(before, now), STRANGE)
        return now

    def _covers(self, place: Place) -> bool:
        """Return whether a buffer was a view of the whole parameter. A part may stay the same."""
        buffer = self._model.get_submodule(place[0])._buffers[place[1]]
        return buffer is not None and buffer.nbytes == buffer.untyped_storage().nbytes()

    def _stale(self, before: Held, now: Held) -> Iterator[str]:
        """Yield the layers that got other weights and have the same as before."""
        tensors = dict(named_tensors(self._model))
        for place, rounded in now.rounded.items():
            if before.rounded.get(place, rounded) == rounded or place in self._divided:
                continue
            layer, parameter = place
            key = f"{layer}.{parameter}"
            if layer in self._packings and not parameter.endswith("bias"):
                if _same(before, now, layer + _PACKED) and not self._renewed(layer):
                    yield layer
            elif key in tensors and self._keeps(tensors[key]) and _same(before, now, key):
                yield layer

    def _strange(self, before: Held, now: Held) -> Iterator[str]:
        """Yield the layers that got the same weights and have others than before."""
        moved = {
            layer for (layer, p), n in now.arrived.items() if before.arrived.get((layer, p)) != n
        }
        same = {layer for layer, _ in now.arrived} - moved
        for key, found in now.kernels.items():
            layer = _layer_of(key)
            if layer in same and before.kernels.get(key, found) != found:
                yield layer

    def _keeps(self, tensor: torch.Tensor) -> bool:
        """Return whether it changes with what is loaded. One that is quantised inside need not, nor
        one that was emptied when its values were packed elsewhere."""
        inside = compat.tensors_of(tensor)
        return (
            tensor.numel() > 0
            and len(inside) == 1
            and inside[0] is tensor
            and tensor.dtype == self._dtype
        )

    def _is_unpacked(self, layer: str) -> bool:
        packing = self._packings.get(layer)
        return packing is not None and packing.in_place and not self._renewed(layer)

    def _renewed(self, layer: str) -> bool:
        old = self._packings[layer].holder()
        return old is None or old is not self._packings_now[layer].holder()


_PACKED = " (packed)"


def _layer_of(key: str) -> str:
    return key.removesuffix(_PACKED) if key.endswith(_PACKED) else key.rpartition(".")[0]


@torch.no_grad()
def kernel_checksums(model: torch.nn.Module) -> dict[str, int]:
    """Return checksums of parameters and buffers, and of packed copies by a product of them."""
    found: dict[str, int] = {}
    for name, tensor in named_tensors(model):
        found[name] = 0
        for inner in compat.tensors_of(tensor):
            found[name] = _chained(inner, found[name])
    packs = compat.packings(model)
    for layer, product in compat.packed_products(model):
        if layer in packs:
            key = layer + _PACKED
            found[key] = _chained(product, found.get(key, 0))
    return found


def kernel_digests(model: torch.nn.Module) -> dict[str, str]:
    """Return, by module path, a digest of the weights that its kernels use: equal on two workers of
    the same machine that hold the same, but for changes below the rounding of a packed product.
    """
    found: dict[str, int] = {}
    for key, checksum in kernel_checksums(model).items():
        path = _layer_of(key)
        found[path] = xxhash.xxh3_64_intdigest(f"{key} {checksum}".encode(), found.get(path, 0))
    return {path: f"{digest:016x}" for path, digest in found.items()}


def _chained(tensor: torch.Tensor, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(fingerprint(tensor).to_bytes(8, "big"), seed)


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _same(before: Held, now: Held, key: str) -> bool:
    return key in now.kernels and before.kernels.get(key) == now.kernels[key]


NOT_PACKED = "got weights that were not packed for the kernel, which reads them in another layout"
STALE = (
    "got other weights than in the last sync, and the kernel computes with the same as before: it "
    "keeps a copy that was not made anew"
)
STRANGE = (
    "got the same weights as in the last sync, and the kernel computes with others: something else "
    "has written to them"
)


def _refuse(layers: Iterable[str], what: str) -> None:
    """Raise CoverageError if there are any of these layers."""
    if found := list(dict.fromkeys(layers)):
        raise CoverageError(
            f"{some_of(found)} {what}. This vLLM does not reload that layer as it should: report "
            "it, with the model's architecture, and restart the engine to get these weights"
        )
