"""Your own recordings: a folder of files or of arrays, told by one `ecgfm.yaml` in it (`own_config.OwnConfig`).

Files are WFDB records and those of `ecgfm.formats`; arrays are HDF5 or .npy. A CSV table may say more of them. A slice
is a folder of files, or an array. A recording of the folder that the table does not name, and one of the table that the
folder does not have, are listed and turned away.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ecgfm import formats
from ecgfm.ecg import Digital, EcgRecord, InputError, Rejected
from ecgfm.formats import wfdb
from ecgfm.formats.raw_files import inside
from ecgfm.sources.arrays import ArrayFile, kept_open, open_array, without_padding
from ecgfm.sources.listing import comments_of, found, header_text, listing, other_source, read_csv
from ecgfm.sources.own_config import FILE, UNITS_PER_MV, ArrayConfig, FilesConfig, OwnConfig, load
from ecgfm.sources.own_metadata import with_metadata

NAME = "own"

_ROOT = "."  # the slice of the files that lie in the raw folder itself
_UNITS = {units.lower(): units for units in UNITS_PER_MV} | {"\u03bcv": "uV"}


def list_records(raw_dir: Path) -> pl.DataFrame:
    """The records that `ecgfm.yaml` and its table name, see data_contracts/listing.yaml.

    Opens WFDB headers and, unless `files.read_facts` is false, the other files for what they say beside the signal;
    of an array its ids. What cannot be read is listed all the same, so that `read_record` turns it away.

    Raises:
        InputError: no or a wrong `ecgfm.yaml`, a table that does not fit it, or a record twice.
    """
    if not (raw_dir / FILE).is_file():
        raise InputError(
            f"{raw_dir}: expected an {FILE} that says what lies there, found {found(raw_dir)}"
            f"{other_source(raw_dir, NAME) or f'; write it with `ecgfm init-source {raw_dir}`'}"
        )
    return list_as_told(raw_dir, load(raw_dir))


def list_as_told(raw_dir: Path, config: OwnConfig) -> pl.DataFrame:
    """The records that a config names in a folder; see `list_records`."""
    if config.files is not None:
        reading = _reading(config, list(config.files.override))
        rows = [row | {"reading": reading} for row in _of_files(raw_dir, config.files)]
    else:
        assert config.array is not None
        rows = list(_of_arrays(raw_dir, config, config.array))
    table = listing(
        {
            **row,
            "record_id": f"{NAME}/{row['name']}",
            "source": NAME,
            "dataset": config.name,
            "patient_id": None if row.get("patient_id") is None else f"{NAME}/{row['patient_id']}",
        }
        for row in rows
    )
    twice = table.filter(pl.col("record_id").is_duplicated()).sort("record_id", "raw_path")
    if twice.height:
        paths = " and ".join(dict.fromkeys(twice["raw_path"][:2]))
        way_out = "; narrow files.patterns, or set files.suffix_in_ids: true" if config.files else ""
        raise InputError(
            f"{raw_dir}: expected every record once, found {twice['record_id'][0]} twice ({paths}){way_out}"
        )
    return with_metadata(table, raw_dir, config.metadata, config.files is not None) if config.metadata else table


def read_record(raw_dir: Path, row: Mapping[str, Any]) -> EcgRecord:
    """The record of one row of the listing.

    Raises:
        Rejected: the record cannot be read, or its table and its folder do not agree about it.
    """
    reading = json.loads(row["reading"] or "{}")
    if "rejected" in reading:
        raise Rejected(*reading["rejected"])
    if "row" in reading:
        return _from_array(raw_dir, row, reading)
    return _from_file(raw_dir, row["raw_path"], row["record_id"], reading)


# ---- a folder of files


def _of_files(raw_dir: Path, config: FilesConfig) -> Iterator[dict[str, Any]]:
    """A row per recording: its name, path and slice, and what the file says."""
    wanted = re.compile("|".join(f"(?:{pattern_to_regex(pattern)})" for pattern in config.patterns), re.IGNORECASE)
    matched = False
    for folder, names in folders(raw_dir):
        below = f"{folder}/" if folder else ""
        said: dict[str, dict[str, Any]] = {}
        parts: set[str] = set()  # files that belong to a header: they are no recordings of their own
        for name in names:
            if not wanted.fullmatch(below + name):
                continue
            if not config.read_facts:
                said[name] = {}
            elif name.endswith(".hea"):
                said[name], belonging = _of_header(raw_dir, below + name)
                parts |= belonging
            else:
                said[name] = _of_file(raw_dir, below + name)
        if config.read_facts:
            stems = {os.path.splitext(name)[0] for name in names if name.endswith(".hea")}
            for name in names:
                stem, suffix = os.path.splitext(name)
                orphan = suffix in (".dat", ".mat") and stem not in stems and name not in parts and name not in said
                if orphan and wanted.fullmatch(f"{below}{stem}.hea"):
                    said[f"{stem}.hea"] = {}  # a signal without its header: reading says so
        for name, facts in said.items():
            if name not in parts:
                matched = True
                named = below + (name if config.suffix_in_ids else os.path.splitext(name)[0])
                yield {"name": named, "slice_id": folder or _ROOT, "raw_path": below + name, **facts}
    if not matched:
        shown = ", ".join(config.patterns)
        raise InputError(f"{raw_dir}: {FILE}: files.patterns: expected files like {shown}, found {found(raw_dir)}")


def folders(raw_dir: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder at or below `raw_dir`, as a path below it, with the names of its files; hidden ones left out.

    Raises:
        InputError: a folder is a link: its files would lie outside, or be there twice.
    """
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        names, deeper = [], []
        try:
            with os.scandir(os.path.join(raw_dir, folder)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if not entry.is_dir():
                        names.append(entry.name)
                    elif entry.is_symlink():
                        raise InputError(f"{entry.path}: expected a folder, found a link to one; move its files here")
                    else:
                        deeper.append(f"{folder}/{entry.name}" if folder else entry.name)
        except OSError as error:
            raise InputError(f"{raw_dir}: cannot look into {folder or 'it'}: {error.strerror}") from error
        waiting += sorted(deeper, reverse=True)
        yield folder, sorted(names)


def pattern_to_regex(pattern: str) -> str:
    """A pattern of paths, `*`, `?` and `**/`, as a regular expression for the whole path.

    >>> pattern_to_regex("**/*.hea")
    '(?:.*/)?[^/]*\\\\.hea'
    """
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(tokens.get(token) or re.escape(token) for token in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))


