"""What a model says about segments and records: logits, embeddings, probabilities, and where it looked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from ecgfm import checkpoints
from ecgfm import model as network
from ecgfm.checkpoints import Checkpoint, Kind
from ecgfm.config import Precision, Task, departures_in_words
from ecgfm.contracts import read_table
from ecgfm.data import Shards, in_order, load, standardise, subset, too_large
from ecgfm.ecg import InputError
from ecgfm.label_space import LabelSpace
from ecgfm.model import Classifier, Encoder, pool_nonzero_mean
from ecgfm.scores.calibration import logits_of, scale
from ecgfm.scores.metrics import aggregate
from ecgfm.scores.multiclass import at_temperature, softmax


@dataclass(frozen=True)
class Labelled:
    """One split.

    segments: contract `labelled_segments`
    labels: (segment, label) float32; 1 present, 0 absent, NaN unknown; of task `regression` numbers in their own units
    record_ids, patients: (record,) in the order of their first segments; patients None where unknown
    truth: (record, label) float64, as `labels`
    """

    segments: pl.DataFrame
    labels: Tensor
    record_ids: list[str]
    patients: list[str | None]
    truth: np.ndarray


def read_labelled(manifests: Path, split: str, space: LabelSpace, share: float = 1.0, seed: int = 0) -> Labelled:
    """The labelled segments of one split, or of a share of its patients (`data.subset`), and its records.

    Raises:
        InputError: there is none.
    """
    segments = read_table(manifests / f"labelled_{split}.parquet", space.contract("labelled_segments"))
    if segments.is_empty():
        raise InputError(f"labelled_{split}.parquet is empty: no record of that split has a label")
    chosen = subset(segments["patient_id"].to_list(), segments["record_id"].to_list(), share, seed)
    segments = segments.filter(pl.Series(chosen))
    records = segments.unique("record_id", keep="first", maintain_order=True)
    labels, truth = (
        table.select(pl.col(space.names).cast(number).fill_null(math.nan)).to_numpy()
        for table, number in ((segments, pl.Float32), (records, pl.Float64))
    )
    record_ids, patients = records["record_id"].to_list(), records["patient_id"].to_list()
    return Labelled(segments, torch.tensor(labels), record_ids, patients, truth)


def checkpoint_for(path: Path, kind: Kind, shards: Shards) -> Checkpoint:
    """The checkpoint at `path`, of the kind that is needed and for segments like these. Any length will do.

    Raises:
        InputError: it cannot be read, is of the other kind, of other leads, another order or another sampling rate,
            or, finetuned, of segments that were prepared in another way.
    """
    found = checkpoints.load(path)
    if found.kind != kind:
        other = "it has no classifier: finetune it first" if kind == "finetuned" else "it was trained on labels"
        raise InputError(f"{path}: expected a {kind} checkpoint, found a {found.kind} one; {other}")
    if found.meta.leads != shards.leads:
        found_leads = "the same in the order" if set(found.meta.leads) == set(shards.leads) else "in the shards"
        raise InputError(
            f"{path}: expected the leads {' '.join(found.meta.leads)}, as the model was trained on, found "
            f"{found_leads} {' '.join(shards.leads)}; set prepare.leads to the model's"
        )
    if found.meta.sampling_rate_hz != shards.sampling_rate_hz:
        raise InputError(
            f"{path}: expected {found.meta.sampling_rate_hz:g} Hz as the model was trained on, found "
            f"{shards.sampling_rate_hz:g} Hz in the shards; set prepare.sampling_rate_hz to the model's"
        )
    if kind == "finetuned" and found.meta.departures != shards.departures:  # an encoder may learn another recipe
        raise InputError(
            f"{path}: expected segments prepared {departures_in_words(found.meta.departures)} as the model was trained "
            f"on, found {departures_in_words(shards.departures)}; set prepare's values to the model's"
        )
    return found


@dataclass(frozen=True)
class SegmentOutputs:
    """Of each segment, in the order asked for.

    logits: (segment, label) float32; None of an encoder without classifier
    embeddings: (segment, width) float32, the non-zero mean of the encoder's frames
    """

    logits: np.ndarray | None
    embeddings: np.ndarray


def segment_outputs(
    model: Encoder | Classifier,
    table: pl.DataFrame,
    shards: Shards,
    batch_size: int,
    device: torch.device,
    precision: Precision = "fp32",
) -> SegmentOutputs:
    """Logits and embeddings of the segments of a manifest: no lead masked, no dropout.

    model: on `device`; of a `PretrainModel` its encoder is asked
    table: with `source`, `slice_id` and `shard_row`
    precision: of the matrix products but for the classifier's

    Raises:
        InputError: too little memory; names the batch that fits.
    """
    places = shards.places(table)[:, None]
    logits: list[Tensor] = []
    embeddings: list[Tensor] = []
    in_bf16 = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def ask(signal: Tensor) -> None:
        if isinstance(model, Classifier):
            classified = model(signal)
            logits.append(classified.logits.cpu())
            embeddings.append(classified.embedding.cpu())
        else:
            frames = Encoder.forward(model, signal).frames  # of a PretrainModel too, whose own forward masks
            embeddings.append(pool_nonzero_mean(frames).cpu())

    def attempt(fewer: int) -> None:
        ask(torch.zeros(fewer, len(shards.leads), shards.segment_samples, device=device))

    with torch.inference_mode(), _evaluating(model), in_bf16:
        for batch in load(shards, places, in_order(len(places), batch_size), device):
            try:
                ask(standardise(batch, device))
            except torch.OutOfMemoryError as error:
                n = len(batch.digital)
                raise too_large(
                    error,
                    f"{n} segments at once need more memory than {device} has",
                    n,
                    1,
                    attempt,
                    lambda fewer: f"batch_size={fewer}",
                    "one does not fit either: use another device",
                ) from error
    return SegmentOutputs(torch.cat(logits).numpy() if logits else None, torch.cat(embeddings).numpy())


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """The probabilities that logits of any shape mean, float64."""
    probabilities: np.ndarray = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return probabilities


def record_probabilities(logits: np.ndarray, labelled: Labelled, space: LabelSpace) -> tuple[np.ndarray, np.ndarray]:
    """(segment, label) logits as (record, label) probabilities, aggregated label by label; and segments per record."""
    return of_records(softmax(logits) if space.task == "multiclass" else sigmoid(logits), labelled, space)


def record_values(
    outputs: np.ndarray, labelled: Labelled, space: LabelSpace, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(segment, label) outputs of task `regression` as (record, label) numbers in the labels' units; and segments per
    record.

    scale: (mean and standard deviation, label), `Meta.scale`
    """
    return of_records(unscaled(outputs, scale), labelled, space)


