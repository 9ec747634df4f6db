"""The file that touches vLLM's internals. It probes by feature, not by version.

`offline` does so for models without an engine. `coupling` lists all names of vLLM that are used
here, and elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import types
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils._pytree import tree_leaves

from qerl_sync.buffers.detect import plain_tensors, storage_key
from qerl_sync.errors import CompatError, ConfigError, LoadError
from qerl_sync.worker.compat import older_reload as older
from qerl_sync.worker.compat.coupling import has
from qerl_sync.worker.load.copy_count import CopyCount

# What torch keeps in a module's own dictionary for parameters, submodules and hooks; and the KV
# cache, which a sync leaves as it is.
TORCHS_OWN = frozenset(vars(torch.nn.Module()))
NOT_KEPT = TORCHS_OWN | {"kv_cache"}


def _layerwise() -> Any:
    """Return vLLM's module of the layerwise reload."""
    from vllm.model_executor.model_loader.reload import layerwise

    return layerwise


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Set these attributes of `owner` in this context, and put back what was there."""
    before = {name: getattr(owner, name, _ABSENT) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


_ABSENT = object()


class EngineParts(NamedTuple):
    """Hold what a sync needs of an engine that runs in this process."""

    model: torch.nn.Module
    vllm_config: Any
    device: torch.device
    runner: Any = None  # the worker's model runner, for adapters; None: not known


def in_process_parts(llm: Any) -> EngineParts:
    """Return the model of a vLLM `LLM` whose worker runs in this process (colocate mode).

    Raises:
        CompatError: the worker lives in another process.
    """
    executor = getattr(llm.llm_engine, "model_executor", None)
    worker = getattr(executor, "driver_worker", None)
    runner: Any = getattr(worker, "model_runner", None)
    # Not `runner.model`, which may be a wrapper that replays CUDA graphs.
    model = runner.get_model() if hasattr(runner, "get_model") else None
    if not isinstance(model, torch.nn.Module):
        raise CompatError(
            "the engine's model is not in this process; set VLLM_ENABLE_V1_MULTIPROCESSING=0 "
            "before vLLM is imported"
        )
    return EngineParts(model, runner.vllm_config, torch.device(runner.device), runner)


class LayerState(NamedTuple):
    """A layer's progress. `total_numel` is None when it awaits nothing."""

    loaded_numel: int
    total_numel: int | None


def layer_state(layer: torch.nn.Module) -> LayerState:
    info = _layerwise().LAYERWISE_INFO[layer]
    return LayerState(info.load_numel, info.load_numel_total)


def last_load(layer: torch.nn.Module) -> tuple[str, Mapping[str, Any]] | None:
    """Return the parameter and the arguments of the last call of one of its weight loaders."""
    loads = _layerwise().LAYERWISE_INFO[layer].loaded_weights
    return (loads[-1][0], loads[-1][1].arguments) if loads else None


def is_deferred(layer: torch.nn.Module) -> bool:
    """Return True for attention layers: vLLM processes their scales at the end of any reload."""
    return older.is_deferred(_layerwise(), layer)


