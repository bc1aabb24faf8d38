"""Raw recordings: downloading them, looking at one, reading a folder of one's own."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ecgfm.pipelines_file import read_pipelines
from flows.commands.options import Debug, complete_sources, log_to_terminal, one_line_errors, pipelines_file

app = typer.Typer()


@app.command("download")
def fetch(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="physionet2021, ptb_xl, mimic_iv_ecg or code15.",
            show_default=False,
            autocompletion=complete_sources,
        ),
    ],
    to: Annotated[
        Path,
        typer.Option(
            "--to",
            metavar="DIR",
            help="The raw folder; made where it is not there. What is there is not fetched again.",
        ),
    ],
    mirror: Annotated[
        str | None,
        typer.Option("--mirror", metavar="URL", help="Another address of the version's folder, with the same layout."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="GLOB",
            help="Just the files whose path matches, such as 'training/georgia/*', and the tables. Repeatable.",
        ),
    ] = None,
    connections: Annotated[int, typer.Option("--connections", min=1, max=8, help="Files fetched at once.")] = 8,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how much there is to fetch, and stop.")] = False,
    debug: Debug = False,
) -> None:
    """Download a source's published files: verified, and safe to kill and run again.

    Examples:

      ecgfm download ptb_xl --to /data/ptb-xl --only 'records500/*'

      ecgfm download physionet2021 --to /data/challenge-2021 --only 'training/georgia/*' --dry-run
    """
    with one_line_errors(debug), log_to_terminal():
        from ecgfm import download
        from ecgfm.transfer import Manners

        manners = Manners(connections=connections)
        folder = to.expanduser().absolute()
        if dry_run:
            typer.echo(download.outlook(source, folder, mirror, only or (), verify, manners).in_words(source, folder))
            return
        try:
            summary = download.download(source, folder, mirror, only or (), verify, manners)
        except KeyboardInterrupt:
            typer.secho("interrupted; nothing is lost: run the same command to go on", fg="red", err=True)
            sys.stderr.flush()
            os._exit(130)  # threads may wait for the server yet; ending at once is safe, as being killed is
        for failure in summary.failures:
            typer.secho(f"  {failure}", fg="red", err=True)
        typer.echo(summary.in_words(source, folder))
        if not summary.complete:
            raise typer.Exit(1)
        file = pipelines_file(None)
        of_source = [name for name, values in read_pipelines(file).items() if source in values.get("sources", ())]
        for name in of_source or ["PIPELINE"]:
            typer.echo(f"next: ecgfm run {name} --raw {source}={shlex.quote(str(folder))}")


@app.command()
def peek(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A recording in any format that is read.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PICTURE", help="The drawing, .png or .svg.", show_default="./FILE.png"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Look at one recording: leads, rate, units, length, remarks, quality; and draw it on ECG paper.

    Reads WFDB, GE MUSE, Philips, Schiller, CardioSoft, HL7 aECG, DICOM, EDF and SCP-ECG.

    Examples:

      ecgfm peek records500/00000/00001_hr.hea

      ecgfm peek ecg.dcm --out ecg.svg
    """
    with one_line_errors(debug):
        from ecgfm.peek import describe, draw, look_at

        look = look_at(file)
        picture = out or Path(f"{look.path.name}.png")
        left_out = draw(look, picture)
        for line in describe(look):
            typer.echo(line)
        typer.echo(f"\ndrawn: {picture}" + (f" (without {', '.join(left_out)})" if left_out else ""))


@app.command("init-source")
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Your recordings.", show_default=False)],
    picture: Annotated[Path, typer.Option("--picture", metavar="PNG", help="Where five of them are drawn.")] = Path(
        "init-source.png"
    ),
    force: Annotated[bool, typer.Option("--force", help="Write ecgfm.yaml anew where there is one.")] = False,
    debug: Debug = False,
) -> None:
    """Look at a folder of your own recordings, write an ecgfm.yaml that reads it, and draw five of them.

    Files of any format that is read (WFDB, vendors'), or arrays (.npy, HDF5); CSV tables about them. What the files do
    not say is guessed, with the reason beside it.

    Example:

      ecgfm init-source /data/our-ecgs
    """
    with one_line_errors(debug):
        from ecgfm.init_source import init_source

        for line in init_source(folder, picture, force):
            typer.echo(line)
