"""The page of a run, as HTML in one file or as Markdown, from the same tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from statistics import median
from typing import Any, NamedTuple

from qerl_sync import __version__
from qerl_sync.buffers.trace import Trace
from qerl_sync.meta import format_bytes
from qerl_sync.report.findings import NO_FINDINGS, Finding, explain
from qerl_sync.report.page import (
    HEADROOM,
    SIDE,
    Plot,
    Stream,
    buckets,
    code,
    draw,
    key,
    render,
    ticks,
)
from qerl_sync.report.plots import MOVING_MEAN_STEPS, finite_curve, moving_mean, unit_of
from qerl_sync.report.recorded import RecordedRun
from qerl_sync.report.summary import WINDOW, summarize

# Most buckets of a recorded stream, and points of a curve: a page of 1,000 syncs loads at once.
BUCKETS, POINTS = 240, 1000
SHOWN_SYNCS, SHOWN_WORKERS, SHOWN_LAYERS = 20, 32, 20
HEADINGS = {"failed": "Failed", "warning": "Warning", "advice": "Advice"}
# Colours of the template for the traces of a sync.
COLORS = {"as given": "spill", "predicted": "predicted", "measured": "measured"}


class Table(NamedTuple):
    """Rows of texts. Columns after the first `left` are numbers."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


class Curve(NamedTuple):
    """Values over the steps or versions of a run. `faint`: pale, and not in the legend."""

    color: str
    words: str
    values: Sequence[float]
    faint: bool = False


def run_page(run: RecordedRun, bar: str = "") -> str:
    """Return the HTML page of a run. `bar`: HTML that precedes the findings."""
    plots: list[Plot] = []
    body = [
        bar,
        _heading("Findings", ""),
        "".join(map(_finding, explain(run))) or f"<p>{NO_FINDINGS}</p>",
    ]
    if charts := _charts(run):
        body += [_heading("Along the run", ""), f'<div class="streams">{"".join(charts)}</div>']
    if timelines := _timelines(run, plots):
        words = (
            "What vLLM held while one sync arrived, from the first tensor to the last. Point at "
            "it, or focus it and use the arrow keys, to see which tensors are handed over there."
        )
        body += [_heading("Inside a sync", words), timelines]
    body += [_heading(title, "") + _table(table) for title, table in _tables(run)]
    return render(
        title=_title(run),
        head=f"{_title(run)}: its weight syncs",
        subtitle=str(run.directory.absolute()),
        facts=_facts(run),
        body="\n".join(body),
        plots=plots,
        footer=f"Made by qerl-sync {__version__} with `qerl-sync report`.",
    )


def run_markdown(run: RecordedRun) -> str:
    """Return the same as Markdown, without pictures."""
    lines = [f"# {_title(run)}", "", f"`{run.directory.absolute()}`", ""]
    lines += [
        f"- {name}: **{value}**{words and f' ({words})'}" for name, value, words in _facts(run)
    ]
    findings = explain(run)
    lines += ["", "## Findings", "", *([] if findings else [NO_FINDINGS, ""])]
    for finding in findings:
        lines += [f"### {HEADINGS[finding.kind]}: {finding.what}", ""]
        lines += [f"- {name}: {'; '.join(text.splitlines())}" for name, text in finding.rows()]
        lines.append("")
    for title, table in _tables(run):
        lines += [f"## {title}", "", table.caption, "", _markdown_row(table.heads)]
        number = len(table.heads) - table.left
        lines.append(_markdown_row(["---"] * table.left + ["---:"] * number))
        lines += [*map(_markdown_row, table.rows), ""]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _title(run: RecordedRun) -> str:
    model = run.config.get("model") or {}
    path, tiny = model.get("path"), model.get("tiny") or {}
    name = path or (f"a tiny {tiny['architecture']}" if tiny else "")
    return f"{run.directory.absolute().name}: {name}" if name else run.directory.absolute().name


