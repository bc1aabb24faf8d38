"""The report of an evaluation: plain data in, one self-contained HTML page out.

The page holds neither dates nor seconds nor paths: the same data give the same bytes.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from ecgfm.cohort import cohort_svg
from ecgfm.drawing import Panel, Series, draw_ecg
from ecgfm.pages import transfer as transfer_page
from ecgfm.pages.assessment import sections, shown_p
from ecgfm.pages.expected import Beside
from ecgfm.pages.expected import section as published_section
from ecgfm.pages.exploration import sections as exploration_sections
from ecgfm.pages.parts import FEW_PATIENTS, MINUS, NONE, Cohort, Training, counted, environment, frame, shortened
from ecgfm.pages.pictures import panel_pictures
from ecgfm.pages.template import TEMPLATE, svg_image
from ecgfm.scores.assessment import Assessment
from ecgfm.scores.baselines import Shot
from ecgfm.scores.between_sources import BetweenSources
from ecgfm.scores.confusion import ConfusedPair, ConfusionMatrix
from ecgfm.scores.embedding_map import EmbeddingMap
from ecgfm.scores.metrics import Estimate, OperatingPoint, Scores, pr_curve, roc_curve
from ecgfm.scores.multiclass import most_probable
from ecgfm.scores.significance import ALPHA

MODELS = {
    "finetuned": "Finetuned model",
    "probe": "Linear probe, pretrained encoder",
    "probe_random": "Linear probe, random encoder",
    "neighbours": "Nearest neighbours, pretrained encoder",
    "supervised": "Small supervised network",
}
"""The models an evaluation may score, with the words of the report."""

DIFFERENCES = {
    ("finetuned", "probe"): "Finetuned minus linear probe",
    ("probe", "probe_random"): "Pretrained minus random encoder, by linear probe",
    ("finetuned", "supervised"): "Finetuned minus small supervised network",
    ("probe", "supervised"): "Linear probe minus small supervised network",
}
"""Which models are compared pair by pair: what finetuning adds, and what pretraining adds."""

FEW_POSITIVES = 10
"""Below this, and `FEW_PATIENTS`, the report says in words that the test split is small."""


@dataclass(frozen=True)
class DrawnEcg:
    """One test record to draw.

    row: of the report's `truth`; why: in words, a heading
    signal_mv: (lead, time), millivolt, of `leads`
    saliency: attention (time,) 0 to 1, or of one label and lead by lead (lead, time) -1 to 1
    caption: what part of the record it is, and what the saliency
    """

    row: int
    record_id: str
    why: str
    signal_mv: np.ndarray
    leads: Sequence[str]
    sampling_rate_hz: float
    saliency: np.ndarray
    caption: str


@dataclass(frozen=True)
class Report:
    """All that the page says.

    leak: which test records the model has learnt from, in words; "" where none
    training_is_known: whether all that it has learnt from is known
    labels, aggregations: (label,)
    truth: (record, label) 0, 1, or NaN for unknown; predictions: by model, (record, label); all of the test split
    scores: by model, and of the `DIFFERENCES` by "a - b"
    operating_points: (label,) of the finetuned model
    dropped: label -> why it was left out before training
    probe_strengths: (name, C); n_neighbours: how many were asked
    assessment: of the finetuned model, and of the differences between models; shots: by encoder
    counts: of the cohort, for its diagram (`cohort.count_cohort`)
    confusion: of the finetuned model's decisions: pairs, or where classes exclude each other the matrix
    embedding_map: of the pretrained encoder; None where there is none
    published: results of others, and ours beside them
    small_network: the supervised baseline, where it was asked for; between: datasets, where there are several
    """

    cohort: Cohort
    counts: Mapping[str, Any]
    leak: str
    training_is_known: bool
    labels: Sequence[str]
    aggregations: Sequence[str]
    truth: np.ndarray
    predictions: Mapping[str, np.ndarray]
    scores: Mapping[str, Scores]
    operating_points: Sequence[OperatingPoint]
    n_replicates: int
    confidence: float
    probe_strengths: Sequence[tuple[str, float]]
    n_neighbours: int
    assessment: Assessment
    shots: Mapping[str, Sequence[Shot]]
    published: Sequence[Beside]
    confusion: Sequence[ConfusedPair] | ConfusionMatrix
    embedding_map: EmbeddingMap | None
    dropped: Mapping[str, str]
    pretraining: Training
    finetuning: Training
    ecgs: Sequence[DrawnEcg]
    small_network: Training | None = None
    between: BetweenSources | None = None


def render(report: Report, files: Mapping[str, tuple[str, str]]) -> str:
    """The page. files: what is written beside it and shown in it, collapsed: file name -> (title, content)"""
    made = environment(
        decimals=lambda value: NONE if np.isnan(value) else f"{value:.3f}",
        signed=_signed,
        interval=_interval,
        capitalize_first=lambda text: text[0].upper() + text[1:],
    )
    scores, cohort = report.scores, report.cohort
    trainings = [run for run in (report.pretraining, report.finetuning, report.small_network) if run]
    return made.from_string(TEMPLATE).render(
        frame(cohort, trainings, files),
        r=report,
        subject=counted(len(report.labels), "finding"),
        diagrams=_diagrams(report),
        models={key: name for key, name in MODELS.items() if key in scores},
        differences={" - ".join(pair): name for pair, name in DIFFERENCES.items() if set(pair) <= set(scores)},
        finetuned=scores["finetuned"],
        confidence=f"{100 * report.confidence:g} %",
        summary=_summary(report),
        comparison=_comparison(report),
        meaning=_meaning(report),
        small=_small(report),
        findings=_findings(report),
        unlabelled=sum(split.records - split.labelled_records for split in cohort.splits.values()),
        unknown_note=_unknown_note(report),
        replicate_note=_replicate_note(report),
        roc=_curves(report, roc=True),
        pr=_curves(report, roc=False),
        probes=[(name, f"{c:g}") for name, c in report.probe_strengths],
        ecgs=[_ecg(report, ecg) for ecg in report.ecgs],
        published=published_section(made, report.published, MODELS),
        assessment=sections(made, report.assessment, report.shots, MODELS),
        between=transfer_page.sections(made, report.between),
        exploration=exploration_sections(made, report.confusion, report.embedding_map),
    )


# ---- sentences ----------------------------------------------------------------------------------------------------


def _summary(report: Report) -> str:
    """The headline, with every number's interval."""
    finetuned = report.scores["finetuned"]
    n_labels = len(report.labels) - len(finetuned.left_out)
    test = report.cohort.splits["test"]
    known = test.known_patients and not test.unknown_patients
    whose = f" of {counted(finetuned.n_patients, 'patient')}" if known else ""
    apart = " that no training step has seen" if report.training_is_known and not report.leak else ""
    parts = [
        f"On {counted(finetuned.n_records, 'test record')}{whose}{apart}, the finetuned model "
        f"reaches a macro AUROC of {_with_interval(finetuned.macro_auroc)} and a macro AUPRC of "
        f"{_with_interval(finetuned.macro_auprc)} over {counted(n_labels, 'finding')}."
    ]
    for key, what in (
        ("probe", "A linear probe on the frozen pretrained encoder reaches"),
        ("probe_random", "the same probe on an encoder of random weights"),
    ):
        if key in report.scores:
            one = report.scores[key]
            parts.append(f"{what} {_with_interval(one.macro_auroc)} and {_with_interval(one.macro_auprc)}")
    first, *probes = parts
    return f"{first} {', '.join(probes)}. In brackets: {100 * report.confidence:g} % intervals."


