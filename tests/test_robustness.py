"""What a run survives: disks that are full, read-only or gone, raw files that change while they are read, Ctrl-C."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import polars as pl
import pytest
import small_demo
from conftest import write_wfdb16
from small_demo import MOMENTS, Mounts, Run, half_made, locked, outputs
from test_sources import build_ptb_xl

from ecgfm import formats
from ecgfm import prepare as prepare_module
from ecgfm import runs as runs_module
from ecgfm.config import PrepareConfig
from ecgfm.ecg import EcgRecord, InputError, Rejected
from ecgfm.fingerprints import RawTree
from ecgfm.pipeline import PREPARE, Selection, Walker, walk
from ecgfm.pipelines_file import Pipeline
from ecgfm.runs import find_runs, recorded_run, run_locally
from ecgfm.sources import physionet2021
from ecgfm.sources.listing import header_text
from ecgfm.stages import Request, Store

PREPARATION = Selection(only=("list", "prepare"))
CHALLENGE = Pipeline(sources=("physionet2021",), prepare=PrepareConfig(workers=1, max_rejected_share=1))
SLICES = [f"training/{dataset}/g1" for dataset in ("georgia", "ningbo", "ptb")]
N_RECORDS = 6


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Three folders of six short records; of each one has no signal."""
    rng = np.random.default_rng(0)
    for slice_id in SLICES:
        folder, dataset = tmp_path / "drive" / "raw" / slice_id, slice_id.split("/")[1]
        for number in range(N_RECORDS):
            write_wfdb16(folder, f"{dataset}{number}", rng.integers(-900, 900, (12, 500)).astype(np.int16))
        (folder / f"{dataset}0.mat").unlink()
    return tmp_path / "drive" / "raw"


def prepare(raw: Path, data_dir: Path) -> dict[str, dict[str, str]]:
    """List and prepare a raw folder in this process."""
    run_locally("test", CHALLENGE, {"physionet2021": raw}, Store(data_dir), PREPARATION)
    return outputs(data_dir)


class Disturbed:
    """`read_record` of a source, which does something just before it reads the nth record."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nth: int, disturb: Callable[[], None]) -> None:
        self.reads, self.nth, self.disturb, self.read = 0, nth, disturb, physionet2021.read_record
        monkeypatch.setattr(physionet2021, "read_record", self)

    def __call__(self, raw_dir: Path, row: Mapping[str, Any]) -> EcgRecord:
        self.reads += 1
        if self.reads == self.nth:
            self.disturb()
        return self.read(raw_dir, row)


# ---- raw files that vanish or change while they are read


@pytest.mark.parametrize("nth", [1, 3, N_RECORDS, N_RECORDS + 2, 3 * N_RECORDS])
def test_a_drive_that_vanishes_while_it_is_read_turns_no_record_away(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    drive = raw.parent
    expected = prepare(raw, tmp_path / "once")
    with monkeypatch.context() as patched:
        Disturbed(patched, nth, lambda: drive.rename(tmp_path / "unplugged") and None)
        with pytest.raises(InputError, match=r"is not there any more; is its drive still mounted\?"):
            prepare(raw, tmp_path / "data")
    kept = outputs(tmp_path / "data")
    assert len(kept) == 1 + (nth - 1) // N_RECORDS, "the list, and the slices that were read before"
    assert kept.items() <= expected.items()
    assert half_made(tmp_path / "data") == []
    (tmp_path / "unplugged").rename(drive)
    assert prepare(raw, tmp_path / "data") == expected


def test_a_drive_that_is_gone_for_a_moment_turns_no_record_away(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_twice = prepare_module._check_twice

    def come_back(*given: Any) -> None:
        (tmp_path / "unplugged").rename(raw.parent)
        check_twice(*given)

    Disturbed(monkeypatch, 3, lambda: raw.parent.rename(tmp_path / "unplugged") and None)
    monkeypatch.setattr(prepare_module, "_check_twice", come_back)
    with pytest.raises(
        InputError, match=r"georgia2\.hea could not be read \(missing_header: .*it is read without fault"
    ):
        prepare(raw, tmp_path / "data")
    assert len(outputs(tmp_path / "data")) == 1


def add(folder: Path) -> None:
    """The signal that one record lacks arrives."""
    shutil.copy(folder / "georgia1.mat", folder / "georgia0.mat")


def replace_by_another(folder: Path) -> None:
    """Of the same length."""
    (folder / "georgia5.mat").write_bytes((folder / "georgia1.mat").read_bytes())


def remove(folder: Path) -> None:
    (folder / "georgia5.hea").unlink()


def cut(folder: Path) -> None:
    with open(folder / "georgia5.mat", "r+b") as file:
        file.truncate(1000)


@pytest.mark.parametrize("change", [add, replace_by_another, remove, cut])
def test_files_that_change_between_the_scan_and_their_reading_are_not_kept_under_the_old_key(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    folder = raw / SLICES[0]
    old = next(iter(_prepare_requests(raw, tmp_path / "look"))).key
    with monkeypatch.context() as patched:
        Disturbed(patched, 1, lambda: change(folder))
        with pytest.raises(InputError, match=rf"files in .*{SLICES[0]} were added, removed or written to while they"):
            prepare(raw, tmp_path / "data")
    assert len(outputs(tmp_path / "data")) == 1
    after = prepare(raw, tmp_path / "data")
    assert f"prepare physionet2021 {SLICES[0]} {old}" not in after
    assert after.items() >= {k: v for k, v in prepare(raw, tmp_path / "afresh").items() if k.startswith("prep")}.items()


def test_a_file_in_another_folder_may_change_while_one_is_read(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody uploads the next set meanwhile."""
    new = raw / "training" / "cpsc_2018" / "g1"

    def upload() -> None:
        new.mkdir(parents=True)
        (new / "A0001.hea").write_text("A0001 12 500 5000")

    Disturbed(monkeypatch, 3, upload)
    assert len(prepare(raw, tmp_path / "data")) == 4


