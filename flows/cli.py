"""The command line. Heavy imports stand inside the commands that need them: a plan needs neither prefect nor torch."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from ecgfm import __version__
from ecgfm.config import PretrainConfig, from_dict, load_pipeline, read_pipelines
from ecgfm.ecg import InputError
from ecgfm.pipeline import PREPARE, SPLITS, STAGE_NAMES, PlannedStage, Selection, plan
from ecgfm.runs import report_of, run_locally
from ecgfm.stages import StageFailed, Store
from flows import server

app = typer.Typer(
    name="ecgfm",
    help="From raw ECG recordings to a pretrained, finetuned and evaluated foundation model.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

bench = typer.Typer(help="Measure on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")
checkpoint = typer.Typer(help="Look at a model's weights; make the published ones ours.", no_args_is_help=True)
app.add_typer(checkpoint, name="checkpoint")

_PACKAGED = Path(__file__).parent / "pipelines.yaml"
PIPELINES = _PACKAGED if _PACKAGED.is_file() else Path(__file__).parents[1] / "pipelines.yaml"

PipelineName = Annotated[str, typer.Argument(metavar="PIPELINE", help="A name in pipelines.yaml, such as ptb-xl.")]
Raw = Annotated[
    list[str] | None,
    typer.Option("--raw", metavar="SOURCE=PATH", help="Where a source's raw files lie. Once per source."),
]
DataDir = Annotated[
    Path, typer.Option("--data-dir", envvar="ECGFM_DATA_DIR", help="Everything that is made lies below this folder.")
]
PipelinesFile = Annotated[
    Path | None,
    typer.Option("--pipelines", metavar="FILE", help="The pipelines file. [default: ./pipelines.yaml, else our own]"),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value, such as pretrain.max_steps=200. Repeatable."),
]
Only = Annotated[list[str] | None, typer.Option("--only", metavar="STAGE", help="Make just this stage. Repeatable.")]
From = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Make this stage and those after it.")]
Force = Annotated[list[str] | None, typer.Option("--force", metavar="STAGE", help="Remake a stage. Repeatable.")]
Verify = Annotated[bool, typer.Option("--verify", help="Hash every output before it is used, not only its size.")]
HashRaw = Annotated[
    bool, typer.Option("--hash-raw", help="Know raw files by their content instead of size and modification time.")
]
Heads = Annotated[
    int | None,
    typer.Option("--heads", min=1, help="Attention heads of a published file, where it does not say (published: 12)."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def run(
    pipeline: PipelineName,
    raw: Raw = None,
    data_dir: DataDir = Path("ecgfm-data"),
    pipelines: PipelinesFile = None,
    overrides: Set = None,
    only: Only = None,
    start: From = None,
    force: Force = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    verify: Verify = False,
    hash_raw: HashRaw = False,
    no_prefect: Annotated[bool, typer.Option("--no-prefect", help="Run in this process, without Prefect.")] = False,
    debug: Debug = False,
) -> None:
    """Run a pipeline: make what is not there yet.

    Examples:

      ecgfm run ptb-xl --raw ptb_xl=/data/ptb-xl --data-dir /data/ecgfm

      ecgfm run ptb-xl --raw ptb_xl=/data/ptb-xl --set pretrain.max_steps=200 --dry-run
    """
    with one_line_errors(debug):
        file = pipelines_file(pipelines)
        config = load_pipeline(file, pipeline, overrides or [])
        folders = raw_folders(raw or [], config.sources)
        selection = Selection(tuple(only or ()), start, tuple(force or ()))
        store = Store(data_dir.absolute(), verify)
        api = None if no_prefect else server.configured_api(store.data_dir)
        if dry_run or not api:
            planned = plan(config, folders, store, selection, hash_raw)
            if dry_run:
                show_plan(pipeline, store.data_dir, planned)
                return
            if all(stage.status in ("cached", "skip") for stage in planned):
                typer.echo(f"{pipeline}: up to date ({len(planned)} stages in {store.data_dir})")
                if planned[-1].directory:
                    typer.echo(f"report: {report_of(store.data_dir, pipeline, planned[-1].directory)}")
                return
        with log_to_terminal():
            if no_prefect:
                recorded = run_locally(pipeline, config, folders, store, selection, hash_raw)
            else:
                server.use(api, store.data_dir, debug)
                from flows.pipeline import run_pipeline, run_stage

                places = {source: str(folder) for source, folder in folders.items()}
                common = (pipeline, str(store.data_dir), str(file.absolute()), places, list(overrides or ()))
                if len(selection.only) == 1 and not start:
                    done = run_stage[selection.only[0]](*common, list(selection.force), verify, hash_raw)
                else:
                    done = run_pipeline(*common, list(selection.only), start, list(selection.force), verify, hash_raw)
                recorded = Path(done)
        if (recorded / "report.html").exists():
            typer.echo(f"report: {recorded / 'report.html'}")


@app.command("plan")
def show(
    pipeline: PipelineName,
    raw: Raw = None,
    data_dir: DataDir = Path("ecgfm-data"),
    pipelines: PipelinesFile = None,
    overrides: Set = None,
    only: Only = None,
    start: From = None,
    force: Force = None,
    verify: Verify = False,
    hash_raw: HashRaw = False,
    debug: Debug = False,
) -> None:
    """Show each stage of a pipeline: cached or to run, and why. Makes nothing."""
    with one_line_errors(debug):
        config = load_pipeline(pipelines_file(pipelines), pipeline, overrides or [])
        folders = raw_folders(raw or [], config.sources)
        selection = Selection(tuple(only or ()), start, tuple(force or ()))
        store = Store(data_dir.absolute(), verify)
        show_plan(pipeline, store.data_dir, plan(config, folders, store, selection, hash_raw))


@app.command("audit")
def show_duplicates(
    pipeline: PipelineName,
    raw: Raw = None,
    data_dir: DataDir = Path("ecgfm-data"),
    pipelines: PipelinesFile = None,
    overrides: Set = None,
    hash_raw: HashRaw = False,
    debug: Debug = False,
) -> None:
    """Show which records are the same ECG under several names, and the cohort from listed records to splits.

    Prepares what is not prepared yet.

    Example:

      ecgfm audit challenge-2021 --raw physionet2021=/data/challenge-2021
    """
    with one_line_errors(debug):
        config = load_pipeline(pipelines_file(pipelines), pipeline, overrides or [])
        folders = raw_folders(raw or [], config.sources)
        store = Store(data_dir.absolute())
        stages = STAGE_NAMES[: STAGE_NAMES.index(SPLITS.name) + 1]
        with log_to_terminal():
            found = run_locally(pipeline, config, folders, store, Selection(only=stages[:-1]), hash_raw) / "audit"
        typer.echo("\n" + (found / "summary.md").read_text(encoding="utf-8"))
        # apart: what was found is worth showing though there may be no way to split it
        split = run_locally(pipeline, config, folders, store, Selection(only=stages), hash_raw) / "splits"
        from ecgfm.cohort import cohort_text

        typer.echo("\n# The cohort\n\n" + cohort_text(json.loads((split / "cohort.json").read_bytes())))
        for file in (
            found / "duplicates.parquet",
            found / "summary.md",
            split / "splits.parquet",
            split / "cohort.svg",
        ):
            typer.echo(str(file))


@app.command("pipelines")
def list_pipelines(pipelines: PipelinesFile = None, debug: Debug = False) -> None:
    """List the pipelines of pipelines.yaml."""
    with one_line_errors(debug):
        file = pipelines_file(pipelines)
        loaded = {name: load_pipeline(file, name) for name in read_pipelines(file)}
        width = max(map(len, loaded), default=0)
        for name, config in loaded.items():
            typer.echo(f"{name:{width}}  {', '.join(config.sources)}: {config.description}")


@app.command("download")
def fetch(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="physionet2021, ptb_xl, mimic_iv_ecg or code15.", show_default=False)
    ],
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="The raw folder. What is there is not fetched again.")
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
    connections: Annotated[int, typer.Option("--connections", min=1, max=8, help="At once.")] = 8,
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
        typer.Option("--out", metavar="PICTURE", help="The drawing, .png or .svg. [default: ./FILE.png]"),
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


@checkpoint.command("show")
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


@checkpoint.command("convert")
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


@bench.command("prepare")
def bench_prepare(
    records: Annotated[int, typer.Option("--records", min=1, help="How many synthetic records.")] = 10_000,
    raw: Annotated[
        Path | None, typer.Option("--raw", help="Records in the layout of the Challenge 2021, instead of synthetic.")
    ] = None,
    folder: Annotated[Path, typer.Option("--folder", help="Where to write; nothing stays there.")] = Path("."),
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes; 0: one per core.")] = 0,
    repeats: Annotated[int, typer.Option("--repeats", min=1)] = 3,
    debug: Debug = False,
) -> None:
    """Records per second of prepare, beside copying the same bytes and beside wfdb record by record."""
    with one_line_errors(debug):
        from ecgfm.bench_prepare import main as measure

        typer.echo(measure(records, raw, folder.absolute(), workers, repeats))


@bench.command("tables")
def bench_tables(
    records: Annotated[int, typer.Option("--records", min=5000, help="How many simulated records.")] = 1_000_000,
    folder: Annotated[Path, typer.Option("--folder", help="Where to write; nothing stays there.")] = Path("."),
    debug: Debug = False,
) -> None:
    """Seconds and memory of audit, splits, labels and manifests on simulated tables, a process each."""
    with one_line_errors(debug):
        from ecgfm.bench_tables import main as measure

        typer.echo(measure(records, folder.absolute()))


@bench.command("load")
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
    repeats: Annotated[int, typer.Option("--repeats", min=1)] = 5,
    debug: Debug = False,
) -> None:
    """Segments per second from shards to batches, beside a plain copy and beside loadmat, the reference's way."""
    with one_line_errors(debug):
        from ecgfm.bench_load import main as measure

        counts = shards or [count for count in (1, 10, 100) if count <= segments]
        typer.echo(measure(segments, counts, batch, workers, folder.absolute(), stage or [], device, repeats))


