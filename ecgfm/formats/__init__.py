"""File formats of ECG recordings, one module each. A reader gives an `EcgRecord` or raises `Rejected`."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Protocol

from ecgfm.ecg import EcgRecord, FileFacts, Rejected
from ecgfm.formats import cardiosoft, dicom, edf, hl7_aecg, muse, philips, schiller, scp, wfdb
from ecgfm.formats.raw_files import rejected

HEAD_BYTES = 64 * 1024
"""How much of a file a format sees to know it."""


class Format(Protocol):
    """What a module of a format holds."""

    NAME: str

    def matches(self, head: bytes) -> bool:
        """Whether a file that begins with `head`, its first `HEAD_BYTES` or all of it, is of this format."""
        ...

    def read(self, path: Path, record_id: str) -> tuple[EcgRecord, FileFacts]:
        """The recording in the file at `path`.

        Raises:
            Rejected: whatever is wrong with the file.
            InputError: its drive fails (raw_files.py), or a package that the format needs is not installed.
        """
        ...


FORMATS: tuple[Format, ...] = (wfdb, muse, philips, schiller, cardiosoft, hl7_aecg, dicom, edf, scp)
"""Every format that is read. No file is of two of them (tests/test_formats_binary.py)."""


_DRAWINGS = {"a PDF": b"%PDF-", "a PNG": b"\x89PNG", "a JPEG": b"\xff\xd8\xff"}


def identify(path: Path) -> Format | None:
    """The format of a file, from its content alone; None where it is of none that is read.

    Raises:
        Rejected: `missing_signal` or `unreadable_signal`, the file cannot be opened.
        InputError: its drive fails (raw_files.py).
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise Rejected("unreadable_signal", f"{path.name}: expected a file, found something else")
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError as error:
        raise Rejected("missing_signal", f"{path.name}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a name no file can have
        raise rejected(error, "unreadable_signal", path.name) from error
    return next((known for known in FORMATS if known.matches(head)), None)


def read_file(path: Path, record_id: str) -> tuple[EcgRecord, FileFacts]:
    """The recording in a file of any format that is read.

    Raises:
        InputError: the format needs a package that is not installed.
        Rejected: `unknown_format`, or what the format's reader says.
        InputError: its drive fails (raw_files.py).
    """
    known = identify(path)
    if known is None:
        raise Rejected("unknown_format", what_is_wrong(path))
    return known.read(path, record_id)


def what_is_wrong(path: Path) -> str:
    """Of a file that is of no format that is read: expected and found, and what to do where that is known.

    >>> import tempfile
    >>> letter = Path(tempfile.mkdtemp()) / "letter.pdf"
    >>> bytes_written = letter.write_bytes(b"%PDF-1.4")
    >>> what_is_wrong(letter)
    'a PDF holds a drawing and not the samples; export the recording itself, as XML, DICOM or SCP-ECG'
    """
    with path.open("rb") as file:
        head = file.read(8)
    if not head:
        return "the file is empty"
    for kind, beginning in _DRAWINGS.items():
        if head.startswith(beginning):
            return f"{kind} holds a drawing and not the samples; export the recording itself, as XML, DICOM or SCP-ECG"
    return f"expected one of {', '.join(each.NAME for each in FORMATS)}; found none of them"
