"""One file over an unreliable line, whole and with the published bytes, or a line that says why not.

A file in the making is `<name>.partial`, its bytes, and, if it is large, `<name>.version`: the server's word for which
version of the file they are of (a strong ETag, else the date of its last change). An interrupted one goes on where it
was (RFC 9110: Range, If-Range), a large one in a later process too; of another version, it begins again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from ecgfm import __version__
from ecgfm.archives import Checksum

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 8
"""More would be unkind to a server that many people use."""

MAX_FILE_BYTES = 16 << 30
"""No file of these archives is nearly as large; a server that sends without end must not fill the disk."""

NOTED_BYTES = 1 << 20
"""A smaller file's version is not written down: a later process begins it again, which costs less than the note."""

_BUSY = {429, 503}
_DENIED = {401, 403}
_GONE = {404, 410}
_TRY_AGAIN = {408, 425, *_BUSY, 500, 502, 504}


@dataclass(frozen=True)
class Manners:
    """How to treat a server.

    connections: at once, at most MAX_CONNECTIONS
    connect_s, read_s: how long to wait for a connection, and for the next bytes
    least_bytes_per_s: a reply that has been slower than this over `read_s` has stalled
    attempts: in a row without progress, for a file
    damaged: times that a file may come with other bytes than published
    backoff_s, longest_wait_s: the first wait between attempts, doubled each time, and the longest; a server that asks
        for more than `longest_wait_s` is asked again another day
    """

    connections: int = MAX_CONNECTIONS
    connect_s: float = 15.0
    read_s: float = 30.0
    least_bytes_per_s: float = 64.0
    attempts: int = 8
    damaged: int = 3
    backoff_s: float = 1.0
    longest_wait_s: float = 120.0

    def __post_init__(self) -> None:
        if not 1 <= self.connections <= MAX_CONNECTIONS:
            raise ValueError(f"connections: expected 1 to {MAX_CONNECTIONS}, found {self.connections}")


class TransferFailed(Exception):
    """A file did not come; the message says why in one line.

    status: of the server's last reply, None where there was none
    unreachable: whether the server, rather than this file, seems to be the trouble
    """

    def __init__(self, why: str, status: int | None = None, unreachable: bool = False) -> None:
        super().__init__(why)
        self.status = status
        self.unreachable = unreachable


class Stopped(Exception):
    """The transfers were told to end; what has come is kept."""


