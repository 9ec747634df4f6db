"""Sync a trainer's weights to vLLM: plan once, push every step, report what it cost."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import (
    ConfigError,
    CoverageError,
    PlanError,
    StaleBaseError,
    SyncError,
    UnchangedError,
)
from qerl_sync.meta import ParamMeta, Storage, not_ignored
from qerl_sync.options import MapOptions, SyncOptions
from qerl_sync.plan.adapter import Adapter
from qerl_sync.plan.diagnosis import diagnose
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.orders import parse_order
from qerl_sync.plan.part import part_to_send, smallest_part
from qerl_sync.plan.sync_plan import SyncPlan, build_plan
from qerl_sync.sources.base import Source
from qerl_sync.sources.noise import RolloutNoise
from qerl_sync.stopwatch import Stopwatch
from qerl_sync.telemetry.observers import Observer, Push
from qerl_sync.transports.base import SyncResult, Transport, WorkerReport
from qerl_sync.verify.finite import FiniteChecker
from qerl_sync.verify.probe_prompt import Probe, largest_gap, shortened, tolerance
from qerl_sync.wire.host import avoid_cores
from qerl_sync.wire.mirror import mirror_bytes

if TYPE_CHECKING:
    import torch

    from qerl_sync.config import SyncConfig
    from qerl_sync.verify.changes import Changes, ChangeWatch

logger = logging.getLogger(__name__)

# The parameters that the optimizer steps, as `named_parameters` of the trained model yields them.
Trained = Callable[[], Iterable[tuple[str, "torch.Tensor"]]]

Named = Iterator[tuple[str, "torch.Tensor"]]

# The share of a worker's free memory that `budget_bytes: auto` takes. The other half is for the
# second copy of a layer that vLLM makes while it processes it.
AUTO_SHARE = 0.5

PHASES = ("plan", "start", "gather", "load", "finish", "verify", "total")


@dataclass
class SyncReport:
    """Report what one sync did and cost.

    Example:
        report = session.push(step=1)
        print(report.version, report.seconds["total"], report.prediction_exact)
        print(report.transport, report.lost)

    Attributes:
        version: the weight version that this sync committed, counted from 1.
        step: the trainer's global step.
        seconds: by phase. plan: metadata, hashes (`sync.delta`), layer map, order. start: opening
            the reload. gather: waiting for the source's tensors. load: vLLM's loaders. finish: what
            is left, derived state, caches. verify: the trainer's side of what `sync.check_finite`,
            `sync.on_unchanged` and `sync.verify` ask for, the transport's checksums included, which
            are a part of load and finish too.
            total: all of it.
        budget_bytes: what the plan was allowed to pin (`sync.budget_bytes`), in bytes.
        prediction_exact: predicted and measured traces are equal, tensor by tensor.
        first_difference: if not, where they differ first.
        peak_staged_bytes_predicted, peak_staged_bytes_measured: the most that waited in a worker's
            host memory for the rest of its layer (policy `spill`; 0 otherwise).
        transport: how the bytes travelled, and why so.
        workers: what each worker rank measured (`WorkerReport`); the peaks above are those of the
            worker that held most.
        lost: workers that were left behind, and why; see `PoolTransport`.
        changed_tensors: tensors that differ from those sent before, as far as `sync.on_unchanged`
            looks; None: not known.
        probe_gap: the largest difference between the log-probabilities of a prompt on the trainer
            and on an engine (`sync.verify: full`).
        undelivered: names that changed on the trainer and did not travel, where that is a finding.
        lora: of a model that trains an adapter. mode: how that travelled, and reason, why so; base:
            why base weights travelled too, empty if they did not.
        mismatch: with `sync.verify: full`, why the engine's log-probabilities of the prompt differ
            from those of the trainer's own model (`total`), each cause with the largest difference
            that it makes by itself. sync: 0, for what arrived is what was sent. noise: of
            `sync.noise`.
            quantisation: of weights in the engine's dtype and scheme, against the trainer's model
            with such weights. kernels: what is left, activations included. None: not known of that
            scheme.
        unsent_tensors, unsent_bytes: what the workers kept of the version before, because it cannot
            have changed (`Source.unchanging`) or has not (`sync.delta`).
        wire_bytes: what was sent to each worker: less than `sent_bytes` where changed elements
            travelled alone, 0 where workers read the trainer's own memory.
        mirror_bytes: memory in which the trainer keeps what was sent last, and each worker its own
            copy of that (`sync.delta: elements`).
        delta: with `sync.delta`, what was `sent` (everything, the touched layers, or their changed
            elements), and the reason for more than was asked for.
        quantisation: how the engine's layers hold their weights after the sync. scheme: vLLM's name
            for it. bits: the number of layers by the bits of a weight. high_precision: the layers
            that are not quantised, and why. from_checkpoint: the engine's checkpoint was quantised.
        noise: of `sync.noise`; None without it. sigma and stage: what the schedule has for this
            step, 0 where there is none. seed, version and shapes: what the noise is made again from
            (`qerl_sync.noise_of`). arrived_sigma: the standard deviation that is left of it when
            the norms are rounded to the engine's dtype.
        loading: how many of the parent layers that were sent are loaded in which way (`sync.load`).
    """

    version: int
    step: int
    policy: str
    plan_digest: str
    num_tensors: int
    num_chunks: int
    sent_bytes: int
    seconds: dict[str, float]
    peak_buffered_bytes_predicted: int
    peak_buffered_bytes_measured: int
    peak_pinned_bytes_predicted: int
    peak_pinned_bytes_measured: int
    max_open_layers_predicted: int
    max_open_layers_measured: int
    prediction_exact: bool
    first_difference: str | None
    budget_bytes: int | None = None
    peak_staged_bytes_predicted: int = 0
    peak_staged_bytes_measured: int = 0
    transport: str = ""
    workers: list[dict[str, Any]] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    changed_tensors: int | None = None
    undelivered: tuple[str, ...] = ()
    probe_gap: float | None = None
    mismatch: dict[str, float | None] | None = None
    unsent_tensors: int = 0
    unsent_bytes: int = 0
    wire_bytes: int = 0
    mirror_bytes: int = 0
    delta: dict[str, str] | None = None
    lora: dict[str, str] | None = None
    quantisation: dict[str, Any] = field(default_factory=dict)
    noise: dict[str, Any] | None = None
    loading: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Base:
    """The sync that was committed last: a sync of a part of the model builds on it.

    Attributes:
        metas: the whole stream of then.
        stamps: what `Source.unchanging` and `Source.content_stamps` said of it.
    """

    version: int
    metas: list[ParamMeta]
    stamps: Mapping[str, Hashable]


class SyncSession:
    """Push a source's weights to vLLM, as often as wanted.

    Example:
        with SyncSession(HFSource(model), transport, SyncConfig(policy="reorder")) as session:
            for step in range(1, 4):
                train(model)
                report = session.push(step=step)

    Called on every trainer rank, in the same order. Not thread-safe.

    Args:
        source: the trainer's weights.
        transport: the way to the workers.
        config: the `sync` section.
        version: the version of the weights that the workers hold now; it only moves forwards.
        trained: yields the parameters that the optimizer steps, under the trainer's own names and
            with adapters, so that those that do not travel can be named; see `sync.on_unchanged`.
        probe: what the trainer's model says of a prompt, for `sync.verify: full`.
        observers: called after each push, beside those that the configuration asks for.

    Closing it (or leaving it as a context) disconnects the workers and frees shared memory.
    """

    def __init__(
        self,
        source: Source,
        transport: Transport,
        config: SyncConfig,
        *,
        version: int = 0,
        trained: Trained | None = None,
        probe: Probe | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        if config.verify == "full" and probe is None:
            raise ConfigError(
                "sync.verify: full holds the engine against the trainer's own model; give the "
                "session a probe (qerl_sync.sources.hf.probe_of(model)), or choose verify: checksum"
            )
        if config.when != "lazy":
            raise ConfigError(
                f"sync.when: {config.when} is for a TRL trainer (WeightSyncCallback); a session "
                "sends when push() is called. Leave it out, and call push() when you want it"
            )
        if config.delta != "off" and not source.stamps_content:
            raise ConfigError(
                f"sync.delta: {config.delta} hashes the trainer's weights, which "
                f"{type(source).__name__} does not do; choose sync.delta: off, or a source that "
                "has `content_stamps`"
            )
        self._probe = probe if config.verify == "full" else None
        self._prompt: tuple[int, ...] = ()
        self._tolerance = 0.0
        self._noise = None if config.noise is None else RolloutNoise(config.noise)
        if self._noise is not None and self._probe is not None and self._probe.noisy is None:
            raise ConfigError(
                "sync.verify: full holds the engine, whose norms have sync.noise, against the "
                "trainer's model with the same noise, and this probe has no `noisy`; make it with "
                "qerl_sync.sources.hf.probe_of(model), or choose verify: checksum"
            )
        self._source = source
        self._transport = transport
        self._config = config
        self._order = parse_order(config.source_order)
        self._metas: list[ParamMeta] | None = None
        self._warned: set[str] = set()
        self._watch: ChangeWatch | None = None
        if config.on_unchanged != "ignore":
            from qerl_sync.verify.changes import ChangeWatch

            self._watch = ChangeWatch(trained)
        self.version = version
        self._pushed = False
        self._base: _Base | None = None
        self._full_plan: SyncPlan | None = None
        self._part_plan: SyncPlan | None = None
        self._adapter: Adapter | None = None
        self._beside: set[str] = set()  # what has trained, with `lora_base: engine`
        # The last plan without and with the adapter. A new one would be hashed anew in each sync.
        self._last_base: SyncPlan | None = None
        self._last: SyncPlan | None = None
        self.plan: SyncPlan | None = None
        self.layer_map: LayerMap | None = None
        self.last_trace: Trace | None = None
        self._num_pushes = 0
        if source.lora is not None:
            source.metadata()
            self._agree_on_adapter()
        # At the end, since they open ports and directories, which an error above would leave open.
        self._observers = [*_observers_of(config), *observers] if transport.leads else []

    def begin_run(self, num_steps: int, seed: int = 0) -> None:
        """Set how many steps the run has and what it is seeded with, for `sync.noise`. No effect
        where the configuration says it, or has no noise.

        Raises:
            ConfigError: the run has too few steps for the schedule.
        """
        if self._noise is not None:
            self._noise.begin_run(num_steps, seed)

    @property
    def noise_is_scheduled(self) -> bool:
        """Return whether `push` adds noise by a schedule: `sync.noise` is set, and the run has said
        how many steps it has."""
        return self._noise is not None and self._noise.num_steps is not None

    def push(self, step: int = 0, *, clean: bool = False) -> SyncReport:
        """Send the current weights and commit a new version.

        Args:
            step: the trainer's global step.
            clean: without `sync.noise`, as for evaluation.

        Raises:
            PlanError, LayerMapError, CoverageError: before the first byte; the workers keep their
                weights and go on. NaN beyond the first chunk is found while that is loaded.
            CoverageError, LoadError: in the middle; the workers are poisoned and
                refuse to generate until a later push succeeds, or are back on the old version
                (`sync.on_failure`). The version has not moved.
            UnchangedError: after the sync, with `sync.on_unchanged: error`; see there.
        """
        self._num_pushes += 1
        record = self._config.trace == self._num_pushes
        watch = self._transport.watch = Stopwatch(PHASES, record=record)
        started = time.time()
        outcome: dict[str, Any] = {"report": None, "error": None, "workers": ()}
        try:
            report, outcome["workers"] = self._push(step, watch, clean)
            outcome["report"] = report.to_json() if self._observers else None
            return report
        except BaseException as exc:
            outcome["error"] = exc
            raise
        finally:
            if self._observers:
                self._tell(
                    Push(
                        number=self._num_pushes,
                        step=step,
                        version=self.version,
                        started=started,
                        seconds=watch.seconds,
                        failed_in=watch.failed_in,
                        # What failed before it was sent, such as a refused budget, had no plan.
                        plan=self.plan if watch.seconds["start"] else None,
                        layer_map=self.layer_map,
                        source_order=self._config.source_order,
                        spans=watch.spans,
                        versions=dict(self._transport.versions),
                        num_poisoned=self._transport.num_poisoned,
                        **outcome,
                    )
                )

    def _tell(self, push: Push) -> None:
        """Call the observers. Close one that fails, and leave it out from then on: it must not end
        a run."""
        for observer in list(self._observers):
            try:
                observer(push)
            except Exception as exc:  # noqa: PERF203  one failing observer spares the others
                self._observers.remove(observer)
                with suppress(Exception):  # a server that is left open would keep its port
                    observer.close()
                logger.warning(
                    "the observer %s failed, and the run goes on without it: %s: %s",
                    type(observer).__name__,
                    type(exc).__name__,
                    exc,
                )

    def _push(
        self, step: int, watch: Stopwatch, clean: bool
    ) -> tuple[SyncReport, Sequence[WorkerReport]]:
        base = self._base
        self._pushed = False
        with self._transport.together(), watch("total"):
            with watch("plan"):
                full, layer_map = self._agree()
                self._agree_on_adapter()
                stamps = self._stamps()
                # Another session may have synced these workers, and a failed sync may have
                # committed on some of them: no number stands for two sets of weights.
                version = max(self.version, self._transport.committed_version()) + 1
                if self._noise is not None:
                    dtype = self._transport.engine_facts.dtype
                    self._noise.begin(version, step, dtype, clean=clean)
                    stamps = self._noise.stamps(stamps)
                base, why = self._what_they_hold(base)
                part = full if base is None else self._plan_part(full, layer_map, base, stamps)
                plan = self._with_adapter(part)
                mirror = self._config.delta == "elements" and not self._transport.sends_whole
                if mirror:
                    self._require_room_for_mirror(full)
            held = self._source.held_names()
            options = SyncOptions(
                version=version,
                verify=self._config.verify,
                on_failure=self._config.on_failure,
                finite_check=self._source.finite_check(self._config.check_finite),
                stable=self._source.stable,
                held=None if held is None else frozenset(held),
                base=None if base is None or part is full else base.version,
                is_base=bool(stamps),
                mirror=mirror,
                changes_from=base.version if mirror and base is not None else None,
                record_spans=watch.records,
            )
            # If anything fails from here on, a worker may hold half of this sync, and the next push
            # sends everything. Of an adapter alone workers touch nothing before the commit.
            self._base = None
            try:
                try:
                    result = self._send(plan, layer_map, options, watch)
                except StaleBaseError as exc:
                    # A worker was replaced, or written to, since it was asked. Nothing was touched.
                    logger.warning("everything is sent: %s", exc)
                    plan, why = self._with_adapter(full), str(exc)
                    # Another session may have given it the version that this one was to have. A
                    # pool connects anew to engines that it has ended a sync with.
                    committed = max(exc.version, self._transport.committed_version())
                    version = max(version, committed + 1)
                    options = replace(options, version=version, base=None, changes_from=None)
                    watch.failed_in = ""  # where the second attempt fails, if it does
                    result = self._send(plan, layer_map, options, watch)
            except BaseException:
                alone = not plan.base_metas
                if alone and base is not None and self._transport.holds(base.version):
                    self._base = base
                raise
            self.version = options.version
            self.last_trace = result.workers[0].trace
            with watch("verify"):
                asked = self._ask_engine(result)
            # Nothing builds on weights that the engine computes otherwise with. Without stamps,
            # everything may change unseen.
            if stamps:
                self._base = _Base(options.version, list(self._metas or ()), dict(stamps))
            self._pushed = True
            watch.seconds["verify"] += result.verify_seconds
            with watch("verify"):
                changes = self._judge_changes(step)
        report = self._report(plan, result, step, watch.seconds)
        report.unsent_tensors = len(full.metas) - len(plan.base_metas)
        report.unsent_bytes = full.nbytes - sum(meta.nbytes for meta in plan.base_metas)
        if self._config.delta != "off":
            report.delta = self._delta_of(why, options)
        if self._source.lora is not None:
            report.lora = dict(self._source.lora)
        if self._adapter is not None:
            base_reason = _why_base(plan, options, own=self._config.lora_base == "engine")
            report.lora = {**(report.lora or {}), "base": base_reason}
        if self._noise is not None:
            report.noise = self._noise.report()
        if asked is not None:
            report.probe_gap, lost, report.mismatch = asked
            report.lost |= lost
        if changes is not None:
            report.changed_tensors, report.undelivered = changes.num_changed, changes.undelivered
        return report, result.workers

    @property
    def current(self) -> bool:
        """Return whether the workers hold what was last pushed, as far as is known without asking.

        False before the first push and after one that failed; after a connection was lost, since an
        engine that replaces another has the weights that it was started with; and after another
        session of this process has synced the same engine. Push then. Does not block.
        """
        return self._pushed and self._transport.connected

    @property
    def overtaken(self) -> bool:
        """Return whether the source's weights were written to since the last push began, as far as
        it knows (`Source.require_unwritten`)."""
        try:
            self._source.require_unwritten()
        except CoverageError:
            return True
        return False

    def close(self) -> None:
        """Disconnect from the workers. Idempotent; the session cannot push again."""
        with ExitStack() as closing:  # each of them, whatever another one raises
            for observer in self._observers:
                closing.callback(observer.close)
            self._observers = []
            closing.callback(self._transport.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def storages(self) -> Mapping[str, Storage]:
        """Return the memory behind each tensor that workers get, where several share one."""
        if not self._transport.by_reference:
            return {}
        of_source = self._source.storages()
        return of_source if self._noise is None else self._noise.storages(of_source)

    @property
    def chunk_bytes(self) -> int | None:
        """Return the upper bound of a chunk: the configuration's, else the transport's."""
        return self._config.chunk_bytes or self._transport.chunk_bytes

    def _agree(self) -> tuple[SyncPlan, LayerMap]:
        """Return the plan for what the source has: the last one, unless names or shapes changed."""
        given = not_ignored(self._source.metadata(), self._config.ignore_names)
        asked = MapOptions(self._config.allow_incomplete, self._config.load)
        if self._config.lora_base == "engine":
            given, asked = self._beside_the_base(given), replace(asked, allow_incomplete=("*",))
        self._transport.source_device = self._source.device
        metas = self._order(given)
        self._transport.agree_on(metas)
        if self._full_plan is None or self.layer_map is None or metas != self._metas:
            layer_map = self._transport.layer_map(metas, asked)
            if self._probe is not None:
                dtype, quantization, context_tokens = self._transport.engine_facts
                self._tolerance = tolerance(dtype, quantization, self._config.verify_tolerance)
                self._prompt = shortened(self._probe.token_ids, context_tokens)
            if self._noise is not None:
                self._noise.choose(metas, layer_map)
            self.layer_map, self._metas = layer_map, metas
            self._full_plan = self._part_plan = None
            self._full_plan = self._make_plan(metas, given, layer_map)
        return self._full_plan, self.layer_map

    def _beside_the_base(self, given: list[ParamMeta]) -> list[ParamMeta]:
        """Return what travels to an engine that keeps its own base: what trains, and what has
        noise."""
        if self._source.adapter() is None:
            raise ConfigError(
                "sync.lora_base: engine keeps the engine's own weights, and this source has no "
                "adapter that is served beside them; train one and leave sync.lora at adapter, or "
                "leave sync.lora_base out"
            )
        if by := self._source.base_changed_by:
            raise ConfigError(
                "sync.lora_base: engine keeps the engine's own weights, and init_lora_weights: "
                f"{by} has changed the trainer's, to which the adapter belongs. Convert it first "
                "(path_initial_model_for_weight_conversion of PEFT's save_pretrained), or leave "
                "sync.lora_base out"
            )
        frozen = self._source.unchanging().keys()
        noisy = self._config.noise.names if self._config.noise is not None else ()
        # What is frozen now may have been stepped since the last sync.
        self._beside |= {meta.name for meta in given} - frozen
        return [
            meta
            for meta in given
            if meta.name in self._beside or any(fnmatchcase(meta.name, one) for one in noisy)
        ]

    def _agree_on_adapter(self) -> None:
        """Have the workers judge the source's adapter, unless it is the last one."""
        adapter = self._source.adapter()
        if adapter != self._adapter:
            if adapter is not None:
                self._transport.require_adapter(adapter)
            self._adapter = adapter

    def _with_adapter(self, plan: SyncPlan) -> SyncPlan:
        """Return the plan with the adapter, if there is one, behind it."""
        if self._adapter is None:
            return plan
        if self._last_base is not plan or self._last is None or self._last.adapter != self._adapter:
            self._last_base, self._last = plan, plan.with_adapter(self._adapter, self.chunk_bytes)
        return self._last

    def _what_they_hold(self, base: _Base | None) -> tuple[_Base | None, str]:
        """Return the sync that this one may build on; None and the reason if all must be sent."""
        fits = base is not None and base.metas == self._metas
        # All ranks ask, whatever they know themselves: each waits for the others' answers.
        if self._transport.agree_on_base(base.version if base is not None and fits else None):
            return base, ""
        if base is None:
            return None, "it is the first one, or the sync before failed"
        if not fits:
            return None, "the source has other tensors than at the last sync"
        return None, (
            f"a worker is new, was restarted, or has other weights than those of version "
            f"{base.version}"
        )

    def _require_room_for_mirror(self, full: SyncPlan) -> None:
        needed_bytes, allowed = mirror_bytes(full.base_metas), self._config.mirror_budget_bytes
        if allowed is not None and needed_bytes > allowed:
            raise PlanError(
                f"sync.delta: elements keeps {needed_bytes:,} bytes of what was sent last, on the "
                f"trainer and on each worker, and sync.mirror_budget_bytes is {allowed:,}; raise "
                "it, or choose sync.delta: layers, which keeps none"
            )

    def _delta_of(self, why: str, options: SyncOptions) -> dict[str, str]:
        """Return `SyncReport.delta`. `why`: all had to be sent; empty if not."""
        if why:
            return {"sent": "everything", "reason": why}
        if options.changes_from is not None:
            return {"sent": "elements", "reason": ""}
        whole = self._transport.sends_whole if self._config.delta == "elements" else ""
        return {"sent": "layers", "reason": whole}

    def _stamps(self) -> Mapping[str, Hashable]:
        """Return a stamp of each tensor that may stay out of a sync; see `Source.unchanging`."""
        declared = self._source.unchanging()
        if self._config.delta == "off":
            return declared
        return {**self._source.content_stamps(), **declared}

    def _plan_part(
        self, full: SyncPlan, layer_map: LayerMap, base: _Base, stamps: Mapping[str, Hashable]
    ) -> SyncPlan:
        """Return the plan without the tensors that have not changed since `base`; the full plan
        if all have changed, or if none has and there is no adapter to send."""
        metas = self._metas or []
        unchanged = {
            name
            for name, stamp in stamps.items()
            if name in base.stamps and base.stamps[name] == stamp
        }
        part = part_to_send(metas, layer_map, self._transport.agree_on_unchanged(unchanged))
        if not part and self._config.delta != "off" and not self._adapter:
            part = smallest_part(metas, layer_map)  # a version needs a stream that brings it
        if len(part) == len(metas) or not (part or self._adapter):
            return full
        if not part:
            return full.emptied
        # Mostly the same part as last time: what trains does not change from step to step.
        if self._part_plan is None or {m.name for m in part} != set(self._part_plan.order):
            self._part_plan = self._make_plan(part, part, layer_map)
        return self._part_plan

    def _make_plan(
        self, metas: list[ParamMeta], given: list[ParamMeta], layer_map: LayerMap
    ) -> SyncPlan:
        """Return the plan for a stream. Warn, once for each plan, if it opens several layers.

        Args:
            given: the same tensors in the order in which the source yields them.

        Raises:
            PlanError: the source cannot yield in the plan's order, or `policy: error` refuses it.
        """
        budget_bytes = self._config.budget_bytes
        if budget_bytes == "auto":
            budget_bytes = int(self._transport.free_bytes() * AUTO_SHARE)
            if self._transport.by_reference:  # what the source holds anyway is not free, and counts
                budget_bytes += self._source.resident_bytes()
        self.plan = None
        storages = self.storages()
        plan = build_plan(
            metas,
            layer_map,
            self._config.policy,
            chunk_bytes=self.chunk_bytes,
            storages=storages,
            budget_bytes=budget_bytes,
            spill_budget_bytes=self._config.spill_budget_bytes,
            spill_directory=self._config.spill_directory,
        )
        if not self._source.any_order and plan.metas != tuple(given):
            pairs = zip(plan.metas, given, strict=True)
            planned, own = next((a.name, b.name) for a, b in pairs if a != b)
            raise PlanError(
                f"the plan has {planned!r} where the source yields {own!r}, and this source yields "
                "in its own order only. Choose sync.policy: spill, which puts tensors in order on "
                "the worker, or warn; or give the source a method tensor(name)"
            )
        diagnosis = diagnose(
            plan.load_metas, plan.predicted, layer_map, storages, plan.budget_bytes
        )
        if diagnosis is not None and plan.digest not in self._warned:
            text = diagnosis.text(self._config.source_order)
            if plan.policy == "error":
                raise PlanError(f"{text}\nRefused by `sync: {{policy: error}}`; nothing was sent.")
            self._warned.add(plan.digest)
            logger.warning(text)
        self.plan = plan
        return plan

    def _ask_engine(
        self, result: SyncResult
    ) -> tuple[float, Mapping[str, str], dict[str, float | None]] | None:
        """Ask the engine how far its log-probabilities are from the trainer's (`verify: full`), and
        why. Poison it if they are too far, or if it does not answer. Does nothing without a probe.

        Returns:
            `probe_gap`, `lost` and `mismatch` of the report.
        """
        if self._probe is None:
            return None
        tokens = self._prompt
        try:
            if self._noise is None or self._probe.noisy is None:
                right = self._probe.logprobs(tokens)
            else:
                right = self._probe.noisy(tokens, self._noise.noise())
            answers, lost = self._transport.probe(tokens)
            gaps = {engine: largest_gap(right, answer) for engine, answer in answers.items()}
            engine, gap = max(gaps.items(), key=lambda item: item[1])
        except BaseException as exc:
            reason = f"version {self.version} was loaded, and could not be verified: {exc}"
            self._transport.invalidate(reason)
            if isinstance(exc, SyncError) or not isinstance(exc, Exception):
                raise
            raise CoverageError(
                f"{reason}. The engine is poisoned; sync.verify: checksum does not ask it"
            ) from exc
        if not gap <= self._tolerance:
            reason = (
                f"after version {self.version} was loaded, the log-probabilities of {engine} for a "
                f"prompt part from the trainer's by {gap:.2g}, more than {self._tolerance:g}"
            )
            self._transport.invalidate(reason)
            raise CoverageError(
                f"{reason}. The engine is poisoned: it computes with other weights, or the model "
                "otherwise. Hold a fresh engine against the trainer; sync.verify_tolerance raises "
                "the bound",
                engine=engine,
                gap=gap,
            )
        return gap, lost, self._attribute(right, answers[engine], result)

    def _attribute(
        self, right: Sequence[float], answer: Sequence[float], result: SyncResult
    ) -> dict[str, float | None]:
        """Attribute the difference between the two answers to its causes. See
        `SyncReport.mismatch`."""
        assert self._probe is not None
        tokens, noise = self._prompt, {} if self._noise is None else self._noise.noise()
        clean = self._probe.logprobs(tokens) if noise else right
        found: dict[str, float | None] = {
            "total": largest_gap(clean, answer),
            "sync": 0.0,
            "noise": largest_gap(clean, right),
            "quantisation": None,
            "kernels": None,
        }
        from qerl_sync.verify.stored import stored_by

        stored = stored_by(result.workers[0].quantisation, self._transport.engine_facts.dtype)
        if self._probe.noisy is not None and stored is not None:
            reference = self._probe.noisy(tokens, noise, stored)
            found["quantisation"] = largest_gap(right, reference)
            found["kernels"] = largest_gap(reference, answer)
        return found

    def _judge_changes(self, step: int) -> Changes | None:
        """Report what changed. Warn of a sync that did not bring what the trainer changed, or raise
        UnchangedError."""
        if self._watch is None:
            return None
        changes = self._watch.conclude(step)
        if changes.finding is not None:
            if self._config.on_unchanged == "error":
                raise UnchangedError(f"version {self.version} was committed, but {changes.finding}")
            logger.warning("weight version %d: %s", self.version, changes.finding)
        return changes

    def _send(
        self, plan: SyncPlan, layer_map: LayerMap, options: SyncOptions, watch: Stopwatch
    ) -> SyncResult:
        if options.finite_check == "source" and self._transport.by_reference:
            # All of it before the first byte: a worker that gets the trainer's own memory has no
            # copy to look at while it loads, and NaN in its layers poisons it.
            held = options.held
            with watch("verify"):
                self._source.check_finite([n for n in plan.order if held is None or n in held])
        self.plan = plan
        try:
            return self._transfer(plan, layer_map, options, watch)
        except BaseException as exc:
            self._transport.abort(f"a sync failed: {exc}")
            raise

    def _transfer(
        self, plan: SyncPlan, layer_map: LayerMap, options: SyncOptions, watch: Stopwatch
    ) -> SyncResult:
        held = options.held
        chunks = [[n for n in c.names if held is None or n in held] for c in plan.chunks]
        in_step = options.finite_check == "source" and not self._transport.by_reference
        ahead = chunks if in_step else []

        def check_finite(names: Sequence[str], alone: bool) -> None:
            # On the cores on which workers load, it would take time from them.
            with avoid_cores(() if alone else self._transport.busy_cores):
                self._source.check_finite(names, alone=alone)

        def checked(index: int, tensors: Named) -> Named:
            # A transport stages a chunk while it is checked, and sends it once this stream has
            # ended: NaN ends the stream with an error before any byte of the chunk leaves.
            yield from tensors
            with watch("verify"):
                looks.await_chunk(index)

        with FiniteChecker(check_finite, ahead) as looks:
            with watch("start"):
                self._transport.start(plan, layer_map, options)
            if self._watch is not None:
                self._watch.begin(layer_map.contributions.keys() - set(plan.order))
            verified = watch.seconds["verify"]
            with watch("load"), ExitStack() as sending:
                # Before the commit: an error in the source's own cleanup must fail the sync.
                sending.callback(self._source.end_sync)
                for index, (chunk, names) in enumerate(zip(plan.chunks, chunks, strict=True)):
                    if self._source.collective:
                        # Each rank checks its own shards. All must have before any rank sends.
                        with watch("verify"):
                            looks.await_chunk(index)
                    self._transport.meet(f"chunk {index}")
                    try:
                        tensors = self._timed(self._source.materialize(names), watch)
                        # Behind `_timed`, which watches for unchanged weights: noise differs in
                        # each sync, and would hide that the trainer's own do not.
                        if self._noise is not None:
                            tensors = self._noise.onto(tensors)
                        with watch.span("send", f"chunk {index}"):
                            self._transport.send(chunk, checked(index, tensors))
                    finally:
                        self._source.end_chunk()
        self._source.require_unwritten()
        # Waiting for the source and for checks is timed within the loop, and has its own phases.
        watch.seconds["load"] -= watch.seconds["gather"] + watch.seconds["verify"] - verified
        with watch("finish"):
            return self._transport.finish()

    def _timed(self, tensors: Named, watch: Stopwatch) -> Named:
        """Yield the same stream. Time the waiting for it as the phase "gather"; show each tensor to
        the watch for unchanged weights."""
        while True:
            with watch("gather"):
                item = next(tensors, None)
            if item is None:
                return
            if self._watch is not None:
                with watch("verify"):
                    self._watch.see(*item)
            yield item

    def _report(
        self, plan: SyncPlan, result: SyncResult, step: int, seconds: dict[str, float]
    ) -> SyncReport:
        workers = result.workers
        differences = (w.predicted.first_difference(w.trace) for w in workers)
        difference = next((found for found in differences if found is not None), None)
        if difference is not None and difference not in self._warned:
            self._warned.add(difference)
            logger.warning("the measured trace differs from the predicted one: %s", difference)
        predicted, measured = [w.predicted for w in workers], [w.trace for w in workers]
        return SyncReport(
            version=self.version,
            step=step,
            policy=plan.policy,
            plan_digest=plan.digest,
            num_tensors=len(plan.metas),
            num_chunks=len(plan.chunks),
            sent_bytes=plan.nbytes,
            seconds=seconds,
            peak_buffered_bytes_predicted=max(t.peak_buffered_bytes for t in predicted),
            peak_buffered_bytes_measured=max(t.peak_buffered_bytes for t in measured),
            peak_pinned_bytes_predicted=max(t.peak_pinned_bytes for t in predicted),
            peak_pinned_bytes_measured=max(t.peak_pinned_bytes for t in measured),
            max_open_layers_predicted=max(t.max_open_layers for t in predicted),
            max_open_layers_measured=max(t.max_open_layers for t in measured),
            prediction_exact=difference is None,
            first_difference=difference,
            budget_bytes=plan.budget_bytes,
            peak_staged_bytes_predicted=plan.peak_staged_bytes,
            peak_staged_bytes_measured=max(w.peak_staged_bytes for w in workers),
            transport=result.kind,
            wire_bytes=result.wire_bytes,
            mirror_bytes=result.mirror_bytes,
            workers=[worker.to_json() for worker in workers],
            lost=dict(result.lost),
            loading=dict(Counter(plan.loading.values())),
            quantisation=dict(workers[0].quantisation),
        )


def _observers_of(config: SyncConfig) -> list[Observer]:
    """Return the observers that the options ask for.

    Raises:
        ConfigError: one of them cannot be made.
    """
    found: list[Observer] = []
    if config.record_directory is not None:
        from qerl_sync.telemetry.recorder import FlightRecorder

        found.append(FlightRecorder(Path(config.record_directory)))
    elif config.trace is not None:
        raise ConfigError(
            f"sync.trace: {config.trace} has no place to be written to; set sync.record_directory"
        )
    if config.metrics_port is not None:
        from qerl_sync.telemetry.prometheus import MetricsServer

        found.append(MetricsServer(config.metrics_address, config.metrics_port))
    return found


def _why_base(plan: SyncPlan, options: SyncOptions, *, own: bool) -> str:
    """Return why base weights travel with an adapter; empty if none do. `own`: the engine keeps its
    own."""
    if not plan.base_metas:
        return ""
    if options.base is None and not own:
        return "not all workers are known to hold it as the trainer has it"
    first = plan.base_metas[0].name
    return f"what trains beside the adapter, has noise, or has changed: {first}, ..."
