"""Integrated gradients: its axioms, a slow judge, and the sanity check of Adebayo et al. 2018 (arXiv 1810.03292)."""

from __future__ import annotations

import copy
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from training_data import SEGMENT_SAMPLES, TINY

from ecgfm.attribution import TOLERANCE, Attribution, for_display, integrated_gradients
from ecgfm.ecg import LEADS
from ecgfm.model import Classified, Classifier

LEAD, FIRST, STOP = LEADS.index("aVR"), 30, 54
BURST = 4 * torch.hann_window(STOP - FIRST) * torch.cos(torch.arange(STOP - FIRST) * 1.2)


def segments(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """(segment, lead, time) standardised noise, in half of them with a burst in one lead; (segment, 1) whether."""
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(n, 12, SEGMENT_SAMPLES, generator=generator)
    present = (torch.rand(n, 1, generator=generator) < 0.5).float()
    signal[:, LEAD, FIRST:STOP] += present * BURST
    return (signal - signal.mean(dim=2, keepdim=True)) / signal.std(dim=2, keepdim=True), present


@pytest.fixture(scope="module")
def model() -> Classifier:
    """Has learnt to see the burst."""
    torch.manual_seed(0)
    model = Classifier(TINY, 1, feature_grad_scale=1.0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(300):
        signal, present = segments(32, seed=step)
        optimizer.zero_grad()
        torch.autograd.backward(F.binary_cross_entropy_with_logits(model(signal).logits, present))
        optimizer.step()
    model.eval()
    signal, present = segments(200, seed=10_000)
    with torch.no_grad():
        assert ((model(signal).logits > 0) == present.bool()).float().mean() > 0.9
    return model


@pytest.fixture(scope="module")
def positives() -> Tensor:
    signal, present = segments(40, seed=20_000)
    return signal[present[:, 0] == 1][:4]


def test_attributions_add_up_to_the_difference_of_the_logits(model: Classifier, positives: Tensor) -> None:
    untrained = Classifier(TINY, 1).eval()
    for network in (model, untrained):
        for signal in positives:
            found = integrated_gradients(network, signal, 0)
            with torch.no_grad():
                logit = float(network(signal[None]).logits)
                baseline_logit = float(network(torch.zeros_like(signal)[None]).logits)
            assert found.values.shape == (12, SEGMENT_SAMPLES)
            assert (found.logit, found.baseline_logit) == pytest.approx((logit, baseline_logit), abs=1e-5)
            assert found.values.sum() == pytest.approx(logit - baseline_logit, rel=TOLERANCE, abs=1e-4)
            assert found.completeness_error <= TOLERANCE


def test_the_trained_logits_differ_enough_for_completeness_to_mean_something(
    model: Classifier, positives: Tensor
) -> None:
    found = [integrated_gradients(model, signal, 0) for signal in positives]
    assert min(abs(each.logit - each.baseline_logit) for each in found) > 1


def test_equal_steps_would_miss_what_happens(model: Classifier, positives: Tensor) -> None:
    """Why the path is walked in steps of its logarithm: a common gain is normalised away but near zero."""
    signal = positives[0]
    shares = (torch.arange(50) + 0.5) / 50
    on_path = (shares[:, None, None] * signal).requires_grad_()
    (gradients,) = torch.autograd.grad(model(on_path).logits.sum(), on_path)
    ours = integrated_gradients(model, signal, 0)
    equal = Attribution((gradients.mean(dim=0) * signal).numpy(), ours.logit, ours.baseline_logit)
    assert equal.completeness_error > 0.5


def test_it_is_the_slow_sum_over_four_thousand_places(model: Classifier, positives: Tensor) -> None:
    signal = positives[1]
    edges = np.concatenate([[0.0], np.geomspace(1e-7, 1, 4_000)])
    slow = np.zeros((12, SEGMENT_SAMPLES))
    middles, widths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    for first in range(0, len(middles), 100):
        some = torch.tensor(middles[first : first + 100], dtype=torch.float32)
        on_path = (some[:, None, None] * signal).requires_grad_()
        (gradients,) = torch.autograd.grad(model(on_path).logits.sum(), on_path)
        slow += np.einsum("n,nlt->lt", widths[first : first + 100], gradients.double().numpy())
    slow *= signal.numpy()
    ours = integrated_gradients(model, signal, 0).values
    np.testing.assert_allclose(ours, slow, atol=0.02 * np.abs(slow).max())


def test_what_the_label_is_made_of_stands_out(model: Classifier, positives: Tensor) -> None:
    """The burst is one lead of twelve and 24 samples of 3,072."""
    for signal in positives:
        values = np.abs(integrated_gradients(model, signal, 0).values)
        of_leads = values.sum(axis=1)
        assert of_leads.argmax() == LEAD
        assert of_leads[LEAD] > 2 * np.median(of_leads)
        assert values[LEAD, FIRST:STOP].mean() > 5 * values.mean()


def test_a_missing_lead_has_no_part_in_it(model: Classifier, positives: Tensor) -> None:
    signal = positives[0].clone()
    signal[5] = 0
    values = integrated_gradients(model, signal, 0).values
    assert not values[5].any()
    assert values[LEAD].any()


class Linear(nn.Module):
    """Logits that are linear in the signal: there integrated gradients are weight times value."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(3)))

    def forward(self, signal: Tensor) -> Classified:
        logits = torch.einsum("klt,blt->bk", self.weight, signal) + torch.tensor([0.5, -2.0])
        return Classified(logits, logits, None)


@pytest.mark.parametrize("label", [0, 1])
def test_of_a_linear_model_it_is_weight_times_value(label: int) -> None:
    model = Linear()
    signal = torch.randn(12, 8, generator=torch.Generator().manual_seed(4))
    found = integrated_gradients(cast(Classifier, model), signal, label)
    np.testing.assert_allclose(found.values, (model.weight[label] * signal).detach().numpy(), rtol=1e-4, atol=1e-6)
    assert found.baseline_logit == [0.5, -2.0][label]


def test_randomising_the_weights_from_the_top_changes_the_attribution(model: Classifier, positives: Tensor) -> None:
    """A method that shows the signal's edges whatever the weights would pass every look, and fail this."""
    ours = [integrated_gradients(model, signal, 0).values for signal in positives]

    def likeness(random_parts: tuple[str, ...]) -> float:
        """Rank correlation of the attributions' sizes with those of a model of which some parts are random."""
        other = copy.deepcopy(model)
        torch.manual_seed(5)
        state: dict[str, Any] = Classifier(TINY, 1).state_dict()
        other.load_state_dict({k: state[k] if k.startswith(random_parts) else v for k, v in other.state_dict().items()})
        theirs = [integrated_gradients(other.eval(), signal, 0).values for signal in positives]
        pairs = zip(ours, theirs, strict=True)
        return float(np.mean([spearmanr(np.abs(a).ravel(), np.abs(b).ravel())[0] for a, b in pairs]))

    unchanged, *randomised = [
        likeness(parts) for parts in (("nothing",), ("proj", "encoder.encoder.layers.1"), ("proj", "encoder"))
    ]
    assert unchanged == pytest.approx(1)
    assert randomised[0] < 0.85
    assert randomised[1] < 0.5


def test_display_keeps_the_sign_and_one_scale_for_all_leads() -> None:
    values = np.zeros((3, 400), np.float32)
    values[0, 100:140] = 2.0
    values[2, 300:340] = -1.0
    shown = for_display(values, 500.0)
    assert shown.max() == 1
    assert shown.min() == pytest.approx(-0.5)
    assert not shown[1].any()
    assert np.flatnonzero(shown[0]).min() >= 100 - 10
    values[2, 5] = 1e6
    assert np.abs(for_display(values, 500.0)).max() == 1
    assert not for_display(np.zeros((2, 10)), 500.0).any()
