"""Read a PEFT model as two things: its base, never merged, and the adapter that trains."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from qerl_sync.buffers.detect import dtype_name
from qerl_sync.errors import ConfigError
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.adapter import Adapter
from qerl_sync.sources.adapted import Found, in_checkpoint_order, walk
from qerl_sync.sources.hf import HFSource
from qerl_sync.verify.stamps import stamp

MERGE = "choose sync.lora: merge"
# The two factors of an adapted layer, as PEFT names the containers that have one for each adapter.
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
# Prefixes of `init_lora_weights` that take the adapter's first values out of the base weights.
RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterSource(HFSource):
    """Yields a LoRA adapter, and the base weights that it is added to where workers lack them.

    Example:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), LoraConfig(r=8))
        llm = LLM(path, enable_lora=True, max_lora_rank=8)
        with SyncSession(AdapterSource(model), InProcessTransport(llm), SyncConfig()) as session:
            session.push(step=1)  # base and adapter
            session.push(step=2)  # the adapter

    Workers hold the base as the trainer has it, and serve the adapter to every request that names
    no adapter of its own. What trains beside the adapter (`modules_to_save`, biases, norms) travels
    with it, in the same sync.

    Args:
        model: an unsharded `PeftModel`, or a `PreTrainedModel` with `add_adapter`. Never changed.

    Raises:
        ConfigError: the model is sharded, or has something that vLLM does not serve as an adapter:
            `feature` names it. `metadata` raises it too, and where the adapter is merged into the
            base or disabled at the moment.
    """

    lora: Mapping[str, str]

    def __init__(self, model: Any, *, reason: str = "asked for") -> None:
        if not hasattr(model, "peft_config"):
            raise ConfigError(
                f"this {type(model).__name__} has no PEFT adapter to send; give the model that "
                "get_peft_model returned, or an HFSource"
            )
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._peft_config = model.peft_config
        self._factors: dict[str, torch.Tensor] = {}
        self._scalings: dict[str, float] = {}
        self._structure: _Structure | None = None
        self._base: dict[str, torch.Tensor] = {}
        self.lora = {"mode": "adapter", "reason": reason}
        super().__init__(base)

    def adapter(self) -> Adapter:
        metas = (
            ParamMeta(name, dtype_name(t.dtype), tuple(self._shape(t)))
            for name, t in self._factors.items()
        )
        return Adapter(tuple(metas), dict(self._scalings))

    def unchanging(self) -> Mapping[str, Hashable]:
        frozen = {n: stamp(t) for n, t in self._parameters.items() if not t.requires_grad}
        return self._of_outputs(frozen)

    def materialize(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        base = super().materialize([name for name in names if name not in self._factors])
        for name in names:
            yield (name, self._value(name)) if name in self._factors else next(base)

    def _inputs_of(self, name: str) -> Sequence[str]:
        return (name,) if name in self._factors else super()._inputs_of(name)

    def _parts(self, name: str) -> list[torch.Tensor]:
        return [self._factors[name]] if name in self._factors else super()._parts(name)

    def _inputs(self) -> dict[str, torch.Tensor]:
        return self._base | self._factors

    def _find_parameters(self, *, since: str = "") -> dict[str, torch.Tensor]:
        """Return the base under the names that it has without PEFT; note the adapter's factors."""
        if self._structure is not None and self._structure.unchanged():
            # Sharding may change parameters in place (ZeRO-3), which no structure shows.
            self._require_readable(self._inputs().items(), since=since)
            return self._base
        from peft.tuners.lora import LoraLayer

        self._structure = None
        modules = list(self._model.modules())
        layers = [module for module in modules if isinstance(module, LoraLayer)]
        name = _only_adapter(layers, self._peft_config)
        _refuse_features(self._peft_config[name], name)
        made_by = str(getattr(self._peft_config[name], "init_lora_weights", "")).lower()
        self.base_changed_by = made_by if made_by.startswith(RESIDUAL_INITS) else ""
        self._factors, self._scalings = {}, {}
        found: dict[int | str, Found] = {}
        of_origin: dict[int, Found] = {}
        for one in walk(self._model, "", partial(self._note, name)):
            first = of_origin.setdefault(id(one.origin), one)
            if first.tensor is not one.tensor:
                raise ConfigError(
                    f"the adapter {name!r} trains {one.name!r} apart from {first.name!r}, with "
                    "which it shares a weight in the base model (modules_to_save); the engine "
                    "shares it too, and would compute with one for both. Train both alike "
                    "(ensure_weight_tying=True of LoraConfig) or none",
                    feature="modules_to_save",
                )
            # Tied parameters once, as `named_parameters` yields them.
            found.setdefault(id(one.tensor) if one.is_parameter else one.name, one)
        if not self._factors:
            raise ConfigError(
                f"the adapter {name!r} has no LoRA layer in this {type(self._model).__name__}: it "
                "is not attached to it; give the model that get_peft_model returned",
                feature="no layers",
            )
        self._base = in_checkpoint_order(list(found.values()))
        self._require_readable(self._inputs().items(), since=since)
        self._structure = _Structure(modules, layers)
        return self._base

    def _note(self, name: str, module: Any, path: str) -> None:
        """Note an adapter's factors in one of PEFT's modules."""
        from peft.tuners.lora import LoraLayer
        from peft.utils.other import ModulesToSaveWrapper

        if isinstance(module, ModulesToSaveWrapper):
            return
        if not isinstance(module, LoraLayer):
            raise _refusal(name, path, type(module).__name__, "it trains a part of a tensor")
        if variant := module.lora_variant.get(name):
            raise _refusal(name, path, type(variant).__name__, "vLLM computes plain LoRA")
        if name not in module.scaling:
            return
        active = not module.disable_adapters and name in module.active_adapters
        if module.merged or not active:
            raise ConfigError(
                f"the adapter is {'merged into' if module.merged else 'disabled in'} {path!r} at "
                "the moment, and the base weights or the trainer's own answers are not those that "
                "train; call unmerge_adapter() or enable_adapter_layers() before the sync",
                feature="merged" if module.merged else "disabled",
            )
        self._scalings[path] = float(module.scaling[name])
        for kind in FACTORS:
            factor = getattr(module, kind, {})
            if name in factor:
                own = factor[name]
                of_linear = isinstance(own, torch.nn.Module)
                tensor = own.weight if of_linear else own
                self._factors[f"{path}.{kind}{'.weight' if of_linear else ''}"] = tensor


