"""What is written beside exported weights, for readers who have not this project: words, an example, a model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import yaml

from ecgfm.config import departures_in_words
from ecgfm.pages.cards import cell, evaluation_table

STANDARDISATION = (
    "each lead minus its mean, divided by its population standard deviation, both over all valid samples of the "
    "whole recording at the model's sampling rate; 0 where a sample is invalid, and in a constant or missing lead"
)

LICENCE = (
    "The weights are under the terms of the data they were learnt from (training_data) and of the weights they started "
    "from: ask there before passing them on. Not a medical device."
)

_PREPARATION = (
    "take the leads by name, in the order of `leads`, in millivolt; a lead that is missing is invalid throughout",
    "resample linearly to `sampling_rate_hz` with the first and last samples aligned: n samples become "
    "int(n * sampling_rate_hz / rate); no filter",
    "standardise, see `standardisation`",
    "cut into segments of `segment_samples`, from the start, without overlap; a rest that is shorter is left out",
)

STEPS = {
    "multilabel": (
        "ask the model: a logit per segment and label; the probability of a segment is 1 / (1 + exp(-logit))",
        "of each label, the recording's probability is the mean or the maximum of its segments', see `aggregation` "
        "(mean where it says nothing)",
        "of each label with a `temperature` t and a `shift` s (1 and 0 where it has none), the calibrated probability "
        "is 1 / (1 + exp(-logit / t - s)), where logit = log(p / (1 - p)) of the recording's probability p",
        "a label is called present where that probability is at or above its threshold, see `thresholds`, chosen on "
        "recordings that were not trained on",
    ),
    "multiclass": (
        "ask the model: a logit per segment and label; the labels exclude each other, and a segment's probabilities "
        "are exp(logit), divided by their sum over the labels",
        "the recording's probabilities are the means of its segments'",
        "with the `temperature` t, which is the same for all labels, the calibrated probabilities are p ** (1 / t), "
        "divided by their sum over the labels",
        "the label of the highest probability is the one that is called present",
    ),
    "regression": (
        "ask the model: a scaled value per segment and label; with the label's `scaling`, its mean and its standard "
        "deviation, the value is scaled value * standard deviation + mean, in the label's unit, see `label_units`",
        "of each label, the recording's value is the mean of its segments'",
    ),
    "pretrained": ("ask the model: an embedding per segment; the recording's is their mean",),
}


def steps(departures: Mapping[str, Any]) -> tuple[str, ...]:
    """How a recording becomes what the model takes. departures: of `PrepareConfig`"""
    if not departures:
        return _PREPARATION
    return (*_PREPARATION, f"but prepared {departures_in_words(departures)}, as ecgfm's `prepare` section means it")


_EXAMPLE = '''"""Ask the exported model about a recording: python example.py RECORDING.npy RATE_HZ [LEAD...]

