"""SCP-ECG: EN 1064 / ISO 11073-91064, versions 1.x and 2.x. Sections with checksums, signals as Huffman codes.

Read here: samples as they are, or as first or second differences; not compressed, or by the default or own Huffman
tables, with switches between them; with or without a reference beat (section 5) taken off at every QRS (section 4).
Not read, because what a file means by it cannot be told from the file: rhythm thinned outside the QRS ("bimodal",
the filter is not given), a reference beat at another rate than the rhythm, codes that add bits to a base value.
"""

from __future__ import annotations

import binascii
import struct
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np

from ecgfm.ecg import INVALID, MAX_SAMPLES, Digital, EcgRecord, FileFacts, Rejected
from ecgfm.formats.lead_names import lead_of_code
from ecgfm.formats.raw_files import rejected

NAME = "SCP-ECG"

MAX_BYTES = 32 * 2**20
"""Of a file that is read. A lead's data are at most 64 KiB (their length has 16 bits), so a rhythm at most 16 MiB."""

MAX_CODED_BYTES, MAX_CODED_SAMPLES = 2 * 2**20, 4_000_000
"""Of Huffman codes, all leads together: what is decoded in 3 s. Twelve leads of the longest data are 768 KiB."""

MAX_CODES, MAX_SECTIONS = 4096, 1024
"""Of all Huffman tables of a file; of a file."""

_HEADER = struct.Struct("<HHIBB6s")  # of a section: checksum, number, length, section version, protocol version, -
_POINTER = struct.Struct("<HII")  # number, length, place counted from 1
_CODE = struct.Struct("<BBBhI")  # bits of the prefix, bits in all, 0: switches tables, value, prefix (first bit lowest)
_LEAD = struct.Struct("<IIB")  # first and last sample counted from 1, lead
_QRS = struct.Struct("<HIII")  # type of beat, first sample subtracted, fiducial point, last sample
_DEFAULT_TABLE = 19999
_RHYTHM, _REFERENCE_BEAT = 6, 5
_AGE_YEARS = {1: 1.0, 2: 1 / 12, 3: 7 / 365.25, 4: 1 / 365.25, 5: 1 / 8766}


@dataclass(frozen=True, slots=True)
class Code:
    """What a prefix stands for: a value, that many more bits that hold the value, or a change to another table."""

    value: int
    more_bits: int = 0
    next_table: int | None = None


Table = dict[str, Code]
"""By prefix, as a text of 0 and 1 in the order of the stream."""


@dataclass(frozen=True, slots=True)
class Leads:
    """Section 3. first, last: (lead,) int64, the samples of each lead, counted from 1 in the time that all share."""

    names: tuple[str, ...]
    first: np.ndarray
    last: np.ndarray
    reference_beat_subtracted: bool


def matches(head: bytes) -> bool:
    """Whether a file begins with a section 0 that points at itself.

    Some devices write neither the mark of section 0 nor correct places: such a file is known for what it wants to be.
    """
    if len(head) < 32:
        return False
    _, number, length, _, _, mark = _HEADER.unpack_from(head, 6)
    first, first_length, place = _POINTER.unpack_from(head, 22)
    points_at_itself = first == 0 and first_length == length and length >= 26 and place < 8
    marked = mark == b"SCPECG" or length <= 16 + 10 * 64
    return bool(number == 0 and points_at_itself and marked)


