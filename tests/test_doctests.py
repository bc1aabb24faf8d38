"""The examples in docstrings are run, and the pages of the reference show what is there and said.

Examples find a folder as after the quickstart: a finetuned checkpoint, here a tiny untrained one, and a recording.
"""

from __future__ import annotations

import dataclasses
import doctest
import importlib.util
import inspect
import re
import sys
import types
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from test_docs import DOCS, ROOT, all_commands
from training_data import TINY
from typer.main import get_command

from ecgfm import checkpoints
from ecgfm.checkpoints import Meta
from ecgfm.contracts import CONTRACTS
from ecgfm.ecg import LEADS
from ecgfm.model import Classifier
from flows.cli import PANELS, app
from flows.commands.options import PIPELINES

SHOWN = re.compile(r"^::: ([\w.]+)\n(?:    options: (.*)\n)?", re.MULTILINE)
LABELS = ("sinus rhythm", "left bundle branch block")


@pytest.fixture(scope="module")
def reference() -> types.ModuleType:
    """docs/.reference.py, which makes the pages."""
    spec = importlib.util.spec_from_file_location("reference", DOCS / ".reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module  # where dataclasses look for it
    pytest.importorskip("griffe", reason="the reference needs mkdocstrings: pip install 'ecgfm[docs]'")
    spec.loader.exec_module(module)
    return module


def modules_with_examples() -> list[str]:
    """By what is written in them: nothing is imported."""
    paths = [path for path in sorted(ROOT.glob("ecgfm/**/*.py")) if ">>> " in path.read_text(encoding="utf-8")]
    names = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in paths]
    return [name.removesuffix(".__init__") for name in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples find where they run."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "pipelines.yaml").write_bytes(PIPELINES.read_bytes())
    torch.manual_seed(0)
    meta = Meta("finetuned", TINY, LEADS, 500.0, 2500, labels=LABELS, thresholds=dict.fromkeys(LABELS, 0.5))
    run = folder / "ecgfm-data" / "runs" / "demo" / "latest" / "finetune"
    run.mkdir(parents=True)
    checkpoints.save(run, 1, Classifier(TINY, len(LABELS)).state_dict(), None, meta)
    (folder / "samples").mkdir()
    noise = np.random.default_rng(0).integers(-500, 500, (5000, len(LEADS)))
    (folder / "samples" / "S00031.dat").write_bytes(noise.astype("<i2").tobytes())
    lines = ["S00031 12 500 5000", *(f"S00031.dat 16 1000/mV 16 0 0 0 0 {lead}" for lead in LEADS)]
    (folder / "samples" / "S00031.hea").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_of_a_module_give_what_they_show(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    done = doctest.testmod(importlib.import_module(name))
    assert done.attempted
    assert not done.failed


def test_there_are_examples_and_a_wrong_one_is_found() -> None:
    assert len(modules_with_examples()) >= 10
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(wrong, out=lambda text: None).failed == 1


# ---- the pages of the reference


def shown() -> dict[str, Any]:
    """Every name that a page of the reference shows, members too -> what it is."""
    found = {}
    for path in sorted((DOCS / "api").glob("*.md")):
        for name, options in SHOWN.findall(path.read_text(encoding="utf-8")):
            assert name not in found, f"{path.name}: {name} is shown twice"
            found[name] = resolved(name)
            for member in yaml.safe_load(options or "{}").get("members", ()):
                found[f"{name}.{member}"] = inspect.getattr_static(found[name], member)
    return found


def resolved(name: str) -> Any:
    """Raises: AttributeError, ImportError: there is nothing of that name."""
    words = name.split(".")
    module = max(
        (".".join(words[:n]) for n in range(1, len(words)) if importlib.util.find_spec(".".join(words[:n]))), key=len
    )
    return reduce(getattr, name.removeprefix(f"{module}.").split("."), importlib.import_module(module))


def test_what_the_reference_shows_is_there_and_has_a_docstring() -> None:
    found = shown()
    assert len(found) > 100
    assert "ecgfm.inference.Model.predict" in found
    for name, thing in found.items():
        module, _, leaf = name.rpartition(".")
        if inspect.isclass(thing) or callable(thing) or isinstance(thing, (property, cached_property, classmethod)):
            said = getattr(thing, "__func__", thing).__doc__ or ""
            assert said, f"{name} has no docstring"
            assert not said.startswith(f"{leaf}("), f"{name}: {said} is what dataclass made"
        else:  # a constant
            source = Path(sys.modules[module].__file__ or "").read_text(encoding="utf-8")
            assert re.search(rf'^{leaf}\b.* = .*\n"""', source, re.MULTILINE), f"{name}: no docstring below it"


def test_what_a_docstring_says_of_parameters_is_of_parameters_there(reference: types.ModuleType) -> None:
    told = 0
    for name, thing in shown().items():
        if inspect.isfunction(thing):
            known = set(inspect.signature(thing).parameters)
        elif dataclasses.is_dataclass(thing):
            known = {field.name for field in dataclasses.fields(thing)}
        else:
            continue
        for paragraph in re.split(r"\n\s*\n", inspect.getdoc(thing) or ""):
            for given, _ in reference.items_of(paragraph, known) or ():
                names = set(given.split(", "))
                assert names <= known, f"{name}: {', '.join(sorted(names - known))} is no parameter"
                told += len(names)
    assert told > 100


def test_docstrings_become_markdown(reference: types.ModuleType) -> None:
    text = """One <thing>, `a | b`.

    a: first
        and on; with: a colon
    low, high: ends; b: between them

    >>> 1 < 2
    True

    Raises:
        InputError: a reason
            that goes on.
        ValueError: another.
    """
    names = {"a", "b", "low", "high"}
    assert reference.as_markdown(text, names, {"InputError": "ecgfm.ecg.InputError"}).split("\n\n") == [
        "One \\<thing>, `a | b`.",
        "- `a`: first and on; with: a colon\n- `low`, `high`: ends\n- `b`: between them",
        "```pycon\n>>> 1 < 2\nTrue\n```",
        "Raises:",
        "- [`InputError`][ecgfm.ecg.InputError]: a reason that goes on.\n- `ValueError`: another.",
    ]
    assert reference.as_markdown("Known: a sentence.", names) == "Known: a sentence."


# ---- the keys of pipelines.yaml


def test_every_key_is_on_the_page_of_keys_with_a_meaning(reference: types.ModuleType) -> None:
    page = (DOCS / "api" / "keys.md").read_text(encoding="utf-8")
    sections = list(reference.sections())
    assert re.findall(r"^<!-- keys(?:: (\S+))? -->$", page, re.MULTILINE) == sections
    assert len(sections) > 15
    for path in sections:
        keys = reference.keys_of(reference.section(path))
        assert keys
        for key in keys:
            assert key.meaning.removesuffix(". Not in the stage's key"), f"{path}.{key.name}: what does it mean?"


def test_a_key_is_told_with_its_kind_range_and_default(reference: types.ModuleType) -> None:
    of = {key.name: key for key in reference.keys_of(reference.section("pretrain"))}
    assert "model" not in of  # a section of its own
    assert (of["batch_pairs"].takes, of["batch_pairs"].default) == ("whole number, 1 or more", "64")
    assert of["subset"].takes == "number, above 0 and at most 1"
    assert of["precision"].takes == "`fp32`, `bf16`"
    assert of["learning_rate_epochs"].default == "[[1, 0.0001], [6, 8.0e-05], [201, 5.0e-05]]"
    assert of["device"].meaning.endswith("Not in the stage's key")
    assert not of["seed"].meaning.endswith("Not in the stage's key")
    required = {key.name for key in reference.keys_of(reference.section("")) if not key.default}
    assert required == {"sources"}


def test_every_contract_is_on_the_page_of_tables(reference: types.ModuleType) -> None:
    page = (DOCS / "api" / "tables.md").read_text(encoding="utf-8")
    made = reference.on_page_markdown(page, None, None, None)
    heads = re.findall(r"^### (\S+)$", made, re.MULTILINE)
    assert heads == sorted(path.stem for path in CONTRACTS.glob("*.yaml"))
    assert "| `patient_id` | string |  | the person, as in splits; null where unknown |" in made


# ---- the page of commands


def test_the_page_of_commands_has_all_of_them_as_their_help_tells() -> None:
    root = get_command(app)
    commands = list(all_commands(root, typer.Context(root, info_name="ecgfm")))
    assert len(commands) > 30
    told = {path: str(command.help).partition("\n\n")[0] for path, command, _ in commands}
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(ecgfm [\w -]+)` \| (.*) \|$", page, re.MULTILINE)) == told
    assert re.findall(r"^### (.*)$", page, re.MULTILINE) == list(PANELS)


def test_the_help_of_a_command_is_wrapped_by_the_terminal_alone() -> None:
    root = get_command(app)
    for path, command, _ in all_commands(root, typer.Context(root, info_name="ecgfm")):
        paragraphs = str(command.help).split("\n\n")
        assert len(paragraphs) > 2, path  # what it does, Example:, the example
        assert not any("\n" in paragraph for paragraph in paragraphs), path
