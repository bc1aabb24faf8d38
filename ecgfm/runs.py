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
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import yaml

from ecgfm.config import to_dict
from ecgfm.cost import as_json, ledger, put_in
from ecgfm.ecg import InputError
from ecgfm.files import naming, writing_data_dir
from ecgfm.pipeline import Selection, Walker, make_all, walk
from ecgfm.pipelines_file import Pipeline
from ecgfm.stages import Output, Request, Store, is_held

FACTS = "run.json"
LOCK = ".lock"
KEEP = "keep"
REPORT = "report.html"  # in a run's folder: the evaluation's page, and what it cost
COST = "cost.json"
CARDS = frozenset({"model_card.md", "data_card.json"})


@dataclass(frozen=True)
class Run:
    """A run as it lies in a data directory.

    state: `running`, `completed`, `failed`, `stopped` (by Ctrl-C), `killed` (it ended without a word)
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
        return set(links_below(self.directory).values())


def find_runs(data_dir: Path, pipeline: str | None = None) -> list[Run]:
    """The runs of a data directory, newest first; those of one pipeline.

    Raises:
        InputError: a run's facts cannot be read.
    """
    found = [run for folder in run_folders(data_dir, pipeline) if (run := _read(folder))]
    # of one second: 2026-01-01T12-00-00Z, then .2 and so on
    return sorted(found, key=lambda run: (run.started_at, len(run.directory.name), run.name), reverse=True)


def find_run(data_dir: Path, name: str) -> Run:
    """One run by its name, `<pipeline>/<time>` or `<pipeline>/latest`.

    Raises:
        InputError: there is no such run, or its facts cannot be read.
    """
    pipeline, _, time = name.rstrip("/").partition("/")
    runs = find_runs(data_dir, pipeline)
    if time == "latest":
        time = (data_dir / "runs" / pipeline / "latest").resolve().name
    if found := next((run for run in runs if run.directory.name == time), None):
        return found
    if runs:
        there = f"the newest of {len(runs)} is {runs[0].name}"
    else:
        pipelines = sorted({run.pipeline for run in find_runs(data_dir)})
        there = f"there are runs of {', '.join(pipelines)}" if pipelines else "there are none"
    raise InputError(f"no run {name} in {data_dir}: {there}")


def run_folders(data_dir: Path, pipeline: str | None = None) -> list[Path]:
    """The directories of runs, in no order; also of one that was killed before it wrote a word."""
    runs = data_dir / "runs"
    pipelines = [runs / pipeline] if pipeline else _folders_in(runs)
    return [run for folder in pipelines for run in _folders_in(folder)]


def links_below(run: Path) -> dict[str, str]:
    """The links of a run's directory: name of the stage, "prepare ptb_xl records500/00000" -> `<stage>/<key>`.

    Raises:
        OSError: it cannot be read. What is not seen would be taken for unused.
    """

    def raise_unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    found = {}
    for folder, folders, files in os.walk(run, onerror=raise_unless_gone):
        for entry in (*folders, *files):
            link = os.path.join(folder, entry)
            with suppress(FileNotFoundError):  # of a run that is being removed
                if os.path.islink(link) and (target := os.readlink(link).split("/"))[-3:-2] == ["stages"]:
                    stage, _, subject = link[len(str(run)) + 1 :].partition("/")
                    found[f"{stage} {unquote(subject)}".strip()] = "/".join(target[-2:])
    return found


def keep(store: Store, run: Run, kept: bool = True) -> None:
    """From now on a run is kept whatever its age; `kept=False` lets it go again.

    Raises:
        InputError: it was removed meanwhile.
    """
    with store.claiming():
        try:
            if kept:
                (run.directory / KEEP).touch()
            else:
                (run.directory / KEEP).unlink(missing_ok=True)
        except FileNotFoundError as error:
            raise InputError(f"the run {run.name} was removed meanwhile") from error


@contextmanager
def recorded_run(
    data_dir: Path, pipeline: str, config: Pipeline, walker: Walker, raw: Mapping[str, Path]
) -> Iterator[Path]:
    """Around one walk: `runs/<pipeline>/<time>/` with its config, its log, links to what it uses, what that cost, and
    its report with that.

    `runs/<pipeline>/latest` points at the newest that ended. Links are relative, so that a data directory can be moved.
    """
    started = time.monotonic()
    facts: dict[str, Any] = {
        "pipeline": pipeline,
        "state": "running",
        "started_at": _now(),
        "host": platform.node(),
        "process": os.getpid(),
        "raw": {source: str(folder) for source, folder in raw.items()},
        "selection": {name: value for name, value in vars(walker.selection).items() if value},
        "stages": [],
    }
    with walker.store.claiming():  # what lies in runs/ without a lock then was killed, and is not just beginning
        with writing_data_dir():
            run = _new_directory(data_dir / "runs" / pipeline, facts["started_at"])
            lock = open(run / LOCK, "w")  # noqa: SIM115 - closed below
        fcntl.flock(lock, fcntl.LOCK_EX)
        _write(run, facts)
    (run / "config.yaml").write_text(yaml.safe_dump({pipeline: to_dict(config)}, sort_keys=False), encoding="utf-8")
    log = _Log(run / "log.txt", encoding="utf-8")
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("ecgfm").addHandler(log)

    def claim(requests: Sequence[Request]) -> None:
        with walker.store.claiming():
            for request in requests:
                _link(_link_of(run, request), walker.store.place(request))

    def end(state: str, **more: str) -> None:
        logging.getLogger("ecgfm").removeHandler(log)
        log.close()
        walker.store.check()
        seconds = round(time.monotonic() - started, 3)
        spent = ledger([(request, output) for request, output in walker.made if isinstance(output, Output)])
        for request, output in walker.made:
            if isinstance(output, Output):
                facts["stages"].append(_came_of(request, output, walker.reasons.get(request.name, "")))
                if REPORT in output.files:
                    page = (output.directory / REPORT).read_text(encoding="utf-8")
                    (run / REPORT).write_text(put_in(page, spent, seconds), encoding="utf-8")
                for name in CARDS & output.files.keys():
                    _link(run / name, output.directory / name)
            else:  # not selected, and not there
                _link_of(run, request).unlink(missing_ok=True)
        (run / COST).write_text(json.dumps(as_json(spent, seconds), indent=1) + "\n", encoding="utf-8")
        _write(run, facts | {"state": state, **more, "ended_at": _now(), "seconds": seconds})
        _point_latest_at(run)

    walker.claim = claim
    try:
        yield run
    except BaseException as error:
        with suppress(
            OSError, InputError
        ):  # what went wrong matters more than that it cannot be noted; unnoted it is `killed`
            if isinstance(error, KeyboardInterrupt):
                end("stopped", error="by Ctrl-C")
            else:
                end("failed", error=" ".join(str(error).split()) or type(error).__name__)
        raise
    else:
        with naming(run):
            end("completed")
    finally:
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


class _Log(logging.FileHandler):
    """The log of a run, which ends with the disk that it is on, and not in a traceback for each line."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        assert error is not None
        raise error


