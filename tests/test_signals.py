"""One record's signal. The judges: numpy.interp, sample by sample loops, and physics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecgfm.ecg import INVALID, LEADS, Digital, EcgRecord, Rejected
from ecgfm.signals import cut_segments, lead_statistics, present_leads, resample_linear, to_standard_leads


def record_of(leads: tuple[str, ...], signal_mv: np.ndarray, digital: Digital | None = None) -> EcgRecord:
    return EcgRecord("test/1", leads, 500.0, signal_mv if digital is None else digital)


# ---- leads


def test_leads_are_matched_by_name_in_any_case_and_put_in_order() -> None:
    leads = ("v6", "AVF", "avl", "II", "V1", "resp", "i")
    signal_mv = np.arange(len(leads))[:, None] + np.zeros(3)
    record = record_of(leads, signal_mv)
    standard = to_standard_leads(record)
    assert standard.leads == LEADS
    expected = {"V6": 0.0, "aVF": 1.0, "aVL": 2.0, "II": 3.0, "V1": 4.0, "I": 6.0}
    for lead, signal in zip(LEADS, standard.signal_mv, strict=True):
        np.testing.assert_array_equal(signal, np.full(3, expected.get(lead, np.nan)))
    assert present_leads(record) == ["I", "II", "aVL", "aVF", "V1", "V6"]


def test_stored_values_gains_and_baselines_move_with_their_lead() -> None:
    rng = np.random.default_rng(0)
    order = rng.permutation(12)
    digital = Digital(
        rng.integers(-900, 900, (12, 40)).astype(np.int16), rng.uniform(1, 900, 12), rng.normal(0, 50, 12)
    )
    digital.digital[3, 5] = INVALID
    standard = to_standard_leads(record_of(tuple(LEADS[lead] for lead in order), digital.to_mv(), digital))
    assert standard.digital is not None
    np.testing.assert_array_equal(standard.digital.to_mv(), standard.signal_mv)
    for row, lead in enumerate(order):
        np.testing.assert_array_equal(standard.digital.digital[lead], digital.digital[row])
        np.testing.assert_array_equal(standard.signal_mv[lead], digital.to_mv()[row])
    assert np.isnan(standard.signal_mv).sum() == 1


def test_a_missing_lead_is_invalid_over_its_whole_length_stored_too() -> None:
    digital = Digital(np.ones((1, 4), np.int16), np.array([200.0]), np.array([0.0]))
    standard = to_standard_leads(record_of(("V2",), digital.to_mv(), digital))
    assert standard.digital is not None
    present = np.array([lead == "V2" for lead in LEADS])
    assert (standard.digital.digital[~present] == INVALID).all()
    assert np.isnan(standard.signal_mv[~present]).all()
    assert np.isnan(standard.digital.to_mv()[~present]).all()
    np.testing.assert_array_equal(standard.signal_mv[present], np.full((1, 4), 0.005))


@pytest.mark.parametrize(
    ("leads", "reason"),
    [
        (("I", "II", "ii"), "duplicate_lead"),
        (("V1", "V1"), "duplicate_lead"),
        (("resp", "MLII"), "no_standard_lead"),
        ((), "no_standard_lead"),
    ],
)
def test_records_without_or_with_twice_the_same_lead_are_turned_away(leads: tuple[str, ...], reason: str) -> None:
    with pytest.raises(Rejected) as rejected:
        to_standard_leads(record_of(leads, np.zeros((len(leads), 5))))
    assert rejected.value.reason == reason
    assert ", ".join(leads) in rejected.value.detail


def test_another_lead_twice_does_no_harm() -> None:
    standard = to_standard_leads(record_of(("resp", "I", "resp"), np.arange(3.0)[:, None] + np.zeros(2)))
    np.testing.assert_array_equal(standard.signal_mv[0], [1.0, 1.0])


# ---- resampling


def slow_resample(signal_mv: np.ndarray, from_hz: float, to_hz: float) -> np.ndarray:
    """The definition: evenly spaced points, the first on the first sample and the last on the last."""
    n_old = signal_mv.shape[1]
    n_new = int(n_old * to_hz / from_hz)
    places = np.linspace(0, n_old - 1, n_new)
    return np.stack([np.interp(places, np.arange(n_old), lead) for lead in signal_mv])


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 60),
    st.sampled_from([100.0, 128.0, 250.0, 257.0, 360.0, 400.0, 499.9, 500.0, 999.0, 1000.0]),
    st.sampled_from([100.0, 250.0, 500.0]),
    st.integers(0, 2**32 - 1),
)
def test_resampling_interpolates(n_samples: int, from_hz: float, to_hz: float, seed: int) -> None:
    signal_mv = np.random.default_rng(seed).normal(size=(2, n_samples))
    resampled = resample_linear(signal_mv, from_hz, to_hz)
    assert resampled.shape == (2, int(n_samples * to_hz / from_hz))
    np.testing.assert_allclose(resampled, slow_resample(signal_mv, from_hz, to_hz), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n_samples", "from_hz"), [(4096, 400.0), (38_400, 1000.0), (5000, 257.0), (1205, 400.0)])
def test_first_and_last_samples_are_aligned(n_samples: int, from_hz: float) -> None:
    signal_mv = np.random.default_rng(1).normal(size=(12, n_samples))
    resampled = resample_linear(signal_mv, from_hz, 500.0)
    assert resampled.shape == (12, int(n_samples * 500 / from_hz))
    np.testing.assert_array_equal(resampled[:, 0], signal_mv[:, 0])
    np.testing.assert_allclose(resampled[:, -1], signal_mv[:, -1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("from_hz", [257.0, 400.0, 1000.0])
def test_a_sine_stays_that_sine(from_hz: float) -> None:
    """Within the error of linear interpolation, (2 pi f)^2 step^2 / 8, and of the ends' alignment, half a sample."""
    seconds, hz = 10, 5.0
    old_s = np.arange(int(seconds * from_hz)) / from_hz
    resampled = resample_linear(np.sin(2 * np.pi * hz * old_s)[None], from_hz, 500.0)[0]
    new_s = np.arange(len(resampled)) / 500.0
    drift_s = abs(1 / from_hz - 1 / 500)  # the last samples are at seconds - one step, of either rate
    bound = (2 * np.pi * hz / from_hz) ** 2 / 8 + 2 * np.pi * hz * drift_s
    assert np.abs(resampled - np.sin(2 * np.pi * hz * new_s)).max() <= bound
    assert bound < 0.1


