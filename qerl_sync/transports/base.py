"""Define the transport: the way from a session to the workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from qerl_sync.errors import ConfigError, StaleCacheError
from qerl_sync.meta import ParamMeta
from qerl_sync.options import MapOptions, SyncOptions
from qerl_sync.plan.adapter import Adapter
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.sync_plan import Chunk, SyncPlan
from qerl_sync.stopwatch import Span, Stopwatch, slowest
from qerl_sync.wire.messages import TraceData

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class WorkerReport:
    """Hold what one worker rank measured in one sync.

    Attributes:
        worker: names it.
        trace: what it held, tensor by tensor.
        predicted: what the plan says that it would hold. Ranks hold different parts of a model.
        seconds: by phase. wait: for the next chunk; load: vLLM's loaders; finish: what is left;
            verify: checksums, which are a part of the others.
        peak_extra_bytes: the most memory that the sync took on top of what the worker holds
            anyway: receive buffers, and the layer in work. None: not measured.
        peak_extra_bytes_predicted: the same from the plan, before the first byte.
        peak_staged_bytes: the most that it staged in host memory at once (policy `spill`).
        kept_bytes: memory in which it kept the old weights (`on_failure: rollback`).
        mirror_bytes: memory in which it keeps what was sent last (`sync.delta: elements`).
        spans: what it did when, by its host's clock; see `wire.messages.Report`.
        quantisation: how its layers hold their weights after the sync (`SyncReport.quantisation`).
    """

    worker: str
    trace: TraceData
    predicted: TraceData
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_extra_bytes: int | None = None
    peak_extra_bytes_predicted: int | None = None
    peak_staged_bytes: int = 0
    kept_bytes: int = 0
    mirror_bytes: int = 0
    spans: Sequence[Span] = ()
    quantisation: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return all but the traces, which are as long as the model has tensors."""
        return {
            "worker": self.worker,
            "peak_buffered_bytes": self.trace.peak_buffered_bytes,
            "peak_pinned_bytes": self.trace.peak_pinned_bytes,
            "max_open_layers": self.trace.max_open_layers,
            "prediction_exact": self.trace == self.predicted,
            "seconds": dict(self.seconds),
            "peak_extra_bytes": self.peak_extra_bytes,
            "peak_extra_bytes_predicted": self.peak_extra_bytes_predicted,
            "peak_staged_bytes": self.peak_staged_bytes,
            "kept_bytes": self.kept_bytes,
            "mirror_bytes": self.mirror_bytes,
            "slowest_layers": {
                span.detail: round(span.seconds, 6)
                for span in slowest(s for s in self.spans if s.name == "process")[:5]
            },
        }


def require_emptied(connector: str, keeps: str) -> None:
    """Refuse an engine with a connector that would reuse old weights' work after a sync.

    Args:
        connector: the name of its connector; empty if it has none.
        keeps: why a sync cannot have it empty what it keeps; empty if it can.

    Raises:
        StaleCacheError: it cannot.
    """
    if keeps:
        raise StaleCacheError(
            f"the engine has the connector {connector}, which would hand out what old weights have "
            f"computed after a sync: {keeps}. Start the engine without it, or with one that can be "
            "reset (OffloadingConnector without secondary_tiers, MooncakeStoreConnector)",
            connector=connector,
        )


def still_cached(connector: str) -> StaleCacheError:
    """Return the error for caches that vLLM did not empty after a sync."""
    if not connector:
        return StaleCacheError(
            "vLLM does not empty its prefix cache, whose keys and values belong to the old "
            "weights: a request still holds blocks of it, or a data parallel replica does. The "
            "engine does not generate. Sync between two calls of generate, or look at the engine's "
            "log and sync again"
        )
    return StaleCacheError(
        f"the connector {connector} did not empty what it keeps of the old weights, or requests in "
        "flight hold blocks of it; the engine does not generate. Set sync.recompute_running: true "
        "if requests are in flight during a sync; otherwise look at the engine's log, sync again, "
        "or start the engine without the connector",
        connector=connector,
    )


@dataclass(frozen=True)
class SyncResult:
    """Report a committed sync.

    Attributes:
        workers: what each worker rank measured.
        kind: how bytes travelled, and why so.
        lost: workers that did not take the sync although it succeeded, with the reason.
        verify_seconds: what checksums took on the trainer's side (`sync.verify`).
        wire_bytes: what was sent to each worker; none where it reads the trainer's own memory.
        mirror_bytes: memory in which the trainer keeps what it sent (`sync.delta: elements`).
    """

    workers: Sequence[WorkerReport]
    kind: str
    lost: Mapping[str, str] = field(default_factory=dict)
    verify_seconds: float = 0.0
    wire_bytes: int = 0
    mirror_bytes: int = 0


class EngineFacts(NamedTuple):
    """Hold what a session must know of the engine.

    Attributes:
        dtype: that it computes in, and `quantization`, its scheme; None: it has none.
        context_tokens: the most tokens of a request, with its completion; 0: not known.
    """

    dtype: str = "?"
    quantization: str | None = None
    context_tokens: int = 0


class ProbeResult(NamedTuple):
    """Hold the engines' answers for a prompt's log-probabilities.

    Attributes:
        answers: by engine, the log-probabilities.
        lost: engines that did not answer and were left behind, with the reason.
    """

    answers: Mapping[str, Sequence[float]]
    lost: Mapping[str, str] = {}


