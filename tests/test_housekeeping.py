"""What no kept run uses is removed, and nothing else: whatever else goes on, and wherever it is killed."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stages_of_runs import ended, fork, request, run, unresolved, wait_for
from typer.testing import CliRunner

from ecgfm import housekeeping
from ecgfm.housekeeping import Removable, find_removable, remove, stages_of, survey
from ecgfm.pipeline import Walker
from ecgfm.runs import find_runs, keep
from ecgfm.stages import Store
from flows.cli import app


def outputs(data_dir: Path) -> set[str]:
    """`<stage>/<key>` of every finished output."""
    return {f"{path.parent.parent.name}/{path.parent.name}" for path in data_dir.glob("stages/*/*/stage.json")}


def names(data_dir: Path) -> list[str]:
    """The words of the finished outputs."""
    found = [json.loads(path.read_bytes())["name"] for path in data_dir.glob("stages/toy/*/stage.json")]
    return sorted(name.split()[2].split("/")[0] for name in found)


def everything(data_dir: Path) -> set[str]:
    """Every file, directory and link."""
    return {path.relative_to(data_dir).as_posix() for path in data_dir.rglob("*")}


# ---- what goes and what stays


def test_what_only_runs_that_are_not_kept_used_is_removed_with_them(tmp_path: Path) -> None:
    first, second, third = run(tmp_path, "a", "b"), run(tmp_path, "b", "c"), run(tmp_path, "c", "d")
    store = Store(tmp_path)
    before = everything(tmp_path)
    found = find_removable(store, keep_runs=2)
    assert found.runs == [first]
    assert {thing.name for thing in found.things} == {"toy of a/a b", "together of all/a b"}
    assert everything(tmp_path) == before  # a dry run writes nothing
    assert before >= {f"stages/.locks/{place.replace('/', '-')}" for place in found.locks} != set()

    removed = remove(store, keep_runs=2)
    assert removed == found
    assert names(tmp_path) == ["b", "c", "d"]
    assert not first.exists()
    assert unresolved(second) == unresolved(third) == []
    assert len(outputs(tmp_path)) == 5
    assert {path.name for path in (tmp_path / "stages" / ".locks").iterdir()} == {
        "claims",
        *(place.replace("/", "-") for place in outputs(tmp_path)),
    }
    assert not list(tmp_path.rglob(".removed-*"))
    assert not find_removable(store, keep_runs=2)


def test_what_a_failed_run_was_about_to_make_is_made_again_after_gc(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        run(tmp_path, "a", "bad")
    remove(Store(tmp_path))
    assert names(tmp_path) == ["a"]
    run(tmp_path, "a", "b")
    remove(Store(tmp_path), keep_runs=1)
    assert names(tmp_path) == ["a", "b"]


def test_a_pinned_run_and_the_latest_stay_whatever_their_number(tmp_path: Path) -> None:
    for word in "abcd":
        run(tmp_path, word)
    store = Store(tmp_path)
    oldest = find_runs(tmp_path)[-1]
    keep(store, oldest)
    removed = remove(store, keep_runs=0)
    assert set(removed.kept.values()) == {"kept by hand", "the latest that ended"}
    assert names(tmp_path) == ["a", "d"]
    keep(store, oldest, kept=False)
    remove(store, keep_runs=0)
    assert names(tmp_path) == ["d"]


def test_stages_that_two_pipelines_share_stay_as_long_as_one_of_them_keeps_a_run(tmp_path: Path) -> None:
    run(tmp_path, "shared", "p1", pipeline="p")
    last = run(tmp_path, "shared", "q1", pipeline="q")
    for word in ("p2", "p3"):
        run(tmp_path, word, pipeline="p")
    remove(Store(tmp_path), keep_runs=1)
    assert names(tmp_path) == ["p3", "q1", "shared"]
    assert unresolved(last) == []


def test_what_is_young_stays_if_asked(tmp_path: Path) -> None:
    for word in "abc":
        run(tmp_path, word)
    store = Store(tmp_path)
    store.make(request("nobody"))
    assert not find_removable(store, keep_runs=1, older_than_days=1)
    age(tmp_path, "a", days=3)
    found = find_removable(store, keep_runs=1, older_than_days=1)
    assert not found  # its run is young
    old = find_runs(tmp_path)[-1].directory
    facts = json.loads((old / "run.json").read_bytes())
    (old / "run.json").write_text(json.dumps({**facts, "started_at": "2020-01-01T00:00:00Z"}))
    found = remove(store, keep_runs=1, older_than_days=1)
    assert (found.runs, [thing.name for thing in found.things]) == ([old], ["toy of a/a b"])
    assert names(tmp_path) == ["b", "c", "nobody"]


def age(data_dir: Path, word: str, days: float) -> None:
    """Make an output look older."""
    for manifest in data_dir.glob("stages/toy/*/stage.json"):
        facts = json.loads(manifest.read_bytes())
        if facts["name"] == f"toy of {word}/a b":
            then = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - days * 86_400))
            manifest.write_text(json.dumps({**facts, "made_at": then}))


def test_what_is_not_ours_is_neither_seen_nor_removed(tmp_path: Path) -> None:
    directory = run(tmp_path, "a")
    ours = everything(tmp_path)
    mine = ["stages/toy/notes/a.txt", "stages/mine/b.txt", "stages/README", "runs/p/my links/c.txt", "runs/d.txt"]
    for path in mine:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("mine")
    unused = Store(tmp_path).make(request("b"))
    (tmp_path / "runs/p/my links/favourite").symlink_to(f"../../../stages/toy/{unused.directory.name}")
    remove(Store(tmp_path))
    assert ours | set(mine) <= everything(tmp_path)
    assert unused.directory.exists()  # a folder of links keeps what they lead to
    assert unresolved(directory) == []


def test_leftovers_of_killed_makers_go_where_no_kept_run_may_go_on_with_them(tmp_path: Path) -> None:
    directory = run(tmp_path, "a")
    store = Store(tmp_path)
    (link,) = (directory / "toy").iterdir()
    place = link.resolve()
    for path in (place.with_name(place.name + ".stale-12"), place.with_name(place.name + ".partial")):
        path.mkdir()
        (path / "half.txt").write_text("half")
    nobodys = store.place(request("b")).with_suffix(".partial")
    nobodys.mkdir()
    (place.parent / ("0" * 32)).mkdir()  # an output without its stage.json
    removed = remove(store)
    assert sorted(thing.what for thing in removed.things) == ["damaged", "partial", "stale"]
    assert [path.name for path in sorted(place.parent.iterdir())] == [place.name, f"{place.name}.partial"]


def test_a_directory_of_a_run_that_was_killed_before_its_first_word_goes(tmp_path: Path) -> None:
    run(tmp_path, "a")
    silent = tmp_path / "runs" / "p" / "2020-01-01T00-00-00Z"
    silent.mkdir()
    (silent / ".lock").touch()
    assert remove(Store(tmp_path)).runs == [silent]
    assert not silent.exists()


# ---- any set of runs and outputs, beside a slow and obvious judge

KEYS = [f"{stage}/{digit * 32}" for stage in ("toy", "other") for digit in "0123"]
ENDINGS = ("", ".partial", ".stale-7")


@dataclass(frozen=True)
class Past:
    """A run that is to lie in a data directory."""

    pipeline: str
    state: str
    kept: bool
    uses: frozenset[str]


PASTS = st.builds(
    Past,
    st.sampled_from(["p", "q"]),
    st.sampled_from(["running", "killed", "completed", "completed", "failed"]),
    st.integers(0, 5).map(lambda number: number == 0),
    st.frozensets(st.sampled_from(KEYS), max_size=4),
)


def lay_out(data_dir: Path, pasts: list[Past], lying: set[tuple[str, str]], at_work: set[str], held: ExitStack) -> None:
    """The files of runs, the first the oldest, and of what lies in stages/; locks are held as long as `held`."""
    for place, ending in lying:
        folder = data_dir / "stages" / f"{place}{ending}"
        folder.mkdir(parents=True)
        (folder / "word.txt").write_text("word")
        if not ending:
            facts = {"name": place.partition("/")[0], "made_at": "2026-01-01T00:00:00Z", "seconds": 1.0}
            (folder / "stage.json").write_text(json.dumps({**facts, "files": {"word.txt": {"bytes": 4}}}))
    locks = data_dir / "stages" / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    for place in at_work | {place for place, _ in lying}:
        lock = held.enter_context((locks / place.replace("/", "-")).open("w"))
        if place in at_work:
            fcntl.flock(lock, fcntl.LOCK_EX)
    for number, past in enumerate(pasts):
        run = data_dir / "runs" / past.pipeline / f"2026-01-01T00-00-{number:02}Z"
        run.mkdir(parents=True)
        lock = held.enter_context((run / ".lock").open("w"))
        if past.state == "running":
            fcntl.flock(lock, fcntl.LOCK_EX)
        state = "running" if past.state == "killed" else past.state
        facts = {
            "pipeline": past.pipeline,
            "state": state,
            "started_at": f"2026-01-01T00:00:{number:02}Z",
            "stages": [],
        }
        (run / "run.json").write_text(json.dumps(facts))
        if past.kept:
            (run / "keep").touch()
        for place in past.uses:
            stage, _, key = place.partition("/")
            (run / stage).mkdir(exist_ok=True)
            (run / stage / f"of {key[0]}").symlink_to(f"../../../../stages/{place}")


def judged(
    pasts: list[Past], lying: set[tuple[str, str]], at_work: set[str], keep_runs: int
) -> tuple[set[int], set[str]]:
    """The numbers of the runs that stay, and what stays in stages/."""
    stay = set()
    for number, past in enumerate(pasts):
        newer = [later for later in pasts[number + 1 :] if later.pipeline == past.pipeline]
        if past.state == "running" or past.kept or len(newer) < keep_runs or past.uses & at_work:
            stay.add(number)
    used = {place for number in stay for place in pasts[number].uses}
    left = {f"{place}{end}" for place, end in lying if place in at_work or (place in used and "stale" not in end)}
    return stay, left


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pasts=st.lists(PASTS, max_size=8),
    lying=st.sets(st.tuples(st.sampled_from(KEYS), st.sampled_from(ENDINGS))),
    at_work=st.sets(st.sampled_from(KEYS), max_size=2),
    keep_runs=st.integers(0, 3),
)
def test_whatever_lies_there_what_kept_runs_use_stays_and_all_else_goes(
    pasts: list[Past], lying: set[tuple[str, str]], at_work: set[str], keep_runs: int, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    shutil.rmtree(data_dir, ignore_errors=True)
    with ExitStack() as held:
        lay_out(data_dir, pasts, lying, at_work, held)
        stay, left = judged(pasts, lying, at_work, keep_runs)
        runs = dict(enumerate(reversed(find_runs(data_dir))))
        resolved = {number: len(unresolved(runs[number].directory)) for number in stay}
        store = Store(data_dir)

        foreseen = find_removable(store, keep_runs)
        removed = remove(store, keep_runs)
        assert removed == foreseen
        assert {run.directory for run in find_runs(data_dir)} == {runs[number].directory for number in stay}
        assert {thing.place + thing.path.name[32:] for thing in survey(data_dir)} == left
        for number, count in resolved.items():
            assert len(unresolved(runs[number].directory)) == count
        lock_files = {path.name for path in (data_dir / "stages" / ".locks").iterdir()} - {"claims"}
        assert lock_files >= {place.partition(".")[0].replace("/", "-") for place in left}
        assert lock_files <= {place.replace("/", "-") for place in KEYS}
        assert not list(data_dir.rglob(".removed-*"))
        assert not remove(store, keep_runs)  # nothing is left to remove


# ---- while others are at work


def test_a_run_that_begins_while_something_is_taken_out_waits_and_makes_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "data")
    gone = store.make(request("a"))
    taking, go = tmp_path / "taking", tmp_path / "go"
    child = fork(lambda: (wait_for(taking), run(tmp_path / "data", "a")))

    rename = os.rename

    def slow(source: Path, target: Path) -> None:
        if Path(source) == gone.directory:
            taking.touch()
            time.sleep(0.3)  # the run begins
            assert not list((tmp_path / "data" / "runs").glob("*/*"))
            go.touch()
        rename(source, target)

    monkeypatch.setattr(housekeeping.os, "rename", slow)
    removed = remove(store)
    monkeypatch.undo()
    assert ended(child) == 0
    assert go.exists()
    assert [thing.path for thing in removed.things] == [gone.directory]
    (found,) = find_runs(tmp_path / "data")
    assert unresolved(found.directory) == []
    assert found.facts["stages"][0]["status"] == "made"


def test_what_a_run_has_claimed_and_not_looked_for_yet_stays(tmp_path: Path) -> None:
    data_dir, claimed, go = tmp_path / "data", tmp_path / "claimed", tmp_path / "go"
    there = Store(data_dir).make(request("late"))

    def wait_between(walker: Walker) -> None:
        claim = walker.claim

        def slow(requests: Any) -> None:
            claim(requests)
            claimed.touch()
            wait_for(go)

        walker.claim = slow
        (output,) = walker.many([request("late")], "")
        assert output.cached

    child = fork(lambda: run(data_dir, "a", then=wait_between))
    wait_for(claimed)
    removed = remove(Store(data_dir), keep_runs=0)
    go.touch()
    assert ended(child) == 0
    assert not removed.things
    assert there.directory.exists()


def test_a_run_in_the_middle_of_a_stage_keeps_what_it_reads_and_what_it_writes(tmp_path: Path) -> None:
    data_dir, started, go = tmp_path / "data", tmp_path / "started", tmp_path / "go"

    def work(walker: Walker) -> None:
        read = walker.store.find(request("a"))
        assert read
        walker.one(request("slow", "other", [read.select("*")], started=str(started), go=str(go)))
        assert (read.directory / "word.txt").exists()

    child = fork(lambda: run(data_dir, "a", then=work))
    wait_for(started)
    (found,) = find_runs(data_dir)
    assert [stage["status"] for stage in stages_of(Store(data_dir), found)] == ["being made", "made", "made"]
    Store(data_dir).make(request("unused"))
    removed = remove(Store(data_dir), keep_runs=0)
    go.touch()
    assert ended(child) == 0
    assert [thing.name for thing in removed.things] == ["toy of unused/a b"]
    assert unresolved(found.directory) == []


def test_what_a_maker_that_is_no_recorded_run_is_at_stays(tmp_path: Path) -> None:
    store, started, go = Store(tmp_path / "data"), tmp_path / "started", tmp_path / "go"
    slow = request("slow", started=str(started), go=str(go))
    child = fork(lambda: store.make(slow))
    wait_for(started)
    removed = remove(store)
    assert [thing.what for thing in removed.busy] == ["partial"]
    assert not removed
    go.touch()
    assert ended(child) == 0
    assert store.find(slow)


def test_what_somebody_begins_to_make_after_it_was_decided_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, decided, started, go = Store(tmp_path / "data"), *(tmp_path / name for name in ("decided", "started", "go"))
    slow = request("slow", started=str(started), go=str(go))
    leftover = store.place(slow).with_suffix(".partial")
    leftover.mkdir(parents=True)
    child = fork(lambda: (wait_for(decided), store.make(slow)))
    take_out = housekeeping._take_out

    def late(store: Store, found: Removable) -> Any:
        assert [thing.path for thing in found.things] == [leftover]
        decided.touch()
        wait_for(started)
        return take_out(store, found)

    monkeypatch.setattr(housekeeping, "_take_out", late)
    removed = remove(store)
    go.touch()
    assert ended(child) == 0
    assert not removed.things
    assert [thing.path for thing in removed.busy] == [leftover]
    assert store.find(slow)


def test_what_the_processes_of_a_killed_run_read_stays_as_long_as_they_live(tmp_path: Path) -> None:
    store, claimed, started, go = Store(tmp_path / "data"), *(tmp_path / name for name in ("claimed", "started", "go"))
    read = store.make(request("a"))
    slow = request("slow", "other", [read.select("*")], started=str(started), go=str(go))
    worker = fork(lambda: (wait_for(claimed), store.make(slow)))

    def have_it_made(walker: Walker) -> None:
        walker.claim([slow])
        claimed.touch()
        wait_for(go)

    main = fork(lambda: run(store.data_dir, "a", then=have_it_made))
    wait_for(started)
    os.kill(main, signal.SIGKILL)
    ended(main)
    (found,) = find_runs(store.data_dir)
    assert found.state == "killed"
    assert remove(store, keep_runs=0).kept == {found.name: "with a stage being made"}
    assert read.directory.exists()
    go.touch()
    assert ended(worker) == 0
    assert store.find(slow)
    assert remove(store, keep_runs=0).runs == [found.directory]
    assert not outputs(store.data_dir)


def test_a_run_whose_process_was_killed_goes_on_with_its_half_after_gc(tmp_path: Path) -> None:
    data_dir, started, go = tmp_path / "data", tmp_path / "started", tmp_path / "go"
    child = fork(lambda: run(data_dir, "a", then=lambda w: w.one(request("s", started=str(started), go=str(go)))))
    wait_for(started)
    os.kill(child, signal.SIGKILL)
    ended(child)
    assert not remove(Store(data_dir))  # the newest run may go on
    run(data_dir, "b")
    removed = remove(Store(data_dir), keep_runs=1)
    assert sorted(thing.what for thing in removed.things) == ["output", "output", "partial"]


def test_killed_between_any_two_steps_it_takes_nothing_that_is_used_and_the_next_one_finishes(tmp_path: Path) -> None:
    for word in ("a", "b", "c"):
        run(tmp_path / "whole", word, "shared")
    Store(tmp_path / "whole").make(request("unused"))
    steps = 0
    for steps in range(100):
        data_dir = tmp_path / str(steps)
        shutil.copytree(tmp_path / "whole", data_dir, symlinks=True)

        def killed_at(step: int = steps, data_dir: Path = data_dir) -> None:
            left = iter(range(step))

            def count(function: Callable[..., Any]) -> Callable[..., Any]:
                def counted(*given: Any, **named: Any) -> Any:
                    if next(left, None) is None:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*given, **named)

                return counted

            for name in ("rename", "mkdir", "unlink", "rmdir"):
                setattr(os, name, count(getattr(os, name)))
            remove(Store(data_dir), keep_runs=1)

        code = ended(fork(killed_at))
        kept = find_runs(data_dir)[0]
        assert unresolved(kept.directory) == []
        Store(data_dir).make(request("unused"))  # no lock is left held
        remove(Store(data_dir), keep_runs=1)
        assert names(data_dir) == ["c", "shared"]
        assert [found.directory for found in find_runs(data_dir)] == [kept.directory]
        assert not list(data_dir.rglob(".removed-*"))
        assert not find_removable(Store(data_dir), keep_runs=1)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert 20 < steps < 99  # it was killed that often, and not in the end


def test_two_at_once_remove_each_thing_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "data")
    for number in range(60):
        store.make(request(f"w{number}"))
    kept = run(tmp_path / "data", "w3", "w7")
    go = tmp_path / "go"
    removed = tmp_path / "removed.txt"

    def work() -> None:
        wait_for(go)
        found = remove(Store(tmp_path / "data"))
        with open(removed, "a") as file:
            file.write("".join(f"{thing.name}\n" for thing in found.things))

    children = [fork(work) for _ in range(3)]
    go.touch()
    assert [ended(child) for child in children] == [0, 0, 0]
    lines = removed.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 58
    assert unresolved(kept) == []
    assert not find_removable(store)


def test_two_never_make_one_key_though_its_lock_file_is_removed_again_and_again(tmp_path: Path) -> None:
    store, go, stop, counter = Store(tmp_path / "data"), tmp_path / "go", tmp_path / "stop", tmp_path / "counter"
    place = store.place(request("a"))
    counter.write_text("0")
    turns, makers = 300, 3

    def work() -> None:
        wait_for(go)
        for _ in range(turns):
            with store._lock(place):
                count = int(counter.read_text())
                counter.write_text(str(count + 1))

    def drop() -> None:
        wait_for(go)
        while not stop.exists():
            with store.idle(place) as free:
                if free:
                    store.drop_lock(place)

    children = [fork(work) for _ in range(makers)]
    dropping = fork(drop)
    go.touch()
    codes = [ended(child) for child in children]
    stop.touch()
    assert ended(dropping) == 0
    assert codes == [0] * makers
    assert counter.read_text() == str(turns * makers)


def test_runs_and_gc_for_a_while_beside_each_other_and_no_run_misses_anything(tmp_path: Path) -> None:
    data_dir, stop = tmp_path / "data", tmp_path / "stop"

    def runs(pipeline: str, seed: int) -> Callable[[], None]:
        def work() -> None:
            drawn = random.Random(seed)
            while not stop.exists():
                directory = run(data_dir, *drawn.sample("abcdef", 3), pipeline=pipeline, then=check)
                assert unresolved(directory) == []  # the latest that ended

        return work

    def check(walker: Walker) -> None:
        for _, output in walker.made:
            assert (output.directory / "word.txt").exists()

    children = [fork(runs("p", 1)), fork(runs("q", 2))]
    counts = []
    until = time.monotonic() + 3
    while time.monotonic() < until:
        counts.append(len(remove(Store(data_dir), keep_runs=0).things))
    stop.touch()
    assert [ended(child) for child in children] == [0, 0]
    assert sum(counts) > 20  # there was something to remove, again and again


# ---- the commands


def ecgfm(*words: str | Path) -> tuple[int, str]:
    """Exit code and all that was printed."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def said(*words: str | Path) -> str:
    code, text = ecgfm(*words)
    assert code == 0, text
    return text


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """Three runs, the newest failed, and an output of no run."""
    data_dir = tmp_path / "data"
    run(data_dir, "a", "b")
    run(data_dir, "b", "c", pipeline="q")
    with pytest.raises(ValueError):
        run(data_dir, "c", "bad", pipeline="q")
    Store(data_dir).make(request("nobody"))
    return data_dir


