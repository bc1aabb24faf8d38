"""Sketches: what tells one ECG from another in 140 bytes, and which records have the same.

The same recording is published under several names, at other rates and gains and with fewer leads. Its sketch stays
near; the sketch of another ECG, of the same patient too, is far. A sketch knows the first five seconds:

- lead I and lead II, 64 numbers each: means over 20 ms, smoothed (1, 2, 1), less their moving average over half a
  second (QRS complexes and T waves stay, baseline wander goes), projected on fixed random signs. The cosine between
  two of these is that of the signals (Johnson & Lindenstrauss 1984; signs suffice: Achlioptas 2003), whatever the gain;
- the level of each of the twelve leads: the logarithm of its size in the same projection. A gain moves all levels of a
  record together.

Near sketches among many are found by locality-sensitive hashing with random hyperplanes (Charikar 2002), so that a
million records are not compared each with each.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

from ecgfm.ecg import LEADS

SKETCHED_SECONDS = 5.0
SKETCH_LENGTH = 140  # int8: lead I (64), lead II (64), levels of the twelve standard leads
LEVELS = slice(128, SKETCH_LENGTH)

_BLOCK_S = 0.02
_N_BLOCKS = round(SKETCHED_SECONDS / _BLOCK_S)
_FEWEST_BLOCKS = 100  # 2 s: fewer beats are alike by chance
_AVERAGED_BLOCKS = 25  # half a second
_NUMBERS = 64  # per lead
_SHAPE_LEADS = ("I", "II")
_ABSENT = -128  # the level of a lead that is missing, invalid or constant
_LEVEL_STEP = 0.04  # of the natural logarithm
_LEVEL_0_MV = 0.05
_FLAT_MV = 1e-5
_INVALID_SHARE = 0.2  # of a lead's blocks without a valid sample; above it the lead is absent

_BANDS, _BITS = 24, 24  # per lead: see `near_pairs`
_AT_ONCE = 100_000  # rows, so that memory stays in the tens of megabytes


def sketch(signal_mv: np.ndarray, sampling_rate_hz: float, leads: Sequence[str] = LEADS) -> np.ndarray | None:
    """The sketch of one record, (140,) int8; None where neither lead I nor lead II has 2 s of varying
    signal at 50 Hz or more.

    Sketches are compared at one sampling rate: the prepared one.

    signal_mv: (lead, time), millivolt, NaN where invalid
    leads: standard leads, the rows of `signal_mv`
    """
    return sketch_together(signal_mv[None], sampling_rate_hz, leads)[0]


def sketch_together(
    signals_mv: np.ndarray, sampling_rate_hz: float, leads: Sequence[str] = LEADS
) -> list[np.ndarray | None]:
    """`sketch` for each of (record, lead, time). A few recordings together take half the time."""
    n_records, n_leads, n_samples = signals_mv.shape
    if sampling_rate_hz * _BLOCK_S < 1:
        return [None] * n_records
    blocks = _blocks(signals_mv.reshape(n_records * n_leads, n_samples), sampling_rate_hz)
    n_blocks = blocks.shape[1]
    if n_blocks < _FEWEST_BLOCKS:
        return [None] * n_records
    projection = _projection(n_blocks)
    numbers = blocks @ projection
    size_mv = np.sqrt(np.einsum("ln,ln->l", numbers, numbers))
    if not math.isfinite(size_mv.sum()):
        _mend(blocks)
        numbers = blocks @ projection
        size_mv = np.sqrt(np.einsum("ln,ln->l", numbers, numbers))
    size_mv = size_mv.reshape(n_records, n_leads) / math.sqrt(n_blocks * _NUMBERS)
    numbers = numbers.reshape(n_records, n_leads, _NUMBERS)
    present = size_mv > _FLAT_MV
    level_places, shape_rows, shape_places = _places(tuple(leads))
    levels = np.rint(np.log(np.maximum(size_mv, _FLAT_MV) * (1 / _LEVEL_0_MV)) * (1 / _LEVEL_STEP))
    levels = np.minimum(np.maximum(levels, _ABSENT + 1), 127)
    levels[~present] = _ABSENT
    shapes = numbers[:, shape_rows]
    shapes *= (127 * present[:, shape_rows] / np.maximum(np.abs(shapes).max(axis=2), _FLAT_MV))[..., None]
    found = np.zeros((n_records, SKETCH_LENGTH), dtype=np.int8)
    found[:, LEVELS] = _ABSENT
    found[:, level_places] = levels
    found[:, shape_places] = np.rint(shapes)
    told = present[:, shape_rows].any(axis=1).tolist()
    return [of_record if there else None for of_record, there in zip(found, told, strict=True)]


@cache
def _places(leads: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where in a sketch the levels of these leads stand; the rows of leads I and II, and where their numbers stand."""
    levels = LEVELS.start + np.array([LEADS.index(lead) for lead in leads])
    halves = [half for half, lead in enumerate(_SHAPE_LEADS) if lead in leads]
    rows = np.array([leads.index(_SHAPE_LEADS[half]) for half in halves], dtype=np.int64)
    return levels, rows, np.arange(2 * _NUMBERS).reshape(2, _NUMBERS)[halves]


