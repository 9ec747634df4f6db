"""`qerl-sync plan --html`: one page that needs nothing else, in light and dark, to point at."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
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
    details,
    everywhere,
    highest,
    staged_words,
    unit_of,
)
from qerl_sync.meta import format_bytes
from qerl_sync.plan.diagnosis import Cause

TEMPLATE = "page.html"
BUCKETS = 480
LARGEST_AT_PEAK, LARGEST_AT_POINTER = 6, 4
SIDE = 1000  # of the square in which streams are drawn, before it is stretched to its place
HEADROOM = 1.06
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
        facts: (what, value, further words) about the model.
    """
    orders = by_order(scenarios)
    parts = {
        "title": escape(title),
        "subtitle": escape(subtitle),
        "footer": escape(footer),
        "explanation": escape(
            EXPLANATION + RECEIVING * _is_packed(scenarios) + STAGED * _stages(scenarios)
        ),
        "facts": "".join(_fact(*fact) for fact in facts),
        "more_heads": "".join(
            f'<th class="number">{head}</th>'
            for head, shown in (
                ("Receiving", _is_packed(scenarios)),
                ("Staged", _stages(scenarios)),
            )
            if shown
        ),
        "hatched": " Hatched: staged in host memory." * _stages(scenarios),
        "rows": "".join(
            _rows(order, group, scenarios, budget_bytes) for order, group in orders.items()
        ),
        "causes": _causes(scenarios),
        "keys": _keys(scenarios, budget_bytes),
    }
    drawn = {order: [buckets(s, BUCKETS) for s in group] for order, group in orders.items()}
    one_top = HEADROOM * max(highest(scenarios), budget_bytes or 0, 1)
    parts["figures"] = "".join(
        _figure(order, group, drawn[order], one_top, budget_bytes)
        for order, group in orders.items()
    )
    # "</" would end the script element in the middle of a name.
    data = json.dumps(_data(orders, drawn), separators=(",", ":"), ensure_ascii=False)
    parts["data"] = data.replace("</", "<\\/")
    page = files("qerl_sync.cli.plan").joinpath(TEMPLATE).read_text(encoding="utf-8")
    head, *pieces = page.split("{{")
    filled = [head]
    for piece in pieces:
        name, _, text = piece.partition("}}")
        filled += [parts[name], text]
    return "".join(filled)


def _fact(what: str, value: str, words: str) -> str:
    more = f"<small>{escape(words)}</small>" if words else ""
    return f'<div class="card"><dt>{escape(what)}</dt><dd>{escape(value)}{more}</dd></div>'


def _is_packed(scenarios: Iterable[Scenario]) -> bool:
    return any(scenario.receive is not scenario.trace for scenario in scenarios)


def _stages(scenarios: Iterable[Scenario]) -> bool:
    return any(scenario.policy == SPILL for scenario in scenarios)


def _rows(
    order: str,
    group: Sequence[Scenario],
    scenarios: Sequence[Scenario],
    budget_bytes: int | None,
) -> str:
    """A table body with a line for each policy."""
    top = HEADROOM * max(*map(everywhere, scenarios), budget_bytes or 0, 1)
    lines = []
    for i, scenario in enumerate(group):
        head = f'<th rowspan="{len(group)}" scope="rowgroup">{escape(order)}</th>' if i == 0 else ""
        numbers = _number(scenario.peak_buffered_bytes)
        numbers += _number(scenario.peak_pinned_bytes, over=scenario.within_budget is False)
        if _is_packed(scenarios):
            numbers += _number(scenario.peak_receive_bytes)
        if _stages(scenarios):
            numbers += _number(scenario.peak_staged_bytes) if _stages([scenario]) else "<td></td>"
        causes = ", ".join(cause_words(cause) for cause in scenario.causes)
        lines.append(
            f'<tr{_class("first", i == 0)} style="--color:var(--{escape(scenario.policy)})">{head}'
            f'<td><span class="swatch"></span>{escape(_words(scenario))}</td>'
            f'<td class="number">{scenario.max_open_layers:,}</td>'
            f'{numbers}<td class="bar">{_bar(scenario, top, budget_bytes)}</td>'
            f'<td class="cause">{escape(causes)}</td></tr>'
        )
    return f"<tbody>{''.join(lines)}</tbody>"


