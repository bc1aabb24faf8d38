"""A call in a process group of its own: training is never forked from the process that orchestrates it.

The group ends with its parent, even one killed with SIGKILL. What it prints comes back line by line; what it tells
(`tell`) comes back as facts; its progress bars go to the terminal, where there is one.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ecgfm.ecg import InputError
from ecgfm.files import DISK_ERRORS

CHILD = "import sys, pathlib, ecgfm.own_process as own; sys.exit(own.obey(pathlib.Path(sys.argv[1])))"
PATIENCE_S = 30.0  # from SIGTERM to SIGKILL: a large checkpoint takes a while to be on the disk

_LISTENED_TO = "ECGFM_LISTENED_TO"  # environment variable: the parent reads what `tell` prints
_FACTS = "\x1efacts "  # what a line of facts begins with; no line of a log does

Facts = Mapping[str, Any]


class ProcessFailed(RuntimeError):
    """The process crashed or was killed. What it printed came back before."""


def call(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    on_line: Callable[[str], None],
    on_facts: Callable[[Facts], None] | None = None,
) -> Any:
    """What `function(*arguments)`, all of it picklable, gives in a new process group.

    on_line: gets every line that it prints; on_facts: gets what it tells

    Raises:
        InputError: as the function raised it; OSError: as well, one of `files.DISK_ERRORS`.
        ProcessFailed: the process crashed or was killed.
    """
    with tempfile.TemporaryDirectory(prefix="ecgfm-") as scratch:
        order = Path(scratch) / "order.pickle"
        order.write_bytes(pickle.dumps((function, arguments)))
        child = subprocess.Popen(
            [sys.executable, "-u", "-c", CHILD, str(order)],  # unbuffered: lines come when they are printed
            stdin=subprocess.PIPE,  # closes when this process dies, however it dies: see `obey`
            stdout=subprocess.PIPE,
            stderr=None if sys.stderr.isatty() else subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, _LISTENED_TO: "1"} if on_facts else None,
            start_new_session=True,
        )
        last = ""
        # Polars, from its first query on, handles SIGINT such that a wait goes on after it: Python would hear of Ctrl-C
        # when the next line comes, minutes later. This undoes that, and leaves the handlers.
        signal.siginterrupt(signal.SIGINT, True)
        try:
            for line in child.stdout or ():
                if not line.startswith(_FACTS):
                    last = line.rstrip() or last
                    on_line(line.rstrip())
                elif on_facts:
                    on_facts(json.loads(line.removeprefix(_FACTS)))
            code = child.wait()
        except KeyboardInterrupt:
            on_line("stopping")
            _end_group(child)
            for line in child.stdout or ():  # where it goes on from
                if not line.startswith(_FACTS):
                    on_line(line.rstrip())
            raise
        except BaseException:
            _end_group(child)
            raise
        if _answer(order).exists():
            result, error = pickle.loads(_answer(order).read_bytes())
            if error:
                raise error
            if not code:
                return result
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    raise ProcessFailed(f"its process {how}{f': {last}' if last else ''}")


def tell(facts: Facts) -> None:
    """In a process that was called: facts for its parent, such as how far it is. Nothing where none listens."""
    if is_listened_to():
        sys.stdout.write(f"{_FACTS}{json.dumps(facts)}\n")
        sys.stdout.flush()


def is_listened_to() -> bool:
    """Whether anyone reads what this process tells."""
    return _LISTENED_TO in os.environ


def obey(order: Path) -> int:
    """In the new process: what `call` wrote down; ends when the caller ends."""
    end_with_parent()
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("ecgfm").setLevel(logging.INFO)
    function, arguments = pickle.loads(order.read_bytes())
    result = failure = None
    try:
        result = function(*arguments)
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
            raise
        failure = error
    _answer(order).write_bytes(pickle.dumps((result, failure)))
    return 2 if failure else 0


def _answer(order: Path) -> Path:
    """Where the result lies, or an error that is the caller's to hear."""
    return order.with_suffix(".answer")


def end_with_parent() -> None:
    """From now on end this process group once standard input closes: the parent, which holds its other end, is gone."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)
        os.killpg(0, signal.SIGTERM)
        time.sleep(PATIENCE_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _end_group(child: subprocess.Popen[str]) -> None:
    """SIGTERM to a process group, so that a trainer can save; SIGKILL to what is left after a while."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE_S)
        os.killpg(child.pid, signal.SIGKILL)  # also those that outlive the one that was waited for
    child.wait()