def loadable_tensors(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer that vLLM expects to be loaded (see its `get_layer_size`)."""
    tensors: dict[str, torch.Tensor] = _layerwise().get_layer_tensors(layer)
    if not tensors:  # half of a model's modules: containers and activations
        return tensors
    from vllm.model_executor.model_loader.reload import meta

    skipped = getattr(meta, "SKIP_LOAD_TENSORS", meta.SKIP_TENSORS)  # vLLM 0.25 has one set
    return {name: t for name, t in tensors.items() if name not in skipped}


def load_numel_of(tensor: torch.Tensor) -> int:
    """Return how many elements of a parameter a checkpoint brings: all but declared padding."""
    return int(getattr(tensor, "weight_loader_numel", tensor.numel()))


def lacks_padding_alone(layer: Any, loaded_numel: int) -> bool:
    """Return whether all that a layer lacks, which has got so many elements, is padding.

    vLLM pads vocabularies (embeddings, heads) to a multiple of 64 rows. The last tensor parallel
    ranks may have no other rows.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if not isinstance(layer, VocabParallelEmbedding):
        return False
    return loaded_numel > 0 or bool(layer.shard_indices.num_org_elements == 0)


# Called for each tensor that vLLM holds: the layer, the parameter, the arguments of its weight
# loader, and the elements that this loads.
Held = Callable[[torch.nn.Module, str, dict[str, Any], int], None]


class ProcessObserver(Protocol):
    """Told when vLLM processes a layer."""

    def processing(self, layer: torch.nn.Module) -> None: ...

    def processed(self, layer: torch.nn.Module) -> None: ...

    def path_of(self, layer: torch.nn.Module) -> str: ...


@contextlib.contextmanager
def watch_ignored(tell: Callable[[], object]) -> Iterator[None]:
    """Call `tell` when a model's loader passes over a name of a part that the model has not,
    because its class lists a prefix of the name: `ignore_unexpected_prefixes`, and before vLLM 0.31
    `skip_prefixes`, which names parts that are there (tied heads) as well. See `is_unmapped`."""
    from vllm.model_executor.models.utils import AutoWeightsLoader

    can_ignore, can_skip = AutoWeightsLoader._can_ignore_unexpected, AutoWeightsLoader._can_skip

    def ignoring(self: Any, qualname: str) -> bool:
        if qualname.startswith(tuple(self.ignore_unexpected_prefixes)):
            tell()
        return bool(can_ignore(self, qualname))

    def skipping(self: Any, qualname: str) -> bool:
        listed = qualname.startswith(tuple(getattr(self, "skip_prefixes", ())))
        if listed and not has(self.module, qualname):
            tell()
        return bool(can_skip(self, qualname))

    with replaced(AutoWeightsLoader, _can_ignore_unexpected=ignoring, _can_skip=skipping):
        yield


def is_unmapped(model: torch.nn.Module, name: str) -> bool:
    """Return whether the model's class maps a prefix of this checkpoint name to nothing."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    prefixes: Mapping[str, str | None] = getattr(mapper, "orig_to_new_prefix", {})
    return any(to is None and name.startswith(prefix) for prefix, to in prefixes.items())


@contextlib.contextmanager
def observe_loads(held: Held, observer: ProcessObserver | None = None) -> Iterator[None]:
    """Report vLLM's layerwise loading while the context is open.

    vLLM's loading wrapper asks `get_layer_size`, puts the tensor into the layer's list, calls
    `get_numel_loaded`, asks `is_deferred_attention_layer` (older ones: something else, see
    `older_reload`), and calls `_layerwise_process` if the layer is whole. These names of its module
    are wrapped: the loading wrappers themselves outlive a reload (vLLM leaves them on its meta
    tensors), so wrapping their factory would see the first reload only. Before a processed layer is
    copied into its live tensors, `_fit_live_tensors` mends what vLLM's copy cannot do.

    Args:
        observer: None keeps vLLM from processing layers (dry runs).
    """
    layerwise = _layerwise()
    # What vLLM asks next when it has counted a tensor: 0.25 only of layers that are not deferred.
    asks_all = hasattr(layerwise, "is_deferred_attention_layer")
    next_question = "is_deferred_attention_layer" if asks_all else "has_device_tensors"
    real = types.SimpleNamespace(**vars(layerwise))
    count = real.get_numel_loaded if observer else CopyCount(real.get_numel_loaded, load_numel_of)
    # The wrapper names its layer to `get_layer_size` alone; what it calls next is for the same one.
    sized: list[torch.nn.Module] = []
    # Elements of a tensor that was counted. The wrapper adds them to the layer before it asks the
    # next question, and the observer needs the sum: it is told then.
    counted: list[int] = []

    def get_layer_size(layer: torch.nn.Module) -> int:
        sized[:] = [layer]
        return int(real.get_layer_size(layer))

    def tell(layer: torch.nn.Module) -> None:
        parameter, bound = layerwise.LAYERWISE_INFO[layer].loaded_weights[-1]
        held(layer, parameter, bound.arguments, counted.pop())

    def get_numel_loaded(loader: Callable[..., Any], bound: Any) -> tuple[int, Any]:
        (layer,) = sized
        numel, result = count(loader, bound)
        counted.append(numel)
        if not asks_all and is_deferred(layer):
            tell(layer)
        return numel, result

    def answer(question: Any) -> bool:
        if counted:
            tell(*sized)
        return bool(getattr(real, next_question)(question))

    def _layerwise_process(layer: torch.nn.Module, info: Any) -> None:
        if observer is not None:
            observer.processing(layer)
            _round_held(layer, info)
            real._layerwise_process(layer, info)
            observer.processed(layer)

    def _copy_and_restore_kernel_tensors(layer: torch.nn.Module, info: Any) -> None:
        assert observer is not None, "a dry run processes nothing"
        _fit_live_tensors(layer, info, observer)
        older.keep_derived_buffers(layer, info)
        real._copy_and_restore_kernel_tensors(layer, info)

    def _place_kernel_tensors(layer: torch.nn.Module, info: Any) -> None:
        real._place_kernel_tensors(layer, info)
        older.placed_back(layer, info)

    wrappers = {
        "get_layer_size": get_layer_size,
        "get_numel_loaded": get_numel_loaded,
        next_question: answer,
        "_layerwise_process": _layerwise_process,
        "_copy_and_restore_kernel_tensors": _copy_and_restore_kernel_tensors,
        "_place_kernel_tensors": _place_kernel_tensors,
    }
    counting = count.counting() if isinstance(count, CopyCount) else contextlib.nullcontext()
    with replaced(layerwise, **wrappers), counting:
        yield


def cast_dtypes(layer: torch.nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype with which parameters are loaded that processing has cast since, and that
    vLLM keeps real in a reload, so that they are loaded with the one of now: the bias of a linear
    layer that a CPU kernel wants in float32."""
    bias, dtype = layer._parameters.get("bias"), getattr(layer, "params_dtype", None)
    return {"bias": dtype} if bias is not None and dtype not in (None, bias.dtype) else {}


def _round_held(layer: torch.nn.Module, info: Any) -> None:
    """Round what is held for such a parameter, as the first load of these weights would."""
    dtypes = cast_dtypes(layer)
    for name, bound in info.loaded_weights if dtypes else ():
        if name in dtypes:
            for key, value in bound.arguments.items():
                if key != "param" and isinstance(value, torch.Tensor):
                    bound.arguments[key] = value.to(dtypes[name])


def _fit_live_tensors(layer: torch.nn.Module, info: Any, observer: ProcessObserver) -> None:
    """Prepare a layer's live tensors for what processing has made of the new weights.

    A parameter that another layer has emptied when it was loaded (MLA frees `kv_b_proj` on CPUs
    with AMX) gets its memory back: that layer reads it, and empties it again. Non-persistent
    buffers that processing registers are derived from the weights; vLLM takes all of that kind for
    constants and would put the old ones back.

    Raises:
        LoadError: a parameter that has another size now was not emptied. Kernels may hold its
            address, so that it cannot be exchanged.
    """
    parameters, buffers = info.kernel_tensors
    for name, live in parameters.items():
        new = getattr(layer, name)
        if live.numel() == new.numel():
            continue
        if live.numel():
            raise LoadError(
                f"{observer.path_of(layer)}.{name} ({type(layer).__name__}) has shape "
                f"{list(live.shape)} in the engine, and {list(new.shape)} when it is loaded again: "
                "something has changed it since the engine was started. Restart the engine to get "
                "these weights"
            )
        live.data = torch.empty_like(new.data)
    for name in info.kernel_non_persistent_buffers - info.restore_metadata[1].keys():
        live, derived = buffers.get(name), layer._buffers.get(name)
        if live is None or derived is None or derived is live or derived.is_meta:
            continue
        if derived.shape == live.shape:
            live.data.copy_(derived)


def unfit_parameters(model: torch.nn.Module) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Return the live shape, and that of loading, of parameters that cannot be loaded again.

    A layer that has no `quant_method` is copied into its live tensors as it was loaded. In an open
    reload. See `_fit_live_tensors` for parameters that are empty.
    """
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    found = {}
    for path, layer in model.named_modules():
        info = _layerwise().LAYERWISE_INFO.get(layer)
        processes = isinstance(getattr(layer, "quant_method", None), QuantizeMethodBase)
        if info is None or info.kernel_tensors is None or processes or is_deferred(layer):
            continue
        for name, live in info.kernel_tensors[0].items():
            new = layer._parameters.get(name)
            if new is not None and live.numel() and live.numel() != new.numel():
                found[f"{path}.{name}"] = (live.shape, new.shape)
    return found


def recorded_parameters(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the layer's parameters as they were when the model was built, on meta."""
    info = _layerwise().LAYERWISE_INFO.get(layer)
    return {} if info is None else dict(info.restore_metadata[0])


def unrecorded_buffers(layer: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the non-persistent buffers that vLLM's record of the layer lacks: those that were
    views of parameters when the model was built. Call it outside of a reload."""
    from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS

    info = _layerwise().LAYERWISE_INFO.get(layer)
    known = SKIP_TENSORS if info is None else SKIP_TENSORS | info.restore_metadata[1].keys()
    return [
        (name, buffer)
        for name, buffer in layer._buffers.items()
        if buffer is not None
        and not buffer.is_meta
        and name not in known
        and name in layer._non_persistent_buffers_set
    ]


def arrived_value(layer: torch.nn.Module, parameter: str) -> torch.Tensor:
    """Return what has arrived for a parameter: loaded by vLLM's own loader into memory of its own,
    or into the parameter, where a route has filled that. Call it when the layer is whole and before
    it is processed."""
    from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor

    layerwise = _layerwise()
    info = layerwise.LAYERWISE_INFO[layer]
    awaiting = getattr(layer, parameter)
    load = layerwise._get_original_loader(awaiting)
    with info.restore_device:
        value: torch.Tensor = materialize_meta_tensor(awaiting) if awaiting.is_meta else awaiting
    for name, bound in info.loaded_weights:
        if name == parameter:
            bound.arguments["param"] = value  # vLLM puts its own there when it loads the layer
            load(*bound.args, **bound.kwargs)
    return value


def awaited_shape(
    layer: Any, parameter: str, arguments: Mapping[str, Any]
) -> tuple[int, ...] | None:
    """Return the shape that a checkpoint's tensor must have in this call of a weight loader.

    None where the layer does not tell. vLLM's loaders assert it and do not say it.
    """
    own = tuple(getattr(layer, parameter).shape)
    shard = arguments.get("loaded_shard_id")
    if hasattr(layer, "org_vocab_size"):
        rows, columns = layer.org_vocab_size, own[-1]
    elif not hasattr(layer, "output_size"):
        return own if len(own) == 1 else None
    else:  # the sizes of the whole layer, of which a rank holds a part
        rows, columns = layer.output_size, layer.input_size
        if shard == "q":
            rows = layer.total_num_heads * layer.head_size
        elif shard in ("k", "v"):
            rows = layer.total_num_kv_heads * layer.head_size
        elif isinstance(shard, int | tuple):  # several parts, fused in the checkpoint
            parts = shard if isinstance(shard, tuple) else (shard,)
            rows = sum(layer.output_sizes[part] for part in parts)
    return (rows, columns)[: len(own)] if len(own) <= 2 else None


def credit_padding(layer: torch.nn.Module) -> None:
    """Count a layer's padding as loaded, so that vLLM processes it with the tensor at hand.

    vLLM would process it at the end of the reload and hold its tensors until then.
    """
    info = _layerwise().LAYERWISE_INFO[layer]
    info.load_numel = info.load_numel_total


class LayerReload:
    """A layer's progress in reloads, for what does not come by its weight loaders."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self._layer = layer
        self._layerwise = _layerwise()
        self._info = self._layerwise.get_layerwise_info(layer)

    @property
    def awaits_more(self) -> bool:
        """Return whether the layer is not yet whole."""
        return bool(self._info.can_load())

    def count(self, numel: int) -> None:
        """Count elements that are held, as vLLM's loading wrapper does."""
        self._info.load_numel += numel

    def process_if_whole(self) -> None:
        """Process a layer all of whose elements have arrived, as the wrapper does."""
        if self._info.load_numel >= self._info.load_numel_total:
            self._layerwise._layerwise_process(self._layer, self._info)
            self._layerwise.LOADING_LAYERS.discard(self._layer)

    def materialise(self) -> None:
        """Give the layer memory for what is to be loaded. vLLM passes over what has some."""
        from vllm.model_executor.model_loader.reload.meta import materialize_layer

        materialize_layer(self._layer, self._info)


def forget_packed_experts(layer: Any) -> None:
    """Take the kernel from unquantised experts on CPU, so that vLLM packs and builds it anew.

    `UnquantizedFusedMoEMethod` packs only while it has no kernel, and takes every later load for
    an update in place, which the packed copy does not see. On GPUs the kernel reads the parameters
    themselves and captured graphs hold their addresses, so nothing is touched there.
    """
    if _packs_experts(layer):
        layer.quant_method.moe_kernel = None


def begin_reload(model: torch.nn.Module, live: Collection[torch.nn.Module] = ()) -> None:
    """Save the live tensors, put the model's parameters on meta, wrap their loaders.

    Args:
        live: layers that stay as they are. See `direct`.

    Raises:
        CompatError: this vLLM reloads them all the same.
    """
    for layer in model.modules():
        emptied = {
            name: None if parameter is None else parameter.dtype
            for name, parameter in layer._parameters.items()
            if parameter is None or not parameter.numel()
        }
        if emptied:
            _EMPTIED[layer] = emptied
    infos = [_layerwise().get_layerwise_info(layer) for layer in live]
    for info in infos:
        info.load_numel_total = 0  # vLLM passes over a layer whose reload has begun
    try:
        older.begin_reload(_layerwise(), model)
    finally:
        for info in infos:
            info.load_numel_total = None
    if any(tensor.is_meta for layer in live for tensor in layer.parameters(recurse=False)):
        raise CompatError(
            "this vLLM's layerwise reload takes up layers whose load has begun, so that none can "
            "be written where it stays; choose sync.load: layerwise"
        )


# Parameters that a kernel has taken and left at None (int8 of oneDNN: `weight`), or without
# elements, with their dtype. vLLM's reload deletes the former, puts back tensors only, and the
# kernel then finds no such attribute. The latter (MLA's `kv_b_proj`) are made in torch's default
# dtype, which is the model's only when an engine starts; MLA casts its input to what it finds.
_EMPTIED: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, torch.dtype | None]] = (
    weakref.WeakKeyDictionary()
)


