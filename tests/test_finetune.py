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
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from training_data import LABELS, PRETRAIN, TINY, digests, rows, write_inputs

from ecgfm import checkpoints
from ecgfm import finetune as stage
from ecgfm.config import FinetuneConfig
from ecgfm.data import Shards, subset
from ecgfm.ecg import LEADS, InputError
from ecgfm.finetune import finetune, is_better, masked_bce, parameter_groups, positive_weight
from ecgfm.fingerprints import Input
from ecgfm.label_space import Label, LabelSpace, read_label_space
from ecgfm.model import Classifier
from ecgfm.pipeline import FINETUNE as FINETUNE_STAGE
from ecgfm.predict import segment_outputs
from ecgfm.pretrain import pretrain
from ecgfm.stages import Request, Store

FINETUNE = FinetuneConfig(
    precision="fp32",
    max_epochs=3,
    batch_size=16,
    learning_rate=1e-3,
    layer_decay=0.8,
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
    whole = masked_bce

    def acting(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, int]:
        nonlocal done
        if logits.requires_grad:
            if done == step:
                act()
            done += 1
        return whole(logits, labels, weights)

    monkeypatch.setattr(stage, "masked_bce", acting)


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


def test_it_learns_what_can_be_learned(inputs: dict[str, Any], tmp_path: Path) -> None:
    config = replace(
        FINETUNE, max_epochs=25, learning_rate=3e-3, layer_decay=1.0, lead_mask_probability=0.0, freeze_extractor=False
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


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_extractor_does_not_change(inputs: dict[str, Any], tmp_path: Path, frozen: bool) -> None:
    finetune(inputs, replace(FINETUNE, max_epochs=1, freeze_extractor=frozen, weight_decay=0.1), tmp_path)
    before, after = pretrained_state(inputs), finetuned_state(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    extractor = {name for name in before if name.startswith("feature_extractor.")}
    assert len(extractor) == 6
    assert changed >= set(before) - extractor
    assert (changed & extractor) == (set() if frozen else extractor)


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


def test_unknown_labels_carry_no_loss_and_no_gradient() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, generator=random, requires_grad=True)
    labels = torch.randint(2, (6, 3), generator=random).float()
    unknown = torch.rand(6, 3, generator=random) < 0.4
    labels[unknown] = math.nan
    weights = torch.tensor([2.0, 1.0, 0.5])
    total, known = masked_bce(logits, labels, weights)
    slow, count = 0.0, 0
    for i in range(6):
        for j in range(3):
            if not unknown[i, j]:
                probability = 1 / (1 + math.exp(-float(logits[i, j].detach())))
                positive = float(labels[i, j])
                slow -= float(weights[j]) * positive * math.log(probability) + (1 - positive) * math.log(
                    1 - probability
                )
                count += 1
    assert 0 < count < 18
    assert known == count
    assert float(total.detach()) == pytest.approx(slow, rel=1e-5)
    total.backward()
    assert logits.grad is not None
    assert not logits.grad[unknown].any()
    assert logits.grad[~unknown].all()


def test_a_batch_of_nothing_but_unknown_labels_changes_nothing() -> None:
    logits = torch.randn(2, 2, requires_grad=True)
    total, known = masked_bce(logits, torch.full((2, 2), math.nan), torch.ones(2))
    total.backward()
    assert (float(total.detach()), known) == (0.0, 1)
    assert logits.grad is not None
    assert not logits.grad.any()


def test_positives_weigh_as_much_as_negatives() -> None:
    space = LabelSpace((Label("a", (), "mean"), Label("b", (), "max")))
    labels = torch.tensor([[1, 0], [0, 0], [0, 0], [0, 1], [math.nan, 1]])
    assert positive_weight(labels, space).tolist() == [3.0, 1.5]
    with pytest.raises(InputError, match="label 'a' has 1 positive and 0 negative"):
        positive_weight(labels[:1], space)


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
