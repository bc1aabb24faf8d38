"""Sketches: near for the same ECG however it was stored, far for another."""

from __future__ import annotations

import timeit
from functools import cache

import numpy as np
import pytest
from scipy.signal import resample_poly

from ecgfm.ecg import INVALID, LEADS
from ecgfm.shards import digitise
from ecgfm.signals import resample_linear
from ecgfm.sketches import LEVELS, SKETCH_LENGTH, near_pairs, similarity, sketch
from ecgfm.synthetic_ecg import recordings

RATE_HZ = 500.0
SAME, SPREAD = 0.97, 1.25


@cache
def ecgs() -> tuple[tuple[int, np.ndarray], ...]:
    """(patient, (lead, time) millivolt at 500 Hz), some patients several times: every whole recording of 60."""
    whole = []
    for patient in range(1, 61):
        for one in recordings(0, patient):
            if len(one.leads) == 12 and (one.digital != INVALID).all() and one.digital.std(axis=1).all():
                rows = [one.leads.index(lead) for lead in LEADS]
                signal_mv = one.digital[rows] / one.adc_gain_per_mv
                whole.append((patient, resample_linear(signal_mv, one.sampling_rate_hz, RATE_HZ)))
    assert len(whole) > 100
    return tuple(whole)


def of(signal_mv: np.ndarray, *given: object) -> np.ndarray:
    found = sketch(signal_mv, RATE_HZ, *given)  # type: ignore[arg-type]
    assert found is not None
    assert found.shape == (SKETCH_LENGTH,)
    assert found.dtype == np.int8
    return found


