"""Segments from shards to the device: int16 as stored, standardised there by one multiply-add.

Torch begins here. An example is one segment (finetuning, prediction) or a pair of them (pretraining). The order of
visits is a pure function of seed and epoch, and so a batch is one of seed and its number: a run that resumes at step k
reads what it would have read had it never stopped.

Threads read ahead, not processes: a segment is one system call that lets go of the interpreter, straight into its place
in the batch, and nothing is sent from process to process.
"""

from __future__ import annotations

import resource
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from ecgfm.config import departures_in_words
from ecgfm.ecg import INVALID, InputError
from ecgfm.shards import ShardReader

SPARE_OPEN_FILES = 128  # libraries, logs
AHEAD = 2  # batches that wait or are being read, for each thread


class Batch(NamedTuple):
    """Segments as they are stored, and what standardises them.

    numbers: (example,) int64, which examples these are
    digital: (segment, lead, time) int16; of pairs, all first segments and then all second ones
    scale, offset: (segment, lead) float32, of `shards.standardisation`
    sd_mv: (segment, lead) float32, millivolt: one step of the standardised signal; 0 of a constant or missing lead
    """

    numbers: Tensor
    digital: Tensor
    scale: Tensor
    offset: Tensor
    sd_mv: Tensor


class Shards:
    """The shards of several slices as one. Several threads may read at once, and so may a forked or spawned process.

    Opening takes some 3 us and 150 bytes a segment and 3 ms a shard: where each segment lies, and what standardises it,
    is known from then on.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        """directories: of prepared slices, each with its `shard.h5`

        Raises:
            InputError: none at all, one that is no shard, one slice twice, or slices prepared in different ways.
        """
        if not directories:
            raise InputError("expected prepared slices, found none")
        _allow_open_files(len(directories) + SPARE_OPEN_FILES)
        self._readers: list[ShardReader] = []
        self._number: dict[tuple[str, str], int] = {}
        facts, values = [], []
        for number, directory in enumerate(directories):
            path = Path(directory) / "shard.h5"
            shard = ShardReader(path)
            self._readers.append(shard)
            if self._number.setdefault((shard.source, shard.slice_id), number) != number:
                raise InputError(f"{path}: the slice {shard.source} {shard.slice_id} is there twice")
            facts.append((shard.sampling_rate_hz, shard.segment_samples, shard.leads, shard.departures))
            if facts[-1][:3] != facts[0][:3]:
                raise InputError(
                    f"{path}: expected segments of {facts[0][1]} samples at {facts[0][0]:g} Hz with {len(facts[0][2])} "
                    f"leads as in {self._readers[0].path}, found {facts[-1][1]} at {facts[-1][0]:g} Hz with "
                    f"{len(facts[-1][2])}; prepare all slices in one way"
                )
            if shard.departures != facts[0][3]:
                raise InputError(
                    f"{path}: expected segments prepared {departures_in_words(facts[0][3])} as in "
                    f"{self._readers[0].path}, found {departures_in_words(shard.departures)}; prepare all slices "
                    "in one way"
                )
            values.append(shard.standardisation())
        self.sampling_rate_hz, self.segment_samples, self.leads, self.departures = facts[0]
        self.n_segments = np.array([shard.n_segments for shard in self._readers])
        self._first = np.cumsum(self.n_segments) - self.n_segments  # segment of each shard, of all in a row
        self._values = np.concatenate(values, axis=1)  # (3, segment, lead): scale, offset, sd_mv

    def places(self, table: pl.DataFrame, row_column: str = "shard_row") -> np.ndarray:
        """Where the segments of a manifest lie: (row of the table, 2) int64, number of the shard and row in it.

        table: with `source`, `slice_id` and `row_column`

        Raises:
            InputError: a slice or a row that is in no shard.
        """
        try:
            shard = [self._number[key] for key in zip(table["source"], table["slice_id"], strict=True)]
        except KeyError as error:
            source, slice_id = error.args[0]
            raise InputError(f"the manifest names the slice {source} {slice_id}, which was not given") from error
        places = np.stack([np.array(shard, np.int64), table[row_column].to_numpy().astype(np.int64)], axis=1)
        beyond = places[:, 1] >= self.n_segments[places[:, 0]]
        if beyond.any():
            number, row = places[beyond][0]
            raise InputError(
                f"{self._readers[number].path}: the manifest names row {row}, the shard has "
                f"{self.n_segments[number]} rows"
            )
        return places

    def read(self, numbers: np.ndarray, places: np.ndarray, pinned: bool = False) -> Batch:
        """The batch of the examples `numbers`, whose segments lie at `places` (segment, 2).

        pinned: in memory that a GPU copies from without waiting. PyTorch keeps such memory and hands it out again, once
            the copies that were asked for are done

        Raises:
            InputError: a shard that cannot be read.
        """
        shape = (len(places), len(self.leads))
        digital = torch.empty((*shape, self.segment_samples), dtype=torch.int16, pin_memory=pinned)
        values = torch.empty((3, *shape), pin_memory=pinned)
        for into, (number, row) in zip(digital.numpy(), places.tolist(), strict=True):
            self._readers[number].read(row, into)
        of_all = self._first[places[:, 0]] + places[:, 1]
        for of_segment, into in zip(self._values, values.numpy(), strict=True):
            np.take(of_segment, of_all, axis=0, out=into)
        return Batch(torch.from_numpy(numbers), digital, *values)

    def close(self) -> None:
        """Close the files. No loader may be reading."""
        for reader in self._readers:
            reader.close()


def standardise(batch: Batch, device: torch.device) -> Tensor:
    """(segment, lead, time) float32 on the device: mean 0, standard deviation 1 over each record's lead.

    Invalid samples and constant or missing leads are 0.
    """
    digital = batch.digital.to(device, non_blocking=True)
    scale, offset = (x.to(device, non_blocking=True)[..., None] for x in (batch.scale, batch.offset))
    signal = digital.float()
    return torch.addcmul(offset, signal, scale, out=signal).masked_fill_(digital == INVALID, 0)


def visits(
    n_examples: int,
    batch_size: int,
    seed: int,
    epoch: int,
    *,
    weights: np.ndarray | None = None,
    multiple: int = 1,
) -> list[np.ndarray]:
    """The batches of one epoch: every example once, in an order drawn from (seed, epoch), batches equal to within one.

    100 examples at a batch size of 64 make two batches of 50 rather than 64 and 36: no example is left out, and no
    batch is much smaller than the others.

    weights: (example,) how often an example is visited, relative to others; 0: never. An epoch has as many visits as
        there are examples with a weight above 0, and each comes as often as its share of the weights says, rounded down
        or up by a draw that is right on average. Its visits lie evenly apart: two meet in one batch only where that
        is about as long as the epoch over their number
    multiple: every batch is a multiple of so many examples (processes that share it); up to `multiple` - 1 visits
        of an epoch are left out, others in each epoch

    Raises:
        InputError: see `batches_per_epoch`.
    """
    n_batches = batches_per_epoch(n_examples, batch_size, weights=weights, multiple=multiple)
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(n_examples) if weights is None else _weighted_order(weights, random)
    groups = order[: len(order) - len(order) % multiple].reshape(-1, multiple)
    return [batch.reshape(-1) for batch in np.array_split(groups, n_batches)]


def _weighted_order(weights: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Systematic resampling (Kitagawa 1996, J. Comput. Graph. Stat. 5:1) of the examples, shuffled first."""
    examples = random.permutation(np.flatnonzero(weights))
    share = np.cumsum(weights[examples], dtype=np.float64)
    edges = np.floor(share / share[-1] * len(examples) + random.random()).astype(np.int64)
    counts = np.diff(edges, prepend=0)
    visit = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # 0, 1, ... of each example
    when = (visit + np.repeat(random.random(len(examples)), counts)) / np.repeat(counts, counts)
    return np.repeat(examples, counts)[np.argsort(when, kind="stable")]


