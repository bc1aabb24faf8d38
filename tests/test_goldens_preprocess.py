"""What the reference system wrote for the recordings it was given, against what the prepare stage writes for the same.

The files are read and prepared by the pipeline's own functions. `pytest -s` prints the largest errors per set. Where
the reference is wrong, ours is right, and a test says so.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pytest
from conftest import write_wfdb16

from ecgfm.config import ListConfig, PrepareConfig
from ecgfm.contracts import read_table
from ecgfm.prepare import list_source, prepare_slice
from ecgfm.shards import ShardReader
from ecgfm.signals import lead_statistics, resample_linear, to_standard_leads
from ecgfm.sources import SOURCES

ROUNDING = 2.0**-24
"""Half a unit in the last place of float32, relative: the goldens are stored in it."""

HALF_A_STEP = 0.5 + 0.01
"""The goldens' own rounding is up to a hundredth of the finest digitisation step."""


@dataclass(frozen=True)
class Prepared:
    """One record of a shard.

    facts: its row of `records`
    standardised: (segment, lead, time) float64, in standard deviations of the lead
    step: (lead,) of the stored values, in standard deviations; NaN for a constant lead
    mean_mv, std_mv: (lead,) at the shard's rate, what it is standardised by
    """

    facts: dict[str, Any]
    standardised: np.ndarray
    step: np.ndarray
    mean_mv: np.ndarray
    std_mv: np.ndarray


def prepare(raw: Path, source: str, out: Path) -> dict[str, Prepared]:
    """Every record of a source, by its name, through the two stages."""
    (listing := out / "list").mkdir(parents=True)
    list_source({"raw": raw}, ListConfig(source), listing)
    prepared = {}
    for number, entry in enumerate(json.loads((listing / "slices.json").read_text()).values()):
        (directory := out / f"slice_{number}").mkdir()
        counts = prepare_slice({"rows": listing / entry["file"], "raw": raw}, PrepareConfig(workers=1), directory)
        assert counts["prepared"] == counts["listed"]
        segments = read_table(directory / "segments.parquet", "segments").sort("record_id", "segment_index")
        shard = ShardReader(directory / "shard.h5")
        with h5py.File(directory / "shard.h5") as file:
            gain, mean, std = (file[name][:] for name in ("adc_gain_per_mv", "mean_mv", "std_mv"))
        for facts in read_table(directory / "records.parquet", "records").iter_rows(named=True):
            rows = segments.filter(pl.col("record_id") == facts["record_id"])["shard_row"].to_list()
            mean_mv, std_mv = mean[rows[0]], std[rows[0]]
            varies = np.where(std_mv > 0, std_mv, np.nan)
            signal_mv = np.stack([shard.signal_mv(row) for row in rows])
            standardised = (signal_mv - mean_mv[:, None]) / varies[:, None]
            standardised[:, std_mv == 0] = 0
            name = facts["record_id"].removeprefix(f"{source}/")
            prepared[name] = Prepared(facts, standardised, 1 / (gain[rows[0]] * varies), mean_mv, std_mv)
        shard.close()
    return prepared