def _words(scenario: Scenario) -> str:
    return POLICY_WORDS.get(scenario.policy, scenario.policy)


def _class(name: str, applies: bool) -> str:
    return f' class="{name}"' if applies else ""


def _number(nbytes: int, *, over: bool = False) -> str:
    return f'<td class="number{" over" * over}">{format_bytes(nbytes)}</td>'


def _bar(scenario: Scenario, top: float, budget_bytes: int | None) -> str:
    def percent(nbytes: int) -> str:
        return f"{100 * nbytes / top:.2f}%"

    bar = f'<i style="width:{percent(scenario.peak_buffered_bytes)}"></i>'
    if scenario.peak_pinned_bytes > scenario.peak_buffered_bytes:
        bar += f'<i class="pins" style="width:{percent(scenario.peak_pinned_bytes)}"></i>'
    if scenario.peak_staged_bytes:
        on_device = percent(everywhere(scenario) - scenario.peak_staged_bytes)
        width = percent(scenario.peak_staged_bytes)
        bar += f'<i class="staged" style="left:{on_device};width:{width}"></i>'
    if budget_bytes is not None:
        bar += f'<b style="left:{percent(budget_bytes)}"></b>'
    return f'<div class="track" aria-hidden="true">{bar}</div>'


def _causes(scenarios: Sequence[Scenario]) -> str:
    found = [cause for cause in Cause if any(cause in scenario.causes for scenario in scenarios)]
    return "".join(
        f"<p><strong>{escape(cause_words(cause)).capitalize()}:</strong> {escape(cause.value)}. "
        f"<strong>Cure:</strong> {_with_code(cause.cure)}.</p>"
        for cause in found
    )


def _with_code(text: str) -> str:
    return re.sub(r"`(.+?)`", r"<code>\1</code>", escape(text))


def _keys(scenarios: Sequence[Scenario], budget_bytes: int | None) -> str:
    policies = {scenario.policy: _words(scenario) for scenario in scenarios}
    keys = [
        f'<span style="--color:var(--{escape(policy)})"><span class="swatch"></span>'
        f"{escape(words)}</span>"
        for policy, words in policies.items()
    ]
    if any(s.peak_pinned_bytes > s.peak_buffered_bytes for s in scenarios):
        keys.append('<span><span class="dash"></span>pinned</span>')
    if budget_bytes is not None:
        words = f"budget {format_bytes(budget_bytes)}"
        keys.append(f'<span><span class="dash budget"></span>{words}</span>')
    return "".join(keys)


def _figure(
    order: str,
    group: Sequence[Scenario],
    drawn: Sequence[Sequence[Bucket]],
    one_top: float,
    budget_bytes: int | None,
) -> str:
    """The streams of one order on top of each other, and what is largest at the highest point."""
    top = HEADROOM * max(highest(group), 1)
    if budget_bytes is not None and top < budget_bytes < 1.5 * top:
        top = HEADROOM * budget_bytes
    paths = "".join(
        _paths(scenario.policy, parts, top) for scenario, parts in zip(group, drawn, strict=True)
    )
    if budget_bytes is not None:
        y = _y(budget_bytes, top)
        paths += f'<path class="budget" d="M0 {y}H{SIDE}"/>'
    peaks = "; ".join(
        f"{_words(s)}: at most {format_bytes(s.peak_buffered_bytes)} buffered, "
        f"{format_bytes(s.peak_pinned_bytes)} pinned, {s.max_open_layers} open{staged_words(s)}"
        for s in group
    )
    total = len(group[0].metas)
    return (
        f'<figure class="card"><header><h3>{escape(order)}</h3>'
        f"<span>{escape(_headline(group))}</span></header>"
        f'<div class="plot" tabindex="0" role="group" aria-label="{escape(f"{order}. {peaks}")}">'
        f'<div class="axis own" aria-hidden="true">{_ticks(top)}</div>'
        f'<div class="axis one" aria-hidden="true">{_ticks(one_top)}</div>'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" aria-hidden="true">'
        f'<g class="stream" style="--one:{top / one_top:.6g}">{paths}</g></svg>'
        f'<div class="hair"></div>'
        f'<div class="ends" aria-hidden="true"><span>tensor 1</span><span>{total:,}</span></div>'
        f"</div>{_largest(group)}</figure>"
    )


