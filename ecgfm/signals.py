"""One record's signal: lead order, gaps, resampling, filters, statistics, segments.

The published recipe is that of ECG-FM (McKeen et al. 2025, JAMIA Open, ooaf122): leads by name, linear resampling with
the first and last samples aligned, no filter, each lead standardised over the whole record, non-overlapping segments.

Signals are (lead, time), millivolt, float64 or float32, NaN where invalid. A filter sees a straight line across
invalid samples (and the nearest valid sample's value beyond the first and last), and leaves them invalid: so none
spreads, and a short valid stretch between two gaps is filtered as part of the whole. Every operation is the same on
each lead and linear, so that I + III = II survives it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from ecgfm.ecg import INVALID, LEADS, Digital, EcgRecord, Rejected

BANDPASS_ORDER = 2
NOTCH_Q = 10.0
LARGEST_DENOMINATOR = 20_000
_EXACT_SUM_SAMPLES = 2**22  # so many squares of int16 add up to at most 2^52, exact in float64
_INT64_SAMPLES = 2**16  # of so many the number times the sum of squares is at most 2^62


@dataclass(frozen=True)
class LeadStatistics:
    """Per lead, over its valid samples.

    mean_mv, std_mv: (lead,) float64, millivolt; population standard deviation, exactly 0 where the lead is
        constant; both NaN where no sample is valid
    invalid: (lead,) bool, at least one sample is invalid
    constant: (lead,) bool, all valid samples are equal (and there are some)
    """

    mean_mv: np.ndarray
    std_mv: np.ndarray
    invalid: np.ndarray
    constant: np.ndarray


def to_standard_leads(record: EcgRecord, leads: Sequence[str] = LEADS) -> EcgRecord:
    """The record with the chosen standard leads in the given order, matched by name in any case.

    A lead that the recording lacks is invalid over its whole length; other leads are left out. A digital signal stays
    digital, and where its leads are these already, nothing is copied.

    Raises:
        Rejected: none of the leads, or one twice.

    >>> record = EcgRecord("mine", ("v1", "II"), 500.0, np.array([[0.1, 0.2], [0.3, 0.4]]))
    >>> to_standard_leads(record, ("I", "II", "V1")).signal_mv
    array([[nan, nan],
           [0.3, 0.4],
           [0.1, 0.2]])
    """
    if record.leads == tuple(leads):
        return record
    place_of = {name.lower(): place for place, name in enumerate(leads)}
    rows = [(place_of[name.lower()], row) for row, name in enumerate(record.leads) if name.lower() in place_of]
    if not rows:
        raise Rejected("no_standard_lead", f"expected some of {', '.join(leads)}, found {', '.join(record.leads)}")
    places, row_of = (list(column) for column in zip(*rows, strict=True))
    if len(set(places)) < len(places):
        raise Rejected("duplicate_lead", f"a lead appears twice among {', '.join(record.leads)}")
    if places == row_of == list(range(len(leads))) and len(record.leads) == len(leads):  # other spellings
        return EcgRecord(record.record_id, tuple(leads), record.sampling_rate_hz, record.signal)
    shape = (len(leads), record.n_samples)
    signal: Digital | np.ndarray
    if isinstance(record.signal, Digital):
        digital, gain, baseline = np.full(shape, INVALID, np.int16), np.ones(len(leads)), np.zeros(len(leads))
        digital[places] = record.signal.digital[row_of]
        gain[places] = record.signal.adc_gain_per_mv[row_of]
        baseline[places] = record.signal.baseline[row_of]
        signal = Digital(digital, gain, baseline)
    else:
        signal = np.full(shape, np.nan, record.signal.dtype)
        signal[places] = record.signal[row_of]
    return EcgRecord(record.record_id, tuple(leads), record.sampling_rate_hz, signal)


def present_leads(record: EcgRecord, leads: Sequence[str] = LEADS) -> list[str]:
    """Those of the standard leads `leads` that a recording has, in their order."""
    return list(_present(record.leads, tuple(leads)))


@lru_cache(256)  # the records of an archive have the same leads
def _present(names: tuple[str, ...], leads: tuple[str, ...]) -> tuple[str, ...]:
    named = {name.lower() for name in names}
    return tuple(lead for lead in leads if lead.lower() in named)


def lead_statistics(signal_mv: np.ndarray) -> LeadStatistics:
    """Statistics per lead of (lead, time), millivolt; summed in float64.

    >>> found = lead_statistics(np.array([[1.0, 3.0, np.nan], [2.0, 2.0, 2.0]]))
    >>> found.mean_mv, found.std_mv
    (array([2., 2.]), array([1., 0.]))
    >>> found.invalid, found.constant
    (array([ True, False]), array([False,  True]))
    """
    signal_mv = signal_mv.astype(np.float64, copy=False)
    valid = ~np.isnan(signal_mv)
    count = valid.sum(axis=1)
    some = count > 0
    if some.all() and valid.all():  # the common case needs no masks, and sums pairwise as numpy's mean does
        mean, std = signal_mv.mean(axis=1), signal_mv.std(axis=1)
        low, high = signal_mv.min(axis=1), signal_mv.max(axis=1)
    else:
        mean, std, low, high = (np.full(len(signal_mv), np.nan) for _ in range(4))
        for lead in np.flatnonzero(some):
            samples = signal_mv[lead, valid[lead]]
            mean[lead], std[lead], low[lead], high[lead] = samples.mean(), samples.std(), samples.min(), samples.max()
    constant = some & (low == high)
    std[constant] = 0.0  # rounding leaves 1e-17 for some constants
    return LeadStatistics(mean, std, ~valid.all(axis=1), constant)


def digital_statistics(digital: Digital) -> LeadStatistics:
    """`lead_statistics(digital.to_mv())`, from the stored integers and free of rounding until the last division."""
    stored = digital.digital
    n_leads, n_samples = stored.shape
    invalid = np.zeros(n_leads, bool) if n_samples == 0 else stored.min(axis=1) == INVALID
    count = np.full(n_leads, n_samples)
    if invalid.any():
        valid = stored != INVALID
        count = np.count_nonzero(valid, axis=1)
        stored = np.where(valid, stored, 0)  # adds nothing to either sum
    whole = np.dtype(np.int64 if n_samples <= _INT64_SAMPLES else object)  # object: Python's own, of any size
    total: np.ndarray = np.zeros(n_leads, whole)
    squares: np.ndarray = np.zeros(n_leads, whole)
    for start in range(0, n_samples, _EXACT_SUM_SAMPLES):
        part = stored[:, start : start + _EXACT_SUM_SAMPLES].astype(np.float64, order="C")
        total += part.sum(axis=1).astype(np.int64).astype(whole, copy=False)
        squares += np.matmul(part[:, None, :], part[:, :, None])[:, 0, 0].astype(np.int64).astype(whole, copy=False)
    spread = count * squares - total * total  # n^2 variance, a whole number; 0 if all are equal, only then
    gain = digital.adc_gain_per_mv
    with np.errstate(invalid="ignore"):  # no valid sample: 0 / 0
        mean = ((total - count * digital.baseline).astype(np.float64) / count) / gain
        std = np.sqrt(spread.astype(np.float64)) / count / np.abs(gain)
    return LeadStatistics(mean, std, invalid, (spread == 0) & (count > 0))


def bridge_gaps(signal_mv: np.ndarray, max_samples: int) -> np.ndarray:
    """The signal with a straight line over every run of at most `max_samples` invalid samples between valid ones.

    Longer runs, and those at the start or end, stay invalid. The signal itself where there is nothing to bridge.

    >>> bridge_gaps(np.array([[0.0, np.nan, 0.2, np.nan, np.nan]]), max_samples=1)
    array([[0. , 0.1, 0.2, nan, nan]])
    """
    invalid = np.isnan(signal_mv)
    if not invalid.any():
        return signal_mv
    edges = np.diff(invalid.astype(np.int8), axis=1, prepend=0, append=0)
    n_samples = signal_mv.shape[1]
    bridged = _without_gaps(signal_mv)
    for (lead, start), stop in zip(np.argwhere(edges == 1), np.argwhere(edges == -1)[:, 1], strict=True):
        if stop - start > max_samples or start == 0 or stop == n_samples:
            bridged[lead, start:stop] = np.nan
    return bridged


def _without_gaps(signal_mv: np.ndarray) -> np.ndarray:
    """A copy with straight lines across invalid samples, the nearest valid value before the first and after the last
    valid one, and 0 in a lead without any."""
    filled = signal_mv.copy()
    at = np.arange(signal_mv.shape[1])
    for lead in np.flatnonzero(np.isnan(signal_mv).any(axis=1)):
        valid = ~np.isnan(signal_mv[lead])
        filled[lead, ~valid] = np.interp(at[~valid], at[valid], signal_mv[lead, valid]) if valid.any() else 0.0
    return filled


@lru_cache(maxsize=16)
def _interpolation(n_old: int, n_new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each new sample the old ones on both sides and the weight of the right one; where it falls on an old one,
    that is both. In whole numbers, so that it is known when it does."""
    steps = max(n_new - 1, 1)
    left, rest = np.divmod(np.arange(n_new, dtype=np.int64) * (n_old - 1), steps)
    return left, left + (rest > 0), rest / steps


