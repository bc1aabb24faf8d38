"""The evaluation: record-level predictions on data no training step has seen, linear probes, and the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from ecgfm import checkpoints
from ecgfm.config import EvaluateConfig
from ecgfm.contracts import read_table, read_tables, write_table
from ecgfm.data import Shards
from ecgfm.drawing import draw_panels
from ecgfm.evaluate_values import evaluate_values
from ecgfm.evaluated import (
    embed,
    embedding_table,
    encoders_of,
    open_evaluated,
    records_and_quality,
    sample,
    write_report,
)
from ecgfm.label_space import LabelSpace
from ecgfm.lead_subsets import score_lead_subsets, subsets_of, with_leads
from ecgfm.model import Classifier
from ecgfm.pages.expected import beside
from ecgfm.pages.findings import DIFFERENCES, MODELS, Report, curve_panels, render
from ecgfm.predict import (
    Labelled,
    calibrated,
    record_probabilities,
    segment_outputs,
)
from ecgfm.report_contents import (
    choose_records,
    draw,
    read_card_facts,
    read_cohort,
    read_finetuning,
    read_pretraining,
    says_normal,
    tell_small_network,
)
from ecgfm.scores.assessment import ScoredRecords, as_json, assess
from ecgfm.scores.baselines import Shot, few_shot, knn
from ecgfm.scores.between_sources import BetweenSources, Records, leave_one_out, origins, transfer_thresholds
from ecgfm.scores.confusion import ConfusedPair, ConfusionMatrix, confused_pairs, confusion_matrix
from ecgfm.scores.embedding_map import MAP_RECORDS, EmbeddingMap, embedding_map
from ecgfm.scores.metrics import BOOTSTRAP_RULE, best_f1_threshold, compare
from ecgfm.scores.probe import Probe, linear_probe
from ecgfm.small_network import train_small_network
from ecgfm.splits import SPLITS


def evaluate(inputs: Mapping[str, Any], config: EvaluateConfig, out: Path) -> dict[str, int]:
    """Write `predictions.parquet`, `embeddings.parquet`, `metrics.json`, `summary.md`, `report.html`, and the cards
    of the model and of its data.

    inputs: `slices`, the directories of the prepared slices; `audit`, `splits`, `labels`, `manifests`, `pretrain`,
        `finetune`: the directories of those stages

    Raises:
        InputError: as `evaluated.open_evaluated`.
    """
    subject = open_evaluated(inputs, config)
    if subject.space.task == "regression":
        return evaluate_values(subject, inputs, config, out)
    device, shards, space, splits = subject.device, subject.shards, subject.space, subject.splits
    finetuned, pretrained = subject.finetuned, subject.pretrained
    model = checkpoints.build(finetuned).to(device)
    assert isinstance(model, Classifier)

    predictions, table = _predict(model, finetuned.meta, splits, shards, space, config, device)
    write_table(table, "predictions", out / "predictions.parquet")

    encoders = encoders_of(subject, config)
    embeddings = {
        name: {split: embed(encoder.to(device), splits[split], shards, config, device) for split in SPLITS}
        for name, encoder in encoders.items()
    }
    write_table(embedding_table(embeddings, splits), "embeddings", out / "embeddings.parquet")
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
    asked = sample(len(splits["train"].record_ids), config.baseline_records, config.seed)
    some = {**splits, "train": _of_rows(splits["train"], asked)}
    some_embeddings = {name: {**of_split, "train": of_split["train"][asked]} for name, of_split in embeddings.items()}
    by_model["neighbours"], n_neighbours, shots = _untrained(some_embeddings, some)
    trained = train_small_network(some, shards, space, config, device) if config.supervised_baseline else None
    if trained:
        by_model["supervised"] = trained.probabilities
    exclusive, stored, valid = space.task == "multiclass", finetuned.meta.thresholds, splits["valid"]
    thresholds = [math.nan] * len(space.names)  # the most probable class is called
    if not exclusive:
        thresholds = [
            stored[label] if label in stored else best_f1_threshold(valid.truth[:, k], predictions["valid"][:, k])
            for k, label in enumerate(space.names)
        ]
    differences = [pair for pair in DIFFERENCES if set(pair) <= set(by_model)]
    scored = _scored(inputs, test, space)
    draws: dict[str, Any] = {
        "n_replicates": config.bootstrap_samples,
        "confidence": config.confidence,
        "seed": config.seed,
    }
    assessment, areas = assess(scored, by_model, "finetuned", thresholds, differences, exclusive=exclusive, **draws)
    scores = compare(test.truth, by_model, space.names, test.patients, differences=differences, areas=areas, **draws)
    if config.lead_subsets:
        by_leads = {tuple(shards.leads): predictions["test"]} | {
            kept: with_leads(model, kept, test, shards, space, finetuned.meta, config, device)
            for kept in subsets_of(shards.leads)
        }
        fewer = score_lead_subsets(by_leads, test.truth, space.names, test.patients, **draws)
        assessment = replace(assessment, parts=(*assessment.parts, *fewer))
    choices = choose_records(predictions["test"], test.truth, says_normal(space), config.drawn_records)
    report = Report(
        cohort=read_cohort(inputs, splits),
        counts=json.loads((inputs["splits"] / "cohort.json").read_bytes()),
        leak=subject.leak,
        training_is_known=subject.training_is_known,
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
        published=beside(
            config.published,
            scores,
            assessment.challenge.score if assessment.challenge else None,
            len(test.record_ids),
        ),
        confusion=_confusion(test.truth, predictions["test"], thresholds, space),
        embedding_map=_map(embeddings["pretrained"], scored, config.seed),
        dropped=space.dropped,
        pretraining=read_pretraining(inputs["pretrain"], pretrained),
        finetuning=read_finetuning(inputs["finetune"], finetuned),
        ecgs=[
            draw(choice, test, predictions["test"], model, shards, inputs["slices"], device, space)
            for choice in choices
        ],
        small_network=tell_small_network(trained, config) if trained else None,
        between=_between(inputs, some, some_embeddings["pretrained"], predictions, space, draws),
    )
    trainings = (report.pretraining, report.finetuning)
    card_facts = read_card_facts(inputs, finetuned, pretrained, space, trainings)
    write_report(_metrics(report, probes), card_facts, partial(render, report), summary(report), out)
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


def _predict(
    model: Classifier,
    meta: checkpoints.Meta,
    splits: Mapping[str, Labelled],
    shards: Shards,
    space: LabelSpace,
    config: EvaluateConfig,
    device: torch.device,
) -> tuple[dict[str, np.ndarray], pl.DataFrame]:
    """(record, label) probabilities of valid and test, calibrated as the model's are, and both as a table."""
    predictions, tables = {}, []
    for split in ("valid", "test"):
        labelled = splits[split]
        logits = segment_outputs(model, labelled.segments, shards, config.batch_size, device, config.precision).logits
        assert logits is not None
        raw, n_segments = record_probabilities(logits, labelled, space)
        predictions[split] = calibrated(raw, space.names, meta.temperature, meta.shift, space.task)
        head = pl.DataFrame({"record_id": labelled.record_ids, "split": split, "n_segments": n_segments})
        tables.append(head.hstack(pl.DataFrame(predictions[split], schema=space.names)))
    return predictions, pl.concat(tables)


