"""Codes, or columns, to labels: 1 present, 0 absent, null unknown; or numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ecgfm.config import LabelsConfig
from ecgfm.contracts import contract, read_tables, write_table
from ecgfm.ecg import InputError
from ecgfm.label_reports import from_reports
from ecgfm.label_space import Label, LabelSpace
from ecgfm.label_tables import columns_of_records, counts_of, from_columns, read_table_of_labels
from ecgfm.sources import ptb_xl

CHALLENGE_2021: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("atrial fibrillation", ("164889003",)),
    ("atrial flutter", ("164890007",)),
    ("bundle branch block", ("6374002",)),
    ("bradycardia", ("426627000",)),
    ("left bundle branch block", ("164909002", "733534002")),
    ("right bundle branch block", ("59118001", "713427006")),
    ("1st degree AV block", ("270492004",)),
    ("incomplete right bundle branch block", ("713426002",)),
    ("left axis deviation", ("39732003",)),
    ("left anterior fascicular block", ("445118002",)),
    ("prolonged PR interval", ("164947007",)),
    ("low QRS voltages", ("251146004",)),
    ("prolonged QT interval", ("111975006",)),
    ("nonspecific intraventricular conduction disorder", ("698252002",)),
    ("sinus rhythm", ("426783006",)),
    ("premature atrial contraction", ("284470004", "63593006")),
    ("pacing rhythm", ("10370003",)),
    ("poor R wave progression", ("365413008",)),
    ("premature ventricular contraction", ("427172004", "17338001")),
    ("Q wave abnormal", ("164917005",)),
    ("right axis deviation", ("47665007",)),
    ("sinus arrhythmia", ("427393009",)),
    ("sinus bradycardia", ("426177001",)),
    ("sinus tachycardia", ("427084000",)),
    ("T wave abnormal", ("164934002",)),
    ("T wave inversion", ("59931005",)),
)
"""The 26 classes of the PhysioNet/CinC Challenge 2021 (30 SNOMED CT codes; four pairs are scored as one)."""


def make_labels(inputs: Mapping[str, Any], config: LabelsConfig, out: Path) -> dict[str, int]:
    """Write `labels.parquet` (a column per label) and `label_space.yaml`; with scheme `reports` also what each report
    asserts by which words, `findings.parquet`, and what nothing explains, `unmatched.csv`.

    inputs: `slices`, the directories of the prepared slices; with scheme `table` also `table`, its path; with scheme
        `reports` what reports are read by, which `config.reports` names too

    Raises:
        InputError: a source has codes and none of them belongs to a label; no record has a code; a table or a column
            that is not as the config says (label_tables.py); a label has the name of a column beside the labels.
    """
    tables = [slice_dir / "records.parquet" for slice_dir in inputs["slices"]]
    columns = ["record_id", "patient_id", "source", "codes"]
    counts: dict[str, int]
    if config.scheme == "table":
        records = read_tables(tables, "records", columns)
        values, counts = read_table_of_labels(inputs["table"], list(config.columns.values()), records)
        labels, space = from_columns(values, config)
    elif config.scheme == "columns":
        wanted = columns_of_records(config)
        records = read_tables(tables, "records", list(dict.fromkeys([*columns, *wanted])))
        labels, space = from_columns(records.sort("record_id"), config)
        counts = {}
    elif config.scheme == "reports":
        records = read_tables(tables, "records", [*columns, "report"])
        labels, space, counts = from_reports(records.sort("record_id"), config, out)
        if config.task == "multiclass":
            labels, several, none = exclusive(labels, space)
            counts |= {"records of several classes": several, "records of no class": none}
    else:
        records = read_tables(tables, "records", columns)
        space = label_space(config)
        labels = assign(records, space, f"scheme {config.scheme}")
        counts = {"records without codes": records["codes"].null_count()}
        if config.task == "multiclass":
            labels, several, none = exclusive(labels, space)
            counts |= {"records of several classes": several, "records of no class": none}
    _check_names(space)
    if labels.select(pl.all_horizontal(pl.col(name).is_null().all() for name in space.names)).item():
        raise InputError(f"labels: of {labels.height:,} records none has a known label; choose others")
    write_table(labels, space.contract("labels"), out / "labels.parquet", {"records": records})
    space.write(out / "label_space.yaml")
    return {"records": records.height, "labels": len(space.labels), **counts, **counts_of(labels, space)}


def label_space(config: LabelsConfig) -> LabelSpace:
    """The labels that a config names by codes.

    Raises:
        InputError: a label has the name of a column beside the labels, or `max_labels` names an unknown label, or there
            is one class alone.
    """
    if config.scheme == "challenge_2021":
        codes = dict(CHALLENGE_2021)
    elif config.scheme == "scp":
        codes = {name: (f"{config.scp_level}:{name}",) for name in ptb_xl.names_at(config.scp_level)}
    else:
        codes = dict(config.codes)
    if unknown := [name for name in config.max_labels if name not in codes]:
        raise InputError(f"labels.max_labels: no label {', '.join(unknown)}; labels: {', '.join(codes)}")
    if config.task == "multiclass" and len(codes) < 2:
        raise InputError(f"labels: task 'multiclass' needs two classes or more, found {', '.join(codes)} alone")
    space = LabelSpace(
        tuple(Label(name, of, "max" if name in config.max_labels else "mean") for name, of in codes.items()),
        {},
        config.task,
    )
    _check_names(space)
    return space


def _check_names(space: LabelSpace) -> None:
    tables = ("labelled_segments", "predictions")
    beside = {column for table in tables for column in contract(table)["columns"]}
    if taken := [name for name in space.names if name in beside]:
        raise InputError(f"labels: {', '.join(taken)}: a column of the tables has that name; give another")


def exclusive(labels: pl.DataFrame, space: LabelSpace) -> tuple[pl.DataFrame, int, int]:
    """The labels of records that have exactly one of them; all unknown where they have several, or none of them, and
    how many these are."""
    how_many = pl.sum_horizontal(pl.col(name) for name in space.names)
    is_known = pl.any_horizontal(pl.col(name).is_not_null() for name in space.names)
    several, none = labels.select(
        (is_known & (how_many > 1)).sum().alias("several"), (is_known & (how_many == 0)).sum().alias("none")
    ).row(0)
    kept = [pl.when(is_known & (how_many == 1)).then(pl.col(name)).alias(name) for name in space.names]
    return labels.with_columns(kept), several, none


def assign(records: pl.DataFrame, space: LabelSpace, scheme: str) -> pl.DataFrame:
    """A 0/1 column per label from the column `codes`; null where a record's codes are null.

    Raises:
        InputError: see `make_labels`.
    """
    known = sorted({code for label in space.labels for code in label.codes})
    _require_codes(records, known, scheme)
    of_label = [
        pl.col("codes").list.eval(pl.element().is_in(label.codes)).list.any().cast(pl.Int8).alias(label.name)
        for label in space.labels
    ]
    return records.select("record_id", *of_label).sort("record_id")


def _require_codes(records: pl.DataFrame, known: Sequence[str], scheme: str) -> None:
    """Codes of another vocabulary would make every label 0 without a word: say so instead."""
    coded = records.filter(pl.col("codes").list.len() > 0)
    if coded.is_empty():
        raise InputError(f"labels: none of the {records.height} records has a diagnostic code; {scheme} needs some")
    for (source,), rows in coded.group_by("source", maintain_order=True):
        codes = rows["codes"].explode()
        if not codes.is_in(known).any():
            raise InputError(
                f"labels: none of the {rows.height} records of {source} has a code of {scheme} "
                f"(theirs look like {codes[0]}); choose another labels.scheme"
            )
