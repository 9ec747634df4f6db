"""Load a run's prompts: the toy task made in memory, or a data set from a file or the hub."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from qerl_sync.config import DataConfig
from qerl_sync.config.contradictions import FILE_FORMATS
from qerl_sync.config.files import where
from qerl_sync.config.violations import nearest
from qerl_sync.errors import ConfigError, FileError

if TYPE_CHECKING:
    from datasets import Dataset


def addition_rows(size: int, seed: int) -> list[dict[str, str]]:
    """Return `size` sums of one-digit numbers whose sum has one digit, drawn at random."""
    problems = [(a, b) for a in range(10) for b in range(10 - a)]
    rng = random.Random(seed)
    drawn = (rng.choice(problems) for _ in range(size))
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in drawn]


def load_data(config: DataConfig, seed: int, *, needs_answers: bool) -> tuple[Dataset, Dataset]:
    """Return the training rows and the held-out rows.

    They have the column `prompt` and, if it exists, `answer`.

    Raises:
        ConfigError: there is no such data set, split or column.
    """
    from datasets import Dataset

    if config.task == "addition":
        rows = Dataset.from_list(addition_rows(config.size, seed))
    else:
        rows = _read(config)
    rows = _rename(rows, "prompt_column", config.prompt_column, "prompt")
    for number, prompt in enumerate(rows["prompt"]):
        if not prompt or not isinstance(prompt, str | list):  # as TRL takes them
            raise ConfigError(
                f"data.prompt_column: the prompt of row {number} is {prompt!r}, not a text or a "
                "list of chat messages; correct or remove that row",
                place="data.prompt_column",
            )
    if needs_answers or config.answer_column in rows.column_names:
        rows = _rename(rows, "answer_column", config.answer_column, "answer")
    if config.eval_size >= len(rows):
        raise ConfigError(
            f"data.eval_size {config.eval_size} leaves nothing to train on: the data set has "
            f"{len(rows)} rows",
            place="data.eval_size",
        )
    train = rows.select(range(config.eval_size, len(rows)))
    return train, rows.select(range(config.eval_size))


def _read(config: DataConfig) -> Dataset:
    from datasets import load_dataset

    given = config.path
    assert given is not None
    path = Path(given)

    def refusal(what: str) -> FileError:
        return FileError(f"data.path: {what}", path=given)

    file_format = FILE_FORMATS.get(path.suffix)
    if file_format is not None and not path.is_file():
        raise refusal(f"there is no file {where(given)}; name one that is there")
    if path.is_file() and not path.stat().st_size:  # `datasets` would raise a bare StopIteration
        raise refusal(f"{where(given)} is empty; there is nothing to train on")
    try:
        if file_format is not None:
            rows = load_dataset(file_format, data_files=str(path), split="train")
        else:
            rows = load_dataset(given, config.subset, split=config.split)
    except Exception as exc:  # `datasets` raises whatever the hub, the file or Arrow raises
        what = "cannot be read"
        if not path.exists():
            what = f"is neither at {where(given)} nor a data set that the hub gives"
        innermost: BaseException = exc  # `datasets` wraps it into text without content
        while innermost.__cause__ is not None:
            innermost = innermost.__cause__
        raise refusal(
            f"{given!r} {what} ({type(innermost).__name__}: {innermost}); give a "
            f"{', '.join(FILE_FORMATS)} file, a directory or a hub id"
        ) from exc
    if not len(rows):
        raise refusal(f"{given!r} has no rows; there is nothing to train on")
    return rows


def _rename(rows: Dataset, option: str, column: str, name: str) -> Dataset:
    """Return the rows with `column` renamed to `name`."""
    if column not in rows.column_names:
        raise ConfigError(
            f"data.{option}: the data set has no column {column!r}; "
            f"{nearest(column, rows.column_names)}",
            place=f"data.{option}",
        )
    if column == name:
        return rows
    if name in rows.column_names:
        rows = rows.remove_columns(name)
    return rows.rename_column(column, name)
