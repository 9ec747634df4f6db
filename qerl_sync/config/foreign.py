"""Check the keys of sections that are passed unchanged to TRL, vLLM and transformers.

Without the check a typo would surface only after the model was built and the engine started or, in
a transformers configuration, never.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qerl_sync.config.violations import Violation, nearest
from qerl_sync.config.yaml_tree import value_at

PLAIN_TYPES = {bool, int, float, str, list, dict, type(None), Any}
OUR_SEED = "is ours: set `seed` at the top, it seeds everything"
OUR_SERVER = "is ours: set `rollout.server_url`, or `rollout.server_port` for one that we start"
OUR_DIRECTORY = "is ours: set `output_dir` at the top, or --output-dir"

# The known keys of a section with their type hints; None: there is nothing to compare with.
Hints = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A section that another package reads.

    Attributes:
        place: dotted path of the section.
        package: the package that must be installed for it.
        owner: whose arguments these are, for messages.
        hints: reads the known keys of the package, which it imports.
        owned: keys that this program sets itself, with the reason and the way to set them.
        complete: the hints name every key that has an effect.
        trainer: the class of `package` that is made with these arguments, and takes others beside
            them, which no configuration can hold.
    """

    place: str
    package: str
    owner: str
    hints: Callable[[Mapping[str, Any]], Hints | None]
    owned: Mapping[str, str]
    complete: bool = True
    trainer: str | None = None


def _hints_of_trl(name: str, tree: Mapping[str, Any]) -> Hints:
    import trl

    # transformers' hint of `fsdp` leaves out the True that its documentation asks for.
    return get_type_hints(getattr(trl, name)) | {"fsdp": bool | str | None}


def _hints_of_fields(module: str, name: str, tree: Mapping[str, Any]) -> Hints:
    # Some hints name classes that exist for type checkers only, so each stands for itself.
    fields = dataclasses.fields(getattr(import_module(module), name))
    return {field.name: field.type for field in fields if field.init}


def _hints_of_architecture(tree: Mapping[str, Any]) -> Hints | None:
    from transformers import CONFIG_MAPPING

    architecture = value_at(tree, "model.tiny.architecture") or "qwen3"
    if architecture not in CONFIG_MAPPING:
        return None
    config = CONFIG_MAPPING[architecture]
    # Types are left to transformers: it checks them itself when the configuration is made.
    names = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    return dict.fromkeys(names, Any)


SECTIONS = (
    Foreign(
        "trainer",
        "trl",
        "TRL's GRPOConfig",
        partial(_hints_of_trl, "GRPOConfig"),
        {
            "use_vllm": "is ours: this program always generates with vLLM",
            "vllm_mode": "is ours: set `rollout.mode`",
            "vllm_server_base_url": OUR_SERVER,
            "vllm_server_host": OUR_SERVER,
            "vllm_server_port": OUR_SERVER,
            "vllm_server_timeout": "is ours: set `rollout.start_timeout_seconds`",
            "vllm_group_port": "is without use: no weights go over TRL's NCCL group",
            "output_dir": OUR_DIRECTORY,
            "seed": OUR_SEED,
            "peft_config": "is an argument of GRPOTrainer: set the section `peft`",
        },
        trainer="GRPOTrainer",
    ),
    Foreign(
        "peft",
        "peft",
        "PEFT's LoraConfig",
        partial(_hints_of_fields, "peft", "LoraConfig"),
        {
            "peft_type": "is ours: only LoRA adapters are synced",
            "task_type": "is ours: the policy is a causal language model",
            "inference_mode": "would freeze the adapters; nothing would be trained",
        },
    ),
    Foreign(
        "warmup.trainer",
        "trl",
        "TRL's SFTConfig",
        partial(_hints_of_trl, "SFTConfig"),
        {"output_dir": OUR_DIRECTORY, "seed": OUR_SEED},
        trainer="SFTTrainer",
    ),
    Foreign(
        "rollout.engine",
        "vllm",
        "vLLM's engine",
        partial(_hints_of_fields, "vllm.engine.arg_utils", "EngineArgs"),
        {
            "model": "is ours: the engine loads the model of the section `model`",
            "tokenizer": "is ours: the engine uses the tokenizer beside the model",
            "enable_sleep_mode": "is TRL's: set `trainer.vllm_enable_sleep_mode`",
            "logprobs_mode": "is TRL's: its importance sampling needs `processed_logprobs`",
            "weight_transfer_config": "is ours: weights come through the section `sync`",
        },
    ),
    Foreign(
        "model.tiny.config",
        "transformers",
        "the transformers configuration of that architecture",
        _hints_of_architecture,
        {
            "vocab_size": "is ours: set `model.tiny.vocab_size`",
            "dtype": "is ours: set `model.dtype`",
        },
        # Models also read keys that their configuration class does not declare (Qwen3-MoE reads
        # `head_dim`), so only what looks like a typo is refused.
        complete=False,
    ),
)