def read(path: Path, record_id: str) -> tuple[EcgRecord, FileFacts]:
    """The rhythm of an SCP-ECG file; samples as stored, unless two units are mixed in them.

    Leads that were not recorded at the same time are invalid outside theirs.

    Raises:
        Rejected: `too_large`, `truncated`, `unreadable_header` or `unreadable_signal`.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise Rejected("too_large", f"{path.name}: expected at most {MAX_BYTES} bytes, found {size}")
        sections = _sections(path.read_bytes())
        return _record(sections, record_id)
    except OSError as error:
        raise rejected(error, "unreadable_signal", path.name) from error
    except struct.error as error:
        raise Rejected("unreadable_header", f"SCP-ECG: a section ends before its content: {error}") from error


def _sections(content: bytes) -> dict[int, bytes]:
    """The content of every section that is there, behind its header. Checks lengths and checksums."""
    if len(content) < 22:
        raise Rejected("truncated", f"SCP-ECG: expected at least 22 bytes, found {len(content)}")
    if len(content) >= 32 and _POINTER.unpack_from(content, 22)[2] != 7:
        place = _POINTER.unpack_from(content, 22)[2]
        raise Rejected("unreadable_header", f"SCP-ECG: section 0 says it is at byte {place}, expected 7: not EN 1064")
    checksum, size = struct.unpack_from("<HI", content)
    if not 22 <= size <= len(content):
        raise Rejected("truncated", f"SCP-ECG: expected {size} bytes as its first field says, found {len(content)}")
    _check(checksum, content[2:size], "the file")
    _, number, length, *_ = _HEADER.unpack_from(content, 6)
    if number != 0 or not 26 <= length <= min(size - 6, _HEADER.size + MAX_SECTIONS * _POINTER.size):
        raise Rejected("unreadable_header", "SCP-ECG: expected section 0 first, found none")
    sections: dict[int, bytes] = {}
    total = 6
    for at in range(22, 6 + length - _POINTER.size + 1, _POINTER.size):
        number, section_length, place = _POINTER.unpack_from(content, at)
        if section_length == 0:
            continue
        start, total = place - 1, total + section_length
        if start < 6 or section_length < _HEADER.size or start + section_length > size or total > size:
            raise Rejected(
                "truncated", f"SCP-ECG: section {number}: {section_length} bytes at {place} are not in the file"
            )
        checksum, found, header_length, *_ = _HEADER.unpack_from(content, start)
        if (found, header_length) != (number, section_length):
            raise Rejected(
                "unreadable_header",
                f"SCP-ECG: expected section {number} of {section_length} bytes at {place}, found {found} of "
                f"{header_length}",
            )
        _check(checksum, content[start + 2 : start + section_length], f"section {number}")
        sections[number] = content[start + _HEADER.size : start + section_length]
    return sections


def _check(expected: int, content: bytes, what: str) -> None:
    """The checksum is that of CCITT, from all ones on."""
    found = binascii.crc_hqx(content, 0xFFFF)
    if found != expected:
        raise Rejected("unreadable_signal", f"SCP-ECG: {what}: expected checksum {expected}, found {found}: damaged")


def _record(sections: dict[int, bytes], record_id: str) -> tuple[EcgRecord, FileFacts]:
    for number, what in ((3, "leads"), (_RHYTHM, "rhythm")):
        if number not in sections:
            there = ", ".join(map(str, sorted(sections)))
            raise Rejected("unreadable_signal", f"SCP-ECG: expected section {number} ({what}), found {there}")
    tables = _tables(sections[2]) if 2 in sections else None
    leads = _from_one(_leads(sections[3]), sections[_RHYTHM], tables)
    n_samples = leads.last - leads.first + 1
    step_nv, interval_us, thinned, rhythm = _samples(sections[_RHYTHM], n_samples, tables)
    if thinned:
        raise Rejected("unreadable_signal", "SCP-ECG: the rhythm is thinned outside the QRS (bimodal): not read")

    start, end = int(leads.first.min()), int(leads.last.max())
    together = (len(rhythm), end - start + 1)
    if together[0] * together[1] > MAX_SAMPLES:
        raise Rejected("too_large", f"expected at most {MAX_SAMPLES} samples, found {together[0]} x {together[1]}")
    stored = np.zeros(together, dtype=np.int64)
    invalid = np.ones(together, dtype=bool)
    for row, samples in enumerate(rhythm):
        at = int(leads.first[row]) - start
        stored[row, at : at + len(samples)] = samples
        invalid[row, at : at + len(samples)] = False

    per_mv = 1e6 / step_nv
    added_mv = (
        _subtracted_mv(sections, leads, tables, interval_us, together[1]) if leads.reference_beat_subtracted else None
    )
    signal: Digital | np.ndarray
    if added_mv is None and (stored[~invalid] > INVALID).all():
        digital = np.where(invalid, INVALID, stored).astype(np.int16)
        signal = Digital(digital, np.full(len(rhythm), per_mv), np.zeros(len(rhythm)))
    else:
        signal = np.where(invalid, np.nan, stored / per_mv + (0.0 if added_mv is None else added_mv))
    record = EcgRecord(record_id, leads.names, 1e6 / interval_us, signal)
    return record, _facts(sections, "nV")


def _leads(section: bytes) -> Leads:
    n_leads, flags = struct.unpack_from("<BB", section)
    rows = [_LEAD.unpack_from(section, 2 + number * _LEAD.size) for number in range(n_leads)]
    if not rows:
        raise Rejected("unreadable_header", "SCP-ECG: expected at least one lead, found none")
    for first, last, _ in rows:
        if first > last or last < 1:
            raise Rejected("unreadable_header", f"SCP-ECG: expected samples from 1 on, found {first} to {last}")
    first, last, codes = zip(*rows, strict=True)
    return Leads(tuple(map(lead_of_code, codes)), np.array(first, np.int64), np.array(last, np.int64), bool(flags & 1))


def _from_one(leads: Leads, rhythm: bytes, tables: list[Table] | None) -> Leads:
    """The leads as the standard counts. Some devices count from 0 and name the sample after the last one; where
    samples are stored as they are, the length of their data tells."""
    from_zero = leads.first == 0
    if not from_zero.any():
        return leads
    lengths = np.array(struct.unpack_from(f"<{len(from_zero)}H", rhythm, 6))
    if tables is not None or (lengths != 2 * leads.last)[from_zero].any():
        raise Rejected("unreadable_header", "SCP-ECG: expected samples counted from 1, found one counted 0")
    return replace(leads, first=np.maximum(leads.first, 1))


def _default_table() -> Table:
    """C.5 of the standard: 0 for 0, n ones, 0 and a sign for up to 8, and two ways out to 8 and to 16 bits."""
    table = {"0": Code(0)}
    for value in range(1, 9):
        table |= {"1" * value + "00": Code(value), "1" * value + "01": Code(-value)}
    return table | {"1111111110": Code(0, 8), "1111111111": Code(0, 16)}


def _tables(section: bytes) -> list[Table]:
    """Section 2: the default table, or the file's own."""
    (n_tables,) = struct.unpack_from("<H", section)
    if n_tables == _DEFAULT_TABLE:
        return [_default_table()]
    tables: list[Table] = []
    at = 2
    for _ in range(n_tables):
        (n_codes,) = struct.unpack_from("<H", section, at)
        if n_codes + sum(map(len, tables)) > MAX_CODES or len(tables) > MAX_CODES:
            raise Rejected("too_large", f"SCP-ECG: expected at most {MAX_CODES} Huffman codes, found more")
        table: Table = {}
        for number in range(n_codes):
            prefix_bits, bits, is_value, value, prefix = _CODE.unpack_from(section, at + 2 + number * _CODE.size)
            if not 1 <= prefix_bits <= min(bits, 32) or bits - prefix_bits > 16:
                raise Rejected("unreadable_signal", f"SCP-ECG: a code of {prefix_bits} bits in {bits} is none")
            if is_value and value and bits > prefix_bits:
                raise Rejected("unreadable_signal", "SCP-ECG: a Huffman code with both a value and more bits: not read")
            text = f"{prefix:032b}"[::-1][:prefix_bits]
            table[text] = Code(value, bits - prefix_bits) if is_value else Code(0, 0, value - 1)
        tables.append(table)
        at += 2 + n_codes * _CODE.size
    if not tables:
        raise Rejected("unreadable_signal", "SCP-ECG: expected a Huffman table, found none")
    return tables


