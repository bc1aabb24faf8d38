"""What the XML formats share: one safe parse, the numbers and facts in it, and the record made of them.

Nothing here opens another file or a network address: a document type declaration may be there (every GE MUSE
file names `restecg.dtd`) but is not followed, and a document that declares an entity is turned away
(defusedxml). Sizes are bounded before anything is built: the worst that was found within these bounds, numbers from
end to end, takes 2 s and 150 MB.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import stat
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal
from xml.etree.ElementTree import Element, ParseError, TreeBuilder

import numpy as np

from ecgfm.ecg import INVALID, MAX_SAMPLES, Digital, EcgRecord, InputError, Rejected
from ecgfm.formats.lead_names import lead_of_label
from ecgfm.formats.raw_files import rejected

MAX_BYTES = 8 * 2**20
"""Of a file. A resting ECG of 10 s takes 0.05 to 0.5 MB as XML; 13 minutes of GE MUSE at 500 Hz fit."""

MAX_ELEMENTS = 200_000
"""Of a document; the richest of the vendors' sample files have some 4,000."""

MAX_DEPTH = 64
"""Elements inside one another; HL7 annotations go to about 20."""

MAX_TAG_BYTES = 2**18
"""Of one tag with its attributes, or one comment; the parser builds either as a whole before anyone is asked."""

MAX_SAMPLING_RATE_HZ = 100_000.0

_MV_PER_UNIT = {
    **{"v": 1e3, "volt": 1e3, "volts": 1e3},
    **{"mv": 1.0, "millivolt": 1.0, "millivolts": 1.0},
    **{"uv": 1e-3, "\u03bcv": 1e-3, "microvolt": 1e-3, "microvolts": 1e-3},
    **{"nv": 1e-6, "nanovolt": 1e-6, "nanovolts": 1e-6},
}
"""By units without regard to case; the micro sign (U+00B5) folds to the Greek letter (U+03BC)."""

_YEARS_PER_UNIT = {
    **dict.fromkeys(("years", "year", "yr", "y", "a"), 1.0),
    **dict.fromkeys(("months", "month", "mo"), 1 / 12),
    **dict.fromkeys(("weeks", "week", "wk"), 7 / 365.25),
    **dict.fromkeys(("days", "day", "d"), 1 / 365.25),
    **dict.fromkeys(("hours", "hour", "h"), 1 / 8766),
}
"""By units without regard to case, HL7's (UCUM) among them."""

_CHUNK_BYTES = 2**16


_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?"  # one way to read any digits: two are quadratic
# The repetitions are possessive: they keep no state per number or blank, and a mistake ends them at once.
_NUMBERS = re.compile(rf"\s*+{_NUMBER}(?:(?:\s*+[,;]\s*+|\s++){_NUMBER})*+\s*+(?:[,;]\s*+)?", re.ASCII)
_WHOLE = re.compile(r"\d{1,15}", re.ASCII)
_PROLOG = re.compile(r"\s+|<\?[^>]*>|<!DOCTYPE[^>\[]*(?:\[[^\]]*\]\s*)?>")
_ROOT = re.compile(r"<(?:[\w.-]+:)?([\w.-]+)[\s/>]")


