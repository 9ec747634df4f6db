"""Generate docs/configuration.md from the models:

python -m qerl_sync.config.document > docs/configuration.md
"""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from qerl_sync.config.models import Section, TrainConfig
from qerl_sync.config.violations import sections

HEAD = """# Configuration

One YAML file is one run of `qerl-sync train`; `configs/` has complete examples. Unknown keys are
errors. On the command line any value can be changed: `qerl-sync train CONFIG.yaml sync.policy=warn
trainer.max_steps=20`. The fields of the section `sync` are also the keyword arguments of
`WeightSyncCallback`. A file for TRL's own command line is taken as it is, its flat keys mapped into
these sections: `qerl-sync train --trl-config FILE sync.policy=reorder`; what of it cannot be
followed is an error that names each key.

This page is made from the code: `python -m qerl_sync.config.document > docs/configuration.md`.
"""


def configuration_page() -> str:
    """Return the whole page: one table for each section, in the order in which they occur."""
    return "\n".join([HEAD, *(_section(*found) for found in sections(TrainConfig))])


def _section(place: str, section: type[BaseModel]) -> str:
    title = f"## `{place}`" if place else "## Top level"
    rows = []
    for name, field in section.model_fields.items():
        kind = _kind(field.annotation).replace("|", "\\|")
        meaning = _text(field.description or "")
        rows.append(f"| `{name}` | {kind} | {_default(field)} | {meaning} |")
    head = ["| key | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join(
        [title, "", _text((section.__doc__ or "").partition("\n\n")[0]), "", *head, *rows, ""]
    )


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, Section):
        return "its defaults"
    if field.default is None:
        return "`null`"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " | ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " | ".join(_kind(part) for part in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"list of {_kind(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    names = {str: "text", int: "integer", float: "number", bool: "`true` | `false`"}
    return names.get(annotation, "null")


def _text(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(configuration_page(), end="")
