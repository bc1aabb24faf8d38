"""The record of a run: what it uses, whether it goes on, how it is found, kept and let go."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from stages_of_runs import ended, fork, request, run, unresolved, wait_for

from ecgfm.ecg import InputError
from ecgfm.pipeline import Walker
from ecgfm.runs import find_run, find_runs, keep, links_below, run_folders
from ecgfm.stages import Store


def state_of(data_dir: Path) -> str:
    (found,) = find_runs(data_dir)
    return found.state


def test_a_run_says_what_it_made_and_why_and_what_was_there(tmp_path: Path) -> None:
    first, second = run(tmp_path, "a", "b"), run(tmp_path, "b", "c")
    newest, oldest = find_runs(tmp_path)
    assert (newest.directory, oldest.directory) == (second, first)
    stages = {stage["name"]: stage for stage in newest.facts["stages"]}
    assert stages["toy of b/a b"]["status"] == "cached"
    assert stages["toy of c/a b"]["status"] == "made"
    assert stages["toy of c/a b"]["why"] == "new"
    assert "new input (toy of c/a b)" in stages["together of all/a b"]["why"]
    assert newest.state == "completed"
    assert newest.seconds is not None


def test_the_links_of_a_run_are_named_as_its_stages_are(tmp_path: Path) -> None:
    directory = run(tmp_path, "a", "b")
    (found,) = find_runs(tmp_path)
    written = {stage["name"]: f"{stage['name'].partition(' ')[0]}/{stage['key']}" for stage in found.facts["stages"]}
    assert links_below(directory) == written
    assert found.uses() == set(written.values())
    (directory / "report.html").symlink_to("../../../stages/toy/key/report.html")  # of an evaluation: no stage
    assert links_below(directory) == written


def test_a_run_that_failed_says_why_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        run(tmp_path, "a", "bad")
    (found,) = find_runs(tmp_path)
    assert found.state == "failed"
    assert found.facts["error"] == "not a good word"
    assert len(found.uses()) == 2  # it was about to make them


def test_a_run_goes_on_as_long_as_its_process_lives_and_was_killed_after_that(tmp_path: Path) -> None:
    started, go = tmp_path / "started", tmp_path / "go"

    def wait(walker: Walker) -> None:
        walker.one(request("slow", started=str(started), go=str(go)))

    child = fork(lambda: run(tmp_path, "a", then=wait))
    wait_for(started)
    assert state_of(tmp_path) == "running"
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    assert state_of(tmp_path) == "killed"


def test_a_run_that_wrote_its_end_but_is_still_there_goes_on(tmp_path: Path) -> None:
    directory = run(tmp_path, "a")
    assert state_of(tmp_path) == "completed"
    with open(directory / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert state_of(tmp_path) == "running"


def test_no_run_begins_while_something_is_removed(tmp_path: Path) -> None:
    (ready, go) = tmp_path / "ready", tmp_path / "go"

    def begin() -> None:  # a process from before the lock: a fork would hold it too
        ready.touch()
        wait_for(go)
        run(tmp_path, "a")

    child = fork(begin)
    wait_for(ready)
    with Store(tmp_path).removing():
        go.touch()
        time.sleep(0.3)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        assert run_folders(tmp_path) == []
    assert ended(child) == 0
    assert state_of(tmp_path) == "completed"


def test_a_run_is_found_by_its_name_and_the_newest_by_latest(tmp_path: Path) -> None:
    first, second = run(tmp_path, "a"), run(tmp_path, "b")
    assert find_run(tmp_path, f"p/{first.name}").directory == first
    assert find_run(tmp_path, "p/latest").directory == second
    assert find_run(tmp_path, "p/latest/").name == f"p/{second.name}"


def test_runs_of_one_second_are_in_the_order_in_which_they_began(tmp_path: Path) -> None:
    begun = [run(tmp_path, "a") for _ in range(12)]
    assert [found.directory for found in find_runs(tmp_path)] == begun[::-1]


def test_a_run_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run p/latest in .*: there are none"):
        find_run(tmp_path, "p/latest")
    directory = run(tmp_path, "a")
    with pytest.raises(InputError, match=f"no run p/2020 in .*: the newest of 1 is p/{directory.name}"):
        find_run(tmp_path, "p/2020")
    with pytest.raises(InputError, match=r"no run q/latest in .*: there are runs of p$"):
        find_run(tmp_path, "q/latest")


def test_a_run_is_kept_until_it_is_released(tmp_path: Path) -> None:
    run(tmp_path, "a")
    store, (found,) = Store(tmp_path), find_runs(tmp_path)
    for kept in (True, True, False, False):
        keep(store, found, kept)
        assert find_run(tmp_path, "p/latest").kept == kept
    shutil.rmtree(found.directory)
    with pytest.raises(InputError, match="was removed meanwhile"):
        keep(store, found)


def test_a_directory_of_a_run_without_a_word_is_no_run(tmp_path: Path) -> None:
    silent = tmp_path / "runs" / "p" / "2026-01-01T00-00-00Z"
    silent.mkdir(parents=True)
    (silent / ".lock").touch()
    assert find_runs(tmp_path) == []
    assert run_folders(tmp_path) == [silent]


def test_facts_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (run(tmp_path, "a") / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json: not JSON"):
        find_runs(tmp_path)


def test_links_that_cannot_be_read_are_an_error_and_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = run(tmp_path, "a")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("/toy"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        links_below(directory)


def test_a_moved_data_directory_has_the_same_runs_and_links(tmp_path: Path) -> None:
    directory = run(tmp_path / "here", "a", "b")
    uses = find_runs(tmp_path / "here")[0].uses()
    (tmp_path / "here").rename(tmp_path / "there")
    (moved,) = find_runs(tmp_path / "there")
    assert moved.uses() == uses
    assert unresolved(moved.directory) == []
    assert not directory.exists()


def test_the_facts_of_a_run_are_json_that_a_person_can_read(tmp_path: Path) -> None:
    facts = json.loads((run(tmp_path, "a") / "run.json").read_text())
    assert facts["raw"] == {"synthetic": "/raw"}
    assert facts["process"] == os.getpid()
    assert facts["ended_at"] >= facts["started_at"]
