"""From one dataset to another: what is held back stays unseen, and thresholds are those of the valid records alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jinja2
import numpy as np
import polars as pl
import pytest
import sklearn.metrics
from markupsafe import Markup

from ecgfm.contracts import empty_table
from ecgfm.pages.transfer import sections
from ecgfm.scores.assessment import as_json
from ecgfm.scores.between_sources import (
    MIN_RECORDS,
    BetweenSources,
    Records,
    Untold,
    leave_one_out,
    origins,
    transfer_thresholds,
)
from ecgfm.scores.metrics import best_f1_threshold
from ecgfm.scores.probe import linear_probe

LABELS = ["a", "b"]
DRAWS: dict[str, Any] = {"n_replicates": 60, "confidence": 0.95, "seed": 0}


def made(seed: int = 0, n: int = 120) -> tuple[dict[str, np.ndarray], dict[str, Records]]:
    """Two origins. Label a is the sign of feature 0 in `one` and the opposite in `two`; label b is feature 1's in
    both."""
    random = np.random.default_rng(seed)
    embeddings, records = {}, {}
    for split in ("train", "valid", "test"):
        x = random.normal(size=(n, 4)).astype(np.float32)
        of = np.array(["one", "two"])[np.arange(n) % 2]
        sign = np.where(of == "one", 1.0, -1.0)
        noisy = x + random.normal(scale=0.5, size=x.shape)
        truth = np.stack([noisy[:, 0] * sign > 0.3, noisy[:, 1] > 0.3], axis=1).astype(np.float64)
        truth[::17, 0] = np.nan
        embeddings[split] = x
        records[split] = Records(truth, of, [f"{split}{row // 3}" for row in range(n)])
    return embeddings, records


def frame(rows: list[tuple[str, str, str | None]]) -> pl.DataFrame:
    schema = {"record_id": pl.String, "source": pl.String, "dataset": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")


def test_an_origin_is_a_published_dataset_and_those_that_share_an_ecg_are_one() -> None:
    rows: list[tuple[str, str, str | None]] = [
        ("c/1", "c", "georgia"),
        ("c/2", "c", "ptb-xl"),
        ("p/1", "p", None),
        ("p/2", "p", None),
        ("q/1", "q", None),
    ]
    none = empty_table("duplicates")
    assert origins(frame(rows), none) == {
        "c/1": "c georgia",
        "c/2": "c ptb-xl",
        "p/1": "p",
        "p/2": "p",
        "q/1": "q",
    }
    schema = {"record_id": pl.String, "group_id": pl.String}
    shared = pl.DataFrame([("c/2", "c/2"), ("p/1", "c/2")], schema=schema, orient="row")
    assert set(origins(frame(rows), shared).values()) == {"c georgia", "c ptb-xl = p", "q"}
    chain = pl.concat([shared, pl.DataFrame([("p/2", "p/2"), ("q/1", "p/2")], schema=schema, orient="row")])
    assert set(origins(frame(rows), chain).values()) == {"c georgia", "c ptb-xl = p = q"}
    assert len(set(origins(frame(rows), chain).values())) == 2


def test_nothing_of_the_origin_that_is_left_out_reaches_the_probe() -> None:
    embeddings, records = made()
    found, untold = leave_one_out(embeddings, records, LABELS, **DRAWS)
    assert [one.origin for one in found] == ["one", "two"]
    assert untold == []
    rows = {split: one.origins == "one" for split, one in records.items()}
    spoilt, truths = dict(embeddings), dict(records)
    for split in ("train", "valid"):
        spoilt[split] = np.where(rows[split][:, None], 100.0, embeddings[split]).astype(np.float32)
        truths[split] = records[split]._replace(
            truth=np.where(rows[split][:, None], 1 - records[split].truth, records[split].truth)
        )
    again, _ = leave_one_out(spoilt, truths, LABELS, **DRAWS)
    assert again[0].unseen == found[0].unseen
    assert again[0].seen != found[0].seen


def test_the_probe_that_has_not_seen_it_is_the_one_fitted_on_the_other() -> None:
    embeddings, records = made()
    found, _ = leave_one_out(embeddings, records, LABELS, **DRAWS)
    for one in found:
        other = {split: r.origins != one.origin for split, r in records.items()}
        own = ~other["test"]
        probe = linear_probe(
            (embeddings["train"][other["train"]], records["train"].truth[other["train"]]),
            (embeddings["valid"][other["valid"]], records["valid"].truth[other["valid"]]),
            embeddings["test"][own],
            LABELS,
        )
        for k, label in enumerate(one.unseen.labels):
            known = ~np.isnan(records["test"].truth[own, k])
            expected = sklearn.metrics.roc_auc_score(
                records["test"].truth[own, k][known], probe.probabilities[known, k]
            )
            assert label.auroc is not None
            assert label.auroc.value == pytest.approx(expected, abs=1e-12)
            assert label.n == known.sum()
        assert one.n_train == 60
        for measure in ("macro_auroc", "macro_auprc"):
            difference, unseen, seen = (getattr(scores, measure) for scores in (one.difference, one.unseen, one.seen))
            assert difference.value == pytest.approx(unseen.value - seen.value)
        assert one.unseen.labels[0].auroc is not None
        assert one.unseen.labels[1].auroc is not None
        assert one.unseen.labels[0].auroc.value < 0.3, "what it learnt elsewhere is the opposite here"
        assert one.unseen.labels[1].auroc.value > 0.8, "and this is the same everywhere"


def test_a_label_that_the_others_do_not_teach_is_left_out_and_said() -> None:
    embeddings, records = made()
    truth = records["train"].truth.copy()
    truth[records["train"].origins == "two", 0] = 0
    records["train"] = records["train"]._replace(truth=truth)
    found, _ = leave_one_out(embeddings, records, LABELS, **DRAWS)
    without_one, without_two = found
    assert without_one.not_learnt == ("a",)
    assert [label.label for label in without_one.unseen.labels] == ["b"]
    assert [label.label for label in without_one.seen.labels] == ["b"], "both are of the same labels"
    assert without_two.not_learnt == ()


def test_what_cannot_be_told_is_said_with_its_reason() -> None:
    embeddings, records = made()
    few = np.where(np.arange(120) < MIN_RECORDS - 1, "few", records["test"].origins)
    names = records["train"].origins.copy()
    names[:5] = "few"
    many = {**records, "train": records["train"]._replace(origins=names), "test": records["test"]._replace(origins=few)}
    _, untold = leave_one_out(embeddings, many, LABELS, **DRAWS)
    assert untold == [Untold("few", f"{MIN_RECORDS - 1} test records")]
    strangers = {**records, "train": records["train"]._replace(origins=np.full(120, "one"))}
    found, untold = leave_one_out(embeddings, strangers, LABELS, **DRAWS)
    assert [one.of for one in untold] == ["one", "two"]
    assert [one.why for one in untold] == [
        "no label that the others teach has both classes in its test records",
        "no train records",
    ]
    assert found == []


def scored() -> tuple[Records, np.ndarray, Records, np.ndarray]:
    """Valid and test of one model whose probabilities are twice as high in `one` as in `two`."""
    random = np.random.default_rng(3)
    found: list[Any] = []
    for split in ("valid", "test"):
        of = np.array(["one", "two"])[np.arange(200) % 2]
        truth = (random.random((200, 2)) < 0.35).astype(np.float64)
        p = np.clip(0.25 + 0.15 * truth + random.normal(scale=0.05, size=truth.shape), 0, 0.5)
        truth[::13, 1] = np.nan
        found += [
            Records(truth, of, [f"{split}{row // 2}" for row in range(200)]),
            p * np.where(of == "one", 2, 1)[:, None],
        ]
    return found[0], found[1], found[2], found[3]


def test_thresholds_are_of_the_valid_records_of_one_and_decide_on_the_test_records_of_the_other() -> None:
    valid, on_valid, test, on_test = scored()
    transfers, untold = transfer_thresholds(valid, on_valid, test, on_test, LABELS, **DRAWS)
    assert untold == []
    cells = {(one.fitted_on, one.applied_to): one for one in transfers}
    assert set(cells) == {(a, b) for a in ("one", "two") for b in ("one", "two")}
    for (fitted_on, applied_to), cell in cells.items():
        f1 = []
        for k, label in enumerate(cell.labels):
            mine = (valid.origins == fitted_on) & ~np.isnan(valid.truth[:, k])
            threshold = best_f1_threshold(valid.truth[mine, k], on_valid[mine, k])
            theirs = (test.origins == applied_to) & ~np.isnan(test.truth[:, k])
            truth, called = test.truth[theirs, k], on_test[theirs, k] >= threshold
            assert label.point.threshold == threshold
            assert label.sensitivity == pytest.approx(sklearn.metrics.recall_score(truth, called))
            assert label.specificity == pytest.approx(sklearn.metrics.recall_score(1 - truth, ~called))
            assert label.f1 == pytest.approx(sklearn.metrics.f1_score(truth, called))
            assert sum(label.point[1:]) == theirs.sum()
            f1.append(label.f1)
        assert cell.macro_f1 is not None
        assert cell.macro_f1.value == pytest.approx(np.mean(f1))
        assert cell.macro_f1.low is not None
        assert cell.macro_f1.high is not None
        assert cell.macro_f1.low <= cell.macro_f1.value <= cell.macro_f1.high
        assert (cell.difference is None) == (fitted_on == applied_to)
        if cell.difference is not None:
            own = cells[applied_to, applied_to].macro_f1
            assert own is not None
            assert cell.difference.value == pytest.approx(cell.macro_f1.value - own.value)
            assert cell.difference.high is not None
            assert cell.difference.high < 0, "thresholds of another scale are of no use"


def test_thresholds_do_not_see_the_test_records() -> None:
    valid, on_valid, test, on_test = scored()
    transfers, _ = transfer_thresholds(valid, on_valid, test, on_test, LABELS, **DRAWS)
    others, _ = transfer_thresholds(valid, on_valid, test._replace(truth=1 - test.truth), on_test, LABELS, **DRAWS)
    assert [[x.point.threshold for x in one.labels] for one in transfers] == [
        [x.point.threshold for x in one.labels] for one in others
    ]


def test_a_label_without_a_threshold_of_both_is_not_compared() -> None:
    valid, on_valid, test, on_test = scored()
    truth = valid.truth.copy()
    truth[valid.origins == "two", 0] = 0
    transfers, untold = transfer_thresholds(valid._replace(truth=truth), on_valid, test, on_test, LABELS, **DRAWS)
    assert untold == []
    labels = {(one.fitted_on, one.applied_to): [x.label for x in one.labels] for one in transfers}
    assert labels == {("one", "one"): ["a", "b"], ("one", "two"): ["b"], ("two", "one"): ["b"], ("two", "two"): ["b"]}
    truth[valid.origins == "two"] = 0
    transfers, untold = transfer_thresholds(valid._replace(truth=truth), on_valid, test, on_test, LABELS, **DRAWS)
    assert transfers == [], "of one origin alone there is nothing to compare"
    assert untold == [Untold("two", "no label has both classes in its valid records")]


def test_the_page_shows_every_number_with_its_interval_and_what_is_missing() -> None:
    embeddings, records = made()
    left_out, _ = leave_one_out(embeddings, records, LABELS, **DRAWS)
    left_out[0] = replace(left_out[0], not_learnt=("<b>",))
    transfers, _ = transfer_thresholds(*scored(), LABELS, **DRAWS)
    between = BetweenSources(
        ("one", "two"), tuple(left_out), tuple(transfers), (Untold("three", "2 test records"),), ()
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "count": str,
        "counted": lambda n, noun: f"{n} {noun}s",
        "decimals": lambda value: f"{value:.3f}",
        "signed": lambda value: f"{value:+.3f}",
        "interval": lambda estimate, signed: f"[{estimate.low:.3f} {estimate.high:.3f}]",
        "percent": str,
        "words": str,
    }
    page = sections(environment, between)
    for one in left_out:
        for estimate in (one.seen.macro_auroc, one.unseen.macro_auprc, one.difference.macro_auroc):
            assert estimate is not None
            assert f"{estimate.value:.3f}" in page
            assert f"[{estimate.low:.3f} {estimate.high:.3f}]" in page
    for cell in transfers:
        assert cell.macro_f1 is not None
        assert f"{cell.macro_f1.value:.3f}" in page
        if cell.difference is not None:
            assert f"{cell.difference.value:+.3f} to its own" in page
    assert "three (2 test records)" in page
    assert "&lt;b&gt;" in page
    assert sections(environment, None) == Markup()
    assert as_json(between)["transfers"][0]["labels"][0]["point"]["true_positives"] >= 0
