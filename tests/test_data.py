"""Segments reach the device standardised, in an order that can be resumed."""

from __future__ import annotations

import multiprocessing
import resource
import threading
import weakref
from collections.abc import Iterator
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_data import RATE_HZ, SEGMENT_SAMPLES, slow_standardised, write_inputs

from ecgfm.config import SplitsConfig
from ecgfm.data import (
    AHEAD,
    Batch,
    Shards,
    batches_per_epoch,
    in_order,
    load,
    pick_device,
    standardise,
    subset,
    too_large,
    visits,
    visits_from,
)
from ecgfm.ecg import LEADS, InputError
from ecgfm.shards import ShardReader, ShardWriter
from ecgfm.splits import _by_hash

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


WEIGHTS = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.0, 2.5, 7.0]), min_size=1, max_size=60).filter(any)


@given(weights=WEIGHTS, batch=st.integers(1, 20), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_an_example_comes_as_often_as_its_weight_says_give_or_take_one(
    weights: list[float], batch: int, seed: int, epoch: int
) -> None:
    batches = visits(len(weights), batch, seed, epoch, weights=np.array(weights))
    counts = np.bincount(np.concatenate(batches), minlength=len(weights))
    assert counts.sum() == sum(weight > 0 for weight in weights)
    assert len(batches) == batches_per_epoch(len(weights), batch, weights=np.array(weights))
    for count, weight in zip(counts, weights, strict=True):
        expected = counts.sum() * weight / sum(weights)
        assert expected - 1 - 1e-9 < count < expected + 1 + 1e-9
        assert count == 0 or weight > 0


def test_over_many_epochs_visits_are_as_the_weights() -> None:
    weights = np.array([0.0, 0.2, 1.0, 1.0, 3.0, 5.5, 0.7])
    epochs = 4000
    counts = np.zeros(len(weights))
    for epoch in range(epochs):
        counts += np.bincount(np.concatenate(visits(7, 3, 1, epoch, weights=weights)), minlength=7)
    expected = epochs * 6 * weights / weights.sum()
    # each epoch's count is one of two neighbours, of variance at most 1/4: five standard deviations
    assert np.abs(counts - expected).max() < 5 * np.sqrt(epochs / 4)
    assert counts[0] == 0


def test_visits_of_one_example_lie_apart_and_in_every_order() -> None:
    """A batch much shorter than an epoch over the number of visits has no example twice: in CMSC it would repel
    itself."""
    weights = np.where(np.arange(2000) < 200, 4.0, 1.0)
    orders = [visits(2000, 32, 0, epoch, weights=weights) for epoch in range(20)]
    assert all(len(set(batch.tolist())) == len(batch) for order in orders for batch in order)
    assert max(np.bincount(np.concatenate(orders[0]))) >= 3
    heavy = np.array([[np.mean(batch < 200) for batch in order] for order in orders])
    # 800 of 2,600 shares of the visits, all through the epoch
    assert np.abs(heavy.mean(axis=0) - 800 / 2600).max() < 5 * np.sqrt(0.25 / (20 * 32))
    assert len({np.concatenate(order).tobytes() for order in orders}) == 20


@given(
    n=st.integers(1, 60), units=st.integers(1, 9), multiple=st.integers(1, 4), first=st.integers(0, 9),
    weighted=st.booleans(),
)  # fmt: skip
def test_weighted_and_shared_batches_resume_anywhere(
    n: int, units: int, multiple: int, first: int, weighted: bool
) -> None:
    given_ = {"weights": np.arange(1.0, n + 1) if weighted else None, "multiple": multiple}
    size = units * multiple
    if n < multiple:
        with pytest.raises(InputError, match="too few for"):
            next(visits_from(n, size, 3, 0, 1, **given_))
        return
    everything = list(visits_from(n, size, 3, 0, first + 5, **given_))
    tail = list(visits_from(n, size, 3, first, first + 5, **given_))
    assert [numbers.tolist() for numbers in tail] == [numbers.tolist() for numbers in everything[first:]]
    assert len(everything) == first + 5
    assert all(0 < len(numbers) <= size and len(numbers) % multiple == 0 for numbers in everything)
    per_epoch = batches_per_epoch(n, size, **given_)
    assert sum(map(len, visits(n, size, 3, 0, **given_))) == n - n % multiple
    assert len(visits(n, size, 3, 0, **given_)) == per_epoch


def test_what_a_shared_epoch_leaves_out_comes_in_another() -> None:
    left_out = [set(range(11)) - set(np.concatenate(visits(11, 4, 0, epoch, multiple=4))) for epoch in range(30)]
    assert {len(numbers) for numbers in left_out} == {3}
    assert not set.intersection(*left_out[:10])


def test_without_weights_the_order_is_that_of_the_first_version() -> None:
    """Runs that began before weights were there go on in their order."""
    order = np.random.default_rng([3, 1]).permutation(10)
    assert [batch.tolist() for batch in visits(10, 4, 3, 1)] == [part.tolist() for part in np.array_split(order, 3)]


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, float("nan")], [0.0, 0.0]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(InputError, match=r"weight of 0 or more for each of 2 examples|give at least one source"):
        visits(2, 1, 0, 0, weights=np.array(weights))


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    with pytest.raises(InputError, match="a batch of 6 cannot be shared by 4 processes"):
        visits(20, 6, 0, 0, multiple=4)


