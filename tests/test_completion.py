"""The Tab key: what is offered, that a shell gets it, and that it comes soon."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ecgfm.archives import ARCHIVES
from ecgfm.pipeline import STAGE_NAMES
from ecgfm.pipelines_file import read_pipelines
from flows.cli import app
from flows.commands.options import PIPELINES

BIN = Path(sys.executable).parent


def offered(line: str) -> list[str]:
    """What bash would be offered for the last word of a line."""
    words = line.split(" ")
    environment = {"_ECGFM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    return CliRunner().invoke(app, env=environment, prog_name="ecgfm").output.split()


def test_commands_and_options_are_offered() -> None:
    assert offered("ecgfm ru") == ["run", "runs"]
    assert offered("ecgfm checkpoint d") == ["download"]
    assert offered("ecgfm run demo --dry") == ["--dry-run"]
    assert offered("ecgfm embed a b --level s") == ["segment"]


def test_the_pipelines_of_the_file_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert offered("ecgfm run ") == list(read_pipelines(PIPELINES))
    (tmp_path / "pipelines.yaml").write_text("mine: {sources: [synthetic]}\nmore: {sources: [synthetic]}\n")
    assert offered("ecgfm plan m") == ["mine", "more"]
    assert offered("ecgfm serve mine m") == ["more"]
    (tmp_path / "other.yaml").write_text("others: {sources: [synthetic]}\n")
    assert offered("ecgfm audit --pipelines other.yaml ") == ["others"]


@pytest.mark.parametrize("content", [b"no mapping", b"a: [", b"\xff\xfe", None])
def test_a_pipelines_file_that_cannot_be_read_offers_nothing_and_says_why(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "broken.yaml"
    file.mkdir() if content is None else file.write_bytes(content)
    assert offered("ecgfm run --pipelines broken.yaml ") == []
    asked = CliRunner().invoke(app, ["plan", "mine", "--pipelines", "broken.yaml"])
    assert asked.exit_code == 2
    assert asked.stderr.startswith("error: broken.yaml: ")


def test_stages_sources_sets_and_devices_are_offered() -> None:
    for option in ("--only", "--from", "--force"):
        assert offered(f"ecgfm run demo {option} ") == list(STAGE_NAMES)
    assert offered("ecgfm stages --stage pre") == ["prepare", "pretrain"]
    assert offered("ecgfm download ") == list(ARCHIVES)
    assert "ecg-fm-17" in offered("ecgfm label reports.csv --labels ")
    assert offered("ecgfm predict a b --device c") == ["cpu", "cuda"]


def test_the_runs_of_the_data_directory_are_offered(tmp_path: Path) -> None:
    for run in ("demo/2026-01-02T03-04-05Z", "demo/2026-02-02T03-04-05Z", "mine/2026-01-02T03-04-05Z"):
        (tmp_path / "runs" / run).mkdir(parents=True)
    assert offered(f"ecgfm runs --data-dir {tmp_path} ")[:2] == ["demo", "mine"]
    assert offered(f"ecgfm runs --data-dir {tmp_path} demo/") == [
        "demo/latest",
        "demo/2026-02-02T03-04-05Z",
        "demo/2026-01-02T03-04-05Z",
    ]
    assert offered(f"ecgfm runs --data-dir {tmp_path} --keep mine/2") == ["mine/2026-01-02T03-04-05Z"]
    assert offered(f"ecgfm runs --data-dir {tmp_path / 'nothing'} ") == []


@pytest.mark.parametrize(("shell", "file"), [("bash", ".bashrc"), ("zsh", ".zshrc")])
def test_completion_installs_itself(shell: str, file: str, tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    words = [BIN / "ecgfm", "--install-completion", shell]
    subprocess.run(words, check=True, env=environment, capture_output=True, timeout=60)
    assert (tmp_path / file).exists()
    scripts = [path.read_text() for path in tmp_path.rglob("*") if path.is_file() and "ecgfm" in path.name]
    assert any(f"complete_{shell}" in script for script in scripts)


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes(tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    environment["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    script = (
        'source <(ecgfm --show-completion bash); COMP_WORDS=(ecgfm run de); COMP_CWORD=2; "$(complete -p ecgfm | '
        'sed -E \'s/.*-F (\\S+) .*/\\1/\')" ecgfm; echo "${COMPREPLY[*]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script], check=True, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "demo\n"


def test_what_is_offered_comes_without_the_heavy_libraries(tmp_path: Path) -> None:
    """Half a second of imports is what a Tab costs: neither torch nor prefect nor polars is among them."""
    program = (
        "import sys\nfrom flows.cli import app\n"
        "try:\n    app(prog_name='ecgfm')\n"
        "except SystemExit:\n    print(*{'torch', 'prefect', 'polars', 'sklearn', 'matplotlib'} & sys.modules.keys())\n"
    )
    environment = os.environ | {"_ECGFM_COMPLETE": "complete_bash", "COMP_WORDS": "ecgfm run de", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.split() == ["demo"]
