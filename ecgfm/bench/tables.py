"""How long the stages between preparation and training take, and how much memory, on simulated tables of any size.

The tables are what `prepare` would have left of `n_records` recordings of two segments, in slices of 5,000, two to a
patient. One in twenty is a copy of a record of the slice before, under another source, without a patient, at another
gain and with noise of its own: `audit` must find it.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ecgfm.audit import audit
from ecgfm.config import AuditConfig, LabelsConfig, ManifestsConfig, SplitsConfig
from ecgfm.contracts import empty_table, read_table, table_of, write_table
from ecgfm.ecg import LEADS
from ecgfm.labels import CHALLENGE_2021, make_labels
from ecgfm.manifests import make_manifests
from ecgfm.sketches import SKETCH_LENGTH, sketch
from ecgfm.splits import make_splits

RECORDS_PER_SLICE = 5000
COPIES_PER_SLICE = 250
_RATE_HZ = 50.0  # the lowest that has a sketch
_SAMPLES = 250


@dataclass(frozen=True)
class Measured:
    """What one stage took. peak_mb: the most memory that its process held; counts: what it returned."""

    stage: str
    seconds: float
    peak_mb: float
    written_mb: float
    counts: Mapping[str, int]


def main(records: int, folder: Path) -> str:
    """Measure on so many records in a folder of its own below `folder`, which is removed; the table to print."""
    with tempfile.TemporaryDirectory(prefix="ecgfm-bench-", dir=folder) as scratch:
        measured = bench_tables(records, Path(scratch))
        planted, found = found_copies(Path(scratch))
    lines = [f"{records:,} records in slices of {RECORDS_PER_SLICE:,}", ""]
    lines += ["| stage | seconds | peak memory | written |", "|---|---:|---:|---:|"]
    lines += [
        f"| {one.stage} | {one.seconds:.1f} | {one.peak_mb:,.0f} MB | {one.written_mb:,.0f} MB |" for one in measured
    ]
    (audited,) = (one.counts for one in measured if one.stage == "audit")
    lines += ["", f"copies: {found:,} of {planted:,} found; {audited['copies'] - found:,} that are none"]
    return "\n".join(lines)


def bench_tables(n_records: int, scratch: Path) -> list[Measured]:
    """Simulate the slices below `scratch` and run each stage on them, each in a process of its own."""
    slices = [scratch / "slices" / f"{number:04d}" for number in range(_n_slices(n_records))]
    labels = LabelsConfig("challenge_2021")
    stages: list[tuple[str, Callable[..., Mapping[str, int]], dict[str, Any], Any]] = [
        ("simulate", simulate, {"records": n_records, "slices": slices}, None),
        ("audit", audit, {"slices": slices}, AuditConfig()),
        ("splits", make_splits, {"slices": slices, "audit": scratch / "audit"}, SplitsConfig(unknown_patients="alone")),
        ("labels", make_labels, {"slices": slices}, labels),
        (
            "manifests",
            make_manifests,
            {"slices": slices, "splits": scratch / "splits", "labels": scratch / "labels"},
            ManifestsConfig(rare_labels="drop"),
        ),
    ]
    measured = []
    for name, function, inputs, config in stages:
        out = scratch / name
        out.mkdir()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            seconds, peak_mb, counts = alone.submit(_measure, function, inputs, config, out).result()
        written = scratch / "slices" if name == "simulate" else out
        bytes_written = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
        measured.append(Measured(name, seconds, peak_mb, bytes_written / 1e6, counts))
    return measured


def found_copies(scratch: Path) -> tuple[int, int]:
    """How many copies were planted by `simulate`, and how many of them `audit` tied to their originals."""
    duplicates = read_table(scratch / "audit" / "duplicates.parquet", "duplicates")
    group = pl.col("record_id").replace_strict(duplicates["record_id"], duplicates["group_id"], default=None)
    planted = pl.read_parquet(scratch / "simulate" / "copies.parquet")
    of_copy = planted.select(group)["record_id"]
    of_original = planted.select(record_id="original").select(group)["record_id"]
    return planted.height, int((of_copy == of_original).sum())


def _measure(
    function: Callable[..., Mapping[str, int]], inputs: Mapping[str, Any], config: Any, out: Path
) -> tuple[float, float, dict[str, int]]:
    """In a process of its own: seconds, the most memory held (MB), and what the stage counts."""
    started = time.monotonic()
    counts = function(inputs, config, out)
    seconds = time.monotonic() - started
    status = Path("/proc/self/status")
    if status.exists():  # of this process alone; the other figure may include its parent's, from before it started
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return seconds, int(line.split()[1]) / 1000, dict(counts)
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, dict(counts)


def _n_slices(n_records: int) -> int:
    return -(-n_records // RECORDS_PER_SLICE)


# ---- simulated tables


def simulate(inputs: Mapping[str, Any], config: None, out: Path) -> dict[str, int]:
    """Write the tables of every slice, and `copies.parquet`: which records are copies of which.

    inputs: `records`, how many; `slices`, their directories
    """
    copies: list[pl.DataFrame] = []
    earlier = np.empty((0, len(LEADS), _SAMPLES), dtype=np.float32)
    for number, directory in enumerate(inputs["slices"]):
        directory.mkdir(parents=True)
        first = number * RECORDS_PER_SLICE
        ids = np.arange(first, min(first + RECORDS_PER_SLICE, inputs["records"]))
        rng = np.random.default_rng(number)
        signals = _signals(len(ids), rng)
        n_copies = min(len(earlier), len(ids) // 20)
        if n_copies:
            noise = rng.normal(0, 0.01, (n_copies, len(LEADS), _SAMPLES))
            signals[-n_copies:] = 1.1 * earlier[:n_copies] + noise
            source = np.where(np.arange(len(ids)) < len(ids) - n_copies, "first", "second")
            originals = np.arange(first - RECORDS_PER_SLICE, first - RECORDS_PER_SLICE + n_copies)
            copies.append(
                pl.DataFrame({"record_id": _named("second", ids[-n_copies:]), "original": _named("first", originals)})
            )
        else:
            source = np.full(len(ids), "first")
        earlier = signals[:COPIES_PER_SLICE].copy()
        _write_slice(directory, ids, source, signals, rng)
    schema = {"record_id": pl.String, "original": pl.String}
    pl.concat([pl.DataFrame(schema=schema), *copies]).write_parquet(out / "copies.parquet")
    return {"records": inputs["records"]}


def _signals(n_records: int, rng: np.random.Generator) -> np.ndarray:
    """(record, lead, time) float32, millivolt: 5 s of beats, each five waves of a dipole of its record's own."""
    cycle_s = np.clip(rng.normal(0.85, 0.13, (n_records, 1)), 0.4, 1.5)
    jitter = np.where(rng.random((n_records, 1)) < 0.05, 0.15, 0.02)  # one in twenty as irregular as in fibrillation
    cycles_s = cycle_s * np.maximum(1 + jitter * rng.normal(size=(n_records, 16)), 0.4)
    beats_s = cycles_s.cumsum(axis=1) - cycles_s.sum(axis=1, keepdims=True) * rng.random((n_records, 1)) / 16 - 1.5
    time_s = np.arange(_SAMPLES) / _RATE_HZ
    since_s = np.full((n_records, _SAMPLES), 9.0)
    for beat in range(beats_s.shape[1]):
        passed = time_s - beats_s[:, beat, None]
        since_s = np.where(passed >= 0, passed, since_s)
    waves = np.array([[0.10, 0.025], [0.21, 0.010], [0.25, 0.016], [0.29, 0.012], [0.50, 0.050]])  # P Q R S T: s
    sizes_mv = np.array([0.1, 0.15, 1.0, 0.3, 0.25])[:, None]
    axes = np.array([[0.6, 0.7, 0.1], [-0.5, 0.2, -0.3], [0.7, 0.6, -0.2], [-0.4, -0.5, 0.5], [0.6, 0.6, 0.3]])
    dipole = sizes_mv * (axes + rng.normal(0, 0.4, (n_records, 5, 3)))  # (record, wave, axis)
    shapes = np.exp(-0.5 * ((since_s[:, None] - waves[:, :1]) / waves[:, 1:]) ** 2)  # (record, wave, time)
    angles = np.deg2rad([0, 60, 120, 210, -30, 90])
    limbs = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    chest = np.array([[-0.4, 0, 0.9], [-0.1, 0, 1], [0.3, 0, 0.8], [0.7, 0.1, 0.5], [0.9, 0.1, 0.1], [1, 0.1, -0.2]])
    leads = np.concatenate([limbs, chest])
    signals: np.ndarray = np.matmul(leads @ dipole.transpose(0, 2, 1), shapes).astype(np.float32)
    signals += rng.normal(0, 0.015, signals.shape).astype(np.float32)
    return signals


