"""A first look at a folder of recordings: what lies there, an `ecgfm.yaml` that reads it, five recordings drawn.

Everything that the files do not say is a guess, and the guess says why.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from matplotlib import image

from ecgfm import formats
from ecgfm.config import from_dict
from ecgfm.csv_tables import separator
from ecgfm.drawing import draw_ecg
from ecgfm.ecg import LEADS, EcgRecord, InputError, Rejected
from ecgfm.init_tables import guess_metadata
from ecgfm.labels import CHALLENGE_2021
from ecgfm.sources import own
from ecgfm.sources.arrays import ArrayFile, open_array
from ecgfm.sources.listing import other_source
from ecgfm.sources.own_config import FILE, OwnConfig

N_READ = 100
"""Recordings that are read for the look, evenly over the listing."""

N_DRAWN = 5
_SLOW_CHUNKS = 2000  # recordings unpacked to have one, times chunks
_ARRAYS = (".npy", ".h5", ".hdf5")
_NO_RECORDINGS = {*_ARRAYS, ".csv", ".dat", ".atr", ".png", ".jpg", ".md", ".txt", ".yaml", ".json", ".xsd", ".zip"}
_USUAL_RATES_HZ = (100, 125, 128, 200, 240, 250, 256, 300, 360, 400, 500, 512, 1000)
_USUAL_SECONDS = 10.0
_LEADS_BY_COUNT: dict[int, tuple[str, ...]] = {
    **{1: ("I",), 2: ("I", "II"), 3: LEADS[:3], 6: LEADS[:6], 12: LEADS},
    8: ("I", "II", *LEADS[6:]),
}
_RATE_NAMES = ("sampling_rate_hz", "sampling_rate", "sampling_frequency", "sample_rate", "fs", "frequency")


@dataclass
class Look:
    """What was found: values of an OwnConfig, a remark to some of them by key, and lines to print."""

    values: dict[str, Any]
    remarks: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def init_source(folder: Path, picture: Path, force: bool = False) -> list[str]:
    """Write FOLDER/ecgfm.yaml and the picture; returns what there is to say, line by line.

    Raises:
        InputError: no such folder, no recording in it, an ecgfm.yaml that is there already (unless `force`), or one of
            the two cannot be written.
    """
    path = folder / FILE
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of recordings, found {'a file' if folder.exists() else 'none'}")
    if path.exists() and not force:
        raise InputError(f"{path} is there already; --force writes it anew")
    if not os.access(folder, os.W_OK):
        raise InputError(
            f"{folder}: no permission to write {FILE} into it, which says how it is read; have it writable for this "
            "once, or copy the recordings"
        )
    if not os.access(picture.absolute().parent, os.W_OK):
        raise InputError(f"{picture}: no permission to write there, or no such folder; name another with --picture")
    look = look_at(folder)
    config = from_dict(OwnConfig, look.values, str(path))
    listed = own.list_as_told(folder, config)
    records, rejected = _sample(folder, listed)
    lines = [*look.lines, *_what_was_read(records, rejected)]
    if not records:
        raise InputError(f"{folder}: none of {len(rejected)} recordings could be read: {'; '.join(rejected[:3])}")
    path.write_text(as_yaml(look), encoding="utf-8")
    n_drawn = min(len(records), N_DRAWN)
    drawn = [records[place * (len(records) - 1) // max(n_drawn - 1, 1)] for place in range(n_drawn)]  # first to last
    picture.write_bytes(draw_records(drawn))
    lines += [f"wrote {path}: read it, and mend what is guessed wrong", f"drew {n_drawn}: {picture}"]
    return [*lines, *_next(folder, listed, len(rejected) / (len(rejected) + len(records)))]


def look_at(folder: Path) -> Look:
    """What lies in a folder, as the values of an `ecgfm.yaml`.

    Raises:
        InputError: nothing that can be read.
    """
    paths = [f"{below}/{name}" if below else name for below, names in own.folders(folder) for name in names]
    by_suffix: dict[str, list[str]] = {}
    for path in paths:
        by_suffix.setdefault(os.path.splitext(path)[1].lower(), []).append(path)
    shown = ", ".join(f"{len(those):,} {suffix or 'without suffix'}" for suffix, those in sorted(by_suffix.items()))
    recordings = {suffix: known for suffix, those in sorted(by_suffix.items()) if (known := _formats(folder, those))}
    arrays = [path for suffix in _ARRAYS for path in by_suffix.get(suffix, [])]
    lines = [f"{folder}: {len(paths):,} files: {shown}"]
    if (other := other_source(folder, own.NAME)).startswith("; it looks"):
        lines.append(f"{other.removeprefix('; ')}, which needs no {FILE}")
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name).strip("-") or "own"
    if recordings:
        look = _of_files({suffix: by_suffix[suffix] for suffix in recordings}, name)
        lines += [f"{len(by_suffix[suffix]):,} {suffix}: {_counted(known)}" for suffix, known in recordings.items()]
        if arrays:
            lines.append(f"left aside: {len(arrays)} arrays such as {arrays[0]}; a folder has files or arrays")
    elif arrays:
        look = _of_arrays(folder, arrays, name)
    else:
        known_formats = ", ".join(known.NAME for known in formats.FORMATS)
        raise InputError(f"{folder}: expected recordings ({known_formats}, .npy, HDF5), found {shown or 'nothing'}")
    tables = by_suffix.get(".csv", [])
    if tables:
        listed = own.list_as_told(folder, from_dict(OwnConfig, _opening_nothing(look.values), FILE))
        metadata, remarks, said = guess_metadata(folder, tables, listed)
        lines += said
        if metadata:
            look.values["metadata"] = metadata
            look.remarks |= {f"metadata.{key}": remark for key, remark in remarks.items()}
    look.lines = lines + look.lines
    return look


def as_yaml(look: Look) -> str:
    """The `ecgfm.yaml` of a look, with its remarks as comments."""
    text = [
        "# How ecgfm reads this folder, written by `ecgfm init-source`. Every key and what it may be stands in",
        "# ecgfm/sources/own_config.py; an unknown one is an error. Check what is called a guess.",
    ]
    for key, value in look.values.items():
        if not isinstance(value, Mapping):
            text.append(_line(key, value, look.remarks.get(key)))
            continue
        text.append(f"{key}:")
        text += [f"  {_line(inner, held, look.remarks.get(f'{key}.{inner}'))}" for inner, held in value.items()]
    return "\n".join(text) + "\n"


def draw_records(records: Sequence[EcgRecord]) -> bytes:
    """A PNG of recordings, one below the other, each with its name, rate and length."""
    pictures = []
    for record in records:
        title = (
            f"{record.record_id}   {record.sampling_rate_hz:g} Hz   {record.n_samples / record.sampling_rate_hz:.1f} s"
        )
        standard = {lead.lower(): lead for lead in LEADS}
        leads = [standard.get(lead.lower(), lead) for lead in record.leads]
        drawn = draw_ecg(record.signal_mv, record.sampling_rate_hz, title=title, dpi=80, leads=leads)
        pictures.append(image.imread(io.BytesIO(drawn), format="png")[..., :3])
    width = max(picture.shape[1] for picture in pictures)
    padded = [
        np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=1.0) for picture in pictures
    ]
    out = io.BytesIO()
    image.imsave(out, np.concatenate(padded), format="png")
    return out.getvalue()


# ---- files


def _formats(folder: Path, paths: Sequence[str]) -> Counter[str]:
    """The formats of files of one suffix, of as many as are looked at: format -> files."""
    known: Counter[str] = Counter()
    if os.path.splitext(paths[0])[1].lower() not in _NO_RECORDINGS:
        for path in _evenly(paths, N_READ):
            try:
                of = formats.identify(folder / path)
            except Rejected:
                continue
            known.update([of.NAME] if of else [])
    return known


def _of_files(by_suffix: Mapping[str, Sequence[str]], name: str) -> Look:
    files: dict[str, Any] = {"patterns": [f"**/*{suffix}" for suffix in by_suffix]}
    look = Look({"name": name, "files": files}, {"files.patterns": "any folder, upper or lower case"})
    stems = Counter(os.path.splitext(path)[0] for those in by_suffix.values() for path in those)
    twice = [stem for stem, count in stems.items() if count > 1]
    if twice:
        files["suffix_in_ids"] = True
        look.remarks["files.suffix_in_ids"] = f"{twice[0]} is the name of several files, but for the suffix"
    return look


def _opening_nothing(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config whose files are listed without a look into them."""
    return {**values, "files": {**values["files"], "read_facts": False}} if "files" in values else dict(values)


