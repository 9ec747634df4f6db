"""One dry run of vLLM's own loaders: meta tensors in, what became of them out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qerl_sync.buffers.detect import dtype_name
from qerl_sync.errors import LayerMapError
from qerl_sync.meta import CASTABLE_FLOATS, ParamMeta
from qerl_sync.plan.layer_map import Contribution, ParentLayer
from qerl_sync.worker.compat import engine as compat


class Stream:
    """Meta tensors to feed a model with, each to be known again by its storage."""

    def __init__(self, model: torch.nn.Module, metas: Sequence[ParamMeta]) -> None:
        self._model = model
        # All are made before and kept to the end: addresses identify storages.
        self._tensors = [
            torch.empty(meta.shape, dtype=getattr(torch, meta.dtype), device="meta")
            for meta in metas
        ]
        self._metas = metas
        self._by_name = {m.name: t for m, t in zip(metas, self._tensors, strict=True)}
        self._sources = {
            tensor.untyped_storage()._cdata: meta
            for tensor, meta in zip(self._tensors, metas, strict=True)
        }
        self.current: ParamMeta | None = None

    def tensor(self, name: str) -> torch.Tensor:
        return self._by_name[name]

    def source_of(self, tensor: torch.Tensor) -> ParamMeta | None:
        """Return the checkpoint tensor that `tensor` is a view of."""
        return self._sources.get(tensor.untyped_storage()._cdata)

    def load(self, *, one_tensor_calls: bool = False) -> None:
        """Feed the model, in one call or in one for each tensor.

        Raises:
            LayerMapError: vLLM refuses a tensor.
        """
        try:
            load_weights(self._model, self._named(), one_tensor_calls)
        except Exception as exc:
            at, family = self.current, type(self._model).__name__
            if at is None:
                raise LayerMapError(f"vLLM's {family} loads nothing: {_in_words(exc)}") from exc
            layer, expected = self._refusing(at)
            if expected is None or expected == at.shape:
                cause, expected = _in_words(exc), None
            else:  # vLLM asserts it without a word
                cause = f"{layer} awaits shape {list(expected)}"
            raise LayerMapError(
                f"vLLM's {family} refuses {at.name!r} ({at.dtype}, shape {list(at.shape)}): "
                f"{cause}. Check that the trainer's model is the one that vLLM was started with, "
                "that its embeddings were not resized since, and that the source yields checkpoint "
                "names and shapes",
                tensor=at.name,
                expected=expected,
                got=at.shape,
            ) from exc

    def _refusing(self, meta: ParamMeta) -> tuple[str, tuple[int, ...] | None]:
        """Return the layer whose weight loader was called with `meta` last, and the shape that it
        awaits, as far as it says so."""
        for path, layer in self._model.named_modules():
            load = compat.last_load(layer)
            if load is None:
                continue
            parameter, arguments = load
            tensors = [v for v in arguments.values() if isinstance(v, torch.Tensor)]
            if any(self.source_of(tensor) is meta for tensor in tensors):
                return path, compat.awaited_shape(layer, parameter, arguments)
        return "", None

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        for meta, tensor in zip(self._metas, self._tensors, strict=True):
            self.current = meta
            yield meta.name, tensor


def load_weights(
    model: torch.nn.Module,
    tensors: Iterable[tuple[str, torch.Tensor]],
    one_tensor_calls: bool,
) -> None:
    """Let vLLM's loaders have a stream. See `LayerMap.one_tensor_calls`."""
    calls = ([named] for named in tensors) if one_tensor_calls else [tensors]
    for call in calls:
        model.load_weights(call)  # type: ignore[operator]


