"""Cancel in the UI, for runs of the command line. Those of servers and workers have a runner that sees to it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import httpx
from prefect import get_client
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext

LOOK_S = 3.0  # how often the server is asked
_RUNNERS = "PREFECT__FLOW_RUN_ID"  # environment variable: set for the process of a run by the runner that started it


class CancelledInUI(BaseException):
    """Somebody cancelled the run. No Exception: nothing on the way may take it for an error of its own."""


@contextmanager
def cancellable() -> Iterator[None]:
    """Within a flow, in the main thread: ask the server now and then whether the run is to be cancelled.

    Raises:
        CancelledInUI: it is.
    """
    context = FlowRunContext.get()
    if _RUNNERS in os.environ or context is None or context.flow_run is None:
        yield
        return
    run, over = context.flow_run.id, threading.Event()

    def watch() -> None:
        with get_client(sync_client=True) as client:
            while not over.wait(LOOK_S):
                try:
                    state = client.read_flow_run(run).state
                except httpx.HTTPError:  # a server that is away cancels nothing
                    continue
                if state and state.type in (StateType.CANCELLING, StateType.CANCELLED):
                    os.kill(os.getpid(), signal.SIGUSR1)
                    return

    def stop(number: int, frame: FrameType | None) -> None:
        if not over.is_set():
            raise CancelledInUI("cancelled in the UI")

    before = signal.signal(signal.SIGUSR1, stop)
    threading.Thread(target=watch, name="cancel", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.signal(signal.SIGUSR1, before)