def _put_back_emptied(model: torch.nn.Module) -> None:
    for layer in model.modules():
        for name, dtype in _EMPTIED.pop(layer, {}).items():
            if not hasattr(layer, name):
                layer.register_parameter(name, None)
            parameter = layer._parameters.get(name)
            if dtype is not None and parameter is not None and not parameter.numel():
                parameter.data = parameter.data.to(dtype)


def working_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Return, for each layer, the bytes that vLLM needs to process it: the layer materialised, and
    once more where a CPU kernel packs it. Call it in an open reload only: outside of one, kernels
    keep their weights where parameters do not show them."""
    found = {}
    for path, layer in model.named_modules():
        nbytes = sum(t.nbytes for t in loadable_tensors(layer).values() if t.is_meta)
        found[path] = nbytes * (2 if nbytes and packs(layer) else 1)
    return found


def weight_bytes(model: torch.nn.Module, paths: Collection[str]) -> int:
    """Return the bytes of these layers' weights in an open reload, in the model's own format."""
    layers = map(model.get_submodule, paths)
    return sum(t.nbytes for layer in layers for t in loadable_tensors(layer).values())


def live_tensors(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that the layer's kernels read, in a reload and outside of one."""
    info = _layerwise().LAYERWISE_INFO.get(layer)
    if info is not None and info.can_load() and info.kernel_tensors is not None:
        parameters, buffers = info.kernel_tensors
        return {**parameters, **buffers}
    tensors: dict[str, torch.Tensor] = _layerwise().get_layer_tensors(layer)
    return tensors


