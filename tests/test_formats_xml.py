"""The XML formats: files written here from known signals, the vendors' own files, and files made to do harm."""

from __future__ import annotations

import base64
import os
import struct
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree.ElementTree import tostring

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecgfm.ecg import LEADS, EcgRecord, FileFacts, InputError, Rejected
from ecgfm.formats import cardiosoft, hl7_aecg, muse, philips, schiller
from ecgfm.formats.xml_document import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_ELEMENTS,
    MAX_TAG_BYTES,
    age_years,
    decimal_numbers,
    parse,
    root_tag,
    text_at,
)

STORED = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")

Leads = Mapping[str, Sequence[int]]


def signal(names: Sequence[str] = LEADS, n_samples: int = 60, seed: int = 0) -> dict[str, list[int]]:
    """ADC units: a walk with steep complexes in it; the limb leads are what an electrocardiograph makes of I and II,
    each rounded by itself, halves away from zero."""
    rng = np.random.default_rng(seed)
    walk = rng.integers(-3, 4, (8, n_samples)).cumsum(axis=1)
    walk[:, n_samples // 3 : n_samples // 3 + 4] += np.outer(rng.integers(-400, 400, 8), [1, 3, -2, 1])
    leads = dict(zip(STORED, walk.tolist(), strict=True))

    def rounded(doubled: int) -> int:
        return (abs(doubled) + 1) // 2 * (1 if doubled >= 0 else -1)

    pairs = list(zip(leads["I"], leads["II"], strict=True))
    leads["III"] = [ii - i for i, ii in pairs]
    leads["aVR"] = [rounded(-i - ii) for i, ii in pairs]
    leads["aVL"] = [rounded(2 * i - ii) for i, ii in pairs]
    leads["aVF"] = [rounded(2 * ii - i) for i, ii in pairs]
    return {name: leads.get(name, [0] * n_samples) for name in names}


# ---- writers, one per format


def muse_xml(
    leads: Leads,
    *,
    uv_per_bit: str = "4.88",
    units: str = "MICROVOLTS",
    rate: tuple[int, int] = (500, 0),
    kinds: Sequence[str] = ("Median", "Rhythm"),
    count: int | None = None,
    checksum: int | None = None,
    prolog: str = '<?xml version="1.0" encoding="ISO-8859-1"?>\n<!DOCTYPE RestingECG SYSTEM "restecg.dtd">',
    patient: str = "<PatientID>4711</PatientID><PatientAge>58</PatientAge><AgeUnits>YEARS</AgeUnits>"
    "<Gender>FEMALE</Gender>",
) -> str:
    def lead_data(name: str, values: Sequence[int]) -> str:
        stored = b"".join(value.to_bytes(2, "little", signed=True) for value in values)
        text = base64.encodebytes(stored).decode()
        return (
            f"<LeadData><LeadByteCountTotal>{len(stored)}</LeadByteCountTotal><LeadTimeOffset>0</LeadTimeOffset>"
            f"<LeadSampleCountTotal>{len(values) if count is None else count}</LeadSampleCountTotal>"
            f"<LeadAmplitudeUnitsPerBit>{uv_per_bit}</LeadAmplitudeUnitsPerBit>"
            f"<LeadAmplitudeUnits>{units}</LeadAmplitudeUnits><LeadID>{name}</LeadID>"
            f"<LeadSampleSize>2</LeadSampleSize><LeadOff>{'TRUE' if name == 'V6' else 'FALSE'}</LeadOff>"
            f"<LeadDataCRC32>{zlib.crc32(stored) if checksum is None else checksum}</LeadDataCRC32>"
            f"<WaveFormData>\n{text}</WaveFormData></LeadData>"
        )

    def waveform(kind: str) -> str:
        used = leads if kind == "Rhythm" else {name: [7, 7] for name in leads}
        return (
            f"<Waveform><WaveformType>{kind}</WaveformType><SampleBase>{rate[0]}</SampleBase>"
            f"<SampleExponent>{rate[1]}</SampleExponent>"
            f"{''.join(lead_data(name, values) for name, values in used.items())}</Waveform>"
        )

    return (
        f"{prolog}\n<RestingECG><MuseInfo><MuseVersion>9.0</MuseVersion></MuseInfo>"
        f"<PatientDemographics>{patient}</PatientDemographics>"
        "<TestDemographics><AcquisitionDevice>MAC55</AcquisitionDevice><AcquisitionTime>11:18:05</AcquisitionTime>"
        "<AcquisitionDate>03-25-1996</AcquisitionDate></TestDemographics><Diagnosis>"
        "<DiagnosisStatement><StmtText>Sinus rhythm</StmtText></DiagnosisStatement>"
        "<DiagnosisStatement><StmtFlag>ENDSLINE</StmtFlag><StmtText>with PVCs</StmtText></DiagnosisStatement>"
        "<DiagnosisStatement><StmtFlag>ENDSLINE</StmtFlag><StmtText>Abnormal ECG</StmtText></DiagnosisStatement>"
        f"</Diagnosis>{''.join(map(waveform, kinds))}</RestingECG>"
    )


def slow_lzw(data: bytes) -> bytes:
    """LZW with codes of 10 bits, the first bit first: the textbook's encoder, a bit a character. 1023 is the end."""
    table = {bytes([byte]): byte for byte in range(256)}
    bits, current = "", b""
    for at in range(len(data)):
        byte = data[at : at + 1]
        if current + byte in table:
            current += byte
            continue
        bits += f"{table[current]:010b}"
        if len(table) < 1023:
            table[current + byte] = len(table)
        current = byte
    bits += f"{table[current]:010b}" if current else ""
    bits += f"{1023:010b}"
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))


def slow_xli(values: Sequence[int]) -> bytes:
    """One lead as a chunk: how far each sample falls short of the line through the two before it, said one early."""
    short = [2 * values[i - 1] - values[i - 2] - values[i] for i in range(2, len(values))]
    codes = [values[0], values[1], *(miss + 64 for miss in short[1:]), 64]
    words = [code.to_bytes(2, "big", signed=True) for code in codes]
    packed = slow_lzw(bytes(word[0] for word in words) + bytes(word[1] for word in words))
    return struct.pack("<ihh", len(packed), 1, short[0]) + packed


def differences(leads: Leads) -> dict[str, list[int]]:
    """The limb leads as Philips stores them: what truncated halves of I and II miss."""
    stored = {name: list(values) for name, values in leads.items()}
    if "III" not in leads:
        return stored
    for at, (i, ii) in enumerate(zip(leads["I"], leads["II"], strict=True)):
        iii = leads["III"][at]
        stored["III"][at] = ii - i - iii
        stored["aVR"][at] = -int((i + ii) / 2) - leads["aVR"][at]
        stored["aVL"][at] = int((i - iii) / 2) - leads["aVL"][at]
        stored["aVF"][at] = int((ii + iii) / 2) - leads["aVF"][at]
    return stored


