"""The stage store: what is already there is not made again.

A stage is one plain function, `(inputs: paths, config: dataclass, out: directory) -> counts`. Its output lies in
`<data_dir>/stages/<stage>/<key>/`, where the key is a hash of everything that decides the content: stage name
and version, the config values that matter, the digests of the files it reads, and the syntax trees of the
modules it is made of. It never includes absolute paths, dates, host names or run ids.

A directory is built beside its place (`<key>.partial`), its `stage.json` is written last, and one rename commits
it; a reader sees all of it or nothing. One maker per key: `flock`, which the kernel drops when its holder dies.
"""

from __future__ import annotations

import fcntl
import fnmatch
import functools
import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ecgfm import own_process
from ecgfm.config import content_of
from ecgfm.ecg import InputError
from ecgfm.energy import Meter, cuda_devices, forget_peak_memory, peak_memory
from ecgfm.files import KEY_LENGTH, digest_of, naming, sha256_of, sync, sync_and_hash, writing_data_dir
from ecgfm.fingerprints import Input, RawTree, code_digests, differences, looks_below
from ecgfm.own_process import Facts, ProcessFailed
from ecgfm.processes import WorkerDied, ordered_map

RAW_FILES = "raw_files.json"  # beside stage.json: the raw files that a slice was made of, for `explain`
RECORDED_VERSIONS = ("ecgfm", "numpy", "polars", "pyarrow", "h5py", "torch")
_CLAIMS = "claims"  # a lock that nobody holds for long

logger = logging.getLogger(__name__)


class StageFailed(RuntimeError):
    """The process of a stage crashed or was killed. What it printed is in the log; what it saved is kept."""


