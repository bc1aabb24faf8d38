"""Scores in parts of the test split."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from ecgfm.contracts import empty_table
from ecgfm.scores.metrics import compare
from ecgfm.scores.subgroups import Part, parts, score_parts


def tables(n: int = 60, **columns: list[object]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Records and their quality: as given, the rest alike."""
    given = {
        "record_id": [f"s/{place}" for place in range(n)],
        "source": ["s"] * n,
        "sampling_rate_hz": [500.0] * n,
        **columns,
    }
    records = pl.concat([empty_table("records"), pl.DataFrame(given)], how="diagonal_relaxed")
    noise = [[float(place), float("nan")] for place in range(n)]
    quality = pl.DataFrame({"record_id": given["record_id"], "lead_noise_uv": noise})
    return records, pl.concat([empty_table("quality"), quality], how="diagonal_relaxed")


def by(found: list[Part], what: str) -> dict[str, int]:
    return {part.name: int(part.rows.sum()) for part in found if part.by == what}


def test_every_record_is_in_one_part_of_each_property() -> None:
    ages = [17.9, 18, 39, 40, 64.5, 65, 79, 80, 101, None] * 6
    sexes = ["female", None, "male"] * 20
    found = parts(*tables(age_years=ages, sex=sexes, dataset=["georgia"] * 30 + [None] * 30))
    assert by(found, "age") == {
        "under 18 years": 6,
        "18 to 39 years": 12,
        "40 to 64 years": 12,
        "65 to 79 years": 12,
        "80 years and over": 12,
        "unknown": 6,
    }
    assert by(found, "sex") == {"female": 20, "male": 20, "unknown": 20}
    assert by(found, "source") == {"s": 30, "s georgia": 30}
    for what in {part.by for part in found}:
        together = np.sum([part.rows for part in found if part.by == what], axis=0)
        assert (together == 1).all()


def test_the_parts_stand_in_order() -> None:
    found = parts(*tables(age_years=[81.0, 20.0, 5.0] * 20, sampling_rate_hz=[1000.0, 250.0, 500.0] * 20))
    assert list(by(found, "age")) == ["under 18 years", "18 to 39 years", "80 years and over"]
    assert list(by(found, "recorded rate")) == ["250 Hz", "500 Hz", "1000 Hz"]


def test_noise_is_parted_in_thirds_of_the_median_over_the_leads_that_tell() -> None:
    assert list(by(parts(*tables()), "noise from 30 to 100 Hz").values()) == [20, 20, 20]


def test_the_most_common_sites_and_devices_are_parts_and_the_rest_is_one() -> None:
    """Each of their own would be dozens of parts of a few records."""
    sites = ["abcdefghijklmno"[place % 15] for place in range(59)] + [None]
    found = by(parts(*tables(site=sites, device=["A"] * 50 + ["B"] * 10)), "site")
    assert list(found) == [*"abcdefghij", "all others", "unknown"]
    assert list(found.values()) == [*[4] * 10, 19, 1]
    assert by(parts(*tables(device=["A"] * 50 + ["B"] * 10)), "device") == {"A": 50, "B": 10}


def test_a_property_that_parts_nothing_is_left_out() -> None:
    assert {part.by for part in parts(*tables())} == {"noise from 30 to 100 Hz"}


def test_a_part_is_scored_as_its_records_alone_are() -> None:
    random = np.random.default_rng(0)
    truth = (random.random((80, 3)) < 0.4).astype(float)
    probabilities = np.clip(truth * 0.4 + random.random((80, 3)) * 0.6, 0, 1)
    patients = [f"p{place // 2}" for place in range(80)]
    half = np.arange(80) < 40
    (scored,) = score_parts(
        [Part("x", "first", half)], truth, probabilities, ["a", "b", "c"], patients, n_replicates=50
    )
    alone = compare(truth[:40], {"m": probabilities[:40]}, ["a", "b", "c"], patients[:40], n_replicates=50)["m"]
    assert scored.scores == alone
    assert scored.scores.n_patients == 20


def test_a_part_without_both_classes_of_any_label_has_no_macro_mean() -> None:
    truth = np.zeros((6, 1))
    (scored,) = score_parts([Part("x", "all", np.ones(6, bool))], truth, truth, ["a"], [None] * 6, n_replicates=5)
    assert scored.scores.macro_auroc is None
    assert scored.scores.left_out == ("a",)


def test_records_and_quality_must_be_of_one_order() -> None:
    records, quality = tables()
    with pytest.raises(AssertionError):
        parts(records, quality.reverse())
