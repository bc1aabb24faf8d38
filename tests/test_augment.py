"""Augmentations: what is added has the physics that its name promises, in millivolt, and nothing else changes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wfdb
from scipy.spatial.transform import Rotation
from torch import Generator, Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ecgfm.augment import DOWER, INDEPENDENT, INVERSE_DOWER, augment, dipole_matrix, is_on
from ecgfm.config import AugmentConfig, PretrainConfig, from_dict
from ecgfm.ecg import LEADS, InputError
from ecgfm.synthetic_ecg import DOWER as DOWER_OF_THE_SYNTHETIC_HEART

RATE_HZ = 500.0
EIGHT = [LEADS.index(lead) for lead in INDEPENDENT]
NAMES = ("powerline", "emg", "baseline_shift", "baseline_wander", "vcg")
NOISES = NAMES[:-1]


def only(*names: str, probability: float = 1.0, **values: Any) -> AugmentConfig:
    return AugmentConfig(**{f"{name}_probability": probability for name in names}, **values)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def added_mv(config: AugmentConfig, batch: int = 200, n_samples: int = 2500, rate_hz: float = RATE_HZ) -> np.ndarray:
    """(batch, 12, time) float64 millivolt: what is added to silence."""
    silence = torch.zeros(batch, 12, n_samples)
    return augment(silence, torch.ones(batch, 12), rate_hz, LEADS, config, seeded()).double().numpy()


def ecg(batch: int = 6, n_samples: int = 300, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(batch, 12, time) standardised and (batch, 12) millivolt: any eight signals, and limb leads that follow."""
    eight = torch.randn(batch, 8, n_samples, generator=seeded(seed)).double().numpy() * 0.3
    one, two = eight[:, 0], eight[:, 1]
    limb = [one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2]
    signal_mv = torch.from_numpy(np.concatenate([np.stack(limb, axis=1), eight[:, 2:]], axis=1))
    sd_mv = signal_mv.std(dim=-1)
    return (signal_mv / sd_mv[..., None]).float(), sd_mv.float()


def to_mv(signal: Tensor, sd_mv: Tensor) -> np.ndarray:
    return (signal.double() * sd_mv.double()[..., None]).numpy()


def broken_limb_laws(signal_mv: np.ndarray) -> float:
    """By how many millivolts the worst sample of (batch, 12, time) breaks the laws of Einthoven and Goldberger."""
    one, two, three, avr, avl, avf = signal_mv[:, :6].swapaxes(0, 1)
    broken = (one + three - two, avr + (one + two) / 2, avl - (one - three) / 2, avf - (two + three) / 2)
    return float(max(np.abs(part).max() for part in broken))


# ---- every augmentation


def test_by_default_all_is_off_and_the_signal_is_not_even_copied() -> None:
    signal, sd_mv = ecg()
    assert not is_on(AugmentConfig())
    assert PretrainConfig().augment == AugmentConfig()
    assert augment(signal, sd_mv, RATE_HZ, LEADS, AugmentConfig(), seeded()) is signal


@pytest.mark.parametrize("name", NAMES)
def test_each_alone_is_something_on_and_changes_all_twelve_leads(name: str) -> None:
    signal, sd_mv = ecg()
    before = signal.clone()
    assert is_on(only(name))
    after = augment(signal, sd_mv, RATE_HZ, LEADS, only(name), seeded())
    assert torch.equal(signal, before)
    assert (after != before).any(dim=-1).all()
    assert after.shape == before.shape
    assert after.dtype == torch.float32


