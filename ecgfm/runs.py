"""One execution of a pipeline: what it used and is using, links to it, the resolved config, the log, how it ended.

A run links what it is about to use before it looks for it, so that nobody removes it meanwhile; a link that leads
nowhere is a stage that the run did not finish. While it goes on it holds a lock, which the kernel drops when its
process dies.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from ecgfm.config import Pipeline, to_dict
from ecgfm.ecg import InputError
from ecgfm.files import writing_data_dir
from ecgfm.pipeline import Selection, Walker, make_all, walk
from ecgfm.stages import Output, Request, Store

FACTS = "run.json"
LOCK = ".lock"


@dataclass(frozen=True)
class Run:
    """A run as it lies in a data directory.

    state: `running`, `completed`, `failed`, `killed` (it ended without a word)
    facts: what `run.json` says: `raw`, `process`, `host`, `error`, `stages` (name, key, status, why, seconds)
    """

    directory: Path
    pipeline: str
    state: str
    started_at: str
    seconds: float | None
    kept: bool
    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        """`<pipeline>/<time>`, as a person names it."""
        return f"{self.pipeline}/{self.directory.name}"

    def uses(self) -> set[str]:
        """What the run made, used or is about to use: `<stage>/<key>`."""
        found = set()
        for folder, _, _ in os.walk(self.directory):
            with os.scandir(folder) as entries:
                found |= {"/".join(Path(os.readlink(e.path)).parts[-2:]) for e in entries if e.is_symlink()}
        return {place for place in found if not place.endswith("/report.html")}


def find_runs(data_dir: Path, pipeline: str | None = None) -> list[Run]:
    """The runs of a data directory, newest first; those of one pipeline.

    Raises:
        InputError: a run's facts cannot be read.
    """
    folders = (data_dir / "runs").glob(f"{pipeline or '*'}/[0-9]*/")
    found = [_read(folder) for folder in folders if (folder / FACTS).is_file()]
    return sorted(found, key=lambda run: (run.started_at, run.name), reverse=True)


@contextmanager
def recorded_run(
    data_dir: Path, pipeline: str, config: Pipeline, walker: Walker, raw: Mapping[str, Path]
) -> Iterator[Path]:
    """Around one walk: `runs/<pipeline>/<time>/` with its config, its log and links to what it uses.

    `runs/<pipeline>/latest` points at the newest that ended. Links are relative, so that a data directory can be moved.
    """
    started, started_at = time.monotonic(), _now()
    with writing_data_dir():
        run = _new_directory(data_dir / "runs" / pipeline)
        lock = open(run / LOCK, "w")  # noqa: SIM115 - closed below
    fcntl.flock(lock, fcntl.LOCK_EX)
    facts: dict[str, Any] = {
        "pipeline": pipeline,
        "state": "running",
        "started_at": started_at,
        "host": platform.node(),
        "process": os.getpid(),
        "raw": {source: str(folder) for source, folder in raw.items()},
        "selection": {name: value for name, value in vars(walker.selection).items() if value},
        "stages": [],
    }
    _write(run, facts)
    (run / "config.yaml").write_text(yaml.safe_dump({pipeline: to_dict(config)}, sort_keys=False), encoding="utf-8")
    log = logging.FileHandler(run / "log.txt", encoding="utf-8")
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("ecgfm").addHandler(log)

    def claim(requests: Sequence[Request]) -> None:
        with walker.store.claiming():
            for request in requests:
                _link(_link_of(run, request), walker.store.place(request))

    walker.claim = claim
    try:
        yield run
        facts["state"] = "completed"
    except BaseException as error:
        facts |= {"state": "failed", "error": " ".join(str(error).split()) or type(error).__name__}
        raise
    finally:
        logging.getLogger("ecgfm").removeHandler(log)
        log.close()
        for request, output in walker.made:
            if isinstance(output, Output):
                facts["stages"].append(_came_of(request, output, walker.reasons.get(request.name, "")))
                if "report.html" in output.files:
                    _link(run / "report.html", output.directory / "report.html")
            else:  # not selected, and not there
                _link_of(run, request).unlink(missing_ok=True)
        _write(run, facts | {"ended_at": _now(), "seconds": round(time.monotonic() - started, 3)})
        _point_latest_at(run)
        lock.close()


def run_locally(
    name: str, pipeline: Pipeline, raw: Mapping[str, Path], store: Store, selection: Selection, hash_raw: bool = False
) -> Path:
    """Run a pipeline in this process (training in processes of its own), without Prefect.

    Returns the directory that records the run.

    Raises:
        InputError: the pipeline's runner needs Prefect; or as a stage raises.
    """
    if pipeline.runner.kind != "local":
        raise InputError(f"runner {pipeline.runner.kind} needs Prefect: leave --no-prefect out, or --set runner=local")
    walker = Walker(store, lambda requests, group: make_all(pipeline, store, selection, requests, group), selection)
    with recorded_run(store.data_dir, name, pipeline, walker, raw) as directory:
        walk(pipeline, raw, walker, hash_raw)
    return directory


def report_of(data_dir: Path, pipeline: str, evaluated: Path) -> Path:
    """Where the report of an evaluation lies: in the newest run that it belongs to, else in its output directory."""
    report = evaluated / "report.html"
    runs = sorted((data_dir / "runs" / pipeline).glob("[0-9]*/report.html"), reverse=True)
    return next((link for link in runs if link.exists() and link.samefile(report)), report)


def _read(directory: Path) -> Run:
    try:
        facts = json.loads((directory / FACTS).read_bytes())
    except ValueError as error:
        raise InputError(f"{directory / FACTS}: not JSON ({error}); remove {directory}") from error
    state = facts["state"]
    if state == "running" and not _is_going_on(directory):
        state = "killed"
    kept = (directory / "keep").exists()
    return Run(directory, facts["pipeline"], state, facts["started_at"], facts.get("seconds"), kept, facts)


def _is_going_on(run: Path) -> bool:
    """Whether a process holds the run's lock."""
    try:
        with open(run / LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _came_of(request: Request, output: Output, why: str) -> dict[str, Any]:
    return {
        "name": request.name,
        "key": request.key,
        "status": "cached" if output.cached else "made",
        **({"why": why} if why else {}),
        **({} if output.cached else {"seconds": output.seconds}),
    }


def _write(run: Path, facts: Mapping[str, Any]) -> None:
    scratch = run / f".{FACTS}"
    scratch.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, run / FACTS)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _new_directory(parent: Path) -> Path:
    started = _now().replace(":", "-")
    for number in range(1, 1000):
        run = parent / (started if number == 1 else f"{started}.{number}")
        try:
            run.mkdir(parents=True)
        except FileExistsError:  # two runs in one second
            continue
        return run
    raise InputError(f"{parent}: a thousand runs in one second")


def _point_latest_at(run: Path) -> None:
    scratch = run.parent / f".latest-{os.getpid()}"
    scratch.symlink_to(run.name)
    os.replace(scratch, run.parent / "latest")


def _link_of(run: Path, request: Request) -> Path:
    return Path(run, request.stage.name, *([quote(request.subject, safe=" ")] if request.subject else []))


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        link.symlink_to(os.path.relpath(target, link.parent))
