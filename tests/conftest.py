"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("ECGFM_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real recordings and reference outputs beside the checkout. It is not part of the project."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no real recordings at {SHARED} (set ECGFM_SHARED to the folder that holds data/ and golden/)")
    return SHARED