def philips_xml(
    leads: Leads,
    *,
    coding: str = "XLI",
    version: str = "1.04",
    kind: str = "PhilipsECG",
    labels: str | None = None,
    milliseconds: int | None = None,
    content: bytes | None = None,
    age: str = "<years>50</years>",
) -> str:
    stored = {"XLI": differences, "differences": differences}.get(coding, dict)(leads)
    n_samples = len(next(iter(leads.values())))
    if content is None and coding == "XLI":
        content = b"".join(map(slow_xli, stored.values()))
        content += slow_xli([0] * n_samples)  # of a channel that is not connected
    elif content is None:
        content = b"".join(struct.pack("<h", value) for values in stored.values() for value in values)
    encoding, text = "Base64", base64.b64encode(content).decode()
    if coding == "Plain":
        encoding, text = "Plain", "\n".join(" ".join(map(str, values)) for values in stored.values())
    if version == "1.03":
        compression = f'compressflag="{coding == "XLI"}" compressmethod="XLI" nbitspersample="16"'
        signal_layout = "<signalresolution>5</signalresolution><acquisitiontype>STD-12</acquisitiontype>"
    else:
        compression = f'compression="{"XLI" if coding == "XLI" else "Uncompressed"}" bitspersample="16" resolution="5"'
        compression += f' numberofleads="{len(leads)}" leadlabels="{labels or " ".join(leads)}" samplespersecond="500"'
        signal_layout = "<resolution>5</resolution><acquisitiontype>10-WIRE</acquisitiontype>"
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<restingecgdata xmlns="http://www3.medical.philips.com">'
        f"<documentinfo><documenttype>{kind}</documenttype><documentversion>{version}</documentversion></documentinfo>"
        '<dataacquisition date="2011-12-01" time="07:27:34"><machine machineid="1">PageWriter</machine>'
        f"<signalcharacteristics><samplingrate>500</samplingrate>{signal_layout}<bitspersample>16</bitspersample>"
        "<signaloffset>0</signaloffset><signalsigned>True</signalsigned>"
        f"<numberchannelsvalid>{len(leads)}</numberchannelsvalid></signalcharacteristics></dataacquisition>"
        f'<patient><generalpatientdata><patientid>4711</patientid><age defaultage="61">{age}</age><sex>Female</sex>'
        "</generalpatientdata></patient>"
        "<interpretations><interpretation><severity>- ABNORMAL ECG -</severity><statement>"
        "<leftstatement>Sinus bradycardia</leftstatement><rightstatement>rate&lt; 50</rightstatement></statement>"
        "</interpretation></interpretations>"
        f'<waveforms><parsedwaveforms {compression} dataencoding="{encoding}" '
        f'durationperchannel="{2 * n_samples if milliseconds is None else milliseconds}">{text}</parsedwaveforms>'
        "</waveforms></restingecgdata>"
    )


def cardiosoft_xml(
    leads: Leads,
    *,
    resolution: str = '<Resolution units="uVperLsb">5</Resolution>',
    count: int | None = None,
    age: str = '<Age units="MONTHS">18</Age>',
) -> str:
    n_samples = len(next(iter(leads.values())))
    texts = "".join(
        f'<WaveformData lead="{name}">{",".join(map(str, values))}</WaveformData>' for name, values in leads.items()
    )
    return (
        '<?xml version="1.0" encoding="ISO-8859-1"?>\n<CardiologyXML><ObservationType>RestECG</ObservationType>'
        "<ObservationDateTime><Hour>14</Hour><Minute>9</Minute><Second>3</Second><Day>19</Day><Month>7</Month>"
        "<Year>2018</Year></ObservationDateTime><ClinicalInfo><DeviceInfo><Desc>CardioSoft</Desc></DeviceInfo>"
        f"</ClinicalInfo><PatientInfo><PID>4711</PID>{age}<BirthDateTime><Day>1</Day><Month>1</Month>"
        "<Year>2017</Year></BirthDateTime><Gender>FEMALE</Gender></PatientInfo><Interpretation><Diagnosis>"
        "<DiagnosisText>Sinus rhythm</DiagnosisText><DiagnosisText/></Diagnosis></Interpretation>"
        "<RestingECGMeasurements><MedianSamples><ChannelSampleCountTotal>2</ChannelSampleCountTotal>"
        '<WaveformData lead="I">7,7</WaveformData></MedianSamples></RestingECGMeasurements>'
        f'<StripData><SampleRate units="Hz">500</SampleRate>'
        f"<ChannelSampleCountTotal>{n_samples if count is None else count}</ChannelSampleCountTotal>"
        f"{resolution}{texts}</StripData></CardiologyXML>"
    )


def schiller_xml(leads: Leads, *, exponent: str = "1", count: int | None = None) -> str:
    def wave(kind: str, used: Leads) -> str:
        channels = "".join(
            f"<channel><name>{name}</name><data>{','.join(map(str, values))}</data>"
            f"<datastype>COMMASEPARATE</datastype><samplecount>{len(values) if count is None else count}</samplecount>"
            "</channel>"
            for name, values in used.items()
        )
        return (
            f"<wavedata><type>{kind}</type><resolution><samplerate><exponent>{exponent}</exponent><value>500</value>"
            "</samplerate><yres><unitperbit>2.5</unitperbit><units>UV</units></yres></resolution>"
            f"{channels}</wavedata>"
        )

    tag = "com.xiriuz.sema.xml.schillerEDI.SchillerEDI"
    return (
        f"<{tag}><patdata><id>4711</id><birthdate>19560502</birthdate><gender>FEMALE</gender></patdata>"
        "<examdescript><startdatetime><date>20060502</date><time>140610000</time></startdatetime><aquiringdevice>"
        "<hardware><vendor>Schiller</vendor><model>AT-110</model></hardware></aquiringdevice></examdescript>"
        f"<eventdata><event>{wave('ECG_AVERAGES', {name: [7, 7] for name in leads})}{wave('ECG_RHYTHMS', leads)}"
        "<textdata><type>INTERPRETATION</type><textdata>Sinus rhythm\nAbnormal</textdata></textdata>"
        f"<textdata><type>MEDICATION</type><textdata>none</textdata></textdata></event></eventdata></{tag}>"
    )


