"""Energy and memory, from counters made here: a machine that tells nothing is the usual case."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from ecgfm import energy
from ecgfm.energy import Counter, Meter, forget_peak_memory, gpu_counters, peak_memory, processor_counters


def counter(states: Sequence[float], part: str = "processor", wraps_at: float | None = None) -> Counter:
    """A counter that is seen in one state after another."""
    seen: Iterator[float] = iter(states)
    return Counter(part, lambda: next(seen), wraps_at)


def zone(powercap: Path, number: str, name: str, joules: float, limit_j: float = 262.0) -> Path:
    """A zone of Linux's powercap."""
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit_j * 1e6:.0f}\n")
    (folder / "energy_uj").write_text(f"{joules * 1e6:.0f}\n")
    return folder


def test_what_was_used_is_the_difference_also_where_the_counter_turned() -> None:
    with Meter([counter([100.0, 130.5]), counter([250.0, 20.0], wraps_at=262.0)]) as meter:
        pass
    assert meter.joules == {"processor": pytest.approx(30.5 + 12.0 + 20.0)}


def test_a_counter_that_turns_more_than_once_is_looked_at_in_between() -> None:
    states, seen = [0.0, 90.0, 80.0, 70.0, 60.0], threading.Event()
    given = iter(states)

    def read() -> float:
        state = next(given, 60.0)
        if state == 60.0:
            seen.set()
        return state

    with Meter([Counter("processor", read, 100.0)], every_s=0.01) as meter:
        assert seen.wait(10)
    assert meter.joules["processor"] == pytest.approx(90 + 3 * 90)


def test_of_the_zones_packages_and_their_memory_count_once(tmp_path: Path) -> None:
    zones = [
        zone(tmp_path, "0", "package-0", 10.0),
        zone(tmp_path, "0:0", "core", 4.0),
        zone(tmp_path, "0:1", "dram", 2.0),
        zone(tmp_path, "1", "package-1", 261.0),
        zone(tmp_path, "2", "psys", 500.0),
    ]
    counters = processor_counters(tmp_path)
    assert len(counters) == 3
    with Meter(counters) as meter:
        for place, after in zip(zones, (15.0, 9.0, 3.0, 4.0, 900.0), strict=True):
            (place / "energy_uj").write_text(f"{after * 1e6:.0f}\n")
    assert meter.joules == {"processor": pytest.approx(5.0 + 1.0 + 5.0)}


def test_what_may_not_be_read_is_not_known(tmp_path: Path) -> None:
    assert processor_counters(tmp_path / "none") == []
    (zone(tmp_path, "0", "package-0", 10.0) / "energy_uj").unlink()
    assert processor_counters(tmp_path) == []
    with Meter([]) as meter:
        pass
    assert meter.joules == {}


def nvml(joules: dict[str, list[float]], error: bool = False) -> types.ModuleType:
    """NVML as of a machine with these GPUs: UUID -> states of their counters."""
    module = types.ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def init() -> None:
        if error:
            raise NVMLError("driver not loaded")

    given = {
        "NVMLError": NVMLError,
        "nvmlInit": init,
        "nvmlDeviceGetCount": lambda: len(joules),
        "nvmlDeviceGetHandleByIndex": lambda number: list(joules)[number],
        "nvmlDeviceGetHandleByUUID": lambda name: name,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 1e3 * joules[handle].pop(0),
    }
    for name, value in given.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, 7.0 + 30.0), ("1", 30.0), ("GPU-a", 7.0), ("GPU-b, GPU-a", 37.0), ("", None)]
)
def test_gpus_count_as_far_as_they_are_visible(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: float | None
) -> None:
    gpus = {"GPU-a": [1.0, 1.0, 8.0], "GPU-b": [5.0, 5.0, 35.0]}  # seen when found, at the start, at the end
    monkeypatch.setitem(sys.modules, "pynvml", nvml(gpus))
    monkeypatch.setattr(energy, "cuda_devices", lambda: ["one"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with Meter(gpu_counters()) as meter:
        pass
    assert meter.joules == ({} if expected is None else {"gpu": pytest.approx(expected)})


def test_a_gpu_that_this_process_has_not_used_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "cuda_devices", lambda: [])
    with Meter([counter([1.0, 9.0], part="gpu"), counter([1.0, 3.0])]) as meter:
        pass
    assert meter.joules == {"processor": 2.0}


def test_a_machine_without_nvml_or_its_driver_has_no_gpu_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_counters() == []
    monkeypatch.setitem(sys.modules, "pynvml", nvml({"GPU-a": [1.0]}, error=True))
    assert gpu_counters() == []


def test_what_failed_is_measured_too_and_the_watch_ends() -> None:
    before = threading.active_count()
    meter = Meter([counter([0.0, 1.0])], every_s=1000)
    with pytest.raises(RuntimeError), meter:
        raise RuntimeError
    assert meter.joules == {"processor": 1.0}
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_the_peak_of_memory_is_that_since_it_was_forgotten() -> None:
    before = peak_memory()
    if before is None:
        pytest.skip("this machine does not say how much memory a process has held")
    held = np.ones(40_000_000)  # 320 MB
    largest = peak_memory()
    assert largest is not None
    assert largest >= held.nbytes
    del held
    forget_peak_memory()
    after = peak_memory()
    assert after is not None
    if after >= largest:
        pytest.skip("this machine does not forget")
    assert largest - after > 250_000_000


def test_no_gpu_is_looked_for_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert energy.cuda_devices() == []
    assert "torch" not in sys.modules
