"""HL7 annotated ECG (`AnnotatedECG`, ANSI/HL7 V3 ECG R1): decimal digits with an origin and a scale.

A series holds a sequence set: one sequence of time (`GLIST_TS` or `GLIST_PQ`: its increment is the sampling
interval) and one of voltage per lead (`SLIST_PQ`: value = origin + digit x scale). The series of code RHYTHM is
read; a representative beat is a series of its own, or one derived from the rhythm.
"""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element

import numpy as np

from ecgfm.ecg import EcgRecord, FileFacts, Rejected
from ecgfm.formats.xml_document import (
    age_years,
    decimal_numbers,
    moment_of,
    mv_per_unit,
    number_or_none,
    parse,
    positive_number,
    record_of,
    root_tag,
    sex_of,
    shown,
    text_at,
    years_between,
)

NAME = "HL7 aECG"

_LEAD = "MDC_ECG_LEAD_"
_SECONDS_PER_UNIT = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_AGE_CODES = {"21612-7", "30525-0", "29553-5", "MDC_ATTR_PT_AGE"}
"""LOINC: age reported, age, age calculated; MDC (ISO/IEEE 11073): the patient's age."""

_TIME = re.compile(r"(\d{8}(?:\d{2}){0,3})(?:\.(\d{1,6})\d*)?([-+]\d{4})?", re.ASCII)
_TIME_LAYOUT = "%Y%m%d%H%M%S"


class Voltage(NamedTuple):
    """One lead: `mV = origin_mv + digit * mv_per_digit`.

    digits: (time,) float64
    """

    lead: str
    digits: np.ndarray
    origin_mv: float
    mv_per_digit: float
    units: str


def matches(head: bytes) -> bool:
    """Whether the first bytes of a file are those of this format."""
    return root_tag(head) == "AnnotatedECG"


def read(path: Path, record_id: str) -> tuple[EcgRecord, FileFacts]:
    """The first rhythm series of the file at `path`.

    Raises:
        Rejected: the file or its rhythm cannot be used.
    """
    root = parse(path)
    if root.tag != "AnnotatedECG":
        raise Rejected("unknown_format", f"expected the element AnnotatedECG, found {shown(root.tag)}")
    every = root.findall("component/series")
    rhythms = [series for series in every if _code(series) == "RHYTHM"]
    if not rhythms:
        found = ", ".join(shown(_code(series)) for series in every) or "no series"
        raise Rejected("missing_signal", f"expected a series of code RHYTHM, found {found}")
    sets = rhythms[0].findall("component/sequenceSet")
    if not sets:
        raise Rejected("missing_signal", "expected a sequence set in the rhythm series, found none")
    sequences = sets[0].findall("component/sequence")
    voltages = [_voltage(sequence) for sequence in sequences if _code(sequence).startswith(_LEAD)]
    record = record_of(
        record_id,
        [voltage.lead for voltage in voltages],
        _sampling_rate_hz(sequences),
        [voltage.digits for voltage in voltages],
        [voltage.mv_per_digit for voltage in voltages],
        [-voltage.origin_mv / voltage.mv_per_digit for voltage in voltages],
    )
    notes = [
        f"the first of {count} {what}"
        for count, what in ((len(rhythms), "rhythm series"), (len(sets), "sequence sets"))
        if count > 1
    ]
    units = ", ".join(sorted({voltage.units for voltage in voltages}))
    return record, _facts(root, rhythms[0], units, notes)


def _code(element: Element) -> str:
    return _attribute(element, "code", "code")


def _attribute(element: Element, path: str, name: str) -> str:
    """An attribute of the first element at `path` below `element`; empty if there is none."""
    found = element.find(path)
    return "" if found is None else found.get(name, "").strip()


def _sampling_rate_hz(sequences: list[Element]) -> float:
    for sequence in sequences:
        if _code(sequence) in {"TIME_ABSOLUTE", "TIME_RELATIVE"}:
            unit = _attribute(sequence, "value/increment", "unit")
            if unit not in _SECONDS_PER_UNIT:
                raise Rejected("unreadable_header", f"increment of time: expected s, ms or us, found {shown(unit)}")
            increment = positive_number(_attribute(sequence, "value/increment", "value"), "increment of time")
            seconds = increment * _SECONDS_PER_UNIT[unit]
            if not 1e-9 < seconds < 1e9:
                raise Rejected("unreadable_header", f"increment of time: found {increment:g} {unit}")
            return round(1 / seconds, 9)  # 0.002 s is 500 Hz, whatever binary fractions make of it
    raise Rejected("unreadable_header", "expected a sequence TIME_ABSOLUTE or TIME_RELATIVE, found none")