def test_at_the_same_rate_nothing_is_touched() -> None:
    signal_mv = np.random.default_rng(2).normal(size=(12, 100))
    assert resample_linear(signal_mv, 500.0, 500.0) is signal_mv


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 49), st.sampled_from([250.0, 400.0, 1000.0]))
def test_an_invalid_sample_makes_only_its_neighbours_invalid(at: int, from_hz: float) -> None:
    signal_mv = np.random.default_rng(3).normal(size=(2, 50))
    whole = resample_linear(signal_mv, from_hz, 500.0)
    signal_mv[1, at] = np.nan
    resampled = resample_linear(signal_mv, from_hz, 500.0)
    places = np.linspace(0, 49, resampled.shape[1])
    near = np.abs(places - at) < 1 - 1e-9
    np.testing.assert_array_equal(np.isnan(resampled[1]), near)
    np.testing.assert_array_equal(resampled[1, ~near], whole[1, ~near])
    np.testing.assert_array_equal(resampled[0], whole[0])


@pytest.mark.parametrize("value", [0.0, 0.1, -0.3, 1 / 3, 1e-9, 123.456])
@pytest.mark.parametrize("from_hz", [257.0, 400.0, 1000.0])
def test_a_constant_lead_stays_exactly_constant(value: float, from_hz: float) -> None:
    resampled = resample_linear(np.full((1, 999), value), from_hz, 500.0)
    assert (resampled == value).all()
    assert lead_statistics(resampled).constant.all()


