"""Damaged and hostile raw folders through listing and preparation, in a process that is watched. A campaign of it:

python tests/fuzzing.py --cases 5000 --seed 1 [--kinds dicom,edf]

A case is a kind of input and a seed, and so can be run again: `--kinds dicom --only 4711`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CASE_SECONDS = 5.0  # of work; a busy machine may take longer over it
CASE_BYTES = 2**30
ADDRESS_BYTES = 2 * 2**30  # beyond those of the libraries: an absurd allocation fails, touched or not
HANG_SECONDS = 20.0  # by the clock; the process is killed, for nothing in it answers
MARK = b"C" * 24
"""Every byte of the files outside the raw folder, so far as their formats let it be; no output may hold it."""

WATCHED = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "subprocess.Popen"}
WATCHED |= {"os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pickle.find_class", "webbrowser.open"}
OPENING = {"open", "os.listdir", "os.scandir"}


@dataclass
class Outcome:
    """What became of one case.

    what: the damage, in words
    rejected: by reason
    refused: the InputError's message, where the run ended with one
    fault: what must not be; empty where all is well
    seconds: of work of the process and its children
    peak_bytes: resident memory of the process
    """

    kind: str
    seed: int
    what: list[str] = field(default_factory=list)
    listed: int = 0
    prepared: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    refused: str = ""
    fault: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0


# ---- the parent: cases are handed to a child, which may die of them


def run(cases: Iterable[tuple[str, int]], shared: Path | None = None) -> Iterator[Outcome]:
    """The outcome of each case, in their order. A child that hangs or dies is replaced, and its case has a fault.

    shared: the folder of real recordings, for the kinds that begin with `real`
    """
    child = None
    with tempfile.TemporaryDirectory(prefix="ecgfm-fuzz-") as scratch:
        try:
            for kind, seed in cases:
                child = child or _Child(Path(scratch), shared)
                outcome = child.ask(kind, seed)
                yield outcome
                if child.process.poll() is not None:
                    child = None
        finally:
            if child is not None:
                child.end()


class _Child:
    def __init__(self, scratch: Path, shared: Path | None) -> None:
        one_thread = dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"), "1"
        )
        self.folder = Path(tempfile.mkdtemp(dir=scratch))
        self.errors = self.folder / "stderr"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--child", str(self.folder), "--shared", str(shared or "")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **one_thread},
                start_new_session=True,
            )
        self.selector = selectors.DefaultSelector()
        assert self.process.stdout is not None
        self.selector.register(self.process.stdout, selectors.EVENT_READ)
        ready = self._line(120)
        assert ready == "ready\n", f"{ready!r} {self.errors.read_text()}"

    def ask(self, kind: str, seed: int) -> Outcome:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([kind, seed]) + "\n")
        self.process.stdin.flush()
        started = time.monotonic()
        line = self._line(HANG_SECONDS)
        if line:
            return Outcome(**json.loads(line))
        took = time.monotonic() - started
        what = json.loads((self.folder / "what.json").read_text())
        if line is None:
            self.end()
            return Outcome(kind, seed, what, fault=f"hangs: no answer within {HANG_SECONDS:g} s", seconds=took)
        code = self.process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        said = " / ".join(self.errors.read_text(errors="replace").splitlines()[-3:])
        return Outcome(kind, seed, what, fault=f"the process died: {how} {said}", seconds=took)

    def _line(self, timeout_s: float) -> str | None:
        """What the child says next; "" where it died, None where it says nothing."""
        assert self.process.stdout is not None
        return self.process.stdout.readline() if self.selector.select(timeout_s) else None

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


# ---- the child


class Guard:
    """Watches what the process opens. Python tells by its audit events; HDF5, polars and libsndfile open files without
    Python, so the kernel tells (inotify) of every opening in the folder `outside`, whoever opens."""

    def __init__(self, allowed: Sequence[Path], outside: Path) -> None:
        self.allowed = [os.path.join(os.path.realpath(path), "") for path in allowed]
        self.events: list[str] = []
        self.watching = False
        libc = ctypes.CDLL(None, use_errno=True)
        self.inotify = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        in_access, in_open = 1, 0x20
        assert libc.inotify_add_watch(self.inotify, os.fsencode(outside), in_access | in_open) >= 0
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event in WATCHED and arguments[0] != sys.executable:  # a reader of our own, which inotify watches
            self.events.append(f"{event} {arguments[:1]}")
        elif event in OPENING and not isinstance(arguments[0], int):
            path = os.path.realpath(os.fsdecode(arguments[0] or "."))
            if not os.path.join(path, "").startswith(tuple(self.allowed)):
                self.events.append(f"{event} {path}")

    def __enter__(self) -> Guard:
        self._opened()
        self.events.clear()
        self.watching = True
        return self

    def __exit__(self, *_: object) -> None:
        self.watching = False
        if self._opened():
            self.events.append("a file of the folder outside")

    def _opened(self) -> bool:
        try:
            return bool(os.read(self.inotify, 1 << 16))
        except BlockingIOError:
            return False


def child(folder: Path, shared: Path | None) -> None:
    """Obey: lines of [kind, seed] come in, an outcome each goes out."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    sys.path.insert(0, str(Path(__file__).parent))
    import fuzz_inputs

    warnings.simplefilter("ignore")
    kinds = fuzz_inputs.kinds(shared)
    outside = folder / "outside"
    fuzz_inputs.write_outside(outside, MARK)
    libraries = [sys.prefix, sys.base_prefix, Path(__file__).parents[1], "/usr", "/lib", "/proc/self", "/sys"]
    libraries += ["/dev/null", "/dev/urandom", "/etc/localtime", "/etc/mime.types"]
    guard = Guard([folder / "raw", folder / "out", *map(Path, libraries)], outside)
    for kind in dict.fromkeys(fuzz_inputs.LATE_IMPORTS):  # what is imported late is not the first case's time
        _run_case(kinds[kind], Outcome(kind, 0), folder, guard, damaged=False)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status_bytes("VmSize") + ADDRESS_BYTES, hard))
    answers.write("ready\n")
    for line in sys.stdin:
        name, seed = json.loads(line)
        outcome = Outcome(name, seed)
        if name in SABOTAGE:
            with guard:
                _watched(SABOTAGE[name], outcome, (folder,))
            _judge(outcome, guard, folder)
        else:
            _run_case(kinds[name], outcome, folder, guard, damaged=seed > 0)
        answers.write(json.dumps(asdict(outcome)) + "\n")


