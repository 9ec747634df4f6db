"""The configuration models. Unknown keys fail; the text under each field is its documentation."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)
from typing_extensions import Self

from qerl_sync.config.contradictions import contradictions_of_sync
from qerl_sync.config.violations import Contradictions, config_error, schema_violations
from qerl_sync.errors import ConfigError
from qerl_sync.meta import parse_bytes
from qerl_sync.plan.orders import parse_order


@contextmanager
def _pydantics(otherwise: str = "") -> Iterator[None]:
    """Raise the ValueError that pydantic expects of a validator in place of our ConfigError."""
    try:
        yield
    except ConfigError as exc:
        raise ValueError(f"{exc}{otherwise}") from exc


def _bytes(value: object) -> object:
    """Convert texts such as "64MiB" and numbers to bytes; keep None."""
    if not isinstance(value, int | float | str):
        return value
    with _pydantics():
        return parse_bytes(value)


def _budget(value: Any) -> Any:
    """Convert like `_bytes`; also accept "auto"."""
    if value is None or value == "auto":
        return value
    with _pydantics(", or auto"):
        return parse_bytes(value)


def _known_order(value: str) -> str:
    with _pydantics():
        parse_order(value)
    return value


def _server_url(value: str | None) -> str | None:
    if value is not None and not value.startswith(("http://", "https://")):
        raise ValueError(f"{value!r} is no address of a server; write http://127.0.0.1:8000")
    return value


def require_announced(address: str) -> None:
    """Raise ConfigError for 0.0.0.0 and the like: a server can listen there, but no client can
    connect.
    """
    try:
        numeric = socket.getaddrinfo(address or "0.0.0.0", None, flags=socket.AI_NUMERICHOST)
    except OSError:  # a name, which is resolved when it is used
        return
    if ip_address(numeric[0][4][0]).is_unspecified:
        raise ConfigError(
            f"workers connect to the trainer's address, and {address or 'an empty one'} is no "
            "address of a machine; give one under which they reach this machine (`hostname -I` "
            "lists its own), or 127.0.0.1 where all are on it. trainer_bind: 0.0.0.0 listens on all"
        )


def _announced(value: str) -> str:
    address = value.strip("[]")
    with _pydantics():
        require_announced(address)
    return address


def _absolute(value: str | None) -> str | None:
    if value is not None and not PurePosixPath(value).is_absolute():
        raise ValueError(
            f"{value!r} is not an absolute path; workers have directories of their own"
        )
    return value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


# Every wait ends. What select and poll can wait for is bounded too; eleven days are within it.
Seconds = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of all sections: closed and immutable. The text under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def of(cls, **options: Any) -> Self:
        """Return the section with these fields.

        Raises:
            ConfigError: lists every option that is unknown or has a wrong value.
        """
        try:
            return cls(**options)
        except ValidationError as exc:
            raise config_error(cls.__name__, schema_violations(exc, cls)) from exc

    @classmethod
    def given(cls, config: Self | None, options: Mapping[str, Any]) -> Self:
        """Return `config`, or where it is None the section with the fields `options`.

        Raises:
            ConfigError: both are given, or as `of`.
        """
        if config is None:
            return cls.of(**options)
        if options:
            raise ConfigError(
                f"give either a {cls.__name__} or its fields, not both ({', '.join(options)})"
            )
        return config

    def _exactly_one_of(self, first: str, second: str) -> None:
        given = [name for name in (first, second) if getattr(self, name) is not None]
        if len(given) != 1:
            what = "both are given" if given else "neither is given"
            raise ValueError(f"needs exactly one of {first!r} and {second!r}; {what}")


class NoiseConfig(Section):
    """QeRL's adaptive quantisation noise (arXiv 2510.11696): Gaussian noise on the RMSNorm weights
    that the rollout engines get, drawn anew for each sync. The trainer's own weights stay as they
    are, and each sync starts from them."""

    preset: Literal["scripts", "table-4", "section-4.1"] | None = None
    """The paper's standard deviations, which conflict: 1e-2 to 1e-4 in its training scripts
    (`scripts`), 1e-2 to 5e-4 in table 4 of its appendix E (`table-4`), 5e-2 to 5e-4 in its section
    4.1 (`section-4.1`). Null: `sigma_start` and `sigma_end`."""

    sigma_start: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The standard deviation of the first stage."""

    sigma_end: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """That of the last stage, at most `sigma_start`. Between them it falls geometrically: `sigma(k)
    = sigma_start * (sigma_end / sigma_start) ** ((k - 1) / (K - 1))` (the paper's equation 8)."""

    intervals: Annotated[int, Field(ge=2)] = 10
    """The run is divided into so many even intervals. The first has no noise; the others are the
    stages k = 1 to K."""

    steps: PositiveInt | None = None
    """The steps of the run. Null: as many as the trainer will make (TRL tells it)."""

    seed: NonNegativeInt | None = None
    """With the weight version and a tensor's name it determines the noise, which can be made again
    from a report (`qerl_sync.noise_of`). Null: the trainer's seed."""

    names: Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)] = (
        "*.input_layernorm.weight",
        "*.post_attention_layernorm.weight",
    )
    """Checkpoint names (`fnmatch` patterns) of RMSNorm weights. The default has the paper's: those
    before attention and before the MLP, as Llama, Qwen and Mistral name them."""

    @model_validator(mode="after")
    def _one_range(self) -> Self:
        ends = {"sigma_start": self.sigma_start, "sigma_end": self.sigma_end}
        given = [name for name, value in ends.items() if value is not None]
        if self.preset is None and len(given) < 2:
            raise ValueError("needs a preset, or both sigma_start and sigma_end")
        if self.preset is not None and given:
            raise ValueError(f"the preset has its own {given[0]}; leave one of them out")
        start, end = self.sigma_start or 0.0, self.sigma_end or 0.0
        if end > start:
            raise ValueError(
                f"sigma_end is {end:g} and sigma_start {start:g}, and the noise must not grow; "
                "exchange them, or make them equal"
            )
        if self.steps is not None and self.intervals > self.steps:
            raise ValueError(
                f"{self.intervals} intervals do not fit into {self.steps} steps; each needs one"
            )
        return self


