"""The small supervised baseline: what a compact residual network, which no pretraining has touched, learns from labels.

The network is an xresnet1d18, the small one of the family that Strodthoff et al. 2021 (IEEE J. Biomed. Health Inform.
25:1519, arXiv 2004.13701) found best on PTB-XL, with half its blocks and 96 channels at most: a stem of three
convolutions of width 5 and pooled shortcuts (He et al. 2019, arXiv 1812.01187), mean and maximum pooling before the
classifier. As there, it sees the ECG at 100 Hz and is trained by AdamW and a one-cycle rate (Smith and Topin 2018,
arXiv 1708.07120). Of 12 leads and 10 labels it has 161,066 parameters.

Letters: B batch (segments), L leads, T samples, C channels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ecgfm import own_process
from ecgfm.config import PROGRESS_BAR, EvaluateConfig
from ecgfm.data import Shards, batches_per_epoch, in_order, load, standardise, too_large, visits_from
from ecgfm.ecg import InputError
from ecgfm.label_space import LabelSpace
from ecgfm.predict import Labelled, record_probabilities
from ecgfm.scores.metrics import point_scores
from ecgfm.supervised import masked_bce, masked_cross_entropy

INPUT_HZ = 100
STEM = (16, 16, 32)  # channels of its convolutions
STAGES = (32, 48, 64, 96)  # channels of the blocks, each of half the rate of the one before, but for the first
KERNEL = 5
DROPOUT = 0.5  # before the classifier
BATCH = 64  # segments in an update
WEIGHT_DECAY = 0.01
TELL_S = 1.0


@dataclass(frozen=True)
class Trained:
    """A trained baseline.

    probabilities: (record, label) float64 of the test records
    best_epoch: of the highest valid macro AUPRC, from 1: the one that these are of
    rows: as of a metrics.jsonl: the mean loss and the valid scores of each epoch
    """

    probabilities: np.ndarray
    n_parameters: int
    n_records: int
    n_segments: int
    epochs: int
    best_epoch: int
    valid_macro_auprc: float
    rows: tuple[dict[str, Any], ...]


class Block(nn.Module):
    """Two convolutions beside a shortcut that is pooled and projected where rate or channels change."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(channels, out_channels, stride)
        self.second = nn.Conv1d(out_channels, out_channels, KERNEL, padding=KERNEL // 2, bias=False)
        self.norm = nn.BatchNorm1d(out_channels)
        shortcut: list[nn.Module] = [nn.AvgPool1d(2, ceil_mode=True)] if stride > 1 else []
        if channels != out_channels:
            shortcut.append(nn.Conv1d(channels, out_channels, 1, bias=False))
            shortcut.append(nn.BatchNorm1d(out_channels))
        self.shortcut = nn.Sequential(*shortcut)
        nn.init.kaiming_normal_(self.second.weight)
        nn.init.zeros_(self.norm.weight)  # a block begins as its shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) to (B, out_channels, T / stride, rounded up)"""
        return F.relu(self.norm(self.second(self.first(x))) + self.shortcut(x))


class ResidualNetwork(nn.Module):
    """Logits of standardised segments."""

    def __init__(self, n_leads: int, n_labels: int, sampling_rate_hz: float) -> None:
        super().__init__()
        self.samples_as_one = max(1, round(sampling_rate_hz / INPUT_HZ))
        self.stem = nn.Sequential(
            *(
                _convolution(before, after, stride=2 if place == 0 else 1)
                for place, (before, after) in enumerate(pairwise((n_leads, *STEM)))
            ),
            nn.MaxPool1d(3, stride=2, padding=1),
        )
        self.blocks = nn.Sequential(
            *(
                Block(before, after, stride=1 if place == 0 else 2)
                for place, (before, after) in enumerate(pairwise((STEM[-1], *STAGES)))
            )
        )
        self.dropout = nn.Dropout(DROPOUT)
        self.proj = nn.Linear(2 * STAGES[-1], n_labels)

    def forward(self, signal: Tensor) -> Tensor:
        """(B, L, T), mean 0 and standard deviation 1 of each lead of a record, to (B, labels) logits."""
        x = F.avg_pool1d(signal, self.samples_as_one, ceil_mode=True)
        x = self.blocks(self.stem(x))
        logits: Tensor = self.proj(self.dropout(torch.cat([x.mean(dim=2), x.amax(dim=2)], dim=1)))
        return logits


def train_small_network(
    splits: Mapping[str, Labelled],
    shards: Shards,
    space: LabelSpace,
    config: EvaluateConfig,
    device: torch.device,
) -> Trained:
    """Train on the train split, keep the epoch of the highest valid macro AUPRC by record, and predict the test split.

    The loss is that of finetuning by default: binary cross-entropy of the known labels, positives weighted by
    negatives / positives (1 where the train records have one class only); of classes that exclude each other,
    cross-entropy in which each class weighs the same. All that is random is drawn from `config.seed`.

    splits: `train`, `valid` and `test`; the records of train may be a sample

    Raises:
        InputError: no label has both classes in valid, a loss that is not finite, or too little memory; names the batch
            that fits.
    """
    train = splits["train"]
    places = shards.places(train.segments)[:, None]
    weights = _weights(train.labels, space).to(device)
    loss_of = masked_cross_entropy if space.task == "multiclass" else masked_bce
    per_epoch = batches_per_epoch(len(places), BATCH)
    max_steps = per_epoch * config.supervised_epochs
    torch.manual_seed(config.seed)
    model = ResidualNetwork(len(shards.leads), len(space.labels), shards.sampling_rate_hz).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.supervised_learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.supervised_learning_rate, max_steps)
    batches = load(shards, places, visits_from(len(places), BATCH, config.seed, 0, max_steps), device)
    rows: list[dict[str, Any]] = []
    best_epoch, best_score, best_state = 0, -math.inf, model.state_dict()
    told = -math.inf
    with (
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
        tqdm(desc="small supervised network", total=max_steps, unit=" steps", **PROGRESS_BAR) as bar,
    ):
        for epoch in range(1, config.supervised_epochs + 1):
            model.train()
            summed, n_known = 0.0, 0
            for step in range((epoch - 1) * per_epoch + 1, epoch * per_epoch + 1):
                started = time.perf_counter()
                batch = next(batches)
                signal = standardise(batch, device)
                labels = train.labels[batch.numbers].to(device)
                optimizer.zero_grad()
                try:
                    total, known = loss_of(model(signal), labels, weights)
                    torch.autograd.backward(total / known)
                except torch.OutOfMemoryError as error:
                    raise _too_large(error, model, signal.shape, device) from error
                optimizer.step()
                schedule.step()
                loss = float(total.detach()) / known
                if not math.isfinite(loss):
                    raise InputError(
                        f"evaluate: the small supervised network's loss of step {step} is {loss}; try a smaller "
                        "evaluate.supervised_learning_rate, or evaluate.supervised_baseline=false"
                    )
                summed, n_known = summed + loss * known, n_known + known
                now = time.perf_counter()
                if now - told >= TELL_S or step == max_steps:
                    told = now
                    facts = {"step": step, "max_steps": max_steps, "loss": loss}
                    own_process.tell(facts | {"segments_per_second": len(signal) / (now - started)})
                bar.update()
            said = record_probabilities(
                segment_logits(model, splits["valid"], shards, config.batch_size, device), splits["valid"], space
            )[0]
            measured = _scores(splits["valid"].truth, said)
            score = measured["macro_auprc"]
            rows.append({"step": step, "split": "train", "loss": summed / n_known})
            rows.append({"step": step, "split": "valid", **measured})
            if score > best_score:
                best_epoch, best_score = epoch, score
                best_state = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(best_state)
        logits = segment_logits(model, splits["test"], shards, config.batch_size, device)
    return Trained(
        record_probabilities(logits, splits["test"], space)[0],
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        n_records=len(train.record_ids),
        n_segments=len(places),
        epochs=config.supervised_epochs,
        best_epoch=best_epoch,
        valid_macro_auprc=best_score,
        rows=tuple(rows),
    )


