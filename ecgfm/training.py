"""What the two training loops share: seeds, a schedule, the log, and a polite end."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

import numpy as np
import torch
import yaml
from torch import Generator, Tensor, nn
from tqdm import tqdm

from ecgfm import checkpoints, own_process
from ecgfm.config import content_of
from ecgfm.ecg import InputError

Value = int | float | str | None

MAX_LOG_ROWS = 10_000
"""Training rows of a whole run: a published run of 329,000 steps logs every 33rd."""

TELL_S = 2.0
"""How often a training tells how far it is."""

VALIDATION = 2**40
"""Stands in for the step where validation draws its masks, always the same; no run has so many steps."""


def seed_of(*parts: int) -> int:
    """One seed from several numbers. Equal numbers give equal seeds, neighbouring ones unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


class Randomness:
    """All that is random in training, begun anew at each step from (seed, step): there is no state to save.

    host, device: generators, of the CPU and of the model's device, of which processes that train together draw alike,
        for the whole batch; what is a process's own comes from `own`, of its device, and, dropout, from torch's global
        generators, which are seeded with them
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self.host = Generator()
        self.device = Generator(device)
        self.own = Generator(device)

    def begin(self, step: int, rank: int = 0) -> None:
        """Put every generator where it stands before this step, in the process `rank` of those that train together."""
        torch.manual_seed(seed_of(self._seed, step, 0, rank))
        self.host.manual_seed(seed_of(self._seed, step, 1))
        self.device.manual_seed(seed_of(self._seed, step, 2))
        self.own.manual_seed(seed_of(self._seed, step, 3, rank))


def warm_up(step: int, warmup_steps: int) -> float:
    """The factor on the learning rate of the update after `step` updates: linear up to 1, then 1."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def cosine(step: int, warmup_steps: int, max_steps: int) -> float:
    """The factor on the learning rate of the update after `step` updates: 1 until the warm-up ends, then half a turn of
    a cosine down to 0 at `max_steps` (Loshchilov and Hutter 2017, arXiv 1608.03983)."""
    done = (step - warmup_steps) / max(max_steps - warmup_steps, 1)
    return 0.5 + 0.5 * math.cos(math.pi * min(max(done, 0.0), 1.0))


def rate_of_epoch(epoch: int, rates: Sequence[tuple[int, float]]) -> float:
    """The learning rate in an epoch, numbered from 1, where `rates` says from which epoch each one holds."""
    return next(rate for first, rate in sorted(rates, reverse=True) if first <= epoch)


def divide_gradients(model: nn.Module, count: int | Tensor) -> float:
    """Divide every gradient by `count`; returns the norm of all of them together."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    torch._foreach_div_(gradients, count)
    return float(gradient_norm(model))


def gradient_norm(model: nn.Module) -> Tensor:
    """(): the norm of all gradients together, left on the device."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm


class Later:
    """Numbers on their way from a device: asked for now, read when the device has come to them anyway, so that it need
    not stand still for a line of the log."""

    def __init__(self, numbers: Tensor) -> None:
        """numbers: (n,)"""
        self._arrived: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        else:
            self._numbers = numbers

    def read(self) -> list[float]:
        """The numbers; waits for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._numbers.tolist()
        return numbers


PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "A10": 125e12}
"""By a word of the device's name: dense bf16 operations a second on its data sheet (NVIDIA; of two the SXM one)."""


