"""Every error that qerl-sync raises on purpose.

    SyncError
    ├── ConfigError         a YAML file, an option or an argument is wrong
    │   └── FileError           a file or directory cannot be used
    ├── CompatError         the installed vLLM or TRL lacks something that a sync needs
    ├── LayerMapError       vLLM refused, ignored or lost a checkpoint tensor in the dry run
    ├── PlanError           no plan satisfies what was asked (policy, budget, doubled names)
    ├── CoverageError       the stream and the plan differ: missing, doubled, misshapen, non-finite
    ├── UnchangedError      a sync brought nothing new although the trainer has gone on
    ├── LoadError           vLLM's own loader failed in the middle of a sync
    ├── AgreementError      trainer and worker differ: versions, layout, plan, token
    │   ├── EngineTakenError    another trainer's session holds the engine
    │   ├── StaleBaseError      a sync of a part of the model meets a worker without the rest
    │   └── WorldSizeError      an engine has more workers, or fewer, than have connected
    ├── TransportError      tensors or messages do not get through
    │   ├── TransportTimeout    the other side did not answer in time
    │   ├── PeerLostError       the other side is gone
    │   ├── IntegrityError      bytes arrived that the other side did not send
    │   └── NoRoomError         shared memory has less room than the sync needs
    ├── PublicationError    weights as files cannot be written or read
    │   └── PublisherTakenError another publisher writes to the same directory
    ├── StaleCacheError     an engine keeps what old weights have computed
    ├── TrainerRankError    a trainer rank failed with an error of other code
    └── PoisonedError       the worker holds half of a sync and refuses to generate

Each message names the thing, the value and the next step. Errors of vLLM, TRL and torch are
translated once, where they enter, with ``from exc``.
"""


class SyncError(Exception):
    """Base of all errors that qerl-sync raises on purpose.

    Example:
        try:
            session.push(step=1)
        except SyncError as error:
            print(type(error).__name__, error, vars(error))

    Args:
        facts: what the message says, as attributes. They survive pickling, and the way from a
            worker to its trainer.
    """

    def __init__(self, text: str = "", **facts: object) -> None:
        super().__init__(text)
        vars(self).update(facts)


class ConfigError(SyncError):
    """A configuration file, an option or an argument cannot be right.

    Example:
        try:
            load_config("run.yaml")
        except ConfigError as error:
            for place, message in error.violations:
                print(place, message)

    Attributes:
        violations: (place, message) of each, where a configuration was checked as a whole.
        place: the option that is wrong, where it is one alone.
    """

    violations: tuple[tuple[str, str], ...] = ()
    place: str = ""


class FileError(ConfigError):
    """A file or directory is missing, damaged, full, read-only, or of another kind.

    Attributes:
        path: the file or directory; None where nothing says which.
        tensor: the checkpoint name that it has wrong, or lacks.
    """

    path: str | None = None
    tensor: str | None = None


class CompatError(SyncError):
    """The installed vLLM or TRL lacks something that a sync needs.

    Attributes:
        missing: the names of what is missing, where these are known.
        version, window: the vLLM that was found, and the versions that were run.
    """

    missing: tuple[str, ...] = ()
    version: str = ""
    window: str = ""


class LayerMapError(SyncError):
    """vLLM refused, ignored or lost a checkpoint tensor while the layer map was observed.

    Attributes:
        tensor: its checkpoint name.
        expected, got: the shape that vLLM's model has for it, and its own, where vLLM refused it.
    """

    tensor: str | None = None
    expected: tuple[int, ...] | None = None
    got: tuple[int, ...] | None = None


class PlanError(SyncError):
    """No plan satisfies what was asked for.

    Attributes:
        needed_bytes: the least budget that would do, where one is too small.
        layer: the parent layer that needs as much.
        tensor: the checkpoint name that the source yields twice.
    """

    needed_bytes: int | None = None
    layer: str | None = None
    tensor: str | None = None