def _of_header(raw_dir: Path, path: str) -> tuple[dict[str, Any], set[str]]:
    """What a WFDB header says of the recording, and the names of the files beside it that belong to it."""
    text = header_text(raw_dir, path)
    first, *lines = [line.split(None, 2) for line in text.splitlines() if line and line[0] != "#"] or [[""]]
    files = {words[0] for words in lines if words}
    if "/" in first[0]:  # a record of several segments, each with a header of its own
        files = {f"{name}.hea" for name in files}
        folder = path.rpartition("/")[0]
        for segment in sorted(files - {"~.hea", path.rpartition("/")[2]}):
            if "/" not in segment:
                files |= {
                    words[0]
                    for words in map(str.split, header_text(raw_dir, f"{folder}/{segment}").splitlines())
                    if words
                }
    return comments_of(text), files - {path.rpartition("/")[2]}


def _of_file(raw_dir: Path, path: str) -> dict[str, Any]:
    """What a vendor's file says of the recording; nothing where it cannot be read, which reading the record says."""
    try:
        _, facts = formats.read_file(Path(inside(raw_dir, path)), path)
    except Rejected:
        return {}
    return {
        "patient_id": facts.patient_id or None,
        "age_years": facts.age_years,
        "sex": facts.sex,
        "recorded_at": facts.recorded_at,
        "report": "; ".join(facts.statements) or None,
    }


