"""pipelines.yaml -> Prefect deployments: when each pipeline runs by itself, where, and beside what.

A deployment is ours by its flow, the tag `ecgfm` and a tag that names its place: a data directory that `ecgfm serve`
serves, or a work pool. Others are never touched.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import httpx
from cronsim import CronSim
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.client.schemas.objects import (
    ConcurrencyLimitConfig,
    ConcurrencyLimitStrategy,
    StateType,
    VersionInfo,
    WorkPool,
)
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments.runner import DeploymentApplyError, RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.runner import Runner
from prefect.schedules import Cron, Interval, Schedule
from prefect.server.schemas import schedules as dates
from prefect.settings import PREFECT_API_URL
from prefect.types.entrypoint import EntrypointType
from pydantic import PrivateAttr

import flows
from ecgfm import __version__
from ecgfm.ecg import InputError
from ecgfm.pipeline import Selection
from ecgfm.pipelines_file import DeploymentConfig, ScheduleConfig, load_pipeline
from flows.pipeline import FLOW_NAME, run_pipeline

TAG = "ecgfm"
POLL_S = 5  # how often the server is asked for runs that are due
LOOK_S = 2.0  # and for their states, to say them
GONE_S = 150.0  # a server that is away for so long does not just restart; a runner waits for about 190
STOP_PATIENCE_S = 60.0  # a training saves a checkpoint when it is stopped

_VERSION = VersionInfo(type="prefect:simple", version=__version__)
_PAGE = 200  # as many as the API gives at once
_STRATEGIES = {"skip": ConcurrencyLimitStrategy.CANCEL_NEW, "wait": ConcurrencyLimitStrategy.ENQUEUE}


@dataclass(frozen=True)
class Place:
    """Where deployed pipelines run: served by this process, or by the workers of a work pool.

    data_dir, pipelines_file: as the machine that runs them sees them
    job_variables: of a pool's jobs, beside its own
    """

    data_dir: Path
    pipelines_file: Path
    pool: str | None = None
    job_variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        """Tells the deployments of one place from those of others."""
        return f"pool:{self.pool}" if self.pool else f"data:{self.data_dir}"

    def name_of(self, pipeline: str) -> str:
        """The deployment's name: a pool is named, because another one may run the same pipeline."""
        return f"{pipeline} on {self.pool}" if self.pool else pipeline


class Deployment(RunnerDeployment):
    """A pipeline as Prefect deploys it. It is sent to the server once.

    A runner would send it again, whereupon the server forgets and makes anew the runs that are due: one that is due
    in those seconds would be lost.
    """

    _id: UUID | None = PrivateAttr(default=None)

    async def aapply(
        self,
        schedules: list[dict[str, Any]] | None = None,
        work_pool_name: str | None = None,
        image: str | None = None,
        version_info: VersionInfo | None = None,
    ) -> UUID:
        """The deployment's id on the server. Sends it, but for one that is known to be there."""
        if self._id is None:
            self._id = await super().aapply(schedules, work_pool_name, image, version_info)
        return self._id


@dataclass(frozen=True)
class Change:
    """What is done to one deployment: `create`, `update` (with what differs), `remove` or `keep`."""

    kind: str
    name: str
    what: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind:6}  {self.name}" + (f": {', '.join(self.what)}" if self.what else "")


