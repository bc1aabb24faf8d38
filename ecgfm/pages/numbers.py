"""The report of an evaluation of numbers: plain data in, one self-contained HTML page out, of the look of the report on
findings (findings.py). It holds neither dates nor seconds nor paths: the same data give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ecgfm.cohort import cohort_svg
from ecgfm.drawing import Panel, Series
from ecgfm.label_space import Label
from ecgfm.pages.assessment import shown_p
from ecgfm.pages.numbers_template import TEMPLATE
from ecgfm.pages.parts import FEW_PATIENTS, MINUS, Cohort, Training, counted, environment, frame
from ecgfm.pages.pictures import panel_pictures
from ecgfm.pages.template import svg_image
from ecgfm.scores.metrics import Estimate
from ecgfm.scores.regression import ModelScores, PartValues, ValueDifference, ValueScores
from ecgfm.scores.significance import ALPHA

MODELS = {
    "finetuned": "Finetuned model",
    "probe": "Ridge probe, pretrained encoder",
    "probe_random": "Ridge probe, random encoder",
    "neighbours": "Nearest neighbours, pretrained encoder",
    "train_mean": "Mean of the train split, whatever the ECG",
}
"""The models that are scored, with the words of the report."""

DIFFERENCES = {
    ("finetuned", "probe"): "Finetuned minus ridge probe",
    ("finetuned", "train_mean"): "Finetuned minus the train split's mean",
    ("probe", "probe_random"): "Pretrained minus random encoder, by ridge probe",
}
"""Which models are compared pair by pair."""

MAX_DRAWN = 1000  # points of a scatter; more make a grey cloud and megabytes
_LINE = np.linspace(0.0, 1.0, 25)


@dataclass(frozen=True)
class ValuesReport:
    """All that the page says.

    counts: of the cohort, `splits/cohort.json`
    leak: which test records the model has learnt from, in words; "" where none
    truth: (record, label), NaN for unknown; values: by model, (record, label); all of the test split
    alphas: of the ridge probes, by encoder and label; neighbours: how many were asked, by label
    dropped: label -> why it was left out before training
    """

    cohort: Cohort
    counts: Mapping[str, Any]
    leak: str
    training_is_known: bool
    labels: Sequence[Label]
    truth: np.ndarray
    values: Mapping[str, np.ndarray]
    scores: Mapping[str, ModelScores]
    differences: Sequence[ValueDifference]
    parts: Sequence[PartValues]
    n_replicates: int
    confidence: float
    alphas: Mapping[str, Sequence[float]]
    neighbours: Sequence[int]
    dropped: Mapping[str, str]
    pretraining: Training
    finetuning: Training


def render(report: ValuesReport, files: Mapping[str, tuple[str, str]]) -> str:
    """The page. files: what is written beside it and shown in it, collapsed: file name -> (title, content)"""
    made = environment(decimals=shown, signed=lambda value: shown(value, signed=True), interval=_interval, p=shown_p)
    return made.from_string(TEMPLATE).render(
        frame(report.cohort, (report.pretraining, report.finetuning), files),
        r=report,
        finetuned=report.scores["finetuned"],
        subject="; ".join(_with_unit(label.name, label.unit) for label in report.labels),
        confidence=f"{100 * report.confidence:g} %",
        summary=_summary(report),
        comparison=_comparison(report),
        small=_small(report),
        tables=[_of_label(report, k) for k in range(len(report.labels))],
        agreement=[
            panel_pictures(agreement_panels(report, k), "Agreement", (5.0, 3.9), 1) for k in range(len(report.labels))
        ],
        drawn=_drawn(report),
        diagram=svg_image(cohort_svg(report.counts), "Flow of records; the numbers are below"),
        baselines=_baselines(report),
    )


def summary(report: ValuesReport) -> str:
    """The headline numbers as a Markdown table."""
    lines = ["| on the test split | label | records | mean absolute error | R2 |", "|---|---|---:|---:|---:|"]
    for model, scores in report.scores.items():
        for one in scores.labels:
            numbers = " | ".join(_in_words(estimate) for estimate in (one.mean_absolute_error, one.r2))
            lines.append(f"| {MODELS[model]} | {_with_unit(one.label, one.unit)} | {one.n} | {numbers} |")
    return "\n".join([*lines, "", f"In brackets: {report.confidence:.0%} intervals, bootstrapped by patient.", ""])


# ---- sentences ---------------------------------------------------------------------------------------------------


def _summary(report: ValuesReport) -> str:
    """The headline, with every number's interval."""
    finetuned, floor = report.scores["finetuned"], report.scores["train_mean"]
    apart = " that no training step has seen" if report.training_is_known and not report.leak else ""
    sentences = [f"The finetuned model, on {counted(finetuned.n_records, 'test record')}{_whose(report)}{apart}."]
    for one, mean in zip(finetuned.labels, floor.labels, strict=True):
        sentences.append(
            f"{one.label[:1].upper()}{one.label[1:]} is off by {_in_words(one.mean_absolute_error)} {one.unit}".rstrip()
            + f" on average (mean absolute error); always saying the train split's mean would be off by "
            f"{_in_words(mean.mean_absolute_error)}. R² is {_in_words(one.r2)}, and predictions are "
            f"{_bias(one)}."
        )
    return " ".join([*sentences, f"In brackets: {100 * report.confidence:g} % intervals."])


