"""How fast batches are delivered: segments a second from shards in memory, beside a plain copy of the same bytes and
beside the reference's way, `scipy.io.loadmat` of a float64 file per segment.

The segments are synthetic ones of the published size (5 s, 500 Hz, 12 leads), or the user's own prepared slices. All
files are read once before the clock starts: what is measured is not the disk.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ecgfm.data import Shards, batches_per_epoch, load, pick_device, standardise, visits_from
from ecgfm.ecg import LEADS, InputError
from ecgfm.files import scratch_folder
from ecgfm.shards import ShardWriter

SAMPLING_RATE_HZ, SEGMENT_SAMPLES = 500.0, 2500
MAT_FILES = 2000  # enough of the slow way to time it
COPIED_BYTES = 1 << 28  # what the plain copy takes its segments from: more than any cache holds


class Speed(NamedTuple):
    """Of one pass over so many segments: by the clock, and in seconds of processor of all threads together."""

    segments: int
    seconds: float
    processor_seconds: float


def main(
    segments: int,
    shard_counts: Sequence[int],
    batch: int,
    workers: int,
    folder: Path,
    stages: Sequence[Path],
    device_name: str,
    repeats: int,
) -> str:
    """Measure, and return what to print.

    segments: how many are read in a run, and written where they are synthetic; of fewer in `stages` each is read often
    shard_counts: into how many shards the synthetic ones are divided, once for each
    batch: segments in a batch
    workers: threads that read ahead; 0: reads when asked
    folder: where synthetic shards and files are written; nothing stays there
    stages: directories of prepared slices, in place of synthetic ones
    device_name: where the batches go to be standardised

    Raises:
        InputError: `folder` cannot be written, no such device, more shards than segments, or a slice that cannot be
            read.
    """
    device = pick_device(device_name)
    if not stages and max(shard_counts) > segments:
        raise InputError(f"--shards {max(shard_counts)}: {segments:,} segments are too few for so many shards")
    with scratch_folder(folder, "ecgfm-bench-load") as scratch:
        slices = [list(stages)] if stages else [write_slices(scratch, segments, count) for count in shard_counts]
        return _measure(slices, segments, batch, workers, scratch, device, repeats)


def write_slices(folder: Path, n_segments: int, n_shards: int) -> list[Path]:
    """Slices of noise, `n_segments` in all, as even as they can be."""
    random = np.random.default_rng(0)
    some = random.integers(-3000, 3000, (64, len(LEADS), SEGMENT_SAMPLES), np.int16)
    per_lead = np.stack([np.full(len(LEADS), value) for value in (1000.0, 0.0, 0.0, 1.7)])
    slices = []
    for number in range(n_shards):
        directory = folder / f"{n_shards}-shards" / str(number)
        directory.mkdir(parents=True)
        slices.append(directory)
        with ShardWriter(directory / "shard.h5", "noise", str(number), SAMPLING_RATE_HZ, SEGMENT_SAMPLES) as shard:
            for first in range(number, n_segments, n_shards * len(some)):
                shard.append(some[: len(range(first, n_segments, n_shards))], per_lead)
    return slices


def _measure(
    slices: Sequence[Sequence[Path]],
    segments: int,
    batch: int,
    workers: int,
    scratch: Path,
    device: torch.device,
    repeats: int,
) -> str:
    opened: list[Shards] = []
    openings = []
    for directories in slices:
        started = time.perf_counter()
        opened.append(Shards(directories))
        openings.append(time.perf_counter() - started)
    places = [every_place(shards, segments) for shards in opened]
    shape = (len(opened[0].leads), opened[0].segment_samples)
    source = np.ones((max(COPIED_BYTES // (2 * shape[0] * shape[1]), 1), *shape), np.int16)
    mats = _write_mats(scratch, min(segments, MAT_FILES), shape)

    work: dict[str, Callable[[int], Speed]] = {}
    for shards, where in zip(opened, places, strict=True):
        deliver = partial(_deliver, shards, where, segments, batch, workers, device)
        count = len(shards.n_segments)
        work[f"deliver from {count} shard{'s' * (count != 1)}"] = partial(deliver, False)
    work[f"deliver, standardise ({device.type})"] = partial(deliver, True)
    work["copy in memory"] = partial(_copy, source, segments, batch)
    work["loadmat, file by file"] = partial(_loadmat, mats)

    for run in work.values():
        run(0)  # warms the cache
    runs = [{name: run(seed) for name, run in work.items()} for seed in range(1, repeats + 1)]  # noise hits all alike
    for shards in opened:
        shards.close()

    megabytes = 2 * shape[0] * shape[1] / 1e6
    speeds = {
        name: tuple(
            statistics.median(one[name].segments / seconds for one in runs for seconds in [one[name][part]])
            for part in (1, 2)
        )
        for name in work
    }
    slow, slow_per_core = speeds["loadmat, file by file"]
    opening = ", ".join(
        f"{1000 * seconds:,.0f} ms ({int(shards.n_segments.sum()):,} segments in {len(shards.n_segments)})"
        for seconds, shards in zip(openings, opened, strict=True)
    )
    return "\n".join(
        [
            f"batches of {batch} segments of {shape[0]} leads, {shape[1]:,} samples; "
            f"{workers or 'no'} thread{'s' * (workers != 1)} reading ahead, warm cache, medians of {repeats} runs over "
            f"{segments:,} segments",
            "",
            f"{'':30} {'segments/s':>11} {'MB/s':>7} {'to loadmat':>11} {'per core':>10} {'to loadmat':>11}",
            *(
                f"{name:30} {speed:11,.0f} {speed * megabytes * (4 if 'loadmat' in name else 1):7,.0f} "
                f"{speed / slow:11.1f} {per_core:10,.0f} {per_core / slow_per_core:11.1f}"
                for name, (speed, per_core) in speeds.items()
            ),
            "",
            "per core: segments in a second of processor, all threads together; loadmat reads float64",
            f"opening the shards, once: {opening}",
        ]
    )


def every_place(shards: Shards, at_most: int) -> np.ndarray:
    """Where the segments of all shards lie, or `at_most` of them, evenly: (segment, 1, 2), for `load`."""
    every = np.concatenate(
        [np.stack([np.full(count, number), np.arange(count)], axis=1) for number, count in enumerate(shards.n_segments)]
    )
    if len(every) == 0:
        raise InputError("the slices hold no segment; name others with --stage")
    return every[np.linspace(0, len(every) - 1, min(at_most, len(every))).astype(int), None]


def _order(n_examples: int, segments: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Epoch after epoch, of some `segments` in all."""
    epochs = -(-segments // n_examples)
    return visits_from(n_examples, batch, seed, 0, epochs * batches_per_epoch(n_examples, batch))


def _deliver(
    shards: Shards,
    places: np.ndarray,
    segments: int,
    batch: int,
    workers: int,
    device: torch.device,
    standardised: bool,
    seed: int,
) -> Speed:
    """Batch after batch; on a GPU with the copy to it."""
    order = _order(len(places), segments, batch, seed)
    clock = _Clock()
    count = 0
    for delivered in load(shards, places, order, device, workers):
        count += len(delivered.digital)
        if standardised:
            standardise(delivered, device)
        else:
            delivered.digital.to(device, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock.read(count)


def _copy(source: np.ndarray, n_segments: int, batch: int, seed: int) -> Speed:
    """No less can be done: as many segments, from random places in memory into a batch."""
    order = [numbers % len(source) for numbers in _order(n_segments, n_segments, batch, seed)]
    into = np.zeros((batch, *source.shape[1:]), np.int16)
    clock = _Clock()
    for numbers in order:
        np.take(source, numbers, axis=0, out=into[: len(numbers)], mode="clip")  # the default copies twice
    return clock.read(n_segments)


def _write_mats(folder: Path, n_files: int, shape: tuple[int, int]) -> list[Path]:
    """A file per segment, as the reference writes them."""
    from scipy.io import savemat

    random = np.random.default_rng(0)
    paths = [folder / f"{number}.mat" for number in range(n_files)]
    for path in paths:
        savemat(path, {"feats": random.normal(size=shape), "curr_sample_rate": SAMPLING_RATE_HZ})
    return paths


def _loadmat(paths: Sequence[Path], seed: int) -> Speed:
    """What the reference's data set does for each segment; the making of batches is left out."""
    from scipy.io import loadmat

    order = np.random.default_rng(seed).permutation(len(paths))
    clock = _Clock()
    for number in order:
        torch.from_numpy(loadmat(paths[number])["feats"]).float()
    return clock.read(len(paths))


class _Clock:
    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def read(self, segments: int) -> Speed:
        wall, processor = self._started
        return Speed(segments, time.perf_counter() - wall, time.process_time() - processor)
