"""The evaluation of a small real run: its numbers, checked by other means from its tables."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import sklearn.metrics
import torch

from ecgfm import checkpoints
from ecgfm.attribution import TOLERANCE
from ecgfm.config import EvaluateConfig, from_dict
from ecgfm.contracts import empty_table, read_table, write_table
from ecgfm.data import Shards
from ecgfm.ecg import InputError
from ecgfm.evaluate import evaluate
from ecgfm.label_space import read_label_space
from ecgfm.leakage import Seen, find_leak
from ecgfm.model import pool_nonzero_mean
from ecgfm.pipeline import Walker, walk
from ecgfm.pipelines_file import Pipeline
from ecgfm.predict import read_labelled
from ecgfm.report_contents import Choice, choose_records, read_cohort
from ecgfm.shards import ShardReader
from ecgfm.splits import SPLITS
from ecgfm.stages import Output, StageFailed, Store

PIPELINE = {
    "sources": ["synthetic"],
    "synthetic": {"n_patients": 60},
    "prepare": {"workers": 1},
    "splits": {"valid_share": 0.25, "test_share": 0.3},
    "labels": {
        "scheme": "codes",
        "codes": {
            "sinus rhythm": ["426783006"],
            "sinus tachycardia": ["427084000"],
            "left bundle branch block": ["164909002"],
            "premature ventricular contraction": ["427172004"],
            "atrial flutter": ["164890007"],
        },
        "max_labels": ["sinus tachycardia"],
    },
    "manifests": {"rare_labels": "drop"},
    "pretrain": {
        "model": {
            "conv_channels": 8, "width": 32, "n_layers": 2, "n_heads": 2, "ffn_width": 64, "pos_conv_kernel": 8,
            "pos_conv_groups": 4, "codebook_entries": 8, "codebook_width": 16, "contrast_width": 16,
        },
        "max_steps": 4, "batch_pairs": 4, "accumulate": 1, "learning_rate": 1e-3, "n_negatives": 10, "valid_every": 2,
        "save_every": 2, "device": "cpu",
    },
    "finetune": {"max_epochs": 2, "batch_size": 32, "learning_rate": 1e-3, "warmup_epochs": 0, "device": "cpu"},
    "evaluate": {"bootstrap_samples": 50, "supervised_epochs": 2, "device": "cpu"},
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The inputs of `evaluate`, made by the stages before it, and under `out` what it wrote."""
    store = Store(tmp_path_factory.mktemp("data"))
    walker = Walker(store, lambda requests, group: [store.make(request) for request in requests])
    walk(from_dict(Pipeline, PIPELINE, "test"), {}, walker)
    of_stage: dict[str, list[Path]] = {}
    for request, output in walker.made:
        assert isinstance(output, Output)
        of_stage.setdefault(request.stage.name, []).append(output.directory)
    one = {name: of_stage[name][0] for name in ("audit", "splits", "labels", "manifests", "pretrain", "finetune")}
    (request,) = (request for request, _ in walker.made if request.stage.name == "evaluate")
    return {
        "inputs": {**one, "slices": of_stage["prepare"]},
        "out": of_stage["evaluate"][0],
        "store": store,
        "request": request,
    }


