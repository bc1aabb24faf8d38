"""The embedded source: synthetic recordings written as WFDB files in two published layouts.

The codes and reports are those of a fallible reader, as in real archives: about 2 in 100 assertions are wrong and as
many are missing (`misread`). So no classifier can be right everywhere, and a perfect score means a leak.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ecgfm.config import SyntheticConfig
from ecgfm.synthetic_ecg import OTHER_FINDINGS, RHYTHMS, Recording, random_stream, recordings

SNOMED_CODES: Mapping[str, tuple[str, ...]] = {
    "sinus_rhythm": ("426783006",),
    "sinus_bradycardia": ("426177001",),
    "sinus_tachycardia": ("427084000",),
    "atrial_fibrillation": ("164889003",),
    "pacing_rhythm": ("10370003",),
    "first_degree_av_block": ("270492004",),
    "left_bundle_branch_block": ("164909002",),
    "right_bundle_branch_block": ("59118001",),
    "premature_ventricular_contraction": ("427172004",),
    "inferior_infarction": ("164917005", "164867002"),  # Q wave abnormal, old myocardial infarction
    "low_quality": (),  # Challenge 2021 has no code for it; the reports say it
}

RECORDS_PER_FOLDER = 200
BROKEN = ("truncated", "without_signal", "broken_header")  # the three recordings that cannot be read, on purpose


def synthesize(inputs: Mapping[str, Any], config: SyntheticConfig, out: Path) -> dict[str, int]:
    """Write the synthetic source below `out`: two sets in published layouts, and `patients.csv`.

    Three patients of four are in `challenge-2021/` (PhysioNet/CinC Challenge 2021: WFDB format 16 behind a 24-byte
    MATLAB header, 1000/mV, SNOMED CT codes), every fourth in `mimic-iv-ecg/` (MIMIC-IV-ECG: 200/mV, aVF before aVL,
    reports and no codes). `patients.csv` says which records of the first set are one patient's; the Challenge has no
    place for it.

    A patient's recordings depend on the seed and the patient's number alone, so fewer patients are the first of many.
    The recordings named in `BROKEN` are patient 0's and always there: signal cut short, signal absent, header that
    does not parse.

    Equal seeds give equal bytes as long as numpy keeps its random streams. Between processors the last bit of a sine
    may differ, which the rounding to whole ADC steps hides but for about one sample in 1e12.

    inputs: none

    Returns:
        Counts: patients, readable records by set, broken records.
    """
    del inputs
    counts = {"patients": config.n_patients, "challenge_2021": 0, "mimic_iv_ecg": 0, "broken": len(BROKEN)}
    challenge = out / "challenge-2021" / "training" / "synthetic"
    mimic = out / "mimic-iv-ecg"
    patient_rows: list[tuple[str, str]] = []
    list_rows: list[list[Any]] = []
    machine_rows: list[list[Any]] = []

    _write_broken(challenge / "g1", config.seed)
    patient_rows += [(name, "p00000") for name in BROKEN]
    for number in range(1, config.n_patients + 1):
        reader = random_stream(config.seed, number, 1)
        for recording in recordings(config.seed, number):
            asserted = misread(reader, recording.findings)
            if number % 4:
                counts["challenge_2021"] += 1
                name = f"S{counts['challenge_2021']:05d}"
                folder = challenge / f"g{(counts['challenge_2021'] - 1) // RECORDS_PER_FOLDER + 1}"
                write_challenge(folder, name, recording, asserted)
                patient_rows.append((name, f"p{number:05d}"))
            else:
                counts["mimic_iv_ecg"] += 1
                subject, study = 10_000_000 + number // 4, 40_000_000 + counts["mimic_iv_ecg"]
                path = f"files/p{subject // 10_000}/p{subject}/s{study}/{study}"
                _write_mimic(mimic / path, subject, recording)
                list_rows.append([subject, study, study, recording.recorded_at, path])
                machine_rows.append(
                    _machine_row(subject, study, recording, report(reader, asserted, recording.heart_rate_bpm))
                )

    _write_csv(out / "patients.csv", ("record", "patient"), patient_rows)
    if list_rows:
        _write_csv(mimic / "record_list.csv", ("subject_id", "study_id", "file_name", "ecg_time", "path"), list_rows)
        _write_csv(mimic / "machine_measurements.csv", MACHINE_COLUMNS, machine_rows)
    return counts


# ---- what the reader writes


def misread(rng: np.random.Generator, findings: Sequence[str]) -> tuple[str, ...]:
    """What a fallible reader makes of the findings, the rhythm first.

    A rhythm is mistaken for another 2 times in 100; of the other findings, one that is there is overlooked 3 times in
    100, and one that is not there is seen 4 times in 1,000.
    """
    rhythm, *others = findings
    if rng.random() < 0.02:
        rhythm = str(rng.choice([other for other in RHYTHMS if other != rhythm]))
    seen = [finding for finding in others if rng.random() >= 0.03]
    seen += [finding for finding in OTHER_FINDINGS if finding not in others and rng.random() < 0.004]
    return (rhythm, *seen)


WORDINGS: Mapping[str, tuple[str, ...]] = {
    "sinus_rhythm": ("Sinus rhythm",),
    "sinus_bradycardia": ("Sinus bradycardia",),
    "sinus_tachycardia": ("Sinus tachycardia",),
    "atrial_fibrillation": ("Atrial fibrillation",),
    "pacing_rhythm": ("Ventricular paced rhythm", "Electronic ventricular pacemaker"),
    "first_degree_av_block": ("1st degree A-V block", "First degree A-V block", "with 1st degree A-V block"),
    "left_bundle_branch_block": ("Left bundle branch block",),
    "right_bundle_branch_block": ("Right bundle branch block", "RBBB"),
    "premature_ventricular_contraction": ("with PVC(s)", "Premature ventricular contractions", "Frequent PVCs"),
    "inferior_infarction": (
        "Inferior infarct - age undetermined",
        "Possible inferior infarct - age undetermined",
        "Old inferior infarct",
    ),
    "low_quality": (
        "Poor data quality, interpretation may be adversely affected",
        "Artifact in lead(s) I, II, V1 and baseline wander in lead(s) V3, V4",
    ),
}


def report(rng: np.random.Generator, asserted: Sequence[str], heart_rate_bpm: float) -> tuple[str, ...]:
    """Statements in the manner of an electrocardiograph's program, the rhythm first and the conclusion last."""
    statements: list[str] = []
    for finding in asserted:
        words = str(rng.choice(WORDINGS[finding]))
        if finding == "atrial_fibrillation" and heart_rate_bpm > 100:
            words += " with rapid ventricular response"
        elif finding == "atrial_fibrillation" and heart_rate_bpm < 60:
            words += " with slow ventricular response"
        if words.startswith("with "):  # MIMIC-IV-ECG writes "Sinus rhythm with PVC(s)" in one statement
            joined = " and " + words.removeprefix("with ") if " with " in statements[0] else " " + words
            statements[0] += joined
        else:
            statements.append(words)
    abnormal = set(asserted) - {"sinus_rhythm", "low_quality"}
    slight = abnormal <= {"sinus_bradycardia", "first_degree_av_block"}
    conclusion = "Normal ECG" if not abnormal else "Borderline ECG" if slight else "Abnormal ECG"
    return (*statements, conclusion)


