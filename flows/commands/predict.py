"""A model's answers about recordings: predictions, embeddings, saliency."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.commands.options import Debug, complete_devices, one_line_errors

app = typer.Typer()

CheckpointPath = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A checkpoint's directory, a training stage's output, such as runs/ptb-xl/latest/finetune, or a .pt file.",
        show_default=False,
    ),
]
Inputs = Annotated[
    list[Path],
    typer.Argument(
        metavar="INPUT...",
        help="Recordings in any format that is read, folders of them, or what a pipeline has prepared: a data "
        "directory or a run in it.",
        show_default=False,
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Segments that the model sees at once.")]
Device = Annotated[
    str,
    typer.Option(
        "--device", help="auto (a GPU where there is one), cpu, cuda or cuda:1.", autocompletion=complete_devices
    ),
]
Precision = Annotated[
    Literal["fp32", "bf16"], typer.Option("--precision", help="Of the matrix products; bf16 is faster on a GPU.")
]
Jobs = Annotated[
    int, typer.Option("--jobs", min=0, help="Processes that read files; 0: one per core, where there are many files.")
]


@app.command()
def predict(
    checkpoint: CheckpointPath,
    inputs: Inputs,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The table, .parquet or .csv.")],
    segments: Annotated[
        Path | None, typer.Option("--segments", metavar="FILE", help="A row per segment as well, .parquet or .csv.")
    ] = None,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    precision: Precision = "fp32",
    jobs: Jobs = 0,
    debug: Debug = False,
) -> None:
    """Predict: a row per recording, a named column per label with its probability, or its number, and decisions.

    What cannot be used is in FILE.rejects beside the table, with the reason: listed = predicted + rejected.

    Examples:

      ecgfm predict ecgfm-data/runs/ptb-xl/latest/finetune our-ecgs/ --out predictions.csv

      ecgfm predict ecg-fm-mimic a.dcm b.xml c.hea --out predictions.parquet --segments segments.parquet
    """
    with one_line_errors(debug), _one_line_rejects(debug):
        from ecgfm import answer_files, predict_commands

        # before the seconds that torch and the weights take
        answer_files.check_outs([out, *([segments] if segments else [])], predict_commands.TABLES)
        from ecgfm import inference

        model = inference.load(checkpoint, device, precision)
        summary = predict_commands.predict(model, inputs, out, segments, batch_size, jobs)
        for line in summary.in_words("predicted"):
            typer.echo(line)


@app.command()
def embed(
    checkpoint: CheckpointPath,
    inputs: Inputs,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The vectors, .parquet, .npy or .csv.")],
    level: Annotated[
        Literal["record", "segment"],
        typer.Option("--level", help="A row per record (the mean of its segments), or a row per segment."),
    ] = "record",
    batch_size: BatchSize = 64,
    device: Device = "auto",
    precision: Precision = "fp32",
    jobs: Jobs = 0,
    debug: Debug = False,
) -> None:
    """Embed: the encoder's vector of every recording or segment, by a pretrained or a finetuned checkpoint.

    No lead is masked. The rows of a .npy are named in FILE.rows.csv beside it.

    Examples:

      ecgfm embed ecgfm-data/runs/ptb-xl/latest/pretrain our-ecgs/ --out embeddings.parquet

      ecgfm embed mimic_iv_ecg_physionet_pretrained.pt our-ecgs/ --out embeddings.npy --level segment
    """
    with one_line_errors(debug), _one_line_rejects(debug):
        from ecgfm import answer_files, predict_commands

        answer_files.check_outs([out], predict_commands.VECTORS)
        from ecgfm import inference

        model = inference.load(checkpoint, device, precision)
        summary = predict_commands.embed(model, inputs, out, level, batch_size, jobs)
        for line in summary.in_words("embedded"):
            typer.echo(line)


@app.command()
def saliency(
    checkpoint: CheckpointPath,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A recording.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="A picture, .png, or a page, .html.")],
    label: Annotated[
        str | None,
        typer.Option(
            "--label",
            metavar="LABEL",
            help="The label asked about.",
            show_default="the most probable, or the first number",
        ),
    ] = None,
    method: Annotated[
        Literal["attention", "gradient"],
        typer.Option(
            "--method",
            help="attention: where the last layer looks, alike in all leads and for all labels; gradient: what makes "
            "the label's logit, lead by lead (integrated gradients).",
        ),
    ] = "attention",
    segment: Annotated[
        int | None,
        typer.Option("--segment", min=0, help="Just this segment, from 0.", show_default="all, or the most probable"),
    ] = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Draw a recording on ECG paper, 25 mm/s and 10 mm/mV, shaded by what the model looked at or depends on.

    Examples:

      ecgfm saliency ecg-fm-mimic ecg.dcm --out ecg.html --method gradient --label 'Left bundle branch block'

      ecgfm saliency ecgfm-data/runs/ptb-xl/latest/finetune 00001_hr.hea --out attention.png
    """
    with one_line_errors(debug), _one_line_rejects(debug, f"{file}: "):
        from ecgfm import answer_files, predict_commands

        answer_files.check_outs([out], predict_commands.PICTURES)
        from ecgfm import inference

        model = inference.load(checkpoint, device)
        found = predict_commands.draw_saliency(model, file, out, label, method, segment)
        if found.label is not None:
            typer.echo(f"{found.label}: {found.answer}")
        for remark in found.remarks:
            typer.echo(remark)
        if method == "gradient":
            typer.echo(
                f"the shading adds up to the {'logit' if found.value is None else 'number'}'s difference to within "
                f"{100 * found.completeness_error:.2g} %"
            )
        typer.echo(f"drawn: {out}")


@contextmanager
def _one_line_rejects(debug: bool, where: str = "") -> Iterator[None]:
    """A recording that was named and cannot be used is the user's to mend. where: what stands before the reason"""
    from ecgfm.ecg import InputError, Rejected

    try:
        yield
    except Rejected as why:
        if debug:
            raise
        raise InputError(f"{where}{why}") from why