def deployment_of(pipeline: str, raw: Mapping[str, Path], place: Place) -> Deployment:
    """The deployment of one pipeline at a place.

    Raises:
        InputError: the pipeline, or one of its schedules, is not as it must be.
    """
    config = load_pipeline(place.pipelines_file, pipeline)
    for schedule in config.deployment.schedules:
        load_pipeline(place.pipelines_file, pipeline, schedule.set)  # a mistake is told here, not at night
        Selection(only=schedule.only)
    parameters = {
        "pipeline": pipeline,
        "data_dir": str(place.data_dir),
        "pipelines_file": str(place.pipelines_file),
        "raw": {source: str(folder) for source, folder in raw.items()},
    }
    deployment = Deployment.from_flow(
        run_pipeline,
        place.name_of(pipeline),
        description=config.description or f"The pipeline {pipeline} of {place.pipelines_file.name}.",
        tags=[TAG, place.tag, *config.deployment.tags],
        parameters=parameters,
        schedules=[_schedule(schedule) for schedule in config.deployment.schedules],
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=_STRATEGIES[config.deployment.overlap]),
        version=__version__,
        work_pool_name=place.pool,
        job_variables=dict(place.job_variables),
        entrypoint_type=EntrypointType.MODULE_PATH,  # found wherever ecgfm is installed
    )
    assert isinstance(deployment, Deployment)
    return deployment


def bring_up_to_date(place: Place, wanted: Sequence[Deployment], dry_run: bool = False) -> list[Change]:
    """Make the deployments of a place exactly those wanted; those that are as they should be are left alone.

    A deployment or a schedule that somebody paused in the UI stays paused.

    Raises:
        InputError: a name is taken by a deployment that is not of this place.
    """
    with get_client(sync_client=True) as client:
        there = _ours_or_in_the_way(client)
        for deployment in wanted:
            found = there.get(deployment.name)
            if found and not _is_of(found, place):
                whose = next((tag for tag in found.tags if tag.startswith(("data:", "pool:"))), "somebody else's")
                raise InputError(
                    f"this server has a deployment {FLOW_NAME}/{deployment.name} already, and it is {whose}, not "
                    f"{place.tag}; serve one of the two on a server of its own, deploy it to a work pool (ecgfm deploy "
                    f"--pool POOL), or remove it with: prefect deployment delete '{FLOW_NAME}/{deployment.name}'"
                )
        names = {deployment.name for deployment in wanted}
        changes = []
        for name, found in there.items():
            if name not in names and _is_of(found, place):
                changes.append(Change("remove", name))
                if not dry_run:
                    client.delete_deployment(found.id)
        return changes + [_send(client, one, there.get(one.name), dry_run) for one in wanted]


