"""The evaluation of numbers: of a finetuned model beside what needs no training or no ECG, on the test split."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from ecgfm import checkpoints
from ecgfm.config import EvaluateConfig
from ecgfm.contracts import write_table
from ecgfm.evaluated import Evaluated, embed, embedding_table, encoders_of, records_and_quality, sample, write_report
from ecgfm.model import Classifier
from ecgfm.pages.numbers import DIFFERENCES, ValuesReport, render, summary
from ecgfm.predict import record_values, segment_outputs
from ecgfm.report_contents import read_card_facts, read_cohort, read_finetuning, read_pretraining
from ecgfm.scores.assessment import as_json
from ecgfm.scores.regression import (
    BOOTSTRAP_RULE,
    compare_values,
    neighbour_means,
    ridge_probe,
    score_value_parts,
    train_mean,
)
from ecgfm.scores.subgroups import parts
from ecgfm.splits import SPLITS


def evaluate_values(subject: Evaluated, inputs: Mapping[str, Any], config: EvaluateConfig, out: Path) -> dict[str, int]:
    """Write `predictions.parquet`, `embeddings.parquet`, `metrics.json`, `summary.md` and `report.html` of a model
    whose labels are numbers. inputs: as of `evaluate.evaluate`

    Raises:
        InputError: an embedding that is not finite.
    """
    device, shards, space, splits = subject.device, subject.shards, subject.space, subject.splits
    model = checkpoints.build(subject.finetuned).to(device)
    assert isinstance(model, Classifier)
    values, table = _predict(model, subject, config, device)
    write_table(table, space.contract("predictions"), out / "predictions.parquet")

    embeddings = {
        name: {split: embed(encoder.to(device), splits[split], shards, config, device) for split in SPLITS}
        for name, encoder in encoders_of(subject, config).items()
    }
    write_table(embedding_table(embeddings, splits), "embeddings", out / "embeddings.parquet")
    train, valid, test = (splits[split] for split in SPLITS)
    probes = {
        name: ridge_probe((of["train"], train.truth), (of["valid"], valid.truth), of["test"], space.names)
        for name, of in embeddings.items()
    }
    asked = sample(len(train.record_ids), config.baseline_records, config.seed)
    of = embeddings["pretrained"]
    neighbours = neighbour_means(
        (of["train"][asked], train.truth[asked]), (of["valid"], valid.truth), of["test"], space.names
    )
    by_model = {"finetuned": values["test"], "probe": probes["pretrained"].values}
    if "random" in probes:
        by_model["probe_random"] = probes["random"].values
    by_model |= {"neighbours": neighbours.values, "train_mean": train_mean(train.truth, len(test.record_ids))}

    units = [label.unit for label in space.labels]
    draws: dict[str, Any] = {
        "n_replicates": config.bootstrap_samples,
        "confidence": config.confidence,
        "seed": config.seed,
    }
    differences = [pair for pair in DIFFERENCES if set(pair) <= set(by_model)]
    scores, tests = compare_values(
        test.truth, by_model, space.names, units, test.patients, differences=differences, **draws
    )
    found = parts(*records_and_quality(inputs, test))
    of_parts = score_value_parts(found, test.truth, values["test"], space.names, units, test.patients, **draws)
    report = ValuesReport(
        cohort=read_cohort(inputs, splits),
        counts=json.loads((inputs["splits"] / "cohort.json").read_bytes()),
        leak=subject.leak,
        training_is_known=subject.training_is_known,
        labels=space.labels,
        truth=test.truth,
        values=by_model,
        scores=scores,
        differences=tests,
        parts=of_parts,
        n_replicates=config.bootstrap_samples,
        confidence=config.confidence,
        alphas={name: probe.alphas for name, probe in probes.items()},
        neighbours=neighbours.k,
        dropped=space.dropped,
        pretraining=read_pretraining(inputs["pretrain"], subject.pretrained),
        finetuning=read_finetuning(inputs["finetune"], subject.finetuned),
    )
    trainings = (report.pretraining, report.finetuning)
    card_facts = read_card_facts(inputs, subject.finetuned, subject.pretrained, space, trainings)
    write_report(_metrics(report), card_facts, partial(render, report), summary(report), out)
    shards.close()
    return {
        "labels": len(space.labels),
        "test records": len(test.record_ids),
        "test patients": scores["finetuned"].n_patients,
        "test segments": test.segments.height,
        "embeddings": sum(len(split.record_ids) for split in splits.values()) * len(embeddings),
    }


def _predict(
    model: Classifier, subject: Evaluated, config: EvaluateConfig, device: torch.device
) -> tuple[dict[str, np.ndarray], pl.DataFrame]:
    """(record, label) numbers of valid and test, and both as a table."""
    values, tables = {}, []
    for split in ("valid", "test"):
        labelled = subject.splits[split]
        outputs = segment_outputs(
            model, labelled.segments, subject.shards, config.batch_size, device, config.precision
        ).logits
        assert outputs is not None
        values[split], n_segments = record_values(outputs, labelled, subject.space, subject.finetuned.meta.scale)
        head = pl.DataFrame({"record_id": labelled.record_ids, "split": split, "n_segments": n_segments})
        tables.append(head.hstack(pl.DataFrame(values[split], schema=subject.space.names)))
    return values, pl.concat(tables)


def _metrics(report: ValuesReport) -> dict[str, Any]:
    """The numbers of the report."""
    return {
        "task": "regression",
        "split": "test",
        "leakage": report.leak or None,
        "training_is_known": report.training_is_known,
        "bootstrap": {"replicates": report.n_replicates, "confidence": report.confidence, "rule": BOOTSTRAP_RULE},
        "scores": as_json(report.scores),
        "differences": as_json(report.differences),
        "parts": as_json(report.parts),
        "ridge_alphas": as_json(report.alphas),
        "neighbours": as_json(report.neighbours),
        "cohort": as_json(report.cohort),
        "dropped": dict(report.dropped),
    }
