"""The documentation's pages: what they quote is in the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

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


def test_every_page_is_in_the_navigation():
    site = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert [page.name for page in PAGES if f": {page.name}\n" not in site] == []