def peak_flops(device: torch.device) -> float | None:
    """What the device could do in a second at most, for its utilisation; None where no data sheet says."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((flops for word, flops in PEAK_FLOPS.items() if word in words), None)


def diverged(stage: str, step: int, loss: float, record_ids: Sequence[str]) -> InputError:
    """What to raise on a loss that is not finite."""
    more = f" and {len(record_ids) - 8} more" if len(record_ids) > 8 else ""
    return InputError(
        f"{stage}: the loss of step {step} is {loss}; try a smaller {stage}.learning_rate or a longer warm-up; "
        f"the step read {', '.join(record_ids[:8])}{more}"
    )


class Log:
    """`metrics.jsonl`, a pure function of the inputs, and `timings.jsonl`, which is not. A row a line.

    Metrics rows have `step`, the updates done, and `split`, `train` (of that update) or `valid` (after it).
    """

    def __init__(self, out: Path | None, resumed_step: int, max_steps: int, tensorboard: bool = False) -> None:
        """out: None: of several processes one writes, and this is another
        resumed_step: rows that a killed run wrote after this step are removed, as they are about to be written
            again; so is the validation row of the step itself, which every loop begins with
        tensorboard: write the same numbers to `tensorboard/` too

        Raises:
            InputError: TensorBoard is asked for and not installed.
        """
        self._every = math.ceil(max_steps / MAX_LOG_ROWS)
        self._max_steps, self._told = max_steps, -math.inf
        self._loss: Value = None
        self._files: dict[str, TextIO] = {}
        self._board: Any = None
        if out is None:
            return
        _keep_rows(out / "metrics.jsonl", lambda row: row["step"] < resumed_step + (row["split"] == "train"))
        _keep_rows(out / "timings.jsonl", lambda row: row["step"] <= resumed_step)
        for name in ("metrics", "timings"):
            self._files[name] = open(out / f"{name}.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise InputError("tensorboard: true needs TensorBoard: pip install 'ecgfm[tensorboard]'") from error
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=resumed_step + 1)

    def metrics(self, row: Mapping[str, Value]) -> None:
        """Write a row, now."""
        self._write("metrics", row)

    def training(self, row: Mapping[str, Value]) -> None:
        """Write an update's row, where the run is long only every so often."""
        self._loss = row["loss"]
        if int(row["step"] or 0) % self._every == 0:
            self.metrics(row)

    def timing(
        self, step: int, seconds: float, wait_seconds: float, segments: int, utilisation: float | None = None
    ) -> None:
        """Write how long an update took, how much of that it waited for data, and what share of the operations that
        the device could have done were the model's (MFU), where that is known."""
        self._tell(step, segments / seconds)
        if step % self._every:
            return
        row = {
            "step": step,
            "seconds": round(seconds, 4),
            "data_wait_seconds": round(wait_seconds, 4),
            "segments_per_second": round(segments / seconds, 1),
            **({} if utilisation is None else {"mfu": round(utilisation, 4)}),
        }
        self._write("timings", row)

    def _tell(self, step: int, segments_per_second: float) -> None:
        """How far the training is, for the process that started this one: `own_process.tell`."""
        now = time.monotonic()
        if not self._files or not (now - self._told >= TELL_S or step == self._max_steps):
            return
        self._told = now
        facts = {"step": step, "max_steps": self._max_steps, "loss": self._loss}
        own_process.tell(facts | {"segments_per_second": segments_per_second})

    def _write(self, name: str, row: Mapping[str, Value]) -> None:
        if name in self._files:
            self._files[name].write(_line(row))
            self._files[name].flush()
        if self._board is not None:
            group = row.get("split", "time")
            for measure, value in row.items():
                if measure != "step" and isinstance(value, int | float):
                    self._board.add_scalar(f"{group}/{measure}", value, int(row["step"] or 0))

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()


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
        say(f"stopped after step {step:,}, which is saved; the next run goes on from there")
        raise SystemExit(128 + signal.SIGTERM)


def resume(
    out: Path, config: Any, model: nn.Module, optimizer: torch.optim.Optimizer, aloud: bool = True
) -> checkpoints.Meta | None:
    """Fill model and optimizer from the newest complete checkpoint below `out`; None where there is none.

    aloud: say so; of several processes one does

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
    if aloud:
        say(f"going on after step {checkpoint.meta.step:,}")
    return checkpoint.meta


def prune(out: Path, scheduled: Callable[[int], bool], keep_last: int, keep_every: int = 0) -> None:
    """Keep the last checkpoints of the schedule, the best, and those at multiples of `keep_every`. One that SIGTERM
    made has served and is removed, so that an interrupted run ends with the files of an uninterrupted one."""
    for step, path in checkpoints.steps(out).items():
        if not scheduled(step):
            shutil.rmtree(path)
    checkpoints.keep_last(out, keep_last, keep_every)


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
