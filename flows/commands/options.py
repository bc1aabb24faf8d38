"""What commands share: options and what the Tab key offers for them, how errors end, what the log looks like."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ecgfm.config import LabelsConfig
from ecgfm.ecg import InputError
from ecgfm.files import DISK_ERRORS
from ecgfm.pipeline import STAGE_NAMES
from ecgfm.pipelines_file import Pipeline, load_pipeline, read_pipelines
from ecgfm.runs import run_folders
from ecgfm.stages import StageFailed

_PACKAGED = Path(__file__).parents[1] / "pipelines.yaml"
PIPELINES = _PACKAGED if _PACKAGED.is_file() else Path(__file__).parents[2] / "pipelines.yaml"

# ---- what the Tab key offers beside commands and options


def complete_pipelines(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Names in the pipelines file, with what they are. Of a file that cannot be read none: the command will say why."""
    try:
        known = read_pipelines(pipelines_file(ctx.params.get("pipelines")))
    except InputError:
        return []
    named = ctx.params.get("names") or ()  # of a command that takes several
    offered = [name for name in _beginning(incomplete, known) if name not in named]
    return [(name, str(known[name].get("description", ""))) for name in offered]


def complete_stages(incomplete: str) -> list[str]:
    """Kinds of stages, in their order."""
    return _beginning(incomplete, STAGE_NAMES)


def complete_runs(ctx: typer.Context, incomplete: str) -> list[str]:
    """The pipelines that have run in the data directory, and their runs, newest first."""
    folders = sorted(run_folders(Path(ctx.params.get("data_dir") or "ecgfm-data")), reverse=True)
    pipelines = sorted({folder.parent.name for folder in folders})
    latest = [f"{name}/latest" for name in pipelines]
    return _beginning(incomplete, [*pipelines, *latest, *(f"{one.parent.name}/{one.name}" for one in folders)])


def complete_sources(incomplete: str) -> list[str]:
    """Sources that can be downloaded."""
    from ecgfm.archives import ARCHIVES

    return _beginning(incomplete, ARCHIVES)


def complete_label_sets(incomplete: str) -> list[str]:
    """Our sets of labels."""
    from ecgfm.reports.vocabulary import Vocabulary

    return _beginning(incomplete, Vocabulary.read().label_sets)


def complete_devices(incomplete: str) -> list[str]:
    """Where a model can be; torch, which would say what is there, takes too long."""
    return _beginning(incomplete, ("auto", "cpu", "cuda"))


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


# ---- options


PipelineName = Annotated[
    str,
    typer.Argument(
        metavar="PIPELINE", help="A name in pipelines.yaml, such as ptb-xl.", autocompletion=complete_pipelines
    ),
]
Raw = Annotated[
    list[str] | None,
    typer.Option(
        "--raw",
        metavar="SOURCE=PATH",
        help="Where a source's raw files lie, such as ptb_xl=/data/ptb-xl. Once per source.",
    ),
]
DataDir = Annotated[
    Path, typer.Option("--data-dir", envvar="ECGFM_DATA_DIR", help="Everything that is made lies below this folder.")
]
PipelinesFile = Annotated[
    Path | None,
    typer.Option(
        "--pipelines", metavar="FILE", help="The pipelines file.", show_default="./pipelines.yaml, else our own"
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a value, such as pretrain.max_steps=200. Repeatable. Every key: docs/api/keys.md.",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="STAGE",
        help=f"Make just this stage. Repeatable. Stages: {', '.join(STAGE_NAMES)}.",
        autocompletion=complete_stages,
    ),
]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="STAGE",
        help="Make this stage and those after it, such as finetune.",
        autocompletion=complete_stages,
    ),
]
Until = Annotated[
    str | None,
    typer.Option(
        "--until",
        metavar="STAGE",
        help="Make this stage and those before it, such as splits.",
        autocompletion=complete_stages,
    ),
]
Force = Annotated[
    list[str] | None,
    typer.Option(
        "--force",
        metavar="STAGE",
        help="Make a stage again although it is there. Repeatable.",
        autocompletion=complete_stages,
    ),
]
Verify = Annotated[bool, typer.Option("--verify", help="Hash every output before it is used, not only its size.")]
HashRaw = Annotated[
    bool, typer.Option("--hash-raw", help="Know raw files by their content instead of size and modification time.")
]
AllowLeakage = Annotated[
    bool, typer.Option("--allow-leakage", help="Evaluate also where the model knows test records; the report says so.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


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
        if debug or error.errno not in DISK_ERRORS:
            raise
        typer.secho(f"error: {error}; nothing is lost: run the same command again when mended", fg="red", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        if debug:
            raise
        typer.secho("stopped; nothing is lost: run the same command to go on", fg="red", err=True)
        raise typer.Exit(130) from None  # as a shell has it for a program that Ctrl-C ended


def pipelines_file(given: Path | None) -> Path:
    """The pipelines file that was named, or the one in this folder, or the one that comes with the package."""
    here = Path("pipelines.yaml")
    return given or (here if here.is_file() else PIPELINES)


def values_of(overrides: Sequence[str] | None, allow_leakage: bool) -> list[str]:
    """All that is set on the command line, as of --set."""
    return [*(overrides or []), *(["evaluate.allow_leakage=true"] if allow_leakage else [])]


def asked_for(
    pipeline: str, pipelines: Path | None, overrides: Sequence[str] | None, raw: Sequence[str] | None
) -> tuple[Path, Pipeline, dict[str, Path]]:
    """The pipelines file, the pipeline of that name with its overrides, and its raw folders.

    Raises:
        InputError: no such file or pipeline, an unknown key or a wrong value, a source that it does not have.
    """
    file = pipelines_file(pipelines)
    config = load_pipeline(file, pipeline, overrides or ())
    check_labels(config.labels)
    return file, config, raw_folders(raw or (), config, file)


def check_labels(config: LabelsConfig) -> None:
    """What a pipeline's labels are made of is there by name: labels come after preparation, too late to tell a slip.

    Raises:
        InputError: a table without these columns, rules that cannot be used, or no such set of labels.
    """
    given = [config.table] if config.reports is None else [config.reports.rules, config.reports.patterns]
    if not all(Path(path).expanduser().exists() for path in given if path is not None):
        return  # the plan says so
    if config.table is not None:
        from ecgfm.label_tables import check_table

        check_table(Path(config.table).expanduser().absolute(), list(config.columns.values()))
    if config.reports is not None:
        from ecgfm.label_reports import labels_of

        labels_of(config.reports)


def raw_folders(given: Sequence[str], config: Pipeline, file: Path) -> dict[str, Path]:
    """Source -> raw folder: SOURCE=PATH texts, and for the rest what the pipelines file says.

    Raises:
        InputError: not of that form, or a source that the pipeline does not have.
    """
    folders = {source: (file.absolute().parent / Path(path).expanduser()) for source, path in config.raw.items()}
    for text in given:
        source, equals, path = text.partition("=")
        if not equals or not path:
            raise InputError(f"--raw {text}: expected SOURCE=PATH, such as ptb_xl=/data/ptb-xl")
        if source not in config.sources:
            known = ", ".join(config.sources)
            raise InputError(f"--raw {text}: this pipeline has no source {source!r}; its sources: {known}")
        folders[source] = Path(path).expanduser().absolute()
    return folders


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
