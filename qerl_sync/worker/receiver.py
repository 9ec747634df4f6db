"""The worker's side of a sync: loads what arrives, accounts for it, refuses what is not right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from qerl_sync.buffers.detect import dtype_name, require_finite
from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import CoverageError, LoadError, PoisonedError, SyncError
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.sync_plan import Chunk, SyncPlan
from qerl_sync.worker import compat, memory, refresh
from qerl_sync.worker.monitor import SyncMonitor
from qerl_sync.worker.probe import observe_layer_map


@dataclass
class _ModelState:
    """What must outlive a receiver: several may be made for the same model, one after the other."""

    syncing: bool = False
    poison: torch.utils.hooks.RemovableHandle | None = None


_STATES: WeakKeyDictionary[torch.nn.Module, _ModelState] = WeakKeyDictionary()


class Receiver:
    """Loads planned streams into one live vLLM model. One per worker rank, not thread-safe.

        ready ----start----> syncing ----finish----> ready
                             syncing --error, abort--> poisoned ----start, ..., finish----> ready

    A poisoned worker holds a mix of old and new weights: its modules are whole (no meta tensors, no
    half-open layers), but its model refuses to run until a full sync has finished.

    Raises:
        CompatError: the installed vLLM has no layerwise reload, or another one.
    """

    def __init__(self, parts: compat.EngineParts) -> None:
        compat.require_layerwise_reload()
        self.model = parts.model
        self._config = parts.vllm_config
        self._device = parts.device
        self._state = _STATES.setdefault(parts.model, _ModelState())
        self._open = False
        self._awaited: Iterator[ParamMeta] = iter(())
        self._check_finite = True
        self._observing = contextlib.ExitStack()

    def layer_map(
        self,
        metas: Sequence[ParamMeta],
        *,
        allow_incomplete: Sequence[str] = (),
    ) -> LayerMap:
        """See `probe.observe_layer_map`, whose errors it raises."""
        return observe_layer_map(self.model, self._config, metas, allow_incomplete=allow_incomplete)

    def free_bytes(self) -> int:
        """Memory that is free now where the weights live."""
        return memory.free_bytes(self._device)

    def start(self, plan: SyncPlan, layer_map: LayerMap, *, check_finite: bool = True) -> None:
        """Open a sync. From here to the end of `finish` the model must not run.

        Raises:
            SyncError: a sync is already open.
        """
        if self._state.syncing:
            raise SyncError("a sync is already open on this worker; finish or abort it first")
        self._open = self._state.syncing = True
        self.poison("a sync is in progress")
        self._awaited = iter(plan.metas)
        self._check_finite = check_finite
        self._monitor = SyncMonitor(self.model, layer_map, self._device)
        with self._aborting():
            self._observing.enter_context(compat.observe_loads(self._monitor))
            with compat.loading_context(self._config):
                compat.begin_reload(self.model)

    def receive(self, chunk: Chunk, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the next chunk of the plan: one `load_weights` call.

        The tensors are kept by reference until their layer is whole, at the latest until the end
        of this call (deferred layers: until `finish`).

        Raises:
            CoverageError: a tensor is not the one that the plan has next, or cannot be right.
            LoadError: vLLM's loader failed. In both cases the worker is poisoned.
        """
        with self._aborting(), compat.loading_context(self._config):
            self.model.load_weights(self._checked(chunk, tensors))  # type: ignore[operator]

    def finish(self) -> Trace:
        """Close the sync and return its measured trace. The model may run again.

        Raises:
            CoverageError: the plan's stream did not arrive completely; the worker is poisoned.
        """
        with self._aborting():
            missing = list(self._awaited)
            if missing:
                raise CoverageError(
                    f"the sync ended with {len(missing)} tensors outstanding, the first is "
                    f"{missing[0].name!r}; send every chunk of the plan"
                )
            with compat.loading_context(self._config):
                compat.finish_reload(self.model, self._config)
                refresh.after_reload(self.model)
        self._close()
        self._heal()
        return self._monitor.trace()

    def abort(self, reason: str) -> None:
        """Give up an open sync: whole modules, a mix of weights, poisoned. Idempotent."""
        if not self._open:
            return
        self._close()
        compat.restore(self.model)
        self.poison(reason)

    def poison(self, reason: str) -> None:
        """Make the model refuse to run, with `reason`, until a sync has finished."""
        self._heal()

        def refuse(module: torch.nn.Module, args: object) -> None:
            raise PoisonedError(
                f"this worker does not generate: {reason}. Its weights may be a mix of two "
                "versions; run a full sync (`session.push()`) to make them right"
            )

        self._state.poison = self.model.register_forward_pre_hook(refuse)

    def _heal(self) -> None:
        if self._state.poison is not None:
            self._state.poison.remove()
            self._state.poison = None

    def _close(self) -> None:
        self._open = self._state.syncing = False
        self._observing.close()

    @contextlib.contextmanager
    def _aborting(self) -> Iterator[None]:
        """Whatever fails in here ends the sync, poisoned, with an error of ours."""
        try:
            yield
        except SyncError as exc:
            self.abort(f"a sync failed: {exc}")
            raise
        except BaseException as exc:
            self.abort(f"a sync failed: {type(exc).__name__}: {exc}")
            if not isinstance(exc, Exception):
                raise
            raise LoadError(
                f"vLLM failed in the middle of a sync: {type(exc).__name__}: {exc}. The worker is "
                "poisoned until a full sync succeeds"
            ) from exc

    def _checked(
        self, chunk: Chunk, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The stream, each tensor held against the plan before vLLM sees it."""
        arriving = iter(tensors)
        for _ in chunk.names:
            awaited = next(self._awaited)
            name, tensor = next(arriving, (None, None))
            if name is None or tensor is None:
                raise CoverageError(f"the source ended where {awaited.name!r} was next")
            _check(awaited, name, tensor, finite=self._check_finite)
            self._monitor.begin(name)
            yield name, tensor
        surplus = next(arriving, None)
        if surplus is not None:
            raise CoverageError(
                f"{surplus[0]!r} arrived after the last tensor of its chunk; the plan has no such "
                "tensor there. Yield each planned name once"
            )


def _check(awaited: ParamMeta, name: str, tensor: torch.Tensor, *, finite: bool) -> None:
    if name != awaited.name:
        raise CoverageError(
            f"{name!r} arrived where the plan has {awaited.name!r}; the source must yield exactly "
            "the names that it is asked for, in that order"
        )
    shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
    if (shape, dtype) != (awaited.shape, awaited.dtype):
        raise CoverageError(
            f"{name!r} arrived as {dtype} {list(shape)}, the plan says {awaited.dtype} "
            f"{list(awaited.shape)}; the source's metadata and its tensors differ"
        )
    if finite:
        require_finite(name, tensor)