def _comparison(report: Report) -> str:
    """Whether the test split can tell the models apart, by p values that are corrected for the number of pairs."""
    corrected = {
        (test.first, test.second): test.p_holm
        for test in report.assessment.tests
        if test.label is None and test.measure == "auroc"
    }
    subjects = {
        ("finetuned", "probe"): ("the finetuned model", "the linear probe"),
        ("probe", "probe_random"): ("the probe on the pretrained encoder", "the one on random weights"),
        ("finetuned", "supervised"): ("the finetuned model", "the small supervised network"),
        ("probe", "supervised"): ("the probe on the pretrained encoder", "that network"),
    }
    sentences = []
    for pair, (subject, other) in subjects.items():
        difference, p = report.scores.get(" - ".join(pair)), corrected.get(pair)
        if difference is None or difference.macro_auroc is None or difference.macro_auroc.low is None or p is None:
            continue
        value, low, high = difference.macro_auroc.value, difference.macro_auroc.low, difference.macro_auroc.high
        assert high is not None
        if p < ALPHA:
            verdict = f"{subject} ranks {'better' if value > 0 else 'worse'} than {other}"
        else:
            verdict = f"these records do not tell {subject} from {other}"
        sentences.append(
            f"{verdict} (macro AUROC difference {_signed(value)}, interval {_signed(low)} to {_signed(high)}, "
            f"corrected p {shown_p(p)})"
        )
    text = "; ".join(sentences)
    return text[:1].upper() + text[1:] + "." if text else ""


