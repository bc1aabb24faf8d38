"""A stage in milliseconds, runs that make it, and processes of their own; for the tests of runs and of housekeeping."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ecgfm.fingerprints import Input
from ecgfm.pipeline import Made, Walker, make_all
from ecgfm.pipelines_file import Pipeline
from ecgfm.runs import recorded_run
from ecgfm.stages import Request, Stage, Store

PIPELINE = Pipeline(sources=("synthetic",))
PATIENCE_S = 30.0


def write(inputs: Mapping[str, Any], config: Mapping[str, str], out: Path) -> dict[str, int]:
    """The word of its config in a file. `started` is touched at once; `go` is waited for."""
    if config["word"] == "bad":
        raise ValueError("not a good\nword")
    if "started" in config:
        (out / "half.txt").write_text("half")
        Path(config["started"]).touch()
        wait_for(Path(config["go"]))
    (out / "word.txt").write_text(config["word"])
    return {"words": 1}


def request(word: str, stage: str = "toy", inputs: Sequence[Input] = (), **config: str) -> Request:
    """A request for the stage above; each word is another output."""
    made = Stage(stage, "stages_of_runs:write")
    return Request(made, {"words": list(inputs)} if inputs else {}, {"word": word, **config}, f"of {word}/a b")


def run(data_dir: Path, *words: str, pipeline: str = "p", then: Callable[[Walker], None] = lambda walker: None) -> Path:
    """A recorded run that makes the words, and then one of all of them together."""
    store = Store(data_dir)

    def execute(requests: Sequence[Request], group: str) -> Sequence[Made]:
        return make_all(PIPELINE, store, walker.selection, requests, group)

    walker = Walker(store, execute)
    with recorded_run(data_dir, pipeline, PIPELINE, walker, {"synthetic": Path("/raw")}) as directory:
        made = walker.many([request(word) for word in words], "")
        walker.one(request("all", "together", [one.select("*") for one in made]))
        then(walker)
    return directory


def wait_for(path: Path) -> None:
    """Until another process has made the file."""
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.005)


def fork(work: Callable[[], object]) -> int:
    """Do something in another process, which then ends; returns its id. Locks that this process holds, it holds too."""
    child = os.fork()
    if child == 0:
        signal.alarm(int(2 * PATIENCE_S))  # none outlives a test that failed
        try:
            work()
            os._exit(0)
        finally:  # whatever it raised
            traceback.print_exc()
            os._exit(1)
    return child


def ended(child: int) -> int:
    """Wait for a process; its exit code, below 0 the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def unresolved(run: Path) -> list[Path]:
    """The links of a run that lead to no finished output."""
    links = [Path(folder, name) for folder, folders, files in os.walk(run) for name in (*folders, *files)]
    return [link for link in links if link.is_symlink() and not (link / "stage.json").is_file() and not link.is_file()]
