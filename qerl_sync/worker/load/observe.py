"""The layer map, observed from the live model by a dry run on meta tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch

from qerl_sync.errors import CoverageError, LayerMapError
from qerl_sync.meta import CASTABLE_FLOATS, ParamMeta
from qerl_sync.options import Load
from qerl_sync.plan.layer_map import LayerMap, Loading, ParentLayer
from qerl_sync.worker.compat import direct
from qerl_sync.worker.compat import engine as compat
from qerl_sync.worker.load import refresh
from qerl_sync.worker.load.dry_run import Bypasses, DryRun, Stream, load_weights, watch_bypasses

# Names that checkpoints carry and vLLM computes by itself.
DERIVED_NAMES = ("*rotary_emb.inv_freq",)


def observe_layer_map(
    model: torch.nn.Module,
    vllm_config: Any,
    metas: Sequence[ParamMeta],
    *,
    allow_incomplete: Sequence[str] = (),
    load: Load = "auto",
    renewed: Collection[str] = (),
) -> LayerMap:
    """Feed `model` a stream of meta tensors and record what its own loaders do with them.

    Weights, data pointers and generations are the same afterwards. Runs on every worker rank (the
    element counts are those of its own shard), between requests.

    Args:
        model: the worker's live vLLM model, or one built on the meta device.
        metas: the stream, in source order.
        allow_incomplete: fnmatch patterns of parent layers that may miss elements.
        load: see `SyncConfig`.
        renewed: layers whose tensors are needed when they are processed, for lost views.

    Raises:
        LayerMapError: vLLM refuses, ignores or loses a tensor, or would cast it by value.
        CoverageError: the stream leaves parameters of the model without their weights.
    """
    tied = set(refresh.tied_parameters(model))
    stream = Stream(model, metas)
    run = DryRun(model, stream)
    with compat.loading_context(vllm_config), compat.dry_reload(model) as written_live:
        with compat.observe_loads(run.held):
            stream.load()
        one_tensor_calls = run.num_late > 0 and _loads_alike_singly(run, metas)
        unseen = [meta for meta in metas if not run.contributions[meta.name]]
        puzzling = [
            meta
            for meta in unseen
            if not any(fnmatchcase(meta.name, pattern) for pattern in DERIVED_NAMES)
            and meta.name.rpartition(".")[0] not in tied
        ]
        bypasses = Bypasses()
        if puzzling:
            bypasses = watch_bypasses(model, metas, written_live, run.received.keys())
        for meta in puzzling:
            run.written_past(meta, bypasses.written.get(meta.name, ()))
        layers = run.parent_layers()
        if load == "auto":
            layers = _with_loadings(run, layers, renewed)
        known = bypasses.live | bypasses.lost | bypasses.written.keys()
        dropped = {m.name for m in puzzling if m.name not in known}
        missing = _missing(run, layers, tied, allow_incomplete)
        _check_shapes(run)
        _check_casts(run, metas)
        _check_fates(run, puzzling, bypasses, layers, load)
        # What one pipeline stage drops, another may take. The trainer holds all stages together.
        is_stage = vllm_config.parallel_config.pipeline_parallel_size > 1
        dropped -= _ignored(run, dropped)  # every stage lists the same
        if not is_stage:
            dropped -= left_out(run, dropped, vllm_config.model_config.hf_config)
        if dropped and not is_stage:
            _refuse_dropped(run, next(m.name for m in metas if m.name in dropped), missing)
        if missing:
            shown = "".join(f"\n  {line}" for line in missing[:12])
            more = f"\n  and {len(missing) - 12} more" if len(missing) > 12 else ""
            raise CoverageError(
                "the source does not bring these parameters of vLLM's "
                f"{type(model).__name__} exactly once; they would keep old or half weights:"
                f"{shown}{more}\nLet the source yield them, or, if that is right, name the layer "
                "in sync.allow_incomplete"
            )
    return LayerMap(
        layers=layers,
        contributions={meta.name: tuple(run.contributions[meta.name]) for meta in metas},
        elsewhere=frozenset(dropped),
        one_tensor_calls=one_tensor_calls,
    )


def _loads_alike_singly(run: DryRun, metas: Sequence[ParamMeta]) -> bool:
    """Return whether calls with one tensor each come to what `run`, one call, has come to.

    Some loaders take the whole stream before they load its first tensor (vLLM 0.28's GraniteMoe
    collects it in a dictionary). Others hold a tensor back for one that belongs to it: those must
    get both in one call.
    """
    singly = DryRun(run.model, Stream(run.model, metas))
    try:
        with compat.observe_loads(singly.held):
            singly.stream.load(one_tensor_calls=True)
    except LayerMapError:
        return False
    return singly.contributions == run.contributions and not singly.num_late


def left_out(run: DryRun, dropped: Collection[str], config: Any) -> set[str]:
    """Return the names of modules that vLLM builds its model without on purpose.

    LLaVA's language model reads the last but one layer of its vision tower: vLLM builds neither the
    last layer nor the norm after it, and skips their weights. The trainer's model does not use them
    either. The engine's model shows it: its list of layers is shorter than in its own
    configuration, or has None or a module without weights where the checkpoint has a module.
    """
    if not dropped:
        return set()
    parts = [config, *vars(config).values()]
    num_layers = {getattr(part, "num_hidden_layers", None) for part in parts}
    containers: dict[str, torch.nn.Module] = {}  # by their names in the checkpoint
    for name, found in run.contributions.items():
        for one in found[:1]:  # where the names inside a container are the checkpoint's
            own = f"{one.parent_layer}.{one.parameter}".split(".")
            theirs = name.split(".")
            while own and theirs and own.pop() == theirs.pop():
                containers.setdefault(".".join(theirs), run.model.get_submodule(".".join(own)))
    gone = set()
    for name in dropped:
        path, _, child = name.rpartition(".")[0].rpartition(".")
        while path and path not in containers:
            path, _, child = path.rpartition(".")
        container = containers.get(path)
        if isinstance(container, torch.nn.ModuleList):
            others = (other[len(path) + 1 :] for other in dropped if other.startswith(f"{path}."))
            indices = {int(i) for other in others if (i := other.partition(".")[0]).isdecimal()}
            beyond = child.isdecimal() and len(container) <= int(child)
            if beyond and max(indices) + 1 in num_layers:
                gone.add(name)
        elif hasattr(container, child):
            there = getattr(container, child)
            if there is None or (isinstance(there, torch.nn.Module) and not there.state_dict()):
                gone.add(name)
    return gone


def _ignored(run: DryRun, dropped: Collection[str]) -> set[str]:
    """Return the names that the model's class lists as those of parts that vLLM has not: the video
    model of LLaVA-NeXT has no use for what marks a picture's lines, Qwen2.5-Omni does not speak."""
    found = {name for name in dropped if compat.is_unmapped(run.model, name)}
    for name in set(dropped) - found:
        # By itself, as loaders read ahead: in the stream it would not be known which one it is.
        alone = [(name, run.stream.tensor(name))]
        with compat.watch_ignored(partial(found.add, name)), suppress(Exception):
            load_weights(run.model, alone, one_tensor_calls=False)
    return found


