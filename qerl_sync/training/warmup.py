"""Warm up a policy by supervised training: TRL's `SFTTrainer` on prompts and answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qerl_sync.training.display import Steps

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    arguments: SFTConfig,
    steps: Steps,
) -> None:
    """Train `model` in place on the columns `prompt` and `answer` of `rows`."""
    from trl import SFTTrainer

    from qerl_sync.training.callbacks import ShowProgress, quieten

    def example(row: dict[str, Any]) -> dict[str, Any]:
        """Return a row in TRL's format: text to text, or chat messages to chat messages."""
        prompt, answer = row["prompt"], str(row["answer"])
        if isinstance(prompt, str):
            return {"prompt": prompt, "completion": answer}
        return {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}

    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows.map(example, remove_columns=rows.column_names),
        processing_class=tokenizer,
        callbacks=[ShowProgress(steps, _note)],
    )
    quieten(trainer)
    trainer.train()


def _note(log: dict[str, Any]) -> str:
    return f"loss {float(log['loss']):.2f}" if "loss" in log else ""
