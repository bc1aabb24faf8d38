"""Published archives and their own lists of files, which are read as what they are: text from elsewhere.

PhysioNet's archives list their files in SHA256SUMS.txt, a line each: a checksum and a path. CODE-15% is a record of
Zenodo, whose API gives names, sizes and MD5 sums; its parts are zip files with one HDF5 file each.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import quote

from ecgfm.ecg import InputError

HIDDEN = ".ecgfm-download"
"""The folder, below the one that is downloaded into, for what is no part of the archive."""

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *]?(\S.*)")
_MAX_RECORD_BYTES = 1 << 20  # of a record of Zenodo, which is one JSON text
_MAX_PATH_BYTES, _MAX_NAME_BYTES = 1024, 255
_MAX_LINE = 2048  # characters: a text without line ends is not read at once


@dataclass(frozen=True)
class Checksum:
    """algorithm: a name of hashlib; hexdigest: in lower case"""

    algorithm: str
    hexdigest: str


@dataclass(frozen=True)
class Archive:
    """A published archive.

    base: the address below which its files lie; `--mirror` takes its place
    tables: what a source reads beside recordings; taken whatever subset is asked for
    """

    title: str
    base: str
    kind: Literal["physionet", "zenodo"]
    tables: tuple[str, ...] = ()

    @property
    def list_url(self) -> str:
        """Where the list of files is, below the base."""
        return "/SHA256SUMS.txt" if self.kind == "physionet" else ""

    @property
    def list_path(self) -> str:
        """Where the list lies in the folder."""
        return "SHA256SUMS.txt" if self.kind == "physionet" else f"{HIDDEN}/record.json"


ARCHIVES: Mapping[str, Archive] = {
    "physionet2021": Archive(
        "Challenge 2021, version 1.0.3", "https://physionet.org/files/challenge-2021/1.0.3", "physionet"
    ),
    "ptb_xl": Archive(
        "PTB-XL, version 1.0.3",
        "https://physionet.org/files/ptb-xl/1.0.3",
        "physionet",
        ("ptbxl_database.csv", "scp_statements.csv"),
    ),
    "mimic_iv_ecg": Archive(
        "MIMIC-IV-ECG, version 1.0",
        "https://physionet.org/files/mimic-iv-ecg/1.0",
        "physionet",
        ("record_list.csv", "machine_measurements.csv"),
    ),
    "code15": Archive("CODE-15%, version 1.0.0", "https://zenodo.org/api/records/4916206", "zenodo", ("exams.csv",)),
}
"""By the name of the source that reads it."""


class Listed(NamedTuple):
    """A file of an archive.

    path: below the folder, where it is to lie
    place: below the base, as it stands in an address
    checksum: of what is sent
    size: bytes of what is sent, where the list says
    zipped: whether what is sent is a zip file that holds the file
    """

    path: str
    place: str
    checksum: Checksum
    size: int | None = None
    zipped: bool = False


def archive_of(source: str) -> Archive:
    """The archive that a source reads.

    Raises:
        InputError: none is known.
    """
    if source not in ARCHIVES:
        raise InputError(f"no download for {source!r}; there is one for {', '.join(ARCHIVES)}")
    return ARCHIVES[source]


def files_of(archive: Archive, listing: Path) -> Iterator[Listed]:
    """The files of a list, one after the other.

    Raises:
        InputError: a line that is none, or a path that leads elsewhere.
    """
    if archive.kind == "zenodo":
        yield from _files_of_record(listing)
        return
    with open(listing, encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        for number, text in enumerate(iter(lambda: lines.readline(_MAX_LINE), ""), 1):
            found = _LINE.fullmatch(text.rstrip("\r\n"))
            if found is None or not text.endswith("\n"):
                raise InputError(
                    f"{listing.name}, line {number}: expected a SHA-256 sum and a path, found {text[:60]!r}; is this"
                    " the list of a PhysioNet archive?"
                )
            path = _safe(found[2], f"{listing.name}, line {number}")
            if path != listing.name:
                yield Listed(path, f"/{quote(path)}", Checksum("sha256", found[1].lower()))


def _files_of_record(listing: Path) -> Iterator[Listed]:
    """The files of a record of Zenodo, in the form of its API. A zip file stands for the HDF5 file in it."""
    try:
        if listing.stat().st_size > _MAX_RECORD_BYTES:
            raise ValueError(f"{listing.stat().st_size:,} bytes")
        for file in json.loads(listing.read_text(encoding="utf-8"))["files"]:
            name, size = str(file["key"]), int(file["size"])
            algorithm, _, hexdigest = str(file["checksum"]).rpartition(":")
            if not re.fullmatch("[0-9a-f]{32}", hexdigest) or algorithm not in ("md5", "") or size < 0 or "/" in name:
                raise ValueError(f"{file['key']!r}: {file['checksum']!r}")
            zipped = name.endswith(".zip")
            path = _safe(name.removesuffix(".zip") + ".hdf5" if zipped else name, listing.name)
            yield Listed(path, f"/files/{quote(name)}/content", Checksum("md5", hexdigest), size, zipped)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"expected a record of Zenodo with names, sizes and MD5 sums, found {error!r}") from error


def _safe(path: str, where: str) -> str:
    """A path of a list, which must stay below the folder and out of our own.

    Raises:
        InputError: it does not, or cannot be a path here.
    """
    parts = path.split("/")
    if (
        not path.isprintable()  # also: bytes that are not UTF-8
        or "\\" in path
        or {"", ".", "..", HIDDEN} & set(path.casefold().split("/"))
        or len(path.encode()) > _MAX_PATH_BYTES
        or max(len(part.encode()) for part in parts) > _MAX_NAME_BYTES
    ):
        raise InputError(f"{where}: expected a path below the archive, found {path[:100]!r}; nothing was taken from it")
    return path


def chosen(archive: Archive, listing: Path, only: Sequence[str]) -> Iterator[Listed]:
    """The files of the list that match one of the patterns, all if there is none, and the archive's tables."""
    wanted = _patterns(only)
    for file in files_of(archive, listing):
        if not wanted or file.path in archive.tables or any(pattern.match(file.path) for pattern in wanted):
            yield file


def check(archive: Archive, listing: Path, only: Sequence[str]) -> tuple[int, int]:
    """How many files are wanted, and their bytes as far as the list says. Looks at the whole list, so that nothing is
    taken from one that leads elsewhere.

    Raises:
        InputError: as `files_of`; the list is empty; a pattern that no file matches.
    """
    wanted, matched, count, size, example = _patterns(only), set[int](), 0, 0, ""
    for file in files_of(archive, listing):
        hits = [position for position, pattern in enumerate(wanted) if pattern.match(file.path)]
        matched.update(hits)
        if hits or not wanted or file.path in archive.tables:
            count += 1
            size += file.size or 0
        example = file.path
    if not example:
        raise InputError(f"{archive.title}: the list of files is empty")
    for position, pattern in enumerate(only):
        if position not in matched:
            raise InputError(f"--only {pattern}: no file of {archive.title} matches; a path there: {example}")
    return count, size


def _patterns(only: Sequence[str]) -> list[re.Pattern[str]]:
    return [re.compile(fnmatch.translate(pattern)) for pattern in only]