def resample_linear(signal_mv: np.ndarray, from_hz: float, to_hz: float) -> np.ndarray:
    """(lead, time) at `from_hz` -> (lead, int(time * to_hz / from_hz)), first and last samples aligned.

    The same as torch's `interpolate(mode="linear", align_corners=True)`. An invalid sample makes invalid only the
    new samples that lie between it and its neighbours. There is no filter: what is above half of `to_hz` aliases.

    >>> resample_linear(np.array([[0.0, 0.7, 1.4, 2.1]]), from_hz=250, to_hz=500)
    array([[0. , 0.3, 0.6, 0.9, 1.2, 1.5, 1.8, 2.1]])
    """
    n_old = signal_mv.shape[1]
    n_new = int(n_old * to_hz / from_hz)
    if n_new == n_old:
        return signal_mv
    left, right, weight = _interpolation(n_old, n_new)
    resampled = signal_mv.take(left, axis=1)
    # the difference, not left * (1 - weight) + right * weight: a constant lead stays exactly constant
    difference = signal_mv.take(right, axis=1)
    difference -= resampled
    difference *= weight.astype(signal_mv.dtype)
    resampled += difference
    return resampled


@lru_cache(maxsize=16)
def _antialias(up: int, down: int) -> np.ndarray:
    """The filter of `resample_polyphase` at `up` times the old rate."""
    if up == down:
        return np.ones(1)
    from scipy.signal import firwin

    taps: np.ndarray = firwin(20 * max(up, down) + 1, 1 / max(up, down), window=("kaiser", 5.0))
    return taps


