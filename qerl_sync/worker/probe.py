"""The layer map, observed from the live model by a dry run on meta tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qerl_sync.buffers.detect import dtype_name
from qerl_sync.errors import CoverageError, LayerMapError
from qerl_sync.meta import CASTABLE_FLOATS, ParamMeta
from qerl_sync.plan.layer_map import Contribution, LayerMap, ParentLayer
from qerl_sync.worker import compat, refresh

# Names that checkpoints carry and vLLM computes by itself.
DERIVED_NAMES = ("*rotary_emb.inv_freq",)


def observe_layer_map(
    model: torch.nn.Module,
    vllm_config: Any,
    metas: Sequence[ParamMeta],
    *,
    allow_incomplete: Sequence[str] = (),
) -> LayerMap:
    """Feed `model` a stream of meta tensors and record what its own loaders do with them.

    Weights, data pointers and generations are the same afterwards. Runs on every worker rank (the
    element counts are those of its own shard), between requests.

    Args:
        model: the worker's live vLLM model, or one built on the meta device.
        metas: the stream, in source order.
        allow_incomplete: fnmatch patterns of parent layers that may miss elements.

    Raises:
        LayerMapError: vLLM refuses, ignores or loses a tensor, or would cast it by value.
        CoverageError: the stream leaves parameters of the model without their weights.
    """
    tied = set(refresh.tied_layers(model))
    run = _DryRun(model)
    with compat.loading_context(vllm_config), compat.dry_reload(model) as written_live:
        run.written_live = written_live
        with compat.observe_loads(run, process=False), run:
            run.load(metas)
        layers = run.parent_layers()
        _check_fates(run, metas, tied)
        _check_coverage(run, layers, tied, allow_incomplete)
    return LayerMap(
        layers=layers,
        contributions={meta.name: tuple(run.contributions[meta.name]) for meta in metas},
    )


@dataclass
class _DryRun(TorchDispatchMode):
    """Observes one dry run: through vLLM's loading wrappers, and `copy_` beside them."""

    model: torch.nn.Module
    contributions: dict[str, list[Contribution]] = field(default_factory=lambda: defaultdict(list))
    received: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    live: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    miscast: dict[str, str] = field(default_factory=dict)
    written_live: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        self._paths = {id(module): path for path, module in self.model.named_modules()}
        self._sources: dict[int, ParamMeta] = {}
        self._kept: list[torch.Tensor] = []  # keys are addresses: nothing may be freed before the end
        self._current: ParamMeta | None = None
        self._copied: list[tuple[str, int]] = []

    def load(self, metas: Iterable[ParamMeta]) -> None:
        try:
            self.model.load_weights(self._stream(metas))  # type: ignore[operator]
        except Exception as exc:
            at = self._current
            what = f"{at.name!r} ({at.dtype}, shape {list(at.shape)})" if at else "the stream"
            raise LayerMapError(
                f"vLLM's {type(self.model).__name__} refuses {what}: {type(exc).__name__}: {exc}. "
                "Check that the trainer's model is the one that vLLM was started with, and that "
                "the source yields checkpoint names and shapes"
            ) from exc

    def _stream(self, metas: Iterable[ParamMeta]) -> Iterator[tuple[str, torch.Tensor]]:
        for meta in metas:
            self._settle_copies()
            tensor = torch.empty(meta.shape, dtype=getattr(torch, meta.dtype), device="meta")
            self._sources[tensor.untyped_storage()._cdata] = meta
            self._kept.append(tensor)
            self._current = meta
            yield meta.name, tensor
        self._settle_copies()

    def held(
        self, layer: torch.nn.Module, parameter: str, arguments: dict[str, Any], loaded_numel: int
    ) -> None:
        """vLLM keeps a tensor for `layer`. Its source is told by its storage, since a loader may
        hold a tensor back and load it later than it was yielded."""
        self._copied.clear()  # the copies of this call went through the wrapper
        tensors = [
            value
            for key, value in arguments.items()
            if key != "param" and isinstance(value, torch.Tensor)
        ]
        self._kept += tensors
        sources = [self._sources.get(t.untyped_storage()._cdata) for t in tensors]
        meta = next((s for s in sources if s is not None), self._current)
        assert meta is not None
        contribution = Contribution(
            parent_layer=self._paths[id(layer)],
            parameter=parameter,
            loaded_numel=loaded_numel,
            held_bytes=sum(t.nbytes for t in tensors),
            aliases_source=any(s is not None for s in sources),
        )
        _merge(self.contributions[meta.name], contribution)
        self.received[contribution.parent_layer, parameter] += loaded_numel
        self._check_cast(meta, getattr(layer, parameter))

    def processing(self, layer: torch.nn.Module) -> None:
        raise AssertionError("a dry run processes nothing")

    processed = processing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            destination, source = args[0], args[1]
            meta = self._sources.get(source.untyped_storage()._cdata)
            if meta is not None:
                self._copied.append((meta.name, destination.untyped_storage()._cdata))
        return func(*args, **(kwargs or {}))

    def _settle_copies(self) -> None:
        """Copies that no wrapper saw went past the reload: into a live tensor, or into nothing."""
        for name, destination in self._copied:
            (self.live if destination in self.written_live else self.lost).add(name)
        self._copied.clear()

    def _check_cast(self, meta: ParamMeta, parameter: torch.Tensor) -> None:
        wanted = dtype_name(parameter.dtype)
        if meta.dtype != wanted and not {meta.dtype, wanted} <= CASTABLE_FLOATS:
            self.miscast[meta.name] = wanted

    def parent_layers(self) -> dict[str, ParentLayer]:
        """Every module that awaits elements, in module order."""
        expected: dict[str, int] = defaultdict(int)
        for (path, _), numel in self.received.items():
            expected[path] += numel
        layers = {}
        for path, module in self.model.named_modules():
            total = compat.layer_state(module).total_numel
            if total:
                layers[path] = ParentLayer(
                    name=path,
                    kind=type(module).__name__,
                    total_numel=total,
                    expected_numel=expected[path],
                    deferred=compat.is_deferred(module),
                )
        return layers