def serve(deployments: Sequence[Deployment], say: Callable[[str], None], check_server: Callable[[], None]) -> None:
    """Run what is due of these deployments, each run in a process of its own, until SIGINT or SIGTERM.

    say: gets a line whenever a run starts or ends; check_server: raises InputError once the server has ended for good

    What runs then gets a while to save its work and ends as Cancelled. Runs that become due while nobody serves are
    Late, and dealt with as the pipeline's `missed` says when somebody serves again.

    Raises:
        InputError: the server has ended, or has not answered for `GONE_S`.
    """
    # looked for when they are due, not before: whether a run overlaps another is decided at its time
    runner = Runner("ecgfm serve", query_seconds=POLL_S, prefetch_seconds=0, pause_on_shutdown=False)
    names = {asyncio.run(runner.aadd_deployment(one)): one.name for one in deployments}

    async def work() -> None:
        stop = asyncio.Event()
        running = asyncio.create_task(runner.start())
        await asyncio.sleep(0)  # it takes SIGTERM for itself when it starts, and would wait for itself in the handler
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        stopping = asyncio.create_task(stop.wait())
        watching = asyncio.create_task(_watch(names, say, check_server))
        await asyncio.wait({running, stopping, watching}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if runner.started and not watching.done():
            await asyncio.wait({asyncio.create_task(runner.astop())}, timeout=STOP_PATIENCE_S)
        else:  # nobody to tell
            running.cancel()
        await asyncio.wait({running}, timeout=STOP_PATIENCE_S)
        if watching.done():
            watching.result()
        watching.cancel()
        if running.done() and not running.cancelled():
            running.result()

    asyncio.run(work())


async def _watch(names: Mapping[UUID, str], say: Callable[[str], None], check_server: Callable[[], None]) -> None:
    """Say the states of runs of these deployments (id -> name) from now on, as they change.

    Raises:
        InputError: the server has ended, or has not answered for a while; a runner would go on without asking it.
    """
    said: dict[UUID, str | None] = {}
    question = FlowRunFilter.model_validate(
        {
            "deployment_id": {"any_": list(names)},
            "state": {"type": {"not_any_": [StateType.SCHEDULED, StateType.PENDING]}},
            "start_time": {"after_": datetime.now(UTC)},
        }
    )
    address, answered = str(PREFECT_API_URL.value()), time.monotonic()
    while True:
        await asyncio.sleep(LOOK_S)
        check_server()
        try:
            async with httpx.AsyncClient(timeout=LOOK_S) as plain:  # Prefect's own waits for a minute
                (await plain.get(f"{address}/health")).raise_for_status()
            async with get_client() as client:
                runs = await client.read_flow_runs(
                    flow_run_filter=question, sort=FlowRunSort.START_TIME_DESC, limit=_PAGE
                )
        except httpx.HTTPError as error:
            if time.monotonic() > answered + GONE_S:
                raise InputError(f"the Prefect server at {address} has not answered for {GONE_S:g} s") from error
            continue
        answered = time.monotonic()
        for run in reversed(runs):
            if run.state and run.deployment_id and said.get(run.id) != run.state.name:
                when = f"{run.state.timestamp.astimezone():%H:%M:%S}"
                schedule = f" ({run.created_by.display_value})" if run.auto_scheduled and run.created_by else ""
                why = f": {run.state.message}" if run.state.message else ""
                say(f"{when}  {names[run.deployment_id]}{schedule}  {run.state.name}{why}")
        said = {run.id: run.state_name for run in runs}


def schedules_in_words(deployment: Deployment, config: DeploymentConfig) -> list[tuple[str, str]]:
    """A row per schedule: when it runs, in words, and its next time; of a deployment without one, that."""
    rows = []
    for schedule in config.schedules:
        (next_date,) = asyncio.run(_dates(schedule).get_dates(1)) or (None,)
        when = f"{next_date:%a %Y-%m-%d %H:%M:%S %Z}" if next_date else "never"
        rows.append((f"{schedule.name}: {in_words(schedule)}", when))
    return rows or [("when somebody starts it", "")]


def in_words(schedule: ScheduleConfig) -> str:
    """When a schedule runs: "at 02:00 every day (Europe/Berlin)", "every 90 minutes"."""
    if schedule.cron:
        words = str(CronSim(schedule.cron, datetime(2020, 1, 1)).explain())
        return f"{words[0].lower()}{words[1:]} ({schedule.timezone})"
    assert schedule.interval_s is not None
    for unit, seconds in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        number, rest = divmod(schedule.interval_s, seconds)
        if number and not rest:
            return f"every {unit}" if number == 1 else f"every {number:g} {unit}s"
    return f"every {schedule.interval_s:g} s"


def pool_variables(pool: str, image: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The job variables of deployments on a pool: an image, those given, and our settings in the environment of a run.

    Raises:
        InputError: no such pool; a variable that it does not have; an image where there is none, or none where one is
            needed.
    """
    with get_client(sync_client=True) as client:
        try:
            found: WorkPool = client.read_work_pool(pool)
        except ObjectNotFound as error:
            raise InputError(
                f"no work pool {pool!r} on this server; make it with: prefect work-pool create {pool} --type process "
                "(or docker, kubernetes)"
            ) from error
    known = found.base_job_template.get("variables", {}).get("properties", {})
    variables = {**given, **({"image": image} if image else {})}
    for name in variables:
        if name not in known:
            raise InputError(
                f"work pool {pool} is of type {found.type} and has no job variable {name!r}; it has "
                + (", ".join(sorted(known)) or "none")
            )
    if "image" in known and not variables.get("image"):
        raise InputError(f"work pool {pool} is of type {found.type}: name the image that has ecgfm with --image IMAGE")
    # a run's process imports Prefect before us, and would not see what we set for ourselves
    if "env" in known:
        variables["env"] = {**flows.SETTINGS, **(given.get("env") or {})}
    return variables


def _schedule(schedule: ScheduleConfig) -> Schedule:
    parameters: dict[str, Any] = {"overrides": list(schedule.set)} if schedule.set else {}
    if schedule.only:
        parameters["only"] = list(schedule.only)
    common: dict[str, Any] = {"timezone": schedule.timezone, "parameters": parameters, "slug": schedule.name}
    if schedule.cron:
        return Cron(schedule.cron, **common)
    return Interval(timedelta(seconds=schedule.interval_s or 0), anchor_date=_midnight(schedule.timezone), **common)


def _dates(schedule: ScheduleConfig) -> dates.CronSchedule | dates.IntervalSchedule:
    """A schedule as Prefect's server works out its times."""
    if schedule.cron:
        return dates.CronSchedule(cron=schedule.cron, timezone=schedule.timezone)
    return dates.IntervalSchedule.model_validate(
        {
            "interval": timedelta(seconds=schedule.interval_s or 0),
            "anchor_date": _midnight(schedule.timezone),
            "timezone": schedule.timezone,
        }
    )


def _midnight(timezone: str) -> datetime:
    """What intervals count from, whenever they are deployed."""
    return datetime(2020, 1, 1, tzinfo=ZoneInfo(timezone))


def _ours_or_in_the_way(client: SyncPrefectClient) -> dict[str, DeploymentResponse]:
    """Every deployment of our flow, by name: ours, and those whose names are taken."""
    flow_filter = FlowFilter.model_validate({"name": {"any_": [FLOW_NAME]}})
    found: list[DeploymentResponse] = []
    while len(page := client.read_deployments(flow_filter=flow_filter, limit=_PAGE, offset=len(found))):
        found += page
    return {deployment.name: deployment for deployment in found}


def _is_of(deployment: DeploymentResponse, place: Place) -> bool:
    return {TAG, place.tag} <= set(deployment.tags)


def _send(client: SyncPrefectClient, deployment: Deployment, found: DeploymentResponse | None, dry_run: bool) -> Change:
    """Create or update one deployment on the server, where it is not as wanted."""
    what: tuple[str, ...] = ()
    if found:
        deployment.paused = found.paused
        active = {schedule.slug: schedule.active for schedule in found.schedules}
        for schedule in deployment.schedules or []:
            schedule.active = active.get(schedule.slug, True)
        wanted, there = _facts(deployment), _facts(found)
        what = tuple(name for name in wanted if wanted[name] != there[name])
        if not what:
            deployment._id = found.id
            return Change("keep", deployment.name)
    if not dry_run:
        try:
            deployment._id = asyncio.run(deployment.aapply(version_info=_VERSION))
        except DeploymentApplyError as error:
            raise InputError(f"{deployment.name}: {' '.join(str(error).split())}") from error
        slugs = {schedule.slug for schedule in deployment.schedules or []}
        for stale in found.schedules if found else []:  # an update adds and changes schedules, and removes none
            if found and stale.slug not in slugs:
                client.delete_deployment_schedule(found.id, stale.id)
    return Change("update" if found else "create", deployment.name, what)


def _facts(deployment: Deployment | DeploymentResponse) -> dict[str, Any]:
    """What decides how a deployment runs, by what a person calls it."""
    if isinstance(deployment, Deployment):
        limit = deployment.concurrency_limit
    else:
        shared = deployment.global_concurrency_limit
        limit = shared.limit if shared else None
    options = deployment.concurrency_options
    return {
        "schedules": {
            one.slug: (one.schedule and one.schedule.model_dump(), one.parameters) for one in deployment.schedules or []
        },
        "overlap": (limit, options and options.collision_strategy),
        "parameters": deployment.parameters,
        "tags": sorted(deployment.tags),
        "description": deployment.description,
        "job variables": deployment.job_variables,
        "entrypoint": deployment.entrypoint,
        "version": deployment.version,
    }
