"""Self-supervised pretraining: wav2vec 2.0 + CMSC + random lead masking (McKeen et al. 2024, arXiv 2408.05178).

One update: the losses of `accumulate` batches of pairs are summed and the gradient is divided by their masked frames.
Several processes share each batch; what is drawn at random is drawn for all of it by each, and each takes its rows.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from ecgfm import checkpoints, distributed, leakage
from ecgfm.augment import augment
from ecgfm.config import PROGRESS_BAR, PretrainConfig, content_of, from_dict
from ecgfm.contracts import read_table
from ecgfm.data import (
    Batch,
    Shards,
    batches_per_epoch,
    in_order,
    load,
    standardise,
    subset,
    too_large,
    visits_from,
)
from ecgfm.distributed import World
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
from ecgfm.model import PretrainModel, flops_per_segment, n_frames, sample_gumbel
from ecgfm.training import (
    VALIDATION,
    Later,
    Log,
    Randomness,
    SavesOnSigterm,
    cosine,
    diverged,
    gradient_norm,
    peak_flops,
    prune,
    rate_of_epoch,
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
    weights: (pair,) how often each is visited, relative to others; None: all alike
    """

    record_ids: Sequence[str]
    places: np.ndarray
    patients: Tensor
    weights: np.ndarray | None


class Update(NamedTuple):
    """An update that the device may still be at.

    step: updates done with it; measures: of `measure`, and the gradient's norm; numbers: of its pairs
    """

    step: int
    row: dict[str, float]
    measures: Later
    numbers: Tensor


def pretrain(inputs: Mapping[str, Any], config: PretrainConfig, out: Path) -> dict[str, int]:
    """Train, and write checkpoints `step_<n>/`, `metrics.jsonl`, `timings.jsonl` and `config.yaml`.

    Goes on from the newest complete checkpoint in `out`, to the same weights as if it had never stopped. SIGTERM saves
    after the current step and ends the process. With `config.processes` this process starts them and waits for them.

    inputs: `manifests`, the directory of `cmsc_train.parquet` and `cmsc_valid.parquet`; `slices`, the directories of
        the prepared slices

    Raises:
        InputError: too few pairs, segments too short, another number of leads, no such device, too little memory, a
            loss that is not finite, or a checkpoint in `out` that cannot be read.
    """
    processes = distributed.wanted(config.processes)
    if processes > 1 and not distributed.joined():
        return distributed.launch(pretrain, (dict(inputs), config, out), processes)
    with distributed.join(config.device) as world:
        return _train(inputs, config, out, world)


