"""Schiller XML."""

from __future__ import annotations

from pathlib import Path

from ecgfm.ecg import EcgRecord, FileFacts, Rejected
from ecgfm.formats.xml_document import parse, root_tag

NAME = "Schiller XML"


def matches(head: bytes) -> bool:
    """Whether the first bytes of a file are those of this format."""
    return root_tag(head) == "com.xiriuz.sema.xml.schillerEDI.SchillerEDI"


def read(path: Path, record_id: str) -> tuple[EcgRecord, FileFacts]:
    """The recording at `path`."""
    parse(path)
    raise Rejected("unreadable_signal", "not read yet")
