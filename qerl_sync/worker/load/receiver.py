"""The worker's side of a sync: loads what arrives, accounts for it, refuses what is not right."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch

from qerl_sync.buffers.detect import dtype_name, require_finite, require_in_range
from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import (
    ConfigError,
    CoverageError,
    LayerMapError,
    LoadError,
    PoisonedError,
    StaleBaseError,
    SyncError,
)
from qerl_sync.meta import ParamMeta
from qerl_sync.options import MapOptions, SyncOptions
from qerl_sync.plan.adapter import Adapter
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.part import filled_layers
from qerl_sync.plan.sync_plan import Chunk, SyncPlan
from qerl_sync.stopwatch import Stopwatch
from qerl_sync.verify.stream import as_planned
from qerl_sync.wire import cuda_memory
from qerl_sync.worker.compat import engine as compat
from qerl_sync.worker.compat import lora as vllm_lora
from qerl_sync.worker.compat import quantisation
from qerl_sync.worker.compat.coupling import require
from qerl_sync.worker.load import memory, refresh
from qerl_sync.worker.load.aliases import LostView, Views, lost_views
from qerl_sync.worker.load.base import emptied_layers, sample_kernels
from qerl_sync.worker.load.direct import DirectLoad
from qerl_sync.worker.load.dry_run import load_weights
from qerl_sync.worker.load.footprint import LoadCosts
from qerl_sync.worker.load.kernel_check import Held, KernelCheck
from qerl_sync.worker.load.lora import AdapterLoad
from qerl_sync.worker.load.monitor import SyncMonitor
from qerl_sync.worker.load.observe import observe_layer_map
from qerl_sync.worker.load.rollback import Rollback
from qerl_sync.worker.load.routes import RoutedLoad, Routes, record_routes
from qerl_sync.worker.load.spill import SpillBuffer
from qerl_sync.worker.load.tied import TiedCheck

logger = logging.getLogger(__name__)

# Layer maps whose routes a model keeps.
MAX_ROUTES = 4


@dataclass
class _ModelState:
    """Hold what outlives a receiver: several may be made for one model, one after the other."""

    syncing: bool = False
    poison: contextlib.ExitStack | None = None
    reason: str | None = None
    version: int = 0
    caches_suspect: bool = False
    # Layers that a sync has begun to fill and not committed: the model is poisoned while there are.
    mixed: frozenset[str] = frozenset()
    held: Held | None = None
    # Versions only move forwards, so that this and the version name one state of the weights.
    instance: str = field(default_factory=lambda: secrets.token_hex(8))
    # Of the sync that was committed last, where a sync of a part may build on it.
    kernels: dict[str, int] | None = None
    tied: dict[str, int] = field(default_factory=dict)
    # The layers that the engine had quantised when it was started.
    quantised: frozenset[str] | None = None
    # Found in whole weights: after a sync that failed, values no longer tell what was a view.
    lost_views: list[LostView] | None = None
    # By the digest of the layer map; several sessions may take turns.
    routes: dict[str, Routes] = field(default_factory=dict)


# By model: the poison of a failed sync must outlast the session, and a new session must find it.
_STATES: WeakKeyDictionary[torch.nn.Module, _ModelState] = WeakKeyDictionary()


class Receiver:
    """Loads planned streams into one live vLLM model. One per worker rank, not thread-safe.

        ready --start--> syncing --finish--> whole --commit--> ready
                         syncing --error, abort--> poisoned --start, finish, commit--> ready

    A sync that fails before its first tensor has touched nothing: the worker is as it was before.
    A LoRA adapter is built aside and swapped in by `commit`: a sync of an adapter alone touches
    nothing until then, whatever fails.
    With `on_failure: rollback` a sync that fails puts the old weights back instead:

        syncing, whole --error, abort--> ready, on the version of before

    With `verify: full` the engine is asked when it is ready, and the answer may invalidate it:

        ready --probe parts from the trainer, poison--> poisoned

    A poisoned worker holds a mix of old and new weights: its modules are whole (no meta tensors, no
    half-open layers), but its model refuses to run until a full sync has been committed. What was
    computed meanwhile, or with weights not known to be finite, may lie in the KV cache as NaN,
    which later requests would meet: the next commit overwrites it.

    Attributes:
        costs: of the last sync.

    Raises:
        CompatError: the installed vLLM has no layerwise reload, or another one.
    """

    def __init__(self, parts: compat.EngineParts) -> None:
        require("layerwise reload")
        self._parts = parts
        self.model = parts.model
        self._config = parts.vllm_config
        self.device = parts.device
        self._dtype: torch.dtype = parts.vllm_config.model_config.dtype
        self._state = _STATES.setdefault(parts.model, _ModelState())
        self._open = False
        self._finished = False  # and neither committed nor aborted since
        self._untouched = False
        self._awaited: Iterator[ParamMeta] = iter(())
        self._options = SyncOptions()
        self._spill: SpillBuffer | None = None
        self.costs = LoadCosts()
        self._clock = Stopwatch(["verify"])
        self._rollback: Rollback | None = None
        self._poisoned_before: str | None = None
        self._check: KernelCheck | None = None
        self._held: Held | None = None
        self._kernels: dict[str, int] | None = None
        self._adapter: AdapterLoad | None = None
        self._able: Adapter | None = None
        self._loads_base = True
        self._quantisation: dict[str, Any] | None = None
        self._observing = contextlib.ExitStack()

    def require_adapter(self, adapter: Adapter) -> None:
        """Check that this engine can serve the adapter. See `compat.lora.require_servable`."""
        if adapter != self._able:
            with compat.loading_context(self._config):
                vllm_lora.require_servable(self._parts, adapter)
            self._able = adapter

    def layer_map(self, metas: Sequence[ParamMeta], options: MapOptions = MapOptions()) -> LayerMap:
        """See `observe_layer_map`, whose errors it raises; SyncError while a sync is open.

        Raises:
            ConfigError: the engine was to quantise, and has no quantised layer; `scheme`. Or it
                moves weights while it runs.
        """
        self._require_closed()
        compat.require_weights_in_place(self._config)
        self._require_quantised()
        try:
            layer_map = observe_layer_map(
                self.model,
                self._config,
                metas,
                allow_incomplete=options.allow_incomplete,
                load=options.load,
                renewed={view.source_path for view in self._find_lost_views()},
            )
        except (LayerMapError, CoverageError) as exc:
            scheme = self._config.model_config.quantization
            if scheme is not None and quantisation.is_from_checkpoint(self._config):
                exc.args = (
                    f"this engine's checkpoint is quantised ({scheme}), and vLLM does not quantise "
                    "what arrives for it. Start the engine from the checkpoint that it was made "
                    "of, with a quantisation that vLLM does when it loads "
                    '(quantization="fp8_per_channel"), or train an adapter and set '
                    f"sync.lora_base: engine. What vLLM says: {exc}",
                )
            raise
        known = self._state.routes
        known.pop(layer_map.digest, None)
        if len(known) == MAX_ROUTES:
            del known[next(iter(known))]
        routes = record_routes(self.model, self._config, metas, layer_map)
        if options.load == "auto":
            known[layer_map.digest] = routes
        return layer_map

    def _require_quantised(self) -> None:
        scheme = self._config.model_config.quantization
        if self._state.quantised is None:
            self._state.quantised = quantisation.quantised_layers(self.model)
            on_cpu = self.device.type == "cpu"
            if on_cpu and (slow := quantisation.slow_layer(self.model)):
                logger.warning(
                    "this engine will generate several hundred times slower than it could: for the "
                    "fp8 products of %s and others, torch takes a reference loop of oneDNN on a "
                    'CPU with AMX but without AMX-FP16. Choose quantization="fp8_per_block", which '
                    "has a kernel of its own there",
                    slow,
                )
        if scheme is not None and not self._state.quantised:
            reasons = self.quantisation["high_precision"]
            layer, why = next(iter(reasons.items()), ("none", "it has no such layer"))
            raise ConfigError(
                f"the engine was started with quantization={scheme!r}, and none of its layers is "
                f"quantised ({layer}: {why}). Choose a scheme that has something for this model, "
                "or leave it out",
                scheme=scheme,
            )

    @property
    def quantisation(self) -> dict[str, Any]:
        """Return how the engine's layers hold their weights now. See `compat.quantisation`."""
        if self._quantisation is None:
            self._quantisation = quantisation.quantisation_of(self.model, self._config)
        return self._quantisation

    def free_bytes(self) -> int:
        """Return the bytes that are free now where the weights live."""
        return memory.free_bytes(self.device)

    @property
    def context_tokens(self) -> int:
        """Return the most tokens that a request may have, prompt and completion together."""
        return int(self._config.model_config.max_model_len)

    @property
    def precision(self) -> tuple[str, str | None]:
        """Return the dtype that the model computes in, and its quantisation."""
        return dtype_name(self._dtype), self._config.model_config.quantization

    @property
    def version(self) -> int:
        """Return the weight version last committed; 0 if none."""
        return self._state.version

    @property
    def instance(self) -> str:
        """Return a name that no other model ever has: with `version`, one state of the weights."""
        return self._state.instance

    @property
    def poisoned(self) -> str | None:
        """Return why the model refuses to run; None if it runs."""
        return self._state.reason

    def start(
        self,
        plan: SyncPlan,
        layer_map: LayerMap,
        options: SyncOptions,
        *,
        borrowed: bool = False,
    ) -> None:
        """Open a sync. From here to `commit` the model must not run.

        Args:
            borrowed: the memory of received tensors will be used again after each chunk, so what
                vLLM keeps longer (deferred layers) is copied out.

        Raises:
            SyncError: a sync is already open.
            PlanError, ConfigError: what the plan stages cannot be staged here.
            CoverageError: the plan has a part of a parent layer, or leaves out one of which a sync
                that failed has left a mix of two versions.
            StaleBaseError: the plan is a part of the model, and the rest of it is not that of
                `options.base` here.
            CompatError: this engine cannot serve adapters. In each case nothing was touched.
        """
        self._require_closed()
        self._adapter, self._loads_base = None, bool(plan.base_metas)
        if plan.adapter is not None:
            self.require_adapter(plan.adapter)
            self._adapter = AdapterLoad(self._parts, plan.adapter)
        self._filled = filled = frozenset(self._layers_to_fill(plan, layer_map, options.base))
        if left := self._state.mixed - filled:
            raise CoverageError(
                f"a sync that failed has left a mix of two versions in {len(left)} layers that "
                f"this one does not bring, the first is {min(left)}; sync all weights of the model "
                "(with sync.lora_base: trainer, and without sync.allow_incomplete), or start the "
                "engine anew",
                layer=min(left),
            )
        self._mixed_before = self._state.mixed
        spill = plan.spill
        self._spill = None if spill is None else SpillBuffer(plan, spill, self.device)
        self._open = self._state.syncing = self._untouched = True
        self._rollback, self._poisoned_before = None, self.poisoned
        self._state.caches_suspect |= self.poisoned is not None
        self.poison("a sync is in progress")
        self._awaited, self._parents = iter(plan.metas), layer_map.parents_text
        self._one_tensor_calls = layer_map.one_tensor_calls
        self._options = options
        self._held = self._kernels = None
        self._clock = Stopwatch(["verify"])
        self._monitor = SyncMonitor(
            self.model,
            layer_map,
            filled,
            before=self._before_processing,
            after=self._renew_tied,
            # Staged memory is given back with its chunk.
            borrowed=borrowed or spill is not None,
        )
        self.costs = LoadCosts(processed_layers=self._monitor.processed_layers)
        if not self._loads_base:
            return
        self._quantisation = None
        with self._aborting():
            if options.checksums:
                self._check = KernelCheck(
                    self.model,
                    layer_map,
                    self._dtype,
                    self._state.held,
                    {
                        (view.path, view.name): (view.source_path, view.parameter)
                        for view in self._find_lost_views()
                    },
                    is_part=options.base is not None,
                )
            # vLLM's reload goes on with layers that another one has left half open.
            compat.restore(self.model)
            # Ties and views show in shared memory, and a reload puts parameters on meta: before it.
            self._tied = refresh.tied_parameters(self.model)
            known = {} if options.base is None else self._state.tied
            self._tied_check = TiedCheck(layer_map, self._tied, known)
            self._direct = DirectLoad(self.model, layer_map, filled, self._keep)
            # A reload passes over what a sync of a part brings nothing for. Not over attention
            # layers, which derive what they hold from others.
            unsent = [
                layer
                for path, layer in self.model.named_modules()
                if options.base is not None and path not in filled and not compat.is_deferred(layer)
            ]
            self._views = Views(self.model, [*self._direct.unprocessed, *unsent])
            routes = self._state.routes.get(layer_map.digest, {})
            self._routed = RoutedLoad(self.model, layer_map, routes, self._monitor)
            # What was held for layers that a failed sync left open may be copies of weights: they
            # would stay in memory until the next sync.
            self._observing.callback(self._routed.forget)
            self._observing.callback(self._monitor.forget)
            self._observing.enter_context(compat.observe_loads(self._monitor.held, self._monitor))
            self._observing.enter_context(self._direct.watching(self._monitor.loaded))
            with compat.loading_context(self._config):
                compat.begin_reload(self.model, [*self._direct.modules, *unsent])
            if options.on_failure == "rollback":
                self._rollback = Rollback()
                self._rollback.begin(self.model, filled)
            working_bytes = compat.working_bytes(self.model)
            self.costs.working_bytes = working_bytes
            self.costs.finishing_bytes = max(
                refresh.packed_anew_bytes(self.model, self._tied, working_bytes),
                self._direct.working_bytes,
            )

    def receive(self, chunk: Chunk, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the next chunk of the plan: one `load_weights` call (see
        `LayerMap.one_tensor_calls`).

        The tensors are kept by reference until their layer is whole, at the latest until the end
        of this call (deferred layers: until `finish`). A plan that spills has what is whole by now
        loaded, and the rest of the chunk copied to host memory.

        Raises:
            CoverageError: a tensor is not the one that the plan has next, or cannot be right.
            LoadError: vLLM's loader failed. In both cases the worker is poisoned.
        """
        self._require_open()
        if self._adapter is not None and chunk.names[0] in self._adapter:
            with self._aborting():
                for name, tensor in self._checked(chunk, tensors):
                    self._adapter.take(name, tensor)
            return
        if self._untouched:
            self._untouched = False
            self._state.mixed |= self._filled
        with self._aborting(), compat.loading_context(self._config):
            stream = self._checked(chunk, tensors)
            if self._spill is None:
                self._load(stream)
            else:
                self._spill.load(stream, self._load)

    def finish(self) -> Trace:
        """Process what is left when all has arrived, and return the measured trace.

        The weights are whole and new; the model runs again after `commit`.

        Raises:
            CoverageError: the plan's stream did not arrive completely, a parent layer was not
                filled, or kernels do not hold what arrived (`sync.verify`); the worker is poisoned.
        """
        self._require_open()
        with self._aborting():
            missing = list(self._awaited)
            if missing:
                raise CoverageError(
                    f"the sync ended with {len(missing)} tensors outstanding, the first is "
                    f"{missing[0].name!r}; send every chunk of the plan"
                )
            if self._adapter is not None:
                with compat.loading_context(self._config):
                    self._adapter.build()
            if self._loads_base:
                self._finish_base()
        self._close()
        self._finished = True
        self.costs.kept_bytes = 0 if self._rollback is None else self._rollback.nbytes
        self.costs.verify_seconds = self._clock.seconds["verify"]
        return self._monitor.trace()

    def commit(self, version: int, *, keep_old: bool = True) -> bool:
        """Commit the new weights as `version`; the model may run again.

        Args:
            keep_old: if that fails, as in `abort`.

        Returns whether the KV caches were overwritten: what was computed before is gone then, and
        what refers to it (requests in flight, the prefix cache) must be emptied.

        Raises:
            SyncError: no sync has been finished, and nothing is changed. Or the version is not
                larger than the last.
            LoadError: vLLM cannot activate the adapter. In both cases the worker is poisoned, or
                with `keep_old` on the old version where `abort` goes back to it.
        """
        if not self._finished:
            raise SyncError("no finished sync is there to commit on this worker; finish one first")
        if version <= self._state.version:
            reason = f"version {version} was to follow {self._state.version}"
            self.abort(f"a sync failed: {reason}", keep_old=keep_old)
            raise SyncError(f"{reason}; versions only move forwards. Begin a new session")
        with self._aborting(keep_old=keep_old), compat.loading_context(self._config):
            if self._adapter is not None:
                self._adapter.swap(verify=self._options.checksums)
            elif self._parts.runner is not None and self._config.lora_config is not None:
                vllm_lora.serve(self._parts.runner, None)  # a sync without one has whole weights
        self._adapter, self._rollback = None, None
        self._finished = self._untouched = False
        self._state.version, self._state.mixed = version, frozenset()
        if self._loads_base:
            self._state.held, self._state.kernels = self._held, self._kernels
            self._state.tied = self._tied_check.checksums
        overwritten = self._state.caches_suspect
        if overwritten:
            compat.zero_kv_caches(self._config)
        self._state.caches_suspect = self._options.finite_check == "nobody"
        self._heal()
        return overwritten

    def abort(self, reason: str, *, keep_old: bool = True) -> None:
        """Give up a sync that is not committed: whole modules, poisoned, or on the old version if
        nothing was touched or `on_failure: rollback` was asked for. Idempotent.

        Args:
            keep_old: go back to the old version where that was asked for. False: other workers may
                have committed, and this one must not serve what they do not.
        """
        if self._open:
            self._close()
            compat.restore(self.model)
        self._finished = False
        rollback, self._rollback = self._rollback, None
        # Nothing but an adapter can be untouched when others may have committed theirs.
        old, self._untouched, self._adapter = self._untouched and keep_old, False, None
        if rollback is not None and keep_old:
            rollback.put_back()
            self._state.mixed = self._mixed_before
            old = True
        if old:
            if self._poisoned_before is None:
                self._heal()
            reason = self._poisoned_before or reason
        if self.poisoned is not None:
            self.poison(reason)

    def poison(self, reason: str) -> None:
        """Make the model refuse to run, with `reason`, until a sync has finished."""
        self._heal()

        def refuse(*args: object, **options: object) -> None:
            raise PoisonedError(
                f"this worker does not generate: {reason}. Its weights may be a mix of two "
                "versions; run a full sync (`session.push()`) to make them right"
            )

        self._state.poison = undo = contextlib.ExitStack()
        undo.callback(self.model.register_forward_pre_hook(refuse).remove)
        # A replayed CUDA graph does not come by the hook; what follows it does come by this.
        attributes = vars(self.model)
        if (own := attributes.get("compute_logits")) is not None:  # another tool's wrapper
            undo.callback(attributes.update, compute_logits=own)
        undo.callback(attributes.pop, "compute_logits", None)
        attributes["compute_logits"] = refuse
        self._state.reason = reason

    def _layers_to_fill(
        self, plan: SyncPlan, layer_map: LayerMap, base: int | None
    ) -> Collection[str]:
        """Return the parent layers that the plan brings; `start` has what is raised."""
        layers = layer_map.layers.values()
        self._loaded_layers = [
            one.name for one in layers if one.expected_numel and not one.deferred
        ]
        if base is None:
            if unsent := layer_map.contributions.keys() - set(plan.order):
                raise CoverageError(
                    f"the plan leaves out {len(unsent)} tensors, the first is {min(unsent)!r}, and "
                    "does not say which version this worker should have them from; send everything"
                )
            return {one.name for one in layers if one.expected_numel}
        filled = filled_layers(plan.base_metas, layer_map)
        if why := self._not_on(base, [p for p in self._loaded_layers if p not in filled]):
            raise StaleBaseError(
                f"a sync of a part of the model needs the rest of version {base} here, and {why}; "
                "send everything",
                base=base,
                version=self.version,
            )
        return filled

    def _not_on(self, base: int, kept: Sequence[str]) -> str:
        """Return why the layers `kept` may not have the weights of version `base`; empty if they
        have."""
        if self.poisoned is not None:
            return f"this worker is poisoned: {self.poisoned}"
        if self.version != base:
            return f"this worker has version {self.version}"
        if self._state.kernels is None:
            return "that sync was not to be built upon"
        if emptied := emptied_layers(self.model, kept):
            return f"{emptied[0]} has given its weights away to another layer"
        # Other code can write here, too: `sleep(level=2)` drops all weights.
        known = self._state.kernels
        for name, sample in sample_kernels(self.model, kept).items():
            if known.get(name) != sample:
                return f"something else has written to {name} since"
        return ""

    def _require_closed(self) -> None:
        if self._state.syncing:
            raise SyncError("a sync is already open on this worker; finish or abort it first")

    def _require_open(self) -> None:
        if not self._open:
            raise SyncError("no sync is open on this worker; start one first")

    def _heal(self) -> None:
        if self._state.poison is not None:
            self._state.poison.close()
        self._state.poison = self._state.reason = None

    def _close(self) -> None:
        self._open = self._state.syncing = False
        self._observing.close()
        self._check = None
        if self._spill is not None:
            self.costs.peak_staged_bytes = self._spill.peak_bytes
            self._spill.close()
        self._spill = None

    @contextlib.contextmanager
    def _aborting(self, *, keep_old: bool = True) -> Iterator[None]:
        """End the sync, poisoned, with an error of ours, if anything fails in here."""
        try:
            yield
        except SyncError as exc:
            self.abort(f"a sync failed: {exc}", keep_old=keep_old)
            raise
        except BaseException as exc:
            self.abort(f"a sync failed: {type(exc).__name__}: {exc}", keep_old=keep_old)
            if not isinstance(exc, Exception):
                raise
            poisoned = "poisoned until a full sync succeeds"
            outcome = poisoned if self.poisoned is not None else f"back on version {self.version}"
            raise LoadError(
                "vLLM, or the source of its tensors, failed in the middle of a sync: "
                f"{type(exc).__name__}: {exc}. The worker is {outcome}"
            ) from exc

    def _find_lost_views(self) -> list[LostView]:
        if self._state.lost_views is None:
            self._state.lost_views = lost_views(self.model)
        return self._state.lost_views

    def _before_processing(self, layer: torch.nn.Module) -> None:
        renewed = [view for view in self._find_lost_views() if view.source is layer]
        for module in (layer, *(view.owner for view in renewed)):
            self._keep(module)
        self._routed.fill(layer)
        for view in renewed:
            view.renew()

    def _renew_tied(self, layer: torch.nn.Module) -> None:
        """Replace the old packed copy in heads that share this layer's weight."""
        for head in refresh.heads_of(self.model, self._tied, layer):
            self._keep(head)
            compat.lend_packing(layer, head)

    def _finish_base(self) -> None:
        self._tied_check.conclude()
        if self._options.verify != "off":
            self._monitor.require_filled()
        self._untouched = False
        with compat.loading_context(self._config):
            self._direct.conclude()
            compat.finish_reload(self.model, self._config, self._monitor.parent_layers)
            # vLLM processes no tied head, so that nothing has been kept of it yet.
            for path in refresh.tied_parameters(self.model):
                self._keep(self.model.get_submodule(path))
            refresh.after_reload(self.model)
            self._views.restore()
        known = self._state.quantised
        if known and (lost := known - quantisation.quantised_layers(self.model)):
            raise CoverageError(
                f"{min(lost)} was quantised before the sync, and holds its weights in high "
                "precision now; report it, with the engine's quantisation",
                layer=min(lost),
            )
        # A kernel that has failed says so here, and not after the commit.
        cuda_memory.synchronize(self.device)
        if self._check is not None:
            with self._clock("verify"):
                self._held = self._check.conclude()
        if self._options.is_base:
            kept = self._state.kernels if self._options.base is not None else None
            # What did not travel was compared with what is known of it when the sync began.
            anew = self._loaded_layers if kept is None else self._monitor.parent_layers
            self._kernels = {**(kept or {}), **sample_kernels(self.model, anew)}

    def _keep(self, layer: torch.nn.Module) -> None:
        """Keep what the layer has, where a sync that fails must go back."""
        if self._rollback is not None:
            self._rollback.keep(layer)

    def _load(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        def watched() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in tensors:
                self._monitor.begin(name)
                given = self._direct.begin(name, tensor)
                if not self._routed.load(name, given):
                    yield name, given

        load_weights(self.model, watched(), self._one_tensor_calls)
        # Without `sync.verify` nothing else notices tensors that a loader has left in the stream.
        if (left := next(tensors, None)) is not None:
            raise LoadError(f"vLLM's loader ended before it had taken {left[0]!r}")

    def _checked(
        self, chunk: Chunk, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the stream, each tensor compared with the plan before vLLM gets it."""
        awaited = islice(self._awaited, len(chunk.names))
        for meta, tensor in as_planned(awaited, tensors, self._parents):
            if self._options.finite_check == "worker":
                require_finite(meta.name, tensor, self._parents)
            # A source that has looked itself does not know the engine's dtype.
            if self._options.finite_check != "nobody":
                require_in_range(meta.name, tensor, self._dtype, self._parents)
            if self._check is not None:
                with self._clock("verify"):
                    self._check.arrived(meta.name, tensor)
            if self._loads_base:
                self._tied_check.arrived(meta.name, tensor)
            yield meta.name, tensor
