"""A look at one file: what it is, what is in it, how good it is, and a drawing of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ecgfm.drawing import draw_ecg
from ecgfm.ecg import LEADS, EcgRecord, FileFacts, InputError, Rejected
from ecgfm.formats import identify, read_file, what_is_wrong
from ecgfm.quality import Quality, assess

MAX_DRAWN_LEADS = 12
_HEADER_SUFFIX = ".hea"
_SIGNAL_SUFFIXES, _ARRAY_SUFFIXES = (".dat", ".mat"), (".h5", ".hdf5", ".npy")
_SPELLING = {lead.lower(): lead for lead in LEADS}
_SHOWN_LINES, _SHOWN_WIDTH = 40, 400  # of comments and of statements: a file may hold thousands


@dataclass(frozen=True)
class Look:
    """What a look at a file found.

    path: of the file that was read: the header beside a signal file
    leads, signal_mv: (lead, time), millivolt; the standard leads first, in standard order and spelling
    """

    path: Path
    record: EcgRecord
    facts: FileFacts
    leads: tuple[str, ...]
    signal_mv: np.ndarray
    quality: Quality


def look_at(path: Path) -> Look:
    """What is in a recording's file; for a WFDB signal file or a record's name without suffix, its header's record.

    Raises:
        InputError: a folder, no such file, or no recording that can be read; in one line, with what to do.
    """
    file = _file_to_read(path)
    try:
        record, facts = read_file(file, file.stem)
    except Rejected as error:
        raise InputError(f"{path}: {_one_line(str(error))}") from error
    spelled = [_SPELLING.get(lead.lower(), _one_line(lead)) for lead in record.leads]
    order = sorted(range(len(spelled)), key=lambda row: LEADS.index(spelled[row]) if spelled[row] in LEADS else 12)
    leads, signal_mv = tuple(spelled[row] for row in order), record.signal_mv[order]
    quality = assess(signal_mv.astype(np.float32), record.sampling_rate_hz, leads)
    return Look(file, record, facts, leads, signal_mv, quality)


def describe(look: Look) -> list[str]:
    """The lines to print: the file, the recording, the patient, what is written beside the signal, each lead."""
    record, facts = look.record, look.facts
    lines = [f"{look.path.name}: {facts.format}"]
    lines += [f"  {word:11}{_one_line(text)}" for word, text in _rows(look) if text]
    for word, texts in (("statements", facts.statements), ("comments", facts.comments)):
        shown = [_one_line(text) for text in texts[:_SHOWN_LINES] if text.strip()]
        shown += [f"... and {len(texts) - _SHOWN_LINES:,} more"] if len(texts) > _SHOWN_LINES else []
        lines += [f"  {word if number == 0 else '':11}{text}" for number, text in enumerate(shown)]
    lines += ["", *_quality_table(look)]
    if look.quality.suspected_reversal:
        first, second = look.quality.suspected_reversal.split("-")
        lines += ["", f"  The electrodes {first} and {second} look interchanged: look at the drawing."]
    if record.n_samples == 0:
        lines += ["", "  There is no sample to draw."]
    return lines


def draw(look: Look, picture: Path) -> tuple[str, ...]:
    """Draw a recording on ECG paper, 25 mm/s and 10 mm/mV, into a .png or .svg file. The leads left out.

    Of more than twelve leads the standard ones are drawn, or where there are none the first twelve.

    Raises:
        InputError: a picture of another kind, or in a folder that does not exist.
    """
    picture_format = _picture_format(picture)
    if not picture.absolute().parent.is_dir():
        raise InputError(f"{picture}: no folder {picture.parent} to draw into; make it first")
    if not os.access(picture.absolute().parent, os.W_OK):
        raise InputError(f"{picture}: no permission to write there; name another with --out")
    rows = list(range(len(look.leads)))
    if len(rows) > MAX_DRAWN_LEADS:
        rows = [row for row in rows if look.leads[row] in LEADS] or rows
        rows = rows[:MAX_DRAWN_LEADS]
    drawn = draw_ecg(
        look.signal_mv[rows],
        look.record.sampling_rate_hz,
        title=look.path.name,
        leads=[look.leads[row] for row in rows],
        picture_format=picture_format,
    )
    picture.write_bytes(drawn)
    return tuple(lead for row, lead in enumerate(look.leads) if row not in rows)


def _picture_format(picture: Path) -> Literal["png", "svg"]:
    suffix = picture.suffix.lower()
    if suffix == ".png":
        return "png"
    if suffix == ".svg":
        return "svg"
    raise InputError(f"{picture}: expected a picture named .png or .svg, found {picture.suffix or 'no suffix'}")


def _file_to_read(path: Path) -> Path:
    """The file itself, or where it is a signal file or a record's name, the WFDB header beside it."""
    header = path.with_name(path.name + _HEADER_SUFFIX) if path.name else path
    if path.is_dir():
        some = next((child for child in sorted(path.iterdir()) if _is_recording(child)), None)
        example = f", such as {some}" if some else ""
        raise InputError(
            f"{path}: expected a file, found a folder; name one file in it{example}, or look at all of them with "
            "ecgfm init-source"
        )
    if not path.exists():
        if header.is_file():
            return header
        raise InputError(f"{path}: no such file")
    try:
        known = identify(path)
    except Rejected as error:
        raise InputError(f"{path}: {_one_line(str(error))}") from error
    beside = path.with_suffix(_HEADER_SUFFIX)
    if known is None and beside.is_file():
        return beside
    if known is None:
        hint = ""
        if path.suffix.lower() in _SIGNAL_SUFFIXES:
            hint = f"; a WFDB signal file needs its header {beside.name} beside it"
        elif path.suffix.lower() in _ARRAY_SUFFIXES:
            hint = "; arrays of recordings are looked at with ecgfm init-source FOLDER"
        elif path.suffix.lower() == ".csv":
            hint = "; a table of samples is not read: save them as a NumPy array, .npy, for ecgfm init-source FOLDER"
        raise InputError(f"{path}: {what_is_wrong(path)}{hint}")
    return path


