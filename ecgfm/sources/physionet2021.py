"""The PhysioNet/Computing in Cardiology Challenge 2021, version 1.0.3: 88,253 records of eight sets.

Layout: `training/<set>/g<k>/<record>.{hea,mat}`, with age, sex and SNOMED CT codes in the header's comments. There
are no patient ids. The dates in the headers are those of the conversion, so `recorded_at` is null.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from ecgfm.ecg import EcgRecord, InputError
from ecgfm.formats import wfdb
from ecgfm.sources.listing import found, listing

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

_COMMENT = re.compile(r"^\s*#\s*(age|sex|dx)\s*:(.*)$", re.IGNORECASE | re.MULTILINE)
_SEX = {"m": "male", "male": "male", "f": "female", "female": "female"}
_NOT_GIVEN = {"", "unknown", "nan"}
_MAX_AGE_YEARS = 130.0


def list_records(raw_dir: Path) -> pl.DataFrame:
    """The records below `raw_dir`, see data_contracts/listing.yaml: those of every folder of `training/`, or,
    where `raw_dir` has no such folder, of the folders named as one of the eight sets.

    Reads headers, opens no signal file. A header that cannot be read, or a signal without a header, is listed
    all the same, with nulls, so that `read_record` turns it away and it is counted.

    Raises:
        InputError: no record in that layout, or a record name twice.
    """
    rows: dict[str, dict[str, Any]] = {}
    for dataset, folder in _sets(raw_dir):
        for path, has_header in _records(folder):
            raw_path = path.relative_to(raw_dir)
            if (other := rows.get(path.stem)) is not None:
                raise InputError(
                    f"{raw_dir}: expected every record name once, found {other['raw_path']} and {raw_path.as_posix()};"
                    " remove one of the two"
                )
            rows[path.stem] = {
                "record_id": f"{NAME}/{path.stem}",
                "source": NAME,
                "dataset": dataset,
                "slice_id": raw_path.parent.as_posix(),
                "raw_path": raw_path.as_posix(),
                **(_comments(path) if has_header else {}),
            }
    if not rows:
        raise InputError(
            f"{raw_dir}: expected the Challenge 2021 layout, training/<set>/g<k>/<record>.hea with sets such as"
            f" georgia, found {found(raw_dir)}"
        )
    return listing(rows.values())


def read_record(raw_dir: Path, row: Mapping[str, Any]) -> EcgRecord:
    """The record of one row of the listing.

    Raises:
        Rejected: the record cannot be read.
    """
    return wfdb.read_wfdb(raw_dir, row["raw_path"], row["record_id"])


def _sets(raw_dir: Path) -> Iterator[tuple[str, Path]]:
    training = raw_dir / "training"
    if training.is_dir():
        yield from ((folder.name, folder) for folder in sorted(training.iterdir()) if folder.is_dir())
    else:
        yield from ((name, raw_dir / name) for name in DATASETS if (raw_dir / name).is_dir())


def _records(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Every record in a folder and the folders below: where its header is or should be, and whether it is."""
    headers: set[str] = set()
    signals: set[str] = set()
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            stem, suffix = os.path.splitext(entry.name)
            if stem.startswith("."):  # hidden files, such as the ._A0001.mat of some archivers
                continue
            if suffix == ".hea":
                headers.add(stem)
            elif suffix == ".mat":
                signals.add(stem)
            elif entry.is_dir():
                yield from _records(folder / entry.name)
    for stem in sorted(headers | signals):
        yield folder / f"{stem}.hea", stem in headers


def _comments(path: Path) -> dict[str, Any]:
    """Age, sex and codes from a header's comments; null what is absent, unknown or implausible."""
    try:
        text = wfdb.decode(path.read_bytes())
    except OSError:
        return {}  # read_record says what is wrong with it
    fields = {name.lower(): value.strip() for name, value in _COMMENT.findall(text)}
    codes = tuple(dict.fromkeys(code for part in fields.get("dx", "").split(",") if (code := part.strip())))
    return {
        "age_years": _age_years(fields.get("age", "")),
        "sex": _SEX.get(fields.get("sex", "").lower()),
        "codes": None if {code.lower() for code in codes} <= _NOT_GIVEN else list(codes),
    }


def _age_years(text: str) -> float | None:
    try:
        age_years = float(text)
    except ValueError:
        return None
    return age_years if math.isfinite(age_years) and 0 <= age_years <= _MAX_AGE_YEARS else None
