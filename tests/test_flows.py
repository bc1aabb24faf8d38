"""Runs under Prefect, seen through the API of a real local server, as the UI sees them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ecgfm.ecg import InputError
from flows import server
from flows.prepare import BATCH_RECORDS, MAX_TASKS, batches

STAGES = ("synthesize", "list", "prepare", "audit", "splits", "labels", "manifests")
WORDS = ["--set", "synthetic.n_patients=40", "--set", "manifests.rare_labels=drop", *(f"--only={s}" for s in STAGES)]


@dataclass
class Watched:
    """A data directory and the server that its runs go to."""

    data_dir: Path
    api: str

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`ecgfm run demo` in a process of its own."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
        command = [sys.executable, "-m", "flows.cli", "run", "demo", "--data-dir", str(self.data_dir), *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    def ask(self, path: str, question: dict[str, Any] | None = None) -> Any:
        """One call of the server's API."""
        body = None if question is None else json.dumps(question).encode()
        request = urllib.request.Request(self.api + path, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def newest_run(self, name: str = "demo") -> dict[str, Any]:
        """The flow run that started last."""
        question = {"sort": "START_TIME_DESC", "limit": 1, "flow_runs": {"name": {"any_": [name]}}}
        (found,) = self.ask("/flow_runs/filter", question)
        return dict(found)

    def states(self, flow_run: str, expected: int) -> dict[str, str]:
        """Task run -> state name. The server records them from events, a little after the fact."""
        for _ in range(100):
            runs = self.ask("/task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}})
            states = {run["name"]: run["state_name"] for run in runs}
            if len(states) >= expected and not {"Running", "Pending"} & set(states.values()):
                return states
            time.sleep(0.2)
        raise AssertionError(f"expected {expected} task runs, found {states}")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    data_dir = tmp_path_factory.mktemp("watched")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with server.local_server(data_dir, port) as local:
        yield Watched(data_dir, f"{local.address}/api")


def test_a_run_shows_each_stage_as_a_named_task_and_the_second_run_shows_them_cached(watched: Watched) -> None:
    first = watched.run(*WORDS)
    assert first.returncode == 0, first.stderr
    run = watched.newest_run()
    assert run["state_name"] == "Completed"
    assert run["parameters"]["overrides"] == ["synthetic.n_patients=40", "manifests.rare_labels=drop"]
    states = watched.states(run["id"], 7)
    for name in ("synthesize", "list synthetic", "audit", "splits", "labels", "manifests"):
        assert states[name] == "Completed"

    second = watched.run(*WORDS)
    assert second.returncode == 0, second.stderr
    again = watched.newest_run()
    assert again["id"] != run["id"]
    states = watched.states(again["id"], 7)
    for name in ("synthesize", "list synthetic", "audit", "splits", "labels", "manifests"):
        assert states[name] == "Cached"
    subflow = watched.newest_run("synthetic")
    (slices,) = watched.states(subflow["id"], 1).items()
    assert slices[0].startswith("synthetic: slices 1-2 of 2")
    assert slices[1] == "Cached"


def test_the_run_graph_has_the_edges_of_the_dag_and_the_counts_as_artifacts(watched: Watched) -> None:
    watched.run(*WORDS)
    run = watched.newest_run()
    watched.states(run["id"], 7)
    nodes = {node["id"]: node for _, node in watched.ask(f"/flow_runs/{run['id']}/graph-v2")["nodes"]}
    reads = {node["label"]: {nodes[parent["id"]]["label"] for parent in node["parents"]} for node in nodes.values()}
    assert reads == {
        "synthesize": set(),
        "list synthetic": {"synthesize"},
        "prepare / synthetic": {"synthesize", "list synthetic"},
        "audit": {"prepare / synthetic"},
        "splits": {"prepare / synthetic", "audit"},
        "labels": {"prepare / synthetic"},
        "manifests": {"prepare / synthetic", "splits", "labels"},
    }
    (artifact,) = watched.ask("/artifacts/latest/filter", {"artifacts": {"key": {"any_": ["demo-prepare-synthetic"]}}})
    counts = {row["what"]: row["count"] for row in json.loads(artifact["data"])}
    assert counts["listed"] == counts["prepared"] + counts["rejected"]
    assert counts["rejected: truncated"] == 1


def test_the_log_of_the_library_is_in_the_runs_log(watched: Watched) -> None:
    watched.run(*WORDS)
    question = {"logs": {"flow_run_id": {"any_": [watched.newest_run()["id"]]}}, "limit": 200}
    for _ in range(50):
        logs = watched.ask("/logs/filter", question)
        if any(log["name"] == "ecgfm.pipeline" and log["message"].startswith("manifests: cached") for log in logs):
            return
        time.sleep(0.2)
    raise AssertionError(f"no line of the library among {[log['message'] for log in logs]}")


def test_one_stage_runs_alone_as_a_flow_of_its_own(watched: Watched) -> None:
    watched.run(*WORDS)
    done = watched.run(*WORDS[:4], "--only", "splits", "--force", "splits")
    assert done.returncode == 0, done.stderr
    run = watched.newest_run("demo: splits")
    assert watched.states(run["id"], 1) == {"splits": "Completed"}


def test_a_mistake_inside_a_run_is_one_line_and_a_failed_run(watched: Watched) -> None:
    done = watched.run(*WORDS, "--set", "prepare.max_rejected_share=0")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "records were rejected" in done.stderr
    assert watched.newest_run()["state_name"] == "Failed"


def test_a_second_server_on_one_data_directory_is_refused(watched: Watched) -> None:
    with pytest.raises(InputError, match="already runs at"), server.local_server(watched.data_dir, 1):
        pass


def test_a_server_that_ends_by_itself_is_said(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(InputError, match=r"ended with exit code 3; see .*server\.log"):
        server.LocalServer("http://127.0.0.1:4200", ended, tmp_path / "server.log").wait()


def test_an_api_is_looked_for_in_the_environment_then_the_data_directory_then_the_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("PREFECT_PROFILE", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    assert server.configured_api(tmp_path) is None
    (tmp_path / "profiles.toml").write_text(
        'active = "team"\n[profiles.team]\nPREFECT_API_URL = "http://team:4200/api"\n[profiles.other]\n'
    )
    assert server.configured_api(tmp_path) == "http://team:4200/api"
    monkeypatch.setenv("PREFECT_PROFILE", "other")
    assert server.configured_api(tmp_path) is None
    monkeypatch.setenv("PREFECT_API_URL", "http://mine:4200/api")
    assert server.configured_api(tmp_path) == "http://mine:4200/api"


def test_a_server_that_is_gone_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect" / "server.json").write_text('{"api": "http://127.0.0.1:9/api", "pid": 1}')
    assert server.running_ui(tmp_path) is None


def test_slices_are_batched_in_order_so_that_a_level_of_the_graph_stays_readable() -> None:
    for sizes in ([1000] * 22, [800] * 1000, [5], [9000, 1, 1]):
        batched = list(batches(sizes, BATCH_RECORDS, MAX_TASKS))
        assert [place for batch in batched for place in batch] == list(range(len(sizes)))
        assert len(batched) <= MAX_TASKS
        assert all(sum(sizes[place] for place in batch) >= BATCH_RECORDS for batch in batched[:-1])
        assert len(list(batches(sizes, BATCH_RECORDS, 1))) == 1
