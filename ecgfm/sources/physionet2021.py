"""The PhysioNet/Computing in Cardiology Challenge 2021, version 1.0.3: 88,253 records of eight sets.

Layout: `training/<set>/g<k>/<record>.{hea,mat}`, with age, sex and SNOMED CT codes in the header's comments. There
are no patient ids. The dates in the headers are those of the conversion, so `recorded_at` is null.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from ecgfm.ecg import EcgRecord, InputError
from ecgfm.formats import wfdb
from ecgfm.sources.listing import comments_of, found, header_text, listing, other_source

NAME = "physionet2021"

DATASETS = (
    "chapman_shaoxing",
    "cpsc_2018",
    "cpsc_2018_extra",
    "georgia",
    "ningbo",
    "ptb",
    "ptb-xl",
    "st_petersburg_incart",
)


def list_records(raw_dir: Path) -> pl.DataFrame:
    """The records below `raw_dir`, see data_contracts/listing.yaml: those of every folder of `training/`, or,
    where `raw_dir` has no such folder, of the folders named as one of the eight sets.

    Reads headers, opens no signal file. A header that cannot be read, or a signal without a header, is listed
    all the same, with nulls, so that `read_record` turns it away and it is counted.

    Raises:
        InputError: no record in that layout, or a record name twice.
    """
    rows: dict[str, dict[str, Any]] = {}
    for set_folder in _sets(raw_dir):
        for slice_id, name, has_header in _records(raw_dir, set_folder):
            raw_path = f"{slice_id}/{name}.hea"
            if (other := rows.get(name)) is not None:
                raise InputError(
                    f"{raw_dir}: expected every record name once, found {other['raw_path']} and {raw_path};"
                    " remove one of the two"
                )
            rows[name] = {
                "record_id": f"{NAME}/{name}",
                "source": NAME,
                "dataset": set_folder.rpartition("/")[2],
                "slice_id": slice_id,
                "raw_path": raw_path,
                **(_comments(raw_dir, raw_path) if has_header else {}),
            }
    if not rows:
        raise InputError(
            f"{raw_dir}: expected the Challenge 2021 layout, training/<set>/g<k>/<record>.hea with sets such as"
            f" georgia, found {found(raw_dir)}{other_source(raw_dir, NAME)}"
        )
    return listing(rows.values())


def read_record(raw_dir: Path, row: Mapping[str, Any]) -> EcgRecord:
    """The record of one row of the listing.

    Raises:
        Rejected: the record cannot be read.
    """
    return wfdb.read_wfdb(raw_dir, row["raw_path"], row["record_id"])


def _sets(raw_dir: Path) -> list[str]:
    """The folders of the sets, below `raw_dir`."""
    training = raw_dir / "training"
    if training.is_dir():
        return [f"training/{folder.name}" for folder in sorted(training.iterdir()) if folder.is_dir()]
    return [name for name in DATASETS if (raw_dir / name).is_dir()]


def _records(raw_dir: Path, folder: str) -> Iterator[tuple[str, str, bool]]:
    """Every record in a folder and the folders below it: folder, name, and whether it has a header.

    Plain strings and one look at each folder: there are 88,000 records.
    """
    headers: set[str] = set()
    signals: set[str] = set()
    with os.scandir(raw_dir / folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name, suffix = os.path.splitext(entry.name)
            if name.startswith("."):  # hidden files, such as the ._A0001.mat of some archivers
                continue
            if suffix == ".hea":
                headers.add(name)
            elif suffix == ".mat":
                signals.add(name)
            elif entry.is_dir():
                if entry.is_symlink():
                    raise InputError(f"{entry.path}: expected a folder, found a link to one; move its files here")
                yield from _records(raw_dir, f"{folder}/{entry.name}")
    for name in sorted(headers | signals):
        yield folder, name, name in headers


def _comments(raw_dir: Path, raw_path: str) -> dict[str, Any]:
    """Age, sex and codes from a header's comments; null what is absent, unknown or implausible."""
    said = comments_of(header_text(raw_dir, raw_path))  # of one that cannot be read nothing; reading it says why
    return {column: said[column] for column in ("age_years", "sex", "codes")}