def _facts(run: RecordedRun) -> list[tuple[str, str, str]]:
    # From what is there so far: summary.json is written when a run ends.
    numbers = summarize(run.log, run.syncs, wall_seconds=0.0, versions={})
    facts = []
    if numbers.reward_first is not None and numbers.reward_last is not None:
        words = f"from {numbers.reward_first:.3f}, means of {WINDOW} logged steps"
        facts.append(("Reward", f"{numbers.reward_last:.3f}", words))
    facts.append(("Syncs", f"{len(run.syncs):,}", f"{len(run.failures):,} failed"))
    if not run.syncs:
        return facts
    last_sync = run.syncs[-1]
    total = [sync["seconds"]["total"] for sync in run.syncs]
    # Of summary.json alone: with `sync.when: eager`, syncs.jsonl does not have what was waited.
    share = run.summary.get("sync_time_share")
    of_steps = f"{share:.1%} of the training steps" if share else ""
    pinned = f"{format_bytes(numbers.peak_pinned_bytes_measured)} pinned"
    budget = last_sync["budget_bytes"]
    exact = sum(sync["prediction_exact"] for sync in run.syncs)
    unsent_bytes = sum(sync["unsent_bytes"] for sync in run.syncs)
    skipped = f"{format_bytes(unsent_bytes)} were unchanged" if unsent_bytes else ""
    kind, _, reason = last_sync["transport"].partition(": ")
    facts += [
        ("A sync takes", f"{median(total):.3g} s", of_steps or f"at most {max(total):.3g} s"),
        ("Sent", format_bytes(numbers.sent_bytes), skipped),
        ("Peak buffered", format_bytes(numbers.peak_buffered_bytes_measured), pinned),
        ("Budget", format_bytes(budget) if budget else "none", ""),
        ("Predicted exactly", f"{exact:,} of {len(run.syncs):,}", "tensor by tensor"),
        ("Policy", last_sync["policy"], f"verify: {run.sync_options.get('verify', 'not known')}"),
        ("Transport", kind, reason),
    ]
    if numbers.logprob_gap_max is not None:
        gap = f"{numbers.logprob_gap_max:.1e}"
        facts.append(("Largest logprob gap", gap, "trainer to vLLM"))
    if versions := run.summary.get("versions"):
        facts.append(("vLLM", versions.get("vllm", "?"), f"torch {versions.get('torch', '?')}"))
    return facts


def _tables(run: RecordedRun) -> list[tuple[str, Table]]:
    """Return the tables, each with its heading."""
    if not run.syncs:
        return []
    return [
        *([("Recorded syncs", _recorded(run))] if run.records else []),
        ("Phases", _phases(run)),
        ("Parent layers", _layers(run)),
        ("The last syncs", _last_syncs(run)),
    ]


def _recorded(run: RecordedRun) -> Table:
    rows = []
    for record in reversed(run.records):
        # Of the worker that held most; a sync that failed before it began has a prediction alone.
        files = [*record["workers"], {"predicted": record.get("planned"), "measured": None}][0]
        predicted, measured = (
            run.trace(files[name]) if files[name] else None for name in ("predicted", "measured")
        )
        rows.append(
            [
                _name(record),
                ", ".join(record["unusual"]),
                *(format_bytes(t.peak_pinned_bytes) if t else "" for t in (predicted, measured)),
                format_bytes(b) if (b := record.get("budget_bytes")) else "",
                f"{record['seconds']['total']:.3f}",
            ]
        )
    heads = ["Sync", "Unusual", "Pinned, predicted", "Pinned, measured", "Budget", "Seconds"]
    return Table("The last ones, and for longer those that were unusual.", heads, rows, left=2)


def _phases(run: RecordedRun) -> Table:
    """Return seconds by phase: medians over the syncs, on the trainer and on each worker."""
    sums: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sync in run.syncs[-100:]:
        for process in ({"worker": "trainer", **sync}, *sync["workers"]):
            for phase, seconds in process["seconds"].items():
                sums[process["worker"]][phase].append(seconds)
    shown = dict(list(sums.items())[: SHOWN_WORKERS + 1])
    phases = list(dict.fromkeys(phase for found in shown.values() for phase in found))
    phases.sort(key="total".__eq__)  # the last column; the others stay in their order
    rows = [
        [who, *(f"{median(found[p]):.4f}" if p in found else "" for p in phases)]
        for who, found in shown.items()
    ]
    more = f" {len(sums) - len(shown):,} more workers are not shown." * (len(sums) > len(shown))
    return Table(
        "Seconds, medians of the last 100 syncs. load and wait overlap with the trainer's phases; "
        f"verify is a part of the others on a worker.{more}",
        ["Process", *phases],
        rows,
    )


def _layers(run: RecordedRun) -> Table:
    """Return the parent layers that are largest, and those that took longest to process."""
    # A sync of an adapter alone has none.
    found = (r["largest_layers"] for r in reversed(run.records) if r.get("largest_layers"))
    sizes = dict(next(found, []))
    slowest: dict[str, float] = {}
    for sync in run.syncs[-SHOWN_SYNCS:]:
        for worker in sync["workers"]:
            for layer, seconds in worker.get("slowest_layers", {}).items():
                slowest[layer] = max(slowest.get(layer, 0.0), seconds)
    slowest_first = sorted(slowest, key=lambda layer: -slowest[layer])
    names = list(dict.fromkeys([*sizes, *slowest_first]))[: 2 * SHOWN_LAYERS]
    rows = [
        [
            name,
            format_bytes(sizes[name]) if name in sizes else "",
            f"{1000 * slowest[name]:.2f}" if name in slowest else "",
        ]
        for name in names
    ]
    return Table(
        "The largest of the last recorded sync, and those that vLLM took longest to process in the "
        "last syncs, at most and on any worker. On a GPU: to launch.",
        ["Parent layer", "Bytes", "Milliseconds"],
        rows,
    )