def test_a_listing_of_what_changes_meanwhile_is_not_kept(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = physionet2021.list_records

    def vanish(raw_dir: Path) -> Any:
        found = listed(raw_dir)
        raw.parent.rename(tmp_path / "unplugged")
        return found

    monkeypatch.setattr(physionet2021, "list_records", vanish)
    with pytest.raises(InputError, match="is not there any more"):
        prepare(raw, tmp_path / "data")
    assert outputs(tmp_path / "data") == {}


def test_of_an_archive_that_was_downloaded_in_part_the_rest_is_rejected_and_prepared_when_it_comes(
    tmp_path: Path,
) -> None:
    """PTB-XL's table lists all records, whichever are there. A drive that goes away meanwhile is still an error."""
    raw = tmp_path / "drive" / "ptb-xl"
    build_ptb_xl(raw)
    config = Pipeline(sources=("ptb_xl",), prepare=PrepareConfig(workers=1, segment_seconds=0.1, max_rejected_share=1))
    (raw / "records500" / "01000").rename(tmp_path / "later")

    def run() -> dict[str, list[str]]:
        directory = run_locally("test", config, {"ptb_xl": raw}, Store(tmp_path / "data"), PREPARATION)
        tables = {unquote(folder.name): folder / "rejects.parquet" for folder in (directory / "prepare").iterdir()}
        return {name.rpartition("/")[2]: pl.read_parquet(file)["reason"].to_list() for name, file in tables.items()}

    assert run() == {"00000": ["truncated"], "01000": ["missing_header", "missing_header"]}
    (tmp_path / "later").rename(raw / "records500" / "01000")
    assert run() == {"00000": ["truncated"], "01000": ["missing_signal"]}

    look = RawTree.scan(raw, "ptb_xl").by_slice(["records500/02000"])["records500/02000"]
    look.check()
    raw.parent.rename(tmp_path / "unplugged")
    with pytest.raises(InputError, match="is not there any more"):
        look.check()


def _prepare_requests(raw: Path, data_dir: Path) -> Iterator[Request]:
    store = Store(data_dir)
    walker = Walker(store, lambda requests, group: [store.make(request) for request in requests], PREPARATION)
    walk(CHALLENGE, {"physionet2021": raw}, walker)
    yield from (request for request, _ in walker.made if request.stage is PREPARE)


@pytest.mark.parametrize("hash_content", [False, True])
def test_a_second_look_sees_every_change_at_its_own_place_and_at_no_other(tmp_path: Path, hash_content: bool) -> None:
    """Slices that are folders, folders within them, files, and what is in no other."""
    files = ["index.csv", "a/1.dat", "a/2.dat", "a/deep/3.dat", "a/deep/4.dat", "a/other/5.dat", "b/6.hdf5", "b/7.hdf5"]
    slices = {"a": {1, 2, 5}, "a/deep": {3, 4}, "b/6.hdf5": {6}, "b/7.hdf5": {7}, ".": {0}}
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def changed(parts: Mapping[str, Any]) -> set[str]:
        found = set()
        for slice_id, given in parts.items():
            try:
                given.check()
            except InputError:
                found.add(slice_id)
        return found

    for number, name in enumerate(files):
        tree = RawTree.scan(tmp_path, "toy", hash_content)
        parts = {**tree.by_slice(list(slices)), "everything": tree.everything()}
        assert changed(parts) == set()
        text = (tmp_path / name).read_text()
        time.sleep(0.01)  # a file system's clock may tick 250 times a second
        (tmp_path / name).write_text(text.upper())
        owner = {slice_id for slice_id, held in slices.items() if number in held}
        assert changed(parts) == owner | {"everything"}
        (tmp_path / name).unlink()
        assert changed(parts) == owner | {"everything"}
        (tmp_path / name).write_text(text)
    (tmp_path / "a/deep/new.dat").touch()
    assert changed(parts) == {"a/deep", "everything"} | {slice_id for slice_id, held in slices.items() if 7 in held}


DRIVE = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EACCES, errno.EHOSTDOWN)
FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


