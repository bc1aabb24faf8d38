"""A prediction is of one segment: it does not depend on the others, nor on what training does at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from training_data import SEGMENT_SAMPLES, TINY, write_inputs

from ecgfm.data import Shards, load, standardise
from ecgfm.model import Classifier, Encoder, PretrainModel
from ecgfm.predict import saliency, segment_outputs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_inputs(tmp_path_factory.mktemp("inputs"), n_train=9, n_valid=2)


@pytest.fixture(scope="module")
def table(inputs: dict[str, Any]) -> pl.DataFrame:
    return pl.read_parquet(inputs["manifests"] / "labelled_train.parquet")


@pytest.fixture
def classifier() -> Classifier:
    """Untrained, with every kind of dropout, in training mode."""
    torch.manual_seed(1)
    return Classifier(TINY, 2, dropout=0.5, activation_dropout=0.5).train()


def test_outputs_do_not_depend_on_the_batch(
    inputs: dict[str, Any], table: pl.DataFrame, classifier: Classifier
) -> None:
    shards = Shards(inputs["slices"])
    outputs = [segment_outputs(classifier, table, shards, size, CPU) for size in (1, 7, 100)]
    assert outputs[0].embeddings.shape == (18, TINY.width)
    assert outputs[0].embeddings.dtype == np.float32
    for other in outputs[1:]:
        assert outputs[0].logits is not None
        assert other.logits is not None
        np.testing.assert_allclose(other.embeddings, outputs[0].embeddings, atol=1e-6)
        np.testing.assert_allclose(other.logits, outputs[0].logits, atol=1e-6)
    assert np.ptp(outputs[0].embeddings, axis=0).max() > 0.01


def test_rows_are_in_the_order_asked_for(inputs: dict[str, Any], table: pl.DataFrame, classifier: Classifier) -> None:
    shards = Shards(inputs["slices"])
    straight = segment_outputs(classifier, table, shards, 4, CPU)
    shuffled = table.with_row_index().sample(fraction=1.0, shuffle=True, seed=3)
    assert shuffled["index"].to_list() != list(range(18))
    mixed = segment_outputs(classifier, shuffled.drop("index"), shards, 4, CPU)
    np.testing.assert_allclose(mixed.embeddings, straight.embeddings[shuffled["index"].to_numpy()], atol=1e-6)


def test_an_embedding_is_the_mean_of_frames_and_a_logit_is_read_from_it(
    inputs: dict[str, Any], table: pl.DataFrame, classifier: Classifier
) -> None:
    shards = Shards(inputs["slices"])
    outputs = segment_outputs(classifier, table, shards, 4, CPU)
    (batch,) = load(shards, shards.places(table)[:, None], iter([np.arange(18)]), CPU)
    classifier.eval()
    with torch.no_grad():
        frames = classifier.encoder(standardise(batch, CPU)).frames
        assert (frames != 0).all()
        np.testing.assert_allclose(outputs.embeddings, frames.mean(dim=1).numpy(), atol=1e-6)
        assert outputs.logits is not None
        expected = classifier.proj(torch.from_numpy(outputs.embeddings))
    np.testing.assert_allclose(outputs.logits, expected.numpy(), atol=1e-6)


def test_a_pretraining_model_is_asked_for_its_encoder(inputs: dict[str, Any], table: pl.DataFrame) -> None:
    torch.manual_seed(2)
    pretrained = PretrainModel(TINY, dropout=0.5)
    encoder = Encoder(TINY)
    encoder.load_state_dict(pretrained.state_dict(), strict=False)
    shards = Shards(inputs["slices"])
    ours, theirs = (segment_outputs(model, table, shards, 5, CPU) for model in (pretrained, encoder))
    assert ours.logits is None
    np.testing.assert_array_equal(ours.embeddings, theirs.embeddings)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_left_as_it_was(
    inputs: dict[str, Any], table: pl.DataFrame, classifier: Classifier, training: bool
) -> None:
    classifier.train(training)
    segment_outputs(classifier, table, Shards(inputs["slices"]), 5, CPU)
    saliency(classifier, torch.randn(1, 12, SEGMENT_SAMPLES))
    modes = {module.training for module in classifier.modules() if isinstance(module, nn.Module)}
    assert modes == {training}


def test_saliency_spans_zero_to_one_in_each_segment(classifier: Classifier) -> None:
    signal = torch.randn(3, 12, SEGMENT_SAMPLES, generator=torch.Generator().manual_seed(0))
    shown = saliency(classifier, signal)
    assert shown.shape == (3, SEGMENT_SAMPLES)
    assert shown.dtype == torch.float32
    assert shown.amin(dim=1).tolist() == [0, 0, 0]
    assert shown.amax(dim=1).tolist() == [1, 1, 1]
    torch.testing.assert_close(saliency(classifier, signal[1:2]), shown[1:2], atol=1e-4, rtol=0)
    torch.testing.assert_close(saliency(classifier.encoder, signal), shown)