def test_runs_are_listed_newest_first_with_what_was_new_or_wrong(used: Path) -> None:
    text = said("runs", "--data-dir", used)
    runs = find_runs(used)
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1::2]] == [run.name for run in runs]
    assert [line.split()[1] for line in lines[1::2]] == ["failed", "completed", "completed"]
    assert lines[2].strip() == "not a good word"
    assert lines[4].strip() == "toy of c/a b: new"
    assert lines[5].split()[-2:] == ["3", "0"]  # made and cached
    assert said("runs", "p", "--data-dir", used).count("\n") == 3
    listed = json.loads(said("runs", "--json", "--data-dir", used))
    assert [run["name"] for run in listed] == [run.name for run in runs]
    assert listed[0]["error"] == "not a good word"


def test_one_run_is_shown_stage_by_stage_with_the_reasons(used: Path) -> None:
    text = said("runs", "q/latest", "--data-dir", used)
    assert "q/" in text.splitlines()[0]
    assert "failed" in text.splitlines()[0]
    assert "not a good word" in text
    assert "/raw" in text
    text = said("runs", find_runs(used, "q")[1].name, "--data-dir", used)
    rows = {" ".join(line.split()[:4]): line.split()[4:] for line in text.splitlines()}
    assert "cached" in rows["toy of b/a b"]
    assert rows["toy of c/a b"][1] == "made"
    assert rows["toy of c/a b"][-1] == "new"