def _check_shapes(run: DryRun) -> None:
    """Check that layers that are not processed have the shapes with which they are loaded."""
    for name, (live, loaded) in compat.unfit_parameters(run.model).items():
        raise LayerMapError(
            f"{name} of vLLM's {type(run.model).__name__} has shape {list(live)} in the engine, "
            f"and {list(loaded)} when it is loaded: something has changed it since the engine was "
            "started, and new weights would not fit. Restart the engine, without what changes it"
        )


def _check_casts(run: DryRun, metas: Sequence[ParamMeta]) -> None:
    """Refuse casts that change what a tensor's numbers mean."""
    for meta in metas:
        wanted = run.miscast.get(meta.name)
        if wanted is None:
            continue
        cure = wanted if wanted in CASTABLE_FLOATS else "the dtype that vLLM was started with"
        raise LayerMapError(
            f"{meta.name!r} is {meta.dtype}, its parameter in vLLM's {type(run.model).__name__} is "
            f"{wanted}: vLLM would cast it by value and the weights would be silently wrong. Send "
            f"it as {cure}"
        )


def _with_loadings(
    run: DryRun, layers: Mapping[str, ParentLayer], renewed: Collection[str]
) -> dict[str, ParentLayer]:
    """Return the layers, each with how it is loaded."""
    written_past = {
        c.parent_layer for found in run.contributions.values() for c in found if not c.held_bytes
    }
    found = {}
    for path, layer in layers.items():
        loading: Loading = "layerwise"
        if layer.expected_numel and not layer.deferred and path not in renewed:
            loading = direct.rehearse(run.model.get_submodule(path))
        if loading == "in place" and path not in written_past:
            loading = "layerwise"
        found[path] = replace(layer, loading=loading)
    torch.cuda.empty_cache()  # what rehearsals have left; does nothing without a GPU
    return found