def _untrained(
    embeddings: Mapping[str, Mapping[str, np.ndarray]], splits: Mapping[str, Labelled]
) -> tuple[np.ndarray, int, dict[str, tuple[Shot, ...]]]:
    """What the pretrained encoder's nearest neighbours say of the test records, how many there are, and each encoder's
    curve of few shots."""
    truth = {split: labelled.truth for split, labelled in splits.items()}
    pretrained = embeddings["pretrained"]
    neighbours = knn((pretrained["train"], truth["train"]), (pretrained["valid"], truth["valid"]), pretrained["test"])
    shots = {
        name: few_shot((of_split["train"], truth["train"]), (of_split["test"], truth["test"]))
        for name, of_split in embeddings.items()
    }
    return neighbours.probabilities, neighbours.k, shots


def _between(
    inputs: Mapping[str, Any],
    splits: Mapping[str, Labelled],
    embeddings: Mapping[str, np.ndarray],
    predictions: Mapping[str, np.ndarray],
    space: LabelSpace,
    draws: Mapping[str, Any],
) -> BetweenSources | None:
    """What is lost from one dataset to another; None where the records are of one."""
    columns = ("record_id", "source", "dataset")
    records = read_tables([one / "records.parquet" for one in inputs["slices"]], "records", columns)
    origin = origins(records, read_table(inputs["audit"] / "duplicates.parquet", "duplicates"))
    of_split = {
        split: Records(labelled.truth, np.array([origin[one] for one in labelled.record_ids]), labelled.patients)
        for split, labelled in splits.items()
    }
    names = tuple(sorted(set(np.concatenate([one.origins for one in of_split.values()]).tolist())))
    if len(names) == 1:
        return None
    left_out, untold = leave_one_out(embeddings, of_split, space.names, **draws)
    transfers, not_applied = transfer_thresholds(
        of_split["valid"], predictions["valid"], of_split["test"], predictions["test"], space.names, **draws
    )
    return BetweenSources(names, tuple(left_out), tuple(transfers), tuple(untold), tuple(not_applied))


