"""What every evaluation begins and ends with, whatever the task: the models, the labelled splits, embeddings,
whether the models know the test split; the files that say what came out."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from ecgfm import checkpoints, leakage
from ecgfm.checkpoints import Checkpoint
from ecgfm.config import EvaluateConfig
from ecgfm.contracts import read_table, read_tables
from ecgfm.data import Shards, pick_device
from ecgfm.ecg import InputError
from ecgfm.label_space import LabelSpace, read_label_space
from ecgfm.model import Encoder
from ecgfm.pages.cards import DataFacts, ModelFacts, cards
from ecgfm.predict import Labelled, checkpoint_for, read_labelled, segment_outputs
from ecgfm.scores.metrics import aggregate
from ecgfm.splits import SPLITS


@dataclass(frozen=True)
class Evaluated:
    """What is evaluated, on what.

    splits: by name, their labelled records
    finetuned, pretrained: the best checkpoint of the one run, the last of the other
    leak: in words, which test records the models have learnt from; "" where none
    training_is_known: whether all that they have learnt from is known
    """

    device: torch.device
    shards: Shards
    space: LabelSpace
    splits: Mapping[str, Labelled]
    finetuned: Checkpoint
    pretrained: Checkpoint
    leak: str
    training_is_known: bool


def open_evaluated(inputs: Mapping[str, Any], config: EvaluateConfig) -> Evaluated:
    """Read what an evaluation is of. inputs: as of `evaluate.evaluate`

    Raises:
        InputError: a split without a labelled record, a run without a checkpoint or with one of another kind, leads,
            rate, task or labels, test records that a model knows, no such device.
    """
    device = pick_device(config.device)
    shards = Shards(inputs["slices"])
    space = read_label_space(inputs["manifests"] / "label_space.yaml")
    splits = {split: read_labelled(inputs["manifests"], split, space) for split in SPLITS}
    finetuned = _checkpoint(checkpoints.best(inputs["finetune"]), inputs["finetune"], "finetuned", shards)
    pretrained = _checkpoint(checkpoints.meant_by(inputs["pretrain"]), inputs["pretrain"], "pretrained", shards)
    if list(finetuned.meta.labels) != space.names or finetuned.meta.task != space.task:
        raise InputError(
            f"{finetuned.path}: expected the labels {', '.join(space.names)} of task {space.task!r}, found "
            f"{', '.join(finetuned.meta.labels) or 'none'} of task {finetuned.meta.task!r}; finetune again"
        )
    test = splits["test"]
    leak, is_known = _leak(inputs, test, (finetuned, pretrained))
    in_words = leak.in_words(len(test.record_ids)) if leak else ""
    if leak and not config.allow_leakage:
        raise InputError(
            f"evaluate: the model knows the test split: {in_words}; split so that they are apart, or see the numbers, "
            "with a warning, by --allow-leakage"
        )
    return Evaluated(device, shards, space, splits, finetuned, pretrained, in_words, is_known)


def encoders_of(subject: Evaluated, config: EvaluateConfig) -> dict[str, Encoder]:
    """The encoders whose embeddings are probed: `pretrained`, and `random`, of the same architecture, if wanted."""
    encoders = {"pretrained": checkpoints.build_encoder(subject.pretrained)}
    if config.probe_random_encoder:
        torch.manual_seed(config.seed)
        encoders["random"] = Encoder(subject.pretrained.model_config)
    return encoders


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


def embedding_table(embeddings: Mapping[str, Mapping[str, np.ndarray]], splits: Mapping[str, Labelled]) -> pl.DataFrame:
    """Embeddings, by encoder and split, as a table of the contract `embeddings`."""
    return pl.concat(
        pl.DataFrame({"record_id": splits[split].record_ids, "split": split, "encoder": encoder}).with_columns(
            pl.Series("embedding", of_record).cast(pl.List(pl.Float32))
        )
        for encoder, of_split in embeddings.items()
        for split, of_record in of_split.items()
    )


def sample(n: int, most: int, seed: int) -> np.ndarray:
    """Which of n records are taken where not all are: at most so many, ascending."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(seed).choice(n, most, replace=False))


def records_and_quality(inputs: Mapping[str, Any], test: Labelled) -> tuple[pl.DataFrame, pl.DataFrame]:
    """What the slices say of some records, in their order: contracts `records` and `quality`."""
    order = pl.DataFrame({"record_id": test.record_ids})
    records, quality = (
        order.join(read_tables([one / f"{name}.parquet" for one in inputs["slices"]], name), on="record_id", how="left")
        for name in ("records", "quality")
    )
    return records, quality


def _leak(inputs: Mapping[str, Any], test: Labelled, found: Sequence[Checkpoint]) -> tuple[leakage.Leak, bool]:
    """Which test records the models have learnt from, and whether all that they have learnt from is known."""
    seen = functools.reduce(operator.or_, (checkpoints.seen(one) or leakage.UNKNOWN for one in found))
    duplicates = read_table(inputs["audit"] / "duplicates.parquet", "duplicates")
    return leakage.find_leak(seen, test.record_ids, test.patients, duplicates), seen.whole


def _checkpoint(path: Path | None, directory: Path, kind: checkpoints.Kind, shards: Shards) -> Checkpoint:
    if path is None:
        raise InputError(f"{directory}: holds no checkpoint to evaluate; train first")
    return checkpoint_for(path, kind, shards)


def write_report(
    metrics: Mapping[str, Any],
    card_facts: tuple[ModelFacts, DataFacts],
    page: Callable[[Mapping[str, tuple[str, str]]], str],
    summary: str,
    out: Path,
) -> None:
    """Write `metrics.json`, the cards, `report.html` and `summary.md`.

    page: the report, from the cards: file name -> (title, content)
    """
    text = json.dumps(metrics, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    (out / "metrics.json").write_text(text, encoding="utf-8")
    files = cards(*card_facts, metrics)
    for name, (_, content) in files.items():
        (out / name).write_text(content, encoding="utf-8")
    (out / "report.html").write_text(page(files), encoding="utf-8")
    (out / "summary.md").write_text(summary, encoding="utf-8")
