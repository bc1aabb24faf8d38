"""`ecgfm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.commands.options import Debug, one_line_errors
from flows.commands.predict import CheckpointPath

app = typer.Typer()


@app.command("export")
def export_checkpoint(
    checkpoint: CheckpointPath,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to make.", show_default=False)],
    kind: Annotated[
        Literal["onnx", "torch", "huggingface"],
        typer.Option("--format", help="ONNX, a program of torch.export (.pt2), or the layout of Hugging Face."),
    ] = "onnx",
    opset: Annotated[int, typer.Option("--opset", help="Version of ONNX's operators, 18 to 24.")] = 18,
    batch: Annotated[
        str, typer.Option("--batch", metavar="N", help="Segments at once; dynamic: any number, of any length.")
    ] = "dynamic",
    evaluation: Annotated[
        Path | None,
        typer.Option("--evaluation", metavar="DIR", help="An evaluate stage's output, for Hugging Face's model card."),
    ] = None,
    licence: Annotated[
        str, typer.Option("--license", metavar="ID", help="For Hugging Face's model card, such as mit.")
    ] = "other",
    debug: Debug = False,
) -> None:
    """Export a model for those who do not have ecgfm: weights, preprocessing.json, and an example that uses them.

    What was written is read back and compared with the checkpoint; nothing is uploaded.

    Examples:

      ecgfm export ecgfm-data/runs/ptb-xl/latest/finetune --to ptb-xl-onnx

      ecgfm export runs/ptb-xl/latest/finetune --to card --format huggingface --evaluation runs/ptb-xl/latest/evaluate
    """
    with one_line_errors(debug):
        from ecgfm.ecg import InputError

        if batch != "dynamic" and not batch.isdecimal():
            raise InputError(f"--batch {batch}: expected dynamic or a number of segments")
        from ecgfm import export

        size = None if batch == "dynamic" else int(batch)
        for line in export.export(checkpoint, to, kind, opset, size, evaluation, licence).in_words():
            typer.echo(line)
