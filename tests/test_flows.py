"""Runs under Prefect, seen through the API of a real local server, as the UI sees them."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from watched import Watched, watched_runs

from ecgfm.ecg import InputError
from flows import server
from flows.prepare import BATCH_RECORDS, MAX_TASKS, batches

STAGES = ("synthesize", "list", "prepare", "audit", "splits", "labels", "manifests")
WORDS = ["--set", "synthetic.n_patients=40", "--set", "manifests.rare_labels=drop", *(f"--only={s}" for s in STAGES)]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with watched_runs(tmp_path_factory.mktemp("watched")) as found:
        yield found


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
        assert states[f"{name} (cached)"] == "Cached"
    subflow = watched.newest_run("synthetic")
    (slices,) = watched.states(subflow["id"], 1).items()
    assert slices[0].startswith("synthetic: slices 1-2 of 2")
    assert slices[1] == "Cached"


def test_the_run_graph_has_the_edges_of_the_dag_and_the_counts_as_artifacts(watched: Watched) -> None:
    watched.run(*WORDS)
    run = watched.newest_run()
    watched.states(run["id"], 7)
    nodes = {node["id"]: node for _, node in watched.ask(f"/flow_runs/{run['id']}/graph-v2")["nodes"]}
    shown = {place: node["label"].removesuffix(" (cached)") for place, node in nodes.items()}
    edges = {shown[place]: {shown[parent["id"]] for parent in node["parents"]} for place, node in nodes.items()}
    # what follows from others is left out: evaluation reads something of nearly every stage
    assert edges == {
        "synthesize": set(),
        "list synthetic": {"synthesize"},
        "prepare / synthetic": {"list synthetic"},
        "audit": {"prepare / synthetic"},
        "splits": {"audit"},
        "labels": {"prepare / synthetic"},
        "manifests": {"splits", "labels"},
    }
    page = watched.page("demo-prepare-synthetic")["data"]
    counts = {what: int(count.replace(",", "")) for what, count in re.findall(r"^\| (.+) \| ([\d,]+) \|$", page, re.M)}
    assert counts["listed"] == counts["prepared"] + counts["rejected"]
    assert counts["rejected: truncated"] == 1


def test_a_page_says_why_a_stage_was_made_and_shows_its_picture(watched: Watched) -> None:
    watched.run(*WORDS)
    watched.run(*WORDS, "--set", "splits.seed=3")
    page = watched.page("demo-splits")
    assert "because: config splits.seed 10 -> 3." in page["data"]
    assert "![cohort](data:image/svg+xml;base64," in page["data"]
    assert page["description"].startswith("demo: splits: made in")
    assert "unchanged since 20" in watched.page("demo-labels")["data"]


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