class _Structure:
    """A model's modules, their parameters and buffers, and the state of its LoRA layers, as they
    were when this was made.

    To compare is a tenth of the work of walking a PEFT model, which has ten modules for each layer
    that it adapts, and of reading what each of them is.
    """

    def __init__(self, modules: Iterable[torch.nn.Module], layers: Iterable[Any]) -> None:
        # With what the identities belong to, so that nothing else can get them.
        self._modules = [
            (one, [list(table.values()) for table in _tables(one)], self._identities(one))
            for one in modules
        ]
        self._layers = [(layer, self._state_of(layer)) for layer in layers]

    @staticmethod
    def _identities(module: torch.nn.Module) -> list[object]:
        return [(*table, *map(id, table.values())) for table in _tables(module)]

    @staticmethod
    def _state_of(layer: Any) -> tuple[Any, ...]:
        return (
            list(layer.active_adapters),
            list(layer.merged_adapters),
            layer.disable_adapters,
            dict(layer.scaling),
            dict(layer.lora_variant),
        )

    def unchanged(self) -> bool:
        """Return whether all modules still hold the same objects, whatever their values."""
        return all(self._identities(one) == before for one, _, before in self._modules) and all(
            self._state_of(layer) == before for layer, before in self._layers
        )


def _tables(module: torch.nn.Module) -> tuple[dict[str, Any], ...]:
    return module._modules, module._parameters, module._buffers


def _only_adapter(layers: Iterable[Any], configs: Mapping[str, Any]) -> str:
    """Return the name of the one adapter that is active."""
    active = sorted({name for layer in layers for name in layer.active_adapters})
    if len(active) > 1:
        raise ConfigError(
            f"the adapters {', '.join(active)} are active at once, and an engine serves one; "
            f"activate one (model.set_adapter({active[0]!r})), or {MERGE}",
            feature="several active adapters",
        )
    # Without layers: of another kind than LoRA, or not attached. Its configuration tells.
    return active[0] if active else next(iter(configs))


# Fields of a LoraConfig that vLLM's adapters have no counterpart of.
REFUSED = {
    "use_dora": "DoRA scales whole columns of the base",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "it pools the inputs",
    "lora_bias": "the second factor has a bias, which vLLM does not add",
    "target_parameters": "it adapts parameters of fused experts, which vLLM names otherwise",
    "trainable_token_indices": "single rows of the embeddings train",
    "layer_replication": "it computes layers several times",
    "alora_invocation_tokens": "it begins in the middle of a prompt",
    "arrow_config": "it mixes several adapters",
    "megatron_config": "its layers are Megatron's",
}


def _refuse_features(config: Any, name: str) -> None:
    """Raise ConfigError for what would be served otherwise than it is trained."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise _refusal(name, "peft_type", kind, "vLLM serves LoRA only")
    for field, why in REFUSED.items():
        if value := getattr(config, field, None):
            raise _refusal(name, field, value, why)


def _refusal(name: str, feature: str, value: object, why: str) -> ConfigError:
    return ConfigError(
        f"the adapter {name!r} cannot be served beside its base: {feature} is {value!r}, and "
        f"{why}; leave it away, or {MERGE}",
        feature=feature,
    )