MACHINE_COLUMNS = (
    *("subject_id", "study_id", "cart_id", "ecg_time"),
    *(f"report_{k}" for k in range(18)),
    *("bandwidth", "filtering", "rr_interval", "p_onset", "p_end", "qrs_onset", "qrs_end", "t_end"),
    *("p_axis", "qrs_axis", "t_axis"),
)
NOT_MEASURED = 29_999  # as the published table has it


def _machine_row(subject: int, study: int, recording: Recording, statements: Sequence[str]) -> list[Any]:
    """One row of machine_measurements.csv; times in milliseconds, QRS onset at P onset + PR."""
    p_onset = 40
    qrs_onset = 200 if recording.pr_s is None else p_onset + round(1000 * recording.pr_s)
    p_times = (NOT_MEASURED, NOT_MEASURED) if recording.pr_s is None else (p_onset, p_onset + 110)
    times = (qrs_onset, qrs_onset + round(1000 * recording.qrs_s), qrs_onset + round(1000 * recording.qt_s))
    reports = [*statements, *[""] * (18 - len(statements))]
    settings = ("0.005-150 Hz", "60 Hz notch Baseline filter")
    rr_ms = round(60_000 / recording.heart_rate_bpm)
    head = [subject, study, 6_000_000 + subject % 1000, recording.recorded_at]
    return [*head, *reports, *settings, rr_ms, *p_times, *times, *[NOT_MEASURED] * 3]