@pytest.mark.parametrize("number", [*DRIVE, *FILE])
@pytest.mark.parametrize("call", ["open", "pread", "read"])
def test_an_error_of_the_drive_ends_the_run_and_one_of_the_file_turns_it_away(
    raw: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    row = {"raw_path": f"{SLICES[0]}/georgia3.hea", "record_id": "physionet2021/georgia3"}

    def fail(*given: Any) -> Any:
        raise OSError(number, os.strerror(number), *(given[:1] if call == "open" else ()))

    monkeypatch.setattr(os, call, fail)
    expected = InputError if number in DRIVE else Rejected
    with pytest.raises(expected) as raised:
        physionet2021.read_record(raw, row)
    if number in DRIVE:
        assert "georgia3" in str(raised.value)
        assert f"cannot be read: {os.strerror(number)}; see to its drive" in str(raised.value)
    if call != "pread":  # the header, of which a listing reads age, sex and codes
        if number in DRIVE:
            with pytest.raises(InputError, match="see to its drive"):
                header_text(raw, row["raw_path"])
        else:
            assert header_text(raw, row["raw_path"]) == ""


@pytest.mark.parametrize("known", formats.FORMATS, ids=lambda known: str(known.NAME))
def test_no_format_takes_an_error_of_the_drive_for_the_files(
    known: formats.Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pydicom")
    pytest.importorskip("edfio")
    path = tmp_path / "file.xml"
    path.write_bytes(bytes(4096))

    def fail(*given: Any, **named: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for owner, name in ((Path, "stat"), (Path, "open"), (Path, "read_bytes"), (os, "open")):
        monkeypatch.setattr(owner, name, fail)
    with pytest.raises(InputError, match=r"file\.xml cannot be read: Input/output error"):
        known.read(path, "own/file")
    with pytest.raises(InputError, match=r"file\.xml cannot be read: Input/output error"):
        formats.identify(path)


# ---- disks, for real: mounts that nobody else sees


@pytest.fixture
def mounted() -> Iterator[Mounts]:
    with small_demo.mounts() as place:
        if place is None:
            pytest.skip("mounting needs root and util-linux's unshare and nsenter")
        yield place


def demo(place: Mounts, folder: Path, *words: str | Path, command: str = "run") -> Run:
    """A command on the small demo, its data directory on the disk `folder/disk`."""
    file = small_demo.write_pipelines(folder)
    more = ["--no-prefect"] if command == "run" else []
    data_dir = folder / "disk" / "data"
    given = small_demo.words(command, "small", "--pipelines", file, "--data-dir", data_dir, *more, *words)
    return Run(place.within(*given))


def fill(place: Mounts, disk: Path) -> None:
    filling = place.run("dd", "if=/dev/zero", f"of={disk}/filling", "bs=64k", check=False)
    assert "No space left" in filling.stderr


def test_a_full_disk_is_one_line_at_any_stage_and_with_more_room_the_run_goes_on(
    mounted: Mounts, tmp_path: Path, undisturbed: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted.run("mount", "-t", "tmpfs", "-o", "size=48m", "none", disk)
    seen = mounted.seen(disk)
    for stage in ("prepare", "pretrain", "evaluate"):
        run = demo(mounted, tmp_path)
        assert run.until(MOMENTS[stage]), run.errors()
        fill(mounted, disk)
        assert run.end() == 1, run.errors()
        line = run.one_line()
        assert "No space left on device" in line
        assert f"{disk}/data/" in line
        assert "run the same command again" in line
        left = {path.parent.name for path in half_made(seen / "data")}
        assert left <= ({stage} if stage == "pretrain" else set()), "training keeps its checkpoints"
        assert outputs(seen / "data").items() <= outputs(undisturbed).items()
        (seen / "filling").unlink()
    fill(mounted, disk)
    refused = demo(mounted, tmp_path)
    assert refused.end() == 1
    assert "No space left on device" in refused.one_line()
    mounted.run("mount", "-o", "remount,size=96m", disk)
    last = demo(mounted, tmp_path)
    assert last.end() == 0, last.errors()
    assert outputs(seen / "data") == outputs(undisturbed)
    assert (half_made(seen / "data"), locked(seen / "data")) == ([], [])
    states = [run.state for run in find_runs(seen / "data")]
    assert states[0] == "completed"
    assert set(states[1:]) <= {"failed", "killed"}


def test_a_data_directory_that_vanishes_is_one_line_and_nothing_is_made_below_it(
    mounted: Mounts, tmp_path: Path, undisturbed: Path
) -> None:
    disk, drive = tmp_path / "disk", tmp_path / "drive"
    disk.mkdir()
    shutil.copytree(undisturbed, drive / "data", symlinks=True)
    for stage in ("prepare", "finetune", "evaluate"):
        shutil.rmtree(drive / "data" / "stages" / stage)
    for stage in ("prepare", "finetune", "evaluate"):
        mounted.run("mount", "--bind", drive, disk)
        run = demo(mounted, tmp_path)
        assert run.until(MOMENTS[stage]), run.errors()
        mounted.run("umount", "--lazy", disk)
        assert run.end() == 2, run.errors()
        assert f"the data directory {disk}/data is not there any more" in run.one_line()
        assert not [path for path in disk.rglob("*") if path.is_file()], "files on the disk below"
    mounted.run("mount", "--bind", drive, disk)
    last = demo(mounted, tmp_path)
    assert last.end() == 0, last.errors()
    assert outputs(drive / "data") == outputs(undisturbed)
    assert (half_made(drive / "data"), locked(drive / "data")) == ([], [])


def test_a_raw_drive_that_vanishes_is_one_line_and_poisons_nothing(
    mounted: Mounts, tmp_path: Path, undisturbed: Path
) -> None:
    (made,) = (undisturbed / "stages" / "synthesize").glob("*/")
    shutil.copytree(made, tmp_path / "drive")
    (tmp_path / "drive" / "stage.json").unlink()
    for folder in ("disk", "raw"):
        (tmp_path / folder).mkdir()
    words = ["--raw", f"synthetic={tmp_path}/raw", "--only", "list", "--only", "prepare"]
    mounted.run("mount", "--bind", tmp_path / "drive", tmp_path / "raw")
    run = demo(mounted, tmp_path, *words)
    assert run.until(MOMENTS["prepare"]), run.errors()
    mounted.run("umount", "--lazy", tmp_path / "raw")
    assert run.end() == 2, run.errors()
    assert "is not there any more; is its drive still mounted?" in run.one_line()
    data_dir = tmp_path / "disk" / "data"
    assert [name.split()[0] for name in outputs(data_dir)] == ["list"]
    without = demo(mounted, tmp_path, *words)
    assert without.end() == 2
    assert f"the folder {tmp_path}/raw is empty" in without.one_line()
    mounted.run("mount", "--bind", tmp_path / "drive", tmp_path / "raw")
    last = demo(mounted, tmp_path, *words)
    assert last.end() == 0, last.errors()
    prepared = {name: files for name, files in outputs(data_dir).items() if name.startswith("prepare")}
    assert sorted(prepared.values(), key=str) == sorted(
        (files for name, files in outputs(undisturbed).items() if name.startswith("prepare")), key=str
    )


def test_on_a_read_only_data_directory_a_plan_and_a_run_without_work_still_work(
    mounted: Mounts, tmp_path: Path, undisturbed: Path
) -> None:
    (tmp_path / "disk").mkdir()
    mounted.run("mount", "--bind", undisturbed.parent, tmp_path / "disk")
    mounted.run("mount", "-o", "remount,bind,ro", tmp_path / "disk")
    plan = demo(mounted, tmp_path, command="plan")
    assert plan.end() == 0, plan.errors()
    assert len(plan.lines) == 1 + small_demo.STAGES - 1, "a line for the two slices"
    assert all(" cached " in line for line in plan.lines[1:])
    again = demo(mounted, tmp_path)
    assert again.end() == 0, again.errors()
    assert "up to date" in again.lines[0]
    run = demo(mounted, tmp_path, "--set", "splits.seed=3")
    assert run.end() == 2
    assert "the data directory cannot be written: [Errno 30] Read-only file system" in run.one_line()
    changed = demo(mounted, tmp_path, "--set", "splits.seed=3", command="plan")
    assert changed.end() == 0, changed.errors()


# ---- the record of a run, where the disk takes no more


def test_a_record_that_cannot_be_written_is_told_and_hides_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = runs_module._write

    def record(what: Callable[[], None]) -> None:
        walker = Walker(Store(tmp_path), lambda requests, group: [])
        with recorded_run(tmp_path, "test", CHALLENGE, walker, {}):
            monkeypatch.setattr(runs_module, "_write", full)
            what()

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse() -> None:
        raise InputError("a mistake")

    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/runs/test/"):
        record(lambda: None)
    monkeypatch.setattr(runs_module, "_write", written)
    with pytest.raises(InputError, match="a mistake"):
        record(refuse)
    assert [run.state for run in find_runs(tmp_path)] == ["killed", "killed"]
    assert not [run for run in find_runs(tmp_path) if small_demo.is_locked(run.directory / ".lock")]


@pytest.mark.parametrize("max_bytes", [1_000, 5_000])
def test_a_quota_is_one_line_and_leaves_nothing_half_made(raw: Path, tmp_path: Path, max_bytes: int) -> None:
    """No file may grow beyond `max_bytes`: for those who may not mount."""
    data_dir = tmp_path / "data"

    def run(limit: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flows.cli", "run", "challenge-2021-small", "--raw", f"physionet2021={raw}"]
        return subprocess.run(
            [*command, "--data-dir", str(data_dir), "--no-prefect", "--only", "list", "--only", "prepare"],
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )

    stopped = run(max_bytes)
    assert stopped.returncode == 1, stopped.stderr
    (line,) = stopped.stderr.splitlines()
    assert "File too large" in line
    assert "run the same command again" in line
    assert half_made(data_dir) == []
    kept = outputs(data_dir)
    again = run(100_000_000)
    assert again.returncode == 0, again.stderr
    assert kept.items() <= outputs(data_dir).items()
    assert len(outputs(data_dir)) == 4


# ---- Ctrl-C


def test_ctrl_c_is_one_line_at_any_moment_and_the_next_run_goes_on(tmp_path: Path, undisturbed: Path) -> None:
    data_dir = tmp_path / "data"
    command = ["run", "small", "--pipelines", small_demo.write_pipelines(tmp_path), "--data-dir", data_dir]
    for stage in ("prepare", "pretrain", "finetune", "evaluate"):
        run = Run(small_demo.words(*command, "--no-prefect"), mark=str(data_dir))
        assert run.until(MOMENTS[stage]), run.errors()
        time.sleep({"prepare": 1.0}.get(stage, 0.0))  # the workers are starting, or at work
        os.killpg(run.process.pid, signal.SIGINT)  # to all of a terminal's processes, as a terminal does
        pressed = time.monotonic()
        assert run.end() == 130, run.errors()
        assert run.one_line() == "stopped; nothing is lost: run the same command to go on"
        assert time.monotonic() - pressed < 20
        assert small_demo.wait_until_gone(str(data_dir), 5) == []
        assert {path.parent.name for path in half_made(data_dir)} <= {"pretrain", "finetune"}
        assert find_runs(data_dir)[0].state == "stopped"
    last = Run(small_demo.words(*command, "--no-prefect"))
    assert last.end() == 0, last.errors()
    assert outputs(data_dir) == outputs(undisturbed)
    assert (half_made(data_dir), locked(data_dir)) == ([], [])


def test_ctrl_c_while_the_program_is_still_starting_is_one_line() -> None:
    """All that is imported takes half a second, which is when one notices a mistake in what one typed."""
    stopped = 0
    for delay_s in (0.15, 0.2, 0.3, 0.4, 0.5, 0.7):
        started = subprocess.Popen(
            [sys.executable, "-m", "flows", "pipelines"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        time.sleep(delay_s)
        started.send_signal(signal.SIGINT)
        _, said = started.communicate(timeout=60)
        assert "Traceback" not in said
        assert len(said.splitlines()) <= 1
        early = started.returncode == -signal.SIGINT and not said  # before Python itself had begun
        assert early or started.returncode in (0, 130), said
        stopped += started.returncode == 130
    assert stopped
