"""The benchmark of the loader: its shards hold what they should, and its numbers are of real work."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from training_data import write_inputs

from ecgfm.bench.load import _loadmat, _write_mats, every_place, main, write_slices
from ecgfm.data import Shards
from ecgfm.ecg import InputError


@pytest.mark.parametrize(("n_segments", "n_shards"), [(10, 1), (10, 3), (200, 2), (5, 5)])
def test_slices_hold_the_segments_evenly(tmp_path: Path, n_segments: int, n_shards: int) -> None:
    shards = Shards(write_slices(tmp_path, n_segments, n_shards))
    assert len(shards.n_segments) == n_shards
    assert shards.n_segments.sum() == n_segments
    assert max(shards.n_segments) - min(shards.n_segments) <= 1
    places = every_place(shards, n_segments)
    batch = shards.read(np.arange(n_segments), places[:, 0])
    assert (
        len(np.unique(batch.digital.numpy().reshape(n_segments, -1)[:, :50], axis=0)) >= min(n_segments, 64) / n_shards
    )
    assert batch.digital.shape == (n_segments, 12, 2500)


def test_places_are_all_or_some_of_every_shard(tmp_path: Path) -> None:
    shards = Shards(write_slices(tmp_path, 12, 3))
    assert {tuple(place) for place in every_place(shards, 99)[:, 0].tolist()} == {
        (s, r) for s in range(3) for r in range(4)
    }
    some = every_place(shards, 6)[:, 0]
    assert len({tuple(place) for place in some.tolist()}) == 6
    assert set(some[:, 0].tolist()) == {0, 1, 2}


def test_each_way_is_measured_and_nothing_stays(tmp_path: Path) -> None:
    printed = main(60, [1, 3], 16, 1, tmp_path, [], "cpu", 2)
    rows = dict(re.findall(r"^(\S.*?)  +([\d,]+) ", printed, re.MULTILINE))
    assert list(rows) == [
        "deliver from 1 shard", "deliver from 3 shards", "deliver, standardise (cpu)", "copy in memory",
        "loadmat, file by file",
    ]  # fmt: skip
    assert all(int(value.replace(",", "")) > 0 for value in rows.values())
    assert "(60 segments in 1)" in printed
    assert list(tmp_path.iterdir()) == []


def test_prepared_slices_are_measured_in_place_of_synthetic_ones(tmp_path: Path) -> None:
    slices = write_inputs(tmp_path / "inputs")["slices"]
    printed = main(10, [1], 4, 0, tmp_path, slices, "cpu", 1)  # some of 56
    assert "deliver from 2 shards" in main(100, [1], 4, 0, tmp_path, slices, "cpu", 1)  # more than all
    assert "batches of 4 segments of 12 leads, 256 samples; no threads" in printed
    assert "over 10 segments" in printed
    assert "deliver from 2 shards" in printed


def test_the_references_files_are_read_whole(tmp_path: Path) -> None:
    speed = _loadmat(_write_mats(tmp_path, 3, (12, 2500)), 0)
    assert speed.segments == 3
    assert speed.seconds > 0
    assert all(path.stat().st_size > 12 * 2500 * 8 for path in tmp_path.iterdir())


def test_what_cannot_be_measured_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="5 segments are too few for so many shards"):
        main(5, [1, 10], 4, 0, tmp_path, [], "cpu", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--folder .* cannot be written"):
        main(5, [1], 4, 0, tmp_path / "file", [], "cpu", 1)
    with pytest.raises(InputError, match=r"nothing.shard\.h5: not a readable HDF5 file: it is not there$"):
        main(5, [1], 4, 0, tmp_path, [tmp_path / "nothing"], "cpu", 1)
