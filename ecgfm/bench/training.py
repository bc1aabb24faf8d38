"""How fast the model is: steps of pretraining and encoding, on the device that is asked for, with made-up segments.

What is measured is what a run does, with the same functions, but for reading (`ecgfm bench load`): each step begins
with a batch as it is stored. The share of each part is of a step in which the device is waited for after each part.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ecgfm.config import ModelConfig, Precision, PretrainConfig
from ecgfm.data import Batch, pick_device, standardise
from ecgfm.distributed import World
from ecgfm.losses import apply_lead_mask, pretraining_loss, sample_lead_mask, sample_negatives
from ecgfm.model import Encoder, PretrainModel, flops_per_segment, n_frames, pool_nonzero_mean, sample_gumbel
from ecgfm.pretrain import hidden_frames, objective
from ecgfm.training import Randomness, gradient_norm, peak_flops

SEGMENT_SAMPLES = 2500


def bench_pretrain(config: PretrainConfig, steps: int) -> str:
    """Measure updates of one batch of `config.batch_pairs` pairs, and return what to print.

    Raises:
        InputError: no such device.
    """
    device = pick_device(config.device)
    world = World(0, 1, device)
    model = PretrainModel(config.model, dropout=config.dropout, feature_grad_scale=config.feature_grad_scale).to(device)
    trained: nn.Module = torch.compile(model) if config.compile else model  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, eps=config.adam_eps, fused=True)
    randomness = Randomness(config.seed, device)
    batch = made_up(2 * config.batch_pairs, config.model.n_leads)
    patients = torch.full((config.batch_pairs,), -1, device=device)
    losses: list[Tensor] = []

    def step(number: int) -> None:
        randomness.begin(number)
        optimizer.zero_grad()
        signal = standardise(batch, device)
        mask = sample_lead_mask(len(signal), config.model.n_leads, config.lead_mask_probability, randomness.device)
        hidden = hidden_frames(len(signal), config, SEGMENT_SAMPLES, randomness)
        loss = objective(
            trained,
            apply_lead_mask(signal, mask),
            patients,
            hidden,
            2.0,
            config=config,
            randomness=randomness,
            world=world,
        )
        torch.autograd.backward(loss.total / loss.count)
        losses.append(gradient_norm(model))
        optimizer.step()

    warm = 3 if device.type == "cuda" or config.compile else 1
    for number in range(warm):
        step(number)
    _reset_peak(device)
    seconds = _times(step, steps, device)
    parts = statistics_of([_parts(model, batch, patients, optimizer, config, device, n) for n in range(min(steps, 3))])
    return _report(
        f"pretraining steps of {len(batch.digital)} segments",
        len(batch.digital),
        seconds,
        config.model,
        3,
        device,
        config.precision,
        parts,
    )


def bench_encode(config: ModelConfig, batch_size: int, steps: int, device_name: str, precision: Precision) -> str:
    """Measure embeddings of batches of `batch_size` segments, and return what to print.

    Raises:
        InputError: no such device.
    """
    device = pick_device(device_name)
    encoder = Encoder(config).to(device).eval()
    batch = made_up(batch_size, config.n_leads)

    def step(number: int) -> None:
        del number
        pool_nonzero_mean(encoder(standardise(batch, device)).frames).cpu()

    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for number in range(2):
            step(number)
        _reset_peak(device)
        seconds = _times(step, steps, device)
    return _report(f"embeddings of {batch_size} segments", batch_size, seconds, config, 1, device, precision, {})


def made_up(n_segments: int, n_leads: int) -> Batch:
    """Segments of noise, as a loader delivers them."""
    random = np.random.default_rng(0)
    digital = torch.from_numpy(random.integers(-1000, 1000, (n_segments, n_leads, SEGMENT_SAMPLES), np.int16))
    ones = torch.full((n_segments, n_leads), 1 / 577)  # the standard deviation of the above
    return Batch(torch.arange(n_segments // 2), digital, ones, torch.zeros_like(ones), ones)


def statistics_of(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each part."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def _parts(
    model: PretrainModel,
    batch: Batch,
    patients: Tensor,
    optimizer: torch.optim.Optimizer,
    config: PretrainConfig,
    device: torch.device,
    number: int,
) -> dict[str, float]:
    """Seconds of each part of one step, the device waited for after each: together more than a step takes."""
    seconds: dict[str, float] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        _wait(device)
        seconds[name] = time.perf_counter() - started

    randomness = Randomness(config.seed, device)
    randomness.begin(number)
    optimizer.zero_grad()
    with part("standardise, mask"):
        signal = standardise(batch, device)
        mask = sample_lead_mask(len(signal), config.model.n_leads, config.lead_mask_probability, randomness.device)
        signal = apply_lead_mask(signal, mask)
        places = hidden_frames(len(signal), config, SEGMENT_SAMPLES, randomness)
        n_masked = places.shape[1]
        negatives = sample_negatives(len(signal), n_masked, config.n_negatives, randomness.device)
        books = len(signal), n_masked, config.model.n_codebooks, config.model.codebook_entries
        gumbel = sample_gumbel(books, device, randomness.device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        with part("feature extractor"):
            features = model.extract(signal)
        with part("positional convolution"):
            x = model.project(model.layer_norm(features))
            x = x + model.conv_pos(x)
        with part("transformer"):
            model.encoder(x, None, False)
        del features, x
        with part("all forward, with the heads"):
            output = model(signal, places.to(device), 2.0, gumbel)
    with part("losses"):
        loss = pretraining_loss(**output._asdict(), negatives=negatives, config=config, patients=patients)
    with part("backward"):
        torch.autograd.backward(loss.total / loss.count)
    with part("optimizer"):
        gradient_norm(model)
        optimizer.step()
    return seconds


def _times(step: Callable[[int], None], steps: int, device: torch.device) -> list[float]:
    """Seconds of each step. On a GPU steps are queued, as in a run, and waited for in the end."""
    _wait(device)
    if device.type == "cuda":
        started = time.perf_counter()
        for number in range(steps):
            step(number)
        _wait(device)
        return [(time.perf_counter() - started) / steps] * steps
    seconds = []
    for number in range(steps):
        started = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - started)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _report(
    what: str,
    n_segments: int,
    seconds: Sequence[float],
    model: ModelConfig,
    passes: int,
    device: torch.device,
    precision: Precision,
    parts: dict[str, float],
) -> str:
    """passes: forward alone is one third of `flops_per_segment`"""
    median = statistics.median(seconds)
    flops = flops_per_segment(model, SEGMENT_SAMPLES) * passes / 3
    reached = n_segments * flops / median
    peak = peak_flops(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        memory = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        name = f"CPU, {torch.get_num_threads()} threads"
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    share = f"{reached / peak:.1%} of {peak / 1e12:,.0f} TFLOP/s" if peak else _product_speed(precision, reached)
    lines = [
        f"{what}, {name}, {precision}, PyTorch {torch.__version__}, median of {len(seconds)}",
        f"  {n_segments / median:10,.1f} segments/s   {1e3 * median:,.1f} ms "
        f"(from {1e3 * min(seconds):,.1f} to {1e3 * max(seconds):,.1f})",
        f"  {flops / 1e9:10,.1f} GFLOP a segment of {n_frames(model, SEGMENT_SAMPLES)} frames: "
        f"{reached / 1e12:.3f} TFLOP/s",
        f"  {'MFU':>10} {share}",
        f"  {memory:10,.2f} GiB at most",
    ]
    return "\n".join([*lines, *(f"  {1e3 * spent:10,.1f} ms {part}" for part, spent in parts.items())])


def _product_speed(precision: Precision, reached: float) -> str:
    """Of a CPU no data sheet says it: how fast it multiplies matrices of the transformer's size."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.ones(2048, 768, dtype=kind), torch.ones(768, 3072, dtype=kind)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    fastest = 2 * 2048 * 768 * 3072 / min(seconds)
    return f"{reached / fastest:.1%} of {fastest / 1e12:.3f} TFLOP/s, which a lone product of 2048 x 768 x 3072 reaches"
