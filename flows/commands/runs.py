"""Running pipelines and looking at what they would do."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ecgfm.ecg import InputError
from ecgfm.pipeline import PREPARE, SPLITS, STAGE_NAMES, PlannedStage, Selection, plan
from ecgfm.pipelines_file import load_pipeline, read_pipelines
from ecgfm.runs import report_of, run_locally
from ecgfm.stages import StageFailed, Store
from flows import server
from flows.commands.options import (
    AllowLeakage,
    DataDir,
    Debug,
    Force,
    From,
    HashRaw,
    Only,
    PipelineName,
    PipelinesFile,
    Raw,
    Set,
    Until,
    Verify,
    asked_for,
    log_to_terminal,
    one_line_errors,
    pipelines_file,
    values_of,
)

app = typer.Typer()


@app.command()
def run(
    pipeline: PipelineName,
    raw: Raw = None,
    data_dir: DataDir = Path("ecgfm-data"),
    pipelines: PipelinesFile = None,
    overrides: Set = None,
    only: Only = None,
    start: From = None,
    until: Until = None,
    force: Force = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    verify: Verify = False,
    hash_raw: HashRaw = False,
    allow_leakage: AllowLeakage = False,
    no_prefect: Annotated[bool, typer.Option("--no-prefect", help="Run in this process, without Prefect.")] = False,
    debug: Debug = False,
) -> None:
    """Run a pipeline: make what is not there yet. Killed, it goes on when it is run again.

    Examples:

      ecgfm run demo

      ecgfm run ptb-xl --raw ptb_xl=/data/ptb-xl --data-dir /data/ecgfm

      ecgfm run ptb-xl --raw ptb_xl=/data/ptb-xl --until splits

      ecgfm run ptb-xl --raw ptb_xl=/data/ptb-xl --set pretrain.max_steps=200 --dry-run
    """
    with one_line_errors(debug):
        values = values_of(overrides, allow_leakage)
        file, config, folders = asked_for(pipeline, pipelines, values, raw)
        selection = _selected(only, start, until, force)
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
                places = {source: str(folder) for source, folder in folders.items()}
                common = (pipeline, str(store.data_dir), str(file.absolute()), places, values)
                recorded = _run_under_prefect(api, common, selection, store, hash_raw, debug)
        if (recorded / "report.html").exists():
            typer.echo(f"report: {recorded / 'report.html'}")


def _run_under_prefect(
    api: str | None,
    common: tuple[str, str, str, dict[str, str], list[str]],
    selection: Selection,
    store: Store,
    hash_raw: bool,
    debug: bool,
) -> Path:
    """Run a pipeline as a flow, its only stage as that stage's flow; on a temporary server where there is no other.

    common: pipeline, data directory, pipelines file, raw folders, overrides: as the flows take them
    """
    with ExitStack() as serving:
        used = api or serving.enter_context(server.temporary_server(store.data_dir))
        server.use(used, store.data_dir, debug, temporary=not api)
        import httpx
        from prefect.exceptions import CancelledRun

        from flows.engine import send_what_waits
        from flows.pipeline import run_pipeline, run_stage

        serving.callback(send_what_waits)
        only, force = list(selection.only), list(selection.force)
        try:
            if len(only) == 1 and not selection.start:
                return Path(run_stage[only[0]](*common, force, store.verify, hash_raw))
            return Path(run_pipeline(*common, only, selection.start, force, store.verify, hash_raw))
        except CancelledRun:
            raise StageFailed(f"{common[0]}: cancelled in the UI") from None
        except httpx.HTTPError as error:
            raise StageFailed(
                f"{common[0]}: the Prefect server at {used} does not record any more ({_one_line(error)}); see its "
                "log, or go on with --no-prefect"
            ) from error


@app.command("plan")
def show(
    pipeline: PipelineName,
    raw: Raw = None,
    data_dir: DataDir = Path("ecgfm-data"),
    pipelines: PipelinesFile = None,
    overrides: Set = None,
    only: Only = None,
    start: From = None,
    until: Until = None,
    force: Force = None,
    verify: Verify = False,
    hash_raw: HashRaw = False,
    allow_leakage: AllowLeakage = False,
    debug: Debug = False,
) -> None:
    """Show each stage of a pipeline: cached or to run, and why. Makes nothing.

    Examples:

      ecgfm plan demo

      ecgfm plan ptb-xl --raw ptb_xl=/data/ptb-xl --set pretrain.max_steps=200
    """
    with one_line_errors(debug):
        _, config, folders = asked_for(pipeline, pipelines, values_of(overrides, allow_leakage), raw)
        selection = _selected(only, start, until, force)
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
        _, config, folders = asked_for(pipeline, pipelines, overrides, raw)
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
    """List the pipelines of pipelines.yaml: name, sources, what it is.

    Example:

      ecgfm pipelines --pipelines pipelines.yaml
    """
    with one_line_errors(debug):
        file = pipelines_file(pipelines)
        loaded = {name: load_pipeline(file, name) for name in read_pipelines(file)}
        width = max(map(len, loaded), default=0)
        for name, config in loaded.items():
            typer.echo(f"{name:{width}}  {', '.join(config.sources)}: {config.description}")


def _selected(
    only: Sequence[str] | None, start: str | None, until: str | None, force: Sequence[str] | None
) -> Selection:
    """The stages that --only, --from, --until and --force ask for.

    Raises:
        InputError: no such stage, or --until beside one of the others that say which.
    """
    if not until:
        return Selection(tuple(only or ()), start, tuple(force or ()))
    if only or start:
        raise InputError(f"--until {until} and {'--only' if only else '--from'}: expected one of them")
    if until not in STAGE_NAMES:
        raise InputError(f"--until {until}: no such stage; stages: {', '.join(STAGE_NAMES)}")
    return Selection(STAGE_NAMES[: STAGE_NAMES.index(until) + 1], force=tuple(force or ()))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def show_plan(pipeline: str, data_dir: Path, planned: Sequence[PlannedStage]) -> None:
    """A line per stage; the slices of a source together, by what becomes of them."""
    typer.echo(f"{pipeline} in {data_dir}")
    rows = []
    for (kind, source), group in itertools.groupby(planned, key=lambda stage: (stage.kind, stage.name.split()[1:2])):
        stages = list(group)
        if kind != PREPARE.name:
            rows += [(stage.name, stage.status, stage.why) for stage in stages]
            continue
        cached = [stage for stage in stages if stage.status == "cached"]
        if cached:
            number = f"{len(cached)} slice{'s' if len(cached) > 1 else ''}"
            rows.append((" ".join([kind, *source]), f"cached {number}", max(stage.why for stage in cached)))
        rest = [stage for stage in stages if stage.status != "cached"]
        for (status, why), count in Counter((stage.status, stage.why) for stage in rest).items():
            some = [stage.name.split(maxsplit=2)[-1] for stage in rest if (stage.status, stage.why) == (status, why)]
            names = ", ".join(some[:3]) + (", ..." if count > 3 else "")
            number = f"{count} slice{'s' if count > 1 else ''}"
            rows.append((" ".join([kind, *source]), f"{status} {number}", f"{names}: {why}" if why else ""))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, status, why in rows:
        typer.secho(f"  {name:{widths[0]}}  {status:{widths[1]}}  {why}".rstrip(), dim=status.startswith("cached"))