def aecg_xml(
    leads: Leads,
    *,
    increment: str = 'value="0.002" unit="s"',
    scale: str = 'value="2.5" unit="uV"',
    origin: str = 'value="100" unit="uV"',
    codes: Sequence[str] = ("REPRESENTATIVE_BEAT", "RHYTHM"),
    age: str = '<value xsi:type="PQ" value="46" unit="a"/>',
) -> str:
    def series(at: int, code: str) -> str:
        used = leads if codes[at] == "RHYTHM" and "RHYTHM" not in codes[:at] else {name: [7, 7] for name in leads}
        sequences = "".join(
            f'<component><sequence><code code="MDC_ECG_LEAD_{name.upper()}"/><value xsi:type="SLIST_PQ">'
            f"<origin {origin}/><scale {scale}/><digits>\n{' '.join(map(str, values))}\n</digits></value></sequence>"
            "</component>"
            for name, values in used.items()
        )
        return (
            f'<component><series><code code="{code}"/><effectiveTime><low value="20021122091000.500"/>'
            '<high value="20021122091010"/></effectiveTime><author><seriesAuthor><manufacturedSeriesDevice>'
            "<manufacturerModelName>ELI250</manufacturerModelName></manufacturedSeriesDevice></seriesAuthor></author>"
            '<component><sequenceSet><component><sequence><code code="TIME_ABSOLUTE"/><value xsi:type="GLIST_TS">'
            f'<head value="20021122091000"/><increment {increment}/></value></sequence></component>{sequences}'
            '</sequenceSet></component><subjectOf><annotationSet><component><annotation><code code="MDC_ECG_RHY"/>'
            '<value xsi:type="CE" code="MDC_ECG_RHY_SINUS_RHY" displayName="Sinus Rhythm"/></annotation></component>'
            '<component><annotation><code code="MDC_ECG_INTERPRETATION"/><component><annotation>'
            '<code code="MDC_ECG_INTERPRETATION_STATEMENT"/><value xsi:type="ST">Normal ECG</value></annotation>'
            "</component></annotation></component></annotationSet></subjectOf></series></component>"
        )

    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<AnnotatedECG xmlns="urn:hl7-org:v3" '
        'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><effectiveTime><center value="20021122"/>'
        "</effectiveTime>"
        "<componentOf><timepointEvent><componentOf><subjectAssignment><subject><trialSubject>"
        '<id root="1.2.3" extension="4711"/><subjectDemographicPerson><administrativeGenderCode code="F"/>'
        '<birthTime value="19521122"/></subjectDemographicPerson></trialSubject></subject></subjectAssignment>'
        "</componentOf></timepointEvent></componentOf><controlVariable><relatedObservation>"
        f'<code code="21612-7"/>{age}</relatedObservation></controlVariable>'
        f"{''.join(series(at, code) for at, code in enumerate(codes))}</AnnotatedECG>"
    )


class Format:
    """A format, how a file of it is written here, and the microvolts of its ADC unit."""

    def __init__(self, module: Any, write: Callable[..., str], uv_per_bit: float, leads: Sequence[str]) -> None:
        self.module: Any = module
        self.write = write
        self.uv_per_bit = uv_per_bit
        self.leads = leads


FORMATS = {
    "muse": Format(muse, muse_xml, 4.88, STORED),
    "philips": Format(philips, philips_xml, 5, LEADS),
    "cardiosoft": Format(cardiosoft, cardiosoft_xml, 5, LEADS),
    "schiller": Format(schiller, schiller_xml, 2.5, LEADS),
    "hl7_aecg": Format(hl7_aecg, aecg_xml, 2.5, LEADS),
}
every_format = pytest.mark.parametrize("name", FORMATS)


def read_text(folder: Path, module: Any, content: str | bytes) -> tuple[EcgRecord, FileFacts]:
    path = folder / "file.xml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("latin-1"))
    record, facts = module.read(path, "own/file")
    assert isinstance(record, EcgRecord)
    assert isinstance(facts, FileFacts)
    return record, facts


def reason_of(folder: Path, module: Any, content: str | bytes) -> str:
    with pytest.raises(Rejected) as rejected:
        read_text(folder, module, content)
    assert "\n" not in rejected.value.detail
    return rejected.value.reason


# ---- what is written is read


@every_format
def test_the_samples_written_are_the_samples_read(tmp_path: Path, name: str) -> None:
    kind = FORMATS[name]
    leads = signal(kind.leads)
    record, facts = read_text(tmp_path, kind.module, kind.write(leads))
    assert record.record_id == "own/file"
    assert record.sampling_rate_hz == 500
    assert set(record.leads) == set(LEADS)
    assert record.digital is not None, "integers stay integers"
    origin_uv = 100 if name == "hl7_aecg" else 0
    for lead, values in leads.items():
        at = record.leads.index(lead)
        np.testing.assert_array_equal(record.digital.digital[at], values)
        expected_mv = (np.array(values) * kind.uv_per_bit + origin_uv) / 1000
        np.testing.assert_allclose(record.signal_mv[at], expected_mv, rtol=0, atol=1e-12)
    assert facts.patient_id == "4711"
    assert facts.sex == "female"
    assert facts.format.startswith(kind.module.NAME)


def test_the_facts_of_a_muse_file(tmp_path: Path) -> None:
    _, facts = read_text(tmp_path, muse, muse_xml(signal(STORED)))
    assert facts == FileFacts(
        format="GE MUSE XML",
        units="MICROVOLTS",
        derived_leads=("III", "aVR", "aVL", "aVF"),
        patient_id="4711",
        age_years=58,
        sex="female",
        recorded_at=datetime(1996, 3, 25, 11, 18, 5),
        statements=("Sinus rhythm with PVCs", "Abnormal ECG"),
        comments=("device MAC55", "MUSE 9.0", "lead off: V6"),
    )


def test_the_facts_of_a_philips_file(tmp_path: Path) -> None:
    _, facts = read_text(tmp_path, philips, philips_xml(signal()))
    assert facts == FileFacts(
        format="Philips XML 1.04",
        units="uV",
        patient_id="4711",
        age_years=50,
        sex="female",
        recorded_at=datetime(2011, 12, 1, 7, 27, 34),
        statements=("Sinus bradycardia; rate< 50", "- ABNORMAL ECG -"),
        comments=("device PageWriter",),
    )


def test_the_facts_of_a_cardiosoft_file(tmp_path: Path) -> None:
    _, facts = read_text(tmp_path, cardiosoft, cardiosoft_xml(signal()))
    assert facts == FileFacts(
        format="GE CardioSoft XML",
        units="uVperLsb",
        patient_id="4711",
        age_years=1.5,
        sex="female",
        recorded_at=datetime(2018, 7, 19, 14, 9, 3),
        statements=("Sinus rhythm",),
        comments=("device CardioSoft",),
    )


def test_the_facts_of_a_schiller_file(tmp_path: Path) -> None:
    _, facts = read_text(tmp_path, schiller, schiller_xml(signal()))
    assert facts.age_years == pytest.approx(50, abs=1 / 365)
    assert facts == FileFacts(
        format="Schiller XML",
        units="UV",
        patient_id="4711",
        age_years=facts.age_years,
        sex="female",
        recorded_at=datetime(2006, 5, 2, 14, 6, 10),
        statements=("Sinus rhythm", "Abnormal"),
        comments=("device Schiller AT-110",),
    )


