"""A model answers about files as the pipeline's evaluation answers about the same recordings."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from conftest import write_wfdb16
from training_data import TINY

from ecgfm import checkpoints, inference
from ecgfm.checkpoints import Kind, Meta
from ecgfm.config import from_dict
from ecgfm.contracts import read_table
from ecgfm.data import Shards
from ecgfm.ecg import LEADS, EcgRecord, InputError, Rejected
from ecgfm.formats import read_file
from ecgfm.inference import Model, Prediction, load, recording
from ecgfm.model import Classifier, Encoder, PretrainModel
from ecgfm.pipeline import Walker, walk
from ecgfm.pipelines_file import Pipeline
from ecgfm.recordings import Refused, find_recordings, find_slices, prepare, prepare_files, read_slices
from ecgfm.shards import PER_LEAD, ShardReader, standardisation
from ecgfm.stages import Output, Store

PIPELINE = {
    "sources": ["synthetic"],
    "synthetic": {"n_patients": 40},
    "prepare": {"workers": 1},
    "splits": {"valid_share": 0.3, "test_share": 0.3},
    "labels": {
        "scheme": "codes",
        "codes": {"sinus rhythm": ["426783006"], "premature ventricular contraction": ["427172004"]},
        "max_labels": ["premature ventricular contraction"],
    },
    "manifests": {"rare_labels": "drop"},
    "pretrain": {
        "model": {
            "conv_channels": 8, "width": 32, "n_layers": 1, "n_heads": 2, "ffn_width": 32, "pos_conv_kernel": 8,
            "pos_conv_groups": 4, "codebook_entries": 8, "codebook_width": 16, "contrast_width": 16,
        },
        "max_steps": 2, "batch_pairs": 4, "accumulate": 1, "n_negatives": 10, "valid_every": 2, "save_every": 2,
        "device": "cpu", "precision": "fp32",
    },
    "finetune": {"max_epochs": 2, "batch_size": 32, "learning_rate": 1e-3, "device": "cpu", "precision": "fp32"},
    "evaluate": {"bootstrap_samples": 20, "device": "cpu", "precision": "fp32", "drawn_records": 1},
}  # fmt: skip

LABELS = ("fast", "high, in V1")
RATE_HZ, SEGMENT_SAMPLES = 100.0, 256


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """A small run: stage -> directories of its outputs."""
    return made(PIPELINE, tmp_path_factory.mktemp("data"))


def made(pipeline: dict[str, Any], data_dir: Path) -> dict[str, list[Path]]:
    store = Store(data_dir)
    walker = Walker(store, lambda requests, group: [store.make(request) for request in requests])
    walk(from_dict(Pipeline, pipeline, "test"), {}, walker)
    found: dict[str, list[Path]] = {}
    for request, output in walker.made:
        assert isinstance(output, Output)
        found.setdefault(request.stage.name, []).append(output.directory)
    return found


@pytest.fixture(scope="module")
def records(run: dict[str, list[Path]]) -> pl.DataFrame:
    return pl.concat([read_table(directory / "records.parquet", "records") for directory in run["prepare"]])


def raw_file(run: dict[str, list[Path]], record: dict[str, Any]) -> Path:
    (path,) = run["synthesize"][0].glob(f"**/{record['raw_path']}")
    return path


def test_probabilities_of_raw_files_are_those_of_the_evaluation(
    run: dict[str, list[Path]], records: pl.DataFrame
) -> None:
    expected = read_table(run["evaluate"][0] / "predictions.parquet", "predictions")
    assert expected.height > 15
    model = load(run["finetune"][0], "cpu")
    assert model.path == checkpoints.best(run["finetune"][0])
    rows = expected.join(records, on="record_id", maintain_order="left")
    answers = model.predict_many([raw_file(run, row) for row in rows.iter_rows(named=True)], batch_size=7)
    for row, answer in zip(rows.iter_rows(named=True), answers, strict=True):
        assert isinstance(answer, Prediction)
        assert list(answer.probabilities) == ["sinus rhythm", "premature ventricular contraction"]
        for label, probability in answer.probabilities.items():
            assert probability == pytest.approx(row[label], abs=1e-6)
        assert answer.segments.height == row["n_segments"]
    assert np.ptp(expected["sinus rhythm"].to_numpy()) > 0.01, "all records alike would prove nothing"


def test_embeddings_of_raw_files_are_those_of_the_evaluation(run: dict[str, list[Path]], records: pl.DataFrame) -> None:
    expected = read_table(run["evaluate"][0] / "embeddings.parquet", "embeddings").filter(encoder="pretrained")
    rows = expected.join(records, on="record_id", maintain_order="left").sample(20, seed=1)
    model = load(run["pretrain"][0], "cpu")
    found = [model.embed(raw_file(run, row)) for row in rows.iter_rows(named=True)]
    np.testing.assert_allclose(
        np.stack([each.record for each in found]), np.array(rows["embedding"].to_list()), atol=1e-6
    )
    assert np.ptp([each.record for each in found], axis=0).max() > 0.01


def test_a_recording_is_prepared_as_the_training_segments_were(tmp_path: Path, run: dict[str, list[Path]]) -> None:
    """Another recipe than the published one: the checkpoint knows it, and other segments are refused."""
    recipe = {"filter": "bandpass", "bandpass_hz": [1.0, 30.0], "constant_leads": "reject"}
    other = made(PIPELINE | {"prepare": recipe | {"workers": 1}}, tmp_path)
    model = load(other["finetune"][0], "cpu")
    assert model.meta.departures == recipe
    assert model.preparation.filter == "bandpass"
    expected = read_table(other["evaluate"][0] / "predictions.parquet", "predictions")
    listed = pl.concat([read_table(directory / "records.parquet", "records") for directory in other["prepare"]])
    rows = expected.join(listed, on="record_id", maintain_order="left").head(5)
    for row in rows.iter_rows(named=True):
        answer = model.predict(raw_file(other, row))
        assert answer.probabilities == pytest.approx({label: row[label] for label in model.labels}, abs=1e-6)
    with pytest.raises(
        InputError, match=r"prepared with bandpass_hz=\[1\.0, 30\.0\], constant_leads=reject, filter=bandpass, .*by the"
    ):
        next(read_slices(run["prepare"], model.preparation))
    with pytest.raises(
        InputError, match=r"expected segments prepared by the published recipe .*found with .*filter=bandpass"
    ):
        Shards([run["prepare"][0], other["prepare"][-1]])


def test_prepared_records_get_the_answers_of_their_raw_files(run: dict[str, list[Path]], records: pl.DataFrame) -> None:
    model = load(run["finetune"][0], "cpu")
    listed = {row["record_id"]: raw_file(run, row) for row in records.iter_rows(named=True)}
    n_refused = 0
    for outputs in model.outputs(read_slices(run["prepare"], model.preparation), 16):
        if isinstance(outputs, Refused):
            n_refused += 1
            continue
        ours = model.prediction(outputs)
        theirs = model.predict(listed.pop(ours.record_id))
        assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-6)
        for field in ("missing_leads", "invalid_leads", "constant_leads", "duration_s", "sampling_rate_hz"):
            assert getattr(ours, field) == getattr(theirs, field)
        assert ours.quality == pytest.approx(theirs.quality, nan_ok=True)
        if len(listed) < len(records) - 25:
            break
    assert len(listed) < len(records)


def test_what_standardises_is_what_a_shard_gives(run: dict[str, list[Path]]) -> None:
    reader = ShardReader(run["prepare"][0] / "shard.h5")
    per_lead = np.stack(reader.per_lead(*PER_LEAD), axis=1)
    scale, offset, sd_mv = reader.standardisation()
    ours = np.stack([standardisation(values) for values in per_lead])
    np.testing.assert_array_equal(ours[:, 0], scale)
    np.testing.assert_array_equal(ours[:, 1], offset)
    np.testing.assert_array_equal(ours[:, 2], sd_mv)
    reader.close()


# ---- a small model with random weights


def written(folder: Path, kind: Kind = "finetuned", seed: int = 1, **differences: Any) -> Path:
    """A checkpoint of random weights."""
    meta = Meta(
        kind, TINY, LEADS, RATE_HZ, SEGMENT_SAMPLES,
        labels=LABELS if kind == "finetuned" else (),
        aggregation={LABELS[1]: "max"} if kind == "finetuned" else {},
        thresholds={LABELS[0]: 0.5} if kind == "finetuned" else {},
    )  # fmt: skip
    meta = dataclasses.replace(meta, **differences)
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    network = PretrainModel(meta.model) if kind == "pretrained" else Classifier(meta.model, len(LABELS))
    return checkpoints.save(folder, 1, network.state_dict(), None, meta)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(written(tmp_path_factory.mktemp("model")), "cpu")


def beats(seconds: float = 10, rate_hz: float = RATE_HZ, seed: int = 0, n_leads: int = 12) -> np.ndarray:
    """(lead, time) int16: steps of a microvolt, as if 1000 to the millivolt."""
    random = np.random.default_rng(seed)
    time_s = np.arange(round(seconds * rate_hz)) / rate_hz
    wave = 500 * np.sin(2 * np.pi * (1 + seed) * time_s + np.arange(n_leads)[:, None])
    return (wave + random.normal(scale=50, size=wave.shape)).astype(np.int16)


def test_a_file_an_ecg_record_and_an_array_get_one_answer(model: Model, tmp_path: Path) -> None:
    digital = beats()
    write_wfdb16(tmp_path, "r1", digital, sampling_rate_hz=RATE_HZ)
    record, _ = read_file(tmp_path / "r1.hea", "r1.hea")
    order = np.random.default_rng(0).permutation(12)
    array = recording(digital[order] / 1000, RATE_HZ, [LEADS[i].upper() for i in order], "r1.hea")
    answers = [model.predict(one) for one in (tmp_path / "r1.hea", str(tmp_path / "r1.mat"), record, array)]
    for answer in answers:
        assert answer.record_id == "r1.hea"
        assert answer.probabilities == pytest.approx(answers[0].probabilities, abs=1e-5)
        assert answer.remarks == ("the last 2.32 s are no whole segment: not used",)
        assert answer.missing_leads == answer.invalid_leads == answer.constant_leads == ()


def test_an_array_alone_is_refused_with_the_way_to_give_one(model: Model) -> None:
    with pytest.raises(InputError, match=r"neither its rate nor its leads; give ecgfm\.recording\("):
        model.predict(beats())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a file or a recording, found Tensor"):
        model.embed(torch.zeros(12, 5000))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"expected several recordings, found the text 'a\.hea'"):
        next(model.predict_many("a.hea"))
    assert str(model.path) in repr(model)


def test_a_records_probability_comes_from_its_segments_as_the_checkpoint_says(model: Model) -> None:
    answer = model.predict(recording(beats(13) / 1000, RATE_HZ))
    of_segments = answer.segments
    assert of_segments.columns == ["segment_index", "start_s", *LABELS]
    assert of_segments["start_s"].to_list() == pytest.approx([0, 2.56, 5.12, 7.68, 10.24])
    mean, greatest = answer.probabilities.values()
    assert mean == pytest.approx(of_segments[LABELS[0]].mean())
    assert greatest == of_segments[LABELS[1]].max()
    assert answer.decisions == {LABELS[0]: mean >= 0.5, LABELS[1]: None}


def test_a_records_probability_is_calibrated_by_its_labels_temperature(tmp_path: Path) -> None:
    """Its logit is divided, and then shifted, and so are its segments'."""
    one = recording(beats() / 1000, RATE_HZ)
    raw = load(written(tmp_path / "raw"), "cpu").predict(one)
    calibrated = load(written(tmp_path / "two", temperature={LABELS[0]: 2.0}, shift={LABELS[0]: 0.3}), "cpu").predict(
        one
    )
    logit_raw, logit = (np.log(p / (1 - p)) for p in (a.probabilities[LABELS[0]] for a in (raw, calibrated)))
    assert abs(logit_raw) > 0.01
    assert logit == pytest.approx(logit_raw / 2 + 0.3)
    assert calibrated.probabilities[LABELS[1]] == raw.probabilities[LABELS[1]]
    p, p_raw = (answer.segments[LABELS[0]].to_numpy() for answer in (calibrated, raw))
    np.testing.assert_allclose(np.log(p / (1 - p)), np.log(p_raw / (1 - p_raw)) / 2 + 0.3, atol=1e-9)


