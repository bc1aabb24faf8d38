"""Which samples of which lead made a logit: integrated gradients.

Sundararajan, Taly and Yan 2017 (arXiv 1703.01365): a sample's attribution is its value times the gradient of the logit
with respect to it, averaged along the straight path from a baseline to the signal. Attributions add up to the
difference between the logit of the signal and that of the baseline (completeness).

The baseline is zero, which is each lead's mean all the time, and also what the model sees of a lead that is missing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ecgfm.model import Classifier

TOLERANCE = 0.01
"""Of completeness: the sum of attributions differs from the logits' difference by at most this share of it."""

SMALLEST_DIFFERENCE = 0.01
"""Logits that differ by less are as good as equal: `TOLERANCE` is then of this."""

_FEWEST_NODES, _MOST_NODES = 32, 512
_LOWEST = 1e-8  # of the path, as a share of the signal; below it the model is its value at the baseline
_AT_ONCE = 16

DISPLAY_S, LARGE = 0.04, 0.99
"""Over how long attributions are averaged for display, one small square of ECG paper; the share of samples that are not
large."""


@dataclass(frozen=True)
class Attribution:
    """What of one segment made one label's logit.

    values: (lead, time) float32, in logits: what each sample adds to the logit, or takes from it where negative
    logit, baseline_logit: of the segment, and of a segment of zeros
    """

    values: np.ndarray
    logit: float
    baseline_logit: float

    @property
    def completeness_error(self) -> float:
        """How far the sum of `values` is from the logits' difference, as a share of it (see `SMALLEST_DIFFERENCE`)."""
        difference = self.logit - self.baseline_logit
        return abs(float(self.values.sum(dtype=np.float64)) - difference) / max(abs(difference), SMALLEST_DIFFERENCE)


def integrated_gradients(model: Classifier, signal: Tensor, label: int) -> Attribution:
    """Integrated gradients of one logit of one segment.

    The path is walked in equal steps of its logarithm, not of itself: the extractor's GroupNorm makes the model all but
    blind to a gain that all samples share, so on the way from zero to the signal nearly everything happens in the
    first hundredth, which equal steps would miss. Gauss-Legendre nodes are doubled until completeness holds
    within `TOLERANCE`, from 32 up to 512.

    model: in eval mode
    signal: (lead, time) standardised, on the model's device
    """
    zero = torch.zeros_like(signal)
    with torch.no_grad():
        logits = model(torch.stack([signal, zero])).logits[:, label].tolist()
    n_nodes = _FEWEST_NODES
    while True:
        found = Attribution((_mean_gradient(model, signal, label, n_nodes) * signal).cpu().numpy(), *logits)
        if found.completeness_error <= TOLERANCE or n_nodes >= _MOST_NODES:
            return found
        n_nodes *= 2


def for_display(values: np.ndarray, sampling_rate_hz: float) -> np.ndarray:
    """(lead, time) attributions as -1 to 1 in one scale for all leads: averaged over `DISPLAY_S`, and divided by the
    size that one sample in a hundred exceeds, which are cut. What adds to the logit is positive.
    """
    width = max(round(DISPLAY_S * sampling_rate_hz), 1)
    window = np.ones(width) / width
    smooth = np.stack([np.convolve(lead, window, mode="same") for lead in values.astype(np.float64)])
    sizes = np.abs(smooth[smooth != 0])  # a missing lead has no part in the scale
    large = float(np.quantile(sizes, LARGE)) if len(sizes) else 1.0
    return np.clip(smooth / large, -1, 1).astype(np.float32)


def _mean_gradient(model: Classifier, signal: Tensor, label: int, n_nodes: int) -> Tensor:
    """(lead, time): the integral over the path, from 0 to 1, of the logit's gradient at that share of the signal."""
    shares, weights = _path(n_nodes)
    total = torch.zeros_like(signal, dtype=torch.float64)
    for first in range(0, len(shares), _AT_ONCE):
        some = torch.tensor(shares[first : first + _AT_ONCE], dtype=signal.dtype, device=signal.device)
        with torch.enable_grad():
            on_path = (some[:, None, None] * signal).requires_grad_()
            (gradients,) = torch.autograd.grad(model(on_path).logits[:, label].sum(), on_path)
        of_some = torch.tensor(weights[first : first + _AT_ONCE], dtype=torch.float64, device=signal.device)
        total += torch.einsum("n,nlt->lt", of_some, gradients.double())
    return total.to(signal.dtype)


@lru_cache(8)
def _path(n_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Where on the path from 0 to 1 the gradient is looked at, and with which weight: Gauss-Legendre in the logarithm
    of the share from `_LOWEST` to 1, and what is below `_LOWEST` as one step."""
    nodes, weights = np.polynomial.legendre.leggauss(n_nodes)
    length = -math.log(_LOWEST)
    shares = np.exp((nodes - 1) / 2 * length)
    return np.append(shares, _LOWEST), np.append(weights / 2 * length * shares, _LOWEST)