def resample_polyphase(signal_mv: np.ndarray, from_hz: float, to_hz: float) -> np.ndarray:
    """(lead, time) at `from_hz` -> (lead, int(time * to_hz / from_hz)), without aliasing; first samples aligned.

    A low-pass at half of the lower rate without delay (Kaiser window of beta 5, ten samples of the lower rate to both
    sides): what is below 0.42 of the lower rate stays, of what is above 0.58 less than 0.3 % does. The ratio of the
    rates is taken as a fraction of at most `LARGEST_DENOMINATOR`. Beyond its ends a lead goes on along the line from
    its first to its last sample; a constant lead stays exactly constant. A new sample is invalid where one of the
    two old ones around it is.
    """
    from scipy.signal import resample_poly  # half a second to import, for the options alone

    n_old = signal_mv.shape[1]
    n_new = int(n_old * to_hz / from_hz)
    if from_hz == to_hz or n_new == 0:
        return signal_mv[:, :n_new] if n_new < n_old else signal_mv
    ratio = (Fraction(to_hz) / Fraction(from_hz)).limit_denominator(LARGEST_DENOMINATOR)
    up, down = ratio.numerator, ratio.denominator
    invalid = np.isnan(signal_mv)
    filled = _without_gaps(signal_mv) if invalid.any() else signal_mv
    # the old time of each new sample, in old samples
    left, rest = np.divmod(np.arange(n_new, dtype=np.int64) * down, up)
    first, slope = filled[:, :1], (filled[:, -1:] - filled[:, :1]) / max(n_old - 1, 1)
    around_line = filled - (first + slope * np.arange(n_old))
    if (missing := math.ceil(n_new * down / up) - n_old) > 0:  # the fraction is not the ratio to the last sample
        around_line = np.pad(around_line, ((0, 0), (0, missing)))
    resampled: np.ndarray = resample_poly(around_line, up, down, axis=1, window=_antialias(up, down))[:, :n_new]
    resampled = (resampled + (first + slope * (left + rest / up))).astype(signal_mv.dtype)
    if invalid.any():
        left = np.minimum(left, n_old - 1)
        right = np.minimum(left + (rest > 0), n_old - 1)
        resampled[invalid[:, left] | invalid[:, right]] = np.nan
    return resampled


def bandpass(signal_mv: np.ndarray, sampling_rate_hz: float, low_hz: float, high_hz: float) -> np.ndarray:
    """(lead, time) between two frequencies, without delay: a Butterworth filter of order `BANDPASS_ORDER` on both
    sides, forwards and backwards, so that half of the amplitude is left at `low_hz` and at `high_hz`.

    Raises:
        ValueError: `high_hz` is not below half of the sampling rate, or `low_hz` not below `high_hz`.
    """
    from scipy.signal import butter

    if not 0 < low_hz < high_hz < sampling_rate_hz / 2:
        raise ValueError(
            f"a band-pass from {low_hz:g} to {high_hz:g} Hz needs 0 < low < high < half of the sampling rate,"
            f" which is {sampling_rate_hz / 2:g} Hz"
        )
    sections = butter(BANDPASS_ORDER, (low_hz, high_hz), "bandpass", fs=sampling_rate_hz, output="sos")
    return _without_delay(sections, signal_mv, round(2 * sampling_rate_hz / low_hz), None)[0]


