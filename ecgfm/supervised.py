"""Losses on labels: of each segment and label a logit, and 1 present, 0 absent or NaN unknown; or a number.

All of them take (segment, label) outputs and labels, and return the sum over the known labels (of classes: segments)
and how many these are (at least 1, so that it divides). An unknown label carries no loss and no gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ecgfm.config import FinetuneConfig, Task
from ecgfm.ecg import InputError
from ecgfm.label_space import LabelSpace

_SMALLEST = 1e-12  # a probability whose power has a finite slope


def supervised_loss(
    outputs: Tensor, labels: Tensor, task: Task, config: FinetuneConfig, weights: Tensor
) -> tuple[Tensor, int]:
    """What task and config name, with its parameters.

    labels: of `regression` scaled, as the outputs are
    weights: (label,) of positives as of `masked_bce`, or of classes as of `masked_cross_entropy`; without effect on the
        other losses
    """
    if task == "multiclass":
        return masked_cross_entropy(outputs, labels, weights)
    if task == "regression":
        return masked_error(outputs, labels, config.regression_loss == "smooth_l1")
    if config.loss == "focal":
        return masked_focal(outputs, labels, config.focal_gamma, config.focal_alpha)
    if config.loss == "asymmetric":
        return masked_asymmetric(
            outputs,
            labels,
            config.asymmetric_gamma_positive,
            config.asymmetric_gamma_negative,
            config.asymmetric_margin,
        )
    return masked_bce(outputs, labels, weights)


def masked_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy of the softmax over labels that exclude each other: of a segment exactly one is 1, or all are
    unknown.

    class_weights: (label,) factor on the loss of segments of that class
    """
    known = ~labels.isnan().any(dim=1)
    loss = F.cross_entropy(logits, labels.nan_to_num(0.0).argmax(dim=1), weight=class_weights, reduction="none")
    return (loss * known).sum(), max(int(known.sum()), 1)


def masked_error(outputs: Tensor, labels: Tensor, smooth: bool) -> tuple[Tensor, int]:
    """The squared error of numbers; or smooth, half of it where it is below 1 and the absolute error less a half above
    (Huber 1964; Girshick 2015, arXiv 1504.08083), so that no outlier outweighs the rest."""
    known = ~labels.isnan()
    loss = (F.smooth_l1_loss if smooth else F.mse_loss)(outputs, labels.nan_to_num(0.0), reduction="none")
    return (loss * known).sum(), max(int(known.sum()), 1)


def masked_bce(logits: Tensor, labels: Tensor, positive_weights: Tensor) -> tuple[Tensor, int]:
    """Binary cross-entropy.

    positive_weights: (label,) factor on the loss of positives
    """
    known = ~labels.isnan()
    loss = F.binary_cross_entropy_with_logits(
        logits, labels.nan_to_num(0.0), weight=known.float(), pos_weight=positive_weights, reduction="sum"
    )
    return loss, max(int(known.sum()), 1)


def masked_focal(logits: Tensor, labels: Tensor, gamma: float, alpha: float | None) -> tuple[Tensor, int]:
    """Focal loss (Lin et al. 2017, arXiv 1708.02002): cross-entropy times (1 - p)^gamma, where p is the probability
    given to the truth: what is right already weighs little.

    alpha: factor on the loss of positives, 1 - alpha on that of negatives; None: neither has one
    """
    known, positive = ~labels.isnan(), labels == 1
    of_truth = torch.where(positive, logits, -logits)  # the logit of what is so
    loss = -torch.exp(gamma * F.logsigmoid(-of_truth)) * F.logsigmoid(of_truth)
    if alpha is not None:
        loss = loss * torch.where(positive, alpha, 1 - alpha)
    return (loss * known).sum(), max(int(known.sum()), 1)


def masked_asymmetric(
    logits: Tensor, labels: Tensor, gamma_positive: float, gamma_negative: float, margin: float
) -> tuple[Tensor, int]:
    """Asymmetric loss (Ben-Baruch et al. 2021, arXiv 2009.14119): a focal loss with one gamma for positives and another
    for negatives, whose probability is first lowered by `margin`: negatives below it weigh nothing.
    """
    known, positive = ~labels.isnan(), labels == 1
    of_positive = -torch.exp(gamma_positive * F.logsigmoid(-logits)) * F.logsigmoid(logits)
    # log(1 - p), p the lowered probability; from logarithms, so that it is exact where p is near 1
    no_margin = torch.full_like(logits, math.log(margin) if margin else -math.inf)
    of_absence = torch.logaddexp(F.logsigmoid(-logits), no_margin).clamp(max=0.0)
    lowered = -torch.expm1(of_absence)
    of_negative = -lowered.clamp_min(_SMALLEST).pow(gamma_negative) * of_absence
    return (torch.where(positive, of_positive, of_negative) * known).sum(), max(int(known.sum()), 1)


def loss_weights(labels: Tensor, space: LabelSpace, config: FinetuneConfig) -> Tensor:
    """(label,) the weights that `supervised_loss` takes, of the labels trained on; 1 where nothing is to be weighed.

    Raises:
        InputError: a loss of another task than the labels', or as `positive_weight` and `class_weight`.
    """
    if misfit := config.misfit(space.task):
        raise InputError(f"finetune.{misfit}")
    if space.task == "regression" or config.loss != "bce" or config.pos_weight is False:
        return torch.ones(len(space.labels))
    return (class_weight if space.task == "multiclass" else positive_weight)(labels, space)


def class_weight(labels: Tensor, space: LabelSpace) -> Tensor:
    """(label,) segments of known class / (classes * segments of this class), of (segment, label): each class weighs the
    same in all, and a segment 1 on average.

    Raises:
        InputError: a class without a segment.
    """
    counts = (labels == 1).sum(dim=0)
    for label, count in zip(space.labels, counts.tolist(), strict=True):
        if not count:
            raise InputError(
                f"class {label.name!r} has no segment to train on; set manifests.rare_labels=drop, "
                "finetune.pos_weight=false or a larger finetune.subset"
            )
    return counts.sum() / (len(counts) * counts)


def positive_weight(labels: Tensor, space: LabelSpace) -> Tensor:
    """(label,) negatives / positives of (segment, label); unknown ones are neither.

    Raises:
        InputError: a label without both.
    """
    positives, negatives = (labels == 1).sum(dim=0), (labels == 0).sum(dim=0)
    for label, positive, negative in zip(space.labels, positives.tolist(), negatives.tolist(), strict=True):
        if not positive or not negative:
            raise InputError(
                f"label {label.name!r} has {positive} positive and {negative} negative segments to train on and needs "
                "both; set manifests.rare_labels=drop, finetune.pos_weight=false or a larger finetune.subset"
            )
    return negatives / positives
