"""Reward functions with TRL's signature: built in, or the user's as `package.module:function`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from qerl_sync.config.violations import nearest
from qerl_sync.errors import ConfigError

Reward = Callable[..., Sequence[float | None]]


def exact_match(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any
) -> list[float]:
    """Reward 1 where the completion, without surrounding space, is the answer; else 0."""
    pairs = zip(completions, answer, strict=True)
    return [float(_text(completion).strip() == str(right).strip()) for completion, right in pairs]


def final_number(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any
) -> list[float]:
    """Reward 1 where the last number of the completion is the last one of the answer; else 0.

    So GSM8K's answers, which end in `#### 72`, are compared.
    """
    pairs = zip(completions, answer, strict=True)
    numbers = [(_last_number(_text(c)), _last_number(str(right))) for c, right in pairs]
    return [float(found is not None and found == right) for found, right in numbers]


def _last_number(text: str) -> float | None:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


def _text(completion: Any) -> str:
    """Return the text of a completion, or of its last chat message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


# The built-in rewards; all of them read the column `answer`.
BUILTIN: dict[str, Reward] = {"exact_match": exact_match, "final_number": final_number}


def resolve_reward(name: str) -> Reward:
    """Return the reward function called `name` in the configuration.

    Modules are also looked for in the current directory.

    Raises:
        ConfigError: there is no such built-in, module or function.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon:
        if name not in BUILTIN:
            raise ConfigError(
                f"unknown reward {name!r}; {nearest(name, BUILTIN)} For your own, write "
                "package.module:function",
                place="reward",
            )
        return BUILTIN[name]
    # A console script has its own directory on the path and not the one it is called from.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = import_module(module_name)
    except (ImportError, ValueError) as exc:
        raise ConfigError(
            f"reward {name!r}: the module {module_name!r} cannot be imported ({exc}); install it "
            "or call the program from the directory that holds it",
            place="reward",
        ) from exc
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        raise ConfigError(
            f"reward {name!r}: {module_name} has no function {attribute!r}; "
            f"{nearest(attribute, functions)}",
            place="reward",
        )
    return function
