"""`qerl-sync plan --html`: one page that needs nothing else, in light and dark, to point at."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from qerl_sync import __version__
from qerl_sync.cli.plan.run import Outcome
from qerl_sync.cli.plan.scenarios import Scenario
from qerl_sync.cli.plan.series import (
    POLICY_WORDS,
    by_order,
    cause_words,
    device_peak,
    more_columns,
    staged_words,
)
from qerl_sync.meta import format_bytes
from qerl_sync.plan.diagnosis import Cause
from qerl_sync.plan.simulator import open_at_each
from qerl_sync.report.page import (
    HEADROOM,
    Plot,
    Stream,
    buckets,
    code,
    draw,
    fill,
    key,
    render,
)

TEMPLATE = "body.html"
BUCKETS = 480
LARGEST_AT_PEAK, LARGEST_AT_POINTER = 6, 4
FIRST = ' class="first"'
EXPLANATION = (
    "vLLM keeps every tensor that it is given until the module that owns it, its parent layer, is "
    "complete. Buffered: the bytes of the tensors that are kept. Pinned: the memory that they keep "
    "alive, which is more where they are views of larger buffers; a budget limits it."
)
MORE_EXPLANATION = {
    "receiving": " Receiving: pinned, and the transport's receive buffers.",
    "staged": " Staged: bytes that wait in the worker's host memory until their parent layer is "
    "complete.",
}


def render_page(outcome: Outcome) -> str:
    """Return the page."""
    scenarios, budget_bytes = outcome.scenarios, outcome.budget_bytes
    layer, held = outcome.largest_layer
    facts = [
        ("Tensors", f"{len(outcome.found.metas):,}", ""),
        ("Size", format_bytes(outcome.total_bytes), outcome.dtypes),
        ("Parent layers", f"{len(outcome.layer_bytes):,}", ""),
        ("Largest parent layer", format_bytes(held), layer),
    ]
    more = more_columns(scenarios)
    keys = [
        key(policy, POLICY_WORDS[policy])
        for policy in dict.fromkeys(scenario.policy for scenario in scenarios)
    ]
    if any(s.peak_pinned_bytes > s.peak_buffered_bytes for s in scenarios):
        keys.append('<span><span class="dash"></span>pinned</span>')
    if budget_bytes is not None:
        budget = format_bytes(budget_bytes)
        facts.append(("Budget", budget, ""))
        keys.append(f'<span><span class="dash budget"></span>budget {budget}</span>')
    one_top = HEADROOM * max(device_peak(*scenarios), budget_bytes or 0, 1)
    orders = by_order(scenarios)
    plots = [Plot([_stream(s) for s in group], len(group[0].metas)) for group in orders.values()]
    figures = [
        _figure(order, group, plot, one_top, budget_bytes)
        for (order, group), plot in zip(orders.items(), plots, strict=True)
    ]
    parts = {
        "explanation": escape(EXPLANATION + "".join(MORE_EXPLANATION[title] for title in more)),
        "more_heads": "".join(f'<th class="number">{title.capitalize()}</th>' for title in more),
        "hatched": " Hatched: staged in host memory." * ("staged" in more),
        "rows": _rows(scenarios, budget_bytes),
        "causes": "".join(
            f"<p><strong>{escape(cause_words(cause)).capitalize()}:</strong> "
            f"{escape(cause.text)}. <strong>Cure:</strong> "
            f"{code(escape(cause.cure))}.</p>"
            for cause in Cause
            if any(cause in scenario.causes for scenario in scenarios)
        ),
        "keys": "".join(keys),
        "figures": "".join(figures),
    }
    template = files("qerl_sync.cli.plan").joinpath(TEMPLATE).read_text(encoding="utf-8")
    title = f"{outcome.asked.name} {outcome.architecture}".rstrip()
    return render(
        title=title,
        head=f"{title}: what its weight sync would hold",
        subtitle=outcome.origin,
        facts=facts,
        body=fill(template, parts),
        plots=plots,
        footer=f"Made by qerl-sync {__version__} with `qerl-sync plan`.",
    )


def _stream(scenario: Scenario) -> Stream:
    parts = buckets(scenario.trace, BUCKETS)
    moments = list(open_at_each(scenario.spans, (part.at for part in parts)))
    return Stream(
        color=scenario.policy,
        words=POLICY_WORDS[scenario.policy],
        parts=parts,
        held=[held[:LARGEST_AT_POINTER] for held in moments],
        others=[max(len(held) - LARGEST_AT_POINTER, 0) for held in moments],
    )


def _rows(scenarios: Sequence[Scenario], budget_bytes: int | None) -> str:
    """Return a table body for each order, with a line for each policy."""
    more = more_columns(scenarios)
    peaks = [device_peak(scenario) + scenario.peak_staged_bytes for scenario in scenarios]
    top = HEADROOM * max(*peaks, budget_bytes or 0, 1)

    def bar(element: str, nbytes: int, left: int = 0) -> str:
        place = f"left:{100 * left / top:.2f}%;" if left else ""
        return f'<i{element} style="{place}width:{100 * nbytes / top:.2f}%"></i>'

    bodies = []
    for order, group in by_order(scenarios).items():
        lines = []
        for scenario in group:
            first = scenario is group[0]
            buffered, pinned = scenario.peak_buffered_bytes, scenario.peak_pinned_bytes
            over = " over" * (scenario.within_budget is False)
            numbers = [(format_bytes(buffered), ""), (format_bytes(pinned), over)]
            numbers += [(text(scenario), "") for text in more.values()]
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
    plot: Plot,
    one_top: float,
    budget_bytes: int | None,
) -> str:
    """Draw the streams of one order over each other, and list the largest layers at the highest
    point."""
    top = HEADROOM * max(device_peak(*group), 1)
    if budget_bytes is not None and top < budget_bytes < 1.5 * top:
        top = HEADROOM * budget_bytes
    described = "; ".join(
        f"{POLICY_WORDS[s.policy]}: at most {format_bytes(s.peak_buffered_bytes)} buffered, "
        f"{format_bytes(s.peak_pinned_bytes)} pinned, {s.max_open_layers} open{staged_words(s)}"
        for s in group
    )
    worst = max(group, key=lambda scenario: scenario.peak_buffered_bytes)
    peak = worst.most_buffered
    share = 100 * peak.buffered_bytes / max(worst.total_bytes, 1)
    where = f"Largest at tensor {peak.index + 1:,}, {POLICY_WORDS[worst.policy]}"
    largest = "".join(
        f'<li><span class="path">{escape(layer)}</span><span>{format_bytes(held)}</span></li>'
        for layer, held in peak.largest(LARGEST_AT_PEAK)
    )
    drawn = draw(
        plot,
        label=f"{order}. {described}",
        top=top,
        one_top=one_top,
        budget_bytes=budget_bytes,
    )
    return (
        f'<figure class="card"><header><h3>{escape(order)}</h3><span>at most '
        f"{format_bytes(peak.buffered_bytes)} buffered, {share:.0f}% of the model</span></header>"
        f"{drawn}"
        f'<ul class="largest"><li><span>{where}</span>'
        f"<span>{format_bytes(peak.buffered_bytes)}</span></li>{largest}</ul></figure>"
    )