def _samples(
    section: bytes, n_samples: np.ndarray, tables: list[Table] | None
) -> tuple[int, int, bool, list[np.ndarray]]:
    """Section 5 or 6: nanovolt a step, microseconds a sample, thinned or not, and each lead's samples, int64."""
    step_nv, interval_us, differences, thinned = struct.unpack_from("<HHBB", section)
    if not step_nv or not interval_us or differences > 2:
        raise Rejected(
            "unreadable_header",
            f"SCP-ECG: {step_nv} nV a step, {interval_us} us a sample, {differences} differences: not a signal's",
        )
    lengths = struct.unpack_from(f"<{len(n_samples)}H", section, 6)
    per_byte = 0.5 if tables is None else 8
    if sum(lengths) > len(section) - 6 - 2 * len(lengths) or (n_samples > np.array(lengths) * per_byte).any():
        raise Rejected(
            "truncated",
            f"SCP-ECG: expected {int(n_samples.max())} samples a lead, found {sum(lengths)} bytes for "
            f"{len(lengths)} leads in {len(section)}",
        )
    if tables is not None and sum(lengths) > MAX_CODED_BYTES:
        raise Rejected("too_large", f"expected at most {MAX_CODED_BYTES} bytes of codes, found {sum(lengths)}")
    most = MAX_SAMPLES if tables is None else MAX_CODED_SAMPLES
    if n_samples.sum() > most:
        raise Rejected("too_large", f"expected at most {most} samples, found {n_samples.sum()}")
    leads, at = [], 6 + 2 * len(lengths)
    for count, length in zip(n_samples.tolist(), lengths, strict=True):
        content = section[at : at + length]
        values = np.frombuffer(content, "<i2", count) if tables is None else _decode(content, count, tables)
        leads.append(_integrate(values.astype(np.int64), differences))
        at += length
    return step_nv, interval_us, bool(thinned), leads