def _from_file(raw_dir: Path, path: str, record_id: str, reading: Mapping[str, Any]) -> EcgRecord:
    """The record in a file, with the leads, units and rate that `ecgfm.yaml` tells."""
    if path.lower().endswith(".hea"):
        record = wfdb.read_wfdb(raw_dir, path, record_id)
        if not reading:
            return record
        states_rate, units = _stated(header_text(raw_dir, path))
        return _as_told(record, states_rate, ", ".join(units), reading)
    whole = inside(raw_dir, path)
    if not os.path.isfile(whole):
        raise Rejected("missing_signal", f"{path}: no such file")
    record, facts = formats.read_file(Path(whole), record_id)
    return _as_told(record, True, facts.units, reading)


def _stated(header: str) -> tuple[bool, list[str]]:
    """Whether a WFDB header states the sampling rate, and the units of its signals, each once."""
    first, *lines = [line.split(None, 3) for line in header.splitlines() if line and line[0] != "#"] or [[]]
    units = [words[2].partition("/")[2] for words in lines if len(words) > 2 and "/" in words[2]]
    return len(first) > 2, list(dict.fromkeys(units))


def _as_told(record: EcgRecord, states_rate: bool, units: str, reading: Mapping[str, Any]) -> EcgRecord:
    """The record with the leads, units and rate that `ecgfm.yaml` tells.

    states_rate, units: what the file states itself; no units: none

    Raises:
        Rejected: the file says something else, and is not to be overridden.
    """
    leads, rate_hz, signal = record.leads, record.sampling_rate_hz, record.signal
    if told := reading.get("leads"):
        if len(told) != len(leads):
            raise Rejected("no_standard_lead", f"{FILE} names {len(told)} leads, the file has {', '.join(leads)}")
        leads = tuple(told)
    rename = reading.get("rename_leads", {})
    leads = tuple(rename.get(lead.lower(), lead) for lead in leads)
    override = reading.get("override", ())
    if told := reading.get("sampling_rate_hz"):
        if told != rate_hz and states_rate and "sampling_rate_hz" not in override:
            why = f"{FILE} says {told:g} Hz, the file {rate_hz:g}; files.override: [sampling_rate_hz] trusts {FILE}"
            raise Rejected("unreadable_header", why)
        rate_hz = told
    if told := reading.get("units"):
        signal = _in_units(signal, units, told, "units" in override)
    return EcgRecord(record.record_id, leads, rate_hz, signal)


def _in_units(signal: Digital | np.ndarray, stated: str, told: str, override: bool) -> Digital | np.ndarray:
    """A signal that was read as `stated` (nothing: mV, the default of WFDB) in the units that we are told."""
    units = _UNITS.get(stated.casefold()) if stated else "mV"
    if stated and units != told and not override:
        why = f"{FILE} says {told}, the file {stated}; files.override: [units] trusts {FILE}"
        raise Rejected("unknown_units", why)
    if units is None:
        raise Rejected("unknown_units", f"expected one of {', '.join(UNITS_PER_MV)} in the file, found {stated}")
    factor = UNITS_PER_MV[units] / UNITS_PER_MV[told]
    if isinstance(signal, Digital):
        return Digital(signal.digital, signal.adc_gain_per_mv / factor, signal.baseline)
    return signal * factor


def _reading(config: OwnConfig, override: Sequence[str] = (), **more: Any) -> str | None:
    """What `read_record` has to know of the config, as JSON; null where there is nothing."""
    rename = {name.lower(): lead for name, lead in (config.rename_leads or {}).items()}
    told = {
        "leads": config.leads,
        "rename_leads": rename,
        "sampling_rate_hz": config.sampling_rate_hz,
        "units": config.units,
        "override": override,
        **more,
    }
    kept = {key: value for key, value in told.items() if value or key == "row"}
    return json.dumps(kept) if kept else None


# ---- arrays