class _Stumbled(Exception):
    """An attempt ended early; another may do better, after `wait_s` if the server said so."""

    def __init__(self, why: str, status: int | None = None, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.status = status
        self.wait_s = wait_s


@dataclass(frozen=True)
class Fetched:
    """What the server said of a file: its version, and when it last changed (seconds since 1970)."""

    version: str | None
    modified_s: float | None


class Partial:
    """The bytes of a file that are here, their hash so far, and the version of the file that they are of."""

    def __init__(self, path: Path, algorithm: str) -> None:
        """What an earlier process left is hashed from the disk."""
        self.path, self.algorithm = path, algorithm
        self._note = path.with_suffix(".version")
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._file.seek(0)
        self.hash = hashlib.file_digest(self._file, algorithm)  # leaves the place at the end
        self.length = self._file.tell()
        self.version = self._note.read_text(encoding="utf-8", errors="replace") if self._note.exists() else ""

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def begin(self, version: str = "", expected: int | None = None) -> None:
        """Nothing is here, and what comes is of this version. The note is written after the old bytes are gone."""
        self._file.truncate(0)
        self._note.unlink(missing_ok=True)
        self.length, self.hash, self.version = 0, hashlib.new(self.algorithm), version
        if version and (expected is None or expected >= NOTED_BYTES):
            self._note.write_text(version, encoding="utf-8")

    def append(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            view = view[self._file.write(view) :]
        self.hash.update(chunk)
        self.length += len(chunk)

    def has(self, checksum: Checksum) -> bool:
        return self.hash.hexdigest() == checksum.hexdigest

    def sync(self) -> None:
        os.fsync(self._file.fileno())


def forget(partial: Path) -> None:
    """A file in the making is no longer needed."""
    partial.unlink(missing_ok=True)
    partial.with_suffix(".version").unlink(missing_ok=True)


class Line:
    """A server and the connections to it. Threads share one; proxies are taken from the environment.

    received: bytes of files that have come so far, those of failed attempts included
    """

    def __init__(self, manners: Manners) -> None:
        self.manners = manners
        self.received = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._silent_until = 0.0  # of time.monotonic(): no request before it
        self._client = httpx.Client(
            follow_redirects=True,
            max_redirects=5,
            timeout=httpx.Timeout(manners.read_s, connect=manners.connect_s, pool=None),
            limits=httpx.Limits(max_connections=manners.connections, max_keepalive_connections=manners.connections),
            # compressed on the way, a file has neither the published length nor the published bytes
            headers={"User-Agent": f"ecgfm/{__version__}", "Accept-Encoding": "identity"},
        )

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._client.close()

    def stop(self) -> None:
        """Transfers of other threads end with `Stopped` at their next bytes."""
        self._stop.set()

    def fetch(
        self,
        url: str,
        partial: Path,
        checksum: Checksum | None = None,
        size: int | None = None,
        unless_version: str = "",
        attempts: int | None = None,
    ) -> Fetched | None:
        """Make `partial` the whole file at `url`, on the disk.

        checksum: what its bytes must have; without it, the server's word on its length is all there is
        size: bytes, where known beforehand
        unless_version: of a file that is here already: None is returned if the server still has that one
        attempts: in place of the usual number

        Raises:
            TransferFailed: not to be had, or not as published, after as many attempts as `Manners` allow.
            Stopped: `stop` was called.
            OSError: it cannot be written here.
        """
        failures = damaged = 0
        with Partial(partial, checksum.algorithm if checksum else "sha256") as part:
            fetched: Fetched | None = None
            while True:
                # a process may have ended between the last byte and the renaming, a server after a wrong length
                if checksum and part.has(checksum):
                    part.sync()
                    return fetched or Fetched(None, _date(part.version))
                before = part.length
                try:
                    fetched = self._attempt(url, part, size, unless_version)
                    if fetched is None or checksum is None:
                        part.sync()
                        return fetched
                    if part.has(checksum):
                        continue
                    damaged += 1
                    if damaged >= self.manners.damaged:
                        raise TransferFailed(
                            f"expected {checksum.algorithm} {checksum.hexdigest}, found {part.hash.hexdigest()}"
                            f" ({part.length:,} bytes), {damaged} times"
                        )
                    part.begin()
                    self._wait(self._backoff(damaged))
                except _Stumbled as stumble:
                    failures = 1 if part.length - before >= 1 << 20 else failures + 1
                    if checksum and part.has(checksum):
                        continue
                    if failures >= (attempts or self.manners.attempts) or stumble.wait_s > self.manners.longest_wait_s:
                        raise TransferFailed(f"{stumble} ({failures} in a row)", stumble.status, True) from stumble
                    wait_s = max(stumble.wait_s, self._backoff(failures))
                    if stumble.status in _BUSY:  # meant for all of us
                        self._be_silent(stumble.wait_s, str(stumble))
                        wait_s = self._backoff(failures)  # on top of it, so that not all come back at once
                    self._wait(wait_s)

    def size_of(self, url: str) -> int | None:
        """Bytes of the file at `url`, as the server says without sending it; None if it does not say."""
        try:
            self._wait(0.0)
            reply = self._client.head(url)
        except (httpx.HTTPError, httpx.InvalidURL):  # an estimate does without
            return None
        length = reply.headers.get("Content-Length", "")
        return int(length) if reply.status_code == 200 and length.isdecimal() else None

    def _attempt(self, url: str, part: Partial, size: int | None, unless_version: str) -> Fetched | None:
        """One request: what comes is added to `part`."""
        self._wait(0.0)
        headers = {}
        if part.length and part.version:
            headers = {"Range": f"bytes={part.length}-", "If-Range": part.version}
        elif unless_version:
            headers = {"If-None-Match" if unless_version.startswith('"') else "If-Modified-Since": unless_version}
        try:
            with self._client.stream("GET", url, headers=headers) as reply:
                if self._stop.is_set():  # nothing is written from here on
                    raise Stopped
                if url.startswith("https:") and reply.url.scheme != "https":
                    raise TransferFailed(f"redirected to {reply.url.host} without encryption")
                if reply.status_code == 304 and unless_version:
                    return None
                version = _version_of(reply.headers)
                expected = self._start(reply, part, version, size)
                self._take(reply, part, expected)
                return Fetched(version or None, _date(reply.headers.get("Last-Modified", "")))
        except httpx.TimeoutException as error:
            raise _Stumbled(f"no answer within {self.manners.read_s:g} s ({type(error).__name__})") from error
        except (httpx.TooManyRedirects, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise TransferFailed(str(error)) from error
        except httpx.RequestError as error:
            raise _Stumbled(f"{str(error) or type(error).__name__}") from error

    def _start(self, reply: httpx.Response, part: Partial, version: str, size: int | None) -> int | None:
        """Look at a reply's head; `part` is ready for its body. Gives the whole file's bytes, where they are said."""
        status = reply.status_code
        length = reply.headers.get("Content-Length", "")
        if status == 200:  # also the answer to a Range that the server does not know, or of another version
            expected = int(length) if length.isdecimal() else None
            part.begin(version, expected)
        elif status == 206 and part.length:
            found = re.fullmatch(
                r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", reply.headers.get("Content-Range", "").strip()
            )
            if found is None or int(found[1]) != part.length or (version and version != part.version):
                part.begin()
                said = reply.headers.get("Content-Range", "no Content-Range")
                raise _Stumbled(f"another part than was asked for ({said})", status)
            expected = int(found[2]) + 1 if found[3] == "*" else int(found[3])
        elif status == 416:  # no such place in the file: what is here is too long
            part.begin()
            raise _Stumbled("the part that is here is not of this file", status)
        elif status in _TRY_AGAIN:
            raise _Stumbled(f"the server says {status}", status, _retry_after_s(reply.headers))
        else:
            what = "no such file" if status in _GONE else "access denied" if status in _DENIED else "unexpected answer"
            raise TransferFailed(f"{what} ({status})", status)
        if expected is not None and expected > MAX_FILE_BYTES:
            raise TransferFailed(f"expected at most {MAX_FILE_BYTES:,} bytes, the server says {expected:,}", status)
        if size is not None and expected not in (None, size):
            part.begin()
            raise _Stumbled(f"expected {size:,} bytes, the server says {expected:,}", status)
        return size if expected is None else expected

    def _take(self, reply: httpx.Response, part: Partial, expected: int | None) -> None:
        """The body, onto the disk."""
        limit = MAX_FILE_BYTES if expected is None else min(expected, MAX_FILE_BYTES)
        since, received = time.monotonic(), 0
        for chunk in reply.iter_raw():
            if self._stop.is_set():
                raise Stopped
            if part.length + len(chunk) > limit:
                part.begin()
                raise _Stumbled(f"more than {limit:,} bytes came", reply.status_code)
            part.append(chunk)
            received += len(chunk)
            with self._lock:
                self.received += len(chunk)
            seconds = time.monotonic() - since
            if seconds > self.manners.read_s and received / seconds < self.manners.least_bytes_per_s:
                raise _Stumbled(f"only {received:,} bytes in {seconds:.0f} s")
        if expected is not None and part.length < expected:
            raise _Stumbled(f"expected {expected:,} bytes, found {part.length:,}")

    def _backoff(self, failures: int) -> float:
        """Seconds: doubled each time, up to a limit, and by chance as little as half of it."""
        doubled: float = self.manners.backoff_s * 2.0 ** (failures - 1)
        return min(self.manners.longest_wait_s, doubled) * random.uniform(0.5, 1)

    def _be_silent(self, seconds: float, why: str) -> None:
        """No thread asks for anything during that time."""
        with self._lock:
            if seconds > 0 and time.monotonic() + seconds > self._silent_until + 1:
                log.info("%s: waiting %.0f s", why, seconds)
            self._silent_until = max(self._silent_until, time.monotonic() + seconds)

    def _wait(self, seconds: float) -> None:
        """That long, and until requests are allowed."""
        if self._stop.wait(seconds):
            raise Stopped
        while (rest := self._silent_until - time.monotonic()) > 0:
            if self._stop.wait(rest):
                raise Stopped


def _version_of(headers: Mapping[str, str]) -> str:
    """What If-Range may name (RFC 9110, 13.1.5): a strong ETag, else the date of the last change, else nothing."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified", "")


def _date(text: str) -> float | None:
    """Seconds since 1970 of a date in HTTP's form; None for anything else."""
    try:
        found = parsedate_to_datetime(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait: a number or a date; 0 if it does not."""
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    until = _date(text)
    return 0.0 if until is None else max(0.0, until - datetime.now(UTC).timestamp())
