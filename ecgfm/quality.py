"""How good a recording is, lead by lead, as columns beside it: nothing is excluded silently.

Everything is measured in windows of 200 ms: short enough that most of them lie between two QRS complexes, so that a
median over them tells noise from the heart, and 50 and 60 Hz both make whole turns in them. One matrix product with
a fixed basis gives each window's spectrum where it matters and its course in steps of 40 ms.

The kinds of trouble are those of the PhysioNet/CinC Challenge 2011 (Silva, Moody and Celi 2011, Comput. Cardiol.
38:273), of Clifford et al. 2012 (Physiol. Meas. 33:1419) and of Zhao and Zhang 2018 (Front. Physiol. 9:727). Those
measure by ratios of the recording's own power; here are physical quantities, in microvolt, that a person can check
on the paper. For interchanged electrodes see Batchvarov et al. 2007 (Europace 9:1081) and Kors and van Herpen 2001
(Am. J. Cardiol. 88:396), who compare leads by correlation too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from ecgfm.ecg import INVALID

Reversal = Literal["RA-LA", "RA-LL", "RA-RL"]
REVERSALS: tuple[Reversal, ...] = get_args(Reversal)
"""Interchanged electrodes that one recording can tell: right arm (RA), left arm, left leg, right leg. Not those of
left arm and left leg, which looks like another normal ECG."""

WINDOW_S = 0.2
_MIN_WINDOWS = 10  # 2 s; a shorter recording may hold no more than one heart beat
_LOWEST_RATE_HZ = 50.0  # ten samples a window
_STEPS = 5  # of 40 ms a window: P, QRS and T by their areas
_MAINS_HZ = (50.0, 60.0)
_FLOOR_HZ = (40.0, 70.0)  # around both, and where the taper lets nothing of either through
_NOISE_HZ = (*_FLOOR_HZ, 30.0, 80.0, 90.0, 100.0)  # above the T wave, without the mains
_NOISE_BAND_HZ = 70.0  # from 30 to 100
_NOISE_MEDIAN = 0.945  # median over mean of the mean of six powers, in Gaussian noise: 12 degrees of freedom
_WAVES_HZ = np.array([*_MAINS_HZ, *_NOISE_HZ])
_POWERLINE_RATE_HZ, _NOISE_RATE_HZ = 150.0, 210.0  # twice the highest frequency each needs, and a margin
_WANDER_HZ = 0.67  # what a filter without delay may take away (Kligfield et al. 2007, Circulation 115:1306)
_WANDER_WINDOWS = 50  # 10 s, the longest stretch whose wander is taken as a whole
_OPPOSITE = -0.3  # correlation below which two leads point opposite ways
_STILL = 0.1  # of the other limb leads' size: the same potential twice
_MIRRORED = 0.9  # correlation, negative, of two leads that show the same potential from either side


@dataclass(frozen=True)
class Quality:
    """One recording's quality; arrays are (lead,) float32, NaN where it cannot be told: for a lead with less than
    2 s of windows without invalid samples, or at too low a rate.

    flat_share: share of the windows of 200 ms in which all samples are equal: an electrode is off
    clipped_share: share of samples in runs of at least 3 equal ones at the lead's own highest or lowest value; 0 for
        a constant lead, which `flat_share` tells
    powerline_uv: amplitude (half of peak to peak) of the sine at 50 or at 60 Hz, the larger, above the floor of 40
        and 70 Hz; the median over windows, so a hum through at least half of the recording. A mains frequency off
        by 0.3 Hz changes it by less than 1 %. NaN below 150 Hz
    noise_uv: root mean square of the noise from 30 to 100 Hz without the mains, between heart beats: the median over
        windows, scaled to be right for Gaussian noise. NaN below 210 Hz
    baseline_wander_uv: root mean square, around the lead's mean, of what is below 0.67 Hz
    suspected_reversal: electrodes that look interchanged, a word of `REVERSALS`; a suspicion, no more
    """

    flat_share: np.ndarray
    clipped_share: np.ndarray
    powerline_uv: np.ndarray
    noise_uv: np.ndarray
    baseline_wander_uv: np.ndarray
    suspected_reversal: Reversal | None

    def columns(self) -> dict[str, Any]:
        """The columns of the table `quality` (data_contracts/quality.yaml), but for its key."""
        return {
            "lead_flat_share": self.flat_share,
            "lead_clipped_share": self.clipped_share,
            "lead_powerline_uv": self.powerline_uv,
            "lead_noise_uv": self.noise_uv,
            "lead_baseline_wander_uv": self.baseline_wander_uv,
            "suspected_reversal": self.suspected_reversal,
        }


def assess(signal_mv: np.ndarray, sampling_rate_hz: float, leads: Sequence[str]) -> Quality:
    """The quality of (lead, time), millivolt, NaN where invalid. It computes in float32.

    leads: the names of the rows

    Ask it about a recording as recorded: resampling hides clipping, and filters hide the rest.
    """
    return assess_together(signal_mv[None], sampling_rate_hz, leads)[0]


def assess_together(
    signals_mv: np.ndarray, sampling_rate_hz: float, leads: Sequence[str], stored: np.ndarray | None = None
) -> list[Quality]:
    """`assess` for each of (record, lead, time). A few recordings together take half the time.

    stored: where all are digital, the same samples as stored, int16: clipping is seen in them sooner
    """
    n_records, n_leads, n_samples = signals_mv.shape
    signal_mv = np.ascontiguousarray(signals_mv, np.float32).reshape(n_records * n_leads, n_samples)
    samples = signal_mv if stored is None else stored.reshape(n_records * n_leads, n_samples)
    window_samples = round(WINDOW_S * sampling_rate_hz)
    n_windows = n_samples // window_samples if sampling_rate_hz >= _LOWEST_RATE_HZ else 0
    measured = np.full((5, n_records * n_leads), np.nan, np.float32)
    reversals: Sequence[Reversal | None] = [None] * n_records
    if n_windows >= _MIN_WINDOWS:
        steps_mv = _measure(signal_mv, samples, sampling_rate_hz, n_windows, measured)
        reversals = _suspected_reversals(steps_mv.reshape(n_records, n_leads, -1), leads)
    measured[2:] = measured[2:].round(2)  # 10 nV; what is beyond differs from processor to processor
    of_records = measured.reshape(5, n_records, n_leads).swapaxes(0, 1)
    return [
        Quality(flat, clipped, powerline, noise, wander, reversal)
        for (flat, clipped, powerline, noise, wander), reversal in zip(of_records, reversals, strict=True)
    ]


def _measure(
    signal_mv: np.ndarray, samples: np.ndarray, sampling_rate_hz: float, n_windows: int, measured: np.ndarray
) -> np.ndarray:
    """Fill `measured` (quality, lead) from (lead, time); returns the means of steps of 40 ms, (lead, step).

    samples: the signal again, as stored where it is digital
    """
    n_leads, n_samples = signal_mv.shape
    window_samples = round(WINDOW_S * sampling_rate_hz)
    windows = signal_mv[:, : n_windows * window_samples].reshape(n_leads, n_windows, window_samples)
    projected = (windows.reshape(-1, window_samples) @ _basis(sampling_rate_hz)).reshape(n_leads, n_windows, -1)
    means_mv, steps_mv, waves_mv = projected[..., 0], projected[..., 1 : 1 + _STEPS], projected[..., 1 + _STEPS :]
    lowest, highest = samples.min(axis=1), samples.max(axis=1)
    gappy = np.isnan(highest) if samples is signal_mv else lowest == INVALID
    whole = np.flatnonzero(~gappy) if gappy.any() else slice(None)  # a slice copies nothing
    if not gappy.all():
        measured[0, whole] = _flat_share(windows[whole])
        measured[1, whole] = _clipped_samples(samples[whole], lowest[whole], highest[whole]) / n_samples
        measured[2:4, whole] = _powerline_and_noise_uv(waves_mv[whole], sampling_rate_hz)
        measured[4, whole] = _wander_uv(means_mv[whole], window_samples / sampling_rate_hz)
    for lead in np.flatnonzero(gappy):
        valid = ~np.isnan(windows[lead]).any(axis=1)
        if valid.sum() < _MIN_WINDOWS:
            continue
        samples_mv, at = signal_mv[lead, None], np.arange(n_windows)
        clipped = _clipped_samples(samples_mv, np.fmin.reduce(samples_mv, axis=1), np.fmax.reduce(samples_mv, axis=1))
        bridged_mv = np.interp(at, at[valid], means_mv[lead, valid]).astype(np.float32)  # wander does not stop in a gap
        measured[0, lead, None] = _flat_share(windows[lead][valid][None])
        measured[1, lead, None] = clipped / np.count_nonzero(~np.isnan(samples_mv))
        measured[2:4, lead, None] = _powerline_and_noise_uv(waves_mv[lead][valid][None], sampling_rate_hz)
        measured[4, lead, None] = _wander_uv(bridged_mv[None], window_samples / sampling_rate_hz)
    steps: np.ndarray = steps_mv.reshape(n_leads, -1)
    return steps


@lru_cache(maxsize=32)
def _basis(sampling_rate_hz: float) -> np.ndarray:
    """(sample of a window, column) float32: its mean; the means of its `_STEPS` steps; the cosines of `_WAVES_HZ` and
    their sines, tapered so that a sine's two products have its amplitude as their length."""
    n = round(WINDOW_S * sampling_rate_hz)
    edges = np.round(np.arange(_STEPS + 1) * n / _STEPS)
    at = np.arange(n)[:, None]
    steps = (at >= edges[:-1]) & (at < edges[1:])
    taper = 0.5 - 0.5 * np.cos(2 * np.pi * at / n)  # Hann's
    turns = 2 * np.pi * _WAVES_HZ * at / sampling_rate_hz
    waves = np.concatenate([np.cos(turns), np.sin(turns)], axis=1) * taper * (2 / taper.sum())
    # where 200 ms are no whole number of samples, an electrode's offset and drift would leak in: take them out
    line = np.linalg.qr(np.concatenate([np.ones_like(at), at - at.mean()], axis=1).astype(np.float64))[0]
    waves -= line @ (line.T @ waves)
    basis = np.concatenate([np.full((n, 1), 1 / n), steps / steps.sum(axis=0), waves], axis=1)
    return basis.astype(np.float32)