def _of_rows(labelled: Labelled, rows: np.ndarray) -> Labelled:
    """Some records of a split, in their order. rows: their numbers"""
    record_ids = [labelled.record_ids[row] for row in rows]
    chosen = labelled.segments["record_id"].is_in(record_ids)
    return Labelled(
        labelled.segments.filter(chosen),
        labelled.labels[torch.from_numpy(chosen.to_numpy())],
        record_ids,
        [labelled.patients[row] for row in rows],
        labelled.truth[rows],
    )


def _scored(inputs: Mapping[str, Any], test: Labelled, space: LabelSpace) -> ScoredRecords:
    """The test records with what their slices say of them."""
    records, quality = records_and_quality(inputs, test)
    codes = [label.codes for label in space.labels]
    return ScoredRecords(test.truth, space.names, codes, test.patients, records, quality)


def _confusion(
    truth: np.ndarray, probabilities: np.ndarray, thresholds: Sequence[float], space: LabelSpace
) -> list[ConfusedPair] | ConfusionMatrix:
    """What of the test records is taken for what."""
    if space.task == "multiclass":
        return confusion_matrix(truth, probabilities, space.names)
    return confused_pairs(truth, probabilities >= np.asarray(thresholds), space.names)


def _map(embeddings: Mapping[str, np.ndarray], test: ScoredRecords, seed: int) -> EmbeddingMap | None:
    origins = {name: test.records[name].fill_null("unknown").to_list() for name in ("source", "dataset")}
    return embedding_map(embeddings, test.truth, test.labels, origins, MAP_RECORDS, seed)


def _metrics(report: Report, probes: Mapping[str, Probe]) -> dict[str, Any]:
    """The numbers of the report."""
    return {
        "split": "test",
        "leakage": report.leak or None,
        "training_is_known": report.training_is_known,
        "bootstrap": {"replicates": report.n_replicates, "confidence": report.confidence, "rule": BOOTSTRAP_RULE},
        "scores": {name: asdict(scores) for name, scores in report.scores.items()},
        "operating_points": {
            label: as_json(point) for label, point in zip(report.labels, report.operating_points, strict=True)
        },
        "probes": {
            name: {"c": probe.c, "valid_macro_auprc": probe.valid_macro_auprc} for name, probe in probes.items()
        },
        "neighbours": report.n_neighbours,
        "assessment": as_json(report.assessment),
        "few_shot": as_json(report.shots),
        "small_network": dict(report.small_network.facts) if report.small_network else None,
        "between_sources": as_json(report.between),
        "published": as_json(report.published),
        "cohort": asdict(report.cohort),
        "dropped": dict(report.dropped),
    }