def _voltage(sequence: Element) -> Voltage:
    lead = _code(sequence).removeprefix(_LEAD)
    kind = _attribute(sequence, "value", "type").rpartition(":")[2]
    if kind != "SLIST_PQ":
        raise Rejected("unreadable_signal", f"{lead}: expected values SLIST_PQ, found {shown(kind)}")
    units = _attribute(sequence, "value/scale", "unit")
    scale = positive_number(_attribute(sequence, "value/scale", "value"), f"{lead}: scale") * mv_per_unit(units)
    origin = 0.0
    if sequence.find("value/origin") is not None:
        text = _attribute(sequence, "value/origin", "value")
        number = number_or_none(text)
        if number is None:
            raise Rejected("unreadable_header", f"{lead}: expected a number as origin, found {shown(text)}")
        origin = number and number * mv_per_unit(_attribute(sequence, "value/origin", "unit"))
    digits = decimal_numbers(sequence.findtext("value/digits") or "", f"lead {lead}")
    return Voltage(lead, digits, origin, scale, units)


def _moment(text: str) -> datetime | None:
    """The time that a TS of HL7 is, from `20021122` to `20021122091000.500+0100`; None where it is none.

    Its digits are counted: `strptime` alone takes `19521122` for one in the morning of January the 1st.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    digits, fraction, zone = match[1], match[2] or "0", match[3] or ""
    layout = _TIME_LAYOUT[: 6 + (len(digits) - 8)]
    return moment_of(f"{digits}.{fraction}{zone}", f"{layout}.%f{'%z' if zone else ''}")


def _facts(root: Element, rhythm: Element, units: str, notes: list[str]) -> FileFacts:
    starts = [
        _attribute(element, f"effectiveTime{at}", "value")
        for element in (rhythm, root)
        for at in ("/low", "/center", "", "/high")
    ]
    recorded_at = next(filter(None, map(_moment, starts)), None)
    subject = "componentOf/timepointEvent/componentOf/subjectAssignment/subject/trialSubject"
    person = f"{subject}/subjectDemographicPerson"
    ages = [
        age_years(_attribute(observation, "value", "value"), _attribute(observation, "value", "unit"))
        for observation in root.findall("controlVariable/relatedObservation")
        if _code(observation) in _AGE_CODES
    ]
    birth = _moment(_attribute(root, f"{person}/birthTime", "value"))
    device = "author/seriesAuthor"
    maker = text_at(rhythm, f"{device}/manufacturerOrganization/name")
    model = text_at(rhythm, f"{device}/manufacturedSeriesDevice/manufacturerModelName")
    comments = [f"device {' '.join(filter(None, (maker, model)))}"] if maker or model else []
    comments += filter(None, (text_at(finding, "text") for finding in root.findall("pertainsTo/subjectFindingComment")))
    return FileFacts(
        format=NAME,
        units=units,
        patient_id=_attribute(root, f"{subject}/id", "extension") or None,
        age_years=next((age for age in ages if age is not None), years_between(birth, recorded_at)),
        sex=sex_of(_attribute(root, f"{person}/administrativeGenderCode", "code")),
        recorded_at=recorded_at,
        statements=_statements(rhythm),
        comments=(*comments, *notes),
    )


def _statements(rhythm: Element) -> tuple[str, ...]:
    """The interpretation: its texts, and the rhythm where it is annotated by a code with a name."""
    statements = []
    for annotation in rhythm.findall("subjectOf/annotationSet//annotation"):
        code = _code(annotation)
        if code.startswith("MDC_ECG_INTERPRETATION"):
            statements.append(text_at(annotation, "value"))
        elif code == "MDC_ECG_RHY":
            statements.append(_attribute(annotation, "value", "displayName"))
    return tuple(filter(None, statements))
