"""Parts of HTML pages that need neither a network nor another file, in light and dark."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from math import ceil, floor, log10
from typing import Any, NamedTuple

from qerl_sync.buffers.trace import Trace
from qerl_sync.report.plots import unit_of

TEMPLATE = "page.html"
SIDE = 1000  # of the square in which streams are drawn, before it is stretched to its place
HEADROOM = 1.06


class Bucket(NamedTuple):
    """Consecutive tensors, with the extremes that were reached among them.

    Attributes:
        first, last: indices of its tensors, both included.
        at, name: the first of them with the most buffered bytes.
        low_bytes, high_bytes: the least and the most buffered bytes.
        pinned_bytes: the most pinned bytes.
        open_layers: the most open layers.
    """

    first: int
    last: int
    at: int
    name: str
    low_bytes: int
    high_bytes: int
    pinned_bytes: int
    open_layers: int


def buckets(trace: Trace, count: int) -> list[Bucket]:
    """Cut the stream into at most `count` buckets of nearly equal length."""
    steps = trace.steps
    count = min(count, len(steps))
    result = []
    for number in range(count):
        first, end = number * len(steps) // count, (number + 1) * len(steps) // count
        part = steps[first:end]
        heights = [step.buffered_bytes for step in part]
        high = max(heights)
        highest = heights.index(high)
        result.append(
            Bucket(
                first=first,
                last=end - 1,
                at=first + highest,
                name=part[highest].name,
                low_bytes=min(heights),
                high_bytes=high,
                pinned_bytes=max(step.pinned_bytes for step in part),
                open_layers=max(step.open_layers for step in part),
            )
        )
    return result


@dataclass(frozen=True)
class Stream:
    """One curve of a plot, and what the pointer shows of each bucket.

    Attributes:
        color: the name of a colour in the template.
        words: its name in the legend.
        held: the largest layers of each bucket, with their bytes; empty: not known.
        others: the number of other layers of each bucket.
    """

    color: str
    words: str
    parts: Sequence[Bucket]
    held: Sequence[Sequence[tuple[str, int]]] = ()
    others: Sequence[int] = ()


class Plot(NamedTuple):
    """Streams of the same `num_tensors` tensors, drawn over each other."""

    streams: Sequence[Stream]
    num_tensors: int


def render(
    *,
    title: str,
    head: str,
    subtitle: str,
    facts: Sequence[tuple[str, str, str]],
    body: str,
    plots: Sequence[Plot],
    footer: str,
) -> str:
    """Return the page.

    Args:
        head: the title of the browser's tab.
        facts: (name, value, further words), for the cards at the top.
        body: HTML.
        plots: those in `body`, in the same order: the page's script pairs them by position.
    """
    parts = {
        "title": escape(title),
        "head": escape(head),
        "subtitle": escape(subtitle),
        "facts": "".join(
            f'<div class="card"><dt>{escape(name)}</dt><dd>{escape(value)}'
            f"{f'<small>{escape(words)}</small>' if words else ''}</dd></div>"
            for name, value, words in facts
        ),
        "body": body,
        "footer": escape(footer),
        "data": _data(plots),
    }
    return fill(files("qerl_sync.report").joinpath(TEMPLATE).read_text(encoding="utf-8"), parts)


def _data(plots: Sequence[Plot]) -> str:
    """Return the plots as JSON, for the page's script."""
    # Names are numbered: one name occurs in many buckets, and would be most of the page's bytes.
    numbers: dict[str, int] = {}

    def number(name: str) -> int:
        return numbers.setdefault(name, len(numbers))

    def known(stream: Stream) -> dict[str, Any]:
        found: dict[str, Any] = {
            "policy": stream.color,
            "words": stream.words,
            "high": [part.high_bytes for part in stream.parts],
            "pinned": [part.pinned_bytes for part in stream.parts],
            "open": [part.open_layers for part in stream.parts],
            "names": [number(part.name) for part in stream.parts],
        }
        if stream.held:
            found["largest"] = [
                [value for layer, size in held for value in (number(layer), size)]
                for held in stream.held
            ]
            found["others"] = list(stream.others)
        return found

    orders = [
        {"tensors": tensors, "buckets": len(streams[0].parts), "streams": list(map(known, streams))}
        for streams, tensors in plots
    ]
    text = json.dumps(
        {"layers": list(numbers), "orders": orders}, separators=(",", ":"), ensure_ascii=False
    )
    return text.replace("</", "<\\/")  # it would end the script element in the middle of a name


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Return the template with its `{{names}}` replaced."""
    return re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], template)


def key(color: str, words: str) -> str:
    """Return the entry of a legend."""
    return (
        f'<span style="--color:var(--{color})"><span class="swatch"></span>{escape(words)}</span>'
    )


def draw(
    plot: Plot,
    *,
    label: str,
    top: float,
    one_top: float,
    budget_bytes: int | None,
) -> str:
    """Return a plot as HTML. The page's script shows the values under the pointer or the arrow
    keys.

    Args:
        label: for screen readers.
        top, one_top: the highest value of its own scale, and of the one that all plots share.
    """
    paths = "".join(_paths(stream, top) for stream in plot.streams)
    if budget_bytes is not None:
        paths += f'<path class="budget" d="M0 {_y(budget_bytes, top)}H{SIDE}"/>'
    return (
        f'<div class="plot" tabindex="0" role="group" aria-label="{escape(label)}">'
        f'<div class="axis own" aria-hidden="true">{_byte_ticks(top)}</div>'
        f'<div class="axis one" aria-hidden="true">{_byte_ticks(one_top)}</div>'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" aria-hidden="true">'
        f'<g class="stream" style="--one:{top / one_top:.6g}">{paths}</g></svg>'
        f'<div class="hair"></div><div class="ends" aria-hidden="true"><span>tensor 1</span>'
        f"<span>{plot.num_tensors:,}</span></div></div>"
    )


def code(text: str) -> str:
    return re.sub("`(.+?)`", r"<code>\1</code>", text)


def _paths(stream: Stream, top: float) -> str:
    """Return the SVG paths of one stream: the area, the band from lowest to highest, outlines."""

    def outline(heights: Sequence[int], *, backwards: bool = False) -> str:
        """Return steps "V y H x", from left to right or back. Equal heights are one step."""
        count, steps = len(heights), []
        for i, height in enumerate(heights):
            if i + 1 == count or heights[i + 1] != height:
                x = SIDE * (count - i - 1 if backwards else i + 1) / count
                steps.append(f"V{_y(height, top)}H{x:.5g}")
        return "".join(steps)

    parts = stream.parts
    high = outline([part.high_bytes for part in parts])
    low = outline([part.low_bytes for part in reversed(parts)], backwards=True)
    pins = ""
    if any(part.pinned_bytes > part.high_bytes for part in parts):
        pinned = outline([part.pinned_bytes for part in parts])
        pins = f'<path class="pins" d="M0 {pinned[1:]}"/>'
    return (
        f'<g style="--color:var(--{stream.color})"><path class="area" d="M0 {SIDE}{high}V{SIDE}Z"/>'
        f'<path class="band" d="M0 {high[1:]}{low}Z"/><path d="M0 {high[1:]}"/>{pins}</g>'
    )


def _y(nbytes: float, top: float) -> str:
    return f"{SIDE * (1 - nbytes / top):.5g}"


def ticks(top: float, *, low: float = 0.0, scale: float, unit: str) -> str:
    """Return labels at round numbers from `low` to `top`, at most six.

    Args:
        scale, unit: in which the labels are written.
    """
    first, last = low / scale, top / scale
    least = (last - first) / 5
    power = 10.0 ** floor(log10(least))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= least)
    return "".join(
        f'<span style="bottom:{100 * (n * step - first) / (last - first):.2f}%">'
        f"{f'{n * step:g} {unit}'.strip()}</span>"
        for n in range(ceil(first / step), int(last / step) + 1)
    )


def _byte_ticks(top: float) -> str:
    scale, unit = unit_of(int(top))
    return ticks(top, scale=scale, unit=unit)
