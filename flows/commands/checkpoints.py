"""`ecgfm checkpoint`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import Debug, one_line_errors

app = typer.Typer(
    help="Look at a model's weights; download the published ones, and make them ours.", no_args_is_help=True
)

Heads = Annotated[
    int | None,
    typer.Option("--heads", min=1, help="Attention heads of a published file, where it does not say (published: 12)."),
]


@app.command("show")
def show_checkpoint(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A checkpoint's directory, a training stage's output, or a published .pt file."
        ),
    ],
    heads: Heads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint is: architecture, parameters, input, labels, what it was trained on, digest.

    Equal weights have the same digest, in a published file and in a directory of ours.

    Examples:

      ecgfm checkpoint show mimic_iv_ecg_finetuned.pt

      ecgfm checkpoint show ecgfm-data/runs/ptb-xl/latest/pretrain
    """
    with one_line_errors(debug):
        from ecgfm import checkpoint_commands

        found = checkpoint_commands.facts(path, heads)
        lines = [json.dumps(found, indent=1, ensure_ascii=False)] if as_json else checkpoint_commands.describe(found)
        for line in lines:
            typer.echo(line)


@app.command("download")
def download_checkpoint(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose weights: ecg-fm.")],
    finetuned: Annotated[
        bool,
        typer.Option("--finetuned", help="The classifier of 17 findings (MIMIC-IV-ECG), not the pretrained encoder."),
    ] = False,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            metavar="TARGET",
            show_default=False,
            help="The directory to make, by default ./NAME-pretrained or ./NAME-finetuned.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Bring published weights from the Hugging Face hub, verified, and make a checkpoint of ours of them.

    About 1.1 GB each, kept in the hub's cache, from where they come the next time. HF_ENDPOINT names a mirror,
    HF_HUB_OFFLINE=1 takes them from the cache alone, HF_HOME is where the cache lies. Wants the extra huggingface.

    Examples:

      ecgfm checkpoint download ecg-fm

      ecgfm checkpoint download ecg-fm --finetuned --to ecg-fm-mimic
    """
    with one_line_errors(debug):
        from ecgfm import checkpoint_commands, hub
        from flows.commands.tables import size_of

        weights = hub.published(name)
        target = to or Path(f"{name}-{'finetuned' if finetuned else 'pretrained'}")
        checkpoint_commands.check_target(target)
        file = weights.finetuned if finetuned else weights.pretrained
        typer.echo(f"{file} of {weights.repository}")
        typer.echo(f"  licence  {weights.licence}")
        typer.echo(f"  cite     {weights.citation}")
        brought = hub.bring(weights.repository, file)
        right = "as the hub says" if brought.verified else "which the hub does not tell"
        typer.echo(f"  commit   {brought.commit}, {size_of(brought.n_bytes)}, SHA-256 {brought.sha256}, {right}")
        checkpoint_commands.convert(brought.path, target, weights.labels if finetuned else None)
        for line in checkpoint_commands.describe(checkpoint_commands.facts(target)):
            typer.echo(line)


@app.command("convert")
def convert_checkpoint(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A published .pt file, or a checkpoint of ours.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The directory to make.")],
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="LABELS",
            help="What each logit is, in order: a file (a label a line, a .csv with a column 'name', a "
            "label_space.yaml), names with commas between, or mimic_iv_ecg for the published model of that name.",
        ),
    ] = None,
    aggregation: Annotated[
        list[str] | None,
        typer.Option(
            "--aggregation", metavar="LABEL=HOW", help="A record from its segments: mean (default) or max. Repeatable."
        ),
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option("--threshold", metavar="LABEL=P", help="The probability from which on it is present. Repeatable."),
    ] = None,
    heads: Heads = None,
    debug: Debug = False,
) -> None:
    """Make a directory of model.safetensors and meta.json of a published file: labels and all its use needs with it.

    Of a checkpoint of ours: a copy without the state that only resuming needs.

    Examples:

      ecgfm checkpoint convert mimic_iv_ecg_finetuned.pt ecg-fm-mimic --labels mimic_iv_ecg

      ecgfm checkpoint convert mine.pt mine --labels labels.txt --aggregation 'Ventricular tachycardia=max'
    """
    with one_line_errors(debug):
        from ecgfm import checkpoint_commands

        checkpoint_commands.convert(source, target, labels, aggregation or (), threshold or (), heads)
        for line in checkpoint_commands.describe(checkpoint_commands.facts(target)):
            typer.echo(line)