def _in_words(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"


@dataclass
class DryRun:
    """Observes one dry run through vLLM's loading wrappers."""

    model: torch.nn.Module
    stream: Stream
    contributions: dict[str, list[Contribution]] = field(default_factory=lambda: defaultdict(list))
    received: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    num_loads: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    miscast: dict[str, str] = field(default_factory=dict)
    num_late: int = 0  # tensors that were loaded after the next one was taken

    def __post_init__(self) -> None:
        self._paths = {id(module): path for path, module in self.model.named_modules()}
        self._kept: list[torch.Tensor] = []  # addresses identify storages: none may be freed

    def held(
        self, layer: torch.nn.Module, parameter: str, arguments: dict[str, Any], loaded_numel: int
    ) -> None:
        """Record a tensor that vLLM keeps for `layer`. Its storage identifies its source, since a
        loader may hold a tensor back and load it later than it was yielded."""
        tensors = [
            value
            for key, value in arguments.items()
            if key != "param" and isinstance(value, torch.Tensor)
        ]
        self._kept += tensors
        sources = [self.stream.source_of(t) for t in tensors]
        meta = next((s for s in sources if s is not None), self.stream.current)
        assert meta is not None
        self.num_late += meta is not self.stream.current
        contribution = Contribution(
            parent_layer=self._paths[id(layer)],
            parameter=parameter,
            loaded_numel=loaded_numel,
            held_bytes=sum(t.nbytes for t in tensors),
            aliases_source=any(s is not None for s in sources),
        )
        self.num_loads[contribution.parent_layer] += 1
        self._add(meta, contribution, getattr(layer, parameter))

    def written_past(self, meta: ParamMeta, written: Sequence[Contribution]) -> None:
        """Record that a loader writes `meta` without vLLM's weight loaders."""
        for contribution in written:
            layer = self.model.get_submodule(contribution.parent_layer)
            self._add(meta, contribution, getattr(layer, contribution.parameter))

    def _add(self, meta: ParamMeta, contribution: Contribution, parameter: torch.Tensor) -> None:
        _merge(self.contributions[meta.name], contribution)
        place = (contribution.parent_layer, contribution.parameter)
        self.received[place] += contribution.loaded_numel
        wanted = dtype_name(parameter.dtype)
        if meta.dtype != wanted and not {meta.dtype, wanted} <= CASTABLE_FLOATS:
            self.miscast[meta.name] = wanted

    def parent_layers(self) -> dict[str, ParentLayer]:
        """Return every module that awaits elements, in module order."""
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
                    num_loads=self.num_loads[path],
                )
        return layers


@dataclass
class Bypasses:
    """Names of tensors that go past the reload: into a live tensor (`live`), into a parameter that
    is on meta meanwhile (`written`), or into nothing (`lost`)."""

    live: set[str] = field(default_factory=set)
    written: dict[str, list[Contribution]] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)


class _CopyWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every `copy_` of a stream's tensors, in Python and in C++, and every `copy_` into one of
    `unfilled`, parameters by their storage."""

    def __init__(
        self, stream: Stream, written_live: set[int], unfilled: Mapping[int, tuple[str, str]]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stream = stream
        self._written_live = written_live
        self._unfilled = unfilled
        self.found = Bypasses()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self._see(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _see(self, target: torch.Tensor, value: torch.Tensor) -> None:
        meta, storage = self._stream.source_of(value), target.untyped_storage()._cdata
        if storage in self._unfilled:
            # What a loader has rearranged is told by when it is written.
            meta = meta or self._stream.current
            assert meta is not None
            written = Contribution(
                *self._unfilled[storage], target.numel(), held_bytes=0, aliases_source=False
            )
            _merge(self.found.written.setdefault(meta.name, []), written)
        elif meta is not None:
            is_live = storage in self._written_live
            (self.found.live if is_live else self.found.lost).add(meta.name)


def watch_bypasses(
    model: torch.nn.Module,
    metas: Sequence[ParamMeta],
    written_live: set[int],
    received: Collection[tuple[str, str]],
) -> Bypasses:
    """Run the loaders a second time, for tensors that no wrapper held in the first run. The answer
    means nothing for the others, whose copies it sees too.

    Most models need none, and seeing every operation makes a run three times as slow.

    Args:
        received: the parameters that wrappers held something for in the first, with their layers.
    """
    stream = Stream(model, metas)
    unfilled = {
        tensor.untyped_storage()._cdata: (path, name)
        for path, module in model.named_modules()
        for name, tensor in compat.loadable_tensors(module).items()
        if (path, name) not in received
    }
    watch = _CopyWatch(stream, written_live, unfilled)
    with compat.observe_loads(lambda *held: None), watch:
        stream.load()
    return watch.found


def _merge(contributions: list[Contribution], new: Contribution) -> None:
    """Sum up the calls for the same parameter: a fused tensor is loaded slice by slice."""
    if contributions and contributions[-1][:2] == new[:2]:
        old = contributions[-1]
        contributions[-1] = old._replace(
            loaded_numel=old.loaded_numel + new.loaded_numel,
            held_bytes=old.held_bytes + new.held_bytes,
            aliases_source=old.aliases_source and new.aliases_source,
        )
    else:
        contributions.append(new)
