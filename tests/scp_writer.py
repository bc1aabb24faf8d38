"""A slow, obvious writer of SCP-ECG files, to judge the reader by: every bit is a character of a text."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

# (prefix, value) for a value of its own, (prefix, bits) for that many bits behind, (prefix, table) for a change
OwnTable = list[tuple[str, str, int]]

DEFAULT_TABLE: OwnTable = [
    ("0", "value", 0),
    *((f"{'1' * size}0{sign}", "value", -size if sign else size) for size in range(1, 9) for sign in (0, 1)),
    ("1111111110", "bits", 8),
    ("1111111111", "bits", 16),
]
"""EN 1064, C.5."""

LEAD_CODES = {
    **{"I": 1, "II": 2, "V1": 3, "V2": 4, "V3": 5, "V4": 6, "V5": 7, "V6": 8, "V7": 9},
    **{"III": 61, "aVR": 62, "aVL": 63, "aVF": 64},
}


@dataclass
class ScpFile:
    """What to write. rhythm: (lead, time) integers; first: of each lead, counted from 1."""

    rhythm: np.ndarray
    leads: Sequence[str]
    step_nv: int = 2500
    interval_us: int = 2000
    differences: int = 2
    tables: list[OwnTable] | str | None = "default"
    first: Sequence[int] | None = None
    thinned: int = 0
    beat: np.ndarray | None = None  # (lead, time), taken off at every QRS of type 0
    beat_step_nv: int = 2500
    beat_interval_us: int = 2000
    beat_fiducial: int = 1
    qrs: Sequence[tuple[int, int, int, int]] = ()
    tags: dict[int, bytes] = field(default_factory=dict)
    statements: Sequence[str] = ()

    def content(self) -> bytes:
        lengths = [lead.size for lead in self.rhythm]
        first = list(self.first or [1] * len(lengths))
        residual = self._residual(first)
        sections = {
            1: b"".join(struct.pack("<BH", tag, len(value)) + value for tag, value in self.tags.items())
            + struct.pack("<BH", 255, 0),
            3: struct.pack("<BB", len(lengths), (self.beat is not None) | 4 | len(lengths) << 3 & 0xFF)
            + b"".join(
                struct.pack("<IIB", start, start + size - 1, LEAD_CODES[lead])
                for start, size, lead in zip(first, lengths, self.leads, strict=True)
            ),
            6: self._signal(residual, self.step_nv, self.interval_us, self.thinned),
        }
        if self.tables is not None:
            sections[2] = section_2(self.tables)
        if self.beat is not None:
            beat_ms = round(self.beat.shape[1] * self.beat_interval_us / 1000)
            sections[4] = struct.pack("<HHH", beat_ms, self.beat_fiducial, len(self.qrs))
            sections[4] += b"".join(struct.pack("<HIII", *each) for each in self.qrs)
            sections[5] = self._signal(self.beat, self.beat_step_nv, self.beat_interval_us, 0)
        if self.statements:
            texts = [text.encode("latin-1") + b"\0" for text in self.statements]
            sections[8] = bytes(8) + bytes([len(texts)])
            sections[8] += b"".join(struct.pack("<BH", n, len(t)) + t for n, t in enumerate(texts, 1))
        return assemble(sections)

    def _residual(self, first: list[int]) -> np.ndarray:
        """The rhythm less the reference beat around each QRS, sample by sample; both in one unit here."""
        residual = [[int(sample) for sample in lead] for lead in self.rhythm]
        if self.beat is None:
            return np.array(residual)
        for kind, start, fiducial, end in self.qrs:
            for number in range(start, end + 1):  # counted from 1
                place = number - fiducial + self.beat_fiducial  # of the beat, counted from 1
                if kind == 0 and 1 <= place <= self.beat.shape[1]:
                    for row, lead in enumerate(residual):
                        if 0 <= number - first[row] < len(lead):
                            lead[number - first[row]] -= int(self.beat[row, place - 1])
        return np.array(residual)

    def _signal(self, samples: np.ndarray, step_nv: int, interval_us: int, thinned: int) -> bytes:
        coded = [
            b"".join(struct.pack("<h", _wrapped(value)) for value in differences_of(lead, self.differences))
            if self.tables is None
            else huffman(differences_of(lead, self.differences), self.tables)
            for lead in samples
        ]
        coded = [lead + bytes(len(lead) % 2) for lead in coded]
        head = struct.pack("<HHBB", step_nv, interval_us, self.differences, thinned)
        return head + b"".join(struct.pack("<H", len(lead)) for lead in coded) + b"".join(coded)


def assemble(sections: dict[int, bytes], fast_checksum: Callable[[bytes, int], int] | None = None) -> bytes:
    """The file: its own header, section 0 with the places of the others, the sections; each with its checksum.

    fast_checksum: for files of megabytes
    """
    padded = {number: content + bytes(len(content) % 2) for number, content in sorted(sections.items())}
    count = max(12, 1 + max(padded))
    places, at = {0: (16 + 10 * count, 7)}, 7 + 16 + 10 * count
    for number, content in padded.items():
        places[number] = (16 + len(content), at)
        at += 16 + len(content)
    pointers = b"".join(struct.pack("<HII", n, *places.get(n, (0, 0))) for n in range(count))

    def sealed(rest: bytes) -> bytes:
        return struct.pack("<H", fast_checksum(rest, 0xFFFF) if fast_checksum else checksum(rest)) + rest

    def section(number: int, content: bytes, mark: bytes) -> bytes:
        return sealed(struct.pack("<HIBB6s", number, 16 + len(content), 20, 20, mark) + content)

    body = section(0, pointers, b"SCPECG") + b"".join(section(n, c, bytes(6)) for n, c in padded.items())
    return sealed(struct.pack("<I", 6 + len(body)) + body)


def resealed(content: bytes) -> bytes:
    """The same file with the checksums that it should have, as far as its places can be followed."""
    changed = bytearray(content)
    if len(changed) < 22:
        return content
    for at in range(22, min(len(changed), 22 + 10 * 12) - 10, 10):
        _, length, place = struct.unpack_from("<HII", changed, at)
        if place > 7 and length >= 16 and place - 1 + length <= len(changed):
            struct.pack_into("<H", changed, place - 1, checksum(bytes(changed[place + 1 : place - 1 + length])))
    (size,) = struct.unpack_from("<I", changed, 2)
    struct.pack_into("<H", changed, 0, checksum(bytes(changed[2 : min(size, len(changed))])))
    return bytes(changed)


def checksum(content: bytes) -> int:
    """CCITT, x^16 + x^12 + x^5 + 1 from all ones on, bit by bit."""
    register = 0xFFFF
    for byte in content:
        for bit in range(7, -1, -1):
            out = (register >> 15) ^ (byte >> bit & 1)
            register = (register << 1 & 0xFFFF) ^ (0x1021 if out else 0)
    return register


def section_2(tables: list[OwnTable] | str) -> bytes:
    if isinstance(tables, str):
        return struct.pack("<H", 19999)
    out = struct.pack("<H", len(tables))
    for table in tables:
        out += struct.pack("<H", len(table))
        for prefix, kind, number in table:
            bits = len(prefix) + (number if kind == "bits" else 0)
            value = 0 if kind == "bits" else number
            out += struct.pack("<BBBhI", len(prefix), bits, kind != "table", value, int(prefix[::-1], 2))
    return out


def differences_of(samples: np.ndarray, order: int) -> list[int]:
    values = [int(sample) for sample in samples]
    if order == 0:
        return values
    if order == 1:
        return [value - values[i - 1] if i else value for i, value in enumerate(values)]
    return [value - 2 * values[i - 1] + values[i - 2] if i > 1 else value for i, value in enumerate(values)]


def huffman(values: list[int], tables: list[OwnTable] | str) -> bytes:
    """The codes of values, the shortest that this table has; where it has none, those after a change of table."""
    all_tables = [DEFAULT_TABLE] if isinstance(tables, str) else tables
    bits, now = "", 0
    for value in map(_wrapped, values):
        code = _code(value, all_tables[now])
        if code is None:
            for prefix, kind, number in all_tables[now]:
                if kind == "table" and _code(value, all_tables[number - 1]) is not None:
                    bits, now = bits + prefix, number - 1
                    break
            code = _code(value, all_tables[now])
        assert code is not None
        bits += code
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))


def _code(value: int, table: OwnTable) -> str | None:
    codes = [prefix for prefix, kind, number in table if kind == "value" and number == value]
    codes += [
        prefix + f"{value % 2**number:0{number}b}"
        for prefix, kind, number in table
        if kind == "bits" and -(2 ** (number - 1)) <= value < 2 ** (number - 1)
    ]
    return min(codes, key=len, default=None)


def _wrapped(value: int) -> int:
    return (value + 2**15) % 2**16 - 2**15
