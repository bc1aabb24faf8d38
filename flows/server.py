"""Which Prefect server a run goes to, and a local one to watch it in.

Nothing here imports prefect: looking for a server must not cost the two seconds that the import takes.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ecgfm.ecg import InputError
from ecgfm.files import writing_data_dir

START_PATIENCE_S = 120
_TEMPORARY = "ECGFM_TEMPORARY_SERVER"  # environment variable, set for the processes of a run

# python -c ... -m MODULE WORDS: the module as a program that ends when its parent does
_ENDS_WITH_US = """
import runpy, sys
from ecgfm.own_process import end_with_parent
end_with_parent()
module, sys.argv = sys.argv[2], sys.argv[2:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def configured_api(data_dir: Path) -> str | None:
    """The API that runs on this data directory go to: the user's own, else the one `ecgfm ui` started, else none."""
    return os.environ.get("PREFECT_API_URL") or _of_profile() or running_ui(data_dir)


def running_ui(data_dir: Path) -> str | None:
    """The API of the server that `ecgfm ui` runs on this data directory, if it answers."""
    facts = _facts(data_dir)
    return str(facts["api"]) if facts and answers(str(facts["api"])) else None


def use(api: str, data_dir: Path, debug: bool, temporary: bool = False) -> None:
    """Set this process up for a server, before prefect is imported. temporary: it is there for one run."""
    os.environ["PREFECT_API_URL"] = api
    if temporary:
        os.environ[_TEMPORARY] = "1"
    if "PREFECT_HOME" not in os.environ:
        os.environ["PREFECT_HOME"] = str(_made_home(data_dir))
    # the command line shows our own lines and one line for an error; the run's log has everything
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO" if debug else "CRITICAL")


def is_temporary() -> bool:
    """Whether the server that this process uses is there for one run alone: nothing is shared through it."""
    return _TEMPORARY in os.environ


def reports_address(data_dir: Path) -> str | None:
    """Where reports of this data directory are served: as ECGFM_REPORTS_URL says, else by `ecgfm ui`, else nowhere."""
    facts = _facts(data_dir)
    return os.environ.get("ECGFM_REPORTS_URL") or (str(facts["reports"]) if facts else None)


@dataclass(frozen=True)
class LocalServer:
    """A Prefect server on this machine. address: for a browser."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait(self) -> None:
        """Return never while the server is up.

        Raises:
            InputError: it ended by itself.
        """
        code = self.process.wait()
        raise InputError(f"the Prefect server at {self.address} ended with exit code {code}; see {self.log}")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def local_server(data_dir: Path, port: int) -> Iterator[LocalServer]:
    """A Prefect server while the context lasts.

    Raises:
        InputError: one runs already, the port is taken, or it does not come up.
    """
    if (api := running_ui(data_dir)) and (there := _facts(data_dir)):
        address = api.removesuffix("/api")
        raise InputError(f"a server for {data_dir} already runs at {address} (process {there['pid']})")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise InputError(f"port {port} is taken; choose another with --port")
    home = _made_home(data_dir)
    facts = home / "server.json"
    try:
        with _server(home, port, {}, ["-m", "prefect", "server", "start"]) as started, _reports(data_dir) as reports:
            found = {"api": f"{started.address}/api", "pid": started.process.pid, "reports": reports}
            facts.write_text(json.dumps(found))
            yield started
    finally:
        facts.unlink(missing_ok=True)


@contextmanager
def temporary_server(data_dir: Path) -> Iterator[str]:
    """The API of a server without UI for one run. It ends with this process, however that ends, which Prefect's own
    temporary server does not.

    Its database is that of `ecgfm ui`, which shows the run later.

    Raises:
        InputError: it does not come up.
    """
    ephemeral = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"}  # no scheduler either
    app = ["--factory", "prefect.server.api.server:create_app", "--log-level", "error"]
    with _server(_made_home(data_dir), free_port(), ephemeral, ["-m", "uvicorn", *app]) as started:
        yield f"{started.address}/api"


@contextmanager
def _reports(data_dir: Path) -> Iterator[str]:
    """The reports of a data directory, and nothing else of it, for a browser on this machine: a page that came from a
    server may not open files. Yields the address of the data directory."""

    class Reports(SimpleHTTPRequestHandler):
        def send_head(self) -> Any:
            if not self.path.endswith("/report.html"):
                return self.send_error(404, "only reports are served")
            return super().send_head()

        def log_message(self, format: str, *values: Any) -> None:
            """Requests are nobody's business."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Reports, directory=str(data_dir))) as reports:
        threading.Thread(target=reports.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{reports.server_port}"
        finally:
            reports.shutdown()


@contextmanager
def _server(home: Path, port: int, settings: Mapping[str, str], command: Sequence[str]) -> Iterator[LocalServer]:
    """A server process of this machine in a group of its own, which ends with this process."""
    address = f"http://127.0.0.1:{port}"
    # the UI asks the address it was told, whatever port the server has
    ours = {"PREFECT_HOME": str(home), "PREFECT_SERVER_UI_API_URL": f"{address}/api", "PREFECT_API_URL": ""}
    environment = {name: value for name, value in {**os.environ, **ours, **settings}.items() if value}
    log = home / "server.log"
    words = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "ab") as output:
        server = subprocess.Popen(
            [sys.executable, "-c", _ENDS_WITH_US, *words],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        _wait_until_up(server, f"{address}/api", log)
        yield LocalServer(address, server, log)
    finally:
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _wait_until_up(server: subprocess.Popen[bytes], api: str, log: Path) -> None:
    deadline = time.monotonic() + START_PATIENCE_S
    while not answers(api):
        if server.poll() is not None:
            raise InputError(f"the Prefect server ended with exit code {server.returncode}; see {log}")
        if time.monotonic() > deadline:
            raise InputError(f"the Prefect server did not answer within {START_PATIENCE_S} s; see {log}")
        time.sleep(0.3)


def answers(api: str) -> bool:
    """Whether a server is at an address; False for what is no address, too."""
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, ValueError, http.client.HTTPException):
        return False


def _home(data_dir: Path) -> Path:
    return data_dir / "prefect"


def _facts(data_dir: Path) -> dict[str, Any] | None:
    """What `local_server` wrote of the server that it runs."""
    try:
        facts: dict[str, Any] = json.loads((_home(data_dir) / "server.json").read_bytes())
    except FileNotFoundError:
        return None
    return facts


def _made_home(data_dir: Path) -> Path:
    home = _home(data_dir)
    with writing_data_dir():
        home.mkdir(parents=True, exist_ok=True)
    return home


def _of_profile() -> str | None:
    """PREFECT_API_URL of the user's active Prefect profile."""
    home = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect"))
    try:
        profiles = tomllib.loads((home / "profiles.toml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{home / 'profiles.toml'}: not TOML: {error}") from error
    active = os.environ.get("PREFECT_PROFILE") or profiles.get("active")
    url = profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")
    return str(url) if url else None
