"""Prefect servers, and what runs there by itself: serving pipelines, deploying them, closing what died."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from ecgfm.ecg import InputError
from ecgfm.pipelines_file import Pipeline, load_pipeline, read_pipelines
from flows import server
from flows.commands.options import (
    DataDir,
    Debug,
    PipelinesFile,
    Raw,
    complete_pipelines,
    one_line_errors,
    pipelines_file,
    raw_folders,
)

if TYPE_CHECKING:
    from flows.deployments import Deployment, Place

app = typer.Typer()

Chosen = dict[str, tuple[Pipeline, dict[str, Path]]]  # name of a pipeline -> its config and raw folders

Port = Annotated[int, typer.Option("--port", help="Where the server listens, on this machine only.")]
Pipelines = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PIPELINE]...",
        help="Just these; else all whose raw folders are known.",
        show_default=False,
        autocompletion=complete_pipelines,
    ),
]
GpuSlots = Annotated[
    int | None,
    typer.Option(
        "--gpu-slots", min=1, help="Trainings on GPUs at once.", show_default="as it is, else the GPUs of this machine"
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would change and stop.")]


@app.command()
def ui(data_dir: DataDir = Path("ecgfm-data"), port: Port = 4200, debug: Debug = False) -> None:
    """Start a local Prefect server. Runs on the same data directory go to it while it is up. Ctrl-C ends it.

    Example:

      ecgfm ui --data-dir /data/ecgfm --port 4201
    """
    with one_line_errors(debug), server.local_server(data_dir.absolute(), port) as local:
        typer.echo(f"Prefect UI: {local.address} (runs with --data-dir {data_dir} show up there; Ctrl-C ends it)")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            local.wait()


@app.command()
def serve(
    names: Pipelines = None,
    raw: Raw = None,
    data_dir: DataDir = Path("ecgfm-data"),
    pipelines: PipelinesFile = None,
    gpu_slots: GpuSlots = None,
    port: Port = 4200,
    debug: Debug = False,
) -> None:
    """Run pipelines on their schedules, and when somebody starts one in the UI, until Ctrl-C.

    One process, no infrastructure: without a Prefect server of your own it starts one, as `ecgfm ui` does.

    Examples:

      ecgfm serve --data-dir /data/ecgfm --pipelines pipelines.yaml

      ecgfm serve ptb-xl --raw ptb_xl=/data/ptb-xl --data-dir /data/ecgfm
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with one_line_errors(debug), suppress(KeyboardInterrupt), ExitStack() as stack:
        file = pipelines_file(pipelines).absolute()
        chosen, left_out = _chosen(file, names or [], raw or [])
        api = server.configured_api(data_dir.absolute())
        local = None
        if not api:
            local = stack.enter_context(server.local_server(data_dir.absolute(), port))
            api = f"{local.address}/api"
        server.use(api, data_dir.absolute(), debug)
        from flows import deployments

        place = deployments.Place(data_dir.absolute(), file)
        with _asking(api):
            served = _brought_up_to_date(place, chosen, gpu_slots, dry_run=False)
        _show_table(served, chosen)
        for name, why in left_out.items():
            typer.echo(f"not served: {name} ({why})")
        typer.echo(f"\nPrefect UI: {api.removesuffix('/api')} (Ctrl-C ends it all)")

        def check_server() -> None:
            if local and local.process.poll() is not None:
                local.wait()  # says how it ended

        deployments.serve(served, typer.echo, check_server)


