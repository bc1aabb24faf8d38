"""Downloads from a server that stalls, truncates, refuses, lies and dies: as published, or a line that says why not.

The server is in the test; nothing here needs a network.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from typer.testing import CliRunner

from ecgfm import archives, download, transfer
from ecgfm.archives import ARCHIVES, HIDDEN, check, chosen
from ecgfm.ecg import InputError
from ecgfm.sources import ptb_xl
from ecgfm.transfer import Manners
from flows.cli import app

QUICK = Manners(connect_s=5, read_s=1.5, backoff_s=0.01, longest_wait_s=5, attempts=6)
PUBLISHED_S = 1_600_000_000
BASE = "/files/archive/1.0"


class Server(ThreadingHTTPServer):
    """PhysioNet's layout below BASE, with faults.

    files: path below BASE -> bytes
    faults: path -> what goes wrong with the next requests for it, one after the other
    requests: (path, status, Range header) of every GET; sent: bytes of bodies
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.requests: list[tuple[str, int, str | None]] = []
        self.times: list[tuple[str, float]] = []
        self.sent = 0
        self.bytes_per_s = 0.0  # as fast as it goes
        self.delay_s = 0.0
        self.etags = True
        self.now, self.most_at_once = 0, 0
        self.lock = threading.Lock()
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{BASE}"

    def publish(self, files: dict[str, bytes]) -> None:
        """These files and their list, as PhysioNet writes it."""
        lines = [f"{hashlib.sha256(data).hexdigest()} {path}\n" for path, data in files.items()]
        self.files = {**files, "SHA256SUMS.txt": "".join(lines).encode()}

    def gets(self, path: str) -> int:
        return sum(asked == path for asked, _, _ in self.requests)

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are what is tested."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server = self.server
        path = unquote(urlsplit(self.path).path).removeprefix(f"{BASE}/").removeprefix(BASE).removeprefix("moved/")
        with server.lock:
            fault = server.faults[path].pop(0) if server.faults[path] and self.command == "GET" else ""
            server.now += 1
            server.most_at_once = max(server.most_at_once, server.now)
            server.times.append((path, time.monotonic()))
        try:
            time.sleep(server.delay_s)
            self.answer(path, fault)
        finally:
            with server.lock:
                server.now -= 1

    def answer(self, path: str, fault: str) -> None:  # noqa: PLR0912 - a fault, a branch
        server = self.server
        data = server.files.get(path)
        if data is None or fault.isdecimal() or fault.startswith("429"):
            status = 404 if data is None else int(fault[:3])
            self.head(path, status, 0, {"Retry-After": fault[4:]} if "/" in fault else {})
            return
        if fault == "redirect":
            self.head(path, 302, 0, {"Location": f"{BASE}/moved/{path}"})
            return
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        headers = {"Last-Modified": formatdate(PUBLISHED_S, usegmt=True)} | ({"ETag": tag} if server.etags else {})
        if self.headers.get("If-None-Match") == tag:
            self.head(path, 304, 0, headers)
            return
        start, status = 0, 200
        asked = self.headers.get("Range")
        if asked and self.headers.get("If-Range") in headers.values() and fault != "ignores range":
            start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
            if start >= len(data):
                self.head(path, 416, 0, {"Content-Range": f"bytes */{len(data)}"})
                return
            said = start + 7 if fault == "other range" else start
            headers["Content-Range"] = f"bytes {said}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        length = len(body)
        half = body[: len(body) // 2]
        if fault == "wrong bytes":
            body = bytes(byte ^ 1 for byte in body)
        elif fault in ("stall", "truncate", "truncate, then another"):
            body = half
        elif fault == "says too little":
            body, length = half, len(half)
        elif fault == "says too much":
            length += 1000
        elif fault == "sends too much":
            body += bytes(1000)
        self.head(path, status, length, headers)
        if self.command == "HEAD":
            return
        while fault == "drips" and len(body) > len(half):  # too slow for anybody, too fast for a stall
            self.wfile.write(body[:1])
            body = body[1:]
            time.sleep(0.05)
        for place in range(0, len(body), 16_384):
            chunk = body[place : place + 16_384]
            self.wfile.write(chunk)
            with server.lock:
                server.sent += len(chunk)
            if server.bytes_per_s:
                time.sleep(len(chunk) / server.bytes_per_s)
        if fault == "stall":
            server.ended.wait(20)
        if fault in ("stall", "truncate", "truncate, then another", "says too much", "drips"):
            self.close_connection = True
        if fault == "truncate, then another":
            server.files[path] = server.files.pop(f"another/{path}")

    def head(self, path: str, status: int, length: int, headers: dict[str, str]) -> None:
        if self.command == "GET":
            self.server.requests.append((path, status, self.headers.get("Range")))
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    """PTB-XL in small: two tables, six records at two rates."""
    with Server() as server:
        files = {"LICENSE.txt": b"terms", "ptbxl_database.csv": b"ecg_id\n1\n", "scp_statements.csv": b",diagnostic\n"}
        for number in range(1, 7):
            for rate, suffix, size in ((100, "lr", 4_000), (500, "hr", 60_000)):
                stem = f"records{rate}/00000/{number:05d}_{suffix}"
                files[f"{stem}.hea"] = f"{number:05d} 12 {rate}\n".encode()
                files[f"{stem}.dat"] = noise(size + number, number + rate)
        server.publish(files)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


def noise(size: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def bring(server: Server, folder: Path, manners: Manners = QUICK, **options: Any) -> download.Summary:
    return download.download("ptb_xl", folder, server.url, manners=manners, **options)


def there(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of what is visible, files in the making included."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(HIDDEN)}


def assert_whole(server: Server, folder: Path) -> None:
    assert there(folder) == server.files
    assert not list(folder.rglob("*.partial"))
    assert not (folder / HIDDEN / "partial").exists()


def ecgfm(*words: str | Path) -> tuple[int, str]:
    """Exit code and all that was printed."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


DAT = "records500/00000/00003_hr.dat"


# ---- the whole of it


def test_what_is_published_arrives_and_a_second_run_asks_for_nothing(server: Server, tmp_path: Path) -> None:
    n_files = len(server.files) - 1
    code, text = ecgfm("download", "ptb_xl", "--to", tmp_path / "raw", "--mirror", server.url)
    assert code == 0, text
    assert f"{n_files} files fetched" in text
    assert f"ecgfm run ptb-xl --raw ptb_xl={tmp_path / 'raw'}" in text
    assert_whole(server, tmp_path / "raw")
    assert {(tmp_path / "raw" / path).stat().st_mtime for path in server.files} == {PUBLISHED_S}, (
        "a source's fingerprint is the same on another machine"
    )
    server.requests.clear()
    again = bring(server, tmp_path / "raw")
    assert (again.present, again.fetched) == (n_files, 0)
    assert [(path, status) for path, status, _ in server.requests] == [("SHA256SUMS.txt", 304)]


def test_real_recordings_arrive_and_are_listed(shared: Path, server: Server, tmp_path: Path) -> None:
    original = shared / "data" / "ptb-xl"
    paths = sorted(path for path in original.rglob("*") if path.is_file() and path.name != "SHA256SUMS.txt")
    server.publish({str(path.relative_to(original)): path.read_bytes() for path in paths})
    ours = set(server.files["SHA256SUMS.txt"].decode().splitlines())
    published = set((original / "SHA256SUMS.txt").read_text().splitlines())
    assert len(ours & published) > 50, "the list that is served here is in PhysioNet's own form"
    code, text = ecgfm("download", "ptb_xl", "--to", tmp_path, "--mirror", server.url, "--only", "records500/*")
    assert code == 0, text
    listed = ptb_xl.list_records(tmp_path)
    assert listed.height == 210
    assert listed.equals(ptb_xl.list_records(original))
    row = listed.row(7, named=True)
    assert np.array_equal(
        ptb_xl.read_record(tmp_path, row).signal_mv, ptb_xl.read_record(original, row).signal_mv, equal_nan=True
    )


# ---- a server with faults

FAULTS = (
    ["stall"],
    ["truncate", "truncate", "truncate"],
    ["429", "429/0", "503"],
    ["500", "502", "500", "504"],
    ["says too little"],
    ["says too much"],
    ["sends too much"],
    ["truncate", "ignores range"],
    ["truncate", "other range"],
    ["wrong bytes", "wrong bytes"],
    ["truncate", "wrong bytes", "truncate"],
    ["redirect"],
    ["truncate", "redirect", "429"],
)


@pytest.mark.parametrize("faults", FAULTS, ids=", ".join)
def test_faults_are_outlived(server: Server, tmp_path: Path, faults: list[str]) -> None:
    server.etags = "redirect" not in faults  # with dates alone too
    server.faults[DAT] = list(faults)
    summary = bring(server, tmp_path)
    assert summary.complete, summary.failures
    assert not server.faults[DAT], "every fault came"
    assert_whole(server, tmp_path)


def test_any_mixture_of_faults_is_outlived(server: Server, tmp_path: Path) -> None:
    chance = random.Random(3)
    kinds = [fault for faults in FAULTS for fault in faults if fault not in ("stall", "wrong bytes", "says too little")]
    for path in server.files:
        server.faults[path] = [chance.choice(kinds) for _ in range(chance.randrange(4))]
    server.faults["SHA256SUMS.txt"] = ["truncate", "500", "redirect"]
    summary = bring(server, tmp_path, manners=Manners(backoff_s=0.01, longest_wait_s=0.1, attempts=20))
    assert summary.complete, summary.failures
    came = Counter(path for path, _, _ in server.requests)
    assert sum(came.values()) > 2 * len(server.files)
    assert_whole(server, tmp_path)


def test_an_interrupted_file_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.faults[DAT] = ["truncate", "stall", "truncate"]
    assert bring(server, tmp_path).complete
    size = len(server.files[DAT])
    starts = [
        int(asked.removeprefix("bytes=").strip("-")) for path, _, asked in server.requests if path == DAT and asked
    ]
    assert starts[0] == size // 2
    assert starts[0] < starts[1] < starts[2]
    assert server.sent == sum(map(len, server.files.values())), "no byte came twice"


@pytest.mark.parametrize("etags", [True, False], ids=["etag", "date"])
def test_a_file_that_changed_is_not_glued_to_what_is_here(server: Server, tmp_path: Path, etags: bool) -> None:
    """The list has the new one. Without ETags the two cannot be told apart, and the checksum tells."""
    server.etags = etags
    old, new = noise(3_000_000, 1), noise(3_000_000, 2)
    server.publish({DAT: new})
    server.files |= {DAT: old, f"another/{DAT}": new}
    server.faults[DAT] = ["truncate, then another"]
    assert bring(server, tmp_path).complete
    assert (tmp_path / DAT).read_bytes() == new
    statuses = [status for path, status, _ in server.requests if path == DAT]
    assert statuses == ([200, 200] if etags else [200, 206, 200])


def test_a_reply_that_drips_is_given_up_and_goes_on(server: Server, tmp_path: Path) -> None:
    server.faults[DAT] = ["drips"]
    slow = Manners(read_s=0.5, least_bytes_per_s=1_000_000, backoff_s=0.01)
    assert bring(server, tmp_path, manners=slow).complete
    assert [status for path, status, _ in server.requests if path == DAT] == [200, 206]
    assert_whole(server, tmp_path)


def test_retry_after_is_honoured_by_all(server: Server, tmp_path: Path) -> None:
    server.faults["LICENSE.txt"] = ["429/1"]
    bring(server, tmp_path, manners=Manners(connections=2, backoff_s=0.01))
    refused = next(at for path, at in server.times if path == "LICENSE.txt")
    after = [at - refused for _, at in server.times if at > refused]
    assert sum(at < 0.9 for at in after) <= 1, "but for what the other connection had begun"
    assert len(after) > 20
    server.files["new"] = b"1"
    server.files["SHA256SUMS.txt"] += f"{hashlib.sha256(b'1').hexdigest()} new\n".encode()
    server.faults["new"] = ["429/3600"]
    summary = bring(server, tmp_path)
    assert summary.failures == ["new: the server says 429 (1 in a row)"], "nobody waits for an hour"


def test_no_more_connections_than_allowed(server: Server, tmp_path: Path) -> None:
    server.delay_s = 0.05
    for connections in (3, 8):
        server.most_at_once = 0
        bring(server, tmp_path / str(connections), manners=Manners(connections=connections))
        assert connections / 2 < server.most_at_once <= connections
    with pytest.raises(ValueError, match="expected 1 to 8, found 9"):
        Manners(connections=9)


def test_files_are_taken_from_the_list_as_they_are_needed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of millions is never in memory, and no more are waiting than the connections need."""
    server.publish({f"records500/{number:05d}.dat": b"%d" % number for number in range(120)})
    ahead = []

    def watched(*given: Any) -> Iterator[archives.Listed]:
        for taken, file in enumerate(chosen(*given)):
            ahead.append(taken - len(server.requests))
            yield file

    monkeypatch.setattr(download, "chosen", watched)
    assert bring(server, tmp_path).fetched == 120
    assert len(ahead) == 120
    assert max(ahead) <= 2 * QUICK.connections
    listing = tmp_path / "SHA256SUMS.txt"
    listing.write_text("".join(f"{number:064x} files/p1000/{number}.dat\n" for number in range(5_000)))
    tracemalloc.start()
    assert check(ARCHIVES["ptb_xl"], listing, ["files/*"]) == (5_000, 0)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


# ---- what cannot be had


def test_a_file_that_is_not_as_published_is_named_and_the_others_come(server: Server, tmp_path: Path) -> None:
    server.faults[DAT] = ["wrong bytes"] * 3
    server.files["gone"] = b"gone"
    server.publish({path: data for path, data in server.files.items() if path != "SHA256SUMS.txt"})
    del server.files["gone"]
    code, text = ecgfm("download", "ptb_xl", "--to", tmp_path, "--mirror", server.url)
    assert code == 1
    assert f"{DAT}: expected sha256 {hashlib.sha256(server.files[DAT]).hexdigest()}, found " in text
    assert "gone: no such file (404)" in text
    assert "2 failed; nothing is lost: run the same command to go on" in text
    assert there(tmp_path) == {path: data for path, data in server.files.items() if path != DAT}
    assert not list(tmp_path.rglob("*.partial")), "nothing of a wrong file is kept"
    server.files["gone"] = b"gone"
    server.requests.clear()
    summary = bring(server, tmp_path)
    assert summary.complete
    assert Counter(path for path, _, _ in server.requests) == {"SHA256SUMS.txt": 1, DAT: 1, "gone": 1}
    assert_whole(server, tmp_path)


def test_a_server_that_is_gone_ends_the_download(server: Server, tmp_path: Path) -> None:
    server.publish({f"records500/{number}": b"x" * number for number in range(120)})
    for path in list(server.files)[60:]:
        if path != "SHA256SUMS.txt":
            server.faults[path] = ["500"] * 9
    summary = bring(server, tmp_path, manners=Manners(backoff_s=0.001, attempts=3))
    assert summary.stopped.endswith("files in a row did not come")
    assert summary.fetched == 60
    assert 16 <= summary.n_failed < 50
    assert "is the server up?" in summary.in_words("ptb_xl", tmp_path)
    server.faults.clear()
    assert bring(server, tmp_path).fetched == 60
    assert_whole(server, tmp_path)


def test_a_wrong_address_is_one_line(server: Server, tmp_path: Path) -> None:
    quick = {"manners": Manners(backoff_s=0.001)}
    with pytest.raises(InputError, match=r"no list of files at .*/2.0/SHA256SUMS.txt: no such file \(404\)"):
        download.download("ptb_xl", tmp_path, server.url.replace("1.0", "2.0"), **quick)
    with pytest.raises(InputError, match=r"--mirror ftp://here: expected an address such as https://"):
        download.download("ptb_xl", tmp_path, "ftp://here", **quick)
    with pytest.raises(InputError, match="no download for 'ludb'; there is one for physionet2021, ptb_xl"):
        download.download("ludb", tmp_path)
    with pytest.raises(InputError, match=r"no list of files at http://127.0.0.1:1/x/SHA.*; check network and proxy"):
        download.download("ptb_xl", tmp_path, "http://user:secret@127.0.0.1:1/x", **quick)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a folder, found a file"):
        bring(server, tmp_path / "file")
    server.files["SHA256SUMS.txt"] = b"<html>Please log in</html>\n"
    with pytest.raises(InputError, match="line 1: expected a SHA-256 sum and a path, found '<html>"):
        bring(server, tmp_path)


def test_a_list_that_was_cut_short_is_told_and_asked_for_anew(server: Server, tmp_path: Path) -> None:
    whole = server.files["SHA256SUMS.txt"]
    server.files["SHA256SUMS.txt"] = whole[:-5]
    with pytest.raises(InputError, match="expected a SHA-256 sum and a path"):
        bring(server, tmp_path)
    server.files["SHA256SUMS.txt"] = whole
    assert bring(server, tmp_path).complete
    assert_whole(server, tmp_path)


def test_a_full_disk_is_one_line_and_nothing_is_half_made(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = [150_000]

    def append(part: transfer.Partial, chunk: bytes, whole: Callable[..., None] = transfer.Partial.append) -> None:
        room[0] -= len(chunk)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part.path))
        whole(part, chunk)

    with monkeypatch.context() as full:
        full.setattr(transfer.Partial, "append", append)
        code, text = ecgfm("download", "ptb_xl", "--to", tmp_path, "--mirror", server.url)
    assert code == 1
    assert text.count("\n") == 1
    assert "No space left on device" in text
    assert "run the same command again" in text
    visible = there(tmp_path)
    assert 1 < len(visible) < len(server.files)
    assert visible.items() <= server.files.items()
    assert bring(server, tmp_path).complete
    assert_whole(server, tmp_path)


# ---- lists and links that lead elsewhere


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/evil", "../evil", "a/../../evil", "a/./b", "a//b", "a\\..\\evil", ".ecgfm-download/files.sqlite"),
        *(".ECGFM-download/lock", "a/\x00b", "a/\x1b[2J", "x" * 300, "a/" * 600 + "b", "\udcff"),
    ],
)
def test_a_list_that_leads_elsewhere_is_refused_as_a_whole(server: Server, tmp_path: Path, path: str) -> None:
    server.files["SHA256SUMS.txt"] += b"%064x %s\n" % (0, path.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"line 28: expected a (path below the archive|SHA-256 sum)"):
        bring(server, tmp_path / "raw")
    assert set(there(tmp_path / "raw")) <= {"SHA256SUMS.txt"}
    assert not (tmp_path / "evil").exists()
    assert [asked for asked, _, _ in server.requests] == ["SHA256SUMS.txt"]


