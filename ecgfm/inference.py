"""A checkpoint that answers: probabilities or numbers, embeddings and saliency of recordings that no pipeline has seen.

    model = ecgfm.load("ecgfm-data/runs/ptb-xl/latest/finetune")
    prediction = model.predict("ecg.dcm")
    prediction.probabilities["left bundle branch block"]

A recording is a file of any format that is read, an `EcgRecord`, or an array by way of `recording`. It is prepared as
the checkpoint says that its training segments were (rate, leads, length, filter; standardised over the whole record): a
record that a pipeline has evaluated gets the same probabilities here.
"""

from __future__ import annotations

import difflib
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import polars as pl
import torch
from torch import Tensor

from ecgfm import checkpoints
from ecgfm.attribution import DISPLAY_S, for_display, integrated_gradients
from ecgfm.checkpoint_commands import find
from ecgfm.checkpoints import Meta
from ecgfm.config import Precision, PrepareConfig, from_dict
from ecgfm.data import Batch, pick_device, standardise, too_large
from ecgfm.ecg import LEADS, Digital, EcgRecord, InputError, Rejected
from ecgfm.model import Classifier, Encoder, pool_nonzero_mean
from ecgfm.predict import calibrated, sigmoid, unscaled
from ecgfm.predict import saliency as attention_saliency
from ecgfm.prepare import PreparedRecord
from ecgfm.recordings import Prepared, Refused, file_record, prepare
from ecgfm.scores.metrics import aggregate
from ecgfm.scores.multiclass import most_probable, softmax
from ecgfm.shards import standardisation

BATCH_SIZE = 64

Method = Literal["attention", "gradient"]

QUALITY = ("flat_share", "clipped_share", "powerline_uv", "noise_uv", "baseline_wander_uv")
"""What the table `quality` has of each lead; a prediction tells the worst lead's."""

_MOST_WAITING = 256  # recordings that were turned away wait too, for those before them

Source = str | PathLike[str] | EcgRecord
"""A recording to ask about: a file of any format that is read, or one that is in memory."""
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Prediction:
    """What the model says of one recording.

    record_id: the file's name, or as it was given
    probabilities: label -> that it is present, from the segments' as the checkpoint says: their mean or maximum,
        calibrated by the label's temperature and shift where it has them; empty where the labels are numbers
        (`Meta.task`)
    decisions: label -> whether the probability is at or above the threshold that was chosen on the valid split; None
        where the checkpoint has none for it. Of labels that exclude each other, True of the most probable one alone;
        empty where the labels are numbers
    values: label -> its number, in the unit trained on (`Meta.units`): the mean of the segments'; empty where the
        labels are no numbers
    segments: a row per segment: `segment_index`, `start_s`, and each label's probability, calibrated alike: of
        a label with one, a record's is the mean of the uncalibrated ones, calibrated; or its number
    missing_leads: leads of the model that the recording lacks, which are 0 for it, as a masked lead is
    invalid_leads, constant_leads: leads with invalid samples (0 for the model) and those that do not vary
    quality: `worst_<name>` of each of `QUALITY`, NaN where no lead can tell, and `suspected_reversal`; see quality.py
    duration_s, sampling_rate_hz: as recorded
    remarks: what was done or is odd, in words
    """

    record_id: str
    probabilities: dict[str, float]
    decisions: dict[str, bool | None]
    values: dict[str, float]
    segments: pl.DataFrame
    missing_leads: tuple[str, ...]
    invalid_leads: tuple[str, ...]
    constant_leads: tuple[str, ...]
    quality: dict[str, float | str | None]
    duration_s: float
    sampling_rate_hz: float
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Embedding:
    """One recording's vectors. No lead is ever masked at random.

    segments: (segment, width) float32, the non-zero mean of the encoder's frames
    record: (width,) float32, their mean
    """

    record_id: str
    segments: np.ndarray
    record: np.ndarray


