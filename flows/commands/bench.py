"""`ecgfm bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ecgfm.config import PretrainConfig, from_dict
from ecgfm.ecg import InputError
from flows.commands.options import Debug, one_line_errors

app = typer.Typer(
    help="Measure on this machine; each prints a table. See docs/performance.md for what was measured.",
    no_args_is_help=True,
)


@app.command("prepare")
def bench_prepare(
    records: Annotated[int, typer.Option("--records", min=1, help="How many synthetic records.")] = 10_000,
    raw: Annotated[
        Path | None, typer.Option("--raw", help="Records in the layout of the Challenge 2021, instead of synthetic.")
    ] = None,
    folder: Annotated[Path, typer.Option("--folder", help="Where to write; nothing stays there.")] = Path("."),
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes; 0: one per core.")] = 0,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="How often it is measured.")] = 3,
    debug: Debug = False,
) -> None:
    """Records per second of prepare, beside copying the same bytes and beside wfdb record by record.

    Example:

      ecgfm bench prepare --records 1000 --folder /tmp
    """
    with one_line_errors(debug):
        from ecgfm.bench.prepare import main as measure

        typer.echo(measure(records, raw, folder.absolute(), workers, repeats))


@app.command("orchestration")
def bench_orchestration(
    slices: Annotated[int, typer.Option("--slices", min=1, help="How many folders of one record each.")] = 1000,
    folder: Annotated[Path, typer.Option("--folder", help="Where to write; nothing stays there.")] = Path("."),
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="How often it is measured.")] = 3,
    debug: Debug = False,
) -> None:
    """What Prefect costs: start, seconds a stage and a slice, memory, beside the same work without it.

    Example:

      ecgfm bench orchestration --slices 100 --folder /tmp
    """
    with one_line_errors(debug):
        from flows.bench_orchestration import main as measure

        typer.echo(measure(slices, folder.absolute(), repeats))


@app.command("tables")
def bench_tables(
    records: Annotated[int, typer.Option("--records", min=5000, help="How many simulated records.")] = 1_000_000,
    folder: Annotated[Path, typer.Option("--folder", help="Where to write; nothing stays there.")] = Path("."),
    debug: Debug = False,
) -> None:
    """Seconds and memory of audit, splits, labels and manifests on simulated tables, a process each.

    Example:

      ecgfm bench tables --records 100000 --folder /tmp
    """
    with one_line_errors(debug):
        from ecgfm.bench.tables import main as measure

        typer.echo(measure(records, folder.absolute()))


@app.command("load")
def bench_load(
    segments: Annotated[int, typer.Option("--segments", min=1, help="How many a run reads; 60 KB each.")] = 10_000,
    shards: Annotated[
        list[int] | None,
        typer.Option("--shards", min=1, help="Into how many shards: 1, 10 and 100, or others. Repeatable."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Segments in a batch.")] = 128,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Threads that read ahead.")] = 1,
    folder: Annotated[Path, typer.Option("--folder", help="Where to write; nothing stays there.")] = Path("."),
    stage: Annotated[
        list[Path] | None, typer.Option("--stage", help="The directory of a prepared slice, instead. Repeatable.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where batches go: auto, cpu, cuda.")] = "auto",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="How often it is measured.")] = 5,
    debug: Debug = False,
) -> None:
    """Segments per second from shards to batches, beside a plain copy and beside loadmat, the reference's way.

    Example:

      ecgfm bench load --segments 2000 --workers 2 --folder /tmp
    """
    with one_line_errors(debug):
        from ecgfm.bench.load import main as measure

        counts = shards or [count for count in (1, 10, 100) if count <= segments]
        typer.echo(measure(segments, counts, batch, workers, folder.absolute(), stage or [], device, repeats))


BenchModel = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="KEY=VALUE", help="Another model than the published one: n_layers=4. Repeatable."),
]
BenchDevice = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:<number>.")]
BenchPrecision = Annotated[str, typer.Option("--precision", help="bf16 or fp32.")]
BenchSteps = Annotated[int, typer.Option("--steps", min=1, help="How many are timed.")]


@app.command("pretrain")
def bench_pretrain(
    pairs: Annotated[int, typer.Option("--pairs", min=2, help="Pairs in a batch, of two segments each.")] = 4,
    steps: BenchSteps = 5,
    precision: BenchPrecision = "bf16",
    device: BenchDevice = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="With torch.compile.")] = False,
    model: BenchModel = None,
    debug: Debug = False,
) -> None:
    """Segments per second of pretraining, milliseconds of each part, utilisation, memory.

    Example:

      ecgfm bench pretrain --device cuda --pairs 64
    """
    with one_line_errors(debug):
        from ecgfm.bench.training import bench_pretrain as measure

        values = {"batch_pairs": pairs, "precision": precision, "device": device, "compile": compiled}
        typer.echo(measure(from_dict(PretrainConfig, {**values, "model": _values(model)}, "bench pretrain"), steps))


@app.command("encode")
def bench_encode(
    batch: Annotated[int, typer.Option("--batch", min=1, help="Segments in a batch.")] = 16,
    steps: BenchSteps = 5,
    precision: BenchPrecision = "bf16",
    device: BenchDevice = "auto",
    model: BenchModel = None,
    debug: Debug = False,
) -> None:
    """Segments per second of embedding, utilisation, memory.

    Example:

      ecgfm bench encode --device cuda --batch 256
    """
    with one_line_errors(debug):
        from ecgfm.bench.training import bench_encode as measure

        config = from_dict(
            PretrainConfig, {"precision": precision, "device": device, "model": _values(model)}, "bench encode"
        )
        typer.echo(measure(config.model, batch, steps, config.device, config.precision))


def _values(given: Sequence[str] | None) -> dict[str, str]:
    """KEY=VALUE, KEY=VALUE as a mapping."""
    pairs = [one.partition("=") for one in given or ()]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise InputError(f"--model {wrong[0]}: expected KEY=VALUE, such as n_layers=4")
    return {key: value for key, _, value in pairs}


@app.command("label")
def bench_label(
    reports: Annotated[int, typer.Option("--reports", min=1, help="How many are made up.")] = 200_000,
    table: Annotated[
        Path | None, typer.Option("--table", metavar="FILE", help="Your own reports, .csv or .parquet, instead.")
    ] = None,
    text_column: Annotated[
        str, typer.Option("--text-column", metavar="NAME", help="The column of the reports' text.")
    ] = "report",
    id_column: Annotated[
        str, typer.Option("--id-column", metavar="NAME", help="The column that names each report.")
    ] = "record_id",
    jobs: Annotated[int, typer.Option("--jobs", min=0, help="Processes; 0: one per core.")] = 0,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="How often it is measured.")] = 3,
    debug: Debug = False,
) -> None:
    """Reports per second of `ecgfm label`, beside a regular expression per phrase.

    Example:

      ecgfm bench label --reports 10000
    """
    with one_line_errors(debug):
        from ecgfm.bench.label import main as measure

        typer.echo(measure(reports, table, text_column, id_column, jobs, repeats))