def test_the_facts_of_an_hl7_file(tmp_path: Path) -> None:
    _, facts = read_text(tmp_path, hl7_aecg, aecg_xml(signal()))
    assert facts == FileFacts(
        format="HL7 aECG",
        units="uV",
        patient_id="4711",
        age_years=46,
        sex="female",
        recorded_at=datetime(2002, 11, 22, 9, 10, 0, 500_000),
        statements=("Sinus Rhythm", "Normal ECG"),
        comments=("device ELI250",),
    )


@pytest.mark.parametrize(
    ("age", "units", "years"),
    [
        *(("18", "MONTHS", 1.5), ("7", "days", 7 / 365.25), ("6", "WEEKS", 42 / 365.25), ("12", "HOURS", 12 / 8766)),
        *(("3", "mo", 0.25), ("46", "a", 46), ("46", "", None), ("", "YEARS", None), ("-1", "YEARS", None)),
        *(("old", "YEARS", None), ("46", "parsecs", None), ("1e999", "YEARS", None)),
    ],
)
def test_an_age_is_in_years_whatever_its_units(age: str, units: str, years: float | None) -> None:
    assert age_years(age, units) == (None if years is None else pytest.approx(years))


def test_an_age_not_stated_is_that_between_birth_and_recording(tmp_path: Path) -> None:
    """The `defaultage` of Philips is the setting of a machine and nobody's age."""
    texts: list[tuple[Any, str, float | None]] = [
        (muse, muse_xml(signal(STORED), patient="<DateofBirth>03-25-1946</DateofBirth>"), 50),
        (muse, muse_xml(signal(STORED), patient=""), None),
        (philips, philips_xml(signal(), age="<dateofbirth>1951-12-01</dateofbirth>"), 60),
        (philips, philips_xml(signal(), age="<dateofbirth/>"), None),
        (cardiosoft, cardiosoft_xml(signal(), age=""), 1.546),
        (hl7_aecg, aecg_xml(signal(), age=""), 50),
    ]
    for module, text, years in texts:
        _, facts = read_text(tmp_path, module, text)
        assert facts.age_years == (None if years is None else pytest.approx(years, abs=0.003)), module


@every_format
def test_a_file_is_of_one_format(name: str) -> None:
    kind = FORMATS[name]
    text = kind.write(signal(kind.leads)).partition("?>")[2] or kind.write(signal(kind.leads))
    trick = "<!-- <RestingECG> <restingecgdata> <AnnotatedECG/> -->"
    heads = [text, f'<?xml version="1.0"?>{trick}{text}', f"\n  {text}"]
    encoded = [head.encode(code) for head in heads for code in ("utf-8", "utf-8-sig", "utf-16", "utf-16-be")]
    for head in encoded:
        assert [other for other, kind in FORMATS.items() if kind.module.matches(head[:65536])] == [name]


def test_what_is_no_xml_is_of_no_format() -> None:
    for head in (b"", b"RestingECG", b"<RestingECG", b"<!-- <RestingECG>", b"\xff\xfe", b"<html><RestingECG>", b"<?"):
        assert root_tag(head) not in {"RestingECG", "restingecgdata", "CardiologyXML", "AnnotatedECG"}
        assert not any(kind.module.matches(head) for kind in FORMATS.values())


# ---- GE MUSE


def test_derived_leads_are_exact_in_adc_units(tmp_path: Path) -> None:
    leads = signal(STORED)
    record, facts = read_text(tmp_path, muse, muse_xml(leads))
    assert record.leads == (*STORED, *facts.derived_leads)
    assert record.digital is not None, "halves are whole in units half as large"
    lead_i, lead_ii = np.array(leads["I"]), np.array(leads["II"])
    doubled = {"III": 2 * (lead_ii - lead_i), "aVR": -lead_i - lead_ii, "aVL": 2 * lead_i - lead_ii}
    doubled["aVF"] = 2 * lead_ii - lead_i
    for lead, twice in doubled.items():
        np.testing.assert_allclose(record.signal_mv[record.leads.index(lead)], twice * 0.00488 / 2, rtol=1e-14)


def test_leads_that_leave_int16_when_they_are_derived_are_millivolts(tmp_path: Path) -> None:
    leads = signal(STORED)
    leads["I"][5], leads["II"][5] = -30000, 30000
    record, _ = read_text(tmp_path, muse, muse_xml(leads))
    assert record.digital is None
    assert record.signal_mv[record.leads.index("III"), 5] == pytest.approx(60000 * 0.00488)
    assert record.signal_mv[record.leads.index("aVL"), 5] == pytest.approx(-45000 * 0.00488)


def test_an_invalid_sample_is_invalid_in_the_leads_derived_from_it(tmp_path: Path) -> None:
    leads = signal(STORED)
    leads["II"][7] = leads["V3"][9] = -32768
    record, _ = read_text(tmp_path, muse, muse_xml(leads))
    assert record.digital is not None
    invalid = {(record.leads[lead], int(at)) for lead, at in np.argwhere(np.isnan(record.signal_mv))}
    assert invalid == {*((lead, 7) for lead in ("II", "III", "aVR", "aVL", "aVF")), ("V3", 9)}


def test_leads_a_muse_file_has_are_not_derived_again(tmp_path: Path) -> None:
    leads = {**signal(STORED), "III": list(range(60))}
    record, facts = read_text(tmp_path, muse, muse_xml(leads))
    assert facts.derived_leads == ("aVR", "aVL", "aVF")
    assert record.signal_mv[record.leads.index("III"), 59] == pytest.approx(59 * 0.00488)
    record, facts = read_text(tmp_path, muse, muse_xml({"V1": [1, 2, 3]}))
    assert (record.leads, facts.derived_leads) == (("V1",), ())


def test_the_rhythm_is_read_and_not_the_median_wherever_it_stands(tmp_path: Path) -> None:
    leads = signal(STORED)
    for kinds in (("Rhythm", "Median"), ("Median", "Rhythm"), ("Rhythm", "Rhythm")):
        record, facts = read_text(tmp_path, muse, muse_xml(leads, kinds=kinds))
        assert record.n_samples == 60
        assert ("the first of 2 rhythm waveforms" in facts.comments) == (kinds == ("Rhythm", "Rhythm"))
    assert reason_of(tmp_path, muse, muse_xml(leads, kinds=("Median",))) == "missing_signal"


def test_the_rate_and_the_units_of_a_muse_file(tmp_path: Path) -> None:
    leads = signal(STORED)
    record, _ = read_text(tmp_path, muse, muse_xml(leads, rate=(25, 1), uv_per_bit="0.00488", units="MILLIVOLTS"))
    assert record.sampling_rate_hz == 250
    np.testing.assert_allclose(record.signal_mv[0], np.array(leads["I"]) * 0.00488)
    assert reason_of(tmp_path, muse, muse_xml(leads, units="MMHG")) == "unknown_units"