class _BoundedBuilder(TreeBuilder):
    """Builds the tree without namespaces, and stops where it grows beyond all ECGs."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.depth = 0

    def start(self, tag: str, attrs: dict[str, str], /) -> Element:
        self.elements += 1
        self.depth += 1
        if self.elements > MAX_ELEMENTS:
            raise Rejected("too_large", f"expected at most {MAX_ELEMENTS} XML elements, found more")
        if self.depth > MAX_DEPTH:
            raise Rejected("too_large", f"expected XML at most {MAX_DEPTH} elements deep, found deeper")
        return super().start(_local(tag), {_local(name): value for name, value in attrs.items()})

    def end(self, tag: str, /) -> Element:
        self.depth -= 1
        return super().end(_local(tag))


def root_tag(head: bytes) -> str:
    """The name of a document's outermost element, without namespace, from the first bytes of a file.

    Empty where they are not XML in UTF-8, UTF-16 or an encoding that has ASCII in it.
    """
    if head[:2] == b"\xff\xfe" or head[1:2] == b"\0":
        text = head.decode("utf-16-le", "replace")
    elif head[:2] == b"\xfe\xff" or head[:1] == b"\0":
        text = head.decode("utf-16-be", "replace")
    else:
        text = head.removeprefix(b"\xef\xbb\xbf").decode("latin-1")
    at = len(text) - len(text.lstrip("\ufeff"))
    while True:
        if text.startswith("<!--", at):
            end = text.find("-->", at)
            if end < 0:
                return ""
            at = end + len("-->")
        elif skipped := _PROLOG.match(text, at):
            at = skipped.end()
        else:
            break
    root = _ROOT.match(text, at)
    return root[1] if root else ""


def parse(path: Path) -> Element:
    """The outermost element of the document at `path`; tags and attributes come without their namespaces.

    Encodings: UTF-8, UTF-16 and every encoding of one byte a character that Python knows.

    Raises:
        Rejected: `too_large`; `unreadable_header` where it is not well-formed, declares entities or is
            in an unknown encoding.
        InputError: defusedxml is not installed.
    """
    try:
        from defusedxml.common import DefusedXmlException
        from defusedxml.ElementTree import XMLParser
    except ModuleNotFoundError as error:
        raise InputError("reading XML needs defusedxml: pip install 'ecgfm[xml]'") from error
    content = _content(path)
    parser = XMLParser(target=_BoundedBuilder(), forbid_dtd=False, forbid_entities=True, forbid_external=True)
    try:
        for at in range(0, len(content), _CHUNK_BYTES):
            parser.feed(content[at : at + _CHUNK_BYTES])
            if at - parser.parser.CurrentByteIndex > MAX_TAG_BYTES:
                raise Rejected("too_large", f"expected tags of at most {MAX_TAG_BYTES} bytes, found more")
        root: Element = parser.close()
    except DefusedXmlException as error:
        raise Rejected(
            "unreadable_header", f"expected XML without entities, found {type(error).__name__}: {shown(str(error))}"
        ) from error
    except (ParseError, LookupError, ValueError) as error:  # the last two: an encoding unknown, or not of bytes
        raise Rejected("unreadable_header", f"expected well-formed XML, found {shown(str(error))}") from error
    return root


def text_at(element: Element, path: str) -> str:
    """The text of the first element at `path` below `element`, without blanks around it; empty if there is none."""
    return (element.findtext(path) or "").strip()


def positive_number(text: str, what: str) -> float:
    """The number that `text` is, as rates and scales are: from 1e-12 to 1e12, so that what is worked out stays finite.

    Raises:
        Rejected: `unreadable_header`, with what was read.
    """
    number = number_or_none(text)
    if number is None or not 1e-12 <= number <= 1e12:
        raise Rejected("unreadable_header", f"expected a number from 1e-12 to 1e12 as {what}, found {shown(text)}")
    return number


def number_or_none(text: str) -> float | None:
    """The finite number that `text` is, if it is one."""
    if re.fullmatch(_NUMBER, text.strip(), re.ASCII) is None:
        return None
    number = float(text)
    return number if math.isfinite(number) else None


def sample_count(text: str, what: str) -> int:
    """The number of samples that `text` promises.

    Raises:
        Rejected: `unreadable_header`; `too_large` beyond MAX_SAMPLES.
    """
    if _WHOLE.fullmatch(text) is None:
        raise Rejected("unreadable_header", f"expected a whole number as {what}, found {shown(text)}")
    if int(text) > MAX_SAMPLES:
        raise Rejected("too_large", f"expected at most {MAX_SAMPLES} samples, found {what} {text}")
    return int(text)


def decimal_numbers(text: str, what: str) -> np.ndarray:
    """(time,) float64: numbers written in decimal, with commas, semicolons or blanks between them.

    Raises:
        Rejected: `unreadable_signal` where anything else is among them, two separators in a row too.
    """
    if not text.strip():
        return np.empty(0)
    if _NUMBERS.fullmatch(text) is None:
        raise Rejected("unreadable_signal", f"expected decimal numbers as {what}, found {shown(text.strip())}")
    return np.fromstring(text.replace(",", " ").replace(";", " "), dtype=np.float64, sep=" ")


def base64_bytes(text: str, what: str) -> bytes:
    """The bytes that `text` is the base64 of; blanks and line ends in it do not count.

    Raises:
        Rejected: `unreadable_signal`.
    """
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Rejected("unreadable_signal", f"expected base64 as {what}: {error}") from error


def check_length(found: int, promised: int, what: str) -> None:
    """Compare the number of samples found with that promised.

    Raises:
        Rejected: `truncated` where there are fewer, `unreadable_signal` where there are more.
    """
    if found != promised:
        reason: Literal["truncated", "unreadable_signal"] = "truncated" if found < promised else "unreadable_signal"
        raise Rejected(reason, f"{what}: expected {promised} samples, found {found}")


def mv_per_unit(units: str) -> float:
    """Millivolts that one unit of that name is.

    Raises:
        Rejected: `unknown_units`.
    """
    try:
        return _MV_PER_UNIT[units.strip().casefold()]
    except KeyError:
        raise Rejected("unknown_units", f"expected V, mV, uV or nV, found {shown(units)}") from None


def record_of(
    record_id: str,
    leads: Sequence[str],
    sampling_rate_hz: float,
    values: Sequence[np.ndarray],
    mv_per_value: Sequence[float],
    zero: Sequence[float] | None = None,
) -> EcgRecord:
    """The record of these leads: `mV = (value - zero) * mv_per_value`, lead by lead.

    `Digital`, and so without loss, where all values are integers that int16 holds beside `INVALID`.

    values: per lead (time,), numbers; NaN where a sample is invalid
    zero: per lead the value at 0 mV; 0 where not given

    Raises:
        Rejected: `missing_signal`, `duplicate_lead`, `unreadable_signal` (leads of different length, values
            that are no numbers), `unreadable_header` (a rate or scale that cannot be), `too_large`.
    """
    if not leads or not any(map(len, values)):
        raise Rejected("missing_signal", "expected the samples of at least one lead, found none")
    names = tuple(map(lead_of_label, leads))
    if len(set(names)) < len(names):
        raise Rejected("duplicate_lead", f"expected every lead once, found {', '.join(names)}")
    if len({len(lead) for lead in values}) > 1:
        lengths = ", ".join(f"{name} {len(lead)}" for name, lead in zip(names, values, strict=True))
        raise Rejected("unreadable_signal", f"expected leads of one length, found {lengths}")
    if len(names) * len(values[0]) > MAX_SAMPLES:
        raise Rejected("too_large", f"expected at most {MAX_SAMPLES} samples, found {len(names)} x {len(values[0])}")
    if not 0 < sampling_rate_hz <= MAX_SAMPLING_RATE_HZ:
        raise Rejected(
            "unreadable_header",
            f"expected a sampling rate up to {MAX_SAMPLING_RATE_HZ:g} Hz, found {sampling_rate_hz:g}",
        )
    scale = np.array(mv_per_value, dtype=np.float64)
    baseline = np.zeros(len(names)) if zero is None else np.array(zero, dtype=np.float64)
    with np.errstate(all="ignore"):
        gain = 1 / scale
    if not (np.isfinite(gain) & np.isfinite(baseline) & (gain > 0)).all():
        raise Rejected("unreadable_header", f"expected positive millivolts per value, found {scale.tolist()}")
    stored = np.stack(list(values)).astype(np.float64)
    if np.isinf(stored).any():
        raise Rejected("unreadable_signal", "expected finite samples, found others")
    invalid = np.isnan(stored)
    if (invalid | ((stored == np.rint(stored)) & (np.abs(stored) < -INVALID))).all():
        digital = Digital(np.where(invalid, INVALID, stored).astype(np.int16), gain, baseline)
        return EcgRecord(record_id, names, sampling_rate_hz, digital)
    return EcgRecord(record_id, names, sampling_rate_hz, (stored - baseline[:, None]) * scale[:, None])


def age_years(age: str, units: str) -> float | None:
    """The age in years; None where it is not given in words that are known."""
    number, years = number_or_none(age), _YEARS_PER_UNIT.get(units.strip().casefold())
    return None if number is None or years is None or number < 0 else number * years


def years_between(birth: datetime | None, moment: datetime | None) -> float | None:
    """The age at that moment, in years of 365.25 days; None where either is unknown or they are in disorder."""
    if birth is None or moment is None:
        return None
    days = (moment.replace(tzinfo=None) - birth.replace(tzinfo=None)).days
    return days / 365.25 if days >= 0 else None


def sex_of(text: str) -> Literal["female", "male"] | None:
    """From MALE, Female, M, f; None for anything else."""
    match text.strip().casefold():
        case "f" | "female":
            return "female"
        case "m" | "male":
            return "male"
    return None


def moment_of(text: str, *layouts: str) -> datetime | None:
    """The time that `text` is in the first of the layouts (of `strptime`) it has; None where it has none."""
    for layout in layouts:
        try:
            return datetime.strptime(text.strip(), layout)
        except ValueError:
            continue
    return None


def shown(text: str) -> str:
    """Text from a file, fit for a message of one line."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _content(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Rejected("unreadable_header", f"{path.name}: expected a file, found something else")
        if status.st_size > MAX_BYTES:
            raise Rejected("too_large", f"{path.name}: expected at most {MAX_BYTES} bytes, found {status.st_size}")
        return path.read_bytes()
    except OSError as error:
        raise rejected(error, "unreadable_header", path.name) from error


def _local(name: str) -> str:
    return name.rpartition("}")[2]
