"""Slices made by the workers of a Dask or Ray on this machine, seen through the API of a real Prefect server."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import pipeline, write_raw

from ecgfm.config import PrepareConfig, from_dict, to_dict
from ecgfm.ecg import InputError
from ecgfm.fingerprints import Input
from ecgfm.pipeline import PREPARE, Made, Selection, Walker, walk
from ecgfm.pipelines_file import Pipeline, RunnerConfig, load_pipeline
from ecgfm.runs import run_locally
from ecgfm.stages import Output, Request, Stage, StageFailed, Store
from flows import prepare, server

N_SLICES = 6
NOBODY = {"kind": "dask", "address": "tcp://127.0.0.1:9", "patience_s": 5}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server that the runs of this module go to."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.engine import send_what_waits

    send_what_waits()  # what sends in the background keeps the server that it began with: another module's
    with server.local_server(tmp_path_factory.mktemp("server"), server.free_port()) as local:
        url = f"{local.address}/api"
        with temporary_settings({PREFECT_API_URL: url}):
            yield url
            send_what_waits()


@pytest.fixture(scope="module")
def dask(api: str) -> Iterator[dict[str, Any]]:
    """The runner of a Dask of two processes. One death at a task is tried again, the second is too many."""
    distributed = pytest.importorskip("distributed", reason="the extra ecgfm[dask] is not installed")
    pytest.importorskip("prefect_dask", reason="the extra ecgfm[dask] is not installed")
    import dask.config

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
    ):
        yield {"kind": "dask", "address": cluster.scheduler_address, "patience_s": 20}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw"), range(N_SLICES))


@pytest.fixture(scope="module")
def made_locally(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A data directory whose slices the local runner made. Not to be written to."""
    store = Store(tmp_path_factory.mktemp("local"))
    run_locally("test", pipeline(), {"ptb_xl": raw}, store, Selection(("list", "prepare")))
    return store


@pytest.fixture(autouse=True)
def _a_batch_per_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "BATCH_RECORDS", 40)


def make(store: Store, requests: Sequence[Request], runner: Any, force: bool = False) -> list[Output]:
    """The requests as the slices of one source, under Prefect."""
    from flows.engine import Work

    selection = Selection(force=("prepare",) if force else ())
    work = Work("test", pipeline(runner=runner), store, selection)
    return prepare.prepare_source(work, "prepare ptb_xl", requests)


def slices_of(raw: Path, store: Store) -> list[Request]:
    """The requests of every slice, none of them made; the listing is."""
    found: list[Request] = []

    def execute(requests: Sequence[Request], group: str) -> list[Made]:
        if requests[0].stage is PREPARE:
            found.extend(requests)
            raise StopIteration
        return [store.make(request) for request in requests]

    with pytest.raises(StopIteration):
        walk(pipeline(), {"ptb_xl": raw}, Walker(store, execute))
    return found


def bytes_of(store: Store) -> dict[str, tuple[str, dict[str, str]]]:
    """Key -> digest and file hashes of every prepared slice, and no half-made one."""
    found = {}
    for place in (store.data_dir / "stages" / "prepare").iterdir():
        facts = json.loads((place / "stage.json").read_bytes())
        found[place.name] = (facts["digest"], {name: file["sha256"] for name, file in facts["files"].items()})
    return found


def special(tmp_path: Path, function: str, subject: str = "one") -> Request:
    """A request of one of the stages made for these tests."""
    (tmp_path / "notes").touch()
    notes = Input(tmp_path / "notes", "0", "notes")
    stage = Stage("prepare", f"stages_of_runners:{function}")
    return Request(stage, {"notes": notes}, PrepareConfig(workers=7), subject, size=100)


