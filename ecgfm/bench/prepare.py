"""How fast recordings are prepared: records a second, bytes, the share of each step, beside `wfdb` record by record.

The records are synthetic ones in the layout of the Challenge 2021 (10 s, 500 Hz, 12 leads, WFDB format 16), or the
user's own in that layout. All files are read once before the clock starts: what is measured is not the disk.
"""

from __future__ import annotations

import cProfile
import os
import pstats
import resource
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ecgfm.config import PrepareConfig
from ecgfm.ecg import LEADS
from ecgfm.files import scratch_folder, sync
from ecgfm.pipeline import LIST, PREPARE, Made, Pending, Selection, Walker, make_all, total_counts, walk
from ecgfm.pipelines_file import Pipeline
from ecgfm.processes import ordered_map
from ecgfm.sources import physionet2021
from ecgfm.stages import Output, Request, Store
from ecgfm.synthesize import write_challenge
from ecgfm.synthetic_ecg import Recording, recordings

RECORDS_PER_FOLDER = 1000  # as in the Challenge 2021
WFDB_RECORDS = 2000  # enough of the slow way to time it

SEGMENT_SAMPLES = 2500

_READER = ("wfdb_header.read_header", "wfdb._open")
_RECORD = ("wfdb.read_wfdb", "signals.digital_statistics", "quality.assess_together", "sketches.sketch_together")
_SLICE = ("prepare.prepare_block", "shards.append", "prepare.write")
STEPS: Sequence[tuple[str, str, Sequence[str]]] = (
    ("read the header", "wfdb_header.read_header", ()),
    ("read the signal file", "wfdb._open", ()),
    ("decode", "wfdb.read_wfdb", _READER),
    ("statistics", "signals.digital_statistics", ()),
    ("quality", "quality.assess_together", ()),
    ("sketch", "sketches.sketch_together", ()),
    ("the rest of a record", "prepare.prepare_block", _RECORD),
    ("write the shard", "shards.append", ()),
    ("write the tables", "prepare.write", ()),
    ("the rest of a slice", "prepare.prepare_slice", _SLICE),
    ("hash", "files.sha256_of", ()),
    ("wait for the disk", "files.sync", ()),
)
"""(step, function, functions that it calls and that are steps of their own)"""


def main(records: int, raw: Path | None, folder: Path, workers: int, repeats: int) -> str:
    """Measure, and return what to print.

    records: how many synthetic ones, where `raw` is None
    raw: a raw folder in the layout of the Challenge 2021
    folder: where the synthetic records and the outputs are written; nothing stays there
    workers: processes; 0: one per core

    Raises:
        InputError: `folder` cannot be written, or `raw` holds no record.
    """
    with scratch_folder(folder, "ecgfm-bench-prepare") as scratch:
        if raw is None:
            raw = scratch / "raw"
            write_records(raw, records)
        return _measure(raw, scratch, workers or os.cpu_count() or 1, repeats)


def write_records(raw_dir: Path, n_records: int, per_folder: int = RECORDS_PER_FOLDER) -> None:
    """Synthetic records of 10 s at 500 Hz with 12 leads, so many in a folder. A few ECGs under many names: making one
    takes 14 ms, and the bytes of each file are its own."""
    some: list[Recording] = []
    patient = 1
    while len(some) < min(n_records, 40):
        some += [one for one in recordings(0, patient) if one.digital.shape == (12, 5000) and one.leads == LEADS]
        patient += 1
    for number in range(n_records):
        folder = raw_dir / "training" / "synthetic" / f"g{number // per_folder + 1}"
        recording = some[number % len(some)]
        write_challenge(folder, f"B{number:07d}", recording, recording.findings)


