"""`qerl-sync init`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from qerl_sync.cli.errors import Debug, errors_as_text, notes, require_directories
from qerl_sync.errors import FileError


def init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file to write.")] = Path(
        "train.yaml"
    ),
    debug: Debug = False,
) -> None:
    """Write a commented YAML file to start from. It runs as it is, on a CPU, in about a minute."""
    with errors_as_text(debug=debug):
        from qerl_sync.config.files import file_errors_explained

        require_directories(path)
        text = files("qerl_sync.cli").joinpath("starter.yaml").read_text(encoding="utf-8")
        if path.exists():
            raise FileError(
                f"{path} is there already, and stays as it is; give another name", path=str(path)
            )
        with file_errors_explained(path), path.open("x", encoding="utf-8") as file:
            file.write(text.replace("FILE", str(path)))
        notes().print(f"written to {path}; next: qerl-sync train {path}")