def _headline(group: Sequence[Scenario]) -> str:
    worst = max(group, key=lambda scenario: scenario.peak_buffered_bytes)
    share = 100 * worst.peak_buffered_bytes / max(worst.total_bytes, 1)
    return f"at most {format_bytes(worst.peak_buffered_bytes)} buffered, {share:.0f}% of the model"


def _paths(policy: str, parts: Sequence[Bucket], top: float) -> str:
    high = _outline([part.high_bytes for part in parts], top)
    low = _outline([part.low_bytes for part in reversed(parts)], top, backwards=True)
    pins = ""
    if any(part.pinned_bytes > part.high_bytes for part in parts):
        outline = _outline([part.pinned_bytes for part in parts], top)
        pins = f'<path class="pins" d="M0 {outline[1:]}"/>'
    return (
        f'<g style="--color:var(--{escape(policy)})">'
        f'<path class="area" d="M0 {SIDE}{high}V{SIDE}Z"/>'
        f'<path class="band" d="M0 {high[1:]}{low}Z"/>'
        f'<path d="M0 {high[1:]}"/>{pins}</g>'
    )


def _outline(heights: Sequence[int], top: float, *, backwards: bool = False) -> str:
    """Steps "V y H x", from left to right or back. Equal heights are one step."""
    count = len(heights)
    steps = []
    for i, height in enumerate(heights):
        if i + 1 < count and heights[i + 1] == height:
            continue
        x = SIDE * (count - i - 1 if backwards else i + 1) / count
        steps.append(f"V{_y(height, top)}H{x:.5g}")
    return "".join(steps)


def _y(nbytes: float, top: float) -> str:
    return f"{SIDE * (1 - nbytes / top):.5g}"


def _ticks(top: float) -> str:
    """Labels at round numbers, at most five."""
    scale, unit = unit_of(int(top))
    largest = top / scale
    step = next(
        step
        for step in (s * 10.0**p for p in range(-2, 6) for s in (1, 2, 5))
        if largest / step <= 5
    )
    return "".join(
        f'<span style="bottom:{100 * n * step / largest:.2f}%">{n * step:g} {unit}</span>'
        for n in range(int(largest / step) + 1)
    )


def _largest(group: Sequence[Scenario]) -> str:
    worst = max(group, key=lambda scenario: scenario.peak_buffered_bytes)
    peak = worst.most_buffered
    head = f"Largest at tensor {peak.index + 1:,}, {_words(worst)}"
    lines = [
        f"<li><span>{escape(head)}</span><span>{format_bytes(peak.buffered_bytes)}</span></li>"
    ]
    lines += [
        f'<li><span class="path">{escape(layer)}</span><span>{format_bytes(held)}</span></li>'
        for layer, held in peak.held[:LARGEST_AT_PEAK]
    ]
    rest = peak.held[LARGEST_AT_PEAK:]
    if rest:
        words = f"and {len(rest):,} more"
        size = format_bytes(sum(held for _, held in rest))
        lines.append(f"<li><span>{words}</span><span>{size}</span></li>")
    return f'<ul class="largest">{"".join(lines)}</ul>'


def _data(
    orders: Mapping[str, Sequence[Scenario]], drawn: Mapping[str, Sequence[Sequence[Bucket]]]
) -> dict[str, Any]:
    """What the pointer shows."""
    numbers: dict[str, int] = {}

    def number(layer: str) -> int:
        return numbers.setdefault(layer, len(numbers))

    found = []
    for order, group in orders.items():
        streams = []
        for scenario, parts in zip(group, drawn[order], strict=True):
            moments = details(scenario, parts, LARGEST_AT_POINTER)
            streams.append(
                {
                    "policy": scenario.policy,
                    "words": _words(scenario),
                    "high": [part.high_bytes for part in parts],
                    "pinned": [part.pinned_bytes for part in parts],
                    "open": [part.open_layers for part in parts],
                    "names": [moment.name for moment in moments],
                    "largest": [
                        [value for layer, held in moment.largest for value in (number(layer), held)]
                        for moment in moments
                    ],
                    "others": [moment.others for moment in moments],
                }
            )
        found.append(
            {
                "tensors": len(group[0].metas),
                "buckets": len(drawn[order][0]),
                "streams": streams,
            }
        )
    return {"layers": list(numbers), "orders": found}