@app.command()
def deploy(
    pool: Annotated[str, typer.Option("--pool", metavar="POOL", help="A work pool of the Prefect server.")],
    names: Pipelines = None,
    raw: Raw = None,
    data_dir: DataDir = Path("ecgfm-data"),
    pipelines: PipelinesFile = None,
    image: Annotated[
        str | None, typer.Option("--image", help="The container image with ecgfm, where the pool runs containers.")
    ] = None,
    job_variable: Annotated[
        list[str] | None,
        typer.Option("--job-variable", metavar="KEY=VALUE", help="A variable of the pool's jobs, as YAML. Repeatable."),
    ] = None,
    gpu_slots: GpuSlots = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Deploy pipelines to a work pool, whose workers run them: process, docker, kubernetes.

    The pool then has exactly these pipelines of ours. The data directory, the pipelines file and the raw folders are
    named as the workers see them; the file is read here too.

    Examples:

      ecgfm deploy --pool lab --data-dir /data/ecgfm

      ecgfm deploy --pool cluster --image registry.example.org/ecgfm:0.1 --job-variable namespace=ecg --dry-run
    """
    with one_line_errors(debug):
        file = pipelines_file(pipelines).absolute()
        chosen, left_out = _chosen(file, names or [], raw or [])
        with _asking(_used(server.configured_api(data_dir.absolute()), debug)):
            from flows import deployments

            variables = deployments.pool_variables(pool, image, _job_variables(job_variable or []))
            place = deployments.Place(data_dir.absolute(), file, pool, variables)
            deployed = _brought_up_to_date(place, chosen, gpu_slots, dry_run)
        if not dry_run:
            _show_table(deployed, chosen)
        for name, why in left_out.items():
            typer.echo(f"not deployed: {name} ({why})")


@app.command()
def reconcile(
    data_dir: DataDir = Path("ecgfm-data"),
    api: Annotated[
        str | None,
        typer.Option("--api", metavar="URL", help="The Prefect server's API.", show_default="the one that runs go to"),
    ] = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Close on the Prefect server what dead processes left open: runs, their tasks, slots that nobody holds.

    Example:

      ecgfm reconcile --data-dir /data/ecgfm --dry-run
    """
    with one_line_errors(debug), _asking(_used(api or server.configured_api(data_dir.absolute()), debug)):
        from flows.reconcile import reconcile as close

        closed = []
        for one in close(data_dir.absolute(), dry_run):
            typer.echo(f"{'would close' if dry_run else 'closed'} {one}")
            closed.append(one)
        if not closed:
            typer.echo("nothing to close")


def _used(api: str | None, debug: bool) -> str:
    """Set this process up for a server that is there, before prefect is imported. Returns its API."""
    if not api:
        raise InputError("no Prefect server: set PREFECT_API_URL to yours, or start one with ecgfm ui")
    os.environ["PREFECT_API_URL"] = api
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO" if debug else "CRITICAL")
    return api


@contextmanager
def _asking(api: str) -> Iterator[None]:
    """A server that cannot be reached is told in one line."""
    import httpx

    try:
        yield
    except httpx.TransportError as error:
        raise InputError(f"the Prefect server at {api} does not answer: {error or type(error).__name__}") from error


def _chosen(file: Path, names: Sequence[str], raw: Sequence[str]) -> tuple[Chosen, dict[str, str]]:
    """The pipelines that can be deployed, each with its config and raw folders; of those that cannot, why.

    Raises:
        InputError: a named one is not there or has no raw folder; there is none at all; a --raw of no pipeline.
    """
    chosen: Chosen = {}
    left_out = {}
    configs = {name: load_pipeline(file, name) for name in names or read_pipelines(file)}
    for text in raw:  # a misspelt one is told as such
        if not any(text.partition("=")[0] in config.sources for config in configs.values()):
            known = ", ".join(sorted({source for config in configs.values() for source in config.sources}))
            raise InputError(f"--raw {text}: expected SOURCE=PATH; the sources of these pipelines: {known}")
    for name, config in configs.items():
        given = [text for text in raw if text.partition("=")[0] in config.sources]
        folders = raw_folders(given, config, file)
        missing = [source for source in config.sources if source not in folders and source != "synthetic"]
        if missing:
            left_out[name] = "needs " + " ".join(f"--raw {source}=PATH" for source in missing)
        else:
            chosen[name] = config, folders
    if names and left_out:
        name, why = next(iter(left_out.items()))
        raise InputError(f"{name} {why}, or raw: in {file.name}")
    if not chosen:
        raise InputError(f"no pipeline of {file} has its raw folders: give --raw SOURCE=PATH, or raw: in the file")
    return chosen, left_out


def _job_variables(texts: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE texts; a value is YAML."""
    variables = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--job-variable {text}: expected KEY=VALUE, such as namespace=ecg")
        try:
            variables[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--job-variable {text}: the value is not YAML: {' '.join(str(error).split())}") from error
    return variables


def _brought_up_to_date(place: Place, chosen: Chosen, gpu_slots: int | None, dry_run: bool) -> list[Deployment]:
    """Deploy, say what changed, and have the server watch over it."""
    from flows import deployments, reconcile

    wanted = [deployments.deployment_of(name, folders, place) for name, (_, folders) in chosen.items()]
    changes = deployments.bring_up_to_date(place, wanted, dry_run)
    for change in changes:
        if dry_run or change.kind != "keep":
            typer.echo(str(change))
    if not dry_run:
        reconcile.watch_heartbeats()
        reconcile.limit_gpus([config.deployment.gpu_limit for config, _ in chosen.values()], gpu_slots)
    return wanted


def _show_table(deployed: Sequence[Deployment], chosen: Chosen) -> None:
    """A row per schedule: pipeline, when in words, next run."""
    from flows.deployments import schedules_in_words

    rows = [("pipeline", "schedule", "next run")]
    for deployment, (config, _) in zip(deployed, chosen.values(), strict=True):
        rows += [(deployment.name, *row) for row in schedules_in_words(deployment, config.deployment)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    typer.echo()
    for row in rows:
        typer.echo(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}".rstrip())
