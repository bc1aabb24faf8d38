"""The benchmark of the tables: its simulated cohort is whole, and its copies are found."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from ecgfm.bench.tables import bench_tables, found_copies, main
from ecgfm.contracts import read_tables


def test_every_stage_runs_on_the_simulated_tables_and_the_copies_are_found(tmp_path: Path) -> None:
    measured = {one.stage: one for one in bench_tables(6000, tmp_path)}
    assert list(measured) == ["simulate", "audit", "splits", "labels", "manifests"]
    slices = sorted((tmp_path / "slices").iterdir())
    records = read_tables([directory / "records.parquet" for directory in slices], "records")
    assert records.height == 6000
    segments = read_tables([directory / "segments.parquet" for directory in slices], "segments")
    assert segments.height == 12_000
    assert records["patient_id"].null_count() == 50
    planted, found = found_copies(tmp_path)
    assert planted == 50
    assert found >= 48
    counts = measured["splits"].counts
    assert sum(counts[split] for split in ("train", "valid", "test")) + counts["excluded: invalid_sample"] == 6000
    assert measured["manifests"].counts["pairs: train"] == counts["train"]
    for one in measured.values():
        assert 0 < one.seconds < 120
        assert 50 < one.peak_mb < 4000
    splits = pl.read_parquet(tmp_path / "splits" / "splits.parquet")
    copies = pl.read_parquet(tmp_path / "simulate" / "copies.parquet")
    person = dict(splits.select("record_id", "patient_id").iter_rows())
    tied = sum(person[copy] == person[original] for copy, original in copies.iter_rows())
    assert tied == found


def test_the_printed_table_names_the_stages_and_leaves_nothing_behind(tmp_path: Path) -> None:
    text = main(300, tmp_path)
    assert text.startswith("300 records in slices of 5,000\n")
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")][1:] == [
        *("| simulate", "| audit", "| splits", "| labels", "| manifests"),
    ]
    assert list(tmp_path.iterdir()) == []
