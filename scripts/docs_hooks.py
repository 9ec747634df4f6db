"""Hooks of the documentation site (mkdocs.yml): pages from outside of docs/, links to sources."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md")
_LINK = re.compile(r"(?<!\!)\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that stand in the repository's root."""
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Rewrite links that leave docs/: to a page of the root, else (a source file) to plain text."""
    here = page.file.src_uri
    home = ROOT if here in PAGES else ROOT / "docs"

    def rewritten(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        path = (home / posixpath.dirname(here) / target).resolve()
        if not path.exists():
            raise PluginError(f"{here}: the link to {target} leads nowhere")
        if path.is_dir() and (path / "README.md").exists():
            path /= "README.md"
        place = path.relative_to(ROOT).as_posix().removeprefix("docs/")
        if files.get_file_from_path(place) is None:
            return text  # a source file: the site does not have it
        back = posixpath.relpath(place, posixpath.dirname(here) or ".")
        return f"[{text}]({back}{anchor})"

    return _LINK.sub(rewritten, markdown)
