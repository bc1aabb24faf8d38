"""Schiller XML, as the SEMA data management exports it (`SchillerEDI`): decimal numbers, one text per lead.

An event holds `wavedata` of several types; `ECG_RHYTHMS` is the recording, `ECG_AVERAGES` its mean beat.
"""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from xml.etree.ElementTree import Element

from ecgfm.ecg import EcgRecord, FileFacts, Rejected
from ecgfm.formats.xml_document import (
    check_length,
    decimal_numbers,
    moment_of,
    mv_per_unit,
    parse,
    positive_number,
    record_of,
    root_tag,
    sample_count,
    sex_of,
    shown,
    text_at,
    years_between,
)

NAME = "Schiller XML"


def matches(head: bytes) -> bool:
    """Whether the first bytes of a file are those of this format."""
    return _is_schiller(root_tag(head))


def read(path: Path, record_id: str) -> tuple[EcgRecord, FileFacts]:
    """The rhythm of the file at `path`, of its first event that has one.

    Raises:
        Rejected: the file or its rhythm cannot be used.
    """
    root = parse(path)
    if not _is_schiller(root.tag):
        raise Rejected("unknown_format", f"expected the element SchillerEDI, found {shown(root.tag)}")
    rhythms = [wave for wave in root.findall("eventdata/event/wavedata") if text_at(wave, "type") in _RHYTHM_TYPES]
    if not rhythms:
        raise Rejected("missing_signal", "expected wavedata of type ECG_RHYTHMS, found none")
    rhythm = rhythms[0]
    names, values = [], []
    for channel in rhythm.findall("channel"):
        name = text_at(channel, "name")
        layout = text_at(channel, "datastype")
        if layout != "COMMASEPARATE":
            raise Rejected("unreadable_signal", f"{name}: expected samples COMMASEPARATE, found {shown(layout)}")
        samples = decimal_numbers(channel.findtext("data") or "", f"lead {name}")
        check_length(len(samples), sample_count(text_at(channel, "samplecount"), "samplecount"), name)
        names.append(name)
        values.append(samples)
    units = text_at(rhythm, "resolution/yres/units")
    per_bit = positive_number(text_at(rhythm, "resolution/yres/unitperbit"), "unitperbit") * mv_per_unit(units)
    record = record_of(record_id, names, _sampling_rate_hz(rhythm), values, [per_bit] * len(names))
    return record, _facts(root, units, len(rhythms))


_RHYTHM_TYPES = {"ECG_RHYTHM", "ECG_RHYTHMS"}


def _is_schiller(tag: str) -> bool:
    """`com.xiriuz.sema.xml.schillerEDI.SchillerEDI`, a Java class's name, as the element's."""
    return tag.rpartition(".")[2] == "SchillerEDI"


def _sampling_rate_hz(rhythm: Element) -> float:
    """Only the exponent 1 is known from files: what another one means is not guessed."""
    exponent = text_at(rhythm, "resolution/samplerate/exponent")
    if exponent not in {"", "1"}:
        raise Rejected("unreadable_header", f"samplerate: expected the exponent 1, found {shown(exponent)}")
    return positive_number(text_at(rhythm, "resolution/samplerate/value"), "samplerate")


def _moment(date: str, time: str) -> datetime | None:
    """`20060502` and `140610000`, the last three milliseconds; None where either is something else."""
    if re.fullmatch(r"\d{8}", date, re.ASCII) is None or re.fullmatch(r"\d{6}(?:\d{3})?", time, re.ASCII) is None:
        return None
    return moment_of(f"{date} {time[:6]}", "%Y%m%d %H%M%S")


def _facts(root: Element, units: str, n_rhythms: int) -> FileFacts:
    start = "examdescript/startdatetime"
    recorded_at = _moment(text_at(root, f"{start}/date"), text_at(root, f"{start}/time"))
    statements = [
        line.strip()
        for block in root.findall("eventdata/event/textdata")
        if text_at(block, "type") == "INTERPRETATION"
        for line in "\n".join(text.text or "" for text in block.findall("textdata")).splitlines()
    ]
    hardware = "examdescript/aquiringdevice/hardware"
    device = " ".join(filter(None, (text_at(root, f"{hardware}/{of}") for of in ("vendor", "model"))))
    comments = [f"device {device}"] if device else []
    if n_rhythms > 1:
        comments.append(f"the first of {n_rhythms} rhythms")
    return FileFacts(
        format=NAME,
        units=units,
        patient_id=text_at(root, "patdata/id") or None,
        age_years=years_between(_moment(text_at(root, "patdata/birthdate"), "000000"), recorded_at),
        sex=sex_of(text_at(root, "patdata/gender")),
        recorded_at=recorded_at,
        statements=tuple(filter(None, statements)),
        comments=tuple(comments),
    )
