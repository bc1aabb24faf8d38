"""Who may import whom, read from the syntax tree. A new module is entered here, with what it may know."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

WORDS = {"ecg", "config"}
TABLES = {*WORDS, "contracts"}
RECORDS = {*TABLES, "sources", "signals", "quality", "shards"}
MODEL = {"data", "augment", "model", "losses", "published", "checkpoints", "training", "predict"}
TRAINING = {
    *TABLES,
    *MODEL,
    "leakage",
    "shards",
    "label_space",
    "scores.metrics",
    "scores.calibration",
    "scores.multiclass",
}

# module, or package for all of its modules -> the modules of ecgfm that it may import
MAY_IMPORT: dict[str, set[str]] = {
    "ecg": set(),
    "config": {"ecg"},
    "pipelines_file": WORDS,
    # files and what identifies them
    "contracts": WORDS,
    "files": {"ecg"},
    "csv_tables": set(),
    "fingerprints": {*WORDS, "files"},
    "interrupts": set(),
    "processes": {"config", "interrupts"},
    "own_process": {"ecg", "files"},
    "energy": set(),
    "stages": {*WORDS, "energy", "files", "fingerprints", "own_process", "processes"},
    # published archives
    "archives": {"ecg"},
    "transfer": {"archives"},
    "download": {*WORDS, "files", "archives", "transfer"},
    # recordings
    "formats": {"ecg", "formats"},
    "sources": {*WORDS, "csv_tables", "formats", "sources"},
    "init_tables": {"csv_tables", "sources"},
    "init_source": {*WORDS, "csv_tables", "formats", "sources", "drawing", "init_tables", "labels"},
    "synthetic_ecg": {"ecg"},
    "synthesize": {*TABLES, "synthetic_ecg"},
    "signals": WORDS,
    "quality": {"ecg"},
    "shards": WORDS,
    "sketches": {"ecg"},
    # stages without torch, and what they are made of
    "prepare": {*RECORDS, "processes", "quality", "sketches"},
    "cohort": WORDS,
    "audit": {*TABLES, "sketches"},
    "splits": {*TABLES, "cohort"},
    "reports": {*WORDS, "contracts", "reports"},
    "label_space": WORDS,
    "label_tables": {*TABLES, "csv_tables", "label_space"},
    "label_reports": {*TABLES, "answer_files", "csv_tables", "label_space", "processes", "reports"},
    "label_compare": {*TABLES, "answer_files", "label_reports"},
    "labels": {"label_reports", *RECORDS, "label_space", "label_tables"},
    "manifests": {*RECORDS, "label_space", "splits"},
    "scores.metrics": RECORDS,
    "scores.calibration": {*RECORDS, "scores.metrics"},
    "scores.challenge": {*RECORDS, "scores.metrics"},
    "scores.multiclass": {*RECORDS, "scores.metrics", "scores.calibration"},
    "scores.significance": {*RECORDS, "scores.metrics"},
    "scores.probe": {*RECORDS, "scores.metrics"},
    "scores.baselines": {*RECORDS, "scores.metrics", "scores.probe"},
    "drawing": {"ecg"},
    "peek": {"ecg", "formats", "signals", "quality", "drawing"},
    "pages.template": set(),
    "export_texts": {*WORDS, "pages.cards"},
    "scores.regression": {*RECORDS, "scores.metrics", "scores.significance", "scores.subgroups"},
    "pages.numbers_template": {"pages.template"},
    "pages.parts": {"drawing", "pages.pictures", "pages.template"},
    "pages.numbers": {
        *RECORDS,
        *("scores.metrics", "label_space", "scores.regression", "cohort", "drawing", "pages.parts", "pages.pictures"),
        *("pages.assessment", "pages.template", "scores.significance", "pages.numbers_template"),
    },
    "leakage": TABLES,
    "scores.subgroups": {*TABLES, "scores.metrics"},
    "scores.confusion": {"ecg"},
    "pages.cards": {*TABLES, "label_space"},
    "scores.embedding_map": set(),
    "pages.pictures": {"drawing", "pages.template"},
    "pages.exploration": {"scores.confusion", "drawing", "scores.embedding_map", "pages.pictures"},
    "scores.between_sources": {*TABLES, "scores.metrics", "scores.probe"},
    "pages.transfer": {"scores.between_sources", "pages.template"},
    "scores.assessment": {
        *TABLES,
        "scores.metrics",
        "scores.calibration",
        "scores.challenge",
        "scores.multiclass",
        "scores.significance",
        "scores.subgroups",
    },
    "pages.expected": {*WORDS, "scores.metrics", "pages.template"},
    "pages.assessment": {
        *TABLES,
        *("scores.metrics", "scores.calibration", "scores.baselines", "scores.assessment", "scores.significance"),
        *("drawing", "pages.parts", "pages.pictures", "pages.template"),
    },
    "pages.findings": {
        *RECORDS,
        *(
            "scores.metrics",
            "scores.multiclass",
            "scores.baselines",
            "scores.assessment",
            "pages.assessment",
            "drawing",
            "pages.expected",
            "pages.template",
        ),
        *("cohort", "scores.confusion", "scores.embedding_map", "pages.exploration", "pages.parts", "pages.pictures"),
        *("scores.between_sources", "scores.significance", "pages.transfer"),
    },
    # the DAG
    "pipeline": {*WORDS, "pipelines_file", "files", "stages", "fingerprints", "own_process", "processes", "prepare"},
    "cost": {"pages.template", "stages"},
    "runs": {*WORDS, "pipelines_file", "cost", "files", "stages", "pipeline"},
    "housekeeping": {"files", "pipeline", "runs", "stages"},
    "lineage": {*WORDS, "pipelines_file", "files", "fingerprints", "pipeline", "runs"},
    "bench.prepare": {
        *RECORDS,
        "pipelines_file",
        "files",
        "pipeline",
        "prepare",
        "processes",
        "stages",
        "synthesize",
        "synthetic_ecg",
    },
    "bench.label": {*WORDS, "label_reports", "reports"},
    "bench.tables": {*TABLES, "audit", "labels", "manifests", "sketches", "splits"},
    # ---- torch begins here
    "model": WORDS,
    "augment": WORDS,
    "losses": {*WORDS, "model"},
    "supervised": {*WORDS, "label_space"},
    "published": WORDS,
    "checkpoints": {*TABLES, "files", "leakage", "model", "published"},
    "checkpoint_commands": {*WORDS, "files", "model", "published", "checkpoints", "label_space"},
    "data": {*TABLES, "shards"},
    "bench.load": {*WORDS, "files", "shards", "data"},
    "distributed": {*WORDS, "shards", "data"},
    "training": {*TABLES, "own_process", "shards", "data", "model", "losses", "checkpoints"},
    "predict": TRAINING - {"training"},
    "pretrain": {
        *TRAINING - {"label_space", "scores.metrics", "scores.calibration", "scores.multiclass"},
        "distributed",
    },
    "bench.training": {*TRAINING, "distributed", "pretrain"},
    "finetune": {*TRAINING, "supervised"},
    "small_network": {*TRAINING - {"training"}, "own_process", "supervised"},
    "lead_subsets": {*TRAINING - {"training"}, "scores.subgroups"},
    "report_contents": {
        *TRAINING - {"training"},
        *("splits", "attribution", "pages.cards", "drawing", "pages.findings", "pages.parts", "small_network"),
    },
    "evaluated": {*TRAINING - {"training"}, "splits", "pages.cards"},
    "evaluate_values": {
        *TRAINING - {"training"},
        *(
            "evaluated",
            "splits",
            "scores.subgroups",
            "scores.assessment",
            "pages.cards",
            "scores.regression",
            "report_contents",
        ),
        "pages.numbers",
    },
    "evaluate": {
        *TRAINING - {"training"},
        *("evaluated", "evaluate_values"),
        *(
            "splits",
            "scores.probe",
            "scores.baselines",
            "scores.subgroups",
            "scores.assessment",
            "drawing",
            "pages.expected",
        ),
        *("pages.findings", "report_contents", "pages.cards", "scores.confusion", "scores.embedding_map"),
        *("scores.between_sources", "small_network", "lead_subsets"),
    },
    # answers about recordings that no pipeline has seen; recordings are found and prepared without torch
    "recordings": {*TABLES, "formats", "sources", "shards", "processes", "prepare"},
    "attribution": {"model"},
    "inference": {
        *(
            *WORDS,
            "scores.metrics",
            "scores.multiclass",
            "prepare",
            "recordings",
            "data",
            "model",
            "predict",
            "attribution",
        ),
        *("checkpoints", "checkpoint_commands", "shards"),
    },
    "pages.saliency": {"checkpoints", "inference"},
    "answer_files": {*TABLES, "files"},
    "predict_commands": {"answer_files", *TABLES, "files", "drawing", "recordings", "inference", "pages.saliency"},
    "hub": {"ecg", "files"},
    "doctor": set(),  # what this machine can do
    "export": {*WORDS, "checkpoints", "export_texts", "inference", "model", "prepare", "shards", "synthetic_ecg"},
}
MAY_IMPORT_TORCH = {
    *MODEL,
    "supervised",
    "distributed",
    "checkpoint_commands",
    "pretrain",
    "finetune",
    "small_network",
    "lead_subsets",
    "report_contents",
    "evaluate",
    "evaluate_values",
    "evaluated",
    "bench.load",
    "bench.training",
    "attribution",
    "inference",
    "doctor",  # asks whether it can be imported
    "export",
}


@cache
def modules() -> dict[str, Path]:
    """Every module of ours by its full name."""
    found = {}
    for path in sorted([*ROOT.glob("ecgfm/**/*.py"), *ROOT.glob("flows/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_by(source: str) -> set[str]:
    """What a module's code imports, wherever in it, by full name; of a name in a package of ours, the module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & modules().keys()
            rest = {alias.name for alias in node.names if f"{node.module}.{alias.name}" not in inside}
            found |= inside | ({str(node.module)} if rest else set())
    return found


