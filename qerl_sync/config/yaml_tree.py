"""Parse YAML into plain values with each key's line, and apply overrides like
`sync.policy=warn`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import yaml

from qerl_sync.config.violations import Violation
from qerl_sync.errors import ConfigError

Tree = dict[str, Any]
COMMAND_LINE = "command line"


class _Loader(yaml.SafeLoader):
    """Load scalars as YAML 1.2 does.

    PyYAML follows 1.1, where `1e-3` is a text, `no` is false and `1:30` is 90. The first two are
    common values of trainer arguments.
    """


_CHANGED = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _CHANGED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?
            |[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.X,
    ),
    list("-+0123456789."),
)


def read_tree(text: str, source: str) -> tuple[Tree, dict[str, str], list[Violation]]:
    """Return the values in `text`, the line of each dotted path ("line 7"), and duplicate keys.

    Raises:
        ConfigError: it is no YAML, or not a mapping.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        tree = loader.construct_document(node) if node else {}
    except (yaml.YAMLError, ValueError) as exc:
        raise ConfigError(f"{source} is no valid YAML: {exc}") from exc
    finally:
        loader.dispose()
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{source} holds {type(tree).__name__}, not a mapping; it must have sections such as "
            "`model:`, `data:` and `trainer:`"
        )
    lines: dict[str, str] = {}
    doubled: list[Violation] = []
    _walk(node, "", lines, doubled)
    return tree, lines, doubled


def _walk(node: Any, prefix: str, lines: dict[str, str], doubled: list[Violation]) -> None:
    """Note each key's line. Report a duplicate key: YAML would silently keep one."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[Hashable, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        place = f"{prefix}{key.value}"
        if key.value in seen and key.value != "<<":
            doubled.append(Violation(place, f"stands twice, first in line {seen[key.value]}"))
        seen.setdefault(key.value, line)
        lines[place] = f"line {line}"
        _walk(value, f"{place}.", lines, doubled)


def apply_overrides(
    tree: Tree, overrides: Sequence[str], origins: dict[str, str]
) -> list[Violation]:
    """Put `path.to.key=value` into `tree`, the value parsed as YAML; note its origin in
    `origins`.
    """
    violations = []
    for override in overrides:
        path, equals, text = override.partition("=")
        *sections, key = path.strip().split(".")
        if not equals or not all([*sections, key]):
            message = "is no override; write section.key=value (sync.policy=warn)"
            violations.append(Violation(override, message))
            continue
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError):
            violations.append(Violation(path, f"the value {text!r} is no valid YAML"))
            continue
        at: Any = tree
        for depth, name in enumerate(sections, 1):
            if at.get(name) is None:
                at[name] = {}
                origins[".".join(sections[:depth])] = COMMAND_LINE
            at = at[name]
            if not isinstance(at, dict):
                message = f"{name!r} is {at!r}, not a section, so it has no {key!r}"
                violations.append(Violation(path, message))
                break
        else:
            at[key] = value
            origins[path.strip()] = COMMAND_LINE
    return violations


def value_at(tree: Any, place: str) -> Any:
    """Return the value at a dotted path; None where there is none."""
    for name in place.split("."):
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(name)
    return tree