def _merge(contributions: list[Contribution], new: Contribution) -> None:
    """A fused tensor is loaded slice by slice: sum up the calls for the same parameter."""
    if contributions and contributions[-1][:2] == new[:2]:
        old = contributions[-1]
        contributions[-1] = old._replace(
            loaded_numel=old.loaded_numel + new.loaded_numel,
            held_bytes=old.held_bytes + new.held_bytes,
            aliases_source=old.aliases_source and new.aliases_source,
        )
    else:
        contributions.append(new)


def _check_fates(run: _DryRun, metas: Sequence[ParamMeta], tied: set[str]) -> None:
    """Every tensor must have been held, written live, or be known to be of no use to vLLM."""
    family = type(run.model).__name__
    if run.miscast:
        name, wanted = next(iter(run.miscast.items()))
        dtype = next(meta.dtype for meta in metas if meta.name == name)
        raise LayerMapError(
            f"{name!r} is {dtype}, its parameter in vLLM's {family} is {wanted}: vLLM would cast it "
            "by value and the weights would be silently wrong. Send it as "
            f"{wanted if wanted in CASTABLE_FLOATS else 'the dtype that vLLM was started with'}"
        )
    for meta in metas:
        name = meta.name
        if name in run.lost and not run.contributions[name]:
            raise LayerMapError(
                f"vLLM's {family} writes {name!r} past the layerwise reload, on a tensor that is not "
                "there then: it would be lost and the old weights would stay. This architecture "
                "cannot be synced with this vLLM"
            )
        owner = name.rpartition(".")[0]
        useless = any(fnmatchcase(name, pattern) for pattern in DERIVED_NAMES) or owner in tied
        if not run.contributions[name] and name not in run.live and not useless:
            raise LayerMapError(
                f"vLLM's {family} accepts {name!r} and does nothing with it; its weights would stay "
                "as they are. Do not send it, or, if that is right, name it in sync.ignore_names"
            )


def _check_coverage(
    run: _DryRun,
    layers: dict[str, ParentLayer],
    tied: set[str],
    allow_incomplete: Sequence[str],
) -> None:
    """Every parameter must get all its elements, or have a reason not to."""
    missing = []
    for path, layer in layers.items():
        module = run.model.get_submodule(path)
        excused = any(fnmatchcase(path, pattern) for pattern in allow_incomplete)
        if layer.deferred or path in tied or excused:
            continue
        for name, tensor in compat.loadable_tensors(module).items():
            wanted, got = compat.load_numel_of(tensor), run.received.get((path, name), 0)
            derived = name in module._buffers and name in module._non_persistent_buffers_set
            padded = 0 < got < wanted and compat.is_padded_embedding(module)
            if got != wanted and not derived and not padded:
                missing.append(f"{path}.{name} ({layer.kind}): {got:,} of {wanted:,} elements")
    if missing:
        shown = "".join(f"\n  {line}" for line in missing[:12])
        more = f"\n  and {len(missing) - 12} more" if len(missing) > 12 else ""
        raise CoverageError(
            "the source does not bring these parameters of vLLM's "
            f"{type(run.model).__name__} exactly once; they would keep old or half weights:"
            f"{shown}{more}\nLet the source yield them, or, if that is right, name the layer in "
            "sync.allow_incomplete"
        )
