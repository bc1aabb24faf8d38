"""Codes to labels: 1 present, 0 absent, null unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ecgfm.config import LabelsConfig
from ecgfm.contracts import contract, read_tables, write_table
from ecgfm.ecg import InputError
from ecgfm.label_space import Label, LabelSpace
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
    """Write `labels.parquet` (a column per label) and `label_space.yaml`.

    inputs: `slices`, the directories of the prepared slices

    Raises:
        InputError: a source has codes and none of them belongs to a label; no record has a code.
    """
    tables = [slice_dir / "records.parquet" for slice_dir in inputs["slices"]]
    records = read_tables(tables, "records", ("record_id", "source", "codes"))
    space = label_space(config)
    labels = assign(records, space, f"scheme {config.scheme}")
    write_table(labels, "labels", out / "labels.parquet", {"records": records})
    space.write(out / "label_space.yaml")
    unknown = records["codes"].null_count()
    return {"records": records.height, "labels": len(space.labels), "records without codes": unknown} | {
        f"positive: {name}": int(labels[name].sum()) for name in space.names
    }


def label_space(config: LabelsConfig) -> LabelSpace:
    """The labels that a config names.

    Raises:
        InputError: a label has the name of a column beside the labels, or `max_labels` names an unknown label.
    """
    if config.scheme == "challenge_2021":
        codes = dict(CHALLENGE_2021)
    elif config.scheme == "scp":
        codes = {name: (f"{config.scp_level}:{name}",) for name in ptb_xl.names_at(config.scp_level)}
    else:
        codes = dict(config.codes)
    beside = {column for table in ("labelled_segments", "predictions") for column in contract(table)["columns"]}
    if taken := [name for name in codes if name in beside]:
        raise InputError(f"labels.codes: {', '.join(taken)}: a column of the tables has that name; give another")
    if unknown := [name for name in config.max_labels if name not in codes]:
        raise InputError(f"labels.max_labels: no label {', '.join(unknown)}; labels: {', '.join(codes)}")
    return LabelSpace(
        tuple(Label(name, of, "max" if name in config.max_labels else "mean") for name, of in codes.items())
    )


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