# ---- a share of the patients


def people(n: int) -> tuple[list[str | None], list[str]]:
    """Three records of each patient but for every tenth record, whose patient is unknown."""
    patients = [None if i % 10 == 0 else f"toy/p{i // 3}" for i in range(n)]
    return patients, [f"toy/{i}" for i in range(n)]


def test_a_share_of_the_patients_has_about_that_many_and_all_of_each() -> None:
    patients, records = people(9000)
    ids = np.array([patient or record for patient, record in zip(patients, records, strict=True)])
    for share in (0.1, 0.5, 0.9):
        chosen = subset(patients, records, share)
        assert not set(ids[chosen]) & set(ids[~chosen])
        n = len(set(ids))
        assert abs(len(set(ids[chosen])) - share * n) < 5 * np.sqrt(n * share * (1 - share))
    assert subset(patients, records, 1.0).all()


def test_smaller_shares_are_part_of_larger_ones_and_of_no_order() -> None:
    patients, records = people(600)
    shares = [subset(patients, records, share) for share in (0.05, 0.1, 0.5, 0.51, 1.0)]
    for smaller, larger in pairwise(shares):
        assert (smaller <= larger).all()
        assert smaller.sum() < larger.sum()
    order = np.random.default_rng(0).permutation(600)[:300]  # and of nothing that others are there
    again = subset([patients[i] for i in order], [records[i] for i in order], 0.5)
    assert (again == shares[2][order]).all()


def test_a_share_of_the_train_split_is_a_share_of_it() -> None:
    """Splits go by a hash of the same ids: a share by the same hash would be all or nothing of a split."""
    ids = pl.Series([f"toy/p{i}" for i in range(8000)])
    split = _by_hash(ids, SplitsConfig(seed=0))
    train = ids.filter(split == "train").to_list()
    chosen = subset(train, train, 0.1)
    assert abs(chosen.mean() - 0.1) < 5 * np.sqrt(0.09 / len(train))


def test_a_share_of_nobody_is_refused() -> None:
    with pytest.raises(InputError, match="a share of 1e-09 leaves none of 30 examples"):
        subset(*people(30), 1e-9)


def test_validation_goes_in_order() -> None:
    assert np.concatenate(list(in_order(10, 4))).tolist() == list(range(10))
    assert [len(numbers) for numbers in in_order(10, 4)] == [4, 3, 3]


def test_however_many_threads_read_the_batches_are_the_same(inputs: dict[str, Any], shards: Shards) -> None:
    _, places = pairs_of(inputs, shards)
    here, *others = (list(load(shards, places, visits_from(6, 2, 0, 0, 40), CPU, workers)) for workers in (0, 1, 2, 5))
    assert len(here) == 40
    assert len({one.numbers.numpy().tobytes() for one in here}) > 10
    for there in others:
        for one, other in zip(here, there, strict=True):
            assert isinstance(other, Batch)
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_few_batches_are_read_ahead_and_no_more(inputs: dict[str, Any], shards: Shards) -> None:
    """An endless order is taken only as it is used, and a batch that was handed out stays as it is."""
    _, places = pairs_of(inputs, shards)
    taken = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += 1
            yield np.array([taken % 6])

    batches = load(shards, places, endless(), CPU, workers=2)
    first = next(batches)
    kept = first.digital.clone()
    for _ in range(20):
        next(batches)
    assert taken == 21 + 2 * AHEAD
    assert torch.equal(first.digital, kept)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load")]