def _last_syncs(run: RecordedRun) -> Table:
    rows = [
        [
            f"{sync['version']:,}",
            f"{sync['step']:,}",
            f"{sync['seconds']['total']:.3f}",
            format_bytes(sync["sent_bytes"]),
            format_bytes(sync["peak_pinned_bytes_measured"]),
            f"{sync['max_open_layers_measured']:,}",
            "exact" if sync["prediction_exact"] else "differs",
        ]
        for sync in reversed(run.syncs[-SHOWN_SYNCS:])
    ]
    heads = ["Version", "Step", "Seconds", "Sent", "Pinned", "Open layers", "Prediction"]
    return Table(f"The last {len(rows):,} of {len(run.syncs):,}.", heads, rows, left=0)


def _heading(title: str, words: str) -> str:
    return f"<h2>{escape(title)}</h2>" + (f"<p>{escape(words)}</p>" if words else "")


def _finding(finding: Finding) -> str:
    rows = "".join(f"<dt>{name}</dt><dd>{code(escape(text))}</dd>" for name, text in finding.rows())
    return (
        f'<article class="card finding" style="--color:var(--{finding.kind})">'
        f"<h3>{HEADINGS[finding.kind]}: {escape(finding.what)}</h3><dl>{rows}</dl></article>"
    )


def _table(table: Table) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        kinds = (' class="number"' * (place >= table.left) for place in range(len(cells)))
        found = (f"<{tag}{k}>{escape(cell)}</{tag}>" for k, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(found)}</tr>"

    return (
        f'<div class="card scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}">'
        f'<table class="plain"><caption>{escape(table.caption)}</caption>'
        f"<thead>{row('th', table.heads)}</thead>"
        f"<tbody>{''.join(row('td', cells) for cells in table.rows)}</tbody></table></div>"
    )


def _charts(run: RecordedRun) -> list[str]:
    """Draw what changes along a run."""
    found = []
    steps, values = finite_curve(run.rewards)
    if len(steps) > 1:
        means = moving_mean(values, MOVING_MEAN_STEPS)
        curves = [
            Curve("measured", "each logged step", values, faint=True),
            Curve("measured", f"mean of {MOVING_MEAN_STEPS}", means),
        ]
        found.append(_chart("Reward", "step", steps, curves))
    syncs = run.syncs
    if len(syncs) > 1:
        versions = [sync["version"] for sync in syncs]
        phases = {"total": "measured", "load": "advice", "gather": "predicted"}
        curves = [
            Curve(color, phase, [sync["seconds"][phase] for sync in syncs])
            for phase, color in phases.items()
        ]
        found.append(_chart("Seconds of a sync", "version", versions, curves))
        curves = [
            Curve(words, words, [sync[f"peak_pinned_bytes_{words}"] for sync in syncs])
            for words in ("predicted", "measured")
        ]
        budgets = [sync["budget_bytes"] for sync in syncs]
        if all(budgets):
            curves.append(Curve("budget", "budget", budgets))
        found.append(_chart("Peak pinned", "version", versions, curves, in_bytes=True))
    return found


