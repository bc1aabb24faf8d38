"""How good a recording is. The judges: physics, sample by sample loops, and cardiologists' notes beside real ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from ecgfm.contracts import check, contract, table_of
from ecgfm.ecg import LEADS
from ecgfm.quality import REVERSALS, Quality, Reversal, assess
from ecgfm.signals import to_standard_leads
from ecgfm.sources import SOURCES
from ecgfm.synthetic_ecg import recordings

RATES_HZ = (250.0, 257.0, 400.0, 500.0, 1000.0)
PER_LEAD = ("flat_share", "clipped_share", "powerline_uv", "noise_uv", "baseline_wander_uv")


def seconds(rate_hz: float, duration_s: float = 10.0) -> np.ndarray:
    return np.arange(int(duration_s * rate_hz)) / rate_hz


def heart(rate_hz: float, beats_per_minute: float = 70, duration_s: float = 10.0) -> np.ndarray:
    """(1, time), millivolt: P, R, S and T waves of some beats."""
    at_s = seconds(rate_hz, duration_s)
    signal_mv = np.zeros_like(at_s)
    for beat_s in np.arange(0.3, duration_s, 60 / beats_per_minute):
        for height_mv, centre_s, width_s in (
            (0.15, -0.16, 0.02),
            (1.2, 0, 0.01),
            (-0.3, 0.03, 0.01),
            (0.3, 0.22, 0.04),
        ):
            signal_mv += height_mv * np.exp(-0.5 * ((at_s - beat_s - centre_s) / width_s) ** 2)
    return signal_mv[None]


def assess_leads(signal_mv: np.ndarray, rate_hz: float = 500.0) -> Quality:
    return assess(signal_mv.astype(np.float32), rate_hz, LEADS[: len(signal_mv)])


# ---- each number, by physics


@pytest.mark.parametrize("rate_hz", RATES_HZ)
@pytest.mark.parametrize("mains_hz", [49.7, 50.0, 50.3, 59.7, 60.0, 60.3])
@pytest.mark.parametrize("amplitude_uv", [20.0, 100.0, 1000.0])
def test_the_mains_are_read_back(rate_hz: float, mains_hz: float, amplitude_uv: float) -> None:
    rng = np.random.default_rng(0)
    hum_mv = amplitude_uv / 1e3 * np.sin(2 * np.pi * mains_hz * seconds(rate_hz) + 1)
    signal_mv = heart(rate_hz) + hum_mv + rng.normal(0, 0.003, hum_mv.shape)
    assert assess_leads(signal_mv, rate_hz).powerline_uv[0] == pytest.approx(amplitude_uv, rel=0.05)


@pytest.mark.parametrize("rate_hz", RATES_HZ)
def test_without_mains_neither_noise_nor_heart_nor_offset_looks_like_them(rate_hz: float) -> None:
    noise_mv = np.random.default_rng(0).normal(0, 0.02, (12, len(seconds(rate_hz))))
    assert assess_leads(noise_mv + heart(rate_hz), rate_hz).powerline_uv.max() < 10
    assert assess_leads(heart(rate_hz, 120) + 50, rate_hz).powerline_uv.max() < 5


@pytest.mark.parametrize("rate_hz", RATES_HZ)
@pytest.mark.parametrize("std_uv", [5.0, 50.0])
def test_white_noise_reads_as_its_share_of_30_to_100_hz_whether_the_heart_beats_or_not(
    rate_hz: float, std_uv: float
) -> None:
    noise_mv = np.random.default_rng(1).normal(0, std_uv / 1e3, (12, len(seconds(rate_hz, 60))))
    in_band_uv = std_uv * np.sqrt(70 / (rate_hz / 2))
    quiet = assess_leads(noise_mv, rate_hz).noise_uv
    np.testing.assert_allclose(quiet, in_band_uv, rtol=0.1)
    assert np.median(quiet) == pytest.approx(in_band_uv, rel=0.03)
    beating = assess_leads(noise_mv + heart(rate_hz, 60, 60), rate_hz).noise_uv
    assert np.median(beating) == pytest.approx(in_band_uv, rel=0.25)
    assert assess_leads(heart(rate_hz, 60, 60), rate_hz).noise_uv < 1


def test_mains_are_no_noise() -> None:
    hum_mv = 0.2 * np.sin(2 * np.pi * np.array([[50.0], [60.0]]) * seconds(500))
    assert assess_leads(hum_mv).noise_uv.max() < 0.1


@pytest.mark.parametrize("rate_hz", [60.0, 100.0, *RATES_HZ])
@pytest.mark.parametrize("duration_s", [10.0, 17.3, 300.0])
def test_slow_waves_are_wander_and_fast_ones_and_offsets_are_not(rate_hz: float, duration_s: float) -> None:
    at_s = seconds(rate_hz, duration_s)
    wander_mv = 0.5 * np.sin(2 * np.pi * 0.25 * at_s)
    expected_uv = 1e3 * wander_mv.std()
    for signal_mv in (wander_mv, wander_mv - 80, wander_mv + 0.5 * np.sin(2 * np.pi * 3 * at_s)):
        assert assess_leads(signal_mv[None], rate_hz).baseline_wander_uv[0] == pytest.approx(expected_uv, rel=0.05)
    assert assess_leads(0.5 * np.sin(2 * np.pi * 3 * at_s)[None] + 80, rate_hz).baseline_wander_uv[0] < 25
    drift_mv = at_s[None] / duration_s
    assert assess_leads(drift_mv, rate_hz).baseline_wander_uv[0] == pytest.approx(1e3 / np.sqrt(12), rel=0.02)


def test_an_electrode_that_falls_off_is_flat_from_then_on() -> None:
    signal_mv = np.random.default_rng(2).normal(size=(4, 5000))
    signal_mv[1, 2500:] = 0.25
    signal_mv[2] = 0
    signal_mv[3] = 0.1
    found = assess_leads(signal_mv)
    assert found.flat_share.tolist() == [0, 0.5, 1, 1]
    assert found.clipped_share.tolist() == [0, 0, 0, 0]
    for dead in (found.powerline_uv, found.noise_uv, found.baseline_wander_uv):
        assert dead[2] == 0
        assert dead[3] == pytest.approx(0, abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(100, 400), st.integers(1, 3), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_flat_and_clipped_are_what_a_loop_counts(n_samples: int, levels: int, held: float, seed: int) -> None:
    """At 50 Hz: windows of ten samples."""
    rng = np.random.default_rng(seed)
    signal_mv = rng.integers(-levels, levels + 1, (3, n_samples)).astype(np.float32)
    for sample in range(1, n_samples):  # values that are held make runs
        stays = rng.random(3) < held
        signal_mv[stays, sample] = signal_mv[stays, sample - 1]
    found = assess(signal_mv, 50.0, LEADS[:3])
    for lead, values in enumerate(signal_mv.tolist()):
        windows = [values[start : start + 10] for start in range(0, n_samples - 9, 10)]
        assert found.flat_share[lead] == pytest.approx(sum(len(set(w)) == 1 for w in windows) / len(windows))
        clipped, run = 0, [values[0]]
        for value in [*values[1:], None]:
            if value == run[0]:
                run.append(value)
                continue
            clipped += len(run) if len(run) >= 3 and run[0] in (min(values), max(values)) else 0
            run = [value]
        expected = clipped / n_samples if len(set(values)) > 1 else 0
        assert found.clipped_share[lead] == pytest.approx(expected)


# ---- what cannot be told


def test_invalid_samples_count_for_nothing_and_leave_the_other_leads_alone() -> None:
    rng = np.random.default_rng(3)
    signal_mv = heart(500) + rng.normal(0, 0.01, (12, 5000)) + 0.3 * np.sin(2 * np.pi * 0.2 * seconds(500))
    signal_mv[2] += 0.1 * np.sin(2 * np.pi * 50 * seconds(500))
    whole = assess_leads(signal_mv)
    signal_mv[2, [77, 1500, 1501, 4000]] = np.nan
    signal_mv[5] = np.nan
    signal_mv[6, 900:] = np.nan  # 1.8 s are left
    holed = assess_leads(signal_mv)
    others = [lead for lead in range(12) if lead not in (2, 5, 6)]
    for name in PER_LEAD:
        before, after = getattr(whole, name), getattr(holed, name)
        np.testing.assert_allclose(after[others], before[others], rtol=1e-5, atol=1e-4)
        assert np.isnan(after[[5, 6]]).all()
        assert after[2] == pytest.approx(before[2], rel=0.1, abs=0.01)
        assert after.dtype == np.float32


@pytest.mark.parametrize(("n_samples", "rate_hz"), [(0, 500.0), (1, 500.0), (999, 500.0), (5000, 49.0), (5000, 0.1)])
def test_too_short_or_too_slow_a_recording_tells_nothing(n_samples: int, rate_hz: float) -> None:
    found = assess_leads(np.zeros((12, n_samples)), rate_hz)
    assert all(np.isnan(getattr(found, name)).all() for name in PER_LEAD)
    assert found.suspected_reversal is None


def test_what_a_rate_does_not_hold_is_nan_and_the_rest_is_told() -> None:
    for rate_hz, mains, noise in (
        (100.0, False, False),
        (149.0, False, False),
        (160.0, True, False),
        (240.0, True, True),
    ):
        found = assess_leads(heart(rate_hz), rate_hz)
        assert np.isfinite(found.powerline_uv).all() == mains
        assert np.isfinite(found.noise_uv).all() == noise
        assert np.isfinite([found.flat_share, found.clipped_share, found.baseline_wander_uv]).all()


def test_one_lead_alone_any_order_and_double_precision_say_the_same() -> None:
    signal_mv = heart(500) + np.random.default_rng(4).normal(0, 0.02, (12, 5000))
    together = assess_leads(signal_mv)
    turned = assess(signal_mv[::-1].astype(np.float32), 500.0, LEADS[::-1])
    for name in PER_LEAD:
        np.testing.assert_allclose(getattr(turned, name)[::-1], getattr(together, name), rtol=1e-4, atol=1e-3)
        alone = getattr(assess(signal_mv[3:4], 500.0, ("aVR",)), name)
        np.testing.assert_allclose(alone, getattr(together, name)[3:4], rtol=1e-4, atol=1e-3)


# ---- interchanged electrodes


def interchanged(signal_mv: np.ndarray, which: str) -> np.ndarray:
    """(lead, time), the twelve leads, as they would be with two cables interchanged: by the electrodes' potentials."""
    one, two, chest = signal_mv[0], signal_mv[1], signal_mv[6:]
    at = {"RA": -(one + two) / 3, "LA": (2 * one - two) / 3, "LL": (2 * two - one) / 3}  # against their mean
    # both legs are at the end of the same trunk, but for the amplifier's noise
    at["RL"] = at["LL"] + np.random.default_rng(7).normal(0, 0.005, one.shape)
    first, second = which.split("-")
    at[first], at[second] = at[second], at[first]
    right, left, foot = at["RA"], at["LA"], at["LL"]
    middle = (right + left + foot) / 3
    limbs = [left - right, foot - right, foot - left]
    augmented = [1.5 * (potential - middle) for potential in (right, left, foot)]
    return np.stack([*limbs, *augmented, *(chest - middle)])


