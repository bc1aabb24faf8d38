"""The pages: what they tell to type is typed, and what they show is what comes.

A block ```sh or ```python of a page in `RUN` is run, top to bottom, all blocks of a page in one folder; a ```text block
right after it is what it printed. Comments before a block say what to do with it:

    <!-- skip: REASON -->              not run; its `ecgfm` commands are parsed as those of every page
    <!-- file: NAME -->                written as a file of that name
    <!-- fails -->                     ends with an error; what it says is what was printed
    <!-- stable -->                    of a ```text block: exactly what was printed
    <!-- stable: beginning -->         how it begins
    <!-- stable: but for numbers -->   every number may be another
    <!-- stable: beginning, but for numbers -->
    <!-- shared rules: MODULE BUILDER -->  tests/test_sources.py is run over that source

ECGFM_DOCS_TIMES=FILE has the seconds of every block that was run written to FILE, as tab-separated lines.
Pages are run with a pipelines.yaml of `small_pipelines` in the folder, which `ecgfm` takes before its own: a
smaller network, a quicker evaluation. The commands are those of the page, to the letter. The page calls its folder
/home/you. What `BEGINS` makes for a page is there when it begins.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_demo
import typer
import yaml
from page_folders import own_folders, published_ptb_xl, raw_ptb_xl
from typer.main import get_command

from ecgfm.config import from_dict
from ecgfm.ecg import InputError
from ecgfm.pipelines_file import Pipeline
from ecgfm.reports.vocabulary import Vocabulary
from ecgfm.sources import own_config
from flows.cli import app
from flows.commands.options import PIPELINES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
COMMANDS: Any = get_command(app)
RUN = (
    "index",
    "quickstart",
    "own-data",
    "from-ecg-fm",
    "adding-a-source",
    "glossary",
    "prepare-dataset",
    "pretraining",
    "training",
    "sources",
    "runners",
    "labeler",
    "answers",
    "finetuning",
    "orchestration",
)
AFTER = {  # page -> the page in whose folder it goes on
    "own-data": "quickstart",
    "from-ecg-fm": "quickstart",
    "pretraining": "prepare-dataset",
    "training": "pretraining",
    "labeler": "quickstart",
    "answers": "quickstart",
    "finetuning": "quickstart",
    "orchestration": "quickstart",
}
BEGINS: dict[str, Callable[[Path], AbstractContextManager[None]]] = {  # page -> what it finds, until it is done
    "prepare-dataset": published_ptb_xl,
    "sources": own_folders,
    "runners": raw_ptb_xl,
}

_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=fence)\s*$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!-- ([\w ]+?)(?:: ([^>]*?))? -->")
_NUMBER = re.compile(r"\d[\d,]*(\.\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what the comments before it say, and the line where it begins."""

    language: str
    text: str
    marks: dict[str, str]
    line: int
    follows: bool  # nothing but comments stands between it and the block before


def blocks(markdown: str) -> list[Block]:
    found, end = [], 0
    for match in _FENCE.finditer(markdown):
        between = markdown[end : match.start()]
        near = between.rpartition("\n\n")[2] if "\n\n" in between.strip("\n") else between
        marks = {name: value or "" for name, value in _COMMENT.findall(near)}
        follows = not _COMMENT.sub("", between).strip()
        line = markdown.count("\n", 0, match.start()) + 1
        found.append(Block(match["language"], match["text"], marks, line, follows))
        end = match.end()
    return found


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


# ---- running the pages


def small_pipelines() -> dict[str, Any]:
    """Our own pipelines, with a `demo` and a `ptb-xl` that take seconds."""
    small = yaml.safe_load(small_demo.PIPELINES)["small"]
    pipelines: dict[str, Any] = yaml.safe_load(PIPELINES.read_text())
    demo = pipelines["demo"]
    demo["prepare"] = {"workers": 1}
    demo["pretrain"] = small["pretrain"]
    demo["finetune"] |= {"device": "cpu"}
    demo["evaluate"] = {
        **{"bootstrap_samples": 20, "lead_subsets": False, "probe_random_encoder": False},
        **{"drawn_records": 0, "supervised_baseline": False, "device": "cpu"},
    }
    ptb_xl = pipelines["ptb-xl"]
    ptb_xl["prepare"] = {"workers": 1}
    ptb_xl["pretrain"] = {**small["pretrain"], "max_steps": 60, "valid_every": 30, "save_every": 30}
    ptb_xl["finetune"] = {**small["finetune"], "max_epochs": 1}
    return pipelines