def _check_fates(
    run: DryRun,
    puzzling: Sequence[ParamMeta],
    bypasses: Bypasses,
    layers: Mapping[str, ParentLayer],
    load: Load,
) -> None:
    """Raise if a loader wrote what no wrapper held into memory that is given up."""
    family = type(run.model).__name__
    for name in (meta.name for meta in puzzling):
        into = [c.parent_layer for c in bypasses.written.get(name, ())]
        lost = [path for path in into if layers[path].loading == "layerwise"]
        if lost or name in bypasses.lost:
            cure = (
                "sync.load: auto may write it where it stays"
                if load == "layerwise"
                else "This architecture cannot be synced with this vLLM"
            )
            raise LayerMapError(
                f"vLLM's {family} writes {name!r} past the layerwise reload, on a tensor that is "
                f"not there then: it would be lost and the old weights would stay. {cure}"
            )


def _refuse_dropped(run: DryRun, name: str, missing: Sequence[str]) -> None:
    """Refuse a name that vLLM ignores. Where a parameter lacks elements, ignoring it is no cure."""
    said = f"vLLM's {type(run.model).__name__} accepts {name!r} and does nothing with it"
    if missing:
        raise LayerMapError(
            f"{said}, and a parameter gets less than it needs: {missing[0]}. Either vLLM knows "
            "that parameter by another name (compare the names in the checkpoint that the engine "
            "was started with), or this model's loader writes past the layerwise reload, where "
            "weights would be lost. Then this architecture cannot be synced with this vLLM"
        )
    raise LayerMapError(
        f"{said}; its weights would stay as they are. Do not send it, or, if that is right, name "
        "it in sync.ignore_names"
    )


def _missing(
    run: DryRun,
    layers: dict[str, ParentLayer],
    tied: set[str],
    allow_incomplete: Sequence[str],
) -> list[str]:
    """Describe each parameter that does not get all its elements and has no reason not to."""
    missing = []
    for path, layer in layers.items():
        module = run.model.get_submodule(path)
        excused = any(fnmatchcase(path, pattern) for pattern in allow_incomplete)
        if layer.deferred or path in tied or excused:
            continue
        for name, tensor in compat.loadable_tensors(module).items():
            wanted, got = compat.load_numel_of(tensor), run.received.get((path, name), 0)
            derived = name in module._buffers and name in module._non_persistent_buffers_set
            # Constants of the configuration, such as the mean and deviation of an image processor,
            # are modules of buffers alone: nothing that is trained, and vLLM's own check of a
            # checkpoint (`track_weights_loading`) asks for parameters only.
            constant = not got and not any(True for _ in module.parameters())
            padded = got < wanted and compat.lacks_padding_alone(module, got)
            if got != wanted and not derived and not constant and not padded:
                missing.append(f"{path}.{name} ({layer.kind}): {got:,} of {wanted:,} elements")
    return missing