# ---- arrays


def _of_arrays(folder: Path, paths: Sequence[str], name: str) -> Look:
    """The first array that has recordings, and the others of its shape but for their number."""
    found: dict[str, tuple[str, tuple[int, ...], str]] = {}
    lines = []
    look: Look | None = None
    for path in paths:
        try:
            file = open_array(str(folder / path))
        except Rejected as rejected:
            lines.append(f"{path}: {rejected.detail}")
            continue
        try:
            dataset, shape, others = _recordings_in(file)
            lines.append(f"{path}: {others}")
            if shape and look is None:
                look = _of_array(folder, file, path, dataset, shape)
                look.values["name"] = name
            found[path] = (dataset, shape, os.path.splitext(path)[1])
        except Rejected as rejected:
            lines.append(f"{path}: {rejected.detail}")
        finally:
            file.close()
    if look is None:
        raise InputError(f"{folder}: expected an array (record, lead, time), found {'; '.join(lines)}")
    first = look.values["array"]["patterns"][0]
    alike = [
        path
        for path, (d, s, e) in found.items()
        if (d, s[1:], e) == (found[first][0], found[first][1][1:], found[first][2])
    ]
    if len(alike) > 1 and "ids_file" not in look.values["array"]:
        look.values["array"]["patterns"] = alike
    left = [path for path in found if path not in look.values["array"]["patterns"]]
    if left:
        lines.append(f"left aside: {', '.join(left[:5])}")
    look.lines = lines + look.lines
    return look


