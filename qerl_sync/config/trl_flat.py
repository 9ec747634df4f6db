"""Read the flat format of TRL's own command line (`trl grpo --config run.yaml`) into our sections.

    model_name_or_path: Qwen/Qwen3-0.6B      ->  model.path
    dataset_name: trl-lib/DeepMath-103K      ->  data.path
    reward_funcs: [accuracy_reward]          ->  reward: trl.rewards:accuracy_reward
    use_peft: true, lora_r: 16               ->  peft.r
    vllm_mode: server, vllm_server_port: 1   ->  rollout.mode, rollout.server_url
    learning_rate: 1e-6                      ->  trainer.learning_rate, as all of GRPOConfig

A key that TRL reads and we cannot follow is a violation with the way out, unless its value changes
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields
from typing import Any, get_args, get_origin, get_type_hints

from qerl_sync.config.contradictions import COLOCATED_ARGUMENTS
from qerl_sync.config.violations import Violation, nearest
from qerl_sync.config.yaml_tree import Tree

# Keys that have a place of their own, under other names. All else of GRPOConfig goes to `trainer`.
PLACES = {
    "model_name_or_path": "model.path",
    "dtype": "model.dtype",
    "attn_implementation": "trainer.model_init_kwargs.attn_implementation",
    "dataset_name": "data.path",
    "dataset_config": "data.subset",
    "dataset_train_split": "data.split",
    "output_dir": "output_dir",
    "seed": "seed",
    "vllm_mode": "rollout.mode",
}
# With `use_peft`: TRL's names, PEFT's, and the values that TRL passes where none is given.
PEFT = {
    "lora_r": ("r", 16),
    "lora_alpha": ("lora_alpha", 32),
    "lora_dropout": ("lora_dropout", 0.05),
    "lora_target_modules": ("target_modules", None),
    "lora_target_parameters": ("target_parameters", None),
    "lora_modules_to_save": ("modules_to_save", None),
    "use_rslora": ("use_rslora", False),
    "use_dora": ("use_dora", False),
}
# Any other value than the default would be lost.
UNSUPPORTED = {
    "model_revision": "download that revision, and give its directory as model_name_or_path",
    "load_in_4bit": "the trainer's weights must be those that vLLM loads; `rollout.engine"
    ".quantization` quantises the engine alone",
    "load_in_8bit": "the trainer's weights must be those that vLLM loads; `rollout.engine"
    ".quantization` quantises the engine alone",
    "reward_model_name_or_path": "write a reward function that asks the model, and name it in "
    "reward_funcs",
    "dataset_streaming": "download the data set; its rows are drawn at random",
    "streaming": "download the data set; its rows are drawn at random",
    "test_split_size": "set `data.eval_size`, a number of rows",
    "lora_task_type": "the policy is a causal language model, CAUSAL_LM",
    "resume_from_checkpoint": "leave it out; `--resume` goes on from the run's last checkpoint",
}
# Read by TRL only together with others that are handled, or for nothing that we do.
WITHOUT_USE = {"use_vllm", "vllm_group_port", "ignore_bias_buffers", "dataset_test_split"}
WITHOUT_USE |= {"bnb_4bit_quant_type", "bnb_4bit_quant_storage", "use_bnb_nested_quant"}
# Settings of an engine that TRL does not start.
SERVED = ("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout")
# YAML 1.1, which TRL's parser reads, has these for booleans.
BOOLEANS = {"yes": True, "on": True, "no": False, "off": False}
# transformers' default for `output_dir`.
TRAINER_OUTPUT = "trainer_output"
PUNISHMENT = "get_soft_overlong_punishment"
OF_YOUR_OWN = "name a function of your own, which holds what it returns (package.module.function)"
OF_A_DATASET = {"path": "data.path", "name": "data.subset", "split": "data.split"}


def sections_of(
    flat: Mapping[str, Any], lines: Mapping[str, str]
) -> tuple[Tree, dict[str, str], list[Violation]]:
    """Return a configuration in our sections, where each of its values was written, and what of
    `flat` cannot be followed.

    Imports TRL: its classes define the keys.
    """
    known = _known_keys()
    tree: Tree = {}
    origins: dict[str, str] = {}
    violations = [
        Violation(key, f"`trl grpo` has no such key; {nearest(key, known)}")
        for key in flat
        if key not in known and key != "env"
    ]
    given = {k: _converted(v, known[k][0]) for k, v in flat.items() if k in known}

    def put(place: str, value: Any, key: str) -> None:
        *sections, name = place.split(".")
        at = tree
        for section in sections:
            at[section] = at.get(section) or {}  # it may be null
            at = at[section]
        if isinstance(at.get(name), dict) and isinstance(value, dict | None):
            value = {**at[name], **(value or {})}
        at[name] = value
        origins[place] = lines.get(key, "")

    for key in ("output_dir", "seed"):
        given.setdefault(key, known[key][1] or TRAINER_OUTPUT)
    served = given.get("vllm_mode") == "server"
    for key, value in given.items():
        if key in UNSUPPORTED:
            if value is not None and value != known[key][1]:
                violations.append(Violation(key, f"{value!r} is not supported; {UNSUPPORTED[key]}"))
        elif key in PLACES:
            put(PLACES[key], value, key)
        elif key == "reward_funcs":
            names = [value] if isinstance(value, str) else value or ()
            if PUNISHMENT in names:
                violations.append(Violation(key, f"{PUNISHMENT} makes a function; {OF_YOUR_OWN}"))
            named = (name if "." in name else f"trl.rewards.{name}" for name in names)
            put("reward", [":".join(name.rsplit(".", 1)) for name in named], key)
        elif key == "datasets":
            violations += _put_dataset(value, put)
        elif key in (*PEFT, "use_peft", *SERVED, *WITHOUT_USE) or (
            served and key in COLOCATED_ARGUMENTS
        ):
            continue
        else:
            put(f"trainer.{key}", value, key)
    if given.get("use_vllm") is False:
        violations.append(Violation("use_vllm", "this program always generates with vLLM"))
    if given.get("use_peft"):
        for key, (name, default) in PEFT.items():
            value = given.get(key, default)
            if value is not None:
                single = key == "lora_target_modules" and isinstance(value, list)
                put(f"peft.{name}", value[0] if single and len(value) == 1 else value, key)
    if served:
        host, port = given.get("vllm_server_host", "0.0.0.0"), given.get("vllm_server_port", 8000)
        host = "127.0.0.1" if host == "0.0.0.0" else host
        url = given.get("vllm_server_base_url") or f"http://{host}:{port}"
        put("rollout.server_url", url, "vllm_mode")
        if (seconds := given.get("vllm_server_timeout")) is not None:
            put("rollout.start_timeout_seconds", seconds, "vllm_server_timeout")
    return tree, origins, violations


def _known_keys() -> dict[str, tuple[Any, Any]]:
    """Return TRL's keys, with their types and defaults."""
    from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig
    from trl.scripts.grpo import GRPOScriptArguments

    known = {}
    for kind in (DatasetMixtureConfig, GRPOScriptArguments, ModelConfig, GRPOConfig):
        hints = get_type_hints(kind)
        for field in fields(kind):
            default = None if field.default is MISSING else field.default
            known[field.name] = (hints[field.name], default)
    return known