def _of_arrays(raw_dir: Path, config: OwnConfig, array: ArrayConfig) -> Iterator[dict[str, Any]]:
    """A row per recording of every file: its name, path and slice, and where it stands in the array."""
    wanted = re.compile("|".join(f"(?:{pattern_to_regex(pattern)})" for pattern in array.patterns), re.IGNORECASE)
    paths = [f"{folder}/{name}" if folder else name for folder, names in folders(raw_dir) for name in names]
    paths = [path for path in paths if wanted.fullmatch(path)]
    shown = ", ".join(array.patterns)
    if not paths:
        raise InputError(f"{raw_dir}: {FILE}: array.patterns: expected files like {shown}, found {found(raw_dir)}")
    if array.ids_file and len(paths) > 1:
        raise InputError(
            f"{raw_dir}: {FILE}: array.ids_file names the recordings of one file, {shown} are {len(paths)}"
        )
    for path in paths:
        try:
            file = open_array(inside(raw_dir, path))
            try:
                n_records = _check_shape(file, path, config, array)
                names = _ids(raw_dir, file, path, array, n_records)
            finally:
                file.close()
        except Rejected as rejected:
            raise InputError(f"{raw_dir / path}: {rejected.detail}") from rejected
        if len(names) != n_records:
            raise InputError(
                f"{raw_dir / path}: expected a name for each of {n_records} recordings, found {len(names)}"
            )
        for row, name in enumerate(names):
            reading = _reading(config, row=row, dataset=array.dataset, axes=array.axes, strip=array.strip)
            yield {"name": name, "slice_id": path, "raw_path": path, "reading": reading}


def _check_shape(file: ArrayFile, path: str, config: OwnConfig, array: ArrayConfig) -> int:
    """The number of recordings in an array that is as the config says."""
    shape = file.array(array.dataset).shape
    if len(shape) != len(array.axes):
        raise InputError(f"{path}: expected the axes {', '.join(array.axes)}, found the shape {shape}")
    n_leads = shape[array.axes.index("lead")] if "lead" in array.axes else 1
    if n_leads != len(config.leads):
        raise InputError(
            f"{path}: {FILE} names {len(config.leads)} leads, found {n_leads} along axis lead of {shape}; is the order "
            f"of array.axes ({', '.join(array.axes)}) right?"
        )
    return int(shape[array.axes.index("record")])


def _ids(raw_dir: Path, file: ArrayFile, path: str, array: ArrayConfig, n_records: int) -> list[str]:
    """The names of an array's recordings, in its order."""
    if array.ids_dataset:
        return file.ids(array.ids_dataset)
    if array.ids_are_rows:
        stem = os.path.splitext(path)[0]
        return [f"{stem}/{row}" for row in range(n_records)]
    names = read_csv(raw_dir, array.ids_file, [array.ids_column])[array.ids_column]
    if names.null_count():
        line = names.is_null().arg_true()[0] + 2
        raise InputError(f"{raw_dir / array.ids_file}: expected a name in every line, found none in line {line}")
    return names.to_list()


def _from_array(raw_dir: Path, row: Mapping[str, Any], reading: Mapping[str, Any]) -> EcgRecord:
    axes = list(reading["axes"])
    axis = axes.index("record")
    stored = kept_open(inside(raw_dir, row["raw_path"])).read(reading.get("dataset", ""), reading["row"], axis)
    axes.remove("record")
    if stored.ndim != len(axes):
        raise Rejected("unreadable_signal", f"{row['raw_path']}: expected {', '.join(axes)}, found {stored.shape}")
    stored = stored[None] if "lead" not in axes else stored if axes == ["lead", "time"] else stored.T
    strip = reading["strip"]
    units_per_mv = UNITS_PER_MV[reading["units"]]
    signal: Digital | np.ndarray
    if stored.dtype == np.int16:
        if strip == "zero":
            stored = without_padding(stored)
        n_leads = len(stored)
        signal = Digital(np.ascontiguousarray(stored), np.full(n_leads, units_per_mv), np.zeros(n_leads))
    else:
        signal = stored.astype(np.float64)
        signal[~np.isfinite(signal)] = np.nan
        if strip != "none":
            signal = without_padding(signal, 0.0 if strip == "zero" else np.nan)
        signal /= units_per_mv
    if not stored.shape[1]:
        raise Rejected("no_valid_sample", f"{row['raw_path']}: expected samples, found none")
    return EcgRecord(row["record_id"], tuple(reading["leads"]), reading["sampling_rate_hz"], signal)