def test_links_do_not_lead_out_of_the_folder(server: Server, tmp_path: Path) -> None:
    raw, outside = tmp_path / "raw", tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_bytes(b"mine")
    raw.mkdir()
    (raw / "records100").symlink_to(outside)
    (raw / "LICENSE.txt").symlink_to(outside / "mine")
    summary = bring(server, raw)
    assert summary.n_failed == 12
    assert "is a link out of" in summary.failures[0]
    assert there(outside) == {"mine": b"mine"}
    assert not (raw / "LICENSE.txt").is_symlink(), "the link is replaced, not what it points at"
    (raw / "records100").unlink()
    (raw / "elsewhere").mkdir()
    (raw / "records100").symlink_to("elsewhere")
    assert bring(server, raw).complete, "a link within the folder is the user's affair"


def test_a_folder_where_a_file_should_be_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "LICENSE.txt").mkdir()
    (tmp_path / "records100").write_text("")
    summary = bring(server, tmp_path)
    assert summary.n_failed == 13
    assert any("LICENSE.txt is in the way: expected a file" in line for line in summary.failures)
    assert any("records100 is in the way: expected a folder" in line for line in summary.failures)


# ---- what is there already


def test_files_that_are_there_are_taken_over_if_they_are_right(server: Server, tmp_path: Path) -> None:
    for path, data in server.files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    (tmp_path / DAT).write_bytes(server.files[DAT][:-1] + b"?")
    summary = bring(server, tmp_path)
    assert (summary.fetched, summary.present) == (1, len(server.files) - 2)
    assert_whole(server, tmp_path)


