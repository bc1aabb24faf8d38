"""Preparation: every record that goes in comes out prepared or rejected with a reason, the same each time.

The raw folders are tiny Challenge 2021 ones. With the real recordings, the reference's own output is the judge.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import write_wfdb16

from ecgfm.config import ListConfig, PrepareConfig
from ecgfm.contracts import read_table
from ecgfm.ecg import INVALID, LEADS, EcgRecord, InputError, Rejected
from ecgfm.prepare import list_source, prepare_record, prepare_slice
from ecgfm.shards import ShardReader, ShardWriter

SLICE = "training/georgia/g1"
OTHER = "training/ptb/g1"
DEFAULT = PrepareConfig()


def noise(name: str, n_samples: int = 5000, n_leads: int = 12) -> np.ndarray:
    """(lead, time) int16, another for each name."""
    seed = int.from_bytes(name.encode(), "little")
    return np.random.default_rng(seed).integers(-900, 900, (n_leads, n_samples)).astype(np.int16)


def write_raw(raw: Path) -> Path:
    """Records of every kind, good and bad."""
    folder = raw / SLICE

    def write(name: str, digital: np.ndarray | None = None, **kwargs: object) -> None:
        write_wfdb16(folder, name, noise(name) if digital is None else digital, **kwargs)  # type: ignore[arg-type]

    write("good", comments=["Age: 74", "Sex: Male", "Dx: 426783006,59118001"])
    write("long", noise("long", 7600))
    write("short", noise("short", 2499))
    write("fast", noise("fast", 10_000), sampling_rate_hz=1000)
    write("slow", noise("slow", 4096), sampling_rate_hz=400)
    write("two_leads", noise("two_leads", n_leads=2), leads=("V1", "ii"))
    flat = noise("flat")
    flat[6] = 100
    write("flat", flat)
    flat_fast = noise("flat_fast", 10_000)
    flat_fast[6] = 100  # 0.1 mV: no exact float
    write("flat_fast", flat_fast, sampling_rate_hz=1000)
    holes = noise("holes")
    holes[2, 1000:1010] = INVALID
    write("holes", holes)

    write("cut")
    (folder / "cut.mat").write_bytes((folder / "cut.mat").read_bytes()[:-1000])
    write("no_signal")
    (folder / "no_signal.mat").unlink()
    write("no_header")
    (folder / "no_header.hea").unlink()
    write("nonsense")
    (folder / "nonsense.hea").write_text("not a header\n")
    write("void", np.full((12, 5000), INVALID, np.int16))
    write("breath", noise("breath", n_leads=1), leads=("resp",))
    write("twice", leads=("I", "i", *LEADS[2:]))
    write("kelvin")
    (folder / "kelvin.hea").write_text((folder / "kelvin.hea").read_text().replace("/mV", "/K"))

    write_wfdb16(raw / OTHER, "alone", noise("alone"))
    return raw


REJECTED = {
    "cut": "truncated",
    "no_signal": "missing_signal",
    "no_header": "missing_header",
    "nonsense": "unreadable_header",
    "void": "no_valid_sample",
    "breath": "no_standard_lead",
    "twice": "duplicate_lead",
    "kelvin": "unknown_units",
}
SEGMENTS = {
    "good": 2,
    "long": 3,
    "short": 0,
    "fast": 2,
    "slow": 2,
    "two_leads": 2,
    "flat": 2,
    "flat_fast": 2,
    "holes": 2,
}


@dataclass(frozen=True)
class Prepared:
    """A prepared slice."""

    directory: Path
    counts: Mapping[str, int]

    @property
    def records(self) -> dict[str, dict[str, object]]:
        """Rows of records.parquet by the record's name."""
        rows = read_table(self.directory / "records.parquet", "records").iter_rows(named=True)
        return {row["record_id"].partition("/")[2]: row for row in rows}

    def rows(self, name: str) -> list[int]:
        """The shard's rows of a record's segments, in order."""
        table = read_table(self.directory / "segments.parquet", "segments")
        of_record = table.filter(pl.col("record_id").str.ends_with(f"/{name}")).sort("segment_index")
        assert of_record["segment_index"].to_list() == list(range(of_record.height))
        return of_record["shard_row"].to_list()

    def shard(self) -> ShardReader:
        """The slice's shard, opened."""
        return ShardReader(self.directory / "shard.h5")


