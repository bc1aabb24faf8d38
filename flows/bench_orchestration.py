"""What Prefect costs: the same commands with it and without, timed from outside, with the memory that they took."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ecgfm.bench.prepare import write_records
from ecgfm.ecg import InputError
from ecgfm.files import scratch_folder
from flows import server

SMALL_STAGES = ("audit", "splits", "labels", "manifests")
_SPLITS = ("--set", "splits.unknown_patients=alone", "--set", "manifests.rare_labels=drop")


@dataclass(frozen=True)
class Timing:
    """Medians of some runs of one command. peak_mb: of its largest process, resident memory."""

    seconds: float
    peak_mb: float


def main(slices: int, folder: Path, repeats: int) -> str:
    """Measure, and return what to print.

    slices: folders with one record each
    folder: where records and outputs are written; nothing stays there

    Raises:
        InputError: `folder` cannot be written, or no server comes up.
    """
    with scratch_folder(folder, "ecgfm-bench-orchestration") as scratch:
        write_records(scratch / "raw", slices, per_folder=1)
        return _measure(scratch, slices, repeats)


def _measure(scratch: Path, slices: int, repeats: int) -> str:
    data = {"without": scratch / "without", "with": scratch / "with"}
    prepare = ("--only", "list", "--only", "prepare")
    small = [word for stage in SMALL_STAGES for word in ("--only", stage, "--force", stage)]
    one = ("--only", "splits", "--force", "splits")
    cases = {  # what -> words, and whether what it made is removed before
        "prepare, nothing there": (prepare, True),
        "listed anew, slices there": ((*prepare, "--force", "list"), False),
        "4 small stages made anew": (small, False),
        "1 small stage made anew": (one, False),
    }
    lines = [f"{slices:,} slices of one record; medians of {repeats} runs", ""]
    lines += [f"{'':28} {'without Prefect':>22} {'with a server':>22}   what Prefect adds"]
    added = {}
    with server.local_server(data["with"], server.free_port()) as local:
        for what, (words, anew) in cases.items():
            found = {
                how: _timed(scratch, data[how], (*words, *extra), anew, repeats)
                for how, extra in (("without", ("--no-prefect",)), ("with", ()))
            }
            added[what] = found["with"].seconds - found["without"].seconds
            shown = [f"{found[how].seconds:9.2f} s {found[how].peak_mb:7,.0f} MB" for how in ("without", "with")]
            lines.append(f"{what:28} {shown[0]:>22} {shown[1]:>22}   {added[what]:6.2f} s")
        resident = _resident_mb(local.process.pid)
    start = added["1 small stage made anew"]
    per_stage = (added["4 small stages made anew"] - start) / (len(SMALL_STAGES) - 1)
    per_slice_ms = (added["prepare, nothing there"] - start) / slices * 1e3
    lines += ["", f"start-up {start:.2f} s; each further stage {per_stage:.2f} s; each slice {per_slice_ms:.1f} ms"]
    lines.append(f"the server's resident memory afterwards: {resident:,.0f} MB")
    temporary = _timed(scratch, data["without"], one, False, repeats)
    alone = _timed(scratch, data["without"], (*one, "--no-prefect"), False, repeats)
    lines.append(
        f"1 small stage with a temporary server: {temporary.seconds:.2f} s, without Prefect {alone.seconds:.2f} s"
    )
    up_to_date = _timed(scratch, data["without"], prepare, False, repeats)
    lines.append(f"up to date, no server asked: {up_to_date.seconds:.2f} s, {up_to_date.peak_mb:,.0f} MB")
    return "\n".join(lines)


def _timed(scratch: Path, data_dir: Path, words: Sequence[str], anew: bool, repeats: int) -> Timing:
    """`ecgfm run` in a process of its own, from its start to its end."""
    command = [sys.executable, "-m", "flows.cli", "run", "challenge-2021-small"]
    command += ["--raw", f"physionet2021={scratch / 'raw'}", "--data-dir", str(data_dir), *_SPLITS, *words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    seconds, peaks = [], []
    for _ in range(repeats):
        if anew:
            shutil.rmtree(data_dir / "stages", ignore_errors=True)
        started = time.perf_counter()
        peaks.append(_peak_mb(command, environment))
        seconds.append(time.perf_counter() - started)
    return Timing(statistics.median(seconds), statistics.median(peaks))


def _peak_mb(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Run a command to its end; the most resident memory that it had, or a process that it waited for.

    Raises:
        InputError: it failed.
    """
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise InputError(f"{' '.join(command)} failed: {errors.strip()}")
    return usage.ru_maxrss / 1024


def _resident_mb(process: int) -> float:
    """Of a process and its children."""
    total = 0.0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        parent = re.search(r"^PPid:\s+(\d+)$", text, re.M)
        resident = re.search(r"^VmRSS:\s+(\d+) kB$", text, re.M)
        if resident and process in (int(status.parent.name), int(parent[1]) if parent else 0):
            total += int(resident[1]) / 1024
    return total
