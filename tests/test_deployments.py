"""Deployments, schedules, missed runs and dead workers, on a real Prefect server with short intervals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import yaml
from conftest import write_wfdb16
from prefect import flow, get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate, WorkPoolCreate
from prefect.client.schemas.filters import LogFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Running
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker
from typer.testing import CliRunner, Result

from ecgfm.ecg import InputError
from ecgfm.pipelines_file import DeploymentConfig, ScheduleConfig
from ecgfm.runs import FACTS
from flows import SETTINGS, deployments, reconcile, server
from flows.cli import app
from flows.deployments import Place, bring_up_to_date, deployment_of, in_words, pool_variables
from flows.pipeline import FLOW_NAME, FLOW_RUN_ID, SKIPPED, run_pipeline, why_skip

UP_TO_MANIFESTS = ["list", "prepare", "audit", "splits", "labels", "manifests"]
CODES = {"sinus rhythm": ["426783006"], "atrial fibrillation": ["164889003"]}
DUE = datetime(2026, 11, 23, 2, 0, tzinfo=UTC)


def pipelines(raw: Path, overlap: str = "wait", **schedule: Any) -> dict[str, Any]:
    """A pipelines file: a scheduled pipeline on WFDB files, one started by hand, one whose raw folder is not known."""
    return {
        "often": {
            "description": "a few records up to the manifests",
            "sources": ["physionet2021"],
            "raw": {"physionet2021": str(raw)},
            "prepare": {"workers": 1},
            "splits": {"strategy": "random"},
            "labels": {"scheme": "codes", "codes": CODES},
            "manifests": {"rare_labels": "drop"},
            "deployment": {
                "overlap": overlap,
                "tags": ["short"],
                "schedules": [{"name": "nightly", "only": UP_TO_MANIFESTS, **schedule}],
            },
        },
        "by-hand": {"sources": ["synthetic"]},
        "elsewhere": {"sources": ["ptb_xl"]},
    }


def add_folder(raw: Path, name: str, n_records: int) -> None:
    """A folder of the Challenge's layout, there at once: noise, half of it called atrial fibrillation."""
    (raw / "training" / "georgia").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(name))
    for number in range(n_records):
        digital = rng.integers(-900, 900, (12, 5000)).astype(np.int16)
        code = list(CODES.values())[number % 2][0]
        comments = ["Age: 50", "Sex: Male", f"Dx: {code}"]
        write_wfdb16(raw.parent / "uploaded", f"{name}{number:03d}", digital, comments=comments)
    (raw.parent / "uploaded").rename(raw / "training" / "georgia" / name)


# -- without a server ------------------------------------------------------------------------------------------------


def hours(number: float) -> datetime:
    return DUE + timedelta(hours=number)


def test_of_the_runs_missed_one_stands_for_all_that_were_due_when_it_started() -> None:
    config = DeploymentConfig(missed="once")
    assert why_skip(config, DUE, hours(9), []) is None  # nobody did it
    assert why_skip(config, DUE, hours(9), [("before", hours(-0.1))]) is None  # it started before this one was due
    why = why_skip(config, DUE, hours(9), [("later", hours(8.5)), ("first", hours(8)), ("before", hours(-24))])
    assert why == "due 2026-11-23 02:00:00 UTC: first, which started 2026-11-23 10:00:00 UTC, stands for it"


def test_of_any_number_of_missed_runs_exactly_one_works_whatever_their_order() -> None:
    config = DeploymentConfig(missed="once")
    for order in np.random.default_rng(0).permuted(np.tile(np.arange(6), (20, 1)), axis=1):
        completed: list[tuple[str, datetime]] = []
        for place, due in enumerate(order):
            now = hours(10 + place)  # all were due before the first could start
            if why_skip(config, hours(int(due)), now, completed) is None:
                completed.append((f"run {due}", now))
        assert len(completed) == 1


