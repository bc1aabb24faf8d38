"""Recordings that a model is asked about: files and folders that no pipeline has seen, or what a pipeline has prepared.

Both come out as a pipeline's `prepare` makes them, so that a model sees what it was trained on.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from ecgfm.config import PrepareConfig, departures_in_words
from ecgfm.contracts import read_table
from ecgfm.ecg import EcgRecord, FileFacts, InputError, Rejected
from ecgfm.formats import FORMATS, identify, read_file, wfdb
from ecgfm.formats.wfdb_header import read_header
from ecgfm.prepare import BLOCK_BYTES, TOGETHER, PreparedRecord, prepare_record
from ecgfm.processes import ordered_map, worthwhile
from ecgfm.shards import PER_LEAD, ShardReader
from ecgfm.sources.own import folders

_HEADER, _SIGNALS = ".hea", (".dat", ".mat")
_RECORDINGS = frozenset({_HEADER, ".dcm", ".dicom", ".edf", ".scp", ".xml", ".aecg"})
"""What is called so and is of no format that is read is a recording that is turned away, not a file of another kind."""


class Recording(NamedTuple):
    """Where a recording lies.

    record_id: its path below the folder that was named; of several inputs, below the deepest folder they share
    path: the file to read: of a WFDB record its header
    """

    record_id: str
    path: str


@dataclass(frozen=True)
class Found:
    """What lies in some files and folders.

    recordings: in the order of their ids, each once
    others: how many files of folders are no recordings, by suffix
    """

    recordings: list[Recording]
    others: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Prepared:
    """One recording as the model will see it.

    record_id: see `Recording`; of a pipeline's record its own
    prepared: (segment, lead, time) int16 with what standardises it, and facts; see prepare.py
    remarks: what was done or is odd, in words
    """

    record_id: str
    prepared: PreparedRecord
    remarks: tuple[str, ...]

    @property
    def missing_leads(self) -> tuple[str, ...]:
        """The model's leads that the recording lacks: 0 for the model, as a masked lead is."""
        return tuple(self.prepared.facts["missing_leads"])


class Refused(NamedTuple):
    """A recording that was turned away. path: as it can be found"""

    record_id: str
    path: str
    why: Rejected


def find_recordings(inputs: Sequence[Path]) -> Found:
    """The recordings that files and folders hold.

    In a folder: every file, however deep, whose content is of a format that is read, and those that are called like a
    recording but are none, so that they are turned away with a reason. Files that belong to a WFDB header are no
    recordings of their own; hidden files and folders are left out. A file that is named itself is always one.

    Raises:
        InputError: no such file or folder, one that cannot be looked into, or nothing in them.
    """
    paths: dict[str, None] = {}
    others: Counter[str] = Counter()
    for given in inputs:
        whole = os.path.abspath(given)
        if os.path.isdir(whole):
            for folder, names in folders(Path(whole)):
                _of_folder(os.path.join(whole, folder) if folder else whole, names, paths, others)
        else:
            paths[_file_to_read(whole, given)] = None
    if not paths:
        shown = ", ".join(map(str, inputs)) or "no input"
        rest = f"{_counted(others)} of other kinds" if others else "nothing"
        formats = ", ".join(each.NAME for each in FORMATS)
        raise InputError(f"{shown}: expected recordings ({formats}), found {rest}; arrays go through `ecgfm.load`")
    root = os.path.commonpath(
        [
            os.path.abspath(given) if os.path.isdir(given) else os.path.dirname(os.path.abspath(given))
            for given in inputs
        ]
    )
    recordings = sorted(Recording(os.path.relpath(path, root), path) for path in paths)
    for recording in recordings:
        try:
            recording.record_id.encode()
        except UnicodeEncodeError as error:  # names of files may be any bytes
            raise InputError(f"expected names in UTF-8, found {recording.record_id!r}; rename it") from error
    return Found(recordings, others)


def prepare_file(config: PrepareConfig, recording: Recording) -> Prepared | Refused:
    """Read and prepare one recording.

    Raises:
        InputError: its format needs a package that is not installed, or its drive fails.
    """
    try:
        record, facts = _read(recording)
        return prepare(record, config, facts)
    except Rejected as why:
        return Refused(*recording, why)


def prepare_files(
    recordings: Sequence[Recording], config: PrepareConfig, jobs: int = 0
) -> Iterator[Prepared | Refused]:
    """`prepare_file` of each, in order, by up to `jobs` processes (0: one per core). Few are in memory at a time."""
    blocks = (recordings[first : first + TOGETHER] for first in range(0, len(recordings), TOGETHER))
    for done, rest in ordered_map(partial(_prepare_block, config), blocks, worthwhile(len(recordings), jobs)):
        yield from done
        for recording in rest:
            yield prepare_file(config, recording)


