"""A published archive into a folder: every file of its own list, verified, and only what is not there yet.

What the download remembers lies in `<folder>/.ecgfm-download/`, a hidden folder that is no part of a source's raw
files: `files.sqlite` (of each file that was verified: its published checksum, and size and modification time then),
`partial/` (files in the making) and `lock`. A file becomes visible by one rename, when its bytes are verified and on
the disk. Losing the hidden folder costs hashing what is there.

The list may have millions of lines: it is read as a stream, and no more files are in hand than twice the connections.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import re
import shutil
import sqlite3
import stat
import struct
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from ecgfm.archives import HIDDEN, Archive, Listed, archive_of, check, chosen
from ecgfm.config import PROGRESS_BAR
from ecgfm.ecg import InputError
from ecgfm.files import sync
from ecgfm.transfer import MAX_FILE_BYTES, Line, Manners, Stopped, TransferFailed, forget

NAMED_FAILURES = 20
"""So many files that failed are named; the rest is counted."""

FIRST_ATTEMPTS = 4
"""For the list of files: somebody waits, and a wrong address is more likely than a server that is down."""

SAMPLES_PER_KIND = 16
"""Files of each name ending whose size is asked for, to estimate what all of them need."""


def in_bytes(count: int) -> str:
    """
    >>> in_bytes(999), in_bytes(1_234_567), in_bytes(2_500_000_000)
    ('999 B', '1.2 MB', '2.5 GB')
    """
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


@dataclass
class Summary:
    """What came of a download.

    present, fetched: files that were there, and that came
    received: bytes that came, those of failed attempts included
    failures: a line each, for the first NAMED_FAILURES of `n_failed`
    stopped: why the rest was not tried, or empty
    """

    present: int = 0
    fetched: int = 0
    received: int = 0
    seconds: float = 0.0
    n_failed: int = 0
    failures: list[str] = field(default_factory=list)
    stopped: str = ""

    @property
    def complete(self) -> bool:
        return not self.n_failed and not self.stopped

    def in_words(self, source: str, folder: Path) -> str:
        """A line."""
        received = f"{in_bytes(self.received)} in {self.seconds:.0f} s"
        there = f"{self.fetched:,} files fetched ({received}), {self.present:,} there"
        if self.complete:
            return f"{source}: {there}; all verified, in {folder}"
        trouble = f"{self.n_failed:,} failed" + (f"; {self.stopped}: is the server up?" if self.stopped else "")
        return f"{source}: {there}, {trouble}; nothing is lost: run the same command to go on"

    def add_failure(self, line: str) -> None:
        self.n_failed += 1
        if len(self.failures) < NAMED_FAILURES:
            self.failures.append(line)


@dataclass(frozen=True)
class Outlook:
    """What a download would do.

    needed: bytes that are to come, None where the server does not say
    asked: files whose size was asked for if `needed` is an estimate; 0 if the list has all sizes
    """

    listed: int
    present: int
    missing: int
    needed: int | None
    asked: int
    free: int

    def in_words(self, source: str, folder: Path) -> str:
        """A line, and another where the disk is too small."""
        how = f", from the sizes of {self.asked:,} of them" if self.asked else ""
        size = "the server does not say how large" if self.needed is None else in_bytes(self.needed) + how
        text = (
            f"{source}: {self.listed:,} files, {self.present:,} of them in {folder}, {self.missing:,} to fetch"
            f" ({size}); {in_bytes(self.free)} free there"
        )
        if self.needed is not None and self.needed > self.free:
            text += f"\nthe disk is too small by {in_bytes(self.needed - self.free)}"
        return text


def download(
    source: str,
    folder: Path,
    mirror: str | None = None,
    only: Sequence[str] = (),
    verify: bool = False,
    manners: Manners | None = None,
) -> Summary:
    """Bring every file of an archive, or those that match a pattern of `only`, into a folder.

    mirror: an address to take instead of the archive's `base`, with the same layout below it
    only: glob patterns of paths (`*` matches `/` too); the archive's tables come in any case
    verify: hash every file that is there, not only those that changed since they were verified

    Raises:
        InputError: an unknown source or a wrong address, no list of files there, a list with a path that leads
            elsewhere, a pattern that nothing matches, or another download into the folder that runs.
        OSError: the disk is full or cannot be written. What has come is kept.
    """
    archive, base = archive_of(source), _checked(source, mirror)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"--to {folder}: expected a folder, found a file: {error.filename}") from error
    folder = folder.resolve()
    with (
        _lock(folder),
        Line(manners or Manners()) as line,
        _Memory(folder / HIDDEN / "files.sqlite") as memory,
    ):
        url = base + archive.list_url
        listing, version = _bring_list(archive, url, folder, line, memory.list_version(url))
        wanted = check(archive, listing, only)
        memory.note_list(url, version)
        summary = Summary()
        _bring_files(chosen(archive, listing, only), wanted, base, _Folder(folder), line, memory, verify, summary)
        if summary.complete:
            shutil.rmtree(folder / HIDDEN / "partial")
        else:
            memory.note_list(url, "")  # it may be the list that is wrong: ask for it anew
        return summary


def outlook(
    source: str,
    folder: Path,
    mirror: str | None = None,
    only: Sequence[str] = (),
    verify: bool = False,
    manners: Manners | None = None,
) -> Outlook:
    """What `download` would do; makes nothing. A file that has not been verified counts as missing.

    Raises:
        InputError: as `download`.
    """
    archive, base, manners = archive_of(source), _checked(source, mirror), manners or Manners()
    folder = folder.resolve()
    remembered = folder / HIDDEN / "files.sqlite"
    missing, needed, by_kind = 0, 0, _Kinds()
    with (
        tempfile.TemporaryDirectory() as scratch,
        Line(manners) as line,
        _Memory(remembered if remembered.exists() else Path(scratch, "files.sqlite")) as memory,
    ):
        listing, _ = _bring_list(archive, base + archive.list_url, Path(scratch), line, "")
        n_wanted, _ = check(archive, listing, only)
        for file in chosen(archive, listing, only):
            if verify or not memory.holds(file, folder / file.path):
                missing += 1
                needed += file.size or 0
                if file.size is None:
                    by_kind.add(file)
        estimate = by_kind.estimate(line, base, manners.connections)
    there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    total = None if estimate is None else needed + estimate
    return Outlook(n_wanted, n_wanted - missing, missing, total, by_kind.asked, shutil.disk_usage(there).free)


def _checked(source: str, mirror: str | None) -> str:
    """The address to put paths behind.

    Raises:
        InputError: the mirror's is none.
    """
    base = mirror or archive_of(source).base
    parts = urlsplit(base)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InputError(f"--mirror {base}: expected an address such as https://host/folder-of-the-version")
    return base.rstrip("/")


def _bring_list(archive: Archive, url: str, folder: Path, line: Line, version: str) -> tuple[Path, str]:
    """The archive's list of files as it is now, and its version. One that did not change keeps its modification time.

    version: of the list that is there, if it was good

    Raises:
        InputError: there is none.
    """
    listing, partial = folder / archive.list_path, folder / HIDDEN / "partial" / "list.partial"
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        there = version if listing.is_file() else ""
        fetched = line.fetch(url, partial, unless_version=there, attempts=FIRST_ATTEMPTS)
    except TransferFailed as error:
        shown = re.sub("//[^/@]*@", "//", url)  # without a password
        hint = "network and proxy" if error.status is None else "that it is the version's folder, as published"
        raise InputError(f"no list of files at {shown}: {error}; check {hint}") from error
    if fetched is not None:
        version = fetched.version or ""
        if not listing.is_file() or _hash(listing, "sha256") != _hash(partial, "sha256"):
            _settle(partial, listing, fetched.modified_s)
    forget(partial)
    return listing, version


def _settle(whole: Path, place: Path, modified_s: float | None) -> None:
    """A whole file, which is on the disk, appears in its place. Its modification time is as published: raw files are
    known by size and time, and those of another machine have the same.

    The renaming is not waited for: one that is lost is a file that is missing, and comes again.
    """
    if modified_s is not None:
        os.utime(whole, (modified_s, modified_s))
    os.replace(whole, place)


# ---- what is remembered


class _Memory:
    """Which files were verified, and as what they lay there then."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _Memory:
        try:
            self._db = sqlite3.connect(self.path, timeout=30)
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, checksum TEXT, size INT, mtime_ns INT,"
                " content TEXT) WITHOUT ROWID"
            )
            self._db.execute("CREATE TABLE IF NOT EXISTS list (url TEXT PRIMARY KEY, version TEXT)")
        except sqlite3.DatabaseError as error:
            hint = "remove it: files that are there are then hashed once more"
            raise InputError(f"{self.path}: {error}; {hint}") from error
        self._committed = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with self._disk_full_said():
                self._db.commit()
        finally:
            self._db.close()

    def holds(self, file: Listed, place: Path) -> bool:
        """Whether the file lies there as it was when it was verified against this checksum."""
        query = "SELECT size, mtime_ns FROM files WHERE path = ? AND checksum = ?"
        row = self._db.execute(query, (file.path, file.checksum.hexdigest)).fetchone()
        if row is None:
            return False
        try:
            found = os.lstat(place)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return stat.S_ISREG(found.st_mode) and (found.st_size, found.st_mtime_ns) == row

    def content_of(self, file: Listed) -> str:
        """The SHA-256 of the file that was unpacked from what this checksum is of; empty if there is none."""
        query = "SELECT content FROM files WHERE path = ? AND checksum = ?"
        row = self._db.execute(query, (file.path, file.checksum.hexdigest)).fetchone()
        return str(row[0]) if row else ""

    def note(self, file: Listed, found: os.stat_result, content: str) -> None:
        """A file was verified. What the last second noted may be lost when killed, and is hashed again then."""
        row = (file.path, file.checksum.hexdigest, found.st_size, found.st_mtime_ns, content)
        with self._disk_full_said():
            self._db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", row)
            if time.monotonic() - self._committed > 1:
                self._db.commit()
                self._committed = time.monotonic()

    def list_version(self, url: str) -> str:
        """The version of the list that is there, if it came from there; empty if it is to be asked for anew."""
        row = self._db.execute("SELECT version FROM list WHERE url = ?", (url,)).fetchone()
        return str(row[0]) if row else ""

    def note_list(self, url: str, version: str) -> None:
        with self._disk_full_said():
            self._db.execute("DELETE FROM list")
            self._db.execute("INSERT INTO list VALUES (?, ?)", (url, version))
            self._db.commit()

    @contextmanager
    def _disk_full_said(self) -> Iterator[None]:
        """A full disk is the same error, whoever writes."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path)) from error


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One download into a folder at a time. The kernel drops the lock when its holder dies.

    Raises:
        InputError: another one has it.
    """
    hidden = folder / HIDDEN
    hidden.mkdir(exist_ok=True)
    with open(hidden / "lock", "a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            raise InputError(
                f"another download into {folder} runs (process {handle.read().strip() or 'unknown'});"
                " wait for its end, or take another folder"
            ) from error
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


