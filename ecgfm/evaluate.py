"""The evaluation: record-level predictions on data no training step has seen, linear probes, and the report."""

from __future__ import annotations

import functools
import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
import yaml

from ecgfm import checkpoints, leakage
from ecgfm.assessment import ScoredRecords, as_json, assess
from ecgfm.baselines import Shot, few_shot, knn
from ecgfm.config import EvaluateConfig, ModelConfig
from ecgfm.contracts import read_table, read_tables, write_table
from ecgfm.data import Shards, in_order, load, pick_device, standardise
from ecgfm.drawing import LONG_SECONDS, draw_panels, drawn_seconds
from ecgfm.ecg import InputError
from ecgfm.html_report import DIFFERENCES, MODELS, Cohort, DrawnEcg, Report, SplitCounts, Training, curve_panels, render
from ecgfm.label_space import LabelSpace, read_label_space
from ecgfm.metrics import BOOTSTRAP_RULE, aggregate, best_f1_threshold, compare
from ecgfm.model import Classifier, Encoder
from ecgfm.predict import (
    Labelled,
    calibrated,
    checkpoint_for,
    read_labelled,
    record_probabilities,
    saliency,
    segment_outputs,
)
from ecgfm.probe import Probe, linear_probe
from ecgfm.shards import ShardReader
from ecgfm.splits import SPLITS

NORMAL_CODES = frozenset({"426783006", "NORM"})
"""Codes of an unremarkable ECG: sinus rhythm in SNOMED CT, and PTB-XL's normal ECG (behind its level's name)."""


_LOSSES = {"bce": "binary cross-entropy", "focal": "focal loss", "asymmetric": "asymmetric loss"}
_MODES = {
    "full": "all parameters",
    "frozen": "all but the convolutional feature extractor",
    "linear": "the classifier alone",
}


class Choice(NamedTuple):
    """A record to draw. kind: `right`, `wrong` or `normal`; label: its number where one label is the reason."""

    row: int
    kind: str
    label: int | None


