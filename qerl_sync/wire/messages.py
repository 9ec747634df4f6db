"""Everything that trainer and worker say to each other. Closed, typed, checked on arrival.

    trainer                              worker
    -- connect (through vLLM's init route) ->
    <- Hello                                        what the worker is
    -- Welcome                            ->        how bytes will travel
    <- Ready
    -- Ping                               ->        between syncs, before the engine is paused:
    <- Pong                                         does the connection still lead anywhere?
    -- MapRequest                         ->
    <- MapReply                                     where each tensor lands
    -- AdapterRequest                     ->
    <- AdapterReply                                 the engine can serve that LoRA adapter
    -- SyncRequest                        ->        the plan
    <- Accepted                                     nothing has moved yet
    -- Chunk, Chunk, ...                  ->        at most `chunks_in_flight` ahead of
    <- Credit, Credit, ...                          the chunks that are loaded
    -- Finish                             ->
    <- Report                                       loaded, whole, not serving yet
    -- Commit                             ->        every worker has reported
    <- Committed
    -- End                                ->        the worker returns to vLLM

At any point `<- Failure`, or `-- Abort ->` with its answer `<- Aborted`; after a commit that turns
out to be wrong `-- Invalidate ->`, with the same answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
from datetime import datetime, timezone
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)

from qerl_sync import errors
from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import AgreementError, SyncError, TransportError
from qerl_sync.options import MapOptions, SyncOptions
from qerl_sync.stopwatch import Span

# Raised with every change of what is said here.
PROTOCOL = 12

TraceData = Annotated[
    Trace,
    PlainValidator(lambda data: data if isinstance(data, Trace) else Trace.from_json(data)),
    PlainSerializer(Trace.to_json),
]

# An error may name a file with bytes that are not UTF-8. Python keeps those as surrogates, which
# pydantic refuses to write as JSON: the error itself would be lost.
ErrorText = Annotated[
    str, AfterValidator(lambda text: text.encode(errors="backslashreplace").decode())
]

# How bytes get to a worker in another process.
Way = Literal["cuda_ipc", "shm", "tcp", "ray"]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainerSession(_Message):
    """Identifies the trainer that drives an engine. Several trainers may know the token."""

    id: str
    """Equal for all calls of one session, and for those of no other."""
    host: str
    pid: int
    since: str
    """When the session began (ISO 8601, UTC)."""

    @classmethod
    def begin(cls) -> TrainerSession:
        """Return a new session of this process."""
        return cls(
            id=secrets.token_hex(16),
            host=platform.node(),
            pid=os.getpid(),
            since=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def facts(self) -> dict[str, Any]:
        """Return the attributes of an EngineTakenError."""
        return self.model_dump(exclude={"id"})


class Hello(_Message):
    """Describes the worker, for the trainer to check that both fit together."""

    type: Literal["hello"] = "hello"
    protocol: int
    packages: dict[str, str]
    engine: str
    """Names the engine (all workers of it alike)."""
    replica: int = 0
    """Index of the data parallel replica."""
    rank: int
    world_size: int
    """`rank` of `world_size` within the replica: tensor and pipeline parallel ranks."""
    server_is_partial: bool = False
    """The engine's server controls a part of its replicas, and others the rest (vLLM's hybrid or
    external load balancing)."""
    layout: dict[str, int]
    """Parallel sizes by vLLM's names: tensor_parallel_size, ..., enable_expert_parallel."""
    model: str
    dtype: str
    quantization: str | None
    context_tokens: int = 0
    """The most that one request may have, prompt and completion together; 0: not told."""
    host: str
    """Equal for two processes that see the same shared memory, as far as can be told."""
    pid: int
    cores: list[int] = []
    """CPUs of `host` that the worker's thread is on, where it computes on them; else none."""
    device_uuid: str = ""
    """UUID of the GPU that the worker's weights are on; empty if they are elsewhere."""
    version: int
    """The weight version last committed here; 0 if none."""
    instance: str = ""
    """Names the worker's model among all that ever were: of another process, another one."""
    poisoned: ErrorText | None
    connector: str = ""
    """vLLM's connector that keeps keys and values, or embeddings, outside of the engine."""
    connector_keeps: str = ""
    """Why a sync cannot have that connector empty what it keeps; empty if it can."""
    update_open: bool
    """vLLM's update route was entered and not left: an earlier trainer died in it."""

    @property
    def place(self) -> tuple[str, int, int]:
        """Identify the worker within all engines."""
        return self.engine, self.replica, self.rank

    @property
    def process(self) -> tuple[str, int]:
        """Identify the worker's process."""
        return self.host, self.pid

    @property
    def worker(self) -> str:
        """Name the worker, for errors and reports."""
        replica = f" of replica {self.replica}" if self.replica else ""
        place = f"worker {self.rank} of {self.world_size}{replica}"
        return f"{place} (pid {self.pid}, engine {self.engine})"


