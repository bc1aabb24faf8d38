"""The words of this house: leads, one recording, and why a recording is turned away."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

Lead = Literal["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]
LEADS: tuple[Lead, ...] = get_args(Lead)
"""The twelve standard leads, I II III aVR aVL aVF V1 to V6, in the order every array of this project has them."""

INVALID = -32768
"""The stored value of an invalid sample (WFDB format 16); NaN in memory."""

RejectReason = Literal[
    "missing_header",  # a signal file without its header
    "missing_signal",  # a header without its signal file
    "unreadable_header",  # the header does not parse
    "unreadable_signal",  # the signal does not decode
    "truncated",  # fewer samples than the header promises
    "too_large",  # more samples than any resting ECG has: MAX_SAMPLES
    "unknown_format",  # a file of none of the formats that are read
    "unknown_units",  # neither V, mV, uV nor nV
    "no_standard_lead",  # none of the twelve leads by name
    "duplicate_lead",  # one lead name twice
    "no_valid_sample",  # nothing but invalid samples
    "too_short",  # not one whole segment, where a model is asked about it; prepare keeps it
    "invalid_sample",  # an invalid sample, where prepare.gaps turns these away
    "constant_lead",  # a lead that does not vary, where prepare.constant_leads turns these away
]
REJECT_REASONS: tuple[str, ...] = get_args(RejectReason)

MAX_SAMPLES = 12_000_000
"""Samples of all leads together that a reader decodes: 12 leads at 500 Hz for 33 minutes (the longest of the Challenge
of 2021 are 30). A damaged count must not take the machine's memory: so many take 0.7 GB to prepare, filtered 0.9."""


MAX_DETAIL = 400
"""Characters of a reject's detail: it may quote a file, and a file may hold anything."""


def one_line(text: str) -> str:
    """The text on one line and fit for a terminal: what does not print, such as a line end in a file's name, as Python
    writes it.

    >>> one_line("a\\nb")
    'a\\\\nb'
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class InputError(ValueError):
    """What the person who started the program can mend: a path, a config value, a file's content.

    The message is one line: what was expected, what was found, what to do. The command line shows it
    without a traceback and exits with 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Rejected(Exception):
    """One record cannot be used. It becomes a row of `rejects.parquet`; the run goes on.

    detail: on one line, and of at most `MAX_DETAIL` characters whatever is given

    >>> str(Rejected("too_short", "3.1 s, and a segment is 5 s"))
    'too_short: 3.1 s, and a segment is 5 s'
    """

    def __init__(self, reason: RejectReason, detail: str) -> None:
        detail = one_line(detail[: MAX_DETAIL + 1])
        detail = detail if len(detail) <= MAX_DETAIL else detail[: MAX_DETAIL - 3] + "..."
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Digital:
    """A signal as an ADC stored it: `mV = (digital - baseline) / adc_gain_per_mv`, lead by lead.

    digital: (lead, time) int16, `INVALID` where there is no sample
    adc_gain_per_mv: (lead,) float64, ADC units per millivolt
    baseline: (lead,) float64, the digital value at 0 mV

    >>> Digital(np.array([[0, 200, INVALID]], np.int16), np.array([200.0]), np.array([0.0])).to_mv()
    array([[ 0.,  1., nan]])
    """

    digital: np.ndarray
    adc_gain_per_mv: np.ndarray
    baseline: np.ndarray

    def to_mv(self, dtype: type[np.floating[Any]] = np.float64) -> np.ndarray:
        """(lead, time) of `dtype`, millivolt; NaN where the sample is invalid."""
        signal_mv = self.digital.astype(dtype)
        if self.baseline.any():
            signal_mv -= self.baseline[..., None].astype(dtype)
        signal_mv /= self.adc_gain_per_mv[..., None].astype(dtype)
        invalid = self.digital == INVALID
        if invalid.any():
            signal_mv[invalid] = np.nan
        return signal_mv


@dataclass(frozen=True)
class EcgRecord:
    """One ECG recording as its source gives it, leads in the file's own order and spelling.

    signal: `Digital` where the file is digital (int16) and so can be kept without loss; else (lead, time) float64,
        millivolt, NaN where invalid
    """

    record_id: str
    leads: tuple[str, ...]
    sampling_rate_hz: float
    signal: Digital | np.ndarray

    @cached_property
    def signal_mv(self) -> np.ndarray:
        """(lead, time) float64, millivolt; NaN where invalid. Worked out when it is first asked for."""
        return self.signal.to_mv() if isinstance(self.signal, Digital) else self.signal

    @property
    def digital(self) -> Digital | None:
        """The signal as stored in the file, where the file is digital."""
        return self.signal if isinstance(self.signal, Digital) else None

    @property
    def n_samples(self) -> int:
        """Samples per lead."""
        stored = self.signal.digital if isinstance(self.signal, Digital) else self.signal
        return int(stored.shape[1])


@dataclass(frozen=True)
class FileFacts:
    """What a recording's file says beside its signal; None or empty what it does not say.

    units: of the stored samples, as spelled in the file
    derived_leads: leads that the file does not store and the reader worked out from others
    patient_id: as the file has it, without a source before it
    statements: the interpretation, a line each
    comments: other remarks worth showing, such as the device or filters
    """

    format: str
    units: str = ""
    derived_leads: tuple[str, ...] = ()
    patient_id: str | None = None
    age_years: float | None = None
    sex: Literal["female", "male"] | None = None
    recorded_at: datetime | None = None
    statements: tuple[str, ...] = ()
    comments: tuple[str, ...] = ()
