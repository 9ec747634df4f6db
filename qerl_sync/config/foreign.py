"""The sections handed on to TRL, vLLM and transformers as they are: are their keys known there?

A typo in one of them would otherwise surface only after the model was built and the engine started,
or, in a transformers configuration, never.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from qerl_sync.config.violations import Violation, nearest

OUR_SEED = "is ours: set `seed` at the top, it seeds everything"
OUR_DIRECTORY = "is ours: set `output_dir` at the top, or --output-dir"


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A section that another package reads.

    Attributes:
        place: dotted path of the section.
        package: the package that must be installed for it.
        owner: whose arguments these are, for messages.
        fields: yields the known keys; imports the package. None: there is nothing to compare with.
        owned: keys that this program sets itself, with the reason and the way to set them.
    """

    place: str
    package: str
    owner: str
    fields: Callable[[Mapping[str, Any]], set[str] | None]
    owned: Mapping[str, str]


def _fields_of_grpo(tree: Mapping[str, Any]) -> set[str]:
    from trl import GRPOConfig

    return {field.name for field in dataclasses.fields(GRPOConfig)}


def _fields_of_sft(tree: Mapping[str, Any]) -> set[str]:
    from trl import SFTConfig

    return {field.name for field in dataclasses.fields(SFTConfig)}


def _fields_of_engine(tree: Mapping[str, Any]) -> set[str]:
    from vllm.engine.arg_utils import EngineArgs

    return {field.name for field in dataclasses.fields(EngineArgs)}


def _fields_of_architecture(tree: Mapping[str, Any]) -> set[str] | None:
    from transformers import CONFIG_MAPPING

    architecture = _at(tree, "model.tiny.architecture") or "qwen3"
    if architecture not in CONFIG_MAPPING:
        return None
    config = CONFIG_MAPPING[architecture]
    return {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)


SECTIONS = (
    Foreign(
        "trainer",
        "trl",
        "TRL's GRPOConfig",
        _fields_of_grpo,
        {
            "use_vllm": "is ours: this program always generates with vLLM",
            "vllm_mode": "is ours: set `rollout.mode`",
            "output_dir": OUR_DIRECTORY,
            "seed": OUR_SEED,
        },
    ),
    Foreign(
        "warmup.trainer",
        "trl",
        "TRL's SFTConfig",
        _fields_of_sft,
        {"output_dir": OUR_DIRECTORY, "seed": OUR_SEED},
    ),
    Foreign(
        "rollout.engine",
        "vllm",
        "vLLM's engine",
        _fields_of_engine,
        {
            "model": "is ours: the engine loads the model of the section `model`",
            "tokenizer": "is ours: the engine uses the tokenizer beside the model",
            "tensor_parallel_size": "is TRL's: set `trainer.vllm_tensor_parallel_size`",
            "enable_sleep_mode": "is TRL's: set `trainer.vllm_enable_sleep_mode`",
            "distributed_executor_backend": "is TRL's: in colocate mode it must stay as it is",
            "logprobs_mode": "is TRL's: its importance sampling needs `processed_logprobs`",
        },
    ),
    Foreign(
        "model.tiny.config",
        "transformers",
        "the transformers configuration of that architecture",
        _fields_of_architecture,
        {
            "vocab_size": "is ours: set `model.tiny.vocab_size`",
            "dtype": "is ours: set `model.dtype`",
        },
    ),
)


def foreign_violations(tree: Mapping[str, Any]) -> list[Violation]:
    """Keys that the package they are meant for does not know, or that are ours to set."""
    violations = [found for section in SECTIONS for found in _check(section, tree)]
    return violations + _unknown_architecture(tree)


def _check(section: Foreign, tree: Mapping[str, Any]) -> Iterator[Violation]:
    given = _at(tree, section.place)
    if not isinstance(given, Mapping) or not given:
        return
    if find_spec(section.package) is None:
        yield Violation(
            section.place,
            f"{section.package} is not installed; `./scripts/setup` installs all that a run needs",
        )
        return
    known = section.fields(tree)
    for key in map(str, given):
        if key in section.owned:
            yield Violation(f"{section.place}.{key}", section.owned[key])
        elif known is not None and key not in known:
            hint = nearest(key, known - set(section.owned))
            yield Violation(f"{section.place}.{key}", f"{section.owner} has no such key; {hint}")


def _unknown_architecture(tree: Mapping[str, Any]) -> list[Violation]:
    architecture = _at(tree, "model.tiny.architecture")
    if not isinstance(architecture, str) or find_spec("transformers") is None:
        return []
    from transformers import CONFIG_MAPPING

    if architecture in CONFIG_MAPPING:
        return []
    hint = nearest(architecture, CONFIG_MAPPING.keys())
    message = f"transformers has no architecture {architecture!r}; {hint}"
    return [Violation("model.tiny.architecture", message)]


def _at(tree: Any, place: str) -> Any:
    for name in place.split("."):
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(name)
    return tree
