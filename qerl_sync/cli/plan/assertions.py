"""Limits that a plan must keep: `max_open_layers=1`, `peak_buffered_bytes=2GiB`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from qerl_sync.cli.plan.scenarios import Scenario
from qerl_sync.errors import ConfigError
from qerl_sync.meta import format_bytes, parse_bytes

# What can be limited: what the number counts, and the scenario's moment at which it is at its peak.
FIELDS = {
    "max_open_layers": ("parent layers open at once", "most_open"),
    "peak_buffered_bytes": ("buffered", "most_buffered"),
    "peak_pinned_bytes": ("pinned", "most_pinned"),
    "peak_receive_bytes": ("pinned or in receive buffers", ""),
    "peak_staged_bytes": ("staged in host memory", ""),
}


@dataclass(frozen=True)
class Assertion:
    """No scenario may have more than `limit` in `field`."""

    field: str
    limit: int

    def failures(self, scenarios: Sequence[Scenario]) -> list[str]:
        """Describe each scenario that breaks the limit."""
        found = []
        for scenario in scenarios:
            value = getattr(scenario, self.field)
            if value > self.limit:
                text = f"{scenario.order}, {scenario.policy}: {self._words(value)}"
                if name := FIELDS[self.field][1]:
                    moment = getattr(scenario, name)
                    text += f" at tensor {moment.index + 1:,} ({moment.name})"
                found.append(text)
        return found

    def text(self) -> str:
        return f"at most {self._words(self.limit)}"

    def to_json(self, scenarios: Sequence[Scenario]) -> dict[str, Any]:
        failures = self.failures(scenarios)
        return {
            "field": self.field,
            "limit": self.limit,
            "holds": not failures,
            "failures": failures,
        }

    def _words(self, number: int) -> str:
        value = format_bytes(number) if self.field.endswith("_bytes") else f"{number:,}"
        return f"{value} {FIELDS[self.field][0]}"


def parse_assertion(text: str) -> Assertion:
    """Parse "FIELD=LIMIT".

    Raises:
        ConfigError: there is no such field, or the limit is no number of what it counts.
    """
    field, sign, limit = (part.strip() for part in text.partition("="))
    if not sign:
        raise ConfigError(f"--assert {text!r} has no limit; write for example max_open_layers=1")
    if field not in FIELDS:
        close = get_close_matches(field, FIELDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(FIELDS)}"
        raise ConfigError(f"--assert {text!r}: nothing is called {field!r}; {hint}")
    if field.endswith("_bytes"):
        return Assertion(field, parse_bytes(limit))
    if not limit.isdecimal():
        raise ConfigError(f"--assert {text!r}: {limit!r} is no whole number")
    return Assertion(field, int(limit))