def _chart(
    title: str, axis: str, xs: Sequence[int], curves: Sequence[Curve], *, in_bytes: bool = False
) -> str:
    """Draw curves on one scale from 0, or from their lowest value where that is less."""
    values = [y for curve in curves for y in curve.values]
    low, high = min(0.0, *values), max(*values, 1e-9)
    top = low + HEADROOM * (high - low)
    left, right = xs[0], xs[-1]
    paths = []
    for curve in curves:
        points = _thinned(list(zip(xs, curve.values, strict=True)))
        steps = "L".join(
            f"{SIDE * (x - left) / max(right - left, 1e-9):.4g} "
            f"{SIDE * (top - y) / (top - low):.4g}"
            for x, y in points
        )
        faint = ' class="faint"' if curve.faint else ""
        paths.append(f'<path{faint} style="--color:var(--{curve.color})" d="M{steps}"/>')
    scale, unit = unit_of(int(high)) if in_bytes else (1.0, "")

    def words(value: float) -> str:
        return f"{value / scale:.3g} {unit}".strip()

    label = "; ".join(
        f"{c.words}: from {words(c.values[0])} to {words(c.values[-1])}, at most "
        f"{words(max(c.values))}"
        for c in curves
    )
    return (
        f'<figure class="card"><header><h3>{escape(title)}</h3><div class="keys">'
        f"{''.join(key(c.color, c.words) for c in curves if not c.faint)}</div></header>"
        f'<div class="plot still chart" role="img" aria-label="{escape(f"{title}. {label}")}">'
        f'<div class="axis" aria-hidden="true">{ticks(top, low=low, scale=scale, unit=unit)}</div>'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" aria-hidden="true">'
        f'{"".join(paths)}</svg><div class="ends" aria-hidden="true"><span>{axis} {left:,.0f}'
        f"</span><span>{right:,.0f}</span></div></div></figure>"
    )


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most about `POINTS` points, with the highest of each stretch and the last one."""
    stride = -(-len(points) // POINTS)
    found = [
        max(points[i : i + stride], key=lambda point: point[1])
        for i in range(0, len(points), stride)
    ]
    return found if found[-1] == points[-1] else [*found, points[-1]]


def _timelines(run: RecordedRun, plots: list[Plot]) -> str:
    """Draw each recorded sync, those with equal traces once; empty if there is none."""
    figures: dict[tuple[str, ...], str] = {}
    shown: set[str] = set()
    options: dict[str, list[str]] = {"Unusual": [], "The last ones": []}
    for record in reversed(run.records):
        for worker in record["workers"] or [{"worker": "", "predicted": record.get("planned")}]:
            files = (worker["predicted"], worker.get("measured"), record.get("as_given"))
            traces = {
                words: run.trace(name) if name else None
                for words, name in zip(("predicted", "measured", "as given"), files, strict=True)
            }
            drawn = {words: trace for words, trace in traces.items() if trace and trace.steps}
            if "predicted" not in drawn:
                continue
            if traces["as given"] == traces["predicted"]:
                del drawn["as given"]
            budget = record.get("budget_bytes")
            shown |= {*drawn, *(["budget"] if budget else [])}
            identity = (*map(str, files), str(budget))
            if identity not in figures:
                figures[identity] = _timeline(len(figures), drawn, budget, plots)
            name = f"{_name(record)}{worker['worker'] and ', ' + worker['worker']}"
            peaks = "; ".join(
                f"{words}: {format_bytes(t.peak_buffered_bytes)} buffered, "
                f"{format_bytes(t.peak_pinned_bytes)} pinned, {t.max_open_layers} open"
                for words, t in drawn.items()
            )
            within = f"; budget: {format_bytes(budget)}" if budget else ""
            unusual = record["unusual"]
            options["Unusual" if unusual else "The last ones"].append(
                f'<option data-shows="{list(figures).index(identity)}" '
                f'data-words="{escape(peaks + within)}">'
                f"{escape(name + (': ' + ', '.join(unusual) if unusual else ''))}</option>"
            )
    if not figures:
        return ""
    groups = "".join(
        f'<optgroup label="{label}">{"".join(found)}</optgroup>'
        for label, found in reversed(options.items())
        if found
    )
    keys = "".join(key(color, words) for words, color in COLORS.items() if words in shown)
    keys += '<span><span class="dash"></span>pinned</span>'
    if "budget" in shown:
        keys += '<span><span class="dash budget"></span>budget</span>'
    return (
        f'<div class="bartools"><label>Sync <select id="pick">{groups}</select></label>'
        f'<div class="keys">{keys}</div></div>'
        f'<p id="picked" aria-live="polite"></p>{"".join(figures.values())}'
    )


def _timeline(
    number: int, traces: Mapping[str, Trace], budget_bytes: int | None, plots: list[Plot]
) -> str:
    streams = [
        Stream(color, words, buckets(traces[words], BUCKETS))
        for words, color in COLORS.items()
        if words in traces
    ]
    plots.append(Plot(streams, len(traces["predicted"].steps)))
    peak = max(max(t.peak_pinned_bytes, t.peak_buffered_bytes) for t in traces.values())
    top = HEADROOM * max(peak, 1)
    if budget_bytes is not None and top < budget_bytes < 3 * top:
        top = HEADROOM * budget_bytes
    drawn = draw(
        plots[-1],
        label="Bytes that vLLM holds along the stream: as given, predicted, measured",
        top=top,
        one_top=top,
        budget_bytes=budget_bytes,
    )
    hidden = " hidden" if number else ""
    return f'<figure class="card" data-figure="{number}"{hidden}>{drawn}</figure>'


def _name(record: Mapping[str, Any]) -> str:
    if "failure" in record:
        return f"failed after version {record['version']}, step {record['step']}"
    return f"version {record['version']}, step {record['step']}"
