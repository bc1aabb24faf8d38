"""Synthetic 12-lead ECGs: persons with persistent findings, and their recordings, from a physiological model.

Each heartbeat is a sum of Gaussian movements of one dipole (x left, y down, z back), after Sameni et al. 2007,
"Multichannel ECG and noise modeling" (EURASIP J. Adv. Signal Process. 2007:43407), and McSharry et al. 2003, "A
dynamical model for generating synthetic electrocardiogram signals" (IEEE Trans. Biomed. Eng. 50:289). Dower's matrix
(Dower et al. 1980, "On deriving the electrocardiogram from vectorcardiographic leads", Clin. Cardiol. 3:87) projects
the dipole to the leads. Noise is added to the nine electrodes, as a real amplifier would see it.

In the stored integers III = II - I exactly. The augmented leads are derived from the stored I and II and rounded half
to even, so aVR + aVL + aVF is 0 within one digitisation step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from ecgfm.ecg import INVALID, LEADS

RHYTHMS = ("sinus_rhythm", "sinus_bradycardia", "sinus_tachycardia", "atrial_fibrillation", "pacing_rhythm")
OTHER_FINDINGS = (
    "first_degree_av_block",
    "left_bundle_branch_block",
    "right_bundle_branch_block",
    "premature_ventricular_contraction",
    "inferior_infarction",
)

# Rows I, II, V1..V6; columns x, y, z.
DOWER = np.array(
    [
        [0.632, -0.235, 0.059],
        [0.235, 1.066, -0.132],
        [-0.515, 0.157, -0.917],
        [0.044, 0.164, -1.387],
        [0.882, 0.098, -1.277],
        [1.213, 0.127, -0.601],
        [1.125, 0.127, -0.086],
        [0.831, 0.076, 0.230],
    ]
)
# The same eight leads as differences of the electrodes RA, LA, LL, C1..C6; chest leads against Wilson's terminal.
ELECTRODES = np.zeros((8, 9))
ELECTRODES[0, :2] = -1, 1
ELECTRODES[1, [0, 2]] = -1, 1
ELECTRODES[2:, :3] = -1 / 3
ELECTRODES[2:, 3:] = np.eye(6)

Dipole = tuple[float, float, float]
Deflection = tuple[float, float, Dipole]
"""One part of a QRS complex: centre and width as fractions of the complex's duration, dipole in millivolt."""

Conduction = Literal["normal", "right_block", "left_block", "paced"]
QRS: Mapping[str, tuple[Deflection, ...]] = {
    "normal": (
        (0.20, 0.075, (-0.12, -0.05, -0.18)),
        (0.47, 0.115, (1.00, 0.80, 0.45)),
        (0.78, 0.095, (-0.20, -0.20, 0.60)),
    ),
    "right_block": (
        (0.12, 0.048, (-0.12, -0.05, -0.22)),
        (0.32, 0.080, (1.00, 0.75, 0.50)),
        (0.50, 0.070, (-0.05, -0.15, 0.35)),
        (0.76, 0.105, (-0.52, 0.02, -0.50)),
    ),
    "left_block": ((0.34, 0.130, (0.80, 0.35, 0.90)), (0.67, 0.140, (0.85, 0.15, 0.95))),
    "paced": ((0.36, 0.140, (0.60, -0.50, 0.80)), (0.65, 0.145, (0.30, -0.85, 0.70))),
    "right_ventricular_beat": ((0.36, 0.145, (0.50, 0.95, 0.80)), (0.63, 0.150, (0.45, 0.80, 0.80))),
    "left_ventricular_beat": ((0.36, 0.145, (-0.40, -0.65, -0.85)), (0.63, 0.150, (-0.55, -0.55, -0.75))),
}
REPOLARISATION: Mapping[str, tuple[Dipole, Dipole]] = {  # ST segment, T wave
    "normal": ((0.02, 0.02, -0.03), (0.25, 0.22, -0.15)),
    "right_block": ((0.00, 0.00, 0.02), (0.26, 0.20, 0.12)),
    "left_block": ((-0.10, -0.03, -0.18), (-0.22, -0.05, -0.40)),
    "paced": ((-0.06, 0.14, -0.15), (-0.20, 0.42, -0.40)),
    "right_ventricular_beat": ((-0.08, -0.16, -0.15), (-0.28, -0.45, -0.45)),
    "left_ventricular_beat": ((0.08, 0.12, 0.16), (0.30, 0.38, 0.45)),
}
P_WAVE: tuple[tuple[float, float, Dipole], ...] = (  # seconds from the onset of P
    (0.042, 0.017, (0.06, 0.12, -0.05)),
    (0.070, 0.018, (0.08, 0.08, 0.05)),
)


