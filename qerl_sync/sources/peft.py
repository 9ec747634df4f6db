"""Read the weights of a model with PEFT's LoRA adapters, merged into the base model's.

The trainer's weights are never written to: what is merged is a new tensor, which lives until it has
been sent. PEFT's own `merge_adapter` writes to the base weights, and in bfloat16 each cycle of
merging and unmerging rounds them once more.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qerl_sync.errors import ConfigError
from qerl_sync.meta import Storage
from qerl_sync.sources.hf import HFSource, clean, part_here, saved_buffers_of
from qerl_sync.verify.changes import fingerprint

# Returns all of a tensor of the model, of which this process may hold a shard.
Whole = Callable[[torch.Tensor], torch.Tensor]


class PEFTSource(HFSource):
    """Yields what the base model's checkpoint would hold, had the active adapters been merged.

    Example:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), LoraConfig(r=8))
        with SyncSession(PEFTSource(model), transport, SyncConfig()) as session:
            session.push(step=1)  # everything
            session.push(step=2)  # what the adapters touch, and what is trained beside them

    A merged tensor is computed in float32 and rounded once to the dtype of the base weight:
    `W + scaling * B @ A`, with DoRA's magnitudes over it. Modules in `modules_to_save` are those of
    the active adapter, trained base parameters are sent as they are, frozen ones once.

    Args:
        model: a `PeftModel`, or a `PreTrainedModel` with adapters of its own (`add_adapter`).

    Raises:
        ConfigError: the model is sharded, or has something that cannot be merged so; `metadata`
            raises it too, if it has become so since. `module` and `what` say where and what.
    """

    def __init__(self, model: Any) -> None:
        self._adapted = model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._merges: dict[str, _Merge] = {}
        super().__init__(base)

    def unchanging(self) -> Mapping[str, Hashable]:
        frozen = {
            name: _stamp(tensor)
            for name, tensor in self._parameters.items()
            # Buffers have no gradients, and training changes some of them.
            if isinstance(tensor, torch.nn.Parameter)
            and not tensor.requires_grad
            and name not in self._merges
        }
        return {
            meta.name: tuple(frozen[name] for name in group.parameters)
            for group in self._groups
            if frozen.keys() >= set(group.parameters)
            for meta in group.outputs
        }

    def _find_parameters(self, *, since: str = "") -> dict[str, torch.Tensor]:
        _require_lora(self._adapted, self._model)
        self._require_readable(self._model.named_parameters(), since=since)
        found: dict[str, _Found] = {}
        of_origin: dict[int, _Found] = {}
        for one in _walk(self._model, ""):
            first = of_origin.setdefault(id(one.origin), one)
            if first is one:
                found[one.name] = one
            elif first.treatment != one.treatment:
                raise _refusal(
                    one.name,
                    f"shares its weight with {first.name!r} in the base model, and only one of "
                    "both has this adapter; the engine, which shares it too, would compute with "
                    "one weight for both. Adapt both alike (ensure_weight_tying=True of "
                    "LoraConfig) or none",
                )
        self._merges = {name: one.merge for name, one in found.items() if one.merge is not None}
        buffers = {name: one for name, one in found.items() if not one.is_parameter}
        ordered = {n: one for n, one in found.items() if n not in buffers} | buffers
        return {name: one.tensor for name, one in ordered.items()}

    def _value(self, name: str) -> torch.Tensor:
        base = self._whole(name, self._parameters[name])
        if (merge := self._merges.get(name)) is None:
            return base
        # All that is gathered is gathered before the arithmetic, which may fail on one rank alone.
        whole = {id(part): self._whole(name, part) for part in merge.parts}
        return merge.into(base, lambda part: whole[id(part)])

    def _memory(self, name: str) -> Storage:
        if name in self._merges:
            numel = self._shape(name).numel()
            return Storage(f"merged {name}", numel * self._parameters[name].itemsize)
        return super()._memory(name)

    def _is_sent_as_it_is(self, name: str) -> bool:
        return name not in self._merges

    def _read_for(self, name: str) -> Iterable[torch.Tensor]:
        if name in self._merges and self._merges[name].may_overflow(self._parameters[name]):
            return [self._value(name)]
        return self._parts_of(name)

    def _parts_of(self, name: str) -> list[torch.Tensor]:
        """Return what this process holds of all that `_value` is made from."""
        parts = self._merges[name].parts if name in self._merges else []
        return [part_here(one) for one in (self._parameters[name], *parts)]


@dataclass(frozen=True)
class _Merge:
    """Compute what the active adapters of a LoRA layer add to one parameter of its base layer.

    Attributes:
        layer: PEFT's.
        adapters: the active ones that it has.
        parameter: `weight`, `bias`, or the name that a `ParamWrapper` wraps.
    """

    layer: Any
    adapters: tuple[str, ...]
    parameter: str

    @torch.no_grad()
    def into(self, base: torch.Tensor, whole: Whole) -> torch.Tensor:
        """Return the merged parameter, in memory of its own. `base` is only read."""
        first, *others = (self._delta(adapter, whole) for adapter in self.adapters)
        total: torch.Tensor = first.to(base.device)
        for delta in others:
            total += delta.to(base.device)
        total += base
        for adapter in self.adapters if self.parameter == "weight" else ():
            if magnitudes := _magnitudes(self.layer, adapter, whole):
                total *= magnitudes(total)
        return total.to(base.dtype)

    @property
    def parts(self) -> list[torch.Tensor]:
        """All that is added to the base parameter, or scales it."""
        return [
            *(one for adapter in self.adapters for one in self._factors(adapter)),
            *(
                self.layer.lora_magnitude_vector[adapter].weight
                for adapter in (self.adapters if self.parameter == "weight" else ())
                if adapter in getattr(self.layer, "lora_variant", {})
            ),
        ]

    def may_overflow(self, base: torch.Tensor) -> bool:
        """Return whether a division (DoRA) or the range of float16 may make the merged parameter
        infinite where base and factors are finite."""
        return base.dtype == torch.float16 or any(
            adapter in getattr(self.layer, "lora_variant", {}) for adapter in self.adapters
        )

    @property
    def treatment(self) -> Hashable:
        """Equal for two parameters that share a weight and get the same added to it."""
        return tuple(
            # A rank's shard may have no rows, and no address.
            (self.layer.scaling[a], *sorted(part_here(f).data_ptr() or id(f) for f in factors))
            for a in self.adapters
            for factors in [self._factors(a)]
        )

    def _factors(self, adapter: str) -> list[torch.Tensor]:
        if self.parameter == "bias":
            return [self.layer.lora_B[adapter].bias]
        if adapter in self.layer.lora_A:
            return [self.layer.lora_A[adapter].weight, self.layer.lora_B[adapter].weight]
        return [self.layer.lora_embedding_A[adapter], self.layer.lora_embedding_B[adapter]]

    def _delta(self, adapter: str, whole: Whole) -> torch.Tensor:
        """Return what this adapter adds, in float32 and in memory of its own."""
        layer, scaling = self.layer, float(self.layer.scaling[adapter])
        if self.parameter == "bias":
            (bias,) = self._factors(adapter)
            return whole(bias).float().mul(scaling)
        down, up = (whole(factor).float() for factor in self._factors(adapter))
        experts = getattr(layer, "num_experts", 1)
        if experts > 1:
            # As in PEFT's ParamWrapper, which stacks the experts' factors.
            down = down.reshape(experts, -1, down.shape[-1])
            up = up.reshape(up.shape[0], -1, experts)
            shape = "e o i" if layer._did_swap_in_out_features else "e i o"
            return torch.einsum(f"o r e, e r i -> {shape}", up, down).contiguous().mul_(scaling)
        transposed = adapter not in layer.lora_A or getattr(layer, "fan_in_fan_out", False)
        return (down.T @ up.T if transposed else up @ down).mul_(scaling)


def _magnitudes(layer: Any, adapter: str, whole: Whole) -> Any:
    """Return DoRA's factor as a function of the merged weight (float32, in its stored shape); None
    without DoRA."""
    if adapter not in getattr(layer, "lora_variant", {}):
        return None
    dora = layer.lora_magnitude_vector[adapter]
    # The norms are over what feeds each output; of embeddings, over the vocabulary.
    dim = 0 if dora.fan_in_fan_out else 1

    def factor(merged: torch.Tensor) -> torch.Tensor:
        magnitudes: torch.Tensor = whole(dora.weight).float().to(merged.device)
        factors: torch.Tensor = magnitudes / torch.linalg.norm(merged, dim=dim)
        return factors.unsqueeze(dim)

    return factor


@dataclass(frozen=True)
class _Found:
    """A parameter or saved buffer of the base model.

    Attributes:
        name: in the base model, without PEFT's additions.
        tensor: what is sent, or what is merged into.
        origin: the base model's own, which a copy in `modules_to_save` replaces.
        merge: what is added to it; None: nothing.
    """

    name: str
    tensor: torch.Tensor
    origin: torch.Tensor
    merge: _Merge | None = None
    is_parameter: bool = True

    @property
    def treatment(self) -> Hashable:
        copy = None if self.tensor is self.origin else id(self.tensor)
        return copy, None if self.merge is None else self.merge.treatment


def _walk(module: torch.nn.Module, path: str) -> Iterator[_Found]:
    """Yield what the base model's checkpoint would hold of a module, as the trainer computes now.

    Raises:
        ConfigError: PEFT has made something of the module that cannot be merged.
    """
    from peft.tuners.lora import LoraLayer, ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    merges: dict[str, _Merge] = {}
    if isinstance(module, ModulesToSaveWrapper):
        _require_enabled(module, path)
        original, copies = module.original_module, module.modules_to_save
        active = next((a for a in module.active_adapters if a in copies), None)
        origins = {one.name: one.origin for one in _walk(original, path)}
        for one in _walk(original if active is None else copies[active], path):
            yield _Found(
                one.name, one.tensor, origins[one.name], one.merge, is_parameter=one.is_parameter
            )
        return
    if isinstance(module, AuxiliaryTrainingWrapper):
        raise _refusal(path, f"is wrapped by {type(module).__name__} (trainable_token_indices)")
    if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
        raise _refusal(path, f"has an adapter of another kind than LoRA: {_kind_of(module)}")
    while isinstance(module, LoraLayer):
        merges |= {name: merge for name, merge in _merges_of(module, path) if merge.adapters}
        module = module.base_layer if isinstance(module, ParamWrapper) else module.get_base_layer()
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield _Found(_join(path, name), parameter, parameter, merges.get(name))
    for name, buffer in saved_buffers_of(module):
        yield _Found(_join(path, name), buffer, buffer, is_parameter=False)
    for name, child in module.named_children():
        yield from _walk(child, _join(path, name))


def _merges_of(layer: Any, path: str) -> Iterator[tuple[str, _Merge]]:
    """Yield what a LoRA layer adds, by the name of its base layer's parameter."""
    from peft.tuners.lora import Embedding, Linear, ParamWrapper
    from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant

    # Exact classes: those for quantised layers, convolutions and others derive from them or not.
    if type(layer) not in (Linear, Embedding, ParamWrapper):
        raise _refusal(path, f"has a LoRA layer that is not merged here: {_kind_of(layer)}")
    _require_enabled(layer, path)
    if layer.merged:
        raise _refusal(
            path,
            f"has the adapters {layer.merged_adapters} merged into it, which would be added twice; "
            "call unmerge_adapter() first",
        )
    adapters = tuple(
        a for a in layer.active_adapters if a in layer.lora_A or a in layer.lora_embedding_A
    )
    for adapter in adapters:
        variant = layer.lora_variant.get(adapter)
        if variant is None:
            continue
        if type(variant) not in (DoraLinearVariant, DoraEmbeddingVariant):
            raise _refusal(path, f"has a variant of LoRA that is not merged: {_kind_of(variant)}")
        if len(adapters) > 1:
            raise _refusal(path, f"has DoRA and several active adapters: {list(adapters)}")
    if isinstance(layer, ParamWrapper):
        yield layer.parameter_name, _Merge(layer, adapters, layer.parameter_name)
        return
    yield "weight", _Merge(layer, adapters, "weight")
    biased = tuple(adapter for adapter in adapters if layer.lora_bias.get(adapter))
    if biased and layer.get_base_layer().bias is None:
        raise _refusal(path, "has no bias that lora_bias could be added to")
    yield "bias", _Merge(layer, biased, "bias")


