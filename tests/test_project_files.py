"""What stands beside the code is true: citation, licence, changelog, and the commands that contributors are told."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from ecgfm import __version__
from ecgfm.hub import PUBLISHED
from flows.cli import app

ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return found


def test_the_citation_is_of_this_version(project: dict[str, Any]) -> None:
    """The keys are those that the Citation File Format 1.2.0 requires, and ours."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == __version__ == project["project"]["version"]
    assert citation["title"] == project["project"]["name"]
    assert citation["type"] == "software"
    assert citation["license"] == "MIT"
    assert all(
        one.keys() & {"name", "family-names"} for of in (citation, *citation["references"]) for one in of["authors"]
    )
    assert all({"type", "title", "authors"} <= reference.keys() for reference in citation["references"])


def test_the_license_and_the_notice_travel_with_the_package(project: dict[str, Any]) -> None:
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License\n")
    assert "The ecgfm authors" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert project["project"]["license-files"] == ["LICENSE", "NOTICE"]
    included = set(project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])
    beside = {"NOTICE", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md"}
    assert beside <= included
    assert all((ROOT / name).exists() for name in included)


def test_the_notice_names_what_is_downloaded_and_computed() -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for weights in PUBLISHED.values():
        assert weights.repository in notice
        assert weights.citation.rpartition("doi:")[2] in notice
    for identifier in ("2006.11477", "2005.13249", "2203.06889", "zenodo.4916206", "s41597-020-0495-6", "SNOMED CT"):
        assert identifier in notice


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## \[(.+?)\] - (unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0][0] == __version__


def commands(text: str) -> list[list[str]]:
    """The words of each command in the shell blocks of a page, without their comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


def missing_of(words: list[str]) -> str:
    """What a command names that does not exist, or empty."""
    program, *rest = words
    if program == "make":
        targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
        return " ".join(set(rest) - targets)
    if program == ".venv/bin/python":
        files = [word for word in rest if word.startswith("tests/")]
        return " ".join(name for name in files if not (ROOT / name).is_file()) if rest[:2] == ["-m", "pytest"] else "-m"
    if program == ".venv/bin/ruff":
        return "" if rest in (["format"], ["check"]) else " ".join(rest)
    if program != ".venv/bin/ecgfm":
        return program
    command: Any = typer.main.get_command(app)
    while rest and hasattr(command, "commands"):
        name = rest.pop(0)
        if name not in command.commands:
            return name
        command = command.commands[name]
    options = {option for parameter in command.params for option in parameter.opts}
    return " ".join(word for word in rest if word.startswith("--") and word not in options)


def test_every_command_that_contributors_are_told_exists() -> None:
    told = commands(CONTRIBUTING)
    assert len(told) > 10
    assert {words[0] for words in told} == {"make", ".venv/bin/python", ".venv/bin/ecgfm", ".venv/bin/ruff"}
    assert [missing for words in told if (missing := missing_of(words))] == []


@pytest.mark.parametrize(
    "line",
    [
        "make everything",
        ".venv/bin/ecgfm diagnose",
        ".venv/bin/ecgfm label guess x",
        ".venv/bin/ecgfm plan demo --nothing",
        ".venv/bin/python -m pytest tests/test_nothing.py",
        "tox",
    ],
)
def test_a_command_that_does_not_exist_would_be_noticed(line: str) -> None:
    assert missing_of(shlex.split(line))


def test_every_file_that_contributors_are_told_of_exists() -> None:
    linked = re.findall(r"\]\(([^)#:]+)\)", CONTRIBUTING)
    named = [
        name for name in re.findall(r"`([\w./-]+)`", CONTRIBUTING) if "/" in name or name.endswith((".toml", ".md"))
    ]
    assert len(linked) >= 3
    assert len(named) > 15
    assert [name for name in [*linked, *named] if not (ROOT / name).exists()] == []
