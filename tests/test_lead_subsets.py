"""A model that is shown fewer leads: nothing of the others reaches it, and all leads are as ever."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from training_data import TINY, write_inputs

from ecgfm.checkpoints import Meta
from ecgfm.config import EvaluateConfig
from ecgfm.data import Shards
from ecgfm.ecg import LEADS
from ecgfm.label_space import LabelSpace, read_label_space
from ecgfm.lead_subsets import SUBSETS, leads_alone, score_lead_subsets, subsets_of, with_leads
from ecgfm.model import Classifier
from ecgfm.predict import Labelled, calibrated, read_labelled, record_probabilities, segment_outputs
from ecgfm.scores.metrics import point_scores

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier(TINY, 2).eval()


def read(folder: Path) -> tuple[Labelled, Shards, LabelSpace]:
    inputs = write_inputs(folder, n_train=8, n_valid=6)
    space = read_label_space(inputs["manifests"] / "label_space.yaml")
    return read_labelled(inputs["manifests"], "valid", space), Shards(inputs["slices"]), space


def test_all_leads_are_the_ordinary_predictions_exactly(model: Classifier, tmp_path: Path) -> None:
    labelled, shards, space = read(tmp_path)
    meta = Meta(
        "finetuned", TINY, LEADS, 100.0, 256, labels=tuple(space.names), temperature={"fast": 1.7}, shift={"fast": -0.4}
    )
    logits = segment_outputs(model, labelled.segments, shards, 4, CPU).logits
    assert logits is not None
    ordinary = calibrated(record_probabilities(logits, labelled, space)[0], space.names, meta.temperature, meta.shift)
    config = EvaluateConfig(batch_size=4)
    everything = with_leads(model, LEADS, labelled, shards, space, meta, config, CPU)
    assert everything.tobytes() == ordinary.tobytes()
    two = with_leads(model, ("I", "II"), labelled, shards, space, meta, config, CPU)
    assert (two != ordinary).any()
    again = segment_outputs(model, labelled.segments, shards, 4, CPU).logits
    assert again is not None
    assert again.tobytes() == logits.tobytes(), "the model itself is as it was"


@pytest.mark.parametrize("kept", SUBSETS[1:], ids=" ".join)
def test_what_the_other_leads_hold_changes_nothing(model: Classifier, kept: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    signal = torch.randn(3, len(LEADS), 500, generator=generator)
    others = [LEADS.index(lead) for lead in LEADS if lead not in kept]
    changed = signal.clone()
    changed[:, others] = signal[:, others[1:] + others[:1]].flip(2) * 7
    zeroed = signal.clone()
    zeroed[:, others] = 0
    with torch.inference_mode():
        assert (model(signal).logits != model(changed).logits).any()
        with leads_alone(model, LEADS, kept):
            seen = [model(one).logits for one in (signal, changed, zeroed)]
        assert torch.equal(seen[0], seen[1])
        assert torch.equal(seen[0], seen[2])
        assert torch.equal(seen[0], model(zeroed).logits), "outside it the same, of leads that are missing"
        exchanged = signal.clone()
        mine = [LEADS.index(lead) for lead in kept]
        exchanged[:, mine] = signal[:, mine].flip(2)
        with leads_alone(model, LEADS, kept):
            assert (model(exchanged).logits != seen[0]).any(), "the leads that are kept do matter"


def test_only_sets_that_are_a_part_of_the_leads_are_asked_for() -> None:
    assert [len(one) for one in subsets_of(LEADS)] == [6, 4, 3, 2, 1]
    assert subsets_of(("II", "I")) == [("I",)]
    assert subsets_of(("I", "II", "V2")) == [("I", "II"), ("I",)]
    assert subsets_of(("II", "V1")) == []


def test_differences_are_to_all_leads_on_the_same_records() -> None:
    random = np.random.default_rng(0)
    truth = (random.random((60, 2)) < 0.4).astype(float)
    good, poor = (truth + random.normal(scale=scale, size=truth.shape) for scale in (0.4, 1.5))
    patients = [f"p{row // 2}" for row in range(60)]
    by_leads = {tuple(LEADS): good, ("I", "II"): poor}
    draws = {"n_replicates": 200, "confidence": 0.95, "seed": 0}
    everything, two = score_lead_subsets(by_leads, truth, ["a", "b"], patients, **draws)  # type: ignore[arg-type]
    assert [everything.name, two.name] == ["all 12", "2: I II"]
    assert {everything.by, two.by} == {"leads"}
    assert everything.difference is None
    assert two.difference is not None
    assert two.difference.macro_auroc is not None
    expected = point_scores(truth, poor).auroc.mean() - point_scores(truth, good).auroc.mean()
    assert two.difference.macro_auroc.value == pytest.approx(expected)
    assert two.difference.macro_auroc.high is not None
    assert two.difference.macro_auroc.high < 0
    assert two.scores.n_records == 60
    assert two.scores.n_patients == 30
    assert score_lead_subsets({("II", "V1"): good}, truth, ["a", "b"], patients, **draws) == []  # type: ignore[arg-type]