class Wave(NamedTuple):
    """An asymmetric Gaussian movement of the dipole; the centre counts from the onset of the QRS complex."""

    centre_s: float
    rise_s: float
    fall_s: float
    dipole_mv: np.ndarray  # (3,)


class Beat(NamedTuple):
    """One heartbeat: the onset of its QRS complex, the interval before it, its voltage relative to the mean."""

    onset_s: float
    rr_s: float
    voltage: float
    ventricular: bool = False


@dataclass(frozen=True)
class Patient:
    """What stays with a person from recording to recording."""

    age_years: float
    sex: str
    rhythm: Literal["sinus", "atrial_fibrillation", "paced"]
    conduction: Conduction
    infarction: float  # mV of the inferior Q wave's dipole; 0: none
    heart_rate_bpm: float
    pr_s: float
    qrs_s: Mapping[str, float]  # by kind of complex
    qt_corrected_s: float
    ventricular_share: float  # of the recordings that have premature ventricular beats
    ventricular_kind: str
    voltage: float
    t_voltage: float
    rotation: np.ndarray  # (3, 3), the heart's position
    torso: np.ndarray  # (8, 3), Dower's matrix for this chest
    variation: Mapping[str, np.ndarray]  # (deflection, 3) factors on the dipoles, by kind of complex
    terminal_mv: np.ndarray  # (3,) a small late force to the right, as in incomplete right bundle branch block
    mains_hz: float


@dataclass(frozen=True)
class Recording:
    """One synthetic ECG with what is true of it.

    digital: (lead, time) int16, INVALID where there is no sample
    age_years: None where the recording does not say
    pr_s: None without P waves; qrs_s and onsets_s (of the QRS complex): of the conducted or paced beats
    findings: what was put in, one of RHYTHMS first
    """

    age_years: float | None
    sex: str
    leads: tuple[str, ...]
    digital: np.ndarray
    sampling_rate_hz: int
    adc_gain_per_mv: int
    heart_rate_bpm: float
    pr_s: float | None
    qrs_s: float
    qt_s: float
    onsets_s: np.ndarray
    ventricular_onsets_s: np.ndarray
    findings: tuple[str, ...]
    recorded_at: datetime


def recordings(seed: int, number: int) -> Iterator[Recording]:
    """The one to four recordings of patient `number`. Every fourth patient is recorded as MIMIC-IV-ECG does."""
    rng = random_stream(seed, number)
    patient = draw_patient(rng)
    recorded_at = datetime(2110, 1, 1) + timedelta(minutes=int(rng.integers(80 * 365 * 24 * 60)))
    for _ in range(int(rng.integers(1, 5))):
        yield record(rng, patient, recorded_at, mimic=number % 4 == 0)
        recorded_at += timedelta(minutes=int(rng.integers(30, 300 * 24 * 60)))


