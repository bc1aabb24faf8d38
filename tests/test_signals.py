"""One record's signal. The judges: numpy.interp, exact fractions, sample by sample loops, and physics."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecgfm.ecg import INVALID, LEADS, Digital, EcgRecord, Rejected
from ecgfm.signals import (
    bandpass,
    bridge_gaps,
    cut_segments,
    digital_statistics,
    lead_statistics,
    notch,
    present_leads,
    resample_linear,
    resample_polyphase,
    to_standard_leads,
)


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


def test_chosen_leads_come_in_the_chosen_order_and_the_others_are_left_out() -> None:
    record = record_of(("I", "V1", "ii", "V5"), np.arange(4.0)[:, None] + np.zeros(3))
    chosen = to_standard_leads(record, ("V5", "aVR", "I"))
    assert chosen.leads == ("V5", "aVR", "I")
    np.testing.assert_array_equal(chosen.signal_mv[:, 0], [3.0, np.nan, 0.0])
    assert present_leads(record, ("V5", "aVR", "I")) == ["V5", "I"]
    with pytest.raises(Rejected, match="no_standard_lead: expected some of V3, found I, V1, ii, V5"):
        to_standard_leads(record, ("V3",))


def test_leads_that_are_in_order_already_are_not_copied_and_no_millivolt_is_worked_out() -> None:
    digital = Digital(np.ones((12, 4), np.int16), np.full(12, 200.0), np.zeros(12))
    record = record_of(LEADS, np.empty(0), digital)
    standard = to_standard_leads(record)
    assert isinstance(standard.signal, Digital)
    assert standard.signal.digital is digital.digital
    turned = to_standard_leads(record_of(LEADS[::-1], np.empty(0), digital))
    assert isinstance(turned.signal, Digital)
    assert not any("signal_mv" in vars(each) for each in (record, standard, turned))


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


def exact_statistics(digital: Digital, lead: int) -> tuple[float, float]:
    """Mean and standard deviation by fractions: only the last step rounds."""
    gain, baseline = Fraction(digital.adc_gain_per_mv[lead]), Fraction(digital.baseline[lead])
    valid = [Fraction(int(value)) for value in digital.digital[lead] if value != INVALID]
    mean = sum(valid, Fraction()) / len(valid)
    variance = sum(((value - mean) ** 2 for value in valid), Fraction()) / len(valid)
    return float((mean - baseline) / gain), math.sqrt(variance / gain**2)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.2, 0.9]),
    st.sampled_from([0, 5, 32767]),
)
def test_digital_statistics_are_exact(n_samples: int, seed: int, invalid_share: float, size: int) -> None:
    rng = np.random.default_rng(seed)
    stored = rng.integers(-size, size + 1, (4, n_samples)).astype(np.int16)
    stored[rng.random(stored.shape) < invalid_share] = INVALID
    digital = Digital(stored, rng.uniform(0.1, 9000, 4), np.rint(rng.uniform(-40_000, 40_000, 4)))
    found, judge = digital_statistics(digital), lead_statistics(digital.to_mv())
    np.testing.assert_array_equal(found.invalid, judge.invalid)
    np.testing.assert_array_equal(found.constant, judge.constant)
    for lead in range(4):
        if (stored[lead] == INVALID).all():
            assert np.isnan([found.mean_mv[lead], found.std_mv[lead]]).all()
            continue
        mean, std = exact_statistics(digital, lead)
        np.testing.assert_allclose([found.mean_mv[lead], found.std_mv[lead]], [mean, std], rtol=1e-15, atol=0)
        assert found.constant[lead] == (found.std_mv[lead] == 0)


@pytest.mark.parametrize("baseline", [0.0, -2000.0, 31_000.0])
def test_both_statistics_agree_on_whole_recordings(baseline: float) -> None:
    rng = np.random.default_rng(7)
    stored = np.clip(np.cumsum(rng.normal(0, 30, (12, 5000)), axis=1), -30_000, 30_000).astype(np.int16)
    digital = Digital(stored, rng.uniform(100, 5000, 12), np.full(12, baseline))
    found, judge = digital_statistics(digital), lead_statistics(digital.to_mv())
    scale_mv = np.abs(digital.to_mv()).max(axis=1)  # a mean near 0 is a sum of what is not
    assert (np.abs(found.mean_mv - judge.mean_mv) <= 1e-12 * np.maximum(np.abs(found.mean_mv), scale_mv)).all()
    np.testing.assert_allclose(found.std_mv, judge.std_mv, rtol=1e-12)


def test_digital_statistics_stay_exact_where_the_sum_of_squares_outgrows_float64() -> None:
    stored = np.full((1, 2**23 + 3), 32767, np.int16)
    one = Digital(stored, np.ones(1), np.zeros(1))
    assert digital_statistics(one).constant.all()
    stored[0, 0] = 32766
    found = digital_statistics(one)
    assert not found.constant.any()
    n = stored.shape[1]
    np.testing.assert_allclose(found.std_mv, math.sqrt(n - 1) / n, rtol=1e-14)
    np.testing.assert_allclose(found.mean_mv, 32767 - 1 / n, rtol=1e-15)


def test_single_precision_is_summed_in_double() -> None:
    signal_mv = np.random.default_rng(8).normal(1000, 1, (2, 50_000)).astype(np.float32)
    found, judge = lead_statistics(signal_mv), lead_statistics(signal_mv.astype(np.float64))
    np.testing.assert_array_equal(found.mean_mv, judge.mean_mv)
    np.testing.assert_array_equal(found.std_mv, judge.std_mv)


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


# ---- options: what physics says of each

RATE_HZ = 500.0

OPTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear up": lambda signal_mv: resample_linear(signal_mv, 400.0, RATE_HZ),
    "linear down": lambda signal_mv: resample_linear(signal_mv, 1000.0, RATE_HZ),
    "polyphase up": lambda signal_mv: resample_polyphase(signal_mv, 400.0, RATE_HZ),
    "polyphase down": lambda signal_mv: resample_polyphase(signal_mv, 1000.0, RATE_HZ),
    "polyphase odd": lambda signal_mv: resample_polyphase(signal_mv, 257.0, RATE_HZ),
    "bandpass": lambda signal_mv: bandpass(signal_mv, RATE_HZ, 0.5, 100.0),
    "notch": lambda signal_mv: notch(signal_mv, RATE_HZ, 50.0),
    "bridge": lambda signal_mv: bridge_gaps(signal_mv, 10),
}
every_option = pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
filters = pytest.mark.parametrize("option", [OPTIONS["bandpass"], OPTIONS["notch"]], ids=["bandpass", "notch"])


def sine(hz: float, rate_hz: float, seconds: float = 20.0) -> np.ndarray:
    """(1, time)"""
    return np.sin(2 * np.pi * hz * np.arange(int(seconds * rate_hz)) / rate_hz + 0.3)[None]


def amplitude(signal: np.ndarray, hz: float, rate_hz: float) -> float:
    """Of the sine at `hz` in the middle half of (1, time)."""
    n = signal.shape[1]
    middle = np.arange(n // 4, n - n // 4)
    turns = 2 * np.pi * hz * middle / rate_hz
    basis = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    return float(np.linalg.norm(np.linalg.lstsq(basis, signal[0, middle], rcond=None)[0]))


def r_wave(rate_hz: float, seconds: float = 10.0, at_s: float = 5.0) -> np.ndarray:
    """(1, time): one R wave of 1 mV, 20 ms wide on both sides of its peak."""
    return np.exp(-0.5 * ((np.arange(int(seconds * rate_hz)) / rate_hz - at_s) / 0.01) ** 2)[None]


def test_above_half_of_the_new_rate_linear_aliases_and_polyphase_does_not() -> None:
    """70 Hz sampled at 100 Hz looks like 30 Hz."""
    tremor = sine(70, 1000)
    assert amplitude(resample_linear(tremor, 1000, 100), 30, 100) > 0.8
    assert np.abs(resample_polyphase(tremor, 1000, 100)[:, 100:-100]).max() < 0.003


@pytest.mark.parametrize("from_hz", [128.0, 257.0, 360.0, 400.0, 499.97, 1000.0])
@pytest.mark.parametrize("hz", [1.0, 10.0, 40.0])
def test_below_that_polyphase_keeps_a_sine_in_size_and_time(from_hz: float, hz: float) -> None:
    resampled = resample_polyphase(sine(hz, from_hz), from_hz, 500.0)
    assert resampled.shape == (1, int(int(20 * from_hz) * 500 / from_hz))
    middle = slice(1000, -1000)  # 20 samples of the lower rate are the filter's
    np.testing.assert_allclose(resampled[:, middle], sine(hz, 500.0)[:, : resampled.shape[1]][:, middle], atol=0.005)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.floats(50, 2000), st.sampled_from([100.0, 250.0, 500.0]))
def test_both_ways_to_resample_have_the_same_length(n_samples: int, from_hz: float, to_hz: float) -> None:
    signal_mv = np.random.default_rng(0).normal(size=(2, n_samples))
    n_new = int(n_samples * to_hz / from_hz)
    assert resample_polyphase(signal_mv, from_hz, to_hz).shape == (2, n_new)
    assert resample_linear(signal_mv, from_hz, to_hz).shape == (2, n_new)


@pytest.mark.parametrize("mains_hz", [50.0, 60.0])
def test_a_notch_takes_the_mains_and_leaves_the_heart(mains_hz: float) -> None:
    heard = sine(mains_hz, RATE_HZ) + sine(10, RATE_HZ)
    filtered = notch(heard, RATE_HZ, mains_hz)
    assert amplitude(filtered, mains_hz, RATE_HZ) < 1e-4
    assert amplitude(filtered, 10, RATE_HZ) == pytest.approx(1, abs=0.01)
    np.testing.assert_allclose(filtered, sine(10, RATE_HZ), atol=0.02)  # from the first sample to the last
    np.testing.assert_allclose(filtered[:, 500:-500], sine(10, RATE_HZ)[:, 500:-500], atol=1e-3)
    drifting = notch(sine(mains_hz + 0.3, RATE_HZ), RATE_HZ, mains_hz)
    assert amplitude(drifting, mains_hz + 0.3, RATE_HZ) < 0.02
    beside = notch(sine(mains_hz + mains_hz / 20, RATE_HZ), RATE_HZ, mains_hz)
    assert amplitude(beside, mains_hz + mains_hz / 20, RATE_HZ) == pytest.approx(0.5, abs=0.02)


def test_a_bandpass_takes_wander_and_offset_and_leaves_the_heart() -> None:
    heard = 3 * sine(0.1, RATE_HZ) + sine(10, RATE_HZ) + 7
    filtered = bandpass(heard, RATE_HZ, 0.5, 100.0)
    assert amplitude(filtered, 0.1, RATE_HZ) < 0.003 * 3
    assert amplitude(filtered, 10, RATE_HZ) == pytest.approx(1, abs=0.01)
    assert abs(filtered[:, 2500:-2500].mean()) < 0.01
    for hz in (0.5, 100.0):
        edge = bandpass(sine(hz, RATE_HZ, 60), RATE_HZ, 0.5, 100.0)
        assert amplitude(edge, hz, RATE_HZ) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("at_s", [0.5, 5.0, 9.5])
@pytest.mark.parametrize(
    ("option", "rate_hz"),
    [("bandpass", 500.0), ("notch", 500.0), ("polyphase up", 400.0), ("polyphase down", 1000.0)],
)
def test_an_r_wave_stays_where_it_is_and_upright(option: str, rate_hz: float, at_s: float) -> None:
    filtered = OPTIONS[option](r_wave(rate_hz, at_s=at_s))[0]
    assert filtered.argmax() == round(at_s * RATE_HZ)
    assert filtered.max() == pytest.approx(1, abs=0.1)
    around = filtered[round(at_s * RATE_HZ) - 100 :][:201]
    np.testing.assert_allclose(around, around[::-1], atol=0.01)  # as early as late: no delay at any frequency


@every_option
def test_einthovens_law_survives_every_option(option: Callable[[np.ndarray], np.ndarray]) -> None:
    rng = np.random.default_rng(4)
    first, second = np.cumsum(rng.normal(0, 0.05, (2, 4000)), axis=1)
    limb = np.stack([first, second, second - first])
    limb[:, 700:708] = np.nan
    one, two, three = option(limb)
    assert np.isnan(one).sum() < 30
    np.testing.assert_allclose(one + three, two, rtol=0, atol=1e-11)


@every_option
@pytest.mark.parametrize("value", [0.0, 0.1, -0.3, 1 / 3, 123.456])
def test_a_constant_lead_stays_exactly_constant_through_every_option(
    option: Callable[[np.ndarray], np.ndarray], value: float
) -> None:
    """Rounding alone would be blown up to a signal by the standardisation."""
    signal_mv = np.full((1, 3001), value)
    assert lead_statistics(option(signal_mv)).constant.all()
    signal_mv[0, 50:90] = np.nan
    assert lead_statistics(option(signal_mv)).constant.all()


@filters
def test_an_invalid_sample_stays_where_it_is_and_spreads_nowhere(option: Callable[[np.ndarray], np.ndarray]) -> None:
    rng = np.random.default_rng(5)
    signal_mv = rng.normal(size=(5, 2000))
    signal_mv[0, 777] = np.nan
    signal_mv[1, :300] = np.nan
    signal_mv[2] = np.nan
    signal_mv[3, 1 + np.arange(0, 1900, 3)] = np.nan  # no valid run is longer than two samples
    filtered = option(signal_mv)
    np.testing.assert_array_equal(np.isnan(filtered), np.isnan(signal_mv))
    np.testing.assert_allclose(filtered[4], option(signal_mv[4:])[0], rtol=0, atol=1e-12)


def test_a_gap_changes_little_of_what_is_around_it() -> None:
    """The filters see a line there, not an edge: a quiet lead on an offset of 5 mV stays quiet."""
    signal_mv = 5 + 0.01 * sine(10, RATE_HZ)
    whole = {name: OPTIONS[name](signal_mv) for name in ("bandpass", "notch", "polyphase down")}
    signal_mv[0, 4000:4300] = np.nan
    for name, judge in whole.items():
        filtered = OPTIONS[name](signal_mv)
        assert np.isnan(filtered).any()
        assert np.nanmax(np.abs(filtered - judge)) < 0.02, name


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 49), st.sampled_from([128.0, 250.0, 400.0, 1000.0]))
def test_polyphase_makes_invalid_what_lies_beside_an_invalid_sample(at: int, from_hz: float) -> None:
    signal_mv = np.random.default_rng(3).normal(size=(2, 50))
    signal_mv[1, at] = np.nan
    resampled = resample_polyphase(signal_mv, from_hz, 500.0)
    places = np.arange(resampled.shape[1]) * from_hz / 500.0
    near = np.abs(np.minimum(places, 49) - at) < 1 - 1e-9
    np.testing.assert_array_equal(np.isnan(resampled[1]), near)
    assert not np.isnan(resampled[0]).any()


@pytest.mark.parametrize("n_samples", [0, 1, 2, 3, 10])
@every_option
def test_the_shortest_recordings_come_through(option: Callable[[np.ndarray], np.ndarray], n_samples: int) -> None:
    assert np.isfinite(option(np.ones((12, n_samples)))).all()


@every_option
def test_single_precision_stays_single(option: Callable[[np.ndarray], np.ndarray]) -> None:
    signal_mv = np.random.default_rng(6).normal(size=(2, 3000))
    single = option(signal_mv.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, option(signal_mv), rtol=0, atol=1e-5)


def test_filters_beyond_half_of_the_sampling_rate_are_refused() -> None:
    signal_mv = np.zeros((12, 1000))
    with pytest.raises(ValueError, match="half of the sampling rate, which is 50 Hz"):
        bandpass(signal_mv, 100.0, 0.5, 100.0)
    with pytest.raises(ValueError, match="at 50 Hz needs a sampling rate of more than 100 Hz, found 100 Hz"):
        notch(signal_mv, 100.0, 50.0)


# ---- gaps


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_short_gaps_become_lines_and_nothing_else_changes(valid: list[bool], most: int, seed: int) -> None:
    lead = np.random.default_rng(seed).normal(size=len(valid))
    lead[~np.array(valid)] = np.nan
    expected = lead.copy()
    start = 0
    while start < len(valid):
        stop = start + 1
        while stop < len(valid) and valid[stop] == valid[start]:
            stop += 1
        if not valid[start] and start > 0 and stop < len(valid) and stop - start <= most:
            left, right = lead[start - 1], lead[stop]
            for place in range(start, stop):
                expected[place] = left + (right - left) * (place - start + 1) / (stop - start + 1)
        start = stop
    before = lead.copy()
    np.testing.assert_allclose(bridge_gaps(np.stack([lead, np.arange(len(lead))]), most)[0], expected, atol=1e-12)
    np.testing.assert_array_equal(lead, before)


def test_a_signal_without_gaps_is_not_copied() -> None:
    signal_mv = np.zeros((12, 100))
    assert bridge_gaps(signal_mv, 10) is signal_mv


# ---- segments


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 50), st.integers(1, 20))
def test_segments_are_cut_from_the_start_without_overlap_and_the_tail_is_dropped(n_samples: int, length: int) -> None:
    samples = np.arange(12 * n_samples).reshape(12, n_samples)
    segments = cut_segments(samples, length)
    assert segments.shape == (n_samples // length, 12, length)
    for index, segment in enumerate(segments):
        np.testing.assert_array_equal(segment, samples[:, index * length : (index + 1) * length])