class Segment(_Message):
    """A piece of shared memory: of the host's, by its name under /dev/shm, or of a GPU's."""

    model_config = ConfigDict(from_attributes=True)  # of its owner's side: `Segment.model_validate`

    name: str
    nbytes: Annotated[int, Field(gt=0)]
    handle: Annotated[str, Field(pattern=r"^([0-9a-f]{128})?$")] = ""
    """CUDA's for memory of a GPU, in hexadecimal digits; `name` is its own alone then."""


class Welcome(_Message):
    type: Literal["welcome"] = "welcome"
    transport: Way
    timeout_seconds: float
    options: dict[str, Any] = {}
    """For the transport to begin with: a probe segment, whether payloads are sealed."""


class Ready(_Message):
    type: Literal["ready"] = "ready"
    options: dict[str, Any] = {}


class Ping(_Message):
    """Answered at once, whatever the worker's thread does. A byte comes on the link, if any."""

    type: Literal["ping"] = "ping"


class Pong(_Message):
    type: Literal["pong"] = "pong"


class MapRequest(_Message):
    type: Literal["map_request"] = "map_request"
    metas: list[tuple[str, str, tuple[int, ...]]]
    options: MapOptions


class MapReply(_Message):
    type: Literal["map_reply"] = "map_reply"
    layer_map: dict[str, Any]
    free_bytes: int


class AdapterRequest(_Message):
    type: Literal["adapter_request"] = "adapter_request"
    adapter: dict[str, Any]


class AdapterReply(_Message):
    type: Literal["adapter_reply"] = "adapter_reply"


class SyncRequest(_Message):
    type: Literal["sync_request"] = "sync_request"
    digest: str
    """The plan's."""
    plan: dict[str, Any] | None
    """None where it is that of the sync before."""
    layer_map: str
    """Digest of the layer map that this worker replied."""
    held: list[int] | None
    """Indices into the plan's tensors that this trainer rank can send; None: all."""
    options: SyncOptions
    """Without `held`, which is said by index."""
    mirror: str = ""
    """Names the trainer's mirror: the worker keeps one too, under that name. Empty: it needs none.
    """
    segments: list[Segment]
    slots: list[int]
    """Bytes of each receive buffer; chunk i travels in slot i modulo their number. They are what
    `plan.staging` says for the tensors that this trainer rank can send."""


class Accepted(_Message):
    type: Literal["accepted"] = "accepted"
    owned: list[int] | None
    """Indices of the tensors that this trainer rank is to send; None: all. A tensor that several
    ranks hold is sent by the lowest of them."""


class Chunk(_Message):
    type: Literal["chunk"] = "chunk"
    index: int
    places: list[tuple[int, int]]
    """For each of its tensors, in plan order: the segment and the offset in bytes in it. Empty
    where its bytes follow the message, or come from an object store."""
    pieces: list[int] = []
    """The number of tensors in each piece of these bytes, in plan order."""
    in_place: bool = False
    """Its tensors lie where the trainer keeps its parameters, not in a slot."""
    checksums: list[int] = []
    """One for each of its tensors, in plan order, where the sync is verified by checksums."""
    changes: list[tuple[int, int]] = []
    """For each of its tensors, in plan order, how many changed elements travel instead of it, and
    the bytes of a place (`wire.mirror`); two zeros: itself. Empty: all of them travel whole."""
    segments: list[Segment] = []
    """All segments from here on, if others than before."""