def evaluate(inputs: Mapping[str, Any], config: EvaluateConfig, out: Path) -> dict[str, int]:
    """Write `predictions.parquet`, `embeddings.parquet`, `metrics.json`, `summary.md` and `report.html`.

    inputs: `slices`, the directories of the prepared slices; `splits`, `manifests`, `pretrain`, `finetune`: the
        directories of those stages

    Raises:
        InputError: a split without a labelled record, a run without a checkpoint or with one of another kind, leads,
            rate or labels, no such device.
    """
    device = pick_device(config.device)
    shards = Shards(inputs["slices"])
    space = read_label_space(inputs["manifests"] / "label_space.yaml")
    splits = {split: read_labelled(inputs["manifests"], split, space) for split in SPLITS}
    finetuned = _checkpoint(checkpoints.best(inputs["finetune"]), inputs["finetune"], "finetuned", shards)
    pretrained = _checkpoint(checkpoints.meant_by(inputs["pretrain"]), inputs["pretrain"], "pretrained", shards)
    if list(finetuned.meta.labels) != space.names:
        raise InputError(
            f"{finetuned.path}: expected the labels {', '.join(space.names)}, "
            f"found {', '.join(finetuned.meta.labels) or 'none'}; finetune again"
        )
    leak, is_known = _leak(inputs, splits["test"], (finetuned, pretrained))
    if leak and not config.allow_leakage:
        raise InputError(
            f"evaluate: the model knows the test split: {leak.in_words(len(splits['test'].record_ids))}; split so that "
            "they are apart, or see the numbers, with a warning, by --allow-leakage"
        )
    model = checkpoints.build(finetuned).to(device)
    assert isinstance(model, Classifier)

    predictions = {}
    tables = []
    for split in ("valid", "test"):
        labelled = splits[split]
        logits = segment_outputs(model, labelled.segments, shards, config.batch_size, device, config.precision).logits
        assert logits is not None
        raw, n_segments = record_probabilities(logits, labelled, space)
        predictions[split] = calibrated(raw, space.names, finetuned.meta.temperature)
        head = pl.DataFrame({"record_id": labelled.record_ids, "split": split, "n_segments": n_segments})
        tables.append(head.hstack(pl.DataFrame(predictions[split], schema=space.names)))
    write_table(pl.concat(tables), "predictions", out / "predictions.parquet")

    encoders: dict[str, Encoder] = {"pretrained": checkpoints.build_encoder(pretrained)}
    if config.probe_random_encoder:
        torch.manual_seed(config.seed)
        encoders["random"] = Encoder(pretrained.model_config)
    embeddings = {
        name: {split: embed(encoder.to(device), splits[split], shards, config, device) for split in SPLITS}
        for name, encoder in encoders.items()
    }
    write_table(_embedding_table(embeddings, splits), "embeddings", out / "embeddings.parquet")
    probes = {
        name: linear_probe(
            (of_split["train"], splits["train"].truth),
            (of_split["valid"], splits["valid"].truth),
            of_split["test"],
            space.names,
        )
        for name, of_split in embeddings.items()
    }

    test = splits["test"]
    by_model = {"finetuned": predictions["test"], "probe": probes["pretrained"].probabilities}
    if "random" in probes:
        by_model["probe_random"] = probes["random"].probabilities
    by_model["neighbours"], n_neighbours, shots = _untrained(embeddings, splits, config)
    stored, valid = finetuned.meta.thresholds, splits["valid"]
    thresholds = [
        stored[label] if label in stored else best_f1_threshold(valid.truth[:, k], predictions["valid"][:, k])
        for k, label in enumerate(space.names)
    ]
    differences = [pair for pair in DIFFERENCES if set(pair) <= set(by_model)]
    assessment, areas = assess(
        _scored(inputs, test, space),
        by_model,
        "finetuned",
        thresholds,
        differences,
        n_replicates=config.bootstrap_samples,
        confidence=config.confidence,
        seed=config.seed,
    )
    scores = compare(
        test.truth,
        by_model,
        space.names,
        test.patients,
        differences=differences,
        n_replicates=config.bootstrap_samples,
        confidence=config.confidence,
        seed=config.seed,
        areas=areas,
    )
    choices = choose_records(predictions["test"], test.truth, _is_normal(space), config.drawn_records)
    report = Report(
        cohort=read_cohort(inputs, splits),
        leak=leak.in_words(len(test.record_ids)) if leak else "",
        training_is_known=is_known,
        labels=space.names,
        aggregations=[label.aggregation for label in space.labels],
        truth=test.truth,
        predictions=by_model,
        scores=scores,
        operating_points=[one.point for one in assessment.decisions],
        n_replicates=config.bootstrap_samples,
        confidence=config.confidence,
        probe_strengths=[(f"{name} encoder", probe.c) for name, probe in probes.items()],
        n_neighbours=n_neighbours,
        assessment=assessment,
        shots=shots,
        dropped=space.dropped,
        pretraining=_pretraining(inputs["pretrain"], pretrained),
        finetuning=_finetuning(inputs["finetune"], finetuned),
        ecgs=[
            _draw(choice, test, predictions["test"], model, shards, inputs["slices"], device, space)
            for choice in choices
        ],
    )
    _write_metrics(report, probes, out / "metrics.json")
    (out / "report.html").write_text(render(report), encoding="utf-8")
    (out / "summary.md").write_text(summary(report), encoding="utf-8")
    if panels := curve_panels(report, roc=True):
        (out / "roc.svg").write_text(draw_panels(panels, panel_inches=(2.5, 2.5)), encoding="utf-8")
    shards.close()
    return {
        "labels": len(space.labels),
        "test records": len(test.record_ids),
        "test patients": scores["finetuned"].n_patients,
        "test segments": test.segments.height,
        "embeddings": sum(len(split.record_ids) for split in splits.values()) * len(encoders),
    }


def summary(report: Report) -> str:
    """The headline numbers as a Markdown table."""
    lines = ["| on the test split | records | macro AUROC | macro AUPRC |", "|---|---:|---:|---:|"]
    for model in report.predictions:
        scores = report.scores[model]
        shown = [
            f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
            if estimate
            else "no label has both classes"
            for estimate in (scores.macro_auroc, scores.macro_auprc)
        ]
        lines.append(f"| {MODELS[model]} | {scores.n_records} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", f"In brackets: {report.confidence:.0%} intervals, bootstrapped by patient.", ""])