def _run_case(kind: Any, outcome: Outcome, folder: Path, guard: Guard, damaged: bool) -> None:
    """Write the kind's folder, damage it (a seed of 0: not at all) and have it prepared."""
    import fuzz_inputs

    dice = random.Random(f"{outcome.kind}/{outcome.seed}")
    files = dict(kind.files)
    config: dict[str, Any] = {"segment_seconds": 0.1}
    for name in ("raw", "out"):
        fuzz_inputs.remove(folder / name)
    (folder / "out").mkdir()
    if damaged:
        outcome.what = fuzz_inputs.damage(files, kind, dice, folder / "out")
        config |= dice.choice(fuzz_inputs.CONFIGS)
    fuzz_inputs.write(files, folder / "raw")
    large = any(isinstance(content, fuzz_inputs.Odd) and content.size > 10**9 for content in files.values())
    hash_raw = damaged and not large and dice.random() < 0.2  # to hash gigabytes may take as long as it takes
    (folder / "what.json").write_text(json.dumps(outcome.what))  # should this process not live to tell it
    with guard:
        _watched(_prepare, outcome, (outcome, kind.source, folder, config, hash_raw))
    _judge(outcome, guard, folder)
    fuzz_inputs.remove(folder / "raw")


def _watched(function: Any, outcome: Outcome, arguments: tuple[Any, ...]) -> None:
    """Call, with the time and the memory that it takes; what it raises is a fault."""
    _reset_peak()
    started = sum(os.times()[:4])
    try:
        function(*arguments)
    except BaseException as error:  # noqa: BLE001  polars' panics are none of Exception, and all of them are faults
        import traceback

        last = traceback.extract_tb(error.__traceback__)[-3:]
        at = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(last))
        outcome.fault = f"{type(error).__name__}: {str(error)[:300]} ({at})"
    outcome.seconds = sum(os.times()[:4]) - started
    outcome.peak_bytes = _status_bytes("VmHWM")