def report_of(data_dir: Path, pipeline: str, evaluated: Path) -> Path:
    """Where the report of an evaluation lies: in the newest run that it belongs to, else in its output directory."""
    pages = sorted((data_dir / "runs" / pipeline).glob(f"[0-9]*/{REPORT}"), reverse=True)
    mine = (page for page in pages if (page.parent / evaluated.parent.name).resolve() == evaluated.resolve())
    return next(mine, evaluated / REPORT)


def _read(directory: Path) -> Run | None:
    """The run of a directory; None where it said nothing yet, or is being removed."""
    going_on = is_held(directory / LOCK)
    try:
        facts = json.loads((directory / FACTS).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise InputError(f"{directory / FACTS}: not JSON ({error}); remove {directory}") from error
    state = "running" if going_on else "killed" if facts["state"] == "running" else facts["state"]
    kept = (directory / KEEP).exists()
    return Run(directory, facts["pipeline"], state, facts["started_at"], facts.get("seconds"), kept, facts)


def _folders_in(folder: Path) -> list[Path]:
    """The directories in a folder that may not be there; neither hidden ones nor links."""
    try:
        with os.scandir(folder) as entries:
            return [Path(e.path) for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


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


def _new_directory(parent: Path, started_at: str) -> Path:
    started = started_at.replace(":", "-")
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
