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
from qerl_sync.sources.adapted import Found, in_checkpoint_order, walk
from qerl_sync.sources.hf import HFSource, joined
from qerl_sync.verify.parts import part_here
from qerl_sync.verify.stamps import stamp

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
            name: stamp(tensor)
            for name, tensor in self._parameters.items()
            # Buffers have no gradients, and training changes some of them.
            if isinstance(tensor, torch.nn.Parameter)
            and not tensor.requires_grad
            and name not in self._merges
        }
        return self._of_outputs(frozen)

    def _find_parameters(self, *, since: str = "") -> dict[str, torch.Tensor]:
        _require_lora(self._adapted, self._model)
        self._require_readable(self._model.named_parameters(), since=since)
        merges: dict[str, _Merge] = {}

        def meet(module: Any, path: str) -> None:
            merges.update({joined(path, n): merge for n, merge in _merges_of(module, path)})

        def treatment(one: Found) -> Hashable:
            copy = None if one.tensor is one.origin else id(one.tensor)
            merge = merges.get(one.name)
            return copy, None if merge is None else merge.treatment

        of_origin: dict[int, Found] = {}
        for one in walk(self._model, "", meet):
            first = of_origin.setdefault(id(one.origin), one)
            if first is not one and treatment(first) != treatment(one):
                raise _refusal(
                    one.name,
                    f"shares its weight with {first.name!r} in the base model, and only one of "
                    "both has this adapter; the engine, which shares it too, would compute with "
                    "one weight for both. Adapt both alike (ensure_weight_tying=True of "
                    "LoraConfig) or none",
                )
        found = in_checkpoint_order(list(of_origin.values()))
        self._merges = {name: merges[name] for name in found if name in merges}
        return found

    def _parts(self, name: str) -> list[torch.Tensor]:
        merge = self._merges.get(name)
        return [self._parameters[name], *(merge.parts if merge is not None else ())]

    def _value(self, name: str) -> torch.Tensor:
        base, *parts = self._parts(name)
        whole = self._whole(name, base)
        if not parts:
            return whole
        # All that is gathered is gathered before the arithmetic, which may fail on one rank alone.
        added = {id(part): self._whole(name, part) for part in parts}
        return self._merges[name].into(whole, lambda part: added[id(part)])

    def _memory(self, name: str) -> Storage:
        if name in self._merges:
            base = self._parameters[name]
            return Storage(f"merged {name}", self._shape(base).numel() * base.itemsize)
        return super()._memory(name)

    def _to_check(self, name: str) -> Iterable[torch.Tensor]:
        if name in self._merges and self._merges[name].may_overflow(self._parameters[name]):
            return [self._value(name)]
        return super()._to_check(name)


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
            if adapter in self.layer.lora_variant:
                total *= _dora_factors(self.layer.lora_magnitude_vector[adapter], total, whole)
        return total.to(base.dtype)

    @property
    def parts(self) -> list[torch.Tensor]:
        """Return all that is added to the base parameter, or scales it."""
        return [
            *(one for adapter in self.adapters for one in self._factors(adapter)),
            *(
                self.layer.lora_magnitude_vector[adapter].weight
                for adapter in (self.adapters if self.parameter == "weight" else ())
                if adapter in self.layer.lora_variant
            ),
        ]

    def may_overflow(self, base: torch.Tensor) -> bool:
        """Return whether a division (DoRA) or the range of float16 may make the merged parameter
        infinite where base and factors are finite."""
        return base.dtype == torch.float16 or any(
            adapter in self.layer.lora_variant for adapter in self.adapters
        )

    @property
    def treatment(self) -> Hashable:
        """Return a value that is equal for two parameters that get the same added."""
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


def _dora_factors(dora: Any, merged: torch.Tensor, whole: Whole) -> torch.Tensor:
    """Return DoRA's factors of a merged weight (float32, in its stored shape)."""
    # The norms are over what feeds each output; of embeddings, over the vocabulary.
    dim = 0 if dora.fan_in_fan_out else 1
    magnitudes: torch.Tensor = whole(dora.weight).float().to(merged.device)
    factors: torch.Tensor = magnitudes / torch.linalg.norm(merged, dim=dim)
    return factors.unsqueeze(dim)


def _merges_of(module: Any, path: str) -> Iterator[tuple[str, _Merge]]:
    """Yield what one of PEFT's modules adds, by the name of its base layer's parameter.

    Raises:
        ConfigError: it cannot be merged.
    """
    from peft.tuners.lora import Embedding, Linear, LoraLayer, ParamWrapper
    from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    copies = isinstance(module, ModulesToSaveWrapper)
    if not copies:
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise _refusal(path, f"is wrapped by {type(module).__name__} (trainable_token_indices)")
        if not isinstance(module, LoraLayer):
            raise _refusal(path, f"has an adapter of another kind than LoRA: {_kind_of(module)}")
        # Exact classes: those for quantised layers, convolutions and others may derive from them.
        if type(module) not in (Linear, Embedding, ParamWrapper):
            raise _refusal(path, f"has a LoRA layer that is not merged here: {_kind_of(module)}")
    if module.disable_adapters:
        raise _refusal(
            path,
            "has its adapters disabled (disable_adapter()): the engine would get other weights "
            "than those that are trained. Sync outside of that",
        )
    if copies:
        return
    if module.merged:
        raise _refusal(
            path,
            f"has the adapters {module.merged_adapters} merged into it, which would be added "
            "twice; call unmerge_adapter() first",
        )
    adapters = tuple(
        a for a in module.active_adapters if a in module.lora_A or a in module.lora_embedding_A
    )
    for adapter in adapters:
        variant = module.lora_variant.get(adapter)
        if variant is None:
            continue
        if type(variant) not in (DoraLinearVariant, DoraEmbeddingVariant):
            raise _refusal(path, f"has a variant of LoRA that is not merged: {_kind_of(variant)}")
        if len(adapters) > 1:
            raise _refusal(path, f"has DoRA and several active adapters: {list(adapters)}")
    if adapters:
        name = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
        yield name, _Merge(module, adapters, name)
    biased = tuple(adapter for adapter in adapters if module.lora_bias.get(adapter))
    if biased and module.get_base_layer().bias is None:
        raise _refusal(path, "has no bias that lora_bias could be added to")
    if biased:
        yield "bias", _Merge(module, biased, "bias")


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