def test_damaged_samples_are_known_by_their_checksum(tmp_path: Path) -> None:
    assert reason_of(tmp_path, muse, muse_xml(signal(STORED), checksum=12345)) == "unreadable_signal"
    leads = {"I": [1, 2, 3]}
    signed = zlib.crc32(struct.pack("<3h", 1, 2, 3)) - 2**32  # as a signed number of 32 bits
    read_text(tmp_path, muse, muse_xml(leads, checksum=signed))


# ---- Philips


@pytest.mark.parametrize(
    ("coding", "version", "kind"),
    [
        *(("XLI", "1.03", "SierraECG"), ("XLI", "1.04.01", "PhilipsECG"), ("Plain", "1.03", "SierraECG")),
        *(("differences", "1.04", "PhilipsECG"), ("leads", "1.04", "PhilipsECG"), ("leads", "1.03", "SierraECG")),
    ],
)
def test_philips_documents_plain_or_compressed_hold_the_same_leads(
    tmp_path: Path, coding: str, version: str, kind: str
) -> None:
    leads = signal(n_samples=300)
    record, _ = read_text(tmp_path, philips, philips_xml(leads, coding=coding, version=version, kind=kind))
    assert record.leads == LEADS
    assert record.digital is not None
    np.testing.assert_array_equal(record.digital.digital, list(leads.values()))


def test_a_table_of_strings_that_is_full_is_used_to_its_last(tmp_path: Path) -> None:
    values = signal(("V1",), n_samples=3000, seed=2)["V1"]
    packed = np.unpackbits(np.frombuffer(slow_xli(values)[8:], dtype=np.uint8))
    codes = packed[: len(packed) // 10 * 10].reshape(-1, 10) @ (1 << np.arange(9, -1, -1))
    assert {1021, 1022} < set(codes.tolist())
    record, _ = read_text(tmp_path, philips, philips_xml({"V1": values}))
    assert record.digital is not None
    assert record.digital.digital[0].tolist() == values


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(-2000, 2000), min_size=3, max_size=400),
    st.lists(st.sampled_from([0, 0, 0, 1, 255]), min_size=0, max_size=3000),
)
def test_compression_of_any_signal_is_undone(tmp_path: Path, wild: list[int], tame: list[int]) -> None:
    """Tame signals repeat themselves, and use a string while it is being made."""
    values = wild + tame
    record, _ = read_text(tmp_path, philips, philips_xml({"V1": values}))
    assert record.digital is not None
    assert record.digital.digital[0].tolist() == values


def test_the_calibration_pulse_is_left_out(tmp_path: Path) -> None:
    leads = signal()
    pulse = [0] * 25 + [200] * 50 + [0] * 25  # 1 mV at 5 uV, equal in all leads
    record, facts = read_text(tmp_path, philips, philips_xml({name: [*v, *pulse] for name, v in leads.items()}))
    assert record.n_samples == 60
    assert facts.comments[-1] == "the last 0.2 s are a calibration pulse and left out"
    flat_end = {name: [*v, *[0] * 100] for name, v in leads.items()}
    record, facts = read_text(tmp_path, philips, philips_xml(flat_end))
    assert record.n_samples == 160, "silence is no pulse"
    one_lead = {"V1": [*leads["V1"], *pulse]}
    assert read_text(tmp_path, philips, philips_xml(one_lead))[0].n_samples == 160, "one lead cannot say"
    assert reason_of(tmp_path, philips, philips_xml(dict.fromkeys(LEADS, pulse))) == "no_valid_sample"


@pytest.mark.parametrize(("kind", "version"), [("MortaraECG", "1.03"), ("SierraECG", "1.05"), ("SierraECG", "1.03x")])
def test_other_documents_of_the_same_element_are_turned_away(tmp_path: Path, kind: str, version: str) -> None:
    assert reason_of(tmp_path, philips, philips_xml(signal(), kind=kind, version=version)) == "unknown_format"


def test_compressed_leads_are_as_long_as_promised(tmp_path: Path) -> None:
    leads = signal()
    assert reason_of(tmp_path, philips, philips_xml(leads, milliseconds=122)) == "truncated"
    assert reason_of(tmp_path, philips, philips_xml(leads, milliseconds=118)) == "unreadable_signal"
    whole = b"".join(map(slow_xli, differences(leads).values()))
    assert reason_of(tmp_path, philips, philips_xml(leads, content=whole[:-40])) == "truncated"
    assert reason_of(tmp_path, philips, philips_xml(leads, content=b"")) == "truncated"


def test_codes_that_stand_for_gigabytes_are_never_written_out(tmp_path: Path) -> None:
    """256, 257, ... each stand for one byte more than the one before; repeated, the last makes 767 of 10 bits."""
    codes = [0, *range(256, 1023), *[1022] * 200_000]
    bits = "".join(f"{code:010b}" for code in codes)
    packed = bytes(int(bits[at : at + 8].ljust(8, "0"), 2) for at in range(0, len(bits), 8))
    content = struct.pack("<ihh", len(packed), 1, 0) + packed
    text = philips_xml({"V1": [0, 0, 0]}, content=content)
    assert reason_of(tmp_path, philips, text) == "unreadable_signal"


@pytest.mark.parametrize("codes", [[300], [0, 258], [0, 256, 900]])
def test_a_code_that_cannot_be_is_no_signal(tmp_path: Path, codes: list[int]) -> None:
    bits = "".join(f"{code:010b}" for code in codes)
    packed = bytes(int(bits[at : at + 8].ljust(8, "0"), 2) for at in range(0, len(bits), 8))
    content = struct.pack("<ihh", len(packed), 1, 0) + packed
    assert reason_of(tmp_path, philips, philips_xml({"V1": [0] * 9}, content=content)) == "unreadable_signal"


def test_a_delta_that_leads_out_of_16_bits_is_no_signal(tmp_path: Path) -> None:
    words = [0, 30000, *[64] * 6]
    packed = slow_lzw(bytes(word >> 8 for word in words) + bytes(word & 255 for word in words))
    content = struct.pack("<ihh", len(packed), 1, 0) + packed
    assert reason_of(tmp_path, philips, philips_xml({"V1": [0] * 8}, content=content)) == "unreadable_signal"


# ---- HL7


@pytest.mark.parametrize(
    ("increment", "rate_hz"),
    [('value="0.002" unit="s"', 500), ('value="1" unit="ms"', 1000), ('value="4000" unit="us"', 250)],
)
def test_the_increment_of_time_is_the_rate(tmp_path: Path, increment: str, rate_hz: float) -> None:
    assert read_text(tmp_path, hl7_aecg, aecg_xml(signal(), increment=increment))[0].sampling_rate_hz == rate_hz