@lru_cache(maxsize=64)
def _wander_basis(n_windows: int, window_s: float) -> np.ndarray:
    """(window, column) float32: the orthonormal cosines (DCT-II) of at most `_WANDER_HZ`, the constant among them."""
    order = np.arange(int(2 * _WANDER_HZ * n_windows * window_s) + 1)
    cosines = np.cos(np.pi * order * (np.arange(n_windows)[:, None] + 0.5) / n_windows)
    basis: np.ndarray = (cosines / np.linalg.norm(cosines, axis=0)).astype(np.float32)
    return basis


@lru_cache(maxsize=1)
def _powers() -> np.ndarray:
    """(squares of the cosines and sines of `_WAVES_HZ`, column) float32: their sums at 50, 60, 40 and 70 Hz, and the
    mean of those of `_NOISE_HZ`."""
    powers = np.zeros((2, len(_WAVES_HZ), 5), np.float32)
    powers[:, range(4), range(4)] = 1
    powers[:, len(_MAINS_HZ) :, 4] = 1 / len(_NOISE_HZ)
    return powers.reshape(-1, 5)


def _flat_share(windows: np.ndarray) -> np.ndarray:
    """(lead, window, sample) -> (lead,): the share of windows in which all samples are equal."""
    first, middle, last = windows[..., 0], windows[..., windows.shape[-1] // 2], windows[..., -1]
    flat: np.ndarray = (first == middle) & (first == last)  # few windows of a living lead pass, and are looked at
    if flat.any():
        flat[flat] = (windows[flat] == windows[flat][:, :1]).all(axis=1)
    share: np.ndarray = np.add.reduce(flat, axis=1, dtype=np.float32) / flat.shape[1]
    return share


def _clipped_samples(samples: np.ndarray, lowest: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """(lead, time) -> (lead,): samples in runs of at least 3 at the lead's lowest or highest value."""
    n_leads, n_samples = samples.shape
    clipped = np.zeros(n_leads)
    extreme = np.flatnonzero((samples == lowest[:, None]) | (samples == highest[:, None]))
    values = samples.reshape(-1)[extreme]
    goes_on = (extreme[1:] == extreme[:-1] + 1) & (values[1:] == values[:-1]) & (extreme[1:] % n_samples != 0)
    if (goes_on[1:] & goes_on[:-1]).any():
        starts = np.flatnonzero(np.concatenate([[True], ~goes_on]))
        lengths = np.diff(np.append(starts, len(extreme)))
        np.add.at(clipped, extreme[starts] // n_samples, np.where(lengths >= 3, lengths, 0))
        clipped[lowest == highest] = 0
    return clipped


def _powerline_and_noise_uv(waves_mv: np.ndarray, sampling_rate_hz: float) -> tuple[np.ndarray, np.ndarray]:
    """(lead, window, cosines and sines of `_WAVES_HZ`) -> amplitude of the mains, noise: each (lead,)."""
    n_leads, n_windows, _ = waves_mv.shape
    squares = (waves_mv * waves_mv).reshape(n_leads * n_windows, 2 * len(_WAVES_HZ))
    looked_at = (squares @ _powers()).reshape(n_leads, n_windows, 5).swapaxes(1, 2).copy()
    looked_at.sort(axis=2)
    typical = (looked_at[..., n_windows // 2] + looked_at[..., (n_windows - 1) // 2]) / 2  # the median
    at_50, at_60, below, above, noise = typical.T
    # the floor at 50 and at 60 Hz: a third and two thirds of the way from 40 to 70, in decibels, as spectra fall
    excess = np.maximum(at_50 - np.cbrt(below**2 * above), at_60 - np.cbrt(below * above**2))
    powerline_uv = 1e3 * np.sqrt(np.maximum(excess, 0))
    # Hann's taper lets the noise of 1.5 bins, of 1 / WINDOW_S each, through; a sine of amplitude 1 has a power of 1/2
    noise_uv = 1e3 * np.sqrt(noise / 2 / _NOISE_MEDIAN * _NOISE_BAND_HZ * WINDOW_S / 1.5)
    nothing = np.full(n_leads, np.nan, np.float32)
    return (
        powerline_uv if sampling_rate_hz >= _POWERLINE_RATE_HZ else nothing,
        noise_uv if sampling_rate_hz >= _NOISE_RATE_HZ else nothing,
    )


def _wander_uv(means_mv: np.ndarray, window_s: float) -> np.ndarray:
    """(lead, window) means -> (lead,): root mean square of what is slow, in equal stretches of at most 10 s."""
    n_leads, n_windows = means_mv.shape
    around_mean_mv = means_mv - np.add.reduce(means_mv, axis=1, keepdims=True) / n_windows
    n_stretches = -(-n_windows // _WANDER_WINDOWS)
    edges = [n_windows * stretch // n_stretches for stretch in range(n_stretches + 1)]
    slow = np.zeros(n_leads, np.float32)
    for start, stop in pairwise(edges):
        slow += ((around_mean_mv[:, start:stop] @ _wander_basis(stop - start, window_s)) ** 2).sum(axis=1)
    wander_uv: np.ndarray = 1e3 * np.sqrt(slow / n_windows)
    return wander_uv


def _suspected_reversals(steps_mv: np.ndarray, leads: Sequence[str]) -> list[Reversal | None]:
    """From the course of the limb leads and V6, (record, lead, step of 40 ms).

    V6 and I look at the heart from the same side, aVR from the other. Where I goes against V6 and the lead that goes
    against it most is not aVR but aVL, the arms' cables are likely interchanged; where II does and it is aVF, those
    of right arm and left leg are. A right arm electrode on the right leg leaves nothing in II, the difference of the
    legs, and makes III the mirror of I.
    """
    names = ("I", "II", "III", "aVR", "aVL", "aVF", "V6")
    if not set(names) <= set(leads):
        return [None] * len(steps_mv)
    steps_mv = steps_mv[:, [leads.index(name) for name in names]]
    change = steps_mv[..., 1:] - steps_mv[..., :-1]  # in 40 ms wander changes little
    change[np.isnan(change)] = 0
    products = change @ change.swapaxes(1, 2)
    size = np.sqrt(np.diagonal(products, axis1=1, axis2=2))
    size_i, size_ii, size_iii = size[:, :3].T
    still_ii = (size_ii < _STILL * np.minimum(size_i, size_iii)) & (products[:, 0, 2] < -_MIRRORED * size_i * size_iii)
    whole = size.all(axis=1)  # no lead is missing or flat
    with_v6 = np.divide(products[:, -1], size * size[:, -1:], where=whole[:, None], out=np.zeros_like(size))
    first, second, _, right, left, foot, _ = with_v6.T
    arms = whole & (first < _OPPOSITE) & (left < np.minimum(right, foot))
    arm_and_leg = whole & (second < _OPPOSITE) & (foot < np.minimum(right, left))
    found: list[Reversal | None] = [None] * len(steps_mv)
    for where, word in ((arm_and_leg, REVERSALS[1]), (arms, REVERSALS[0]), (still_ii, REVERSALS[2])):
        for record in np.flatnonzero(where):
            found[record] = word
    return found
