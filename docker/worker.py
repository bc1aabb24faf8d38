"""What a worker's container runs: `worker.py COMMAND...`, so that `docker stop` lets a training save.

Prefect's worker, told to stop, kills its runs and is gone within two seconds. A training notices that and saves, but a
container ends with its first process, and everything else in it is killed. So here the runs are told first, which end
as Crashed, with their trainings saved; then the worker; and this process ends when nothing that it started is left.
`stop_grace_period` of compose.yaml is longer than a training may take to save.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

LOOK_S = 0.2
_PR_SET_CHILD_SUBREAPER = 36  # prctl(2): what loses its parent becomes a child of this process


def main(command: Sequence[str]) -> int:
    """Run the command until it ends by itself or SIGTERM or SIGINT comes; returns its exit code."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    worker = os.posix_spawnp(command[0], [*command], os.environ, setsigdef=[signal.SIGTERM, signal.SIGINT])
    codes: dict[int, int] = {}
    told: set[int] = set()
    while worker not in codes and not stop.wait(LOOK_S):
        _bury(codes)
    pause = threading.Event()
    while worker not in codes:
        runs = _children(worker)
        for process in runs - told or ({worker} - told if not runs else ()):
            with suppress(ProcessLookupError):  # it ended just now
                os.kill(process, signal.SIGTERM)
            told.add(process)
        pause.wait(LOOK_S)
        _bury(codes)
    with suppress(ChildProcessError):  # nothing is left
        while True:
            os.wait()
    return codes[worker]


def _bury(codes: dict[int, int]) -> None:
    """Note the exit codes of the children that have ended."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])


def _children(process: int) -> set[int]:
    """The processes that a process started and that have not ended."""
    threads = Path(f"/proc/{process}/task").glob("*/children")
    with suppress(FileNotFoundError, ProcessLookupError):
        return {int(child) for thread in threads for child in thread.read_text().split()}
    return set()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.exit(code if code >= 0 else 128 - code)