def random_stream(*key: int) -> np.random.Generator:
    """A stream of random numbers of its own for every key."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


# ---- the person


def draw_patient(rng: np.random.Generator) -> Patient:
    """A person with what stays the same from recording to recording."""
    rhythm: Any = rng.choice(("sinus", "atrial_fibrillation", "paced"), p=(0.735, 0.15, 0.115))
    blocks: Any = rng.choice(("normal", "right_block", "left_block"), p=(0.72, 0.16, 0.12))
    conduction: Conduction = "paced" if rhythm == "paced" else blocks
    infarcted = conduction in ("normal", "right_block") and rng.random() < 0.16
    infarction = rng.uniform(0.25, 0.80) if infarcted else 0.0
    ill = rhythm != "sinus" or conduction != "normal" or infarcted
    age_years = round(float(np.clip(rng.normal(66 if ill else 54, 14 if ill else 17), 18, 95)))
    sex = str(rng.choice(("female", "male")))

    pace = rng.choice(3, p=(0.68, 0.17, 0.15))
    heart_rate = (rng.normal(75, 8), rng.normal(53, 5), rng.normal(111, 11))[pace]
    heart_rate += (3 if sex == "female" else 0) - 0.08 * (age_years - 55)
    pr_s = float(np.clip(rng.normal(0.158, 0.018), 0.120, 0.195))
    if rng.random() < 0.19:
        pr_s = rng.uniform(0.206, 0.232) if rng.random() < 0.45 else rng.uniform(0.232, 0.310)
    durations = {
        "normal": float(np.clip(rng.normal(0.092, 0.008), 0.074, 0.112)),
        "right_block": rng.uniform(0.122, 0.158),
        "left_block": rng.uniform(0.132, 0.172),
        "paced": rng.uniform(0.146, 0.186),
        "right_ventricular_beat": rng.uniform(0.138, 0.180),
        "left_ventricular_beat": rng.uniform(0.138, 0.180),
    }
    angles = np.radians(rng.normal((3.0, 0.0, 0.0), (18.0, 9.0, 9.0)))
    incomplete_block = rng.random() < 0.12
    return Patient(
        age_years=age_years,
        sex=sex,
        rhythm=rhythm,
        conduction=conduction,
        infarction=float(infarction),
        heart_rate_bpm=float(heart_rate),
        pr_s=float(pr_s),
        qrs_s=durations,
        qt_corrected_s=rng.normal(0.405 if sex == "female" else 0.395, 0.014),
        ventricular_share=0.55 if rng.random() < 0.20 else 0.02,
        ventricular_kind=str(rng.choice(("right_ventricular_beat", "left_ventricular_beat"))),
        voltage=float(rng.lognormal(0.0, 0.18) * (0.93 if sex == "female" else 1.05) * (1 - 0.003 * (age_years - 55))),
        t_voltage=float(rng.lognormal(0.0, 0.25) * (0.3 if rng.random() < 0.10 else 1.0)),
        rotation=_rotation(angles),
        torso=DOWER * rng.normal(1.0, 0.07, DOWER.shape),
        variation={kind: rng.normal(1.0, 0.15, (len(parts), 3)) for kind, parts in QRS.items()},
        terminal_mv=np.array((-0.22, 0.0, -0.28)) * rng.uniform(0.6, 1.6) * incomplete_block,
        mains_hz=float(rng.choice((50.0, 60.0))),
    )


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation by angles in the frontal (x, y), the horizontal (x, z) and the sagittal (y, z) plane."""
    whole = np.eye(3)
    for angle, (first, second) in zip(angles, ((0, 1), (0, 2), (1, 2)), strict=True):
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[second, first] = np.sin(angle)
        turn[first, second] = -np.sin(angle)
        whole = turn @ whole
    return whole


# ---- one recording


def record(rng: np.random.Generator, patient: Patient, recorded_at: datetime, mimic: bool) -> Recording:
    """One recording of a patient: what is found today, the signal, the defects of the day."""
    now = _today(rng, patient)
    sampling_rate_hz, duration_s, defect = _acquisition(rng, mimic)
    n_samples = round(duration_s * sampling_rate_hz)
    beats = _beats(rng, now, duration_s)
    if rng.random() < now.ventricular_share:
        beats = _with_ventricular_beats(rng, beats, duration_s)
    conducted = np.array([beat.onset_s for beat in beats if not beat.ventricular and 0 <= beat.onset_s < duration_s])
    ventricular = np.array([beat.onset_s for beat in beats if beat.ventricular])
    recorded = (pair for pair in pairwise(beats) if pair[0].onset_s >= 0 and pair[1].onset_s < duration_s)
    rr_s = float(np.mean([beat.rr_s for _, beat in recorded if not beat.ventricular]))
    now = replace(now, pr_s=min(now.pr_s, 0.16 + 0.12 * rr_s))  # conduction is faster at a fast rate
    low_quality = rng.random() < 0.085
    findings = _findings(now, 60 / rr_s, bool(len(ventricular)), low_quality)

    dipole_mv = _dipole(rng, now, beats, n_samples, sampling_rate_hz)
    signal_mv = now.torso @ dipole_mv + ELECTRODES @ _noise_mv(rng, now, n_samples, sampling_rate_hz, low_quality)
    adc_gain_per_mv = 200 if mimic else 1000
    leads, digital = _with_defect(rng, _digitise(signal_mv, adc_gain_per_mv), defect, sampling_rate_hz)

    return Recording(
        age_years=None if rng.random() < 0.02 else patient.age_years,
        sex=patient.sex,
        leads=leads,
        digital=digital,
        sampling_rate_hz=sampling_rate_hz,
        adc_gain_per_mv=adc_gain_per_mv,
        heart_rate_bpm=60 / rr_s,
        pr_s=now.pr_s if now.rhythm == "sinus" else None,
        qrs_s=now.qrs_s[now.conduction],
        qt_s=_qt_s(now, rr_s),
        onsets_s=conducted,
        ventricular_onsets_s=ventricular,
        findings=findings,
        recorded_at=recorded_at,
    )