def test_a_decision_is_made_at_the_threshold_itself(tmp_path: Path) -> None:
    one = recording(beats() / 1000, RATE_HZ)
    probability = load(written(tmp_path), "cpu").predict(one).probabilities[LABELS[0]]
    for threshold, expected in ((probability, True), (np.nextafter(probability, 1), False)):
        path = written(tmp_path / str(expected), thresholds={LABELS[0]: float(threshold)})
        assert load(path, "cpu").predict(one).decisions[LABELS[0]] is expected


def test_answers_do_not_depend_on_the_batch_and_are_equal_twice(model: Model) -> None:
    several = [recording(beats(6 + k, seed=k) / 1000, RATE_HZ, record_id=str(k)) for k in range(6)]
    asked = {
        size: [one.probabilities for one in model.predict_many(several, size) if isinstance(one, Prediction)]
        for size in (1, 5, 1000)
    }
    again = [one.probabilities for one in model.predict_many(several, 5) if isinstance(one, Prediction)]
    assert again == asked[5]
    assert len(again) == 6
    for size in (1, 1000):
        for ours, theirs in zip(asked[size], asked[5], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6)
    assert len({one[LABELS[0]] for one in again}) == 6


def test_answers_come_in_order_with_the_rejected_in_their_place(model: Model, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no ECG")
    good = recording(beats() / 1000, RATE_HZ)
    short = recording(beats(2) / 1000, RATE_HZ)
    other = recording(beats(n_leads=1) / 1000, RATE_HZ, ["MCL1"])
    empty = recording(np.full((12, 1000), np.nan), RATE_HZ)
    answers = list(model.predict_many([good, short, tmp_path / "notes.txt", other, good, empty], batch_size=2))
    reasons = [answer.reason if isinstance(answer, Rejected) else "" for answer in answers]
    assert reasons == ["", "too_short", "unknown_format", "no_standard_lead", "", "no_valid_sample"]
    assert "expected at least 2.56 s, one segment, found 2 s" in str(answers[1])
    with pytest.raises(Rejected, match="too_short"):
        model.predict(short)
    with pytest.raises(Rejected, match="too_short"):
        model.embed(short)
    with pytest.raises(Rejected, match="too_short"):
        model.saliency(short)


def test_no_more_recordings_are_taken_than_a_batch_needs(model: Model) -> None:
    taken = []

    def endless() -> Iterator[EcgRecord]:
        while True:
            taken.append(1)
            yield recording(beats() / 1000, RATE_HZ)

    answers = model.predict_many(endless(), batch_size=9)  # three segments each
    for _ in range(10):
        next(answers)
    assert len(taken) <= 12


def test_a_lead_that_is_missing_is_what_the_pipeline_makes_of_nan(model: Model) -> None:
    digital = beats()
    chosen = [LEADS.index("II"), LEADS.index("V1")]
    few = model.predict(recording(digital[chosen] / 1000, RATE_HZ, ["ii", "V1"]))
    with_nan = digital / 1000.0
    with_nan[[row for row in range(12) if row not in chosen]] = np.nan
    whole = model.predict(recording(with_nan, RATE_HZ))
    assert few.probabilities == whole.probabilities
    assert few.missing_leads == tuple(lead for lead in LEADS if lead not in ("II", "V1"))
    assert few.remarks[0] == "I III aVR aVL aVF V2 V3 V4 V5 V6 missing: 0 for the model"
    assert whole.missing_leads == ()
    assert whole.invalid_leads == few.missing_leads
    assert few.probabilities != model.predict(recording(digital / 1000, RATE_HZ)).probabilities


def test_it_is_what_the_network_says_of_standardised_segments(model: Model, tmp_path: Path) -> None:
    """From the millivolts of two leads, with none of the code in between."""
    signal_mv = beats(2 * SEGMENT_SAMPLES / RATE_HZ, n_leads=2) / 1000
    standardised = np.zeros((12, 2 * SEGMENT_SAMPLES), np.float32)
    for row, lead in ((0, "V6"), (1, "aVR")):
        standardised[LEADS.index(lead)] = (signal_mv[row] - signal_mv[row].mean()) / signal_mv[row].std()
    segments = torch.from_numpy(standardised.reshape(12, 2, SEGMENT_SAMPLES).swapaxes(0, 1).copy())
    network = checkpoints.build(checkpoints.load(model.path))
    with torch.no_grad():
        expected = network(segments)
    answer = model.predict(recording(signal_mv, RATE_HZ, ["V6", "aVR"]))
    found = np.stack([answer.segments[label].to_numpy() for label in LABELS], axis=1)
    np.testing.assert_allclose(found, expected.logits.sigmoid().numpy(), atol=1e-4)  # the segments are int16
    embedded = model.embed(recording(signal_mv, RATE_HZ, ["V6", "aVR"]))
    np.testing.assert_allclose(embedded.segments, expected.embedding.numpy(), atol=1e-3)
    np.testing.assert_allclose(embedded.record, embedded.segments.mean(axis=0), atol=1e-6)


def test_a_model_of_two_leads_takes_them_by_name(tmp_path: Path) -> None:
    path = written(tmp_path, leads=("V1", "II"), model=dataclasses.replace(TINY, n_leads=2))
    model = load(path, "cpu")
    digital = beats() / 1000
    answer = model.predict(recording(digital, RATE_HZ))
    few = model.predict(recording(digital[[1, 6]], RATE_HZ, ["II", "V1"]))
    assert answer.probabilities == few.probabilities
    assert answer.missing_leads == few.missing_leads == ()


def test_odd_recordings_are_told(model: Model) -> None:
    digital = beats(10, rate_hz=200).astype(float)
    digital[3] = 5
    digital[7, 100:110] = np.nan
    answer = model.predict(recording(digital / 1000, 200))
    assert answer.constant_leads == ("aVR",)
    assert answer.invalid_leads == ("V2",)
    assert answer.quality["worst_flat_share"] == 1
    assert answer.sampling_rate_hz == 200
    assert answer.duration_s == 10
    assert "resampled from 200 Hz" in answer.remarks
    assert "aVR constant: 0 for the model" in answer.remarks


# ---- the checkpoint


def test_a_stage_means_its_best_checkpoint_and_else_the_latest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        torch.manual_seed(step)
        state = Classifier(TINY, 2).state_dict()
        checkpoints.save(
            tmp_path, step, state, None, Meta("finetuned", TINY, LEADS, RATE_HZ, SEGMENT_SAMPLES, labels=LABELS)
        )
    assert load(tmp_path, "cpu").meta.step == 3
    checkpoints.mark_best(tmp_path, 2)
    assert load(str(tmp_path), "cpu").meta.step == 2
    assert load(tmp_path / "step_0000001", "cpu").meta.step == 1


def test_a_pretrained_checkpoint_embeds_and_does_not_predict(tmp_path: Path) -> None:
    model = load(written(tmp_path, "pretrained"), "cpu")
    one = recording(beats() / 1000, RATE_HZ)
    found = model.embed(one)
    assert found.segments.shape == (3, TINY.width)
    assert model.saliency(one).values.shape == (3, 12, SEGMENT_SAMPLES)
    for ask in (model.predict, lambda r: model.saliency(r, method="gradient")):
        with pytest.raises(InputError, match="has no classifier and predicts nothing; finetune it first"):
            ask(one)


def test_a_finetuned_embedding_is_that_of_its_encoder(model: Model) -> None:
    one = recording(beats() / 1000, RATE_HZ)
    encoder = checkpoints.build_encoder(checkpoints.load(model.path))
    assert isinstance(encoder, Encoder)
    prepared = prepare(one, model.preparation)
    (outputs,) = model.outputs([prepared])
    assert not isinstance(outputs, Refused)
    np.testing.assert_array_equal(outputs.embeddings, model.embed(one).segments)
    assert outputs.logits is not None
    expected = model._network.proj(torch.from_numpy(outputs.embeddings)).detach().numpy()  # type: ignore[union-attr,operator]
    np.testing.assert_allclose(outputs.logits, expected, atol=1e-6)


def test_a_published_file_without_labels_embeds_and_says_how_to_name_them(shared: Path) -> None:
    file = shared / "golden/model/tiny_finetuned.pt"
    model = load(file, "cpu")
    record = shared / "data/challenge-2021/training/georgia/g1/E00001.hea"
    record = record if record.is_file() else next((shared / "data/challenge-2021/training").glob("georgia/*/*.hea"))
    assert model.embed(record).record.shape == (64,)
    with pytest.raises(InputError, match=r"does not say of what; name them with `ecgfm checkpoint convert .*--labels"):
        model.predict(record)
    assert load(shared / "golden/model/tiny_pretrained.pt", "cpu").embed(record).record.shape == (64,)


def test_logits_that_are_not_finite_stop_with_a_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Classifier(TINY, 2)
    with torch.no_grad():
        network.proj.weight.fill_(3e38)
    meta = Meta("finetuned", TINY, LEADS, RATE_HZ, SEGMENT_SAMPLES, labels=LABELS)
    model = load(checkpoints.save(tmp_path, 1, network.state_dict(), None, meta), "cpu")
    with pytest.raises(InputError, match=r"answer to r1 is not finite \(NaN or infinity\); take an earlier checkpoint"):
        model.predict(recording(beats() / 1000, RATE_HZ, record_id="r1"))


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (lambda: recording(np.zeros((1000, 12)), 500), r"expected an array \(12 leads, time\).*give its transpose"),
        (lambda: recording(np.zeros(1000), 500), "expected an array"),
        (lambda: recording(np.full((12, 9), np.inf), 500), "found infinity"),
        (lambda: recording(np.zeros((12, 9)), 0), "expected a sampling rate"),
        (lambda: load("/nowhere/at/all"), "no such checkpoint"),
    ],
)
def test_a_mistake_gets_a_line(ask: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        ask()


def test_a_file_that_is_not_there_and_a_folder_are_named(model: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        model.predict(tmp_path / "nothing.dcm")
    with pytest.raises(InputError, match="expected a file, found a folder"):
        model.predict(tmp_path)


# ---- saliency


def test_attention_is_alike_in_all_leads_and_of_no_label(model: Model) -> None:
    found = model.saliency(recording(beats() / 1000, RATE_HZ))
    assert found.label is None
    assert found.values.shape == found.signal_mv.shape == (3, 12, SEGMENT_SAMPLES)
    assert (found.values == found.values[:, :1]).all()
    assert found.values.min() == 0
    assert found.values.max() == 1


def test_gradient_is_of_the_label_and_lead_by_lead(model: Model) -> None:
    one = recording(beats() / 1000, RATE_HZ)
    found = model.saliency(one, LABELS[1], "gradient")
    answer = model.predict(one)
    assert found.probability == answer.probabilities[LABELS[1]]
    np.testing.assert_allclose(1 / (1 + np.exp(-found.logits)), answer.segments[LABELS[1]].to_numpy(), atol=1e-6)
    sums = found.values.sum(axis=(1, 2))
    np.testing.assert_allclose(sums, found.logits - found.baseline_logit, rtol=0.01, atol=1e-4)
    assert found.completeness_error <= 0.01
    assert not (found.values == found.values[:, :1]).all()
    assert np.abs(found.shown).max() == 1
    assert model.saliency(one, method="gradient").label == max(
        answer.probabilities, key=answer.probabilities.__getitem__
    )


def test_a_saliency_of_a_label_that_is_not_there_names_the_nearest(model: Model) -> None:
    one = recording(beats() / 1000, RATE_HZ)
    with pytest.raises(InputError, match="the model has no label 'fats'; did you mean 'fast'"):
        model.saliency(one, "fats", "gradient")
    with pytest.raises(InputError, match="its labels: fast, high, in V1"):
        model.saliency(one, "zebra")
    with pytest.raises(InputError, match="expected attention or gradient"):
        model.saliency(one, method="lime")  # type: ignore[arg-type]


# ---- what lies in folders


def test_the_recordings_of_a_folder_are_found_once_each(tmp_path: Path) -> None:
    write_wfdb16(tmp_path / "raw/a", "r2", beats(30), suffix=".dat")
    write_wfdb16(tmp_path / "raw", "r1", beats())
    (tmp_path / "raw/a/notes.txt").write_text("no ECG")
    (tmp_path / "raw/a/broken.dcm").write_bytes(b"no ECG either")
    (tmp_path / "raw/a/alone.dat").write_bytes(b"\0" * 100)
    (tmp_path / "raw/bad.hea").write_text("not a header at all, is it?\n")
    (tmp_path / "raw/.hidden").write_text("")
    found = find_recordings([tmp_path / "raw"])
    assert [one.record_id for one in found.recordings] == [
        "a/alone.dat",
        "a/broken.dcm",
        "a/r2.hea",
        "bad.hea",
        "r1.hea",
    ]
    assert dict(found.others) == {".txt": 1}
    config = inference.PrepareConfig()
    became = list(prepare_files(found.recordings, config))
    reasons = [one.why.reason if isinstance(one, Refused) else "" for one in became]
    assert reasons == ["missing_header", "unknown_format", "", "unreadable_header", "too_short"]


def test_ids_of_several_inputs_are_below_the_folder_they_share(tmp_path: Path) -> None:
    for folder in ("x/a", "x/b"):
        write_wfdb16(tmp_path / folder, "r", beats(), suffix=".dat")
    both = find_recordings([tmp_path / "x/a", tmp_path / "x/b/r.dat", tmp_path / "x/b/r.hea", tmp_path / "x/b/r"])
    assert [one.record_id for one in both.recordings] == ["a/r.hea", "b/r.hea"]
    assert [one.record_id for one in find_recordings([tmp_path / "x/b/r.hea"]).recordings] == ["r.hea"]


def test_segments_of_a_multi_segment_record_are_no_recordings(shared: Path) -> None:
    found = find_recordings([shared / "data/wfdb-formats/multi-segment"])
    names = {one.record_id for one in found.recordings}
    assert names
    headers = {
        str(p.relative_to(shared / "data/wfdb-formats/multi-segment"))
        for p in (shared / "data").rglob("multi-segment/**/*.hea")
    }
    assert names < headers


def test_slices_are_found_in_a_slice_a_run_and_a_data_directory(run: dict[str, list[Path]], tmp_path: Path) -> None:
    slices = run["prepare"]
    newest = tmp_path / "data/runs/demo/latest"
    (newest / "prepare").mkdir(parents=True)
    (tmp_path / "data/stages").mkdir()
    (newest / "run.json").write_text(json.dumps({}))
    for number, directory in enumerate(slices):
        (newest / "prepare" / str(number)).symlink_to(directory)
    expected = sorted(path.resolve() for path in slices)
    assert sorted(find_slices(newest)) == sorted(find_slices(tmp_path / "data")) == expected
    assert find_slices(slices[0]) == [slices[0]]
    assert find_slices(tmp_path) == []
    (tmp_path / "empty/stages").mkdir(parents=True)
    with pytest.raises(InputError, match="expected a run with prepared records, found none"):
        find_slices(tmp_path / "empty")


def test_slices_that_the_model_cannot_read_are_refused(
    run: dict[str, list[Path]], model: Model, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="expected sampling_rate_hz 100, as the model was trained on, found 500"):
        next(read_slices(run["prepare"], model.preparation))
    copy = tmp_path / "copy"
    copy.symlink_to(run["prepare"][0])
    preparation = load(run["finetune"][0], "cpu").preparation
    with pytest.raises(InputError, match="was prepared twice"):
        list(read_slices([run["prepare"][0], copy], preparation))


def test_the_package_gives_its_api_without_loading_torch() -> None:
    code = (
        "import sys, ecgfm; assert 'torch' not in sys.modules; assert 'load' in dir(ecgfm); "
        "ecgfm.load; assert 'torch' in sys.modules; print(ecgfm.recording.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ecgfm.inference"


def test_large_recordings_are_held_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        write_wfdb16(tmp_path, f"r{number}", beats(30, seed=number), suffix=".dat")
    found, config = find_recordings([tmp_path]).recordings, inference.PrepareConfig()
    expected = list(prepare_files(found, config))
    monkeypatch.setattr("ecgfm.recordings.BLOCK_BYTES", 1)
    assert [one.record_id for one in prepare_files(found, config)] == [one.record_id for one in expected]
    assert [one.record_id for one in expected] == [f"r{number}.hea" for number in range(5)]