def test_origin_and_scale_have_units_of_their_own(tmp_path: Path) -> None:
    text = aecg_xml({"II": [0, 4, -4]}, scale='value="0.25" unit="mV"', origin='value="-500" unit="uV"')
    record, _ = read_text(tmp_path, hl7_aecg, text)
    np.testing.assert_allclose(record.signal_mv, [[-0.5, 0.5, -1.5]])
    for wrong in ('value="1" unit="mm"', 'value="0" unit="uV"', 'value="x" unit="uV"', ""):
        assert reason_of(tmp_path, hl7_aecg, aecg_xml({"II": [1]}, scale=wrong)) in {
            "unknown_units",
            "unreadable_header",
        }


def test_the_rhythm_series_is_read_of_several(tmp_path: Path) -> None:
    beat_only = aecg_xml(signal(), codes=("REPRESENTATIVE_BEAT",))
    assert reason_of(tmp_path, hl7_aecg, beat_only) == "missing_signal"
    record, facts = read_text(tmp_path, hl7_aecg, aecg_xml(signal(), codes=("RHYTHM", "RHYTHM")))
    assert record.n_samples == 60
    assert facts.comments[-1] == "the first of 2 rhythm series"


def test_fractions_are_kept_as_millivolts(tmp_path: Path) -> None:
    text = aecg_xml({"II": [1, 2]}).replace(">\n1 2\n<", ">1.5 -.25e1<")
    record, _ = read_text(tmp_path, hl7_aecg, text)
    assert record.digital is None
    np.testing.assert_allclose(record.signal_mv, [[0.10375, 0.09375]])


def test_values_that_int16_does_not_hold_are_kept_as_millivolts(tmp_path: Path) -> None:
    for values, is_digital in (([32767, -32767], True), ([32768, 0], False), ([0, -32768], False)):
        record, _ = read_text(tmp_path, hl7_aecg, aecg_xml({"II": values}, origin='value="0" unit="uV"'))
        assert (record.digital is not None) == is_digital
        np.testing.assert_allclose(record.signal_mv[0], np.array(values) * 0.0025)


# ---- signals that do not add up


def test_counts_and_units_that_do_not_fit_are_turned_away(tmp_path: Path) -> None:
    leads, few = signal(), signal(STORED)
    million_millions = 10**12
    cases: list[tuple[Any, str, str]] = [
        (muse, muse_xml(few, count=61), "truncated"),
        (muse, muse_xml(few, count=59), "unreadable_signal"),
        (muse, muse_xml(few, count=million_millions), "too_large"),
        (muse, muse_xml(few, uv_per_bit="0"), "unreadable_header"),
        (muse, muse_xml(few, uv_per_bit="1e-320"), "unreadable_header"),
        (muse, muse_xml(few, rate=(500, 99)), "unreadable_header"),
        (muse, muse_xml({**few, "i": [1] * 60}), "duplicate_lead"),
        (muse, muse_xml({**few, "V6": [1] * 59}), "unreadable_signal"),
        (philips, philips_xml(leads, milliseconds=million_millions), "too_large"),
        (philips, philips_xml(leads, milliseconds=10_000_000), "too_large"),
        (philips, philips_xml(leads, labels="I II"), "unreadable_header"),
        (philips, philips_xml(leads, labels="I " * 12), "duplicate_lead"),
        (philips, philips_xml({"III": [1, 2, 3]}, coding="Plain"), "missing_signal")
        if False
        else (philips, philips_xml({"V1": [1, 2, 3]}, version="1.03"), "no_standard_lead"),
        (cardiosoft, cardiosoft_xml(leads, count=61), "truncated"),
        (cardiosoft, cardiosoft_xml(leads, count=million_millions), "too_large"),
        (cardiosoft, cardiosoft_xml(leads, resolution='<Resolution units="mm">5</Resolution>'), "unknown_units"),
        (cardiosoft, cardiosoft_xml(leads, resolution=""), "unknown_units"),
        (schiller, schiller_xml(leads, count=61), "truncated"),
        (schiller, schiller_xml(leads, exponent="3"), "unreadable_header"),
        (hl7_aecg, aecg_xml({**leads, "V6": [1]}), "unreadable_signal"),
        (hl7_aecg, aecg_xml(leads, increment='value="0" unit="s"'), "unreadable_header"),
        (hl7_aecg, aecg_xml(leads, increment='value="1" unit="fortnight"'), "unreadable_header"),
        (hl7_aecg, aecg_xml({}), "missing_signal"),
    ]
    for module, text, reason in cases:
        assert reason_of(tmp_path, module, text) == reason, (module.NAME, reason)


@pytest.mark.parametrize("text", ["1,,2", "1 2 x", "1-2", "nan", "1e9999999", "0x10", "1,2,,", "\u0661", "--1", "1_0"])
def test_text_that_is_not_numbers_throughout_is_no_signal(text: str) -> None:
    with pytest.raises(Rejected) as rejected:
        decimal_numbers(text, "lead I")
    assert rejected.value.reason == "unreadable_signal"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-40000, 40000), min_size=1), st.sampled_from([",", ", ", " ", "\n", ";", ",\r\n", "\t"]))
def test_numbers_are_read_whatever_separates_them(values: list[int], separator: str) -> None:
    assert decimal_numbers(f" {separator.join(map(str, values))}\n", "lead I").tolist() == values


# ---- the safe parse


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "iso-8859-1", "windows-1252"])
@every_format
def test_encodings(tmp_path: Path, name: str, encoding: str) -> None:
    kind = FORMATS[name]
    body = kind.write(signal(kind.leads)).partition("?>")[2] or kind.write(signal(kind.leads))
    label = encoding.removesuffix("-sig").removesuffix("-be")
    text = f'<?xml version="1.0" encoding="{label}"?>{body}'.replace("4711", "Grüße")
    content = text.encode(encoding)
    record, facts = read_text(tmp_path, kind.module, (b"\xfe\xff" if encoding == "utf-16-be" else b"") + content)
    assert facts.patient_id == "Grüße"
    assert record.n_samples == 60
    assert kind.module.matches(content[:65536])


def test_an_encoding_nobody_knows_is_turned_away(tmp_path: Path) -> None:
    for encoding in ("klingon", "utf-7", "base64", "idna", "utf-32", "shift_jis", "punycode", "rot13"):
        text = muse_xml(signal(STORED), prolog=f'<?xml version="1.0" encoding="{encoding}"?>')
        assert reason_of(tmp_path, muse, text) == "unreadable_header", encoding
    assert reason_of(tmp_path, muse, muse_xml(signal(STORED)).encode("utf-16").replace(b"\xff\xfe", b"")) == (
        "unreadable_header"
    )


ENTITIES = {
    "billion laughs": '<!ENTITY a0 "lol">' + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10)),
    "quadratic": f'<!ENTITY a9 "{"x" * 100_000}">',
    "external": '<!ENTITY a9 SYSTEM "file:///etc/hostname">',
    "network": '<!ENTITY a9 SYSTEM "http://127.0.0.1:9/x">',
    "parameter": '<!ENTITY % p SYSTEM "file:///etc/hostname"> %p;',
    "unparsed": '<!NOTATION n SYSTEM "n"><!ENTITY a9 SYSTEM "x" NDATA n>',
}