def embed(
    encoder: Encoder, labelled: Labelled, shards: Shards, config: EvaluateConfig, device: torch.device
) -> np.ndarray:
    """(record, width) float32: the mean over a record's segments of their embeddings."""
    embeddings = segment_outputs(
        encoder, labelled.segments, shards, config.batch_size, device, config.precision
    ).embeddings
    record_ids, of_record, _ = aggregate(
        labelled.segments["record_id"].to_list(), embeddings, ["mean"] * embeddings.shape[1]
    )
    assert record_ids == labelled.record_ids
    return of_record.astype(np.float32)


def _leak(
    inputs: Mapping[str, Any], test: Labelled, found: Sequence[checkpoints.Checkpoint]
) -> tuple[leakage.Leak, bool]:
    """Which test records the models have learnt from, and whether all that they have learnt from is known."""
    seen = functools.reduce(operator.or_, (checkpoints.seen(one) or leakage.UNKNOWN for one in found))
    duplicates = read_table(inputs["audit"] / "duplicates.parquet", "duplicates")
    return leakage.find_leak(seen, test.record_ids, test.patients, duplicates), seen.whole


def _untrained(
    embeddings: Mapping[str, Mapping[str, np.ndarray]], splits: Mapping[str, Labelled], config: EvaluateConfig
) -> tuple[np.ndarray, int, dict[str, tuple[Shot, ...]]]:
    """What the pretrained encoder's nearest neighbours say of the test records, how many there are, and each encoder's
    curve of few shots."""
    truth = {split: labelled.truth for split, labelled in splits.items()}
    asked = sample(len(truth["train"]), config.baseline_records, config.seed)
    truth["train"] = truth["train"][asked]
    some = {name: {**of_split, "train": of_split["train"][asked]} for name, of_split in embeddings.items()}
    neighbours = knn(
        (some["pretrained"]["train"], truth["train"]),
        (some["pretrained"]["valid"], truth["valid"]),
        some["pretrained"]["test"],
    )
    shots = {
        name: few_shot((of_split["train"], truth["train"]), (of_split["test"], truth["test"]))
        for name, of_split in some.items()
    }
    return neighbours.probabilities, neighbours.k, shots