def _today(rng: np.random.Generator, patient: Patient) -> Patient:
    """The patient on the day of a recording: most findings persist, some come and go, all vary a little."""
    rhythm, conduction = patient.rhythm, patient.conduction
    if rhythm == "atrial_fibrillation":
        rhythm = "sinus" if rng.random() < 0.20 else rhythm
    elif rhythm == "paced" and rng.random() < 0.10:  # a pacemaker on demand that was not needed
        rhythm, conduction = "sinus", "normal"
    if conduction in ("left_block", "right_block") and rng.random() < 0.10:
        conduction = "normal"
    heart_rate = patient.heart_rate_bpm
    if rhythm == "atrial_fibrillation":
        heart_rate = 0.5 * heart_rate + rng.normal(48, 12)
    if rhythm == "paced":
        heart_rate = float(rng.choice((60.0, 65.0, 70.0, 75.0, 80.0)))
    else:
        heart_rate = float(np.clip(heart_rate + rng.normal(0, 4.5), 38, 150))
    return replace(
        patient,
        rhythm=rhythm,
        conduction=conduction,
        heart_rate_bpm=heart_rate,
        pr_s=patient.pr_s + rng.normal(0, 0.004),
        qrs_s={kind: duration + rng.normal(0, 0.002) for kind, duration in patient.qrs_s.items()},
        qt_corrected_s=patient.qt_corrected_s + rng.normal(0, 0.006),
        voltage=patient.voltage * rng.lognormal(0, 0.05),
        t_voltage=patient.t_voltage * rng.lognormal(0, 0.12),
        rotation=_rotation(np.radians(rng.normal(0, 3.0, 3))) @ patient.rotation,
        torso=patient.torso * rng.normal(1.0, 0.03, (8, 3)),  # electrodes are never put in the same place twice
    )


def _acquisition(rng: np.random.Generator, mimic: bool) -> tuple[int, float, str | None]:
    """Sampling rate in Hz, duration in seconds, and a defect of the day."""
    sampling_rate_hz = int(rng.choice((500, 400, 1000, 250), p=(0.85, 0.06, 0.04, 0.05)))
    kind = rng.choice(("standard", "tiny", "short", "long"), p=(0.88, 0.015, 0.065, 0.04))
    duration_s = {
        "standard": 10.0,
        "tiny": 4.0,
        "short": float(rng.integers(10, 19) / 2),
        "long": float(rng.integers(15, 31)),
    }[str(kind)]
    defect = str(rng.choice(("none", "flat", "invalid", "missing"), p=(0.95, 0.017, 0.017, 0.016)))
    if mimic:  # all of MIMIC-IV-ECG has 12 leads of 10 s at 500 Hz
        sampling_rate_hz, duration_s = 500, 10.0
        defect = "none" if defect == "missing" else defect
    return sampling_rate_hz, duration_s, None if defect == "none" else defect


def _findings(now: Patient, heart_rate_bpm: float, ventricular: bool, low_quality: bool) -> tuple[str, ...]:
    if now.rhythm == "sinus":
        pace = "bradycardia" if heart_rate_bpm < 60 else "tachycardia" if heart_rate_bpm > 100 else "rhythm"
        rhythm = f"sinus_{pace}"
    else:
        rhythm = {"atrial_fibrillation": "atrial_fibrillation", "paced": "pacing_rhythm"}[now.rhythm]
    present = {
        "first_degree_av_block": now.rhythm == "sinus" and now.pr_s > 0.200,
        "left_bundle_branch_block": now.conduction == "left_block",
        "right_bundle_branch_block": now.conduction == "right_block",
        "premature_ventricular_contraction": ventricular,
        "inferior_infarction": now.infarction > 0,
        "low_quality": low_quality,
    }
    return (rhythm, *(finding for finding, is_there in present.items() if is_there))