def _blocks(signal_mv: np.ndarray, sampling_rate_hz: float) -> np.ndarray:
    """Means over 20 ms, (lead, block) float64, of the first five seconds; NaN where a sample of a block is invalid."""
    per_block = sampling_rate_hz * _BLOCK_S
    n_blocks = min(int(signal_mv.shape[1] / per_block + 1e-9), _N_BLOCKS)
    whole = round(per_block)
    if whole and abs(per_block - whole) < 1e-9:
        begin = np.ascontiguousarray(signal_mv[:, : n_blocks * whole], dtype=np.float64)
        # a product with ones takes a tenth of the time of numpy's mean over short rows
        means: np.ndarray = begin.reshape(-1, whole) @ np.full(whole, 1 / whole)
        return means.reshape(len(signal_mv), n_blocks)
    first = np.ceil(np.arange(n_blocks + 1) * per_block - 1e-9).astype(np.int64)  # every sample is in one block
    sums: np.ndarray = np.add.reduceat(signal_mv[:, : first[-1]], first[:-1], axis=1, dtype=np.float64)
    sums /= np.diff(first)
    return sums


def _mend(blocks: np.ndarray) -> None:
    """Put a straight line where blocks are invalid, in place; 0 all along a lead that is not valid enough."""
    invalid = ~np.isfinite(blocks)
    valid_enough = invalid.mean(axis=1) <= _INVALID_SHARE
    position = np.arange(blocks.shape[1])
    for row in np.flatnonzero(invalid.any(axis=1) & valid_enough):
        there = ~invalid[row]
        blocks[row] = np.interp(position, position[there], blocks[row, there])
    blocks[~valid_enough] = 0.0


@cache
def _projection(n_blocks: int) -> np.ndarray:
    """(block, number): a weighted mean of three, less the moving average, then sums with fixed random signs.

    Without the weighted mean, noise above 25 Hz is folded into the blocks, and not alike at another rate.
    """
    shaped = _averaging(n_blocks, [0.25, 0.5, 0.25])
    shaped = shaped - shaped @ _averaging(n_blocks, [1 / _AVERAGED_BLOCKS] * _AVERAGED_BLOCKS)
    projection: np.ndarray = shaped @ _signs("sketch", _N_BLOCKS, _NUMBERS)[:n_blocks]
    return projection


