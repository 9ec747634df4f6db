"""Layers whose live tensors vLLM's loaders can write to: found by rehearsal, loaded directly.

vLLM's initial load writes into the parameters and then processes each layer. Where processing is
the identity, or can be repeated in place, the same loaders may write into the live parameters of an
engine that runs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch

from qerl_sync.plan.layer_map import Loading
from qerl_sync.verify.checksum import fingerprint
from qerl_sync.worker.compat.engine import (
    NOT_KEPT,
    _layerwise,
    forget_packed_experts,
    live_tensors,
    loadable_tensors,
    parts_of,
    replaced,
)

logger = logging.getLogger(__name__)

# Elements of the pattern. A prime number: no order that a kernel lays weights out in repeats it.
_PATTERN = 65_521
# How deep attributes of vLLM's own objects are looked at.
_DEPTH = 6


def rehearse(layer: torch.nn.Module) -> Loading:
    """Return how vLLM's loaders can fill a layer. Call it in an open dry reload.

    A layer whose live tensors are laid out as those that the loaders fill is processed as the
    reload would process it, with a pattern for weights and in scratch memory of its own. If
    processing leaves every tensor and attribute as it was, kernels read what loaders write. The
    layer itself is not changed. What a model without an engine has is not known: "in place" is
    the most that it may need.
    """
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    if _layerwise().LAYERWISE_INFO[layer].kernel_tensors is None:
        return "layerwise"  # never loaded: weights that are quantised online, without an engine
    awaited = loadable_tensors(layer)
    # Quantised weights are not looked at: processing them needs values that mean something.
    if not all(t.is_floating_point() and t.itemsize > 1 for t in awaited.values()):
        return "layerwise"
    live = {name: tensor for name, tensor in live_tensors(layer).items() if name in awaited}
    if any(tensor.is_meta for tensor in live.values()):
        return "in place"
    if _layouts(live) != _layouts(awaited) or _loaders(live) != _loaders(awaited):
        return "layerwise"
    if not isinstance(getattr(layer, "quant_method", None), QuantizeMethodBase):
        return "direct"  # the reload processes no such layer either
    try:
        with _scratch(layer):
            before = _State(layer)
            _process(layer)
            after = _State(layer)
    except Exception as exc:  # no memory, or no processing of such values
        logger.info("%s stays layerwise: %r", type(layer).__name__, exc)
        return "layerwise"
    if before == after:
        return "direct"
    return "in place" if before.layouts == after.layouts else "layerwise"


def changed_since(layer: torch.nn.Module) -> bool:
    """Return whether the live tensors have another layout than when the model was built. Call it
    outside of a reload."""
    parameters, buffers = _layerwise().LAYERWISE_INFO[layer].restore_metadata
    return any(
        _layout(tensor) != _layout(built)
        for name, tensor in loadable_tensors(layer).items()
        if (built := buffers.get(name, parameters.get(name))) is not None
    )


def _process(layer: torch.nn.Module) -> None:
    """Process a layer as the reload does when all its tensors have been loaded."""
    forget_packed_experts(layer)
    vars(layer).pop("_already_called_process_weights_after_loading", None)
    method: Any = layer.quant_method
    method.process_weights_after_loading(layer)
    update = getattr(layer, "update_param_tp_status", None)
    if callable(update):
        update()


def process_in_place(layer: torch.nn.Module) -> None:
    """Process a layer that holds what was loaded, and keep the addresses of its tensors."""
    layerwise = _layerwise()
    info = layerwise.get_layerwise_info(layer)
    info.kernel_tensors = layerwise.get_layer_params_buffers(layer)
    info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
    try:
        _process(layer)
        layerwise._copy_and_restore_kernel_tensors(layer, info)
    except BaseException:  # a layer that was not begun is not one that `restore` puts back
        layerwise._place_kernel_tensors(layer, info)
        raise
    finally:
        info.reset()


@contextmanager
def count_loads(layer: torch.nn.Module, loaded: Callable[[], None]) -> Iterator[None]:
    """Call `loaded` after each call of one of the layer's weight loaders."""
    layerwise = _layerwise()

    def counted(load: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load)
        def loader(*args: Any, **options: Any) -> Any:
            result = load(*args, **options)
            loaded()
            return result

        return loader

    with ExitStack() as stack:
        for tensor in loadable_tensors(layer).values():
            load = counted(layerwise._get_weight_loader(tensor))
            stack.enter_context(replaced(tensor, weight_loader=load))
        yield


