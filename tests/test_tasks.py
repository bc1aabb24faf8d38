"""A regression and a task of classes through all stages, and what their checkpoints answer afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import balanced_accuracy_score, mean_absolute_error, r2_score
from test_finetune import FINETUNE, at_step
from training_data import PRETRAIN, digests, rows, write_inputs

import ecgfm
from ecgfm import checkpoints, predict_commands
from ecgfm.checkpoint_commands import convert, describe, facts
from ecgfm.config import EvaluateConfig, from_dict
from ecgfm.contracts import check, read_table, write_table
from ecgfm.ecg import InputError
from ecgfm.evaluate import evaluate
from ecgfm.export import export
from ecgfm.finetune import finetune, is_better
from ecgfm.formats import read_file
from ecgfm.inference import Prediction
from ecgfm.label_space import Label, LabelSpace, read_label_space
from ecgfm.pipeline import Walker, walk
from ecgfm.pipelines_file import Pipeline
from ecgfm.pretrain import pretrain
from ecgfm.stages import Output, Store

VALUES: dict[str, Any] = {
    "sources": ["synthetic"],
    "synthetic": {"n_patients": 60},
    "prepare": {"workers": 1},
    "splits": {"valid_share": 0.25, "test_share": 0.3},
    "manifests": {"rare_labels": "drop"},
    "pretrain": {
        "model": {
            "conv_channels": 8, "width": 32, "n_layers": 1, "n_heads": 2, "ffn_width": 32, "pos_conv_kernel": 8,
            "pos_conv_groups": 4, "codebook_entries": 8, "codebook_width": 16, "contrast_width": 16,
        },
        "max_steps": 2, "batch_pairs": 4, "accumulate": 1, "n_negatives": 10, "valid_every": 2, "save_every": 2,
        "device": "cpu", "precision": "fp32",
    },
    "finetune": {"max_epochs": 2, "batch_size": 32, "learning_rate": 1e-3, "warmup_epochs": 0, "device": "cpu",
                 "precision": "fp32"},
    "evaluate": {"bootstrap_samples": 40, "device": "cpu", "drawn_records": 1},
}  # fmt: skip
CLASSES = {"slow": ["426177001"], "normal": ["426783006"], "fast": ["427084000"]}
TASKS: dict[str, dict[str, Any]] = {
    "regression": {
        "labels": {
            "scheme": "columns", "task": "regression", "columns": {"age": "age_years", "length": "n_samples"},
            "units": {"age": "years"},
        },
    },
    "multiclass": {"labels": {"scheme": "codes", "task": "multiclass", "codes": CLASSES}},
}  # fmt: skip


class Run:
    """What the stages of a pipeline made."""

    def __init__(self, task: str, data: Path) -> None:
        store = Store(data)
        walker = Walker(store, lambda requests, group: [store.make(request) for request in requests])
        self.config = from_dict(Pipeline, VALUES | TASKS[task], "test")
        walk(self.config, {}, walker)
        self.made: dict[str, list[Path]] = {}
        self.counts: dict[str, dict[str, int]] = {}
        for request, output in walker.made:
            assert isinstance(output, Output)
            self.made.setdefault(request.stage.name, []).append(output.directory)
            self.counts[request.stage.name] = dict(output.counts)
        self.records = pl.concat(read_table(one / "records.parquet", "records") for one in self.made["prepare"])

    def __getitem__(self, stage: str) -> Path:
        return self.made[stage][0]

    @property
    def inputs(self) -> dict[str, Any]:
        """Of `evaluate`."""
        stages = ("audit", "splits", "labels", "manifests", "pretrain", "finetune")
        return {**{stage: self[stage] for stage in stages}, "slices": self.made["prepare"]}

    def files(self, predictions: pl.DataFrame) -> list[Path]:
        """The raw files of predicted records, in their order."""
        paths = predictions.join(self.records, on="record_id", maintain_order="left")["raw_path"]
        return [next(self["synthesize"].glob(f"**/{path}")) for path in paths]


@pytest.fixture(scope="module")
def regression(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run("regression", tmp_path_factory.mktemp("regression"))


@pytest.fixture(scope="module")
def multiclass(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run("multiclass", tmp_path_factory.mktemp("multiclass"))


@pytest.fixture(params=["regression", "multiclass"])
def run(request: pytest.FixtureRequest) -> Run:
    found: Run = request.getfixturevalue(request.param)
    return found


def best(run: Run) -> checkpoints.Checkpoint:
    path = checkpoints.best(run["finetune"])
    assert path is not None
    return checkpoints.load(path)


# ---- what the checkpoint and the tables hold


def test_the_checkpoint_says_what_its_outputs_are(regression: Run, multiclass: Run) -> None:
    meta = best(regression).meta
    assert (meta.task, meta.labels, meta.units) == ("regression", ("age", "length"), {"age": "years"})
    assert (meta.thresholds, meta.temperature) == ({}, {})
    train = read_table(regression["manifests"] / "labelled_train.parquet", "labelled_segments_values")
    records = train.unique("record_id")
    for label in meta.labels:
        values = records[label].drop_nulls().to_numpy()
        assert meta.scaling[label] == (pytest.approx(values.mean()), pytest.approx(values.std()))
    said = read_label_space(regression["manifests"] / "label_space.yaml").labels[0].records["train"]
    assert said["mean"] == pytest.approx(meta.scaling["age"][0])
    meta = best(multiclass).meta
    assert (meta.task, meta.labels, meta.scaling) == ("multiclass", ("slow", "normal", "fast"), {})
    assert meta.thresholds == {}
    assert len(set(meta.temperature.values())) == 1
    assert set(meta.temperature) == set(meta.labels)


def test_show_tells_the_task(regression: Run, multiclass: Run) -> None:
    shown = "\n".join(describe(facts(regression["finetune"])))
    assert "regression: each label is a number" in shown
    mean, deviation = best(regression).meta.scaling["age"]
    assert f"{mean:.4g} ± {deviation:.4g} years where it was trained on" in shown
    assert "multiclass: of the labels exactly one is present" in "\n".join(describe(facts(multiclass["finetune"])))


def test_a_converted_checkpoint_keeps_its_task_and_takes_no_threshold(run: Run, tmp_path: Path) -> None:
    found = best(run)
    label = found.meta.labels[0]
    with pytest.raises(InputError, match=f"labels of task '{found.meta.task}' have none"):
        convert(found.path, tmp_path / "with", thresholds=[f"{label}=0.5"])
    converted = convert(found.path, tmp_path / "without")
    assert (converted.meta.task, converted.meta.scaling) == (found.meta.task, found.meta.scaling)


# ---- evaluation


def test_the_errors_are_those_of_the_written_predictions_joined_by_record(regression: Run) -> None:
    out = regression["evaluate"]
    predictions = read_table(out / "predictions.parquet", "predictions_values").filter(split="test")
    truth = read_table(regression["labels"] / "labels.parquet", "labels_values")
    joined = predictions.join(truth, on="record_id", suffix=" truth")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["task"] == "regression"
    assert joined.height > 10
    for found in metrics["scores"]["finetuned"]["labels"]:
        known = joined.drop_nulls(f"{found['label']} truth")
        y, p = known[f"{found['label']} truth"].to_numpy(), known[found["label"]].to_numpy()
        assert np.ptp(p) > 0
        assert found["n"] == known.height
        assert found["mean_absolute_error"]["value"] == pytest.approx(mean_absolute_error(y, p), abs=1e-9)
        assert found["r2"]["value"] == pytest.approx(r2_score(y, p), abs=1e-9)
        low, high = (found["mean_absolute_error"][end] for end in ("low", "high"))
        assert low <= found["mean_absolute_error"]["value"] <= high
    assert set(metrics["scores"]) == {"finetuned", "probe", "probe_random", "neighbours", "train_mean"}
    floor = metrics["scores"]["train_mean"]["labels"][0]
    mean = best(regression).meta.scaling["age"][0]
    known = joined.drop_nulls("age truth")["age truth"].to_numpy()
    assert floor["mean_absolute_error"]["value"] == pytest.approx(np.abs(known - mean).mean())
    assert floor["pearson_r"] is None
    assert [one["p_holm"] >= one["p"] for one in metrics["differences"]] == [True] * 6
    assert {part["by"] for part in metrics["parts"]} >= {"age", "sex"}


def test_decisions_and_accuracy_are_of_the_most_probable_class(multiclass: Run) -> None:
    out = multiclass["evaluate"]
    predictions = read_table(out / "predictions.parquet", "predictions")
    names = list(CLASSES)
    np.testing.assert_allclose(predictions.select(names).sum_horizontal(), 1, atol=1e-9)
    truth = read_table(multiclass["labels"] / "labels.parquet", "labels")
    joined = predictions.filter(split="test").join(truth, on="record_id", suffix=" truth")
    so = joined.select(f"{name} truth" for name in names).to_numpy().argmax(axis=1)
    said = joined.select(names).to_numpy().argmax(axis=1)
    metrics = json.loads((out / "metrics.json").read_text())
    classes = metrics["assessment"]["classes"]
    assert classes["n"] == joined.height > 10
    assert classes["accuracy"]["value"] == pytest.approx((so == said).mean())
    assert classes["balanced_accuracy"]["value"] == pytest.approx(balanced_accuracy_score(so, said))
    for k, decision in enumerate(metrics["assessment"]["decisions"]):
        point = decision["point"]
        assert point["threshold"] is None
        assert point["true_positives"] == int(((so == k) & (said == k)).sum())
        assert point["false_positives"] == int(((so != k) & (said == k)).sum())
    page = (out / "report.html").read_text()
    assert "Balanced accuracy" in page
    assert "nan" not in re.sub(r"base64,[A-Za-z0-9+/=]+|<script>.*?</script>", "", page, flags=re.DOTALL)


def test_the_report_is_whole_and_of_this_page_alone(run: Run) -> None:
    page = (run["evaluate"] / "report.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "{{" not in page
    if best(run).meta.task == "regression":
        assert "always saying the train split&#39;s mean would be off by" in page
        assert "age, years" in page
        assert not re.search(
            "None|nan", re.sub(r"base64,[A-Za-z0-9+/=]+|<script>.*?</script>", "", page, flags=re.DOTALL)
        )
        assert "limits of agreement" in page
        differences = json.loads((run["evaluate"] / "metrics.json").read_text())["differences"]
        clear = sum(one["p_holm"] < 0.05 for one in differences)
        assert len(re.findall(r"is (?:closer|further off) than", page)) == clear
        assert page.count("these records do not tell") == len(differences) - clear
        assert page.count(", corrected p ") >= len(differences)
        summary = (run["evaluate"] / "summary.md").read_text()
        assert summary.count("| age, years |") == summary.count("| length |") == 5


def test_evaluating_again_writes_the_same_bytes(run: Run, tmp_path: Path) -> None:
    counts = evaluate(run.inputs, run.config.evaluate, tmp_path)
    assert counts == run.counts["evaluate"]
    assert digests(tmp_path) == digests(run["evaluate"])


def test_records_that_the_model_knows_are_refused_here_too(run: Run, tmp_path: Path) -> None:
    manifests = tmp_path / "manifests"
    shutil.copytree(run["manifests"], manifests)
    for one, other in (("train", "test"), ("test", "train")):
        shutil.copy(run["manifests"] / f"labelled_{one}.parquet", manifests / f"labelled_{other}.parquet")
    inputs, out = run.inputs | {"manifests": manifests}, tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match=r"the model knows the test split: of \d+ records \d+ learnt from"):
        evaluate(inputs, run.config.evaluate, out)
    allowed = EvaluateConfig(bootstrap_samples=10, device="cpu", drawn_records=0, allow_leakage=True)
    if best(run).meta.task == "regression":
        evaluate(inputs, allowed, out)
        assert "The model knows the test split" in (out / "report.html").read_text()


def test_a_checkpoint_of_another_task_is_refused(regression: Run, multiclass: Run, tmp_path: Path) -> None:
    inputs = regression.inputs | {"finetune": multiclass["finetune"]}
    with pytest.raises(InputError, match=r"the labels age, length of task 'regression', found slow, normal, f"):
        evaluate(inputs, regression.config.evaluate, tmp_path)


# ---- answers


def test_answers_about_raw_files_are_those_of_the_evaluation(run: Run) -> None:
    model = ecgfm.load(run["finetune"], device="cpu")
    task = model.meta.task
    expected = read_table(
        run["evaluate"] / "predictions.parquet", "predictions_values" if task == "regression" else "predictions"
    ).head(12)
    answers = list(model.predict_many(run.files(expected), batch_size=5))
    for row, answer in zip(expected.iter_rows(named=True), answers, strict=True):
        assert isinstance(answer, Prediction)
        given = answer.values if task == "regression" else answer.probabilities
        assert list(given) == list(model.labels)
        for label, value in given.items():
            scale = model.meta.scaling[label][1] if task == "regression" else 1
            assert value == pytest.approx(row[label], abs=1e-5 * scale)
        assert answer.segments.height == row["n_segments"]
        if task == "regression":
            assert (answer.probabilities, answer.decisions) == ({}, {})
            for label, value in given.items():
                assert value == pytest.approx(answer.segments[label].mean())
        else:
            assert answer.values == {}
            assert sum(given.values()) == pytest.approx(1)
            called = [label for label, is_called in answer.decisions.items() if is_called]
            assert called == [max(given, key=given.__getitem__)]
            np.testing.assert_allclose(answer.segments.select(model.labels).sum_horizontal(), 1)
    first = [answer.values or answer.probabilities for answer in answers if isinstance(answer, Prediction)]
    assert len({tuple(one.values()) for one in first}) == len(first), "all alike would prove nothing"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_of_answers_have_the_columns_of_their_task(run: Run, tmp_path: Path, suffix: str) -> None:
    model = ecgfm.load(run["finetune"], device="cpu")
    predictions = pl.read_parquet(run["evaluate"] / "predictions.parquet").head(5)
    files = run.files(predictions)
    tables = []
    for name in ("a", "b"):
        out, segments = tmp_path / f"{name}{suffix}", tmp_path / f"{name}_segments{suffix}"
        predict_commands.predict(model, files, out, segments, 3 if name == "a" else 64, 1)
        tables.append(pl.read_csv(out) if suffix == ".csv" else pl.read_parquet(out))
    regression = model.meta.task == "regression"
    extra = [] if regression else ["most_probable"]
    assert tables[0].columns[:2] == ["record_id", "n_segments"]
    assert tables[0].columns[2:][: len(model.labels) + len(extra)] == [*model.labels, *extra]
    assert not [column for column in tables[0].columns if column.endswith(" present")]
    for label in model.labels:
        scale = model.meta.scaling[label][1] if regression else 1
        np.testing.assert_allclose(tables[0][label], tables[1][label], atol=1e-6 * scale, rtol=1e-6)
    if not regression:
        said = tables[0].select(model.labels).to_numpy().argmax(axis=1)
        assert tables[0]["most_probable"].to_list() == [model.labels[k] for k in said]
    if suffix == ".parquet":
        check(tables[0], predict_commands.contract_of_predictions(model.meta.task))
    segments_table = pl.read_csv(tmp_path / "a_segments.csv") if suffix == ".csv" else pl.read_parquet(
        tmp_path / "a_segments.parquet"
    )  # fmt: skip
    assert segments_table.columns == ["record_id", "segment_index", "start_s", *model.labels]


def test_attributions_add_up_to_the_number_or_the_classs_logit(run: Run, tmp_path: Path) -> None:
    model = ecgfm.load(run["finetune"], device="cpu")
    (file,) = run.files(pl.read_parquet(run["evaluate"] / "predictions.parquet").head(1))
    label = model.labels[-1]
    found = predict_commands.draw_saliency(model, file, tmp_path / "s.html", label, "gradient", None)
    sums = found.values.sum(axis=(1, 2), dtype=np.float64)
    differences = found.logits - found.baseline_logit
    assert np.abs(differences).max() > 0
    np.testing.assert_allclose(sums, differences, atol=0.02 * np.abs(differences).max())
    prediction = model.predict(file)
    page = (tmp_path / "s.html").read_text()
    if model.meta.task == "regression":
        np.testing.assert_allclose(found.logits, prediction.segments[label], rtol=1e-4)
        assert found.value == prediction.values[label]
        assert found.probability is None
        assert "raises length" in page
        assert "the number" in page
        default = model.saliency(file, method="gradient")
        assert (default.label, default.unit, default.answer) == (
            "age",
            "years",
            f"{prediction.values['age']:.4g} years",
        )
    else:
        assert found.probability == prediction.probabilities[label]
        assert found.answer == f"probability {found.probability:.3f}"
        assert "logit" in page
        assert model.saliency(file, method="gradient").label == max(
            prediction.probabilities, key=prediction.probabilities.__getitem__
        )
    predict_commands.draw_saliency(model, file, tmp_path / "s.png", label, "gradient", None)
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


# ---- export


@pytest.mark.parametrize("kind", ["onnx", "torch", "huggingface"])
def test_an_export_says_task_scaling_and_unit_and_answers_alike(run: Run, tmp_path: Path, kind: Any) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    evaluation = run["evaluate"] if kind == "huggingface" else None
    made = export(run["finetune"], tmp_path / "out", kind, evaluation=evaluation)
    meta = best(run).meta
    output = "scaled_values" if meta.task == "regression" else "logits"
    assert set(made.differences) == {output, "embedding"}
    assert max(made.differences.values()) <= 1e-4
    name = "preprocessor_config.json" if kind == "huggingface" else "preprocessing.json"
    about = json.loads((tmp_path / "out" / name).read_text())
    assert about["task"] == meta.task
    assert about["label_units"] == meta.units
    assert about["scaling"] == {label: list(both) for label, both in meta.scaling.items()}
    steps = " ".join(about["steps"])
    assert ("standard deviation + mean" in steps) == (meta.task == "regression")
    assert ("exclude each other" in steps) == (meta.task == "multiclass")
    if kind == "huggingface":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["problem_type"] == {
            "regression": "regression", "multiclass": "single_label_classification",
        }[meta.task]  # fmt: skip
        card = (tmp_path / "out" / "README.md").read_text()
        assert ("| 0 | age | years |" in card) == (meta.task == "regression")
        assert ("mean absolute error, age" in card) == (meta.task == "regression")
        again = ecgfm.load(tmp_path / "out", device="cpu")
        (file,) = run.files(pl.read_parquet(run["evaluate"] / "predictions.parquet").head(1))
        assert again.predict(file).values == ecgfm.load(run["finetune"], device="cpu").predict(file).values
        return
    if kind == "onnx":
        import onnx

        written = {one.key: one.value for one in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
        assert written["task"] == meta.task
        assert json.loads(written["scaling"]) == about["scaling"]
        assert json.loads(written["label_units"]) == about["label_units"]
    predictions = pl.read_parquet(run["evaluate"] / "predictions.parquet").head(1)
    (file,) = run.files(predictions)
    record, _ = read_file(file, "asked")
    np.save(tmp_path / "recording.npy", record.signal_mv)
    command = [sys.executable, "example.py", tmp_path / "recording.npy", str(record.sampling_rate_hz), *record.leads]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True, cwd=tmp_path / "out")
    answer = json.loads(done.stdout)
    for label in meta.labels:
        scale = meta.scaling[label][1] if meta.task == "regression" else 1
        assert answer[label] == pytest.approx(predictions[label][0], abs=1e-3 * scale)


# ---- training


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Small manifests whose labels are numbers: `rate` is told by the wave's frequency, of some records unknown."""
    made = write_inputs(tmp_path_factory.mktemp("inputs"), n_train=24, n_valid=12)
    manifests = made["manifests"]
    for split in ("train", "valid"):
        path = manifests / f"labelled_{split}.parquet"
        table = pl.read_parquet(path)
        rate = pl.when(pl.col("fast") == 1).then(120.0).when(pl.col("fast") == 0).then(50.0)
        table = table.with_columns(rate.alias("rate"), pl.lit(3.0).alias("size") * (1 + pl.col("high in V1")))
        table = table.drop("fast", "high in V1").with_columns(pl.col("size").cast(pl.Float64))
        write_table(table, "labelled_segments_values", path)
    space = LabelSpace(
        (Label("rate", ("r",), "mean", unit="beats/min"), Label("size", ("s",), "mean")), {}, "regression"
    )
    space.write(manifests / "label_space.yaml")
    out = tmp_path_factory.mktemp("pretrain")
    pretrain(made, PRETRAIN, out)
    return made | {"pretrain": out}