@dataclass
class Worst:
    """The largest errors of one set. A mean's is relative to the larger of itself and the standard deviation: a mean
    near 0 is the difference of large sums, and has no digits of its own."""

    records: int = 0
    segments: int = 0
    mean: float = 0.0
    std: float = 0.0
    error_sd: float = 0.0
    error_steps: float = 0.0
    step_sd: float = 0.0

    def add_statistics(
        self, mean: np.ndarray, std: np.ndarray, golden_mean: np.ndarray, golden_std: np.ndarray
    ) -> None:
        self.records += 1
        size = np.maximum(np.abs(golden_mean), golden_std)
        with np.errstate(invalid="ignore"):
            self.mean = max(self.mean, float(np.nan_to_num(np.abs(mean - golden_mean) / size).max()))
            self.std = max(self.std, float(np.nan_to_num(np.abs(std - golden_std) / golden_std).max()))
        np.testing.assert_array_equal(std == 0, golden_std == 0)
        np.testing.assert_array_equal(mean[std == 0], golden_mean[std == 0])

    def add_segment(self, found: np.ndarray, golden: np.ndarray, step: np.ndarray, lossless: bool, name: str) -> None:
        """Both (lead, time). A lossless segment differs by the golden's rounding, another by half a step more."""
        assert found.shape == golden.shape == (12, 2500)
        assert golden.dtype == np.float32
        error = np.abs(found - golden)
        digitisation = 0.0 if lossless else 0.5 * np.nan_to_num(step)[:, None]
        allowed = digitisation + ROUNDING * np.abs(golden) + 1e-9
        assert (error <= allowed).all(), f"{name}: error {error.max():.3g} SD where {allowed.max():.3g} is allowed"
        assert allowed.max() < 2e-4, f"{name}: the bound says nothing"
        self.segments += 1
        self.error_sd = max(self.error_sd, float(error.max()))
        self.error_steps = max(self.error_steps, float(np.nan_to_num(error.max(axis=1) / step).max()))
        self.step_sd = max(self.step_sd, float(np.nanmax(step)))


def show(table: dict[str, Worst]) -> None:
    print(
        "\n\nset                records segments  mean      std      error, SD  error, steps  step, SD (largest errors)"
    )
    for name, worst in sorted(table.items()):
        print(
            f"{name:18s} {worst.records:7d} {worst.segments:8d}  {worst.mean:.1e}  {worst.std:.1e}  "
            f"{worst.error_sd:.1e}    {worst.error_steps:.1e}       {worst.step_sd:.1e}"
        )