def unscaled(outputs: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(..., label) outputs of the network as numbers in the labels' units, float64. scale: `Meta.scale`"""
    mean, deviation = scale
    return np.asarray(outputs.astype(np.float64) * deviation + mean)


def of_records(answers: np.ndarray, labelled: Labelled, space: LabelSpace) -> tuple[np.ndarray, np.ndarray]:
    """(segment, label) answers as (record, label), aggregated label by label; and segments per record."""
    record_ids, of_record, n_segments = aggregate(
        labelled.segments["record_id"].to_list(), answers, [label.aggregation for label in space.labels]
    )
    assert record_ids == labelled.record_ids
    return of_record, n_segments


def calibrated(
    probabilities: np.ndarray,
    labels: Sequence[str],
    temperature: Mapping[str, float],
    shift: Mapping[str, float],
    task: Task = "multilabel",
) -> np.ndarray:
    """(record, label) float64 probabilities at the temperature and shift of each label; where it has none, as they are.

    Of records, after their segments' were aggregated: that leaves the order of the records as it is. Labels that
    exclude each other have one temperature, and no shift (multiclass.py).
    """
    found = probabilities.astype(np.float64)
    if task == "multiclass":
        common = {temperature.get(label, 1.0) for label in labels}
        assert len(common) == 1
        return found if common == {1.0} else at_temperature(found, common.pop())
    for number, label in enumerate(labels):
        divisor, added = temperature.get(label, 1.0), shift.get(label, 0.0)
        if (divisor, added) != (1, 0):
            found[:, [number]] = scale(logits_of(found[:, [number]]), np.array([divisor]), added)
    return found


def saliency(model: Encoder | Classifier, signal: Tensor) -> Tensor:
    """How much the last layer looks at each sample: attention averaged over heads, its maximum over queries.

    signal: (segment, lead, time) standardised, on the model's device. Returns (segment, time) float32, 0 to 1 in each.
    """
    encoder = model.encoder if isinstance(model, Classifier) else model
    with torch.inference_mode(), _evaluating(encoder):
        attention = Encoder.forward(encoder, signal, need_attention=True).attention
    assert attention is not None
    return network.saliency(attention, signal.shape[2]).float()


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside, as before outside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
