"""Self-supervised pretraining: wav2vec 2.0 + CMSC + random lead masking (McKeen et al. 2024, arXiv 2408.05178).

One update: the losses of `accumulate` batches of pairs are summed and the gradient is divided by their masked frames.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from tqdm import tqdm

from ecgfm import checkpoints
from ecgfm.config import PROGRESS_BAR, PretrainConfig, content_of
from ecgfm.contracts import read_table
from ecgfm.data import Shards, batches_per_epoch, in_order, load, pick_device, standardise, visits_from
from ecgfm.ecg import InputError
from ecgfm.losses import (
    MIN_SPANS,
    PretrainingLoss,
    apply_lead_mask,
    masked_frames,
    pretraining_loss,
    sample_lead_mask,
    sample_negatives,
    sample_span_mask,
)
from ecgfm.model import PretrainModel, n_frames
from ecgfm.training import (
    VALIDATION,
    Log,
    Randomness,
    SavesOnSigterm,
    diverged,
    divide_gradients,
    prune,
    resume,
    say,
    warm_up,
    write_config,
)


@dataclass(frozen=True)
class Pairs:
    """The pairs of one manifest.

    places: (pair, 2, 2), of `Shards.places`: of the first and of the second segment
    patients: (pair,) int64, -1 where unknown
    """

    record_ids: Sequence[str]
    places: np.ndarray
    patients: Tensor


def pretrain(  # noqa: PLR0915 - one loop, to be read from top to bottom
    inputs: Mapping[str, Any], config: PretrainConfig, out: Path
) -> dict[str, int]:
    """Train, and write checkpoints `step_<n>/`, `metrics.jsonl`, `timings.jsonl` and `config.yaml`.

    Goes on from the newest complete checkpoint in `out`, to the same weights as if it had never stopped. SIGTERM saves
    after the current step and ends the process.

    inputs: `manifests`, the directory of `cmsc_train.parquet` and `cmsc_valid.parquet`; `slices`, the directories of
        the prepared slices

    Raises:
        InputError: too few pairs, segments too short, another number of leads, no such device, a loss that is not
            finite, or a checkpoint in `out` that cannot be read.
    """
    device = pick_device(config.device)
    shards = Shards(inputs["slices"])
    train, valid = (_read_pairs(inputs["manifests"], split, shards) for split in ("train", "valid"))
    _check(config, shards, len(train.places))

    torch.manual_seed(config.seed)
    model = PretrainModel(config.model, dropout=config.dropout, feature_grad_scale=config.feature_grad_scale).to(device)
    # Decoupled weight decay: what the reference's optimizer does under the name of Adam.
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=config.adam_betas, eps=config.adam_eps, weight_decay=config.weight_decay
    )
    meta = checkpoints.Meta("pretrained", config.model, shards.leads, shards.sampling_rate_hz, shards.segment_samples)
    write_config(config, out)
    resumed = resume(out, config, model, optimizer)
    start = resumed.step if resumed else 0
    visits = visits_from(
        len(train.places),
        config.batch_pairs,
        config.seed,
        start * config.accumulate,
        config.max_steps * config.accumulate,
    )
    batches = load(shards, train.places, visits, device, config.loader_workers)
    randomness = Randomness(config.seed, device)

    step = start  # updates done
    with (
        SavesOnSigterm() as sigterm,
        Log(out, start, config.max_steps) as log,
        tqdm(desc="pretrain", initial=start, total=config.max_steps, unit=" steps", **PROGRESS_BAR) as bar,
    ):
        while True:
            last_step = step == config.max_steps

            if last_step or step % config.valid_every == 0:
                row = validate(model, shards, valid, config, device)
                log.metrics({"step": step, "split": "valid", **row})
                say(f"step {step:,} of {config.max_steps:,}: valid loss {row['loss']:.4g} bits per masked frame")

            scheduled = last_step or step % config.save_every == 0
            if step > start and (scheduled or sigterm.requested):
                epochs = step * config.accumulate / batches_per_epoch(len(train.places), config.batch_pairs)
                progress = {"config": content_of(config), "epochs": epochs}
                state = {"optimizer": optimizer.state_dict()}
                checkpoints.save(out, step, model.state_dict(), state, replace(meta, progress=progress))
                if scheduled:
                    prune(out, lambda s: s == config.max_steps or s % config.save_every == 0, config.keep_last)

            if last_step:
                break
            if sigterm.requested:
                sigterm.leave(step)

            started, waited = time.perf_counter(), 0.0
            randomness.begin(step)
            temperature = quantizer_temperature(step, config)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * warm_up(step, config.warmup_steps)
            optimizer.zero_grad()
            numbers: list[Tensor] = []
            losses: list[PretrainingLoss] = []
            for _ in range(config.accumulate):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                signal = standardise(batch, device)
                lead_mask = sample_lead_mask(
                    len(signal), len(shards.leads), config.lead_mask_probability, randomness.device
                )
                signal = apply_lead_mask(signal, lead_mask)
                patients = train.patients[batch.numbers].to(device)
                loss = objective(model, signal, patients, temperature, config=config, randomness=randomness)
                torch.autograd.backward(loss.total)
                losses.append(loss)
                numbers.append(batch.numbers)
            row = summary(losses)
            if not math.isfinite(row["loss"]):
                raise diverged(
                    "pretrain", step + 1, row["loss"], [train.record_ids[int(i)] for i in torch.cat(numbers)]
                )
            gradient_norm = divide_gradients(model, sum(loss.count for loss in losses))
            optimizer.step()

            step += 1
            log.training(
                {
                    "step": step,
                    "split": "train",
                    **row,
                    "quantizer_temperature": temperature,
                    "gradient_norm": gradient_norm,
                    "learning_rate": optimizer.param_groups[0]["lr"],
                }
            )
            log.timing(step, time.perf_counter() - started, waited, 2 * sum(map(len, numbers)))
            bar.set_postfix_str(f"loss {row['loss']:.3f} bits", refresh=False)
            bar.update()

    shards.close()
    return {
        "steps": step,
        "pairs": len(train.places),
        "valid pairs": len(valid.places),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def quantizer_temperature(step: int, config: PretrainConfig) -> float:
    """The Gumbel temperature of the update after `step` updates."""
    start, end, decay = config.quantizer_temperature
    return max(end, start * decay**step)


def objective(
    model: PretrainModel,
    signal: Tensor,
    patients: Tensor,
    temperature: float,
    *,
    config: PretrainConfig,
    randomness: Randomness,
) -> PretrainingLoss:
    """Hide frames of (segment, lead, time), first segments of all pairs and then the second, and score the guesses."""
    batch, _, n_samples = signal.shape
    span_mask = sample_span_mask(
        batch,
        n_frames(config.model, n_samples),
        config.span_mask_probability,
        config.span_mask_frames,
        randomness.host,
    )
    hidden = masked_frames(span_mask)
    negatives = sample_negatives(batch, hidden.shape[1], config.n_negatives, randomness.device)
    output = model(signal, hidden.to(signal.device), temperature)
    return pretraining_loss(**output._asdict(), negatives=negatives, config=config, patients=patients)


@torch.inference_mode()
def validate(
    model: PretrainModel, shards: Shards, valid: Pairs, config: PretrainConfig, device: torch.device
) -> dict[str, float]:
    """The objective on the valid pairs: no dropout, no masked leads, and every time the same masked frames."""
    randomness = Randomness(config.seed, device)
    randomness.begin(VALIDATION)
    model.eval()
    losses = []
    for batch in load(shards, valid.places, in_order(len(valid.places), config.batch_pairs), device):
        patients = valid.patients[batch.numbers].to(device)
        losses.append(objective(model, standardise(batch, device), patients, 1.0, config=config, randomness=randomness))
    model.train()
    return summary(losses)


def summary(losses: Sequence[PretrainingLoss]) -> dict[str, float]:
    """Batches as one row of the log: bits per masked frame, weighted as in the objective; shares; perplexities."""
    count = torch.tensor([loss.count for loss in losses], dtype=torch.float64)
    share = count / count.sum()
    bit = math.log(2) * float(count.sum())
    total = torch.stack([loss.total.detach() for loss in losses]).double().cpu().sum()
    parts = {name: torch.stack([loss.parts[name] for loss in losses]).double().cpu().sum() for name in losses[0].parts}
    measures = {
        name: torch.stack([getattr(loss, name) for loss in losses]).double().cpu()
        for name in ("correct", "probability_perplexity", "code_perplexity")
    }
    return {
        "loss": float(total) / bit,
        **{name: float(part) / bit for name, part in parts.items()},
        "accuracy": float(measures["correct"].sum() / count.sum()),
        "probability_perplexity": float((measures["probability_perplexity"] * share).sum()),
        "code_perplexity": float((measures["code_perplexity"] * share).sum()),
    }


def _read_pairs(manifests: Path, split: str, shards: Shards) -> Pairs:
    table = read_table(manifests / f"cmsc_{split}.parquet", "pairs")
    if table.is_empty():
        raise InputError(
            f"cmsc_{split}.parquet is empty: no record has two adjacent segments; is prepare.segment_seconds "
            f"({shards.segment_samples / shards.sampling_rate_hz:g}) more than half the records?"
        )
    places = np.stack([shards.places(table, column) for column in ("first_row", "second_row")], axis=1)
    # equal patients, equal numbers
    patients = table["patient_id"].rank("dense").cast(pl.Int64).fill_null(-1)
    return Pairs(table["record_id"].to_list(), places, torch.tensor(patients.to_list()))


def _check(config: PretrainConfig, shards: Shards, n_pairs: int) -> None:
    """What would otherwise fail later, or worse, not at all."""
    if config.batch_pairs < 2 or n_pairs < 2:
        raise InputError(
            "pretrain: CMSC tells a record from others, so a batch needs at least 2 pairs; found "
            f"pretrain.batch_pairs {config.batch_pairs} and {n_pairs} pair{'s' * (n_pairs != 1)} to train on"
        )
    if config.model.n_leads != len(shards.leads):
        raise InputError(f"pretrain.model.n_leads is {config.model.n_leads}, the shards have {len(shards.leads)} leads")
    frames, span = n_frames(config.model, shards.segment_samples), config.span_mask_frames
    spans = max(MIN_SPANS, int(config.span_mask_probability * frames / span) + 1)
    if spans > frames - span:
        raise InputError(
            f"segments of {shards.segment_samples} samples make {frames} frames, too few for {spans} masked spans of "
            f"{span}; use longer prepare.segment_seconds, or a smaller pretrain.span_mask_frames or "
            "pretrain.span_mask_probability"
        )