def run_page(name: str, folder: Path, seconds: dict[str, float]) -> None:
    """Run the blocks of a page, and compare what they print with what the page shows.

    seconds: where a block begins -> how long it took; each that is run is added
    """
    environment = small_demo.environment() | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "MPLCONFIGDIR": str(folder / ".matplotlib"),
        "LC_ALL": "C",  # the order of ls
    }
    printed = None
    for block in blocks(page(name)):
        where = f"docs/{name}.md:{block.line}"
        if "skip" in block.marks:
            printed = None
        elif "file" in block.marks:
            (folder / block.marks["file"]).write_text(block.text, encoding="utf-8")
        elif block.language in ("sh", "python"):
            words = ["bash", "-euo", "pipefail", "-c"] if block.language == "sh" else [sys.executable, "-c"]
            began = time.monotonic()
            done = subprocess.run(
                [*words, block.text],
                check=False,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=200,
            )
            seconds[where] = time.monotonic() - began
            fails = "fails" in block.marks
            assert (done.returncode != 0) == fails, f"{where}\n{done.stdout}\n{done.stderr}"
            printed = (done.stdout + done.stderr * fails).replace(str(folder), "/home/you")
        elif block.language == "text" and "stable" in block.marks:
            assert block.follows, f"{where}: which block printed this?"
            assert printed is not None, f"{where}: the block before it was not run"
            compare(block.text, printed, block.marks["stable"], where)


def compare(shown: str, printed: str, how: str, where: str) -> None:
    """What a page shows against what was printed."""
    hows = set(how.split(", ")) if how else set()
    assert hows <= {"beginning", "but for numbers"}, f"{where}: stable: {how}?"
    if "beginning" in hows:
        printed = "".join(printed.splitlines(keepends=True)[: shown.count("\n")])
    if "but for numbers" in hows:
        shown, printed = _NUMBER.sub("0", shown), _NUMBER.sub("0", printed)
    assert printed == shown, where


@pytest.fixture(scope="module")
def seconds() -> Iterator[dict[str, float]]:
    """Block -> its seconds; at the end of the pages, in the file that the environment names."""
    taken: dict[str, float] = {}
    yield taken
    if file := os.environ.get("ECGFM_DOCS_TIMES"):
        Path(file).write_text("".join(f"{where}\t{took:.1f}\n" for where, took in taken.items()), encoding="utf-8")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory, seconds: dict[str, float]) -> Callable[[str], Path]:
    """Runs a page, those before it that it goes on from first; gives the folder in which it ran. Each runs once."""
    ran: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in ran:
            folder = tmp_path_factory.mktemp(name) / "folder"
            if name in AFTER:
                shutil.copytree(run(AFTER[name]), folder, symlinks=True)
            else:
                folder.mkdir()
                (folder / "pipelines.yaml").write_text(yaml.safe_dump(small_pipelines(), sort_keys=False))
            with BEGINS[name](folder) if name in BEGINS else nullcontext():
                run_page(name, folder, seconds)
            ran[name] = folder
        return ran[name]

    return run


@pytest.mark.parametrize("name", RUN)
def test_what_a_page_tells_to_do_does_what_it_shows(name: str, folder_of: Callable[[str], Path]) -> None:
    assert any(block.language in ("sh", "python") for block in blocks(page(name))) or name in ("index", "glossary")
    folder_of(name)


def test_a_block_that_fails_or_prints_something_else_is_found(tmp_path: Path) -> None:
    for shown, printed, how in (
        ("a 1\n", "a 2\n", ""),
        ("a\n", "b\na\n", "beginning"),
        ("a 1\n", "b 2\n", "but for numbers"),
    ):
        with pytest.raises(AssertionError):
            compare(shown, printed, how, "here")
    compare("a 1.5 s\n", "a 1,234 s\n", "but for numbers", "here")
    compare("a\n", "a\nb\n", "beginning", "here")
    compare("a 1\n", "a 2\nb\n", "beginning, but for numbers", "here")
    text = (
        "x\n\n<!-- skip: far -->\n```sh\nfalse\n```\n\n<!-- stable -->\n```text\nno\n```\n\nword\n\n```text\nyes\n```\n"
    )
    assert [(b.language, b.marks, b.line, b.follows) for b in blocks(text)] == [
        ("sh", {"skip": "far"}, 4, False),
        ("text", {"stable": ""}, 9, True),
        ("text", {}, 15, False),
    ]


