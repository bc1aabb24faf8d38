"""Work on several cores: results in order, memory bounded, processes that end with their parent.

Processes are spawned, not forked: HDF5, BLAS and an orchestrator's threads do not survive a fork.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import TypeVar

from ecgfm.config import PROGRESS_BAR
from ecgfm.interrupts import is_delicate, when_swallowed

Item = TypeVar("Item")
Result = TypeVar("Result")

_KEPT_BYTES, _LARGE_BYTES = 1 << 26, 1 << 25  # kept at most; larger ones are given back still

RECORDS_PER_PROCESS = 2000  # a process takes about as long to start as to prepare so many


PATIENCE_S, LOOK_S = 10.0, 0.05  # until a worker that was told to end is killed; how often it is told


class WorkerDied(RuntimeError):
    """A worker process ended without an answer: killed, or out of memory."""


def worthwhile(n_records: int, most: int) -> int:
    """How many processes so many records are worth; `most` 0: at most one per core."""
    return max(1, min(most or os.cpu_count() or 1, n_records // RECORDS_PER_PROCESS))


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map(function, items)` by `workers` processes; with one, in this process.

    Results come in the order of the items. Items are taken as room is made, so that of an endless iterable only a few
    are in memory. After an error the items that are being worked on are finished; when this process is stopped, or
    nobody wants the rest, they are given up at once.

    Raises:
        WorkerDied: a process was killed.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    context = multiprocessing.get_context("spawn")
    told, tell = context.Pipe(duplex=False)  # that it closes tells the workers to end
    with told, tell, ProcessPoolExecutor(workers, context, _be_one_of_several, (told,)) as pool:
        signal.siginterrupt(signal.SIGINT, True)  # a wait for results ends with Ctrl-C: see own_process.call
        try:
            for item in items:
                with _interrupts_left_to_this_process():  # a worker is started when there is work for it
                    waiting.append(pool.submit(_work, function, item))
                if len(waiting) > 2 * workers:
                    yield _first(waiting)
            while waiting:
                yield _first(waiting)
        except (BrokenProcessPool, _Ended) as error:
            raise WorkerDied(
                "a worker process was killed; was there enough memory? (And is what a script of your own calls under "
                "`if __name__ == '__main__':`? Workers import it.)"
            ) from error
        except BaseException as error:
            if waiting:
                pool.shutdown(wait=False, cancel_futures=True)
                if not isinstance(error, Exception):
                    tell.close()
            raise


def settle_memory() -> None:
    """Before work on many arrays: let this process use the memory that it frees again, in place of giving it back, and
    look for garbage in circles less often, not at all among what is imported by now.

    An array above 128 KB is given back by default, and the next one comes as new pages, which the system clears one by
    one: a fifth of the time that a recording of 10 s takes to prepare. With glibc alone (M_TRIM_THRESHOLD and
    M_MMAP_THRESHOLD of mallopt(3)); another C library has ways of its own.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, _KEPT_BYTES)
        mallopt(-3, _LARGE_BYTES)
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _first(waiting: deque[Future[Result]]) -> Result:
    """The result that is due; until it is there it stays among those that are waited for."""
    result = waiting[0].result()
    waiting.popleft()
    return result


@contextmanager
def _interrupts_left_to_this_process() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal: one that is started here never sees it, and ends when it is told."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Ended(BaseException):
    """This worker is to end: what it was doing cleans up behind itself."""


_at_work, _ending = threading.Event(), threading.Event()  # of a worker


def _work(function: Callable[[Item], Result], item: Item) -> Result:
    _at_work.set()
    try:
        if _ending.is_set():  # the next item was there already
            raise _Ended
        return function(item)
    finally:
        _at_work.clear()


def _end(_number: int, frame: FrameType | None) -> None:
    """On SIGTERM, which comes again and again: out of what this worker is doing, then out of the process."""
    if not _at_work.is_set():
        os._exit(1)  # nothing is begun; of an exception while it is being set up, the pool would print a traceback
    if not _ending.is_set() and not is_delicate(frame):
        _ending.set()
        raise _Ended


def _be_one_of_several(told: Connection) -> None:
    """In a worker: numerical libraries take one core, the parent shows one progress bar for all, and this process
    ends when that one does, however it ends, or closes the other end of `told`."""
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    settle_memory()
    PROGRESS_BAR["disable"] = True
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a worker that is ended would leave behind
    threadpool_limits(1)  # BLAS is loaded by now, and reads no variable any more
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
        os.environ[variable] = "1"
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        if sentinel not in wait([sentinel, told]):
            for _ in range(int(PATIENCE_S / LOOK_S)):
                if wait([sentinel], LOOK_S):
                    break
                os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGKILL)

    when_swallowed(_Ended, _ending.clear)  # the next SIGTERM raises it again
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=watch, daemon=True).start()
