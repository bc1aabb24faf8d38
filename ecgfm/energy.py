"""What a machine used while something was made: energy, as far as it tells, and memory.

Energy is of the whole processor and of whole GPUs, whatever else ran on them at that time. Counters are RAPL's of the
processor packages and their memory (Linux `powercap`; readable by root alone since CVE-2020-8694 unless somebody lets
others read them too) and NVML's of the GPUs (package `nvidia-ml-py`, where it is installed). What is not told is not
known: nothing is guessed from a power that a chip is sold with.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

POWERCAP = Path("/sys/class/powercap")
EVERY_S = 30.0  # a package's counter wraps around in minutes: at 262 kJ, and one of a server uses 400 W

_OUR_MEMORY = Path("/proc/self")


@dataclass
class Counter:
    """An energy counter. part: `processor` or `gpu`

    read: its state now, joules; wraps_at: where it begins at 0 again, joules; None where it does not
    """

    part: str
    read: Callable[[], float]
    wraps_at: float | None = None
    _last: float = field(default=0.0, init=False)
    used: float = field(default=0.0, init=False)

    def start(self) -> None:
        """From now on."""
        self._last, self.used = self.read(), 0.0

    def update(self) -> None:
        """Add what was used since the last look; at most one turn of the counter."""
        now = self.read()
        turned = self.wraps_at if now < self._last and self.wraps_at is not None else 0.0
        self.used += now - self._last + turned
        self._last = now


class Meter:
    """Measures what is used within a `with`.

    joules: afterwards, by `processor` and `gpu`; only what is known. GPUs count where this process used them
    """

    def __init__(self, counters: Sequence[Counter] | None = None, every_s: float = EVERY_S) -> None:
        """counters: None: those that this machine has"""
        self._counters = [*processor_counters(), *gpu_counters()] if counters is None else list(counters)
        self._every_s = every_s
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._looking = threading.Thread(target=self._look, name="energy", daemon=True)
        self.joules: dict[str, float] = {}

    def __enter__(self) -> Meter:
        for counter in self._counters:
            counter.start()
        if self._counters:
            self._looking.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._counters:
            self._looking.join()
        self._update()
        for counter in self._counters:
            if counter.part != "gpu" or cuda_devices():
                self.joules[counter.part] = self.joules.get(counter.part, 0.0) + counter.used

    def _look(self) -> None:
        while not self._stopped.wait(self._every_s):
            self._update()

    def _update(self) -> None:
        with self._lock:
            for counter in self._counters:
                counter.update()


def processor_counters(powercap: Path = POWERCAP) -> list[Counter]:
    """RAPL's counters that may be read: each package, and each memory that is not part of one.

    `psys` is the whole machine, packages included; `core` and `uncore` are parts of a package.
    """
    found = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            limit = float((zone / "max_energy_range_uj").read_text()) / 1e6
            counter = Counter("processor", partial(_joules_in, zone / "energy_uj"), limit)
            counter.read()
        except (OSError, ValueError):  # not ours to read, or not there: not known
            continue
        if name.startswith("package") or name == "dram":
            found.append(counter)
    return found


def gpu_counters() -> list[Counter]:
    """NVML's counters of the GPUs that CUDA_VISIBLE_DEVICES leaves visible; none without NVML."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = []
    with suppress(nvml.NVMLError):  # no driver, or a GPU without such a counter: not known
        nvml.nvmlInit()
        names = range(nvml.nvmlDeviceGetCount()) if visible is None else [n.strip() for n in visible.split(",") if n]
        for name in names:
            by_number = isinstance(name, int) or name.isdigit()
            by = nvml.nvmlDeviceGetHandleByIndex if by_number else nvml.nvmlDeviceGetHandleByUUID
            handle = by(int(name) if by_number else name)
            counter = Counter("gpu", partial(_joules_of, nvml, handle))
            counter.read()
            found.append(counter)
    return found


def _joules_in(file: Path) -> float:
    return float(file.read_text()) / 1e6


def _joules_of(nvml: Any, gpu: Any) -> float:
    """Since its driver was loaded."""
    return float(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) / 1e3


def cuda_devices() -> list[str]:
    """The names of the GPUs that this process has used; does not load PyTorch to ask."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return []
    used = [number for number in range(torch.cuda.device_count()) if torch.cuda.max_memory_allocated(number)]
    return [torch.cuda.get_device_name(number) for number in used]


def forget_peak_memory() -> None:
    """From now on `peak_memory` is of what comes; Linux alone can do that, and not everywhere."""
    with suppress(OSError):
        (_OUR_MEMORY / "clear_refs").write_text("5")


def peak_memory() -> int | None:
    """The most memory that this process held since `forget_peak_memory`, bytes; None where that is not told."""
    try:
        lines = (_OUR_MEMORY / "status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