def _measure(raw: Path, scratch: Path, workers: int, repeats: int) -> str:
    headers = [raw / path for path in physionet2021.list_records(raw)["raw_path"]]
    bytes_in = sum(len(content) for header in headers for content in _contents(header))  # warms the cache
    runs = [_prepare(raw, scratch / f"run-{number}", workers) for number in range(repeats)]
    counts, bytes_out, _ = runs[-1]
    seconds = statistics.median(run[2] for run in runs)
    floor = statistics.median(_timed(_copy, headers, scratch, workers) for _ in range(repeats))
    some = headers[:: max(len(headers) // WFDB_RECORDS, 1)]
    one_by_one = statistics.median(_timed(_with_wfdb, some, scratch, workers) for _ in range(repeats))
    start = statistics.median(_start(workers) for _ in range(repeats))
    per_second, wfdb_per_second = len(headers) / (seconds - start), len(some) / one_by_one
    largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return "\n".join(
        [
            f"{workers} processes, warm cache, medians of {repeats} runs; the start of the processes apart",
            f"listed {counts['listed']:,} = prepared {counts['prepared']:,} + rejected {counts['rejected']:,}; "
            f"read {bytes_in / 1e6:,.0f} MB, written {bytes_out / 1e6:,.0f} MB",
            "",
            f"{'prepare':26} {per_second:8,.0f} records/s {seconds - start:8.2f} s",
            f"{'prepare, with the start':26} {len(headers) / seconds:8,.0f} records/s {seconds:8.2f} s",
            f"{'copying the same files':26} {len(headers) / floor:8,.0f} records/s {floor:8.2f} s",
            f"{'wfdb, record by record':26} {wfdb_per_second:8,.0f} records/s {one_by_one:8.2f} s "
            f"({len(some):,} of them)",
            f"{'ratio to wfdb':26} {per_second / wfdb_per_second:8.1f}",
            f"{'largest process':26} {largest / 1024:8,.0f} MB",
            "",
            "one slice in one process, profiled:",
            *_profile(raw, scratch / "profile"),
        ]
    )


def _prepare(raw: Path, data_dir: Path, workers: int) -> tuple[Mapping[str, int], int, float]:
    """Counts, bytes written, and the seconds from the first slice to the last; nothing stays in `data_dir`."""
    seconds = 0.0

    def execute(requests: Sequence[Request], group: str) -> Sequence[Made]:
        nonlocal seconds
        started = time.perf_counter()
        made = make_all(pipeline, store, selection, requests, group)
        seconds = time.perf_counter() - started  # of the last group: prepare
        return made

    selection = Selection(only=(LIST.name, PREPARE.name))
    pipeline = Pipeline(sources=(physionet2021.NAME,), prepare=PrepareConfig(workers=workers, max_rejected_share=1))
    store = Store(data_dir)
    walker = Walker(store, execute, selection)
    walk(pipeline, {physionet2021.NAME: raw}, walker)
    outputs = [made for request, made in walker.made if request.stage is PREPARE and isinstance(made, Output)]
    bytes_out = sum((output.directory / name).stat().st_size for output in outputs for name in output.files)
    shutil.rmtree(data_dir)
    return total_counts(outputs), bytes_out, seconds


def _profile(raw: Path, data_dir: Path) -> list[str]:
    """A line per step: microseconds a record and share, of one slice made in this process."""
    profile = cProfile.Profile()

    def execute(requests: Sequence[Request], group: str) -> Sequence[Made]:
        del group
        if requests[0].stage is LIST:
            return [store.make(request) for request in requests]
        first = max(requests, key=lambda request: request.size)
        profile.enable()
        made = store.make(replace(first, config=PrepareConfig(workers=1)))
        profile.disable()
        records.append(made.counts["listed"])
        return [made if request is first else Pending(request.name) for request in requests]

    records: list[int] = []
    store = Store(data_dir)
    pipeline = Pipeline(sources=(physionet2021.NAME,), prepare=PrepareConfig(max_rejected_share=1))
    walk(pipeline, {physionet2021.NAME: raw}, Walker(store, execute, Selection(only=(LIST.name, PREPARE.name))))
    seconds: Counter[str] = Counter()
    for (file, _, function), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        seconds[f"{Path(file).stem}.{function}"] += cumulative
    total = seconds["stages.make"]
    own = {step: seconds[function] - sum(seconds[name] for name in inner) for step, function, inner in STEPS}
    own["the rest of the stage"] = total - sum(own.values())
    return [f"  {step:24} {1e6 * spent / records[0]:7.0f} us {spent / total:6.1%}" for step, spent in own.items()]


def _start(workers: int) -> float:
    """Seconds until as many processes have been started, with what they import to prepare a slice, and ended; 0 for
    one, which is this one."""
    started = time.perf_counter()
    if workers > 1:
        list(ordered_map(_imported, range(workers), workers))
    return time.perf_counter() - started


def _imported(number: int) -> None:
    import ecgfm.prepare  # noqa: F401 - what is timed

    time.sleep(0.1)  # so that no process takes two


def _timed(work: Callable[[Path, Sequence[Path]], None], headers: Sequence[Path], scratch: Path, workers: int) -> float:
    """Seconds that `work` takes over all records in as many processes, but for their start. Nothing it writes stays."""
    out = scratch / work.__name__
    out.mkdir()
    portion = RECORDS_PER_FOLDER // 4
    portions = [headers[first : first + portion] for first in range(0, len(headers), portion)]
    seconds = sum(ordered_map(partial(_clocked, work, out), portions, workers)) / workers
    shutil.rmtree(out)
    return seconds


def _clocked(work: Callable[[Path, Sequence[Path]], None], out: Path, headers: Sequence[Path]) -> float:
    import wfdb  # noqa: F401 - a script imports it once: before the clock starts

    started = time.perf_counter()
    work(out, headers)
    return time.perf_counter() - started


def _contents(header: Path) -> Iterator[bytes]:
    """The bytes of a record's files."""
    for path in (header, header.with_suffix(".mat")):
        if path.exists():
            yield path.read_bytes()


def _copy(out: Path, headers: Sequence[Path]) -> None:
    """No less can be done: every byte read, and as many written and brought to the disk."""
    path = out / headers[0].stem
    with open(path, "wb", buffering=0) as file:
        for header in headers:
            for content in _contents(header):
                file.write(content)
    sync(path)


def _with_wfdb(out: Path, headers: Sequence[Path]) -> None:
    """What a script does: read a record with `wfdb`, standardise its leads, save its segments."""
    import wfdb

    for header in headers:
        record = wfdb.rdrecord(str(header.with_suffix("")))
        signal_mv = record.p_signal.T
        std = signal_mv.std(axis=1, keepdims=True)
        standard = (signal_mv - signal_mv.mean(axis=1, keepdims=True)) / np.where(std > 0, std, 1)
        for index in range(standard.shape[1] // SEGMENT_SAMPLES):
            segment = standard[:, index * SEGMENT_SAMPLES : (index + 1) * SEGMENT_SAMPLES]
            np.save(out / f"{header.stem}_{index}.npy", segment.astype(np.float32))