@pytest.fixture(scope="module")
def synthetic() -> list[np.ndarray]:
    """(lead, time), millivolt, 500 Hz: twelve leads without defects."""
    drawn = (recording for number in range(60) for recording in recordings(0, number))
    whole = [r for r in drawn if r.leads == LEADS and r.sampling_rate_hz == 500 and r.digital.any(axis=1).all()]
    assert len(whole) > 50
    return [recording.digital / recording.adc_gain_per_mv for recording in whole]


@pytest.fixture(scope="module")
def ptb_xl(shared: Path) -> dict[int, np.ndarray]:
    """(lead, time), millivolt, 500 Hz, by ecg_id."""
    source, folder = SOURCES["ptb_xl"], shared / "data/ptb-xl"
    signals = {}
    for row in source.list_records(folder).iter_rows(named=True):
        record = to_standard_leads(source.read_record(folder, row))
        assert record.sampling_rate_hz == 500
        signals[int(re.findall(r"\d{5}", row["record_id"])[0])] = record.signal_mv
    assert len(signals) == 210
    return signals


def suspicions(signals: list[np.ndarray], which: Reversal | None) -> list[Reversal | None]:
    return [assess_leads(s if which is None else interchanged(s, which)).suspected_reversal for s in signals]


def test_interchanging_is_what_the_textbook_says() -> None:
    rng = np.random.default_rng(5)
    one, two = rng.normal(size=(2, 50))
    leads = np.stack([one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2, *rng.normal(size=(6, 50))])
    i, ii, iii, avr, avl, avf = leads[:6]
    chest = leads[6:]
    np.testing.assert_allclose(interchanged(leads, "RA-LA"), [-i, iii, ii, avl, avr, avf, *chest], atol=1e-12)
    np.testing.assert_allclose(interchanged(leads, "RA-LL"), [-iii, -ii, -i, avf, avl, avr, *chest], atol=1e-12)
    np.testing.assert_allclose(interchanged(leads, "RA-RL")[1], 0, atol=0.03)