def _bias(one: ValueScores) -> str:
    error = one.mean_error
    if error is None:
        return "not compared"
    value = error.value
    side = "too high" if value > 0 else "too low"
    if error.low is not None and error.high is not None and error.low <= 0 <= error.high:
        return f"on average neither clearly too high nor too low ({shown(value, signed=True)})"
    return f"on average {shown(abs(value))} {side}"


def _whose(report: ValuesReport) -> str:
    test = report.cohort.splits["test"]
    known = test.known_patients and not test.unknown_patients
    return f" of {counted(report.scores['finetuned'].n_patients, 'patient')}" if known else ""


def _comparison(report: ValuesReport) -> list[str]:
    """Whether the test split can tell the models apart, label by label, by p values corrected for their number."""
    subjects = {
        ("finetuned", "probe"): ("the finetuned model", "the ridge probe"),
        ("finetuned", "train_mean"): ("the finetuned model", "the train split's mean"),
        ("probe", "probe_random"): ("the probe on the pretrained encoder", "the one on random weights"),
    }
    told: dict[str, list[str]] = {}
    for one in report.differences:
        subject, other = subjects[one.first, one.second]
        error = one.mean_absolute_error
        if error is None or error.low is None or one.p_holm is None:
            continue
        if one.p_holm < ALPHA:
            verdict = f"{subject} is {'closer' if error.value < 0 else 'further off'} than {other}"
        else:
            verdict = f"these records do not tell {subject} from {other}"
        told.setdefault(one.label, []).append(
            f"{verdict} (difference of the mean absolute errors {shown(error.value, signed=True)}, interval "
            f"{_interval(error, signed=True)}, corrected p {shown_p(one.p_holm)})"
        )
    return [f"{label[:1].upper()}{label[1:]}: {'; '.join(sentences)}." for label, sentences in told.items()]


def _small(report: ValuesReport) -> str:
    finetuned = report.scores["finetuned"]
    if finetuned.n_patients >= FEW_PATIENTS:
        return ""
    of_whom = "patient" if report.cohort.splits["test"].known_patients else "record"
    return (
        f"This test split is small: it holds {counted(finetuned.n_patients, of_whom)}. One more or less moves such "
        "numbers visibly, and a bootstrap of so few tends to give intervals that are too narrow. Read the numbers as a "
        "check that the pipeline works and learns, not as the performance of the model."
    )


def _drawn(report: ValuesReport) -> str:
    n = len(report.truth)
    return f" Of {n:,} records {MAX_DRAWN:,}, evenly chosen by their order, are drawn." if n > MAX_DRAWN else ""


