"""`qerl-sync report` and `qerl-sync explain`: what a run has left, for people."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from qerl_sync.cli.errors import Debug, errors_as_text, notes, require_directories
from qerl_sync.errors import ConfigError

RUN = typer.Argument(
    metavar="RUN",
    help="The output directory of `qerl-sync train`, or a session's sync.record_directory.",
    show_default=False,
)


def report(
    run: Annotated[Path, RUN],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write. Default: report.html in RUN."),
    ] = None,
    md: Annotated[
        bool, typer.Option("--md", help="Write Markdown instead. Default: report.md in RUN.")
    ] = False,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    live: Annotated[
        bool,
        typer.Option("--live", help="Serve the page on this machine and update it, until Ctrl-C."),
    ] = False,
    port: Annotated[
        int, typer.Option(help="With --live: the port on 127.0.0.1; 0 takes a free one.")
    ] = 0,
    debug: Debug = False,
) -> None:
    """Write one HTML page about a run: rewards, each sync's time and memory, failures, advice.

    The page needs no network and no other file.
    """
    with errors_as_text(debug=debug):
        from qerl_sync.config.files import file_errors_explained

        if live:
            if md or output is not None:
                raise ConfigError(
                    "--live serves the page and writes no file; leave out --md and --output"
                )
            return _serve(run, port, show=show)
        from qerl_sync.report.recorded import RecordedRun
        from qerl_sync.report.run_page import run_markdown, run_page

        require_directories(output)
        path = output or run / ("report.md" if md else "report.html")
        recorded = RecordedRun.read(run)
        page = run_markdown(recorded) if md else run_page(recorded)
        with file_errors_explained(path):
            path.write_text(page, encoding="utf-8")
        notes().print(f"written to {path}")
        if show:
            _open(path.absolute().as_uri())


def _open(url: str) -> None:
    import webbrowser

    if not webbrowser.open(url):
        notes().print(f"no browser was found on this machine; open {url}")


def _serve(run: Path, port: int, *, show: bool) -> None:
    from qerl_sync.report.live import LiveReport

    if not run.is_dir():
        raise ConfigError(f"{run} is no directory; give the output directory of a run")
    report = LiveReport(run, port)
    notes().print(f"serving {run} at {report.url}; Ctrl-C stops it")
    if show:
        _open(report.url)
    try:
        report.serve()
    except KeyboardInterrupt:
        notes().print("stopped")


def explain(
    run: Annotated[Path, RUN],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Explain what went wrong in a run: the cause, the layers, and what to change."""
    with errors_as_text(debug=debug):
        from qerl_sync.report import findings
        from qerl_sync.report.recorded import RecordedRun

        found = findings.explain(RecordedRun.read(run))
        # Elsewhere than on a terminal a text stays one line, for grep.
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        typer.echo(findings.as_json(found) if as_json else findings.as_text(found, width))