def _decode(content: bytes, count: int, tables: list[Table]) -> np.ndarray:
    """`count` values from a stream of Huffman codes, highest bit of each byte first."""
    bits = f"{int.from_bytes(content, 'big'):0{8 * len(content)}b}" if content else ""
    lengths = [sorted({len(prefix) for prefix in table}) for table in tables]
    values: list[int] = []
    table, lengths_now, at = tables[0], lengths[0], 0
    while len(values) < count:
        for length in lengths_now:
            code = table.get(bits[at : at + length])
            if code is not None:
                break
        else:
            what = "the data end" if at + max(lengths_now, default=0) > len(bits) else "no code of the table"
            raise Rejected("unreadable_signal", f"SCP-ECG: {what} at bit {at}, after {len(values)} of {count} samples")
        at += length
        if code.more_bits:
            if at + code.more_bits > len(bits):
                raise Rejected("truncated", f"SCP-ECG: expected {count} samples, found {len(values)}")
            value = int(bits[at : at + code.more_bits], 2)
            values.append(value - ((value >> (code.more_bits - 1)) << code.more_bits))
            at += code.more_bits
        elif code.next_table is None:
            values.append(code.value)
        elif 0 <= code.next_table < len(tables):
            table, lengths_now = tables[code.next_table], lengths[code.next_table]
        else:
            raise Rejected("unreadable_signal", f"SCP-ECG: a switch to Huffman table {code.next_table + 1}: not there")
    return np.array(values, dtype=np.int64)


def _integrate(values: np.ndarray, differences: int) -> np.ndarray:
    """Samples from their first or second differences; the first one or two are samples themselves.

    Samples have 16 bits, and differences of theirs are had modulo 2^16: an encoder of 16 bits can do no other.
    """
    samples = values.copy()
    if differences == 2:
        samples[1:2] -= samples[:1]  # the first step
        samples[1:] = np.cumsum(samples[1:])
    if differences:
        samples = np.cumsum(samples)
    return samples.astype(np.int16).astype(np.int64)


def _subtracted_mv(
    sections: dict[int, bytes], leads: Leads, tables: list[Table] | None, interval_us: int, n_samples: int
) -> np.ndarray:
    """(lead, time) float64, millivolt: what was taken off the rhythm, the reference beat at every QRS of its type.

    Sample `i` of the rhythm lost sample `i - fiducial point of the QRS + fiducial point of the beat`.
    """
    if 4 not in sections or _REFERENCE_BEAT not in sections:
        raise Rejected(
            "unreadable_signal", "SCP-ECG: a reference beat was subtracted, but sections 4 and 5 are missing"
        )
    beat_ms, beat_fiducial, n_qrs = struct.unpack_from("<HHH", sections[4])
    _, beat_interval_us = struct.unpack_from("<HH", sections[_REFERENCE_BEAT])
    if beat_interval_us != interval_us:
        raise Rejected(
            "unreadable_signal",
            f"SCP-ECG: a reference beat at {beat_interval_us} us a sample, a rhythm at {interval_us}: not read",
        )
    count = round(beat_ms * 1000 / interval_us)
    step_nv, _, _, beats = _samples(sections[_REFERENCE_BEAT], np.full(len(leads.names), count), tables)
    beat = np.stack(beats)
    start, done = int(leads.first.min()), 0
    subtracted_mv = np.zeros((len(beats), n_samples))
    for number in range(n_qrs):
        kind, first, fiducial, last = _QRS.unpack_from(sections[4], 6 + number * _QRS.size)
        if kind != 0:
            continue
        if first <= done:
            raise Rejected(
                "unreadable_signal", f"SCP-ECG: QRS {number + 1} from sample {first}, the one before to {done}"
            )
        done = last
        shift = fiducial - beat_fiducial  # sample 1 of the beat is sample 1 + shift of the rhythm
        first, last = max(first, 1 + shift, start), min(last, count + shift, start + n_samples - 1)
        if first <= last:
            subtracted_mv[:, first - start : last - start + 1] = beat[:, first - shift - 1 : last - shift] * step_nv
    return subtracted_mv / 1e6


