"""PTB-XL, version 1.0.3: 21,799 records of 18,869 patients.

Layout: `ptbxl_database.csv`, `records500/<5>/<5>_hr.{hea,dat}` (500 Hz) and `records100/<5>/<5>_lr.{hea,dat}` (the
same at 100 Hz).

The codes of a record are `<level>:<name>`: each of its SCP-ECG statements at every level it has, as in the published
benchmark (Strodthoff et al., IEEE J. Biomed. Health Inform. 25, 2021), which counts every statement of a record
whatever the likelihood beside it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import polars as pl

from ecgfm.ecg import EcgRecord, InputError
from ecgfm.formats import wfdb
from ecgfm.sources.listing import found, listing, other_source, read_csv

NAME = "ptb_xl"

Level = Literal["all", "diagnostic", "subdiagnostic", "superdiagnostic", "form", "rhythm"]
LEVELS: tuple[Level, ...] = get_args(Level)

_SEX = {"0": "male", "1": "female"}
_AGE_OVER_89_YEARS = 300.0  # PTB-XL writes 300 for everybody over 89, so that none can be told by the age
_LOWEST_AGE_OVER_89_YEARS = 90.0
_COLUMNS = (
    "ecg_id",
    "patient_id",
    "age",
    "sex",
    "recording_date",
    "report",
    "scp_codes",
    "strat_fold",
    "site",
    "device",
)


class Statement(NamedTuple):
    """One line of PTB-XL's scp_statements.csv."""

    code: str
    superclass: str | None
    subclass: str | None
    is_diagnostic: bool
    is_form: bool
    is_rhythm: bool

    def names(self) -> Iterator[tuple[Level, str]]:
        """The levels that the statement has, with its name there."""
        yield "all", self.code
        if self.is_diagnostic:
            yield "diagnostic", self.code
        if self.subclass is not None:
            yield "subdiagnostic", self.subclass
        if self.superclass is not None:
            yield "superdiagnostic", self.superclass
        if self.is_form:
            yield "form", self.code
        if self.is_rhythm:
            yield "rhythm", self.code


# fmt: off
STATEMENTS = tuple(Statement(*line) for line in (
    ("NDT", "STTC", "STTC", True, True, False),
    ("NST_", "STTC", "NST_", True, True, False),
    ("DIG", "STTC", "STTC", True, True, False),
    ("LNGQT", "STTC", "STTC", True, True, False),
    ("NORM", "NORM", "NORM", True, False, False),
    ("IMI", "MI", "IMI", True, False, False),
    ("ASMI", "MI", "AMI", True, False, False),
    ("LVH", "HYP", "LVH", True, False, False),
    ("LAFB", "CD", "LAFB/LPFB", True, False, False),
    ("ISC_", "STTC", "ISC_", True, False, False),
    ("IRBBB", "CD", "IRBBB", True, False, False),
    ("1AVB", "CD", "_AVB", True, False, False),
    ("IVCD", "CD", "IVCD", True, False, False),
    ("ISCAL", "STTC", "ISCA", True, False, False),
    ("CRBBB", "CD", "CRBBB", True, False, False),
    ("CLBBB", "CD", "CLBBB", True, False, False),
    ("ILMI", "MI", "IMI", True, False, False),
    ("LAO/LAE", "HYP", "LAO/LAE", True, False, False),
    ("AMI", "MI", "AMI", True, False, False),
    ("ALMI", "MI", "AMI", True, False, False),
    ("ISCIN", "STTC", "ISCI", True, False, False),
    ("INJAS", "MI", "AMI", True, False, False),
    ("LMI", "MI", "LMI", True, False, False),
    ("ISCIL", "STTC", "ISCI", True, False, False),
    ("LPFB", "CD", "LAFB/LPFB", True, False, False),
    ("ISCAS", "STTC", "ISCA", True, False, False),
    ("INJAL", "MI", "AMI", True, False, False),
    ("ISCLA", "STTC", "ISCA", True, False, False),
    ("RVH", "HYP", "RVH", True, False, False),
    ("ANEUR", "STTC", "STTC", True, False, False),
    ("RAO/RAE", "HYP", "RAO/RAE", True, False, False),
    ("EL", "STTC", "STTC", True, False, False),
    ("WPW", "CD", "WPW", True, False, False),
    ("ILBBB", "CD", "ILBBB", True, False, False),
    ("IPLMI", "MI", "IMI", True, False, False),
    ("ISCAN", "STTC", "ISCA", True, False, False),
    ("IPMI", "MI", "IMI", True, False, False),
    ("SEHYP", "HYP", "SEHYP", True, False, False),
    ("INJIN", "MI", "IMI", True, False, False),
    ("INJLA", "MI", "AMI", True, False, False),
    ("PMI", "MI", "PMI", True, False, False),
    ("3AVB", "CD", "_AVB", True, False, False),
    ("INJIL", "MI", "IMI", True, False, False),
    ("2AVB", "CD", "_AVB", True, False, False),
    ("ABQRS", None, None, False, True, False),
    ("PVC", None, None, False, True, False),
    ("STD_", None, None, False, True, False),
    ("VCLVH", None, None, False, True, False),
    ("QWAVE", None, None, False, True, False),
    ("LOWT", None, None, False, True, False),
    ("NT_", None, None, False, True, False),
    ("PAC", None, None, False, True, False),
    ("LPR", None, None, False, True, False),
    ("INVT", None, None, False, True, False),
    ("LVOLT", None, None, False, True, False),
    ("HVOLT", None, None, False, True, False),
    ("TAB_", None, None, False, True, False),
    ("STE_", None, None, False, True, False),
    ("PRC(S)", None, None, False, True, False),
    ("SR", None, None, False, False, True),
    ("AFIB", None, None, False, False, True),
    ("STACH", None, None, False, False, True),
    ("SARRH", None, None, False, False, True),
    ("SBRAD", None, None, False, False, True),
    ("PACE", None, None, False, False, True),
    ("SVARR", None, None, False, False, True),
    ("BIGU", None, None, False, False, True),
    ("AFLT", None, None, False, False, True),
    ("SVTAC", None, None, False, False, True),
    ("PSVT", None, None, False, False, True),
    ("TRIGU", None, None, False, False, True),
))
# fmt: on
"""The 71 statements of the published scp_statements.csv, in its order."""

