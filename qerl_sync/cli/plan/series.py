"""Shared by table, picture and page: what streams are called."""

from __future__ import annotations

import re
from collections.abc import Sequence

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
    orders: dict[str, list[Scenario]] = {}
    for scenario in scenarios:
        orders.setdefault(scenario.order, []).append(scenario)
    return orders


def shows_receiving(scenarios: Sequence[Scenario]) -> bool:
    """Return whether receive buffers make a difference, so that they get a column."""
    return any(scenario.receive is not scenario.trace for scenario in scenarios)


def shows_staged(scenarios: Sequence[Scenario]) -> bool:
    return any(scenario.policy == SPILL for scenario in scenarios)


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
