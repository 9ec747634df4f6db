"""Streams of any length, cut into as many buckets as a picture has room for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qerl_sync.cli.plan.scenarios import Scenario
from qerl_sync.meta import format_bytes
from qerl_sync.plan.diagnosis import Cause
from qerl_sync.plan.simulator import open_at_each

# Policies in the order in which they are drawn and listed, with the words for people.
POLICY_WORDS = {
    "as_given": "as given",
    "by_parent_layer": "by parent layer",
    "within_budget": "within the budget",
    "spill": "spilled",
}
SHORT_WORDS = {
    "as_given": "as given",
    "by_parent_layer": "by layer",
    "within_budget": "in budget",
    "spill": "spilled",
}


class Bucket(NamedTuple):
    """Consecutive tensors. Nothing that was reached among them is lost: lowest and highest stay.

    Attributes:
        first, last: indices of its tensors, both included.
        at: the first of them with the most buffered bytes.
        low_bytes, high_bytes: the least and the most buffered bytes.
        pinned_bytes: the most pinned bytes.
        open_layers: the most open layers.
    """

    first: int
    last: int
    at: int
    low_bytes: int
    high_bytes: int
    pinned_bytes: int
    open_layers: int


@dataclass(frozen=True)
class Detail:
    """What is held at `Bucket.at`: the largest layers, and how many more there are."""

    name: str
    largest: Sequence[tuple[str, int]]
    others: int


def buckets(scenario: Scenario, count: int) -> list[Bucket]:
    """The stream in at most `count` buckets of nearly equal length."""
    steps = scenario.trace.steps
    count = min(count, len(steps))
    result = []
    for number in range(count):
        first, end = number * len(steps) // count, (number + 1) * len(steps) // count
        part = steps[first:end]
        heights = [step.buffered_bytes for step in part]
        high = max(heights)
        result.append(
            Bucket(
                first=first,
                last=end - 1,
                at=first + heights.index(high),
                low_bytes=min(heights),
                high_bytes=high,
                pinned_bytes=max(step.pinned_bytes for step in part),
                open_layers=max(step.open_layers for step in part),
            )
        )
    return result


def details(scenario: Scenario, of: Sequence[Bucket], shown: int) -> list[Detail]:
    """What is held at the highest point of each bucket, its `shown` largest layers by name."""
    moments = open_at_each(scenario.spans, (bucket.at for bucket in of))
    return [
        Detail(scenario.trace.steps[bucket.at].name, held[:shown], max(len(held) - shown, 0))
        for bucket, held in zip(of, moments, strict=True)
    ]


def by_order(scenarios: Sequence[Scenario]) -> dict[str, list[Scenario]]:
    """The scenarios of each order, in the order in which they were given."""
    orders: dict[str, list[Scenario]] = {}
    for scenario in scenarios:
        orders.setdefault(scenario.order, []).append(scenario)
    return orders


def highest(scenarios: Sequence[Scenario]) -> int:
    """The most bytes that any of them buffers or pins."""
    return max((max(s.peak_buffered_bytes, s.peak_pinned_bytes) for s in scenarios), default=0)


def everywhere(scenario: Scenario) -> int:
    """The peaks on the device and in the worker's host memory, one after the other."""
    on_device = max(scenario.peak_buffered_bytes, scenario.peak_pinned_bytes)
    return on_device + scenario.peak_staged_bytes


def staged_words(scenario: Scenario) -> str:
    staged = scenario.peak_staged_bytes
    return f", {format_bytes(staged)} staged in host memory" if staged else ""


def shorten(path: str, width: int) -> str:
    """A path in at most `width` characters: its end tells most, from a separator on."""
    if len(path) <= width:
        return path
    end = path[-(width - 1) :]
    parts = re.split(r"(?<=[./])", end, maxsplit=1)
    return "…" + (parts[1] if len(parts) > 1 and parts[1] else end)


def unit_of(largest_bytes: int) -> tuple[float, str]:
    """The unit in which to draw up to `largest_bytes`: its bytes and its name."""
    for power, unit in ((3, "GiB"), (2, "MiB")):
        if largest_bytes >= 1024**power:
            return 1024.0**power, unit
    return 1024.0, "KiB"


def cause_words(cause: Cause) -> str:
    return cause.name.lower().replace("_", " ")
