"""What the report shows beside numbers: records in and out, what was trained, and ECGs, chosen by rule and drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
import yaml

from ecgfm import checkpoints
from ecgfm.attribution import for_display, integrated_gradients
from ecgfm.config import EvaluateConfig, ModelConfig, Task, to_dict
from ecgfm.contracts import read_table, read_tables
from ecgfm.data import Shards, in_order, load, standardise
from ecgfm.drawing import LONG_SECONDS, drawn_seconds
from ecgfm.label_space import LabelSpace, read_label_space
from ecgfm.model import Classifier
from ecgfm.pages.cards import DataFacts, ModelFacts, TrainingFacts
from ecgfm.pages.findings import DrawnEcg
from ecgfm.pages.parts import Cohort, SplitCounts, Training
from ecgfm.predict import Labelled, saliency
from ecgfm.shards import ShardReader
from ecgfm.small_network import Trained
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


def read_pretraining(directory: Path, checkpoint: checkpoints.Checkpoint) -> Training:
    """How the encoder was trained. directory: of the run, or the checkpoint itself where it was made elsewhere."""
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


def read_finetuning(directory: Path, checkpoint: checkpoints.Checkpoint) -> Training:
    """How the evaluated model was trained. directory: of the run."""
    config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    start = "the pretrained encoder" if config["init"] == "pretrained" else "random weights"
    task = checkpoint.meta.task
    measure = "mean absolute error" if task == "regression" else "macro AUPRC"
    return Training(
        name="Finetuning",
        facts=[
            ("objective", f"{_objective(config, task)}; unknown labels teach nothing"),
            ("start", start),
            ("trained", _MODES[config["mode"]]),
            ("parameters", f"{sum(tensor.numel() for tensor in checkpoint.state.values()):,}"),
            (
                "evaluated",
                f"the checkpoint of the {'lowest' if task == 'regression' else 'best'} valid {measure}, update "
                f"{checkpoint.meta.step:,} "
                f"({_epochs(checkpoint)})",
            ),
        ],
        config=config,
        rows=_rows(directory),
        caption="Train loss by update; valid loss and mean absolute error (by record, in standard deviations of the "
        "train split) after each epoch."
        if task == "regression"
        else "Train loss by update; valid loss, macro AUPRC and macro AUROC (by record) after each epoch.",
    )


def _objective(config: Mapping[str, Any], task: Task) -> str:
    if task == "multiclass":
        return "cross-entropy over findings that exclude each other"
    if task == "multilabel":
        return f"{_LOSSES[config['loss']]} per finding"
    error = "smooth absolute error" if config["regression_loss"] == "smooth_l1" else "squared error"
    return f"{error}, in standard deviations of the train split"


def tell_small_network(trained: Trained, config: EvaluateConfig) -> Training:
    """How the supervised baseline was trained."""
    return Training(
        name="Small supervised network",
        facts=[
            ("objective", "the labels alone, from random weights, for comparison"),
            ("architecture", "xresnet1d of four blocks at 100 Hz (Strodthoff et al. 2021)"),
            ("parameters", f"{trained.n_parameters:,}"),
            ("trained on", f"{trained.n_segments:,} segments of {trained.n_records:,} train records"),
            ("evaluated", f"epoch {trained.best_epoch} of {trained.epochs}, of the best valid macro AUPRC"),
        ],
        config={"epochs": trained.epochs, "learning_rate": config.supervised_learning_rate, "seed": config.seed},
        rows=trained.rows,
        caption="Mean train loss of each epoch; valid macro AUPRC and macro AUROC (by record) after it.",
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


def read_card_facts(
    inputs: Mapping[str, Any],
    finetuned: checkpoints.Checkpoint,
    pretrained: checkpoints.Checkpoint,
    used: LabelSpace,
    trainings: Sequence[Training],
) -> tuple[ModelFacts, DataFacts]:
    """What the cards say, but for the numbers. inputs: of the evaluation; used: the labels that are evaluated"""
    model = ModelFacts(
        meta=to_dict(finetuned.meta),
        digest=f"sha256:{checkpoints.digest(finetuned.state)}",
        n_parameters=sum(tensor.numel() for tensor in finetuned.state.values()),
        architecture=_architecture(finetuned.model_config),
        encoder_data=pretrained.meta.training_data,
        trainings=[TrainingFacts(one.name, one.facts, one.config) for one in trainings],
    )
    facts = [json.loads((one / "stage.json").read_bytes()) for one in inputs["slices"]]
    tables = {name: json.loads((inputs[name] / "stage.json").read_bytes()) for name in ("splits", "labels")}
    return model, DataFacts(facts, tables, read_label_space(inputs["labels"] / "label_space.yaml"), used)


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


def says_normal(space: LabelSpace) -> np.ndarray:
    """(label,) bool: which labels say that nothing is amiss."""
    return np.array([any(code.rpartition(":")[2] in NORMAL_CODES for code in label.codes) for label in space.labels])


def draw(
    choice: Choice,
    test: Labelled,
    probabilities: np.ndarray,
    model: Classifier,
    shards: Shards,
    slices: Sequence[Path],
    device: torch.device,
    space: LabelSpace,
) -> DrawnEcg:
    """The first segments of a record, up to the 10 s of an ECG's paper, with saliency: of an error the integrated
    gradients of its label, lead by lead; of any other record, where the model looks."""
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
    signal = standardise(batch, device)
    if choice.kind == "wrong" and choice.label is not None:
        found = [integrated_gradients(model, segment, choice.label) for segment in signal]
        values = np.concatenate([one.values for one in found], axis=1)
        salient = for_display(values, shards.sampling_rate_hz)  # one scale for all segments
        shading = (
            f"Shaded: the integrated gradients of the logit of {space.names[choice.label]}, lead by lead, which add up "
            "to what it is above that of a segment of zeros, to within "
            f"{100 * max(one.completeness_error for one in found):.2g} %"
        )
    else:
        salient = saliency(model, signal).flatten().cpu().numpy()
        shading = "Shaded: attention, of all leads and findings together"
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
        saliency=salient,
        caption=(
            f"Record {record_id}: its first {drawn:g} s. The prediction is made from "
            f"{all_segments.height} segment{'s' * (all_segments.height != 1)} of {seconds:g} s. {shading}."
        ),
    )
