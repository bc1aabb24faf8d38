"""The console script, and `python -m flows`. Ctrl-C is looked after before half a second of imports begins."""

from __future__ import annotations

import os
import sys

from ecgfm.interrupts import hear_interrupts


def main() -> None:
    """The command line; see cli.py."""
    hear_interrupts()
    try:
        from flows.cli import app

        app()
    except KeyboardInterrupt:  # before a command has begun; the rest is said by it
        print("stopped; nothing was begun", file=sys.stderr, flush=True)
        os._exit(130)  # sys.exit may end in SIGINT's own exit code: Python remembers an interrupted `exec`


if __name__ == "__main__":
    main()
