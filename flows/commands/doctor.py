"""`ecgfm doctor`. Imports torch, to see whether that works, and not Prefect."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ecgfm.ecg import InputError
from flows.commands.options import DataDir, Debug, one_line_errors

app = typer.Typer()

_COLOURS = {"  ok ": "green", "  missing ": "yellow", "  wrong ": "red"}


@app.command()
def doctor(
    data_dir: DataDir = Path("ecgfm-data"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Tell what this machine can do, and for what is missing the command that mends it.

    Python, torch and its GPUs, threads, memory, disk, Prefect and its server, and the optional parts. The exit code is
    0 where all that is required works, else 1.

    Examples:

      ecgfm doctor

      ecgfm doctor --data-dir /data/ecgfm --json
    """
    with one_line_errors(debug):
        from ecgfm.doctor import examine, in_words, works
        from flows.server import answers, configured_api

        api, failure = None, ""
        try:
            api = configured_api(data_dir)
        except InputError as error:  # a profile that cannot be read is a finding
            failure = str(error)
        findings = examine(data_dir, api, api is not None and answers(api), failure)
        if as_json:
            typer.echo(json.dumps([asdict(one) for one in findings], indent=1, ensure_ascii=False))
        else:
            for line in in_words(findings):
                typer.secho(line, fg=next((colour for word, colour in _COLOURS.items() if line.startswith(word)), None))
        if not works(findings):
            raise typer.Exit(1)
