"""Find options of the section `sync` that have no effect, given the others.

Such an option is refused, not ignored: a user who sets `verify_tolerance` and forgets `verify:
full` would believe that the sync is verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qerl_sync.config.violations import Violation

# The option, its default, and the option with the only value under which it has an effect.
DEPENDENT = (
    ("spill_budget_bytes", None, "policy", "spill", "reorder"),
    ("spill_directory", None, "policy", "spill", "reorder"),
    ("mirror_budget_bytes", None, "delta", "elements", "off"),
    ("verify_tolerance", None, "verify", "full", "coverage"),
    ("recompute_running", True, "pause_mode", "keep", "keep"),
)
# Nothing is waited for, paused or connected within one process.
BETWEEN_PROCESSES = {
    "chunks_in_flight": 2,
    "timeout_seconds": 300.0,
    "trainer_address": "127.0.0.1",
    "pause_mode": "keep",
    "recompute_running": True,
}


def without_effect(sync: Mapping[str, Any], *, in_process: bool = False) -> list[Violation]:
    """Return the options that have no effect; places are relative to the section.

    Args:
        sync: the options; those that are missing have their defaults.
        in_process: the engine is in the trainer's process, whatever `transport` says.
    """
    violations = []
    for name, default, other, needed, otherwise in DEPENDENT:
        actual = sync.get(other) or otherwise
        if sync.get(name, default) != default and actual != needed:
            violations.append(
                Violation(
                    name,
                    f"has an effect only with `{other}: {needed}`, and `{other}` is {actual}; "
                    "leave it out, or change that",
                )
            )
    if in_process or sync.get("transport") == "inproc":
        violations += [
            Violation(
                name,
                "has no effect on an engine in the trainer's own process; leave it out, or choose "
                "another place for the engine (`rollout.mode`)",
            )
            for name, default in BETWEEN_PROCESSES.items()
            if sync.get(name, default) != default
        ]
    return violations