def test_where_missed_is_never_a_late_run_does_nothing_and_one_in_time_runs() -> None:
    config = DeploymentConfig(missed="never", late_s=600)
    assert why_skip(config, DUE, DUE + timedelta(seconds=600), [("other", hours(1))]) is None
    why = why_skip(config, DUE, DUE + timedelta(seconds=601), [])
    assert why == "due 2026-11-23 02:00:00 UTC, 0:10:01 before it could start; missed: never, late_s: 600"


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (ScheduleConfig(cron="0 2 * * *", timezone="Europe/Berlin"), "at 02:00 every day (Europe/Berlin)"),
        (ScheduleConfig(cron="30 1 * * 1-5"), "at 01:30 on Monday through Friday (UTC)"),
        (ScheduleConfig(interval_s=5), "every 5 s"),
        (ScheduleConfig(interval_s=90), "every 90 s"),
        (ScheduleConfig(interval_s=5400), "every 90 minutes"),
        (ScheduleConfig(interval_s=86_400), "every day"),
    ],
)
def test_a_schedule_is_told_in_words(schedule: ScheduleConfig, words: str) -> None:
    assert in_words(schedule) == words


def test_the_form_of_a_run_says_what_each_value_is_and_offers_the_stages() -> None:
    form = parameter_schema(run_pipeline)
    assert all(value["description"] for value in form.properties.values())
    assert form.required == ["pipeline", "data_dir", "pipelines_file"]
    assert "pretrain" in form.properties["only"]["items"]["enum"]