@pytest.fixture(scope="module")
def challenge(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    return prepare(shared / "data/challenge-2021", "physionet2021", tmp_path_factory.mktemp("challenge"))


@pytest.fixture(scope="module")
def code15(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    return prepare(shared / "data/code-15", "code15", tmp_path_factory.mktemp("code15"))


def names(listed: str) -> list[str]:
    """The golden's way to write a list of leads: `['I', 'II']`."""
    return [name for name in listed.strip("[]").replace("'", "").split(", ") if name]


def test_the_71_records_of_the_challenge(shared: Path, challenge: dict[str, Prepared]) -> None:
    folder = shared / "golden/preprocess-challenge-2021"
    with (folder / "meta.csv").open() as file:
        golden = {row["record"]: row for row in csv.DictReader(file)}
    assert challenge.keys() == golden.keys()
    assert len(golden) == 71
    table: dict[str, Worst] = defaultdict(Worst)
    relative = []
    for name, expected in golden.items():
        facts = challenge[name].facts
        mean, std = (np.array(facts[f"lead_{which}_mv"]) for which in ("mean", "std"))
        golden_mean, golden_std = (np.array([float(expected[f"{w}_{i}"]) for i in range(12)]) for w in ("mean", "std"))
        table[expected["dataset"]].add_statistics(mean, std, golden_mean, golden_std)
        exactly_0 = mean == 0  # the sum of the stored integers is
        assert (np.abs(golden_mean[exactly_0]) < 1e-18).all()
        relative += (np.abs(mean - golden_mean)[~exactly_0] / np.abs(golden_mean)[~exactly_0]).tolist()
        assert (len(facts["invalid_leads"]) > 0) == (expected["nan_any"] == "True")
        assert facts["invalid_leads"] == names(expected["nan_leads"])
        assert (len(facts["constant_leads"]) > 0) == (expected["constant_leads_any"] == "True")
        assert facts["constant_leads"] == names(expected["constant_leads"])
        assert facts["leads"] == names(expected["avail_leads"])
        assert facts["n_segments"] == len(challenge[name].standardised) == int(expected["n_segments"])
        assert facts["sampling_rate_hz"] == float(expected["sample_rate"])
        assert facts["n_samples"] == int(expected["sample_size"])
        assert facts["dataset"] == expected["dataset"]
    assert max(relative) <= 1e-9, "relative to themselves too"
    assert len(relative) > 800
    assert {name for name, one in challenge.items() if one.facts["constant_leads"]} == {"JS20004", "JS45542"}

    segments = np.load(folder / "segments.npz")
    for key in segments.files:
        name, _, index = key.partition("__segment_")
        one = challenge[name]
        lossless = one.facts["sampling_rate_hz"] == 500
        found = one.standardised[int(index)]
        table[one.facts["dataset"]].add_segment(found, segments[key], one.step, lossless, key)
    show(table)
    assert sum(worst.segments for worst in table.values()) == len(segments.files) == 33
    assert all(worst.mean <= 1e-9 and worst.std <= 1e-9 for worst in table.values())
    assert all(worst.error_steps <= HALF_A_STEP for worst in table.values())
    assert table["ptb"].error_steps > 0.4, "S0001 was resampled and digitised again"
    assert all(worst.error_sd < 1e-6 for name, worst in table.items() if name != "ptb"), "the others are as recorded"


def test_the_5_exams_of_code_15(shared: Path, code15: dict[str, Prepared]) -> None:
    """Its golden statistics are those at 500 Hz. The exams given here are rounded to float32, the reference read them
    before that: means and deviations agree to 1e-9 of the deviation, and a mean of a thousandth of it less far."""
    golden = np.load(shared / "golden/preprocess-code-15/reference.npz")
    assert code15.keys() == {key.partition("__")[0] for key in golden.files}
    assert len(code15) == 5
    worst = Worst()
    source = SOURCES["code15"]
    rows = source.list_records(shared / "data/code-15").rows_by_key("record_id", named=True, unique=True)
    for name, one in code15.items():
        golden_mean, golden_std = (golden[f"{name}__{which}"][:, 0] for which in ("mean", "std"))
        worst.add_statistics(one.mean_mv, one.std_mv, golden_mean, golden_std)
        n_golden = sum(key.startswith(f"{name}__segment_") for key in golden.files)
        assert one.facts["n_segments"] == len(one.standardised) == n_golden
        for index, found in enumerate(one.standardised):
            key = f"{name}__segment_{index}"
            worst.add_segment(found, golden[key], one.step, False, key)
        # before it is digitised, the whole exam with the tail that no segment holds
        record = source.read_record(shared / "data/code-15", {"record_id": f"code15/{name}", **rows[f"code15/{name}"]})
        resampled = resample_linear(to_standard_leads(record).signal_mv, record.sampling_rate_hz, 500.0)
        whole, expected = (resampled - golden_mean[:, None]) / golden_std[:, None], golden[f"{name}__preprocessed"]
        assert whole.shape == expected.shape
        np.testing.assert_allclose(whole, expected, rtol=2 * ROUNDING, atol=1e-7)  # what was read, and the golden
    show({"code-15": worst})
    assert worst.segments == 7
    assert worst.mean <= 1e-9
    assert worst.std <= 1e-9
    assert worst.error_steps <= HALF_A_STEP


# ---- where the reference is wrong


def test_exams_are_joined_by_their_id_and_the_dummy_row_is_none(shared: Path, code15: dict[str, Prepared]) -> None:
    """HDF5 and CSV have another order, and the last HDF5 row is a row of zeros with the id 0."""
    with h5py.File(shared / "data/code-15/exams_part0.hdf5", "r", locking=False) as file:
        in_hdf5 = [str(exam_id) for exam_id in file["exam_id"][:]]
        tracings = {exam_id: file["tracings"][row] for row, exam_id in enumerate(in_hdf5)}
    with (shared / "data/code-15/exams.csv").open() as file:
        in_csv = {row["exam_id"]: row for row in csv.DictReader(file)}
    assert in_hdf5[-1] == "0"
    assert in_hdf5[: len(in_csv)] != list(in_csv), "joined by position, labels would move to other exams"
    assert set(code15) == set(in_csv) == set(in_hdf5[:-1])
    for name, one in code15.items():
        tracing = tracings[name][(tracings[name] != 0).any(axis=1)].astype(np.float64)
        np.testing.assert_allclose(one.facts["lead_mean_mv"], tracing.mean(axis=0), rtol=1e-12)
        assert one.facts["n_samples"] == len(tracing)
        assert one.facts["age_years"] == float(in_csv[name]["age"])
        assert one.facts["sex"] == ("male" if in_csv[name]["is_male"] == "True" else "female")
        assert ("RBBB" in one.facts["codes"]) == (in_csv[name]["RBBB"] == "True")


@pytest.mark.parametrize("rate_hz", [500.0, 1000.0])
def test_one_invalid_sample_does_not_spoil_its_lead(tmp_path: Path, rate_hz: float) -> None:
    """The reference's mean over a lead with one NaN is NaN, and so is every standardised sample of it."""
    n_samples = int(10 * rate_hz)
    digital = np.random.default_rng(0).integers(-900, 900, (12, n_samples)).astype(np.int16)
    whole_folder, holed_folder = tmp_path / "whole", tmp_path / "holed"
    write_wfdb16(whole_folder / "training/ptb/g1", "S1", digital, sampling_rate_hz=rate_hz)
    digital[4, 777] = -32768
    write_wfdb16(holed_folder / "training/ptb/g1", "S1", digital, sampling_rate_hz=rate_hz)
    whole = prepare(whole_folder, "physionet2021", tmp_path / "1")["S1"]
    holed = prepare(holed_folder, "physionet2021", tmp_path / "2")["S1"]

    signal_mv = digital / 1000.0
    signal_mv[4, 777] = np.nan
    reference = (signal_mv - signal_mv.mean(axis=1, keepdims=True)) / signal_mv.std(axis=1, keepdims=True)
    assert np.isnan(reference[4]).all()

    assert holed.facts["invalid_leads"] == ["aVL"]
    invalid = np.isnan(holed.standardised)
    assert set(zip(*(places.tolist() for places in np.nonzero(invalid)), strict=True)) <= {
        (0, 4, 777 * 500 // int(rate_hz)),
        (0, 4, 777 * 500 // int(rate_hz) + 1),
    }
    assert 1 <= invalid.sum() <= 2
    np.testing.assert_allclose(holed.standardised[~invalid], whole.standardised[~invalid], rtol=0, atol=1e-3)
    others = np.arange(12) != 4
    np.testing.assert_array_equal(holed.standardised[:, others], whole.standardised[:, others])


def test_a_constant_lead_is_still_constant_once_it_is_resampled() -> None:
    """Weighed as left * (1 - w) + right * w, a constant of 0.3 mV varies by its rounding, and standardising it makes
    a signal of that: the reference divides by every deviation that is not 0."""
    signal_mv = np.full((1, 4096), 0.3)
    weight = np.linspace(0, 4095, 5120) % 1
    weighed = 0.3 * (1 - weight) + 0.3 * weight
    assert np.abs((weighed - weighed.mean()) / weighed.std()).max() > 0.5
    resampled = resample_linear(signal_mv, 400.0, 500.0)
    assert resampled.shape == (1, 5120)
    assert lead_statistics(resampled).std_mv.tolist() == [0.0]


def test_a_resampled_record_is_standardised_by_what_it_has_become(shared: Path, challenge: dict[str, Prepared]) -> None:
    """The reference's table holds the statistics as recorded (so does `records`); its segments are standardised by
    those at 500 Hz. Both are kept, and not taken for each other."""
    one, folder = challenge["S0001"], shared / "data/challenge-2021"
    source = SOURCES["physionet2021"]
    rows = source.list_records(folder).filter(pl.col("record_id") == one.facts["record_id"])
    recorded_mv = to_standard_leads(source.read_record(folder, rows.row(0, named=True))).signal_mv
    assert one.facts["sampling_rate_hz"] == 1000
    np.testing.assert_allclose(one.facts["lead_std_mv"], recorded_mv.std(axis=1), rtol=1e-9)
    np.testing.assert_allclose(one.std_mv, resample_linear(recorded_mv, 1000.0, 500.0).std(axis=1), rtol=1e-9)
    golden = np.load(shared / "golden/preprocess-challenge-2021/segments.npz")["S0001__segment_0"]
    taken_for_each_other = one.standardised[0] * (one.std_mv / recorded_mv.std(axis=1))[:, None]
    assert np.abs(taken_for_each_other - golden).max() > 2 * np.abs(one.standardised[0] - golden).max()