def parts_of(layer: torch.nn.Module) -> list[Any]:
    """Return the layer, and what keeps state for it (MLA on CPUs with AMX: `impl`)."""
    parts = (getattr(layer, name, None) for name in ("quant_method", "impl", "scheme"))
    return [layer, *(part for part in parts if hasattr(part, "__dict__"))]


def tensors_written_live(layer: torch.nn.Module) -> list[torch.Tensor]:
    """Return the tensors of a layer in reload that vLLM writes as they arrive."""
    if not _layerwise().get_layerwise_info(layer).can_load():
        return []
    return [t for t in _layerwise().get_layer_tensors(layer).values() if not t.is_meta]


def packed_bytes(layer: torch.nn.Module) -> int:
    """Return the bytes of the packed copy beside the parameters. Call it in an open reload."""
    if not _packs_linear(layer):
        return 0
    return sum(t.nbytes for t in loadable_tensors(layer).values() if t.is_meta)


def tensors_of(parameter: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that hold a parameter's or buffer's bytes: itself, what TorchAO's keep
    inside, or the partitions of vLLM's `SharedWeightParameter`, which itself is empty."""
    partitions = getattr(parameter, "partitions", None)
    parts = partitions.values() if isinstance(partitions, dict) else [parameter]
    return [plain for part in parts for plain in plain_tensors(part)]


def packs(layer: torch.nn.Module) -> bool:
    """Return whether a CPU kernel packs this layer, a linear one or experts."""
    kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
    return _packs_linear(layer) or (kernel is not None and is_on_cpu())


def lend_packing(owner: Any, layer: Any) -> bool:
    """Have a layer that shares its owner's weight compute with its owner's packed copy, too.

    vLLM packs embeddings on CPU although it only looks rows up in them, and packs the same weight
    once more for a tied head. Returns whether both would be packed alike.
    """
    if not can_lend_packing(owner, layer):
        return False
    layer.cpu_linear = owner.cpu_linear
    return True


def can_lend_packing(owner: Any, layer: Any) -> bool:
    methods = {type(getattr(one, "quant_method", None)) for one in (owner, layer)}
    unbiased = all(getattr(one, "bias", None) is None for one in (owner, layer))
    return len(methods) == 1 and unbiased and _packs_linear(owner) and _packs_linear(layer)


def packed_products(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each module path, and the product of its kernel's packed weights with a fixed vector.

    Experts, packed in kernels of their own, give those kernels' tensors.
    """
    for path, layer in model.named_modules():
        linear, weight = getattr(layer, "cpu_linear", None), getattr(layer, "weight", None)
        # What is not packed is the parameter itself, and of MLA's `kv_b_proj` may be empty.
        if _packs_linear(layer) and isinstance(weight, torch.Tensor) and not weight.is_meta:
            assert linear is not None
            probe = torch.linspace(-1, 1, _input_size(layer)).to(weight.dtype)
            yield path, linear(probe.expand(2, -1).contiguous(), weight, None)
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        experts = getattr(kernel, "fused_experts", None)
        for value in vars(experts).values() if experts is not None else ():
            if isinstance(value, torch.Tensor):
                yield path, value


class Packing(NamedTuple):
    """Describe the packed copy that a layer's CPU kernel computes with. Packing makes it anew."""

    holder: weakref.ref[Any]
    # The copy lies in the parameters themselves, in another layout, so that they change with what
    # arrives whether or not that is packed.
    in_place: bool


def packings(model: torch.nn.Module) -> dict[str, Packing]:
    """Return the packed copies of the model's layers, by module path."""
    found = {}
    for path, layer in model.named_modules():
        if _packs_experts(layer):
            found[path] = Packing(weakref.ref(layer.quant_method.moe_kernel), in_place=True)
        elif _packs_linear(layer):
            found[path] = Packing(weakref.ref(layer.cpu_linear), in_place=False)
    return found


def _packs_linear(layer: torch.nn.Module) -> bool:
    return getattr(getattr(layer, "cpu_linear", None), "__closure__", None) is not None


def _packs_experts(layer: Any) -> bool:
    """Return whether these are the experts that `forget_packed_experts` is for."""
    method = getattr(layer, "quant_method", None)
    if getattr(method, "moe_kernel", None) is None:
        return False
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )

    return is_on_cpu() and isinstance(method, UnquantizedFusedMoEMethod)


def _input_size(layer: torch.nn.Module) -> int:
    for name in ("input_size_per_partition", "input_size", "embedding_dim"):
        size = getattr(layer, name, None)
        if size:
            return int(size)
    raise CompatError(f"vLLM's {type(layer).__name__} does not tell its input size")


def is_on_cpu() -> bool:
    """Return whether this is vLLM's CPU backend."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def zero_kv_caches(vllm_config: Any) -> int:
    """Overwrite all cached keys, values and states. Returns how many bytes that were.

    Freed blocks keep what was computed last, and attention multiplies what is behind the end of a
    sequence by zero, which leaves NaN what was NaN. Of an engine that sleeps nothing is left to
    overwrite, and its memory is not mapped.
    """
    layers = vllm_config.compilation_config.static_forward_context.values()
    caches = tree_leaves([getattr(layer, "kv_cache", None) for layer in layers])
    tensors = [] if _kv_caches_sleep() else [c for c in caches if isinstance(c, torch.Tensor)]
    for tensor in tensors:
        tensor.zero_()
    return sum(tensor.nbytes for tensor in tensors)


def _kv_caches_sleep() -> bool:
    """Return whether vLLM has freed the memory of the caches for a while (`LLM.sleep`)."""
    if is_on_cpu():
        return False
    try:
        from vllm.device_allocator.cumem import CuMemAllocator
    except ImportError:
        return False
    allocator = CuMemAllocator.instance
    known = allocator.pointer_to_data.values() if allocator is not None else ()
    return any(data.tag == "kv_cache" and data.is_asleep for data in known)


def finish_reload(
    model: torch.nn.Module, vllm_config: Any, expected: Collection[str] | None = None
) -> None:
    """Process what is left: deferred attention layers, layers that got nothing.

    vLLM warns "Failed to load weights" of each of the latter, by its class: also of those that no
    checkpoint has (rotary caches, tied heads), and so after each sync.

    Args:
        expected: names of the layers that the stream was to fill; vLLM's warnings of others are
            dropped. None: all are logged.
    """
    layerwise = _layerwise()
    findings = set()
    for name in expected or ():
        layer = model.get_submodule(name)
        loaded_numel, total_numel = layer_state(layer)
        if total_numel is not None and loaded_numel <= 0:
            findings.add(f"{type(layer).__name__}: Failed to load weights")

    def is_finding(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return expected is None or not text.endswith(": Failed to load weights") or text in findings

    logger = logging.getLogger(layerwise.__name__)
    logger.addFilter(is_finding)
    try:
        older.place_empty_layers(layerwise, model)
        layerwise.finalize_layerwise_reload(model, vllm_config.model_config)
        _put_back_emptied(model)
    finally:
        logger.removeFilter(is_finding)


def require_weights_in_place(vllm_config: Any) -> None:
    """Check that the engine keeps weights where vLLM's loaders put them.

    Raises:
        ConfigError: it moves them while it runs.
    """
    offload = vllm_config.offload_config
    for moves, option, why in (
        (
            vllm_config.parallel_config.enable_eplb,
            "enable_eplb",
            "balances experts: it moves them to other slots while it runs, and vLLM's loaders fill "
            "the slots of its start, so that experts would get one another's weights",
        ),
        (
            offload.uva.cpu_offload_gb > 0,
            "cpu_offload_gb",
            "keeps weights in host memory, for which vLLM's layerwise reload is not made",
        ),
        (
            offload.offload_backend == "prefetch" or offload.prefetch.offload_group_size > 0,
            "offload_group_size",
            "fetches layers from host memory for each step, over what a sync has written",
        ),
    ):
        if moves:
            raise ConfigError(
                f"this engine cannot be synced: it {why}. Start it without {option}",
                place=option,
            )


@contextlib.contextmanager
def loading_context(vllm_config: Any) -> Iterator[None]:
    """Set vLLM's current config and disable gradients, as its loaders and quantisers expect."""
    from vllm.config import set_current_vllm_config

    with torch.no_grad(), set_current_vllm_config(vllm_config):
        yield


def restore(model: torch.nn.Module) -> None:
    """Bring a model back from the middle of a reload.

    Every layer gets its live tensors again, what was held for it is dropped, loading wrappers are
    taken off. Layers that were already processed keep their new weights: the model is usable,
    but a mix of old and new, until a full sync has succeeded.
    """
    layerwise = _layerwise()
    for layer in model.modules():
        info = layerwise.LAYERWISE_INFO.get(layer)
        if info is None:
            continue
        if info.can_load():
            if info.kernel_tensors is not None:
                layerwise._place_kernel_tensors(layer, info)
                older.placed_back(layer, info)
            info.reset()
        for tensor in layerwise.get_layer_tensors(layer).values():
            if layerwise._get_weight_loader(tensor).__name__ == "online_process_loader":
                tensor.weight_loader = layerwise._get_original_loader(tensor)
    _put_back_emptied(model)
    if hasattr(model, "_original_do_torchao_reload"):
        model._do_torchao_reload = model._original_do_torchao_reload
    layerwise.LOADING_LAYERS.clear()


@contextlib.contextmanager
def dry_reload(model: torch.nn.Module) -> Iterator[set[int]]:
    """Open a reload with every tensor on meta, undone at the end: weights and pointers unchanged.

    Yields the storage keys of the meta twins of those tensors that vLLM keeps real during a reload,
    and writes on arrival (`bias`, router corrections).
    """
    from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, to_meta_tensor

    twins: set[int] = set()
    stash: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    # What some models derive from weights while they load them.
    derived = [
        (vars(layer), name, value)
        for layer in model.modules()
        for name, value in vars(layer).items()
        if isinstance(value, torch.Tensor)
    ]
    begin_reload(model)
    try:
        for layer in model.modules():
            owned: tuple[dict[str, Any], ...] = (layer._parameters, layer._buffers)
            for tensors in owned:
                for name, tensor in tensors.items():
                    if tensor is None or (tensor.is_meta and name not in SKIP_TENSORS):
                        continue
                    stash.append((tensors, name, tensor))
                    twin = to_meta_tensor(tensor)
                    twins.add(storage_key(twin))
                    tensors[name] = twin
        yield twins
    finally:
        for tensors, name, tensor in (*stash, *derived):
            tensors[name] = tensor
        restore(model)
