"""What `scripts/faults` shows: a table, complaints, and the page docs/faults.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from faults.outcomes import HANG, LIMIT_SECONDS, MEANING, OURS, STOCK, WRONG, Outcome


def fault_table(outcomes: Sequence[Outcome], by: str) -> Table:
    """A row for each case on each engine."""
    columns = ["case", "engine", "ended", "next sync" if by == OURS else "next full reload"]
    columns += ["requests", "noticed", ""] if by == OURS else []
    table = Table(box=box.SIMPLE_HEAD, title=by, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for o in _of(by, outcomes):
        noticed = "" if o.detection_seconds is None else f"{o.detection_seconds:.2f} s"
        row = [o.case, o.spec, o.ended, _next(o), o.after, noticed]
        row = [*map(escape, row), "ok" if o.ok else "[red]not ok[/red]"]
        table.add_row(*row[: len(columns)])
    return table


def complaints(outcomes: Sequence[Outcome]) -> list[str]:
    """Why cases are not ok, one line each."""
    return [
        f"{o.spec}: {o.case}: {o.ended} (allowed: {', '.join(o.expected)}); {_why(o)}"
        for o in _of(OURS, outcomes)
        if not o.ok
    ]


def _why(outcome: Outcome) -> str:
    found = [f"leaks {', '.join(outcome.leaks)}"] if outcome.leaks else []
    found += outcome.version_faults
    if outcome.healed is not True:
        found.append("the next full sync was not exactly right")
    if outcome.is_late:
        found.append(f"noticed after {outcome.detection_seconds:.1f} s")
    return "; ".join([*found, outcome.error or outcome.note or "no error"])


def _next(outcome: Outcome) -> str:
    return {None: "", True: "exact", False: "wrong"}[outcome.healed]


def _of(by: str, outcomes: Iterable[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.by == by]


# ---------------------------------------------------------------------------------- the page

PAGE = """\
# What breaks, and what happens then

<!-- Written by `scripts/faults --stock --docs docs/faults.md`, or from several runs (`--json`) by
`scripts/faults --read FILE... --docs docs/faults.md`; do not edit. -->

Each fault happens to a sync of a real engine. Then requests are sent, and two more full
syncs are run, to the new weights and back to the old ones. What the kernels hold is held
against a model freshly loaded from the same checkpoint. What is generated, with a prompt
longer than a block of the prefix cache, is held, to the last bit, against what the same
engine said: of the old weights before its first sync; of the new ones after the first
sync that left its kernels exactly as in a freshly loaded model, with its caches emptied
by hand. Weight versions must only rise. {versions}.

Engines, each with its model and kernels: {specs}. A number in parentheses
says on how many of them, where they differ; – says that a case makes no sense there or
was not run.

{totals}

{meanings}

{table}
"""


def fault_page(outcomes: Sequence[Outcome], versions: str) -> str:
    """docs/faults.md: what happens to each fault, beside stock vLLM."""
    ours, stock = _of(OURS, outcomes), _of(STOCK, outcomes)
    engines = list(dict.fromkeys(_engine(o) for o in ours))
    rows = []
    for case in dict.fromkeys(o.case for o in ours):
        row = [case]
        row += [
            _counted(o.ended for o in ours if (o.case, _engine(o)) == (case, e)) for e in engines
        ]
        if stock:
            found = [o for o in stock if o.case == case]
            row += [_counted(o.ended for o in found), _counted(map(_next, found))]
        rows.append(row)
    header = ["fault", *engines, *(["stock vLLM", "its next full reload"] if stock else [])]
    used = dict.fromkeys(o.ended for o in ours + stock)
    return PAGE.format(
        versions=versions,
        specs=", ".join(dict.fromkeys(o.spec for o in ours)),
        totals="\n\n".join(_totals(ours, stock)),
        meanings=_markdown(["word", "meaning"], [[w, MEANING[w]] for w in used if w in MEANING]),
        table=_markdown(header, rows),
    )


def _totals(ours: Sequence[Outcome], stock: Sequence[Outcome]) -> Iterable[str]:
    def number(outcomes: Sequence[Outcome], ended: str) -> int:
        return sum(o.ended == ended for o in outcomes)

    yield (
        f"qerl-sync, {len(ours)} cases: {number(ours, WRONG)} ended with wrong weights "
        f"that are served, {number(ours, HANG)} hung, {sum(bool(o.leaks) for o in ours)} left "
        f"something behind, {sum(bool(o.version_faults) for o in ours)} had a version that did not "
        f"move forwards; the next full sync was exactly right after "
        f"{sum(o.healed is True for o in ours)}."
    )
    timed = [o for o in ours if o.detection_seconds is not None]
    if timed:
        slowest = max(timed, key=lambda o: (o.detection_seconds or 0) / o.allowed_seconds)
        yield (
            f"Of {len(timed)} faults whose detection was timed, "
            f"{sum(not o.is_late for o in timed)} were noticed within their "
            f"limit: {LIMIT_SECONDS:g} s, or a timeout and {LIMIT_SECONDS:g} s where only that can "
            "tell. The slowest for its limit "
            f"took {slowest.detection_seconds:.2f} s of {slowest.allowed_seconds:g} s: "
            f"{slowest.case} ({slowest.spec})."
        )
    if stock:
        yield (
            f"vLLM's own reload, the {len(stock)} of them that it can meet:"
            f" {number(stock, WRONG)} ended with wrong weights that are served,"
            f" {number(stock, HANG)} hung; its next full reload was exactly right after"
            f" {sum(o.healed is True for o in stock)}."
        )


def _counted(words: Iterable[str]) -> str:
    """Each word once, with how often where there are several."""
    found = list(words)
    distinct = dict.fromkeys(found)
    if len(distinct) == 1:
        return found[0]
    return ", ".join(f"{word} ({found.count(word)})" for word in distinct) or "–"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def _engine(outcome: Outcome) -> str:
    return outcome.spec.partition("/")[0]
