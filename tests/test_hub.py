"""`ecgfm checkpoint download`, from a hub of the test's own that answers as huggingface.co does."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from test_checkpoints import FINETUNED, PRETRAINED, as_published, model_of, published

from ecgfm import checkpoints, hub
from ecgfm.ecg import InputError
from ecgfm.published import MIMIC_IV_ECG_LABELS
from flows.server import free_port

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = hub.PUBLISHED["ecg-fm"]
LABELLED = dataclasses.replace(FINETUNED, labels=tuple(MIMIC_IV_ECG_LABELS), aggregation=MIMIC_IV_ECG_LABELS)


class Hub(ThreadingHTTPServer):
    """A hub with one repository: file names are resolved to a store of blobs elsewhere, by their SHA-256.

    asked: of each request for bytes the range it wanted, "" for all
    break_after: so many bytes of an answer come, then the connection ends; for the first of these answers
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.store = f"http://localhost:{self.server_port}"  # another host to the library
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        for name, content in files.items():
            self.offer(name, content)
        self.asked: list[str] = []
        self.requests = 0
        self.break_after: list[int] = []

    def offer(self, name: str, content: bytes) -> None:
        self.files[name] = content
        self.blobs[hashlib.sha256(content).hexdigest()] = content


class Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.server.requests += 1
        prefix = f"/{WEIGHTS.repository}/resolve/main/"
        content = self.server.files.get(self.path.removeprefix(prefix))
        if not self.path.startswith(prefix):
            self.answer(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif content is None:
            self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            sha256 = hashlib.sha256(content).hexdigest()
            told = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
            self.answer(302, told | {"Location": f"{self.server.store}/blobs/{sha256}"})

    def do_GET(self) -> None:
        self.server.requests += 1
        content = self.server.blobs[self.path.removeprefix("/blobs/")]
        wanted = self.headers.get("Range", "")
        self.server.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        part = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if wanted else {}
        self.answer(206 if wanted else 200, part, content[start:])

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.server.break_after:
            body = body[: self.server.break_after.pop(0)]
            self.close_connection = True
        self.wfile.write(body)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Published files of a tiny network."""
    folder = tmp_path_factory.mktemp("published")
    return {
        WEIGHTS.pretrained: published(folder, as_published(PRETRAINED)).read_bytes(),
        WEIGHTS.finetuned: published(folder, as_published(LABELLED)).read_bytes(),
    }


@pytest.fixture
def running(files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub(files) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()


class User:
    """Somebody with a folder and a cache."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder, self.endpoint = folder, endpoint
        self.cache = folder / "hub-home"

    def __call__(self, *words: str, most_bytes: int = resource.RLIM_INFINITY, **environment: str) -> tuple[int, str]:
        """Exit code of `ecgfm checkpoint download`, and what it printed; of an error alone the line of it."""
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        done = subprocess.run(
            [sys.executable, "-m", "flows", "checkpoint", "download", *words],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env=kept | {"PYTHONPATH": str(Path(hub.__file__).parents[1])} | ours | environment,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY)),
        )
        if not done.returncode:
            return 0, done.stdout
        assert "Traceback" not in done.stderr, done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, done.stderr
        assert done.stderr.splitlines()[-1] == errors[0]
        return done.returncode, errors[0].removeprefix("error: ")

    def parts(self) -> list[str]:
        """What is left of a transfer that did not end."""
        return [path.name for path in self.cache.rglob("*.incomplete")]


@pytest.fixture
def user(tmp_path: Path, running: Hub) -> User:
    return User(tmp_path, running.address)


