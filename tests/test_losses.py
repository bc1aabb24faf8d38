"""The objective: what is drawn at random, each part against a slow obvious computation, and the reference's numbers."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from training_data import GOLDEN

from ecgfm.config import PretrainConfig
from ecgfm.losses import (
    PretrainingLoss,
    apply_lead_mask,
    cmsc_loss,
    code_frequencies,
    contrastive_logits,
    contrastive_loss,
    diversity_loss,
    feature_penalty,
    masked_frames,
    perplexity,
    pretraining_loss,
    sample_lead_mask,
    sample_negatives,
    sample_span_mask,
)
from ecgfm.model import PretrainModel


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


# ---- what is drawn


def test_each_lead_is_masked_independently_with_its_probability() -> None:
    mask = sample_lead_mask(20_000, 4, 0.3, seeded()).double()
    torch.testing.assert_close(mask.mean(dim=0), torch.full((4,), 0.3, dtype=torch.float64), rtol=0, atol=0.015)
    correlation = torch.corrcoef(mask.T) - torch.eye(4)
    assert correlation.abs().max() < 0.03


@pytest.mark.parametrize(("probability", "expected"), [(0.0, False), (1.0, True)])
def test_lead_masks_of_never_and_always(probability: float, expected: bool) -> None:
    assert (sample_lead_mask(50, 12, probability, seeded()) == expected).all()


def test_a_masked_lead_is_zero_and_the_others_are_untouched() -> None:
    signal = torch.randn(2, 3, 5)
    mask = torch.tensor([[True, False, False], [False, True, True]])
    masked = apply_lead_mask(signal, mask)
    for b in range(2):
        for lead in range(3):
            assert torch.equal(masked[b, lead], torch.zeros(5) if mask[b, lead] else signal[b, lead])


def test_all_segments_have_equally_many_masked_frames() -> None:
    for seed in range(20):
        counts = sample_span_mask(16, 156, 0.65, 10, seeded(seed)).sum(dim=1)
        assert counts.unique().numel() == 1
        assert 20 <= counts[0] <= 110


def test_one_segment_alone_is_masked_in_whole_spans() -> None:
    for seed in range(50):  # nothing is thinned in a batch of one
        mask = sample_span_mask(1, 156, 0.65, 10, seeded(seed))[0].int().tolist()
        runs = [len(run) for run in "".join(map(str, mask)).split("0") if run]
        assert min(runs) >= 10


def test_the_mean_number_of_spans_is_exact() -> None:
    # Without thinning the expected coverage follows from the number of spans n: a frame far from the edges is free
    # if none of its 10 possible starts, of 146, is among the n drawn without replacement.
    def covered(n: int) -> float:
        return 1 - math.prod((146 - 10 - i) / (146 - i) for i in range(n))

    expected = 0.86 * covered(10) + 0.14 * covered(11)  # 0.65 x 156 / 10 = 10.14
    generator = seeded()
    middle = torch.stack([sample_span_mask(1, 156, 0.65, 10, generator)[0, 20:130] for _ in range(3000)])
    assert middle.double().mean().item() == pytest.approx(expected, abs=0.005)


def test_frames_are_masked_uniformly_but_for_the_edges() -> None:
    generator = seeded()
    rate = torch.cat([sample_span_mask(64, 156, 0.65, 10, generator) for _ in range(100)]).double().mean(dim=0)
    middle = rate[9:146]
    assert middle.std() < 0.01
    assert rate[0] < rate[4] < rate[9]  # fewer spans reach them
    assert rate[155] == 0  # the last possible start is left out, as in the reference


def test_there_are_at_least_two_spans() -> None:
    for seed in range(30):
        assert 11 <= sample_span_mask(1, 40, 0.0, 10, seeded(seed)).sum() <= 20


def test_segments_too_short_for_their_spans_are_named() -> None:
    with pytest.raises(ValueError, match="segments of 11 frames are too short for 2 masked spans of 10"):
        sample_span_mask(4, 11, 0.65, 10, seeded())
    assert sample_span_mask(4, 12, 0.65, 10, seeded()).sum(dim=1).tolist() == [11] * 4


def test_masked_frames_are_the_places_of_the_mask_in_order() -> None:
    mask = sample_span_mask(5, 60, 0.65, 10, seeded())
    places = masked_frames(mask)
    assert [row.tolist() for row in places] == [[f for f in range(60) if row[f]] for row in mask]


def test_negatives_are_the_other_masked_frames_each_as_likely() -> None:
    negatives = sample_negatives(300, 7, 100, seeded())
    assert negatives.shape == (300, 7, 100)
    for frame in range(7):
        counts = Counter(negatives[:, frame].flatten().tolist())
        assert set(counts) == set(range(7)) - {frame}
        assert all(count == pytest.approx(5000, rel=0.06) for count in counts.values())


def test_a_lone_masked_frame_has_no_negatives() -> None:
    with pytest.raises(ValueError, match="at least 2 masked frames"):
        sample_negatives(2, 1, 5, seeded())


def test_the_same_seed_draws_the_same_and_another_seed_does_not() -> None:
    def draw(seed: int) -> tuple[Tensor, ...]:
        generator = seeded(seed)
        mask = sample_span_mask(8, 156, 0.65, 10, generator)
        return mask, sample_negatives(8, 20, 10, generator), sample_lead_mask(8, 12, 0.5, generator)

    assert all(torch.equal(*pair) for pair in zip(draw(1), draw(1), strict=True))
    assert not any(torch.equal(one[:, :9], other[:, :9]) for one, other in zip(draw(1), draw(2), strict=True))


# ---- the parts


def contrast_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """context, quantized, codes, negatives: 3 segments, 8 masked frames, 2 codebooks of 2 entries (many are equal)"""
    generator = seeded()
    codes = torch.randint(2, (3, 8, 2), generator=generator)
    codebook = torch.randn(2, 2, 5, generator=generator)
    quantized = torch.cat([codebook[group][codes[..., group]] for group in range(2)], dim=-1)
    return torch.randn(3, 8, 10, generator=generator), quantized, codes, sample_negatives(3, 8, 6, generator)


def test_contrastive_logits_against_loops() -> None:
    context, quantized, codes, negatives = contrast_inputs()
    logits = contrastive_logits(context, quantized, codes, negatives, 0.1)
    equal = 0
    for b in range(3):
        for m in range(8):
            candidates = [m, *negatives[b, m].tolist()]
            for k, other in enumerate(candidates):
                expected = F.cosine_similarity(context[b, m], quantized[b, other], dim=0) / 0.1
                if k and torch.equal(quantized[b, other], quantized[b, m]):
                    equal += 1
                    expected = torch.tensor(-math.inf)
                torch.testing.assert_close(logits[b, m, k], expected, rtol=1e-4, atol=1e-4)
    assert 0 < equal < 3 * 8 * 6


def test_the_contrastive_loss_is_the_summed_cross_entropy() -> None:
    context, quantized, codes, negatives = contrast_inputs()
    logits = contrastive_logits(context, quantized, codes, negatives, 0.1)
    loss, correct = contrastive_loss(logits)
    rows = logits.flatten(0, 1).double()
    expected = sum(torch.log(row.exp().sum()) - row[0] for row in rows)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert correct.item() == sum(row[0] > row[1:].max() for row in rows)


def test_candidates_that_are_all_equal_are_not_a_right_answer() -> None:
    logits = torch.tensor([[[1.0, 1.0, 1.0], [2.0, 1.0, 0.0], [0.0, 1.0, -math.inf]]])
    assert contrastive_loss(logits)[1] == 1


def test_context_that_points_at_its_target_loses_less() -> None:
    context, quantized, codes, negatives = contrast_inputs()
    losses = [
        contrastive_loss(contrastive_logits(c, quantized, codes, negatives, 0.1))[0] for c in (context, quantized)
    ]
    assert losses[1] < losses[0] / 4


def test_no_gradient_is_lost_to_a_codebook_that_has_collapsed() -> None:
    context, quantized, codes, negatives = contrast_inputs()
    context.requires_grad_()
    loss, _ = contrastive_loss(contrastive_logits(context, quantized, torch.zeros_like(codes), negatives, 0.1))
    loss.backward()
    assert loss == 0
    assert context.grad is not None
    assert context.grad.isfinite().all()


def test_perplexity_counts_the_entries_in_use() -> None:
    use = torch.zeros(2, 20)
    use[0, :5] = 1 / 5
    use[1, 7] = 1
    assert perplexity(use).item() == pytest.approx(6, rel=1e-4)
    assert diversity_loss(use).item() == pytest.approx(34 / 40, rel=1e-4)
    assert diversity_loss(torch.full((2, 20), 1 / 20)).item() == pytest.approx(0, abs=1e-4)


def test_code_frequencies_are_counted_by_codebook() -> None:
    codes = torch.tensor([[[0, 2], [0, 1]], [[1, 2], [0, 2]]])
    assert code_frequencies(codes, 3).tolist() == [[0.75, 0.25, 0], [0, 0.25, 0.75]]


def test_feature_penalty_is_the_mean_square() -> None:
    assert feature_penalty(torch.tensor([[[1.0, -2.0], [3.0, 0.0]]])).item() == 14 / 4


def slow_cmsc(first: Tensor, second: Tensor, patients: list[int]) -> float:
    terms = []
    for anchors, others in ((first, second), (second, first)):
        for i, anchor in enumerate(anchors):
            similar = {
                j: math.exp(F.cosine_similarity(anchor, other, dim=0).item() / 0.1)
                for j, other in enumerate(others)
                if i == j or patients[i] == -1 or patients[i] != patients[j]
            }
            terms.append(-math.log(similar[i] / sum(similar.values())))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("patients", [[-1, -1, -1, -1], [0, 1, 2, 3], [4, 4, -1, -1], [7, 7, 7, 2]])
def test_cmsc_against_loops(patients: list[int]) -> None:
    first, second = torch.randn(2, 4, 6, generator=seeded())
    expected = slow_cmsc(first, second, patients)
    assert cmsc_loss(first, second, 0.1, torch.tensor(patients)).item() == pytest.approx(expected, rel=1e-5)


def test_patients_are_ignored_where_none_are_given() -> None:
    first, second = torch.randn(2, 4, 6, generator=seeded())
    reference = cmsc_loss(first, second, 0.1)
    assert reference == cmsc_loss(first, second, 0.1, torch.tensor([-1, -1, -1, -1]))
    assert reference > cmsc_loss(first, second, 0.1, torch.tensor([5, 5, 5, -1]))


def test_cmsc_of_a_patients_records_alone_is_zero() -> None:
    first, second = torch.randn(2, 3, 6, generator=seeded())
    assert cmsc_loss(first, second, 0.1, torch.tensor([3, 3, 3])) == 0


def test_cmsc_is_symmetric_and_blind_to_length() -> None:
    first, second = torch.randn(2, 4, 6, generator=seeded())
    torch.testing.assert_close(cmsc_loss(first, second, 0.1), cmsc_loss(second, first, 0.1))
    torch.testing.assert_close(cmsc_loss(first, second, 0.1), cmsc_loss(3 * first, second / 5, 0.1))


def test_cmscs_gradient_holds_the_norms_constant() -> None:
    first, second = torch.randn(2, 4, 6, generator=seeded())
    first.requires_grad_()
    cmsc_loss(first, second, 0.1).backward()
    constant = first.detach().norm(dim=1, keepdim=True)
    free = first.detach().clone().requires_grad_()
    similarity = (free / constant) @ F.normalize(second, dim=1).T / 0.1
    target = torch.arange(4)
    ((F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2).backward()
    assert first.grad is not None
    assert free.grad is not None
    torch.testing.assert_close(first.grad, free.grad)
    # With the norm differentiated the gradient would have no part along the vector itself.
    assert (first.grad * first).sum(dim=1).abs().max() > 1e-3


def total(config: PretrainConfig, patients: Tensor | None = None) -> PretrainingLoss:
    context, quantized, codes, negatives = (tensor[:2] for tensor in contrast_inputs())
    pooled = torch.randn(8, 6, generator=seeded(3))
    context, quantized, codes, negatives = (torch.cat([t, t, t, t]) for t in (context, quantized, codes, negatives))
    return pretraining_loss(
        context=context,
        quantized=quantized,
        codes=codes,
        code_probabilities=torch.tensor([[0.9, 0.1], [0.5, 0.5]]),
        features=torch.full((8, 5, 3), 0.5),
        pooled=pooled,
        negatives=negatives,
        config=config,
        patients=patients,
    )


def test_the_total_is_the_weighted_sum_of_its_parts() -> None:
    found = total(PretrainConfig(diversity_weight=0.3, feature_penalty_weight=2.0, cmsc_weight=0.7))
    pooled = torch.randn(8, 6, generator=seeded(3))
    entries = math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1)) + 2
    assert found.count == 8 * 8
    assert found.parts["diversity"].item() == pytest.approx(64 * 0.3 * (4 - entries) / 4, rel=1e-4)
    assert found.parts["feature_penalty"].item() == pytest.approx(64 * 2.0 * 0.25)
    assert found.parts["cmsc"].item() == pytest.approx(64 * 0.7 * slow_cmsc(pooled[:4], pooled[4:], [-1] * 4), rel=1e-5)
    assert found.total.item() == pytest.approx(sum(part.item() for part in found.parts.values()), rel=1e-6)
    assert found.probability_perplexity.item() == pytest.approx(entries, rel=1e-4)
    assert 2 < found.code_perplexity <= 4
    assert 0 < found.correct < found.count


def test_known_patients_count_only_where_the_reference_way_is_off() -> None:
    patients = torch.tensor([1, 1, 2, -1])
    ignored, repelled = (
        total(PretrainConfig(same_patient_negatives=same), patients).parts["cmsc"] for same in (False, True)
    )
    assert repelled == total(PretrainConfig()).parts["cmsc"]
    assert ignored < repelled


# ---- the reference


def test_the_reference_loss_and_every_gradient_are_reproduced(shared: Path) -> None:
    folder = shared / "golden/model"
    expected = json.loads((folder / "tiny.json").read_text())
    with np.load(folder / "tiny.npz") as arrays:
        given = {name: torch.from_numpy(arrays[name]) for name in arrays.files if arrays[name].dtype.kind != "U"}
    config = PretrainConfig(model=GOLDEN)
    model = PretrainModel(GOLDEN, feature_grad_scale=config.feature_grad_scale).eval()
    model.load_state_dict(torch.load(folder / "tiny_pretrained.pt", weights_only=True)["model"])

    places = masked_frames(given["mask_indices"])
    batch, n_masked = places.shape
    negatives = given["neg_idxs"].view(batch, n_masked, -1) - n_masked * torch.arange(batch)[:, None, None]
    output = model(given["source"], places, 2.0)
    logits = contrastive_logits(output.context, output.quantized, output.codes, negatives, 0.1)
    # The reference lays its rows out masked frame by masked frame, the segments within each.
    reference_logits = given["pre_logits"].view(n_masked, batch, -1).transpose(0, 1)
    torch.testing.assert_close(logits, reference_logits, rtol=1e-4, atol=1e-5)
    finite = torch.isfinite(logits)
    assert not finite.all()
    error = ((logits - reference_logits)[finite].abs() / reference_logits[finite].abs().clamp_min(1)).max()
    print(f"contrastive logits: {float(error):.1e} at most")

    pairs_in_order = np.lexsort((given["patient_id"], given["segment"]))
    loss = pretraining_loss(
        context=output.context,
        quantized=output.quantized,
        codes=output.codes,
        code_probabilities=output.code_probabilities,
        features=output.features,
        pooled=output.pooled[pairs_in_order],
        negatives=negatives,
        config=config,
    )
    log = expected["log"]
    print(f"total: {abs(loss.total.item() / expected['loss_total'] - 1):.1e} relative")
    for part, name in enumerate(("contrastive", "diversity", "feature_penalty", "cmsc")):
        print(f"{name}: {abs(loss.parts[name].item() / log[f'loss_{part}'] - 1):.1e} relative")
    assert loss.total.item() == pytest.approx(expected["loss_total"], rel=1e-4)
    for part, name in enumerate(("contrastive", "diversity", "feature_penalty", "cmsc")):
        assert loss.parts[name].item() == pytest.approx(log[f"loss_{part}"], rel=1e-4)
    assert (loss.correct.item(), loss.count) == (log["correct"], expected["sample_size"])
    assert loss.probability_perplexity.item() == pytest.approx(log["prob_perplexity"], rel=1e-4)
    assert loss.code_perplexity.item() == pytest.approx(log["code_perplexity"], rel=1e-4)

    loss.total.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    errors = [abs(norms[n] / expected["grad_norms"][n] - 1) for n in norms if not n.endswith("k_proj.bias")]
    print(f"gradient norms of {len(errors)} parameters: {max(errors):.1e} relative at most")
    # A key bias moves all scores of a query alike: its gradient is 0 but for rounding.
    assert norms == pytest.approx(expected["grad_norms"], rel=1e-4, abs=1e-6)
    assert min(norm for name, norm in norms.items() if not name.endswith("k_proj.bias")) > 0.1