@pytest.mark.parametrize("entities", ENTITIES.values(), ids=ENTITIES)
@every_format
def test_documents_that_declare_entities_are_turned_away(tmp_path: Path, name: str, entities: str) -> None:
    kind = FORMATS[name]
    text = kind.write(signal(kind.leads))
    root = root_tag(text.encode())
    body = text[text.index(f"<{root}") :].replace("4711", "&a9;" * 1000)
    assert reason_of(tmp_path, kind.module, f"<!DOCTYPE {root} [{entities}]>{body}") == "unreadable_header"


def test_a_document_type_that_is_named_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "restecg.dtd").write_text('<!ENTITY secret "leaked"><!ATTLIST RestingECG leaked CDATA "leaked">')
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in {"open", "socket.connect", "socket.getaddrinfo", "urllib.Request"}:
            opened.append(str(arguments[0]))

    read_text(tmp_path, muse, muse_xml(signal(STORED)))  # imports what is imported late
    path = tmp_path / "file.xml"
    sys.addaudithook(watch)  # cannot be taken away again
    muse.read(path, "own/file")
    watching = False
    assert opened == [str(path)]
    assert "leaked" not in parse(path).attrib
    text = muse_xml(signal(STORED), patient="<PatientID>&secret;</PatientID>")
    assert reason_of(tmp_path, muse, text) == "unreadable_header"


def test_absurd_documents_are_refused(tmp_path: Path) -> None:
    kind = FORMATS["muse"]
    text = kind.write(signal(kind.leads))
    root = root_tag(text.encode())
    deep = f"<{root}>" + "<a>" * MAX_DEPTH
    assert reason_of(tmp_path, kind.module, deep) == "too_large"
    assert reason_of(tmp_path, kind.module, "<a>" * 500_000) == "too_large"
    assert reason_of(tmp_path, kind.module, f"<{root}>" + "<a/>" * MAX_ELEMENTS) == "too_large"
    assert reason_of(tmp_path, kind.module, f'<{root} a="{"a" * 2 * MAX_TAG_BYTES}"/>') == "too_large"
    assert reason_of(tmp_path, kind.module, f"<!--{'-a' * MAX_TAG_BYTES}--><{root}/>") == "too_large"
    assert reason_of(tmp_path, kind.module, f"<{root}/>") != "too_large"
    path = tmp_path / "sparse.xml"
    path.write_bytes(text.encode())
    os.truncate(path, MAX_BYTES + 1)
    with pytest.raises(Rejected, match="too_large"):
        kind.module.read(path, "own/file")


@every_format
def test_what_cannot_be_opened_is_rejected(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "nowhere.xml", tmp_path / "pipe"):
        with pytest.raises(Rejected, match="unreadable_header"):
            FORMATS[name].module.read(path, "own/file")


@every_format
def test_a_file_of_another_format_is_rejected(tmp_path: Path, name: str) -> None:
    for other, kind in FORMATS.items():
        if other != name:
            text = kind.write(signal(kind.leads))
            assert reason_of(tmp_path, FORMATS[name].module, text) == "unknown_format"


def test_without_defusedxml_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("defusedxml", "defusedxml.common", "defusedxml.ElementTree"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"pip install 'ecgfm\[xml\]'"):
        read_text(tmp_path, muse, muse_xml(signal(STORED)))


# ---- fuzz: prepared or rejected, and nothing else


def prepared_or_rejected(path: Path, module: Any) -> bool:
    """Read the file; whether there was a record. What is wrong in any other way raises."""
    try:
        record, facts = module.read(path, "own/file")
    except Rejected:
        return False
    assert record.n_samples > 0
    assert record.signal_mv.shape == (len(record.leads), record.n_samples)
    assert len(set(record.leads)) == len(record.leads)
    assert np.isfinite(record.signal_mv[~np.isnan(record.signal_mv)]).all()
    assert 0 < record.sampling_rate_hz < 1e6
    assert facts.age_years is None or facts.age_years >= 0
    return True


TOKENS = [
    *(b"", b"-1", b"0", b"1e400", b"nan", b"99999999999999999999", b"1e-320", b"<", b">", b"&#0;", b"&x;", b"]]>"),
    *(b"\x00", b"\xff", b"\xff\xfe", b"<a>", b"</a>", b"<![CDATA[", b"16", b"1.5", b"-32768", b"A", b"=", b"\xc3"),
]


@every_format
def test_damaged_files_are_prepared_or_rejected(tmp_path: Path, name: str) -> None:
    kind = FORMATS[name]
    whole = kind.write(signal(kind.leads[:6], n_samples=12)).encode("latin-1")
    path = tmp_path / "fuzzed.xml"
    outcomes = []

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(
        st.lists(
            st.tuples(st.integers(0, len(whole)), st.integers(0, 40), st.sampled_from(TOKENS) | st.binary(max_size=3)),
            max_size=4,
        ),
        st.integers(0, len(whole)) | st.just(len(whole)),
    )
    def check(edits: list[tuple[int, int, bytes]], end: int) -> None:
        content = whole
        for at, length, token in edits:
            content = content[:at] + token + content[at + length :]
        path.write_bytes(content[: end if len(edits) % 2 else len(content)])
        outcomes.append(prepared_or_rejected(path, kind.module))

    check()
    assert set(outcomes) == {True, False}, "some are read, some are not"


@every_format
def test_absurd_values_are_prepared_or_rejected(tmp_path: Path, name: str) -> None:
    """Of each kind of element one has its text and attributes replaced, in a document that stays well-formed."""
    kind = FORMATS[name]
    text = kind.write(signal(kind.leads[:6], n_samples=12))
    path = tmp_path / "absurd.xml"
    (tmp_path / "whole.xml").write_bytes(text.encode("latin-1"))
    root = parse(tmp_path / "whole.xml")
    outcomes = []
    values = ["", "-1", "0", "1e300", "1e-323", "1e400", "9" * 5000, "1" * 15, "AAAA", "x" * 300]
    places = {(parent.tag, child.tag): child for parent in root.iter() for child in parent}
    for element in places.values():
        kept_text, kept = element.text, dict(element.attrib)
        for value in values:
            if not len(element):
                element.text = value
                path.write_bytes(tostring(root))
                outcomes.append(prepared_or_rejected(path, kind.module))
                element.text = kept_text
            for attribute, kept_value in kept.items():
                element.set(attribute, value)
                path.write_bytes(tostring(root))
                outcomes.append(prepared_or_rejected(path, kind.module))
                element.set(attribute, kept_value)
    assert outcomes.count(True) > 20
    assert outcomes.count(False) > 20


# ---- the vendors' own files

