"""The losses on labels: what a slow, obvious implementation says of them, and what they become at their limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ecgfm.config import FinetuneConfig
from ecgfm.ecg import InputError
from ecgfm.label_space import Label, LabelSpace
from ecgfm.supervised import (
    class_weight,
    loss_weights,
    masked_asymmetric,
    masked_bce,
    masked_cross_entropy,
    masked_error,
    masked_focal,
    positive_weight,
    supervised_loss,
)

Loss = Callable[[Tensor, Tensor], tuple[Tensor, int]]
WEIGHTS = torch.tensor([2.0, 1.0, 0.5])
LOSSES: dict[str, Loss] = {
    "bce": lambda logits, labels: masked_bce(logits, labels, WEIGHTS.to(logits)),
    "focal": lambda logits, labels: masked_focal(logits, labels, 2.0, 0.25),
    "focal, a fraction, no alpha": lambda logits, labels: masked_focal(logits, labels, 0.5, None),
    "asymmetric": lambda logits, labels: masked_asymmetric(logits, labels, 1.0, 4.0, 0.05),
    "asymmetric, a fraction, no margin": lambda logits, labels: masked_asymmetric(logits, labels, 0.0, 0.5, 0.0),
}


def slow(name: str, logit: float, label: float, number: int) -> float:
    """The loss of one known label, from its formula in its paper."""
    p = 1 / (1 + math.exp(-logit))
    if name == "bce":
        return -float(WEIGHTS[number]) * math.log(p) if label else -math.log(1 - p)
    if name.startswith("focal"):
        gamma, alpha = (2.0, 0.25) if name == "focal" else (0.5, None)
        p_t, alpha_t = (p, alpha) if label else (1 - p, None if alpha is None else 1 - alpha)
        return -(1.0 if alpha_t is None else alpha_t) * (1 - p_t) ** gamma * math.log(p_t)
    gamma_positive, gamma_negative, margin = (1.0, 4.0, 0.05) if name == "asymmetric" else (0.0, 0.5, 0.0)
    if label:
        return -((1 - p) ** gamma_positive) * math.log(p)
    lowered = max(p - margin, 0.0)
    return -(lowered**gamma_negative) * math.log(1 - lowered)


def some(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels of which some are unknown, and which."""
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(8, 3, generator=random, dtype=torch.float64)
    labels = torch.randint(2, (8, 3), generator=random).double()
    unknown = torch.rand(8, 3, generator=random) < 0.4
    labels[unknown] = math.nan
    assert 0 < unknown.sum() < 24
    assert {*labels[~unknown].tolist()} == {0.0, 1.0}
    return logits.requires_grad_(), labels, unknown


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_what_its_formula_says_summed_over_known_labels(name: str) -> None:
    logits, labels, unknown = some()
    total, known = LOSSES[name](logits, labels)
    assert known == int((~unknown).sum())
    expected = [slow(name, float(logits[i, j].detach()), float(labels[i, j]), j) for i, j in (~unknown).nonzero()]
    assert float(total.detach()) == pytest.approx(sum(expected), rel=1e-9)
    assert min(expected) >= 0
    assert max(expected) > 0


@pytest.mark.parametrize("name", LOSSES)
def test_unknown_labels_carry_no_loss_and_no_gradient(name: str) -> None:
    logits, labels, unknown = some()
    total, _ = LOSSES[name](logits, labels)
    total.backward()
    assert logits.grad is not None
    assert not logits.grad[unknown].any()
    assert logits.grad[~unknown].any()
    moved = logits.detach().clone()
    moved[unknown] += 5.0  # whatever the model says of them
    assert torch.equal(LOSSES[name](moved, labels)[0], total.detach())


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_is_the_slope_of_the_formula(name: str) -> None:
    logits, labels, unknown = some(1)
    LOSSES[name](logits, labels)[0].backward()
    assert logits.grad is not None
    step = 1e-6
    for i, j in (~unknown).nonzero().tolist():
        x, label = float(logits[i, j].detach()), float(labels[i, j])
        slope = (slow(name, x + step, label, j) - slow(name, x - step, label, j)) / (2 * step)
        assert float(logits.grad[i, j]) == pytest.approx(slope, rel=1e-4, abs=1e-7), (x, label)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_nothing_but_unknown_labels_changes_nothing(name: str) -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    total, known = LOSSES[name](logits, torch.full((2, 3), math.nan))
    total.backward()
    assert (float(total.detach()), known) == (0.0, 1)
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_a_sure_model_has_a_finite_loss_and_slope(name: str) -> None:
    """In single precision, where a probability of 1 - 1e-8 is 1."""
    logits = torch.tensor([[-200.0, -50.0, 0.0], [50.0, 200.0, 1e-30]], requires_grad=True)
    for label in (0.0, 1.0):
        logits.grad = None
        total, _ = LOSSES[name](logits, torch.full((2, 3), label))
        total.backward()
        assert logits.grad is not None
        assert total.isfinite()
        assert logits.grad.isfinite().all()
        wrong = logits.grad[0, 0] if label else logits.grad[1, 1]
        saturated = name == "asymmetric" and not label  # with a margin the worst negatives teach nothing: its purpose
        assert (wrong == 0) == saturated


