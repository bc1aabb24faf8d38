"""What this machine can do, and for all that is missing or wrong the command that mends it.

A check is a pure function of what was found on the machine; `examine` looks at the machine. torch, the only heavy
library here, is imported by it and not by the checks: whether it can be imported at all is one of the questions.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from ecgfm import __version__

GB = 10**9
OLDEST_PYTHON = (3, 11)
LEAST_MEMORY = 4 * GB  # torch and two preparing processes take 2 GB, and a training of the small encoder as much again
LEAST_DISK = GB  # the demo writes a third of it

EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "xml": ("GE MUSE, Philips, Schiller, CardioSoft, HL7 aECG files", ("defusedxml>=0.7",)),
    "dicom": ("DICOM files", ("pydicom>=3.0",)),
    "edf": ("EDF files", ("edfio>=0.4.8",)),
    "onnx": ("ecgfm export --format onnx", ("onnx>=1.18", "onnxscript>=0.5.4", "onnxruntime>=1.22")),
    "tensorboard": ("training's log for TensorBoard", ("tensorboard>=2.14",)),
    "dask": ("prepare on a Dask cluster", ("prefect-dask>=0.3", "distributed>=2024.8")),
    "ray": ("prepare on a Ray cluster", ("prefect-ray>=0.4", "ray>=2.40", "grpcio>=1.50")),
    "huggingface": ("ecgfm checkpoint download", ("huggingface_hub>=0.25",)),
}
"""Extra -> what it is for, its libraries as pyproject.toml has them (a test compares them)."""

State = Literal["ok", "missing", "wrong"]


@dataclass(frozen=True)
class Finding:
    """What came of one check.

    found: what there is, in words
    mend: the command that mends it; empty where nothing has to be mended
    required: whether `ecgfm` works at all without it
    """

    name: str
    state: State
    found: str
    mend: str = ""
    required: bool = True


@dataclass(frozen=True)
class Torch:
    """What torch says of itself and of the accelerators that it can use.

    cuda: version of CUDA or ROCm that it was built for, None for a build without
    gpus: name and memory, bytes, of each GPU it can use
    failure: why it cannot be imported; all else is empty then
    """

    version: str = ""
    cuda: str | None = None
    gpus: tuple[tuple[str, int], ...] = ()
    mps: bool = False
    threads: int = 0
    failure: str = ""


# ---- the checks --------------------------------------------------------------------------------------------------


def check_python(version: tuple[int, int, int], executable: str) -> Finding:
    """
    >>> check_python((3, 12, 1), "/usr/bin/python3")
    Finding(name='Python', state='ok', found='3.12.1, /usr/bin/python3', mend='', required=True)
    """
    found = f"{'.'.join(map(str, version))}, {executable}"
    if version >= OLDEST_PYTHON:
        return Finding("Python", "ok", found)
    return Finding(
        "Python", "wrong", f"{found}; expected 3.11 or newer", "rm -rf .venv && make install PYTHON=python3.11"
    )


def check_libraries(needed: Sequence[str], installed: Mapping[str, str], pip: str) -> Finding:
    """The libraries without which nothing works.

    needed: requirements; installed: version of each distribution that is there; pip: the command that installs
    """
    if not needed:
        return Finding("libraries", "missing", "ecgfm itself is not installed", f"{pip} -e .")
    missing, old = _unmet(needed, installed)
    if not missing and not old:
        return Finding("libraries", "ok", f"all {len(needed)} that are needed")
    return Finding("libraries", "missing" if missing else "wrong", _in_words(missing, old), _install(pip, missing, old))


def check_torch(found: Torch, pip: str) -> Finding:
    """Whether torch works, and what it was built for."""
    if found.failure:
        return Finding("torch", "wrong", f"cannot be imported: {found.failure}", f"{pip} --force-reinstall torch")
    build = f"built for CUDA {found.cuda}" if found.cuda else "built for the CPU"
    return Finding("torch", "ok", f"{found.version}, {build}")


def check_gpu(found: Torch, devices: Sequence[str], pip: str) -> Finding:
    """The GPUs that torch can use. Not required: everything works on a CPU, if not at the published size.

    devices: device files of GPUs that the machine has, whether torch can use them or not
    """
    if found.gpus:
        listed = ", ".join(f"{name} ({memory / GB:.0f} GB)" for name, memory in found.gpus)
        return Finding("GPU", "ok", listed, required=False)
    if found.mps:
        return Finding("GPU", "ok", "Apple's, which shares the machine's memory", required=False)
    if not devices:
        return Finding("GPU", "ok", "none: the CPU does it; the published size wants a GPU", required=False)
    there = f"{', '.join(devices)} there"
    if found.failure:
        return Finding("GPU", "wrong", f"{there}, but torch does not work", f"{pip} --force-reinstall torch", False)
    if found.cuda is None:
        mend = f"{pip} --force-reinstall torch --index-url https://pypi.org/simple"
        return Finding("GPU", "wrong", f"{there}, but torch was built for the CPU", mend, required=False)
    built = f"{there}, but torch (CUDA {found.cuda}) cannot use it: the driver is too old, or hidden from this process"
    return Finding("GPU", "wrong", built, "nvidia-smi", required=False)


def check_threads(usable: int, cores: int, torch_threads: int, asked: str | None) -> Finding:
    """asked: OMP_NUM_THREADS, None where it is not set"""
    cpus = f"{usable} CPUs" if usable == cores else f"{usable} of {cores} CPUs"
    threads = f"{torch_threads} thread{'s' * (torch_threads != 1)} for torch"
    found = f"{cpus}, {threads}" if torch_threads else cpus
    if asked is not None:
        found += f" (OMP_NUM_THREADS={asked})"
    if torch_threads > usable:
        return Finding("threads", "wrong", f"{found}: they wait for each other", "unset OMP_NUM_THREADS", False)
    return Finding("threads", "ok", found, required=False)


def check_memory(total: int) -> Finding:
    """total: bytes, of the machine or of this container, whichever is less"""
    found = f"{total / GB:.1f} GB"
    if total >= LEAST_MEMORY:
        return Finding("memory", "ok", found)
    few = "export OMP_NUM_THREADS=1 && ecgfm run demo --set prepare.workers=1"
    return Finding("memory", "wrong", f"{found}; below {LEAST_MEMORY / GB:.0f} GB one thing at a time", few, False)


def check_disk(data_dir: Path, free: int, writable: bool) -> Finding:
    """free: bytes where the data directory lies, or would lie"""
    found = f"{free / GB:.1f} GB free for {data_dir}"
    there = shlex.quote(str(data_dir))
    if not writable:
        elsewhere = "export ECGFM_DATA_DIR=$HOME/ecgfm-data"
        return Finding("disk", "wrong", f"{data_dir}: this user may not write there", elsewhere)
    if free < LEAST_DISK:
        return Finding("disk", "wrong", f"{found}; the demo alone wants some of it", f"ecgfm gc --data-dir {there}")
    return Finding("disk", "ok", found)


def check_server(api: str | None, answers: bool, failure: str, of_environment: bool) -> Finding:
    """The Prefect server that runs go to.

    api: as configured, None where none is; failure: why the configuration cannot be read
    of_environment: whether PREFECT_API_URL says so, not a profile
    """
    if failure:
        return Finding("server", "wrong", failure, "prefect profile inspect")
    if api is None:
        return Finding("server", "ok", "none configured: a run starts one of its own and ends it", required=False)
    if answers:
        return Finding("server", "ok", f"{api} answers", required=False)
    forget = "unset PREFECT_API_URL" if of_environment else "prefect config unset PREFECT_API_URL --yes"
    return Finding("server", "wrong", f"{api} is configured and does not answer", forget)


def check_extra(extra: str, installed: Mapping[str, str], pip: str) -> Finding:
    """An optional part, by its name in EXTRAS."""
    purpose, needed = EXTRAS[extra]
    missing, old = _unmet(needed, installed)
    if not missing and not old:
        versions = ", ".join(f"{one.name} {installed[_key(one.name)]}" for one in map(Requirement, needed))
        return Finding(extra, "ok", f"{purpose}: {versions}", required=False)
    state: State = "missing" if missing else "wrong"
    found = f"{purpose}: {_in_words(missing, old)}"
    return Finding(extra, state, found, _install(pip, missing, old), required=False)


# ---- the machine -------------------------------------------------------------------------------------------------


def examine(data_dir: Path, api: str | None, answers: bool, failure: str = "") -> list[Finding]:
    """All findings of this machine, what is required first.

    data_dir: where everything that is made lies; needs not be there yet
    api, answers, failure: of the Prefect server, for `check_server`
    """
    pip = _pip()
    installed = {_key(one.name): one.version for one in metadata.distributions() if one.name}
    torch = _torch()
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    folder = next(path for path in (data_dir.absolute(), *data_dir.absolute().parents) if path.is_dir())
    prefect = installed.get("prefect")
    findings = [
        check_python(sys.version_info[:3], sys.executable),
        check_libraries(_needed(), installed, pip),
        check_torch(torch, pip),
        check_gpu(torch, [str(path) for path in sorted(Path("/dev").glob("nvidia[0-9]*"))], pip),
        check_threads(usable, cores, torch.threads, os.environ.get("OMP_NUM_THREADS")),
        check_memory(_memory()),
        check_disk(data_dir, shutil.disk_usage(folder).free, os.access(folder, os.W_OK | os.X_OK)),
        Finding("Prefect", "ok", prefect) if prefect else Finding("Prefect", "missing", "", f"{pip} prefect"),
        check_server(api, answers, failure, "PREFECT_API_URL" in os.environ),
    ]
    return [*findings, *(check_extra(extra, installed, pip) for extra in EXTRAS)]


def in_words(findings: Sequence[Finding]) -> list[str]:
    """The page: a line a finding, and below what is to be mended its command."""
    width = max(len(one.name) for one in findings)
    lines = [f"ecgfm {__version__} on {platform.system()} {platform.release()}, {platform.machine()}"]
    for one in findings:
        lines.append(f"  {one.state:7}  {one.name:{width}}  {one.found}".rstrip())
        if one.mend:
            lines.append(f"  {'':7}  {'':{width}}  $ {one.mend}")
    bad = [one.name for one in findings if one.required and one.state != "ok"]
    optional = [one.name for one in findings if not one.required and one.state != "ok"]
    lines.append("")
    lines.append(f"does not work without: {', '.join(bad)}" if bad else "all that is required works")
    if optional:
        lines[-1] += f"; not there, and only needed for what their lines say: {', '.join(optional)}"
    return lines


def works(findings: Sequence[Finding]) -> bool:
    """Whether all that is required does."""
    return all(one.state == "ok" for one in findings if one.required)


def _torch() -> Torch:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of CUDA that is not there
        return Torch(failure=str(error).partition("\n")[0] or type(error).__name__)
    gpus = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(number)
        gpus.append((str(about.name), int(about.total_memory)))
    cuda = torch.version.cuda or getattr(torch.version, "hip", None)
    return Torch(torch.__version__, cuda, tuple(gpus), torch.backends.mps.is_available(), torch.get_num_threads())


def _memory() -> int:
    """Bytes: of the machine, or what this container may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        with suppress(OSError, ValueError):  # not there, or "max"
            total = min(total, int(limit.read_text()))
    return total


