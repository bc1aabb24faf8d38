"""The small supervised baseline: it learns what is there, the same bytes each time, and says what it cannot do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from training_data import LABELS, RATE_HZ, SEGMENT_SAMPLES, write_inputs

from ecgfm.config import EvaluateConfig
from ecgfm.data import Shards
from ecgfm.ecg import LEADS, InputError
from ecgfm.label_space import LabelSpace, read_label_space
from ecgfm.predict import Labelled, read_labelled
from ecgfm.scores.metrics import point_scores
from ecgfm.small_network import ResidualNetwork, train_small_network

CPU = torch.device("cpu")
CONFIG = EvaluateConfig(supervised_epochs=8)


class Given(NamedTuple):
    splits: dict[str, Labelled]
    shards: Shards
    space: LabelSpace


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """90 records of slow and fast waves, in a third of them V1 is high; 60 to train on."""
    inputs: dict[str, Any] = write_inputs(tmp_path_factory.mktemp("given"), n_train=60, n_valid=30)
    manifests: Path = inputs["manifests"]
    held_out = pl.read_parquet(manifests / "labelled_valid.parquet")
    for_test = held_out["record_id"] >= "toy/075"
    held_out.filter(for_test).write_parquet(manifests / "labelled_test.parquet")
    held_out.filter(~for_test).write_parquet(manifests / "labelled_valid.parquet")
    space = read_label_space(manifests / "label_space.yaml")
    splits = {split: read_labelled(manifests, split, space) for split in ("train", "valid", "test")}
    return Given(splits, Shards(inputs["slices"]), space)


def test_it_learns_a_planted_pattern(given: Given) -> None:
    trained = train_small_network(*given, CONFIG, CPU)
    truth = given.splits["test"].truth
    assert len(truth) == 15
    assert point_scores(truth, trained.probabilities).auroc[LABELS.index("fast")] > 0.95
    losses = [row["loss"] for row in trained.rows if row["split"] == "train"]
    assert losses[-1] < losses[0] / 2


def test_what_it_learns_is_the_labels(given: Given) -> None:
    opposite = {
        split: replace(one, labels=1 - one.labels, truth=1 - one.truth)
        for split, one in given.splits.items()
        if split != "test"
    }
    trained = train_small_network({**given.splits, **opposite}, given.shards, given.space, CONFIG, CPU)
    assert point_scores(given.splits["test"].truth, trained.probabilities).auroc[LABELS.index("fast")] < 0.05


def test_the_epoch_of_the_best_valid_auprc_is_the_one_that_answers(given: Given) -> None:
    trained = train_small_network(*given, CONFIG, CPU)
    scores = [row["macro_auprc"] for row in trained.rows if row["split"] == "valid"]
    assert len(scores) == CONFIG.supervised_epochs
    assert trained.best_epoch == 1 + int(np.argmax(scores))
    assert trained.valid_macro_auprc == max(scores)
    on_valid = {**given.splits, "test": given.splits["valid"]}
    answered = train_small_network(on_valid, given.shards, given.space, CONFIG, CPU).probabilities
    assert np.nanmean(point_scores(given.splits["valid"].truth, answered).auprc) == max(scores)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(given: Given) -> None:
    config = replace(CONFIG, supervised_epochs=2)
    once = train_small_network(*given, config, CPU)
    torch.rand(7)  # what was drawn before does not matter
    again = train_small_network(*given, config, CPU)
    assert once.probabilities.tobytes() == again.probabilities.tobytes()
    assert once.rows == again.rows
    other = train_small_network(*given, replace(config, seed=1), CPU)
    assert once.probabilities.tobytes() != other.probabilities.tobytes()


def test_how_many_segments_are_asked_at_once_does_not_matter(given: Given) -> None:
    config = replace(CONFIG, supervised_epochs=2)
    few, many = (train_small_network(*given, replace(config, batch_size=n), CPU).probabilities for n in (3, 64))
    assert few == pytest.approx(many, abs=1e-6)


def test_a_label_that_the_sample_has_one_class_of_does_not_stop_it(given: Given) -> None:
    train = given.splits["train"]
    labels = train.labels.clone()
    labels[:, 1] = 0
    splits = {**given.splits, "train": replace(train, labels=labels)}
    trained = train_small_network(splits, given.shards, given.space, replace(CONFIG, supervised_epochs=1), CPU)
    assert np.isfinite(trained.probabilities).all()


def test_classes_that_exclude_each_other_add_up_to_one(given: Given) -> None:
    splits = {}
    for split, labelled in given.splits.items():
        of_segment, of_record = labelled.labels[:, 1:].nan_to_num(0.0), np.nan_to_num(labelled.truth[:, 1:])
        labels = torch.cat([of_segment, 1 - of_segment], dim=1)
        splits[split] = replace(labelled, labels=labels, truth=np.hstack([of_record, 1 - of_record]))
    labels = tuple(replace(label, aggregation="mean") for label in given.space.labels)
    space = replace(given.space, labels=labels, task="multiclass")
    trained = train_small_network(splits, given.shards, space, replace(CONFIG, supervised_epochs=1), CPU)
    assert trained.probabilities.sum(axis=1) == pytest.approx(np.ones(15))


def test_a_valid_split_that_cannot_choose_an_epoch_is_refused(given: Given) -> None:
    valid = given.splits["valid"]
    splits = {**given.splits, "valid": replace(valid, truth=np.ones_like(valid.truth))}
    with pytest.raises(InputError, match="no label has both classes in the valid split"):
        train_small_network(splits, given.shards, given.space, CONFIG, CPU)


@pytest.mark.parametrize("training", [True, False])
def test_too_little_memory_is_a_clear_line(given: Given, monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    whole = ResidualNetwork.forward

    def forward(self: ResidualNetwork, signal: torch.Tensor) -> torch.Tensor:
        if self.training == training and len(signal) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, signal)

    monkeypatch.setattr(ResidualNetwork, "forward", forward)
    expected = r"more memory than cpu has; .* set evaluate\.supervised_baseline=false"
    if not training:
        expected = r"\d+ segments at once need more memory than cpu has; [12] fit: use evaluate\.batch_size=[12]$"
    with pytest.raises(InputError, match=expected):
        train_small_network(*given, CONFIG, CPU)


def test_a_loss_that_is_not_finite_stops_it(given: Given) -> None:
    with pytest.raises(InputError, match=r"loss of step \d+ is .*supervised_learning_rate"):
        train_small_network(*given, replace(CONFIG, supervised_learning_rate=1e30), CPU)


def test_it_is_as_large_as_it_says() -> None:
    model = ResidualNetwork(12, 10, 500.0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 161_066


@pytest.mark.parametrize(("rate_hz", "n_samples"), [(500.0, 2500), (RATE_HZ, SEGMENT_SAMPLES), (240.0, 601), (50.0, 9)])
def test_any_rate_and_length_will_do_and_a_missing_lead_is_zeros(rate_hz: float, n_samples: int) -> None:
    model = ResidualNetwork(len(LEADS), 3, rate_hz).eval()
    signal = torch.randn(2, len(LEADS), n_samples)
    signal[:, 3:] = 0
    assert model(signal).shape == (2, 3)
