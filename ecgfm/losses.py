"""The pretraining objective: random lead masking, masked-frame prediction (wav2vec 2.0), and CMSC. Plain functions.

Letters: B batch (segments), L leads, T samples, F frames, C conv channels, D width, M masked frames of a segment,
K negatives of a masked frame, G codebooks, V codebook entries, P pairs (B = 2 P: the first segments, then the second).

Sources: Baevski et al. 2020 (arXiv 2006.11477), contrastive and diversity loss; Kiyasseh et al. 2021 (arXiv
2005.13249), CMSC; Oh et al. 2022 (arXiv 2203.06889), random lead masking and the sum of all three.

Everything random takes a generator and happens on the generator's device. Lead masks and negatives may be drawn on the
model's device; span masks are best drawn on the CPU, where the number of masked frames is known without waiting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ecgfm.config import PretrainConfig

MIN_SPANS = 2
"""Spans of masked frames per segment, at least."""


@dataclass(frozen=True)
class PretrainingLoss:
    """The objective of one batch, in nats, summed over masked frames.

    total: what to differentiate, after dividing by the masked frames of the whole update
    parts: `contrastive`, `diversity`, `feature_penalty`, `cmsc`: weighted, they add up to the total; no gradient
    correct: () int64, masked frames whose true target is the most similar of all candidates
    count: masked frames, B x M
    probability_perplexity: () entries in use by the mean softmax, all codebooks together; at most G x V
    code_perplexity: () the same by the entries actually chosen
    """

    total: Tensor
    parts: dict[str, Tensor]
    correct: Tensor
    count: int
    probability_perplexity: Tensor
    code_perplexity: Tensor


def sample_lead_mask(batch: int, n_leads: int, probability: float, generator: Generator) -> Tensor:
    """(B, L) bool: each lead of each segment is masked with `probability`, independently. All may be."""
    return torch.rand(batch, n_leads, generator=generator, device=generator.device) < probability


def apply_lead_mask(signal: Tensor, lead_mask: Tensor) -> Tensor:
    """(B, L, T) with the masked leads (B, L) set to 0, as a missing lead is"""
    return signal.masked_fill(lead_mask[..., None], 0)


def sample_span_mask(batch: int, n_frames: int, probability: float, span: int, generator: Generator) -> Tensor:
    """(B, F) bool: the frames hidden from the encoder, in spans, equally many in every segment.

    The number of spans, `probability * F / span` rounded up or down at random (so that its mean is exact), is the same
    for the whole batch. Their starts are drawn without replacement and spans may overlap, so that fewer than
    `probability` of the frames are masked. Segments are then thinned at random to the smallest count among them. As in
    the reference no span starts at the last possible place: the last frame is never masked.

    Raises:
        ValueError: segments too short for the spans.
    """
    n_starts = n_frames - span
    spans = int(probability * n_frames / span + torch.rand((), generator=generator, device=generator.device).item())
    spans = max(spans, MIN_SPANS)
    if spans > n_starts:
        raise ValueError(
            f"segments of {n_frames} frames are too short for {spans} masked spans of {span}; use longer segments, or "
            f"smaller pretrain.span_mask_frames or pretrain.span_mask_probability"
        )
    starts = _draw_distinct(torch.ones(batch, n_starts, dtype=torch.bool, device=generator.device), spans, generator)
    covered = (starts[..., None] + torch.arange(span, device=starts.device)).flatten(start_dim=1)
    spanned = torch.zeros(batch, n_frames, dtype=torch.bool, device=starts.device).scatter_(1, covered, True)
    fewest = int(spanned.sum(dim=1).min())
    return torch.zeros_like(spanned).scatter_(1, _draw_distinct(spanned, fewest, generator), True)


def _draw_distinct(allowed: Tensor, count: int, generator: Generator) -> Tensor:
    """(B, count): `count` places of each row of (B, N) bool, drawn without replacement where it is True"""
    scores = torch.rand(allowed.shape, generator=generator, device=allowed.device)
    return scores.masked_fill(~allowed, -1).topk(count, dim=1).indices


def masked_frames(span_mask: Tensor) -> Tensor:
    """(B, F) bool, equally many True in every row -> (B, M) int64, where they are, in order"""
    return span_mask.nonzero()[:, 1].view(len(span_mask), -1)


def sample_negatives(batch: int, n_masked: int, n_negatives: int, generator: Generator) -> Tensor:
    """(B, M, K) int64: for each masked frame, K of the *other* masked frames of its segment (0 .. M - 1), drawn
    uniformly with replacement.

    Raises:
        ValueError: fewer than two masked frames, so that there is no other.
    """
    if n_masked < 2:
        raise ValueError(f"expected at least 2 masked frames per segment, found {n_masked}; use longer segments")
    device = generator.device
    others = torch.randint(n_masked - 1, (batch, n_masked, n_negatives), generator=generator, device=device)
    return others + (others >= torch.arange(n_masked, device=device)[:, None])  # step over the frame itself


def contrastive_logits(
    context: Tensor, quantized: Tensor, codes: Tensor, negatives: Tensor, temperature: float
) -> Tensor:
    """(B, M, 1 + K): cosine similarity of context and target over `temperature`; the true target first.

    A negative with the codes of the true target is no negative: -inf. Every similarity within a segment is computed
    once, (B, M, M), and the K of each frame are picked from it: the K targets themselves would take K / M x 256 times
    the memory.

    context, quantized: (B, M, width); codes: (B, M, G); negatives: (B, M, K) of `sample_negatives`
    """
    similarity = F.normalize(context.float(), dim=-1) @ F.normalize(quantized.float(), dim=-1).transpose(1, 2)
    same_target = (codes[:, :, None] == codes[:, None, :]).all(dim=-1)
    candidates = (similarity / temperature).masked_fill(same_target, -math.inf).gather(2, negatives)
    positive = similarity.diagonal(dim1=1, dim2=2)[..., None] / temperature
    return torch.cat([positive, candidates], dim=2)


def contrastive_loss(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(B, M, 1 + K) -> the cross-entropy with the first as target, summed over masked frames; and how many frames are
    right: the first is the largest, and not merely because all are equal."""
    loss = -logits.log_softmax(dim=-1)[..., 0].sum()
    correct = ((logits.argmax(dim=-1) == 0) & (logits.argmin(dim=-1) != 0)).sum()
    return loss, correct