def written(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_deployment_is_what_the_pipelines_file_says(tmp_path: Path) -> None:
    content = pipelines(tmp_path / "raw", cron="0 2 * * *", timezone="Europe/Berlin", set=["splits.seed=3"])
    place = Place(tmp_path / "data", written(tmp_path / "p.yaml", content))
    made = deployment_of("often", {"physionet2021": tmp_path / "raw"}, place)
    assert (made.name, made.flow_name) == ("often", FLOW_NAME)
    assert made.description == "a few records up to the manifests"
    assert made.entrypoint == "flows.pipeline.run_pipeline"
    assert made.tags == ["ecgfm", f"data:{tmp_path / 'data'}", "short"]
    assert (made.concurrency_limit, str(made.concurrency_options.collision_strategy.value)) == (1, "ENQUEUE")
    assert made.parameters == {
        "pipeline": "often",
        "data_dir": str(tmp_path / "data"),
        "pipelines_file": str(tmp_path / "p.yaml"),
        "raw": {"physionet2021": str(tmp_path / "raw")},
    }
    (schedule,) = made.schedules
    assert schedule.slug == "nightly"
    assert (schedule.schedule.cron, schedule.schedule.timezone) == ("0 2 * * *", "Europe/Berlin")
    assert schedule.parameters == {"overrides": ["splits.seed=3"], "only": UP_TO_MANIFESTS}


@pytest.mark.parametrize(
    ("schedule", "message"),
    [({"set": ["splits.sed=3"]}, "did you mean 'seed'"), ({"only": ["lists"]}, "--only lists: no such stage")],
)
def test_a_mistake_in_a_schedule_is_told_when_it_is_deployed(
    tmp_path: Path, schedule: dict[str, Any], message: str
) -> None:
    content = pipelines(tmp_path, interval_s=60, **schedule)
    place = Place(tmp_path, written(tmp_path / "p.yaml", content))
    with pytest.raises(InputError, match=message):
        deployment_of("often", {}, place)


# -- with a server ---------------------------------------------------------------------------------------------------


@dataclass
class Team:
    """A Prefect server, and a folder for everything."""

    api: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
        return {**kept, "PREFECT_API_URL": self.api, "PREFECT_HOME": str(self.folder / "home")}

    def ecgfm(self, *words: str) -> Result:
        """A command of the command line, in this process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREFECT_API_URL", self.api)
            patch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
            return CliRunner().invoke(app, list(words))


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    folder = tmp_path_factory.mktemp("team")
    os.environ["PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS"] = "2"  # for a slot of a deployment: 30
    try:
        with server.local_server(folder, server.free_port()) as local:
            api = f"{local.address}/api"
            with temporary_settings({PREFECT_API_URL: api, PREFECT_HOME: folder / "home"}):
                yield Team(api, folder)
    finally:
        del os.environ["PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS"]


@pytest.fixture
def client(team: Team) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client
        for deployment in client.read_deployments():
            client.delete_deployment(deployment.id)


def wait_for(what: Callable[[], Any], seconds: float, why: Callable[[], object] = lambda: "") -> Any:
    """What a function gives, once it gives anything."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain: {why()}"
        time.sleep(0.3)
    return found


def names(client: SyncPrefectClient) -> dict[str, UUID]:
    return {deployment.name: deployment.id for deployment in client.read_deployments()}


def runs_of(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    """The runs of a deployment in the order in which they were due."""
    runs = [run for run in client.read_flow_runs(limit=200) if run.deployment_id == deployment]
    return sorted(runs, key=lambda run: run.expected_start_time or datetime.max.replace(tzinfo=UTC))


@flow(name="nightly backup")
def foreign() -> None:
    """A flow of somebody else."""


def test_deployments_become_exactly_those_of_the_file_and_others_are_left_alone(
    team: Team, client: SyncPrefectClient, tmp_path: Path
) -> None:
    content = pipelines(tmp_path, cron="0 2 * * *")
    place = Place(tmp_path / "data", written(tmp_path / "p.yaml", content))
    elsewhere = Place(tmp_path / "other data", place.pipelines_file)

    def wanted(*pipelines: str, at: Place = place) -> list[deployments.Deployment]:
        return [deployment_of(pipeline, {}, at) for pipeline in pipelines]

    def kinds(changes: list[deployments.Change]) -> dict[str, str]:
        return {change.name: change.kind for change in changes}

    others = {"tagged alike": foreign.to_deployment("tagged alike", tags=["ecgfm", place.tag])}
    others["ours by hand"] = run_pipeline.to_deployment("ours by hand", tags=["ecgfm"])
    kept = {name: deployment.apply() for name, deployment in others.items()}
    bring_up_to_date(elsewhere, wanted("elsewhere", at=elsewhere))
    kept["elsewhere"] = names(client)["elsewhere"]

    assert kinds(bring_up_to_date(place, wanted("often", "by-hand"), dry_run=True)) == {
        "often": "create",
        "by-hand": "create",
    }
    assert names(client) == kept
    bring_up_to_date(place, wanted("often", "by-hand"))
    first = names(client)
    assert first.keys() == kept.keys() | {"often", "by-hand"}

    # again: nothing is touched, the runs that are scheduled least of all
    scheduled = wait_for(lambda: [run.id for run in runs_of(client, first["often"])], 60)
    assert kinds(bring_up_to_date(place, wanted("often", "by-hand"))) == {"often": "keep", "by-hand": "keep"}
    assert names(client) == first
    assert set(scheduled) <= {run.id for run in runs_of(client, first["often"])}

    # another time, one schedule less, one deployment less; what somebody paused stays paused
    content["often"]["deployment"]["schedules"] = [
        {"name": "nightly", "cron": "0 3 * * *"},
        {"name": "weekly", "cron": "0 4 * * 0"},
    ]
    written(place.pipelines_file, content)
    changes = bring_up_to_date(place, wanted("often"))
    assert [str(change) for change in changes] == ["remove  by-hand", "update  often: schedules"]
    content["often"]["deployment"]["schedules"].pop(0)
    written(place.pipelines_file, content)
    client.pause_deployment(first["often"])
    bring_up_to_date(place, wanted("often"))
    found = client.read_deployment(first["often"])
    assert [schedule.slug for schedule in found.schedules] == ["weekly"]
    assert found.paused
    assert names(client) == kept | {"often": first["often"]}

    # a name that is taken is not taken away
    with pytest.raises(
        InputError, match=r"a deployment ecgfm/often already, and it is data:.*/data, not data:.*/other"
    ):
        bring_up_to_date(elsewhere, wanted("often", at=elsewhere))
    bring_up_to_date(place, [])
    bring_up_to_date(elsewhere, [])
    for name in ("tagged alike", "ours by hand"):
        client.delete_deployment(kept[name])
    assert not names(client)


def make_process_pool(client: SyncPrefectClient, name: str) -> None:
    """As `prefect work-pool create --type process` does."""
    template = ProcessWorker.get_default_base_job_template()
    client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))