REAL: dict[str, tuple[ModuleType, int, float, int]] = {
    "BIVectors/example1.xml": (muse, 12, 500, 5000),
    "BIVectors/example2.xml": (muse, 12, 500, 5000),
    "CardioVascular-Research-Group/MUSE_20080710_165457_96000.xml": (muse, 12, 250, 2500),
    "CardioVascular-Research-Group/TemplateExample1.xml": (hl7_aecg, 3, 1000, 10000),
    "CardioVascular-Research-Group/ecg_900657176_1.xml": (philips, 15, 500, 5300),
    "CardioVascular-Research-Group/schiller.xml": (schiller, 12, 500, 4998),
    "FDA/minimum_aecg.xml": (hl7_aecg, 1, 500, 13),
    "FDA/minimum_aecg_effectiveTime_high.xml": (hl7_aecg, 1, 500, 13),
    "FDA/minimum_aecg_effectiveTime_interval.xml": (hl7_aecg, 1, 500, 13),
    "FDA/minimum_aecg_effectiveTime_low.xml": (hl7_aecg, 1, 500, 13),
    "FDA/minimum_aecg_nouuid.xml": (hl7_aecg, 1, 500, 13),
    "FDA/subject1_0.xml": (hl7_aecg, 12, 500, 5000),
    "HeartWise-AI/dummy_ecg.xml": (cardiosoft, 12, 500, 5000),
    "marianux/ecg_hl7.xml": (hl7_aecg, 12, 500, 5000),
    "pypi/example-XML1.xml": (cardiosoft, 12, 500, 5000),
    "sixlettervariables/129DYPRG.XML": (philips, 12, 500, 5264),
    "sixlettervariables/2020-5-18_15-48-11.xml": (philips, 12, 500, 5300),
    "sixlettervariables/3191723_ZZDEMOPTONLY_1-04_orig.xml": (philips, 12, 500, 5300),
}
TURNED_AWAY: dict[str, tuple[ModuleType, str]] = {
    "FDA/empty.xml": (hl7_aecg, "missing_signal"),
    "sixlettervariables/invalid-doc-type.xml": (philips, "unknown_format"),
    "sixlettervariables/invalid-doc-version.xml": (philips, "unknown_format"),
}
TWELVE = [name for name, (_, n_leads, _, _) in REAL.items() if n_leads >= 12]

UNITS_OFF = {"HeartWise-AI/dummy_ecg.xml": 4.0, "sixlettervariables/129DYPRG.XML": 2.0}
"""ADC units by which I + III differs from II: leads made anonymous one by one, and leads filtered one by one."""


def real(shared: Path, name: str) -> EcgRecord:
    record, _ = REAL[name][0].read(shared / "data/vendor" / name, name)  # type: ignore[attr-defined]
    assert isinstance(record, EcgRecord)
    return record


def test_every_xml_file_of_the_vendors_is_known(shared: Path) -> None:
    folder = shared / "data/vendor"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() == ".xml"}
    assert found == set(REAL) | set(TURNED_AWAY)


@pytest.mark.parametrize("name", REAL)
def test_files_of_the_vendors_are_read(shared: Path, name: str) -> None:
    module, n_leads, rate_hz, n_samples = REAL[name]
    head = (shared / "data/vendor" / name).read_bytes()[:65536]
    assert [kind.module for kind in FORMATS.values() if kind.module.matches(head)] == [module]
    record = real(shared, name)
    assert (len(record.leads), record.sampling_rate_hz, record.n_samples) == (n_leads, rate_hz, n_samples)
    assert record.digital is not None


@pytest.mark.parametrize("name", TURNED_AWAY)
def test_files_that_are_invalid_on_purpose_are_turned_away(shared: Path, name: str) -> None:
    module, reason = TURNED_AWAY[name]
    with pytest.raises(Rejected, match=f"^{reason}: "):
        module.read(shared / "data/vendor" / name, name)


@pytest.mark.parametrize("name", TWELVE)
def test_einthoven_and_goldberger_hold_in_the_vendors_files(shared: Path, name: str) -> None:
    """To half an ADC unit of rounding; Philips' halves rounded down instead of towards zero would make it 1.5."""
    record = real(shared, name)
    assert record.digital is not None
    unit_mv = 1 / record.digital.adc_gain_per_mv[record.leads.index("I")]
    lead = dict(zip(record.leads, record.signal_mv / unit_mv, strict=True))
    off, tiny = UNITS_OFF.get(name, 0.0), 1e-9
    assert np.abs(lead["I"] + lead["III"] - lead["II"]).max() <= off + tiny
    assert np.abs(lead["aVR"] + (lead["I"] + lead["II"]) / 2).max() <= 0.5 + off + tiny
    assert np.abs(lead["aVL"] - (lead["I"] - lead["III"]) / 2).max() <= 0.5 + off + tiny
    assert np.abs(lead["aVF"] - (lead["II"] + lead["III"]) / 2).max() <= 0.5 + off + tiny
    assert np.abs(lead["aVR"] + lead["aVL"] + lead["aVF"]).max() <= 1 + off + tiny
    assert 0.3 < np.ptp(lead["II"]) * unit_mv < 6, "millivolts of a heart"


@pytest.mark.parametrize("name", [name for name in TWELVE if REAL[name][0] is philips])
def test_complexes_are_as_high_as_the_machine_measured(shared: Path, name: str) -> None:
    """Its own measurement of each lead, of the mean beat: what it read is what is read here, lead by lead."""
    record = real(shared, name)
    root = parse(shared / "data/vendor" / name)
    measured = {lead.get("leadname", ""): int(text_at(lead, "qrsppk")) for lead in root.iter("leadmeasurement")}
    assert len(measured) == 12
    heights_uv = {lead: np.ptp(record.signal_mv[record.leads.index(lead)]) * 1000 for lead in measured}
    ratios = np.array([heights_uv[lead] / measured[lead] for lead in measured])
    assert ratios.min() > 0.98
    assert ratios.max() < 2.1
    assert np.median(ratios) < 1.3


def test_derived_leads_agree_with_those_printed_by_ge(shared: Path, tmp_path: Path) -> None:
    """A text of twelve leads in whole microvolts ships beside the files. It is of none of them, but its I and II were
    ADC units of 4.88 uV, and its other limb leads are those GE derives."""
    lines = (shared / "data/vendor/CardioVascular-Research-Group/J123456_10sec.txt").read_text().splitlines()
    rows = [line.split() for line in lines if len(line.split()) == 12]
    printed_uv = dict(zip(LEADS, np.array(rows, dtype=int).T, strict=True))
    assert len(rows) == 5000
    leads = {lead: np.rint(printed_uv[lead] / 4.88).astype(int).tolist() for lead in STORED}
    record, facts = read_text(tmp_path, muse, muse_xml(leads))
    for lead in facts.derived_leads:
        read_uv = record.signal_mv[record.leads.index(lead)] * 1000
        assert np.abs(read_uv - printed_uv[lead]).max() < 6, lead