def _recordings_in(file: ArrayFile) -> tuple[str, tuple[int, ...], str]:
    """The dataset that is most likely the recordings, its shape (empty: none is), and all of them in words."""
    names = [""] if isinstance(file.handle, np.ndarray) else file.names
    shapes: dict[str, tuple[int, ...]] = {}
    words = []
    for name in names:
        try:
            array = file.array(name)
        except Rejected:
            continue  # text, or a link: no recordings
        words.append(f"{name or 'array'} {array.dtype} {'x'.join(map(str, array.shape))}{_slow_chunks(array)}")
        if array.ndim in (2, 3):
            shapes[name] = tuple(array.shape)
    best = max(shapes, key=lambda name: (len(shapes[name]), int(np.prod(shapes[name]))), default="")
    return best, shapes.get(best, ()), ", ".join(words) or "no array of numbers"


def _slow_chunks(array: Any) -> str:
    """A warning where one recording lies in many compressed chunks, each of which holds parts of many others."""
    chunks = getattr(array, "chunks", None)
    if chunks is None or array.ndim != 3:
        return ""
    n_chunks = int(np.prod([-(-size // chunk) for size, chunk in zip(array.shape[1:], chunks[1:], strict=True)]))
    if n_chunks * chunks[0] < _SLOW_CHUNKS:
        return ""
    return f" (SLOW: chunks {chunks}, {n_chunks} to unpack for each recording; store it with chunks (1, ...) or none)"


def _of_array(folder: Path, file: ArrayFile, path: str, dataset: str, shape: tuple[int, ...]) -> Look:
    ids = _ids_dataset(file, shape)
    n_records = len(ids[1]) if ids else None
    axes = _axes(shape, n_records)
    sizes = dict(zip(axes, shape, strict=True))
    array: dict[str, Any] = {"patterns": [path], "axes": axes}
    look = Look({"name": "", "array": array}, {"array.axes": f"guess for the shape {'x'.join(map(str, shape))}"})
    if dataset:
        array["dataset"] = dataset
    if ids:
        array["ids_dataset"] = ids[0]
    elif (column := _ids_column(folder, sizes["record"])) is not None:
        array["ids_file"], array["ids_column"] = column
        look.remarks["array.ids_column"] = (
            "guess: as many lines as recordings, and no value twice; in the array's order"
        )
    else:
        array["ids_are_rows"] = True
        look.remarks["array.ids_are_rows"] = "nothing here names the recordings"
    signals = [
        _leads_first(file.read(dataset, row, axes.index("record")), axes) for row in _evenly(range(sizes["record"]), 20)
    ]
    strip, why = _padding(signals)
    if strip:
        array["strip"] = strip
        look.remarks["array.strip"] = why
    n_leads = sizes.get("lead", 1)
    leads = _LEADS_BY_COUNT.get(n_leads) or (*LEADS, *(f"lead {n}" for n in range(13, n_leads + 1)))[:n_leads]
    look.values["leads"] = list(leads)
    look.remarks["leads"] = "guess: the usual order; is it yours?"
    look.values["sampling_rate_hz"], look.remarks["sampling_rate_hz"] = _rate(file, dataset, sizes["time"])
    look.values["units"], span = units_by_amplitude(signals)
    look.remarks["units"] = f"GUESS by amplitude: a lead spans {span}, and that of an ECG 0.5 to 5 mV"
    return look


def _axes(shape: tuple[int, ...], n_records: int | None) -> list[str]:
    """The names of the axes: leads are 12 or at most 15, records as many as there are ids, else the first."""
    places = list(range(len(shape)))
    axes = [""] * len(shape)
    if len(shape) == 3:
        lead = next((p for p in (2, 1, 0) if shape[p] == len(LEADS)), min(places, key=lambda p: (shape[p], -p)))
        axes[lead] = "lead"
        places.remove(lead)
    record = next((p for p in places if shape[p] == n_records), places[0])
    axes[record] = "record"
    places.remove(record)
    axes[places[0]] = "time"
    return axes


def _ids_dataset(file: ArrayFile, shape: tuple[int, ...]) -> tuple[str, list[str]] | None:
    """A dataset of ids beside the array: as long as one of its axes, and no value twice."""
    if isinstance(file.handle, np.ndarray):
        return None
    for name in file.names:
        try:
            ids = file.ids(name)
        except Rejected:
            continue
        if len(ids) in shape and len(set(ids)) == len(ids):
            return name, ids
    return None


def _ids_column(folder: Path, n_records: int) -> tuple[str, str] | None:
    """A column of a CSV table with a name for each of so many recordings."""
    for path in sorted(folder.glob("*.csv")):
        try:
            table = pl.read_csv(path, infer_schema=False, separator=separator(path))
        except (pl.exceptions.PolarsError, OSError):
            continue
        if table.height == n_records:
            for column in table.columns:
                if table[column].n_unique() == n_records and not table[column].null_count():
                    return path.name, column
    return None


def _leads_first(stored: np.ndarray, axes: Sequence[str]) -> np.ndarray:
    rest = [axis for axis in axes if axis != "record"]
    return np.atleast_2d(stored if rest != ["time", "lead"] else stored.T).astype(np.float64)


def _padding(signals: Sequence[np.ndarray]) -> tuple[str, str]:
    """What stands at the ends of recordings that are shorter than the array, if any are."""
    for what in ("nan", "zero"):
        at_ends = [np.isnan(s[:, [0, -1]]) if what == "nan" else s[:, [0, -1]] == 0 for s in signals]
        if padded := sum(bool(end.all(axis=0).any()) for end in at_ends):
            return what, f"{padded} of {len(signals)} recordings looked at begin or end with it in every lead"
    return "", ""


def _rate(file: ArrayFile, dataset: str, n_samples: int) -> tuple[float, str]:
    """The sampling rate that an HDF5 attribute says, else the usual one that makes the recording about 10 s long."""
    if not isinstance(file.handle, np.ndarray):
        for place in (file.handle[dataset], file.handle):
            said = {str(name).lower(): value for name, value in place.attrs.items()}
            for name in _RATE_NAMES:
                if name in said and np.ndim(said[name]) == 0 and np.asarray(said[name]).dtype.kind in "iuf":
                    return float(said[name]), f"the file's attribute {name}"
    rate = min(_USUAL_RATES_HZ, key=lambda hz: abs(n_samples / hz - _USUAL_SECONDS))
    return float(rate), f"GUESS: makes {n_samples} samples {n_samples / rate:.1f} s long; the file does not say it"


def units_by_amplitude(signals: Sequence[np.ndarray]) -> tuple[str, str]:
    """The units in which (lead, time) signals are ECGs, whose leads span 0.05 to 50 mV, and the span in the middle."""
    spans = []
    for signal in signals:
        valid = signal[np.isfinite(signal).any(axis=1)]
        if valid.size:
            low, high = np.nanpercentile(valid, [0.5, 99.5], axis=1)
            spans.append(np.median(high - low))
    span = float(np.median(spans)) if spans else 1.0
    return "V" if span < 0.05 else "mV" if span < 50 else "uV", f"{span:.3g}"


# ---- what was read, and what to do next


def _sample(folder: Path, listed: pl.DataFrame) -> tuple[list[EcgRecord], list[str]]:
    """Some records of the listing as read, and why others are not."""
    records, rejected = [], []
    for row in _evenly(list(listed.iter_rows(named=True)), N_READ):
        try:
            record = own.read_record(folder, row)
            if not {lead.lower() for lead in record.leads} & {lead.lower() for lead in LEADS}:
                raise Rejected("no_standard_lead", f"leads are {', '.join(record.leads)}; see rename_leads")
            records.append(record)
        except Rejected as reason:
            rejected.append(f"{row['record_id']}: {reason}")
    return records, rejected


def _what_was_read(records: Sequence[EcgRecord], rejected: Sequence[str]) -> list[str]:
    leads = Counter(", ".join(record.leads) for record in records)
    rates = Counter(f"{record.sampling_rate_hz:g} Hz" for record in records)
    seconds = sorted(record.n_samples / record.sampling_rate_hz for record in records)
    lines = [f"read {len(records)} of {len(records) + len(rejected)} looked at"]
    if records:
        lines += [
            f"  leads: {_counted(leads)}",
            f"  sampling rates: {_counted(rates)}; length {seconds[0]:.1f} to {seconds[-1]:.1f} s",
        ]
        units, why = units_by_amplitude(
            [record.signal_mv[:, : 20 * int(record.sampling_rate_hz)] for record in records]
        )
        right = "as it should be" if units == "mV" else f"{units}, not mV? see units and files.override"
        lines.append(f"  amplitude: a lead spans {why} as read: {right}")
    standard = {lead.lower() for lead in LEADS}
    others = Counter(lead for record in records for lead in record.leads if lead.lower() not in standard)
    if others:
        lines.append(
            f"  none of the twelve leads, so left out: {_counted(others)}; rename_leads gives them their names"
        )
    reasons = Counter(line.split(": ")[1] for line in rejected)
    lines += [
        f"  rejected, {reason}: {count}, such as "
        + next(line for line in rejected if f": {reason}: " in line).replace(f" {reason}:", "", 1)
        for reason, count in reasons.most_common()
    ]
    return lines


def _next(folder: Path, listed: pl.DataFrame, rejected_share: float) -> list[str]:
    """How many of what there is, and the command that goes on."""
    facts = {"age_years": "age", "sex": "sex", "patient_id": "patient", "codes": "codes", "report": "report"}
    known = ", ".join(f"{listed[column].count():,} with {word}" for column, word in facts.items())
    lines = [f"listed {listed.height:,}: {known}"]
    command = ["ecgfm", "run", "own", "--raw", f"own={folder.resolve()}"]
    if rejected_share > 0.2:
        allowed = min(math.ceil(10 * rejected_share) / 10 + 0.1, 1)  # others were looked at than there are
        command += ["--set", f"prepare.max_rejected_share={allowed:g}"]
    counts = Counter(listed["codes"].explode().drop_nulls().to_list())
    both = {code: count for code, count in counts.most_common(20) if count < listed["codes"].count()}
    if both:
        named = {code: name for name, codes in CHALLENGE_2021 for code in codes}
        labels: dict[str, list[str]] = {}
        for code in both:
            labels.setdefault(named.get(code, code), []).append(code)
        flow = json.dumps(labels, ensure_ascii=False)  # is YAML, and its quotes suit a shell
        lines.append(
            f"codes: {_counted({f'{code} {named[code]}' if code in named else code: n for code, n in counts.items()})}"
        )
        command += ["--set", "labels.scheme=codes", "--set", f"labels.codes={flow}"]
    else:
        lines.append("no codes to learn: recordings are prepared and split; metadata.codes or code_columns name some")
        command += ["--only", "list", "--only", "prepare", "--only", "audit", "--only", "splits"]
    return [*lines, "next:", f"  {shlex.join(command)}"]


def _counted(counts: Mapping[str, int]) -> str:
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = "; ".join(f"{name} ({count})" for name, count in most[:8])
    return shown if len(most) <= 8 else f"{shown}; and {len(most) - 8} more"


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    if len(items) <= count:
        return list(items)
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, count)]


def _line(key: str, value: Any, remark: str | None) -> str:
    shown = (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
        .strip()
        .removesuffix("...")
        .strip()
    )
    return f"{key}: {shown}" + (f"  # {remark}" if remark else "")