def test_every_augmentation_of_the_config_is_tested_here() -> None:
    assert {field.name for field in dataclasses.fields(AugmentConfig) if field.name.endswith("_probability")} == {
        f"{name}_probability" for name in NAMES
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("probability", [0.03, 0.4])
def test_a_probability_is_the_share_of_segments_that_are_met(name: str, probability: float) -> None:
    signal, sd_mv = ecg(batch=8000, n_samples=6)
    config = only(name, probability=probability, baseline_shift_seconds=(1, 1))
    after = augment(signal, sd_mv, RATE_HZ, LEADS, config, seeded())
    met = (after != signal).flatten(1).any(dim=1)
    deviation = math.sqrt(probability * (1 - probability) / len(met))
    assert abs(float(met.double().mean()) - probability) < 4 * deviation
    pairs = met.double().view(2, -1)  # first and second segments of pairs are met independently
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 4 / math.sqrt(len(met) / 2)


def test_augmentations_meet_a_segment_independently() -> None:
    # on a silent ECG a turn does nothing: a shift of a whole segment is told from noise by its differences
    config = only("baseline_shift", "emg", probability=0.5, baseline_shift_seconds=(1, 1))
    added = added_mv(config, batch=4000, n_samples=20)[:, 0]
    noisy = np.diff(added).std(axis=1) > 1e-6
    shifted = np.where(noisy, np.nan, np.abs(added).max(axis=1) > 0)
    assert abs(noisy.mean() - 0.5) < 0.035
    assert abs(np.nanmean(shifted) - 0.5) < 0.05


def test_equal_generators_give_equal_bytes_and_others_do_not() -> None:
    signal, sd_mv = ecg()
    first, again, other = (
        augment(signal, sd_mv, RATE_HZ, LEADS, only(*NAMES), seeded(seed)).numpy().tobytes() for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", NAMES)
def test_equal_segments_get_draws_of_their_own(name: str) -> None:
    signal, sd_mv = (tensor[:1].repeat(40, *(1,) * (tensor.ndim - 1)) for tensor in ecg(n_samples=2500))
    after = augment(signal, sd_mv, RATE_HZ, LEADS, only(name), seeded())
    assert len({segment.numpy().tobytes() for segment in after}) == 40


@pytest.mark.parametrize("absent", [0.0, math.nan])
def test_constant_and_missing_leads_stay_exactly_zero(absent: float) -> None:
    signal, sd_mv = ecg()
    gone = torch.rand(sd_mv.shape, generator=seeded(5)) < 0.4
    gone[0] = True
    signal, sd_mv = signal.masked_fill(gone[..., None], 0), sd_mv.masked_fill(gone, absent)
    after = augment(signal, sd_mv, RATE_HZ, LEADS, only(*NAMES), seeded())
    assert torch.equal(after[gone], torch.zeros_like(after[gone]))
    assert (after[~gone] != signal[~gone]).any(dim=-1).all()
    assert after.isfinite().all()


@pytest.mark.parametrize("name", NOISES)
def test_noise_is_in_millivolt_whatever_a_lead_is_standardised_with(name: str) -> None:
    sd_mv = torch.rand(5, 12, generator=seeded()) + 0.05
    silence = torch.zeros(5, 12, 500)
    standardised = augment(silence, sd_mv, RATE_HZ, LEADS, only(name), seeded())
    one = augment(silence, torch.ones(5, 12), RATE_HZ, LEADS, only(name), seeded())
    torch.testing.assert_close(standardised * sd_mv[..., None], one)


@pytest.mark.parametrize("name", NOISES)
def test_noise_obeys_the_laws_of_the_limb_leads(name: str) -> None:
    added = added_mv(only(name))
    assert np.abs(added[:, :6]).max(axis=(0, 2)).min() > 0.01  # not all silent
    assert broken_limb_laws(added) < 1e-6


def test_noise_does_not_depend_on_the_ecg_and_is_added_to_the_turned_one() -> None:
    signal, sd_mv = ecg()
    noise = augment(torch.zeros_like(signal), sd_mv, RATE_HZ, LEADS, only(*NAMES), seeded())
    turned = augment(signal, sd_mv, RATE_HZ, LEADS, only("vcg"), seeded())
    both = augment(signal, sd_mv, RATE_HZ, LEADS, only(*NAMES), seeded())
    torch.testing.assert_close(both, turned + noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("leads", [("V2",), ("III", "aVF"), ("II", "V5", "I"), LEADS[::-1]])
@pytest.mark.parametrize("name", NOISES)
def test_any_leads_in_any_order_get_the_noise_they_would_get_among_the_twelve(
    name: str, leads: tuple[str, ...]
) -> None:
    some = augment(torch.zeros(4, len(leads), 700), torch.ones(4, len(leads)), RATE_HZ, leads, only(name), seeded())
    expected = added_mv(only(name), batch=4, n_samples=700)[:, [LEADS.index(lead) for lead in leads]]
    assert np.abs(expected).max(axis=(0, 2)).min() > 1e-3
    np.testing.assert_allclose(some.numpy(), expected, rtol=0, atol=1e-6)


def test_nothing_is_read_back_from_the_device() -> None:
    """Tensors without values: whatever asks for one fails, as it would wait on a GPU."""
    signal, sd_mv = ecg()
    augment(signal, sd_mv, RATE_HZ, LEADS, only(*NAMES), seeded())  # the constants are there from now on
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        without_values = (fake.from_tensor(tensor) for tensor in (signal, sd_mv))
        after = augment(*without_values, RATE_HZ, LEADS, only(*NAMES), seeded())
        with pytest.raises(DataDependentOutputException):
            float(after.sum())
    assert after.shape == signal.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_is_not_waited_for() -> None:
    device = torch.device("cuda")
    signal, sd_mv = (tensor.to(device) for tensor in ecg())
    generator = Generator(device).manual_seed(0)
    augment(signal, sd_mv, RATE_HZ, LEADS, only(*NAMES), generator)  # copies the constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(signal, sd_mv, RATE_HZ, LEADS, only(*NAMES), generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_autocast_costs_no_precision() -> None:
    signal, sd_mv = ecg()
    plain = augment(signal, sd_mv, RATE_HZ, LEADS, only(*NAMES), seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment(signal, sd_mv, RATE_HZ, LEADS, only(*NAMES), seeded()), plain)


# ---- the mains


@pytest.mark.parametrize("rate_hz", [500.0, 200.0])
def test_powerline_is_one_sine_at_50_or_60_hz_of_the_stated_amplitude(rate_hz: float) -> None:
    n_samples = int(2 * rate_hz)  # whole periods: a sine is one bin
    spectrum = np.fft.rfft(added_mv(only("powerline", powerline_max_mv=0.3), 2000, n_samples, rate_hz)) * 2 / n_samples
    bins = (100, 120)  # of 0.5 Hz
    energy = np.square(np.abs(spectrum))
    assert (energy[..., bins].sum(axis=-1) > (1 - 1e-6) * energy.sum(axis=-1))[:, EIGHT].all()
    at = np.abs(spectrum[..., bins])
    assert (at[:, EIGHT].min(axis=-1) < 1e-3 * at[:, EIGHT].max(axis=-1)).all()  # one of the two
    sixty = at[:, 0, 1] > at[:, 0, 0]
    assert abs(sixty.mean() - 0.5) < 0.05

    amplitude_mv = at.max(axis=-1)[:, EIGHT]
    strength_mv = amplitude_mv.max(axis=1)  # of eight leads, one takes nearly all of the segment's
    assert amplitude_mv.max() < 0.3 * (1 + 1e-5)
    assert strength_mv.max() > 0.27
    assert amplitude_mv.mean() == pytest.approx(0.3 / 4, rel=0.05)  # two uniform draws
    shares = amplitude_mv / strength_mv[:, None]
    assert shares.min() < 0.05


def test_powerline_is_in_phase_on_all_leads_and_of_any_phase() -> None:
    spectrum = np.fft.rfft(added_mv(only("powerline", powerline_hz=(60.0,)), 2000))[:, :, 300]
    relative = spectrum[:, EIGHT] / spectrum[:, EIGHT].sum(axis=1, keepdims=True)
    assert np.abs(relative.imag).max() < 1e-4
    assert relative.real.min() > -1e-4
    turns = np.angle(spectrum[:, 0]) / (2 * np.pi) % 1
    assert np.abs(np.histogram(turns, 10, (0, 1))[0] - 200).max() < 60  # 4.5 standard deviations


def test_a_frequency_that_segments_cannot_have_is_one_line() -> None:
    signal, sd_mv = ecg()
    with pytest.raises(
        InputError, match=r"powerline_hz: expected less than half the sampling rate of 100 Hz, found 60"
    ):
        augment(signal, sd_mv, 100.0, LEADS, only("powerline"), seeded())
    augment(signal, sd_mv, 110.0, LEADS, only("powerline", powerline_hz=(50.0,)), seeded())
    augment(signal, sd_mv, 100.0, LEADS, only("emg"), seeded())  # off, it is not asked for


# ---- muscles


def test_emg_is_white_gaussian_noise_of_the_stated_deviation() -> None:
    noise = added_mv(only("emg", emg_max_sd_mv=0.2), batch=600)[:, EIGHT]
    sd_mv = noise.std(axis=-1)
    assert sd_mv.max() < 0.2 * 1.1
    counts = np.histogram(sd_mv, 10, (0, 0.2))[0] / sd_mv.size
    assert np.abs(counts - 0.1).max() < 0.02  # uniform

    standard = (noise / sd_mv[..., None]).reshape(-1, 2500)
    power = np.square(np.abs(np.fft.rfft(standard)))[:, 1:-1].mean(axis=0)
    bands = power.reshape(-1, 1249)[:, :1240].reshape(20, 62).mean(axis=1) / 2500
    np.testing.assert_allclose(bands, 1, atol=0.02)
    assert np.mean(standard**4) == pytest.approx(3, abs=0.02)


def test_muscles_under_each_electrode_are_their_own() -> None:
    noise = added_mv(only("emg"), batch=50)[:, EIGHT]
    for segment in noise:
        assert np.abs(np.corrcoef(segment) - np.eye(8)).max() < 0.12  # 6 / sqrt(2500)


# ---- the baseline


def test_baseline_shift_is_one_step_up_or_down_and_back_of_stated_size_and_length() -> None:
    config = only("baseline_shift", baseline_shift_max_mv=0.5, baseline_shift_seconds=(0.5, 2.0))
    added = added_mv(config, batch=1000)
    size = np.where(np.abs(added).max(axis=2) == added.max(axis=2), added.max(axis=2), added.min(axis=2))
    shifted = added[:, 0] != 0
    np.testing.assert_allclose(added, size[..., None] * shifted[:, None], rtol=0, atol=1e-7)  # two levels, one time
    assert (np.abs(np.diff(shifted.astype(int), prepend=0, append=0)).sum(axis=1) == 2).all()  # one stretch

    length_s, start_s = shifted.sum(axis=1) / RATE_HZ, shifted.argmax(axis=1) / RATE_HZ
    assert length_s.min() >= 0.5 - 1 / RATE_HZ
    assert length_s.max() <= 2.0 + 1 / RATE_HZ
    assert np.abs(np.histogram(length_s, 5, (0.5, 2.0))[0] - 200).max() < 55
    assert start_s.min() < 0.1
    assert (start_s + length_s).max() > 4.9

    eight = size[:, EIGHT]
    assert 0.45 < np.abs(eight).max() <= 0.5
    assert abs((eight > 0).mean() - 0.5) < 0.03
    assert ((eight > 0).any(axis=1) & (eight < 0).any(axis=1)).mean() > 0.9  # leads go either way


def test_a_step_longer_than_the_segment_shifts_all_of_it() -> None:
    added = added_mv(only("baseline_shift", baseline_shift_seconds=(3, 3)), n_samples=500)
    assert (added[:, 0] != 0).all()
    assert (added == added[..., :1]).all()


def test_baseline_wander_has_no_energy_outside_its_frequencies() -> None:
    config = only("baseline_wander", baseline_wander_hz=(0.2, 0.5), baseline_wander_max_mv=0.3)
    rate_hz, n_samples = 20.0, 8000  # 400 s, to tell frequencies apart; windowed, to see nothing of the edges
    added = added_mv(config, 100, n_samples, rate_hz)[:, EIGHT]
    power = np.square(np.abs(np.fft.rfft(added * np.blackman(n_samples))))
    frequency_hz = np.fft.rfftfreq(n_samples, 1 / rate_hz)
    inside = (frequency_hz > 0.2 - 0.01) & (frequency_hz < 0.5 + 0.01)
    assert power[..., ~inside].sum() < 1e-6 * power.sum()
    share = power[..., inside & (frequency_hz > 0.35)].sum() / power.sum()
    assert 0.3 < share < 0.7  # both halves of the band


def test_baseline_wander_is_a_sum_of_so_many_cosines_of_the_stated_amplitude() -> None:
    """A single cosine is known by its amplitude; three by what they add up to."""
    one = added_mv(only("baseline_wander", baseline_wander_cosines=1, baseline_wander_hz=(0.5, 0.5)), 2000)
    cycles = np.exp(-2j * np.pi * 0.5 * np.arange(2000) / RATE_HZ)  # two whole periods
    parts = (one[:, EIGHT, :2000] * cycles).mean(axis=-1) * 2
    np.testing.assert_allclose(one[:, EIGHT, :2000], (parts[..., None] * cycles.conj()).real, rtol=0, atol=1e-6)
    amplitude_mv = np.abs(parts)
    assert 0.09 < amplitude_mv.max() <= 0.1 * (1 + 1e-5)
    assert amplitude_mv.mean() == pytest.approx(0.1 / 4, rel=0.05)
    turns = np.angle(parts[:, 0]) / (2 * np.pi) % 1
    assert np.abs(np.histogram(turns, 10, (0, 1))[0] - 200).max() < 60

    three = added_mv(only("baseline_wander"), 2000)[:, EIGHT]
    assert 0.1 < np.abs(three).max() <= 0.3
    assert np.mean(three**2) == pytest.approx(3 * np.mean(one[:, EIGHT, :2000] ** 2), rel=0.15)


def test_baseline_wander_moves_all_leads_together_some_more_than_others() -> None:
    eight = added_mv(only("baseline_wander"), 50)[:, EIGHT]
    for segment in eight:
        _, singular, (drift, *_) = np.linalg.svd(segment, full_matrices=False)
        assert singular[1] < 1e-5 * singular[0]
        share = segment @ drift
        assert share.min() * share.max() > 0
        assert np.abs(share).max() > 1.2 * np.abs(share).min()


# ---- the dipole


def vcg(signal_mv: np.ndarray) -> np.ndarray:
    """(batch, 3, time) millivolt from (batch, 12, time)."""
    return np.array(INVERSE_DOWER) @ signal_mv[:, EIGHT]


def test_dowers_matrix_and_its_inverse_are_the_published_ones() -> None:
    np.testing.assert_array_equal(DOWER, DOWER_OF_THE_SYNTHETIC_HEART)
    published = [  # Edenbrandt & Pahlm 1988; columns I, II, V1 to V6
        [0.156, -0.010, -0.172, -0.074, 0.122, 0.231, 0.239, 0.194],
        [-0.227, 0.887, 0.057, -0.019, -0.106, -0.022, 0.041, 0.048],
        [0.022, 0.102, -0.229, -0.310, -0.246, -0.063, 0.055, 0.108],
    ]
    np.testing.assert_allclose(INVERSE_DOWER, published, rtol=0, atol=0.0005)
    np.testing.assert_allclose(np.array(INVERSE_DOWER) @ np.array(DOWER), np.eye(3), atol=1e-12)


def test_the_dipole_is_turned_about_x_then_y_then_z_and_then_stretched() -> None:
    angles = torch.rand(50, 3, generator=seeded()) * 6 - 3
    scales = torch.rand(50, 3, generator=seeded(1)) + 1
    expected = scales.numpy()[..., None] * Rotation.from_euler("xyz", angles.numpy()).as_matrix()
    np.testing.assert_allclose(dipole_matrix(angles, scales).numpy(), expected, atol=1e-5)


def test_a_turned_ecg_is_what_a_slow_computation_gives() -> None:
    """The matrix is read off the vectorcardiograms; the leads are worked out from it one sample at a time."""
    signal, sd_mv = ecg(batch=20, n_samples=40)
    before = to_mv(signal, sd_mv)
    after = to_mv(augment(signal, sd_mv, RATE_HZ, LEADS, only("vcg"), seeded()), sd_mv)
    angles, scales = [], []
    for segment, result in zip(before, after, strict=True):
        matrix = vcg(result[None])[0] @ np.linalg.pinv(vcg(segment[None])[0])
        stretch = np.linalg.norm(matrix, axis=1)
        turn = matrix / stretch[:, None]
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-4)
        assert np.linalg.det(turn) == pytest.approx(1, abs=1e-4)
        angles.append(Rotation.from_matrix(turn).as_euler("xyz", degrees=True))
        scales.append(stretch)
        for time in range(segment.shape[1]):
            lead = dict(zip(LEADS, segment[:, time], strict=True))
            dipole = [sum(row[i] * lead[name] for i, name in enumerate(INDEPENDENT)) for row in INVERSE_DOWER]
            turned = [sum(matrix[i, j] * dipole[j] for j in range(3)) for i in range(3)]
            for i, name in enumerate(INDEPENDENT):
                lead[name] += sum(DOWER[i][j] * (turned[j] - dipole[j]) for j in range(3))
            lead["III"] = lead["II"] - lead["I"]
            lead["aVR"], lead["aVL"] = -(lead["I"] + lead["II"]) / 2, lead["I"] - lead["II"] / 2
            lead["aVF"] = lead["II"] - lead["I"] / 2
            np.testing.assert_allclose(result[:, time], [lead[name] for name in LEADS], rtol=0, atol=2e-5)
    assert 30 < np.abs(angles).max() <= 45.01
    assert np.min(angles) < -30
    assert np.min(scales) >= 0.9999
    assert 1.4 < np.max(scales) <= 1.5001


def test_angles_and_scales_are_uniform_up_to_their_maxima() -> None:
    signal, sd_mv = ecg(batch=2000, n_samples=12)
    config = only("vcg", vcg_max_rotation_degrees=30.0, vcg_max_scale=1.2)
    after = to_mv(augment(signal, sd_mv, RATE_HZ, LEADS, config, seeded()), sd_mv)
    matrices = vcg(after) @ np.linalg.pinv(vcg(to_mv(signal, sd_mv)))
    stretch = np.linalg.norm(matrices, axis=2)
    degrees = Rotation.from_matrix(matrices / stretch[..., None]).as_euler("xyz", degrees=True)
    for values, low, high in ((degrees, -30, 30), (stretch, 1, 1.2)):
        for axis in range(3):
            assert np.abs(np.histogram(values[:, axis], 10, (low, high))[0] - 200).max() < 60
    drawn = np.concatenate([degrees, stretch], axis=1).T
    assert np.abs(np.corrcoef(drawn) - np.eye(6)).max() < 0.1  # 4.5 / sqrt(2000): each axis its own


def test_no_turn_and_no_stretch_lose_nothing_not_even_what_no_dipole_explains() -> None:
    signal, sd_mv = ecg()
    eight = to_mv(signal, sd_mv)[:, EIGHT]
    unexplained = eight - np.array(DOWER) @ (np.array(INVERSE_DOWER) @ eight)
    assert np.square(unexplained).sum() > 0.3 * np.square(eight).sum()  # a projection would lose as much
    config = only("vcg", vcg_max_rotation_degrees=0.0, vcg_max_scale=1.0)
    assert torch.equal(augment(signal, sd_mv, RATE_HZ, LEADS, config, seeded()), signal)

    turned = to_mv(augment(signal, sd_mv, RATE_HZ, LEADS, only("vcg"), seeded()), sd_mv)[:, EIGHT]
    np.testing.assert_allclose(
        turned - np.array(DOWER) @ (np.array(INVERSE_DOWER) @ turned), unexplained, rtol=0, atol=1e-5
    )


def test_a_turn_keeps_the_length_of_the_dipole_and_a_stretch_does_not() -> None:
    signal, sd_mv = ecg()
    before = np.linalg.norm(vcg(to_mv(signal, sd_mv)), axis=1)
    turned = to_mv(augment(signal, sd_mv, RATE_HZ, LEADS, only("vcg", vcg_max_scale=1.0), seeded()), sd_mv)
    assert np.abs(turned - to_mv(signal, sd_mv)).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(vcg(turned), axis=1), before, rtol=0, atol=1e-5)

    config = only("vcg", vcg_max_rotation_degrees=0.0)
    stretched = vcg(to_mv(augment(signal, sd_mv, RATE_HZ, LEADS, config, seeded()), sd_mv))
    factor = stretched / vcg(to_mv(signal, sd_mv))
    np.testing.assert_allclose(factor, np.median(factor, axis=2, keepdims=True).repeat(300, 2), rtol=0.02)
    assert 1 <= np.median(factor, axis=2).min() < np.median(factor, axis=2).max() <= 1.5


def test_the_laws_of_the_limb_leads_survive_a_turn() -> None:
    signal, sd_mv = ecg()
    assert broken_limb_laws(to_mv(signal, sd_mv)) < 1e-6
    turned = augment(signal, sd_mv, RATE_HZ, LEADS, only("vcg"), seeded())
    assert broken_limb_laws(to_mv(turned, sd_mv)) < 2e-6


@pytest.mark.parametrize("absent", [0.0, math.nan])
def test_a_segment_without_one_of_the_eight_leads_is_not_turned(absent: float) -> None:
    signal, sd_mv = ecg(batch=13)
    gone = torch.eye(13, 12, dtype=torch.bool)  # segment i lacks lead i; the last is whole
    signal, sd_mv = signal.masked_fill(gone[..., None], 0), sd_mv.masked_fill(gone, absent)
    after = augment(signal, sd_mv, RATE_HZ, LEADS, only("vcg"), seeded())
    same = (after == signal).flatten(1).all(dim=1)
    assert same.tolist() == [lead in INDEPENDENT for lead in LEADS] + [False]
    assert torch.equal(after[gone[:, :12]], torch.zeros_like(after[gone]))  # III and the augmented leads stay away


def test_a_turn_of_leads_that_are_not_all_there_is_one_line() -> None:
    signal, sd_mv = ecg()
    ten = [lead for lead in range(12) if LEADS[lead] not in ("V1", "V3")]
    with pytest.raises(InputError, match=r"vcg_probability: .* the segments lack V1, V3; set it to 0"):
        augment(signal[:, ten], sd_mv[:, ten], RATE_HZ, [LEADS[i] for i in ten], only("vcg"), seeded())
    eight = augment(signal[:, EIGHT], sd_mv[:, EIGHT], RATE_HZ, INDEPENDENT, only("vcg"), seeded())
    twelve = augment(signal, sd_mv, RATE_HZ, LEADS, only("vcg"), seeded())
    torch.testing.assert_close(eight, twelve[:, EIGHT])


def test_a_real_recording_keeps_its_laws_and_its_dipole(shared: Path) -> None:
    headers = sorted((shared / "data/ptb-xl").glob("**/*_hr.hea"))[:8]
    assert len(headers) == 8
    signals_mv = torch.stack(
        [torch.from_numpy(wfdb.rdrecord(str(path.with_suffix(""))).p_signal.T)[:, :2500] for path in headers]
    )
    sd_mv, mean_mv = signals_mv.std(dim=-1).float(), signals_mv.mean(dim=-1, keepdim=True)
    signal = ((signals_mv - mean_mv) / sd_mv[..., None]).float()
    before = to_mv(signal, sd_mv)
    turned = to_mv(augment(signal, sd_mv, RATE_HZ, LEADS, only("vcg", vcg_max_scale=1.0), seeded()), sd_mv)
    np.testing.assert_allclose(
        np.linalg.norm(vcg(turned), axis=1), np.linalg.norm(vcg(before), axis=1), rtol=0, atol=1e-5
    )
    all_mv = to_mv(augment(signal, sd_mv, RATE_HZ, LEADS, only(*NAMES), seeded()), sd_mv)
    assert np.abs(all_mv - before).max(axis=(1, 2)).min() > 0.1
    assert broken_limb_laws(all_mv) < broken_limb_laws(before) + 1e-5  # which are as good as the recorder's steps


# ---- the config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"baseline_wander_hz": [0.5, 0.1]}, "baseline_wander_hz must be a lower and a higher value"),
        ({"baseline_shift_seconds": [2, 1]}, "baseline_shift_seconds must be a lower and a higher value"),
        ({"powerline_hz": []}, "at least 1 item"),
        ({"emg_probability": 1.5}, "less than or equal to 1, found 1.5"),
        ({"vcg_max_scale": 0.5}, "greater than or equal to 1, found 0.5"),
        ({"emg_max_mv": 0.1}, "unknown key; did you mean"),
    ],
)
def test_a_mistake_in_the_config_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        from_dict(PretrainConfig, {"augment": values}, "pipelines.yaml")
    assert "augment" in str(raised.value)
