"""GE MUSE XML (`RestingECG`): base64 of little-endian int16, eight leads stored.

Layout: what MUSE 7 to 9 export (`restecg.dtd`). A file holds the median beat and the rhythm, each a `Waveform`
of `LeadData`; the rhythm is read. Leads III, aVR, aVL and aVF are not stored: they are I and II said otherwise.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from ecgfm.ecg import INVALID, EcgRecord, FileFacts, Rejected
from ecgfm.formats.lead_names import lead_of_label
from ecgfm.formats.xml_document import (
    age_years,
    base64_bytes,
    check_length,
    moment_of,
    mv_per_unit,
    number_or_none,
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

NAME = "GE MUSE XML"

DERIVED_LEADS = ("III", "aVR", "aVL", "aVF")


def matches(head: bytes) -> bool:
    """Whether the first bytes of a file are those of this format."""
    return root_tag(head) == "RestingECG"


def read(path: Path, record_id: str) -> tuple[EcgRecord, FileFacts]:
    """The rhythm of the file at `path`: its leads in the file's order, then those derived from I and II.

    The derived leads are exact: a Goldberger lead has half an ADC unit of I and II as its unit. The checksum
    of a lead (CRC-32 of its bytes) is compared where the file has one.

    Raises:
        Rejected: the file or its rhythm cannot be used.
    """
    root = parse(path)
    if root.tag != "RestingECG":
        raise Rejected("unknown_format", f"expected the element RestingECG, found {shown(root.tag)}")
    rhythms = [waveform for waveform in root.iter("Waveform") if _is_rhythm(waveform)]
    if not rhythms:
        raise Rejected("missing_signal", "expected a Waveform of type Rhythm, found none")
    leads = rhythms[0].findall("LeadData")
    names = [lead_of_label(text_at(lead, "LeadID")) for lead in leads]
    values = [_samples(name, lead) for name, lead in zip(names, leads, strict=True)]
    scales = [_mv_per_bit(lead) for lead in leads]
    starts = {(number_or_none(text_at(lead, "LeadTimeOffset")) or 0.0) for lead in leads}
    if len(starts) > 1:
        raise Rejected("unreadable_signal", f"expected leads that begin together, found offsets {sorted(starts)}")
    derived = _derived(dict(zip(names, zip(values, scales, strict=True), strict=True)))
    rate_hz = _sampling_rate_hz(rhythms[0])
    record = record_of(
        record_id,
        [*names, *derived],
        rate_hz,
        [*values, *(lead for lead, _ in derived.values())],
        [*scales, *(scale for _, scale in derived.values())],
    )
    notes = [f"lead off: {name}" for name, lead in zip(names, leads, strict=True) if text_at(lead, "LeadOff") == "TRUE"]
    if len(rhythms) > 1:
        notes.append(f"the first of {len(rhythms)} rhythm waveforms")
    units = sorted({text_at(lead, "LeadAmplitudeUnits") for lead in leads})
    return record, _facts(root, ", ".join(units), tuple(derived), notes)


def _is_rhythm(waveform: Element) -> bool:
    return text_at(waveform, "WaveformType").casefold() == "rhythm"


def _sampling_rate_hz(waveform: Element) -> float:
    exponent = number_or_none(text_at(waveform, "SampleExponent") or "0")
    if exponent is None or abs(exponent) > 6:
        raise Rejected("unreadable_header", f"SampleExponent: found {shown(text_at(waveform, 'SampleExponent'))}")
    return positive_number(text_at(waveform, "SampleBase"), "SampleBase") * 10**exponent


def _mv_per_bit(lead: Element) -> float:
    per_bit = positive_number(text_at(lead, "LeadAmplitudeUnitsPerBit"), "LeadAmplitudeUnitsPerBit")
    return per_bit * mv_per_unit(text_at(lead, "LeadAmplitudeUnits"))


def _samples(name: str, lead: Element) -> np.ndarray:
    """(time,) float64, ADC units; NaN for -32768, which at 4.88 uV no electrode gives."""
    size = text_at(lead, "LeadSampleSize")
    if size != "2":
        raise Rejected("unreadable_signal", f"{name}: expected samples of 2 bytes, found {shown(size)}")
    n_samples = sample_count(text_at(lead, "LeadSampleCountTotal"), "LeadSampleCountTotal")
    stored = base64_bytes(text_at(lead, "WaveFormData"), f"lead {name}")
    check_length(len(stored) // 2, n_samples, name)
    if len(stored) % 2:
        raise Rejected("unreadable_signal", f"{name}: expected whole samples of 2 bytes, found {len(stored)} bytes")
    checksum = number_or_none(text_at(lead, "LeadDataCRC32"))
    if checksum is not None and int(checksum) % 2**32 != zlib.crc32(stored):
        raise Rejected("unreadable_signal", f"{name}: the samples are damaged, their checksum (CRC-32) differs")
    samples = np.frombuffer(stored, dtype="<i2").astype(np.float64)
    samples[samples == INVALID] = np.nan
    return samples


def _derived(stored: dict[str, tuple[np.ndarray, float]]) -> dict[str, tuple[np.ndarray, float]]:
    """The limb leads that I and II give (Einthoven, Goldberger) and the file lacks, each with its mV per unit:

    III = II - I, aVR = -(I + II) / 2, aVL = (I - III) / 2 = (2 I - II) / 2, aVF = (II + III) / 2 = (2 II - I) / 2.
    """
    if "I" not in stored or "II" not in stored:
        return {}
    (lead_i, scale), (lead_ii, scale_ii) = stored["I"], stored["II"]
    if len(lead_i) != len(lead_ii):
        return {}
    if scale_ii != scale:  # in ADC units of I, then
        lead_ii = lead_ii * (scale_ii / scale)
    derived = {
        "III": (lead_ii - lead_i, scale),
        "aVR": (-lead_i - lead_ii, scale / 2),
        "aVL": (2 * lead_i - lead_ii, scale / 2),
        "aVF": (2 * lead_ii - lead_i, scale / 2),
    }
    return {name: lead for name, lead in derived.items() if name not in stored}


def _facts(root: Element, units: str, derived: tuple[str, ...], notes: list[str]) -> FileFacts:
    patient, test = "PatientDemographics", "TestDemographics"
    recorded_at = moment_of(
        f"{text_at(root, f'{test}/AcquisitionDate')} {text_at(root, f'{test}/AcquisitionTime')}", "%m-%d-%Y %H:%M:%S"
    )
    age = age_years(text_at(root, f"{patient}/PatientAge"), text_at(root, f"{patient}/AgeUnits"))
    if age is None:
        age = years_between(moment_of(text_at(root, f"{patient}/DateofBirth"), "%m-%d-%Y"), recorded_at)
    device, version = text_at(root, f"{test}/AcquisitionDevice"), text_at(root, "MuseInfo/MuseVersion")
    about = [f"{what} {value}" for what, value in (("device", device), ("MUSE", version)) if value]
    return FileFacts(
        format=NAME,
        units=units,
        derived_leads=derived,
        patient_id=text_at(root, f"{patient}/PatientID") or None,
        age_years=age,
        sex=sex_of(text_at(root, f"{patient}/Gender")),
        recorded_at=recorded_at,
        statements=_statements(root),
        comments=(*about, *notes),
    )


def _statements(root: Element) -> tuple[str, ...]:
    """The diagnosis, a line each: a statement goes on with the next one unless it is flagged as a line's end."""
    lines = [""]
    for statement in root.findall("Diagnosis/DiagnosisStatement"):
        lines[-1] = f"{lines[-1]} {text_at(statement, 'StmtText')}".strip()
        if any((flag.text or "").strip() == "ENDSLINE" for flag in statement.findall("StmtFlag")):
            lines.append("")
    return tuple(filter(None, lines))