# ---- rhythm


def _beats(rng: np.random.Generator, now: Patient, duration_s: float) -> list[Beat]:
    """Beats from before the start to after the end of a recording.

    Sinus intervals swing with breathing (less so with age) and at 0.1 Hz; fibrillation's are independent draws; a
    pacemaker's are equal within a millisecond. The voltage swings with breathing, too.
    """
    breathing_hz, breathing_phase = rng.uniform(0.18, 0.32), rng.uniform(0, 2 * np.pi)
    mean_s = 60 / now.heart_rate_bpm
    arrhythmia = rng.uniform(0.3, 1.0) * 0.09 * np.exp(-(now.age_years - 18) / 28)
    irregularity = rng.uniform(0.14, 0.26)
    slow_phase = rng.uniform(0, 2 * np.pi)
    time_s = -2.0 - rng.uniform(0, mean_s)
    beats = []
    while time_s < duration_s + 0.6:
        breathing = np.sin(2 * np.pi * breathing_hz * time_s + breathing_phase)
        if now.rhythm == "atrial_fibrillation":
            rr_s = max(mean_s * rng.gamma(irregularity**-2, irregularity**2), 0.30)
        elif now.rhythm == "paced":
            rr_s = mean_s + rng.normal(0, 0.001)
        else:
            swing = (
                arrhythmia * breathing + 0.012 * np.sin(2 * np.pi * 0.1 * time_s + slow_phase) + rng.normal(0, 0.008)
            )
            rr_s = mean_s * (1 + swing)
        time_s += rr_s
        beats.append(Beat(float(time_s), float(rr_s), 1 + 0.06 * breathing + rng.normal(0, 0.02)))
    return beats


def _with_ventricular_beats(rng: np.random.Generator, beats: Sequence[Beat], duration_s: float) -> list[Beat]:
    """Some beats replaced by early ventricular ones. The next beat comes when it would have: a compensatory pause."""
    candidates = [k for k in range(1, len(beats)) if beats[k - 1].onset_s > 0 and beats[k].onset_s < duration_s - 0.2]
    wanted = 1 + int(rng.poisson(1.3))
    chosen: list[int] = []
    for k in rng.permutation(candidates):
        if len(chosen) < wanted and all(abs(k - other) > 1 for other in chosen):
            chosen.append(int(k))
    early = rng.uniform(0.54, 0.72)  # one focus has one coupling interval
    changed = list(beats)
    for k in chosen:
        rr_s = max(beats[k].rr_s * (early + rng.normal(0, 0.01)), 0.3)  # not earlier: the ventricle is refractory
        changed[k] = Beat(beats[k - 1].onset_s + rr_s, rr_s, beats[k].voltage, ventricular=True)
    return changed


# ---- the dipole


def _dipole(
    rng: np.random.Generator, now: Patient, beats: Sequence[Beat], n_samples: int, sampling_rate_hz: int
) -> np.ndarray:
    """(3, time) millivolt: the waves of all beats, with fibrillation and pacing spikes where there are any."""
    dipole_mv = np.zeros((3, n_samples))
    for beat in beats:
        waves = _waves(now, beat)
        first = max(0, int((beat.onset_s - 0.4) * sampling_rate_hz))
        last = min(n_samples, int((beat.onset_s + 0.8) * sampling_rate_hz))
        if last <= first:
            continue
        since_onset_s = np.arange(first, last) / sampling_rate_hz - beat.onset_s
        from_centre_s = since_onset_s - np.array([[wave.centre_s] for wave in waves])
        rise_s, fall_s = (np.array([[getattr(wave, side)] for wave in waves]) for side in ("rise_s", "fall_s"))
        shapes = np.exp(-0.5 * np.square(from_centre_s / np.where(from_centre_s < 0, rise_s, fall_s)))
        dipole_mv[:, first:last] += np.stack([wave.dipole_mv for wave in waves], axis=1) @ shapes
    if now.rhythm == "atrial_fibrillation":
        dipole_mv += _fibrillation(rng, n_samples, sampling_rate_hz)
    if now.rhythm == "paced":
        strength_mv = float(np.clip(rng.lognormal(np.log(0.6), 0.6), 0.15, 2.5))
        height_mv = strength_mv * min(1.0, 0.002 * sampling_rate_hz)  # the 2 ms spike, averaged over a longer sample
        width = max(1, round(0.002 * sampling_rate_hz))
        for beat in beats:
            at = round((beat.onset_s - 0.006) * sampling_rate_hz)
            if not beat.ventricular and 0 <= at < n_samples:
                dipole_mv[:, at : at + width] += height_mv * np.array([[0.45], [0.80], [0.35]])
    return dipole_mv