# ---- files


def write_challenge(folder: Path, name: str, recording: Recording, asserted: Sequence[str]) -> None:
    """`name.hea` and `name.mat` as the Challenge publishes them."""
    folder.mkdir(parents=True, exist_ok=True)
    n_leads, n_samples = recording.digital.shape
    age = "NaN" if recording.age_years is None else str(recording.age_years)
    codes = [code for finding in asserted for code in SNOMED_CODES[finding]]
    comments = (f"Age: {age}", f"Sex: {recording.sex.capitalize()}", f"Dx: {','.join(codes)}")
    header = [f"{name} {n_leads} {recording.sampling_rate_hz} {n_samples}"]
    header += _signal_lines(f"{name}.mat", "16+24", f"{recording.adc_gain_per_mv}/mV", recording, signed=True)
    header += [f"#{comment}" for comment in (*comments, "Rx: Unknown", "Hx: Unknown", "Sx: Unknown")]
    _write_lines(folder / f"{name}.hea", header)
    # MATLAB level 4: little-endian int16 matrix "val", (lead, time) column by column
    preamble = np.array([30, n_leads, n_samples, 0, 4], dtype="<i4").tobytes() + b"val\0"
    (folder / f"{name}.mat").write_bytes(preamble + _interleaved(recording))


def _write_mimic(path: Path, subject: int, recording: Recording) -> None:
    """`path.hea` and `path.dat` as MIMIC-IV-ECG publishes them: aVF before aVL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    order = [0, 1, 2, 3, 5, 4, *range(6, 12)]
    stored = replace(recording, leads=tuple(recording.leads[lead] for lead in order), digital=recording.digital[order])
    n_leads, n_samples = stored.digital.shape
    header = [f"{path.name} {n_leads} {stored.sampling_rate_hz} {n_samples} {stored.recorded_at:%H:%M:%S %d/%m/%Y}"]
    header += _signal_lines(f"{path.name}.dat", "16", f"{stored.adc_gain_per_mv}.0(0)/mV", stored, signed=False)
    header += [f"# <subject_id>: {subject}"]
    _write_lines(path.with_suffix(".hea"), header)
    path.with_suffix(".dat").write_bytes(_interleaved(stored))


def _signal_lines(file: str, storage: str, gain: str, recording: Recording, signed: bool) -> Iterator[str]:
    """The header's line for every lead; the checksum is the sum of the samples in 16 bits."""
    for lead, samples in zip(recording.leads, recording.digital, strict=True):
        checksum = int(samples.sum(dtype=np.int64)) % 65_536
        if signed and checksum >= 32_768:
            checksum -= 65_536
        yield f"{file} {storage} {gain} 16 0 {samples[0]} {checksum} 0 {lead}"


def _interleaved(recording: Recording) -> bytes:
    return recording.digital.T.astype("<i2").tobytes()


def _write_broken(folder: Path, seed: int) -> None:
    """The recordings that no reader can read: each one is a good recording of patient 0, then damaged."""
    recording = next(iter(recordings(seed, 0)))
    for name in BROKEN:
        write_challenge(folder, name, recording, recording.findings)
    signal = folder / "truncated.mat"
    signal.write_bytes(signal.read_bytes()[: signal.stat().st_size * 3 // 5])
    (folder / "without_signal.mat").unlink()
    header = folder / "broken_header.hea"
    text = header.read_bytes()
    header.write_bytes(text.replace(b"broken_header 12 ", b"broken_header twelve ", 1))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
