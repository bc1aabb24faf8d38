"""What lies in a data directory, what no kept run uses, and removing that.

Nothing is taken from a run that is kept or goes on, nor from a process that makes something:

- a run links what it is about to use before it looks for it, while nothing is removed (`Store.claiming`); what goes
  is decided and taken out while no run begins to use anything (`Store.removing`);
- each output is taken out under its maker's lock, which is not waited for: what somebody makes now, stays.

Taking out is a rename into `.removed-*`, so that the slow part, deleting, holds no lock. A process that was killed in
between leaves `.removed-*`, which the next one deletes.
"""

from __future__ import annotations

import calendar
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ecgfm.files import KEY_LENGTH
from ecgfm.pipeline import STAGE_NAMES
from ecgfm.runs import FACTS, LOCK, Run, find_runs, links_below, run_folders
from ecgfm.stages import Store, is_held

KEEP_RUNS = 5  # of each pipeline, unless told otherwise
_REMOVED = ".removed-"
_ENTRY = re.compile(rf"([0-9a-f]{{{KEY_LENGTH}}})(|\.partial|\.stale-[0-9]+)")
_DAY_S = 86_400


@dataclass(frozen=True)
class Lying:
    """One directory of a stage.

    what: `output`; `damaged`: one without a readable stage.json; `partial`: begun and not finished; `stale`: replaced
    name: of the stage, "prepare ptb_xl records500/00000"; of what is not finished only the stage is known
    made_at: seconds since 1970
    seconds: that it took to make, where that is known
    """

    path: Path
    what: str
    stage: str
    key: str
    name: str
    n_bytes: int
    made_at: float
    seconds: float | None = None

    @property
    def place(self) -> str:
        """`<stage>/<key>`, as runs name what they use."""
        return f"{self.stage}/{self.key}"


@dataclass(frozen=True)
class Removable:
    """What no kept run uses.

    runs: directories of runs that are not kept
    things: what lies in `stages/`; `busy`: what would go, but somebody makes it now
    locks: places, `<stage>/<key>`, of which nothing but a lock file will be left
    leftovers: what was taken out by a process that was killed, or is being deleted by another; after `remove`: what
        could not be deleted, because somebody has it open on a network drive or it is not ours
    kept: the runs that stay, with the reason
    """

    runs: Sequence[Path] = ()
    things: Sequence[Lying] = ()
    busy: Sequence[Lying] = ()
    locks: Sequence[str] = ()
    leftovers: Sequence[Path] = ()
    kept: Mapping[str, str] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """How much room it takes, without the leftovers."""
        return sum(thing.n_bytes for thing in self.things)

    def __bool__(self) -> bool:
        return bool(self.runs or self.things or self.locks or self.leftovers)


def survey(data_dir: Path, stage: str | None = None) -> list[Lying]:
    """Everything that lies in `stages/`, or in one stage of it, in the order of the file names.

    What has another name than outputs have is not ours: it is not seen, and so never removed.
    """
    found = []
    for folder in _entries(data_dir / "stages"):
        if not folder.name.startswith(".") and folder.is_dir() and stage in (None, folder.name):
            for entry in _entries(Path(folder.path)):
                if (named := _ENTRY.fullmatch(entry.name)) and entry.is_dir(follow_symlinks=False):
                    with suppress(FileNotFoundError):  # renamed or removed just now
                        found.append(_look_at(Path(entry.path), named[1], named[2]))
    return found


def users(runs: Iterable[Run]) -> dict[str, list[str]]:
    """`<stage>/<key>` -> the names of the runs that use it."""
    found = defaultdict(list)
    for run in runs:
        for place in run.uses():
            found[place].append(run.name)
    return dict(found)


