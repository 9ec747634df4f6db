"""Routes: what vLLM's loaders do with a tensor, recorded once and repeated without them.

A loader finds out by name, in Python, which part of which parameter a tensor is copied to. That
takes vLLM 40 to 180 microseconds a tensor, seconds for a mixture of experts that arrives expert by
expert, and the answer is the same in every sync. Where a dry run shows that loaders do nothing but
copy views of a tensor into views of parameters, these copies are the tensor's route.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qerl_sync.errors import LayerMapError
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.layer_map import Contribution, LayerMap
from qerl_sync.worker.compat import engine as compat
from qerl_sync.worker.load.base import modules_at
from qerl_sync.worker.load.dry_run import Stream
from qerl_sync.worker.load.monitor import SyncMonitor

logger = logging.getLogger(__name__)

# Size, strides and offset, in elements, from the first element of the tensor that is viewed. None:
# all of it, as it is.
View = tuple[tuple[int, ...], tuple[int, ...], int] | None


class LoaderCall(NamedTuple):
    """One call of one weight loader.

    Attributes:
        path, parameter: the parent layer and the parameter that it fills.
        loaded_numel: elements that vLLM counts for it.
        held: the view of the arriving tensor that the loader gets, and that vLLM's reload holds.
        copies: (view of the parameter, view of `held`), in the loader's order.
    """

    path: str
    parameter: str
    loaded_numel: int
    held: View
    copies: tuple[tuple[View, View], ...]


Routes = Mapping[str, tuple[LoaderCall, ...]]


def record_routes(
    model: torch.nn.Module, vllm_config: Any, metas: Sequence[ParamMeta], layer_map: LayerMap
) -> Routes:
    """Return the routes of those tensors that have one, by name.

    Weights and pointers of `model` stay as they are. Runs on every worker rank, between requests.

    Args:
        model: the worker's live vLLM model.
        metas, layer_map: the stream, and what `observe_layer_map` has returned for it.

    Raises:
        LayerMapError: the model computes with weights while it loads others.
    """
    family = type(model).__name__
    with compat.loading_context(vllm_config), compat.dry_reload(model):
        recorder, rest = _Recorder(model, Stream(model, metas)), list[ParamMeta]()
        try:
            recorder.run(one_tensor_calls=layer_map.one_tensor_calls)
            without = recorder.others | layer_map.past_reload
            routes = {
                name: tuple(calls)
                for name, calls in recorder.calls.items()
                if name not in without
                and _numel_by_place(calls) == _numel_by_place(layer_map.contributions[name])
            }
            # A tensor with a route never reaches the model's own loop over the stream, which may
            # count tensors or keep one for another. The rest must fare without them as with them.
            rest = [meta for meta in metas if meta.name not in routes]
            alone = _Recorder(model, Stream(model, rest))
            alone.run(one_tensor_calls=layer_map.one_tensor_calls)
        except Exception as exc:  # the layer map stands, and vLLM's loaders load all of it
            logger.info("%s has no routes: %r", family, exc)
            routes, rest = {}, []
    if recorder.computes:
        what, place = recorder.computes[0]
        raise LayerMapError(
            f"vLLM's {family} computes with {place} ({what}) while it loads weights: from weights "
            "that are half new, or not at all when they come again, and what depends on that would "
            "be wrong. This architecture cannot be synced with this vLLM"
        )
    for meta in rest:
        if alone.steps[meta.name] != recorder.steps[meta.name]:
            logger.info("%s has no routes: without others %s fares differently", family, meta.name)
            return {}
    return routes


def _numel_by_place(landed: Sequence[LoaderCall | Contribution]) -> Counter[tuple[str, str]]:
    """Sum up the elements for each parameter of a parent layer. Both types begin alike."""
    found: Counter[tuple[str, str]] = Counter()
    for path, parameter, loaded_numel, *_ in landed:
        found[path, parameter] += loaded_numel
    return found


class _Recorder(TorchDispatchMode):
    """Sees every operation of a dry run.

    Attributes:
        calls: of each tensor, its loader calls.
        others: names of tensors with which something else is done than copying views.
        steps: what is done from when the model takes a tensor until it takes the next.
        computes: what is computed with weights of the model outside of their layer's own loaders:
            the operation, and the weights.
    """

    def __init__(self, model: torch.nn.Module, stream: Stream) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stream = stream
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._copied: list[tuple[torch.Tensor, torch.Tensor]] = []  # since the last loader call
        self.calls: dict[str, list[LoaderCall]] = defaultdict(list)
        self.others: set[str] = set()
        self.steps: dict[str, list[object]] = defaultdict(list)
        self.computes: list[tuple[str, str]] = []
        self._weights = {
            tensor.untyped_storage()._cdata: (path, name)
            for path, module in model.named_modules()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        self._used: list[tuple[str, tuple[str, str]]] = []  # of them since the last loader call

    def run(self, *, one_tensor_calls: bool) -> None:
        with compat.observe_loads(self._held), self:
            self._stream.load(one_tensor_calls=one_tensor_calls)
        if self._copied:  # after the last loader call, and so outside of any
            self._spoil([of for _, of in self._copied])
        self._find_computed("")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].shape == args[1].shape:
            self._copied.append((args[0], args[1]))
            self._step(func)
            self._use(func, args[1:2])  # behind it may stand `non_blocking`
        elif not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            # Loaders of embeddings fill the rows behind the vocabulary, of which there may be none.
            if any(tensor.numel() for tensor in tensors):
                self._step(func)
                self._use(func, tensors)
                self._spoil(tensors)
        return func(*args, **(kwargs or {}))

    def _step(self, done: object) -> None:
        if self._stream.current is not None:
            self.steps[self._stream.current.name].append(done)

    def _use(self, func: Any, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            place = self._weights.get(tensor.untyped_storage()._cdata)
            if place is not None:
                self._used.append((str(func), place))

    def _find_computed(self, loader_of: str) -> None:
        used, self._used = self._used, []
        for what, (path, name) in used:
            if path != loader_of:
                self.computes.append((what, f"{path}.{name}"))

    def _held(
        self, layer: torch.nn.Module, parameter: str, arguments: dict[str, Any], loaded_numel: int
    ) -> None:
        meta, copied = self._stream.current, self._copied
        self._copied = []
        self._step((self._paths[id(layer)], parameter, loaded_numel))
        self._find_computed(self._paths[id(layer)])
        target = layer._parameters.get(parameter)
        given = [v for k, v in arguments.items() if k != "param" and isinstance(v, torch.Tensor)]
        if (
            meta is None
            or target is None
            or compat.is_deferred(layer)
            or parameter in compat.cast_dtypes(layer)
            or len(given) != 1
            or self._stream.source_of(given[0]) is not meta
            or any(not _is_part(to, target) or not _is_part(of, given[0]) for to, of in copied)
            or sum(to.numel() for to, _ in copied) != loaded_numel
        ):
            self._spoil([of for _, of in copied])
            return
        self.calls[meta.name].append(
            LoaderCall(
                path=self._paths[id(layer)],
                parameter=parameter,
                loaded_numel=loaded_numel,
                held=_view(given[0], self._stream.tensor(meta.name)),
                copies=tuple((_view(to, target), _view(of, given[0])) for to, of in copied),
            )
        )

    def _spoil(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give no route to the current tensor, nor to those that `tensors` are parts of."""
        metas = [self._stream.current, *map(self._stream.source_of, tensors)]
        self.others.update(meta.name for meta in metas if meta is not None)


