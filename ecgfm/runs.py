"""One execution of a pipeline: links to the stages it used, the resolved config, the log."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import yaml

from ecgfm.config import Pipeline, to_dict
from ecgfm.ecg import InputError
from ecgfm.pipeline import Selection, Walker, make_all, walk
from ecgfm.stages import Output, Store


@contextmanager
def recorded_run(data_dir: Path, pipeline: str, config: Pipeline, walker: Walker) -> Iterator[Path]:
    """Around one walk: `runs/<pipeline>/<time>/` with its config, its log and, after it, links to what it made.

    `runs/<pipeline>/latest` points at the newest. Links are relative, so that a data directory can be moved.
    """
    try:
        run = _new_directory(data_dir / "runs" / pipeline)
    except OSError as error:
        raise InputError(f"the data directory cannot be written: {error}; choose another with --data-dir") from error
    (run / "config.yaml").write_text(yaml.safe_dump({pipeline: to_dict(config)}, sort_keys=False), encoding="utf-8")
    log = logging.FileHandler(run / "log.txt", encoding="utf-8")
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("ecgfm").addHandler(log)
    try:
        yield run
    finally:
        logging.getLogger("ecgfm").removeHandler(log)
        log.close()
        for request, output in walker.made:
            if isinstance(output, Output):
                subject = [quote(request.subject, safe=" ")] if request.subject else []
                _link(Path(run, request.stage.name, *subject), output.directory)
                if "report.html" in output.files:
                    _link(run / "report.html", output.directory / "report.html")
        _point_latest_at(run)


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
    with recorded_run(store.data_dir, name, pipeline, walker) as directory:
        walk(pipeline, raw, walker, hash_raw)
    return directory


def report_of(data_dir: Path, pipeline: str, evaluated: Path) -> Path:
    """Where the report of an evaluation lies: in the newest run that it belongs to, else in its output directory."""
    report = evaluated / "report.html"
    runs = sorted((data_dir / "runs" / pipeline).glob("[0-9]*/report.html"), reverse=True)
    return next((link for link in runs if link.exists() and link.samefile(report)), report)


def _new_directory(parent: Path) -> Path:
    started = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
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


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(target, link.parent))