def _require_enabled(module: Any, path: str) -> None:
    if module.disable_adapters:
        raise _refusal(
            path,
            "has its adapters disabled (disable_adapter()): the engine would get other weights "
            "than those that are trained. Sync outside of that",
        )


def _require_lora(model: Any, base: Any) -> None:
    """Refuse adapters that are not LoRA, and base models whose weights are not plain numbers."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise ConfigError(
            f"this {type(model).__name__} carries no PEFT adapter; give it to an HFSource"
        )
    for name, config in configs.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA":
            raise _refusal(name, f"is an adapter of another kind than LoRA: {kind}")
    method = getattr(base, "quantization_method", None)
    if getattr(base, "is_quantized", False) or method is not None:
        method = getattr(method, "value", method)
        raise _refusal(
            type(base).__name__,
            f"is quantised ({method}), and what is merged would have to be quantised again; load "
            "the base model in bfloat16",
        )


def _refusal(module: str, what: str) -> ConfigError:
    return ConfigError(
        f"PEFTSource cannot send this model: {module!r} {what}", module=module, what=what
    )


def _kind_of(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _join(path: str, name: str) -> str:
    return clean(f"{path}.{name}" if path else name)


def _stamp(parameter: torch.Tensor) -> Hashable:
    """Return what changes with the parameter's values.

    torch counts what writes to a tensor in place, except through `.data`, where a sample of its
    values may tell.
    """
    here = part_here(parameter)
    count = None if parameter.is_inference() else (parameter._version, here._version)
    return here.data_ptr(), count, fingerprint(here)