def test_a_block_that_is_not_run_says_why() -> None:
    skipped = [block for name in RUN for block in blocks(page(name)) if "skip" in block.marks]
    assert skipped
    assert all(len(block.marks["skip"]) > 10 for block in skipped)


def test_the_source_that_is_shown_passes_the_rules_of_every_source(tmp_path: Path) -> None:
    written = {block.marks["file"]: block for block in blocks(page("adding-a-source")) if "file" in block.marks}
    (rules,) = (
        block.marks["shared rules"] for block in blocks(page("adding-a-source")) if "shared rules" in block.marks
    )
    module, builder = (Path(file).stem for file in rules.split())
    for file, block in written.items():
        (tmp_path / file).write_text(block.text, encoding="utf-8")
    (tmp_path / "made_known.py").write_text(
        f"import {module}\nfrom ecgfm.sources import SOURCES\nSOURCES[{module}.NAME] = {module}\n"
        f"import test_sources\nfrom {builder} import build_{module}\n"
        f"test_sources.BUILDERS[{module}.NAME] = build_{module}\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "tests")])}
    words = ["-m", "pytest", "-p", "made_known", "-p", "no:cacheprovider", "tests/test_sources.py", "-k", module]
    done = subprocess.run(
        [sys.executable, *words], check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 8, done.stdout


# ---- every page


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each `ecgfm` command of a block, comments and what only a shell knows left out."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;(?=\s)|\|(?=\s)", line.strip()):
            alone = re.sub(r"^(\s*(do|then|sudo|nohup|nice)\s+)+|^(\w+=\S*\s+)+", "", part.strip())
            words = shlex.split(alone, comments=True) if alone.startswith("ecgfm ") else []
            if words:
                yield [word for word in words[1:] if word not in ("...", "&")]


def told() -> Iterator[tuple[str, list[str]]]:
    """Where and what: every `ecgfm` command in a block of the pages and the README."""
    for path in (*PAGES, ROOT / "README.md"):
        for block in blocks(path.read_text(encoding="utf-8")):
            if block.language in ("sh", "bash", "console", ""):
                yield from ((f"{path.name}:{block.line}", words) for words in commands(block))


def check_command(words: list[str]) -> None:
    """The command is there, and so is every option.

    Raises:
        AssertionError: one is not.
    """
    command, context = COMMANDS, typer.Context(COMMANDS, info_name="ecgfm")
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name = words[0] if words[0] in command.commands else "table"  # `ecgfm label reports.csv`
        assert name in command.commands, f"ecgfm has no command {words[0]!r}"
        words = words[1:] if name == words[0] else words
        command = command.commands[name]
        context = typer.Context(command, info_name=name, parent=context)
    known = {option for parameter in command.get_params(context) for option in parameter.opts}
    asked = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert asked <= known, f"ecgfm {context.info_name} has no {', '.join(sorted(asked - known))}"


def test_every_command_of_the_pages_is_one() -> None:
    found = list(told())
    assert len(found) > 60
    wrong = []
    for where, words in found:
        try:
            check_command(words)
        except AssertionError as error:
            wrong.append(f"{where}: ecgfm {shlex.join(words)}: {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)
    for words in (["ruin", "demo"], ["run", "demo", "--nothing"], ["checkpoint", "shew"]):
        with pytest.raises(AssertionError):
            check_command(words)


# ---- every page's YAML


def documents(text: str) -> list[str]:
    """The parts of a YAML block: where a top key comes again, the next one begins (`labels:`, and other `labels:`)."""
    found: list[str] = []
    seen: set[str] = set()
    for line in text.splitlines(keepends=True):
        key = line.partition(":")[0] if re.match(r"[\w-]+:", line) else ""
        if not found or key in seen:
            found.append("")
            seen = set()
        seen |= {key} - {""}
        found[-1] += line
    return found


def read_as_ours(text: str, where: str, folder: Path) -> str:
    """Has the reader of such a file read it. Returns what it is.

    Raises:
        InputError: the reader refuses it.
        AssertionError: it is of no kind that we read.
    """
    values: dict[str, Any] = yaml.safe_load(text)
    sections = set(Pipeline.__dataclass_fields__)
    if set(values) & {"files", "array"}:
        (folder / own_config.FILE).write_text(text, encoding="utf-8")
        own_config.load(folder)
        return "ecgfm.yaml"
    if set(values) & {"findings", "label_sets"}:
        (folder / "vocabulary.yaml").write_text(text, encoding="utf-8")
        Vocabulary.read(folder / "vocabulary.yaml")
        return "vocabulary"
    if set(values) <= sections:
        from_dict(Pipeline, {"sources": ["ptb_xl"], **values}, where)
        return "section"
    assert all(isinstance(value, dict) and set(value) & sections for value in values.values()), f"{where}: what is it?"
    for pipeline in values.values():
        from_dict(Pipeline, {"sources": ["ptb_xl"], **pipeline}, where)
    return "pipeline"


def test_the_yaml_of_every_page_is_read_by_what_reads_it(tmp_path: Path) -> None:
    kinds: list[str] = []
    for path in (*PAGES, ROOT / "README.md"):
        for block in blocks(path.read_text(encoding="utf-8")):
            if block.language in ("yaml", "yml"):
                where = f"{path.name}:{block.line}"
                kinds += [read_as_ours(text, where, tmp_path) for text in documents(block.text)]
    assert set(kinds) == {"ecgfm.yaml", "vocabulary", "section", "pipeline"}
    assert len(documents("labels: {a: 1}\nlabels:\n  b: 2\nsplits: {}\n")) == 2
    for wrong in (
        "labels: {schema: scp}",
        "mine: {sources: [own], pretrain: {max_stepz: 3}}",
        "name: x\nfiles: {pattern: ['*']}",
        "label_sets: {mine: {x: [no such finding]}}",
    ):
        with pytest.raises(InputError):
            read_as_ours(wrong, "here", tmp_path)
    with pytest.raises(AssertionError):
        read_as_ours("services: {server: {image: x}}", "here", tmp_path)


def test_every_link_and_picture_is_there() -> None:
    links = 0
    for path in (*PAGES, ROOT / "README.md"):
        text = _FENCE.sub("", path.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            linked = (path.parent / file) if file else path
            assert linked.exists(), f"{path.name}: {target}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}
                assert anchor in slugs, f"{path.name}: {target}"
            links += 1
    assert links > 50


def test_every_page_is_in_the_navigation_and_the_site_builds(tmp_path: Path) -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.relative_to(DOCS).as_posix() for path in PAGES}
    assert pages == set(re.findall(r"\b([\w/-]+\.md)$", text, re.MULTILINE))
    pytest.importorskip("material", reason="the site needs mkdocs-material: pip install 'ecgfm[docs]'")
    words = ["-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run([sys.executable, *words], check=False, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    built = {path: path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")}
    assert len(built) > len(PAGES)
    for path, html in built.items():
        fetched = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(https?://[^"]+)"', html)
        assert not fetched, f"the site is read without a network, but {path.name} fetches {fetched[0]}"


# ---- help


def all_commands(command: Any, context: typer.Context) -> Iterator[tuple[str, Any, typer.Context]]:
    for name, below in getattr(command, "commands", {}).items():
        of_it = typer.Context(below, info_name=name, parent=context)
        if hasattr(below, "commands"):
            yield from all_commands(below, of_it)
        else:
            yield of_it.command_path, below, of_it


def test_every_command_has_an_example_that_parses_and_every_option_a_word() -> None:
    root = get_command(app)
    found = list(all_commands(root, typer.Context(root, info_name="ecgfm")))
    assert len(found) > 20
    for path, command, context in found:
        lines = [line.strip() for line in (command.help or "").splitlines()]
        examples = [line for line in lines if line.startswith("ecgfm ")]
        assert examples, f"{path}: no example"
        for example in examples:
            check_command(shlex.split(example)[1:])
        for parameter in command.get_params(context):
            assert parameter.help, f"{path}: {parameter.opts} says nothing"
            assert "[default" not in parameter.help, (
                f"{path}: {parameter.opts}: rich takes [...] for markup: show_default"
            )