CONFIG = from_dict(
    type(FINETUNE), {"precision": "fp32", "max_epochs": 8, "batch_size": 16, "learning_rate": 3e-3, "warmup_epochs": 0,
                     "device": "cpu", "patience_epochs": 0}, "here",
)  # fmt: skip


def test_numbers_are_learnt_and_the_least_valid_error_is_the_best(numbers: dict[str, Any], tmp_path: Path) -> None:
    finetune(numbers, CONFIG, tmp_path)
    judged = {row["step"]: row["mean_absolute_error"] for row in rows(tmp_path, "valid")}
    path = checkpoints.best(tmp_path)
    assert path is not None
    assert judged[checkpoints.load(path).meta.step] == min(judged.values())
    assert min(judged.values()) < 0.6 * judged[min(judged)]
    assert min(judged.values()) < 0.5, "0.9 is what always saying the mean would have"
    assert set(rows(tmp_path, "valid")[0]) == {"step", "split", "epoch", "loss", "mean_absolute_error"}


@pytest.mark.parametrize("loss", ["mse", "smooth_l1"])
def test_sigterm_and_going_on_give_the_same_bytes_for_numbers_too(
    numbers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    config = from_dict(type(FINETUNE), {"precision": "fp32", "max_epochs": 2, "batch_size": 16, "device": "cpu",
                                        "warmup_epochs": 0, "regression_loss": loss}, "here")  # fmt: skip
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    finetune(numbers, config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            finetune(numbers, config, tmp_path / "broken")
    finetune(numbers, config, tmp_path / "broken")
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")


def test_the_scale_is_of_the_records_trained_on_alone(numbers: dict[str, Any], tmp_path: Path) -> None:
    config = from_dict(type(FINETUNE), {"precision": "fp32", "max_epochs": 1, "batch_size": 16, "device": "cpu",
                                        "subset": 0.5}, "here")  # fmt: skip
    counts = finetune(numbers, config, tmp_path)
    found = checkpoints.load(next(iter(checkpoints.steps(tmp_path).values()))).meta
    train = pl.read_parquet(numbers["manifests"] / "labelled_train.parquet")
    assert counts["segments"] < train.height
    assert found.scaling["rate"][0] != train.unique("record_id")["rate"].mean()


def test_a_lower_error_is_better_and_a_lower_area_is_not() -> None:
    assert is_better(0.1, 0.2, lowest=True)
    assert not is_better(0.2, 0.1, lowest=True)
    assert is_better(None, None, lowest=True)
    assert not is_better(None, 0.5, lowest=True)
    assert not is_better(0.1, 0.2)


def test_what_a_checkpoint_says_of_its_task_must_fit_together() -> None:
    common: dict[str, Any] = {
        "kind": "finetuned", "model": PRETRAIN.model, "leads": tuple(f"{k}" for k in range(12)),
        "sampling_rate_hz": 100.0, "segment_samples": 256, "labels": ("a", "b"),
    }  # fmt: skip
    for wrong in (
        {"task": "regression"},
        {"task": "regression", "scaling": {"a": (0.0, 1.0)}},
        {"scaling": {"a": (0.0, 1.0), "b": (0.0, 1.0)}},
        {"task": "multiclass", "thresholds": {"a": 0.5}},
        {"task": "regression", "scaling": {"a": (0.0, 1.0), "b": (0.0, 0.0)}},
    ):
        with pytest.raises(InputError):
            from_dict(checkpoints.Meta, common | wrong, "here")
    meta = from_dict(checkpoints.Meta, common | {"task": "regression", "scaling": {"b": [1, 2], "a": [3, 4]}}, "here")
    assert meta.scale.tolist() == [[3, 1], [4, 2]]