class SyncConfig(Section):
    """How weights go from the trainer to vLLM.

    Example:
        config = SyncConfig.of(policy="reorder", chunk_bytes="64MiB", verify="checksum")
        with SyncSession(HFSource(model), transport, config) as session:
            session.push(step=1)
    """

    policy: Literal["warn", "reorder", "spill", "error"] = "reorder"
    """What to do about a source whose order would keep several parent layers open in vLLM.
    `reorder` sends the tensors grouped by parent layer, so that at most one is open; `spill`, for
    sources whose order nobody can change, keeps it, and has the worker hold in host memory what
    arrives too early, so that at most one is open there too; `warn` keeps the source's order and
    says, before the first sync, what it costs; `error` refuses it."""

    source_order: Annotated[str, AfterValidator(_known_order)] = "hf"
    """The order in which the source yields its tensors, for trying out bad ones: `hf` (as
    `named_parameters` does), `alphabetical`, `size` (largest first), `optimizer` (matrices, then
    vectors), `random:SEED`, `interleaved:N` (N producers taking turns)."""

    chunk_bytes: Annotated[PositiveInt | None, BeforeValidator(_bytes)] = None
    """Upper bound of one chunk, the unit of transfer, as a number or like `64MiB`. A chunk holds
    whole parent layers; a larger layer is a chunk of its own. Null: 64 MiB; in the trainer's own
    process (`inproc`), where nothing is copied, everything is one chunk unless the policy is
    `spill`."""

    load: Literal["auto", "layerwise"] = "auto"
    """How a worker gets tensors into the memory that its kernels read. `auto`: parent layers whose
    kernels read what vLLM's loaders write (norms, and unquantised layers whose kernels pack
    nothing) are written straight there, tensor by tensor: nothing is buffered, materialised or
    copied a second time, and the order does not matter. Which layers these are is observed on the
    live engine. All others, and all of them with `layerwise`, go through vLLM's layerwise reload.
    Loaders that write past that reload (GPT-OSS) need `auto`."""

    delta: Literal["off", "layers", "elements"] = "off"
    """What need not travel again. `off`: everything travels with each sync. `layers`: parent layers
    of which no byte has changed since the last committed sync stay as they are on the workers; a
    worker that does not hold that version gets everything. The trainer hashes its weights before
    each sync (XXH3, 64 bits), frozen ones only once and when they are written to: worth it where
    much is frozen, or the way is slow. With full training nearly every layer changes with each
    step. Not for sharded models, whose hashes would need a gather. `elements`: of the layers that
    have changed, only the changed elements and their places travel, where that is smaller: over
    `tcp` and `ray`. Workers put them into their copy of what was sent last and load the layers from
    there, exactly as if they had come whole, whatever the kernels' format. It costs host memory, as
    much as the weights have as they are sent: on the trainer, which compares with it, and on each
    worker rank (`mirror_bytes` in the report; see `mirror_budget_bytes`). Where nothing is copied
    over a network (colocated engines, `shm`, `cuda_ipc`), or several trainer ranks send,
    `elements` is `layers`; the report says so."""

    mirror_budget_bytes: Annotated[PositiveInt | None, BeforeValidator(_bytes)] = None
    """With `delta: elements`: upper bound of the host memory that keeps what was sent last, on the
    trainer and on each worker rank. What it takes is known before the first byte, and more is
    refused. Null: as much as it takes, if it is free."""

    budget_bytes: Annotated[PositiveInt | Literal["auto"] | None, BeforeValidator(_budget)] = None
    """Upper bound of the memory that tensors may hold on a worker while they wait for the rest of
    their parent layer: a number, a text like `512MiB`, or `auto`. With `policy: reorder` the
    source's order is then kept as far as the budget allows, instead of grouping all tensors by
    parent layer, and a budget smaller than what one parent layer needs is refused before anything
    is sent. With `warn` and `error` the budget is what the order is judged by, not a second open
    layer. What counts are pinned bytes: each storage once, in whole, however small the view of it.
    vLLM needs about as much again while it processes a layer. `auto`: half of the memory that is
    free on the fullest worker when the sync is planned, plus what the trainer's own weights occupy
    if they are handed over by reference (colocated), since that costs nothing new."""

    spill_budget_bytes: Annotated[PositiveInt | None, BeforeValidator(_bytes)] = None
    """With `policy: spill`: upper bound of the host memory in which a worker keeps tensors that
    wait for the rest of their parent layer. What the source's order needs is known beforehand; a
    smaller budget is refused before anything is sent. Null: as much as it needs, if it is free."""

    spill_directory: Annotated[str | None, AfterValidator(_absolute)] = None
    """With `policy: spill`: a directory on the workers' hosts; tensors wait in files there instead
    of in memory. It must exist and belong to the user whom the workers run as (or be like /tmp).
    The files have no names, so that nothing is left behind, however a worker ends."""

    transport: Literal["auto", "inproc", "cuda_ipc", "shm", "tcp", "ray"] = "auto"
    """How chunks reach vLLM workers in other processes. `cuda_ipc`: memory of the GPU that trainer
    and worker are both on, `chunks_in_flight` chunks of it during a sync, which are the trainer's;
    `shm`: shared memory, same host only; `tcp`: the connection that each
    worker has to the trainer, any host; `ray`: Ray's object store, for engines in Ray actors;
    `auto`: memory of the GPU where a worker is on the one that the trainer's tensors are on and can
    map it, else shared memory where a worker can open the trainer's and /dev/shm has room for the
    chunks in flight (Docker gives it 64 MB), elsewhere Ray's object store in Ray actors and TCP for
    the rest; the report says which and why. An engine in the trainer's own process
    (`rollout.mode: colocate`) gets tensors by reference, `inproc`."""

    chunks_in_flight: PositiveInt = 2
    """How many chunks may be on their way or being loaded at once. Two overlap gathering and
    sending with loading. Each costs as much memory as its largest chunk."""

    when: Literal["lazy", "eager"] = "lazy"
    """When a TRL trainer's weights are sent. `lazy`: when TRL asks for them, before it generates.
    `eager`: right after the optimizer step, in a thread, beside what the trainer does before it
    generates again: logging, checkpoints, other callbacks. TRL then finds the weights there, or
    waits for the rest (`sync/seconds/waited`). No weight changes while it is sent: the optimizer's
    next step waits too. How often TRL asks is seen in the first steps, which are lazy. `eager` is
    refused in several trainer processes, with DeepSpeed, with engines that sleep, with
    `verify: full`, and with `rollout.max_staleness`. It gains nothing where a trainer generates at
    once, and little where trainer and engine want the same cores."""

    timeout_seconds: Seconds = 300.0
    """How long either side waits for the other, for each message and each call. Several trainer
    processes wait twice as long for each other. At most a million seconds: every wait ends."""

    trainer_address: Annotated[str, AfterValidator(_announced)] = "127.0.0.1"
    """The address, IPv4 or IPv6, or the name under which workers reach the trainer. Set it where
    they are on other hosts. The trainer listens there, and only there, unless `trainer_bind` says
    otherwise. With `rollout.mode: ray` the default leaves it to Ray: the address of the trainer's
    node, where the cluster has several."""

    trainer_bind: str | None = None
    """The address that the trainer listens on, where workers reach it under another: in a container
    whose port is published, behind NAT. `0.0.0.0` or `::` is every address of this machine. Null:
    `trainer_address`."""

    trainer_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """The port that the trainer listens on, for a firewall or a published port; workers are told
    the same. With `rollout.mode: ray`, the first: each rollout actor takes one. 0: a free one."""

    pause_mode: Literal["keep", "wait", "abort"] = "keep"
    """What becomes of requests in flight on a server during a sync: `keep`, they wait and go on
    with the new weights; `wait`, the sync waits for them to finish; `abort`, they end."""

    recompute_running: bool = True
    """With `pause_mode: keep`: forget the cached keys and values of requests in flight, so that
    what they have so far is computed anew with the new weights. False leaves them as they are; vLLM
    then keeps its whole prefix cache too, for as long as requests are in flight, and later requests
    may reuse what the old weights computed."""

    check_finite: bool = True
    """Refuse NaN and infinite weights (a tensor without dimensions may be infinite: Gemma 4 has
    such bounds), and values that would become infinite in the dtype that the engine computes in,
    such as 70,000 in float16; the latter are found on the worker. vLLM would accept them, and NaN
    stays in its KV cache after the weights have healed. A chunk is looked at before it leaves,
    ahead of those that travel and are loaded: what is found in the first leaves the engine on its
    old weights, what is found later ends the sync (see `on_failure`). Where trainer and engine
    share a process, all is looked at before the first tensor is loaded."""

    verify: Literal["off", "coverage", "checksum", "full"] = "coverage"
    """How far a sync is verified before it is committed.

    `off`: each tensor of the plan arrives once, with its name, dtype and shape. Seen: tensors that
    are missing, doubled or misshapen. Not seen: a layer that vLLM filled otherwise than planned.

    `coverage`, besides: each parent layer got the elements that the dry run counted, and was
    processed once. Not seen: values. It costs nothing that can be measured.

    `checksum`, besides: the XXH3 hash (64 bits) of each tensor's bytes, taken from the trainer's
    own before it is sent, must be that of what arrives: any byte that changed or moved is seen. And
    from sync to sync what each layer's kernel holds, packed copies included, must have changed
    where its tensors have, and nowhere else. Not seen: wrong values that changed all the same (a
    transposed shard), and on the first sync, which has nothing to be compared with, a kernel that
    did not change. A packed copy is compared by its product with a fixed vector, which hides what
    is below that product's rounding. It reads all weights about four times, at the speed of
    memory on one core; the report says what it took (`seconds.verify`).

    `full`, besides: the engine's log-probabilities of a fixed prompt must be those of the trainer's
    model, within `verify_tolerance`. Not seen: weights that the prompt does not use (experts, a
    vision tower), and what moves the answer by less than the tolerance. The engine is asked when it
    runs again, and is poisoned if it differs or cannot be asked, so that it may have answered
    others for the moment that this takes."""

    verify_tolerance: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """With `verify: full`: by how much a log-probability may differ. Null: what rounding explains
    in the dtype that the engine computes in: 1e-4 in float32, 0.03 in float16, 0.15 in bfloat16. A
    quantised engine needs a number."""

    on_failure: Literal["poison", "rollback"] = "poison"
    """What a worker does when a sync fails in the middle. `poison`: it refuses to generate until
    a full sync has succeeded. `rollback`: it goes back to the old weights, exactly, and serves
    them. For that it keeps the old weights of each layer that is written to, during the sync: as
    much host memory as the model has weights (the report says how much, `kept_bytes`), which must
    be free before anything is touched. A worker that cannot know whether others have committed is
    poisoned all the same."""

    lora: Literal["auto", "adapter", "merge"] = "auto"
    """How a model with PEFT's LoRA adapters is synced. `adapter`: the engine gets the adapter
    itself, in memory, and what trains beside it; the base weights travel unmerged, once, and where
    a worker does not hold them (it is new, was poisoned, or synced by another session). The engine
    needs `enable_lora` and a `max_lora_rank` of at least the adapter's, which TRL's colocated
    engine gets by itself. It serves the adapter to every request that names none; requests with
    an adapter of their own need a `max_loras` larger by one. What vLLM computes otherwise than PEFT
    (DoRA, biases of the adapter, parameters of fused experts) is refused by name. `merge`: the
    engine gets the base model's weights with the adapters merged into them. A merged tensor is made
    in float32, rounded once to the base weight's dtype, sent and freed; the trainer's own weights
    are never written to. After the first sync only parent layers that an adapter touches travel,
    and those that are trained beside it. `auto`: `adapter` where the engine serves it exactly, else
    `merge`; the report says which and why (`lora`). Without adapters it has no effect."""

    lora_base: Literal["trainer", "engine"] = "trainer"
    """Whose base weights the engine adds an adapter to. `trainer`: they are sent, as `lora` says.
    `engine`: those that it has loaded itself, which never travel; the adapter does, with what
    trains beside it and what has `noise`. It is for engines whose checkpoint is quantised (GPTQ,
    AWQ, compressed-tensors) and cannot take the trainer's base: docs/quantisation.md. That the
    checkpoint was made of the trainer's base is then the user's word."""

    noise: NoiseConfig | None = None
    """Noise for exploration on the RMSNorm weights that the engines get: see `sync.noise` below and
    docs/qerl.md. With adapters the noisy norms travel beside the adapter, in the same sync.
    Evaluation generates without noise. `verify: checksum` holds what arrives against the noisy
    norms, and `full` the engine against the trainer's model with the same noise. Null: none, and
    what is sent is the trainer's to the bit."""

    on_unchanged: Literal["warn", "error", "ignore"] = "warn"
    """What to do about a sync that brings nothing new although the trainer's step has moved: the
    source reads another model than the one that is trained, or an adapter is never merged. Where
    the session knows the trainer's own parameters (TRL's callback tells it) the names that changed
    there and did not travel are given, and some that never travel are noticed too; frozen ones are
    no finding, nor is a step that changes nothing anywhere, unless three in a row do. `error`
    raises UnchangedError after the sync: workers hold what was sent. A few thousand elements of
    each tensor are compared."""

    ignore_names: tuple[str, ...] = ()
    """Checkpoint names (`fnmatch` patterns) that vLLM is known to ignore: they are not sent, and
    their having no parent layer is no error."""

    allow_incomplete: tuple[str, ...] = ()
    """Parent layers (`fnmatch` patterns) that may be loaded without receiving all their
    elements, because the checkpoint does not have them."""

    record_directory: str | None = None
    """A directory in which each sync leaves its report (`syncs.jsonl`, `failures.jsonl`) and the
    last ones, and those in which something was unusual, what they held tensor by tensor
    (`traces/`): what `qerl-sync report` and `qerl-sync explain` read. `qerl-sync train` sets it to
    `output_dir`. Null: nothing is written."""

    trace: PositiveInt | None = None
    """Record when trainer and workers did what in one sync, the N-th that this process makes, and
    write it into `record_directory` as `trace-N.json`, which chrome://tracing and
    https://ui.perfetto.dev show. On a GPU, what is launched is timed, not what it runs for. Null:
    none."""

    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Serve Prometheus metrics of the syncs on this port of the (main) trainer process, with
    prometheus_client; docs/metrics lists them. Null: none are served."""

    metrics_address: str = "127.0.0.1"
    """The address of this machine on which `metrics_port` is opened. Metrics need no
    authentication: `0.0.0.0` shows them to all that reach this machine."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        violations = contradictions_of_sync(self.model_dump())
        if violations:
            raise Contradictions(violations)
        return self


