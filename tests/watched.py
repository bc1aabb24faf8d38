"""A data directory and a real local server that its runs go to, seen through the server's API as the UI sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import server


@dataclass
class Watched:
    """A data directory and the server that its runs go to."""

    data_dir: Path
    api: str

    def start(self, *words: str) -> subprocess.Popen[str]:
        """`ecgfm run demo` in a process of its own."""
        return self.command("run", "demo", *words)

    def command(self, *words: str) -> subprocess.Popen[str]:
        """An `ecgfm` command on the data directory, in a process group of its own."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *words, "--data-dir", str(self.data_dir)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The same, to its end."""
        started = self.start(*words)
        out, errors = started.communicate()
        return subprocess.CompletedProcess(started.args, started.returncode, out, errors)

    def ask(self, path: str, question: dict[str, Any] | None = None) -> Any:
        """One call of the server's API."""
        body = None if question is None else json.dumps(question).encode()
        request = urllib.request.Request(self.api + path, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def newest_run(self, name: str = "demo") -> dict[str, Any]:
        """The flow run that started last."""
        question = {"sort": "START_TIME_DESC", "limit": 1, "flow_runs": {"name": {"any_": [name]}}}
        (found,) = self.ask("/flow_runs/filter", question)
        return dict(found)

    def page(self, key: str) -> dict[str, Any]:
        """The newest artifact of a key."""
        (found,) = self.ask("/artifacts/latest/filter", {"artifacts": {"key": {"any_": [key]}}})
        return dict(found)

    def states(self, flow_run: str, expected: int) -> dict[str, str]:
        """Task run -> state name. The server records them from events, a little after the fact."""
        for _ in range(100):
            runs = self.ask("/task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}})
            states = {run["name"]: run["state_name"] for run in runs}
            if len(states) >= expected and not {"Running", "Pending"} & set(states.values()):
                return states
            time.sleep(0.2)
        raise AssertionError(f"expected {expected} task runs, found {states}")


@contextmanager
def watched_runs(data_dir: Path) -> Iterator[Watched]:
    """A server on a free port while the context lasts."""
    with server.local_server(data_dir, server.free_port()) as local:
        yield Watched(data_dir, f"{local.address}/api")