def _is_part(view: torch.Tensor, whole: torch.Tensor) -> bool:
    return view.untyped_storage()._cdata == whole.untyped_storage()._cdata


def _view(view: torch.Tensor, whole: torch.Tensor) -> View:
    """Return how `view` lies in `whole`, which is of the same storage."""
    offset = view.storage_offset() - whole.storage_offset()
    if not offset and view.shape == whole.shape and view.stride() == whole.stride():
        return None
    return tuple(view.shape), view.stride(), int(offset)


def _viewed(whole: torch.Tensor, view: View) -> torch.Tensor:
    if view is None:
        return whole
    size, stride, offset = view
    return whole.as_strided(size, stride, whole.storage_offset() + offset)


class RoutedLoad:
    """Loads, in one sync, the tensors that have a route.

    Tensors of layers that are loaded where they stay are copied there at once. Those of the others
    are held as vLLM's reload holds them, counted as it counts them, and copied when their layer is
    whole, before vLLM processes it.

    Args:
        routes: what `record_routes` has found, for this layer map.
        monitor: told of what is held and loaded, as it is of vLLM's own loaders.
    """

    def __init__(
        self, model: torch.nn.Module, layer_map: LayerMap, routes: Routes, monitor: SyncMonitor
    ) -> None:
        self._routes = routes
        self._monitor = monitor
        paths = {call.path for calls in routes.values() for call in calls}
        self._layers = modules_at(model, paths)
        self._paths = {id(layer): path for path, layer in self._layers.items()}
        self._live = {p for p in paths if layer_map.layers[p].loading != "layerwise"}
        self._reloads = {
            path: compat.LayerReload(layer)
            for path, layer in self._layers.items()
            if path not in self._live
        }
        self._plain: dict[tuple[str, str], torch.Tensor] = {}
        self._held: dict[str, list[tuple[LoaderCall, torch.Tensor]]] = defaultdict(list)

    def load(self, name: str, tensor: torch.Tensor) -> bool:
        """Load the tensor by its route. Return False if vLLM's loaders must: it has none, or is
        laid out otherwise than the tensors of the dry run."""
        calls = self._routes.get(name)
        if calls is None or not tensor.is_contiguous():
            return False
        for call in calls:
            given = _viewed(tensor, call.held)
            if call.path in self._live:
                for target, source in call.copies:
                    _viewed(self._parameter(call), target).copy_(_viewed(given, source))
                self._monitor.loaded(call.path)
                continue
            reload = self._reloads[call.path]
            if not reload.awaits_more:
                continue  # vLLM drops what arrives for a layer that is whole
            self._held[call.path].append((call, given))
            reload.count(call.loaded_numel)
            self._monitor.held(
                self._layers[call.path],
                call.parameter,
                {"loaded_weight": given},
                call.loaded_numel,
            )
            reload.process_if_whole()
        return True

    def forget(self) -> None:
        """Drop what is held."""
        self._held.clear()

    def fill(self, layer: torch.nn.Module) -> None:
        """Materialise a layer that is about to be processed, and copy what is held for it."""
        path = self._paths.get(id(layer), "")
        held = self._held.pop(path, None)
        if held is None:
            return
        self._reloads[path].materialise()
        targets, sources = [], []
        for call, given in held:
            parameter = _plain(layer._parameters[call.parameter])
            for target, source in call.copies:
                if given.device != parameter.device:  # from the host, one copy after the other
                    _viewed(parameter, target).copy_(_viewed(given, source))
                    continue
                targets.append(_viewed(parameter, target))
                sources.append(_viewed(given, source))
        if targets:  # on a GPU one launch for many
            torch._foreach_copy_(targets, sources)

    def _parameter(self, call: LoaderCall) -> torch.Tensor:
        place = call.path, call.parameter
        if place not in self._plain:
            self._plain[place] = _plain(self._layers[call.path]._parameters[call.parameter])
        return self._plain[place]


def _plain(parameter: torch.Tensor | None) -> torch.Tensor:
    """Return the same memory without vLLM's subclass, whose every call goes through Python."""
    assert parameter is not None
    return parameter.detach().as_subclass(torch.Tensor)
