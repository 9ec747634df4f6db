"""Make, load or warm up the policy of a run: a checkpoint, or a tiny model with random weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qerl_sync.config import TinyModelConfig
from qerl_sync.config.files import where
from qerl_sync.errors import ConfigError, FileError
from qerl_sync.plan.checkpoint import require_model_directory
from qerl_sync.training.display import Steps

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def make_tiny(
    config: TinyModelConfig, dtype: str, texts: Iterable[str], seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a model with random weights, and a tokenizer trained on `texts`.

    Raises:
        ConfigError: transformers refuses the configuration.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, set_seed

    tokenizer = train_tokenizer(texts, config.vocab_size)
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    set_seed(seed)
    try:
        model_config = CONFIG_MAPPING[config.architecture](**special, **config.config)
        model = AutoModelForCausalLM.from_config(model_config, dtype=getattr(torch, dtype))
    except Exception as exc:  # each architecture checks its own values in its own way
        raise ConfigError(
            f"model.tiny: transformers cannot make this {config.architecture} "
            f"({type(exc).__name__}: {exc})",
            place="model.tiny",
        ) from exc
    return model, tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int | None) -> PreTrainedTokenizerBase:
    """Train a tokenizer: a token for each character, or byte-level BPE of a given size."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": PAD, "eos_token": EOS}
    if vocab_size is None:
        special["unk_token"] = UNKNOWN
        characters = sorted({character for text in texts for character in text})
        vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNKNOWN, *characters])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint.

    Raises:
        ConfigError: there is no such checkpoint, or it has no tokenizer.
    """
    from transformers import AutoTokenizer

    _check_directory(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as exc:  # OSError, ValueError, hub errors: all mean that there is none
        raise _unloadable(path, "tokenizer", exc) from exc
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path: str, dtype: str) -> PreTrainedModel:
    """Load the checkpoint's weights in `dtype`."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    except Exception as exc:  # each architecture and each file format fails in its own way
        raise _unloadable(path, "model", exc) from exc


def _unloadable(path: str, what: str, exc: Exception) -> FileError:
    """Return the error for a checkpoint that transformers does not load."""
    cause = f"{type(exc).__name__}: {str(exc).strip().partition(chr(10))[0]}"
    if Path(path).is_dir():
        return _refusal(
            path, f"no {what} can be loaded from {where(path)} ({cause}); save or fetch it anew"
        )
    return _refusal(
        path,
        f"there is no directory {where(path)}, and no {what} of that name can be had from the "
        f"Hugging Face hub ({cause}); correct the path, or the hub id and the connection",
    )


def _refusal(path: str, what: str) -> FileError:
    return FileError(f"model.path: {what}", path=path)


def _check_directory(path: str) -> None:
    """Check that a local path holds a model and a tokenizer; let hub ids pass."""
    directory = Path(path)
    if not directory.is_dir():
        first, *others = directory.parts
        # A hub id has two parts at most, of which the first is no directory here.
        deep = len(others) > 1 or (others and Path(first).is_dir())
        if directory.exists() or directory.is_absolute() or path.startswith(".") or deep:
            kind = "is a file" if directory.exists() else "does not exist"
            text = f"{where(path)} {kind}; name a directory with a model and a tokenizer"
            raise _refusal(path, text)
        return
    require_model_directory(directory)
    kinds = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
    if not any((directory / kind).is_file() for kind in kinds):
        raise _refusal(
            path,
            f"{path} has no tokenizer (none of {', '.join(kinds)}); save it there with "
            f"tokenizer.save_pretrained({path!r})",
        )


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    arguments: SFTConfig,
    steps: Steps,
) -> None:
    """Train `model` in place, by TRL's SFTTrainer, on `prompt` and `answer` of `rows`."""
    from trl import SFTTrainer

    from qerl_sync.training.callbacks import ShowProgress, quieten

    def example(row: dict[str, Any]) -> dict[str, Any]:
        answer: Any = str(row["answer"])
        if not isinstance(row["prompt"], str):  # chat messages, and so is then the completion
            answer = [{"role": "assistant", "content": answer}]
        return {"prompt": row["prompt"], "completion": answer}

    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows.map(example, remove_columns=rows.column_names),
        processing_class=tokenizer,
        callbacks=[ShowProgress(steps, _loss)],
    )
    quieten(trainer)
    trainer.train()


def _loss(log: dict[str, Any]) -> str:
    return f"loss {float(log['loss']):.2f}" if "loss" in log else ""
