"""Training under Prefect: tried again, cancelled, one at a time on a GPU; and the temporary server of a run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from watched import Watched, watched_runs

UP_TO_PRETRAIN = ("synthesize", "list", "prepare", "audit", "splits", "labels", "manifests", "pretrain")
WORDS = [
    *("--set", "synthetic.n_patients=40", "--set", "manifests.rare_labels=drop"),
    *("--set", "pretrain.max_steps=40", "--set", "pretrain.save_every=5", "--set", "pretrain.valid_every=40"),
    *("--set", "pretrain.batch_pairs=8", *(f"--only={stage}" for stage in UP_TO_PRETRAIN)),
]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with watched_runs(tmp_path_factory.mktemp("trained")) as found:
        yield found


def wait_for(look: Callable[[], Any], seconds: float = 120) -> Any:
    """What a look finds, once it finds anything."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.05)
    return found


def processes(*words: str, parent: int | None = None, api: str = "") -> list[int]:
    """Processes that live and have all of these words in their command line. api: of the server that they report to"""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
            environment = (folder / "environ").read_bytes().decode(errors="replace")
            state, parent_of_it = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        found_in = api in environment and all(word in command for word in words)
        if found_in and state != "Z" and parent in (None, int(parent_of_it)):
            found.append(int(folder.name))
    return found


def trainers(run: subprocess.Popen[str]) -> list[int]:
    return processes("own.obey", parent=run.pid)


def saved_after(watched: Watched, step: int) -> bool:
    return any(
        int(path.name.removeprefix("step_")) >= step
        for path in watched.data_dir.glob("stages/pretrain/*.partial/step_*")
        if (path / "meta.json").exists()
    )


def gone(process: int) -> bool:
    return process not in processes("")


def test_a_training_that_is_killed_is_tried_again_from_its_last_checkpoint(watched: Watched) -> None:
    words = (*WORDS, "--set", "deployment.retries=1", "--set", "deployment.retry_delay_s=0", "--force", "pretrain")
    run = watched.start(*words)
    (trainer,) = wait_for(lambda: trainers(run))
    wait_for(lambda: saved_after(watched, 10))
    os.killpg(trainer, signal.SIGKILL)
    out, errors = run.communicate()
    assert run.returncode == 0, errors
    assert re.search(r"pretrain: going on after step [1-3]\d", out)
    assert watched.states(watched.newest_run()["id"], 8)["pretrain"] == "Completed"
    assert "step 40 of 40, loss" in watched.page("demo-pretrain-progress")["description"]


def test_a_mistake_is_not_tried_again(watched: Watched) -> None:
    done = watched.run(*WORDS, "--set", "deployment.retries=3", "--set", "manifests.rare_labels=error")
    assert done.returncode == 2
    assert done.stdout.count("manifests: to make") == 1
    (run,) = watched.ask(
        "/task_runs/filter",
        {
            "flow_runs": {"id": {"any_": [watched.newest_run()["id"]]}},
            "task_runs": {"name": {"any_": ["manifests"]}},
        },
    )
    assert run["run_count"] == 1


def test_one_training_at_a_time_takes_the_slot_of_a_gpu(watched: Watched) -> None:
    watched.ask("/v2/concurrency_limits/", {"name": "gpu", "limit": 1})
    slot = {"names": ["gpu"], "slots": 1}
    watched.ask("/v2/concurrency_limits/increment", slot | {"mode": "concurrency"})
    run = watched.start(*WORDS, "--set", "deployment.gpu=always", "--set", "pretrain.seed=1")
    assert run.stdout
    for line in run.stdout:
        if "pretrain: waits for a slot of the concurrency limit gpu" in line:
            break
    time.sleep(3)
    assert not trainers(run), "it trains although another training has the GPU"
    watched.ask("/v2/concurrency_limits/decrement", slot)
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    (limit,) = watched.ask("/v2/concurrency_limits/filter", {})
    assert (limit["name"], limit["active_slots"]) == ("gpu", 0)


def test_cancel_in_the_ui_ends_a_training_within_seconds_after_a_checkpoint(watched: Watched) -> None:
    run = watched.start(*WORDS, "--set", "pretrain.seed=2")
    (trainer,) = wait_for(lambda: trainers(run))
    wait_for(lambda: saved_after(watched, 5))
    flow_run = watched.newest_run()["id"]
    watched.ask(f"/flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    cancelled = time.monotonic()
    _, errors = run.communicate()
    assert time.monotonic() - cancelled < 60
    assert errors.strip().endswith("demo: cancelled in the UI; what is saved is kept: run the same command to go on")
    assert run.returncode == 1
    assert gone(trainer)
    assert watched.ask(f"/flow_runs/{flow_run}")["state_name"] == "Cancelled"
    again = watched.run(*WORDS, "--set", "pretrain.seed=2")
    assert again.returncode == 0, again.stderr
    assert "going on after step" in again.stdout


def test_cancel_in_the_ui_ends_a_served_training_too(watched: Watched) -> None:
    serving = watched.command("serve", "demo")
    assert serving.stdout
    for line in serving.stdout:
        if line.startswith("Prefect UI"):
            break
    (deployment,) = watched.ask("/deployments/filter", {"deployments": {"name": {"any_": ["demo"]}}})
    changes = [word for word in WORDS if "=" in word and not word.startswith("--only")]
    parameters = {"overrides": [*changes, "pretrain.seed=3"], "only": list(UP_TO_PRETRAIN)}
    run = watched.ask(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})
    (trainer,) = wait_for(lambda: processes("own.obey", api=watched.api))
    wait_for(lambda: saved_after(watched, 5))
    watched.ask(f"/flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    wait_for(lambda: gone(trainer), 60)
    wait_for(lambda: watched.ask(f"/flow_runs/{run['id']}")["state_name"] == "Cancelled", 60)
    serving.send_signal(signal.SIGTERM)
    serving.communicate(timeout=60)
    assert serving.returncode == 0
    again = watched.run(*WORDS, "--set", "pretrain.seed=3")
    assert "going on after step" in again.stdout


@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGKILL])
def test_no_temporary_server_outlives_the_run_that_started_it(tmp_path: Path, ended_by: signal.Signals) -> None:
    run = Watched(tmp_path, "").start(*WORDS)
    (served,) = wait_for(lambda: processes("uvicorn", "create_app", parent=run.pid))
    wait_for(lambda: list(tmp_path.glob("stages/list/*")) or run.poll() is not None)
    run.send_signal(ended_by)
    run.communicate()
    wait_for(lambda: gone(served), 60)
