"""The finetuned model asked with fewer leads than it was trained on, by the sets of the Challenge 2021.

A lead that is left out is a row of zeros after standardisation, which is what a missing lead is too, and what a masked
one was in pretraining. The statistics that standardise a lead are its own, so that nothing of a lead left out remains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ecgfm.checkpoints import Meta
from ecgfm.config import EvaluateConfig
from ecgfm.data import Shards
from ecgfm.label_space import LabelSpace
from ecgfm.model import Classifier
from ecgfm.predict import Labelled, calibrated, record_probabilities, segment_outputs
from ecgfm.scores.metrics import compare
from ecgfm.scores.subgroups import PartScores

SUBSETS = (
    ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"),
    ("I", "II", "III", "aVR", "aVL", "aVF"),
    ("I", "II", "III", "V2"),
    ("I", "II", "V2"),
    ("I", "II"),
    ("I",),
)
"""Those of the PhysioNet/Computing in Cardiology Challenge 2021 (Reyna et al., doi 10.23919/CinC53138.2021.9662687),
and lead I alone, as a watch records it."""


def subsets_of(leads: Sequence[str]) -> list[tuple[str, ...]]:
    """Those of `SUBSETS` that are a part of some leads, and not all of them."""
    return [one for one in SUBSETS if set(one) < set(leads)]


@contextmanager
def leads_alone(model: Classifier, leads: Sequence[str], kept: Sequence[str]) -> Iterator[None]:
    """Inside, the model sees zeros in every lead but those kept. leads: its own, in their order."""
    dropped = torch.tensor([lead not in kept for lead in leads])

    def leave_out(module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        signal, *rest = arguments
        return signal.masked_fill(dropped.to(signal.device)[:, None], 0), *rest

    handle = model.register_forward_pre_hook(leave_out)
    try:
        yield
    finally:
        handle.remove()


def with_leads(
    model: Classifier,
    kept: Sequence[str],
    labelled: Labelled,
    shards: Shards,
    space: LabelSpace,
    meta: Meta,
    config: EvaluateConfig,
    device: torch.device,
) -> np.ndarray:
    """(record, label) probabilities of a model, calibrated as `meta` says, that is shown the leads `kept` alone."""
    with leads_alone(model, shards.leads, kept):
        logits = segment_outputs(model, labelled.segments, shards, config.batch_size, device, config.precision).logits
    assert logits is not None
    return calibrated(
        record_probabilities(logits, labelled, space)[0], space.names, meta.temperature, meta.shift, space.task
    )


def score_lead_subsets(
    by_leads: Mapping[tuple[str, ...], np.ndarray],
    truth: np.ndarray,
    labels: Sequence[str],
    patients: Sequence[str | None],
    *,
    n_replicates: int,
    confidence: float,
    seed: int,
) -> list[PartScores]:
    """The scores with each set of leads, and their difference to those with the first set, all leads; nothing where
    there is no other.

    by_leads: (record, label) probabilities; truth: (record, label) 0, 1, or NaN for unknown; patients: (record,)
    """
    if len(by_leads) == 1:
        return []
    names = [" ".join(leads) for leads in by_leads]
    scores = compare(
        truth,
        dict(zip(names, by_leads.values(), strict=True)),
        labels,
        patients,
        differences=[(name, names[0]) for name in names[1:]],
        n_replicates=n_replicates,
        confidence=confidence,
        seed=seed,
    )
    shown = [f"all {len(next(iter(by_leads)))}", *(f"{name.count(' ') + 1}: {name}" for name in names[1:])]
    return [
        PartScores("leads", as_shown, scores[name], scores.get(f"{name} - {names[0]}"))
        for as_shown, name in zip(shown, names, strict=True)
    ]
