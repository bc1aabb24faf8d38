"""Segments reach the device standardised, in an order that can be resumed."""

from __future__ import annotations

import pickle
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_data import RATE_HZ, SEGMENT_SAMPLES, slow_standardised, write_inputs

from ecgfm.data import Batch, Shards, in_order, load, pick_device, standardise, visits, visits_from
from ecgfm.ecg import LEADS, InputError
from ecgfm.shards import ShardReader, ShardWriter

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_inputs(tmp_path_factory.mktemp("inputs"), n_train=6, n_valid=2)


@pytest.fixture
def shards(inputs: dict[str, Any]) -> Iterator[Shards]:
    opened = Shards(inputs["slices"])
    yield opened
    opened.close()


def pairs_of(inputs: dict[str, Any], shards: Shards) -> tuple[pl.DataFrame, np.ndarray]:
    table = pl.read_parquet(inputs["manifests"] / "cmsc_train.parquet")
    places = np.stack([shards.places(table, column) for column in ("first_row", "second_row")], axis=1)
    return table, places


def test_a_batch_is_each_sample_standardised_over_its_record(inputs: dict[str, Any], shards: Shards) -> None:
    table, places = pairs_of(inputs, shards)
    numbers = np.array([4, 0, 3])
    (batch,) = load(shards, places, iter([numbers]), CPU)
    signal = standardise(batch, CPU)
    assert signal.dtype == torch.float32
    readers = {path.name: ShardReader(path / "shard.h5") for path in inputs["slices"]}
    expected = [
        slow_standardised(readers[row["slice_id"]], row[column])
        for column in ("first_row", "second_row")  # all first segments, then all second ones
        for row in (table.row(int(i), named=True) for i in numbers)
    ]
    np.testing.assert_allclose(signal.numpy(), np.stack(expected), atol=2e-5)
    assert np.abs(expected).max() > 1
    assert batch.numbers.tolist() == numbers.tolist()


def test_invalid_samples_and_flat_and_missing_leads_are_zero(inputs: dict[str, Any], shards: Shards) -> None:
    _, places = pairs_of(inputs, shards)
    (batch,) = load(shards, places, iter([np.array([0])]), CPU)
    first = standardise(batch, CPU)[0]
    assert not first[[LEADS.index("V4"), LEADS.index("V6")]].any()
    v5 = first[LEADS.index("V5")]
    assert not v5[10:20].any()
    assert (v5[20:] != 0).float().mean() > 0.99


@given(n=st.integers(1, 200), batch=st.integers(1, 70), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_an_epoch_visits_every_example_once_in_even_batches(n: int, batch: int, seed: int, epoch: int) -> None:
    batches = visits(n, batch, seed, epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    sizes = {len(numbers) for numbers in batches}
    assert max(sizes) <= batch
    assert max(sizes) - min(sizes) <= 1
    again = visits(n, batch, seed, epoch)
    assert all((one == other).all() for one, other in zip(batches, again, strict=True))


def test_the_order_changes_with_seed_and_epoch() -> None:
    orders = [np.concatenate(visits(50, 8, seed, epoch)).tolist() for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9


@given(n=st.integers(1, 30), size=st.integers(1, 12), first=st.integers(0, 20), more=st.integers(0, 20))
def test_visits_from_any_batch_are_the_tail_of_all_visits(n: int, size: int, first: int, more: int) -> None:
    everything = list(visits_from(n, size, 3, 0, first + more))
    tail = list(visits_from(n, size, 3, first, first + more))
    assert len(everything) == first + more
    assert [numbers.tolist() for numbers in tail] == [numbers.tolist() for numbers in everything[first:]]


def test_validation_goes_in_order() -> None:
    assert np.concatenate(list(in_order(10, 4))).tolist() == list(range(10))
    assert [len(numbers) for numbers in in_order(10, 4)] == [4, 3, 3]


def test_workers_read_what_this_process_reads(inputs: dict[str, Any], shards: Shards) -> None:
    _, places = pairs_of(inputs, shards)
    here = list(load(shards, places, visits_from(6, 2, 0, 0, 5), CPU))  # opens files, which no worker may use
    there = list(load(shards, places, visits_from(6, 2, 0, 0, 5), CPU, workers=2))
    assert len(here) == len(there) == 5
    for one, other in zip(here, there, strict=True):
        assert isinstance(other, Batch)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_shards_travel_to_another_process_without_open_files(inputs: dict[str, Any], shards: Shards) -> None:
    _, places = pairs_of(inputs, shards)
    before = shards.read(places[0])
    travelled = pickle.loads(pickle.dumps(shards))
    assert not travelled._readers
    for one, other in zip(before, travelled.read(places[0]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_more_shards_than_the_open_file_limit_raise_it(inputs: dict[str, Any]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        Shards(inputs["slices"])
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_manifest_of_other_slices_is_refused(inputs: dict[str, Any], shards: Shards) -> None:
    table = pl.read_parquet(inputs["manifests"] / "labelled_train.parquet")
    with pytest.raises(InputError, match="slice toy elsewhere"):
        shards.places(table.with_columns(slice_id=pl.lit("elsewhere")))
    with pytest.raises(InputError, match="names row 1000"):
        shards.places(table.with_columns(shard_row=pl.lit(1000)))


def test_slices_must_be_prepared_alike_and_given_once(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there twice"):
        Shards([inputs["slices"][0]] * 2)
    with pytest.raises(InputError, match="found none"):
        Shards([])
    with ShardWriter(tmp_path / "shard.h5", "toy", "c", RATE_HZ, SEGMENT_SAMPLES // 2):
        pass
    with pytest.raises(InputError, match="prepare all slices in one way"):
        Shards([*inputs["slices"], tmp_path])


def test_a_damaged_shard_is_named(inputs: dict[str, Any], tmp_path: Path) -> None:
    whole = (inputs["slices"][0] / "shard.h5").read_bytes()
    (tmp_path / "shard.h5").write_bytes(whole)
    shards = Shards([tmp_path])
    (tmp_path / "shard.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"shard\.h5: not a readable"):
        shards.read(np.array([[0, 0]]))


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"device: .*{name}"):
        pick_device(name)


def test_devices_are_named_or_chosen() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