def test_the_encoder_becomes_a_checkpoint_of_ours_and_comes_once(user: User, running: Hub) -> None:
    code, told = user("ecg-fm")
    assert code == 0
    assert told.count(WEIGHTS.licence) == told.count(WEIGHTS.citation) == 1
    sha256 = hashlib.sha256(running.files[WEIGHTS.pretrained]).hexdigest()
    assert f"commit   {COMMIT}, " in told
    assert f"SHA-256 {sha256}, as the hub says" in told
    found = checkpoints.load(user.folder / "ecg-fm-pretrained")
    assert found.meta.labels == ()
    assert checkpoints.digest(found.state) == checkpoints.digest(dict(model_of(PRETRAINED).state_dict()))
    assert found.meta.progress["converted_from_sha256"] == sha256
    assert running.asked == [""]

    code, _ = user("ecg-fm", "--to", "again")
    assert (code, running.asked) == (0, [""])
    code, _ = user("ecg-fm", "--to", "offline", HF_HUB_OFFLINE="1", HF_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    assert code == 0
    for name in ("again", "offline"):
        assert (user.folder / name / "meta.json").read_bytes() == (
            user.folder / "ecg-fm-pretrained" / "meta.json"
        ).read_bytes()


def test_the_classifier_knows_its_labels(user: User) -> None:
    code, told = user("ecg-fm", "--finetuned")
    assert code == 0
    found = checkpoints.load(user.folder / "ecg-fm-finetuned")
    assert (found.kind, found.meta.labels) == ("finetuned", tuple(MIMIC_IV_ECG_LABELS))
    assert found.meta.aggregation == MIMIC_IV_ECG_LABELS
    assert "Supraventricular tachycardia with aberrancy" in told


def test_a_transfer_that_breaks_off_goes_on_where_it_was(user: User, running: Hub, tmp_path: Path) -> None:
    from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE  # what it writes at once, and keeps

    large = as_published(PRETRAINED) | {
        "extra_state": {"iterator": torch.zeros(3 * DOWNLOAD_CHUNK_SIZE, dtype=torch.uint8)}
    }
    running.offer(WEIGHTS.pretrained, published(tmp_path, large).read_bytes())
    running.break_after = [3 * DOWNLOAD_CHUNK_SIZE // 2, DOWNLOAD_CHUNK_SIZE + 1]
    code, told = user("ecg-fm")
    while code and len(running.asked) < 3:  # versions of the library go on by themselves, or when they are run again
        code, told = user("ecg-fm")
    assert code == 0
    assert running.asked == ["", f"bytes={DOWNLOAD_CHUNK_SIZE}-", f"bytes={2 * DOWNLOAD_CHUNK_SIZE}-"]
    assert "as the hub says" in told
    assert checkpoints.load(user.folder / "ecg-fm-pretrained").kind == "pretrained"
    assert user.parts() == []


def test_a_transfer_that_gets_no_further_is_given_up_in_a_line(user: User, running: Hub) -> None:
    running.break_after = [0] * 20
    code, told = user("ecg-fm")
    assert code == 2
    assert f"the transfer from {running.address} failed" in told
    assert told.endswith("; run the same command again")
    assert 0 < len(running.asked) < 20
    assert not (user.folder / "ecg-fm-pretrained").exists()
    running.break_after = []
    assert user("ecg-fm")[0] == 0


def test_other_bytes_of_the_same_length_are_noticed(user: User, running: Hub) -> None:
    whole = dict(running.blobs)
    sha256 = hashlib.sha256(running.files[WEIGHTS.pretrained]).hexdigest()
    damaged = bytearray(whole[sha256])
    damaged[len(damaged) // 2] ^= 1
    running.blobs[sha256] = bytes(damaged)
    code, told = user("ecg-fm")
    assert code == 2
    assert f"expected SHA-256 {sha256}, found {hashlib.sha256(damaged).hexdigest()}" in told
    assert not (user.folder / "ecg-fm-pretrained").exists()
    running.blobs = whole
    assert user("ecg-fm")[0] == 0  # what was damaged is not taken from the cache


def test_offline_without_the_file_is_told(user: User, running: Hub) -> None:
    code, told = user("ecg-fm", HF_HUB_OFFLINE="1")
    assert code == 2
    assert "HF_HUB_OFFLINE is set" in told
    assert str(user.cache) in told
    assert running.requests == 0


def test_nobody_there_is_told(user: User) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    code, told = user("ecg-fm", HF_ENDPOINT=nowhere)
    assert code == 2
    assert f"no answer from {nowhere} (" in told
    assert "HF_ENDPOINT names a mirror" in told


def test_no_such_file_or_repository_is_told(user: User, running: Hub) -> None:
    del running.files[WEIGHTS.pretrained]
    code, told = user("ecg-fm")
    assert code == 2
    assert f"has no file {WEIGHTS.pretrained} in {WEIGHTS.repository}" in told
    code, told = user("ecg-fm", HF_ENDPOINT=f"{running.address}/elsewhere")
    assert code == 2
    assert f"has no repository {WEIGHTS.repository}" in told


def test_a_full_disk_is_told(user: User, running: Hub) -> None:
    code, told = user("ecg-fm", most_bytes=len(running.files[WEIGHTS.pretrained]) // 2)
    assert code == 1
    assert told.endswith("nothing is lost: run the same command again when mended")
    assert not (user.folder / "ecg-fm-pretrained").exists()


def test_what_cannot_be_written_is_not_fetched(user: User, running: Hub) -> None:
    (user.folder / "ecg-fm-pretrained").mkdir()
    assert user("ecg-fm")[1].endswith("is there already; name a new directory")
    assert "no folder" in user("ecg-fm", "--to", "a/b")[1]
    assert user("ecg-gm")[1] == "ecg-gm: no published weights of that name are known; known: ecg-fm"
    assert running.requests == 0


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"needs huggingface_hub: pip install 'ecgfm\[huggingface\]'"):
        hub.bring(WEIGHTS.repository, WEIGHTS.pretrained)
