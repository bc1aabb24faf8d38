"""Augmentations of training segments beside lead masking, on the model's device, a batch at a time.

Letters: B batch (segments), L leads, T samples, W waveforms.

Every augmentation is the same sum: some waveforms are added to the leads, each lead having its own amount of each.
Powerline, shift and wander are one waveform, muscle noise is a waveform for each of the eight independent leads, and
turning the heart's dipole adds to each lead some of the eight leads themselves. So all of them end in one
batched product of (B, L, W) amounts and (B, W, T) waveforms. The amounts are drawn for the eight independent leads and
the other limb leads follow: what is added obeys Einthoven's and Goldberger's laws as the ECG does.

Nothing here waits for the device: whether a segment is met is a factor of 0 or 1, and no number is read back.

Sources: the reference (fairseq-signals), whose noises are a cosine at 50 or 60 Hz, white noise, a step, and three slow
cosines; Gopal et al. 2021, "3KG" (arXiv 2106.04452): rotation by up to 45 degrees, scaling by up to 1.5; Dower et al.
1980 (Clin. Cardiol. 3:87), the matrix; Edenbrandt & Pahlm 1988 (J. Electrocardiol. 21:361), its pseudo-inverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Generator, Tensor

from ecgfm.config import AugmentConfig
from ecgfm.ecg import InputError

INDEPENDENT = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")
"""The leads that no others determine."""

LIMB_LEADS = {
    "I": (1.0, 0.0),
    "II": (0.0, 1.0),
    "III": (-1.0, 1.0),
    "aVR": (-0.5, -0.5),
    "aVL": (1.0, -0.5),
    "aVF": (-0.5, 1.0),
}
"""How much of I and of II is in each."""

DOWER = (
    (0.632, -0.235, 0.059),
    (0.235, 1.066, -0.132),
    (-0.515, 0.157, -0.917),
    (0.044, 0.164, -1.387),
    (0.882, 0.098, -1.277),
    (1.213, 0.127, -0.601),
    (1.125, 0.127, -0.086),
    (0.831, 0.076, 0.230),
)
"""What each of `INDEPENDENT` sees of the heart's dipole: x to the left, y down, z to the back."""

INVERSE_DOWER = tuple(map(tuple, np.linalg.pinv(np.array(DOWER)).tolist()))
"""The dipole from `INDEPENDENT`, by least squares; rounded to three digits, the published inverse."""