def _prepare_block(
    config: PrepareConfig, recordings: Sequence[Recording]
) -> tuple[list[Prepared | Refused], Sequence[Recording]]:
    """Some recordings, and those that are left because these are as many bytes as one process may hold."""
    done: list[Prepared | Refused] = []
    n_bytes = 0
    for number, recording in enumerate(recordings, start=1):
        done.append(one := prepare_file(config, recording))
        n_bytes += one.prepared.segments.nbytes if isinstance(one, Prepared) else 0
        if n_bytes > BLOCK_BYTES:
            return done, recordings[number:]
    return done, ()


def prepare(record: EcgRecord, config: PrepareConfig, facts: FileFacts | None = None) -> Prepared:
    """One recording as `prepare` makes it, with remarks.

    Raises:
        Rejected: it cannot be used, or is shorter than one segment.
    """
    prepared = prepare_record(record, config)
    derived = facts.derived_leads if facts else ()
    return _described(
        record.record_id, prepared, config.sampling_rate_hz, config.leads, config.segment_seconds, derived
    )


def file_record(path: Path) -> tuple[EcgRecord, FileFacts]:
    """The recording in one file, called by the file's name; of a WFDB signal file or record name, its header's.

    Raises:
        InputError: no such file, or a folder.
        Rejected: it cannot be read.
    """
    if path.is_dir():
        raise InputError(f"{path}: expected a file, found a folder; name a file in it")
    file = _file_to_read(os.path.abspath(path), path)
    return _read(Recording(os.path.basename(file), file))


# ---- what a pipeline has prepared


def find_slices(given: Path) -> list[Path]:
    """The prepared slices that a path means: one; those of a run; those of the newest run of each pipeline of a data
    directory. Empty where it is none of these.

    Raises:
        InputError: a run or a data directory in which nothing is prepared.
    """
    if (given / "shard.h5").is_file():
        return [given]
    if (given / "run.json").is_file() or (given / "prepare").is_dir():
        runs = [given]
    elif (given / "stages").is_dir():
        runs = sorted((given / "runs").glob("*/latest"))
    else:
        return []
    slices = {path.resolve(): None for run in runs for path in sorted((run / "prepare").glob("*"))}
    if not slices:
        raise InputError(f"{given}: expected a run with prepared records, found none; run `ecgfm run` first")
    return list(slices)


def count_records(slices: Sequence[Path]) -> int:
    """Records listed in prepared slices, those turned away among them."""
    tables = [directory / f"{name}.parquet" for directory in slices for name in ("records", "rejects")]
    return sum(pl.scan_parquet(path).select(pl.len()).collect().item() for path in tables)


def read_slices(slices: Sequence[Path], config: PrepareConfig) -> Iterator[Prepared | Refused]:
    """The records of prepared slices in the order of their tables, and behind each slice's those that it turned away.

    Raises:
        InputError: a slice of other leads or another rate than `config` has or prepared in another way, the same slice
            twice, or a damaged one.
    """
    seen: dict[tuple[str, str], Path] = {}
    for directory in slices:
        shard = ShardReader(directory / "shard.h5")
        try:
            other = seen.setdefault((shard.source, shard.slice_id), directory)
            if other != directory:
                raise InputError(
                    f"{shard.source} {shard.slice_id} was prepared twice, in {other} and {directory}; name one run, "
                    "such as DATA_DIR/runs/PIPELINE/latest"
                )
            for word, asked, found in (
                ("leads", " ".join(config.leads), " ".join(shard.leads)),
                ("sampling_rate_hz", f"{config.sampling_rate_hz:g}", f"{shard.sampling_rate_hz:g}"),
            ):
                if asked != found:
                    raise InputError(
                        f"{directory}: expected {word} {asked}, as the model was trained on, found {found}; prepare "
                        f"with prepare.{word} as the model has it, or name the raw files"
                    )
            if shard.departures != config.departures:
                raise InputError(
                    f"{directory}: expected records prepared {departures_in_words(config.departures)}, as the model's "
                    f"were, found {departures_in_words(shard.departures)}; name the raw files"
                )
            yield from _of_slice(directory, shard)
        finally:
            shard.close()


def _of_slice(directory: Path, shard: ShardReader) -> Iterator[Prepared | Refused]:
    records, quality, segments, rejects = (
        read_table(directory / f"{name}.parquet", name) for name in ("records", "quality", "segments", "rejects")
    )
    rows_of = {
        key[0]: rows.sort("segment_index")["shard_row"].to_numpy()
        for key, rows in segments.group_by("record_id", maintain_order=True)
    }
    per_lead = np.stack(shard.per_lead(*PER_LEAD), axis=1)  # (segment, 4, lead)
    seconds = shard.segment_samples / shard.sampling_rate_hz
    described = records.join(quality, on="record_id", how="left", maintain_order="left")
    columns = [column for column in quality.columns if column != "record_id"]
    for row in described.iter_rows(named=True):
        record_id, rows = row["record_id"], rows_of.get(row["record_id"], np.empty(0, np.int64))
        prepared = PreparedRecord(
            shard.digital(rows),
            per_lead[rows[0]] if len(rows) else np.full((4, len(shard.leads)), np.nan),
            row,
            {column: row[column] for column in columns},
            None,
        )
        try:
            yield _described(record_id, prepared, shard.sampling_rate_hz, shard.leads, seconds, ())
        except Rejected as why:
            yield Refused(record_id, row["raw_path"], why)
    for row in rejects.iter_rows(named=True):
        yield Refused(row["record_id"], row["raw_path"], Rejected(row["reason"], row["detail"]))