def notch(signal_mv: np.ndarray, sampling_rate_hz: float, notch_hz: float) -> np.ndarray:
    """(lead, time) without `notch_hz` (the mains), without delay: a second-order notch of quality `NOTCH_Q`, forwards
    and backwards: half of the amplitude is left 2.5 Hz beside 50 Hz, 1.5 % of it 0.3 Hz beside. It settles within
    0.2 s, and a hum that is there from the first sample is gone from the first sample: see `_before`.

    Raises:
        ValueError: `notch_hz` is not below half of the sampling rate.
    """
    from scipy.signal import iirnotch, tf2sos

    if not 0 < notch_hz < sampling_rate_hz / 2:
        raise ValueError(
            f"a notch at {notch_hz:g} Hz needs a sampling rate of more than {2 * notch_hz:g} Hz,"
            f" found {sampling_rate_hz:g} Hz"
        )
    sections = tf2sos(*iirnotch(notch_hz, NOTCH_Q, fs=sampling_rate_hz))
    settled = round(2 * NOTCH_Q * sampling_rate_hz / notch_hz)
    filtered, first_mv = _without_delay(sections, signal_mv, settled, notch_hz / sampling_rate_hz)
    restored: np.ndarray = filtered + first_mv
    return restored


def _without_delay(
    sections: np.ndarray, signal_mv: np.ndarray, settled: int, hum: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """A filter forwards and backwards over the signal less each lead's first value, and that value (lead, 1).

    Less its first value a constant lead is 0, and so stays exactly constant. Both ends are continued by `settled`
    samples, in which the filter settles.
    """
    from scipy.signal import sosfiltfilt

    if signal_mv.size == 0:
        return signal_mv, signal_mv.sum(axis=1, keepdims=True)
    invalid = np.isnan(signal_mv)
    filled = _without_gaps(signal_mv) if invalid.any() else signal_mv
    first_mv = filled[:, :1]
    around_first = (filled - first_mv).astype(np.float64)
    n_more = min(settled, signal_mv.shape[1] - 1)
    before, after = _before(around_first, n_more, hum), _before(around_first[:, ::-1], n_more, hum)[:, ::-1]
    longer = np.concatenate([before, around_first, after], axis=1)
    filtered = sosfiltfilt(sections, longer, axis=1, padlen=0)[:, n_more : n_more + signal_mv.shape[1]]
    filtered = filtered.astype(signal_mv.dtype)
    filtered[invalid] = np.nan
    return filtered, first_mv


def _before(signal_mv: np.ndarray, n_more: int, hum: float | None) -> np.ndarray:
    """(lead, n_more) to stand before (lead, time): its point reflection at the first sample.

    hum: turns per sample of a sine that goes on as it is. Reflected, its phase would jump, and a notch would let it
        through for as long as it takes to settle. It is fitted beside a line to the first `n_more` samples.
    """
    sine = np.zeros((len(signal_mv), 2 * n_more + 1))
    if hum is not None:
        at = np.arange(-n_more, n_more + 1)
        columns = np.stack([np.cos(2 * np.pi * hum * at), np.sin(2 * np.pi * hum * at), np.ones_like(at), at], axis=1)
        weights = signal_mv[:, : n_more + 1] @ np.linalg.pinv(columns[n_more:]).T
        sine = weights[:, :2] @ columns[:, :2].T
    rest = signal_mv[:, : n_more + 1] - sine[:, n_more:]
    before: np.ndarray = 2 * rest[:, :1] - rest[:, :0:-1] + sine[:, :n_more]
    return before


def cut_segments(samples: np.ndarray, segment_samples: int) -> np.ndarray:
    """(lead, time) -> (segment, lead, segment_samples), from the start without overlap; the tail is dropped.

    >>> cut_segments(np.arange(7)[None], segment_samples=3).tolist()
    [[[0, 1, 2]], [[3, 4, 5]]]
    """
    n_leads, n_samples = samples.shape
    n_segments = n_samples // segment_samples
    whole = samples[:, : n_segments * segment_samples].reshape(n_leads, n_segments, segment_samples)
    return whole.swapaxes(0, 1)
