"""What can be configured. Unknown keys fail; the text under each field is its documentation."""

from __future__ import annotations

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

from qerl_sync.config.violations import config_error, schema_violations
from qerl_sync.errors import ConfigError
from qerl_sync.meta import parse_bytes
from qerl_sync.plan.orders import parse_order


def _bytes(value: object) -> object:
    """Texts such as "64MiB" and numbers become bytes; None stays."""
    if not isinstance(value, int | float | str):
        return value
    try:
        return parse_bytes(value)
    except ConfigError as exc:
        raise ValueError(str(exc)) from exc


def _budget(value: Any) -> Any:
    """As `_bytes`, and "auto"."""
    if value is None or value == "auto":
        return value
    try:
        return parse_bytes(value)
    except ConfigError as exc:
        raise ValueError(f"{exc}, or auto") from exc


def _known_order(value: str) -> str:
    try:
        parse_order(value)
    except ConfigError as exc:
        raise ValueError(str(exc)) from exc
    return value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Section(BaseModel):
    """Closed and immutable. The text under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def of(cls, **options: Any) -> Self:
        """The section with these fields.

        Raises:
            ConfigError: lists every option that is unknown or has a wrong value.
        """
        try:
            return cls(**options)
        except ValidationError as exc:
            raise config_error(cls.__name__, schema_violations(exc, cls)) from exc

    def _exactly_one_of(self, first: str, second: str) -> None:
        given = [name for name in (first, second) if getattr(self, name) is not None]
        if len(given) != 1:
            what = "both are given" if given else "neither is given"
            raise ValueError(f"needs exactly one of {first!r} and {second!r}; {what}")


class SyncConfig(Section):
    """How weights go from the trainer to vLLM."""

    policy: Literal["warn", "reorder", "error"] = "reorder"
    """What to do about a source whose order would keep several parent layers open in vLLM.
    `reorder` sends the tensors grouped by parent layer, so that at most one is open; `warn` keeps
    the source's order and says, before the first sync, what it costs; `error` refuses it."""

    source_order: Annotated[str, AfterValidator(_known_order)] = "hf"
    """The order in which the source yields its tensors, for trying out bad ones: `hf` (as
    `named_parameters` does), `alphabetical`, `size` (largest first), `optimizer` (matrices, then
    vectors), `random:SEED`, `interleaved:N` (N producers taking turns)."""

    chunk_bytes: Annotated[PositiveInt | None, BeforeValidator(_bytes)] = None
    """Upper bound of one chunk, the unit of transfer, as a number or like `64MiB`. A chunk holds
    whole parent layers; a larger layer is a chunk of its own. Null: everything is one chunk."""

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

    check_finite: bool = True
    """Refuse to send NaN or infinite weights. vLLM would accept them, and they stay in its KV cache
    after the weights have healed."""

    ignore_names: tuple[str, ...] = ()
    """Checkpoint names (`fnmatch` patterns) that vLLM is known to ignore: they are not sent, and
    their having no parent layer is no error."""

    allow_incomplete: tuple[str, ...] = ()
    """Parent layers (`fnmatch` patterns) that may be loaded without receiving all their
    elements, because the checkpoint does not have them."""


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
    """The split of the data set at `path`."""

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

    mode: Literal["colocate"] = "colocate"
    """`colocate`: the engine lives in the trainer's process."""

    engine: dict[str, Any] = {}
    """vLLM engine arguments, as they are: `dtype`, `enforce_eager`, `quantization`,
    `max_model_len` and so on. They override what TRL passes."""


class TrainConfig(Section):
    """One run of `qerl-sync train`."""

    model: ModelConfig
    """The policy that is trained."""

    data: DataConfig
    """The prompts it is trained on."""

    reward: Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]
    """One reward function or a list of them: `package.module:function` with TRL's signature
    (`prompts, completions, **columns` to a list of numbers), or a built-in: `exact_match`, 1 where
    the completion is the answer."""

    trainer: dict[str, Any] = {}
    """Arguments of TRL's `GRPOConfig`, as they are."""

    rollout: RolloutConfig = RolloutConfig()
    """The engine that generates."""

    sync: SyncConfig = SyncConfig()
    """How the trainer's weights reach the engine."""

    warmup: WarmupConfig | None = None
    """A supervised warm-up. Null: none."""

    output_dir: str
    """Where checkpoints, reports and plots go."""

    seed: int = 0
    """Seeds the model's weights, the task's data, the warm-up, the training and the sampling."""

    threads: PositiveInt | None = None
    """CPU threads of trainer and engine; null leaves it to torch. Tiny models are faster on one,
    and much faster where other programs compete for the cores."""
