"""`qerl-sync plan --json`: the same figures for programs."""

from __future__ import annotations

from typing import Any

from qerl_sync.cli.plan.scenarios import Moment, Scenario

LARGEST = 10


def scenario_json(scenario: Scenario) -> dict[str, Any]:
    """One order under one policy. Tensors are counted from 0."""
    return {
        "order": scenario.order,
        "policy": scenario.policy,
        "max_open_layers": scenario.max_open_layers,
        "peak_buffered_bytes": scenario.peak_buffered_bytes,
        "peak_pinned_bytes": scenario.peak_pinned_bytes,
        "peak_receive_bytes": scenario.peak_receive_bytes,
        "peak_staged_bytes": scenario.peak_staged_bytes,
        "within_budget": scenario.within_budget,
        "causes": [cause.name.lower() for cause in scenario.causes],
        "most_buffered": _moment(scenario.most_buffered),
        "most_pinned": _moment(scenario.most_pinned),
        "most_open": _moment(scenario.most_open),
    }


def _moment(moment: Moment) -> dict[str, Any]:
    return {
        "index": moment.index,
        "name": moment.name,
        "buffered_bytes": moment.buffered_bytes,
        "pinned_bytes": moment.pinned_bytes,
        "open_layers": moment.open_layers,
        "num_holding": len(moment.held),
        "largest": [{"layer": layer, "held_bytes": held} for layer, held in moment.held[:LARGEST]],
    }