def _train(  # noqa: PLR0912, PLR0915 - one loop, to be read from top to bottom
    inputs: Mapping[str, Any], config: PretrainConfig, out: Path, world: World
) -> dict[str, int]:
    device = world.device
    shards = Shards(inputs["slices"])
    train = _read_pairs(inputs["manifests"], "train", shards, config)
    valid = _read_pairs(inputs["manifests"], "valid", shards)
    _check(config, shards, len(train.places))

    torch.manual_seed(config.seed)
    model = PretrainModel(config.model, dropout=config.dropout, feature_grad_scale=config.feature_grad_scale).to(device)
    # Decoupled weight decay: what the reference's optimizer does under the name of Adam.
    optimizer = torch.optim.AdamW(
        model.parameters(),
        betas=config.adam_betas,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    meta = checkpoints.Meta(
        "pretrained",
        config.model,
        shards.leads,
        shards.sampling_rate_hz,
        shards.segment_samples,
        departures=shards.departures,
        training_data=checkpoints.training_data(inputs),
    )
    resumed = resume(out, config, model, optimizer, aloud=world.is_first)
    start = resumed.step if resumed else 0
    mix: dict[str, Any] = {"weights": train.weights, "multiple": world.size}
    per_epoch = batches_per_epoch(len(train.places), config.batch_pairs, **mix)
    visits = visits_from(
        len(train.places),
        config.batch_pairs,
        config.seed,
        start * config.accumulate,
        config.max_steps * config.accumulate,
        **mix,
    )
    batches = load(shards, train.places, map(world.part, visits), device, config.loader_workers)
    randomness = Randomness(config.seed, device)
    trained = world.wrap(torch.compile(model) if config.compile else model)  # type: ignore[arg-type]
    device_flops, segment_flops = peak_flops(device), flops_per_segment(config.model, shards.segment_samples)
    best: dict[str, Any] = resumed.progress["best"] if resumed else {"step": None, "loss": None}
    seen = leakage.seen_in(inputs["manifests"], "cmsc") if world.is_first else None
    if world.is_first:
        write_config(config, out)
        if best["step"] in checkpoints.steps(out):
            checkpoints.mark_best(out, best["step"])  # the run may have been killed before it could

    step = start  # updates done
    under_way: deque[Update] = deque()
    with (
        SavesOnSigterm() as sigterm,
        Log(out if world.is_first else None, start, config.max_steps, config.tensorboard) as log,
        tqdm(desc="pretrain", initial=start, total=config.max_steps, unit=" steps", **_bar(world)) as bar,
    ):

        def settle(most: int = 0) -> None:
            """Log the updates that the device is through with, but for the last `most`."""
            while len(under_way) > most:
                update = under_way.popleft()
                *measures, norm = update.measures.read()
                row = row_of(measures)
                if not math.isfinite(row["loss"]):
                    raise diverged(
                        "pretrain", update.step, row["loss"], [train.record_ids[int(i)] for i in update.numbers]
                    )
                row |= {**update.row, "gradient_norm": norm}
                log.training({"step": update.step, "split": "train", **row})
                bar.set_postfix_str(f"loss {row['loss']:.3f} bits", refresh=False)
                bar.update()

        while True:
            last_step = step == config.max_steps
            scheduled = last_step or step % config.save_every == 0
            stop = world.any(sigterm.requested)

            if last_step or step % config.valid_every == 0:
                settle()
                row = validate(model, shards, valid, config, world)
                log.metrics({"step": step, "split": "valid", **row})
                if scheduled and step > 0 and (best["loss"] is None or row["loss"] < best["loss"]):
                    best = {"step": step, "loss": row["loss"]}
                if world.is_first:
                    say(f"step {step:,} of {config.max_steps:,}: valid loss {row['loss']:.4g} bits per masked frame")

            if step > start and (scheduled or stop):
                settle()
                if world.is_first:
                    epochs = step * config.accumulate / per_epoch
                    progress = {"config": content_of(config), "epochs": epochs, "best": best}
                    state = {"optimizer": optimizer.state_dict()}
                    checkpoints.save(out, step, model.state_dict(), state, replace(meta, progress=progress), seen)
                    if best["step"] == step:
                        checkpoints.mark_best(out, step)
                    if scheduled:
                        prune(
                            out,
                            lambda s: s == config.max_steps or s % config.save_every == 0,
                            config.keep_last,
                            config.keep_every,
                        )

            if last_step:
                break
            if stop:
                world.wait()  # until the first process has saved
                sigterm.leave(step)

            started = time.perf_counter()
            randomness.begin(step, world.rank)
            temperature = quantizer_temperature(step, config)
            rate = learning_rate(step, step * config.accumulate // per_epoch + 1, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            together = [next(batches) for _ in range(config.accumulate)]
            waited = time.perf_counter() - started
            hidden = [
                hidden_frames(2 * len(b.numbers) * world.size, config, shards.segment_samples, randomness)
                for b in together
            ]
            count = sum(places.numel() for places in hidden) // world.size
            losses: list[PretrainingLoss] = []
            try:
                for batch, places in zip(together, hidden, strict=True):
                    signal = _input(batch, shards, config, world, randomness)
                    patients = train.patients[batch.numbers].to(device)
                    with nullcontext() if batch is together[-1] or world.size == 1 else trained.no_sync():  # type: ignore[operator]
                        loss = objective(
                            trained,
                            signal,
                            patients,
                            places,
                            temperature,
                            config=config,
                            randomness=randomness,
                            world=world,
                        )
                        torch.autograd.backward(loss.total / count)
                    losses.append(loss)
            except torch.OutOfMemoryError as error:
                raise _too_large(error, trained, batch.digital.shape, config, world) from error
            norm = gradient_norm(model)
            optimizer.step()

            step += 1
            measures = world.sum(measure(losses))
            under_way.append(
                Update(
                    step,
                    {"quantizer_temperature": temperature, "learning_rate": rate},
                    Later(torch.cat([measures, norm.double()[None]])),
                    torch.cat([batch.numbers for batch in together]),
                )
            )
            settle(1 if device.type == "cuda" else 0)
            seconds, segments = time.perf_counter() - started, sum(map(len, hidden))
            done = segments * segment_flops / seconds / world.size
            log.timing(step, seconds, waited, segments, done / device_flops if device_flops else None)

    shards.close()
    return {
        "steps": step,
        "pairs": len(train.places),
        "valid pairs": len(valid.places),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def learning_rate(step: int, epoch: int, config: PretrainConfig) -> float:
    """The learning rate of the update after `step` updates, which is in `epoch`, numbered from 1."""
    rate = rate_of_epoch(epoch, config.learning_rate_epochs) if config.schedule == "epochs" else config.learning_rate
    if config.schedule == "cosine":
        rate *= cosine(step, config.warmup_steps, config.max_steps)
    return rate * warm_up(step, config.warmup_steps)


def quantizer_temperature(step: int, config: PretrainConfig) -> float:
    """The Gumbel temperature of the update after `step` updates."""
    start, end, decay = config.quantizer_temperature
    return max(end, start * decay**step)


def hidden_frames(batch: int, config: PretrainConfig, n_samples: int, randomness: Randomness) -> Tensor:
    """(batch, M) int64 on the CPU: the frames that are hidden in each segment of `n_samples`, of the whole batch."""
    frames = n_frames(config.model, n_samples)
    probability, span = config.span_mask_probability, config.span_mask_frames
    return masked_frames(sample_span_mask(batch, frames, probability, span, randomness.host))


def objective(
    model: nn.Module,
    signal: Tensor,
    patients: Tensor,
    hidden: Tensor,
    temperature: float,
    *,
    config: PretrainConfig,
    randomness: Randomness,
    world: World,
) -> PretrainingLoss:
    """Hide frames of (segment, lead, time), first segments of all pairs and then the second, and score the guesses.

    signal, patients: this process's part of the batch
    hidden: of `hidden_frames`, of the whole batch
    """
    batch, n_masked = hidden.shape
    rows = world.rows(batch // 2)
    negatives = sample_negatives(batch, n_masked, config.n_negatives, randomness.device)
    gumbel = None
    if model.training:
        books = batch, n_masked, config.model.n_codebooks, config.model.codebook_entries
        gumbel = sample_gumbel(books, signal.device, randomness.device)
    if world.size > 1:
        hidden, negatives = hidden[rows], negatives[rows.to(negatives.device)]
        gumbel = gumbel if gumbel is None else gumbel[rows.to(gumbel.device)]
    with torch.autocast(signal.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        output = model(signal, hidden.to(signal.device, non_blocking=True), temperature, gumbel)
    if world.size > 1 and config.across_processes:
        first, second = output.pooled.float().chunk(2)
        pooled = torch.cat([world.gather(first), world.gather(second)])
        output = output._replace(pooled=pooled, code_probabilities=world.mean(output.code_probabilities))
        patients = world.gather(patients)
    return pretraining_loss(**output._asdict(), negatives=negatives, config=config, patients=patients)


@torch.inference_mode()
def validate(
    model: PretrainModel, shards: Shards, valid: Pairs, config: PretrainConfig, world: World
) -> dict[str, float]:
    """The objective on the valid pairs: no dropout, no masked leads, and every time the same masked frames.

    Each process takes whole batches, so that their number changes no result.
    """
    randomness, alone = Randomness(config.seed, world.device), World(0, 1, world.device)
    model.eval()
    losses = []
    batches = list(in_order(len(valid.places), config.batch_pairs))[world.rank :: world.size]
    for number, batch in enumerate(load(shards, valid.places, iter(batches), world.device)):
        randomness.begin(VALIDATION + number * world.size + world.rank)
        patients = valid.patients[batch.numbers].to(world.device)
        hidden = hidden_frames(2 * len(batch.numbers), config, shards.segment_samples, randomness)
        signal = standardise(batch, world.device)
        losses.append(
            objective(model, signal, patients, hidden, 1.0, config=config, randomness=randomness, world=alone)
        )
    model.train()
    nothing = torch.zeros(len(MEASURES) + 4, dtype=torch.float64, device=world.device)  # more processes than batches
    return row_of(world.sum(measure(losses) if losses else nothing).tolist())


MEASURES = ("loss", "contrastive", "diversity", "feature_penalty", "cmsc")


def measure(losses: Sequence[PretrainingLoss]) -> Tensor:
    """What batches add up to, (9,) float64, on their device: the objective and its parts (`MEASURES`), right guesses,
    masked frames, and both perplexities by masked frames."""
    of_batches = [
        torch.stack(
            [
                loss.total.detach(),
                *(loss.parts[name] for name in MEASURES[1:]),
                loss.correct,
                torch.full_like(loss.total.detach(), loss.count),
                loss.probability_perplexity * loss.count,
                loss.code_perplexity * loss.count,
            ]
        )
        for loss in losses
    ]
    return torch.stack(of_batches).double().sum(dim=0)


def row_of(measures: Sequence[float]) -> dict[str, float]:
    """Of `measure`, a row of the log: bits per masked frame, weighted as in the objective; shares; perplexities."""
    *bits, correct, count, of_probabilities, of_codes = measures
    return {
        **{name: value / math.log(2) / count for name, value in zip(MEASURES, bits, strict=True)},
        "accuracy": correct / count,
        "probability_perplexity": of_probabilities / count,
        "code_perplexity": of_codes / count,
    }


def _bar(world: World) -> dict[str, Any]:
    return PROGRESS_BAR if world.is_first else PROGRESS_BAR | {"disable": True}


def _input(batch: Batch, shards: Shards, config: PretrainConfig, world: World, randomness: Randomness) -> Tensor:
    """(segment, lead, time) for the model: standardised, augmented, leads masked."""
    signal = standardise(batch, world.device)
    sd_mv = batch.sd_mv.to(world.device, non_blocking=True)
    signal = augment(signal, sd_mv, shards.sampling_rate_hz, shards.leads, config.augment, randomness.own)
    n_pairs = len(batch.numbers) * world.size
    lead_mask = sample_lead_mask(2 * n_pairs, len(shards.leads), config.lead_mask_probability, randomness.device)
    return apply_lead_mask(signal, lead_mask[world.rows(n_pairs).to(lead_mask.device)] if world.size > 1 else lead_mask)


def _too_large(
    error: torch.OutOfMemoryError, model: nn.Module, shape: Sequence[int], config: PretrainConfig, world: World
) -> InputError:
    segments, *rest = shape
    pairs = segments // 2
    alone = World(0, 1, world.device)
    unwrapped = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    randomness = Randomness(config.seed, world.device)

    def attempt(fewer: int) -> None:
        unwrapped.zero_grad()
        hidden = hidden_frames(2 * fewer, config, rest[-1], randomness)
        signal = torch.zeros(2 * fewer, *rest, device=world.device)
        patients = torch.full((fewer,), -1, device=world.device)
        tried = objective(unwrapped, signal, patients, hidden, 1.0, config=config, randomness=randomness, world=alone)
        torch.autograd.backward(tried.total)

    return too_large(
        error,
        f"pretrain: {pairs} pairs at once need more memory than {world.device} has",
        pairs,
        2,
        attempt,
        lambda fewer: (
            f"pretrain.batch_pairs={fewer * world.size} and "
            f"pretrain.accumulate={config.accumulate * -(-pairs // fewer)}"
        ),
        "2 do not fit either; use a smaller model, or pretrain.precision=bf16",
    )


def _read_pairs(manifests: Path, split: str, shards: Shards, config: PretrainConfig | None = None) -> Pairs:
    """config: of the split to train on, a subset of it, sources by their weights"""
    table = read_table(manifests / f"cmsc_{split}.parquet", "pairs")
    if table.is_empty():
        raise InputError(
            f"cmsc_{split}.parquet is empty: no record has two adjacent segments; is prepare.segment_seconds "
            f"({shards.segment_samples / shards.sampling_rate_hz:g}) more than half the records?"
        )
    weights = None
    if config is not None:
        table = table.filter(
            pl.Series(subset(table["patient_id"].to_list(), table["record_id"].to_list(), config.subset))
        )
        weights = _weights(table["source"], config.source_weights) if config.source_weights else None
    places = np.stack([shards.places(table, column) for column in ("first_row", "second_row")], axis=1)
    # equal patients, equal numbers
    patients = table["patient_id"].rank("dense").cast(pl.Int64).fill_null(-1)
    return Pairs(table["record_id"].to_list(), places, torch.tensor(patients.to_list()), weights)


def _weights(sources: pl.Series, weights: Mapping[str, float]) -> np.ndarray:
    known = sources.unique().to_list()
    if strangers := sorted(set(weights) - set(known)):
        raise InputError(
            f"pretrain.source_weights names {', '.join(strangers)}; the pairs are of {', '.join(sorted(known))}"
        )
    return sources.replace_strict({name: weights.get(name, 1.0) for name in known}, return_dtype=pl.Float64).to_numpy()


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


def main() -> None:
    """One of the processes that torchrun starts on one or several machines: docs/pretraining.md."""
    parser = argparse.ArgumentParser(prog="torchrun ... -m ecgfm.pretrain", description=main.__doc__)
    parser.add_argument("--manifests", type=Path, required=True, help="directory of the stage manifests")
    parser.add_argument("--slices", type=Path, nargs="+", required=True, help="directories of the prepared slices")
    parser.add_argument("--config", type=Path, required=True, help="YAML with the values of the section pretrain")
    parser.add_argument("--out", type=Path, required=True, help="a directory that all machines see")
    given = parser.parse_args()
    config = from_dict(PretrainConfig, yaml.safe_load(given.config.read_text(encoding="utf-8")), str(given.config))
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        pretrain({"manifests": given.manifests, "slices": given.slices}, config, given.out)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