def container_template() -> dict[str, Any]:
    """The least of a pool that runs containers."""
    properties = {"image": {"type": "string"}, "env": {"type": "object"}, "namespace": {"type": "string"}}
    configuration = {name: f"{{{{ {name} }}}}" for name in properties}
    return {"job_configuration": configuration, "variables": {"type": "object", "properties": properties}}


def test_a_pool_has_deployments_of_its_own_and_only_those_are_stale(
    team: Team, client: SyncPrefectClient, tmp_path: Path
) -> None:
    file = written(tmp_path / "p.yaml", pipelines(tmp_path, cron="0 2 * * *"))
    make_process_pool(client, "lab")
    client.create_work_pool(WorkPoolCreate(name="cluster", type="kubernetes", base_job_template=container_template()))
    for pool, image in (("lab", None), ("cluster", "registry.example.org/ecgfm:0.1")):
        variables = pool_variables(pool, image, {"env": {"MINE": "1"}})
        place = Place(Path("/data/ecgfm"), file, pool, variables)
        bring_up_to_date(place, [deployment_of(name, {}, place) for name in ("often", "by-hand")])
    assert set(names(client)) == {"often on lab", "by-hand on lab", "often on cluster", "by-hand on cluster"}
    found = client.read_deployment(names(client)["often on cluster"])
    assert found.work_pool_name == "cluster"
    assert found.job_variables["image"] == "registry.example.org/ecgfm:0.1"
    assert found.job_variables["env"] == {**SETTINGS, "MINE": "1"}  # a worker's run must send heartbeats too
    assert found.entrypoint == "flows.pipeline.run_pipeline"
    assert found.pull_steps == []
    again = [deployment_of("often", {}, place)]
    assert [str(change) for change in bring_up_to_date(place, again)] == [
        "remove  by-hand on cluster",
        "keep    often on cluster",
    ]
    assert set(names(client)) == {"often on lab", "by-hand on lab", "often on cluster"}
    bring_up_to_date(place, [])

    with pytest.raises(InputError, match=r"no work pool 'farm' on this server; make it with: prefect work-pool create"):
        pool_variables("farm", None, {})
    with pytest.raises(InputError, match="type kubernetes: name the image that has ecgfm with --image"):
        pool_variables("cluster", None, {})
    with pytest.raises(InputError, match=r"type process and has no job variable 'image'; it has .*working_dir"):
        pool_variables("lab", "ecgfm:0.1", {})


