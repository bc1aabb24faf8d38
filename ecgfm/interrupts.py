"""Ctrl-C is one clean end at any moment, also while Python starts a process or tidies up after an object."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

_DELICATE_MODULES = {
    "weakref",
    "_weakrefset",
    "multiprocessing.popen_spawn_posix",  # a worker is there, and has not got yet what it needs
    "multiprocessing.resource_tracker",
    "multiprocessing.util",  # what unlinks semaphores, and calls what else was left for the end
}
_DELICATE_FUNCTIONS = {"__del__", "_execute_child"}
_DELICATE_PACKAGES = ("polars.",)  # it calls some of its own Python from Rust, and panics where that raises
_PAUSE_S, _MOST_PAUSES = 0.05, 20  # a delicate place that takes longer than a second is left after all


def hear_interrupts() -> None:
    """From now on Ctrl-C (SIGINT) raises KeyboardInterrupt in the main thread a moment later where Python would lose it
    with a traceback, as in a finalizer, or where it would leave a process half started.

    To be called once, in the main thread, of a program. Where SIGINT is ignored or handled already, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handler = _Handler()
        signal.signal(signal.SIGINT, handler)
        when_swallowed(KeyboardInterrupt, handler.again)


def when_swallowed(kind: type[BaseException], act: Callable[[], None]) -> None:
    """From now on call `act` where Python, tidying up, could not raise such an exception and would only print it."""

    def unraisable(what: sys.UnraisableHookArgs) -> None:
        if what.exc_type is kind:
            act()
        else:
            sys.__unraisablehook__(what)

    sys.unraisablehook = unraisable


class _Handler:
    """Of SIGINT: raises KeyboardInterrupt, unless it is better not to do so here, or not yet."""

    def __init__(self) -> None:
        self._main_thread = threading.get_ident()
        self._pauses = 0
        self._comes_again = False

    def __call__(self, _number: int, frame: FrameType | None) -> None:
        if self._pauses < _MOST_PAUSES and is_delicate(frame):
            self._pauses += 1
            self.again()
            return
        self._pauses = 0
        raise KeyboardInterrupt

    def again(self) -> None:
        """The same signal a moment later, once, however often it came, from a thread that takes no lock to start: the
        main one may hold any."""
        if not self._comes_again:
            self._comes_again = True
            _thread.start_new_thread(self._send, ())

    def _send(self) -> None:
        time.sleep(_PAUSE_S)
        self._comes_again = False
        signal.pthread_kill(self._main_thread, signal.SIGINT)


def is_delicate(frame: FrameType | None) -> bool:
    """Whether this frame, or one that called it, is of what is better not left half done."""
    while frame:
        module = str(frame.f_globals.get("__name__"))
        if module in _DELICATE_MODULES or module.startswith(_DELICATE_PACKAGES):
            return True
        if frame.f_code.co_name in _DELICATE_FUNCTIONS:
            return True
        frame = frame.f_back
    return False