def _baselines(report: ValuesReport) -> str:
    ridges = "; ".join(
        f"{name} encoder: "
        + ", ".join(f"{label.name} {alpha:g}" for label, alpha in zip(report.labels, alphas, strict=True))
        for name, alphas in report.alphas.items()
    )
    asked = ", ".join(f"{label.name} {k}" for label, k in zip(report.labels, report.neighbours, strict=True))
    return (
        "Ridge probes: linear regression on the standardised mean embedding of each record, the encoder frozen; alpha, "
        f"the weight of the squared coefficients, by mean absolute error on the valid split ({ridges}). Nearest "
        "neighbours: the mean of the nearest train records by cosine of the same embeddings, how many by mean absolute "
        f"error on the valid split ({asked})."
    )


# ---- tables and pictures -----------------------------------------------------------------------------------------


def _of_label(report: ValuesReport, k: int) -> dict[str, Any]:
    label = report.labels[k]
    return {
        "name": _with_unit(label.name, label.unit),
        "n": report.scores["finetuned"].labels[k].n,
        "models": [(MODELS[name], scores.labels[k]) for name, scores in report.scores.items()],
        "differences": [
            (DIFFERENCES[one.first, one.second], one) for one in report.differences if one.label == label.name
        ],
        "parts": [(part.by, part.name, part.scores.labels[k], part.scores.n_patients) for part in report.parts],
        "splits": [
            (split, counts["known"], shown(counts["mean"]), shown(counts["standard_deviation"]))
            for split, counts in label.records.items()
        ],
    }


def agreement_panels(report: ValuesReport, k: int) -> list[Panel]:
    """Of one label: predicted over true, and, after Bland and Altman, error over the mean of both."""
    label, scores = report.labels[k], report.scores["finetuned"].labels[k]
    known = np.flatnonzero(~np.isnan(report.truth[:, k]))
    if len(known) > MAX_DRAWN:
        known = known[np.linspace(0, len(known) - 1, MAX_DRAWN).astype(int)]
    truth, values = report.truth[known, k], report.values["finetuned"][known, k]
    unit = f", {label.unit}" if label.unit else ""
    low, high = (float(extreme(truth.tolist() + values.tolist())) for extreme in (min, max))
    both = (truth + values) / 2
    ends = both.min() + (both.max() - both.min()) * _LINE
    lines = [
        Series(name, ends, np.full(len(ends), estimate.value))
        for name, estimate in (
            ("mean error", scores.mean_error),
            ("limits of agreement", scores.lower_limit),
            ("limits of agreement", scores.upper_limit),
        )
        if estimate is not None
    ]
    equal = low + (high - low) * _LINE
    return [
        Panel(
            f"{label.name}: predicted and true",
            f"true{unit}",
            f"predicted{unit}",
            (Series("a record", truth, values, points=True), Series("where both are equal", equal, equal)),
        ),
        Panel(
            f"{label.name}: error by size",
            f"mean of predicted and true{unit}",
            f"predicted {MINUS} true{unit}",
            (Series("a record", both, values - truth, points=True), *lines),
        ),
    ]


# ---- numbers -----------------------------------------------------------------------------------------------------


def shown(value: float, signed: bool = False) -> str:
    """A number of any unit: as many decimals as its size asks for, three at most.

    >>> shown(123.4), shown(12.34), shown(1.234), shown(-0.0504)
    ('123', '12.3', '1.23', '−0.050')
    """
    size = abs(value)
    decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", MINUS)


def _interval(estimate: Estimate, signed: bool = False) -> str:
    if estimate.low is None or estimate.high is None:
        return "no interval"
    return f"{shown(estimate.low, signed)} to {shown(estimate.high, signed)}"


def _in_words(estimate: Estimate | None) -> str:
    return "not defined" if estimate is None else f"{shown(estimate.value)} ({_interval(estimate)})"


def _with_unit(name: str, unit: str) -> str:
    return f"{name}, {unit}" if unit else name
