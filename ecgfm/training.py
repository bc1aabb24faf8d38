"""What the two training loops share: seeds, a schedule, the log, and a polite end."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
import yaml
from torch import Generator, nn
from tqdm import tqdm

from ecgfm import checkpoints
from ecgfm.config import content_of
from ecgfm.ecg import InputError

Value = int | float | str | None

MAX_LOG_ROWS = 10_000
"""Training rows of a whole run: a published run of 329,000 steps logs every 33rd."""

VALIDATION = 2**40
"""Stands in for the step where validation draws its masks, always the same; no run has so many steps."""


def seed_of(*parts: int) -> int:
    """One seed from several numbers. Equal numbers give equal seeds, neighbouring ones unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


class Randomness:
    """All that is random in training, begun anew at each step from (seed, step): there is no state to save.

    host, device: generators, of the CPU and of the model's device; torch's global generators, which dropout and the
        quantizer draw from, are seeded with them
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self.host = Generator()
        self.device = Generator(device)

    def begin(self, step: int) -> None:
        """Put every generator where it stands before this step."""
        torch.manual_seed(seed_of(self._seed, step, 0))
        self.host.manual_seed(seed_of(self._seed, step, 1))
        self.device.manual_seed(seed_of(self._seed, step, 2))


def warm_up(step: int, warmup_steps: int) -> float:
    """The factor on the learning rate of the update after `step` updates: linear up to 1, then 1."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def divide_gradients(model: nn.Module, count: int | torch.Tensor) -> float:
    """Divide every gradient by `count`; returns the norm of all of them together."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for gradient in gradients:
        gradient.div_(count)
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))


def diverged(stage: str, step: int, loss: float, record_ids: Sequence[str]) -> InputError:
    """What to raise on a loss that is not finite."""
    more = f" and {len(record_ids) - 8} more" if len(record_ids) > 8 else ""
    return InputError(
        f"{stage}: the loss of step {step} is {loss}; try a smaller {stage}.learning_rate, or {stage}.warmup_steps; "
        f"the step read {', '.join(record_ids[:8])}{more}"
    )


class Log:
    """`metrics.jsonl`, a pure function of the inputs, and `timings.jsonl`, which is not. A row a line.

    Metrics rows have `step`, the updates done, and `split`, `train` (of that update) or `valid` (after it).
    """

    def __init__(self, out: Path, resumed_step: int, max_steps: int) -> None:
        """resumed_step: rows that a killed run wrote after this step are removed, as they are about to be written
        again; so is the validation row of the step itself, which every loop begins with.
        """
        self._every = math.ceil(max_steps / MAX_LOG_ROWS)
        _keep_rows(out / "metrics.jsonl", lambda row: row["step"] < resumed_step + (row["split"] == "train"))
        _keep_rows(out / "timings.jsonl", lambda row: row["step"] <= resumed_step)
        self._metrics = open(out / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self._timings = open(out / "timings.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def metrics(self, row: Mapping[str, Value]) -> None:
        """Write a row, now."""
        self._metrics.write(_line(row))
        self._metrics.flush()

    def training(self, row: Mapping[str, Value]) -> None:
        """Write an update's row, where the run is long only every so often."""
        if int(row["step"] or 0) % self._every == 0:
            self.metrics(row)

    def timing(self, step: int, seconds: float, wait_seconds: float, segments: int) -> None:
        """Write how long an update took, and how much of that it waited for data."""
        if step % self._every:
            return
        row = {
            "step": step,
            "seconds": round(seconds, 4),
            "data_wait_seconds": round(wait_seconds, 4),
            "segments_per_second": round(segments / seconds, 1),
        }
        self._timings.write(_line(row))
        self._timings.flush()

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._timings.close()


class SavesOnSigterm:
    """While entered, SIGTERM sets `requested` instead of ending the process; the loop saves at its next step."""

    requested = False

    def __enter__(self) -> SavesOnSigterm:
        self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def leave(self, step: int) -> None:
        """End the process, saying that its work is saved."""
        say(f"stopped by SIGTERM after step {step:,}, which is saved; the next run goes on from there")
        raise SystemExit(128 + signal.SIGTERM)


def resume(out: Path, config: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> checkpoints.Meta | None:
    """Fill model and optimizer from the newest complete checkpoint below `out`; None where there is none.

    Raises:
        InputError: it cannot be read, or is of a run with another config.
    """
    path = checkpoints.latest(out)
    if path is None:
        return None
    checkpoint = checkpoints.load(path)
    if checkpoint.meta.progress.get("config") != content_of(config):
        raise InputError(f"{path}: is of a run with another config; remove {out} to start anew")
    checkpoints.load_state(model, checkpoint.state, str(path))
    optimizer.load_state_dict(checkpoints.load_optimizer(path)["optimizer"])
    say(f"going on after step {checkpoint.meta.step:,}")
    return checkpoint.meta


def prune(out: Path, scheduled: Callable[[int], bool], keep_last: int) -> None:
    """Keep the last checkpoints of the schedule (and the best). One that SIGTERM made has served and is removed, so
    that an interrupted run ends with the files of an uninterrupted one."""
    for step, path in checkpoints.steps(out).items():
        if not scheduled(step):
            shutil.rmtree(path)
    checkpoints.keep_last(out, keep_last)


def write_config(config: Any, out: Path) -> None:
    """`config.yaml`: the values that decide the output."""
    text = yaml.safe_dump(content_of(config), sort_keys=False)
    (out / "config.yaml").write_text(text, encoding="utf-8")


def say(message: str) -> None:
    """One line for the run's log, above the progress bar where there is one."""
    tqdm.write(message)
    sys.stdout.flush()


def _line(row: Mapping[str, Value]) -> str:
    """A row as JSON; numbers at six digits, a float32's worth."""
    rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}
    return json.dumps(rounded, allow_nan=False) + "\n"


def _keep_rows(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the rows that are not wanted and a last one that is cut short."""
    if not path.exists():
        return
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(line for line in whole if wanted(json.loads(line))), encoding="utf-8")
    os.replace(partial, path)
