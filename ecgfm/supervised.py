"""Losses on labels: of each segment and label a logit, and 1 present, 0 absent or NaN unknown.

All of them take (segment, label) logits and labels, and return the sum over the known labels and how many these are (at
least 1, so that it divides). An unknown label carries no loss and no gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ecgfm.config import FinetuneConfig
from ecgfm.ecg import InputError
from ecgfm.label_space import LabelSpace

_SMALLEST = 1e-12  # a probability whose power has a finite slope


def supervised_loss(
    logits: Tensor, labels: Tensor, config: FinetuneConfig, positive_weights: Tensor
) -> tuple[Tensor, int]:
    """What `config.loss` names, with its parameters.

    positive_weights: (label,) as of `masked_bce`; without effect on the other losses
    """
    if config.loss == "focal":
        return masked_focal(logits, labels, config.focal_gamma, config.focal_alpha)
    if config.loss == "asymmetric":
        return masked_asymmetric(
            logits,
            labels,
            config.asymmetric_gamma_positive,
            config.asymmetric_gamma_negative,
            config.asymmetric_margin,
        )
    return masked_bce(logits, labels, positive_weights)


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