def prepare(
    raw: Path, out: Path, source: str = "physionet2021", config: PrepareConfig = DEFAULT
) -> dict[str, Prepared]:
    """List a source and prepare its slices."""
    listing = out / "list"
    listing.mkdir(parents=True)
    list_source({"raw": raw}, ListConfig(source), listing)
    slices = {}
    for number, (slice_id, entry) in enumerate(json.loads((listing / "slices.json").read_text()).items()):
        directory = out / f"slice_{number}"
        directory.mkdir()
        counts = prepare_slice({"rows": listing / entry["file"], "raw": raw}, config, directory)
        assert counts["listed"] == entry["records"]
        slices[slice_id] = Prepared(directory, counts)
    return slices


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def slices(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    return prepare(raw, tmp_path_factory.mktemp("prepared"))


# ---- in and out


def test_every_record_comes_out_prepared_or_rejected_with_its_reason(slices: dict[str, Prepared]) -> None:
    assert set(slices) == {SLICE, OTHER}
    prepared = slices[SLICE]
    rejects = read_table(prepared.directory / "rejects.parquet", "rejects")
    reasons = {row["record_id"].partition("/")[2]: row["reason"] for row in rejects.iter_rows(named=True)}
    assert reasons == REJECTED
    assert rejects["detail"].str.len_chars().min() > 10
    assert {name: row["n_segments"] for name, row in prepared.records.items()} == SEGMENTS
    assert prepared.counts == {
        "listed": len(REJECTED) + len(SEGMENTS),
        "prepared": len(SEGMENTS),
        "rejected": len(REJECTED),
        "segments": sum(SEGMENTS.values()),
        **{f"rejected: {reason}": 1 for reason in REJECTED.values()},
    }
    assert set(slices[OTHER].records) == {"alone"}


def test_the_same_bytes_come_out_twice(raw: Path, slices: dict[str, Prepared], tmp_path: Path) -> None:
    time.sleep(1.1)  # longer than the resolution of any time in a file
    again = prepare(raw, tmp_path)
    for slice_id, prepared in slices.items():
        for file in ("shard.h5", "records.parquet", "segments.parquet", "rejects.parquet"):
            assert (again[slice_id].directory / file).read_bytes() == (prepared.directory / file).read_bytes()


def test_a_record_shorter_than_a_segment_is_prepared_with_none(slices: dict[str, Prepared]) -> None:
    assert slices[SLICE].records["short"]["n_samples"] == 2499
    assert slices[SLICE].rows("short") == []


def test_what_the_listing_knows_of_a_record_stays_with_it(slices: dict[str, Prepared]) -> None:
    good = slices[SLICE].records["good"]
    assert (good["age_years"], good["sex"], good["codes"]) == (74.0, "male", ["426783006", "59118001"])
    assert (good["dataset"], good["raw_path"]) == ("georgia", f"{SLICE}/good.hea")


@pytest.mark.parametrize("what", ["nothing", "no such folder"])
def test_a_source_without_records_is_one_clear_line(tmp_path: Path, what: str) -> None:
    raw = tmp_path / "raw"
    if what == "nothing":
        raw.mkdir()
    with pytest.raises(InputError, match="expected the Challenge 2021 layout"):
        prepare(raw, tmp_path / "out")


def test_an_unknown_source_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown source 'physionet'; known: .*physionet2021, ptb_xl"):
        list_source({"raw": tmp_path}, ListConfig("physionet"), tmp_path)


def test_segments_shorter_than_a_sample_are_one_clear_line(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"prepare\.segment_seconds \(0.0001\) x .* is less than one sample"):
        prepare(raw, tmp_path, config=PrepareConfig(segment_seconds=0.0001))


# ---- signals


def test_a_record_at_the_shards_rate_is_kept_without_loss(slices: dict[str, Prepared]) -> None:
    shard = slices[SLICE].shard()
    for name in ("good", "long"):
        rows = slices[SLICE].rows(name)
        kept = shard.digital(rows).swapaxes(0, 1).reshape(12, -1)
        np.testing.assert_array_equal(kept, noise(name, 7600 if name == "long" else 5000)[:, : kept.shape[1]])
        np.testing.assert_array_equal(
            shard.signal_mv(rows[0]), noise(name, 7600 if name == "long" else 5000)[:, :2500] / 1000
        )


@pytest.mark.parametrize(("name", "n_samples", "rate_hz"), [("fast", 10_000, 1000), ("slow", 4096, 400)])
def test_a_record_at_another_rate_is_interpolated_to_within_half_a_step(
    slices: dict[str, Prepared], name: str, n_samples: int, rate_hz: int
) -> None:
    shard = slices[SLICE].shard()
    places = np.linspace(0, n_samples - 1, n_samples * 500 // rate_hz)
    for lead, digital in enumerate(noise(name, n_samples)):
        expected = np.interp(places, np.arange(n_samples), digital / 1000)
        half_step = np.ptp(expected) / 131_068
        for index, row in enumerate(slices[SLICE].rows(name)):
            error = shard.signal_mv(row)[lead] - expected[index * 2500 : (index + 1) * 2500]
            assert np.abs(error).max() <= half_step * (1 + 1e-6)


def test_statistics_are_of_the_record_as_recorded(slices: dict[str, Prepared]) -> None:
    fast = slices[SLICE].records["fast"]
    assert (fast["sampling_rate_hz"], fast["n_samples"]) == (1000.0, 10_000)
    signal_mv = noise("fast", 10_000) / 1000
    np.testing.assert_allclose(fast["lead_mean_mv"], signal_mv.mean(axis=1), rtol=0, atol=1e-12)
    np.testing.assert_allclose(fast["lead_std_mv"], signal_mv.std(axis=1), rtol=1e-12)


def test_flags_name_leads(slices: dict[str, Prepared]) -> None:
    records = slices[SLICE].records
    assert records["two_leads"]["leads"] == ["II", "V1"]
    assert records["two_leads"]["invalid_leads"] == [lead for lead in LEADS if lead not in ("II", "V1")]
    assert [math.isnan(mean) for mean in records["two_leads"]["lead_mean_mv"]] == [
        lead not in ("II", "V1") for lead in LEADS
    ]
    assert records["holes"]["invalid_leads"] == ["III"]
    assert records["holes"]["constant_leads"] == []
    for name in ("flat", "flat_fast"):
        assert (records[name]["constant_leads"], records[name]["invalid_leads"]) == (["V1"], [])
        assert records[name]["lead_std_mv"][6] == 0.0
    assert (records["good"]["leads"], records["good"]["invalid_leads"]) == (list(LEADS), [])


def test_a_constant_lead_is_0_when_standardised_whatever_the_rate(slices: dict[str, Prepared]) -> None:
    shard = slices[SLICE].shard()
    scale, offset, _ = shard.standardisation()
    for name in ("flat", "flat_fast"):
        for row in slices[SLICE].rows(name):
            standardised = shard.digital([row])[0] * scale[row][:, None] + offset[row][:, None]
            assert not standardised[6].any()
            assert np.delete(standardised, 6, axis=0).std() > 0.5
            np.testing.assert_allclose(shard.signal_mv(row)[6], 0.1, rtol=1e-12)


@pytest.mark.parametrize("name", ["good", "fast"])
def test_standardised_a_record_has_mean_0_and_deviation_1_at_the_shards_rate(
    slices: dict[str, Prepared], name: str
) -> None:
    """Not as recorded: interpolation takes a third of the power of this noise."""
    shard, rows = slices[SLICE].shard(), slices[SLICE].rows(name)
    scale, offset = (values[rows][..., None] for values in shard.standardisation()[:2])
    whole = (shard.digital(rows) * scale + offset).swapaxes(0, 1).reshape(12, 5000)
    np.testing.assert_allclose(whole.mean(axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(whole.std(axis=1), 1, atol=1e-4)


def test_invalid_samples_stay_invalid(slices: dict[str, Prepared]) -> None:
    first = slices[SLICE].shard().signal_mv(slices[SLICE].rows("holes")[0])
    assert np.flatnonzero(np.isnan(first[2])).tolist() == list(range(1000, 1010))
    assert np.isnan(first).sum() == 10


@pytest.mark.parametrize("n_samples", [0, 1])
def test_a_record_of_next_to_no_samples_does_not_end_the_run(n_samples: int) -> None:
    record = EcgRecord("test/1", LEADS, 1000.0, np.ones((12, n_samples)))
    if n_samples:
        prepared = prepare_record(record, PrepareConfig())
        assert len(prepared.segments) == prepared.facts["n_segments"] == 0
    else:
        with pytest.raises(Rejected, match="no_valid_sample"):
            prepare_record(record, PrepareConfig())


# ---- options


def prepared_with(raw: Path, tmp_path: Path, **values: object) -> Prepared:
    """The slice of the good and bad records, prepared with other options."""
    return prepare(raw, tmp_path / "prepared", config=PrepareConfig(**values))[SLICE]  # type: ignore[arg-type]


def rejects_of(prepared: Prepared) -> dict[str, str]:
    rows = read_table(prepared.directory / "rejects.parquet", "rejects").iter_rows(named=True)
    return {row["record_id"].partition("/")[2]: row["reason"] for row in rows}


def test_leads_are_chosen_and_ordered_by_the_config(raw: Path, tmp_path: Path, slices: dict[str, Prepared]) -> None:
    prepared = prepared_with(raw, tmp_path, leads=("V1", "II"))
    assert prepared.shard().leads == ("V1", "II")
    row, whole = prepared.rows("good")[1], slices[SLICE].rows("good")[1]
    all_leads = slices[SLICE].shard().signal_mv(whole)
    np.testing.assert_array_equal(prepared.shard().signal_mv(row), all_leads[[LEADS.index("V1"), LEADS.index("II")]])
    two_leads = prepared.records["two_leads"]
    assert two_leads["leads"] == ["V1", "II"]
    assert two_leads["invalid_leads"] == []  # nothing that was asked for is missing
    assert prepared.records["holes"]["invalid_leads"] == []  # the holes are in III
    assert np.shape(prepared.records["good"]["lead_mean_mv"]) == (2,)


def test_records_without_a_chosen_lead_are_rejected(raw: Path, tmp_path: Path) -> None:
    prepared = prepared_with(raw, tmp_path, leads=("V6",))
    assert rejects_of(prepared)["two_leads"] == "no_standard_lead"
    assert "good" in prepared.records


def test_gaps_can_be_turned_away_but_a_missing_lead_is_none(raw: Path, tmp_path: Path) -> None:
    prepared = prepared_with(raw, tmp_path, gaps="reject")
    assert rejects_of(prepared) == {**REJECTED, "holes": "invalid_sample"}
    assert "two_leads" in prepared.records


@pytest.mark.parametrize(("bridge_ms", "bridged"), [(20.0, True), (19.0, False)])
def test_short_gaps_are_bridged_and_nothing_else_moves(
    raw: Path, tmp_path: Path, slices: dict[str, Prepared], bridge_ms: float, bridged: bool
) -> None:
    prepared = prepared_with(raw, tmp_path, gaps="bridge", bridge_ms=bridge_ms)  # the gap: 10 samples, 20 ms
    before = slices[SLICE].shard().digital(slices[SLICE].rows("holes"))[0]
    after = prepared.shard().digital(prepared.rows("holes"))[0]
    gap = before == INVALID
    assert gap.sum() == 10
    np.testing.assert_array_equal(after[~gap], before[~gap])
    assert prepared.records["holes"]["invalid_leads"] == ([] if bridged else ["III"])
    if bridged:
        line = np.interp(np.arange(1000, 1010), [999, 1010], before[2, [999, 1010]])
        np.testing.assert_allclose(after[2, 1000:1010], line, atol=0.5)
    else:
        assert (after[gap] == INVALID).all()


def test_records_with_a_constant_lead_can_be_turned_away(raw: Path, tmp_path: Path) -> None:
    prepared = prepared_with(raw, tmp_path, constant_leads="reject")
    assert rejects_of(prepared) == {**REJECTED, "flat": "constant_lead", "flat_fast": "constant_lead"}


@pytest.mark.parametrize(
    ("values", "kept_hz", "gone_hz"),
    [
        ({"filter": "notch", "notch_hz": 50}, 10.0, 50.0),
        ({"filter": "notch", "notch_hz": 60}, 10.0, 60.0),
        ({"filter": "bandpass", "bandpass_hz": (0.5, 40.0)}, 10.0, 0.1),
        ({"filter": "bandpass", "bandpass_hz": (0.5, 40.0)}, 10.0, 90.0),
        ({"resample": "polyphase", "sampling_rate_hz": 100.0}, 10.0, 70.0),  # linear: an alias at 30 Hz
    ],
)
def test_what_a_filter_takes_away_is_gone_and_the_rest_is_there(
    values: dict[str, object], kept_hz: float, gone_hz: float
) -> None:
    seconds = np.arange(20_000) / 500
    config = PrepareConfig(**values)  # type: ignore[arg-type]

    def height(frequency_hz: float) -> float:
        wave = np.tile(np.sin(2 * np.pi * frequency_hz * seconds), (12, 1))
        prepared = prepare_record(EcgRecord("test/1", LEADS, 500.0, wave), config)
        middle = len(prepared.segments) // 2
        gain, baseline, _, _ = prepared.per_lead
        signal_mv = (prepared.segments[middle] - baseline[:, None]) / gain[:, None]
        return float(np.sqrt(2) * signal_mv.std())

    assert height(kept_hz) == pytest.approx(1, abs=0.02)
    assert height(gone_hz) < 0.05
    if "resample" in values:
        config = PrepareConfig(sampling_rate_hz=100.0)
        assert height(gone_hz) > 0.4


def test_a_filter_that_does_not_go_with_a_rate_is_told(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"prepare.filter bandpass: physionet2021/slow: .*200"):
        prepared_with(raw, tmp_path, filter="bandpass", bandpass_hz=(0.5, 210.0))


def test_several_processes_write_the_same_bytes(
    raw: Path, tmp_path: Path, slices: dict[str, Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecgfm.processes.RECORDS_PER_PROCESS", 4)
    monkeypatch.setattr("ecgfm.prepare.BLOCK_RECORDS", 3)
    alone = prepared_with(raw, tmp_path / "alone", workers=1)
    together = prepared_with(raw, tmp_path / "together", workers=3)
    names = sorted(path.name for path in alone.directory.iterdir())
    assert names == sorted(["shard.h5", *(f"{table}.parquet" for table in TABLES)])
    for name in names:
        assert (alone.directory / name).read_bytes() == (together.directory / name).read_bytes(), name
    assert alone.counts == together.counts == slices[SLICE].counts


def test_of_long_recordings_few_are_held_at_a_time(
    raw: Path, tmp_path: Path, slices: dict[str, Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 min of the Challenge's St Petersburg set are 22 MB each: 32 of them together took 2.4 GB, now 0.8."""
    held: list[int] = []
    append = ShardWriter.append

    def watched(shard: ShardWriter, segments: np.ndarray, per_lead: np.ndarray) -> range:
        held.append(segments.nbytes)
        return append(shard, segments, per_lead)

    monkeypatch.setattr(ShardWriter, "append", watched)
    monkeypatch.setattr("ecgfm.prepare.LONG_S", 1.0)
    monkeypatch.setattr("ecgfm.prepare.BLOCK_BYTES", 200_000)
    made = prepared_with(raw, tmp_path)
    whole = slices[SLICE]
    largest = 12 * 2 * 2500 * int(pl.read_parquet(made.directory / "records.parquet")["n_segments"].max())
    assert len(held) > 2
    assert max(held) <= 200_000 + largest
    for table in TABLES:
        assert (made.directory / f"{table}.parquet").read_bytes() == (whole.directory / f"{table}.parquet").read_bytes()
    one, other = (ShardReader(each.directory / "shard.h5") for each in (made, whole))
    assert np.array_equal(one.digital(range(one.n_segments)), other.digital(range(other.n_segments)))


TABLES = ("quality", "records", "rejects", "segments", "sketches")


def test_quality_and_sketch_stand_beside_every_prepared_record(slices: dict[str, Prepared]) -> None:
    prepared = slices[SLICE]
    for table in ("quality", "sketches"):
        rows = read_table(prepared.directory / f"{table}.parquet", table)
        assert {name.partition("/")[2] for name in rows["record_id"]} == set(prepared.records)
    quality = read_table(prepared.directory / "quality.parquet", "quality")
    flat = quality.filter(pl.col("record_id") == "physionet2021/flat")["lead_flat_share"][0]
    assert [share == 1 for share in flat] == [lead == 6 for lead in range(12)]


# ---- real recordings


@pytest.fixture(scope="module")
def challenge(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    return prepare(shared / "data" / "challenge-2021", tmp_path_factory.mktemp("challenge"))


def test_the_challenges_records_have_the_references_statistics_and_flags(
    shared: Path, challenge: dict[str, Prepared]
) -> None:
    with (shared / "golden/preprocess-challenge-2021/meta.csv").open() as file:
        golden = {row["record"]: row for row in csv.DictReader(file)}
    records = {name: row for prepared in challenge.values() for name, row in prepared.records.items()}
    assert len(golden) == 71
    assert records.keys() == golden.keys()
    for name, expected in golden.items():
        found = records[name]
        for which in ("mean", "std"):
            np.testing.assert_allclose(
                found[f"lead_{which}_mv"],
                [float(expected[f"{which}_{lead}"]) for lead in range(12)],
                rtol=1e-9,
                atol=1e-12,
                err_msg=f"{name} {which}",
            )
        assert found["constant_leads"] == names(expected["constant_leads"])
        assert found["invalid_leads"] == names(expected["nan_leads"])
        assert found["leads"] == names(expected["avail_leads"])
        assert found["n_segments"] == int(expected["n_segments"])
        assert (found["sampling_rate_hz"], found["n_samples"]) == (
            float(expected["sample_rate"]),
            int(expected["sample_size"]),
        )
        assert found["dataset"] == expected["dataset"]
        assert found["codes"] == expected["diagnosis"].split(",")
    assert sum(row["n_segments"] for row in records.values()) == sum(int(row["n_segments"]) for row in golden.values())
    assert any(row["constant_leads"] for row in records.values())


def names(listed: str) -> list[str]:
    """The golden's way to write a list of leads: `['I', 'II']`."""
    return [name for name in listed.strip("[]").replace("'", "").split(", ") if name]


def test_the_challenges_segments_are_the_references_standardised_segments(
    shared: Path, challenge: dict[str, Prepared]
) -> None:
    golden = np.load(shared / "golden/preprocess-challenge-2021/segments.npz")
    records = {name: (prepared, row) for prepared in challenge.values() for name, row in prepared.records.items()}
    compared, resampled = 0, 0
    for key in golden.files:
        name, _, index = key.partition("__segment_")
        prepared, facts = records[name]
        shard, row = prepared.shard(), prepared.rows(name)[int(index)]
        scale, offset = (values[row][:, None] for values in shard.standardisation()[:2])
        digital = shard.digital([row])[0].astype(np.float32)
        found, expected = digital * scale + offset, golden[key]
        assert found.dtype == expected.dtype == np.float32
        # float32 keeps 24 bits of each of: the product, the offset, their sum, the reference's own value;
        # means of thousands of float64 differ by their order
        bound = 2.0**-23 * (np.abs(digital * scale) + np.abs(offset) + np.abs(expected)) + 1e-15
        if facts["sampling_rate_hz"] != 500:  # digitised again: half a step, `scale` is a step in deviations
            bound = bound + np.abs(scale) / 2 * (1 + 1e-6)
            resampled += 1
        error = np.abs(found.astype(np.float64) - expected)
        assert (error <= bound).all(), f"{key}: error {error.max():.3g} where {bound.max():.3g} is allowed"
        assert bound.max() < 2e-4, f"{key}: the bound says nothing"
        compared += 1
    assert compared == 33
    assert resampled == 3
    assert {"S0001", "JS45542", "JS20004"} <= {key.partition("__")[0] for key in golden.files}


def test_every_ptb_xl_record_is_prepared(shared: Path, tmp_path: Path) -> None:
    (prepared,) = prepare(shared / "data" / "ptb-xl", tmp_path, "ptb_xl").values()
    assert prepared.counts == {"listed": 210, "prepared": 210, "rejected": 0, "segments": 420}
    shard = prepared.shard()
    apart_mv = max(np.abs(mv[0] + mv[2] - mv[1]).max() for mv in map(shard.signal_mv, range(420)))
    assert apart_mv < 0.003, "I + III = II, within the last digits of three rounded leads"
    assert {row["patient_id"].partition("/")[0] for row in prepared.records.values()} == {"ptb_xl"}
