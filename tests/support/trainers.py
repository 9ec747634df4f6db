"""A real GRPOTrainer with a real colocated engine, as small as they come."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from support.models import make_model

WORDS = ["<pad>", "<eos>", *"0123456789+=", *(f"w{i}" for i in range(242))]


def save_policy(directory: Path, kind: str = "tied", seed: int = 0) -> Path:
    """A tiny model and a tokenizer of one token for each word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    make_model(kind, seed).save_pretrained(directory)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    ).save_pretrained(directory)
    return directory


def share_of_digits(completions: list[str], **kwargs: Any) -> list[float]:
    return [sum(w.isdigit() for w in text.split()) / 8 for text in completions]


def varied(completions: list[str], **kwargs: Any) -> list[float]:
    """Reward each completion otherwise, so that no step is without a gradient."""
    return [sum(map(ord, str(text))) % 97 / 97 for text in completions]


# For `WeightSyncCallback`: what TRL does not pass to its engine.
ENGINE = {"dtype": "float32", "enforce_eager": True, "num_gpu_blocks_override": 64}

# An engine that is collected tears down the process groups of all others.
_KEPT: list[Any] = []


def build_trainer(
    path: Path,
    output_dir: Path,
    callbacks: Any = (),
    *,
    model: Any = None,
    reward: Any = share_of_digits,
    peft_config: Any = None,
    built_in: Any = nullcontext,
    **changes: Any,
) -> Any:
    """Build a GRPOTrainer for the policy at `path`, or for `model`, which was loaded from there; in
    a context `built_in`, when its arguments have been made."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": 32,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    rows = Dataset.from_dict({"prompt": [f"w{i} w{i + 1} =" for i in range(64)]})
    args = GRPOConfig(**{**arguments, **changes})
    with built_in():
        trainer = GRPOTrainer(
            model=str(path) if model is None else model,
            reward_funcs=reward,
            args=args,
            train_dataset=rows,
            eval_dataset=rows.select(range(4)),
            callbacks=list(callbacks),
            peft_config=peft_config,
        )
    if trainer.use_vllm and trainer.args.vllm_mode == "colocate":
        _KEPT.append(trainer.vllm_generation.llm)
    return trainer


def build_gold_trainer(
    path: Path, output_dir: Path, callbacks: Any, *, teacher: Path | None = None, **changes: Any
) -> Any:
    """On policy only; without a teacher its own, as it was saved, which teaches it nothing."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": 64,
        "lmbda": 1.0,
        "use_uld_loss": False,
        "beta": 0.5,
        "num_generations": 1,
        "max_length": 48,
        "max_completion_length": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    rows = [
        [{"role": "user", "content": f"w{i} w{i + 1} ="}, {"role": "assistant", "content": f"w{i}"}]
        for i in range(16)
    ]
    trainer = GOLDTrainer(
        model=AutoModelForCausalLM.from_pretrained(path),
        teacher_model=AutoModelForCausalLM.from_pretrained(teacher or path),
        args=GOLDConfig(**{**arguments, **changes}),
        train_dataset=Dataset.from_dict({"messages": rows}),
        processing_class=_bytes_tokenizer(),
        callbacks=list(callbacks),
    )
    _KEPT.append(trainer.vllm_generation.llm)
    return trainer


def _bytes_tokenizer() -> Any:
    """A token for each byte; GOLD takes byte-level ones only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())[:200]]
    bpe = models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )


def gap_now(trainer: Any) -> float:
    """The engine's logprobs of a prompt against the trainer's, past whatever guards the engine."""
    from functools import partial
    from types import SimpleNamespace

    from qerl_sync.engines.llm import LLMClient
    from qerl_sync.sources.hf import probe_of

    llm, tokens = trainer.vllm_generation.llm, list(range(5, 15))
    bare = SimpleNamespace(generate=partial(type(llm).generate, llm), llm_engine=llm.llm_engine)
    right = probe_of(trainer.model).logprobs(tokens)
    said = LLMClient(bare).prompt_logprobs(tokens)
    return max(abs(a - b) for a, b in zip(right, said, strict=True))


def gap(log: list[dict[str, Any]]) -> float:
    """TRL's own measure of trainer against engine, the largest over the run."""
    return max(entry.get("sampling/sampling_logp_difference/max", 0.0) for entry in log)