def test_a_run_is_kept_and_released_by_name(used: Path) -> None:
    name = find_runs(used)[-1].name
    assert "kept" in said("runs", "--keep", name, "--data-dir", used)
    assert "kept" in next(line for line in said("runs", "--data-dir", used).splitlines() if line.startswith(name))
    said("runs", "--release", name, "--data-dir", used)
    assert not find_runs(used)[-1].kept


def test_stages_are_listed_with_their_size_and_how_many_runs_use_them(used: Path) -> None:
    text = said("stages", "--data-dir", used)
    of = {" ".join(line.split()[:4]): line.split()[4:] for line in text.splitlines()}
    assert of["toy of b/a b"][-1] == "2"
    assert of["toy of nobody/a b"][-1] == "0"
    assert "6 outputs (" in text
    assert "1 output (" in text
    unused = said("stages", "--unused", "--data-dir", used)
    assert [line.split()[2] for line in unused.splitlines() if line.startswith("toy")] == ["nobody/a"]
    facts = json.loads(said("stages", "--json", "--data-dir", used))
    for thing in facts:
        files = [file for file in Path(thing["path"]).rglob("*") if file.is_file()]
        assert thing["n_bytes"] == sum(file.stat().st_size for file in files)


def test_halves_are_listed_and_who_is_at_work_on_them(tmp_path: Path) -> None:
    store, started, go = Store(tmp_path / "data"), tmp_path / "started", tmp_path / "go"
    run(tmp_path / "data", "a")
    store.place(request("b")).with_suffix(".partial").mkdir()
    child = fork(lambda: store.make(request("slow", started=str(started), go=str(go))))
    wait_for(started)
    text = said("stages", "--data-dir", tmp_path / "data")
    go.touch()
    assert ended(child) == 0
    assert text.count("being made") == 1
    assert text.count("not finished") == 1


