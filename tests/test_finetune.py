"""Finetuning learns labels, leaves alone what it should, and stops and goes on as if it had never stopped."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, log_loss, roc_auc_score
from training_data import LABELS, PRETRAIN, TINY, digests, rows, write_inputs

from ecgfm import checkpoints
from ecgfm import finetune as stage
from ecgfm.config import FinetuneConfig, content_of, from_dict
from ecgfm.data import Shards, subset
from ecgfm.ecg import LEADS, InputError
from ecgfm.finetune import Judged, finetune, is_better, parameter_groups
from ecgfm.fingerprints import Input
from ecgfm.label_space import read_label_space
from ecgfm.model import Classifier
from ecgfm.pipeline import FINETUNE as FINETUNE_STAGE
from ecgfm.predict import calibrated, read_labelled, record_probabilities, segment_outputs
from ecgfm.pretrain import pretrain
from ecgfm.scores.calibration import MIN_TEMPERATURE
from ecgfm.stages import Request, Store

FINETUNE = FinetuneConfig(
    precision="fp32",
    mode="frozen",
    max_epochs=3,
    batch_size=16,
    learning_rate=1e-3,
    warmup_epochs=0.5,
    dropout=0.1,
    lead_mask_probability=0.2,
    device="cpu",
)
STEPS_PER_EPOCH = 3  # 40 segments


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = write_inputs(tmp_path_factory.mktemp("inputs"))
    out = tmp_path_factory.mktemp("pretrain")
    pretrain(made, replace(PRETRAIN, max_steps=1), out)
    return made | {"pretrain": out}


@pytest.fixture(scope="module")
def unbroken(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of FINETUNE that never stopped."""
    out = tmp_path_factory.mktemp("unbroken")
    finetune(inputs, FINETUNE, out)
    return out