@pytest.fixture(scope="module")
def inputs(made: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = made["inputs"]
    return found


@pytest.fixture(scope="module")
def out(made: dict[str, Any]) -> Path:
    found: Path = made["out"]
    return found


def config() -> EvaluateConfig:
    return from_dict(Pipeline, PIPELINE, "test").evaluate


def test_every_labelled_record_of_valid_and_test_is_predicted_once(inputs: dict[str, Any], out: Path) -> None:
    predictions = read_table(out / "predictions.parquet", "predictions")
    assert set(predictions["split"]) == {"valid", "test"}
    for split in ("valid", "test"):
        segments = read_table(inputs["manifests"] / f"labelled_{split}.parquet", "labelled_segments")
        mine = predictions.filter(pl.col("split") == split)
        assert sorted(mine["record_id"]) == sorted(segments["record_id"].unique())
        per_record = dict(segments.group_by("record_id").len().iter_rows())
        assert dict(mine.select("record_id", "n_segments").iter_rows()) == per_record


def test_the_metrics_are_those_of_the_written_predictions_joined_by_record(inputs: dict[str, Any], out: Path) -> None:
    space = read_label_space(inputs["manifests"] / "label_space.yaml")
    joined = (
        read_table(out / "predictions.parquet", "predictions")
        .filter(pl.col("split") == "test")
        .join(read_table(inputs["labels"] / "labels.parquet", "labels"), on="record_id", suffix=" truth")
    )
    scores = json.loads((out / "metrics.json").read_text())["scores"]["finetuned"]
    assert scores["n_records"] == joined.height > 10
    assert len(space.names) >= 2
    areas = []
    for name, found in zip(space.names, scores["labels"], strict=True):
        known = joined.drop_nulls(f"{name} truth")
        truth, predicted = known[f"{name} truth"].to_numpy(), known[name].to_numpy()
        assert (found["label"], found["n"], found["positives"]) == (name, known.height, truth.sum())
        areas.append(sklearn.metrics.roc_auc_score(truth, predicted))
        assert found["auroc"]["value"] == pytest.approx(areas[-1], abs=1e-12)
        assert found["auprc"]["value"] == pytest.approx(
            sklearn.metrics.average_precision_score(truth, predicted), abs=1e-12
        )
        assert found["auroc"]["low"] <= areas[-1] <= found["auroc"]["high"]
    assert scores["macro_auroc"]["value"] == pytest.approx(np.mean(areas), abs=1e-12)
    page = (out / "report.html").read_text()
    assert f"{np.mean(areas):.3f}" in page
    assert "<td>atrial flutter</td>" in page  # in no synthetic record, so dropped, and said to be


def test_a_prediction_is_the_mean_or_maximum_over_segments_seen_one_by_one(inputs: dict[str, Any], out: Path) -> None:
    space = read_label_space(inputs["manifests"] / "label_space.yaml")
    path = checkpoints.best(inputs["finetune"])
    assert path is not None
    found = checkpoints.load(path)
    model = checkpoints.build(found)
    assert set(found.meta.temperature.values()) > {1.0}, "some are fitted, and some have too few records"
    segments = read_table(inputs["manifests"] / "labelled_test.parquet", "labelled_segments")
    readers = {(r.source, r.slice_id): r for r in (ShardReader(d / "shard.h5") for d in inputs["slices"])}
    predictions = read_table(out / "predictions.parquet", "predictions")
    some = predictions.filter(pl.col("split") == "test", pl.col("n_segments") > 1).head(4)
    assert some.height == 4
    for row in some.iter_rows(named=True):
        probabilities = []
        for segment in segments.filter(pl.col("record_id") == row["record_id"]).iter_rows(named=True):
            reader = readers[segment["source"], segment["slice_id"]]
            scale, offset = (x[segment["shard_row"]][:, None] for x in reader.standardisation()[:2])
            signal = torch.from_numpy(reader.digital([segment["shard_row"]])[0] * scale + offset)[None]
            with torch.inference_mode():
                probabilities.append(model(signal).logits.sigmoid()[0].numpy())
        for k, label in enumerate(space.labels):
            values = [p[k] for p in probabilities]
            of_record = max(values) if label.aggregation == "max" else sum(values) / len(values)
            odds = (of_record / (1 - of_record)) ** (1 / found.meta.temperature[label.name])
            odds *= math.exp(found.meta.shift[label.name])
            expected = odds / (1 + odds)
            assert row[label.name] == pytest.approx(expected, abs=1e-4)
    assert {label.aggregation for label in space.labels} == {"mean", "max"}


def test_embeddings_are_of_every_labelled_record_and_of_two_encoders(inputs: dict[str, Any], out: Path) -> None:
    embeddings = read_table(out / "embeddings.parquet", "embeddings")
    for split in SPLITS:
        segments = read_table(inputs["manifests"] / f"labelled_{split}.parquet", "labelled_segments")
        for encoder in ("pretrained", "random"):
            mine = embeddings.filter(pl.col("split") == split, pl.col("encoder") == encoder)
            assert sorted(mine["record_id"]) == sorted(segments["record_id"].unique())
    assert set(embeddings["embedding"].list.len()) == {32}
    by_encoder = embeddings.pivot("encoder", index="record_id", values="embedding")
    assert (by_encoder["pretrained"] != by_encoder["random"]).all()

    path = checkpoints.latest(inputs["pretrain"])
    assert path is not None
    encoder = checkpoints.build_encoder(checkpoints.load(path))
    table = read_table(inputs["manifests"] / "labelled_test.parquet", "labelled_segments")
    mine = table.filter(pl.col("record_id") == table["record_id"][0])
    shards = Shards(inputs["slices"])
    batch = shards.read(np.arange(mine.height), shards.places(mine))
    with torch.inference_mode():
        signal = batch.digital * batch.scale[..., None] + batch.offset[..., None]
        expected = pool_nonzero_mean(encoder(signal).frames).mean(dim=0).numpy()
    (found,) = embeddings.filter(pl.col("encoder") == "pretrained", pl.col("record_id") == table["record_id"][0])[
        "embedding"
    ].to_list()
    assert found == pytest.approx(expected, abs=1e-4)


def test_equal_inputs_elsewhere_give_equal_bytes(inputs: dict[str, Any], out: Path, tmp_path: Path) -> None:
    moved = {
        name: [Path(shutil.copytree(p, tmp_path / "in" / f"{name}{i}")) for i, p in enumerate(paths)]
        if isinstance(paths, list)
        else Path(shutil.copytree(paths, tmp_path / "in" / name))
        for name, paths in inputs.items()
    }
    again = tmp_path / "out"
    again.mkdir()
    evaluate(moved, config(), again)
    names = {path.name for path in again.iterdir()}
    assert names == {
        "predictions.parquet",
        "embeddings.parquet",
        "metrics.json",
        "report.html",
        "summary.md",
        "roc.svg",
        "model_card.md",
        "data_card.json",
    }
    for name in names:
        assert (again / name).read_bytes() == (out / name).read_bytes(), name


def test_the_summary_says_what_the_metrics_say(out: Path) -> None:
    scores = json.loads((out / "metrics.json").read_text())["scores"]
    rows = [line for line in (out / "summary.md").read_text().splitlines() if line.startswith("|")][2:]
    for row, model in zip(rows, ("finetuned", "probe", "probe_random", "neighbours", "supervised"), strict=True):
        auroc = scores[model]["macro_auroc"]
        assert f"{auroc['value']:.3f} ({auroc['low']:.3f} to {auroc['high']:.3f})" in row
        assert f"| {scores[model]['n_records']} |" in row


def test_what_is_for_comparison_can_be_left_out(inputs: dict[str, Any], tmp_path: Path) -> None:
    alone = replace(config(), probe_random_encoder=False, supervised_baseline=False, lead_subsets=False)
    evaluate(inputs, replace(alone, drawn_records=0), tmp_path)
    scores = json.loads((tmp_path / "metrics.json").read_text())["scores"]
    assert set(scores) == {"finetuned", "probe", "neighbours", "finetuned - probe"}
    assert set(read_table(tmp_path / "embeddings.parquet", "embeddings")["encoder"]) == {"pretrained"}
    assert "data:image/png" not in (tmp_path / "report.html").read_text()


def test_what_is_assessed_is_of_the_written_predictions_at_the_checkpoints_thresholds(
    out: Path, inputs: dict[str, Any]
) -> None:
    metrics = json.loads((out / "metrics.json").read_text())
    best = checkpoints.best(inputs["finetune"])
    assert best
    thresholds = checkpoints.load(best).meta.thresholds
    predicted = read_table(out / "predictions.parquet", "predictions").filter(pl.col("split") == "test")
    labelled = read_table(inputs["manifests"] / "labelled_test.parquet", "labelled_segments").unique("record_id")
    for decisions in metrics["assessment"]["decisions"]:
        name = decisions["label"]
        joined = predicted.select("record_id", p=name).join(labelled.select("record_id", truth=name), on="record_id")
        joined = joined.drop_nulls("truth")
        assert decisions["n"] == joined.height
        if name in thresholds:
            called = joined.filter(pl.col("p") >= thresholds[name])
            assert decisions["point"]["true_positives"] == int(called["truth"].sum())
            assert decisions["point"]["false_positives"] == called.height - int(called["truth"].sum())
    parted = {}
    for part in metrics["assessment"]["parts"]:
        parted[part["by"]] = parted.get(part["by"], 0) + part["scores"]["n_records"]
    assert parted.pop("leads") == 6 * predicted.height  # all leads and five sets
    assert parted
    assert set(parted.values()) == {predicted.height}


def test_several_datasets_are_told_apart(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecgfm.scores.between_sources.MIN_RECORDS", 3)
    slices = [Path(shutil.copytree(path, tmp_path / "slices" / path.name)) for path in inputs["slices"]]
    for path in slices:
        records = read_table(path / "records.parquet", "records")
        of_odd = pl.col("record_id").str.slice(-1).is_in(list("13579"))
        other = pl.when(of_odd).then(pl.lit("other")).otherwise("dataset").alias("dataset")
        write_table(records.with_columns(other), "records", path / "records.parquet")
    out = tmp_path / "out"
    out.mkdir()
    evaluate({**inputs, "slices": slices}, replace(config(), drawn_records=0, supervised_baseline=False), out)
    between = json.loads((out / "metrics.json").read_text())["between_sources"]
    assert between["origins"] == ["synthetic challenge-2021", "synthetic other"]
    told, untold = ({one[key] for one in between[name]} for name, key in (("left_out", "origin"), ("no_probe", "of")))
    assert told
    assert told | untold == set(between["origins"])
    assert not told & untold
    cells = {(one["fitted_on"], one["applied_to"]) for one in between["transfers"]}
    assert cells == {(a, b) for a in between["origins"] for b in between["origins"]}
    of_test = read_labelled(inputs["manifests"], "test", read_label_space(inputs["manifests"] / "label_space.yaml"))
    n_records = {one["applied_to"]: one["n_records"] for one in between["transfers"]}
    assert n_records["synthetic other"] == sum(record_id[-1] in "13579" for record_id in of_test.record_ids)
    assert sum(n_records.values()) == len(of_test.record_ids)
    page = (out / "report.html").read_text()
    assert "From one dataset to another" in page
    assert f"{between['left_out'][0]['unseen']['macro_auroc']['value']:.3f}" in page


def test_an_evaluation_killed_while_the_baseline_learns_leaves_nothing_half(made: dict[str, Any], out: Path) -> None:
    """The process that evaluates ends with SIGKILL after its first update; the next one is as if nothing had been."""
    store, request = made["store"], made["request"]
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    told = []

    def kill(facts: Any) -> None:
        told.append(facts)
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                is_it = parent == os.getpid() and b"own.obey" in (folder / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if is_it:
                os.killpg(int(folder.name), signal.SIGKILL)

    with pytest.raises(StageFailed):
        store.make_in_own_process(request, force=True, on_facts=kill)
    assert told[0].keys() == {"step", "max_steps", "loss", "segments_per_second"}
    found = store.find(request)
    assert found is not None
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole, "what was there is whole"
    assert (out.parent / f"{out.name}.partial").exists()
    assert not (out.parent / f"{out.name}.partial" / "metrics.json").exists()
    again = store.make(request, force=True)
    assert not (out.parent / f"{out.name}.partial").exists()
    for name, content in whole.items():
        if name != "stage.json":
            assert (again.directory / name).read_bytes() == content, name


def test_errors_are_drawn_with_what_made_their_logit_and_others_with_attention(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == config().drawn_records == 6
    captions = re.findall(r"<figcaption>Record (.+?)</figcaption>", page, re.DOTALL)
    errors = [float(found) for found in re.findall(r"above that of a segment of zeros, to within ([\d.e-]+) %", page)]
    assert len(captions) == 6
    assert len(errors) == sum("integrated gradients" in caption for caption in captions) == page.count("Furthest from")
    assert len(errors) >= 1
    assert max(errors) <= 100 * TOLERANCE
    assert sum("Shaded: attention" in caption for caption in captions) == 6 - len(errors)


def knowing(inputs: dict[str, Any], seen: Seen | None, folder: Path) -> dict[str, Any]:
    """The inputs with a finetuned checkpoint that has learnt from others than it has."""
    best = checkpoints.best(inputs["finetune"])
    assert best
    found = checkpoints.load(best)
    checkpoints.save(folder, found.meta.step, found.state, None, found.meta, seen)
    checkpoints.mark_best(folder, found.meta.step)
    shutil.copy(inputs["finetune"] / "config.yaml", folder)
    shutil.copy(inputs["finetune"] / "metrics.jsonl", folder)
    return {**inputs, "finetune": folder}


def test_a_checkpoint_knows_whom_it_was_trained_on(inputs: dict[str, Any]) -> None:
    splits = read_table(inputs["splits"] / "splits.parquet", "splits")
    none = empty_table("duplicates")
    for stage, path in (
        ("pretrain", checkpoints.latest(inputs["pretrain"])),
        ("finetune", checkpoints.best(inputs["finetune"])),
    ):
        assert path
        seen = checkpoints.seen(checkpoints.load(path))
        assert seen is not None
        assert seen.whole, stage
        for split in SPLITS:
            mine = splits.filter(pl.col("split") == split)
            leak = find_leak(seen, mine["record_id"].to_list(), mine["patient_id"].to_list(), none)
            assert bool(leak) == (split != "test"), (stage, split)


def test_a_model_that_knows_a_test_record_is_refused_unless_allowed(inputs: dict[str, Any], tmp_path: Path) -> None:
    test = read_table(inputs["manifests"] / "labelled_test.parquet", "labelled_segments")
    (tmp_path / "finetune").mkdir()
    leaking = knowing(inputs, Seen.of([test["record_id"][0]], []), tmp_path / "finetune")
    with pytest.raises(InputError, match=r"the model knows the test split: of \d+ records 1 learnt from") as refusal:
        evaluate(leaking, config(), tmp_path / "refused")
    assert test["record_id"][0] in str(refusal.value)
    (tmp_path / "allowed").mkdir()
    evaluate(leaking, replace(config(), allow_leakage=True, drawn_records=0), tmp_path / "allowed")
    assert "The model knows the test split" in (tmp_path / "allowed" / "report.html").read_text()
    assert "1 learnt from" in json.loads((tmp_path / "allowed" / "metrics.json").read_text())["leakage"]


def test_weights_that_say_nothing_of_their_training_are_evaluated_and_that_is_said(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "finetune").mkdir()
    evaluate(knowing(inputs, None, tmp_path / "finetune"), replace(config(), drawn_records=0), tmp_path)
    assert "cannot be" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "metrics.json").read_text())["training_is_known"] is False


def test_records_in_are_records_out(inputs: dict[str, Any]) -> None:
    space = read_label_space(inputs["manifests"] / "label_space.yaml")
    splits = {split: read_labelled(inputs["manifests"], split, space) for split in SPLITS}
    cohort = read_cohort(inputs, splits)
    in_splits = sum(split.records for split in cohort.splits.values())
    assert sum(cohort.rejected.values()) > 0
    assert sum(cohort.excluded.values()) > 0
    assert sum(cohort.listed.values()) == (
        sum(cohort.rejected.values()) + sum(cohort.excluded.values()) + in_splits
    )  # fmt: skip
    segments = pl.concat([read_table(d / "segments.parquet", "segments") for d in inputs["slices"]])
    assigned = read_table(inputs["splits"] / "splits.parquet", "splits")
    for split, counts in cohort.splits.items():
        mine = assigned.filter(pl.col("split") == split)["record_id"].to_list()
        assert counts.segments == segments.filter(pl.col("record_id").is_in(mine)).height


def test_an_encoder_of_other_labels_is_refused(inputs: dict[str, Any], tmp_path: Path) -> None:
    manifests = Path(shutil.copytree(inputs["manifests"], tmp_path / "manifests"))
    space = read_label_space(manifests / "label_space.yaml")
    replace(space, labels=tuple(reversed(space.labels))).write(manifests / "label_space.yaml")
    with pytest.raises(InputError, match=r"expected the labels .* finetune again"):
        evaluate({**inputs, "manifests": manifests}, config(), tmp_path)


def test_the_thresholds_that_travel_with_the_weights_are_those_of_the_report(inputs: dict[str, Any], out: Path) -> None:
    path = checkpoints.best(inputs["finetune"])
    assert path is not None
    points = json.loads((out / "metrics.json").read_text())["operating_points"]
    assert checkpoints.load(path).meta.thresholds == {
        label: pytest.approx(point["threshold"], abs=1e-6) for label, point in points.items()
    }


@pytest.mark.parametrize(("stage", "other"), [("pretrain", "finetune"), ("finetune", "pretrain")])
def test_a_checkpoint_of_the_other_kind_is_refused(
    inputs: dict[str, Any], tmp_path: Path, stage: str, other: str
) -> None:
    path = checkpoints.latest(inputs[other])
    assert path is not None
    shutil.copytree(path, tmp_path / path.name)
    checkpoints.mark_best(tmp_path, checkpoints.load(path).meta.step)
    with pytest.raises(InputError, match=rf"expected a {stage}\w*d checkpoint, found a {other}\w*d one"):
        evaluate({**inputs, stage: tmp_path}, config(), tmp_path)


def test_a_run_without_a_checkpoint_is_refused(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no checkpoint"):
        evaluate({**inputs, "finetune": tmp_path}, config(), tmp_path)


def test_drawn_records_are_chosen_by_rule() -> None:
    nan = np.nan
    truth = np.array([[0, 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 1], [1, nan, 0]], dtype=float)
    probabilities = np.array(
        [
            [0.1, 0.9, 0.2],  # the surest true finding (label 1)
            [0.9, 0.1, 0.0],  # normal, small error
            [0.6, 0.3, 0.1],  # normal, middling error
            [0.1, 0.6, 0.6],  # normal, large error, but not the worst label
            [0.2, 0.1, 0.02],  # label 2 missed: the worst error
            [0.1, 0.8, 0.7],  # the next label's surest
            [0.9, 0.9, 0.0],  # what is unknown is no error
        ]
    )
    is_normal = np.array([True, False, False])
    chosen = choose_records(probabilities, truth, is_normal, 4)
    assert chosen == [Choice(0, "right", 1), Choice(4, "wrong", 2), Choice(2, "normal", None), Choice(5, "right", 2)]
    assert choose_records(probabilities, truth, is_normal, 0) == []
    everything = choose_records(probabilities, truth, is_normal, 50)
    assert sorted(choice.row for choice in everything) == list(range(7))


def test_without_a_normal_label_a_record_of_no_finding_is_normal() -> None:
    truth = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    probabilities = np.array([[0.9, 0.1], [0.1, 0.2], [0.1, 0.1]])
    chosen = choose_records(probabilities, truth, np.array([False, False]), 3)
    assert chosen == [Choice(0, "right", 0), Choice(1, "wrong", 1), Choice(2, "normal", None)]
