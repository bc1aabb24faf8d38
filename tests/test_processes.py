"""Work on several cores."""

from __future__ import annotations

import multiprocessing.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecgfm.processes import RECORDS_PER_PROCESS, WorkerDied, ordered_map, worthwhile


def slow_square(number: int) -> int:
    time.sleep(0.05 if number % 3 == 0 else 0)  # so that they end in another order
    return number * number


def process_of(number: int) -> int:
    return os.getpid()


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end_myself(number: int) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)


def fail(number: int) -> None:
    raise ValueError(f"item {number}")


def mark_the_end(folder: Path) -> int:
    def mark() -> None:
        time.sleep(0.2)
        (folder / str(os.getpid())).touch()

    multiprocessing.util.Finalize(None, mark, exitpriority=1)
    return os.getpid()


def blas_threads(number: int) -> list[int]:
    from threadpoolctl import threadpool_info

    return [pool["num_threads"] for pool in threadpool_info()]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    assert list(ordered_map(slow_square, range(12), workers)) == [number * number for number in range(12)]


def test_several_workers_are_other_processes_and_one_is_this(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(ordered_map(process_of, range(4), 1)) == {os.getpid()}
    assert os.getpid() not in set(ordered_map(process_of, range(4), 2))


def test_workers_end_as_they_like_also_when_nobody_asks_for_more_than_there_is(tmp_path: Path) -> None:
    workers = {pid for _, pid in zip(range(4), ordered_map(mark_the_end, [tmp_path] * 4, 2), strict=False)}
    assert {int(path.name) for path in tmp_path.iterdir()} == workers


@pytest.mark.parametrize("workers", [1, 2])
def test_few_items_are_taken_ahead(workers: int) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while True:  # endless: taking all would never end
            taken += 1
            yield taken

    results = ordered_map(slow_square, items(), workers)
    assert [next(results) for _ in range(3)] == [1, 4, 9]
    assert taken <= 3 + 2 * workers + 1
    results.close()


def test_an_error_in_a_worker_is_raised_here() -> None:
    with pytest.raises(ValueError, match="item 0"):
        list(ordered_map(fail, range(3), 2))


def test_a_killed_worker_is_told() -> None:
    with pytest.raises(WorkerDied, match="killed"):
        list(ordered_map(die, range(3), 2))


def test_numerical_libraries_take_one_core_in_a_worker() -> None:
    threads = list(ordered_map(blas_threads, range(2), 2))
    assert threads[0]
    assert {count for counts in threads for count in counts} == {1}


def test_workers_are_worth_their_start() -> None:
    assert worthwhile(0, 0) == 1
    assert worthwhile(2 * RECORDS_PER_PROCESS - 1, 8) == 1
    assert worthwhile(3 * RECORDS_PER_PROCESS, 8) == 3
    assert worthwhile(10**6, 4) == 4
    assert worthwhile(10**6, 0) == os.cpu_count()


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(
        "import time, os\n"
        "from pathlib import Path\n"
        "from ecgfm.processes import ordered_map\n"
        "def work(number):\n"
        "    Path(f'worker-{os.getpid()}').touch()\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    list(ordered_map(work, range(2), 2))\n"
    )
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("worker-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    workers = [int(path.name.removeprefix("worker-")) for path in tmp_path.glob("worker-*")]
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


STOPPED = """
import os, sys, threading, time
from pathlib import Path
import polars as pl
from ecgfm.interrupts import hear_interrupts
from ecgfm.processes import ordered_map
class Tidied:
    def __del__(self):  # no exception comes out of it
        time.sleep(3)
def work(number):
    scratch = Path(f"scratch-{os.getpid()}")
    scratch.touch()
    try:
        if "tidying" in sys.argv:
            Tidied()
        time.sleep(60)
    finally:
        scratch.unlink()
if __name__ == "__main__":
    hear_interrupts()
    pl.DataFrame({"a": [1]}).lazy().select("a").collect()  # from here on SIGINT is handled by Polars first
    try:
        list(ordered_map(work, range(6), 2))
    except KeyboardInterrupt:
        print("stopped")
        sys.exit(130)
"""


@pytest.mark.parametrize("doing", ["working", "tidying", "starting"])
def test_ctrl_c_ends_the_workers_at_once_and_they_say_nothing(tmp_path: Path, doing: str) -> None:
    """Sent to every process of the terminal, as a terminal does."""
    (tmp_path / "parent.py").write_text(STOPPED)
    parent = subprocess.Popen(
        [sys.executable, "parent.py", doing],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    begun = 0 if doing == "starting" else 2
    while len(children := list_children(parent.pid)) < 2 or len(list(tmp_path.glob("scratch-*"))) < begun:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(parent.pid, signal.SIGINT)
    stdout, stderr = parent.communicate(timeout=30)
    assert (parent.returncode, stdout, stderr) == (130, "stopped\n", "")
    assert not list(tmp_path.glob("scratch-*")), "they clean up behind themselves"
    assert children
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def list_children(pid: int) -> list[int]:
    """The workers of a process; not the one that keeps track of its semaphores."""
    children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_a_worker_that_is_ended_by_somebody_is_told() -> None:
    with pytest.raises(WorkerDied, match="killed"):
        list(ordered_map(end_myself, range(3), 2))