class Credit(_Message):
    type: Literal["credit"] = "credit"
    index: int


class Finish(_Message):
    type: Literal["finish"] = "finish"


class Report(_Message):
    """See `WorkerReport`."""

    type: Literal["report"] = "report"
    trace: TraceData
    seconds: dict[str, float]
    peak_extra_bytes: int | None
    peak_extra_bytes_predicted: int
    peak_staged_bytes: int = 0
    kept_bytes: int = 0
    mirror_bytes: int = 0
    spans: list[Span] = []
    """Times by the worker host's clock: of all that it did where that was asked for, else of the
    layers that took longest to process."""
    quantisation: dict[str, Any] = {}


class Commit(_Message):
    type: Literal["commit"] = "commit"
    version: int


class Committed(_Message):
    type: Literal["committed"] = "committed"
    caches_overwritten: bool
    """The KV cache is empty now: requests that go on must be computed anew."""


class Abort(_Message):
    type: Literal["abort"] = "abort"
    reason: ErrorText
    keep_old: bool = True
    """No worker can have committed: with `on_failure: rollback` go back to the old version."""


class Invalidate(_Message):
    """Poison the worker: what was committed is wrong. The answer is Aborted."""

    type: Literal["invalidate"] = "invalidate"
    reason: ErrorText


class Aborted(_Message):
    type: Literal["aborted"] = "aborted"
    poisoned: ErrorText | None
    """Why the worker refuses to run; None: it was not touched and goes on with what it has."""


class Failure(_Message):
    type: Literal["failure"] = "failure"
    error: str
    """The name of a class in `qerl_sync.errors`."""
    text: ErrorText
    facts: dict[str, ErrorText | int | float | tuple[int, ...]] = {}
    """The error's attributes."""


class End(_Message):
    type: Literal["end"] = "end"


Message = (
    Hello
    | Welcome
    | Ready
    | Ping
    | Pong
    | MapRequest
    | MapReply
    | AdapterRequest
    | AdapterReply
    | SyncRequest
    | Accepted
    | Chunk
    | Credit
    | Finish
    | Report
    | Commit
    | Committed
    | Abort
    | Invalidate
    | Aborted
    | Failure
    | End
)
_MESSAGES: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


def encode(message: Message) -> bytes:
    return message.model_dump_json().encode()


def decode(frame: bytes) -> Message:
    """Parse a message.

    Raises:
        TransportError: it is no message of this protocol.
        AgreementError: it is the first one of another protocol.
    """
    try:
        return _MESSAGES.validate_json(frame)
    except ValidationError as exc:
        with contextlib.suppress(ValueError):
            said = json.loads(frame)
            theirs = said.get("protocol") if isinstance(said, dict) else None
            if isinstance(theirs, int) and theirs != PROTOCOL and said.get("type") == "hello":
                raise AgreementError(
                    f"a worker speaks protocol {theirs} (packages: {said.get('packages')!r}), the "
                    f"trainer {PROTOCOL}; install the same qerl-sync for both",
                    subject="protocol",
                ) from exc
        first = exc.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise TransportError(
            f"a message arrived that this version does not understand ({place}: {first['msg']}); "
            "install the same qerl-sync for trainer and workers"
        ) from exc


def failure(error: BaseException) -> Failure:
    """Return the message for an error that is to be raised again on the other side."""
    kind = type(error).__name__ if isinstance(error, SyncError) else "TransportError"
    text = str(error) if isinstance(error, SyncError) else f"{type(error).__name__}: {error}"
    reported = {name: fact for name, fact in vars(error).items() if _is_plain(fact)}
    return Failure(error=kind, text=text, facts=reported)


def _is_plain(fact: object) -> bool:
    if isinstance(fact, tuple):  # a shape
        return all(isinstance(one, int) for one in fact)
    return isinstance(fact, (str, int, float))


def error_of(reported: Failure, who: str) -> SyncError:
    """Return the other side's error, with its own class."""
    kind = getattr(errors, reported.error, None)
    if not (isinstance(kind, type) and issubclass(kind, SyncError)):
        kind = TransportError
    return kind(f"{who}: {reported.text}", **reported.facts)
