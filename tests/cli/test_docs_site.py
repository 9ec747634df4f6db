"""The documentation's pages: what they quote is in the code, and their YAML is taken."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from qerl_sync.config import load_config

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
QUOTED = [
    row[1].strip()
    for row in re.finditer(
        r"^\| (?!you read|---)([^|]+)\|.*\|$",
        (ROOT / "docs" / "troubleshooting.md").read_text("utf-8"),
        re.M,
    )
]
YAML_BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in sorted((ROOT / "docs").rglob("*.md"))
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.S))
]


def texts() -> str:
    """Every text of the package, with a gap where a value is filled in."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) for part in node.values)
        return str(node.value) if isinstance(node, ast.Constant) else "…"

    return "\n".join(
        text(node)
        for path in (ROOT / "qerl_sync").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant | ast.JoinedStr)
    )


def test_every_error_that_is_explained_exists():
    all_texts = texts()
    assert len(QUOTED) > 20
    assert [quote for quote in QUOTED if quote not in all_texts] == []


@pytest.mark.parametrize("block", YAML_BLOCKS)
def test_yaml_of_the_pages_is_taken(block: str):
    """In place of the same options of a configuration that runs."""
    changes = [
        f"{section}.{name}={json.dumps(value)}"
        for section, options in yaml.safe_load(block).items()
        for name, value in options.items()
    ]
    load_config(ROOT / "configs" / "grpo_cpu.yaml", changes)


def test_every_page_is_in_the_navigation():
    site = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert [page.name for page in PAGES if f": {page.name}\n" not in site] == []