class CoverageError(SyncError):
    """Raised where what arrived is not what the plan promised.

    Attributes:
        tensor: the checkpoint name of the tensor that is wrong.
        layer, expected, got: the parent layer that a plan brings a part of, its elements, and how
            many of them come.
        engine, gap: the engine with log-probabilities that differ most from the trainer's, and by
            how much (`sync.verify: full`).
    """

    tensor: str = ""
    layer: str = ""
    expected: int = 0
    got: int = 0
    engine: str = ""
    gap: float = 0.0


class UnchangedError(SyncError):
    """A sync was committed and brought nothing new, or not all, although the trainer has gone on.

    The workers hold exactly what was sent, and serve it: what was sent is in question.
    """


class LoadError(SyncError):
    """vLLM's own loader failed in the middle of a sync."""


class AgreementError(SyncError):
    """Trainer and worker differ in something that both must agree on before a byte moves.

    Attributes:
        subject: in what: token, version, protocol, call, session, endpoint, place, layer_map, plan,
            slots, memory, ..., or the field in which workers differ (model, dtype, ...).
    """

    subject: str = ""


class EngineTakenError(AgreementError):
    """Another trainer's session holds the engine, and that trainer is alive.

    Attributes:
        host, pid: of that trainer.
        since: when its session began (ISO 8601, UTC).
    """

    host: str
    pid: int
    since: str


class StaleBaseError(AgreementError):
    """A sync of a part of the model was refused: the worker does not hold the rest of it.

    Nothing was touched. A session sends everything then.

    Attributes:
        base: the version that the sync builds on.
        version: the worker's own.
    """

    base: int = 0
    version: int = 0


class WorldSizeError(AgreementError):
    """The workers that have connected are not all the workers that the engine has.

    Attributes:
        connected, expected: how many.
    """

    connected: int
    expected: int


class TransportError(SyncError):
    """Tensors or messages do not get from one side to the other.

    Example:
        try:
            session.push(step=1)
        except TransportError:  # TransportTimeout and PeerLostError included
            session.push(step=1)  # the next push is a full sync
    """


class TransportTimeout(TransportError):
    """The other side did not answer within the time that it is given."""


class PeerLostError(TransportError):
    """The other side closed the connection or died.

    Attributes:
        exit_code: of its process, where that is known; 128 + N: signal N ended it.
    """

    exit_code: int | None = None


class IntegrityError(TransportError):
    """Bytes arrived that the other side did not send, or not then: they were changed on the way."""


class NoRoomError(TransportError):
    """Shared memory has less room than is needed.

    Attributes:
        needed_bytes, free_bytes: of it.
        transport: for which one: `shm` (/dev/shm) or `cuda_ipc` (the GPU).
    """

    needed_bytes: int = 0
    free_bytes: int = 0
    transport: str = "shm"


class PublicationError(SyncError):
    """Raised where weights as files cannot be written, or none of them can be read.

    Attributes:
        path: the file or directory.
        version: the published version that it is about; 0: none.
    """

    path: str = ""
    version: int = 0


class PublisherTakenError(PublicationError):
    """Raised where another publisher writes to the same directory."""


class StaleCacheError(SyncError):
    """An engine keeps keys, values or embeddings of old weights where a sync cannot remove them.

    Attributes:
        connector: the class name of the vLLM connector that keeps them.
    """

    connector: str = ""


class TrainerRankError(SyncError):
    """A trainer rank raised something else than a SyncError in a sync of several ranks.

    Every rank raises it; on the one that failed, it has the original as its cause.

    Attributes:
        rank: which one.
        error: the class name of what it raised.
    """

    rank: int
    error: str


class PoisonedError(SyncError):
    """The worker holds half of a sync and refuses to generate until a full one has succeeded.

    Example:
        try:
            llm.generate(prompts)
        except PoisonedError:
            session.push(step=1)
            llm.generate(prompts)
    """
