"""The recipes of published results run, on the real recordings that there are, with networks of a toy's size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_data import TINY

from ecgfm.config import from_dict, to_dict
from ecgfm.pipeline import Walker, walk
from ecgfm.pipelines_file import Pipeline, read_pipelines
from ecgfm.stages import Output, Store

FILE = Path(__file__).parent.parent / "pipelines.yaml"
RECIPES = {name: values for name, values in read_pipelines(FILE).items() if "published" in values.get("evaluate", {})}
TOY: dict[str, dict[str, Any]] = {
    "prepare": {"workers": 1, "max_rejected_share": 1.0},
    "pretrain": {
        "model": to_dict(TINY), "max_steps": 2, "batch_pairs": 4, "accumulate": 1, "n_negatives": 10,
        "valid_every": 2, "save_every": 2, "precision": "fp32", "device": "cpu",
    },
    "finetune": {"max_epochs": 1, "batch_size": 64, "precision": "fp32", "device": "cpu"},
    "evaluate": {"bootstrap_samples": 20, "drawn_records": 0, "supervised_epochs": 1, "device": "cpu"},
}  # fmt: skip


def toy(values: dict[str, Any]) -> Pipeline:
    """The recipe with its own labels, splits and published numbers, and another size."""
    kept = {name: part for name, part in values.items() if name not in ("pretrain", "finetune")}
    merged = {name: {**kept.get(name, {}), **TOY.get(name, {})} for name in {*TOY, *kept} if name in TOY}
    return from_dict(Pipeline, kept | merged, "test")


def test_every_published_task_has_a_recipe_and_every_number_its_source() -> None:
    tasks = {values["labels"]["scp_level"] for values in RECIPES.values() if values["labels"]["scheme"] == "scp"}
    assert tasks == {"all", "diagnostic", "subdiagnostic", "superdiagnostic", "form", "rhythm"}
    assert {source for values in RECIPES.values() for source in values["sources"]} >= {"physionet2021", "code15"}
    for name, values in RECIPES.items():
        for one in from_dict(Pipeline, values, name).evaluate.published:
            assert 0.5 < one.value < 1
            assert "doi" in one.source or "arXiv" in one.source


def test_the_small_recipes_differ_from_the_published_in_the_networks_alone() -> None:
    for name, values in RECIPES.items():
        if name.endswith("-small"):
            large = RECIPES[name.removesuffix("-small")]
            assert {part for part in values if values[part] != large.get(part)} == {
                "description", "pretrain", "finetune",
            }  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.endswith("-small")])
def test_a_recipe_runs_and_its_report_has_the_published_numbers(name: str, shared: Path, data_dir: Path) -> None:
    folders = {"ptb_xl": "ptb-xl", "physionet2021": "challenge-2021", "code15": "code-15"}
    if "code15" in RECIPES[name]["sources"]:
        pytest.skip("five exams of CODE-15% are too few for three splits")
    values = RECIPES[name]
    if "mimic_iv_ecg" in values["sources"]:  # one record is there: the embedded source writes that layout too
        shares = {"splits": values["splits"] | {"valid_share": 0.3, "test_share": 0.3}}
        values = values | {"sources": ["synthetic"], "synthetic": {"n_patients": 250}} | shares
    pipeline = toy(values)
    store = Store(data_dir)
    walker = Walker(store, lambda requests, group: [store.make(request) for request in requests])
    walk(
        pipeline,
        {source: shared / "data" / folders[source] for source in pipeline.sources if source in folders},
        walker,
    )
    request, evaluated = walker.made[-1]
    assert request.stage.name == "evaluate"
    assert isinstance(evaluated, Output)
    metrics = json.loads((evaluated.directory / "metrics.json").read_text())
    assert [one["published"]["value"] for one in metrics["published"]] == [
        one["value"] for one in RECIPES[name]["evaluate"]["published"]
    ]
    ours = [one["ours"] for one in metrics["published"]]
    assert all(one["low"] <= one["value"] <= one["high"] for one in ours)
    page = (evaluated.directory / "report.html").read_text()
    assert all(one.source in page for one in pipeline.evaluate.published)