@cache
def imports_of(module: str) -> set[str]:
    return imported_by(modules()[module].read_text())


def entry(module: str) -> str:
    """The table's name for a module of ecgfm: its own, or its package's, as `sources` for `ecgfm.sources.ptb_xl`."""
    name = module.removeprefix("ecgfm.")
    return name if name in MAY_IMPORT else name.partition(".")[0]


GROUPS = {"ecgfm.bench", "ecgfm.pages", "ecgfm.scores"}
"""Packages whose modules each have a row; they themselves import nothing."""

OURS = [module for module in modules() if module.startswith("ecgfm.") and module not in GROUPS]


def test_imports_are_found_wherever_they_stand() -> None:
    code = """
        import ecgfm.ecg, torch.nn as nn
        from ecgfm import model as network, __version__
        from ecgfm.sources import SOURCES, ptb_xl
        def late():
            if True:
                from prefect.states import State
        """
    assert imported_by(re.sub("^ {8}", "", code, flags=re.MULTILINE)) == {
        *("ecgfm.ecg", "torch.nn", "ecgfm.model", "ecgfm", "ecgfm.sources", "ecgfm.sources.ptb_xl", "prefect.states"),
    }


def test_every_module_is_in_the_table_and_nothing_else_is() -> None:
    assert {entry(module) for module in OURS} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", OURS)
