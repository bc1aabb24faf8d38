"""The command line. Its commands stand in flows/commands; a plan needs neither prefect nor torch."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

from ecgfm import __version__
from flows.commands import bench, checkpoints, doctor, export, label, predict, recordings, runs, servers, store

app = typer.Typer(
    name="ecgfm",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# how --help puts commands together; those of a group without a name stand for themselves
PANELS: dict[str, list[tuple[typer.Typer, str | None]]] = {
    "Recordings": [(recordings.app, None)],
    "Reports": [(label.app, "label")],
    "Pipelines": [(runs.app, None)],
    "Models": [(predict.app, None), (checkpoints.app, "checkpoint"), (export.app, None)],
    "Looking back": [(store.app, None)],
    "Schedules and servers": [(servers.app, None)],
    "This machine": [(doctor.app, None), (bench.app, "bench")],
}


def _as_paragraphs(text: str) -> str:
    """A docstring's paragraphs as one line each: a terminal has its own width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


for panel, groups in PANELS.items():
    for group, name in groups:
        for command in group.registered_commands:
            command.help = _as_paragraphs(inspect.getdoc(command.callback) or "")
            command.rich_help_panel = None if name else panel
        if name:
            group.info.help = _as_paragraphs(str(group.info.help))
        app.add_typer(group, name=name, rich_help_panel=panel)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    """From raw ECG recordings to a pretrained, finetuned and evaluated foundation model.

    To begin: ecgfm doctor, then ecgfm run demo. Every command has an example: ecgfm COMMAND --help.
    """
    if version:
        typer.echo(f"ecgfm {__version__}")
        raise typer.Exit


if __name__ == "__main__":
    app()