def _write_slice(
    directory: Path, ids: np.ndarray, source: np.ndarray, signals: np.ndarray, rng: np.random.Generator
) -> None:
    n = len(ids)
    names = pl.Series("record_id", [f"{of}/{number:07d}" for of, number in zip(source, ids, strict=True)])
    codes = np.array([code for _, label in CHALLENGE_2021 for code in label])
    chosen = codes[rng.integers(0, len(codes), (n, 2))]
    faulty = rng.random(n) < 0.01
    start = datetime(2000, 1, 1)
    columns = {
        "record_id": names,
        "source": source,
        "slice_id": [directory.name] * n,
        "raw_path": names + ".hea",
        "patient_id": [
            f"first/p{number // 2}" if of == "first" else None for of, number in zip(source, ids, strict=True)
        ],
        "age_years": rng.integers(18, 90, n).astype(np.float64),
        "sex": np.where(rng.random(n) < 0.5, "female", "male"),
        "codes": list(chosen.tolist()),
        "report": ["sinus rhythm, left axis deviation, otherwise normal ecg"] * n,
        "fold": ids % 10 + 1,
        "recorded_at": [start + timedelta(minutes=int(number)) for number in ids],
        "sampling_rate_hz": np.full(n, 500.0),
        "n_samples": np.full(n, 5000),
        "n_segments": np.full(n, 2),
        "leads": [list(LEADS)] * n,
        "invalid_leads": [["V6"] if one else [] for one in faulty],
        "constant_leads": [[]] * n,
        "lead_mean_mv": signals.mean(axis=2, dtype=np.float64).tolist(),
        "lead_std_mv": signals.std(axis=2, dtype=np.float64).tolist(),
    }
    schema = empty_table("records").schema
    records = pl.DataFrame({name: columns.get(name, [None] * n) for name in schema}, schema=schema)
    write_table(records, "records", directory / "records.parquet")
    row = np.arange(2 * n)
    segments = pl.DataFrame(
        {"record_id": names.gather(row // 2), "segment_index": row % 2, "shard_row": row, "start_s": row % 2 * 5.0}
    )
    write_table(segments, "segments", directory / "segments.parquet", {"records": records})
    outlines = np.stack([_sketch_of(one) for one in signals])
    numbers = pl.Series("sketch", outlines.reshape(-1)).reshape((n, SKETCH_LENGTH)).cast(pl.List(pl.Int8))
    sketches = pl.DataFrame([names, pl.Series("duration_s", np.full(n, 10.0)), numbers])
    write_table(sketches, "sketches", directory / "sketches.parquet")
    rejects = [
        {
            "record_id": f"first/r{directory.name}{number}",
            "source": "first",
            "slice_id": directory.name,
            "raw_path": "r.hea",
            "reason": "truncated",
            "detail": "simulated",
        }
        for number in range(n // 1000)
    ]
    write_table(table_of("rejects", rejects), "rejects", directory / "rejects.parquet")


def _sketch_of(signal_mv: np.ndarray) -> np.ndarray:
    found = sketch(signal_mv, _RATE_HZ)
    assert found is not None
    return found


def _named(source: str, ids: np.ndarray) -> list[str]:
    return [f"{source}/{number:07d}" for number in ids]