class TinyModelConfig(Section):
    """A small model with random weights and a tokenizer of its own, made when the run starts."""

    architecture: str = "qwen3"
    """A transformers model type, for instance `qwen3`, `llama` or `qwen3_moe`."""

    config: dict[str, Any] = {}
    """Arguments of that type's transformers configuration class, as they are: `hidden_size`,
    `num_hidden_layers`, `tie_word_embeddings` and so on. The vocabulary size and the special tokens
    come from the tokenizer."""

    vocab_size: Annotated[int, Field(ge=258)] | None = None
    """Null: the tokenizer has one token for each character that occurs in the data. A number: it is
    a byte-level BPE of that size trained on the data, at least 258 (256 bytes, two special
    tokens)."""


class ModelConfig(Section):
    """The policy: a checkpoint, or a tiny model made on the spot."""

    path: str | None = None
    """A Hugging Face hub id or a local directory with model and tokenizer."""

    tiny: TinyModelConfig | None = None
    """A tiny model made on the spot, in place of `path`."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype of the trainer's weights, and of the engine's unless `rollout.engine.dtype` says
    otherwise. In float32 the log-probabilities of both can be held against each other."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        self._exactly_one_of("path", "tiny")
        return self


class DataConfig(Section):
    """The prompts. All columns of the data set reach the reward functions."""

    path: str | None = None
    """A Hugging Face hub id, or a local `.jsonl`, `.json`, `.parquet` or `.csv` file."""

    task: Literal["addition"] | None = None
    """A data set made in memory, in place of `path`. `addition`: sums such as `3+4=`, whose answer
    has one digit."""

    size: PositiveInt = 4096
    """Number of prompts of a `task`."""

    split: str = "train"
    """The split of the data set at `path`, if that is no single file."""

    subset: str | None = None
    """The configuration name of a hub data set that has several."""

    prompt_column: str = "prompt"
    """The column with the prompts: texts, or lists of chat messages."""

    answer_column: str = "answer"
    """The column with the right answers, which the warm-up and the built-in rewards read as
    `answer`. It may be missing where neither is used."""

    eval_size: NonNegativeInt = 0
    """Number of rows held out for evaluation, which `trainer.eval_strategy` needs."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        self._exactly_one_of("path", "task")
        return self


