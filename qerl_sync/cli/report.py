"""`qerl-sync report` and `qerl-sync explain`: what a run has left, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qerl_sync.cli.errors import Debug, errors_as_text, notes
from qerl_sync.errors import ConfigError

RUN = typer.Argument(
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
        bool, typer.Option("--md", help="Markdown in place of HTML; report.md in RUN.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--open", help="Show it in this machine's browser.")
    ] = False,
    live: Annotated[
        bool,
        typer.Option("--live", help="Serve the page to browsers of this machine, until Ctrl-C."),
    ] = False,
    port: Annotated[
        int, typer.Option(help="With --live: the port on 127.0.0.1. 0: any that is free.")
    ] = 0,
    debug: Debug = False,
) -> None:
    """Write a run's page: rewards, syncs, what they held, what failed, what would help.

    The page needs no network and no other file.
    """
    with errors_as_text(debug=debug):
        from qerl_sync.config.files import file_errors_explained

        if live:
            if md or output is not None:
                raise ConfigError(
                    "--live serves the page and writes no file; leave --md and -o out"
                )
            return _serve(run, port, show=show)
        from qerl_sync.report.recorded import RecordedRun
        from qerl_sync.report.run_page import run_markdown, run_page

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
        notes().print(f"no browser was found here; open {url} in one")


def _serve(run: Path, port: int, *, show: bool) -> None:
    from qerl_sync.report.live import LiveReport

    if not run.is_dir():
        raise ConfigError(f"{run} is no directory; give the output directory of a run")
    report = LiveReport(run, port)
    notes().print(f"{report.url} shows {run} as it goes on. Ctrl-C ends it.")
    if show:
        _open(report.url)
    try:
        report.serve()
    except KeyboardInterrupt:
        notes().print("ended")


def explain(
    run: Annotated[Path, RUN],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, on standard output.")] = False,
    debug: Debug = False,
) -> None:
    """Say what went wrong in a run, which cause and layers, and what to change."""
    with errors_as_text(debug=debug):
        from qerl_sync.report import findings
        from qerl_sync.report.recorded import RecordedRun

        found = findings.explain(RecordedRun.read(run))
        typer.echo(findings.as_json(found) if as_json else findings.as_text(found))
