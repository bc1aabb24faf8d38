"""Stages for tests/test_runners.py, in a module of their own: workers import them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_info

from ecgfm.ecg import InputError


def write_threads(inputs: Mapping[str, Path], config: Any, out: Path) -> dict[str, int]:
    """How many threads each numerical library of the worker takes, and how many processes the config allows."""
    found = {library["filepath"]: library["num_threads"] for library in threadpool_info()}
    (out / "threads.json").write_text(json.dumps({"libraries": found, "workers": config.workers}))
    return {"listed": 1}


def die_once(inputs: Mapping[str, Path], config: Any, out: Path) -> dict[str, int]:
    """Killed half-way where it is tried first; a file beside `notes` remembers it."""
    (out / "half").write_text("half")
    died = inputs["notes"].with_name("died")
    if not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (out / "whole").write_text("whole")
    return {"listed": 1}


def die(inputs: Mapping[str, Path], config: Any, out: Path) -> dict[str, int]:
    """Killed wherever it is tried."""
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def refuse(inputs: Mapping[str, Path], config: Any, out: Path) -> dict[str, int]:
    """A mistake that the user can mend."""
    raise InputError("reading DICOM needs pydicom: pip install 'ecgfm[dicom]'")
