"""What every test may use."""

from __future__ import annotations

import os

# Networks of a few thousand parameters gain nothing from a second thread, and on a loaded machine two wait for each
# other. Here, because numerical libraries read it when they are first imported, in the processes that tests start too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_demo

from ecgfm.ecg import LEADS

SHARED = Path(os.environ.get("ECGFM_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real recordings and reference outputs beside the checkout. It is not part of the project."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no real recordings at {SHARED} (set ECGFM_SHARED to the folder that holds data/ and golden/)")
    return SHARED


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data directory of a run of the small demo that nobody disturbed. Not to be written to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = small_demo.words("run", "small", "--pipelines", small_demo.write_pipelines(folder), "--no-prefect")
    run = small_demo.Run([*command, "--data-dir", str(folder / "data")])
    assert run.end() == 0, run.errors()
    assert run.errors() == ""
    return folder / "data"


def write_wfdb16(
    folder: Path,
    name: str,
    digital: np.ndarray,
    *,
    suffix: str = ".mat",
    sampling_rate_hz: float = 500,
    gain_per_mv: float = 1000,
    leads: Sequence[str] = LEADS,
    comments: Sequence[str] = (),
) -> None:
    """A WFDB record in format 16 of digital (lead, time) int16; a .mat file begins with MATLAB's own 24 bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    offset = 24 if suffix == ".mat" else 0
    storage = f"16+{offset}" if offset else "16"
    lines = [f"{name} {len(digital)} {sampling_rate_hz:g} {digital.shape[1]}"]
    lines += [f"{name}{suffix} {storage} {gain_per_mv:g}/mV 16 0 0 0 0 {lead}" for lead in leads]
    lines += [f"#{comment}" for comment in comments]
    (folder / f"{name}.hea").write_text("\n".join(lines) + "\n")
    (folder / f"{name}{suffix}").write_bytes(bytes(offset) + digital.T.astype("<i2").tobytes())


@pytest.fixture
def raw_tree(tmp_path: Path) -> Path:
    """A raw folder with an index and two folders of files, one of them with a folder of its own."""
    for name in ("index.csv", "a/1.dat", "a/2.dat", "a/deep/3.dat", "b/4.dat"):
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).write_text(name)
    return tmp_path / "raw"


def record_row(record_id: str, **values: Any) -> dict[str, Any]:
    """A row of the table `records`: a whole record of 10 s, but for `values`."""
    source, _, name = record_id.partition("/")
    return {
        "record_id": record_id,
        "source": source,
        "slice_id": "a",
        "raw_path": f"a/{name}.hea",
        "sampling_rate_hz": 500.0,
        "n_samples": 5000,
        "n_segments": 2,
        "leads": list(LEADS),
        "invalid_leads": [],
        "constant_leads": [],
        "lead_mean_mv": [0.0] * 12,
        "lead_std_mv": [1.0] * 12,
        **values,
    }