def _needed() -> list[str]:
    """The requirements of the installed package without its extras; none where it is not installed."""
    try:
        return [text for text in metadata.requires("ecgfm") or [] if "extra ==" not in text]
    except metadata.PackageNotFoundError:
        return []


def _pip() -> str:
    """The command that installs into the Python that runs; one that uv made has no pip."""
    python = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is None:
        return f"uv pip install --python {python}"
    return f"{python} -m pip install"


def _key(name: str) -> str:
    """The name by which distributions are compared.

    >>> _key("huggingface_hub"), _key("PyYAML")
    ('huggingface-hub', 'pyyaml')
    """
    return name.lower().replace("_", "-").replace(".", "-")


def _unmet(needed: Sequence[str], installed: Mapping[str, str]) -> tuple[list[Requirement], dict[str, Requirement]]:
    """The requirements that are missing, and those of another version by what there is of them in words."""
    missing, old = [], {}
    for one in map(Requirement, needed):
        if one.marker is not None and not one.marker.evaluate():
            continue
        version = installed.get(_key(one.name))
        if version is None:
            missing.append(one)
        elif not one.specifier.contains(version, prereleases=True):
            old[f"{one.name} {version} (expected {one.specifier})"] = one
    return missing, old


def _in_words(missing: Sequence[Requirement], old: Mapping[str, Requirement]) -> str:
    return ", ".join([*(f"{one.name} is not installed" for one in missing), *old])


def _install(pip: str, missing: Sequence[Requirement], old: Mapping[str, Requirement]) -> str:
    return f"{pip} {shlex.join(f'{one.name}{one.specifier}' for one in [*missing, *old.values()])}"
