"""The pipeline as a Prefect flow, and each of its stages as a flow that runs alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, cast

from prefect import Flow, flow, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from prefect.states import Cancelled, Completed
from pydantic import Field

from ecgfm.pipeline import PREPARE, STAGE_NAMES, Made, Selection, Walker, walk
from ecgfm.pipelines_file import DeploymentConfig, load_pipeline
from ecgfm.runs import recorded_run
from ecgfm.stages import Request, Store
from flows.cancellation import CancelledInUI, cancellable
from flows.engine import Work
from flows.prepare import prepare_source

FLOW_NAME = "ecgfm"
FLOW_RUN_ID = "flow_run"  # file of a run's record: which flow run it is
SKIPPED = "Skipped"  # state of a scheduled run that did nothing, and need not

StageName = Annotated[str, Field(json_schema_extra={"enum": list(STAGE_NAMES)})]  # a choice in the UI's form


def run_name() -> str:
    """The pipeline, and of a scheduled run its schedule: "demo (nightly)"."""
    run = _own_run()
    pipeline = run.parameters["pipeline"]
    by_schedule = run.auto_scheduled and run.created_by
    return f"{pipeline} ({by_schedule.display_value})" if by_schedule else str(pipeline)


@flow(name=FLOW_NAME, flow_run_name=run_name)
def run_pipeline(
    pipeline: str,
    data_dir: str,
    pipelines_file: str,
    raw: dict[str, str] = {},  # noqa: B006 - the default stands in the UI's form, and is not changed
    overrides: list[str] = [],  # noqa: B006
    only: list[StageName] = [],  # noqa: B006
    start: StageName | None = None,
    force: list[StageName] = [],  # noqa: B006
    verify: bool = False,
    hash_raw: bool = False,
) -> str:
    """Every stage of one pipeline: what is there is used, what is not is made. (The UI's form shows what follows.)

    Returns the directory that records the run. A scheduled run for which another one stands ends as Skipped.

    Args:
        pipeline: A name in the pipelines file.
        data_dir: Everything that is made lies below this folder of the machine that runs it.
        pipelines_file: The pipelines.yaml, as the machine that runs it sees it.
        raw: Source -> its raw folder. The synthetic source needs none.
        overrides: Values for this run alone, such as "pretrain.max_steps=200".
        only: Make just these stages. None named: all.
        start: Make this stage and those after it.
        force: Remake these stages though they are there.
        verify: Hash every output before it is used, not only its size.
        hash_raw: Know raw files by their content instead of size and modification time.
    """
    logging.getLogger("ecgfm").setLevel(logging.INFO)  # a worker shows warnings; the run's log has it all
    config = load_pipeline(Path(pipelines_file), pipeline, overrides)
    if why := _why_skip(config.deployment):
        return cast("str", Completed(name=SKIPPED, message=why))  # a state that a flow returns is the run's own
    work = Work(pipeline, config, Store(Path(data_dir), verify), Selection(tuple(only), start, tuple(force)))

    def execute(requests: Sequence[Request], group: str) -> Sequence[Made]:
        if requests[0].stage is PREPARE:
            return prepare_source(work, group, requests)
        return [work.run_task(request.name, [request])[0] for request in requests]

    walker = Walker(work.store, execute, work.selection)
    work.reasons = walker.reasons
    folders = {source: Path(path) for source, path in raw.items()}
    try:
        with cancellable(), recorded_run(work.store.data_dir, pipeline, config, walker, folders) as directory:
            (directory / FLOW_RUN_ID).write_text(str(_own_run().id), encoding="utf-8")
            walk(config, folders, walker, hash_raw)
    except CancelledInUI:
        return cast("str", Cancelled(message="cancelled in the UI"))
    return str(directory)


def stage_flow(stage: str) -> Flow[..., str]:
    """One stage of a pipeline as a flow of its own: it runs alone on what the earlier stages left."""

    @flow(name=f"{FLOW_NAME} {stage}", flow_run_name=f"{{pipeline}}: {stage}")
    def run_one(
        pipeline: str,
        data_dir: str,
        pipelines_file: str,
        raw: dict[str, str],
        overrides: list[str],
        force: list[str],
        verify: bool = False,
        hash_raw: bool = False,
    ) -> str:
        return run_pipeline.fn(
            pipeline, data_dir, pipelines_file, raw, overrides, [stage], None, force, verify, hash_raw
        )

    return run_one


run_stage = {stage: stage_flow(stage) for stage in STAGE_NAMES}


def why_skip(
    config: DeploymentConfig, due: datetime, now: datetime, completed: Sequence[tuple[str, datetime]]
) -> str | None:
    """Why a scheduled run need not do anything, in a user's words; None where it has to.

    due: when it was to start; now: when it does
    completed: runs of the same deployment with the same parameters that completed: name, start
    """
    if config.missed == "never":
        late = now - due
        if late <= timedelta(seconds=config.late_s):
            return None
        return f"due {_clock(due)}, {_whole(late)} before it could start; missed: never, late_s: {config.late_s:g}"
    covering = [(name, started) for name, started in completed if started >= due]
    if not covering:
        return None
    name, started = min(covering, key=lambda run: run[1])
    return f"due {_clock(due)}: {name}, which started {_clock(started)}, stands for it"


def _why_skip(config: DeploymentConfig) -> str | None:
    """Why this run need not do anything. One that a person started, or started again, always has to."""
    if not _own_run().auto_scheduled:
        return None
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(_own_run().id)  # with its start counted
        if run.deployment_id is None or run.expected_start_time is None or run.run_count > 1:
            return None
        question = FlowRunFilter.model_validate(
            {
                "deployment_id": {"any_": [run.deployment_id]},
                "state": {"type": {"any_": [StateType.COMPLETED]}},
                "start_time": {"after_": run.expected_start_time},
            }
        )
        completed = client.read_flow_runs(flow_run_filter=question, sort=FlowRunSort.START_TIME_ASC)
    others = [
        (other.name, other.start_time)
        for other in completed
        if other.start_time and other.state_name != SKIPPED and other.parameters == run.parameters
    ]
    return why_skip(config, run.expected_start_time, datetime.now(UTC), others)


def _own_run() -> FlowRun:
    """The flow run that this is."""
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    return context.flow_run


def _clock(when: datetime) -> str:
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _whole(span: timedelta) -> str:
    return str(timedelta(seconds=round(span.total_seconds())))