def _meaning(report: Report) -> str:
    return (
        f"An interval says how far the number might move had other patients been in the test split: the middle "
        f"{100 * report.confidence:g} % of {report.n_replicates:,} draws of {_drawn(report)} with "
        "replacement. Differences are taken on the same draws, so they can be clear where the single intervals overlap."
    )


def _drawn(report: Report) -> str:
    """What the bootstrap draws: patients, or where they are unknown, records."""
    n, test = report.scores["finetuned"].n_patients, report.cohort.splits["test"]
    if not test.known_patients:
        return f"{counted(n, 'record')} (patients unknown)"
    return counted(n, "patient") + (" (a record of no known patient counts as one)" if test.unknown_patients else "")


def _small(report: Report) -> str:
    """A plain warning where the test split is small; empty where it is not."""
    finetuned = report.scores["finetuned"]
    rare = [label for label in finetuned.labels if label.positives < FEW_POSITIVES]
    if finetuned.n_patients >= FEW_PATIENTS and not rare:
        return ""
    words = []
    if finetuned.n_patients < FEW_PATIENTS:
        words.append(f"holds {_drawn(report)}")
    if rare:
        least = min(rare, key=lambda label: label.positives)
        words.append(
            f"has fewer than {FEW_POSITIVES} records of {len(rare)} of {len(finetuned.labels)} findings "
            f"({least.label}: {least.positives})"
        )
    perfect = any(area and area.low == area.high for label in finetuned.labels for area in (label.auroc, label.auprc))
    return (
        f"This test split is small: it {' and '.join(words)}. One record more or less moves such numbers visibly, and "
        "a bootstrap of so few cases tends to give intervals that are too narrow. Read the numbers as a check that the "
        "pipeline works and learns, not as the performance of the model."
        + (" An interval of no width (1.000 to 1.000) is a want of hard cases, not certainty." if perfect else "")
    )


def _unknown_note(report: Report) -> str:
    unknown = int(np.isnan(report.truth).sum())
    return f"Left out label by label: {counted(unknown, 'unknown label')} of these records." if unknown else ""


def _replicate_note(report: Report) -> str:
    finetuned = report.scores["finetuned"]
    lost = {label.label: label.auroc.left_out for label in finetuned.labels if label.auroc and label.auroc.left_out}
    if not lost:
        return ""
    worst = max(lost, key=lambda label: lost[label])
    return (
        f"In some of the {report.n_replicates:,} replicates a finding has no record with or none without it, and "
        f"is left out there: {counted(len(lost), 'finding')}, most often {worst} ({lost[worst]:,}). The macro "
        f"mean of such a replicate ({finetuned.incomplete_replicates:,} of them) is that of its other findings."
    )


# ---- tables and pictures ------------------------------------------------------------------------------------------


