"""The console script, and `python -m flows`. Ctrl-C is looked after before half a second of imports begins."""

from __future__ import annotations

import os
import signal
import sys
import threading


def main() -> None:
    """The command line; see cli.py."""
    sys.unraisablehook = _heard
    try:
        from flows.cli import app

        app()
    except KeyboardInterrupt:  # before a command has begun; the rest is said by it
        print("stopped; nothing was begun", file=sys.stderr, flush=True)
        os._exit(130)  # sys.exit may end in SIGINT's own exit code: Python remembers an interrupted `exec`


def _heard(unraisable: sys.UnraisableHookArgs) -> None:
    """Ctrl-C that came while Python was tidying up, where no exception can be raised, comes again a moment later.

    Once in some fifty times it would otherwise be lost, with a traceback and no other effect.
    """
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)
        return
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    again = threading.Timer(0.05, signal.pthread_kill, (main_thread, signal.SIGINT))
    again.daemon = True
    again.start()


if __name__ == "__main__":
    main()