class WarmupConfig(Section):
    """Supervised steps on (prompt, answer) before the reinforcement learning, with TRL's
    `SFTTrainer`: a model that never gives a right answer has nothing to reinforce."""

    trainer: dict[str, Any] = {}
    """Arguments of TRL's `SFTConfig`, as they are."""


class RolloutConfig(Section):
    """The vLLM engine that generates the completions."""

    mode: Literal["colocate", "subprocess", "server", "ray"] = "colocate"
    """`colocate`: the engine lives in the trainer's process; `subprocess`: in a process of its own,
    started and driven by the trainer; `server`: it is a vLLM OpenAI server, reached over HTTP;
    `ray`: trainer and engines are Ray actors, see the section `ray`."""

    engine: dict[str, Any] = {}
    """vLLM engine arguments, as they are: `dtype`, `enforce_eager`, `quantization`,
    `max_model_len` and so on, in all modes. They override what TRL passes."""

    server_url: Annotated[str | None, AfterValidator(_server_url)] = None
    """With `mode: server`, the address of a server that runs, such as `http://127.0.0.1:8000`;
    `qerl-sync serve` starts one. Null: the run starts one itself, on this machine, with the
    arguments in `engine`, and stops it when it ends."""

    server_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """The port of the server that the run starts. Null: a free one."""

    start_timeout_seconds: Seconds = 600.0
    """With `mode: server` or `ray`, how long the run waits until the engines answer. With `ray`
    also how long it waits for a worker that is restarted, where no other is left."""

    generate_timeout_seconds: Seconds = 1800.0
    """With `mode: ray`, how long a rollout actor may take for its share of the completions. One
    that takes longer is taken for lost: the others generate its share, and it gets a full sync when
    it answers again."""

    workers: PositiveInt = 2
    """With `mode: ray`, the number of rollout actors, each with an engine. Completions are divided
    between those that are on the newest weights."""

    max_restarts: Annotated[int, Field(ge=-1)] = -1
    """With `mode: ray`, how often a rollout actor that died is started again; -1: always. It
    generates after its first full sync."""

    max_staleness: NonNegativeInt = 0
    """With `mode: ray`, how many weight versions completions may be behind when they are trained
    on. 0: generating and training take turns. N: the completions of the next N batches are
    generated while the trainer trains; those that are older than N versions are made anew."""

    async_engine: bool = False
    """With `mode: ray`, for `max_staleness`: each rollout actor has an `AsyncLLM`, in a process of
    its own, and a sync does not wait for completions that are being generated. They pause, and go
    on with the new weights (`sync.pause_mode`); the version that counts is the one at which they
    were asked for."""