def addresses(layer: torch.nn.Module) -> list[int]:
    """Return where the layer's live tensors lie, which captured CUDA graphs and kernels know."""
    return [tensor.data_ptr() for tensor in live_tensors(layer).values()]


def _layouts(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: _layout(tensor) for name, tensor in tensors.items()}


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return type(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _loaders(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return what tells their weight loaders from others: methods are bound anew."""
    loaders = {name: _layerwise()._get_original_loader(t) for name, t in tensors.items()}
    return {
        name: (loader.__func__, id(loader.__self__)) if isinstance(loader, MethodType) else loader
        for name, loader in loaders.items()
    }


class _State:
    """Hold what a layer's kernels may read, to compare it; `layouts` of its own tensors."""

    def __init__(self, layer: torch.nn.Module) -> None:
        tensors = _layerwise().get_layer_tensors(layer)
        self.layouts = _layouts(tensors)
        # Addresses identify objects: those that were seen must live as long as this.
        self._seen: dict[int, Any] = {}
        self._held = (
            self._what(tensors, 2),
            [
                self._what({k: v for k, v in vars(part).items() if k not in NOT_KEPT}, _DEPTH)
                for part in parts_of(layer)
            ],
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _State) and self._held == other._held

    __hash__ = None  # type: ignore[assignment]

    def _what(self, value: Any, depth: int) -> Any:
        """Return what the value is, as far as it is known: bytes of tensors, code and closure of
        functions (kernels are chosen anew, as equal functions), else its address."""
        if isinstance(value, str | int | float | bool | None | torch.dtype | torch.device):
            return value
        if isinstance(value, MethodType):
            return value.__func__, id(value.__self__)
        if id(value) in self._seen or depth == 0:
            return id(value)
        self._seen[id(value)] = value
        if isinstance(value, torch.Tensor):
            layout = value.data_ptr(), *_layouts({"": value}).values()
            return layout, None if value.is_meta else fingerprint(value)
        if isinstance(value, FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            inner: Any = [*cells, *(value.__defaults__ or ())]
            return value.__code__, self._what(inner, depth - 1)
        if isinstance(value, list | tuple):
            return [self._what(one, depth - 1) for one in value]
        if isinstance(value, dict):
            return {name: self._what(one, depth - 1) for name, one in value.items()}
        is_vllms = type(value).__module__.startswith("vllm.model_executor.")
        if is_vllms and hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module):
            return id(value), self._what(vars(value), depth - 1)
        return id(value)


@contextmanager
def _scratch(layer: torch.nn.Module) -> Iterator[None]:
    """Give a layer on meta other memory, with a pattern for weights. Take back at the end all that
    has happened to the layer."""
    from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor

    device = _layerwise().LAYERWISE_INFO[layer].restore_device
    live, awaited = live_tensors(layer), loadable_tensors(layer)
    owned: tuple[dict[str, Any], ...] = (layer._parameters, layer._buffers)
    dictionaries: list[dict[str, Any]] = [*(vars(part) for part in parts_of(layer)), *owned]
    kept = [(now, dict(now)) for now in dictionaries]
    try:
        for tensors in owned:
            for name, tensor in list(tensors.items()):
                if tensor is None or not tensor.is_meta:
                    continue
                with device:
                    tensors[name] = made = materialize_meta_tensor(tensor)
                made.weight_loader = _layerwise()._get_original_loader(tensor)
                if name in awaited:
                    _fill(made)
                elif name in live:  # maps of experts, constants
                    made.copy_(live[name])
        yield
    finally:
        for now, before in kept:
            now.clear()
            now.update(before)


def _fill(tensor: torch.Tensor) -> None:
    """Fill a tensor with finite values that no other order of them leaves as they are."""
    numel = tensor.untyped_storage().nbytes() // tensor.itemsize
    flat = tensor.as_strided((numel,), (1,), 0)
    pattern = torch.randn(_PATTERN, generator=torch.Generator().manual_seed(0))
    pattern = pattern.to(tensor.device, tensor.dtype)
    for at in range(0, flat.numel(), _PATTERN):
        part = flat[at : at + _PATTERN]
        part.copy_(pattern[: len(part)])