@pytest.mark.parametrize("which", [None, *get_args(Reversal)])
def test_interchanged_cables_of_synthetic_patients_are_told(
    synthetic: list[np.ndarray], which: Reversal | None
) -> None:
    found = suspicions(synthetic, which)
    assert np.mean([one == which for one in found]) > 0.8


def test_on_real_recordings_interchanges_are_suspected_and_little_else(ptb_xl: dict[int, np.ndarray]) -> None:
    signals = list(ptb_xl.values())
    assert sum(found is not None for found in suspicions(signals, None)) <= 2
    for which in get_args(Reversal):
        share = np.mean([found == which for found in suspicions(signals, which)])
        print(f"\n{which}: {share:.1%} of {len(signals)} interchanged are told")
        assert share >= 0.9


@pytest.mark.parametrize("missing", ["I", "aVL", "V6"])
def test_without_its_leads_nothing_is_suspected(missing: str) -> None:
    signal_mv = interchanged(np.repeat(heart(500), 12, axis=0) * np.linspace(0.3, 1, 12)[:, None], "RA-LA")
    assert assess_leads(signal_mv).suspected_reversal is not None
    lead = LEADS.index(missing)
    rest = tuple(name for name in LEADS if name != missing)
    assert assess(np.delete(signal_mv, lead, axis=0), 500.0, rest).suspected_reversal is None
    signal_mv[lead] = np.nan
    assert assess_leads(signal_mv).suspected_reversal is None


