"""HDF5 shards: what goes in comes out."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecgfm.ecg import INVALID, LEADS, Digital, InputError
from ecgfm.shards import ShardReader, ShardWriter, digitise, lead_values
from ecgfm.signals import cut_segments, lead_statistics

LENGTH = 50


def recorded(seed: int, n_samples: int = 3 * LENGTH) -> Digital:
    """A digital recording with unequal gains and baselines, one constant lead (V3) and an invalid sample (V6)."""
    rng = np.random.default_rng(seed)
    digital = Digital(
        rng.integers(-3000, 3000, (12, n_samples)).astype(np.int16), rng.uniform(50, 5000, 12), rng.normal(0, 300, 12)
    )
    digital.digital[LEADS.index("V3")] = 77
    digital.digital[LEADS.index("V6"), 3] = INVALID
    return digital


def append(shard: ShardWriter, digital: Digital) -> range:
    statistics = lead_statistics(digital.to_mv())
    values = lead_values(digital, statistics.mean_mv, statistics.std_mv)
    return shard.append(cut_segments(digital.digital, LENGTH), values)


def write(path: Path, *recordings: Digital) -> Path:
    with ShardWriter(path, "toy", "a/b c", 500.0, LENGTH) as shard:
        for digital in recordings:
            append(shard, digital)
    return path


def standardised(shard: ShardReader) -> np.ndarray:
    """(segment, lead, time) as training does it."""
    scale, offset, _ = shard.standardisation()
    digital = shard.digital(range(shard.n_segments))
    return np.where(digital == INVALID, 0, digital * scale[..., None] + offset[..., None])


# ---- digitising


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3) | st.just(float("nan")), min_size=1, max_size=30),
    st.floats(-100, 100),
)
def test_digitising_moves_a_sample_by_at_most_half_a_step(samples: list[float], shift: float) -> None:
    signal_mv = np.array([samples, samples[::-1]]) + shift
    digital = digitise(signal_mv)
    back = digital.to_mv()
    assert digital.digital.dtype == np.int16
    np.testing.assert_array_equal(digital.digital == INVALID, np.isnan(signal_mv))
    np.testing.assert_array_equal(np.isnan(back), np.isnan(signal_mv))
    for before, after in zip(signal_mv, back, strict=True):
        valid = before[~np.isnan(before)]
        span = np.ptp(valid) if len(valid) else 0.0
        tiny = 1e-15 / 65_534 if span == 0 else 0.0  # a constant has half the steps
        rounding = 1e-12 * np.abs(valid).max() if len(valid) else 0.0
        assert np.nanmax(np.abs(after - before), initial=0) <= max(span, 1e-15) / 131_068 * (1 + 1e-9) + rounding + tiny


def test_the_range_of_a_lead_is_used_in_full() -> None:
    digital = digitise(np.stack([np.linspace(-0.2, 5.0, 100), np.linspace(1e-6, 2e-6, 100)]))
    assert digital.digital.min(axis=1).tolist() == [-32767, -32767]
    assert digital.digital.max(axis=1).tolist() == [32767, 32767]


@pytest.mark.parametrize("value", [0.0, 0.1, -0.3, 1e-9, 123.456])
def test_a_constant_lead_keeps_its_value(value: float) -> None:
    back = digitise(np.full((12, 20), value)).to_mv()
    assert (back == back[0, 0]).all()
    np.testing.assert_allclose(back, value, rtol=1e-12)


# ---- writing and reading


def test_a_recording_comes_back_without_loss(tmp_path: Path) -> None:
    recordings = [recorded(0), recorded(1, LENGTH - 1), recorded(2, 2 * LENGTH + 7)]
    with ShardWriter(tmp_path / "shard.h5", "toy", "a/b c", 500.0, LENGTH) as writer:
        rows = [append(writer, digital) for digital in recordings]
    assert rows == [range(3), range(3, 3), range(3, 5)]
    shard = ShardReader(tmp_path / "shard.h5")
    assert (shard.source, shard.slice_id, shard.sampling_rate_hz) == ("toy", "a/b c", 500.0)
    assert (shard.n_segments, shard.segment_samples, shard.leads) == (5, LENGTH, LEADS)
    for digital, of_record in zip(recordings, rows, strict=True):
        for index, row in enumerate(of_record):
            window = np.s_[:, index * LENGTH : (index + 1) * LENGTH]
            np.testing.assert_array_equal(shard.digital([row])[0], digital.digital[window])
            np.testing.assert_array_equal(shard.signal_mv(row), digital.to_mv()[window])
    shard.close()


def test_segments_come_in_the_order_asked_for(tmp_path: Path) -> None:
    shard = ShardReader(write(tmp_path / "shard.h5", recorded(0), recorded(1)))
    everything = shard.digital(range(6))
    assert len({segment.tobytes() for segment in everything}) == 6
    for rows in ([5, 0, 3, 3], np.array([2, 1]), []):
        np.testing.assert_array_equal(shard.digital(rows), everything[list(rows)])


def test_standardised_each_lead_of_a_record_has_mean_0_and_deviation_1(tmp_path: Path) -> None:
    shard = ShardReader(write(tmp_path / "shard.h5", recorded(0), recorded(1)))
    segments = standardised(shard)
    for of_record in (segments[:3], segments[3:]):
        by_lead = dict(zip(LEADS, of_record.swapaxes(0, 1).reshape(12, -1), strict=True))
        assert not by_lead.pop("V3").any(), "a constant lead is 0"
        v6 = by_lead.pop("V6")
        assert v6[3] == 0, "so is an invalid sample"
        by_lead["V6"] = np.delete(v6, 3)
        for lead in by_lead.values():
            assert abs(lead.mean()) < 1e-5
            assert abs(lead.std() - 1) < 1e-5


def test_a_missing_lead_is_0_when_standardised_and_invalid_in_millivolt(tmp_path: Path) -> None:
    digital = recorded(0)
    digital.digital[5] = INVALID
    shard = ShardReader(write(tmp_path / "shard.h5", digital))
    assert not standardised(shard)[:, 5].any()
    assert np.isfinite(shard.standardisation()).all()
    assert np.isnan(shard.signal_mv(0)[5]).all()


def test_written_twice_the_bytes_are_the_same(tmp_path: Path) -> None:
    first = write(tmp_path / "one.h5", recorded(0), recorded(1))
    time.sleep(1.1)  # HDF5 would write times in whole seconds
    second = write(tmp_path / "two.h5", recorded(0), recorded(1))
    assert first.read_bytes() == second.read_bytes()
    assert write(tmp_path / "three.h5", recorded(0), recorded(2)).read_bytes() != first.read_bytes()


def test_a_shard_of_no_segments_can_be_read(tmp_path: Path) -> None:
    shard = ShardReader(write(tmp_path / "shard.h5"))
    assert shard.n_segments == 0
    assert standardised(shard).shape == (0, 12, LENGTH)


@pytest.mark.parametrize("what", ["absent", "text", "another HDF5 file", "a later format", "cut short"])
def test_what_is_no_shard_is_one_clear_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "shard.h5"
    if what == "text":
        path.write_text("record_id,signal\n")
    elif what == "another HDF5 file":
        h5py.File(path, "w").close()
    elif what == "a later format":
        with h5py.File(write(path, recorded(0)), "a") as file:
            file.attrs["format"] = 3
    elif what == "cut short":
        path.write_bytes(write(path, recorded(0)).read_bytes()[:3000])
    with pytest.raises(InputError, match=r"shard\.h5: (not a readable HDF5 file|expected a shard of format 2, found)"):
        ShardReader(path)


def rewritten(path: Path, **how: Any) -> Path:
    """The shard with its segments as another program would store them, the last one first."""
    with h5py.File(path, "a") as file:
        segments = file["digital"][:]
        del file["digital"]
        dataset = file.create_dataset("digital", **({"shape": segments.shape, "dtype": "<i2"} | how))
        for row in reversed(range(len(segments))):
            dataset[row] = segments[row]
    return path


def test_segments_are_found_wherever_they_lie_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "shard.h5", *map(recorded, range(20)))
    everything = ShardReader(path).digital(range(60))
    rewritten(path, chunks=(1, 12, LENGTH))
    shard = ShardReader(path)
    assert (np.diff(shard._offsets) < 0).any(), "else this tests nothing"
    np.testing.assert_array_equal(shard.digital(range(60)), everything)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["digital"][:], everything)


@pytest.mark.parametrize(
    "how",
    [
        {"chunks": (1, 12, LENGTH), "compression": "gzip"},
        {"chunks": (1, 12, LENGTH), "shuffle": True},
        {"chunks": (2, 12, LENGTH)},
        {"chunks": (1, 12, LENGTH), "dtype": ">i2"},
        {"chunks": (1, 12, LENGTH), "dtype": "<i4"},
        {"chunks": None},
    ],
)
def test_segments_that_are_no_chunks_of_their_own_are_refused(tmp_path: Path, how: dict[str, Any]) -> None:
    path = rewritten(write(tmp_path / "shard.h5", recorded(0)), **how)
    with pytest.raises(InputError, match=r"shard\.h5: expected one uncompressed chunk of int16 per segment, found"):
        ShardReader(path)


def test_segments_that_were_never_written_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "shard.h5", recorded(0))
    with h5py.File(path, "a") as file:
        file["digital"].resize(5, axis=0)
    with pytest.raises(InputError, match="2 of 5 segments were never written, the first of them row 3"):
        ShardReader(path)


def test_a_reader_travels_to_another_process(tmp_path: Path) -> None:
    shard = ShardReader(write(tmp_path / "shard.h5", recorded(0)))
    packed = pickle.dumps(shard)
    everything = shard.digital(range(3))
    shard.close()
    shard.close()  # twice is no harm
    np.testing.assert_array_equal(pickle.loads(packed).digital(range(3)), everything)
    (tmp_path / "shard.h5").unlink()
    with pytest.raises(InputError, match=r"shard\.h5: cannot be read: .*No such file"):
        pickle.loads(packed)


def test_a_file_system_that_gives_little_at_a_time_gives_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = ShardReader(write(tmp_path / "shard.h5", recorded(0)))
    everything = shard.digital(range(3))
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, into, at: whole(handle, [memoryview(into[0]).cast("B")[:101]], at))
    np.testing.assert_array_equal(shard.digital(range(3)), everything)


def test_deviations_are_those_that_standardise(tmp_path: Path) -> None:
    digital = recorded(0)
    digital.digital[5] = INVALID
    shard = ShardReader(write(tmp_path / "shard.h5", digital))
    scale, _, sd_mv = shard.standardisation()
    assert sd_mv.dtype == np.float32
    assert not sd_mv[:, [5, LEADS.index("V3")]].any(), "missing and constant"
    others = np.delete(np.arange(12), [5, LEADS.index("V3")])
    steps_mv = 1 / digital.adc_gain_per_mv
    np.testing.assert_allclose((scale * sd_mv)[:, others], np.tile(steps_mv[others], (3, 1)), rtol=1e-6)
