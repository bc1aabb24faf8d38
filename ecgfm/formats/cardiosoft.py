"""GE CardioSoft and CASE XML (`CardiologyXML`): decimal numbers, twelve leads or fewer.

Layout: what CardioSoft 6 exports. `StripData` is the ECG that the interpretation rests on (10 s of it at rest), a
text per lead; it is read. The median beat is not, nor is `FullDisclosure`, all that was recorded: its order is
said to be sample by sample, but in CardioSoft 6.73's own file it is a second of each lead in turn, and the file does
not say which.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree.ElementTree import Element

from ecgfm.ecg import EcgRecord, FileFacts, Rejected
from ecgfm.formats.xml_document import (
    age_years,
    check_length,
    decimal_numbers,
    moment_of,
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

NAME = "GE CardioSoft XML"

UNITS = "uVperLsb"


def matches(head: bytes) -> bool:
    """Whether the first bytes of a file are those of this format."""
    return root_tag(head) == "CardiologyXML"


def read(path: Path, record_id: str) -> tuple[EcgRecord, FileFacts]:
    """The strip of the file at `path`.

    Raises:
        Rejected: the file or its signal cannot be used.
    """
    root = parse(path)
    if root.tag != "CardiologyXML":
        raise Rejected("unknown_format", f"expected the element CardiologyXML, found {shown(root.tag)}")
    strip, disclosure = root.find("StripData"), root.find("FullDisclosure")
    notes = () if disclosure is None else ("the full disclosure in the file is not read",)
    if strip is None:
        found = "FullDisclosure alone" if notes else "none"
        raise Rejected("missing_signal", f"expected StripData, found {found}")
    return _read_strip(strip, record_id), _facts(root, notes)


def _read_strip(strip: Element, record_id: str) -> EcgRecord:
    n_samples = sample_count(text_at(strip, "ChannelSampleCountTotal"), "ChannelSampleCountTotal")
    names, values = [], []
    for lead in strip.findall("WaveformData"):
        name = lead.get("lead", "").strip()
        samples = decimal_numbers(lead.text or "", f"lead {name}")
        check_length(len(samples), n_samples, name)
        names.append(name)
        values.append(samples)
    return record_of(record_id, names, _sampling_rate_hz(strip), values, [_mv_per_bit(strip)] * len(names))


def _sampling_rate_hz(part: Element) -> float:
    _check_units(part, "SampleRate", "Hz")
    return positive_number(text_at(part, "SampleRate"), "SampleRate")


def _mv_per_bit(part: Element) -> float:
    _check_units(part, "Resolution", UNITS)
    return positive_number(text_at(part, "Resolution"), "Resolution") / 1000


def _check_units(part: Element, tag: str, units: str) -> None:
    element = part.find(tag)
    found = "" if element is None else element.get("units", "")
    if found.casefold() != units.casefold():
        raise Rejected("unknown_units", f"{tag}: expected {units}, found {shown(found)}")


def _facts(root: Element, notes: tuple[str, ...]) -> FileFacts:
    patient = "PatientInfo"
    recorded_at = moment_of(
        " ".join(
            text_at(root, f"ObservationDateTime/{part}")
            for part in ("Year", "Month", "Day", "Hour", "Minute", "Second")
        ),
        "%Y %m %d %H %M %S",
    )
    age_element = root.find(f"{patient}/Age")
    age = None if age_element is None else age_years(age_element.text or "", age_element.get("units", ""))
    if age is None:
        birth = " ".join(text_at(root, f"{patient}/BirthDateTime/{part}") for part in ("Year", "Month", "Day"))
        age = years_between(moment_of(birth, "%Y %m %d"), recorded_at)
    statements = [
        [(line.text or "").strip() for line in root.findall(f"Interpretation/{of}")]
        for of in ("Conclusion/ConclusionText", "Diagnosis/DiagnosisText")
    ]
    device = " ".join(filter(None, (text_at(root, f"ClinicalInfo/DeviceInfo/{of}") for of in ("Desc", "SoftwareVer"))))
    return FileFacts(
        format=NAME,
        units=UNITS,
        patient_id=text_at(root, f"{patient}/PID") or None,
        age_years=age,
        sex=sex_of(text_at(root, f"{patient}/Gender")),
        recorded_at=recorded_at,
        statements=tuple(filter(None, statements[0] or statements[1])),  # the conclusion is the confirmed diagnosis
        comments=((f"device {device}",) if device else ()) + notes,
    )