def _waves(now: Patient, beat: Beat) -> list[Wave]:
    """The waves of one beat, turned to the heart's position and scaled to the patient's voltage."""
    kind = now.ventricular_kind if beat.ventricular else now.conduction
    duration_s = now.qrs_s[kind]
    voltage = now.voltage * beat.voltage
    infarction = 0.0 if beat.ventricular else now.infarction

    def wave(centre_s: float, rise_s: float, fall_s: float, dipole_mv: Dipole | np.ndarray) -> Wave:
        return Wave(centre_s, rise_s, fall_s, voltage * (now.rotation @ np.asarray(dipole_mv)))

    waves = []
    for (centre, width, dipole), variation in zip(QRS[kind], now.variation[kind], strict=True):
        moved = np.array(dipole) * variation
        moved[1] -= 0.35 * infarction * (centre < 0.6)  # dead inferior wall: less force downwards
        waves.append(wave(centre * duration_s, width * duration_s, width * duration_s, moved))
    if kind == "normal":
        waves.append(wave(0.93 * duration_s, 0.012, 0.012, now.terminal_mv))

    qt_s = _qt_s(now, beat.rr_s) + duration_s - now.qrs_s[now.conduction]
    st_mv, t_mv = (np.array(dipole) * now.t_voltage for dipole in REPOLARISATION[kind])
    if infarction:  # Q of 40 ms or so, ST still raised in some, T inverted; all in the inferior leads
        waves.append(wave(0.024, 0.0100, 0.0130, (0.0, -infarction, 0.0)))
        st_mv = st_mv + np.array((-0.02, 0.12, 0.0)) * max(0.0, infarction - 0.40)
        t_mv = t_mv - np.array((0.0, 0.40 * min(infarction, 0.8), 0.0))
    fall_s = 0.10 * qt_s
    waves.append(wave(0.5 * (duration_s + qt_s - 2.2 * fall_s), 0.045, 0.050, st_mv))
    waves.append(wave(qt_s - 2.2 * fall_s, 0.15 * qt_s, fall_s, t_mv))

    if now.rhythm == "sinus" and not beat.ventricular:
        waves += [wave(centre_s - now.pr_s, width_s, width_s, dipole) for centre_s, width_s, dipole in P_WAVE]
    return waves


def _qt_s(now: Patient, rr_s: float) -> float:
    """QT by Fridericia's cube root of the RR interval (half way to the mean: QT lags behind), longer by a wide QRS."""
    lagged_s = 0.5 * (rr_s + 60 / now.heart_rate_bpm)
    return float(now.qt_corrected_s * np.cbrt(lagged_s)) + 0.7 * (now.qrs_s[now.conduction] - 0.09)


def _fibrillation(rng: np.random.Generator, n_samples: int, sampling_rate_hz: int) -> np.ndarray:
    """(3, time) millivolt: fibrillatory waves, a wandering frequency of 4 to 9 Hz, strongest towards V1."""
    time_s = np.arange(n_samples) / sampling_rate_hz
    centre_hz = rng.uniform(4.8, 8.0)
    wander_hz = 0.7 * np.sin(2 * np.pi * rng.uniform(0.15, 0.5) * time_s + rng.uniform(0, 2 * np.pi))
    phase = 2 * np.pi * np.cumsum(centre_hz + wander_hz) / sampling_rate_hz
    waxing = 1 + 0.4 * np.sin(2 * np.pi * rng.uniform(0.2, 0.6) * time_s + rng.uniform(0, 2 * np.pi))
    strength_mv = rng.lognormal(np.log(0.065), 0.45)
    main = np.array([[-0.45], [0.45], [-0.75]]) * np.sin(phase) * waxing
    second = np.array([[-0.30], [-0.15], [-0.30]]) * np.sin(2 * phase + rng.uniform(0, 2 * np.pi))
    return np.asarray(strength_mv * (main + second))


# ---- noise and digitisation


