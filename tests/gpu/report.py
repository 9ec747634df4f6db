"""Results of the proofs on a GPU: kept as they come, as tables, as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The environment variable with the file in which a case keeps what it has found so far.
PARTIAL = "QERL_SYNC_GPU_PARTIAL"
GB = 1e9


def write(path: Path, text: str) -> None:
    """Write a file in one step: who is killed meanwhile leaves the old one."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def keep(facts: Mapping[str, Any]) -> None:
    """Keep what a case has found so far, in case that it does not come to its end."""
    if os.environ.get(PARTIAL):
        write(Path(os.environ[PARTIAL]), json.dumps({"facts": facts}, default=str))


def markdown(found: Mapping[str, Any]) -> str:
    """Return all results as tables."""
    cases: Sequence[Mapping[str, Any]] = found["cases"]
    lines = [f"{found['seconds']} s in all.", ""]
    lines += [f"- {part} cannot be imported: {why}" for part, why in found["missing_parts"].items()]
    lines += _table(
        ["case", "", "s", ""],
        [[f"{c['part']}/{c['name']}", c["status"], c["seconds"], _words(c)] for c in cases],
    )
    for case in cases:
        rows = case["facts"].get("rows")
        if rows:
            columns = list(dict.fromkeys(key for row in rows for key in row if key != "warning"))
            lines += ["", f"## {case['part']}/{case['name']}", ""]
            lines += _table(columns, [[row.get(key, "") for key in columns] for row in rows])
    return "\n".join(lines) + "\n"


def _words(case: Mapping[str, Any]) -> str:
    facts = case["facts"]
    plain = {k: v for k, v in facts.items() if isinstance(v, str | int | float | bool)}
    deviations = facts.get("deviations") or []
    said = case.get("error") or "; ".join(f"{k} {_number(v)}" for k, v in plain.items())
    return (said + "".join(f"; {one}" for one in deviations))[:400]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    def line(cells: Sequence[Any]) -> str:
        texts = [str(_number(cell)).replace("|", "\\|").replace("\n", " ") for cell in cells]
        return f"| {' | '.join(texts)} |"

    return [line(head), line(["---"] * len(head)), *map(line, rows)]


def _number(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def draw_memory(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw what each sync took of the device, beside its prediction. Nothing without results."""
    shown = [c for c in cases if c["part"] == "memory" and c["facts"].get("rows")]
    if not shown:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    largest = max(float(r.get("extra_gb") or 0) for c in shown for r in c["facts"]["rows"])
    scale, unit = (1.0, "GB") if largest >= 0.5 else (1e3, "MB")
    height = 0.42 * sum(len(c["facts"]["rows"]) + 2 for c in shown)
    figure = Figure(figsize=(9, height), dpi=150, constrained_layout=True)
    FigureCanvasAgg(figure)
    ratios = [len(c["facts"]["rows"]) for c in shown]
    axes = figure.subplots(len(shown), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[
        :, 0
    ]
    for place, case in zip(axes, shown, strict=True):
        rows = case["facts"]["rows"][::-1]
        bars = [scale * float(row.get("extra_gb") or 0) for row in rows]
        colors = ["#d9622b" if row["sync"].startswith("vLLM") else "#2563eb" for row in rows]
        place.barh([row["sync"] for row in rows], bars, color=colors, height=0.6)
        for i, row in enumerate(rows):
            predicted = row.get("predicted_gb")
            if predicted is not None:
                place.plot([scale * predicted] * 2, [i - 0.36, i + 0.36], color="#1f2933", lw=2)
            place.annotate(
                f"{bars[i]:.2f}",
                (bars[i], i),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
            )
        place.margins(x=0.1)
        place.spines[["top", "right"]].set_visible(False)
        sent = case["facts"].get("sent_gb", 0)
        place.set_title(f"{case['name']}: {scale * sent:.1f} {unit} of weights", loc="left")
    axes[-1].set_xlabel(
        f"device memory that a sync takes on top, {unit} (bar: measured; mark: predicted)"
    )
    figure.savefig(path)