def stages_of(store: Store, run: Run) -> list[dict[str, Any]]:
    """What became of each stage of a run: as it wrote in the end, else what its links say.

    name, key, status (`made`, `cached`, and of a run that did not end by itself `being made`, `not finished`), and
    why and seconds where they are known.
    """
    if run.facts["stages"]:
        return list(run.facts["stages"])
    found = []
    for name, place in links_below(run.directory).items():
        output = store.data_dir / "stages" / place
        if facts := _facts(output):
            made = facts["made_at"] >= run.started_at
            entry = {"status": "made", "seconds": facts["seconds"]} if made else {"status": "cached"}
        else:
            entry = {"status": "being made" if store.is_made_now(output) else "not finished"}
        found.append({"name": name, "key": output.name, **entry})
    order = {stage: number for number, stage in enumerate(STAGE_NAMES)}  # one of an earlier version comes first
    return sorted(found, key=lambda entry: (order.get(entry["name"].partition(" ")[0], -1), entry["name"]))


def find_removable(store: Store, keep_runs: int = KEEP_RUNS, older_than_days: float = 0) -> Removable:
    """What `remove` would remove now. Writes nothing.

    keep_runs: the newest of each pipeline, however they ended, beside those that go on, that are kept by hand, and the
        one that `latest` points at
    older_than_days: what is younger stays too

    Raises:
        InputError: a run's facts cannot be read.
    """
    return _decide(store, survey(store.data_dir), keep_runs, _days_ago(older_than_days))


def remove(store: Store, keep_runs: int = KEEP_RUNS, older_than_days: float = 0) -> Removable:
    """Remove what no kept run uses; the arguments are those of `find_removable`. Returns what was removed.

    Raises:
        InputError: the data directory cannot be written, or a run's facts cannot be read.
    """
    lying = survey(store.data_dir)  # may take a while, in which runs may begin
    with store.removing():
        found = _decide(store, lying, keep_runs, _days_ago(older_than_days))
        taken, out = _take_out(store, found)
    left = [folder for folder in (*found.leftovers, *out) if not _delete(folder)]
    return replace(taken, leftovers=left)


def _decide(store: Store, lying: Sequence[Lying], keep_runs: int, before: float) -> Removable:
    """What goes: nothing that a link of a run that stays leads to, nor what is newer than `before`."""
    data_dir, stages = store.data_dir, store.data_dir / "stages"
    locked = list(_locked(stages))
    at_work = {place for place in locked if store.is_made_now(stages / place)}
    kept = _kept(data_dir, keep_runs, before)
    runs, used = [], set()
    for folder in sorted(run_folders(data_dir)):
        links = set(links_below(folder).values())
        if not at_work.isdisjoint(links):  # of a run that was killed its processes may live on for a while
            kept.setdefault(_run_name(folder), "with a stage being made")
        foreign = bool(links) and not (folder / FACTS).exists()  # somebody's own folder of links
        if _run_name(folder) in kept or foreign or is_held(folder / LOCK):
            used |= links
        else:
            runs.append(folder)
    going, busy, staying = [], [], set(used)
    for thing in lying:
        if (thing.place in used and thing.what != "stale") or thing.made_at > before:
            staying.add(thing.place)
        elif thing.place in at_work:
            staying.add(thing.place)
            busy.append(thing)
        elif thing.path.exists():  # another process may have removed it since it was seen
            going.append(thing)
    locks = [place for place in locked if place not in staying and place not in at_work]
    return Removable(runs, going, busy, locks, list(_leftovers(data_dir)), kept)


def _kept(data_dir: Path, keep_runs: int, before: float) -> dict[str, str]:
    """The runs that stay, by name, with the reason."""
    kept = {}
    newest: dict[str, int] = defaultdict(int)
    for run in find_runs(data_dir):
        newest[run.pipeline] += 1
        latest = run.directory.parent / "latest"
        if run.state == "running":
            kept[run.name] = "goes on"
        elif run.kept:
            kept[run.name] = "kept by hand"
        elif newest[run.pipeline] <= keep_runs:
            kept[run.name] = "among the newest"
        elif latest.is_symlink() and os.readlink(latest) == run.directory.name:
            kept[run.name] = "the latest that ended"
        elif seconds_of(run.started_at) > before:
            kept[run.name] = "young"
    return kept


