"""`ecgfm doctor`: what is there, what is missing, and a command for it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ecgfm import doctor
from ecgfm.doctor import (
    EXTRAS,
    GB,
    Finding,
    Torch,
    check_disk,
    check_extra,
    check_gpu,
    check_libraries,
    check_memory,
    check_python,
    check_server,
    check_threads,
    check_torch,
    examine,
    in_words,
    works,
)
from flows import server

ROOT = Path(__file__).parent.parent
PIP = "python -m pip install"
CPU = Torch("2.8.0+cpu", threads=8)
CUDA = Torch("2.8.0", cuda="12.8", threads=8)
BROKEN = Torch(failure="libcudart.so.12: cannot open shared object file")
ALL = {"defusedxml": "0.7.1", "pydicom": "3.0.1", "huggingface-hub": "1.2.0", "onnx": "1.18.0"}


def test_the_extras_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    collections = {"dev", "formats", "docs"}  # for work on the package, or of others
    assert {extra: list(needed) for extra, (_, needed) in EXTRAS.items()} == {
        extra: needed for extra, needed in extras.items() if extra not in collections
    }
    assert doctor.OLDEST_PYTHON == (3, 11)
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"] == ">=3.11"


SOUND: list[Callable[[], Finding]] = [
    lambda: check_python((3, 11, 0), "/usr/bin/python3"),
    lambda: check_libraries(["pydicom>=3.0", "tomli; python_version < '3.11'"], ALL, PIP),
    lambda: check_torch(CPU, PIP),
    lambda: check_gpu(Torch("2.8.0", "12.8", (("H100", 80 * GB),)), ["/dev/nvidia0"], PIP),
    lambda: check_gpu(CPU, [], PIP),
    lambda: check_gpu(Torch("2.8.0", mps=True), [], PIP),
    lambda: check_threads(8, 8, 8, None),
    lambda: check_memory(8 * GB),
    lambda: check_disk(Path("data"), 100 * GB, True),
    lambda: check_server(None, False, "", False),
    lambda: check_server("http://127.0.0.1:4200/api", True, "", True),
    lambda: check_extra("huggingface", ALL, PIP),  # _ and - are one to pip
]


@pytest.mark.parametrize("check", SOUND)
def test_what_works_needs_no_mending(check: Callable[[], Finding]) -> None:
    found = check()
    assert (found.state, found.mend) == ("ok", "")
    assert found.found


# what is found -> state, words of it, the command, whether nothing works without it
UNSOUND: list[tuple[Callable[[], Finding], str, str, str, bool]] = [
    (lambda: check_python((3, 10, 4), "p"), "wrong", "3.10.4", "rm -rf .venv && make install PYTHON=python3.11", True),
    (lambda: check_libraries([], ALL, PIP), "missing", "not installed", f"{PIP} -e .", True),
    (
        lambda: check_libraries(["h5py>=3.11", "pydicom>=4,<5"], ALL, PIP),
        "missing",
        "h5py is not installed, pydicom 3.0.1 (expected <5,>=4)",
        f"{PIP} 'h5py>=3.11' 'pydicom<5,>=4'",
        True,
    ),
    (lambda: check_libraries(["pydicom>=4"], ALL, PIP), "wrong", "pydicom 3.0.1", f"{PIP} 'pydicom>=4'", True),
    (lambda: check_torch(BROKEN, PIP), "wrong", "libcudart", f"{PIP} --force-reinstall torch", True),
    (
        lambda: check_gpu(CPU, ["/dev/nvidia0"], PIP),
        "wrong",
        "built for the CPU",
        f"{PIP} --force-reinstall torch --index-url https://pypi.org/simple",
        False,
    ),
    (lambda: check_gpu(CUDA, ["/dev/nvidia0"], PIP), "wrong", "the driver is too old", "nvidia-smi", False),
    (
        lambda: check_gpu(BROKEN, ["/dev/nvidia0"], PIP),
        "wrong",
        "torch does not work",
        f"{PIP} --force-reinstall torch",
        False,
    ),
    (lambda: check_threads(2, 64, 64, "64"), "wrong", "2 of 64 CPUs", "unset OMP_NUM_THREADS", False),
    (lambda: check_memory(2 * GB), "wrong", "2.0 GB", "OMP_NUM_THREADS=1", False),
    (lambda: check_disk(Path("a b"), GB // 2, True), "wrong", "0.5 GB", "ecgfm gc --data-dir 'a b'", True),
    (lambda: check_disk(Path("/root/x"), 9 * GB, False), "wrong", "/root/x", "export ECGFM_DATA_DIR", True),
    (lambda: check_server("http://a/api", False, "", True), "wrong", "http://a/api", "unset PREFECT_API_URL", True),
    (
        lambda: check_server("http://a/api", False, "", False),
        "wrong",
        "does not answer",
        "prefect config unset PREFECT_API_URL --yes",
        True,
    ),
    (lambda: check_server(None, False, "not TOML", False), "wrong", "not TOML", "prefect profile inspect", True),
    (lambda: check_extra("edf", ALL, PIP), "missing", "edfio is not installed", f"{PIP} 'edfio>=0.4.8'", False),
    (
        lambda: check_extra("onnx", ALL, PIP),
        "missing",
        "onnxscript is not installed, onnxruntime is not installed",
        f"{PIP} 'onnxscript>=0.5.4' 'onnxruntime>=1.22'",
        False,
    ),
    (
        lambda: check_extra("xml", {"defusedxml": "0.6"}, PIP),
        "wrong",
        "defusedxml 0.6 (expected >=0.7)",
        f"{PIP} 'defusedxml>=0.7'",
        False,
    ),
]


@pytest.mark.parametrize(("check", "state", "words", "mend", "required"), UNSOUND)
def test_what_does_not_work_has_a_command(
    check: Callable[[], Finding], state: str, words: str, mend: str, required: bool
) -> None:
    found = check()
    assert (found.state, found.required) == (state, required)
    assert words in found.found
    assert mend in found.mend
    assert subprocess.run(["sh", "-n", "-c", found.mend], check=False).returncode == 0  # a command, not advice


def test_only_what_is_required_makes_it_fail() -> None:
    torch, edf = check_torch(BROKEN, PIP), check_extra("edf", ALL, PIP)
    assert works([check_torch(CPU, PIP), edf])
    assert not works([torch, check_extra("xml", ALL, PIP)])
    assert in_words([torch, edf])[-1].startswith("does not work without: torch; ")
    assert in_words([check_torch(CPU, PIP), edf])[-1].startswith("all that is required works; ")
    assert f"$ {edf.mend}" in "\n".join(in_words([torch, edf]))


def test_what_pip_is_asked_for_is_what_was_missing() -> None:
    found = check_extra("ray", {}, PIP)
    asked = [Requirement(word) for word in shlex.split(found.mend.removeprefix(PIP))]
    assert asked == [Requirement(word) for word in EXTRAS["ray"][1]]


@pytest.fixture
def api() -> Iterator[str]:
    """A server that is well."""

    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Healthy) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/api"
        running.shutdown()


def test_a_server_answers_or_does_not(api: str) -> None:
    assert server.answers(api)
    assert not server.answers(f"http://127.0.0.1:{server.free_port()}/api")
    assert not server.answers("no address")


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    return subprocess.run(
        [sys.executable, "-m", "flows", "doctor", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=kept | environment,
    )


def test_this_machine_is_told_as_it_is(api: str, tmp_path: Path) -> None:
    """The whole of it, as a user runs it: tests run where all that is required works."""
    done = run("--json", "--data-dir", str(tmp_path / "not" / "there"), PREFECT_API_URL=api)
    assert done.stderr == ""
    found = {one["name"]: one for one in json.loads(done.stdout)}
    assert list(found) == [
        *("Python", "libraries", "torch", "GPU", "threads", "memory", "disk", "Prefect", "server"),
        *EXTRAS,
    ]
    assert done.returncode == 0, [one for one in found.values() if one["required"] and one["state"] != "ok"]
    assert found["Python"]["found"] == f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}"
    assert found["server"]["found"] == f"{api} answers"
    assert not (tmp_path / "not").exists()  # a look changes nothing


def test_a_server_that_does_not_answer_is_an_exit_code_and_a_line(tmp_path: Path) -> None:
    away = f"http://127.0.0.1:{server.free_port()}/api"
    done = run("--data-dir", str(tmp_path), PREFECT_API_URL=away)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    where = next(number for number, line in enumerate(lines) if away in line)
    assert lines[where].split()[:2] == ["wrong", "server"]
    assert lines[where + 1].split() == ["$", "unset", "PREFECT_API_URL"]
    assert lines[-1].startswith("does not work without: server")


def test_findings_of_this_process_are_plain_values(tmp_path: Path) -> None:
    findings = examine(tmp_path, None, False, "profiles.toml: not TOML")
    assert all(one.state == "ok" or one.mend for one in findings)
    assert json.loads(json.dumps([asdict(one) for one in findings]))[0]["name"] == "Python"
    assert not works(findings)