def _weights(labels: Tensor, space: LabelSpace) -> Tensor:
    """(label,) what the loss weighs by, of (segment, label): as `supervised.loss_weights`, but that a sample of the
    train records may want a class, which then weighs 1."""
    present, absent = (labels == 1).sum(dim=0), (labels == 0).sum(dim=0)
    if space.task == "multiclass":
        return torch.where(present > 0, present.sum() / (len(present) * present.clamp_min(1)), 1.0)
    return torch.where((present > 0) & (absent > 0), absent / present.clamp_min(1), 1.0)


def _scores(truth: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    auroc, auprc = point_scores(truth, probabilities)
    if np.isnan(auprc).all():
        raise InputError("small supervised network: no label has both classes in the valid split; give more records")
    return {"macro_auprc": float(np.nanmean(auprc)), "macro_auroc": float(np.nanmean(auroc))}


def segment_logits(
    model: nn.Module, labelled: Labelled, shards: Shards, batch_size: int, device: torch.device
) -> np.ndarray:
    """(segment, label) float32 of one split's segments, in eval mode; the model is left in it.

    Raises:
        InputError: too little memory; names the batch that fits.
    """
    model.eval()
    places = shards.places(labelled.segments)[:, None]
    logits: list[Tensor] = []

    def attempt(fewer: int) -> None:
        model(torch.zeros(fewer, len(shards.leads), shards.segment_samples, device=device))

    with torch.inference_mode():
        for batch in load(shards, places, in_order(len(places), batch_size), device):
            try:
                logits.append(model(standardise(batch, device)).cpu())
            except torch.OutOfMemoryError as error:
                n = len(batch.digital)
                raise too_large(
                    error,
                    f"evaluate: {n} segments at once need more memory than {device} has",
                    n,
                    1,
                    attempt,
                    lambda fewer: f"evaluate.batch_size={fewer}",
                    "one does not fit either: use another device",
                ) from error
    return torch.cat(logits).numpy()


def _convolution(channels: int, out_channels: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv1d(channels, out_channels, KERNEL, stride, padding=KERNEL // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight)
    return nn.Sequential(convolution, nn.BatchNorm1d(out_channels), nn.ReLU())


def _too_large(
    error: torch.OutOfMemoryError, model: nn.Module, shape: Sequence[int], device: torch.device
) -> InputError:
    n = shape[0]
    return too_large(
        error,
        f"evaluate: training the small supervised network on {n} segments at once needs more memory than {device} has",
        n,
        n,  # its batch is part of the baseline: a smaller one would be another baseline
        lambda fewer: None,
        str,
        "free some, use another device, or set evaluate.supervised_baseline=false",
    )
