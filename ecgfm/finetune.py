"""Supervised training on labelled segments, from a pretrained encoder or from random weights.

What is trained, and how fast, is `mode`'s and the recipe's affair (`FinetuneConfig`, docs/training.md): by default all,
each layer slower than the one above it, which independent work found decisive for this encoder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ecgfm import checkpoints, leakage
from ecgfm.config import PROGRESS_BAR, FinetuneConfig, Task, content_of
from ecgfm.data import Shards, batches_per_epoch, load, pick_device, standardise, too_large, visits_from
from ecgfm.ecg import InputError
from ecgfm.label_space import LabelSpace, read_label_space
from ecgfm.losses import apply_lead_mask, sample_lead_mask
from ecgfm.model import Classifier
from ecgfm.predict import (
    Labelled,
    calibrated,
    checkpoint_for,
    read_labelled,
    record_probabilities,
    record_values,
    segment_outputs,
)
from ecgfm.scores.calibration import fit_calibration, logits_of
from ecgfm.scores.metrics import best_f1_threshold, mean_of_defined, point_scores
from ecgfm.scores.multiclass import fit_temperature
from ecgfm.supervised import loss_weights, supervised_loss
from ecgfm.training import (
    Log,
    Randomness,
    SavesOnSigterm,
    cosine,
    diverged,
    divide_gradients,
    prune,
    resume,
    say,
    warm_up,
    write_config,
)


def finetune(  # noqa: PLR0915 - one loop, to be read from top to bottom
    inputs: Mapping[str, Any], config: FinetuneConfig, out: Path
) -> dict[str, int]:
    """Train, and write checkpoints `step_<n>/`, `best.json`, `metrics.jsonl`, `timings.jsonl` and `config.yaml`.

    After each epoch the valid records are predicted; the checkpoint of the highest macro AUPRC, or of numbers of the
    lowest mean absolute error (`CRITERIA`), is the one marked best. Each has the temperatures and thresholds that were
    fitted to them. Resuming and SIGTERM as in `pretrain`.

    inputs: `manifests`, the directory of `labelled_{train,valid}.parquet` and `label_space.yaml`; `slices`, the
        directories of the prepared slices; `pretrain`, the directory of a pretraining run, of which the last checkpoint
        is meant, or a checkpoint. Its architecture is also that of random weights

    Raises:
        InputError: no segment or a label without both classes to train on (of numbers: without two different ones), a
            loss of another task than the labels', an encoder of other segments than these, no such device, a loss that
            is not finite, or a checkpoint that cannot be read.
    """
    device = pick_device(config.device)
    shards = Shards(inputs["slices"])
    space = read_label_space(inputs["manifests"] / "label_space.yaml")
    criterion = CRITERIA[space.task]
    train = read_labelled(inputs["manifests"], "train", space, config.subset, config.subset_seed)
    valid = read_labelled(inputs["manifests"], "valid", space)
    places = shards.places(train.segments)[:, None]
    scaling = fit_scaling(train, space) if space.task == "regression" else {}
    targets = scaled(train.labels, scaling)
    weights = loss_weights(train.labels, space, config).to(device)
    pretrained = _read_pretrained(inputs["pretrain"], shards)

    model = begin(config, pretrained, len(space.labels)).to(device)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config), betas=config.adam_betas, eps=config.adam_eps, weight_decay=config.weight_decay
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    meta = checkpoints.Meta(
        "finetuned",
        pretrained.model_config,
        shards.leads,
        shards.sampling_rate_hz,
        shards.segment_samples,
        departures=shards.departures,
        labels=tuple(space.names),
        task=space.task,
        aggregation={label.name: label.aggregation for label in space.labels},
        units={label.name: label.unit for label in space.labels if label.unit},
        scaling=scaling,
        training_data=_training_data(inputs, config, pretrained),
    )
    seen = leakage.seen_in(inputs["manifests"], "labelled")
    if config.init == "pretrained":
        seen |= checkpoints.seen(pretrained) or leakage.UNKNOWN
    write_config(config, out)
    resumed = resume(out, config, model, optimizer)
    start = resumed.step if resumed else 0
    best: dict[str, Any] = resumed.progress["best"] if resumed else {"step": None, "score": None}
    per_epoch = batches_per_epoch(len(places), config.batch_size)
    max_steps = per_epoch * config.max_epochs
    warmup_steps = round(config.warmup_epochs * per_epoch)
    patients = len({patient or record for patient, record in zip(train.patients, train.record_ids, strict=True)})
    visits = visits_from(len(places), config.batch_size, config.seed, start, max_steps)
    batches = load(shards, places, visits, device, config.loader_workers)
    randomness = Randomness(config.seed, device)
    say(f"trains on {len(places):,} segments of {len(train.record_ids):,} records, {patients:,} patients")

    step = start  # updates done
    with (
        SavesOnSigterm() as sigterm,
        Log(out, start, max_steps) as log,
        tqdm(desc="finetune", initial=start, total=max_steps, unit=" steps", **PROGRESS_BAR) as bar,
    ):
        while True:
            end_of_epoch = step > 0 and step % per_epoch == 0
            last_step = step == max_steps

            if end_of_epoch:
                judged = validate(model, shards, valid, space, scaling, weights, config, device)
                log.metrics({"step": step, "split": "valid", "epoch": step // per_epoch, **judged.scores})
                score = judged.scores[criterion.measure]
                if is_better(score, best["score"], criterion.lowest):
                    best = {"step": step, "score": score}
                waited_epochs = (step - best["step"]) // per_epoch
                last_step = last_step or 0 < config.patience_epochs <= waited_epochs
                say(
                    f"epoch {step // per_epoch} of {config.max_epochs}: valid loss {judged.scores['loss']:.4g}, "
                    f"{criterion.words} {_shown(score)} (best {_shown(best['score'])}, step {best['step']:,})"
                )

            if step > start and (end_of_epoch or sigterm.requested):
                progress = {"config": content_of(config), "epochs": step / per_epoch, "best": best}
                state = {"optimizer": optimizer.state_dict()}
                described = replace(meta, progress=progress)
                if end_of_epoch:
                    described = replace(
                        described,
                        thresholds=judged.thresholds,
                        temperature=judged.temperature,
                        shift=judged.shift,
                    )
                checkpoints.save(out, step, model.state_dict(), state, described, seen)
            if end_of_epoch:
                checkpoints.mark_best(out, best["step"])
                prune(out, lambda s: s % per_epoch == 0, keep_last=1)

            if last_step:
                break
            if sigterm.requested:
                sigterm.leave(step)

            started = time.perf_counter()
            randomness.begin(step)
            model.encoder.train(config.mode != "linear")  # else no dropout in it; validation has put all in one mode
            factor = warm_up(step, warmup_steps)
            factor *= cosine(step, warmup_steps, max_steps) if config.schedule == "cosine" else 1.0
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.zero_grad()
            batch = next(batches)
            waited = time.perf_counter() - started
            signal = standardise(batch, device)
            lead_mask = sample_lead_mask(
                len(signal), len(shards.leads), config.lead_mask_probability, randomness.device
            )
            labels = targets[batch.numbers].to(device)
            try:
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    logits = model(apply_lead_mask(signal, lead_mask)).logits
                total, known = supervised_loss(logits, labels, space.task, config, weights)
                torch.autograd.backward(total)
            except torch.OutOfMemoryError as error:
                raise _too_large(error, model, signal.shape, config, device) from error
            loss = float(total.detach()) / known
            if not math.isfinite(loss):
                record_ids = [train.segments["record_id"][int(i)] for i in batch.numbers]
                raise diverged("finetune", step + 1, loss, record_ids)
            gradient_norm = divide_gradients(model, known)
            optimizer.step()

            step += 1
            log.training(
                {
                    "step": step,
                    "split": "train",
                    "loss": loss,
                    "gradient_norm": gradient_norm,
                    "learning_rate": config.learning_rate * factor,
                }
            )
            log.timing(step, time.perf_counter() - started, waited, len(signal))
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()

    shards.close()
    return {
        "steps": step,
        "epochs": step // per_epoch,
        "best epoch": best["step"] // per_epoch,
        "patients": patients,
        "records": len(train.record_ids),
        "segments": len(places),
        "labels": len(space.labels),
        "trained parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _too_large(
    error: torch.OutOfMemoryError, model: Classifier, shape: Sequence[int], config: FinetuneConfig, device: torch.device
) -> InputError:
    n, *rest = shape

    def attempt(fewer: int) -> None:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            logits = model(torch.zeros(fewer, *rest, device=device)).logits
        torch.autograd.backward(logits.sum())

    return too_large(
        error,
        f"finetune: {n} segments at once need more memory than {device} has",
        n,
        1,
        attempt,
        lambda fewer: f"finetune.batch_size={fewer}",
        "one does not fit either: use another device",
    )


def begin(config: FinetuneConfig, pretrained: checkpoints.Checkpoint, n_labels: int) -> Classifier:
    """The model before its first update: what is not to be trained wants no gradient."""
    torch.manual_seed(config.seed)
    model = Classifier(
        pretrained.model_config,
        n_labels,
        dropout=config.dropout,
        activation_dropout=config.activation_dropout,
        feature_grad_scale=1.0 if config.mode == "full" else 0.0,
    )
    if config.init == "pretrained":
        checkpoints.load_state(model.encoder, checkpoints.encoder_state(pretrained), str(pretrained.path))
    if config.mode == "linear":
        model.encoder.requires_grad_(False)
    return model


def parameter_groups(model: Classifier, config: FinetuneConfig) -> list[dict[str, Any]]:
    """What is trained, with its learning rate: the head, then the layers from the top, then all that lies below them.

    The top layer has `learning_rate`, each one below `layer_decay` times that of the one above; the embeddings and the
    extractor, below the lowest layer, share one rate (Clark et al. 2020, arXiv 2003.10555).
    """
    head = config.learning_rate if config.head_learning_rate is None else config.head_learning_rate
    parts: list[tuple[list[torch.nn.Parameter], float]] = [(list(model.proj.parameters()), head)]
    rate = config.learning_rate
    for layer in reversed(model.encoder.encoder.layers):
        parts.append((list(layer.parameters()), rate))
        rate *= config.layer_decay
    above = {id(parameter) for parameters, _ in parts for parameter in parameters}
    parts.append(([parameter for parameter in model.parameters() if id(parameter) not in above], rate))
    trained = [([p for p in parameters if p.requires_grad], rate) for parameters, rate in parts]
    return [{"params": parameters, "lr": rate} for parameters, rate in trained if parameters]


class Criterion(NamedTuple):
    """By which of an epoch's valid scores the best checkpoint is chosen. lowest: the lowest is the best"""

    measure: str
    words: str
    lowest: bool


