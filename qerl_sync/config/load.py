"""Load a YAML file and overrides into a `TrainConfig`, or raise one error that lists all
problems.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from qerl_sync.config.contradictions import contradictions
from qerl_sync.config.foreign import foreign_violations
from qerl_sync.config.models import TrainConfig
from qerl_sync.config.violations import config_error, schema_violations
from qerl_sync.config.yaml_tree import apply_overrides, read_tree
from qerl_sync.errors import ConfigError


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    check_foreign: bool = True,
    trl_format: bool = False,
) -> TrainConfig:
    """Read the configuration at `path` and put `overrides` ("section.key=value") on top.

    Example:
        overrides = ["sync.policy=warn", "trainer.max_steps=20"]
        config = load_config("configs/grpo_cpu.yaml", overrides)
        print(config.sync.policy)

    Args:
        check_foreign: also check the keys of the sections that are handed on to TRL, vLLM and
            transformers as they are, which imports those packages (some seconds).
        trl_format: the file is one of `trl grpo --config` (see `trl_flat`), and the overrides are
            in our sections all the same. Sets the environment variables of its key `env`.

    Raises:
        ConfigError: lists every violation with its place, its line and the nearest valid key.
    """
    tree, origins, violations = read_tree(_read(Path(path)), str(path))
    if trl_format:
        from qerl_sync.config.trl_flat import environment_of, sections_of

        os.environ.update(environment_of(tree))  # before TRL is imported
        tree, places, unsupported = sections_of(tree, origins)
        origins |= places
        violations += unsupported
    violations += apply_overrides(tree, overrides, origins)
    config = None
    try:
        config = TrainConfig.model_validate(tree)
    except ValidationError as exc:
        violations += schema_violations(exc, TrainConfig)
    violations += contradictions(tree)
    if check_foreign:
        violations += foreign_violations(tree)
    if violations or config is None:
        # What a section itself finds is found in the tree too: there also beside wrong values.
        raise config_error(str(path), list(dict.fromkeys(violations)), origins)
    return config


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as exc:
        beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        there = f"; {path.parent} has {', '.join(beside)}" if beside else ""
        raise ConfigError(f"no configuration file {path}{there}") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read as a text file: {exc}") from exc