def foreign_violations(tree: Mapping[str, Any]) -> list[Violation]:
    """Return violations for unknown keys, keys that this program sets, and values of a wrong
    type.
    """
    violations = [found for section in SECTIONS for found in _check(section, tree)]
    architecture = value_at(tree, "model.tiny.architecture")
    if isinstance(architecture, str) and find_spec("transformers") is not None:
        from transformers import CONFIG_MAPPING

        if architecture not in CONFIG_MAPPING:
            hint = nearest(architecture, CONFIG_MAPPING.keys())
            message = f"transformers has no architecture {architecture!r}; {hint}"
            violations.append(Violation("model.tiny.architecture", message))
    return violations


def _check(section: Foreign, tree: Mapping[str, Any]) -> Iterator[Violation]:
    given = value_at(tree, section.place)
    if not isinstance(given, Mapping) or not given:
        return
    if find_spec(section.package) is None:
        yield Violation(
            section.place,
            f"{section.package} is not installed; `./scripts/setup` installs all that a run needs",
        )
        return
    known = section.hints(tree)
    for key, value in given.items():
        problem = _problem(section, str(key), value, known)
        if problem is not None:
            yield Violation(f"{section.place}.{key}", problem)


def _problem(section: Foreign, key: str, value: Any, known: Hints | None) -> str | None:
    if key in section.owned:
        return section.owned[key]
    if known is None:
        return None
    if key in known:
        return _wrong_type(value, known[key])
    if section.trainer is not None:
        # A name like it is no hint here: the key is right, and the place is wrong.
        trainer = getattr(import_module(section.package), section.trainer)
        if key in inspect.signature(trainer).parameters:
            return (
                f"is no setting of {section.owner} but an argument of {section.trainer}, which "
                "this program makes itself, without that; write a script of your own with "
                "WeightSyncCallback (examples/trl_colocate.py)"
            )
    if section.complete or get_close_matches(key, known):
        return f"{section.owner} has no such key; {nearest(key, known.keys() - section.owned)}"
    return None


def _wrong_type(value: Any, hint: Any) -> str | None:
    """Return the problem if `value` plainly contradicts `hint`.

    Leave null to the package: many hints do not mention it.
    """
    if value is None or not _is_plain(hint):
        return None
    try:
        TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(value)
        return None
    except ValidationError:
        choices = [str(choice) for choice in get_args(hint)]
    if get_origin(hint) is Literal:
        wanted = f"one of {', '.join(choices)} ({nearest(str(value), choices)})"
    else:
        wanted = str(hint) if choices else str(hint.__name__)
    return f"must be {wanted}, not {value!r}"


def _is_plain(hint: Any) -> bool:
    """Return True for types that YAML has. Only those can be checked without the package."""
    if get_origin(hint) is Literal:
        return True
    parts = get_args(hint)
    return all(map(_is_plain, parts)) if parts else hint in PLAIN_TYPES
