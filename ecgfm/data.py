"""Segments from shards to the device: int16 as stored, standardised there by one multiply-add.

Torch begins here. An example is one segment (finetuning, prediction) or a pair of them (pretraining). The order of
visits is a pure function of seed and epoch, and so a batch is one of seed and its number: a run that resumes at step k
reads what it would have read had it never stopped.
"""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ecgfm.ecg import INVALID, InputError
from ecgfm.shards import ShardReader

SPARE_OPEN_FILES = 128  # libraries, logs, pipes of the loader


class Batch(NamedTuple):
    """Segments as they are stored, and what standardises them.

    numbers: (example,) int64, which examples these are
    digital: (segment, lead, time) int16; of pairs, all first segments and then all second ones
    scale, offset: (segment, lead) float32, of `ShardReader.standardisation`
    """

    numbers: Tensor
    digital: Tensor
    scale: Tensor
    offset: Tensor


class Shards:
    """The shards of several slices as one. Each process opens its own files, and only those it reads."""

    def __init__(self, directories: Sequence[Path]) -> None:
        """directories: of prepared slices, each with its `shard.h5`

        Raises:
            InputError: none at all, one that is no shard, one slice twice, or slices prepared in different ways.
        """
        if not directories:
            raise InputError("expected prepared slices, found none")
        self._paths = [Path(directory) / "shard.h5" for directory in directories]
        self._readers: dict[int, tuple[ShardReader, np.ndarray, np.ndarray]] = {}
        self._number: dict[tuple[str, str], int] = {}
        self._n_segments: list[int] = []
        facts = []
        for number, path in enumerate(self._paths):
            shard = ShardReader(path)
            if self._number.setdefault((shard.source, shard.slice_id), number) != number:
                raise InputError(f"{path}: the slice {shard.source} {shard.slice_id} is there twice")
            self._n_segments.append(shard.n_segments)
            facts.append((shard.sampling_rate_hz, shard.segment_samples, shard.leads))
            shard.close()
            if facts[-1] != facts[0]:
                raise InputError(
                    f"{path}: expected segments of {facts[0][1]} samples at {facts[0][0]:g} Hz with {len(facts[0][2])} "
                    f"leads as in {self._paths[0]}, found {facts[-1][1]} at {facts[-1][0]:g} Hz with "
                    f"{len(facts[-1][2])}; prepare all slices in one way"
                )
        self.sampling_rate_hz, self.segment_samples, self.leads = facts[0]
        _allow_open_files(len(self._paths) + SPARE_OPEN_FILES)

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
        beyond = places[:, 1] >= np.array(self._n_segments)[places[:, 0]]
        if beyond.any():
            number, row = places[beyond][0]
            raise InputError(
                f"{self._paths[number]}: the manifest names row {row}, the shard has {self._n_segments[number]} rows"
            )
        return places

    def read(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The segments at `places` (segment, 2): digital (segment, lead, time) int16; scale, offset (segment, lead).

        Raises:
            InputError: a shard that cannot be read.
        """
        n_leads = len(self.leads)
        digital = np.empty((len(places), n_leads, self.segment_samples), np.int16)
        scale, offset = np.empty((2, len(places), n_leads), np.float32)
        for i, (number, row) in enumerate(places):
            try:
                if number not in self._readers:
                    reader = ShardReader(self._paths[number])
                    self._readers[number] = (reader, *reader.standardisation())
                reader, scales, offsets = self._readers[number]
                digital[i] = reader.digital([row])[0]
            except OSError as error:
                raise InputError(f"{self._paths[number]}: row {row} cannot be read: {error}") from error
            scale[i], offset[i] = scales[row], offsets[row]
        return digital, scale, offset

    def close(self) -> None:
        """Close the files that this process has opened."""
        for reader, _, _ in self._readers.values():
            reader.close()
        self._readers.clear()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}  # HDF5 handles stay in their process


def standardise(batch: Batch, device: torch.device) -> Tensor:
    """(segment, lead, time) float32 on the device: mean 0, standard deviation 1 over each record's lead.

    Invalid samples and constant or missing leads are 0.
    """
    digital = batch.digital.to(device, non_blocking=True)
    scale, offset = (x.to(device, non_blocking=True)[..., None] for x in (batch.scale, batch.offset))
    return torch.addcmul(offset, digital.float(), scale).masked_fill_(digital == INVALID, 0)


def visits(n_examples: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch: every example once, in an order drawn from (seed, epoch), batches equal to within one.

    100 examples at a batch size of 64 make two batches of 50 rather than 64 and 36: no example is left out, and no
    batch is much smaller than the others.
    """
    order = np.random.default_rng([seed, epoch]).permutation(n_examples)
    return np.array_split(order, batches_per_epoch(n_examples, batch_size))


def batches_per_epoch(n_examples: int, batch_size: int) -> int:
    """How many batches `visits` makes."""
    return -(-n_examples // batch_size)


def visits_from(n_examples: int, batch_size: int, seed: int, first: int, stop: int) -> Iterator[np.ndarray]:
    """The batches numbered first .. stop - 1 of a run, epoch after epoch."""
    per_epoch = batches_per_epoch(n_examples, batch_size)
    for epoch in range(first // per_epoch, -(-stop // per_epoch)):
        start = epoch * per_epoch
        yield from visits(n_examples, batch_size, seed, epoch)[max(first - start, 0) : stop - start]


def in_order(n_examples: int, batch_size: int) -> Iterator[np.ndarray]:
    """Every example once, in order, in batches equal to within one."""
    yield from np.array_split(np.arange(n_examples), max(batches_per_epoch(n_examples, batch_size), 1))


def load(
    shards: Shards, places: np.ndarray, batches: Iterator[np.ndarray], device: torch.device, workers: int = 0
) -> Iterator[Batch]:
    """Read batch after batch.

    places: (example, segment of the example, 2), from `Shards.places`
    batches: the numbers of the examples of each batch
    workers: processes that read ahead; 0: this one reads when asked
    """
    loader = DataLoader(
        _Examples(shards, places),
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,  # a forked process would share HDF5's locks
        pin_memory=device.type == "cuda",
        worker_init_fn=_outlive_sigterm if workers else None,
    )
    return iter(loader)


class _Examples(Dataset[Batch]):
    """What a worker holds; asked with the numbers of a whole batch."""

    def __init__(self, shards: Shards, places: np.ndarray) -> None:
        self.shards = shards
        self.places = places

    def __getitem__(self, numbers: np.ndarray) -> Batch:
        places = self.places[numbers].swapaxes(0, 1).reshape(-1, 2)  # all first segments, then all second
        digital, scale, offset = self.shards.read(places)
        return Batch(*(torch.from_numpy(array) for array in (numbers, digital, scale, offset)))


def _outlive_sigterm(worker: int) -> None:
    """SIGTERM goes to the whole process group: the trainer saves first, and its workers end with it."""
    del worker
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