def nearness(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    cosine, spread = similarity(one[None], other[None])
    return float(cosine[0]), float(spread[0])


# ---- the same ECG


def test_two_leads_of_twelve_have_the_same_numbers() -> None:
    """Reduced-lead copies have I and II at least."""
    for _, ecg in ecgs()[:20]:
        full, two = of(ecg), of(ecg[:2], ("I", "II"))
        assert (full[: LEVELS.start] == two[: LEVELS.start]).all()
        assert (full[LEVELS][:2] == two[LEVELS][:2]).all()
        assert (two[LEVELS][2:] == -128).all()


def test_rows_are_known_by_their_leads() -> None:
    ecg = ecgs()[0][1]
    assert (of(ecg[::-1], LEADS[::-1]) == of(ecg)).all()
    only_second = of(ecg[1:2], ("II",))
    assert (only_second[64:128] == of(ecg)[64:128]).all()
    assert not only_second[:64].any()


@pytest.mark.parametrize("gain", [0.001, 0.5, 3.0, 1000.0])
def test_a_gain_moves_the_levels_and_nothing_else(gain: float) -> None:
    for _, ecg in ecgs()[:20]:
        one, other = of(ecg), of(ecg * gain)
        assert nearness(one, other)[0] > 0.9999
        inside = (np.abs(one[LEVELS].astype(int)) < 120) & (np.abs(other[LEVELS].astype(int)) < 120)
        moved = other[LEVELS].astype(int)[inside] - one[LEVELS].astype(int)[inside]
        assert inside.sum() > 0 or gain in (0.001, 1000.0)
        assert (np.abs(moved - np.log(gain) / 0.04) <= 1).all()


@pytest.mark.parametrize("rate_hz", [100, 250, 400, 1000])
def test_another_rate_is_near(rate_hz: float) -> None:
    """All but the noisiest in 40. At 100 Hz with first and last samples aligned, 10 s are stretched by 8 ms."""
    nearest = []
    for _, ecg in ecgs():
        there = resample_poly(ecg, int(rate_hz), int(RATE_HZ), axis=1)
        nearest.append(nearness(of(ecg), of(resample_linear(there, rate_hz, RATE_HZ))))
    cosine, spread = np.array(nearest).T
    assert np.median(cosine) > 0.99
    assert np.mean((cosine > SAME) & (spread < SPREAD)) > 0.97


def test_coarse_steps_and_an_offset_are_near() -> None:
    for _, ecg in ecgs()[:40]:
        coarse = np.round(ecg * 100) / 100 + 2.5  # 10 microvolt
        cosine, spread = nearness(of(ecg), of(coarse))
        assert cosine > 0.99
        assert spread < 1.2
        assert nearness(of(ecg), of(digitise(ecg).to_mv()))[0] > 0.9999


def test_what_comes_after_five_seconds_does_not_count() -> None:
    ecg = ecgs()[0][1]
    assert (of(ecg[:, :2500]) == of(ecg)).all()
    assert (of(np.concatenate([ecg[:, :2500], ecg[::-1, 2500:]], axis=1)) == of(ecg)).all()


def test_wander_of_the_baseline_hardly_counts() -> None:
    for _, ecg in ecgs()[:40]:
        wander_mv = 0.1 * np.sin(2 * np.pi * 0.2 * np.arange(ecg.shape[1]) / RATE_HZ)
        assert nearness(of(ecg), of(ecg + wander_mv))[0] > 0.95


def test_float32_and_float64_give_the_same_but_for_rounding() -> None:
    for _, ecg in ecgs()[:20]:
        assert np.abs(of(ecg).astype(int) - of(ecg.astype(np.float32))).max() <= 1


# ---- different ECGs


def test_another_ecg_is_far_also_of_the_same_patient() -> None:
    numbers = np.stack([of(ecg) for _, ecg in ecgs()])
    patient = np.array([one for one, _ in ecgs()])
    i, j = np.triu_indices(len(numbers), 1)
    cosine, _ = similarity(numbers[i], numbers[j])
    same_patient = patient[i] == patient[j]
    assert same_patient.sum() > 50
    assert cosine[same_patient].max() < 0.8
    assert cosine.max() < 0.9


# ---- what cannot be sketched


def test_a_recording_that_says_nothing_has_no_sketch() -> None:
    ecg = ecgs()[0][1]
    flat = np.full_like(ecg, 0.3)
    assert sketch(flat, RATE_HZ) is None
    assert sketch(np.full_like(ecg, np.nan), RATE_HZ) is None
    assert sketch(ecg[:, :999], RATE_HZ) is None, "2 s are needed"
    assert sketch(ecg[:, :1000], RATE_HZ) is not None
    assert sketch(ecg[2:], RATE_HZ, LEADS[2:]) is None, "neither I nor II"
    assert sketch(ecg, 49.0) is None
    assert sketch(np.empty((12, 0)), RATE_HZ) is None


def test_a_lead_that_is_flat_or_invalid_is_absent_and_the_other_counts() -> None:
    ecg = ecgs()[0][1].copy()
    whole = of(ecg)
    for value in (np.nan, 0.7):
        one = ecg.copy()
        one[0] = value
        assert not of(one)[:64].any()
        assert (of(one)[64:128] == whole[64:128]).all()
        assert of(one)[LEVELS.start] == -128
        assert nearness(of(one), whole) == (pytest.approx(1), pytest.approx(1))
    cosine, _ = similarity(of(ecg[:1], ("I",))[None], of(ecg[1:2], ("II",))[None])
    assert np.isnan(cosine[0]), "no lead in common"


def test_a_short_gap_is_bridged_and_a_long_one_makes_the_lead_absent() -> None:
    ecg = ecgs()[0][1]
    holed = ecg.copy()
    holed[:, 700:720] = np.nan
    assert nearness(of(holed), of(ecg))[0] > 0.95
    holed[0, 300:900] = np.nan
    assert not of(holed)[:64].any()
    assert of(holed)[64:128].any()


@pytest.mark.parametrize("rate_hz", [50.0, 128.0, 257.0, 360.0, 500.0])
def test_any_rate_has_a_sketch_and_a_gap_stays_where_it_is(rate_hz: float) -> None:
    ecg = resample_linear(ecgs()[0][1], RATE_HZ, rate_hz)
    whole = sketch(ecg, rate_hz)
    holed = ecg.copy()
    holed[:, int(1.4 * rate_hz)] = np.nan
    bridged = sketch(holed, rate_hz)
    assert whole is not None
    assert bridged is not None
    assert nearness(whole, bridged)[0] > 0.9
    assert nearness(whole, of(ecgs()[0][1]))[0] > 0.8, "and much the same at any rate"


# ---- near pairs among many


def brute_force(numbers: np.ndarray) -> set[tuple[int, int]]:
    i, j = np.triu_indices(len(numbers), 1)
    cosine, spread = similarity(numbers[i], numbers[j])
    near = (cosine >= SAME) & (spread <= SPREAD)
    return set(zip(i[near].tolist(), j[near].tolist(), strict=True))


def test_near_pairs_are_those_of_comparing_each_with_each() -> None:
    """Every ECG with a noisy copy, some of one lead: equal to brute force."""
    rng = np.random.default_rng(0)
    numbers = [of(ecg) for _, ecg in ecgs()]
    for place, (_, ecg) in enumerate(ecgs()):
        noisy = 1.3 * ecg + rng.normal(0, 0.02, ecg.shape)
        numbers.append(of(noisy) if place % 3 else of(noisy[1:2], ("II",)))
    order = rng.permutation(len(numbers))
    shuffled = np.stack(numbers)[order]
    expected = brute_force(shuffled)
    assert len(expected) >= 0.95 * len(ecgs())
    found = near_pairs(shuffled, SAME, SPREAD)
    assert {tuple(pair) for pair in found.tolist()} == expected
    assert (found[:, 0] < found[:, 1]).all()


def test_equal_sketches_are_tied_as_a_chain() -> None:
    """A thousand equal records are 999 pairs, not half a million."""
    a, b = of(ecgs()[0][1]), of(ecgs()[50][1])
    assert nearness(a, b)[0] < 0.5
    numbers = np.stack([a, b] * 500)
    pairs = near_pairs(numbers, SAME, SPREAD)
    assert len(pairs) == 998
    assert set(pairs.ravel().tolist()) == set(range(1000))
    assert (pairs[:, 0] % 2 == pairs[:, 1] % 2).all()


def test_of_none_or_one_there_is_no_pair() -> None:
    assert near_pairs(np.empty((0, SKETCH_LENGTH), dtype=np.int8), SAME, SPREAD).shape == (0, 2)
    assert near_pairs(of(ecgs()[0][1])[None], SAME, SPREAD).shape == (0, 2)


def test_sketches_are_what_they_always_were() -> None:
    """A change of the numbers is a change of the stage: it must be meant."""
    time_s = np.arange(2500) / RATE_HZ
    wave = np.stack([np.sin(2 * np.pi * (1 + lead) * time_s) for lead in range(12)])
    found = of(wave)
    assert found[:6].tolist() == [-73, 6, 66, -43, -6, 23]
    assert found[LEVELS].tolist() == [38, 65, 67, 60, 56, 62, 62, 57, 56, 52, 49, 53]


def test_a_sketch_costs_less_than_a_tenth_of_a_millisecond() -> None:
    ecg = ecgs()[0][1][:, :5000].astype(np.float32)
    of(ecg)
    best_s = min(timeit.repeat(lambda: sketch(ecg, RATE_HZ), number=20, repeat=20)) / 20
    assert best_s < 100e-6 * 3, "measured: 47 us; three times as much for a loaded machine"