def _noise_mv(
    rng: np.random.Generator, now: Patient, n_samples: int, sampling_rate_hz: int, low_quality: bool
) -> np.ndarray:
    """(electrode, time) millivolt: baseline wander, muscle, mains hum and movement at RA, LA, LL, C1..C6."""
    time_s = np.arange(n_samples) / sampling_rate_hz
    n_padded = 1 << (n_samples - 1).bit_length()  # a fast length for the transform
    frequency_hz = np.fft.rfftfreq(n_padded, 1 / sampling_rate_hz)

    def coloured(shape: np.ndarray, strength_mv: np.ndarray) -> np.ndarray:
        """Gaussian noise of nine electrodes with an amplitude spectrum and standard deviations (electrode,)."""
        real, imaginary = rng.standard_normal((2, 9, len(frequency_hz)))
        noise = np.fft.irfft((real + 1j * imaginary) * shape, n_padded)[:, :n_samples]
        return np.asarray(noise * (strength_mv[:, None] * n_padded / (2 * np.sqrt(np.sum(np.square(shape))))))

    poor = rng.uniform(0.4, 2.2) if low_quality else 0.0
    wander_mv = rng.lognormal(np.log(0.035), 0.6) * (1 + 5 * poor) * rng.uniform(0.6, 1.4, 9)
    muscle_mv = rng.lognormal(np.log(0.008), 0.7) * (1 + 7 * poor) * rng.uniform(0.5, 1.5, 9)
    slow = np.exp(-np.square(frequency_hz / 0.35)) * (frequency_hz > 0.04)
    fast = np.exp(-np.square((frequency_hz - 60) / 55)) * (frequency_hz > 15)
    noise_mv = coloured(slow, wander_mv)
    centre_s, width_s = rng.uniform(0, time_s[-1]), rng.uniform(0.4, 1.5)
    tension = 1 + rng.uniform(0, 4) * (rng.random() < 0.2) * np.exp(-np.square((time_s - centre_s) / width_s))
    noise_mv += coloured(fast, muscle_mv) * tension

    if rng.random() < 0.30:
        hum = np.sin(2 * np.pi * now.mains_hz * time_s + rng.uniform(0, 2 * np.pi))
        noise_mv += rng.lognormal(np.log(0.006), 0.6) * rng.normal(1.0, 0.7, (9, 1)) * hum
    for _ in range(int(rng.integers(3, 9)) if low_quality else int(rng.random() < 0.05)):
        since_s = time_s - rng.uniform(0, time_s[-1])
        jolt = np.exp(-np.abs(since_s) / np.where(since_s < 0, 0.03, rng.uniform(0.1, 0.6)))
        noise_mv[int(rng.integers(9))] += rng.normal(0, 0.7) * jolt
    return noise_mv


def _digitise(signal_mv: np.ndarray, adc_gain_per_mv: int) -> np.ndarray:
    """(12, time) int16 from the eight independent leads; the limb leads are derived from the stored I and II."""
    whole = np.rint(signal_mv * adc_gain_per_mv).astype(np.int64)
    one, two = np.clip(whole[:2], -16_000, 16_000)  # where the converter saturates; leaves room for II - I
    augmented = [-(one + two) / 2, one - two / 2, two - one / 2]
    limb = [one, two, two - one, *(np.rint(lead).astype(np.int64) for lead in augmented)]
    return np.concatenate([np.stack(limb), np.clip(whole[2:], -32_000, 32_000)]).astype(np.int16)


def _with_defect(
    rng: np.random.Generator, digital: np.ndarray, defect: str | None, sampling_rate_hz: int
) -> tuple[tuple[str, ...], np.ndarray]:
    """A chest electrode fallen off (a flat lead), loose (invalid samples), or leads that were not stored."""
    if defect is None:
        return LEADS, digital
    chest = int(rng.integers(6, 12))
    digital = digital.copy()
    if defect == "flat":
        digital[chest] = 0
    elif defect == "invalid":
        length = int(rng.uniform(0.1, 2.0) * sampling_rate_hz)
        start = int(rng.integers(digital.shape[1] - length))
        digital[chest, start : start + length] = INVALID
    else:
        absent = {chest} if rng.random() < 0.5 else {2, 3, 4, 5}
        kept = [lead for lead in range(12) if lead not in absent]
        return tuple(LEADS[lead] for lead in kept), digital[kept]
    return LEADS, digital