def sample(n: int, most: int, seed: int) -> np.ndarray:
    """Which of n records are taken where not all are: at most so many, ascending."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(seed).choice(n, most, replace=False))


def _scored(inputs: Mapping[str, Any], test: Labelled, space: LabelSpace) -> ScoredRecords:
    """The test records with what their slices say of them."""
    order = pl.DataFrame({"record_id": test.record_ids})
    records, quality = (
        order.join(read_tables([one / f"{name}.parquet" for one in inputs["slices"]], name), on="record_id", how="left")
        for name in ("records", "quality")
    )
    codes = [label.codes for label in space.labels]
    return ScoredRecords(test.truth, space.names, codes, test.patients, records, quality)


def choose_records(probabilities: np.ndarray, truth: np.ndarray, is_normal: np.ndarray, n: int) -> list[Choice]:
    """Up to `n` records that show the model at work, by rule; none twice.

    In turn: the finding called with the highest probability and right, each time another finding while there is one;
    the worst error, the known label whose probability is furthest from the truth; and the normal record of middling
    error, a normal one being one with a normal label and no other, or where no label is normal, with none.

    probabilities, truth: (record, label); is_normal: (label,) bool, the labels that say that nothing is amiss
    """
    error = np.abs(probabilities - truth)  # NaN where unknown
    finding = (truth == 1) & ~is_normal
    unremarkable = ~finding.any(axis=1) & ~np.isnan(truth).any(axis=1)
    if is_normal.any():
        unremarkable &= (truth[:, is_normal] == 1).any(axis=1)
    free = np.ones(len(truth), dtype=bool)
    shown = np.zeros(truth.shape[1], dtype=bool)
    choices: list[Choice] = []
    while len(choices) < n and free.any():
        before = len(choices)
        for kind in ("right", "wrong", "normal"):
            row: int
            label: int | None = None
            if kind == "normal":
                rows = np.flatnonzero(unremarkable & free)
                if not len(rows):
                    continue
                ordered = rows[np.argsort(error[rows].mean(axis=1), kind="stable")]
                row = int(ordered[(len(ordered) - 1) // 2])
            else:
                eligible = free[:, None] & (finding if kind == "right" else ~np.isnan(truth))
                if kind == "right" and (eligible & ~shown).any():
                    eligible &= ~shown
                if not eligible.any():
                    continue
                weight = np.where(eligible, probabilities if kind == "right" else error, -np.inf)
                row, label = (int(i) for i in np.unravel_index(int(np.argmax(weight)), weight.shape))
                shown[label] |= kind == "right"
            free[row] = False
            choices.append(Choice(row, kind, label))
        if len(choices) == before:
            break
    return choices[:n]


def read_cohort(inputs: Mapping[str, Any], splits: Mapping[str, Labelled]) -> Cohort:
    """Records in and out of every stage, from their tables."""
    read = {"records": ("record_id", "source"), "rejects": ("source", "reason"), "segments": ("record_id",)}
    records, rejects, segments = (
        read_tables([slice_dir / f"{name}.parquet" for slice_dir in inputs["slices"]], name, columns)
        for name, columns in read.items()
    )
    assigned = read_table(inputs["splits"] / "splits.parquet", "splits")
    assert assigned.height == records.height
    of_split = {}
    for split in SPLITS:
        mine = assigned.filter(pl.col("split") == split)
        pairs = inputs["manifests"] / f"cmsc_{split}.parquet"
        of_split[split] = SplitCounts(
            records=mine.height,
            known_patients=mine["patient_id"].drop_nulls().n_unique(),
            unknown_patients=mine["patient_id"].null_count(),
            segments=segments.join(mine, on="record_id", how="semi").height,
            pairs=read_table(pairs, "pairs").height if split != "test" else None,
            labelled_records=len(splits[split].record_ids),
            labelled_segments=splits[split].segments.height,
        )
    return Cohort(
        listed=_counts(pl.concat([records["source"], rejects["source"]])),
        rejected=_counts(rejects["reason"]),
        excluded=_counts(assigned["excluded"].drop_nulls()),
        splits=of_split,
    )


def _counts(values: pl.Series) -> dict[str, int]:
    """How often each value occurs, the most frequent first."""
    counted = values.alias("value").value_counts(name="n").sort(["n", "value"], descending=[True, False])
    return dict(counted.iter_rows())


def _checkpoint(path: Path | None, directory: Path, kind: checkpoints.Kind, shards: Shards) -> checkpoints.Checkpoint:
    if path is None:
        raise InputError(f"{directory}: holds no checkpoint to evaluate; train first")
    return checkpoint_for(path, kind, shards)


def _embedding_table(
    embeddings: Mapping[str, Mapping[str, np.ndarray]], splits: Mapping[str, Labelled]
) -> pl.DataFrame:
    return pl.concat(
        pl.DataFrame({"record_id": splits[split].record_ids, "split": split, "encoder": encoder}).with_columns(
            pl.Series("embedding", of_record).cast(pl.List(pl.Float32))
        )
        for encoder, of_split in embeddings.items()
        for split, of_record in of_split.items()
    )


def _is_normal(space: LabelSpace) -> np.ndarray:
    return np.array([any(code.rpartition(":")[2] in NORMAL_CODES for code in label.codes) for label in space.labels])


def _draw(
    choice: Choice,
    test: Labelled,
    probabilities: np.ndarray,
    model: Classifier,
    shards: Shards,
    slices: Sequence[Path],
    device: torch.device,
    space: LabelSpace,
) -> DrawnEcg:
    """The first segments of a record, up to the 10 s of an ECG's paper, with what the model looks at."""
    record_id = test.record_ids[choice.row]
    seconds = shards.segment_samples / shards.sampling_rate_hz
    all_segments = test.segments.filter(pl.col("record_id") == record_id).sort("segment_index")
    segments = all_segments.head(math.ceil(LONG_SECONDS / seconds))
    places = shards.places(segments)
    signal_mv = []
    for number, row in places:
        shard = ShardReader(slices[number] / "shard.h5")
        signal_mv.append(shard.signal_mv(int(row)))
        shard.close()
    (batch,) = load(shards, places[:, None], in_order(len(places), len(places)), device)
    attention = saliency(model, standardise(batch, device)).flatten().cpu().numpy()
    total = segments.height * seconds
    drawn = drawn_seconds(total)
    why = "A typical normal record"
    if choice.label is not None:
        which = "Most confident and true" if choice.kind == "right" else "Furthest from the truth"
        truth = "present" if test.truth[choice.row, choice.label] == 1 else "absent"
        why = (
            f"{which}: {space.names[choice.label]}, {truth}, probability {probabilities[choice.row, choice.label]:.3f}"
        )
    return DrawnEcg(
        row=choice.row,
        record_id=record_id,
        why=why,
        signal_mv=np.concatenate(signal_mv, axis=1),
        leads=shards.leads,
        sampling_rate_hz=shards.sampling_rate_hz,
        saliency=attention,
        caption=(
            f"Record {record_id}: its first {drawn:g} s. The prediction is made from "
            f"{all_segments.height} segment{'s' * (all_segments.height != 1)} of {seconds:g} s."
        ),
    )


