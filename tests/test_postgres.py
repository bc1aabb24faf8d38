"""A team's server: runs of 500 slice tasks recorded by Prefect on PostgreSQL, started here, and on SQLite."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import write_wfdb16

from ecgfm.stages import Store
from flows import server

N_SLICES = 500
ENDURANCE = bool(os.environ.get("ECGFM_ENDURANCE"))

# `ecgfm` with a task for every slice, where it batches thousands of records otherwise
ONE_SLICE_A_TASK = """
import flows.prepare
flows.prepare.LOCAL_BATCH_RECORDS = 1
flows.prepare.MAX_TASKS = 10_000
from flows.cli import app
app()
"""


class Postgres:
    """A PostgreSQL of our own: a cluster in a folder, a port, a password, the user `prefect` and its database."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = server.free_port()
        self.password = secrets.token_urlsafe(16)
        self.runner = unprivileged(folder)
        (folder / "password").write_text(self.password)
        self.command("initdb", "-D", "data", "-U", "prefect", "--auth=scram-sha-256", "--pwfile=password", "-E", "UTF8")
        self.start()
        try:
            with psql_environment(self):
                self.command("createdb", *self.address, "prefect")
        except BaseException:
            self.stop("immediate")
            raise

    @property
    def address(self) -> list[str]:
        return ["-h", "127.0.0.1", "-p", str(self.port), "-U", "prefect"]

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://prefect:{self.password}@127.0.0.1:{self.port}/prefect"

    def start(self) -> None:
        settings = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories={self.folder}"
        self.command("pg_ctl", "-D", "data", "-l", "log", "-w", "-o", settings, "start")

    def stop(self, mode: str) -> None:
        self.command("pg_ctl", "-D", "data", "-m", mode, "-w", "stop")

    def ask(self, question: str) -> str:
        """What one query of psql prints."""
        with psql_environment(self):
            return self.command("psql", *self.address, "-d", "prefect", "-Atc", question).strip()

    def command(self, program: str, *words: str) -> str:
        # in a file, not a pipe: the server that pg_ctl starts would hold the pipe open
        with tempfile.TemporaryFile("w+") as printed:
            command = [*self.runner, found_program(program), *words]
            code = subprocess.call(command, cwd=self.folder, stdout=printed, stderr=subprocess.STDOUT)
            printed.seek(0)
            text = printed.read()
        assert code == 0, f"{program} ended with exit code {code}: {text}"
        return text