# ---- the parts


def _described(
    record_id: str,
    prepared: PreparedRecord,
    rate_hz: float,
    leads: Sequence[str],
    segment_seconds: float,
    derived: Sequence[str],
) -> Prepared:
    """With its missing leads among its facts, and remarks.

    Raises:
        Rejected: `too_short`.
    """
    facts: Mapping[str, Any] = prepared.facts
    seconds = facts["n_samples"] / facts["sampling_rate_hz"]
    if not len(prepared.segments):
        raise Rejected("too_short", f"expected at least {segment_seconds:g} s, one segment, found {seconds:.4g} s")
    missing = [lead for lead in leads if lead not in facts["leads"]]
    gaps = [lead for lead in facts["invalid_leads"] if lead not in missing]
    unused = seconds - len(prepared.segments) * segment_seconds
    reversal = prepared.quality["suspected_reversal"]
    remarks = [
        f"{_listed(missing)} missing: 0 for the model" if missing else "",
        f"invalid samples in {_listed(gaps)}: 0 for the model" if gaps else "",
        f"{_listed(facts['constant_leads'])} constant: 0 for the model" if facts["constant_leads"] else "",
        f"the electrodes {reversal} look interchanged" if reversal else "",
        f"resampled from {facts['sampling_rate_hz']:g} Hz" if facts["sampling_rate_hz"] != rate_hz else "",
        f"the last {unused:.3g} s are no whole segment: not used" if unused >= 0.05 else "",
        f"{_listed(derived)} worked out from other leads" if derived else "",
    ]
    with_missing = PreparedRecord(
        prepared.segments, prepared.per_lead, {**facts, "missing_leads": missing}, prepared.quality, None
    )
    return Prepared(record_id, with_missing, tuple(filter(None, remarks)))


def _listed(leads: Sequence[str]) -> str:
    return " ".join(leads)


def _counted(others: Counter[str]) -> str:
    n = others.total()
    shown = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(others.items()))
    return f"{n} file{'s' * (n != 1)} ({shown})"


def _read(recording: Recording) -> tuple[EcgRecord, FileFacts]:
    path = Path(recording.path)
    suffix = path.suffix.lower()
    if identify(path) is None:
        if suffix == _HEADER:
            return wfdb.read(path, recording.record_id)  # says what is wrong with the header
        if suffix in _SIGNALS:
            header = path.with_suffix(_HEADER).name
            raise Rejected(
                "missing_header", f"{path.name}: a WFDB signal file is read by its header {header}: no such file"
            )
    return read_file(path, recording.record_id)


def _file_to_read(whole: str, given: Path) -> str:
    """The file itself, or where it is a WFDB signal file or a record's name, the header beside it."""
    if not os.path.exists(whole):
        if os.path.isfile(whole + _HEADER):
            return whole + _HEADER
        raise InputError(f"{given}: no such file or folder")
    stem, suffix = os.path.splitext(whole)
    if suffix.lower() in _SIGNALS and os.path.isfile(stem + _HEADER):
        return stem + _HEADER
    return whole


def _of_folder(folder: str, names: Sequence[str], paths: dict[str, None], others: Counter[str]) -> None:
    """Add the recordings among the files of one folder."""
    parts: set[str] = set()  # of headers: signal files and headers of segments
    for name in names:
        if name.lower().endswith(_HEADER):
            parts |= _parts(Path(folder), name)
    for name in names:
        path, suffix = os.path.join(folder, name), os.path.splitext(name)[1].lower()
        if name in parts:
            continue
        if suffix in _RECORDINGS or suffix in _SIGNALS or _is_known(Path(path)):
            paths[path] = None
        else:
            others[suffix] += 1


def _parts(folder: Path, header_name: str) -> set[str]:
    """The files beside a WFDB header that belong to it; none where it cannot be read, which reading the record says."""
    try:
        header = read_header(folder, header_name)
    except Rejected:
        return set()
    found = {signal.file_name for signal in header.signals}
    for name in {name for name, _ in header.segments} - {"~"}:
        segment = f"{name}{_HEADER}"
        if segment != header_name and (folder / segment).is_file():
            found.add(segment)
            with suppress(Rejected):
                found |= {signal.file_name for signal in read_header(folder, segment).signals}
    return found


def _is_known(path: Path) -> bool:
    try:
        return identify(path) is not None
    except Rejected:  # reading it says why
        return True
