"""Shared by table, picture and page: what streams are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby

from qerl_sync.cli.plan.scenarios import SPILL, Scenario
from qerl_sync.meta import format_bytes
from qerl_sync.plan.diagnosis import Cause

# Policies in the order in which they are drawn and listed, with the words for people.
POLICY_WORDS = {
    "warn": "warn",
    "reorder": "reorder",
    "reorder_in_budget": "reorder within the budget",
    "spill": "spill",
}


def by_order(scenarios: Sequence[Scenario]) -> dict[str, list[Scenario]]:
    """Group scenarios by order, in the order in which they were given."""
    groups = groupby(scenarios, lambda scenario: scenario.order)
    return {order: list(group) for order, group in groups}


def more_columns(scenarios: Sequence[Scenario]) -> dict[str, Callable[[Scenario], str]]:
    """Return the columns that some of the scenarios need besides: what each has there, by title."""
    found: dict[str, Callable[[Scenario], str]] = {}
    if any(scenario.receive is not scenario.trace for scenario in scenarios):
        found["receiving"] = lambda scenario: format_bytes(scenario.peak_receive_bytes)
    if any(scenario.policy == SPILL for scenario in scenarios):
        found["staged"] = lambda scenario: (
            format_bytes(scenario.peak_staged_bytes) if scenario.policy == SPILL else ""
        )
    return found


def device_peak(*scenarios: Scenario) -> int:
    """Return the most bytes that any of them buffers or pins."""
    return max((max(s.peak_buffered_bytes, s.peak_pinned_bytes) for s in scenarios), default=0)


def staged_words(scenario: Scenario) -> str:
    staged = scenario.peak_staged_bytes
    return f", {format_bytes(staged)} staged in host memory" if staged else ""


def cause_words(cause: Cause) -> str:
    return cause.name.lower().replace("_", " ")


def shorten(path: str, width: int) -> str:
    """Cut a path to at most `width` characters, from a separator on: its end tells most."""
    if len(path) <= width:
        return path
    end = path[-(width - 1) :]
    parts = re.split(r"(?<=[./])", end, maxsplit=1)
    return "…" + (parts[1] if len(parts) > 1 and parts[1] else end)