def ask(api: str, path: str, question: dict[str, Any]) -> Any:
    request = urllib.request.Request(api + path, json.dumps(question).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def tasks_of_newest_run(api: str, expected: int) -> dict[str, dict[str, Any]]:
    """The task runs of the flow run that started last, once all have ended."""
    (run,) = ask(api, "/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})
    for _ in range(100):
        runs = ask(api, "/task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
        if len(runs) >= expected and not {"Running", "Pending"} & {task["state_name"] for task in runs}:
            return {task["name"]: task for task in runs}
        time.sleep(0.2)
    raise AssertionError(f"expected {expected} task runs, found {runs}")


# ---- what it is for


def test_dask_makes_the_bytes_of_the_local_runner_and_the_second_run_asks_nobody(
    api: str, dask: dict[str, Any], raw: Path, made_locally: Store, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    requests = slices_of(raw, store)
    outputs = make(store, requests, dask)
    assert [output.name for output in outputs] == [request.name for request in requests]
    assert not any(output.cached for output in outputs)
    assert bytes_of(store) == bytes_of(made_locally)
    assert len(bytes_of(store)) == N_SLICES
    tasks = tasks_of_newest_run(api, N_SLICES)
    assert set(tasks) == {f"ptb_xl: slice {number} of {N_SLICES} (40 records)" for number in range(1, N_SLICES + 1)}
    assert {task["state_name"] for task in tasks.values()} == {"Completed"}

    again = make(store, requests, NOBODY)  # nobody answers there
    assert all(output.cached for output in again)
    states = {name: task["state_name"] for name, task in tasks_of_newest_run(api, 1).items()}
    assert states == {f"ptb_xl: slices 1-{N_SLICES} of {N_SLICES} (240 records) (cached)": "Cached"}


def test_only_what_is_missing_is_sent(
    api: str, dask: dict[str, Any], raw: Path, made_locally: Store, tmp_path: Path
) -> None:
    store = Store(Path(shutil.copytree(made_locally.data_dir, tmp_path / "data")))
    requests = slices_of(raw, store)
    for place in (1, 3):
        shutil.rmtree(store.place(requests[place]))
    outputs = make(store, requests, dask)
    assert [output.cached for output in outputs] == [True, False, True, False, True, True]
    assert bytes_of(store) == bytes_of(made_locally)
    states = {name: task["state_name"] for name, task in tasks_of_newest_run(api, 3).items()}
    assert states == {
        "ptb_xl: slice 2 of 6 (40 records)": "Completed",
        "ptb_xl: slice 4 of 6 (40 records)": "Completed",
        "ptb_xl: 4 of slices 1-6 of 6 (160 records) (cached)": "Cached",
    }


def test_force_makes_anew_on_the_workers(dask: dict[str, Any], raw: Path, made_locally: Store, tmp_path: Path) -> None:
    store = Store(Path(shutil.copytree(made_locally.data_dir, tmp_path / "data")))
    outputs = make(store, slices_of(raw, store), dask, force=True)
    assert not any(output.cached for output in outputs)
    assert bytes_of(store) == bytes_of(made_locally)


def test_what_a_worker_logs_is_in_the_runs_log(api: str, dask: dict[str, Any], tmp_path: Path) -> None:
    make(Store(tmp_path), [special(tmp_path, "write_threads")], dask)
    (task,) = tasks_of_newest_run(api, 1).values()
    for _ in range(50):
        logs = ask(api, "/logs/filter", {"logs": {"task_run_id": {"any_": [task["id"]]}}})
        if any(log["name"] == "ecgfm.runners" and "made in" in log["message"] for log in logs):
            return
        time.sleep(0.2)
    raise AssertionError(f"no line of the worker among {[log['message'] for log in logs]}")


def test_a_dask_is_started_for_a_run_without_address_and_its_workers_take_one_thread_each(
    api: str, tmp_path: Path
) -> None:
    pytest.importorskip("prefect_dask", reason="the extra ecgfm[dask] is not installed")
    (output,) = make(Store(tmp_path), [special(tmp_path, "write_threads")], {"kind": "dask", "workers": 1})
    found = json.loads((output.directory / "threads.json").read_text())
    assert found["workers"] == 1  # a slice is made in one process of the engine
    assert found["libraries"]
    assert set(found["libraries"].values()) == {1}


def test_ray_makes_the_bytes_of_the_local_runner(
    api: str, raw: Path, made_locally: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the extra ecgfm[ray] is not installed")
    pytest.importorskip("prefect_ray", reason="the extra ecgfm[ray] is not installed")
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED"):  # as they are afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    store = Store(tmp_path / "data")
    outputs = make(store, slices_of(raw, store), {"kind": "ray", "workers": 2})
    assert not any(output.cached for output in outputs)
    assert bytes_of(store) == bytes_of(made_locally)
    assert {task["state_name"] for task in tasks_of_newest_run(api, N_SLICES).values()} == {"Completed"}
    assert not (tmp_path / "home").exists()  # no token is left there


# ---- what can go wrong


def test_a_killed_worker_costs_its_batch_a_second_try(dask: dict[str, Any], tmp_path: Path) -> None:
    (output,) = make(Store(tmp_path), [special(tmp_path, "die_once")], dask)
    assert (tmp_path / "died").exists()
    assert (output.directory / "whole").read_text() == "whole"


def test_a_batch_that_kills_every_worker_ends_the_run_in_one_line_and_loses_nothing(
    dask: dict[str, Any], tmp_path: Path
) -> None:
    store = Store(tmp_path)
    good, bad = special(tmp_path, "write_threads", "good"), special(tmp_path, "die", "bad")
    make(store, [good], dask)
    with pytest.raises(
        StageFailed, match=r"^ptb_xl: slice 2 of 2 \(100 records\): dask at tcp.* lost it: .*died"
    ) as said:
        make(store, [good, bad], dask)
    assert "\n" not in str(said.value)
    assert store.find(good)
    assert not store.find(bad)


def test_a_mistake_on_a_worker_is_told_as_such(dask: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^on worker .*: reading DICOM needs pydicom: pip install 'ecgfm\[dicom\]'$"):
        make(Store(tmp_path), [special(tmp_path, "refuse")], dask)


def order(store: Store, request: Request, change: Any = None) -> bytes:
    from flows.runners import order_for

    sent = order_for(store, [request], False)
    if change is None:
        return sent
    store, [(request, ingredients, sight)], force = pickle.loads(sent)
    return pickle.dumps((store, [(request, change(ingredients), sight)], force))


def test_a_worker_with_other_code_makes_nothing(raw: Path, tmp_path: Path) -> None:
    from flows.runners import make_ordered

    store = Store(tmp_path)
    request = slices_of(raw, store)[0]
    other = order(store, request, lambda known: known | {"code": known["code"] | {"ecgfm.signals": "0"}})
    with pytest.raises(InputError, match=r"another one \(code of ecgfm.signals changed\); install the same version"):
        make_ordered(other)
    assert not store.find(request)
    assert make_ordered(order(store, request))[0].counts["prepared"] == 40


@pytest.mark.parametrize("looks_like", ["nothing", "an empty mount point", "half of it", "another place"])
def test_a_worker_that_sees_another_raw_folder_makes_nothing(raw: Path, tmp_path: Path, looks_like: str) -> None:
    from flows.runners import make_ordered

    own, store = Path(shutil.copytree(raw, tmp_path / "raw")), Store(tmp_path / "data")
    request = slices_of(own, store)[0]
    sent = order(store, request)
    if looks_like == "nothing":
        shutil.rmtree(own)
    elif looks_like == "half of it":
        next((own / "records500" / "00000").glob("*.dat")).unlink()
    else:
        shutil.rmtree(own / "records500" / "00000")
        if looks_like == "an empty mount point":
            (own / "records500" / "00000").mkdir()
    with pytest.raises(InputError, match=r"on worker .*records500/00000 (does not exist|holds something else) there"):
        make_ordered(sent)
    assert not store.find(request)


def test_a_worker_that_does_not_see_the_data_directory_makes_nothing(raw: Path, tmp_path: Path) -> None:
    from flows.runners import make_ordered

    store = Store(tmp_path / "data")
    request = slices_of(raw, store)[0]
    sent = order(store, request)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(InputError, match=r"slices/.*\.parquet does not exist there; the data directory and the raw"):
        make_ordered(sent)
    assert not (tmp_path / "data").exists()


def test_what_a_worker_made_elsewhere_is_missed(dask: dict[str, Any], tmp_path: Path) -> None:
    """A worker whose data directory is its own: stood in for by a store that looks in another place than it says."""
    from flows.runners import Engine

    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    request = special(tmp_path, "write_threads")
    there.make(request)
    engine = Engine("dask at HOST", None, lambda: 1, (), 0.1)  # type: ignore[arg-type]
    engine._wait_until_seen(there, request)
    with pytest.raises(InputError, match=r"dask at HOST made prepare one, but .* must be one folder that every worker"):
        engine._wait_until_seen(here, request)


def open_engine(**values: Any) -> float:
    """Seconds until an engine of these values is refused."""
    from flows.runners import engine

    started = time.monotonic()
    with engine(from_dict(RunnerConfig, values, "test")):
        raise AssertionError("it was to be refused")
    return time.monotonic() - started


@pytest.mark.parametrize("kind", ["dask", "ray"])
def test_an_address_where_nobody_listens_is_said_at_once(kind: str) -> None:
    address = {"dask": "tcp://127.0.0.1:9", "ray": "ray://127.0.0.1:9"}[kind]
    started = time.monotonic()
    with pytest.raises(
        InputError, match=rf"^no {kind} answers at {address} \(runner.address\): .*refused; start it, or"
    ):
        open_engine(kind=kind, address=address)
    assert time.monotonic() - started < 20


def test_a_server_that_says_nothing_is_no_dask() -> None:
    pytest.importorskip("prefect_dask", reason="the extra ecgfm[dask] is not installed")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(InputError, match=rf"^what answers at {address} \(runner.address\) is no Dask scheduler$"):
            open_engine(kind="dask", address=address, patience_s=1)
        assert time.monotonic() - started < 20


def test_a_dask_without_workers_is_said_after_a_while() -> None:
    distributed = pytest.importorskip("distributed", reason="the extra ecgfm[dask] is not installed")
    with (
        distributed.LocalCluster(
            n_workers=0, processes=False, dashboard_address=None, host="127.0.0.1", protocol="tcp"
        ) as cluster,
        pytest.raises(InputError, match=r"dask at tcp.* has had no worker for 1 s \(runner.patience_s\)"),
    ):
        open_engine(kind="dask", address=cluster.scheduler_address, patience_s=1)


@pytest.mark.parametrize(
    ("kind", "package"), [("dask", "prefect_dask"), ("dask", "distributed"), ("ray", "prefect_ray")]
)
def test_a_missing_extra_is_named(kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "as it was")
    with pytest.raises(InputError, match=rf"^the runner {kind} needs prefect-{kind}: pip install 'ecgfm\[{kind}\]'$"):
        open_engine(kind=kind)


def test_engines_are_imported_when_asked_for() -> None:
    code = "import sys, flows.pipeline; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "prefect" in loaded
    assert not {"distributed", "dask", "ray", "prefect_dask", "prefect_ray"} & loaded


def test_without_prefect_an_engine_is_refused(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^runner dask needs Prefect: leave --no-prefect out, or --set runner=local$"):
        run_locally("test", pipeline(runner="dask"), {"ptb_xl": raw}, Store(tmp_path), Selection())
    assert not list(tmp_path.iterdir())


# ---- pipelines.yaml


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("local", RunnerConfig()),
        ("dask", RunnerConfig("dask")),
        ("{kind: dask, address: 'tcp://10.0.0.1:8786'}", RunnerConfig("dask", "tcp://10.0.0.1:8786")),
        ("{kind: dask, address: 'scheduler:8786'}", RunnerConfig("dask", "scheduler:8786")),
        ("{kind: ray, address: 'ray://head:10001'}", RunnerConfig("ray", "ray://head:10001")),
        ("{kind: ray, workers: 4}", RunnerConfig("ray", workers=4)),
    ],
)
def test_a_runner_is_written_as_a_word_or_with_its_values(tmp_path: Path, written: str, meant: RunnerConfig) -> None:
    (tmp_path / "pipelines.yaml").write_text(f"p: {{sources: [ptb_xl], runner: {written}}}\n")
    loaded = load_pipeline(tmp_path / "pipelines.yaml", "p")
    assert loaded.runner == meant
    assert from_dict(Pipeline, to_dict(loaded), "again") == loaded
    bare = replace(loaded, runner=RunnerConfig())
    assert load_pipeline(tmp_path / "pipelines.yaml", "p", [f"runner={written}"]) == replace(bare, runner=meant)


@pytest.mark.parametrize(
    ("runner", "message"),
    [
        ("spark", "runner.kind: Input should be 'local', 'dask' or 'ray', found 'spark'"),
        ({"kind": "dask", "adress": "x:1"}, "runner.adress: unknown key; did you mean 'address'"),
        ({"address": "tcp://x:1"}, "address and workers need kind dask or ray"),
        ({"kind": "dask", "address": "x"}, "the address of dask must be like tcp://HOST:8786, found 'x'"),
        ({"kind": "ray", "address": "tcp://x:1"}, "the address of ray must be like ray://HOST:10001"),
        ({"kind": "ray", "address": "ray://x:1", "workers": 2}, "an engine at an address has its own"),
    ],
)
def test_a_wrong_runner_is_one_line(runner: Any, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as said:
        pipeline(runner=runner)
    assert "\n" not in str(said.value)