@dataclass(frozen=True)
class Saliency:
    """What the model looked at, or what made a label's logit, or its number.

    method: `attention` (of no label; alike in all leads, for frames are made of all of them together) or `gradient`
        (integrated gradients of the label's logit, lead by lead)
    label, probability, value: None with `attention`; the probability, or where labels are numbers the value, is the
        record's; unit: of the value
    signal_mv: (segment, lead, time), millivolt, as the model saw it; NaN where invalid
    values: (segment, lead, time) float32. `attention`: 0 to 1 in each segment. `gradient`: logits, see attribution.py;
        of a number, in its unit
    shown: the same from -1 to 1, for display, averaged over `display_s` with `gradient`
    logits: (segment,) of the label, and baseline_logit of a segment of zeros; NaN with `attention`; of a number, itself
    probabilities: (segment,) likewise; NaN of a number
    completeness_error: the largest of any segment, see attribution.py; NaN with `attention`
    """

    record_id: str
    method: Method
    label: str | None
    probability: float | None
    leads: tuple[str, ...]
    sampling_rate_hz: float
    signal_mv: np.ndarray
    values: np.ndarray
    shown: np.ndarray
    logits: np.ndarray
    baseline_logit: float
    probabilities: np.ndarray
    completeness_error: float
    remarks: tuple[str, ...]
    value: float | None = None
    unit: str = ""
    display_s: float = DISPLAY_S

    @property
    def answer(self) -> str:
        """The record's probability or number of the label, in words; "" without a label."""
        if self.value is not None:
            return f"{self.value:.4g} {self.unit}".strip()
        return "" if self.probability is None else f"probability {self.probability:.3f}"


def load(path: str | PathLike[str], device: str = "auto", precision: Precision = "fp32") -> Model:
    """A model that answers.

    path: a checkpoint's directory, the output of a training stage (its best checkpoint, or the latest where none is
        marked), such as `runs/<pipeline>/latest/finetune`, or a published .pt file
    device: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:1`
    precision: of the matrix products but for the classifier's; `bf16` is faster and differs in the third digit

    Raises:
        InputError: no checkpoint, a damaged one, or no such device.

    >>> import ecgfm
    >>> model = ecgfm.load("ecgfm-data/runs/demo/latest/finetune")
    >>> model.labels
    ('sinus rhythm', 'left bundle branch block')
    >>> answer = model.predict("samples/S00031.hea")
    >>> answer.record_id, list(answer.probabilities)
    ('S00031.hea', ['sinus rhythm', 'left bundle branch block'])
    """
    return Model(find(Path(path))[0], pick_device(device), precision)


def recording(
    signal_mv: np.ndarray, sampling_rate_hz: float, leads: Sequence[str] = LEADS, record_id: str = "recording"
) -> EcgRecord:
    """An array as a recording.

    signal_mv: (lead, time), millivolt; NaN where invalid
    leads: names of the rows, in any order and case; standard leads that are absent are missing

    Raises:
        InputError: another shape, infinite values, or no such rate.

    >>> two_leads = recording(np.zeros((2, 2500)), sampling_rate_hz=250, leads=("I", "V1"))
    >>> two_leads.n_samples, two_leads.leads
    (2500, ('I', 'V1'))
    >>> recording(np.zeros((2500, 2)), sampling_rate_hz=250, leads=("I", "V1"))
    Traceback (most recent call last):
    ecgfm.ecg.InputError: expected an array (2 leads, time) in millivolt, found (2500, 2); give its transpose
    """
    signal_mv = np.asarray(signal_mv, dtype=np.float64)
    if signal_mv.ndim != 2 or len(signal_mv) != len(leads):
        hint = "; give its transpose" if signal_mv.ndim == 2 and signal_mv.shape[1] == len(leads) else ""
        raise InputError(f"expected an array ({len(leads)} leads, time) in millivolt, found {signal_mv.shape}{hint}")
    if np.isinf(signal_mv).any():
        raise InputError("expected millivolts, NaN where invalid; found infinity")
    if not 0 < sampling_rate_hz < math.inf:
        raise InputError(f"expected a sampling rate in Hz, found {sampling_rate_hz}")
    return EcgRecord(record_id, tuple(leads), float(sampling_rate_hz), signal_mv)


