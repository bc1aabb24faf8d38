"""Philips XML (`restingecgdata`): documents SierraECG and PhilipsECG 1.03 and 1.04, plain and XLI compressed.

Layout as published by C. A. Watford (Sierra ECG Tools, wiki: XLI compression):

- XLI, a chunk per lead: 4 bytes size, 2 bytes always 1, 2 bytes the first delta code (all little-endian,
  signed), then LZW with codes of 10 bits, most significant bit first. The decompressed bytes are the high bytes
  of all delta codes, then their low bytes. The first two codes are the first two samples; from then on a code
  says, less 64, how far the *next* sample falls short of the straight line through the two before it.
- Of III, aVR, aVL and aVF the difference is stored between what I and II make of them and what was measured:
  0 or an ADC unit of rounding. The halves in that are rounded towards zero; the sample files show it: with
  rounding down, aVF is up to 1.5 units off (II + III) / 2, with this 0.5.

The last half second may be a calibration pulse of 1 mV, equal in all leads. It is no ECG and is left out.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from ecgfm.ecg import LEADS, MAX_SAMPLES, EcgRecord, FileFacts, Rejected
from ecgfm.formats.lead_names import lead_of_label
from ecgfm.formats.xml_document import (
    age_years,
    base64_bytes,
    check_length,
    decimal_numbers,
    moment_of,
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

NAME = "Philips XML"

_DOCUMENT_TYPES = {"SierraECG", "PhilipsECG"}
_VERSION = re.compile(r"1\.0[34](?:\.\d{1,2})?", re.ASCII)
_TWELVE_LEADS = {"STD-12", "10-WIRE"}
"""Acquisition types whose channels are the twelve leads in order, where a document (1.03) names no leads."""

_CODE_BITS = 10
_END_CODE = 2**_CODE_BITS - 1
_CHUNK_HEADER = struct.Struct("<ihh")
_DELTA_ZERO = 64

_CALIBRATION_MV = 1.0


def matches(head: bytes) -> bool:
    """Whether the first bytes of a file are those of this format."""
    return root_tag(head) == "restingecgdata"


def read(path: Path, record_id: str) -> tuple[EcgRecord, FileFacts]:
    """The recording at `path`, without the calibration pulse at its end.

    Raises:
        Rejected: the file or its waveforms cannot be used; `unknown_format` where it is another document
            than those named above.
    """
    root = parse(path)
    if root.tag != "restingecgdata":
        raise Rejected("unknown_format", f"expected the element restingecgdata, found {shown(root.tag)}")
    kind, version = (text_at(root, f"documentinfo/document{of}") for of in ("type", "version"))
    if kind not in _DOCUMENT_TYPES or _VERSION.fullmatch(version) is None:
        raise Rejected(
            "unknown_format", f"expected SierraECG or PhilipsECG 1.03 or 1.04, found {shown(f'{kind} {version}')}"
        )
    waveforms, signal = root.find("waveforms/parsedwaveforms"), root.find("dataacquisition/signalcharacteristics")
    if waveforms is None or signal is None:
        raise Rejected(
            "missing_signal", "expected parsedwaveforms and signalcharacteristics, found one or none of them"
        )
    names = _lead_names(waveforms, signal)
    resolution = text_at(signal, "resolution") or text_at(signal, "signalresolution")
    uv_per_bit = positive_number(waveforms.get("resolution", resolution), "resolution")
    rate_hz = positive_number(waveforms.get("samplespersecond", text_at(signal, "samplingrate")), "samplingrate")
    _check_sample_layout(waveforms, signal)
    milliseconds = sample_count(waveforms.get("durationperchannel", ""), "durationperchannel")
    n_samples = round(milliseconds * rate_hz / 1000)
    if n_samples * len(names) > MAX_SAMPLES:
        raise Rejected("too_large", f"expected at most {MAX_SAMPLES} samples, found {n_samples} x {len(names)}")
    leads = _decode(waveforms, names, n_samples)
    n_ecg = _calibration_start(leads, uv_per_bit / 1000)
    if n_ecg == 0 < n_samples:
        raise Rejected("no_valid_sample", "expected an ECG, found nothing but the calibration pulse")
    left_out = f"the last {(n_samples - n_ecg) / rate_hz:g} s are a calibration pulse and left out"
    offset = number_or_none(text_at(signal, "signaloffset") or "0") or 0.0
    record = record_of(
        record_id,
        names,
        rate_hz,
        list(leads[:, :n_ecg]),
        [uv_per_bit / 1000] * len(names),
        [offset] * len(names),
    )
    return record, _facts(root, (left_out,) if n_ecg < n_samples else ())


def _lead_names(waveforms: Element, signal: Element) -> list[str]:
    labels = waveforms.get("leadlabels", "").split()
    if labels:
        promised = waveforms.get("numberofleads", str(len(labels)))
        if promised != str(len(labels)):
            raise Rejected("unreadable_header", f"expected {shown(promised)} lead labels, found {len(labels)}")
        return [lead_of_label(label) for label in labels]
    channels, kind = text_at(signal, "numberchannelsvalid"), text_at(signal, "acquisitiontype")
    if channels != str(len(LEADS)) or kind not in _TWELVE_LEADS:
        raise Rejected(
            "no_standard_lead",
            f"expected the leads' names or 12 channels {' or '.join(sorted(_TWELVE_LEADS))}, "
            f"found {shown(channels)} channels {shown(kind)}",
        )
    return list(LEADS)


def _check_sample_layout(waveforms: Element, signal: Element) -> None:
    bits = waveforms.get("bitspersample") or waveforms.get("nbitspersample") or text_at(signal, "bitspersample")
    signed = waveforms.get("signalsigned", text_at(signal, "signalsigned"))
    if bits != "16" or signed.casefold() != "true":
        raise Rejected(
            "unreadable_signal",
            f"expected signed samples of 16 bits, found {shown(bits)} bits, signed: {shown(signed)}",
        )


def _decode(waveforms: Element, names: list[str], n_samples: int) -> np.ndarray:
    """(lead, time) int64, ADC units."""
    method = waveforms.get("compressmethod", waveforms.get("compression", ""))
    if waveforms.get("compressflag", "True").casefold() == "false":
        method = ""
    encoding, text = waveforms.get("dataencoding", ""), waveforms.text or ""
    if method == "XLI" and encoding == "Base64":
        stored = np.stack(_decompress(base64_bytes(text, "parsedwaveforms"), names, n_samples))
        return _with_limb_leads(stored, names)
    if method not in {"", "Uncompressed", "None"} or encoding not in {"Base64", "Plain"}:
        raise Rejected("unreadable_signal", f"expected XLI or none, found {shown(method)} in {shown(encoding)}")
    if encoding == "Base64":
        content = base64_bytes(text, "parsedwaveforms")
        values = np.frombuffer(content[: len(content) // 2 * 2], dtype="<i2").astype(np.int64)
    else:
        numbers = decimal_numbers(text, "parsedwaveforms")
        if len(numbers) and (np.abs(numbers).max() > 2**15 or (numbers % 1).any()):
            raise Rejected("unreadable_signal", "expected whole numbers of 16 bits, found others")
        values = numbers.astype(np.int64)
    check_length(len(values), n_samples * len(names), "all leads")
    stored = values.reshape(len(names), n_samples)
    return _with_limb_leads(stored, names) if _holds_differences(stored, names) else stored


def _decompress(content: bytes, names: list[str], n_samples: int) -> list[np.ndarray]:
    """Per lead (time,) int64. Chunks beyond the leads are of channels that were not connected."""
    leads: list[np.ndarray] = []
    at = 0
    for name in names:
        if len(content) - at < _CHUNK_HEADER.size:
            raise Rejected("truncated", f"{name}: expected {len(names)} leads, found {len(leads)}")
        size, _, first_delta = _CHUNK_HEADER.unpack_from(content, at)
        at += _CHUNK_HEADER.size
        if not 0 <= size <= len(content) - at:
            raise Rejected("truncated", f"{name}: expected {size} bytes, found {len(content) - at}")
        bytes_ = np.frombuffer(_lzw(content[at : at + size], 2 * n_samples, name), dtype=np.uint8)
        at += size
        check_length(len(bytes_) // 2, n_samples, name)
        codes = (bytes_[:n_samples].astype(np.uint16) << 8 | bytes_[n_samples:]).astype(np.int16).astype(np.int64)
        leads.append(_undo_deltas(codes, first_delta, name))
    return leads


def _lzw(compressed: bytes, n_bytes: int, name: str) -> bytes:
    """The `n_bytes` that were compressed, or fewer where the codes end early. No more is ever made: a few
    kilobytes of codes can stand for gigabytes."""
    bits = np.unpackbits(np.frombuffer(compressed, dtype=np.uint8))
    bits_of_codes = bits[: len(bits) // _CODE_BITS * _CODE_BITS].reshape(-1, _CODE_BITS)
    strings = [bytes([byte]) for byte in range(256)]
    parts: list[bytes] = []
    made = 0
    previous = b""
    for code in (bits_of_codes @ (1 << np.arange(_CODE_BITS - 1, -1, -1))).tolist():
        if code == _END_CODE:
            break
        if code < len(strings):
            string = strings[code]
        elif code == len(strings) and previous:
            string = previous + previous[:1]
        else:
            raise Rejected("unreadable_signal", f"{name}: expected an LZW code up to {len(strings)}, found {code}")
        made += len(string)
        if made > n_bytes + 1:  # one byte makes the number even
            raise Rejected("unreadable_signal", f"{name}: expected {n_bytes} bytes decompressed, found more")
        parts.append(string)
        if previous and len(strings) < _END_CODE:
            strings.append(previous + string[:1])
        previous = string
    return b"".join(parts)[:n_bytes]


def _undo_deltas(codes: np.ndarray, first_delta: int, name: str) -> np.ndarray:
    """(time,) int64: `z[i] = 2 z[i-1] - z[i-2] - delta[i-1]`, with `first_delta` as the first delta.

    The second difference of the samples is minus the delta, so two running sums undo it.
    """
    if len(codes) < 3:
        return codes
    second = np.concatenate([[first_delta], codes[2:-1] - _DELTA_ZERO])
    slopes = codes[1] - codes[0] - np.cumsum(second)
    samples = np.concatenate([codes[:2], codes[1] + np.cumsum(slopes)])
    if samples.min() < -(2**15) or samples.max() >= 2**15:
        raise Rejected(
            "unreadable_signal", f"{name}: expected samples of 16 bits, found a delta that leads out of them"
        )
    return samples


def _halved(values: np.ndarray) -> np.ndarray:
    """Half of whole numbers, rounded towards zero."""
    halves: np.ndarray = np.sign(values) * (np.abs(values) // 2)
    return halves


def _with_limb_leads(stored: np.ndarray, names: list[str]) -> np.ndarray:
    """The leads, of those stored: (lead, time) int64. III before the others, which need it."""
    leads = dict(zip(names, stored, strict=True))
    if not {"III", "aVR", "aVL", "aVF"} & set(names):
        return stored
    if "I" not in leads or "II" not in leads:
        raise Rejected(
            "unreadable_signal", "expected leads I and II, which the other limb leads rest on; found not both"
        )
    lead_i, lead_ii = leads["I"], leads["II"]
    lead_iii = lead_ii - lead_i
    if "III" in leads:
        lead_iii = leads["III"] = lead_iii - leads["III"]
    if "aVR" in leads:
        leads["aVR"] = -_halved(lead_i + lead_ii) - leads["aVR"]
    if "aVL" in leads:
        leads["aVL"] = _halved(lead_i - lead_iii) - leads["aVL"]
    if "aVF" in leads:
        leads["aVF"] = _halved(lead_ii + lead_iii) - leads["aVF"]
    return np.stack([leads[name] for name in names])


def _holds_differences(stored: np.ndarray, names: list[str]) -> bool:
    """Whether the limb leads of uncompressed waveforms are stored as differences too. The published readers
    disagree and the file does not say, but the leads do: III is nearer to 0 then than to II - I."""
    leads = dict(zip(names, stored, strict=True))
    if not {"I", "II", "III"} <= set(leads):
        return False
    return bool(np.abs(leads["III"]).sum() < np.abs(leads["II"] - leads["I"] - leads["III"]).sum())


def _calibration_start(leads: np.ndarray, mv_per_bit: float) -> int:
    """Where the calibration pulse begins, or the number of samples: the end over which all leads are equal, which
    no heart does (aVR + aVL + aVF = 0), if it reaches 1 mV."""
    unequal = np.flatnonzero((leads != leads[0]).any(axis=0))
    start = int(unequal[-1]) + 1 if len(unequal) else 0
    end = leads[0, start:]
    is_pulse = len(leads) > 1 and len(end) and round(float(end.max()) * mv_per_bit, 6) == _CALIBRATION_MV
    return start if is_pulse else leads.shape[1]


def _facts(root: Element, notes: tuple[str, ...]) -> FileFacts:
    patient = "patient/generalpatientdata"
    acquisition = root.find("dataacquisition")
    assert acquisition is not None  # the waveforms were read from below it
    recorded_at = moment_of(f"{acquisition.get('date', '')} {acquisition.get('time', '')}", "%Y-%m-%d %H:%M:%S")
    age = age_years(text_at(root, f"{patient}/age/years"), "years")
    if age is None:
        age = years_between(moment_of(text_at(root, f"{patient}/age/dateofbirth"), "%Y-%m-%d"), recorded_at)
    interpretation = root.find("interpretations/interpretation")
    statements = []
    if interpretation is not None:
        for statement in interpretation.findall("statement"):
            sides = (text_at(statement, f"{side}statement") for side in ("left", "right"))
            statements.append("; ".join(filter(None, sides)))
        statements.append(text_at(interpretation, "severity"))
    machine = text_at(acquisition, "machine")
    return FileFacts(
        format=f"{NAME} {text_at(root, 'documentinfo/documentversion')}",
        units="uV",
        patient_id=text_at(root, f"{patient}/patientid") or None,
        age_years=age,
        sex=sex_of(text_at(root, f"{patient}/sex")),
        recorded_at=recorded_at,
        statements=tuple(filter(None, statements)),
        comments=((f"device {machine}",) if machine else ()) + notes,
    )