def test_a_worker_with_ecgfm_runs_what_is_deployed_to_its_pool(
    team: Team, client: SyncPrefectClient, tmp_path: Path
) -> None:
    add_folder(tmp_path / "raw", "a", 4)
    file = written(tmp_path / "p.yaml", pipelines(tmp_path / "raw", cron="0 2 * * *"))
    make_process_pool(client, "bench")
    words = ["deploy", "--pool", "bench", "often", "--pipelines", str(file), "--data-dir", str(tmp_path / "data")]
    shown = team.ecgfm(*words, "--dry-run")
    assert (shown.exit_code, shown.stdout) == (0, "create  often on bench\n"), shown.output
    assert "often on bench" not in names(client)
    done = team.ecgfm(*words, "--gpu-slots", "3")
    assert done.exit_code == 0, done.output
    assert "often on bench  nightly: at 02:00 every day (UTC)  " in done.stdout
    assert client.read_global_concurrency_limit_by_name("gpu").limit == 3
    run = client.create_flow_run_from_deployment(names(client)["often on bench"], parameters={"only": ["list"]})
    worker = subprocess.run(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", "bench", "--type", "process", "--run-once"],
        env=team.environment,
        cwd=tmp_path,  # where ecgfm is found because it is installed
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    ended = client.read_flow_run(run.id)
    assert ended.state_name == "Completed", worker.stdout + worker.stderr
    assert ended.name == "often"
    (record,) = (tmp_path / "data" / "runs" / "often").glob("[0-9]*")
    assert (record / FLOW_RUN_ID).read_text() == str(run.id)
    question = LogFilter.model_validate({"flow_run_id": {"any_": [run.id]}})
    said = [log.message for log in client.read_logs(question) if log.name == "ecgfm.pipeline"]
    assert any(line.startswith("list physionet2021: made in") for line in said)  # what the library logs
    assert "list physionet2021: made in" in (record / "log.txt").read_text()


@contextmanager
def serving(
    environment: Mapping[str, str], file: Path, data_dir: Path, log: Path, *words: str
) -> Iterator[subprocess.Popen[bytes]]:
    """`ecgfm serve` while the context lasts; it ends by SIGTERM, and leaves no process behind."""
    command = [sys.executable, "-m", "flows.cli", "serve", "--pipelines", str(file), "--data-dir", str(data_dir)]
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [*command, *words], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_for(lambda: "Ctrl-C ends it all" in log.read_text() or process.poll(), 60)
        yield process
        if process.poll() is None:
            process.terminate()
            assert process.wait(60) == 0, log.read_text()
        assert not of_group(process.pid)
    finally:
        for left in of_group(process.pid):
            os.kill(left, signal.SIGKILL)


def of_group(group: int) -> list[int]:
    """Processes of a session."""
    found = subprocess.run(["ps", "-o", "pid=", "--sid", str(group)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def working_runs(data_dir: Path) -> list[tuple[str, dict[str, str]]]:
    """The completed runs that made anything, oldest first: id of the flow run; stage -> made or cached."""
    found = []
    for record in sorted((data_dir / "runs" / "often").glob("[0-9]*")):
        facts = json.loads((record / FACTS).read_bytes())
        statuses = {stage["name"]: stage["status"] for stage in facts["stages"]}
        if facts["state"] == "completed" and "made" in statuses.values():
            found.append(((record / FLOW_RUN_ID).read_text(), statuses))
    return found


def test_a_schedule_runs_a_new_folder_costs_its_own_slice_and_missed_runs_are_made_up_once(
    team: Team, client: SyncPrefectClient, tmp_path: Path
) -> None:
    raw, data_dir, log = tmp_path / "raw", tmp_path / "data", tmp_path / "serve.log"
    add_folder(raw, "a", 60)
    file = written(tmp_path / "p.yaml", pipelines(raw, "skip", interval_s=5))
    with serving(team.environment, file, data_dir, log) as process:
        assert "often     nightly: every 5 s" in log.read_text()
        assert "not served: elsewhere (needs --raw ptb_xl=PATH)" in log.read_text()
        ((flow_run, first),) = wait_for(lambda: working_runs(data_dir), 120, log.read_text)
        assert len(first) == len(UP_TO_MANIFESTS)
        assert set(first.values()) == {"made"}
        ran = wait_for(lambda: (run := client.read_flow_run(UUID(flow_run))).state.is_final() and run, 60)
        assert (ran.name, ran.state_name) == ("often (nightly)", "Completed")
        assert {"ecgfm", "short"} <= set(ran.tags)

        add_folder(raw, "b", 20)
        _, (_, second) = wait_for(lambda: (runs := working_runs(data_dir))[1:] and runs, 120, log.read_text)
        assert second == {
            "list physionet2021": "made",
            "prepare physionet2021 training/georgia/a": "cached",
            "prepare physionet2021 training/georgia/b": "made",
            "audit": "made",
            "splits": "made",
            "labels": "made",
            "manifests": "made",
        }

        wait_for(lambda: of_group(process.pid) == [process.pid], 60)  # between two runs
        for one in of_group(process.pid):  # a power cut
            os.kill(one, signal.SIGKILL)
        process.wait()
    assert "often (nightly)  Completed" in log.read_text()

    def due() -> list[UUID]:
        """Runs that are due, and nobody is there to start them."""
        runs = [run for run in runs_of(client, names(client)["often"]) if not run.state.is_final()]
        late = [run.id for run in runs if run.expected_start_time < datetime.now(UTC)]
        return late if len(late) >= 3 else []

    late = wait_for(due, 90)
    written(file, pipelines(raw, interval_s=3600))  # so that no further run is due; those that are late stay
    with serving(team.environment, file, data_dir, log):

        def missed() -> list[FlowRun]:
            return [client.read_flow_run(run) for run in late]

        wait_for(lambda: all(run.state.is_final() for run in missed()), 180, log.read_text)
        skipped = [run for run in missed() if run.state_name == SKIPPED]
        assert [run.state_name for run in missed() if run.state_name != SKIPPED] == ["Completed"]
        assert len(skipped) == len(late) - 1
        for run in skipped:
            assert "often (nightly), which started" in run.state.message
            assert run.state.message.endswith("stands for it")


def test_without_a_server_serve_starts_its_own_and_ctrl_c_ends_both_and_what_runs(tmp_path: Path) -> None:
    file = written(tmp_path / "p.yaml", {"by-hand": {"sources": ["synthetic"]}})
    data_dir, log, port = tmp_path / "data", tmp_path / "serve.log", server.free_port()
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    alone["HOME"] = str(tmp_path)  # without a profile that names a server
    api = f"http://127.0.0.1:{port}/api"
    with serving(alone, file, data_dir, log, "--port", str(port)) as process:
        assert f"Prefect UI: http://127.0.0.1:{port} (Ctrl-C ends it all)" in log.read_text()
        with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
            parameters = {"only": ["synthesize"], "overrides": ["synthetic.n_patients=20000"]}
            run = client.create_flow_run_from_deployment(names(client)["by-hand"], parameters=parameters)
            wait_for(lambda: client.read_flow_run(run.id).state_name == "Running", 120, log.read_text)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 0, log.read_text()
        assert server.running_ui(data_dir) is None
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_killed_run_is_crashed_and_reconcile_closes_what_it_left_open(
    team: Team, client: SyncPrefectClient, tmp_path: Path
) -> None:
    file = written(tmp_path / "p.yaml", {"by-hand": {"sources": ["synthetic"]}})
    data_dir, log = tmp_path / "data", tmp_path / "serve.log"

    def open_tasks() -> list[str]:
        return [task.name for task in client.read_task_runs() if task.flow_run_id == run.id and task.state.is_running()]

    with serving(team.environment, file, data_dir, log) as process:
        run = client.create_flow_run_from_deployment(
            names(client)["by-hand"],
            parameters={"only": ["synthesize"], "overrides": ["synthetic.n_patients=20000"]},
        )
        wait_for(lambda: list(data_dir.glob("stages/synthesize/*.partial")), 120, log.read_text)
        wait_for(open_tasks, 120, log.read_text)  # what a process says of its tasks, it sends from time to time
        (flow_process,) = set(of_group(process.pid)) - {process.pid} - workers_below(process.pid)
        os.kill(flow_process, signal.SIGKILL)
        wait_for(lambda: client.read_flow_run(run.id).state_name == "Crashed", 180, log.read_text)

    would = [str(one) for one in reconcile.reconcile(data_dir, dry_run=True)]
    assert would == ["task run synthesize: its run by-hand is Crashed"]
    assert open_tasks() == ["synthesize"]
    done = team.ecgfm("reconcile", "--data-dir", str(data_dir), "--api", team.api)
    assert done.stdout == "closed task run synthesize: its run by-hand is Crashed\n", done.output
    assert open_tasks() == []
    assert list(reconcile.reconcile(data_dir)) == []


def workers_below(serve: int) -> set[int]:
    """Processes that a flow process started for its own work."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(serve)], capture_output=True, text=True, check=False)
    direct = {int(pid) for pid in children.stdout.split()}
    return set(of_group(serve)) - direct - {serve}


def started(client: SyncPrefectClient, of_flow: Any) -> FlowRun:
    """A run that says it is Running, and is nobody's."""
    parameters = {"pipeline": "often", "data_dir": "", "pipelines_file": ""} if of_flow is run_pipeline else {}
    run = client.create_flow_run(of_flow, parameters=parameters, name="often")
    client.set_flow_run_state(run.id, Running(), force=True)
    return run


def test_a_run_without_heartbeat_is_closed_only_where_its_record_says_that_its_process_is_gone(
    team: Team, client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, not_ours, of_others = started(client, run_pipeline), started(client, run_pipeline), started(client, foreign)
    record = tmp_path / "runs" / "often" / "2026-11-23T02-00-00Z"
    record.mkdir(parents=True)
    facts = {"pipeline": "often", "state": "running", "started_at": "2026-11-23T02:00:00Z", "stages": []}
    (record / FACTS).write_text(json.dumps(facts))
    (record / FLOW_RUN_ID).write_text(str(dead.id))
    assert list(reconcile.reconcile(tmp_path)) == []  # it has just started: its first heartbeat may be on its way
    monkeypatch.setattr(reconcile, "MISSED_HEARTBEATS", 0)
    assert [str(one) for one in reconcile.reconcile(tmp_path)] == [
        "flow run often: its process is gone (record often/2026-11-23T02-00-00Z: killed)"
    ]
    assert client.read_flow_run(dead.id).state_type == StateType.CRASHED
    for run in (not_ours, of_others):
        assert client.read_flow_run(run.id).state_type == StateType.RUNNING
        client.delete_flow_run(run.id)


def test_a_slot_that_no_run_holds_is_given_back(team: Team, client: SyncPrefectClient, tmp_path: Path) -> None:
    place = Place(tmp_path, written(tmp_path / "p.yaml", {"by-hand": {"sources": ["synthetic"]}}))
    bring_up_to_date(place, [deployment_of("by-hand", {}, place)])
    limit = client.read_deployment(names(client)["by-hand"]).global_concurrency_limit
    assert limit.active_slots == 0
    client.update_global_concurrency_limit(limit.name, GlobalConcurrencyLimitUpdate(active_slots=1))
    assert [str(one) for one in reconcile.reconcile(tmp_path)] == ["slot of deployment by-hand: no run of it goes on"]
    assert client.read_global_concurrency_limit_by_name(limit.name).active_slots == 0
    bring_up_to_date(place, [])


def test_the_limit_for_gpus_is_made_once_and_changed_only_where_asked(team: Team, client: SyncPrefectClient) -> None:
    reconcile.limit_gpus(["gpu of a test"], None)
    made = client.read_global_concurrency_limit_by_name("gpu of a test")
    assert made.limit == max(1, len(list(Path("/dev").glob("nvidia[0-9]*"))))
    reconcile.limit_gpus(["gpu of a test"], 5)
    reconcile.limit_gpus(["gpu of a test"], None)
    assert client.read_global_concurrency_limit_by_name("gpu of a test").limit == 5


def heartbeat(run: FlowRun, of_flow: Any) -> None:
    """What the engine sends for a run every so often."""
    emit_event(
        "prefect.flow-run.heartbeat",
        resource={"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.name": run.name},
        related=[
            {
                "prefect.resource.id": f"prefect.flow.{run.flow_id}",
                "prefect.resource.role": "flow",
                "prefect.resource.name": of_flow.name,
            }
        ],
    )


def test_a_run_whose_heartbeat_stops_becomes_crashed_and_others_flows_are_not_judged(
    team: Team, client: SyncPrefectClient
) -> None:
    reconcile.watch_heartbeats()
    reconcile.watch_heartbeats(timedelta(seconds=10))  # its least; 90 s for real
    (automation,) = client.read_automations_by_name(reconcile.WATCH)
    assert automation.trigger.within == timedelta(seconds=10)
    ours, others = started(client, run_pipeline), started(client, foreign)
    time.sleep(2)  # the server takes up a changed automation after a moment
    heartbeat(ours, run_pipeline)
    heartbeat(others, foreign)
    wait_for(lambda: client.read_flow_run(ours.id).state_name == "Crashed", 60)
    assert "no heartbeat" in client.read_flow_run(ours.id).state.message
    assert client.read_flow_run(others.id).state_name == "Running"
    reconcile.watch_heartbeats()
    (automation,) = client.read_automations_by_name(reconcile.WATCH)
    assert automation.trigger.within == timedelta(seconds=90)
    assert f"prefect.flow-run.{SKIPPED}" in automation.trigger.expect  # a run that ends so is not dead