def perplexity(probabilities: Tensor) -> Tensor:
    """(G, V) -> (): the exponential of each codebook's entropy, added up; G (one entry each) to G x V (all equally)"""
    return torch.exp(-(probabilities * torch.log(probabilities + 1e-7)).sum(dim=-1)).sum()


def code_frequencies(codes: Tensor, n_entries: int) -> Tensor:
    """(B, M, G) int64 -> (G, V): how often each entry was chosen"""
    return F.one_hot(codes, n_entries).float().mean(dim=(0, 1))


def diversity_loss(code_probabilities: Tensor) -> Tensor:
    """(G, V) mean softmax -> (): the share of the codebook entries that lies idle, 0 to 1"""
    n_entries = code_probabilities.numel()
    return (n_entries - perplexity(code_probabilities)) / n_entries


def feature_penalty(features: Tensor) -> Tensor:
    """(B, F, C) extractor output before its LayerNorm -> (): the mean square"""
    return features.float().square().mean()


def cmsc_loss(first: Tensor, second: Tensor, temperature: float, patients: Tensor | None = None) -> Tensor:
    """Contrastive multi-segment coding: adjacent segments of one record attract, those of other records repel.

    InfoNCE both ways, averaged over pairs and over both ways. Cosine similarity, with the norms held constant in the
    gradient.

    first, second: (P, D) pooled frames; row i of both is one record
    patients: (P,) int64, the patient of each record, -1 where unknown: two records of one known patient then do not
        repel each other. None: all others repel (the reference's way).
    """
    first, second = _divide_by_norm(first.float()), _divide_by_norm(second.float())
    similarity = first @ second.T / temperature
    pair = torch.arange(len(first), device=first.device)
    if patients is not None:
        same_patient = (patients[:, None] == patients) & (patients >= 0) & (pair[:, None] != pair)
        similarity = similarity.masked_fill(same_patient, -math.inf)
    return (F.cross_entropy(similarity, pair) + F.cross_entropy(similarity.T, pair)) / 2


def _divide_by_norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)
    return x / norm.clamp_min(1e-8)


def pretraining_loss(
    *,
    context: Tensor,
    quantized: Tensor,
    codes: Tensor,
    code_probabilities: Tensor,
    features: Tensor,
    pooled: Tensor,
    negatives: Tensor,
    config: PretrainConfig,
    patients: Tensor | None = None,
) -> PretrainingLoss:
    """W2V + CMSC + RLM on one batch, weighted by `config`; the tensors are those of `model.PretrainOutput`.

    Every part but the contrastive one is a mean and counts once per masked frame, as that is the sum's unit.

    negatives: (B, M, K) of `sample_negatives`
    pooled: (2 P, D), the first segments of all pairs, then the second segments in the same order
    patients: (P,) as in `cmsc_loss`; without effect where `config.same_patient_negatives`
    """
    logits = contrastive_logits(context, quantized, codes, negatives, config.contrastive_temperature)
    count = logits.shape[0] * logits.shape[1]
    contrastive, correct = contrastive_loss(logits)
    first, second = pooled.chunk(2)
    cmsc = cmsc_loss(first, second, config.cmsc_temperature, None if config.same_patient_negatives else patients)
    parts = {
        "contrastive": contrastive,
        "diversity": config.diversity_weight * count * diversity_loss(code_probabilities),
        "feature_penalty": config.feature_penalty_weight * count * feature_penalty(features),
        "cmsc": config.cmsc_weight * count * cmsc,
    }
    return PretrainingLoss(
        total=torch.stack(list(parts.values())).sum(),
        parts={name: part.detach() for name, part in parts.items()},
        correct=correct,
        count=count,
        probability_perplexity=perplexity(code_probabilities.detach()),
        code_perplexity=perplexity(code_frequencies(codes, code_probabilities.shape[1])),
    )