def test_at_their_limits_all_are_the_cross_entropy() -> None:
    logits, labels, _ = some(2)
    expected, known = masked_bce(logits, labels, torch.ones(3, dtype=torch.float64))
    (slope,) = torch.autograd.grad(expected, logits)
    for name, (total, count) in {
        "focal": masked_focal(logits, labels, 0.0, None),
        "asymmetric": masked_asymmetric(logits, labels, 0.0, 0.0, 0.0),
    }.items():
        assert count == known
        torch.testing.assert_close(total, expected, msg=name)
        torch.testing.assert_close(torch.autograd.grad(total, logits)[0], slope, msg=name)
    halved, _ = masked_focal(logits, labels, 0.0, 0.5)
    torch.testing.assert_close(2 * halved, expected)


def test_one_gamma_and_no_margin_make_the_asymmetric_loss_a_focal_one() -> None:
    logits, labels, _ = some(3)
    torch.testing.assert_close(
        masked_asymmetric(logits, labels, 2.0, 2.0, 0.0), masked_focal(logits, labels, 2.0, None)
    )


def test_a_negative_below_the_margin_teaches_nothing() -> None:
    p = torch.tensor([[0.001, 0.049, 0.051, 0.5]])
    logits = p.logit().requires_grad_()
    masked_asymmetric(logits, torch.zeros(1, 4), 0.0, 1.0, 0.05)[0].backward()
    assert logits.grad is not None
    assert (logits.grad != 0).tolist() == [[False, False, True, True]]


def test_the_config_names_the_loss_and_its_parameters() -> None:
    logits, labels, _ = some(4)
    weights = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    for config, expected in (
        (FinetuneConfig(), masked_bce(logits, labels, weights)),
        (FinetuneConfig(loss="focal"), masked_focal(logits, labels, 2.0, 0.25)),
        (FinetuneConfig(loss="focal", focal_gamma=1.5, focal_alpha=None), masked_focal(logits, labels, 1.5, None)),
        (FinetuneConfig(loss="asymmetric"), masked_asymmetric(logits, labels, 0.0, 4.0, 0.05)),
        (
            FinetuneConfig(
                loss="asymmetric",
                asymmetric_gamma_positive=1.0,
                asymmetric_gamma_negative=2.0,
                asymmetric_margin=0.2,
            ),
            masked_asymmetric(logits, labels, 1.0, 2.0, 0.2),
        ),
    ):
        found = supervised_loss(logits, labels, "multilabel", config, weights)
        assert torch.equal(found[0], expected[0])
        assert found[1] == expected[1]


def test_positives_weigh_as_much_as_negatives() -> None:
    space = LabelSpace((Label("a", (), "mean"), Label("b", (), "max")))
    labels = torch.tensor([[1, 0], [0, 0], [0, 0], [0, 1], [math.nan, 1]])
    assert positive_weight(labels, space).tolist() == [3.0, 1.5]
    with pytest.raises(InputError, match="label 'a' has 1 positive and 0 negative"):
        positive_weight(labels[:1], space)


# ---- classes that exclude each other, and numbers