@dataclass(frozen=True)
class Outputs:
    """What the network makes of one recording's segments.

    logits: (segment, label) float32, None of an encoder; embeddings: (segment, width) float32
    """

    recording: Prepared
    logits: np.ndarray | None
    embeddings: np.ndarray


class Model:
    """A checkpoint on a device, ready to answer. Made by `load`."""

    def __init__(self, path: Path, device: torch.device, precision: Precision) -> None:
        found = checkpoints.load(path)
        self.path = path
        self.meta: Meta = found.meta
        self.device = device
        self.precision = precision
        self._network: Classifier | Encoder
        if found.kind == "finetuned":
            built = checkpoints.build(found)
            assert isinstance(built, Classifier)
            self._network = built.to(device)
        else:
            self._network = checkpoints.build_encoder(found).to(device)

    def __repr__(self) -> str:
        return f"ecgfm.load({str(self.path)!r}, {str(self.device)!r}, {self.precision!r})"

    @property
    def labels(self) -> tuple[str, ...]:
        """What each logit is, in order; empty of a pretrained checkpoint."""
        return self.meta.labels

    @property
    def preparation(self) -> PrepareConfig:
        """How recordings are prepared: as the segments were that the model was finetuned on.

        Raises:
            InputError: the checkpoint says how in words that this version does not know.
        """
        geometry = {
            "sampling_rate_hz": self.meta.sampling_rate_hz,
            "segment_seconds": self.meta.segment_samples / self.meta.sampling_rate_hz,
            "leads": self.meta.leads,
        }
        return from_dict(PrepareConfig, geometry | self.meta.departures, f"{self.path}: departures")

    # ---- asking

    def predict(self, recording: Source) -> Prediction:
        """The probabilities, or the numbers, of one recording.

        recording: a file, or of an array `ecgfm.recording(signal_mv, sampling_rate_hz, leads)`

        Raises:
            Rejected: it cannot be used, with the reason; `too_short` where it has not one whole segment.
            InputError: no such file, or a checkpoint that cannot predict (`check_predicts`).
        """
        return _the_one(self.predict_many([recording]))

    def predict_many(
        self, recordings: Iterable[Source], batch_size: int = BATCH_SIZE
    ) -> Iterator[Prediction | Rejected]:
        """A prediction for each recording, in order, or why it was turned away. Few are in memory at a time.

        Raises:
            InputError: as `predict`, logits that are not finite, or too little memory; names the batch that fits.

        >>> model = load("ecgfm-data/runs/demo/latest/finetune")
        >>> short = recording(np.ones((12, 100)), sampling_rate_hz=500, record_id="short")
        >>> for answer in model.predict_many(["samples/S00031.hea", short]):
        ...     print(answer if isinstance(answer, Rejected) else len(answer.segments))
        2
        too_short: expected at least 5 s, one segment, found 0.2 s
        """
        self.check_predicts()
        prepared = (self._prepare(one) for one in _several(recordings))
        for outputs in self.outputs(prepared, batch_size):
            yield outputs.why if isinstance(outputs, Refused) else self.prediction(outputs)

    def embed(self, recording: Source) -> Embedding:
        """The vectors of one recording, by a checkpoint of either kind. Raises as `predict`.

        >>> model = load("ecgfm-data/runs/demo/latest/finetune")
        >>> found = model.embed("samples/S00031.hea")
        >>> found.segments.shape, found.record.shape
        ((2, 32), (32,))
        """
        return _the_one(self.embed_many([recording]))

    def embed_many(self, recordings: Iterable[Source], batch_size: int = BATCH_SIZE) -> Iterator[Embedding | Rejected]:
        """The vectors of each recording, in order, or why it was turned away. Raises as `predict_many`."""
        prepared = (self._prepare(one) for one in _several(recordings))
        for outputs in self.outputs(prepared, batch_size):
            yield outputs.why if isinstance(outputs, Refused) else self.embedding(outputs)

    def saliency(self, recording: Source, label: str | None = None, method: Method = "attention") -> Saliency:
        """What the model looked at (`attention`), or which samples made a label's logit (`gradient`).

        label: for `gradient`; where none is given, the most probable one, or of numbers the first

        Raises:
            Rejected, InputError: as `predict`; a label that the model does not have; `gradient` of an encoder.
        """
        if method not in ("attention", "gradient"):
            raise InputError(f"method: expected attention or gradient, found {method!r}")
        if method == "gradient" or label is not None:
            self.check_predicts()
        if label is not None:
            self.check_label(label)
        prepared = self._prepare(recording)
        if isinstance(prepared, Refused):
            raise prepared.why
        return self._saliency(prepared, label, method)

    # ---- the parts, for those who have prepared recordings

    def check_predicts(self) -> None:
        """Raises: InputError: the checkpoint has no classifier, or does not say what its logits are."""
        if not isinstance(self._network, Classifier):
            raise InputError(
                f"{self.path}: a pretrained checkpoint has no classifier and predicts nothing; finetune it first, or "
                "use its embeddings (ecgfm embed)"
            )
        if not self.labels:
            raise InputError(
                f"{self.path}: has {self._network.proj.out_features} logits and does not say of what; name them with "
                f"`ecgfm checkpoint convert {self.path} TARGET --labels LABELS` and predict with TARGET"
            )

    def check_label(self, label: str) -> int:
        """The number of a label's logit. Raises: InputError: the model has no such label."""
        if label not in self.labels:
            near = difflib.get_close_matches(label, self.labels, 1)
            hint = f"did you mean {near[0]!r}" if near else f"its labels: {', '.join(self.labels)}"
            raise InputError(f"{self.path}: the model has no label {label!r}; {hint}")
        return self.labels.index(label)

    def outputs(
        self, recordings: Iterable[Prepared | Refused], batch_size: int = BATCH_SIZE
    ) -> Iterator[Outputs | Refused]:
        """What the network makes of prepared recordings, in order; about `batch_size` segments at a time."""
        if batch_size < 1:
            raise InputError(f"batch_size: expected at least 1, found {batch_size}")
        waiting: deque[Prepared | Refused] = deque()
        n_segments = 0
        for one in recordings:
            waiting.append(one)
            n_segments += 0 if isinstance(one, Refused) else len(one.prepared.segments)
            if n_segments >= batch_size or len(waiting) >= _MOST_WAITING:
                yield from self._answered(waiting, batch_size)
                waiting.clear()
                n_segments = 0
        yield from self._answered(waiting, batch_size)

    def prediction(self, outputs: Outputs) -> Prediction:
        """The answer that some outputs mean."""
        assert outputs.logits is not None
        one, task = outputs.recording, self.meta.task
        of_segments = self._of_segments(outputs.logits)
        how = [self.meta.aggregation.get(label, "mean") for label in self.labels]
        _, of_record, _ = aggregate([one.record_id] * len(of_segments), of_segments, how)
        if task != "regression":
            of_record, of_segments = (
                calibrated(p, self.labels, self.meta.temperature, self.meta.shift, task)
                for p in (of_record, of_segments)
            )
        answers = dict(zip(self.labels, of_record[0].tolist(), strict=True))
        facts = one.prepared.facts
        starts = np.arange(len(of_segments)) * (one.prepared.segments.shape[2] / self.meta.sampling_rate_hz)
        head = pl.DataFrame({"segment_index": np.arange(len(of_segments)), "start_s": starts})
        return Prediction(
            record_id=one.record_id,
            probabilities={} if task == "regression" else answers,
            decisions=self._decisions(answers),
            values=answers if task == "regression" else {},
            segments=head.hstack([pl.Series(label, of_segments[:, k]) for k, label in enumerate(self.labels)]),
            missing_leads=one.missing_leads,
            invalid_leads=tuple(lead for lead in facts["invalid_leads"] if lead not in one.missing_leads),
            constant_leads=tuple(facts["constant_leads"]),
            quality=_worst(one.prepared.quality),
            duration_s=facts["n_samples"] / facts["sampling_rate_hz"],
            sampling_rate_hz=facts["sampling_rate_hz"],
            remarks=one.remarks,
        )

    def embedding(self, outputs: Outputs) -> Embedding:
        """The vectors that some outputs hold."""
        of_record = outputs.embeddings.mean(axis=0, dtype=np.float64).astype(np.float32)
        return Embedding(outputs.recording.record_id, outputs.embeddings, of_record)

    # ---- within

    def _of_segments(self, logits: np.ndarray) -> np.ndarray:
        """(segment, label) float64: uncalibrated probabilities, or numbers in their units."""
        if self.meta.task == "regression":
            return unscaled(logits, self.meta.scale)
        return softmax(logits) if self.meta.task == "multiclass" else sigmoid(logits)

    def _decisions(self, answers: Mapping[str, float]) -> dict[str, bool | None]:
        """What is called present, of a record's probabilities."""
        if self.meta.task == "regression":
            return {}
        if self.meta.task == "multiclass":
            called = most_probable(np.array([list(answers.values())]))[0]
            return dict(zip(answers, called.tolist(), strict=True))
        thresholds = self.meta.thresholds
        return {label: p >= thresholds[label] if label in thresholds else None for label, p in answers.items()}

    def _prepare(self, source: Source) -> Prepared | Refused:
        facts = None
        try:
            if isinstance(source, EcgRecord):
                record = source
            elif not isinstance(source, str | PathLike):  # what one tries first
                raise InputError(
                    f"expected a file or a recording, found {type(source).__name__}: an array alone says neither its "
                    "rate nor its leads; give ecgfm.recording(array, sampling_rate_hz=500, leads=('I', ...)), of "
                    "(lead, time) in millivolt"
                )
            else:
                record, facts = file_record(Path(source))
            return prepare(record, self.preparation, facts)
        except Rejected as why:
            name = source.record_id if isinstance(source, EcgRecord) else str(source)
            return Refused(name, name, why)

    def _answered(self, waiting: Sequence[Prepared | Refused], batch_size: int) -> Iterator[Outputs | Refused]:
        """The recordings that wait, in batches of segments as equal as can be."""
        prepared = [one for one in waiting if isinstance(one, Prepared)]
        segments: list[tuple[np.ndarray, PreparedRecord]] = [
            (segment, one.prepared) for one in prepared for segment in one.prepared.segments
        ]
        parts = (
            [
                self._ask(_batch([segments[i] for i in part]))
                for part in np.array_split(np.arange(len(segments)), math.ceil(len(segments) / batch_size))
            ]
            if segments
            else []
        )
        embeddings = np.concatenate([of_part for _, of_part in parts]) if parts else np.empty((0, 0))
        of_parts = [of_part for of_part, _ in parts if of_part is not None]
        logits = np.concatenate(of_parts) if of_parts else None
        first = 0
        for one in waiting:
            if isinstance(one, Refused):
                yield one
                continue
            rows = slice(first, first + len(one.prepared.segments))
            first = rows.stop
            outputs = Outputs(one, None if logits is None else logits[rows], embeddings[rows])
            if not all(np.isfinite(x).all() for x in (outputs.logits, outputs.embeddings) if x is not None):
                way_out = "use precision fp32" if self.precision == "bf16" else "take an earlier checkpoint"
                raise InputError(
                    f"{self.path}: its answer to {one.record_id} is not finite (NaN or infinity); {way_out}"
                )
            yield outputs

    def _ask(self, batch: Batch) -> tuple[np.ndarray | None, np.ndarray]:
        """(segment, label) logits, None of an encoder; (segment, width) embeddings."""

        def ask(signal: Tensor) -> tuple[np.ndarray | None, np.ndarray]:
            with torch.inference_mode(), self._autocast():
                if isinstance(self._network, Classifier):
                    classified = self._network(signal)
                    return classified.logits.float().cpu().numpy(), classified.embedding.cpu().numpy()
                return None, pool_nonzero_mean(self._network(signal).frames).cpu().numpy()

        try:
            return ask(standardise(batch, self.device))
        except torch.OutOfMemoryError as error:
            n, *rest = batch.digital.shape
            raise too_large(
                error,
                f"{n} segments at once need more memory than {self.device} has",
                n,
                1,
                lambda fewer: ask(torch.zeros(fewer, *rest, device=self.device)),
                lambda fewer: f"--batch-size {fewer}",
                "one does not fit either: use another device",
            ) from error

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _saliency(self, one: Prepared, label: str | None, method: Method) -> Saliency:
        segments = [(segment, one.prepared) for segment in one.prepared.segments]
        signal = standardise(_batch(segments), self.device)
        nothing = np.full(len(segments), np.nan)
        probability: float | None = None
        value: float | None = None
        logits, probabilities, baseline_logit, error = nothing, nothing, math.nan, math.nan
        if isinstance(self._network, Classifier) and self.labels:
            (outputs,) = self.outputs([one])
            assert isinstance(outputs, Outputs)
            prediction = self.prediction(outputs)
            if label is None and method == "gradient":
                label = max(self.labels, key=lambda name: prediction.probabilities.get(name, 0.0))
            if label is not None and label in prediction.values:
                value = prediction.values[label]
            elif label is not None:
                probability = prediction.probabilities[label]
                probabilities = prediction.segments[label].to_numpy()
        if method == "attention":
            looked_at = attention_saliency(self._network, signal).cpu().numpy()
            shown = values = np.repeat(looked_at[:, None], len(self.meta.leads), axis=1)
        else:
            assert isinstance(self._network, Classifier)
            assert label is not None
            number = self.labels.index(label)
            found = [integrated_gradients(self._network, segment, number) for segment in signal]
            values = np.stack([each.values for each in found])
            logits, baseline_logit = np.array([each.logit for each in found]), found[0].baseline_logit
            error = max(each.completeness_error for each in found)
            if value is not None:  # the output's share in the number
                mean, deviation = self.meta.scaling[label]
                values = (values * deviation).astype(np.float32)
                logits, baseline_logit = logits * deviation + mean, baseline_logit * deviation + mean
            as_one = for_display(np.concatenate(values, axis=1), self.meta.sampling_rate_hz)  # one scale for all
            shown = as_one.reshape(len(self.meta.leads), len(segments), -1).swapaxes(0, 1)
        return Saliency(
            one.record_id, method, label, probability, self.meta.leads, self.meta.sampling_rate_hz,
            _signal_mv(one.prepared), values, shown, logits, baseline_logit, probabilities, error, one.remarks,
            value, self.meta.units.get(label or "", "") if value is not None else "",
        )  # fmt: skip