class Transport(ABC):
    """Carries one sync at a time: `start`, `send` for each chunk in plan order, `finish`.

    Any error leaves the workers poisoned (see `worker.load.receiver`); `abort` may follow and is
    idempotent. After it a new `start` is allowed.

    Attributes:
        by_reference: workers get the source's own memory, so that the source's storages are theirs.
        chunk_bytes: upper bound of a chunk where the user has set none; None: one chunk.
        busy_cores: CPUs of this machine that its workers are bound to, and load with.
        source_device: where the source's tensors lie; None: not known. The session sets it.
        watch: where the transport records what it does when. The session sets it for each sync.
        leads: of several trainer ranks, this one reports for all of them.
        shares_engine: the engine is one with other trainer ranks': each has a worker of it in its
            process (tensor parallel). Their workers hold different parts of the model, and compute
            together.
    """

    by_reference = False
    chunk_bytes: int | None = 64 << 20
    busy_cores: Collection[int] = ()
    source_device: torch.device | None = None
    watch = Stopwatch()
    leads = True
    shares_engine = False

    @property
    def versions(self) -> Mapping[str, int]:
        """Return the weight version of each worker or engine, as far as known. Does not block."""
        return {}

    @property
    def num_poisoned(self) -> int:
        """Return how many workers are known to refuse to generate until a sync succeeds."""
        return 0

    @property
    def connected(self) -> bool:
        """Return False if a worker that took the last sync is gone, or has had another's since, as
        far as is known without asking. Does not block."""
        return True

    def committed_version(self) -> int:
        """Return the highest weight version that a worker has committed; 0 if it is not known."""
        return 0

    def holds(self, version: int) -> bool:
        """Return whether all workers of the next sync have `version` as this transport committed
        it, as far as is known without asking, so that a sync of a part can build on it.

        Called after `committed_version`. A worker that has become another since refuses
        (StaleBaseError).
        """
        return False

    def agree_on_base(self, version: int | None) -> bool:
        """Return whether this sync may leave out what has not changed since `version`; see
        `holds`. All trainer ranks get the same answer.

        Args:
            version: of the sync that the session committed last; None: it knows of none.
        """
        return version is not None and self.holds(version)

    def agree_on_unchanged(self, names: Collection[str]) -> Collection[str]:
        """Return what has stayed as it is on every trainer rank, given what has on this one."""
        return names

    def await_taken(self) -> list[int] | None:
        """Block until the workers have opened the sync that `start` began, or raise their refusal.

        Returns:
            Indices of the plan's tensors that this trainer rank is to send; None: all, or it was
            called before.
        """
        return None

    @property
    def sends_whole(self) -> str:
        """Return why a changed tensor travels whole; empty where its changed elements can alone
        (`SyncOptions.mirror`). Called after `committed_version`."""
        return f"{type(self).__name__} sends no changes"

    def require_adapter(self, adapter: Adapter) -> None:
        """Check that the workers can serve this LoRA adapter, by building it with zeros.

        Raises:
            ConfigError, CompatError, CoverageError: they cannot, or this transport does not lead
                adapters there.
        """
        raise ConfigError(
            f"{type(self).__name__} does not carry adapters; choose sync.lora: merge, or one engine"
        )

    def together(self) -> AbstractContextManager[None]:
        """Return the context of one sync. With several trainer ranks, an error that leaves it on
        one rank leaves it on all of them."""
        return nullcontext()

    def meet(self, what: str) -> None:  # noqa: B027  there is one rank alone
        """Block until all trainer ranks are about to do this."""

    def agree_on(self, metas: Sequence[ParamMeta]) -> None:  # noqa: B027
        """Check that all trainer ranks have the same tensors to send.

        Raises:
            AgreementError: on all of them.
        """

    @abstractmethod
    def layer_map(self, metas: Sequence[ParamMeta], options: MapOptions = MapOptions()) -> LayerMap:
        """Ask the workers where each tensor lands. Leaves their weights untouched.

        Raises:
            LayerMapError, CoverageError: the workers cannot take this stream.
        """

    @abstractmethod
    def free_bytes(self) -> int:
        """Return the free bytes on the device of the worker that has the fewest."""

    @abstractmethod
    def start(self, plan: SyncPlan, layer_map: LayerMap, options: SyncOptions) -> None:
        """Open a sync on all workers. They do not generate from here to the end of `finish`."""

    @abstractmethod
    def send(self, chunk: Chunk, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Deliver one chunk. `tensors` is consumed lazily, once; nothing is kept after `finish`."""

    @abstractmethod
    def finish(self) -> SyncResult:
        """Close the sync on all workers, commit it on all of them, return what they measured."""

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Abort an open sync: the workers are poisoned until the next one has finished."""

    @property
    def engine_facts(self) -> EngineFacts:
        """Return what is known of the engine. Called after `layer_map`."""
        return EngineFacts()

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Return the engine's log-probabilities of a prompt: see `EngineClient`.

        Raises:
            ConfigError: the engines behind this transport cannot be asked.
        """
        raise ConfigError(
            f"sync.verify: full asks one engine of its own for log-probabilities, which does not "
            f"go over {type(self).__name__}; choose verify: checksum"
        )

    def probe(self, token_ids: Sequence[int]) -> ProbeResult:
        """Ask each engine for the log-probabilities of a prompt. Raises as `prompt_logprobs`."""
        return ProbeResult({"the engine": self.prompt_logprobs(token_ids)})

    def invalidate(self, reason: str) -> None:  # noqa: B027  only what can be asked can be wrong
        """Poison the workers until the next sync: what has been committed is wrong."""

    def close(self) -> None:  # noqa: B027  not every transport holds something
        """Disconnect from the workers and free memory. Idempotent; nothing can be sent then."""
