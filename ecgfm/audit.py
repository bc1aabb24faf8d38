"""The same ECG under several names, found before anything is split.

PTB-XL is a part of Challenge 2021, at two rates; archives hold an ECG twice, also under two patients. Two records are
the same ECG if their sketches (sketches.py) are near: leads I and II alike, all leads of the same size but for a
common gain, and the same duration where they are shorter than what a sketch knows. A longer record and its beginning
are the same ECG.

What was measured on 390 records of eight archives, 72 pairs of which are the same (PTB-XL at 500 and 100 Hz and in
Challenge 2021; 12 leads and 6, 4, 3, 2): the least similar of these has similarity 0.996 and level spread 1.08, the
most similar of the 77,743 others 0.72. Of millions of pairs of different ECGs, each taken from all beginnings as if
their beats had met by chance, two in a million had similarity over 0.85, none over 0.9, and none over 0.7 together with
a spread under 1.25. Of a million simulated records, more alike than real ones are, 24 of 49,652 found copies were
none at 0.97, 286 of 49,980 at 0.95. Two records with no more than two leads in common have little but their
similarity to be told apart by.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ecgfm.config import AuditConfig
from ecgfm.contracts import empty_table, read_tables, write_table
from ecgfm.ecg import InputError
from ecgfm.sketches import SKETCH_LENGTH, SKETCHED_SECONDS, near_pairs, similarity

SAME_DURATION_S = 0.02
SHOWN_GROUPS = 20


def audit(inputs: Mapping[str, Any], config: AuditConfig, out: Path) -> dict[str, int]:
    """Write `duplicates.parquet` and, for a person, `summary.md`.

    inputs: `slices`, the directories of the prepared slices (`records.parquet`, `sketches.parquet`)

    Raises:
        InputError: a damaged table.
    """
    tables = [slice_dir / "records.parquet" for slice_dir in inputs["slices"]]
    records = read_tables(tables, "records", ("record_id", "source", "patient_id"))
    sketches = read_tables([slice_dir / "sketches.parquet" for slice_dir in inputs["slices"]], "sketches")
    duplicates = find_duplicates(records, sketches, config)
    write_table(duplicates, "duplicates", out / "duplicates.parquet", {"records": records})
    members = pl.concat(
        [
            pl.scan_parquet(path).join(duplicates.lazy().select("record_id"), on="record_id", how="semi")
            for path in tables
        ]
    ).select("record_id", "dataset", "sampling_rate_hz", "n_samples", "leads", "age_years", "sex", "codes", "fold")
    without = records.height - sketches["sketch"].count()
    text = summary(records, duplicates, members.collect(), without, config)
    (out / "summary.md").write_text(text, encoding="utf-8")
    groups, tied = duplicates["group_id"].n_unique(), tied_patients(duplicates)
    return {
        "records": records.height,
        "groups of the same ECG": groups,
        "copies": duplicates.height - groups,
        "patients tied": tied["patient_id"].len(),
        "records without a sketch": without,
    }


def find_duplicates(records: pl.DataFrame, sketches: pl.DataFrame, config: AuditConfig) -> pl.DataFrame:
    """The table `duplicates`; the order of records and sketches does not matter.

    records: record_id, source, patient_id; sketches: the table `sketches`

    Raises:
        InputError: sketches of another length.
    """
    known = sketches.filter(pl.col("sketch").is_not_null()).sort("record_id")
    wrong = known.filter(pl.col("sketch").list.len() != SKETCH_LENGTH)
    if wrong.height:
        raise InputError(
            f"audit: the sketch of {wrong['record_id'][0]} has {wrong['sketch'].list.len()[0]} numbers instead of "
            f"{SKETCH_LENGTH}; prepare again with --force prepare"
        )
    numbers = known["sketch"].explode().to_numpy().reshape(known.height, SKETCH_LENGTH)
    pairs = near_pairs(numbers, config.min_similarity, config.max_level_spread)
    duration = known["duration_s"].to_numpy()
    one, other = duration[pairs[:, 0]], duration[pairs[:, 1]]
    same = (np.abs(one - other) <= SAME_DURATION_S) | (np.minimum(one, other) >= SKETCHED_SECONDS)
    group = _components(pairs[same], known.height)
    _, first, group, size = np.unique(group, return_index=True, return_inverse=True, return_counts=True)
    member = np.flatnonzero(size[group] > 1)
    named_after = first[group[member]]  # records are in the order of their ids
    cosine, _ = similarity(numbers[named_after], numbers[member])
    ids = known["record_id"]
    found = pl.DataFrame(
        {
            "record_id": ids[member],
            "group_id": ids[named_after],
            "n_records": size[group[member]],
            "similarity": pl.Series(cosine, dtype=pl.Float32).fill_nan(None),
        }
    ).join(records.select("record_id", "source", "patient_id"), on="record_id")
    return (
        found.join(_persons(found), on="group_id", how="left")
        .select(empty_table("duplicates").columns)
        .sort("record_id")
    )


def _persons(found: pl.DataFrame) -> pl.DataFrame:
    """group_id, person_id: groups that share a patient, and patients that share a group, are one person."""
    named = found.drop_nulls("patient_id").select("group_id", "patient_id").unique().sort("group_id", "patient_id")
    groups, patients = named["group_id"].rank("dense").to_numpy(), named["patient_id"].rank("dense").to_numpy()
    n_groups = int(groups.max(initial=0))
    edges = np.stack([groups - 1, n_groups + patients - 1], axis=1).astype(np.int64)
    component = _components(edges, n_groups + int(patients.max(initial=0)))
    of_group = named.with_columns(component=pl.Series(component[edges[:, 0]]))
    return of_group.select("group_id", person_id=pl.col("patient_id").min().over("component")).unique()


def _components(edges: np.ndarray, n_nodes: int) -> np.ndarray:
    """(node,) the number of the connected component of each node; edges: (edge, 2)."""
    ones = np.ones(len(edges), dtype=np.int8)
    graph = coo_array((ones, (edges[:, 0], edges[:, 1])), shape=(n_nodes, n_nodes))
    components: np.ndarray = connected_components(graph, directed=False)[1]
    return components


def tied_patients(duplicates: pl.DataFrame) -> pl.DataFrame:
    """person_id, patient_id: the patients who share an ECG with another, as one person."""
    known = duplicates.drop_nulls("patient_id").select("person_id", "patient_id").unique()
    return known.filter(pl.len().over("person_id") > 1).sort("person_id", "patient_id")


def summary(
    records: pl.DataFrame, duplicates: pl.DataFrame, members: pl.DataFrame, without: int, config: AuditConfig
) -> str:
    """What was found, as Markdown: how many groups, of which sources, what their records disagree on, the first groups.

    members: what is shown of the records in groups; without: records without a sketch
    """
    groups = duplicates["group_id"].n_unique()
    rule = (
        f"a similarity of at least {config.min_similarity:g} and a level spread of at most {config.max_level_spread:g}"
    )
    result = (
        f"Of {_count(records.height, 'record')}, {duplicates.height:,} are in {_count(groups, 'group')} of the same "
        f"ECG: {duplicates.height - groups:,} more than there are ECGs."
        if groups
        else f"No two of {_count(records.height, 'record')} are the same ECG."
    )
    lines = ["# The same ECG under several names", "", f"{result} The same means {rule}."]
    if without:
        lines += ["", f"Not compared: {_count(without, 'record')} in which neither lead I nor lead II varies over 2 s."]
    if not groups:
        return "\n".join(lines) + "\n"
    told = duplicates.join(members, on="record_id").sort("group_id", "record_id")
    by_sources = (
        told.group_by("group_id", maintain_order=True)
        .agg(sources=pl.col("source").unique().sort().str.join(" + "))
        .group_by("sources")
        .agg(groups=pl.len(), example=pl.col("group_id").min())
        .sort("sources")
    )
    names = dict(told.group_by("group_id").agg(pl.col("record_id").str.join(" = ")).iter_rows())
    lines += ["", "## Where", "", "| sources | groups | for example |", "|---|---:|---|"]
    lines += [f"| {sources} | {count:,} | {names[example]} |" for sources, count, example in by_sources.iter_rows()]
    lines += ["", "## What their records disagree on", ""]
    lines += [f"- {what}: {_count(count, 'group')}" for what, count in _disagreements(told).items()]
    tied = tied_patients(duplicates)
    nameless = duplicates.filter(pl.col("patient_id").is_null() & pl.col("person_id").is_not_null())
    lines += [
        "",
        "## Patients",
        "",
        f"- sharing an ECG with another patient: {_count(tied.height, 'patient')}, "
        f"as {_count(tied['person_id'].n_unique(), 'person')}",
        f"- of unknown patients, but a copy of a known patient's ECG: {_count(nameless.height, 'record')}",
    ]
    lines += [
        f"- {row['person_id']} = {', '.join(row['patient_id'])}"
        for row in tied.filter(pl.col("patient_id") != pl.col("person_id"))
        .group_by("person_id", maintain_order=True)
        .agg("patient_id")
        .head(SHOWN_GROUPS)
        .iter_rows(named=True)
    ]
    shown = told.filter(pl.col("group_id").rank("dense") <= SHOWN_GROUPS)
    head = f"The first {SHOWN_GROUPS} of {groups:,} groups" if groups > SHOWN_GROUPS else "The groups"
    lines += [
        "",
        f"## {head}",
        "",
        "| record | patient | rate | duration | leads | similarity |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in shown.iter_rows(named=True):
        name = row["record_id"] if row["record_id"] == row["group_id"] else f"= {row['record_id']}"
        similar = "" if row["record_id"] == row["group_id"] else _number(row["similarity"])
        lines.append(
            f"| {name} | {row['patient_id'] or 'unknown'} | {row['sampling_rate_hz']:g} Hz "
            f"| {row['n_samples'] / row['sampling_rate_hz']:.2f} s | {len(row['leads'])} | {similar} |"
        )
    return "\n".join(lines) + "\n"


def _disagreements(told: pl.DataFrame) -> dict[str, int]:
    """In how many groups records differ in what should be equal; codes and folds are a source's own."""
    per_group = told.group_by("group_id").agg(
        patient=pl.col("patient_id").drop_nulls().n_unique() > 1,
        duration=(pl.col("n_samples") / pl.col("sampling_rate_hz")).pipe(lambda s: s.max() - s.min()) > SAME_DURATION_S,
        sex=pl.col("sex").drop_nulls().n_unique() > 1,
        age=(pl.col("age_years").max() - pl.col("age_years").min()).fill_null(0) > 1,
    )
    per_source = told.group_by("group_id", "source").agg(
        codes=pl.col("codes").list.sort().list.join(" ").drop_nulls().n_unique() > 1,
        fold=pl.col("fold").drop_nulls().n_unique() > 1,
    )
    differ = {
        "patient": per_group.filter("patient"),
        "official fold": per_source.filter("fold"),
        "codes within a source": per_source.filter("codes"),
        "age by more than a year": per_group.filter("age"),
        "sex": per_group.filter("sex"),
        "duration (one is the beginning of the other)": per_group.filter("duration"),
    }
    return {what: groups["group_id"].n_unique() for what, groups in differ.items()}


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
