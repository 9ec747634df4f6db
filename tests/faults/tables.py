"""Tables of `scripts/faults`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from faults.outcomes import Outcome

OURS, STOCK = "qerl-sync", "stock vLLM"


def fault_table(outcomes: Sequence[Outcome]) -> Table:
    """A row for each case on each engine."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("case", "engine", "ended", "requests", "noticed", "next sync", ""):
        table.add_column(column, overflow="fold")
    for outcome in outcomes:
        if outcome.by == OURS:
            table.add_row(*map(escape, _row(outcome)), "ok" if outcome.ok else "[red]not ok[/red]")
    return table


def stock_table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="stock vLLM", title_justify="left")
    for column in ("case", "engine", "ended", "next full reload"):
        table.add_column(column, overflow="fold")
    for outcome in outcomes:
        if outcome.by == STOCK:
            table.add_row(
                *map(escape, (outcome.case, outcome.subject, outcome.ended)), _next(outcome)
            )
    return table


def complaints(outcomes: Sequence[Outcome]) -> list[str]:
    """Why cases are not ok, one line each."""
    return [
        f"{o.subject}: {o.case}: {o.ended} (allowed: {', '.join(o.expected)}); {why}"
        for o in outcomes
        if o.by == OURS and not o.ok
        for why in [_why(o)]
    ]


def _why(outcome: Outcome) -> str:
    found = [f"leaks {', '.join(outcome.leaks)}"] if outcome.leaks else []
    found += outcome.version_faults
    if outcome.healed is not True:
        found.append("the next full sync was not exactly right")
    if outcome.is_late:
        found.append(f"noticed after {outcome.detection_seconds:.1f} s")
    return "; ".join([*found, outcome.error or outcome.note or "no error"])


def _row(outcome: Outcome) -> tuple[str, ...]:
    seconds = outcome.detection_seconds
    return (
        outcome.case,
        outcome.subject,
        outcome.ended,
        outcome.after,
        "" if seconds is None else f"{seconds:.2f} s",
        _next(outcome),
    )


def _next(outcome: Outcome) -> str:
    if outcome.healed is None:
        return ""
    return "exact" if outcome.healed else "wrong"


# ---------------------------------------------------------------------------------- the page


def fault_page(outcomes: Sequence[Outcome], versions: str, meanings: Mapping[str, str]) -> str:
    """docs/faults.md: what happens to each fault, beside stock vLLM.

    Args:
        meanings: of the words for how a fault may end.
    """
    ours = [o for o in outcomes if o.by == OURS]
    stock = [o for o in outcomes if o.by == STOCK]
    lines = [
        "# What breaks, and what happens then",
        "",
        "<!-- Written by `scripts/faults --stock --docs docs/faults.md`; do not edit. -->",
        "",
        "Each fault happens to a sync of a real engine. Then requests are sent, and two more full",
        "syncs are run, to the new weights and back to the old ones. What the kernels hold is held",
        "against a model freshly loaded from the same checkpoint. What is generated, with a prompt",
        "longer than a block of the prefix cache, is held, to the last bit, against what the same",
        "engine said: of the old weights before its first sync; of the new ones after the first",
        "sync that left its kernels exactly as in a freshly loaded model, with its caches emptied",
        f"by hand. Weight versions must only rise. {versions}.",
        "",
        f"Engines, each with its model and kernels: {_subjects(ours)}. A number in parentheses",
        "says on how many of them, where they differ; – says that a case makes no sense there or",
        "was not run.",
        "",
        *_totals(ours, stock),
        "",
        *_meanings(ours + stock, meanings),
        "",
    ]
    engines = list(dict.fromkeys(_engine(o) for o in ours))
    header = ["fault", *engines, *(["stock vLLM", "its next full reload"] if stock else [])]
    lines += _markdown(header, (_page_row(c, engines, ours, stock) for c in _cases(ours)))
    return "\n".join(lines) + "\n"


def _page_row(
    case: str, engines: Sequence[str], ours: Sequence[Outcome], stock: Sequence[Outcome]
) -> list[str]:
    here = [o for o in ours if o.case == case]
    row = [case, *(_counted(o.ended for o in here if _engine(o) == e) for e in engines)]
    if stock:
        found = [o for o in stock if o.case == case]
        row += [_counted(o.ended for o in found), _counted(map(_next, found))]
    return row


def _counted(words: Iterable[str]) -> str:
    """Each word once, with how often where there are several."""
    found = list(words)
    distinct = dict.fromkeys(found)
    if len(distinct) == 1:
        return found[0]
    return ", ".join(f"{word} ({found.count(word)})" for word in distinct) or "–"


def _totals(ours: Sequence[Outcome], stock: Sequence[Outcome]) -> list[str]:
    healed = sum(o.healed is True for o in ours)
    lines = [
        f"qerl-sync, {len(ours)} cases: {_number(ours, 'wrong weights')} ended with wrong weights "
        f"that are served, {_number(ours, 'hang')} hung, {sum(bool(o.leaks) for o in ours)} left "
        f"something behind, {sum(bool(o.version_faults) for o in ours)} had a version that did not "
        f"move forwards; the next full sync was exactly right after {healed}.",
    ]
    lines += ["", *_noticed(ours)]
    if stock:
        lines += [
            "",
            f"vLLM's own reload, the {len(stock)} of them that it can meet:"
            f" {_number(stock, 'wrong weights')} ended with wrong weights that are served,"
            f" {_number(stock, 'hang')} hung; its next full reload was exactly right after"
            f" {sum(o.healed is True for o in stock)}.",
        ]
    return lines


def _noticed(ours: Sequence[Outcome]) -> list[str]:
    """How fast faults were known, as a share of what each is allowed."""
    timed = [(o.detection_seconds, o) for o in ours if o.detection_seconds is not None]
    if not timed:
        return []
    in_time = sum(not o.is_late for _, o in timed)
    seconds, slowest = max(timed, key=lambda pair: pair[0] / pair[1].allowed_seconds)
    return [
        f"Of {len(timed)} faults whose detection was timed, {in_time} were noticed within their "
        "limit: 2 s, or a timeout and 2 s where only that can tell. The slowest for its limit "
        f"took {seconds:.2f} s of {slowest.allowed_seconds:g} s: {slowest.case} "
        f"({slowest.subject})."
    ]


def _number(outcomes: Iterable[Outcome], ended: str) -> int:
    return sum(o.ended == ended for o in outcomes)


def _meanings(outcomes: Sequence[Outcome], meanings: Mapping[str, str]) -> list[str]:
    used = dict.fromkeys(o.ended for o in outcomes)
    return _markdown(["word", "meaning"], ([w, meanings[w]] for w in used if w in meanings))


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cases(outcomes: Iterable[Outcome]) -> list[str]:
    return list(dict.fromkeys(o.case for o in outcomes))


def _subjects(outcomes: Iterable[Outcome]) -> str:
    return ", ".join(dict.fromkeys(o.subject for o in outcomes))


def _engine(outcome: Outcome) -> str:
    return outcome.subject.partition("/")[0]