class RayConfig(Section):
    """The cluster of `rollout.mode: ray`, and what the actors take of it."""

    address: str | None = None
    """`host:port` of a cluster's head, or `auto` for the one that runs on this machine. Null: the
    run starts one here, and stops it when it ends."""

    num_cpus: PositiveInt | None = None
    """CPUs of the cluster that the run starts; they are tickets that actors take, not cores. Null:
    as many as the actors need, or this machine has."""

    object_store_bytes: Annotated[PositiveInt, BeforeValidator(_bytes)] = 512 << 20
    """The object store of the cluster that the run starts."""

    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How the actors are spread over nodes, in Ray's words."""

    placement_seconds: Seconds = 60.0
    """How long to wait until the cluster has room for all actors."""

    trainer: dict[str, Any] = {}
    """Options of the trainer actor, as Ray has them: `num_cpus` (1), `num_gpus`, `resources`."""

    rollout: dict[str, Any] = {}
    """Options of each rollout actor: `num_cpus` (1), `num_gpus`, `resources`, `runtime_env`."""


class TrainConfig(Section):
    """One run of `qerl-sync train`.

    Example:
        config = load_config("configs/grpo_cpu.yaml", ["trainer.max_steps=20"])
        assert isinstance(config, TrainConfig)
        print(config.sync.policy, config.output_dir)
    """

    model: ModelConfig
    """The policy that is trained."""

    data: DataConfig
    """The prompts it is trained on."""

    reward: Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]
    """One reward function or a list of them: `package.module:function` with TRL's signature
    (`prompts, completions, **columns` to a list of numbers), or a built-in: `exact_match`, 1 where
    the completion is the answer; `final_number`, 1 where the last number of both is the same."""

    trainer: dict[str, Any] = {}
    """Arguments of TRL's `GRPOConfig`, as they are."""

    peft: dict[str, Any] | None = None
    """Train LoRA adapters in place of all weights: arguments of PEFT's `LoraConfig`, as they are
    (`r`, `lora_alpha`, `target_modules` and so on). Null: all weights. See `sync.lora`. A warm-up
    trains all weights, before the adapters are made."""

    rollout: RolloutConfig = RolloutConfig()
    """The engine that generates."""

    sync: SyncConfig = SyncConfig()
    """How the trainer's weights reach the engine."""

    ray: RayConfig = RayConfig()
    """Where actors run, with `rollout.mode: ray`."""

    warmup: WarmupConfig | None = None
    """A supervised warm-up. Null: none."""

    output_dir: str
    """Where checkpoints, reports and plots go."""

    seed: int = 0
    """Seeds the model's weights, the task's data, the warm-up, the training and the sampling."""

    threads: PositiveInt | None = None
    """CPU threads of trainer and engine; null leaves it to torch. Tiny models are faster on one,
    and much faster where other programs compete for the cores."""