def found_program(name: str) -> str:
    """The program's path; Debian keeps PostgreSQL's own out of PATH. Skips where there is none."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = shutil.which(name) or (str(debian[-1]) if debian else None)
    if not found:
        pytest.skip(f"no {name} here: install PostgreSQL (Debian: apt-get install postgresql)")
    return found


def unprivileged(folder: Path) -> list[str]:
    """What to put before a command of PostgreSQL, which refuses to run as root: another user, who gets the folder."""
    if os.geteuid() != 0:
        return []
    if not shutil.which("setpriv"):
        pytest.skip("PostgreSQL refuses to run as root, and there is no setpriv to run it as another user")
    shutil.chown(folder, "nobody", "nogroup")
    return ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]


@contextmanager
def psql_environment(database: Postgres) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPASSWORD", database.password)
        yield


@contextmanager
def postgres() -> Iterator[Postgres]:
    for program in ("initdb", "pg_ctl", "createdb", "psql"):
        found_program(program)
    # not pytest's tmp_path, which another user may not enter; and short, for the path of a socket
    folder = Path(tempfile.mkdtemp(prefix="ecgfm-pg-"))
    try:
        database = Postgres(folder)
        try:
            yield database
        finally:
            if (folder / "data" / "postmaster.pid").exists():
                database.stop("immediate")
    finally:
        shutil.rmtree(folder)


@dataclass
class Team:
    """A server for several users, and where it logs."""

    api: str
    home: Path
    database: Postgres | None

    @property
    def log(self) -> str:
        return (self.home / "prefect" / "server.log").read_text(errors="replace")

    def client(self, raw: Path, data_dir: Path, **settings: str) -> subprocess.Popen[str]:
        """`ecgfm run` of another user of this server, a task a slice."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
        # the level as the command line sets it, before it imports prefect
        environment |= {"PREFECT_API_URL": self.api, "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL", **settings}
        command = [sys.executable, "-c", ONE_SLICE_A_TASK, "run", "challenge-2021-small"]
        command += ["--raw", f"physionet2021={raw}", "--data-dir", str(data_dir), "--set", "prepare.workers=1"]
        command += ["--only", "list", "--only", "prepare"]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def ask(self, path: str, question: dict[str, Any]) -> Any:
        body = json.dumps(question).encode()
        request = urllib.request.Request(self.api + path, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def prepare_runs(self, data_dir: Path) -> list[dict[str, Any]]:
        """Every run of a subflow `prepare` below the runs on one data directory."""
        question = {"flows": {"name": {"any_": ["ecgfm"]}}, "limit": 200}
        parents = [
            run["id"]
            for run in self.ask("/flow_runs/filter", question)
            if run["parameters"].get("data_dir") == str(data_dir)
        ]
        assert parents
        question = {"flows": {"name": {"any_": ["prepare"]}}, "flow_runs": {"parent_flow_run_id": {"any_": parents}}}
        return list(self.ask("/flow_runs/filter", question))

    def task_states(self, data_dir: Path, expected: int, patience_s: float = 90) -> Counter[str]:
        """State -> how many task runs of the subflows `prepare`. The server records them from events, a while after."""
        subflows = [run["id"] for run in self.prepare_runs(data_dir)]
        deadline = time.monotonic() + patience_s
        while True:
            states: Counter[str] = Counter()
            for offset in range(0, 10 * N_SLICES, 200):
                of_run = {"flow_runs": {"id": {"any_": subflows}}, "limit": 200, "offset": offset}
                page = self.ask("/task_runs/filter", of_run)
                states.update(run["state_name"] for run in page)
                if len(page) < 200:
                    break
            if (states.total() >= expected and not states["Running"] + states["Pending"]) or (
                time.monotonic() > deadline
            ):
                return states
            time.sleep(0.5)


@contextmanager
def team_server(kind: str, home: Path) -> Iterator[Team]:
    """A Prefect server on SQLite or PostgreSQL."""
    with postgres() if kind == "postgresql" else nothing() as database, pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_HOME", raising=False)
        patch.delenv("PREFECT_API_DATABASE_CONNECTION_URL", raising=False)
        # what a client is told to try again, such as a locked database, is in the log too
        patch.setenv("PREFECT_API_LOG_RETRYABLE_ERRORS", "true")
        if database:
            patch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", database.url)
        with server.local_server(home, server.free_port()) as local:
            yield Team(f"{local.address}/api", home, database)


@contextmanager
def nothing() -> Iterator[None]:
    yield None


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def team(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with team_server(request.param, tmp_path_factory.mktemp(request.param)) as started:
        yield started


def write_slices(raw: Path, n_slices: int) -> Path:
    """A raw folder of slices of one record of 5 s each."""
    rng = np.random.default_rng(n_slices)
    for number in range(n_slices):
        digital = rng.integers(-900, 900, (12, 2500)).astype(np.int16)
        write_wfdb16(raw / "training" / f"set{number:03d}", f"A{number:04d}", digital)
    return raw


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slices(tmp_path_factory.mktemp("raw"), N_SLICES)


@pytest.fixture(scope="module")
def expected(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run without Prefect makes of the slices."""
    data_dir = tmp_path_factory.mktemp("plain")
    command = [sys.executable, "-m", "flows.cli", "run", "challenge-2021-small", "--raw", f"physionet2021={raw}"]
    command += ["--data-dir", str(data_dir), "--no-prefect", "--only", "list", "--only", "prepare"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return digests(data_dir)


def digests(data_dir: Path) -> dict[str, str]:
    """Stage and key -> digest of every finished stage, each file hashed."""
    found = {}
    for manifest in (data_dir / "stages").glob("*/*/stage.json"):
        facts = Store(data_dir, verify=True)._facts(manifest.parent)
        assert not isinstance(facts, str), facts
        found[f"{manifest.parent.parent.name}/{manifest.parent.name}"] = facts["digest"]
    return found


def refused(team: Team) -> int:
    """How often the server told a client to ask again, because SQLite's file was locked. Nothing else went wrong in it.

    It is locked for a request that has read and then writes, when another wrote in between; Prefect's client asks again
    after 2, 4, 8, 16 and 32 s. PostgreSQL refuses none.
    """
    errors = [line for line in team.log.splitlines() if "| ERROR" in line or "| CRITICAL" in line]
    assert not [line for line in errors if "Encountered retryable exception in request" not in line]
    if team.database:
        assert not errors
        assert "database is locked" not in team.log
    assert "queue is full" not in team.log
    return len(errors)


def finish(clients: Sequence[subprocess.Popen[str]]) -> None:
    for client in clients:
        _, said = client.communicate(timeout=280)
        assert client.returncode == 0, said
        assert "locked" not in said


def some_of(raw: Path, n_slices: int, place: Path) -> Path:
    """A raw folder of the first slices of another."""
    for folder in sorted((raw / "training").iterdir())[:n_slices]:
        shutil.copytree(folder, place / "training" / folder.name)
    return place


def finished_slices(data_dir: Path) -> int:
    return len(list((data_dir / "stages" / "prepare").glob("*/stage.json")))


def test_500_slice_tasks_are_all_recorded_and_the_outputs_are_those_of_a_run_without_prefect(
    team: Team, raw: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    started = time.monotonic()
    finish([team.client(raw, tmp_path)])
    ran_s = time.monotonic() - started
    states = team.task_states(tmp_path, N_SLICES)
    print(f"{N_SLICES} slice tasks: ran {ran_s:.0f} s, recorded after {time.monotonic() - started:.0f} s")
    assert states == {"Completed": N_SLICES}
    print(f"requests refused and asked again: {refused(team)}")
    assert len(expected) == N_SLICES + 1
    assert digests(tmp_path) == expected
    if team.database:  # and it is there that they are
        assert int(team.database.ask("select count(*) from task_run where state_type = 'COMPLETED'")) >= N_SLICES
        assert not (team.home / "prefect" / "prefect.db").exists()


def test_two_clients_at_once_lose_no_task_run(team: Team, raw: Path, expected: dict[str, str], tmp_path: Path) -> None:
    n_slices = N_SLICES if ENDURANCE else 80
    some = some_of(raw, n_slices, tmp_path / "raw")
    started = time.monotonic()
    finish([team.client(some, tmp_path / who) for who in ("one", "other")])
    ran_s = time.monotonic() - started
    for who in ("one", "other"):
        assert team.task_states(tmp_path / who, n_slices) == {"Completed": n_slices}
        slices = {name: digest for name, digest in digests(tmp_path / who).items() if name.startswith("prepare/")}
        assert len(slices) == n_slices
        assert slices.items() <= expected.items()
    print(f"2 x {n_slices} slice tasks at once: ran {ran_s:.0f} s, recorded after {time.monotonic() - started:.0f} s")
    print(f"requests refused and asked again, so far: {refused(team)}")


@pytest.mark.parametrize("team", ["postgresql"], indirect=True)
def test_a_database_that_restarts_delays_a_run_and_does_not_end_it(
    team: Team, raw: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    assert team.database
    settings = yaml.safe_load((Path(__file__).parents[1] / "docker" / "compose.yaml").read_text())["x-client"]
    retry = {name: value for name, value in settings.items() if name.startswith("PREFECT_CLIENT")}
    assert retry  # what makes it so
    some = some_of(raw, 80, tmp_path / "raw")
    client = team.client(some, tmp_path / "data", **retry)
    wait_for_slices(client, tmp_path / "data", 20)
    team.database.stop("immediate")
    time.sleep(4)
    team.database.start()
    _, said = client.communicate(timeout=250)
    assert client.returncode == 0, said
    assert said == ""
    assert {name for name in digests(tmp_path / "data") if name.startswith("prepare/")} <= expected.keys()
    assert finished_slices(tmp_path / "data") == 80


@pytest.mark.parametrize("team", ["postgresql"], indirect=True)
def test_a_database_that_goes_away_for_good_ends_a_run_whose_work_is_not_lost(
    team: Team, raw: Path, tmp_path: Path
) -> None:
    assert team.database
    some = some_of(raw, 80, tmp_path / "raw")
    client = team.client(some, tmp_path / "data")
    wait_for_slices(client, tmp_path / "data", 20)
    team.database.stop("immediate")
    try:
        client.communicate(timeout=250)
    finally:
        team.database.start()
    assert client.returncode == 1
    assert finished_slices(tmp_path / "data") >= 20
    made = digests(tmp_path / "data")
    finish([team.client(some, tmp_path / "data")])
    assert made.items() <= digests(tmp_path / "data").items()
    assert finished_slices(tmp_path / "data") == 80


def wait_for_slices(client: subprocess.Popen[str], data_dir: Path, enough: int) -> None:
    """Until so many slices are made, while more are being made."""
    while finished_slices(data_dir) < enough:
        assert client.poll() is None, client.communicate()[1]
        time.sleep(0.1)
    assert client.poll() is None