CRITERIA: dict[Task, Criterion] = {
    "multilabel": Criterion("macro_auprc", "macro AUPRC", lowest=False),
    "multiclass": Criterion("macro_auprc", "macro AUPRC", lowest=False),
    "regression": Criterion("mean_absolute_error", "mean absolute error in standard deviations", lowest=True),
}


class Judged(NamedTuple):
    """What the valid split says of a model.

    scores: the loss by segment; by record, macro AUPRC and AUROC over the labels with both classes (None: there is
        none); of numbers instead their mean absolute error in train's standard deviations, the mean over the labels
    temperature, shift: label -> what makes its probabilities agree best with the truth
        (`calibration.fit_calibration`; of classes that exclude each other one temperature for all,
        `multiclass.fit_temperature`)
    thresholds: label with both classes -> the calibrated probability of a record at which its F1 is greatest; of task
        `multilabel` alone
    """

    scores: dict[str, float | None]
    temperature: dict[str, float]
    shift: dict[str, float]
    thresholds: dict[str, float]


def validate(
    model: Classifier,
    shards: Shards,
    valid: Labelled,
    space: LabelSpace,
    scaling: Mapping[str, tuple[float, float]],
    weights: Tensor,
    config: FinetuneConfig,
    device: torch.device,
) -> Judged:
    """Predict the valid records, and judge and calibrate the predictions."""
    outputs = segment_outputs(model, valid.segments, shards, config.batch_size, device).logits
    assert outputs is not None
    targets = scaled(valid.labels, scaling)
    total, known = supervised_loss(torch.from_numpy(outputs), targets, space.task, config, weights.cpu())
    loss = float(total) / known
    if space.task == "regression":
        scale = np.array(list(scaling.values())).T
        values, _ = record_values(outputs, valid, space, scale)
        errors = mean_of_defined(np.abs(values - valid.truth) / scale[1])
        return Judged({"loss": loss, "mean_absolute_error": _mean_of_scored(errors)}, {}, {}, {})
    raw, _ = record_probabilities(outputs, valid, space)
    if space.task == "multiclass":
        temperature, shift = dict.fromkeys(space.names, fit_temperature(valid.truth, raw)), {}
    else:
        fitted = fit_calibration(valid.truth, logits_of(raw))
        temperature, shift = (dict(zip(space.names, of_label.tolist(), strict=True)) for of_label in fitted)
    predicted = calibrated(raw, space.names, temperature, shift, space.task)
    scores = point_scores(valid.truth, predicted if space.task == "multiclass" else raw)  # else the order is the same
    thresholds = {
        name: best_f1_threshold(valid.truth[:, k], predicted[:, k])
        for k, name in enumerate(space.names)
        if space.task == "multilabel" and not np.isnan(scores.auprc[k])
    }
    measured = {
        "loss": loss,
        "macro_auprc": _mean_of_scored(scores.auprc),
        "macro_auroc": _mean_of_scored(scores.auroc),
    }
    return Judged(measured, temperature, shift, thresholds)