def test_only_verify_sees_a_rotten_bit(server: Server, tmp_path: Path) -> None:
    bring(server, tmp_path)
    before = (tmp_path / DAT).stat()
    rotten = bytearray((tmp_path / DAT).read_bytes())
    rotten[99] ^= 1
    (tmp_path / DAT).write_bytes(rotten)
    os.utime(tmp_path / DAT, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert bring(server, tmp_path).fetched == 0
    assert bring(server, tmp_path, verify=True).fetched == 1
    assert_whole(server, tmp_path)
    os.utime(tmp_path / DAT)
    (tmp_path / "LICENSE.txt").unlink()
    assert bring(server, tmp_path).fetched == 1, "what was touched is hashed, what is missing comes"


def test_a_second_run_hashes_nothing(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring(server, tmp_path)
    hashed: list[Path] = []
    monkeypatch.setattr(download, "_hash", lambda path, _: hashed.append(path) or "")
    bring(server, tmp_path)
    assert hashed == []


def test_a_memory_that_is_damaged_is_one_line(server: Server, tmp_path: Path) -> None:
    bring(server, tmp_path)
    (tmp_path / HIDDEN / "files.sqlite").write_bytes(b"nonsense" * 999)
    with pytest.raises(InputError, match=r"files.sqlite: .*; remove it: files that are there are then hashed once"):
        bring(server, tmp_path)
    (tmp_path / HIDDEN / "files.sqlite").unlink()
    assert bring(server, tmp_path).fetched == 0


def test_two_downloads_into_a_folder_do_not_collide(server: Server, tmp_path: Path) -> None:
    with download._lock(tmp_path), pytest.raises(InputError, match=rf"another .* runs \(process {os.getpid()}\)"):
        bring(server, tmp_path)
    assert not there(tmp_path)
    assert bring(server, tmp_path).complete


# ---- a part of it, a look ahead, a proxy


def test_a_subset_comes_with_the_tables(server: Server, tmp_path: Path) -> None:
    wanted = {"SHA256SUMS.txt", "ptbxl_database.csv", "scp_statements.csv"}
    wanted |= {path for path in server.files if path.startswith("records500/")}
    bring(server, tmp_path, only=["records500/*.dat", "records500/*.hea"])
    assert set(there(tmp_path)) == wanted
    with pytest.raises(
        InputError, match=r"--only records50/\*: no file of PTB-XL, version 1.0.3 matches; a path there"
    ):
        bring(server, tmp_path, only=["records500/*", "records50/*"])
    assert bring(server, tmp_path).present == len(wanted) - 1


def test_a_dry_run_counts_and_makes_nothing(server: Server, tmp_path: Path) -> None:
    words = ("download", "ptb_xl", "--to", tmp_path / "raw", "--mirror", server.url, "--dry-run")
    total = sum(len(data) for path, data in server.files.items() if path != "SHA256SUMS.txt")
    code, text = ecgfm(*words)
    assert code == 0
    assert f"27 files, 0 of them in {tmp_path / 'raw'}, 27 to fetch ({download.in_bytes(total)}, from the si" in text
    assert " free there" in text
    assert not (tmp_path / "raw").exists()
    assert all(path == "SHA256SUMS.txt" for path, _, _ in server.requests), "sizes are asked for without bodies"
    bring(server, tmp_path / "raw", only=["records100/*"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    seen = download.outlook("ptb_xl", tmp_path / "raw", server.url)
    assert (seen.present, seen.missing) == (14, 13)
    assert seen.needed == sum(len(d) for p, d in server.files.items() if p.startswith("records500") or p[0] == "L")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    code, text = ecgfm(*words, "--only", "nothing")
    assert code == 2
    too_small = download.Outlook(2, 0, 2, 3_000_000, 0, 1_000_000).in_words("ptb_xl", tmp_path)
    assert "the disk is too small by 2.0 MB" in too_small


def test_an_estimate_is_near_the_truth(server: Server, tmp_path: Path) -> None:
    chance = random.Random(0)
    files = {f"{n}.dat": bytes(chance.randrange(900, 1100)) for n in range(400)} | {
        f"{n}.hea": b"x" for n in range(400)
    }
    server.publish(files)
    seen = download.outlook("ptb_xl", tmp_path, server.url)
    assert seen.asked == 2 * download.SAMPLES_PER_KIND
    assert seen.needed == pytest.approx(sum(map(len, files.values())), rel=0.1)


def test_the_proxy_of_the_environment_is_used(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.server_address[1]}")
    summary = download.download("ptb_xl", tmp_path, f"http://physionet.invalid{BASE}", manners=QUICK)
    assert summary.complete
    assert_whole(server, tmp_path)


# ---- killed and interrupted


def start(server: Server, folder: Path) -> subprocess.Popen[str]:
    """The real command."""
    command = [sys.executable, "-m", "flows.cli", "download", "ptb_xl", "--to", str(folder), "--mirror", server.url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], patience_s: float = 20) -> None:
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def test_killed_at_random_moments_it_ends_with_the_same_bytes(server: Server, tmp_path: Path) -> None:
    large = {f"records500/{number}.dat": noise(2_000_000 + number, number) for number in range(4)}
    small = {f"records100/{number}.dat": noise(20_000 + number, number) for number in range(40)}
    server.publish({**small, **large})
    total = sum(map(len, server.files.values()))
    server.bytes_per_s = 3_000_000
    chance = random.Random(5)
    for _ in range(3):
        goal = server.sent + chance.uniform(0.1, 0.25) * total
        running = start(server, tmp_path)
        wait_for(lambda goal=goal: server.sent > goal)
        running.kill()
        assert running.wait() == -signal.SIGKILL, "it was still at work"
        running.communicate()
        assert there(tmp_path).items() <= server.files.items(), "what is visible is whole"
    running = start(server, tmp_path)
    _, errors = running.communicate()
    assert running.returncode == 0, errors
    assert_whole(server, tmp_path)
    assert server.sent < 2 * total
    assert any(status == 206 for _, status, _ in server.requests), "a large file went on where it was"


def test_ctrl_c_ends_at_once_and_keeps_what_came(server: Server, tmp_path: Path) -> None:
    server.faults[DAT] = ["stall"]
    running = start(server, tmp_path)
    wait_for(lambda: len(there(tmp_path)) == len(server.files) - 1)
    running.send_signal(signal.SIGINT)
    asked = time.monotonic()
    _, errors = running.communicate(timeout=15)
    assert running.returncode == 130
    assert time.monotonic() - asked < 10, "though a server is waited for"
    assert errors == "interrupted; nothing is lost: run the same command to go on\n"
    server.requests.clear()
    assert bring(server, tmp_path).complete
    assert {path for path, _, _ in server.requests} == {"SHA256SUMS.txt", DAT}
    assert_whole(server, tmp_path)


# ---- CODE-15%, from Zenodo


def zipped(**members: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return packed.getvalue()


def publish_record(server: Server, **files: bytes) -> None:
    """A record in the form of Zenodo's API."""
    listed = [
        {"key": key, "size": len(data), "checksum": f"md5:{hashlib.md5(data).hexdigest()}"}
        for key, data in files.items()
    ]
    server.files = {f"files/{key}/content": data for key, data in files.items()}
    server.files[""] = json.dumps({"id": 4916206, "files": listed}).encode()


def bring_code15(server: Server, folder: Path, **options: Any) -> download.Summary:
    return download.download("code15", folder, server.url, manners=QUICK, **options)


def test_code15_is_unpacked_and_remembered(server: Server, tmp_path: Path) -> None:
    parts = {f"exams_part{number}.hdf5": noise(50_000, number) * 3 for number in range(3)}
    archive = {name.replace("hdf5", "zip"): zipped(**{name: data}) for name, data in parts.items()}
    publish_record(server, **{"exams.csv": b"exam_id\n1\n"}, **archive)
    server.faults["files/exams_part1.zip/content"] = ["truncate", "says too much", "wrong bytes", "sends too much"]
    seen = download.outlook("code15", tmp_path, server.url)
    assert (seen.missing, seen.asked) == (4, 0)
    assert seen.needed == 10 + sum(map(len, archive.values()))
    assert bring_code15(server, tmp_path).complete
    assert there(tmp_path) == {"exams.csv": b"exam_id\n1\n", **parts}
    assert bring_code15(server, tmp_path).fetched == 0
    os.utime(tmp_path / "exams_part0.hdf5")
    assert bring_code15(server, tmp_path, verify=True).fetched == 0, "what was unpacked is known by its own hash"
    (tmp_path / "exams_part0.hdf5").write_bytes(b"rotten")
    assert bring_code15(server, tmp_path).fetched == 1
    assert there(tmp_path) == {"exams.csv": b"exam_id\n1\n", **parts}
    assert bring_code15(server, tmp_path / "some", only=["*part2*"]).fetched == 2


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (zipped(**{"a.hdf5": b"a"}), r"expected a zip file with exams_part0.hdf5 in it, found 'a.hdf5'"),
        (zipped(**{"exams_part0.hdf5": b"a", "../evil": b"b"}), r"found 'exams_part0.hdf5', '../evil'"),
        (b"no zip file", "the zip file does not unpack: File is not a zip file"),
        (zipped(**{"exams_part0.hdf5": b"abc" * 99})[:60] + b"?" * 99, "the zip file does not unpack"),
        (zipped(**{"exams_part0.hdf5": noise(99, 0)}).replace(noise(99, 0), noise(99, 1)), "Bad CRC-32"),
    ],
)
def test_a_zip_file_that_is_not_as_expected_is_named(
    server: Server, tmp_path: Path, packed: bytes, message: str
) -> None:
    publish_record(server, **{"exams.csv": b"1", "exams_part0.zip": packed})
    summary = bring_code15(server, tmp_path / "raw")
    assert summary.n_failed == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(summary.failures[0])
    assert there(tmp_path / "raw") == {"exams.csv": b"1"}
    assert not list(tmp_path.rglob("*evil*"))
    assert not list(tmp_path.rglob("*.unpacked"))


def test_a_name_in_a_zip_file_is_no_place(server: Server, tmp_path: Path) -> None:
    publish_record(server, **{"exams.csv": b"1", "exams_part0.zip": zipped(**{"../../exams_part0.hdf5": b"signals"})})
    assert bring_code15(server, tmp_path / "deep" / "raw").complete
    assert there(tmp_path / "deep" / "raw") == {"exams.csv": b"1", "exams_part0.hdf5": b"signals"}
    assert not (tmp_path / "exams_part0.hdf5").exists()


@pytest.mark.parametrize(
    "record",
    [
        b"<html>",
        b"{}",
        b"[" * 100_000,
        b'{"files": [{"key": "../evil", "size": 1, "checksum": "md5:%032x"}]}' % 0,
        b'{"files": [{"key": "evil", "size": 1, "checksum": "md5:12"}]}',
        b'{"files": [{"key": "evil", "size": -1, "checksum": "md5:%032x"}]}' % 0,
    ],
)
def test_a_record_of_another_form_is_one_line(server: Server, tmp_path: Path, record: bytes) -> None:
    server.files[""] = record
    with pytest.raises(InputError, match="expected a record of Zenodo with names, sizes and MD5 sums, found "):
        bring_code15(server, tmp_path)
    assert not there(tmp_path)
