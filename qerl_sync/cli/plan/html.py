"""`qerl-sync plan --html`: one page that needs nothing else, in light and dark, to point at."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from qerl_sync.cli.plan.scenarios import SPILL, Scenario
from qerl_sync.cli.plan.series import (
    POLICY_WORDS,
    Bucket,
    buckets,
    by_order,
    cause_words,
    device_peak,
    shows_receiving,
    shows_staged,
    staged_words,
)
from qerl_sync.meta import format_bytes
from qerl_sync.plan.diagnosis import Cause
from qerl_sync.plan.simulator import open_at_each
from qerl_sync.report.plots import unit_of

TEMPLATE = "page.html"
BUCKETS = 480
LARGEST_AT_PEAK, LARGEST_AT_POINTER = 6, 4
SIDE = 1000  # of the square in which streams are drawn, before it is stretched to its place
HEADROOM = 1.06
FIRST = ' class="first"'
EXPLANATION = (
    "vLLM keeps every tensor that it is given until the module that owns it, its parent layer, is "
    "complete. Buffered: the bytes of the tensors that are kept. Pinned: the memory that they keep "
    "alive, which is more where they are views of larger buffers; a budget limits it."
)
RECEIVING = " Receiving: pinned, and the transport's receive buffers."
STAGED = (
    " Staged: bytes that wait in the worker's host memory until their parent layer is complete."
)


def render_page(
    scenarios: Sequence[Scenario],
    *,
    title: str,
    subtitle: str,
    facts: Sequence[tuple[str, str, str]],
    footer: str = "",
    budget_bytes: int | None = None,
) -> str:
    """Return the page.

    Args:
        facts: (name, value, further words) about the model. The budget follows them.
    """
    orders = by_order(scenarios)
    drawn = {order: [buckets(s, BUCKETS) for s in group] for order, group in orders.items()}
    packed, staged = shows_receiving(scenarios), shows_staged(scenarios)
    columns = ["Receiving"] * packed + ["Staged"] * staged
    keys = [
        f'<span style="--color:var(--{policy})"><span class="swatch"></span>'
        f"{POLICY_WORDS[policy]}</span>"
        for policy in dict.fromkeys(scenario.policy for scenario in scenarios)
    ]
    if any(s.peak_pinned_bytes > s.peak_buffered_bytes for s in scenarios):
        keys.append('<span><span class="dash"></span>pinned</span>')
    if budget_bytes is not None:
        budget = format_bytes(budget_bytes)
        facts = [*facts, ("Budget", budget, "")]
        keys.append(f'<span><span class="dash budget"></span>budget {budget}</span>')
    one_top = HEADROOM * max(device_peak(*scenarios), budget_bytes or 0, 1)
    parts = {
        "title": escape(title),
        "subtitle": escape(subtitle),
        "footer": escape(footer),
        "explanation": escape(EXPLANATION + RECEIVING * packed + STAGED * staged),
        "facts": "".join(
            f'<div class="card"><dt>{escape(name)}</dt><dd>{escape(value)}'
            f"{f'<small>{escape(words)}</small>' if words else ''}</dd></div>"
            for name, value, words in facts
        ),
        "more_heads": "".join(f'<th class="number">{column}</th>' for column in columns),
        "hatched": " Hatched: staged in host memory." * staged,
        "rows": _rows(scenarios, orders, budget_bytes),
        "causes": "".join(
            f"<p><strong>{escape(cause_words(cause)).capitalize()}:</strong> "
            f"{escape(cause.value)}. <strong>Cure:</strong> "
            f"{_code(escape(cause.cure))}.</p>"
            for cause in Cause
            if any(cause in scenario.causes for scenario in scenarios)
        ),
        "keys": "".join(keys),
        "figures": "".join(
            _figure(order, group, drawn[order], one_top, budget_bytes)
            for order, group in orders.items()
        ),
        # "</" would end the script element in the middle of a name.
        "data": json.dumps(_data(orders, drawn), separators=(",", ":"), ensure_ascii=False).replace(
            "</", "<\\/"
        ),
    }
    page = files("qerl_sync.cli.plan").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], page)


def _code(text: str) -> str:
    return re.sub("`(.+?)`", r"<code>\1</code>", text)


def _rows(
    scenarios: Sequence[Scenario],
    orders: Mapping[str, Sequence[Scenario]],
    budget_bytes: int | None,
) -> str:
    """Return a table body for each order, with a line for each policy."""
    packed, staged = shows_receiving(scenarios), shows_staged(scenarios)
    peaks = [device_peak(scenario) + scenario.peak_staged_bytes for scenario in scenarios]
    top = HEADROOM * max(*peaks, budget_bytes or 0, 1)

    def bar(element: str, nbytes: int, left: int = 0) -> str:
        place = f"left:{100 * left / top:.2f}%;" if left else ""
        return f'<i{element} style="{place}width:{100 * nbytes / top:.2f}%"></i>'

    bodies = []
    for order, group in orders.items():
        lines = []
        for scenario in group:
            first = scenario is group[0]
            buffered, pinned = scenario.peak_buffered_bytes, scenario.peak_pinned_bytes
            over = " over" * (scenario.within_budget is False)
            numbers = [(format_bytes(buffered), ""), (format_bytes(pinned), over)]
            if packed:
                numbers.append((format_bytes(scenario.peak_receive_bytes), ""))
            if staged:
                spills = scenario.policy == SPILL
                numbers.append((format_bytes(scenario.peak_staged_bytes) * spills, ""))
            bars = bar("", buffered)
            if pinned > buffered:
                bars += bar(' class="pins"', pinned)
            if scenario.peak_staged_bytes:
                bars += bar(' class="staged"', scenario.peak_staged_bytes, device_peak(scenario))
            if budget_bytes is not None:
                bars += f'<b style="left:{100 * budget_bytes / top:.2f}%"></b>'
            lines += [
                f'<tr{FIRST * first} style="--color:var(--{scenario.policy})">',
                f'<th rowspan="{len(group)}" scope="rowgroup">{escape(order)}</th>' * first,
                f'<td><span class="swatch"></span>{POLICY_WORDS[scenario.policy]}</td>',
                f'<td class="number">{scenario.max_open_layers:,}</td>',
                *(f'<td class="number{mark}">{size}</td>' for size, mark in numbers),
                f'<td class="bar"><div class="track" aria-hidden="true">{bars}</div></td>',
                f'<td class="cause">{", ".join(map(cause_words, scenario.causes))}</td></tr>',
            ]
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    return "".join(bodies)


def _figure(
    order: str,
    group: Sequence[Scenario],
    drawn: Sequence[Sequence[Bucket]],
    one_top: float,
    budget_bytes: int | None,
) -> str:
    """Draw the streams of one order over each other, and list the largest layers at the highest
    point."""
    top = HEADROOM * max(device_peak(*group), 1)
    if budget_bytes is not None and top < budget_bytes < 1.5 * top:
        top = HEADROOM * budget_bytes
    paths = "".join(
        _paths(scenario.policy, parts, top) for scenario, parts in zip(group, drawn, strict=True)
    )
    if budget_bytes is not None:
        paths += f'<path class="budget" d="M0 {_y(budget_bytes, top)}H{SIDE}"/>'
    described = "; ".join(
        f"{POLICY_WORDS[s.policy]}: at most {format_bytes(s.peak_buffered_bytes)} buffered, "
        f"{format_bytes(s.peak_pinned_bytes)} pinned, {s.max_open_layers} open{staged_words(s)}"
        for s in group
    )
    worst = max(group, key=lambda scenario: scenario.peak_buffered_bytes)
    peak = worst.most_buffered
    share = 100 * peak.buffered_bytes / max(worst.total_bytes, 1)
    where = f"Largest at tensor {peak.index + 1:,}, {POLICY_WORDS[worst.policy]}"
    largest = [
        (f"<span>{where}</span>", format_bytes(peak.buffered_bytes)),
        *(
            (f'<span class="path">{escape(layer)}</span>', format_bytes(held))
            for layer, held in peak.held[:LARGEST_AT_PEAK]
        ),
    ]
    rest = peak.held[LARGEST_AT_PEAK:]
    if rest:
        more = f"<span>and {len(rest):,} more</span>"
        largest.append((more, format_bytes(sum(held for _, held in rest))))
    items = "".join(f"<li>{name}<span>{size}</span></li>" for name, size in largest)
    return (
        f'<figure class="card"><header><h3>{escape(order)}</h3><span>at most '
        f"{format_bytes(peak.buffered_bytes)} buffered, {share:.0f}% of the model</span></header>"
        f'<div class="plot" tabindex="0" role="group" '
        f'aria-label="{escape(f"{order}. {described}")}">'
        f'<div class="axis own" aria-hidden="true">{_ticks(top)}</div>'
        f'<div class="axis one" aria-hidden="true">{_ticks(one_top)}</div>'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" aria-hidden="true">'
        f'<g class="stream" style="--one:{top / one_top:.6g}">{paths}</g></svg>'
        f'<div class="hair"></div><div class="ends" aria-hidden="true"><span>tensor 1</span>'
        f"<span>{len(worst.metas):,}</span></div>"
        f'</div><ul class="largest">{items}</ul></figure>'
    )


def _paths(policy: str, parts: Sequence[Bucket], top: float) -> str:
    """Return the SVG paths of one stream: the area, the band from lowest to highest, outlines."""

    def outline(heights: Sequence[int], *, backwards: bool = False) -> str:
        """Return steps "V y H x", from left to right or back. Equal heights are one step."""
        count, steps = len(heights), []
        for i, height in enumerate(heights):
            if i + 1 == count or heights[i + 1] != height:
                x = SIDE * (count - i - 1 if backwards else i + 1) / count
                steps.append(f"V{_y(height, top)}H{x:.5g}")
        return "".join(steps)

    high = outline([part.high_bytes for part in parts])
    low = outline([part.low_bytes for part in reversed(parts)], backwards=True)
    pins = ""
    if any(part.pinned_bytes > part.high_bytes for part in parts):
        pinned = outline([part.pinned_bytes for part in parts])
        pins = f'<path class="pins" d="M0 {pinned[1:]}"/>'
    return (
        f'<g style="--color:var(--{policy})"><path class="area" d="M0 {SIDE}{high}V{SIDE}Z"/>'
        f'<path class="band" d="M0 {high[1:]}{low}Z"/><path d="M0 {high[1:]}"/>{pins}</g>'
    )


def _y(nbytes: float, top: float) -> str:
    return f"{SIDE * (1 - nbytes / top):.5g}"


def _ticks(top: float) -> str:
    """Return labels at round numbers, at most five."""
    scale, unit = unit_of(int(top))
    largest = top / scale
    steps = (s * 10.0**p for p in range(-2, 6) for s in (1, 2, 5))
    step = next(step for step in steps if largest / step <= 5)
    return "".join(
        f'<span style="bottom:{100 * n * step / largest:.2f}%">{n * step:g} {unit}</span>'
        for n in range(int(largest / step) + 1)
    )


def _data(
    orders: Mapping[str, Sequence[Scenario]], drawn: Mapping[str, Sequence[Sequence[Bucket]]]
) -> dict[str, Any]:
    """Return what the pointer shows: for each bucket its extremes, and the largest layers at its
    highest point. Layers go by number: a name may occur in thousands of buckets."""
    numbers: dict[str, int] = {}
    found = []
    for order, group in orders.items():
        streams = []
        for scenario, parts in zip(group, drawn[order], strict=True):
            moments = list(open_at_each(scenario.spans, (part.at for part in parts)))
            streams.append(
                {
                    "policy": scenario.policy,
                    "words": POLICY_WORDS[scenario.policy],
                    "high": [part.high_bytes for part in parts],
                    "pinned": [part.pinned_bytes for part in parts],
                    "open": [part.open_layers for part in parts],
                    "names": [scenario.trace.steps[part.at].name for part in parts],
                    "largest": [
                        [
                            value
                            for layer, size in held[:LARGEST_AT_POINTER]
                            for value in (numbers.setdefault(layer, len(numbers)), size)
                        ]
                        for held in moments
                    ],
                    "others": [max(len(held) - LARGEST_AT_POINTER, 0) for held in moments],
                }
            )
        tensors = len(group[0].metas)
        found.append({"tensors": tensors, "buckets": len(drawn[order][0]), "streams": streams})
    return {"layers": list(numbers), "orders": found}
