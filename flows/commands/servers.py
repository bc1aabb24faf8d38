"""Prefect servers: a local one to look at runs in."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from flows import server
from flows.commands.options import DataDir, Debug, one_line_errors

app = typer.Typer()


@app.command()
def ui(
    data_dir: DataDir = Path("ecgfm-data"),
    port: Annotated[int, typer.Option("--port", help="Where the server listens, on this machine only.")] = 4200,
    debug: Debug = False,
) -> None:
    """Start a local Prefect server. Runs on the same data directory go to it while it is up. Ctrl-C ends it."""
    with one_line_errors(debug), server.local_server(data_dir.absolute(), port) as local:
        typer.echo(f"Prefect UI: {local.address} (runs with --data-dir {data_dir} show up there; Ctrl-C ends it)")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            local.wait()