@pytest.mark.parametrize("from_hz", [257.0, 400.0, 500.0, 1000.0])
def test_einthovens_law_survives(from_hz: float) -> None:
    rng = np.random.default_rng(4)
    first, second = rng.normal(size=(2, 1000))
    limb = {"aVR": -(first + second) / 2, "I": first, "III": second - first, "II": second}
    standard = to_standard_leads(record_of(tuple(limb), np.stack(list(limb.values()))))
    resampled = dict(zip(LEADS, resample_linear(standard.signal_mv, from_hz, 500.0), strict=True))
    np.testing.assert_allclose(resampled["I"] + resampled["III"], resampled["II"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(resampled["aVR"], -(resampled["I"] + resampled["II"]) / 2, rtol=0, atol=1e-12)


def test_a_record_too_short_for_one_new_sample_has_none() -> None:
    resampled = resample_linear(np.ones((12, 1)), 1000.0, 500.0)
    assert resampled.shape == (12, 0)
    assert not lead_statistics(resampled).constant.any()


# ---- statistics


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.2, 0.9]))
def test_statistics_are_those_of_the_valid_samples(n_samples: int, seed: int, invalid_share: float) -> None:
    rng = np.random.default_rng(seed)
    signal_mv = rng.normal(1, 2, size=(12, n_samples))
    signal_mv[rng.random(signal_mv.shape) < invalid_share] = np.nan
    found = lead_statistics(signal_mv)
    for lead, samples in enumerate(signal_mv):
        valid = [sample for sample in samples.tolist() if not math.isnan(sample)]
        assert found.invalid[lead] == (len(valid) < n_samples)
        assert found.constant[lead] == (len(set(valid)) == 1)
        if not valid:
            assert np.isnan([found.mean_mv[lead], found.std_mv[lead]]).all()
            continue
        mean = sum(valid) / len(valid)
        std = (sum((sample - mean) ** 2 for sample in valid) / len(valid)) ** 0.5
        np.testing.assert_allclose([found.mean_mv[lead], found.std_mv[lead]], [mean, std], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, -0.3, 1 / 3, 1e-9, 123.456])
def test_a_constant_lead_has_a_deviation_of_exactly_zero(value: float) -> None:
    signal_mv = np.full((2, 5000), value)
    signal_mv[1, 7] = np.nan
    found = lead_statistics(signal_mv)
    assert found.std_mv.tolist() == [0.0, 0.0]
    assert found.constant.tolist() == [True, True]
    assert found.invalid.tolist() == [False, True]
    np.testing.assert_allclose(found.mean_mv, value, rtol=1e-12)


def test_a_lead_that_differs_in_one_last_bit_is_not_constant() -> None:
    signal_mv = np.full((1, 5000), 0.1)
    signal_mv[0, 1] = np.nextafter(0.1, 1)
    assert not lead_statistics(signal_mv).constant.any()


def test_no_sample_at_all_has_no_statistics() -> None:
    found = lead_statistics(np.zeros((12, 0)))
    assert np.isnan(found.mean_mv).all()
    assert np.isnan(found.std_mv).all()
    assert not found.constant.any()


# ---- segments


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 50), st.integers(1, 20))
def test_segments_are_cut_from_the_start_without_overlap_and_the_tail_is_dropped(n_samples: int, length: int) -> None:
    samples = np.arange(12 * n_samples).reshape(12, n_samples)
    segments = cut_segments(samples, length)
    assert segments.shape == (n_samples // length, 12, length)
    for index, segment in enumerate(segments):
        np.testing.assert_array_equal(segment, samples[:, index * length : (index + 1) * length])