def _pretraining(directory: Path, checkpoint: checkpoints.Checkpoint) -> Training:
    if checkpoint.path == directory:  # made elsewhere: `finetune.checkpoint`
        return Training(
            name="Pretraining",
            facts=[
                ("start", "the checkpoint that finetune.checkpoint names, made elsewhere"),
                ("architecture", _architecture(checkpoint.model_config)),
                ("parameters", f"{sum(tensor.numel() for tensor in checkpoint.state.values()):,}"),
                ("digest", checkpoints.digest(checkpoint.state)),
            ],
            config={},
            rows=[],
            caption="Its training was no part of this run.",
        )
    config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    segments = 2 * config["batch_pairs"] * config["accumulate"]
    return Training(
        name="Pretraining",
        facts=[
            ("objective", "wav2vec 2.0 + CMSC + random lead masking: no label is used"),
            ("architecture", _architecture(checkpoint.model_config)),
            ("parameters", f"{sum(tensor.numel() for tensor in checkpoint.state.values()):,}"),
            ("updates", f"{checkpoint.meta.step:,}, each of {segments:,} segments ({_epochs(checkpoint)})"),
        ],
        config=config,
        rows=_rows(directory),
        caption="Losses in bits per masked frame, the parts weighted as in their sum; accuracy of telling the true "
        "masked frame from its distractors.",
    )


def _finetuning(directory: Path, checkpoint: checkpoints.Checkpoint) -> Training:
    config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    start = "the pretrained encoder" if config["init"] == "pretrained" else "random weights"
    return Training(
        name="Finetuning",
        facts=[
            ("objective", f"{_LOSSES[config['loss']]} per finding; unknown labels teach nothing"),
            ("start", start),
            ("trained", _MODES[config["mode"]]),
            ("parameters", f"{sum(tensor.numel() for tensor in checkpoint.state.values()):,}"),
            (
                "evaluated",
                f"the checkpoint of the best valid macro AUPRC, update {checkpoint.meta.step:,} "
                f"({_epochs(checkpoint)})",
            ),
        ],
        config=config,
        rows=_rows(directory),
        caption="Train loss by update; valid loss, macro AUPRC and macro AUROC (by record) after each epoch.",
    )


def _architecture(config: ModelConfig) -> str:
    return (
        f"{len(config.conv_kernels)} convolutions of {config.conv_channels} channels, {config.n_layers} transformer "
        f"layers of width {config.width} with {config.n_heads} heads"
    )


def _epochs(checkpoint: checkpoints.Checkpoint) -> str:
    epochs = checkpoint.meta.progress["epochs"]
    return f"{epochs:.3g} epoch{'s' * (epochs != 1)}"


def _rows(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _write_metrics(report: Report, probes: Mapping[str, Probe], path: Path) -> None:
    """The numbers of the report as JSON."""
    values = {
        "split": "test",
        "leakage": report.leak or None,
        "training_is_known": report.training_is_known,
        "bootstrap": {"replicates": report.n_replicates, "confidence": report.confidence, "rule": BOOTSTRAP_RULE},
        "scores": {name: asdict(scores) for name, scores in report.scores.items()},
        "operating_points": {
            label: point._asdict() for label, point in zip(report.labels, report.operating_points, strict=True)
        },
        "probes": {
            name: {"c": probe.c, "valid_macro_auprc": probe.valid_macro_auprc} for name, probe in probes.items()
        },
        "neighbours": report.n_neighbours,
        "assessment": as_json(report.assessment),
        "few_shot": as_json(report.shots),
        "cohort": asdict(report.cohort),
        "dropped": dict(report.dropped),
    }
    path.write_text(json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