BenchModel = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="KEY=VALUE", help="Another model than the published one: n_layers=4. Repeatable."),
]
BenchDevice = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:<number>.")]
BenchPrecision = Annotated[str, typer.Option("--precision", help="bf16 or fp32.")]
BenchSteps = Annotated[int, typer.Option("--steps", min=1, help="How many are timed.")]


@bench.command("pretrain")
def bench_pretrain(
    pairs: Annotated[int, typer.Option("--pairs", min=2, help="Pairs in a batch, of two segments each.")] = 4,
    steps: BenchSteps = 5,
    precision: BenchPrecision = "bf16",
    device: BenchDevice = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="With torch.compile.")] = False,
    model: BenchModel = None,
    debug: Debug = False,
) -> None:
    """Segments per second of pretraining, milliseconds of each part, utilisation, memory."""
    with one_line_errors(debug):
        from ecgfm.bench_training import bench_pretrain as measure

        values = {"batch_pairs": pairs, "precision": precision, "device": device, "compile": compiled}
        typer.echo(measure(from_dict(PretrainConfig, {**values, "model": _values(model)}, "bench pretrain"), steps))


@bench.command("encode")
def bench_encode(
    batch: Annotated[int, typer.Option("--batch", min=1, help="Segments in a batch.")] = 16,
    steps: BenchSteps = 5,
    precision: BenchPrecision = "bf16",
    device: BenchDevice = "auto",
    model: BenchModel = None,
    debug: Debug = False,
) -> None:
    """Segments per second of embedding, utilisation, memory."""
    with one_line_errors(debug):
        from ecgfm.bench_training import bench_encode as measure

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


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    """From raw ECG recordings to a pretrained, finetuned and evaluated foundation model."""
    if version:
        typer.echo(f"ecgfm {__version__}")
        raise typer.Exit


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """A user's mistake ends with one line and exit code 2; --debug shows the traceback."""
    try:
        yield
    except InputError as error:
        if debug:
            raise
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from None
    except StageFailed as error:
        if debug:
            raise
        typer.secho(f"error: {error}; what is saved is kept: run the same command to go on", fg="red", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EDQUOT):
            raise
        typer.secho(f"error: {error}; nothing is lost: run the same command again when mended", fg="red", err=True)
        raise typer.Exit(1) from None


