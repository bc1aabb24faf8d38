"""Several processes that train one model, by torch.distributed: gloo between CPUs, nccl between GPUs.

`launch` starts them on this machine, as torchrun does; torchrun itself starts them on several (docs/pretraining.md).
The objective stays that of the whole batch: what crosses from one example to another is gathered from all processes,
with its gradient, so that two processes with half of the batch each do what one does with all of it.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ecgfm.data import pick_device
from ecgfm.ecg import InputError

Result = TypeVar("Result")

_REFUSAL = "ECGFM_REFUSAL"  # environment variable: the file that tells the launcher why a process gave up


@dataclass(frozen=True)
class World:
    """The processes that train together, seen from one of them.

    rank: of this one, from 0; size: how many there are
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def part(self, examples: np.ndarray) -> np.ndarray:
        """This process's part of a batch; `examples` are a multiple of `size`."""
        each = len(examples) // self.size
        return examples[self.rank * each : (self.rank + 1) * each]

    def rows(self, n_pairs: int) -> Tensor:
        """The rows of this process's pairs in a batch of `n_pairs` pairs, all first segments and then all second."""
        pairs = torch.from_numpy(self.part(np.arange(n_pairs)))
        return torch.cat([pairs, pairs + n_pairs])

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, without gradient."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so in one of the processes: all of them must stop at the same step."""
        return bool(self.sum(torch.tensor(int(flag)))) if self.size > 1 else flag

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            self.any(False)

    def gather(self, x: Tensor) -> Tensor:
        """(n, ...) of each process -> (size x n, ...), in the order of ranks; the gradient finds its way back."""
        if self.size == 1:
            return x
        gathered: Tensor = _Gather.apply(x, self)  # type: ignore[no-untyped-call]
        return gathered

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all processes; the gradient finds its way back."""
        return self.gather(x[None]).mean(dim=0) if self.size > 1 else x

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over all processes; itself where there is one."""
        if self.size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, [self.device] if self.device.type == "cuda" else None)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        parts = [torch.empty_like(x) for _ in range(world.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # every process has its own loss of all that was gathered: the gradient of their sum
        world, gradient = ctx.world, gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(world.size)[world.rank], None


def joined() -> bool:
    """Whether this process was started as one of several, by `launch` or torchrun."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def wanted(processes: int) -> int:
    """How many processes to start on this machine; 0: one per GPU, or one where there is none."""
    return processes or max(torch.cuda.device_count(), 1)


@contextmanager
def join(device: str) -> Iterator[World]:
    """The processes this one was started with; a world of one otherwise.

    device: as in `data.pick_device`; of several processes each takes the GPU of its own number

    Raises:
        InputError: no such device.
    """
    if not joined():
        yield World(0, 1, pick_device(device))
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    picked = pick_device(device)
    if picked.type == "cuda":
        picked = pick_device(f"cuda:{local_rank}")
        torch.cuda.set_device(picked)
    elif int(os.environ["LOCAL_WORLD_SIZE"]) > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), picked)
    except InputError as error:
        if refusal := os.environ.get(_REFUSAL):
            Path(refusal).write_text(str(error), encoding="utf-8")
        raise
    finally:
        dist.destroy_process_group()


def launch(function: Callable[..., Result], arguments: tuple[Any, ...], processes: int) -> Result:
    """Call `function(*arguments)` in so many new processes at once; returns what the first one did.

    SIGTERM goes on to them, and ends this process once they have ended.

    Raises:
        InputError: one of them raised it.
        RuntimeError: one of them failed otherwise.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="ecgfm-") as scratch:
        refusal = Path(scratch) / "refusal"
        os.environ[_REFUSAL] = str(refusal)
        launcher = elastic_launch(
            LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=processes,
                run_id=Path(scratch).name,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                max_restarts=0,
                monitor_interval=0.1,
            ),
            function,
        )
        try:
            results: dict[int, Result] = launcher(*arguments)
        except ChildFailedError as error:
            if refusal.exists():
                raise InputError(refusal.read_text(encoding="utf-8")) from error
            rank, failure = error.get_first_failure()
            if failure.exitcode == 128 + signal.SIGTERM:
                raise SystemExit(failure.exitcode) from error
            raise RuntimeError(f"process {rank} of {processes} failed: {failure.message}") from error
        except SignalException as error:
            raise SystemExit(128 + error.sigval) from error
        finally:
            del os.environ[_REFUSAL]
    return results[0]