def pretrained_state(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    path = checkpoints.latest(inputs["pretrain"])
    assert path is not None
    return checkpoints.encoder_state(checkpoints.load(path))


def finetuned_state(out: Path) -> dict[str, torch.Tensor]:
    path = checkpoints.latest(out)
    assert path is not None
    return checkpoints.encoder_state(checkpoints.load(path))


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Act once, in the middle of the update after `step` updates of this process."""
    done = 0
    whole = stage.supervised_loss

    def acting(logits: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, int]:
        nonlocal done
        if logits.requires_grad:
            if done == step:
                act()
            done += 1
        return whole(logits, *rest)

    monkeypatch.setattr(stage, "supervised_loss", acting)


def test_two_runs_write_the_same_bytes(inputs: dict[str, Any], unbroken: Path, tmp_path: Path) -> None:
    counts = finetune(inputs, FINETUNE, tmp_path)
    assert digests(tmp_path) == digests(unbroken)
    assert counts["steps"] == 3 * STEPS_PER_EPOCH
    assert counts["epochs"] == 3
    assert set(checkpoints.steps(tmp_path)) == {counts["best epoch"] * STEPS_PER_EPOCH, 3 * STEPS_PER_EPOCH}


@pytest.mark.parametrize("step", [0, 1, 2, 3, 7])
def test_sigterm_saves_and_the_next_run_ends_as_if_it_had_never_stopped(
    inputs: dict[str, Any], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as left:
            finetune(inputs, FINETUNE, tmp_path)
    assert left.value.code == 128 + signal.SIGTERM
    assert max(checkpoints.steps(tmp_path)) == step + 1
    finetune(inputs, FINETUNE, tmp_path)
    assert digests(tmp_path) == digests(unbroken)


def test_a_run_whose_batches_are_read_ahead_stops_and_goes_on_like_any_other(
    inputs: dict[str, Any], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(FINETUNE, loader_workers=2)
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            finetune(inputs, config, tmp_path)
    assert max(checkpoints.steps(tmp_path)) == 5
    finetune(inputs, config, tmp_path)
    assert digests(tmp_path) == digests(unbroken)


@pytest.mark.parametrize("step", [1, 3, 8])
def test_a_run_that_breaks_anywhere_goes_on_from_its_last_checkpoint(
    inputs: dict[str, Any], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        at_step(patch, step, fail)
        with pytest.raises(ZeroDivisionError):
            finetune(inputs, FINETUNE, tmp_path)
    assert len(rows(tmp_path, "train")) == step
    finetune(inputs, FINETUNE, tmp_path)
    assert digests(tmp_path) == digests(unbroken)


@pytest.mark.parametrize("broken", ["mark_best", "keep_last"])
def test_a_run_that_breaks_between_saving_and_tidying_ends_the_same(
    inputs: dict[str, Any], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, broken, fail)
        with pytest.raises(ZeroDivisionError):
            finetune(inputs, FINETUNE, tmp_path)
    assert set(checkpoints.steps(tmp_path)) == {STEPS_PER_EPOCH}
    finetune(inputs, FINETUNE, tmp_path)
    assert digests(tmp_path) == digests(unbroken)


def test_killed_in_the_store_and_run_again_gives_the_bytes_of_one_run(inputs: dict[str, Any], tmp_path: Path) -> None:
    given = {
        "manifests": Input(inputs["manifests"], "m", "manifests"),
        "slices": [Input(path, path.name, path.name) for path in inputs["slices"]],
        "pretrain": Input(inputs["pretrain"], "p", "pretrain"),
    }
    request = Request(FINETUNE_STAGE, given, replace(FINETUNE, max_epochs=12))
    (tmp_path / "order").write_bytes(pickle.dumps((Store(tmp_path / "killed"), request)))
    code = "import pickle, sys; store, request = pickle.load(open(sys.argv[1], 'rb')); store.make(request)"
    partial = Store(tmp_path / "killed").place(request).with_suffix(".partial")
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "order")], stdout=subprocess.DEVNULL) as child:
        try:
            while not checkpoints.steps(partial):
                assert child.poll() is None, "it ended before it could be killed"
                time.sleep(0.002)
        finally:
            child.kill()
    assert 0 < max(checkpoints.steps(partial)) < 12 * STEPS_PER_EPOCH
    again = Store(tmp_path / "killed").make(request)
    once = Store(tmp_path / "once").make(request)
    assert again.files == once.files
    assert digests(again.directory) == digests(once.directory)


@pytest.mark.parametrize("loss", ["bce", "focal", "asymmetric"])
def test_it_learns_what_can_be_learned(inputs: dict[str, Any], tmp_path: Path, loss: Any) -> None:
    config = replace(
        FINETUNE,
        mode="full",
        loss=loss,
        max_epochs=25,
        patience_epochs=0,
        learning_rate=3e-3,
        layer_decay=1.0,
        lead_mask_probability=0.0,
    )
    finetune(inputs, config, tmp_path)
    first, *_, last = rows(tmp_path, "train")
    assert last["loss"] < first["loss"] / 2
    assert max(row["macro_auprc"] for row in rows(tmp_path, "valid")) > 0.9


def test_the_best_checkpoint_is_that_of_the_highest_valid_auprc(unbroken: Path) -> None:
    scores = {row["step"]: row["macro_auprc"] for row in rows(unbroken, "valid")}
    assert list(scores) == [3, 6, 9]
    best = checkpoints.best(unbroken)
    assert best is not None
    assert best.name == f"step_{max(scores, key=lambda step: scores[step]):07d}"


@pytest.mark.parametrize("mode", ["full", "frozen", "linear"])
def test_what_the_mode_leaves_alone_does_not_change(inputs: dict[str, Any], tmp_path: Path, mode: Any) -> None:
    config = replace(FINETUNE, max_epochs=1, mode=mode, weight_decay=0.1)
    counts = finetune(inputs, config, tmp_path)
    before, after = pretrained_state(inputs), finetuned_state(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    extractor = {name for name in before if name.startswith("feature_extractor.")}
    assert len(extractor) == 6
    assert changed == {"full": set(before), "frozen": set(before) - extractor, "linear": set()}[mode]
    path = checkpoints.latest(tmp_path)
    assert path is not None
    assert checkpoints.load(path).state["proj.bias"].all(), "the classifier has learnt, and began with zeros"
    of_changed = sum(after[name].numel() for name in changed)
    assert counts["trained parameters"] == of_changed + len(LABELS) * (TINY.width + 1)


@pytest.mark.parametrize("mode", ["frozen", "linear"])
def test_a_linear_classifier_sees_embeddings_without_dropout_and_without_gradients(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    """In every epoch, also after validation."""
    whole = Classifier.forward
    seen = []

    def watched(self: Classifier, signal_: torch.Tensor, *rest: Any) -> Any:
        found = whole(self, signal_, *rest)
        if self.training:
            seen.append((self.encoder.training, found.embedding.requires_grad, found.logits.requires_grad))
        return found

    monkeypatch.setattr(Classifier, "forward", watched)
    finetune(inputs, replace(FINETUNE, mode=mode, max_epochs=2, dropout=0.5), tmp_path)
    assert seen == [(mode != "linear", mode != "linear", True)] * (2 * STEPS_PER_EPOCH)


@pytest.mark.parametrize("step", [2, 4])
def test_a_linear_classifier_goes_on_as_if_it_had_never_stopped(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config = replace(FINETUNE, mode="linear", max_epochs=2, loss="asymmetric")
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
    finetune(inputs, config, tmp_path / "once")
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            finetune(inputs, config, tmp_path / "twice")
    finetune(inputs, config, tmp_path / "twice")
    assert digests(tmp_path / "twice") == digests(tmp_path / "once")


def test_pretrained_weights_are_the_start_unless_random_ones_are_asked_for(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    still = replace(FINETUNE, max_epochs=1, learning_rate=1e-30)
    for init in ("pretrained", "random"):
        (tmp_path / init).mkdir()
        finetune(inputs, replace(still, init=init), tmp_path / init)
    before = pretrained_state(inputs)
    same, other = finetuned_state(tmp_path / "pretrained"), finetuned_state(tmp_path / "random")
    assert all(torch.equal(before[name], same[name]) for name in before)
    assert not torch.equal(before["encoder.layers.0.fc1.weight"], other["encoder.layers.0.fc1.weight"])


def test_learning_rates_decay_from_the_top_layer_down(inputs: dict[str, Any]) -> None:
    model = Classifier(replace(TINY, n_layers=3), 2, feature_grad_scale=1.0)
    config = replace(FINETUNE, learning_rate=1.0, head_learning_rate=5.0, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in parameter_groups(model, config) for p in group["params"]}
    count = sum(len(group["params"]) for group in parameter_groups(model, config))
    assert count == len(rates) == len(list(model.parameters()))

    def expected(name: str) -> float:
        if name.startswith("proj."):
            return 5.0
        for layer, rate in enumerate((0.25, 0.5, 1.0)):
            if name.startswith(f"encoder.encoder.layers.{layer}."):
                return rate
        return 0.125

    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == expected(name), name


def test_the_published_recipe_is_one_word() -> None:
    """What ECG-FM was finetuned with, value by value."""
    config = from_dict(FinetuneConfig, {"recipe": "published"}, "here")
    published = {
        "recipe": "published", "mode": "frozen", "init": "pretrained", "max_epochs": 140, "batch_size": 256,
        "learning_rate": 1e-6, "head_learning_rate": None, "layer_decay": 1.0, "schedule": "constant",
        "warmup_epochs": 0.0, "weight_decay": 0.0, "adam_betas": [0.9, 0.98], "adam_eps": 1e-8, "dropout": 0.0,
        "activation_dropout": 0.1, "lead_mask_probability": 0.0, "subset": 1.0, "loss": "bce", "pos_weight": None,
        "patience_epochs": 0, "seed": 0,
    }  # fmt: skip
    assert content_of(config).items() >= published.items()
    assert config == FinetuneConfig(recipe="published")
    groups = parameter_groups(Classifier(TINY, 2), config)
    assert {group["lr"] for group in groups} == {1e-6}
    for given in ({"mode": "linear"}, {"init": "random"}):
        assert from_dict(FinetuneConfig, {"recipe": "published", **given}, "here").learning_rate == 1e-5
    with pytest.raises(InputError, match="here: recipe: Input should be 'layerwise' or 'published', found 'reference'"):
        from_dict(FinetuneConfig, {"recipe": "reference"}, "here")


def test_by_default_lower_layers_learn_slower_and_given_values_count() -> None:
    config = FinetuneConfig()
    assert (config.recipe, config.mode) == ("layerwise", "full")
    rates = [group["lr"] for group in parameter_groups(Classifier(replace(TINY, n_layers=12), 2), config)]
    head, *layers, below = rates
    assert head == layers[0] == config.learning_rate
    assert below == pytest.approx(layers[-1] * config.layer_decay)
    assert all(lower == pytest.approx(0.8 * upper) for upper, lower in pairwise(layers))
    given = from_dict(FinetuneConfig, {"recipe": "published", "layer_decay": 0.7, "mode": "full"}, "here")
    assert (given.layer_decay, given.mode, given.learning_rate) == (0.7, "full", 1e-6)
    assert FinetuneConfig(init="random").layer_decay == 1.0
    assert FinetuneConfig(mode="linear").learning_rate == 1e-3


def test_the_published_rate_stays_and_the_default_one_warms_up_and_falls(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("published", "layerwise"):
        (tmp_path / name).mkdir()
    published = FinetuneConfig(recipe="published", precision="fp32", max_epochs=2, batch_size=16, device="cpu")
    finetune(inputs, published, tmp_path / "published")
    assert {row["learning_rate"] for row in rows(tmp_path / "published", "train")} == {1e-6}
    layerwise = FinetuneConfig(precision="fp32", max_epochs=4, warmup_epochs=1.0, batch_size=16, device="cpu")
    finetune(inputs, layerwise, tmp_path / "layerwise")
    expected = [1 / 3, 2 / 3, 1.0]
    expected += [0.5 + 0.5 * math.cos(math.pi * done / 9) for done in range(9)]
    found = [row["learning_rate"] for row in rows(tmp_path / "layerwise", "train")]
    assert found == pytest.approx([1e-4 * factor for factor in expected], rel=1e-5)


def test_the_best_of_a_run_that_overfits_is_kept_and_is_what_is_used(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.9, 0.8, 0.9, 0.7, 0.95])

    def judged(*_: Any) -> Judged:
        score = next(scores)
        return Judged({"loss": 1.0, "macro_auprc": score, "macro_auroc": score}, {}, {}, {"fast": score})

    monkeypatch.setattr(stage, "validate", judged)
    counts = finetune(inputs, replace(FINETUNE, max_epochs=50, patience_epochs=3), tmp_path)
    assert (counts["epochs"], counts["best epoch"]) == (5, 2)
    assert set(checkpoints.steps(tmp_path)) == {2 * STEPS_PER_EPOCH, 5 * STEPS_PER_EPOCH}
    used = checkpoints.best(tmp_path)
    assert used == tmp_path / f"step_{2 * STEPS_PER_EPOCH:07d}"
    assert used is not None
    assert checkpoints.load(used).meta.thresholds == {"fast": 0.9}


def test_training_stops_when_patience_is_over(inputs: dict[str, Any], tmp_path: Path) -> None:
    config = replace(FINETUNE, max_epochs=50, learning_rate=1e-30, patience_epochs=2)
    counts = finetune(inputs, config, tmp_path)  # nothing changes, so no epoch is better than the first
    assert (counts["epochs"], counts["best epoch"]) == (3, 1)
    before = digests(tmp_path)
    assert finetune(inputs, config, tmp_path)["epochs"] == 3  # a finished run that is asked again
    assert digests(tmp_path) == before


def test_an_epoch_without_a_score_is_the_best_only_until_one_has_a_score() -> None:
    assert is_better(None, None)
    assert is_better(0.1, None)
    assert not is_better(None, 0.1)
    assert is_better(0.2, 0.1)
    assert not is_better(0.1, 0.1)


def test_a_checkpoint_says_what_its_logits_mean(inputs: dict[str, Any], unbroken: Path) -> None:
    best = checkpoints.best(unbroken)
    assert best is not None
    meta = checkpoints.load(best).meta
    assert meta.kind == "finetuned"
    assert meta.labels == LABELS
    assert meta.aggregation == {"fast": "mean", "high in V1": "max"}
    assert (meta.leads, meta.sampling_rate_hz, meta.segment_samples) == (LEADS, 100.0, 256)
    assert set(meta.thresholds) == set(LABELS)
    start = checkpoints.latest(inputs["pretrain"])
    assert start is not None
    assert meta.training_data["pretrain"] == checkpoints.digest(checkpoints.load(start).state)
    assert {*meta.training_data} > {"manifests", "pretrain"}


def test_valid_scores_are_by_record(inputs: dict[str, Any], unbroken: Path) -> None:
    path = checkpoints.latest(unbroken)
    assert path is not None
    table = pl.read_parquet(inputs["manifests"] / "labelled_valid.parquet")
    outputs = segment_outputs(
        checkpoints.build(checkpoints.load(path)), table, Shards(inputs["slices"]), 4, torch.device("cpu")
    )
    assert outputs.logits is not None
    p_fast, p_high = torch.from_numpy(outputs.logits).double().sigmoid().numpy().T
    predicted = table.with_columns(p_fast=pl.Series(p_fast), p_high=pl.Series(p_high))
    by_record = predicted.group_by("record_id").agg(
        pl.col(*LABELS).first(), pl.col("p_fast").mean(), pl.col("p_high").max()
    )
    scored = [(by_record["fast"], by_record["p_fast"]), (by_record["high in V1"], by_record["p_high"])]
    row = rows(unbroken, "valid")[-1]
    assert row["macro_auprc"] == pytest.approx(sum(average_precision_score(*s) for s in scored) / 2, abs=1e-5)
    assert row["macro_auroc"] == pytest.approx(sum(roc_auc_score(*s) for s in scored) / 2, abs=1e-5)


def test_an_encoder_of_another_rate_is_refused(inputs: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(inputs["pretrain"], tmp_path / "pretrain")
    (meta,) = (tmp_path / "pretrain").glob("step_*/meta.json")
    meta.write_text(meta.read_text().replace('"sampling_rate_hz": 100.0', '"sampling_rate_hz": 500.0'))
    with pytest.raises(InputError, match="expected 500 Hz as the model was trained on, found 100 Hz in the shards"):
        finetune({**inputs, "pretrain": tmp_path / "pretrain"}, FINETUNE, tmp_path)
    with pytest.raises(InputError, match="no complete checkpoint; pretrain first"):
        finetune({**inputs, "pretrain": tmp_path}, FINETUNE, tmp_path)


def test_a_split_without_labelled_segments_is_refused(inputs: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(inputs["manifests"], tmp_path / "manifests")
    path = tmp_path / "manifests" / "labelled_valid.parquet"
    pl.read_parquet(path).head(0).write_parquet(path)
    with pytest.raises(InputError, match=r"labelled_valid\.parquet is empty"):
        finetune({**inputs, "manifests": tmp_path / "manifests"}, FINETUNE, tmp_path)


def test_a_subset_trains_on_those_patients_alone_and_is_judged_by_all(
    inputs: dict[str, Any], unbroken: Path, tmp_path: Path
) -> None:
    """As if the others had never been in the manifest."""
    table = pl.read_parquet(inputs["manifests"] / "labelled_train.parquet")
    chosen = subset(table["patient_id"].to_list(), table["record_id"].to_list(), 0.5)
    assert 0 < chosen.sum() < len(chosen)
    shutil.copytree(inputs["manifests"], tmp_path / "manifests")
    table.filter(pl.Series(chosen)).write_parquet(tmp_path / "manifests" / "labelled_train.parquet")
    config = replace(FINETUNE, max_epochs=1)
    for name in ("share", "by hand"):
        (tmp_path / name).mkdir()
    counts = finetune(inputs, replace(config, subset=0.5), tmp_path / "share")
    finetune({**inputs, "manifests": tmp_path / "manifests"}, config, tmp_path / "by hand")
    assert counts["segments"] == chosen.sum()
    assert rows(tmp_path / "share", "train") == rows(tmp_path / "by hand", "train")
    assert rows(tmp_path / "share", "valid") == rows(tmp_path / "by hand", "valid")
    assert rows(tmp_path / "share", "train") != rows(unbroken, "train")[: counts["steps"]]


def test_smaller_shares_are_parts_of_larger_ones_of_the_same_seed() -> None:
    patients = [f"toy/p{number}" for number in range(4000)]
    chosen = {
        (seed, share): {patients[i] for i in np.flatnonzero(subset(patients, patients, share, seed))}
        for seed in (0, 1)
        for share in (0.01, 0.1, 0.5, 1.0)
    }
    for seed in (0, 1):
        assert chosen[seed, 0.01] < chosen[seed, 0.1] < chosen[seed, 0.5] < chosen[seed, 1.0] == set(patients)
        for share in (0.01, 0.1, 0.5):
            deviation = math.sqrt(share * (1 - share) / len(patients))
            assert len(chosen[seed, share]) / len(patients) == pytest.approx(share, abs=4 * deviation)
    both = len(chosen[0, 0.1] & chosen[1, 0.1]) / len(patients)
    assert both == pytest.approx(0.01, abs=0.005), "another seed draws anew"


def test_another_subset_seed_trains_on_other_patients(
    inputs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pl.read_parquet(inputs["manifests"] / "labelled_train.parquet")
    losses = {}
    for seed in (0, 2):
        (tmp_path / str(seed)).mkdir()
        config = replace(FINETUNE, max_epochs=1, subset=0.6, subset_seed=seed)
        counts = finetune(inputs, config, tmp_path / str(seed))
        chosen = table.filter(pl.Series(subset(table["patient_id"].to_list(), table["record_id"].to_list(), 0.6, seed)))
        patients = len({patient or record for patient, record in chosen.select("patient_id", "record_id").rows()})
        records = chosen["record_id"].n_unique()
        assert (counts["segments"], counts["records"], counts["patients"]) == (chosen.height, records, patients)
        assert 0 < patients < 11
        shown = f"trains on {chosen.height} segments of {records} records, {patients} patients"
        assert shown in capsys.readouterr().out
        losses[seed] = [row["loss"] for row in rows(tmp_path / str(seed), "train")]
    assert losses[0] != losses[2]


def test_temperatures_and_thresholds_are_those_of_the_valid_records(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", n_train=20, n_valid=48)
    for name in ("pretrain", "out"):
        (tmp_path / name).mkdir()
    pretrain(inputs, replace(PRETRAIN, max_steps=1), tmp_path / "pretrain")
    config = replace(FINETUNE, max_epochs=6, learning_rate=3e-3, warmup_epochs=0.0)
    finetune(inputs | {"pretrain": tmp_path / "pretrain"}, config, tmp_path / "out")
    path = checkpoints.best(tmp_path / "out")
    assert path is not None
    found = checkpoints.load(path)
    space = read_label_space(inputs["manifests"] / "label_space.yaml")
    valid = read_labelled(inputs["manifests"], "valid", space)
    logits = segment_outputs(
        checkpoints.build(found), valid.segments, Shards(inputs["slices"]), 16, torch.device("cpu")
    ).logits
    assert logits is not None
    raw, _ = record_probabilities(logits, valid, space)
    predicted = calibrated(raw, space.names, found.meta.temperature, found.meta.shift)
    assert set(found.meta.temperature) == set(found.meta.thresholds) == set(LABELS)
    for k, name in enumerate(LABELS):
        temperature, shift, truth = found.meta.temperature[name], found.meta.shift[name], valid.truth[:, k]
        assert temperature != 1
        logit = np.log(raw[:, k] / (1 - raw[:, k]))
        of = {
            (factor, more): log_loss(truth, 1 / (1 + np.exp(-logit / (factor * temperature) - shift - more)))
            for factor in (0.97, 1, 1.03)
            if factor * temperature >= MIN_TEMPERATURE * (1 - 1e-9)
            for more in (-0.02, 0, 0.02)
        }
        assert of[1, 0] == min(of.values()), "no other temperature and shift are better"
        np.testing.assert_allclose(predicted[:, k], 1 / (1 + np.exp(-logit / temperature - shift)), atol=1e-9)
        assert (np.argsort(predicted[:, k]) == np.argsort(raw[:, k])).all()
        f1 = {t: f1_score(truth, predicted[:, k] >= t) for t in predicted[:, k]}
        threshold = min(f1, key=lambda t: abs(t - found.meta.thresholds[name]))
        assert threshold == pytest.approx(found.meta.thresholds[name], abs=1e-6)
        assert f1[threshold] == max(f1.values())


def test_labels_are_told_apart_by_name(inputs: dict[str, Any], unbroken: Path, tmp_path: Path) -> None:
    """The columns of the manifest in another order give the same run."""
    shutil.copytree(inputs["manifests"], tmp_path / "manifests")
    for split in ("train", "valid"):
        path = tmp_path / "manifests" / f"labelled_{split}.parquet"
        table = pl.read_parquet(path)
        table.select(*table.columns[:-2], *reversed(table.columns[-2:])).write_parquet(path)
    assert read_label_space(tmp_path / "manifests" / "label_space.yaml").names == list(LABELS)
    (tmp_path / "out").mkdir()
    finetune({**inputs, "manifests": tmp_path / "manifests"}, FINETUNE, tmp_path / "out")
    ours, theirs = digests(tmp_path / "out"), digests(unbroken)
    other = {name for name in theirs if ours[name] != theirs[name]}
    assert other == {"step_0000009/meta.json"}  # which names the manifests, and they are other files
    before, after = (checkpoints.load(out / "step_0000009").meta for out in (unbroken, tmp_path / "out"))
    assert after.training_data.pop("manifests") != before.training_data.pop("manifests")
    assert after == before


def test_bf16_trains_about_as_fp32_does(inputs: dict[str, Any], tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        (tmp_path / precision).mkdir()
        finetune(inputs, replace(FINETUNE, max_epochs=1, precision=precision), tmp_path / precision)
        losses[precision] = [row["loss"] for row in rows(tmp_path / precision, "train")]
    assert losses["fp32"] != losses["bf16"], "nothing was computed in bf16"
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)


def test_memory_that_runs_out_names_the_batch_that_fits(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Classifier.forward

    def small(self: Classifier, signal_: torch.Tensor, *rest: Any) -> Any:
        if len(signal_) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, signal_, *rest)

    monkeypatch.setattr(Classifier, "forward", small)
    with pytest.raises(InputError, match=r"segments at once need .*; (3|5) fit: use finetune.batch_size=(3|5)$"):
        finetune(inputs, FINETUNE, tmp_path)