def pipelines_file(given: Path | None) -> Path:
    """The pipelines file that was named, or the one in this folder, or the one that comes with the package."""
    here = Path("pipelines.yaml")
    return given or (here if here.is_file() else PIPELINES)


def raw_folders(given: Sequence[str], sources: Sequence[str]) -> dict[str, Path]:
    """SOURCE=PATH texts as a mapping.

    Raises:
        InputError: not of that form, or a source that the pipeline does not have.
    """
    folders = {}
    for text in given:
        source, equals, path = text.partition("=")
        if not equals or not path:
            raise InputError(f"--raw {text}: expected SOURCE=PATH, such as ptb_xl=/data/ptb-xl")
        if source not in sources:
            raise InputError(f"--raw {text}: this pipeline has no source {source!r}; its sources: {', '.join(sources)}")
        folders[source] = Path(path).expanduser().absolute()
    return folders


def show_plan(pipeline: str, data_dir: Path, planned: Sequence[PlannedStage]) -> None:
    """A line per stage; the slices of a source together, by what becomes of them."""
    typer.echo(f"{pipeline} in {data_dir}")
    rows = []
    for (kind, source), group in itertools.groupby(planned, key=lambda stage: (stage.kind, stage.name.split()[1:2])):
        stages = list(group)
        if kind != PREPARE.name:
            rows += [(stage.name, stage.status, stage.why) for stage in stages]
            continue
        for (status, why), count in Counter((stage.status, stage.why) for stage in stages).items():
            some = [stage.name.split(maxsplit=2)[-1] for stage in stages if (stage.status, stage.why) == (status, why)]
            names = ", ".join(some[:3]) + (", ..." if count > 3 else "")
            number = f"{count} slice{'s' if count > 1 else ''}"
            rows.append((" ".join([kind, *source]), f"{status} {number}", f"{why}: {names}" if why else ""))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, status, why in rows:
        typer.secho(f"  {name:{widths[0]}}  {status:{widths[1]}}  {why}".rstrip(), dim=status.startswith("cached"))


@contextmanager
def log_to_terminal() -> Iterator[None]:
    """What the library logs, as plain lines. On a terminal, progress bars stand for what a training process prints."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("  %(message)s"))
    if sys.stderr.isatty():
        handler.addFilter(lambda record: record.name != "ecgfm.stages")
    library = logging.getLogger("ecgfm")
    library.setLevel(logging.INFO)
    library.addHandler(handler)
    try:
        yield
    finally:
        library.removeHandler(handler)


if __name__ == "__main__":
    app()
