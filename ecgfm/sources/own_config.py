"""`ecgfm.yaml`: how to read a folder of your own recordings. An unknown key is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from ecgfm.config import STRICT, Positive, from_dict
from ecgfm.ecg import LEADS, InputError, Rejected
from ecgfm.formats.raw_files import inside

FILE = "ecgfm.yaml"
_MAX_BYTES, _MAX_DEPTH = 1 << 16, 20  # far more than a config has; deep nesting takes its parser minutes

Units = Literal["V", "mV", "uV"]
UNITS_PER_MV: dict[str, float] = {"V": 1e-3, "mV": 1.0, "uV": 1e3}

Text = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Text, ...], Field(min_length=1)]


@dataclass(frozen=True, config=STRICT)
class FilesConfig:
    """A folder of files, a recording each. A record's name is its path below the folder without suffix.

    patterns: of paths below the folder, in any case; `*` stays in a folder, `**/` is any folders or none. A WFDB
        record is named by its header: "**/*.hea"
    suffix_in_ids: keep the suffix in the name, where files differ in nothing else
    read_facts: have age, sex, patient, time and statements from the files as well; costs a look into each of them
    override: what the config says in spite of what a file says
    """

    patterns: Names
    suffix_in_ids: bool = False
    read_facts: bool = True
    override: tuple[Literal["units", "sampling_rate_hz"], ...] = ()


@dataclass(frozen=True, config=STRICT)
class ArrayConfig:
    """Arrays of many recordings: HDF5 or .npy. 16-bit numbers are kept as they are, -32768 as an invalid sample.

    patterns: of the files
    dataset: of the array in an HDF5 file
    axes: in the file's order; without `lead` the recordings have one lead
    ids_dataset: the names are in this dataset of the same file
    ids_file, ids_column: or in this column of a CSV file, a line per recording in the array's order
    ids_are_rows: or there are none: a recording is called <file>/<row>
    strip: samples at both ends, at which every lead is zero or NaN, are no part of the recording
    """

    patterns: Names
    axes: tuple[Literal["record", "lead", "time"], ...]
    dataset: str = ""
    ids_dataset: str = ""
    ids_file: str = ""
    ids_column: str = ""
    ids_are_rows: bool = False
    strip: Literal["none", "zero", "nan"] = "none"

    def __post_init__(self) -> None:
        if len(set(self.axes)) < len(self.axes) or not {"record", "time"} <= set(self.axes):
            raise ValueError("axes must name record, lead and time in the array's order, such as [record, time, lead]")
        if [bool(self.ids_dataset), bool(self.ids_file), self.ids_are_rows].count(True) != 1:
            raise ValueError("the names of the recordings: give one of ids_dataset, ids_file, ids_are_rows")
        if bool(self.ids_file) != bool(self.ids_column):
            raise ValueError("ids_file and ids_column go together")


@dataclass(frozen=True, config=STRICT)
class MetadataConfig:
    """A CSV table about the recordings, and which of its columns says what.

    file: below the folder
    record: names the recording: as its record id without "own/", with or without the file's suffix
    match: `path`, the column has paths below the folder; `name`, it has the last part only
    female, male: values of `sex`, beside f, female, m, male in any case
    codes, codes_separator: diagnostic codes in one column; an empty cell is not known, not healthy
    code_columns: or a column of true and false (1 and 0, yes and no) for each code, which is the column's name
    recorded_at_format: where the time is not ISO 8601, as of Python's strptime
    unlisted: recordings that the table does not name: `reject` them, or `keep` them without metadata
    """

    file: Text
    record: Text
    match: Literal["path", "name"] = "path"
    patient: str = ""
    age: str = ""
    sex: str = ""
    female: tuple[Text, ...] = ()
    male: tuple[Text, ...] = ()
    codes: str = ""
    codes_separator: Text = ";"
    code_columns: tuple[Text, ...] = ()
    report: str = ""
    fold: str = ""
    site: str = ""
    device: str = ""
    recorded_at: str = ""
    recorded_at_format: str = ""
    dataset: str = ""
    unlisted: Literal["reject", "keep"] = "reject"

    def __post_init__(self) -> None:
        if self.codes and self.code_columns:
            raise ValueError("codes and code_columns: give one of the two")
        if set(self.female) & set(self.male):
            raise ValueError("a value of sex cannot be both female and male")


@dataclass(frozen=True, config=STRICT)
class OwnConfig:
    """What stands in `ecgfm.yaml`: either `files` or `array`.

    name: of the dataset
    leads: names of the leads in the recordings' order; of files only where theirs are to be left aside
    rename_leads: names as in the files, in any case -> names as they shall be
    sampling_rate_hz, units: of an array; of files that do not say it themselves
    """

    name: Text
    files: FilesConfig | None = None
    array: ArrayConfig | None = None
    leads: tuple[Text, ...] = ()
    rename_leads: dict[str, Text] | None = None
    sampling_rate_hz: Positive | None = None
    units: Units | None = None
    metadata: MetadataConfig | None = None

    def __post_init__(self) -> None:
        if (self.files is None) == (self.array is None):
            raise ValueError("give either files or array")
        names = self.leads or tuple((self.rename_leads or {}).values())
        if len({name.lower() for name in names}) < len(names):
            raise ValueError("leads must name each lead once")
        if self.leads and not {name.lower() for name in names} & {lead.lower() for lead in LEADS}:
            raise ValueError(f"leads must name some of {', '.join(LEADS)}")
        if self.leads and self.rename_leads:
            raise ValueError("leads and rename_leads: give one of the two")
        if self.array is not None:
            missing = [key for key in ("leads", "sampling_rate_hz", "units") if not getattr(self, key)]
            if missing:
                raise ValueError(f"an array does not say its {', '.join(missing)}: give them")
            if "lead" not in self.array.axes and len(self.leads) > 1:
                raise ValueError("array.axes without lead is an array of one lead, but leads names several")
        for key in self.files.override if self.files else ():
            if not getattr(self, key):
                raise ValueError(f"files.override: {key} is to override what the files say, but is not given")


def load(raw_dir: Path) -> OwnConfig:
    """The `ecgfm.yaml` of a raw folder.

    Raises:
        InputError: there is none, it is not YAML, or has an unknown key or a wrong value.
    """
    path = raw_dir / FILE
    try:
        with open(inside(raw_dir, FILE), "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (OSError, Rejected) as error:
        why = error.detail if isinstance(error, Rejected) else error.strerror
        raise InputError(f"{path}: {why}") from error
    if len(content) > _MAX_BYTES:
        raise InputError(f"{path}: expected at most {_MAX_BYTES:,} bytes, found more")
    try:
        text = content.decode()
        _check_plain(text, path)
        values = yaml.safe_load(text)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, no such day, a number of thousands of digits
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys and values, found {type(values).__name__}")
    return from_dict(OwnConfig, values, str(path))


def _check_plain(text: str, path: Path) -> None:
    """Raises: InputError: a document whose few lines stand for more than memory holds, or for a depth of thousands."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _MAX_DEPTH:
            raise InputError(f"{path}: expected YAML without aliases (*name) and at most {_MAX_DEPTH} levels deep")