def _take_out(store: Store, found: Removable) -> tuple[Removable, list[Path]]:
    """Rename what was found into folders beside it that nobody looks into: runs first, because what a run uses must
    not go before it. Returns what was taken out, and those folders.
    """
    stages = store.data_dir / "stages"
    aside = _Aside()
    runs = [folder for folder in found.runs if aside.take(folder)]
    things, busy = [], list(found.busy)
    for thing in found.things:
        with store.idle(stages / thing.place) as free:
            if not free:
                busy.append(thing)
            elif aside.take(thing.path):
                things.append(thing)
    locks = []
    for place in found.locks:
        with store.idle(stages / place) as free:
            if free and not (stages / place).exists() and not (stages / f"{place}.partial").exists():
                store.drop_lock(stages / place)
                locks.append(place)
    return Removable(runs, things, busy, locks, kept=found.kept), list(aside.folders.values())


class _Aside:
    """Folders that take what goes, each beside what it takes: a stage may lie on a disk of its own."""

    def __init__(self) -> None:
        self.folders: dict[Path, Path] = {}

    def take(self, path: Path) -> bool:
        """Whether `path` was still there to be taken."""
        if path.parent not in self.folders:
            self.folders[path.parent] = Path(tempfile.mkdtemp(prefix=_REMOVED, dir=path.parent))
        try:
            os.rename(path, self.folders[path.parent] / path.name)
        except FileNotFoundError:  # another process removed it, or finished it
            return False
        return True


def _delete(folder: Path) -> bool:
    """Delete what was taken out. Another process may be at the same; whether it is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def _leftovers(data_dir: Path) -> Iterator[Path]:
    for room in ("stages", "runs"):
        for folder in _entries(data_dir / room):
            if not folder.name.startswith(".") and folder.is_dir():
                yield from (Path(e.path) for e in _entries(Path(folder.path)) if e.name.startswith(_REMOVED))


def _locked(stages: Path) -> Iterator[str]:
    """The places that have a lock file."""
    for entry in _entries(stages / ".locks"):
        stage, _, key = entry.name.rpartition("-")
        if stage and _ENTRY.fullmatch(key):
            yield f"{stage}/{key}"


def _look_at(path: Path, key: str, ending: str) -> Lying:
    stage, what = path.parent.name, ending.lstrip(".").partition("-")[0] or "output"
    if what == "output":
        if facts := _facts(path):
            made_at = seconds_of(facts["made_at"])
            return Lying(path, what, stage, key, facts["name"], _bytes_below(path), made_at, facts["seconds"])
        what = "damaged"
    return Lying(path, what, stage, key, stage, _bytes_below(path), path.stat().st_mtime)


def _facts(output: Path) -> dict[str, Any] | None:
    """The `stage.json` of an output; None where there is none to read."""
    try:
        facts: dict[str, Any] = json.loads((output / "stage.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return facts


def _bytes_below(folder: Path) -> int:
    n_bytes = 0
    for path, _, files in os.walk(folder):
        for file in files:
            with suppress(FileNotFoundError):  # somebody is at work on it
                n_bytes += os.lstat(os.path.join(path, file)).st_size
    return n_bytes


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, which may not be there, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []


def _run_name(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def seconds_of(time_utc: str) -> float:
    """Seconds since 1970 of a time as `stage.json` and `run.json` have it."""
    return calendar.timegm(time.strptime(time_utc, "%Y-%m-%dT%H:%M:%SZ"))


def _days_ago(days: float) -> float:
    """Seconds since 1970; of 0 days no bound: clocks of several machines differ."""
    return time.time() - days * _DAY_S if days else math.inf