CROSS_PRODUCTS = (
    (0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 1.0, 0.0),
    (0.0, 0.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0),
    (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
)
"""For x, y and z: the cross product of that axis with a vector, as a matrix, row after row."""

Added = tuple[Tensor, Tensor]
"""(B, W, T) waveforms, and (B, 8, W) how much of each is added to each of `INDEPENDENT`; their product is millivolt."""


def is_on(config: AugmentConfig) -> bool:
    """Whether any segment may be changed."""
    return any(probability for probability, _ in _noises(config)) or config.vcg_probability > 0


def augment(
    signal: Tensor,
    sd_mv: Tensor,
    sampling_rate_hz: float,
    leads: Sequence[str],
    config: AugmentConfig,
    generator: Generator,
) -> Tensor:
    """Each segment changed on its own, by what its draws say; a new tensor, or `signal` itself where all is off.

    A dipole that is turned and stretched changes the part of the ECG that a dipole explains, and the rest is left: with
    Dower's matrix D, its pseudo-inverse D+ and the matrix M of the turn, the change of the eight leads is D (M - 1) D+.
    So M = 1 loses nothing, and the vectorcardiogram D+ of the result is exactly M times that of the ECG. It acts on the
    deviations from each lead's mean over its record; the mean, which is the amplifier's, stays. A segment without all
    eight leads is not turned. Noise is added after the turn: it is not of the heart.

    signal: (B, L, T) float32, standardised, 0 where a lead is missing; on the generator's device
    sd_mv: (B, L) millivolt, what 1 is in `signal`; 0 or NaN where a lead is constant or missing: it stays 0
    leads: (L,) standard ones

    Raises:
        InputError: a mains frequency that segments at this rate cannot have, or a turn without the eight leads.
    """
    if not is_on(config):
        return signal
    _check(sampling_rate_hz, leads, config)
    with torch.autocast(signal.device.type, enabled=False):  # bf16's three digits would not keep I + III = II
        varies = sd_mv > 0  # false for NaN
        sd_mv = sd_mv.float().masked_fill(~varies, 1.0)
        waveforms, amounts_mv = _added(signal, sd_mv, varies, sampling_rate_hz, leads, config, generator)
        in_leads_mv = _on_device(_lead_rows(tuple(leads)), signal.device) @ amounts_mv
        return torch.baddbmm(signal, in_leads_mv * (varies / sd_mv)[..., None], waveforms)


def _added(
    signal: Tensor,
    sd_mv: Tensor,
    varies: Tensor,
    sampling_rate_hz: float,
    leads: Sequence[str],
    config: AugmentConfig,
    generator: Generator,
) -> Added:
    """All that is on, side by side; amounts are 0 where a segment is not met."""
    batch, _, n_samples = signal.shape
    time_s = torch.arange(n_samples, device=signal.device) / sampling_rate_hz
    waveforms, amounts_mv = [], []

    if config.vcg_probability:
        places = [leads.index(lead) for lead in INDEPENDENT]
        met = _chosen(batch, config.vcg_probability, generator)
        for place in places:
            met = met & varies[:, place]
        waveforms.append(torch.stack([signal[:, place] * sd_mv[:, place, None] for place in places], dim=1))
        amounts_mv.append(_turn(batch, config, generator) * met[:, None, None])

    for probability, noise in _noises(config):
        if probability:
            met = _chosen(batch, probability, generator)
            waves, amounts = noise(batch, time_s, config, generator)
            waveforms.append(waves)
            amounts_mv.append(amounts * met[:, None, None])

    return torch.cat(waveforms, dim=1), torch.cat(amounts_mv, dim=2)


def powerline(batch: int, time_s: Tensor, config: AugmentConfig, generator: Generator) -> Added:
    """The mains: a sine of any phase at one of the frequencies, in phase on all leads.

    A segment's strength and the share of it that each lead takes are both uniform: leads of one strength would leave
    III = II - I always free of it.
    """
    frequencies_hz = _on_device((config.powerline_hz,), time_s.device)[0]
    which = torch.randint(len(config.powerline_hz), (batch, 1), generator=generator, device=time_s.device)
    cycles = frequencies_hz[which] * time_s + _uniform(0, 1, (batch, 1), generator)
    return _sine(cycles)[:, None], _strengths(batch, config.powerline_max_mv, 0, generator)


def emg(batch: int, time_s: Tensor, config: AugmentConfig, generator: Generator) -> Added:
    """Muscles: white Gaussian noise, every lead's own, with a standard deviation uniform up to the maximum."""
    n_leads = len(INDEPENDENT)
    noise = torch.randn(batch, n_leads, len(time_s), generator=generator, device=time_s.device)
    return noise, torch.diag_embed(_uniform(0, config.emg_max_sd_mv, (batch, n_leads), generator))


def baseline_shift(batch: int, time_s: Tensor, config: AugmentConfig, generator: Generator) -> Added:
    """An electrode that moves and comes back: a step, at one time on all leads, up on some and down on others.

    A segment's strength is uniform, and so is the share of it that each lead takes, from -1 to 1. III = II - I may be
    shifted by twice the maximum.
    """
    length_s = _uniform(*config.baseline_shift_seconds, (batch, 1), generator)
    start_s = (time_s[-1] - length_s).clamp(min=0) * _uniform(0, 1, (batch, 1), generator)
    shifted = (time_s >= start_s) & (time_s < start_s + length_s)
    return shifted.float()[:, None], _strengths(batch, config.baseline_shift_max_mv, -1, generator)


def baseline_wander(batch: int, time_s: Tensor, config: AugmentConfig, generator: Generator) -> Added:
    """Breathing and slow drift: a sum of cosines of any phase, in phase on all leads."""
    shape = (batch, config.baseline_wander_cosines, 1)
    cycles = _uniform(*config.baseline_wander_hz, shape, generator) * time_s + _uniform(0, 1, shape, generator)
    drift = (_uniform(0, 1, shape, generator) * _sine(cycles)).sum(dim=1, keepdim=True)
    return drift, _uniform(0, config.baseline_wander_max_mv, (batch, len(INDEPENDENT), 1), generator)


def dipole_matrix(angles: Tensor, scales: Tensor) -> Tensor:
    """(B, 3, 3): the dipole is turned by angles (B, 3) about x, y and z, one after the other, radian, and then
    stretched by scales (B, 3) along them."""
    cross = _on_device(CROSS_PRODUCTS, angles.device).view(3, 3, 3)
    sine, cosine = angles.sin()[..., None, None], angles.cos()[..., None, None]
    about = torch.eye(3, device=angles.device) + sine * cross + (1 - cosine) * (cross @ cross)  # Rodrigues
    return scales[..., None] * (about[:, 2] @ about[:, 1] @ about[:, 0])


def _turn(batch: int, config: AugmentConfig, generator: Generator) -> Tensor:
    """(B, 8, 8): how much of each independent lead is added to each where the dipole is turned and stretched"""
    most = math.radians(config.vcg_max_rotation_degrees)
    angles = _uniform(-most, most, (batch, 3), generator)
    scales = _uniform(1, config.vcg_max_scale, (batch, 3), generator)
    change = dipole_matrix(angles, scales) - torch.eye(3, device=generator.device)
    return _on_device(DOWER, generator.device) @ change @ _on_device(INVERSE_DOWER, generator.device)


Noise = Callable[[int, Tensor, AugmentConfig, Generator], Added]


def _noises(config: AugmentConfig) -> list[tuple[float, Noise]]:
    """Each noise with the probability that a segment meets it."""
    return [
        (config.powerline_probability, powerline),
        (config.emg_probability, emg),
        (config.baseline_shift_probability, baseline_shift),
        (config.baseline_wander_probability, baseline_wander),
    ]


def _check(sampling_rate_hz: float, leads: Sequence[str], config: AugmentConfig) -> None:
    highest = max(config.powerline_hz)
    if config.powerline_probability and highest >= sampling_rate_hz / 2:
        raise InputError(
            f"augment.powerline_hz: expected less than half the sampling rate of {sampling_rate_hz:g} Hz, found "
            f"{highest:g}; leave it out, or set augment.powerline_probability to 0"
        )
    absent = [lead for lead in INDEPENDENT if lead not in leads]
    if config.vcg_probability and absent:
        raise InputError(
            f"augment.vcg_probability: turning the heart's dipole needs the leads {', '.join(INDEPENDENT)}; the "
            f"segments lack {', '.join(absent)}; set it to 0"
        )


def _chosen(batch: int, probability: float, generator: Generator) -> Tensor:
    """(B,) bool: which segments are met"""
    return torch.rand(batch, generator=generator, device=generator.device) < probability


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def _strengths(batch: int, max_mv: float, lowest_share: float, generator: Generator) -> Tensor:
    """(B, 8, 1) millivolt: the segment's strength, up to the maximum, times each lead's share of it, up to 1"""
    shares = _uniform(lowest_share, 1, (batch, len(INDEPENDENT), 1), generator)
    return _uniform(0, max_mv, (batch, 1, 1), generator) * shares


def _sine(cycles: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * cycles.frac())  # whole turns off first: they would cost digits


Rows = tuple[tuple[float, ...], ...]


@cache
def _on_device(rows: Rows, device: torch.device) -> Tensor:
    """Constants as a tensor, copied once: a copy from the host waits for the device."""
    return torch.tensor(rows, dtype=torch.float32, device=device)


@cache
def _lead_rows(leads: tuple[str, ...]) -> Rows:
    """(L, 8): how much of each of `INDEPENDENT` is in each lead"""
    parts = {lead: {"I": one, "II": two} for lead, (one, two) in LIMB_LEADS.items()}
    parts |= {lead: {lead: 1.0} for lead in INDEPENDENT[2:]}
    return tuple(tuple(parts[lead].get(source, 0.0) for source in INDEPENDENT) for lead in leads)
