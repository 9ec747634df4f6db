"""Describe configuration errors: the place, the value and the nearest valid key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from qerl_sync.errors import ConfigError


@dataclass(frozen=True)
class Violation:
    """One problem of a configuration. `place` is a dotted path."""

    place: str
    message: str


def config_error(
    source: str, violations: Sequence[Violation], origins: Mapping[str, str] | None = None
) -> ConfigError:
    """Return one error that lists all violations.

    Args:
        source: the file or class that is wrong.
        origins: where each dotted path was written ("line 7"), as far as known.
    """
    count = len(violations)
    lines = [f"{source}: {count} problem{'s' if count != 1 else ''}"]
    for violation in violations:
        place = violation.place  # or else the nearest section around it that was written
        while place and place not in (origins or {}):
            place = place.rpartition(".")[0]
        origin = (origins or {}).get(place, "")
        where = f"{violation.place} ({origin})" if origin else violation.place
        lines.append(f"  {where}: {violation.message}")
    found = tuple((violation.place, violation.message) for violation in violations)
    return ConfigError("\n".join(lines), violations=found)


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return a hint to the closest valid word; else the list of valid words, if it is short."""
    known = sorted(valid)
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    if len(known) <= 12:
        return f"valid: {', '.join(known)}"
    return "nothing valid is spelled like it"


class Contradictions(ValueError):
    """Options of one section that contradict each other, for a validator of it to raise."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("; ".join(f"{one.place}: {one.message}" for one in violations))
        self.violations = violations


def schema_violations(error: ValidationError, model: type[BaseModel]) -> list[Violation]:
    """Return pydantic's findings as violations."""
    violations = []
    for found in error.errors():
        cause = found.get("ctx", {}).get("error")
        if isinstance(cause, Contradictions):
            violations += [
                Violation(_dotted((*found["loc"], one.place)), one.message)
                for one in cause.violations
            ]
        else:
            violations.append(Violation(_dotted(found["loc"]), _in_words(found, model)))
    return violations


def _dotted(loc: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in loc)


def _in_words(found: Mapping[str, Any], model: type[BaseModel]) -> str:
    loc, kind, value = found["loc"], found["type"], found["input"]
    if kind == "extra_forbidden":
        # The likely key: a similar one in this section, or the same one in another section.
        key, known = str(loc[-1]), dict(sections(model))
        siblings = known[_dotted(loc[:-1])].model_fields
        elsewhere = [place for place, section in known.items() if key in section.model_fields]
        if elsewhere and not get_close_matches(key, siblings):
            path = f"{elsewhere[0]}.{key}".lstrip(".")
            return f"no such key; did you mean {path!r}?"
        return f"no such key; {nearest(key, siblings)}"
    if kind == "missing":
        return "is required and missing"
    if kind == "literal_error":
        choices = found["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"{value!r} is not valid; {nearest(str(value), choices)}"
    if kind in ("value_error", "assertion_error"):
        return str(found["ctx"]["error"])
    if kind == "model_type":
        return f"is a section and needs keys below it, not {value!r}"
    return f"{found['msg'][0].lower()}{found['msg'][1:]}, not {value!r}"


def sections(model: type[BaseModel], place: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the dotted path of each section, and its model, in the order in which they occur."""
    yield place, model
    for name, field in model.model_fields.items():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from sections(part, f"{place}.{name}".lstrip("."))