def _prepare(outcome: Outcome, source: str, folder: Path, config: dict[str, Any], hash_raw: bool) -> None:
    """As the pipeline does it: the raw files' fingerprints, the listing, each slice. What must hold of the output."""
    from ecgfm.config import ListConfig, PrepareConfig
    from ecgfm.ecg import InputError
    from ecgfm.fingerprints import RawTree
    from ecgfm.prepare import list_source, prepare_slice

    raw, out = folder / "raw", folder / "out"
    (out / "list").mkdir()
    try:
        tree = RawTree.scan(raw, source, hash_raw)
        counts = list_source({"raw": raw}, ListConfig(source), out / "list")
    except InputError as error:
        outcome.refused = str(error)
        assert len(outcome.refused.splitlines()) == 1, f"an InputError of several lines: {outcome.refused!r}"
        return
    index = json.loads((out / "list/slices.json").read_text())
    tree.by_slice(list(index))
    outcome.listed = counts["listed"]
    assert outcome.listed == sum(entry["records"] for entry in index.values())
    reasons: Counter[str] = Counter()
    for number, entry in enumerate(index.values()):
        made = out / f"slice{number}"
        made.mkdir()
        rows = out / "list" / entry["file"]
        told = prepare_slice({"rows": rows, "raw": raw}, PrepareConfig(**config, workers=1), made)
        outcome.prepared += told["prepared"]
        reasons.update(_check_slice(rows, made, raw))
    outcome.rejected = dict(reasons)
    assert outcome.listed == outcome.prepared + reasons.total(), "listed = prepared + rejected"


def _check_slice(rows: Path, made: Path, raw: Path) -> Counter[str]:
    """The reasons of a slice's rejected records, once its tables and its shard are found to be as they must."""
    import numpy as np
    import polars as pl

    from ecgfm.ecg import REJECT_REASONS
    from ecgfm.shards import ShardReader

    listed = pl.read_parquet(rows)
    # `write_table` has checked their contracts
    names = ("records", "segments", "quality", "sketches", "rejects")
    tables = {name: pl.read_parquet(made / f"{name}.parquet") for name in names}
    records, rejects = tables["records"], tables["rejects"]
    assert sorted(listed["record_id"]) == sorted([*records["record_id"], *rejects["record_id"]])
    assert set(rejects["reason"]) <= set(REJECT_REASONS)
    for detail in rejects["detail"]:
        assert len(detail.splitlines()) == 1, f"a detail of several lines: {detail!r}"
        assert str(raw) not in detail, f"a detail that differs from machine to machine: {detail!r}"
        assert len(detail) < 1000, f"a detail of {len(detail)} letters: {detail[:200]!r}"
    assert sorted(tables["quality"]["record_id"]) == sorted(records["record_id"])
    for mean, std in records.select("lead_mean_mv", "lead_std_mv").iter_rows():
        assert not np.isinf([*mean, *std]).any()
    shard = ShardReader(made / "shard.h5")
    assert shard.n_segments == tables["segments"].height == records["n_segments"].sum()
    for row in range(min(shard.n_segments, 50)):
        invalid = shard.digital([row])[0] == -32768
        assert np.isfinite(shard.signal_mv(row)[~invalid]).all(), "a sample that is neither finite nor invalid"
    assert all(np.isfinite(values).all() for values in shard.standardisation()), "a scale that is not finite"
    shard.close()
    return Counter(rejects["reason"])


