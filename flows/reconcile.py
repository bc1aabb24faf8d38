"""When a worker dies: what Prefect is told to watch, and what is closed by hand.

A run sends a heartbeat. The automation set up here ends as Crashed what stops doing so; it sees neither task runs nor
subflows, nor a run that died while no server was up: those `reconcile` closes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.actions import ChangeFlowRunState
from prefect.events.filters import EventFilter
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.states import Crashed

from ecgfm.pipeline import STAGE_NAMES
from ecgfm.runs import Run, find_runs
from flows.engine import count_gpus, ensure_limit
from flows.pipeline import FLOW_NAME, FLOW_RUN_ID, SKIPPED

WATCH = "ecgfm: runs without a heartbeat are Crashed"
MISSED_HEARTBEATS = 3  # so many in a row, and the run is taken for dead
FLOW_NAMES = [FLOW_NAME, *(f"{FLOW_NAME} {stage}" for stage in STAGE_NAMES)]

_HEARTBEAT = "prefect.flow-run.heartbeat"
_ENDS = ("Completed", "Failed", "TimedOut", "Cancelled", "Crashed", SKIPPED)  # names of states a run of ours ends in
_GOING_ON = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
_PAGE = 200


@dataclass(frozen=True)
class Closed:
    """What reconcile closed, or would: `what` it is, its name, and why."""

    what: str
    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.what} {self.name}: {self.why}"


def patience() -> timedelta:
    """So long after its last heartbeat a run is taken for dead."""
    return timedelta(seconds=MISSED_HEARTBEATS * (get_current_settings().flows.heartbeat_frequency or 30))


def watch_heartbeats(within: timedelta | None = None) -> None:
    """Have the server end runs of ours that send no heartbeat any more: one automation, made or brought up to date."""
    wanted = AutomationCore(
        name=WATCH,
        description="Made by ecgfm serve and ecgfm deploy, for flows of ecgfm alone.",
        trigger=EventTrigger(
            after={_HEARTBEAT},
            expect={_HEARTBEAT, *(f"prefect.flow-run.{name}" for name in _ENDS)},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            # others' flows may send theirs less often
            match_related=ResourceSpecification({"prefect.resource.role": "flow", "prefect.resource.name": FLOW_NAMES}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=within or patience(),
        ),
        actions=[
            ChangeFlowRunState.model_validate(
                {"state": StateType.CRASHED, "message": "It sends no heartbeat any more: its process is gone."}
            )
        ],
    )
    with get_client(sync_client=True) as client:
        there = client.read_automations_by_name(WATCH)
        if not there:
            client.create_automation(wanted)
        elif (there[0].trigger, there[0].actions, there[0].description) != (
            wanted.trigger,
            wanted.actions,
            wanted.description,
        ):
            wanted.enabled = there[0].enabled  # as somebody left it in the UI
            client.update_automation(there[0].id, wanted)


def limit_gpus(names: Sequence[str], slots: int | None) -> None:
    """Make the concurrency limits for GPUs, a slot for each of this machine; one that is there is left alone.

    slots: as many instead, also where there is a limit already
    """
    for name in dict.fromkeys(names):
        ensure_limit(name, slots or max(1, count_gpus()))
        if slots:
            with get_client(sync_client=True) as client:
                client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(limit=slots))


def reconcile(data_dir: Path, dry_run: bool = False) -> Iterator[Closed]:
    """Close what dead processes left open on the server, and say each: runs, subflows, tasks, slots of deployments.

    A run goes as dead where it has sent no heartbeat for a while and its record in `data_dir` is not being written;
    a run of another data directory is left to its own.
    """
    records = {text: run for run in find_runs(data_dir) if (text := _flow_run_of(run))}
    with get_client(sync_client=True) as client:
        dead: set[UUID] = set()
        for flow_run in list(_flow_runs(client, names=FLOW_NAMES, states=[StateType.RUNNING, StateType.CANCELLING])):
            record = records.get(str(flow_run.id))
            if record is None or record.state == "running" or _was_heard(client, flow_run):
                continue
            dead.add(flow_run.id)
            yield Closed("flow run", flow_run.name, f"its process is gone (record {record.name}: {record.state})")
            if not dry_run:
                client.set_flow_run_state(flow_run.id, Crashed(message="Closed by ecgfm reconcile."), force=True)
        yield from _close_below(client, dead, dry_run)
        yield from _free_slots(client, dead, dry_run)


def _close_below(client: SyncPrefectClient, dead: set[UUID], dry_run: bool) -> Iterator[Closed]:
    """Task runs, and the subflows that they stand for, of flow runs that have ended."""
    by_id: dict[UUID, FlowRun] = {}

    def has_ended(flow_run: UUID | None) -> FlowRun | None:
        if flow_run is None:
            return None
        if flow_run not in by_id:
            by_id[flow_run] = client.read_flow_run(flow_run)
        found = by_id[flow_run]
        final = found.id in dead or (found.state is not None and found.state.is_final())
        return found if final else None

    for subflow in list(_flow_runs(client, names=["prepare"], states=_GOING_ON)):
        if subflow.parent_task_run_id is None:
            continue
        try:
            parent = has_ended(client.read_task_run(subflow.parent_task_run_id).flow_run_id)
        except ObjectNotFound:
            continue
        if parent:
            dead.add(subflow.id)
            yield Closed("subflow", subflow.name, f"its run {parent.name} is {_state(parent, dead)}")
            if not dry_run:
                client.set_flow_run_state(subflow.id, Crashed(message="Closed by ecgfm reconcile."), force=True)
    question = TaskRunFilter.model_validate({"state": {"type": {"any_": _GOING_ON}}})
    ours = FlowFilter.model_validate({"name": {"any_": [*FLOW_NAMES, "prepare"]}})
    offset = 0
    while page := client.read_task_runs(flow_filter=ours, task_run_filter=question, limit=_PAGE, offset=offset):
        closed = 0
        for task_run in page:
            if parent := has_ended(task_run.flow_run_id):
                yield Closed("task run", task_run.name, f"its run {parent.name} is {_state(parent, dead)}")
                if not dry_run:
                    client.set_task_run_state(task_run.id, Crashed(message="Closed by ecgfm reconcile."), force=True)
                    closed += 1
        offset += len(page) - closed  # what is closed is not in the next answer


def _free_slots(client: SyncPrefectClient, dead: set[UUID], dry_run: bool) -> Iterator[Closed]:
    """Slots of our deployments' limits that no run holds: only a deployment's own runs take them.

    Those of a limit such as `gpu` anybody may hold, and a lease ends each by itself.
    """
    ours = FlowFilter.model_validate({"name": {"any_": [FLOW_NAME]}})
    offset = 0
    while page := client.read_deployments(flow_filter=ours, limit=_PAGE, offset=offset):
        offset += len(page)
        for deployment in page:
            limit = deployment.global_concurrency_limit
            if limit is None or not limit.active_slots:
                continue
            holders = _flow_runs(client, states=_GOING_ON, deployment=deployment)
            if any(run.id not in dead for run in holders):
                continue
            if not dry_run:
                client.update_global_concurrency_limit(limit.name, GlobalConcurrencyLimitUpdate(active_slots=0))
            yield Closed("slot of deployment", deployment.name, "no run of it goes on")


def _flow_runs(
    client: SyncPrefectClient,
    states: Sequence[StateType],
    names: Sequence[str] | None = None,
    deployment: DeploymentResponse | None = None,
) -> Iterator[FlowRun]:
    """Runs in any of some states, of some flows or of one deployment."""
    question = FlowRunFilter.model_validate(
        {
            "state": {"type": {"any_": list(states)}},
            "deployment_id": {"any_": [deployment.id]} if deployment else None,
        }
    )
    flow_filter = FlowFilter.model_validate({"name": {"any_": list(names)}}) if names else None
    offset = 0
    while page := client.read_flow_runs(flow_filter=flow_filter, flow_run_filter=question, limit=_PAGE, offset=offset):
        offset += len(page)
        yield from page


def _was_heard(client: SyncPrefectClient, flow_run: FlowRun) -> bool:
    """Whether a run has sent a heartbeat, or started, a short while ago."""
    since = datetime.now(UTC) - patience()
    if flow_run.start_time and flow_run.start_time > since:
        return True
    question = EventFilter.model_validate(
        {
            "occurred": {"since": since},
            "event": {"name": [_HEARTBEAT]},
            "resource": {"id": [f"prefect.flow-run.{flow_run.id}"]},
        }
    )
    return bool(client.read_events(question, limit=1).events)


def _flow_run_of(run: Run) -> str | None:
    """The id of the flow run that a record is of; None of a run without Prefect."""
    try:
        return (run.directory / FLOW_RUN_ID).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def _state(flow_run: FlowRun, dead: set[UUID]) -> str:
    return "Crashed" if flow_run.id in dead else str(flow_run.state_name)
