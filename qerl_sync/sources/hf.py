"""Read the weights of a Hugging Face model that lives in this process, unsharded."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from qerl_sync.buffers.detect import dtype_name, require_all_finite, storages_of
from qerl_sync.errors import ConfigError, CoverageError
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.sources.base import Source
from qerl_sync.sources.noise import with_noise
from qerl_sync.verify.alias_guard import mark_of
from qerl_sync.verify.parts import part_here
from qerl_sync.verify.probe_prompt import Probe, spread_tokens
from qerl_sync.verify.stamps import ContentStamps
from qerl_sync.verify.stored import Stored, weights_as_stored

# Added to parameter names by wrappers that leave the parameters whole.
WRAPPER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
FSDP1 = "FullyShardedDataParallel"
_PEFT_PARTS = re.compile(r"\.(base_layer(?=\.|$)|modules_to_save\.[^.]+)")


@dataclass(frozen=True)
class _Group:
    """Parameters that are converted together, and the checkpoint tensors that they become.

    `memory` has, for each output, the parameter whose storage it shares or, where the conversion
    copies, the storage of the copy (which several outputs may share).
    """

    parameters: tuple[str, ...]
    outputs: tuple[ParamMeta, ...]
    memory: tuple[str | Storage, ...]


class HFSource(Source):
    """Yields what `save_pretrained` would write, tensor by tensor and without a second copy.

    Example:
        model = AutoModelForCausalLM.from_pretrained(path)
        with SyncSession(HFSource(model), transport, SyncConfig(policy="reorder")) as session:
            session.push(step=1)

    transformers keeps some architectures in memory under other names and shapes than in their
    checkpoints (fused experts, renamed modules), and vLLM's loaders expect the latter. The
    conversion is transformers' own (`revert_weight_conversion`), applied parameter by parameter.

    Which parameters there are is asked with `metadata`, once a sync: a walk over the modules for
    each chunk costs more than looking at its values. What they hold is read when it is asked for.

    Args:
        model: an unsharded `PreTrainedModel`. Its weights are read, never changed.
        convert: False yields the names and shapes as they are in memory.

    Raises:
        ConfigError: the model is sharded or carries adapters; `metadata` raises it too, if it has
            become so since.
    """

    stable = True
    checks_finite = True
    stamps_content = True
    _why_unreadable = (
        ", and this source does not gather; give the session a ShardedSource "
        "(qerl_sync.sources.sharded) on every trainer rank, or train in one process"
    )

    def __init__(self, model: torch.nn.Module, *, convert: bool = True) -> None:
        self._stamps = ContentStamps()
        self._model = model
        self._convert = convert
        self._parameters = self._find_parameters()
        self._layout: tuple[tuple[str, torch.dtype, torch.Size], ...] = ()
        self._groups: list[_Group] = []
        self._group_of: dict[str, _Group] = {}
        self._conversions: list[Any] = []
        self._unwritten: list[tuple[str, torch.Tensor, Hashable]] = []

    def metadata(self) -> list[ParamMeta]:
        # Each time: accelerate and transformers shard a model in `train()`, long after this source
        # was made. A shard would then pass for a whole tensor.
        parameters = self._parameters = self._find_parameters(since=" since this source was made")
        layout = tuple((name, p.dtype, self._shape(p)) for name, p in parameters.items())
        if layout != self._layout:
            self._conversions = _conversions(self._model) if self._convert else []
            twins = {
                name: torch.empty(shape, dtype=parameters[name].dtype, device="meta")
                for name, _, shape in layout
            }
            self._groups = _groups(self._model, twins, self._conversions)
            self._group_of = {meta.name: g for g in self._groups for meta in g.outputs}
            self._layout = layout
        self._unwritten = [
            (name, tensor, mark_of(tensor))
            for name in self._inputs()
            for tensor in self._parts(name)
            if not self._is_gathered(tensor)
        ]
        return [meta for group in self._groups for meta in group.outputs]

    def require_unwritten(self) -> None:
        for name, tensor, mark in self._unwritten:
            if mark_of(tensor) != mark:
                raise CoverageError(
                    f"{name!r} was written to while the weights were sent, which may be those of "
                    "two steps. Let no optimizer step and no callback change weights while push() "
                    "runs; with sync.when: eager, call WeightSyncCallback.wait() before it",
                    tensor=name,
                )

    @property
    def device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    def storages(self) -> Mapping[str, Storage]:
        found = {}
        for group in self._groups:
            for meta, memory in zip(group.outputs, group.memory, strict=True):
                found[meta.name] = self._memory(memory) if isinstance(memory, str) else memory
        return found

    def resident_bytes(self) -> int:
        whole = (p for p in self._parameters.values() if not self._is_gathered(p))
        own = {s.key: s for p in whole for s in storages_of(p)}
        return sum(storage.nbytes for storage in own.values())

    def check_finite(self, names: Collection[str] | None = None, *, alone: bool = True) -> None:
        looked_at: Iterable[str] = self._inputs()
        if names is not None:
            looked_at = dict.fromkeys(one for name in names for one in self._inputs_of(name))
        held = ((name, tensor) for name in looked_at for tensor in self._to_check(name))
        require_all_finite(held, alone=alone)

    def content_stamps(self) -> Mapping[str, Hashable]:
        # What is made of several tensors has no bytes yet.
        own = {name: p for name, p in self._parameters.items() if len(self._parts(name)) == 1}
        return self._of_outputs(self._stamps.of(own))

    def _of_outputs(self, stamps: Mapping[str, Hashable]) -> dict[str, Hashable]:
        """Return stamps of checkpoint tensors, of those whose parameters all have one."""
        return {
            meta.name: tuple(stamps[name] for name in group.parameters)
            for group in self._groups
            if stamps.keys() >= set(group.parameters)
            for meta in group.outputs
        }

    def materialize(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        waiting: dict[str, torch.Tensor] = {}  # converted with another name, asked for later
        for name in names:
            if name not in waiting:
                with torch.no_grad():
                    chosen = {p: self._value(p) for p in self._inputs_of(name)}
                    waiting |= _converted(self._model, chosen, self._conversions)
            yield name, waiting.pop(name)

    # What a source overrides that sends something else than the model's own parameters.

    def _find_parameters(self, *, since: str = "") -> dict[str, torch.Tensor]:
        """Return the model's parameters by their names in memory. `since`: see
        `_require_readable`."""
        if hasattr(self._model, "peft_config"):
            raise ConfigError(
                f"the model carries PEFT adapters{since}, which this source does not merge; give "
                "the model to a PEFTSource"
            )
        self._require_readable(self._model.named_parameters(), since=since)
        return parameters_of(self._model)

    def _require_readable(
        self, parameters: Iterable[tuple[str, torch.Tensor]], *, since: str = ""
    ) -> None:
        """Refuse a model with a parameter that `_whole` would not return whole.

        Args:
            since: what has become of a model that was whole when the source was made.

        Raises:
            ConfigError: it is sharded; `parameter` and `sharding` say which and how.
        """
        for name, parameter in parameters:
            sharding = sharding_of(name, parameter)
            if sharding and not self._is_gathered(parameter):
                raise ConfigError(
                    f"{name!r} is sharded by {sharding}{since}{self._why_unreadable}",
                    parameter=name,
                    sharding=sharding,
                )

    def _is_gathered(self, tensor: torch.Tensor) -> bool:
        """Return whether `_whole` gathers the tensor from shards."""
        return False

    def _inputs(self) -> Mapping[str, torch.Tensor]:
        """Return all tensors that `materialize` reads, by name."""
        return self._parameters

    def _inputs_of(self, name: str) -> Sequence[str]:
        """Return the names of the inputs that a checkpoint tensor is made of."""
        return self._group_of[name].parameters

    def _parts(self, name: str) -> list[torch.Tensor]:
        """Return the tensors that `_value` is made of."""
        return [self._parameters[name]]

    def _value(self, name: str) -> torch.Tensor:
        """Return what is sent for a parameter, before it is converted."""
        (tensor,) = self._parts(name)
        return self._whole(name, tensor)

    def _whole(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return all of a tensor that is read for the parameter of that name."""
        return tensor.detach()

    def _shape(self, tensor: torch.Tensor) -> torch.Size:
        """Return the shape of `_whole`."""
        return torch.Size(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO-3 empties it

    def _memory(self, name: str) -> Storage:
        """Return the memory that `_value` lies in."""
        (storage,) = storages_of(self._parameters[name])
        return storage

    def _to_check(self, name: str) -> Iterable[torch.Tensor]:
        """Return the tensors that must be finite for `_value` to be: this process's parts."""
        return [part_here(tensor) for tensor in self._parts(name)]


def probe_of(
    model: Any, *, attention: str | None = None, called: Callable[[], Any] | None = None
) -> Probe:
    """Return a probe that evaluates this model on a fixed prompt, for `sync.verify: full`.

    The probe switches to evaluation mode and restores the model's own mode afterwards.

    Args:
        attention: the attention implementation of transformers to evaluate with, where the model's
            own takes more than tokens.
        called: returns what is called to evaluate it, where something wraps it later (FSDP1).
    """

    def logprobs(token_ids: Sequence[int]) -> list[float]:
        return noisy(token_ids, {})

    @torch.no_grad()
    def noisy(
        token_ids: Sequence[int], noise: Mapping[str, torch.Tensor], stored: Stored | None = None
    ) -> list[float]:
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        own_attention = None if attention is None else model.config._attn_implementation
        try:
            if attention is not None:
                model.set_attn_implementation(attention)
            ids = torch.tensor([list(token_ids)], device=next(model.parameters()).device)
            # The model's own parameters are only read: the call gets others in their place.
            others = _noisy_parameters(model, noise)
            given = {"input_ids": ids}
            kept = nullcontext() if stored is None else weights_as_stored(_weighted(model), stored)
            with kept:
                output = (
                    torch.func.functional_call(model, others, (), given)
                    if others
                    else (model if called is None else called())(**given)
                )
            reported = output.logits[0, :-1].float().log_softmax(-1)
        finally:
            if attention is not None:
                model.set_attn_implementation(own_attention)
            for module, training in modes:
                module.training = training
            reshard(model)
        return [float(p) for p in reported.gather(1, ids[0, 1:, None])[:, 0]]

    vocab_size = model.config.get_text_config().vocab_size
    return Probe(spread_tokens(vocab_size), logprobs, noisy)


def reshard(model: torch.nn.Module) -> None:
    """Free what FSDP2 keeps gathered of a model's root after a forward pass without a backward one.

    Until then its parameters are copies that the optimizer does not step. Does nothing for other
    models.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # takes 2 s to import, where nothing has
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def _weighted(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the modules of the base model that have a weight, by the paths of their checkpoint."""
    return {
        _plain_path(path): module
        for path, module in model.named_modules()
        if module._parameters.get("weight") is not None and "lora_" not in path
    }


def _plain_path(path: str) -> str:
    """Return a module's or parameter's name without PEFT's parts: around the model, around a layer,
    and of the copy that trains in place of a module."""
    return _PEFT_PARTS.sub("", clean(path.removeprefix("base_model.model.")))


def _noisy_parameters(
    model: torch.nn.Module, noise: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the parameters with noise added, by their names in memory.

    Raises:
        ConfigError: the model has no whole parameter of that checkpoint name; `parameter`.
    """
    wanted, found = dict(noise), {}
    for name, parameter in model.named_parameters() if wanted else ():
        plain = _plain_path(name)
        if plain in wanted and not sharding_of(name, parameter):
            found[name] = with_noise(parameter.detach(), wanted.pop(plain))
    for name in wanted:
        raise ConfigError(
            f"sync.verify: full cannot add sync.noise to {name!r} in the trainer's "
            f"{type(model).__name__}, which has no whole parameter of that name; choose verify: "
            "checksum",
            parameter=name,
        )
    return found


def parameters_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters under clean names, tied ones once, in model order, then saved buffers.

    Checkpoints also hold some buffers, for instance router corrections.
    """
    found: dict[str, torch.Tensor] = {clean(name): p for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        found |= {joined(path, name): buffer for name, buffer in saved_buffers_of(module)}
    return found


def saved_buffers_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the module's own buffers that `save_pretrained` writes and training may change."""
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set and buffer.is_floating_point():
            yield name, buffer


def clean(name: str) -> str:
    """Return the name of a parameter or module without the wrappers around and in it."""
    dotted = f"{name}."
    for prefix in WRAPPER_PREFIXES:
        dotted = dotted.replace(prefix, "")
    return dotted[:-1]


def joined(path: str, name: str) -> str:
    """Return the clean name of what a module has under a name."""
    return clean(f"{path}.{name}" if path else name)


def _groups(
    model: torch.nn.Module, twins: Mapping[str, torch.Tensor], conversions: list[Any]
) -> list[_Group]:
    """Find out, on meta tensors, what each parameter becomes in a checkpoint.

    Most parameters convert alone. Those whose conversion needs others (several parameters that
    the checkpoint keeps as one) are converted together.
    """
    whole = _converted(model, twins, conversions)
    groups, together = [], []
    for name, twin in twins.items():
        alone = _converted(model, {name: twin}, conversions)
        # Without the others a conversion may yield something that no checkpoint has.
        if all(out in whole and whole[out].shape == t.shape for out, t in alone.items()):
            groups.append(_group((name,), alone, twins))
        else:
            together.append(name)
    done = {meta.name for group in groups for meta in group.outputs}
    rest = {out: t for out, t in whole.items() if out not in done}
    return groups + ([_group(tuple(together), rest, twins)] if rest else [])


def _group(
    names: tuple[str, ...], outputs: Mapping[str, torch.Tensor], twins: Mapping[str, torch.Tensor]
) -> _Group:
    memory: dict[int | str, str | Storage] = {
        storage.key: name for name in names for storage in storages_of(twins[name])
    }
    for tensor in outputs.values():
        for storage in storages_of(tensor):
            copy = Storage(f"copy {len(memory)} of {names[0]}", storage.nbytes)
            memory.setdefault(storage.key, copy)
    return _Group(
        parameters=names,
        outputs=tuple(
            ParamMeta(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in outputs.items()
        ),
        memory=tuple(memory[t.untyped_storage()._cdata] for t in outputs.values()),
    )


def _conversions(model: torch.nn.Module) -> list[Any]:
    """Return transformers' conversions from the model's parameters to those of a checkpoint."""
    loaded_with: list[Any] | None = getattr(model, "_weight_conversions", None)
    if loaded_with is not None:
        return loaded_with
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange
    except ImportError:  # transformers 4 keeps parameters as they are in checkpoints
        return []
    found = get_model_conversion_mapping(model, add_legacy=False)
    return [conversion for conversion in found if not isinstance(conversion, PrefixChange)]


def _converted(
    model: torch.nn.Module, parameters: Mapping[str, torch.Tensor], conversions: list[Any]
) -> dict[str, torch.Tensor]:
    """Return `parameters` under the names and in the shapes of a checkpoint."""
    if not conversions:
        return dict(parameters)
    from transformers.core_model_loading import revert_weight_conversion

    # A model that transformers did not load itself does not know its conversions, and looking them
    # up walks all its modules: for each parameter, that is quadratic.
    unknown = getattr(model, "_weight_conversions", None) is None
    if unknown:
        model._weight_conversions = conversions  # type: ignore[assignment]
    try:
        return dict(revert_weight_conversion(model, dict(parameters)))
    finally:
        if unknown:
            del model._weight_conversions


def sharding_of(name: str, parameter: torch.Tensor) -> str:
    """Return what keeps only a part of this parameter in this process; empty if nothing does."""
    if hasattr(parameter, "to_local"):
        return "torch's fully_shard or tensor parallelism (DTensor)"
    if hasattr(parameter, "ds_id"):
        return "DeepSpeed ZeRO-3"
    # With use_orig_params the names may stay, and the parameters are views into a flat one.
    if hasattr(parameter, "_fsdp_flattened") or "_fsdp_wrapped_module" in name:
        return FSDP1
    return FSDP1 if name.endswith("_flat_param") else ""
