"""Small prepared slices and manifests for the tests of training, written as the stages before would."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ecgfm.config import ModelConfig, PretrainConfig
from ecgfm.contracts import write_table
from ecgfm.ecg import INVALID, LEADS
from ecgfm.label_space import Label, LabelSpace
from ecgfm.shards import ShardWriter, digitise, lead_values

RATE_HZ = 100.0
SEGMENT_SAMPLES = 256
LABELS = ("fast", "high in V1")

TINY = ModelConfig(
    conv_channels=8,
    width=32,
    n_layers=2,
    n_heads=2,
    ffn_width=64,
    pos_conv_kernel=8,
    pos_conv_groups=4,
    codebook_entries=8,
    codebook_width=16,
    contrast_width=16,
)
GOLDEN = ModelConfig(
    conv_channels=32,
    width=64,
    n_layers=2,
    n_heads=4,
    ffn_width=128,
    pos_conv_kernel=16,
    pos_conv_groups=4,
    codebook_entries=20,
    codebook_width=32,
    contrast_width=32,
)
"""The architecture of the reference's small checkpoints."""
PRETRAIN = PretrainConfig(
    model=TINY, max_steps=6, batch_pairs=4, accumulate=2, learning_rate=1e-3, span_mask_frames=3, n_negatives=10,
    precision="fp32", valid_every=3, save_every=2, device="cpu",
)  # fmt: skip


def write_inputs(folder: Path, n_train: int = 20, n_valid: int = 8, seed: int = 0) -> dict[str, Any]:
    """Two prepared slices and the manifests of a train and a valid split below `folder`; returns the stages' inputs.

    A record is two segments of one wave with noise, alternately slow and fast; in every third one V1 is ten times as
    high as the other leads in its second half. Two records in a row are one patient's. The first record lacks V6, has
    invalid samples in V5 and a flat V4, and of the second the label "fast" is unknown.
    """
    random = np.random.default_rng(seed)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    (folder / "manifests").mkdir(parents=True)
    slices = [folder / "slices" / name for name in ("a", "b")]
    writers = []
    for directory in slices:
        directory.mkdir(parents=True)
        writers.append(ShardWriter(directory / "shard.h5", "toy", directory.name, RATE_HZ, SEGMENT_SAMPLES))
    for number in range(n_train + n_valid):
        fast, high = number % 2, int(number % 3 == 0)
        signal_mv = wave(random, 2 * SEGMENT_SAMPLES, 12.0 if fast else 3.0, bool(high))
        if number == 0:
            signal_mv[LEADS.index("V6")] = np.nan
            signal_mv[LEADS.index("V5"), 10:20] = np.nan
            signal_mv[LEADS.index("V4")] = 0.25
        digital = digitise(signal_mv)
        segments = digital.digital.reshape(len(LEADS), 2, SEGMENT_SAMPLES).swapaxes(0, 1)
        with np.errstate(invalid="ignore"):
            mean_mv, std_mv = mean_and_std(signal_mv)
        place = writers[number % 2].append(segments, lead_values(digital, mean_mv, std_mv))
        record = {
            "record_id": f"toy/{number:03d}",
            "patient_id": f"toy/p{number // 2}" if number != 5 else None,
            "source": "toy",
            "slice_id": slices[number % 2].name,
        }
        labels = {"fast": None if number == 1 else fast, "high in V1": high}
        rows["train" if number < n_train else "valid"].append({"record": record, "rows": place, "labels": labels})
    for writer in writers:
        writer.__exit__(None, None, None)
    for split, records in rows.items():
        pairs, labelled = [], []
        for r in records:
            first_row, second_row = r["rows"]
            pair = {"first_segment": 0, "second_segment": 1, "first_row": first_row, "second_row": second_row}
            pairs.append({**r["record"], **pair})
            labelled += [{**r["record"], "segment_index": i, "shard_row": r["rows"][i], **r["labels"]} for i in (0, 1)]
        write_table(pl.DataFrame(pairs, infer_schema_length=None), "pairs", folder / f"manifests/cmsc_{split}.parquet")
        table = pl.DataFrame(labelled, infer_schema_length=None).with_columns(pl.col(LABELS).cast(pl.Int8))
        write_table(table, "labelled_segments", folder / f"manifests/labelled_{split}.parquet")
    LabelSpace((Label("fast", ("1",), "mean"), Label("high in V1", ("2",), "max"))).write(
        folder / "manifests/label_space.yaml"
    )
    return {"manifests": folder / "manifests", "slices": slices}


def wave(random: np.random.Generator, n_samples: int, frequency_hz: float, high: bool) -> np.ndarray:
    """(lead, time) millivolt"""
    time_s = np.arange(n_samples) / RATE_HZ
    phase = random.uniform(0, 2 * math.pi)
    gain = random.uniform(0.5, 2.0, size=(len(LEADS), 1))
    signal_mv = gain * np.sin(2 * math.pi * frequency_hz * time_s + phase)
    signal_mv += random.normal(scale=0.1, size=signal_mv.shape)
    if high:  # in each segment's second half, or standardisation would hide it
        signal_mv[LEADS.index("V1"), np.arange(n_samples) % SEGMENT_SAMPLES >= SEGMENT_SAMPLES // 2] *= 10
    return signal_mv


def mean_and_std(signal_mv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per lead over its valid samples, NaN where there is none."""
    valid = [lead[~np.isnan(lead)] for lead in signal_mv]
    mean = [lead.mean() if len(lead) else math.nan for lead in valid]
    std = [(lead.std() if np.ptp(lead) else 0.0) if len(lead) else math.nan for lead in valid]
    return np.array(mean), np.array(std)


def slow_standardised(reader: Any, row: int) -> np.ndarray:
    """(lead, time) float64: one sample at a time from the millivolts of a shard."""
    signal_mv = reader.signal_mv(row)
    mean_mv, std_mv = (values[row] for values in reader.per_lead("mean_mv", "std_mv"))
    out = np.zeros_like(signal_mv)
    stored = reader.digital([row])[0]
    for lead in range(signal_mv.shape[0]):
        for i in range(signal_mv.shape[1]):
            if stored[lead, i] != INVALID and std_mv[lead] > 0:
                out[lead, i] = (signal_mv[lead, i] - mean_mv[lead]) / std_mv[lead]
    return out


def digests(directory: Path) -> dict[str, str]:
    """The hash of every file but the volatile ones and the store's own."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("timings.jsonl", "stage.json")
    }


def rows(out: Path, split: str) -> list[dict[str, Any]]:
    """The rows of a training run's log that are of one split."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["split"] == split]
