"""Read the model that `qerl-sync plan` is asked about, or that of a training run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qerl_sync.errors import ConfigError
from qerl_sync.plan.checkpoint import Checkpoint, read_checkpoint

if TYPE_CHECKING:
    from qerl_sync.config import TinyModelConfig, TrainConfig

# `config.json` of a run's directory is the training configuration: these sections tell.
TRAINING_SECTIONS = {"model", "data", "trainer", "rollout", "sync"}

AUTO_BUDGET = "`sync.budget_bytes: auto` is known when the engine runs; --budget stands in for it."

# What a byte-level tokenizer has at least: a token for each byte, and two special ones.
BYTE_VOCABULARY = 258


@dataclass(frozen=True)
class PlanInput:
    """A model and what is known of how it is trained and served.

    Attributes:
        name: for people.
        engine: vLLM's engine arguments.
        dtype: of the trainer's tensors; None: as the checkpoint says.
        order, policy, budget_bytes, ignore_names, allow_incomplete: of the training configuration,
            if there is one; `policy` is a policy of the plan.
        note: what a reader of the figures must know, in a sentence.
    """

    name: str
    checkpoint: Checkpoint
    engine: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    order: str | None = None
    policy: str | None = None
    budget_bytes: int | None = None
    ignore_names: Sequence[str] = ()
    allow_incomplete: Sequence[str] = ()
    note: str = ""

    @property
    def files(self) -> dict[str, list[str]]:
        """Return the orders that the checkpoint's files give, by name."""
        stored = self.checkpoint
        found = {"safetensors": stored.names} if stored.shards else {}
        if stored.names_by_offset is not None and stored.shards:
            found["fastsafetensors"] = stored.names_by_offset
        return found


def read_input(path: Path) -> PlanInput:
    """Find out what is at `path`.

    Raises:
        ConfigError: nothing that can be planned for.
    """
    if path.suffix in (".yaml", ".yml"):
        from qerl_sync.config import load_config

        return _from_training(load_config(path, check_foreign=False), path.stem)
    run = _as_run(path)
    if run is not None:
        return _from_training(run, path.resolve().name, run=path)
    resolved = path.resolve()
    named_after = resolved if resolved.is_dir() else resolved.with_suffix("")
    if named_after.name in ("config", "model", "model.safetensors.index"):
        named_after = named_after.parent
    return PlanInput(named_after.name, read_checkpoint(path))


def _as_run(path: Path) -> TrainConfig | None:
    """Return the training configuration in the directory of a run."""
    file = path / "config.json"
    if not path.is_dir() or not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None  # the reader of checkpoints says what is wrong with it
    if not isinstance(content, dict) or not content.keys() >= TRAINING_SECTIONS:
        return None
    from qerl_sync.config import TrainConfig

    return TrainConfig.of(**content)


def _from_training(config: TrainConfig, name: str, run: Path | None = None) -> PlanInput:
    """Return the model of a training configuration, as it is served and its weights sent.

    Args:
        run: the directory of a run of it; by default `output_dir`, if that is one.
    """
    if run is None and _as_run(Path(config.output_dir)) == config:
        run = Path(config.output_dir)
    note = ""
    if config.sync.budget_bytes == "auto":
        note = AUTO_BUDGET
    if run is not None and (run / "model").is_dir():
        checkpoint = read_checkpoint(run / "model")
    elif config.model.path is not None:
        checkpoint = read_checkpoint(_local(config.model.path))
    else:
        assert config.model.tiny is not None
        checkpoint, guess = _tiny(config.model.tiny, config.model.dtype)
        note = f"{guess} {note}".rstrip()
    sync = config.sync
    budget_bytes = sync.budget_bytes if isinstance(sync.budget_bytes, int) else None
    engine = {"dtype": config.model.dtype, **config.rollout.engine}
    shards = config.trainer.get("vllm_tensor_parallel_size", 1)
    if shards != 1:
        engine["tensor_parallel_size"] = shards
    return PlanInput(
        name,
        checkpoint,
        engine=engine,
        dtype=config.model.dtype,
        order=sync.source_order,
        policy=policy_name(sync.policy, budget_bytes),
        budget_bytes=budget_bytes,
        ignore_names=sync.ignore_names,
        allow_incomplete=sync.allow_incomplete,
        note=note,
    )


def policy_name(policy: str, budget_bytes: int | None) -> str:
    """Return the name that a line of the table has for what `sync.policy` does with an order."""
    if policy == "spill":
        return "spill"
    if policy != "reorder":
        return "warn"
    return "reorder" if budget_bytes is None else "reorder_in_budget"


def _tiny(tiny: TinyModelConfig, dtype: str) -> tuple[Checkpoint, str]:
    """Return the model that a run would make, without weights; and what of it is a guess."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(tiny.architecture)
    if architecture is None:
        raise ConfigError(
            f"model.tiny: transformers has no causal language model of type {tiny.architecture!r}"
        )
    vocab_size = tiny.vocab_size or BYTE_VOCABULARY
    content = {
        "architectures": [architecture],
        "model_type": tiny.architecture,
        "vocab_size": vocab_size,
        "dtype": dtype,
        **tiny.config,
    }
    note = (
        f"The run makes the model and its tokenizer; a vocabulary of {vocab_size} tokens is "
        "assumed."
    )
    checkpoint = Checkpoint(Path("tiny.json"), content, shards=[], metas=None, names_by_offset=None)
    return checkpoint, note


def _local(model: str) -> Path:
    """Return a directory as it is; of a hub id, the snapshot that was downloaded earlier."""
    path = Path(model)
    if path.exists():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, local_files_only=True))
    except Exception as exc:  # not installed, not a hub id, not downloaded: all mean the same here
        raise ConfigError(
            f"model.path: {model!r} is neither a local directory nor a hub model that was "
            "downloaded before; a plan needs no weights, so its config.json in a directory is "
            "enough: `qerl-sync plan DIRECTORY`"
        ) from exc