# ---- the files


class _Folder:
    """Where files come to lie: below the root, whatever links there are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: set[str] = set()

    def place(self, path: str) -> Path:
        """The place of a file, its folders made.

        Raises:
            TransferFailed: a folder on the way is none, or a link that leads out of the root.
        """
        parent = path.rpartition("/")[0]
        if parent and parent not in self._known:
            here = self.root
            for part in parent.split("/"):
                here = here / part
                try:
                    here.mkdir()
                except FileExistsError:
                    if here.is_symlink() and not here.resolve().is_relative_to(self.root):
                        raise TransferFailed(f"{here} is a link out of {self.root}; remove it") from None
                    if not here.is_dir():
                        raise TransferFailed(f"{here} is in the way: expected a folder") from None
            if len(self._known) > 10_000:  # a list is in order: what comes next is near
                self._known.clear()
            self._known.add(parent)
        return self.root / path

    def partial(self, file: Listed) -> Path:
        """Where the bytes of a file are gathered: one place for each path and checksum."""
        name = hashlib.sha256(f"{file.path}\0{file.checksum.hexdigest}".encode()).hexdigest()[:32]
        return self.root / HIDDEN / "partial" / f"{name}.partial"


class _Came(NamedTuple):
    """A file that lies where it should, verified. content: its own SHA-256 if it was unpacked, else empty"""

    found: os.stat_result
    content: str
    fetched: bool


def _bring_files(
    files: Iterator[Listed],
    wanted: tuple[int, int],
    base: str,
    folder: _Folder,
    line: Line,
    memory: _Memory,
    verify: bool,
    summary: Summary,
) -> None:
    """Every file, several at a time; `summary` is kept up to date. wanted: files, and bytes if known"""
    n_files, n_bytes = wanted
    connections, started, before, failed_in_a_row = line.manners.connections, time.monotonic(), line.received, 0
    in_hand: dict[Future[_Came], Listed] = {}

    def settle(bar: tqdm[None]) -> None:
        """What became of the files in hand that are done; waits for one."""
        nonlocal failed_in_a_row
        for future in wait(in_hand, 0.5, FIRST_COMPLETED).done:
            file = in_hand.pop(future)
            try:
                came = future.result()
            except Stopped:
                continue
            except TransferFailed as error:
                summary.add_failure(f"{file.path}: {error}")
                failed_in_a_row = failed_in_a_row + 1 if error.unreachable else 0
                if failed_in_a_row >= 2 * connections:
                    summary.stopped = f"{failed_in_a_row} files in a row did not come"
                    line.stop()
            else:
                failed_in_a_row = 0
                memory.note(file, came.found, came.content)
                summary.fetched += came.fetched
                summary.present += not came.fetched
        summary.received, summary.seconds = line.received - before, time.monotonic() - started
        rest = n_files - summary.present - summary.fetched - summary.n_failed
        if n_bytes:
            bar.total = n_bytes
        elif summary.fetched:  # the others as large as those that came
            bar.total = round(summary.received * (1 + rest / summary.fetched))
        bar.set_postfix_str(f"{n_files - rest:,} of {n_files:,} files", refresh=False)
        bar.update(summary.received - bar.n)

    pool = ThreadPoolExecutor(connections, "download")
    try:
        with tqdm(desc="download", unit="B", unit_scale=True, **PROGRESS_BAR) as bar:
            for file in files:
                if not verify and memory.holds(file, folder.root / file.path):
                    summary.present += 1
                    n_bytes -= file.size or 0
                    continue
                # a path that is listed twice is not written twice at once
                while len(in_hand) >= 2 * connections or file.path in (other.path for other in in_hand.values()):
                    settle(bar)
                if summary.stopped:
                    break
                in_hand[pool.submit(_bring, file, base, folder, line, memory.content_of(file))] = file
            while in_hand:
                settle(bar)
    finally:
        line.stop()  # a thread that waits for the server writes nothing any more
        pool.shutdown(wait=False, cancel_futures=True)


def _bring(file: Listed, base: str, folder: _Folder, line: Line, content: str) -> _Came:
    """One file into its place, unless it lies there with the right bytes. content: of one that was unpacked earlier

    Raises:
        TransferFailed: this file is not to be had.
        Stopped: all transfers end.
    """
    place, partial = folder.place(file.path), folder.partial(file)
    algorithm, right = ("sha256", content) if file.zipped else (file.checksum.algorithm, file.checksum.hexdigest)
    if place.is_dir() and not place.is_symlink():
        raise TransferFailed(f"{place} is in the way: expected a file")
    if right and place.is_file() and not place.is_symlink() and _hash(place, algorithm) == right:
        forget(partial)
        return _Came(place.stat(), content, False)
    try:
        fetched = line.fetch(base + file.place, partial, file.checksum, file.size)
        whole, content = _unpack(partial, file.path) if file.zipped else (partial, "")
    except TransferFailed as error:
        if not error.unreachable:  # else it goes on with what is here
            forget(partial)
        raise
    _settle(whole, place, fetched.modified_s if fetched else None)
    forget(partial)
    return _Came(place.stat(), content, True)


def _unpack(archive: Path, path: str) -> tuple[Path, str]:
    """The file `path` out of a zip file that holds nothing else, and its SHA-256. No name in the zip file is used as
    a place.

    Raises:
        TransferFailed: it is not such a zip file.
    """
    unpacked, digest, whole = archive.with_suffix(".unpacked"), hashlib.sha256(), False
    try:
        with zipfile.ZipFile(archive) as members:
            inside = [member for member in members.infolist() if not member.is_dir()]
            if [Path(member.filename).name for member in inside] != [path]:
                names = ", ".join(repr(member.filename[:60]) for member in inside[:3])
                raise TransferFailed(f"expected a zip file with {path} in it, found {names or 'nothing'}")
            if (size := inside[0].file_size) > MAX_FILE_BYTES:
                raise TransferFailed(f"expected at most {MAX_FILE_BYTES:,} bytes unpacked, found {size:,}")
            if inside[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise TransferFailed(f"expected a zip file by deflate, found method {inside[0].compress_type}")
            with members.open(inside[0]) as packed, open(unpacked, "wb") as out:  # at most `size` bytes, by their CRC
                while chunk := packed.read(1 << 20):
                    out.write(chunk)
                    digest.update(chunk)
        sync(unpacked)
        whole = True
    except (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise TransferFailed(f"the zip file does not unpack: {error}") from error
    finally:
        if not whole:
            unpacked.unlink(missing_ok=True)
    return unpacked, digest.hexdigest()


def _hash(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


class _Kinds:
    """What files need whose sizes no list says: for each name ending, the mean of a few of them."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._samples: dict[str, list[Listed]] = {}
        self._random = random.Random(0)
        self.asked = 0

    def add(self, file: Listed) -> None:
        kind = os.path.splitext(file.path)[1]
        kind = kind if kind in self._counts or len(self._counts) < 30 else "others"
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        some = self._samples.setdefault(kind, [])
        if len(some) < SAMPLES_PER_KIND:
            some.append(file)
        elif (place := self._random.randrange(count)) < SAMPLES_PER_KIND:  # each is as likely to be among them
            some[place] = file

    def estimate(self, line: Line, base: str, connections: int) -> int | None:
        """Bytes of all; None where the server does not say."""
        total = 0
        with ThreadPoolExecutor(connections) as pool:
            for kind, some in self._samples.items():
                sizes = [size for size in pool.map(lambda f: line.size_of(base + f.place), some) if size is not None]
                if not sizes:
                    return None
                self.asked += len(sizes)
                total += round(sum(sizes) / len(sizes) * self._counts[kind])
        return total