def test_the_leads_deviations_come_with_a_batch(inputs: dict[str, Any], shards: Shards) -> None:
    table, places = pairs_of(inputs, shards)
    (batch,) = load(shards, places, iter([np.arange(6)]), CPU)
    assert batch.sd_mv.dtype == torch.float32
    assert not batch.sd_mv[0, [LEADS.index("V4"), LEADS.index("V6")]].any(), "constant and missing"
    readers = {path.name: ShardReader(path / "shard.h5") for path in inputs["slices"]}
    for i, record in enumerate(table.iter_rows(named=True)):
        rows_of_record = [record["first_row"], record["second_row"]]
        of_record = np.concatenate([readers[record["slice_id"]].signal_mv(row) for row in rows_of_record], axis=1)
        for lead, samples in enumerate(of_record):
            expected = 0.0 if np.isnan(samples).all() else np.nanstd(samples)
            assert float(batch.sd_mv[i, lead]) == pytest.approx(expected, rel=1e-3), LEADS[lead]
            assert batch.sd_mv[i, lead] == batch.sd_mv[6 + i, lead], "of the whole record"


def test_standardising_waits_for_no_value_of_the_device(inputs: dict[str, Any], shards: Shards) -> None:
    """Meta tensors have no values: whatever needed one on the host, and so would stop a GPU's queue, fails."""
    _, places = pairs_of(inputs, shards)
    (batch,) = load(shards, places, iter([np.arange(6)]), CPU)
    signal = standardise(batch, torch.device("meta"))
    assert (signal.shape, signal.dtype) == ((12, 12, SEGMENT_SAMPLES), torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_from_pinned_memory_without_waiting(inputs: dict[str, Any], shards: Shards) -> None:
    _, places = pairs_of(inputs, shards)
    gpu = torch.device("cuda")
    expected = [standardise(batch, CPU) for batch in load(shards, places, visits_from(6, 2, 0, 0, 30), CPU)]
    found = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in load(shards, places, visits_from(6, 2, 0, 0, 30), gpu, workers=2):
            assert all(tensor.is_pinned() for tensor in batch[1:])
            found.append(standardise(batch, gpu))
            del batch  # its memory is used again, and only when it may
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other.cpu())


def read_elsewhere(shards: Shards, places: np.ndarray, answer: Connection) -> None:
    batches = load(shards, places, visits_from(6, 2, 0, 0, 9), CPU, workers=2)
    answer.send([[tensor.numpy().tobytes() for tensor in batch] for batch in batches])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_reads_the_same_while_this_one_reads(
    inputs: dict[str, Any], shards: Shards, method: str
) -> None:
    _, places = pairs_of(inputs, shards)
    here = load(shards, places, visits_from(6, 2, 0, 0, 9), CPU, workers=2)
    batches = [next(here)]  # its threads are at work
    context = multiprocessing.get_context(method)
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=read_elsewhere, args=(shards, places, send))
    child.start()
    send.close()
    there = receive.recv()  # EOFError if it died
    child.join(60)
    assert child.exitcode == 0
    batches += here
    assert there == [[tensor.numpy().tobytes() for tensor in batch] for batch in batches]


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


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_damaged_while_it_is_read_is_named(
    inputs: dict[str, Any], tmp_path: Path, workers: int
) -> None:
    whole = (inputs["slices"][0] / "shard.h5").read_bytes()
    (tmp_path / "shard.h5").write_bytes(whole)
    shards = Shards([tmp_path])
    n_segments = len(shards._readers[0]._offsets)
    places = np.array([[[0, row]] for row in range(n_segments)])
    assert len(list(load(shards, places, in_order(n_segments, 1), CPU, workers))) == n_segments
    with open(tmp_path / "shard.h5", "r+b") as file:
        file.truncate(int(shards._readers[0]._offsets[3]) + 100)
    batches = load(shards, places, in_order(n_segments, 1), CPU, workers)
    got: list[Batch] = []
    with pytest.raises(InputError, match=r"shard\.h5: row 3 cannot be read: the file ends before it"):
        got += batches  # adds one after another
    assert [int(batch.numbers[0]) for batch in got] == [0, 1, 2]
    with pytest.raises(InputError, match=r"shard\.h5: not a readable"):
        Shards([tmp_path])


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"device: .*{name}"):
        pick_device(name)


def test_devices_are_named_or_chosen() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_what_fits_is_tried_without_what_did_not() -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    tried: list[int] = []

    def attempt(n: int) -> None:
        assert all(reference() is None for reference in held), "the last try's memory is still taken"
        activations = torch.zeros(n)
        held.append(weakref.ref(activations))
        tried.append(n)
        if n > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError) as first:
        attempt(14)
    told = too_large(first.value, "14 at once need more memory", 14, 1, attempt, lambda n: f"size={n}", "nothing does")
    assert tried == [14, 7, 3]
    assert str(told) == "14 at once need more memory; 3 fit: use size=3"
    tried.clear()
    with pytest.raises(torch.OutOfMemoryError) as first:
        attempt(14)
    assert (
        str(too_large(first.value, "14 do not fit", 14, 4, attempt, str, "nothing does"))
        == "14 do not fit; nothing does"
    )
    assert tried == [14, 7]