RECORDING.npy: (lead, time), millivolt, NaN where invalid; LEAD: names of its rows, where they are not the model's.
"""

import json
import sys
from pathlib import Path

import numpy as np
{imports}

HERE = Path(__file__).parent
ABOUT = json.loads((HERE / "preprocessing.json").read_text(encoding="utf-8"))
if ABOUT["departures"]:
    sys.exit(f"the model takes recordings prepared with {ABOUT['departures']}, which this example does not do")


def segments_of(signal_mv, rate_hz, leads):
    """(lead, time), millivolt -> (segment, lead, time) float32, standardised. The steps are those of ABOUT["steps"]."""
    row_of = {name.lower(): row for name, row in zip(leads, np.asarray(signal_mv, dtype=float))}
    missing = np.full(signal_mv.shape[1], np.nan)
    signal = np.stack([row_of.get(lead.lower(), missing) for lead in ABOUT["leads"]])
    n_old, n_new = signal.shape[1], int(signal.shape[1] * ABOUT["sampling_rate_hz"] / rate_hz)
    left, rest = np.divmod(np.arange(n_new) * (n_old - 1), max(n_new - 1, 1))  # whole: known where it meets a sample
    signal = signal[:, left] + (signal[:, left + (rest > 0)] - signal[:, left]) * (rest / max(n_new - 1, 1))
    valid = ~np.isnan(signal)
    for lead in range(len(signal)):
        samples = signal[lead, valid[lead]]
        varies = len(samples) > 0 and np.ptp(samples) > 0
        signal[lead] = (signal[lead] - samples.mean()) / samples.std() if varies else 0
    n = ABOUT["segment_samples"]
    whole = np.where(valid, signal, 0)[:, : n_new // n * n]
    return whole.reshape(len(signal), -1, n).swapaxes(0, 1).astype(np.float32)


def answer(outputs):
    """Of a recording: label -> probability, or value; of a model without labels, the embedding."""
    if not ABOUT["labels"]:
        return outputs["embedding"].mean(axis=0).tolist()
    if ABOUT["task"] == "regression":
        mean, deviation = np.array([ABOUT["scaling"][label] for label in ABOUT["labels"]]).T
        values = outputs["scaled_values"].astype(float).mean(axis=0) * deviation + mean
        return dict(zip(ABOUT["labels"], values.tolist()))
    logits = outputs["logits"].astype(float)
    if ABOUT["task"] == "multiclass":
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        p = (powers / powers.sum(axis=1, keepdims=True)).mean(axis=0)
        p = p ** (1 / ABOUT["temperature"].get(ABOUT["labels"][0], 1))
        return dict(zip(ABOUT["labels"], (p / p.sum()).tolist()))
    of_segments = 1 / (1 + np.exp(-logits))
    maximum = [ABOUT["aggregation"].get(label) == "max" for label in ABOUT["labels"]]
    p = np.where(maximum, of_segments.max(axis=0), of_segments.mean(axis=0))
    sharper = np.array([1 / ABOUT.get("temperature", {}).get(label, 1) for label in ABOUT["labels"]])
    factor = np.exp([ABOUT.get("shift", {}).get(label, 0) for label in ABOUT["labels"]])
    p = factor * p**sharper / (factor * p**sharper + (1 - p) ** sharper)
    return dict(zip(ABOUT["labels"], p.tolist()))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    recording, rate_hz, *leads = sys.argv[1:]
    try:
        signal_mv, leads = np.load(recording), leads or ABOUT["leads"]
    except (OSError, ValueError) as error:
        sys.exit(f"{recording}: expected an array that np.save wrote; {error}")
    if signal_mv.ndim != 2 or len(signal_mv) != len(leads):
        sys.exit(f"expected (lead, time) with {len(leads)} leads, {' '.join(leads)}; found {signal_mv.shape}")
    if unknown := [lead for lead in leads if lead.lower() not in map(str.lower, ABOUT["leads"])]:
        sys.exit(f"the model has no lead {' '.join(unknown)}; its leads: {' '.join(ABOUT['leads'])}")
    segments = segments_of(signal_mv, float(rate_hz), leads)
    if not len(segments):
        sys.exit(f"expected at least {ABOUT['segment_seconds']:g} s, found less")
    {ask}
    print(json.dumps(answer(dict(zip(ABOUT["outputs"], outputs))), indent=1))
'''

_TASK_TAGS = {
    "multilabel": "multi-label-classification",
    "multiclass": "multi-class-classification",
    "regression": "regression",
}
_IMPORTS = {"onnx": "import onnxruntime", "torch": "import torch"}
_ASK = {
    "onnx": 'session = onnxruntime.InferenceSession(HERE / "model.onnx", providers=["CPUExecutionProvider"])\n'
    '    outputs = session.run(list(ABOUT["outputs"]), {"signal": segments})',
    "torch": 'model = torch.export.load(HERE / "model.pt2").module()\n'
    "    outputs = [output.detach().numpy() for output in model(torch.from_numpy(segments))]",
}


def example(kind: Literal["onnx", "torch"]) -> str:
    """A program that asks the exported model about a recording, of numpy and onnxruntime (or torch) alone."""
    return _EXAMPLE.replace("{imports}", _IMPORTS[kind]).replace("{ask}", _ASK[kind])


def model_card(about: Mapping[str, Any], n_parameters: int, metrics: Mapping[str, Any] | None, licence: str) -> str:
    """README.md of a folder in Hugging Face's layout: YAML, then Markdown.

    about: of `export.describe`; metrics: of an evaluation's metrics.json; licence: an identifier of Hugging Face's
    """
    labels = about["labels"]
    task = about["task"]
    what = ("regressor" if task == "regression" else "classifier") if labels else "encoder"
    tags = ["ecg", "electrocardiogram", "wav2vec2", "time-series", *([_TASK_TAGS[task]] if labels else [])]
    name = f"ecgfm-{what}-{about['digest'].removeprefix('sha256:')[:12]}"
    front: dict[str, Any] = {
        "license": licence,
        **({"license_name": "terms-of-the-training-data"} if licence == "other" else {}),
        "library_name": "ecgfm",
        "tags": tags,
        "training_data": dict(about["training_data"]),
        "weights_digest": about["digest"],
    }
    if metrics is not None:
        front["model-index"] = [{"name": name, "results": [_result(metrics, task)]}]
    leads, rate_hz = about["leads"], about["sampling_rate_hz"]
    lines = [
        f"# {name}",
        "",
        f"An ECG {what} of {n_parameters:,} parameters: wav2vec 2.0 on {len(leads)} leads, after ECG-FM "
        "(McKeen et al. 2024, arXiv 2408.05178).",
        "",
        "## Input",
        "",
        f"Segments of {about['segment_seconds']:g} s at {rate_hz:g} Hz ({about['segment_samples']:,} samples), "
        f"{len(leads)} leads in this order: {' '.join(leads)}. Before, and after:",
        "",
        *(f"{number}. {step}" for number, step in enumerate(about["steps"], start=1)),
        "",
        f"Standardisation: {about['standardisation']}.",
        "",
        "The same, for programs, is in `preprocessor_config.json`.",
        "",
        "## Use",
        "",
        "    pip install ecgfm",
        f"    ecgfm {'predict' if labels else 'embed'} THIS_FOLDER RECORDINGS --out answers.csv",
        "",
        "`model.safetensors` has the tensors under the names of the published ECG-FM files; `meta.json` makes the "
        "folder a checkpoint of `ecgfm`. It is no model of the package `transformers`.",
        "",
    ]
    if labels and task == "regression":
        lines += ["## Labels", "", "| number | label | unit | mean | standard deviation |", "|---:|---|---|---:|---:|"]
        for number, label in enumerate(labels):
            mean, deviation = about["scaling"][label]
            unit = about["label_units"].get(label, "not given")
            lines.append(f"| {number} | {cell(label)} | {cell(unit)} | {mean:.6g} | {deviation:.6g} |")
        lines += [
            "",
            "Mean and standard deviation are of the records trained on; an output is a value less the former, "
            "divided by the latter.",
            "",
        ]
    elif labels:
        lines += [
            "## Labels",
            "",
            *(["They exclude each other: the most probable one is called.", ""] if task == "multiclass" else []),
            "| number | label | over segments | temperature | shift | present from |",
            "|---:|---|---|---:|---:|---:|",
        ]
        for number, label in enumerate(labels):
            threshold = about["thresholds"].get(label)
            unset = "where most probable" if task == "multiclass" else "not chosen"
            shown = unset if threshold is None else f"{threshold:.3f}"
            how, temperature = about["aggregation"].get(label, "mean"), about.get("temperature", {}).get(label, 1.0)
            shift = about.get("shift", {}).get(label, 0.0)
            lines.append(f"| {number} | {cell(label)} | {how} | {temperature:.3g} | {shift:.3g} | {shown} |")
        lines.append("")
    lines += ["## Learnt from", ""]
    lines += [f"- {source}: `{digest}`" for source, digest in about["training_data"].items()] or [
        "The checkpoint does not say."
    ]
    lines += ["", "Digests of content, by which the same data are known again.", "", "## Evaluation", ""]
    lines += (
        evaluation_table(metrics) if metrics is not None else ["None was given. Measure it on your own recordings."]
    )
    lines += [
        "",
        "## Limits",
        "",
        about["licence"],
        "",
        f"Weights: `{about['digest']}`. Made by {about['made_by']}.",
        "",
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n" + "\n".join(lines)


def _result(metrics: Mapping[str, Any], task: str) -> dict[str, Any]:
    """One result of Hugging Face's model-index."""
    scores = metrics["scores"]["finetuned"]
    if task == "regression":
        found = [
            ("mae", f"mean absolute error, {row['label']}", row["mean_absolute_error"]) for row in scores["labels"]
        ]
    else:
        found = [(name, f"macro {name.upper()}", scores[f"macro_{name}"]) for name in ("auroc", "auprc")]
    return {
        "task": {
            "type": _TASK_TAGS[task],
            "name": "regression on ECGs" if task == "regression" else "ECG classification",
        },
        "dataset": {"name": f"{metrics['split']} split, {scores['n_records']} records", "type": "ecg"},
        "metrics": [{"type": kind, "name": name, "value": one["value"]} for kind, name, one in found if one],
    }