def classes(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, one-hot labels of which some segments' are unknown, and which."""
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(12, 3, generator=random, dtype=torch.float64)
    labels = torch.eye(3, dtype=torch.float64)[torch.randint(3, (12,), generator=random)]
    unknown = torch.rand(12, generator=random) < 0.3
    labels[unknown] = math.nan
    assert 0 < unknown.sum() < 12
    return logits.requires_grad_(), labels, unknown


def test_the_loss_of_classes_is_the_weighted_log_of_the_truths_softmax() -> None:
    logits, labels, unknown = classes()
    total, known = masked_cross_entropy(logits, labels, WEIGHTS.double())
    expected = 0.0
    for row, of_row in zip(logits.tolist(), labels.tolist(), strict=True):
        if not math.isnan(of_row[0]):
            place = of_row.index(1.0)
            expected -= float(WEIGHTS[place]) * math.log(math.exp(row[place]) / sum(map(math.exp, row)))
    assert known == int((~unknown).sum())
    assert float(total.detach()) == pytest.approx(expected)
    torch.autograd.backward(total)
    assert logits.grad is not None
    assert (logits.grad[unknown] == 0).all()
    assert (logits.grad[~unknown] != 0).any(dim=1).all()
    np.testing.assert_allclose(logits.grad.sum(dim=1), 0, atol=1e-12, err_msg="a common shift changes nothing")


@pytest.mark.parametrize("smooth", [False, True])
def test_the_loss_of_numbers_is_their_error_squared_or_smooth_over_known_ones(smooth: bool) -> None:
    random = torch.Generator().manual_seed(1)
    outputs = 2 * torch.randn(9, 2, generator=random, dtype=torch.float64)
    numbers = 2 * torch.randn(9, 2, generator=random, dtype=torch.float64)
    numbers[torch.rand(9, 2, generator=random) < 0.4] = math.nan
    outputs.requires_grad_()
    total, known = masked_error(outputs, numbers, smooth)
    errors = [
        abs(said - so)
        for row, of_row in zip(outputs.tolist(), numbers.tolist(), strict=True)
        for said, so in zip(row, of_row, strict=True)
        if not math.isnan(so)
    ]
    assert min(errors) < 1 < max(errors)
    expected = [(e * e / 2 if e < 1 else e - 0.5) if smooth else e * e for e in errors]
    assert (known, float(total.detach())) == (len(errors), pytest.approx(sum(expected)))
    torch.autograd.backward(total)
    assert outputs.grad is not None
    assert (outputs.grad[numbers.isnan()] == 0).all()
    if smooth:
        assert float(outputs.grad.abs().max()) == 1.0, "no outlier pulls harder than any other"


@pytest.mark.parametrize("task", ["multiclass", "regression"])
def test_where_nothing_is_known_there_is_no_loss(task: Any) -> None:
    outputs = torch.randn(3, 2, requires_grad=True)
    total, known = supervised_loss(outputs, torch.full((3, 2), math.nan), task, FinetuneConfig(), torch.ones(2))
    assert (float(total.detach()), known) == (0.0, 1)
    torch.autograd.backward(total)
    assert outputs.grad is not None
    assert (outputs.grad == 0).all()


def test_class_weights_make_every_class_weigh_the_same_and_a_segment_one_on_average() -> None:
    labels = torch.eye(3)[[0] * 6 + [1] * 3 + [2]]
    labels = torch.cat([labels, torch.full((4, 3), math.nan)])
    space = LabelSpace(tuple(Label(name, (), "mean") for name in "abc"), {}, "multiclass")
    weights = class_weight(labels, space)
    counts = torch.tensor([6.0, 3.0, 1.0])
    np.testing.assert_allclose(weights * counts, [10 / 3] * 3, rtol=1e-6)
    assert float((weights * counts).sum()) == pytest.approx(10)
    with pytest.raises(InputError, match="class 'c' has no segment to train on"):
        class_weight(labels[:9], space)


def test_weights_are_those_of_the_task() -> None:
    labels = torch.eye(2)[[0, 0, 0, 1]]
    spaces = {
        task: LabelSpace((Label("a", (), "mean"), Label("b", (), "mean")), {}, task)  # type: ignore[arg-type]
        for task in ("multilabel", "multiclass", "regression")
    }
    found = {task: loss_weights(labels, space, FinetuneConfig()).tolist() for task, space in spaces.items()}
    assert found == {"multilabel": pytest.approx([1 / 3, 3.0]), "multiclass": pytest.approx([2 / 3, 2.0]),
                     "regression": [1.0, 1.0]}  # fmt: skip
    assert loss_weights(labels, spaces["multiclass"], FinetuneConfig(pos_weight=False)).tolist() == [1, 1]
    with pytest.raises(InputError, match=r"finetune\.loss 'focal' is of task 'multilabel', and labels.task is 'multic"):
        loss_weights(labels, spaces["multiclass"], FinetuneConfig(loss="focal"))
