"""One record's signal: lead order, resampling, statistics, segments.

The recipe is the one of ECG-FM (McKeen et al. 2025, JAMIA Open, ooaf122): leads by name, linear resampling with
the first and last samples aligned, each lead standardised over the whole record, non-overlapping segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ecgfm.ecg import INVALID, LEADS, Digital, EcgRecord, Rejected

_LEAD_INDEX = {lead.lower(): index for index, lead in enumerate(LEADS)}


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


def to_standard_leads(record: EcgRecord) -> EcgRecord:
    """The record with the twelve standard leads in order, matched by name in any case.

    A lead that the recording lacks is NaN over its whole length; leads by other names are left out.

    Raises:
        Rejected: no standard lead, or one twice.
    """
    rows = [(_LEAD_INDEX[name.lower()], row) for row, name in enumerate(record.leads) if name.lower() in _LEAD_INDEX]
    if not rows:
        raise Rejected("no_standard_lead", f"expected some of {', '.join(LEADS)}, found {', '.join(record.leads)}")
    to, row_of = (list(column) for column in zip(*rows, strict=True))
    if len(set(to)) < len(to):
        raise Rejected("duplicate_lead", f"a lead appears twice among {', '.join(record.leads)}")
    signal_mv = np.full((len(LEADS), record.n_samples), np.nan)
    signal_mv[to] = record.signal_mv[row_of]
    digital = None
    if record.digital is not None:
        stored = np.full((len(LEADS), record.n_samples), INVALID, dtype=np.int16)
        gain, baseline = np.ones(len(LEADS)), np.zeros(len(LEADS))
        stored[to] = record.digital.digital[row_of]
        gain[to] = record.digital.adc_gain_per_mv[row_of]
        baseline[to] = record.digital.baseline[row_of]
        digital = Digital(stored, gain, baseline)
    return EcgRecord(record.record_id, LEADS, record.sampling_rate_hz, signal_mv if digital is None else digital)


def present_leads(record: EcgRecord) -> list[str]:
    """The standard leads that a recording has, in standard order."""
    named = {name.lower() for name in record.leads}
    return [lead for lead in LEADS if lead.lower() in named]


def lead_statistics(signal_mv: np.ndarray) -> LeadStatistics:
    """Statistics per lead of (lead, time), millivolt."""
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


def resample_linear(signal_mv: np.ndarray, from_hz: float, to_hz: float) -> np.ndarray:
    """(lead, time) at `from_hz` -> (lead, int(time * to_hz / from_hz)), first and last samples aligned.

    The same as torch's `interpolate(mode="linear", align_corners=True)`. An invalid sample makes invalid only the
    new samples that lie between it and its neighbours.
    """
    n_old = signal_mv.shape[1]
    n_new = int(n_old * to_hz / from_hz)
    if n_new == n_old:
        return signal_mv
    position = np.arange(n_new) * ((n_old - 1) / max(n_new - 1, 1))
    left = np.minimum(position.astype(np.int64), n_old - 1)
    right = np.minimum(left + 1, n_old - 1)
    weight = position - left
    resampled = signal_mv[:, left]
    inside = weight > 0  # 0 * NaN is NaN: a new sample that falls on an old one needs no neighbour
    # the difference, not left * (1 - weight) + right * weight: a constant lead stays exactly constant
    resampled[:, inside] += (signal_mv[:, right[inside]] - resampled[:, inside]) * weight[inside]
    return resampled


def cut_segments(samples: np.ndarray, segment_samples: int) -> np.ndarray:
    """(lead, time) -> (segment, lead, segment_samples), from the start without overlap; the tail is dropped."""
    n_leads, n_samples = samples.shape
    n_segments = n_samples // segment_samples
    whole = samples[:, : n_segments * segment_samples].reshape(n_leads, n_segments, segment_samples)
    return whole.swapaxes(0, 1)