def _diagrams(report: Report) -> list[Markup]:
    """The flow diagram of all records; where there are several sources, then that of each."""
    sources = report.counts["sources"]
    named = {"All sources": report.counts["total"], **sources} if len(sources) > 1 else sources
    return [
        svg_image(
            cohort_svg({"total": counts, "sources": {name: counts}}), f"Flow of records, {name}; the numbers are below"
        )
        for name, counts in named.items()
    ]


def _findings(report: Report) -> list[dict[str, Any]]:
    rows = []
    for k, (scores, probe) in enumerate(
        zip(report.scores["finetuned"].labels, report.scores["probe"].labels, strict=True)
    ):
        point = report.operating_points[k]
        rows.append(
            {
                "label": scores.label,
                "aggregation": report.aggregations[k],
                "scores": scores,
                "probe": probe,
                "prevalence": f"{100 * scores.positives / scores.n:.1f} %" if scores.n else NONE,
                "sensitivity": _share(point.true_positives, point.true_positives + point.false_negatives),
                "specificity": _share(point.true_negatives, point.true_negatives + point.false_positives),
            }
        )
    return rows


def curve_panels(report: Report, roc: bool) -> list[Panel]:
    """A panel for each finding that could be scored: its ROC curve, else its precision-recall curve."""
    panels = []
    for k, scores in enumerate(report.scores["finetuned"].labels):
        if scores.auroc is None:
            continue
        known = ~np.isnan(report.truth[:, k])
        truth = report.truth[known, k]
        curve = roc_curve if roc else pr_curve
        series = tuple(
            Series(MODELS[name], *curve(truth, report.predictions[name][known, k]), steps=not roc)
            for name in ("finetuned", "probe")
        )
        axes = (f"1 {MINUS} specificity", "sensitivity") if roc else ("recall", "precision")
        title = f"{shortened(scores.label)}\n{scores.positives:,} of {scores.n:,}"
        level = None if roc else scores.positives / scores.n
        panels.append(Panel(title, *axes, series, unit_square=True, diagonal=roc, level=level))
    return panels


def _curves(report: Report, roc: bool) -> Markup:
    return panel_pictures(curve_panels(report, roc), "ROC" if roc else "Precision-recall")


def _ecg(report: Report, ecg: DrawnEcg) -> dict[str, Any]:
    """One ECG with the findings that are in it, those called, and the three most probable ones."""
    probabilities, truth = report.predictions["finetuned"][ecg.row], report.truth[ecg.row]
    thresholds = np.array([point.threshold for point in report.operating_points])
    called = most_probable(probabilities[None])[0] if report.assessment.classes else probabilities >= thresholds
    order = np.argsort(-probabilities, kind="stable")
    rows = [
        {
            "label": report.labels[k],
            "truth": "unknown" if np.isnan(truth[k]) else "present" if truth[k] == 1 else "absent",
            "called": "present" if called[k] else "absent",
            "probability": float(probabilities[k]),
            "threshold": float(thresholds[k]),
        }
        for place, k in enumerate(order)
        if place < 3 or truth[k] == 1 or called[k]
    ]
    png = draw_ecg(ecg.signal_mv, ecg.sampling_rate_hz, ecg.saliency, ecg.record_id, leads=ecg.leads)
    return {
        "record_id": ecg.record_id,
        "why": ecg.why,
        "caption": ecg.caption,
        "rows": rows,
        "image": "data:image/png;base64," + base64.b64encode(png).decode(),
    }


# ---- numbers ------------------------------------------------------------------------------------------------------


def _share(part: int, whole: int) -> tuple[str, str]:
    return (f"{part / whole:.2f}" if whole else NONE), f"{part:,}/{whole:,}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", MINUS)


def _interval(estimate: Estimate, signed: bool = False) -> str:
    if estimate.low is None or estimate.high is None:
        return "no interval"
    if signed:
        return f"{_signed(estimate.low)} to {_signed(estimate.high)}"
    return f"{estimate.low:.3f}{NONE}{estimate.high:.3f}"


def _with_interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return "none (no finding has both classes)"
    return f"{estimate.value:.3f} ({_interval(estimate)})"