def _averaging(n_blocks: int, weights: Sequence[float]) -> np.ndarray:
    """(from block, to block): weighted means around each block; the first and last block stand for those beyond."""
    matrix = np.zeros((n_blocks, n_blocks))
    for distance, weight in enumerate(weights, -(len(weights) // 2)):
        to = np.arange(n_blocks)
        np.add.at(matrix, (np.clip(to + distance, 0, n_blocks - 1), to), weight)
    return matrix


def _signs(purpose: str, *shape: int) -> np.ndarray:
    """+1 and -1, (shape) float64, from a hash: the same for ever, on every machine and with every numpy."""
    n_bytes = -(-int(np.prod(shape)) // 8)
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(purpose.encode()).digest(n_bytes), dtype=np.uint8))
    signs: np.ndarray = bits[: int(np.prod(shape))].reshape(shape) * 2.0 - 1.0
    return signs


def similarity(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How near sketches are, pair by pair.

    one, other: (pair, 140) int8

    Returns:
        the cosine, the lower of leads I and II among those that both have; NaN where they share neither: (pair,)
        the spread of the levels: by what factor the leads that both have differ beyond a common gain, 1 where they
        have one lead in common: (pair,)
    """
    halves = [slice(half * _NUMBERS, (half + 1) * _NUMBERS) for half in range(2)]
    cosines = [_cosine(one[:, half], other[:, half]) for half in halves]
    a, b = (levels[:, LEVELS].astype(np.float32) for levels in (one, other))
    difference = np.where((a == _ABSENT) | (b == _ABSENT), np.nan, a - b)
    steps = np.fmax.reduce(difference, axis=1) - np.fmin.reduce(difference, axis=1)
    return np.fmin(*cosines), np.exp(np.nan_to_num(steps) * _LEVEL_STEP)


def _cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Row by row; NaN where one has no numbers."""
    a, b = one.astype(np.float32), other.astype(np.float32)
    size = np.sqrt(np.einsum("pn,pn->p", a, a) * np.einsum("pn,pn->p", b, b))
    cosine = np.full(len(a), np.nan, dtype=np.float32)
    np.divide(np.einsum("pn,pn->p", a, b), size, out=cosine, where=size > 0)
    return cosine


def near_pairs(sketches: np.ndarray, min_cosine: float, max_level_spread: float) -> np.ndarray:
    """The pairs of records whose sketches are near, (pair, 2) int64: places in `sketches`, ordered, each once.

    Two records are compared if `_BITS` sums have equal signs in one of the `_BANDS` bands of a lead. Where both leads
    have cosine c, that is with probability 1 - (1 - (1 - arccos(c) / pi)^24)^48: 0.9999 at 0.98, 0.98 at 0.95. Equal
    sketches are met always; they are tied as a chain, not each with each.

    sketches: (record, 140) int8
    """
    if not len(sketches):
        return np.empty((0, 2), dtype=np.int64)
    packed = np.ascontiguousarray(sketches).view(np.dtype((np.void, SKETCH_LENGTH)))[:, 0]
    order = np.argsort(packed, kind="stable")
    new = np.append(True, packed[order[1:]] != packed[order[:-1]])
    found = [np.stack([order[:-1], order[1:]], axis=1)[~new[1:]]]
    first = order[new]
    planes = _signs("bands", _BANDS, _NUMBERS, _BITS).astype(np.float32)
    for half in range(2):
        numbers = np.ascontiguousarray(sketches[first, half * _NUMBERS : (half + 1) * _NUMBERS])
        there = np.flatnonzero(numbers.any(axis=1))
        for band in planes:
            for alike in _same_band(numbers, there, band):
                near = _cosine(numbers[alike[:, 0]], numbers[alike[:, 1]]) >= min_cosine
                pairs = first[alike[near]]
                cosine, spread = similarity(sketches[pairs[:, 0]], sketches[pairs[:, 1]])
                found.append(pairs[(cosine >= min_cosine) & (spread <= max_level_spread)])
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def _same_band(numbers: np.ndarray, there: np.ndarray, band: np.ndarray) -> Iterator[np.ndarray]:
    """(pair, 2) places whose sums over the planes of a band have the same signs, some 100,000 pairs at a time.

    The sums are of whole numbers below 2^24: exact in float32 on every machine.
    """
    key = np.empty(len(there), dtype=np.uint32)
    weight = 2 ** np.arange(_BITS, dtype=np.uint32)
    for start in range(0, len(there), _AT_ONCE):
        chosen = slice(start, start + _AT_ONCE)
        key[chosen] = ((numbers[there[chosen]].astype(np.float32) @ band) > 0) @ weight
    order = np.argsort(key, kind="stable")
    key, there = key[order], there[order]
    alike = np.arange(len(key))  # those whose neighbour at this distance, in the order of keys, has the same key
    for distance in range(1, len(key)):
        alike = alike[: np.searchsorted(alike, len(key) - distance)]
        alike = alike[key[alike] == key[alike + distance]]
        if not len(alike):
            return
        for start in range(0, len(alike), _AT_ONCE):
            some = alike[start : start + _AT_ONCE]
            yield np.stack([there[some], there[some + distance]], axis=1)