def _converted(value: Any, hint: Any) -> Any:
    """Return the value as TRL's parser would: it reads YAML 1.1, and texts by the key's type."""
    kinds = {get_origin(kind) or kind for kind in (hint, *get_args(hint))}
    if dict in kinds and isinstance(value, str) and value.startswith("{"):
        with suppress(ValueError):  # TRL says what is wrong with it
            return json.loads(value)
    if not isinstance(value, str) or str in kinds:
        return value
    if bool in kinds and value.lower() in BOOLEANS:
        return BOOLEANS[value.lower()]
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def _put_dataset(mixture: Any, put: Callable[[str, Any, str], None]) -> list[Violation]:
    if not mixture:
        return []
    if not isinstance(mixture, list) or len(mixture) != 1 or not isinstance(mixture[0], dict):
        message = "a mixture of several data sets is not supported; give one, or mix them before"
        return [Violation("datasets", message)]
    known = {key: value for key, value in mixture[0].items() if value is not None}
    for key in known.keys() & OF_A_DATASET.keys():
        put(OF_A_DATASET[key], known[key], "datasets")
    return [
        Violation(f"datasets.{key}", "is not supported; prepare the data set before")
        for key in sorted(known.keys() - OF_A_DATASET.keys())
    ]


def environment_of(flat: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment variables that a file in TRL's format sets, in its key `env`."""
    found = flat.get("env")
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, Mapping) else {}