# ---- the table


def test_the_table_takes_what_is_told_and_knows_every_suspicion() -> None:
    found = assess_leads(np.random.default_rng(6).normal(size=(12, 5000)))
    table = table_of("quality", [{"record_id": "test/1", **found.columns()}])
    check(table, "quality")
    assert table.null_count().row(0) == (0, 0, 0, 0, 0, 0, 1)
    rules = contract("quality")["columns"]
    assert set(rules) == {"record_id", *found.columns()}
    assert tuple(rules["suspected_reversal"]["allowed"]) == REVERSALS
    np.testing.assert_array_equal(table["lead_noise_uv"][0].to_numpy(), found.noise_uv)
    missing = assess_leads(np.full((12, 5000), np.nan))
    check(table_of("quality", [{"record_id": "test/2", **missing.columns()}]), "quality")


# ---- real recordings


def test_leads_of_zeros_are_flat_and_no_others(shared: Path) -> None:
    source, folder = SOURCES["physionet2021"], shared / "data/challenge-2021"
    flat = {}
    for row in source.list_records(folder).iter_rows(named=True):
        record = to_standard_leads(source.read_record(folder, row))
        found = assess(record.signal_mv.astype(np.float32), record.sampling_rate_hz, LEADS)
        dead = tuple(lead for lead, share in zip(LEADS, found.flat_share.tolist(), strict=True) if share == 1)
        assert dead == tuple(lead for lead, samples in zip(LEADS, record.signal_mv, strict=True) if not samples.any())
        if dead:
            flat[row["record_id"].partition("/")[2]] = dead
    assert flat == {"JS45542": ("V1", "V2", "V3", "V4", "V5", "V6"), "JS20004": ("V2", "V4", "V6")}