@dataclass(frozen=True)
class Stage:
    """A kind of stage.

    function: `module:name`, imported only where it runs, so that looking at a plan needs no torch
    volatile: patterns of output files that differ from run to run (times); they do not enter the digest
    resumable: a killed run's partial output is handed to the next run instead of being removed
    own_process: runs in a process group of its own (training)
    many: several are made at a time on one machine (slices): what it used meanwhile is not that of one
    chosen_code: modules that import alternatives, of which a request names its own (`Request.code`)
    """

    name: str
    function: str
    version: int = 1
    volatile: tuple[str, ...] = ()
    resumable: bool = False
    own_process: bool = False
    many: bool = False
    chosen_code: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Request:
    """One stage with everything that decides its output.

    subject: which of several outputs of this kind, in words ("ptb_xl records500/00000"); "" where there is one
    code: modules that this request uses beside those that the stage imports
    size: how many records, for dividing work; it decides nothing about the output
    """

    stage: Stage
    inputs: Mapping[str, Input | Sequence[Input]]
    config: Any = None
    subject: str = ""
    code: tuple[str, ...] = ()
    size: int = 0

    @property
    def name(self) -> str:
        """What a person calls it: "prepare ptb_xl records500/00000"."""
        return f"{self.stage.name} {self.subject}".strip()

    def each_input(self) -> Iterator[tuple[str, Input]]:
        """Every input with its name; where there are several of a name, each of them."""
        for name, given in self.inputs.items():
            for one in [given] if isinstance(given, Input) else given:
                yield name, one

    def check_raw(self) -> None:
        """The raw files that are read are still those that the key was made of.

        Raises:
            InputError: they are not.
        """
        for _, one in self.each_input():
            one.check()

    @cached_property
    def ingredients(self) -> dict[str, Any]:
        """Everything that decides the output, as JSON-able data. Its hash is the key."""
        return {
            "stage": self.stage.name,
            "version": self.stage.version,
            "subject": self.subject,
            "config": content_of(self.config),
            "inputs": {name: _identity(given) for name, given in sorted(self.inputs.items())},
            "code": code_digests(self.stage.function.partition(":")[0], self.code, self.stage.chosen_code),
        }

    @cached_property
    def key(self) -> str:
        """The name of the output's directory."""
        text = json.dumps(self.ingredients, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


@dataclass(frozen=True)
class Output:
    """A finished stage: a directory whose `stage.json` says what is in it."""

    directory: Path
    name: str
    files: Mapping[str, str]  # relative path -> sha256, volatile files left out
    counts: Mapping[str, int]
    seconds: float
    made_at: str  # ISO 8601, UTC
    cached: bool = False  # it was there already
    cost: Mapping[str, Any] = field(default_factory=dict)  # device, peak_memory_bytes, energy_j: as far as known

    def select(self, *patterns: str) -> Input:
        """The files that match one of the patterns; the stage gets the directory."""
        chosen = {name: sha for name, sha in self.files.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}
        if not chosen:
            raise InputError(f"{self.directory}: no file matches {', '.join(patterns)}")
        return Input(self.directory, digest_of(chosen), self.name, patterns=patterns)

    def file(self, name: str) -> Input:
        """One file; the stage gets its path."""
        return Input(self.directory / name, self.files[name], self.name, patterns=(name,))

    def as_raw(self) -> RawTree:
        """What the stage wrote, as another stage's raw folder."""
        return RawTree(self.directory, self.files, self.name, looks_below(self.directory))


class Store:
    """The stages of one data directory."""

    def __init__(self, data_dir: Path, verify: bool = False) -> None:
        """verify: a hit also needs every file's hash, not only its size."""
        self.data_dir = data_dir
        self.verify = verify
        self._histories: dict[str, list[dict[str, Any]]] = {}
        self._hashed: dict[Path, bytes] = {}  # outputs whose files were hashed, and their stage.json at that time
        self._begun = False  # this store has written to its data directory

    def place(self, request: Request) -> Path:
        """Where the output of a request lies, made or not."""
        return self.data_dir / "stages" / request.stage.name / request.key

    def find(self, request: Request) -> Output | None:
        """The finished and undamaged output of a request, or None."""
        place = self.place(request)
        facts = self._facts(place)
        return None if isinstance(facts, str) else _output(place, request.name, facts, cached=True)

    def make(self, request: Request, force: bool = False, go_on: bool = False) -> Output:
        """The output of a request: as it is there, or made now.

        force: make it although it is there; go_on: but of what a killed run left, if the stage is resumable

        Raises:
            InputError: the data directory cannot be written, or what the stage's function raises.
        """
        if not force and (found := self.find(request)):
            return found
        place = self.place(request)
        with self._lock(place):
            if not force and (found := self.find(request)):  # another process made it while we waited
                return found
            partial = place.with_name(place.name + ".partial")
            if partial.exists() and not (request.stage.resumable and (go_on or not force)):
                shutil.rmtree(partial)
            partial.mkdir(exist_ok=True)
            started = time.monotonic()
            forget_peak_memory()
            meter = Meter([] if request.stage.many else None)
            try:
                function = _import(request.stage.function)
                paths = {name: _paths(given) for name, given in request.inputs.items()}
                try:
                    with naming(partial), meter:
                        counts = function(paths, request.config, partial)
                except Exception:
                    self.check()  # where a drive is gone, that is what went wrong
                    request.check_raw()
                    raise
                self.check()
                request.check_raw()
                with naming(partial):
                    self._commit(request, partial, dict(counts or {}), time.monotonic() - started, _cost(meter))
            except BaseException as error:
                if not request.stage.resumable:
                    shutil.rmtree(partial, ignore_errors=True)  # gone already where the commit got as far as that
                if isinstance(error, WorkerDied):
                    raise StageFailed(f"{request.name}: {error}") from error
                raise
        return self._made(place, request.name)

    def make_in_own_process(
        self,
        request: Request,
        force: bool = False,
        go_on: bool = False,
        on_facts: Callable[[Facts], None] | None = None,
    ) -> Output:
        """`make` in a process group of its own, which ends with this process (own_process.py). What it prints goes to
        the log line by line.

        on_facts: gets what the process tells: how far it is

        Raises:
            InputError: as the stage raised it.
            StageFailed: the process crashed or was killed.
        """
        if not force and (found := self.find(request)):
            return found
        try:
            made: Output = own_process.call(
                Store.make,
                (self, request, force, go_on),
                lambda line: logger.info("%s: %s", request.name, line),
                on_facts,
            )
        except ProcessFailed as error:
            raise StageFailed(f"{request.name}: {error}") from error
        self._histories.pop(request.stage.name, None)
        return made

    def make_many(self, requests: Sequence[Request], workers: int, force: bool = False) -> Iterator[Output]:
        """The outputs of independent requests, in order, made by up to `workers` processes.

        The processes are spawned, not forked: HDF5 and the orchestrator's threads do not survive a fork.
        """
        found = [None if force else self.find(request) for request in requests]
        missing = [request for request, output in zip(requests, found, strict=True) if output is None]
        workers = min(workers, len(missing))
        if workers > 1:
            for request in missing:  # its history is about to grow, out of this process's sight
                self._histories.pop(request.stage.name, None)
        making = ordered_map(functools.partial(self.make, force=force), missing, workers)
        try:
            yield from (output or next(making) for output in found)
        except WorkerDied as error:
            raise StageFailed(f"{missing[0].stage.name}: {error}") from error

    def explain(self, request: Request) -> str:
        """Why the output of a request is not there, in a user's words; "" where it is."""
        found = self._facts(self.place(request))
        if not isinstance(found, str):
            return ""
        if found:
            return found
        if never := self.never_made(request):
            return never
        earlier = self._alike(request)
        now, folders = request.ingredients, _folders(request)
        reasons = [differences(past["ingredients"], now, past["folders"], folders) for past in earlier]
        nearest = min(range(len(earlier)), key=lambda place: len(reasons[place]))
        if (files := _raw_files(request)) and (then := self._raw_files_of(request.stage, earlier[nearest]["key"])):
            return "; ".join(differences(earlier[nearest]["ingredients"], now, then, files, "file"))
        return "; ".join(reasons[nearest])

    def _raw_files_of(self, stage: Stage, key: str) -> dict[str, dict[str, str]]:
        """The raw files that an earlier output was made of; nothing where that is not known."""
        try:
            found: dict[str, dict[str, str]] = json.loads(
                (self.data_dir / "stages" / stage.name / key / RAW_FILES).read_bytes()
            )
        except (FileNotFoundError, ValueError):
            return {}
        return found

    def check(self) -> None:
        """The data directory that this store has begun to write to is still there.

        Where a drive is not mounted, an empty folder on another disk has its name: a run would go on there.

        Raises:
            InputError: it is not.
        """
        if self._begun and not self._locks.is_dir():
            raise InputError(
                f"the data directory {self.data_dir} is not there any more; is its drive still mounted? When it is "
                "back, run the same command again"
            )

    def never_made(self, request: Request) -> str:
        """In a user's words, that nothing was made of what a request reads, whatever its content; else "".

        What another pipeline made of other records explains nothing.
        """
        if self._alike(request):
            return ""
        if request.subject or not self._history(request.stage.name):
            return "new" if request.subject else "never made"
        first, *others = (one.origin for _, one in request.each_input())
        return f"never made of {first}{f' and {len(others)} more' if others else ''}"

    def _alike(self, request: Request) -> list[dict[str, Any]]:
        """The earlier outputs of a stage and subject whose every input has a name in common with the request's."""
        now = {name: _identity(given).keys() for name, given in request.inputs.items()}

        def alike(then: Mapping[str, Mapping[str, str]]) -> bool:
            both = now.keys() & then.keys()
            return not any(then[name] and now[name] and then[name].keys().isdisjoint(now[name]) for name in both)

        past = [past for past in self._history(request.stage.name) if past["ingredients"]["subject"] == request.subject]
        return [one for one in past if alike(one["ingredients"]["inputs"])]

    def _facts(self, place: Path) -> dict[str, Any] | str:
        """The `stage.json` of an output that is whole; else what is wrong with it, "" where there is none."""
        try:
            text = (place / "stage.json").read_bytes()
            facts: dict[str, Any] = json.loads(text)
        except (FileNotFoundError, NotADirectoryError):
            return "output damaged: stage.json is missing" if place.exists() else ""
        except ValueError:
            return "output damaged: stage.json does not parse"
        hash_too = self.verify and self._hashed.get(place) != text
        for name, expected in facts["files"].items():
            try:
                size = os.stat(place / name).st_size
            except (FileNotFoundError, NotADirectoryError):
                return f"output damaged: {name} is missing"
            if size != expected["bytes"]:
                return f"output damaged: {name} has {size:,} bytes instead of {expected['bytes']:,}"
            if hash_too and sha256_of(place / name) != expected["sha256"]:
                return f"output damaged: {name} has other bytes than were written"
        if hash_too:
            self._hashed[place] = text
        return facts

    def _made(self, place: Path, name: str) -> Output:
        """An output that was made just now, by this process or another."""
        self._histories.pop(place.parent.name, None)
        return _output(place, name, json.loads((place / "stage.json").read_bytes()), cached=False)

    def _commit(
        self, request: Request, partial: Path, counts: dict[str, int], seconds: float, cost: Mapping[str, Any]
    ) -> None:
        files: dict[str, dict[str, Any]] = {}
        manifest = partial / "stage.json"
        beside = (manifest, partial / RAW_FILES)  # which a resumed run may have left
        for path in sorted(p for p in partial.rglob("*") if p.is_file() and p not in beside):
            name = path.relative_to(partial).as_posix()
            volatile = any(fnmatch.fnmatch(name, pattern) for pattern in request.stage.volatile)
            files[name] = {"bytes": path.stat().st_size, "sha256": sync_and_hash(path)} | (
                {"volatile": True} if volatile else {}
            )
        facts = {
            "name": request.name,
            "key": request.key,
            "digest": digest_of({name: file["sha256"] for name, file in files.items() if not file.get("volatile")}),
            "ingredients": request.ingredients,
            "folders": _folders(request),
            "made_from": self._made_from(request),
            "files": files,
            "counts": counts,
            "seconds": round(seconds, 3),
            "cost": cost,
            "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": {"python": platform.python_version()} | _versions(),
        }
        if raw_files := _raw_files(request):  # for `explain` alone: it is no output
            (partial / RAW_FILES).write_text(json.dumps(raw_files, indent=0) + "\n")
        manifest.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
        sync(manifest)
        place = self.place(request)
        if place.exists():
            os.rename(place, place.with_name(f"{place.name}.stale-{os.getpid()}"))
        os.rename(partial, place)
        sync(place.parent)
        for stale in place.parent.glob(place.name + ".stale-*"):
            shutil.rmtree(stale)

    def _made_from(self, request: Request) -> dict[str, list[dict[str, Any]]]:
        """Where a request's inputs lie, by name of input: of stages relative to the data directory. Not in the key."""
        stages = self.data_dir / "stages"
        found: dict[str, list[dict[str, Any]]] = {}
        for name, one in request.each_input():
            place = one.path.relative_to(self.data_dir) if one.path.is_relative_to(stages) else one.path
            facts = {"origin": one.origin, "digest": one.digest, "place": str(place), "patterns": one.patterns}
            found.setdefault(name, []).append(facts)
        return found

    def _history(self, stage: str) -> list[dict[str, Any]]:
        """The facts of every finished output of a stage, newest first."""
        if stage not in self._histories:
            facts = []
            for path in (self.data_dir / "stages" / stage).glob("*/stage.json"):
                try:
                    facts.append(json.loads(path.read_bytes()))
                except (FileNotFoundError, ValueError):  # being replaced, or damaged: not a past to compare with
                    continue
            self._histories[stage] = sorted(facts, key=lambda past: past["made_at"], reverse=True)
        return self._histories[stage]

    @property
    def _locks(self) -> Path:
        return self.data_dir / "stages" / ".locks"

    @contextmanager
    def claiming(self) -> Iterator[None]:
        """While a run notes what it is about to use: nothing that is there is removed (housekeeping.py)."""
        with self._holding(_CLAIMS, fcntl.LOCK_SH):
            yield

    @contextmanager
    def removing(self) -> Iterator[None]:
        """While what no run uses is taken out: no run begins to use anything."""
        with self._holding(_CLAIMS, fcntl.LOCK_EX):
            yield

    def is_made_now(self, place: Path) -> bool:
        """Whether a process holds the right to make `place`. Looks only: it may change at once."""
        return is_held(self._locks / _lock_name(place))

    @contextmanager
    def idle(self, place: Path) -> Iterator[bool]:
        """Hold the right to make `place` without waiting for it; False where somebody else has it."""
        with ExitStack() as held:
            try:
                held.enter_context(self._holding(_lock_name(place), fcntl.LOCK_EX | fcntl.LOCK_NB))
                free = True
            except BlockingIOError:
                free = False
            yield free

    def drop_lock(self, place: Path) -> None:
        """Remove the lock file of a place that is gone, by whoever holds it (`idle`). Those who wait for it take
        another: two never make one key."""
        (self._locks / _lock_name(place)).unlink(missing_ok=True)

    @contextmanager
    def _lock(self, place: Path) -> Iterator[None]:
        """Hold the right to make `place`; waits for another holder."""
        with self._holding(_lock_name(place), fcntl.LOCK_EX):
            with writing_data_dir():
                place.parent.mkdir(parents=True, exist_ok=True)
            yield

    @contextmanager
    def _holding(self, name: str, kind: int) -> Iterator[None]:
        """Hold a lock of the data directory, which the kernel drops when this process dies.

        Raises:
            InputError: the data directory cannot be written, or is not there any more.
        """
        while True:
            self.check()
            with writing_data_dir():
                self._locks.mkdir(parents=True, exist_ok=True)
                handle = open(self._locks / name, "w")  # noqa: SIM115 - closed below
            self._begun = True
            with handle:
                try:
                    fcntl.flock(handle, kind | fcntl.LOCK_NB)
                except BlockingIOError:
                    if kind & fcntl.LOCK_NB:
                        raise
                    if name != _CLAIMS:
                        logger.info("waiting for another process, which makes %s", name)
                    fcntl.flock(handle, kind)
                if os.fstat(handle.fileno()).st_nlink:
                    yield
                    return
                # else it was removed while we waited (`drop_lock`): whoever comes now takes another file


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock file for itself alone."""
    try:
        with open(lock, "rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _lock_name(place: Path) -> str:
    return f"{place.parent.name}-{place.name}"


def _identity(given: Input | Sequence[Input]) -> dict[str, str]:
    """What the key knows of an input: origin -> digest."""
    inputs = [given] if isinstance(given, Input) else given
    identity = {one.origin: one.digest for one in inputs}
    assert len(identity) == len(inputs), "two inputs of one name need different origins"
    return dict(sorted(identity.items()))


def _folders(request: Request) -> dict[str, dict[str, str]]:
    """The folder digests of a request's raw inputs, by input name."""
    return {
        name: dict(given.folders)
        for name, given in request.inputs.items()
        if isinstance(given, Input) and given.folders
    }


def _raw_files(request: Request) -> dict[str, dict[str, str]]:
    """The raw files of a request's inputs, by input name, where they are few enough to be known one by one."""
    return {
        name: dict(given.files) for name, given in request.inputs.items() if isinstance(given, Input) and given.files
    }


def _paths(given: Input | Sequence[Input]) -> Path | list[Path]:
    return given.path if isinstance(given, Input) else [one.path for one in given]


def _import(function: str) -> Callable[[Mapping[str, Any], Any, Path], Mapping[str, int] | None]:
    module, _, name = function.partition(":")
    found: Callable[[Mapping[str, Any], Any, Path], Mapping[str, int] | None] = getattr(
        importlib.import_module(module), name
    )
    return found


@cache
def _versions() -> dict[str, str]:
    found = {}
    for package in RECORDED_VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a partial installation is a fact to record, not an error
            continue
    return found


def _output(place: Path, name: str, facts: Mapping[str, Any], cached: bool) -> Output:
    files = {path: file["sha256"] for path, file in facts["files"].items() if not file.get("volatile")}
    cost = facts.get("cost", {})  # of an earlier version it is not known
    return Output(place, name, files, facts["counts"], facts["seconds"], facts["made_at"], cached, cost)


def _cost(meter: Meter) -> dict[str, Any]:
    """What the making of an output took beside time, as far as this machine tells it."""
    peak = peak_memory()
    return {
        "device": ", ".join(cuda_devices()) or "CPU",
        **({} if peak is None else {"peak_memory_bytes": peak}),
        **({"energy_j": {part: round(joules, 1) for part, joules in meter.joules.items()}} if meter.joules else {}),
    }
