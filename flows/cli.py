"""The command line. Its commands stand in flows/commands; a plan needs neither prefect nor torch."""

from __future__ import annotations

from typing import Annotated

import typer

from ecgfm import __version__
from flows.commands import bench, checkpoints, doctor, export, label, predict, recordings, runs, servers, store

app = typer.Typer(
    name="ecgfm",
    help="From raw ECG recordings to a pretrained, finetuned and evaluated foundation model.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for group in (runs, store, servers, recordings, predict, export, doctor):
    app.add_typer(group.app)
app.add_typer(checkpoints.app, name="checkpoint")
app.add_typer(label.app, name="label")
app.add_typer(bench.app, name="bench")


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    """From raw ECG recordings to a pretrained, finetuned and evaluated foundation model."""
    if version:
        typer.echo(f"ecgfm {__version__}")
        raise typer.Exit


if __name__ == "__main__":
    app()
