"""The embedded source: what the signals show, that the files are genuine, and that nothing depends on chance."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.signal import butter, find_peaks, sosfiltfilt

from ecgfm.config import SyntheticConfig
from ecgfm.contracts import check
from ecgfm.ecg import INVALID, LEADS, InputError, Rejected
from ecgfm.sources import synthetic
from ecgfm.synthesize import BROKEN, SNOMED_CODES, misread, report, synthesize
from ecgfm.synthetic_ecg import OTHER_FINDINGS, RHYTHMS, Recording, random_stream, recordings

N_PATIENTS = 24


@pytest.fixture(scope="module")
def raw_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("raw")
    synthesize({}, SyntheticConfig(n_patients=N_PATIENTS), out)
    return out


@pytest.fixture(scope="module")
def cohort() -> list[Recording]:
    """Every recording of the default configuration."""
    default = SyntheticConfig()
    return [r for number in range(1, default.n_patients + 1) for r in recordings(default.seed, number)]


@pytest.fixture(scope="module")
def readable(cohort: list[Recording]) -> list[Recording]:
    """Those whose signal can be measured by simple means: whole, ten seconds or more, of good quality."""
    return [
        r
        for r in cohort
        if "low_quality" not in r.findings
        and len(r.leads) == 12
        and (r.digital != INVALID).all()
        and r.digital.std(axis=1).all()
        and r.digital.shape[1] >= 10 * r.sampling_rate_hz
    ]


def having(recs: list[Recording], *findings: str, but: tuple[str, ...] = ()) -> list[Recording]:
    chosen = [r for r in recs if set(findings) <= set(r.findings) and not set(but) & set(r.findings)]
    assert len(chosen) >= 8, f"too few recordings with {findings} to say anything"
    return chosen


# ---- measuring, with no knowledge of the generator


def filtered_mv(r: Recording) -> np.ndarray:
    band = butter(2, (0.5, min(45, 0.4 * r.sampling_rate_hz)), "band", fs=r.sampling_rate_hz, output="sos")
    return np.asarray(sosfiltfilt(band, r.digital / r.adc_gain_per_mv, axis=1))


def beat_times_s(r: Recording) -> np.ndarray:
    """Centres of QRS complexes: where all leads together move fast."""
    rate = r.sampling_rate_hz
    speed = np.abs(np.gradient(filtered_mv(r), axis=1)).sum(axis=0)
    speed = np.convolve(speed, np.hanning(round(0.14 * rate)), "same")
    peaks, _ = find_peaks(speed, height=0.38 * np.quantile(speed, 0.98), distance=round(0.27 * rate))
    return np.asarray(peaks / rate)


def mean_beat_mv(r: Recording) -> tuple[np.ndarray, np.ndarray]:
    """(time,) seconds from the QRS onset and (lead, time) millivolt: the median of all conducted beats."""
    rate, signal_mv = r.sampling_rate_hz, filtered_mv(r)
    window = np.arange(-round(0.42 * rate), round(0.40 * rate))
    starts = [round(onset * rate) for onset in r.onsets_s]
    beats = [
        signal_mv[:, start + window]
        for start in starts
        if start + window[0] >= 0 and start + window[-1] < len(signal_mv[0])
    ]
    return window / rate, np.median(beats, axis=0)


def qrs_s(r: Recording) -> float:
    """Time for which the median beat moves fast, seconds."""
    time_s, beat = mean_beat_mv(r)
    speed = np.abs(np.gradient(beat, axis=1)).sum(axis=0)[(time_s > -0.04) & (time_s < 0.22)]
    fast = np.flatnonzero(speed > 0.15 * speed.max())
    return float((fast[-1] - fast[0]) / r.sampling_rate_hz)


# ---- physics


def test_limb_leads_obey_einthoven_in_stored_integers(cohort: list[Recording]) -> None:
    n_whole = 0
    for r in cohort:
        if len(r.leads) < 8 or "III" not in r.leads:
            continue
        lead = dict(zip(r.leads, r.digital.astype(int), strict=True))
        n_whole += 1
        assert np.array_equal(lead["I"] + lead["III"], lead["II"])
        assert np.abs(lead["aVR"] + lead["aVL"] + lead["aVF"]).max() <= 1
        assert np.abs(lead["aVR"] + (lead["I"] + lead["II"]) / 2).max() <= 0.5
        assert np.abs(lead["aVF"] - (lead["II"] + lead["III"]) / 2).max() <= 0.5
    assert n_whole > 500


def test_beats_are_where_they_are_said_to_be(readable: list[Recording]) -> None:
    shares, n_found, n_said = [], 0, 0
    for r in having(readable, "sinus_rhythm", but=("left_bundle_branch_block",)):  # its T waves are as fast
        found = beat_times_s(r)
        said = np.concatenate([r.onsets_s + r.qrs_s / 2, r.ventricular_onsets_s + 0.08])
        said = said[(said > 0.2) & (said < r.digital.shape[1] / r.sampling_rate_hz - 0.2)]
        shares.append(np.mean([np.abs(found - time).min() < 0.06 for time in said]))
        n_found += len(found)
        n_said += len(said)
    assert np.mean(shares) > 0.98
    assert n_found < 1.05 * (n_said + len(shares))


def test_heart_rate_fits_the_rhythm(readable: list[Recording]) -> None:
    def rates(finding: str) -> np.ndarray:
        chosen = having(readable, finding, but=("premature_ventricular_contraction", "left_bundle_branch_block"))
        return np.array([60 / np.median(np.diff(beat_times_s(r))) for r in chosen])

    slow, normal, fast = rates("sinus_bradycardia"), rates("sinus_rhythm"), rates("sinus_tachycardia")
    # the rhythm goes by the mean interval, the measurement by the median: near the border they differ by a beat or two
    assert np.mean(slow < 62) > 0.97
    assert np.median(slow) < 58
    assert np.mean(fast > 98) > 0.97
    assert np.median(fast) > 102
    assert np.mean((normal > 58) & (normal < 102)) > 0.97
    assert ((normal < 63) & (normal > 60)).any(), "no borderline rates: the task would be trivial"


def test_fibrillation_is_irregular_and_has_no_p_wave(readable: list[Recording]) -> None:
    def irregularity(r: Recording) -> float:
        intervals = np.diff(beat_times_s(r))
        return float(intervals.std() / intervals.mean())

    def p_voltage_mv(r: Recording) -> float:
        time_s, beat = mean_beat_mv(r)
        before = beat[1, (time_s > -0.30) & (time_s < -0.03)]
        return float(np.ptp(before))

    other = ("premature_ventricular_contraction", "left_bundle_branch_block")
    fibrillating, sinus = (
        having(readable, "atrial_fibrillation", but=other),
        having(readable, "sinus_rhythm", but=other),
    )
    assert np.quantile([irregularity(r) for r in fibrillating], 0.1) > 0.09
    assert np.quantile([irregularity(r) for r in sinus], 0.9) < 0.07
    assert np.median([p_voltage_mv(r) for r in fibrillating]) < 0.6 * np.median([p_voltage_mv(r) for r in sinus])
    assert {r.pr_s for r in fibrillating} == {None}


def test_fibrillatory_waves_are_strongest_in_v1() -> None:
    from ecgfm.synthetic_ecg import DOWER, _fibrillation

    leads = DOWER @ _fibrillation(random_stream(5), 5000, 500)
    spectrum = np.abs(np.fft.rfft(leads, axis=1))
    assert leads.std(axis=1).argmax() in (2, 3)  # V1 or its neighbour
    assert 4 <= np.fft.rfftfreq(5000, 1 / 500)[spectrum[2].argmax()] <= 9


def test_bundle_branch_blocks_are_wide_and_point_where_they_should(readable: list[Recording]) -> None:
    blocks = ("left_bundle_branch_block", "right_bundle_branch_block", "pacing_rhythm")
    left, right = having(readable, blocks[0]), having(readable, blocks[1])
    normal = having(readable, "sinus_rhythm", but=blocks)
    assert np.median([qrs_s(r) for r in left]) > 1.3 * np.median([qrs_s(r) for r in normal])
    assert np.median([qrs_s(r) for r in right]) > 1.2 * np.median([qrs_s(r) for r in normal])
    assert min(r.qrs_s for r in left) > 0.120
    assert max(r.qrs_s for r in normal) < 0.120

    def late(r: Recording, lead: str) -> float:
        """Mean voltage of the last third of the QRS complex."""
        time_s, beat = mean_beat_mv(r)
        third = (time_s > 0.65 * r.qrs_s) & (time_s < 0.95 * r.qrs_s)
        return float(beat[LEADS.index(lead), third].mean())

    assert np.mean([late(r, "V1") > 0.1 for r in right]) > 0.9  # R'
    assert np.mean([late(r, "V6") < 0 for r in right]) > 0.9  # wide S
    assert np.mean([late(r, "V1") < -0.1 for r in left]) > 0.9  # QS
    assert np.mean([late(r, "V6") > 0.1 for r in left]) > 0.9  # broad R


def test_pr_interval_is_what_the_signal_shows(readable: list[Recording]) -> None:
    chosen = [r for r in readable if r.findings[0] in ("sinus_rhythm", "sinus_bradycardia") and r.heart_rate_bpm < 80]
    peaks_s, said_s = [], []
    for r in chosen:
        time_s, beat = mean_beat_mv(r)
        before = (time_s > -0.38) & (time_s < -0.045)
        p_like = (beat[1] - np.interp(time_s, [-0.40, -0.02], np.interp([-0.40, -0.02], time_s, beat[1])))[before]
        peaks_s.append(-time_s[before][p_like.argmax()])
        said_s.append(r.pr_s)
    assert len(chosen) > 100
    assert np.corrcoef(peaks_s, np.array(said_s, dtype=float))[0, 1] > 0.9
    for r in chosen:
        assert ("first_degree_av_block" in r.findings) == (r.pr_s is not None and r.pr_s > 0.200)


def test_paced_beats_have_a_spike(readable: list[Recording]) -> None:
    def spike(r: Recording) -> float:
        """Sharpness just before the complexes, relative to that in the rest of the recording."""
        lead = r.digital[1].astype(float)
        sharp = np.abs(lead[1:-1] - (lead[:-2] + lead[2:]) / 2)
        near = [
            sharp[int((t - 0.014) * r.sampling_rate_hz) : int((t + 0.002) * r.sampling_rate_hz)]
            for t in r.onsets_s
            if t > 0.02
        ]
        return float(np.median([part.max() for part in near]) / (np.quantile(sharp, 0.99) + 1))

    paced = having(readable, "pacing_rhythm")
    others = having(readable, "sinus_rhythm")
    assert np.median([spike(r) for r in paced]) > 4
    assert np.quantile([spike(r) for r in others], 0.95) < 2
    intervals = np.concatenate([np.diff(r.onsets_s) for r in having(paced, but=("premature_ventricular_contraction",))])
    assert len(set(np.round(60 / intervals))) < 12  # set rates, not a heart's


def test_inferior_infarction_has_q_waves_in_ii_iii_avf_alone(readable: list[Recording]) -> None:
    def q_mv(r: Recording, lead: str) -> float:
        """Lowest voltage in the first 40 ms of the QRS complex, from its onset."""
        time_s, beat = mean_beat_mv(r)
        row = beat[LEADS.index(lead)]
        return float(row[(time_s >= 0) & (time_s < 0.040)].min() - row[np.abs(time_s).argmin()])

    wide = ("left_bundle_branch_block", "right_bundle_branch_block", "pacing_rhythm")
    infarcted = having(readable, "inferior_infarction", but=wide)
    healthy = having(readable, "sinus_rhythm", but=(*wide, "inferior_infarction"))
    for lead in ("II", "III", "aVF"):
        assert np.median([q_mv(r, lead) for r in infarcted]) < -0.12, lead
        assert np.median([q_mv(r, lead) for r in healthy]) > -0.08, lead
    for lead in ("I", "aVL"):
        assert np.median([q_mv(r, lead) for r in infarcted]) > -0.08, lead


def test_premature_beats_are_early_wide_and_followed_by_a_pause(readable: list[Recording]) -> None:
    early, pause, seen = [], [], []
    for r in having(readable, "premature_ventricular_contraction", "sinus_rhythm"):
        beats = np.sort(np.concatenate([r.onsets_s, r.ventricular_onsets_s]))
        usual = 60 / r.heart_rate_bpm
        for onset in r.ventricular_onsets_s:
            k = int(np.searchsorted(beats, onset))
            if 0 < k < len(beats) - 1:
                early.append((beats[k] - beats[k - 1]) / usual)
                pause.append((beats[k + 1] - beats[k]) / usual)
        seen += [np.diff(beat_times_s(r)).min() < 0.88 * usual]
    assert max(early) < 0.85
    assert np.mean(seen) > 0.8  # the signal shows it, to this simple detector
    assert min(pause) > 1.1
    in_one_half = [r for r in having(readable, "premature_ventricular_contraction") if len(r.ventricular_onsets_s) == 1]
    assert in_one_half, "no recording whose finding only one segment shows"


def test_low_quality_is_noisier(cohort: list[Recording]) -> None:
    def roughness_mv(r: Recording) -> float:
        return float(np.median(np.abs(np.diff(r.digital[0] / r.adc_gain_per_mv))) * np.sqrt(r.sampling_rate_hz / 500))

    poor = [roughness_mv(r) for r in having(cohort, "low_quality")]
    good = [roughness_mv(r) for r in cohort if "low_quality" not in r.findings]
    assert np.median(poor) > 3 * np.median(good)


# ---- the cohort


def test_every_finding_is_frequent_enough_and_none_dominates(cohort: list[Recording]) -> None:
    found = Counter(finding for r in cohort for finding in r.findings)
    assert set(found) == set(SNOMED_CODES)
    shares = {finding: n / len(cohort) for finding, n in found.items()}
    assert 0.4 < shares.pop("sinus_rhythm") < 0.6
    assert min(shares.values()) > 0.06
    assert max(shares.values()) < 0.15


def test_findings_persist_in_a_patient_but_recordings_differ() -> None:
    persistent = ("left_bundle_branch_block", "inferior_infarction", "pacing_rhythm")
    agree = []
    for number in range(1, 121):
        own = list(recordings(0, number))
        for first, second in pairwise(own):
            assert first.recorded_at < second.recorded_at
            assert first.digital.shape != second.digital.shape or (first.digital != second.digital).any()
            agree += [f in second.findings for f in persistent if f in first.findings]
    assert len(agree) > 30
    assert 0.8 < np.mean(agree) < 1


def test_odd_recordings_are_there_and_rare(cohort: list[Recording]) -> None:
    odd = Counter()
    for r in cohort:
        odd["flat"] += bool((r.digital.std(axis=1) == 0).any())
        odd["invalid"] += bool((r.digital == INVALID).any())
        odd["missing"] += len(r.leads) < 12
        odd["tiny"] += r.digital.shape[1] < 5 * r.sampling_rate_hz
    assert min(odd[kind] for kind in ("flat", "invalid", "missing", "tiny")) >= 2
    assert sum(odd.values()) + len(BROKEN) < 0.08 * len(cohort)
    assert {r.sampling_rate_hz for r in cohort} == {250, 400, 500, 1000}
    assert {r.adc_gain_per_mv for r in cohort} == {200, 1000}


def test_the_reader_errs_in_about_two_of_a_hundred_assertions(cohort: list[Recording]) -> None:
    rng = random_stream(1)
    pairs = [(set(r.findings), set(misread(rng, r.findings))) for r in cohort * 5]
    n_true = sum(len(true) for true, _ in pairs)
    assert 0.015 < sum(len(said - true) for true, said in pairs) / n_true < 0.03
    assert 0.015 < sum(len(true - said) for true, said in pairs) / n_true < 0.03
    assert all(len(said & set(RHYTHMS)) == 1 for _, said in pairs)
    assert set().union(*(said for _, said in pairs)) <= {*RHYTHMS, *OTHER_FINDINGS, "low_quality"}


def test_reports_read_like_statements() -> None:
    rng = random_stream(2)
    written = {report(rng, ("sinus_rhythm", "premature_ventricular_contraction"), 70.0) for _ in range(20)}
    assert ("Sinus rhythm with PVC(s)", "Abnormal ECG") in written
    assert report(rng, ("atrial_fibrillation",), 120.0)[0] == "Atrial fibrillation with rapid ventricular response"
    assert report(rng, ("sinus_rhythm",), 70.0) == ("Sinus rhythm", "Normal ECG")


# ---- files


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        synthesize({}, SyntheticConfig(n_patients=5, seed=seed), tmp_path / name)
    first, second, other = (tree(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second
    assert len(first) > 15
    signals = {digest for path, digest in first.items() if path.endswith((".mat", ".dat"))}
    assert not signals & set(other.values())


def test_fewer_patients_are_the_first_of_many(raw_dir: Path, tmp_path: Path) -> None:
    synthesize({}, SyntheticConfig(n_patients=8), tmp_path)
    few, many = tree(tmp_path), tree(raw_dir)
    recorded = {path for path in few if not path.endswith(".csv")}
    assert len(recorded) > 20
    assert all(few[path] == many[path] for path in recorded)
    for path in set(few) - recorded:
        assert (raw_dir / path).read_text().startswith((tmp_path / path).read_text())


def test_wfdb_reads_every_record_as_it_was_made(raw_dir: Path) -> None:
    import wfdb

    made = [(number, r) for number in range(1, N_PATIENTS + 1) for r in recordings(0, number)]
    challenge = sorted((raw_dir / "challenge-2021").rglob("S*.hea"))
    mimic = sorted((raw_dir / "mimic-iv-ecg").rglob("*.hea"))
    assert len(challenge) + len(mimic) == len(made)
    headers = {0: iter(mimic), 1: iter(challenge)}
    for number, r in made:
        path = next(headers[bool(number % 4)])
        read = wfdb.rdrecord(str(path.with_suffix("")), physical=False)
        order = [read.sig_name.index(lead) for lead in r.leads]
        assert np.array_equal(read.d_signal[:, order].T, r.digital), path.name
        assert read.fs == r.sampling_rate_hz
        assert read.adc_gain == [r.adc_gain_per_mv] * len(r.leads)
        assert read.init_value == read.d_signal[0].tolist()
        assert [c % 65536 for c in read.checksum] == [int(c) % 65536 for c in read.d_signal.astype(int).sum(axis=0)]
    assert read.sig_name[4:6] == ["aVF", "aVL"]  # the last patient is in MIMIC-IV-ECG's layout


def test_matlab_reads_the_challenge_files(raw_dir: Path) -> None:
    from scipy.io import loadmat

    path = raw_dir / "challenge-2021/training/synthetic/g1/S00001.mat"
    assert np.array_equal(loadmat(path)["val"], next(iter(recordings(0, 1))).digital)


# ---- the source


def test_listing_keeps_its_contract_and_knows_the_patients(raw_dir: Path) -> None:
    records = synthetic.list_records(raw_dir)
    check(records, "listing")
    assert records["record_id"].is_sorted()
    n_made = {number: len(list(recordings(0, number))) for number in range(1, N_PATIENTS + 1)}
    assert records.height == sum(n_made.values()) + len(BROKEN)
    assert records["patient_id"].null_count() == 0
    by_patient = records.group_by("patient_id").len()
    assert by_patient.height == N_PATIENTS + 1  # and the patient whose recordings are broken
    assert sorted(by_patient["len"]) == sorted([*n_made.values(), len(BROKEN)])
    assert dict(records.select("record_id", "dataset").iter_rows())["synthetic/S00001"] == "challenge-2021"
    assert dict(records.select("record_id", "patient_id").iter_rows())["synthetic/40000001"] == "synthetic/10000001"
    mimic = records.filter(pl.col("dataset") == "mimic-iv-ecg")
    challenge = records.filter(pl.col("dataset") == "challenge-2021")
    assert mimic["report"].null_count() == mimic["recorded_at"].null_count() == 0
    assert mimic["codes"].null_count() == mimic.height
    assert challenge["codes"].null_count() == 0
    assert challenge["report"].null_count() == challenge.height
    assert set(challenge["codes"].explode()) <= {code for codes in SNOMED_CODES.values() for code in codes}
    assert all(
        (raw_dir / row["raw_path"]).parent == raw_dir / row["slice_id"] for row in challenge.iter_rows(named=True)
    )


def test_records_are_read_and_broken_ones_rejected_with_the_reason(raw_dir: Path) -> None:
    rejected = {}
    for row in synthetic.list_records(raw_dir).iter_rows(named=True):
        try:
            record = synthetic.read_record(raw_dir, row)
        except Rejected as error:
            rejected[row["record_id"]] = error.reason
        else:
            assert record.record_id == row["record_id"]
            assert record.digital is not None
            assert set(record.leads) <= set(LEADS)
    assert rejected == {
        "synthetic/truncated": "truncated",
        "synthetic/without_signal": "missing_signal",
        "synthetic/broken_header": "unreadable_header",
    }


def test_a_source_of_few_patients_has_the_first_set_alone(tmp_path: Path) -> None:
    counts = synthesize({}, SyntheticConfig(n_patients=3), tmp_path)
    assert counts["mimic_iv_ecg"] == 0
    assert set(synthetic.list_records(tmp_path)["dataset"]) == {"challenge-2021"}


def test_a_folder_that_is_not_the_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"patients\.csv"):
        synthetic.list_records(tmp_path)