def fit_scaling(train: Labelled, space: LabelSpace) -> dict[str, tuple[float, float]]:
    """Label -> mean and population standard deviation of the known numbers of the records trained on.

    Raises:
        InputError: a label without two different numbers.
    """
    scaling = {}
    for label, values in zip(space.labels, train.truth.T, strict=True):
        known = values[~np.isnan(values)]
        if not len(known) or np.ptp(known) == 0:
            raise InputError(
                f"label {label.name!r} has {len(np.unique(known))} different numbers in {len(known):,} records to "
                "train on and needs two or more; use a larger finetune.subset"
            )
        scaling[label.name] = (float(known.mean()), float(known.std()))
    return scaling


def scaled(labels: Tensor, scaling: Mapping[str, tuple[float, float]]) -> Tensor:
    """(segment, label) labels less their mean, divided by their standard deviation; as they are where there is none."""
    if not scaling:
        return labels
    mean, deviation = torch.tensor(list(scaling.values()), dtype=torch.float64).unbind(dim=1)
    return ((labels.double() - mean) / deviation).float()


def is_better(score: float | None, best: float | None, lowest: bool = False) -> bool:
    """Whether an epoch replaces the best so far. Where no label can be scored (None), the latest is the best.

    lowest: a lower score is better
    """
    if score is None or best is None:
        return best is None
    return score < best if lowest else score > best


def _mean_of_scored(of_label: np.ndarray) -> float | None:
    scored = of_label[~np.isnan(of_label)]
    return float(scored.mean()) if len(scored) else None


def _shown(score: float | None) -> str:
    return "unknown" if score is None else f"{score:.3f}"


def _read_pretrained(given: Path, shards: Shards) -> checkpoints.Checkpoint:
    """The checkpoint that is meant by a path (`checkpoints.meant_by`), for segments like these."""
    path = checkpoints.meant_by(given)
    if path is None:
        raise InputError(f"{given}: holds no complete checkpoint; pretrain first")
    return checkpoint_for(path, "pretrained", shards)


def _training_data(
    inputs: Mapping[str, Any], config: FinetuneConfig, pretrained: checkpoints.Checkpoint
) -> dict[str, str]:
    """What is learnt from: the labelled segments, and the digest of the weights it starts from."""
    start = {"pretrain": checkpoints.digest(pretrained.state)} if config.init == "pretrained" else {}
    return checkpoints.training_data(inputs, checkpoints.LABELLED) | start