def batches_per_epoch(n_examples: int, batch_size: int, *, weights: np.ndarray | None = None, multiple: int = 1) -> int:
    """How many batches `visits` makes.

    Raises:
        InputError: weights that are not of these examples or none of them above 0, or fewer visits than `multiple`, or
            a batch size that is none.
    """
    n_visits = n_examples
    if weights is not None:
        if weights.shape != (n_examples,) or not np.isfinite(weights).all() or (weights < 0).any():
            raise InputError(f"expected a weight of 0 or more for each of {n_examples:,} examples")
        n_visits = int(np.count_nonzero(weights))
        if n_visits == 0:
            raise InputError(f"all {n_examples:,} examples have weight 0; give at least one source a weight above 0")
    if batch_size % multiple:
        raise InputError(f"a batch of {batch_size} cannot be shared by {multiple} processes; use a multiple of them")
    if n_visits < multiple:
        raise InputError(f"{n_visits} examples are too few for {multiple} processes; use fewer processes")
    return -(-(n_visits - n_visits % multiple) // batch_size)


def visits_from(
    n_examples: int,
    batch_size: int,
    seed: int,
    first: int,
    stop: int,
    *,
    weights: np.ndarray | None = None,
    multiple: int = 1,
) -> Iterator[np.ndarray]:
    """The batches numbered first .. stop - 1 of a run, epoch after epoch; `weights` and `multiple` as in `visits`."""
    per_epoch = batches_per_epoch(n_examples, batch_size, weights=weights, multiple=multiple)
    for epoch in range(first // per_epoch, -(-stop // per_epoch)):
        start = epoch * per_epoch
        of_epoch = visits(n_examples, batch_size, seed, epoch, weights=weights, multiple=multiple)
        yield from of_epoch[max(first - start, 0) : stop - start]


def subset(keys: Sequence[str | None], fallback: Sequence[str], share: float, seed: int = 0) -> np.ndarray:
    """Which examples belong to a share of the patients: (example,) bool.

    A patient is in by the hash of its id and the seed alone: the same ones whatever else is there, in whatever order,
    in every manifest; those of a smaller share are among those of a larger one, and a share of 1 has all.

    keys: `patient_id` of each example, None where unknown
    fallback: `record_id` of each example, which stands in for an unknown patient

    Raises:
        InputError: nothing is left.
    """
    if share == 1 and len(keys):
        return np.ones(len(keys), bool)
    identities = [key or other for key, other in zip(keys, fallback, strict=True)]
    within = {identity for identity in set(identities) if _place(identity, seed) < share}
    chosen = np.array([identity in within for identity in identities], bool)
    if not chosen.any():
        raise InputError(f"subset: a share of {share:g} leaves none of {len(chosen):,} examples; use a larger one")
    return chosen


def _place(identity: str, seed: int) -> float:
    """Uniform on [0, 1), and nothing to do with the hash that splits are made by."""
    salt = seed.to_bytes(8, "little")
    digest = blake2b(identity.encode(), digest_size=8, person=b"ecgfm-subset", salt=salt).digest()
    return (int.from_bytes(digest) >> 11) / 2**53  # as many bits as a float has: 1 is never reached


def in_order(n_examples: int, batch_size: int) -> Iterator[np.ndarray]:
    """Every example once, in order, in batches equal to within one."""
    yield from np.array_split(np.arange(n_examples), max(batches_per_epoch(n_examples, batch_size), 1))


def load(
    shards: Shards, places: np.ndarray, batches: Iterator[np.ndarray], device: torch.device, workers: int = 0
) -> Iterator[Batch]:
    """Read batch after batch, the same ones in the same order whatever the number of workers.

    places: (example, segment of the example, 2), from `Shards.places`
    batches: the numbers of the examples of each batch
    device: where the batches will go; for a GPU they are in pinned memory
    workers: threads that read ahead, `AHEAD` batches each; 0: this one reads when asked

    Raises:
        InputError: a shard that cannot be read.
    """

    def read(numbers: np.ndarray) -> Batch:
        of_segments = places[numbers].swapaxes(0, 1).reshape(-1, 2)  # all first segments, then all second
        return shards.read(numbers, of_segments, pinned=device.type == "cuda")

    if workers == 0:
        yield from map(read, batches)
        return
    waiting: deque[Future[Batch]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="load")
    try:
        for numbers in batches:
            waiting.append(pool.submit(read, numbers))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # a batch that is being read is done within milliseconds


def pick_device(name: str) -> torch.device:
    """`auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:1`.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device: expected auto, cpu, cuda or cuda:<number>, found {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu, cuda or cuda:<number>, found {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device: {name} was asked for, found {torch.cuda.device_count()} GPUs that PyTorch {torch.__version__} "
            f"can use; use auto or cpu"
        )
    return device


def _allow_open_files(needed: int) -> None:
    """Random access keeps every shard open: raise the soft limit, often 1,024, where there are more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise InputError(f"{needed} files must be open at once and the limit is {hard}; raise it (ulimit -n)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def too_large(
    error: torch.OutOfMemoryError,
    what: str,
    n: int,
    fewest: int,
    attempt: Callable[[int], object],
    advice: Callable[[int], str],
    hopeless: str,
) -> InputError:
    """What to raise where memory ran out: with the largest of n / 2, n / 4, ... that does fit, found by trying.

    error: what the device said; what the calls that it ended still hold is let go first
    what: too much at once, as in "64 pairs at once need more memory than cuda:0 has"
    attempt: does the same with fewer
    advice: what to set so that so many are done at once; hopeless: what to do where not even `fewest` fit
    """
    traceback.clear_frames(error.__traceback__)
    while (n := n // 2) >= fewest:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            attempt(n)
        except torch.OutOfMemoryError as another:
            traceback.clear_frames(another.__traceback__)
            continue
        return InputError(f"{what}; {n} fit: use {advice(n)}")
    return InputError(f"{what}; {hopeless}")