def _is_recording(path: Path) -> bool:
    try:
        return path.is_file() and identify(path) is not None
    except Rejected:
        return False


def _rows(look: Look) -> list[tuple[str, str]]:
    record, facts = look.record, look.facts
    rate_hz, n_samples = record.sampling_rate_hz, record.n_samples
    missing = [lead for lead in LEADS if lead not in look.leads]
    missing_text = "all twelve" if len(missing) == 12 else ", ".join(missing)
    patient = [facts.patient_id, facts.sex, None if facts.age_years is None else _age(facts.age_years)]
    return [
        ("leads", f"{len(look.leads)}: {', '.join(look.leads)}"),
        (
            "derived",
            f"{', '.join(facts.derived_leads)} (not stored: worked out from the others)" * bool(facts.derived_leads),
        ),
        ("missing", missing_text),
        ("rate", f"{rate_hz:.7g} Hz"),
        ("length", f"{n_samples / rate_hz:.5g} s ({n_samples:,} samples a lead)"),
        ("units", _units(record, facts)),
        ("patient", ", ".join(filter(None, patient))),
        ("recorded", f"{facts.recorded_at:%Y-%m-%d %H:%M:%S}" if facts.recorded_at else ""),
    ]


def _age(years: float) -> str:
    return f"{years:.3g} years" if years >= 2 else f"{years * 12:.0f} months"


def _units(record: EcgRecord, facts: FileFacts) -> str:
    """Of the file, and how fine a step of the stored numbers is where they are kept."""
    units = facts.units or "not said"
    if record.digital is None:
        return units
    steps_uv = sorted({float(f"{abs(1000 / gain):.4g}") for gain in record.digital.adc_gain_per_mv})
    finest = f"{steps_uv[0]:g}" if len(steps_uv) == 1 else f"{steps_uv[0]:g} to {steps_uv[-1]:g}"
    return f"{units}; stored as integers, {finest} uV a step"


def _quality_table(look: Look) -> list[str]:
    """A row per lead."""
    quality = look.quality
    heads = ("lead", "range mV", "invalid %", "flat %", "clipped %", "powerline uV", "wander uV", "noise uV")
    rows: list[Sequence[str]] = [heads]
    for row, lead in enumerate(look.leads):
        samples = look.signal_mv[row]
        valid = samples[~np.isnan(samples)]
        in_mv = f"{valid.min():.2f} to {valid.max():.2f}" if len(valid) else "-"
        invalid = 100 * (1 - len(valid) / len(samples)) if len(samples) else np.nan
        rows.append(
            (
                lead,
                in_mv,
                _number(invalid, 1),
                _number(100 * quality.flat_share[row], 1),
                _number(100 * quality.clipped_share[row], 1),
                _number(quality.powerline_uv[row], 0),
                _number(quality.baseline_wander_uv[row], 0),
                _number(quality.noise_uv[row], 0),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return [
        "  "
        + "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _number(value: float, digits: int) -> str:
    """`-` where it cannot be told; a zero that is rounded to has its sign off."""
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def _one_line(text: str) -> str:
    """A remark from a file, without line ends or control characters that a terminal would obey."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= _SHOWN_WIDTH else line[: _SHOWN_WIDTH - 3] + "..."
