"""`qerl-sync serve`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from qerl_sync.cli.errors import Debug, errors_as_text, notes
from qerl_sync.wire.tokens import TOKEN_VARIABLE, new_token


def serve(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model directory, or a name on the Hugging Face hub.",
            show_default=False,
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- VLLM_ARGUMENTS",
            help="Arguments of vLLM's server, such as: -- --enforce-eager --max-model-len 512",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. If other machines can reach it, a token is made unless "
            "QERL_SYNC_TOKEN is set."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    backend: Annotated[str, typer.Option(help="vLLM's weight transfer backend.")] = "qerl",
    start_timeout: Annotated[
        float, typer.Option(min=1, max=1e6, help="Seconds that vLLM may take until it answers.")
    ] = 1800,
    debug: Debug = False,
) -> None:
    """Serve a model with vLLM, ready to receive weights from a trainer. Ctrl-C stops it."""
    console = notes()
    with errors_as_text(debug=debug), _signals_as_interrupts():
        from qerl_sync.serving.command import ServerSpec
        from qerl_sync.serving.server import ServerProcess

        spec = ServerSpec(model=model, host=host, port=port, backend=backend, extra=arguments or [])
        _secure(host, console)
        if not Path(model).expanduser().exists():
            console.print(
                f"{model} is no directory here: vLLM looks for it on the Hugging Face hub"
            )
        started = time.monotonic()
        with ServerProcess(spec, start_timeout_seconds=start_timeout) as server:
            seconds = time.monotonic() - started
            console.print(f"[green]✓[/] ready at [bold]{server.url}[/] [dim]{seconds:.1f} s[/]")
            console.print(
                f'  TRL: GRPOConfig(use_vllm=True, vllm_mode="server", '
                f'vllm_server_base_url="{server.url}")'
            )
            console.print("  Ctrl-C stops it")
            try:
                server.wait()
            except KeyboardInterrupt:  # the usual end of a server, so exit with 0
                console.print("stopping ...")
            else:
                server.check()
        console.print("[green]✓[/] stopped")


def _secure(host: str, console: Console) -> None:
    """Print what keeps other trainers out. Make a token if other machines reach the server.

    The server inherits this process's environment, so the token is set there.
    """
    from qerl_sync.serving.command import is_loopback

    known = bool(os.environ.get(TOKEN_VARIABLE))
    if is_loopback(host):
        if not known:
            console.print(
                f"{TOKEN_VARIABLE} is not set: the server takes the first trainer that connects. "
                "Set it to the same for both to keep others out"
            )
        return
    console.print(
        f"[yellow]warning:[/] other machines can reach the server at {host}: they may generate and "
        f"read; what changes the engine needs {TOKEN_VARIABLE}. Nothing is encrypted"
    )
    if not known:
        os.environ[TOKEN_VARIABLE] = token = new_token()
        console.print(
            f"{TOKEN_VARIABLE} was not set. This server has a token of its own, shown only here; "
            f"for the trainer:\n  export {TOKEN_VARIABLE}={token}"
        )


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Stop the server on SIGTERM and SIGHUP (a closed terminal) as on Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