def _judge(outcome: Outcome, guard: Guard, folder: Path) -> None:
    """The faults that no exception tells."""
    faults = [outcome.fault] if outcome.fault else []
    if guard.events:
        faults.append(f"outside the raw folder: {', '.join(sorted(set(guard.events))[:3])}")
    if outcome.seconds > CASE_SECONDS:
        faults.append(f"took {outcome.seconds:.1f} s")
    if outcome.peak_bytes > CASE_BYTES:
        faults.append(f"took {outcome.peak_bytes / 2**20:.0f} MB")
    made = [path for path in (folder / "out").rglob("*") if path.is_file()]
    faults += [f"{path.name} holds what stands outside" for path in made if MARK in path.read_bytes()]
    outcome.fault = "; ".join(faults)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(name))) * 1024


def _opens_outside(folder: Path) -> None:
    (folder / "outside/secret.dat").read_bytes()


def _opens_outside_unknown_to_python(folder: Path) -> None:
    import h5py

    h5py.File(folder / "outside/secret.h5", "r").close()


def _tells_a_secret(folder: Path) -> None:
    (folder / "out/told").write_bytes(b"it is " + MARK)


def _takes_memory(_: Path) -> None:
    import numpy as np

    np.ones(CASE_BYTES // 8 + 2**20)


def _asks_for_absurd_memory(_: Path) -> None:
    bytearray(4 * ADDRESS_BYTES)


def _takes_time(_: Path) -> None:
    end = time.process_time() + CASE_SECONDS + 0.2
    while time.process_time() < end:
        pass


def _dies(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


SABOTAGE = {
    "opens outside": _opens_outside,
    "opens outside unknown to Python": _opens_outside_unknown_to_python,
    "tells a secret": _tells_a_secret,
    "takes memory": _takes_memory,
    "asks for absurd memory": _asks_for_absurd_memory,
    "takes time": _takes_time,
    "dies": _dies,
}
"""What no reader may do, done, so that a test can see that it is seen."""


# ---- the campaign


def table(outcomes: Sequence[Outcome]) -> str:
    """A line per kind: cases, records prepared and rejected by reason, runs refused, the worst time and memory."""
    kinds = dict.fromkeys(outcome.kind for outcome in outcomes)
    lines = []
    for kind in kinds:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        reasons = sum((Counter(outcome.rejected) for outcome in of_kind), Counter[str]())
        lines.append(
            f"{kind:16} {len(of_kind):6} cases {sum(o.prepared for o in of_kind):7} prepared "
            f"{reasons.total():7} rejected {sum(bool(o.refused) for o in of_kind):6} refused "
            f"{max(o.seconds for o in of_kind):5.2f} s {max(o.peak_bytes for o in of_kind) / 2**20:5.0f} MB "
            f"{sum(bool(o.fault) for o in of_kind):4} faults; "
            + ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default="")
    parser.add_argument("--only", type=int)
    parser.add_argument("--shared", type=lambda text: Path(text) if text else None)
    parser.add_argument("--child", type=Path)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.shared)
        return 0
    sys.path.insert(0, str(Path(__file__).parent))
    import fuzz_inputs

    known = list(fuzz_inputs.kinds(options.shared))
    kinds = options.kinds.split(",") if options.kinds else known
    seeds = range(options.seed * 1_000_000, options.seed * 1_000_000 + options.cases)
    cases = [(kind, options.only) for kind in kinds] if options.only is not None else None
    outcomes, shown = [], Counter[str]()
    for outcome in run(cases or [(kinds[seed % len(kinds)], seed) for seed in seeds], options.shared):
        outcomes.append(outcome)
        if outcome.fault or options.only is not None:
            shown[outcome.fault[:60]] += 1
            if shown[outcome.fault[:60]] <= 3 or options.only is not None:
                print(json.dumps(asdict(outcome)), flush=True)
    print(table(outcomes))
    return any(outcome.fault for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