def test_slices_of_a_source_are_one_line_unless_all_are_asked_for(tmp_path: Path) -> None:
    for number in range(1000):
        lay_out_slice(tmp_path, f"{number:032x}", f"prepare ptb_xl records500/{number:05}")
    text = said("stages", "--data-dir", tmp_path)
    (line,) = (line for line in text.splitlines() if line.startswith("prepare"))
    assert line.split()[:6] == ["prepare", "ptb_xl", "1,000", "slices", "4.2", "MB"]
    assert len(said("stages", "--all", "--data-dir", tmp_path).splitlines()) == 1000 + 4
    assert "1,000 slices" in said("gc", "--data-dir", tmp_path)


def lay_out_slice(data_dir: Path, key: str, name: str) -> None:
    folder = data_dir / "stages" / "prepare" / key
    folder.mkdir(parents=True)
    facts = {"name": name, "made_at": "2026-01-01T00:00:00Z", "seconds": 1.0, "files": {"shard.h5": {"bytes": 4000}}}
    (folder / "stage.json").write_text(json.dumps(facts).ljust(200))
    (folder / "shard.h5").write_bytes(bytes(4000))


def test_gc_removes_nothing_without_delete_and_just_what_it_said_with_it(used: Path) -> None:
    before = everything(used)
    foreseen = said("gc", "--keep-runs", "1", "--data-dir", used)
    assert everything(used) == before
    assert "nothing is removed without --delete" in foreseen
    done = said("gc", "--keep-runs", "1", "--delete", "--data-dir", used)
    assert foreseen.splitlines()[1:-1] == done.splitlines()[1:-1]
    assert names(used) == ["a", "b", "c"]
    assert f"nothing to remove in {used}" in said("gc", "--keep-runs", "1", "--data-dir", used)


def test_a_misspelt_data_directory_is_no_empty_one(tmp_path: Path) -> None:
    for command in ("runs", "stages", "gc"):
        code, text = ecgfm(command, "--data-dir", tmp_path / "typo")
        assert code == 2
        assert "is no data directory" in text
        assert len(text.splitlines()) == 1
    assert not (tmp_path / "typo").exists()


def test_looking_back_loads_neither_prefect_nor_torch(used: Path) -> None:
    (file,) = (find_runs(used, "p")[0].directory / "together").iterdir()
    commands = [["runs"], ["runs", "p/latest"], ["stages"], ["gc"], ["gc", "--delete"]]
    words = [[*command, "--data-dir", str(used)] for command in commands] + [["lineage", str(file)]]
    code = (
        "import sys; from typer.testing import CliRunner; from flows.cli import app\n"
        f"for words in {words}: assert CliRunner().invoke(app, words).exit_code == 0\n"
        "print('heavy:', sorted({'prefect', 'torch', 'polars', 'sklearn', 'h5py'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