def _facts(sections: dict[int, bytes], units: str) -> FileFacts:
    tags = _tags(sections.get(1, b""))
    day, clock = tags.get(25, b""), tags.get(26, b"\0\0\0")
    recorded_at = _day(day + clock[:3]) if len(clock) >= 3 else _day(day)
    sex: dict[int, Literal["female", "male"]] = {1: "male", 2: "female"}
    comments = []
    device = tags.get(14, b"")
    if len(device) > 36:
        made_by = device[36:].split(b"\0")[4:5]
        words = " ".join(filter(None, (_text(part) for part in (*made_by, device[8:14]))))
        comments.append(f"device {words}" if words else "")
    comments += [
        f"{what}: {_text(tags[tag])}" for tag, what in ((13, "referral"), (30, "remark")) if _text(tags.get(tag, b""))
    ]
    filters = [
        f"{what} {struct.unpack_from('<H', tags[tag])[0] * unit:g} Hz"
        for tag, what, unit in ((27, "high-pass", 0.01), (28, "low-pass", 1.0))
        if len(tags.get(tag, b"")) >= 2 and any(tags[tag][:2])
    ]
    comments.append(f"filters: {', '.join(filters)}" if filters else "")
    return FileFacts(
        format=NAME,
        units=units,
        patient_id=_text(tags.get(2, b"")) or None,
        age_years=_age_years(tags, recorded_at),
        sex=sex.get(tags.get(8, b"\0")[0]) if tags.get(8) else None,
        recorded_at=recorded_at,
        statements=tuple(_statements(sections.get(8, b""))),
        comments=tuple(filter(None, comments)),
    )


def _tags(section: bytes) -> dict[int, bytes]:
    """Section 1: number -> content; the first of each, up to the end mark."""
    tags: dict[int, bytes] = {}
    at = 0
    while at + 3 <= len(section) and section[at] != 255:
        tag, length = struct.unpack_from("<BH", section, at)
        tags.setdefault(tag, section[at + 3 : at + 3 + length])
        at += 3 + length
    return tags


def _text(content: bytes) -> str:
    """The text before the first zero byte, without control characters."""
    text = content.partition(b"\0")[0].decode("latin-1")
    return "".join(character for character in text if character.isprintable()).strip()


def _day(content: bytes) -> datetime | None:
    """Year (2 bytes), month, day; then perhaps hours, minutes, seconds."""
    if len(content) < 4:
        return None
    try:
        return datetime(int.from_bytes(content[:2], "little"), content[2], content[3], *content[4:7])
    except ValueError:
        return None


def _age_years(tags: dict[int, bytes], recorded_at: datetime | None) -> float | None:
    if len(tags.get(4, b"")) >= 3:
        age, unit = struct.unpack_from("<HB", tags[4])
        if age and unit in _AGE_YEARS:
            return float(age * _AGE_YEARS[unit])
    born = _day(tags.get(5, b"")[:4])
    if born is None or recorded_at is None or born > recorded_at:
        return None
    had_birthday = (recorded_at.month, recorded_at.day) >= (born.month, born.day)
    return float(recorded_at.year - born.year - (not had_birthday))


def _statements(section: bytes) -> list[str]:
    """Section 8: the interpretation as texts, each behind its number and its length."""
    statements, at = [], 9
    for _ in range(section[8] if len(section) > 8 else 0):
        if at + 3 > len(section):
            break
        (length,) = struct.unpack_from("<H", section, at + 1)
        statements.append(_text(section[at + 3 : at + 3 + length]))
        at += 3 + length
    return [statement for statement in statements if statement]