def _batch(segments: Sequence[tuple[np.ndarray, PreparedRecord]]) -> Batch:
    digital = np.stack([segment for segment, _ in segments])
    values = np.stack([standardisation(record.per_lead) for _, record in segments], axis=1)  # (3, segment, lead)
    return Batch(torch.arange(len(segments)), torch.from_numpy(digital), *map(torch.from_numpy, values))


def _signal_mv(prepared: PreparedRecord) -> np.ndarray:
    """(segment, lead, time) float64, millivolt; NaN where invalid."""
    gain, baseline = prepared.per_lead[:2]
    return np.stack([Digital(segment, gain, baseline).to_mv() for segment in prepared.segments])


def _worst(quality: Mapping[str, Any]) -> dict[str, float | str | None]:
    """Of each value of `quality` the greatest of any lead."""
    found: dict[str, float | str | None] = {}
    for name in QUALITY:
        of_leads = np.asarray(quality[f"lead_{name}"], dtype=np.float32)
        told = of_leads[~np.isnan(of_leads)]
        found[f"worst_{name}"] = float(str(told.max())) if len(told) else math.nan  # 0.1, not 0.10000000149
    return found | {"suspected_reversal": quality["suspected_reversal"]}


def _several(recordings: Iterable[Source]) -> Iterable[Source]:
    if isinstance(recordings, str):  # would be read letter by letter
        raise InputError(f"expected several recordings, found the text {recordings!r}; give a list of files")
    return recordings


def _the_one(answers: Iterator[Answer | Rejected]) -> Answer:
    (answer,) = answers
    if isinstance(answer, Rejected):
        raise answer
    return answer