_STATEMENT = {statement.code: statement for statement in STATEMENTS}


def names_at(level: Level) -> tuple[str, ...]:
    """Every name that a code of this level can have, ordered."""
    return tuple(sorted({name for statement in STATEMENTS for at, name in statement.names() if at == level}))


def list_records(raw_dir: Path) -> pl.DataFrame:
    """The records of `ptbxl_database.csv`, see data_contracts/listing.yaml, at 500 Hz where `records500/` is there,
    else at 100 Hz. Opens no other file: a record whose files are missing is listed and turned away when read.

    Ages over 89 years, which the archive hides, are given as 90.

    Raises:
        InputError: the table is missing or damaged, or neither folder of records is there.
    """
    path = raw_dir / "ptbxl_database.csv"
    if not path.exists():
        raise InputError(
            f"{raw_dir}: expected PTB-XL's ptbxl_database.csv and records500/, found {found(raw_dir)}"
            f"{other_source(raw_dir, NAME)}"
        )
    if (raw_dir / "records500").is_dir():
        file_column = "filename_hr"
    elif (raw_dir / "records100").is_dir():
        file_column = "filename_lr"
    else:
        raise InputError(f"{raw_dir}: expected a folder records500 or records100, found {found(raw_dir)}")
    table = read_csv(raw_dir, path.name, (*_COLUMNS, file_column))
    if not table.height:
        raise InputError(f"{path}: expected one line per record, found none")
    rows = [_row(line, line[file_column], path) for line in table.iter_rows(named=True)]
    if len({row["record_id"] for row in rows}) != len(rows):
        raise InputError(f"{path}: expected every ecg_id once, found one more than once; is the file as published?")
    return listing(rows)


def read_record(raw_dir: Path, row: Mapping[str, Any]) -> EcgRecord:
    """The record of one row of the listing.

    Raises:
        Rejected: the record cannot be read.
    """
    return wfdb.read_wfdb(raw_dir, row["raw_path"], row["record_id"])


def codes_of(scp_codes: Mapping[str, float]) -> list[str]:
    """`<level>:<name>` for every statement and level, each once, in the order of the statements.

    A statement that the published table lacks has the level `all` alone.

    >>> codes_of({"NORM": 100.0, "SR": 0.0})
    ['all:NORM', 'diagnostic:NORM', 'subdiagnostic:NORM', 'superdiagnostic:NORM', 'all:SR', 'rhythm:SR']
    """
    unknown = (None, None, False, False, False)
    statements = (_STATEMENT.get(code) or Statement(code, *unknown) for code in scp_codes)
    return list(dict.fromkeys(f"{level}:{name}" for statement in statements for level, name in statement.names()))


def _row(line: Mapping[str, str | None], file: str | None, path: Path) -> dict[str, Any]:
    """A line of ptbxl_database.csv as a row of the listing."""
    try:
        ecg_id = int(line["ecg_id"] or "")
        if not file:
            raise ValueError("no file name")
        scp_codes = ast.literal_eval(line["scp_codes"] or "{}")
        if not isinstance(scp_codes, dict):
            raise ValueError(f"scp_codes: expected a dict, found {line['scp_codes']!r}")
        age_years = None if line["age"] is None else float(line["age"])
        return {
            "record_id": f"{NAME}/{ecg_id:05d}",
            "source": NAME,
            "slice_id": file.rpartition("/")[0],
            "raw_path": f"{file}.hea",
            "patient_id": None if line["patient_id"] is None else f"{NAME}/{int(float(line['patient_id']))}",
            "age_years": _LOWEST_AGE_OVER_89_YEARS if age_years == _AGE_OVER_89_YEARS else age_years,
            "sex": _SEX.get(line["sex"] or ""),
            "codes": codes_of(scp_codes),
            "report": line["report"],
            "fold": None if line["strat_fold"] is None else int(line["strat_fold"]),
            "site": None if line["site"] is None else f"{float(line['site']):g}",
            "device": None if line["device"] is None else " ".join(line["device"].split()),
            "recorded_at": None if line["recording_date"] is None else datetime.fromisoformat(line["recording_date"]),
        }
    except (ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise InputError(f"{path}: ecg_id {line['ecg_id']}: expected a line as published, found: {error}") from error