@pytest.mark.parametrize("mains_hz", [50.0, 50.3, 60.0])
@pytest.mark.parametrize("amplitude_uv", [20.0, 50.0, 200.0])
def test_mains_added_to_real_recordings_are_read_back(
    ptb_xl: dict[int, np.ndarray], mains_hz: float, amplitude_uv: float
) -> None:
    hum_mv = amplitude_uv / 1e3 * np.sin(2 * np.pi * mains_hz * seconds(500) + 1)
    own = np.array([assess_leads(signal_mv).powerline_uv for signal_mv in ptb_xl.values()])
    read = np.array([assess_leads(signal_mv + hum_mv).powerline_uv for signal_mv in ptb_xl.values()])
    quiet = own < 3  # its own hum adds to ours or takes from it, by its phase
    assert quiet.mean() > 0.9
    within = np.abs(read / amplitude_uv - 1)[quiet] <= 0.1
    assert within.mean() > 0.99
    assert np.median(read[quiet]) == pytest.approx(amplitude_uv, rel=0.01)


def noted_leads(note: str) -> set[int]:
    """The leads of a note such as ` , I-AVR,  ` or `alles`, in the spellings of PTB-XL."""
    note = note.upper().replace(".", ",").replace("V1V6", "V1-V6")
    if "ALLES" in note:
        return set(range(12))
    spelled = [lead.upper() for lead in LEADS]
    leads: set[int] = set()
    in_chest = False
    for part in re.split(r"[,\s]+", note):
        ends = []
        for name in filter(None, part.split("-")):
            in_chest |= name.startswith("V")
            full = f"V{name}" if name.isdigit() and in_chest else "I" if name == "1" else name
            ends.append(spelled.index(full))
        leads |= set(range(ends[0], ends[-1] + 1)) if ends else set()
    return leads


def test_the_notes_of_ptb_xl_and_the_numbers_agree(shared: Path, ptb_xl: dict[int, np.ndarray]) -> None:
    """Its annotators noted drift and noise lead by lead, as they noticed them."""
    database = pl.read_csv(shared / "data/ptb-xl/ptbxl_database.csv", infer_schema_length=0)
    found = {ecg_id: assess_leads(signal_mv) for ecg_id, signal_mv in ptb_xl.items()}
    print("\n\nnote             number              noted  AUROC  medians, uV")
    for note, number, least in (
        ("baseline_drift", "baseline_wander_uv", 0.85),
        ("static_noise", "noise_uv", 0.8),
        ("static_noise", "powerline_uv", 0.6),
        ("burst_noise", "noise_uv", 0.5),
    ):
        noted = np.zeros((len(database), 12), bool)
        for row, text in enumerate(database[note].to_list()):
            noted[row, list(noted_leads(text or ""))] = True
        values = np.array([getattr(found[int(ecg_id)], number) for ecg_id in database["ecg_id"].to_list()])
        auroc = roc_auc_score(noted.ravel(), values.ravel())
        with_note, without = np.median(values[noted]), np.median(values[~noted])
        print(f"{note:16s} {number:18s} {noted.sum():6d}  {auroc:.3f}  {with_note:.1f} with, {without:.1f} without")
        assert noted.sum() > 20
        assert auroc > least
