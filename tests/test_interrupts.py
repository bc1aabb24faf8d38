"""Ctrl-C at a place where Python would lose it, or leave something half done."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import polars as pl
import pytest

from ecgfm.interrupts import is_delicate

HEAD = """
import multiprocessing.util, signal, sys, time, weakref
from ecgfm.interrupts import hear_interrupts

class Thing: ...

def press(times=1):
    for _ in range(times):
        signal.raise_signal(signal.SIGINT)
    [0 for _ in range(10)]  # here Python looks for signals

def finalized():
    thing = Thing()
    weakref.finalize(thing, press)

class Tidied:
    def __del__(self):
        press(3)

class SlowlyTidied:
    def __del__(self):
        press()
        time.sleep(100)

def closed():
    def lines():
        try:
            yield 1
        finally:
            press()
    next(lines())

def called_back(what=press):
    global watched
    thing = Thing()
    watched = weakref.ref(thing, lambda _: what())

def unlinked():
    thing = Thing()
    multiprocessing.util.Finalize(thing, press)

hear_interrupts()
try:
    WHAT()
    print("went on")
    time.sleep(100)
except KeyboardInterrupt:
    print("heard")
"""


def run(what: str, **options: object) -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(HEAD).replace("WHAT", what)
    return subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60, **options
    )  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("what", ["finalized", "Tidied", "SlowlyTidied", "closed", "called_back", "unlinked"])
def test_where_nothing_can_be_raised_it_is_raised_a_moment_later(what: str) -> None:
    done = run(what)
    assert (done.stdout, done.stderr) == ("went on\nheard\n", "")


def test_elsewhere_it_is_raised_at_once() -> None:
    done = run("press")
    assert (done.stdout, done.stderr) == ("heard\n", "")


def test_what_is_ignored_stays_so() -> None:
    """As of a program started with nohup, or in the background by a script."""
    done = run(
        "(lambda: (press(), print('ignored'), sys.exit()))",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert (done.stdout, done.stderr) == ("ignored\n", "")


def test_other_mistakes_of_a_finalizer_are_told_as_ever() -> None:
    done = run("(lambda: (called_back(lambda: int('x')), press()))")
    assert done.stdout == "heard\n"
    assert "ValueError" in done.stderr


def test_what_polars_calls_is_not_interrupted() -> None:
    """It would panic: a worker's SIGTERM, unlike Ctrl-C, it knows nothing of."""
    found = []
    pl.DataFrame({"a": [1]}).map_rows(lambda row: found.append(is_delicate(sys._getframe())) or row)
    assert (found[0], is_delicate(sys._getframe())) == (True, False)