def test_a_module_imports_what_it_may(module: str) -> None:
    ours = {name for name in imports_of(module) if name.startswith("ecgfm.")}
    assert {entry(name) for name in ours} <= MAY_IMPORT[entry(module)]
    outside = {name.partition(".")[0] for name in imports_of(module)}
    assert "flows" not in outside
    assert "prefect" not in outside
    assert "torch" not in outside or entry(module) in MAY_IMPORT_TORCH


def test_the_packages_themselves_import_nothing() -> None:
    assert all(not imports_of(group) for group in GROUPS)
    assert imports_of("ecgfm") <= {"__future__", "importlib", "typing"}
    assert not {"torch", "numpy"} & loaded_after("ecgfm")


def test_the_table_has_no_circle() -> None:
    graph = {name: allowed - {name} for name, allowed in MAY_IMPORT.items()}
    assert set(TopologicalSorter(graph).static_order()) == set(MAY_IMPORT)


def test_the_modules_have_no_circle() -> None:
    list(TopologicalSorter({module: imports_of(module) - {module} for module in modules()}).static_order())


def test_every_package_that_is_imported_is_a_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [given for extra, names in project["optional-dependencies"].items() if extra != "dev" for given in names]
    declared = {re.split(r"[\[<>=~! ]", given)[0].lower() for given in [*project["dependencies"], *extras]}
    outside = {name.partition(".")[0] for module in modules() for name in imports_of(module)}
    distribution = {
        "ahocorasick_rs": "ahocorasick-rs",
        "yaml": "pyyaml",
        "pydantic_core": "pydantic",  # a part of it, of one version with it
        "sklearn": "scikit-learn",
        "grpc": "grpcio",
        "prefect_dask": "prefect-dask",
        "prefect_ray": "prefect-ray",
    }
    imported = {distribution.get(name, name) for name in outside - sys.stdlib_module_names - {"ecgfm", "flows"}}
    assert imported <= declared


def loaded_after(*names: str) -> set[str]:
    """The top-level packages that are loaded once these modules are."""
    code = f"import sys, {', '.join(names)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_everything_before_torch_works_without_torch_and_prefect() -> None:
    """Through other packages too."""
    early = [module for module in OURS if entry(module) not in MAY_IMPORT_TORCH]
    assert {"ecgfm.prepare", "ecgfm.scores.metrics", "ecgfm.pipeline", "ecgfm.pages.findings"} <= set(early)
    assert not {"torch", "prefect"} & loaded_after(*early)


def test_a_look_at_what_is_there_loads_nothing_heavy() -> None:
    """`ecgfm plan`, and a run that finds everything made, start at once."""
    heavy = {"torch", "prefect", "polars", "pandas", "pandera", "wfdb", "scipy", "sklearn", "matplotlib", "h5py"}
    assert not heavy & loaded_after("ecgfm.pipeline", "ecgfm.runs", "flows.cli")


def test_the_table_of_torch_is_true() -> None:
    assert {entry(module) for module in OURS if "torch" in {n.partition(".")[0] for n in imports_of(module)}} == (
        MAY_IMPORT_TORCH
    )
