"""A prediction is of one segment: it does not depend on the others, nor on what training does at random."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from training_data import LABELS, RATE_HZ, SEGMENT_SAMPLES, TINY, write_inputs

from ecgfm import checkpoints
from ecgfm.checkpoints import Kind, Meta
from ecgfm.data import Shards, load, standardise
from ecgfm.ecg import LEADS, InputError
from ecgfm.model import Classifier, Encoder, PretrainModel
from ecgfm.predict import checkpoint_for, saliency, segment_outputs

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


# ---- the checkpoint that is used


def written(directory: Path, kind: Kind, **differences: Any) -> Path:
    meta = Meta(kind, TINY, LEADS, RATE_HZ, SEGMENT_SAMPLES, labels=LABELS if kind == "finetuned" else ())
    meta = dataclasses.replace(meta, **differences)
    model = PretrainModel(meta.model) if kind == "pretrained" else Classifier(meta.model, len(LABELS))
    return checkpoints.save(directory, 1, model.state_dict(), None, meta)


@pytest.mark.parametrize("kind", ["pretrained", "finetuned"])
def test_a_checkpoint_for_segments_like_these_is_read(inputs: dict[str, Any], tmp_path: Path, kind: Kind) -> None:
    shards = Shards(inputs["slices"])
    assert checkpoint_for(written(tmp_path, kind), kind, shards).kind == kind
    # the network takes segments of any length
    checkpoint_for(written(tmp_path, kind, segment_samples=2 * SEGMENT_SAMPLES), kind, shards)


SWAPPED = (LEADS[1], LEADS[0], *LEADS[2:])


@pytest.mark.parametrize(
    ("kind", "differences", "message"),
    [
        ("finetuned", {}, "expected a pretrained checkpoint, found a finetuned one; it was trained on labels"),
        ("pretrained", {"sampling_rate_hz": 500.0}, "expected 500 Hz as the model was trained on, found 100 Hz in the"),
        (
            "pretrained",
            {"leads": SWAPPED},
            "expected the leads II I III aVR aVL aVF V1 V2 V3 V4 V5 V6, as the model was trained on, found the same in "
            "the order I II III aVR aVL aVF V1 V2 V3 V4 V5 V6; set prepare.leads",
        ),
        (
            "pretrained",
            {"leads": LEADS[:2], "model": dataclasses.replace(TINY, n_leads=2)},
            "expected the leads I II, as the model was trained on, found in the shards I II III",
        ),
    ],
)
def test_a_checkpoint_for_other_segments_or_of_the_other_kind_is_refused_in_a_line(
    inputs: dict[str, Any], tmp_path: Path, kind: Kind, differences: dict[str, Any], message: str
) -> None:
    path = written(tmp_path, kind, **differences)
    with pytest.raises(InputError) as caught:
        checkpoint_for(path, "pretrained", Shards(inputs["slices"]))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_pretrained_checkpoint_predicts_nothing(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found a pretrained one; it has no classifier: finetune it first"):
        checkpoint_for(written(tmp_path, "pretrained"), "finetuned", Shards(inputs["slices"]))


def test_a_damaged_checkpoint_is_refused_where_it_is_used(inputs: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, "pretrained")
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(InputError, match="its content is not what was saved"):
        checkpoint_for(path, "pretrained", Shards(inputs["slices"]))


def test_bf16_is_asked_for_and_near(inputs: dict[str, Any], table: pl.DataFrame, classifier: Classifier) -> None:
    shards = Shards(inputs["slices"])
    exact, rounded = (segment_outputs(classifier, table, shards, 5, CPU, p) for p in ("fp32", "bf16"))  # type: ignore[arg-type]
    assert exact.logits is not None
    assert rounded.logits is not None
    assert not np.array_equal(exact.embeddings, rounded.embeddings)
    np.testing.assert_allclose(rounded.logits, exact.logits, atol=0.05)


def test_memory_that_runs_out_names_the_batch_that_fits(
    inputs: dict[str, Any], table: pl.DataFrame, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Encoder.forward

    def small(self: Encoder, signal: torch.Tensor, *rest: Any) -> Any:
        if len(signal) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, signal, *rest)

    monkeypatch.setattr(Encoder, "forward", small)
    with pytest.raises(
        InputError, match=r"^6 segments at once need more memory than cpu has; 3 fit: use batch_size=3$"
    ):
        segment_outputs(classifier, table, Shards(inputs["slices"]), 8, CPU)
    monkeypatch.setattr(Encoder, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(InputError, match="one does not fit either"):
        segment_outputs(classifier, table, Shards(inputs["slices"]), 8, CPU)
