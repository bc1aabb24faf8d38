"""What a page of docs/ finds when it begins: files as they are published, made of synthetic ECGs.

A builder is a context manager: what it serves, it serves until the page is done.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pytest
from conftest import write_wfdb16
from test_download import Server
from test_sources import ptb_xl_line

from ecgfm.ecg import INVALID
from ecgfm.synthetic_ecg import Recording, recordings

RECORDS_PER_FOLDER, FOLDERS = 20, 3
AS_IN_PTB_XL = ("I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6")
STATEMENTS = {  # finding -> statements, as PTB-XL's readers write them
    "sinus_rhythm": ("SR",),
    "sinus_bradycardia": ("SBRAD",),
    "sinus_tachycardia": ("STACH",),
    "atrial_fibrillation": ("AFIB",),
    "pacing_rhythm": ("PACE",),
    "first_degree_av_block": ("1AVB",),
    "left_bundle_branch_block": ("CLBBB",),
    "right_bundle_branch_block": ("CRBBB",),
    "premature_ventricular_contraction": ("PVC",),
    "inferior_infarction": ("IMI", "QWAVE"),
    "low_quality": (),
}


def write_ptb_xl(folder: Path) -> None:
    """PTB-XL's layout at 500 Hz: its table, and three folders of records; the last ECG is the first one again."""
    lines = []
    for place, (patient, recording) in enumerate(islice(_recordings(), RECORDS_PER_FOLDER * FOLDERS - 1)):
        lines.append(_write_record(folder, place, patient, recording))
    lines.append(_write_record(folder, RECORDS_PER_FOLDER * FOLDERS - 1, *next(_recordings())))
    pl.DataFrame(lines).write_csv(folder / "ptbxl_database.csv")
    (folder / "scp_statements.csv").write_text(",description\nNORM,normal ECG\n")


def _recordings() -> Iterator[tuple[int, Recording]]:
    """Patient and recording; patients at multiples of four are recorded as PTB-XL's are: 12 leads, 10 s, 500 Hz."""
    for patient in count(4, 4):
        for recording in recordings(0, patient):
            yield patient, recording


def _write_record(folder: Path, place: int, patient: int, recording: Recording) -> dict[str, object]:
    """One record, and its line of the table."""
    thousands, number = divmod(place, RECORDS_PER_FOLDER)
    ecg_id = 1000 * thousands + number + 1
    file = f"records500/{1000 * thousands:05d}/{ecg_id:05d}_hr"
    digital = recording.digital.copy()
    digital[digital != INVALID] *= 1000 // recording.adc_gain_per_mv
    write_wfdb16((folder / file).parent, f"{ecg_id:05d}_hr", digital, suffix=".dat", leads=AS_IN_PTB_XL)
    statements = [statement for finding in recording.findings for statement in STATEMENTS[finding]]
    normal = ["NORM"] if len(recording.findings) == 1 and recording.findings[0].startswith("sinus") else []
    return ptb_xl_line(
        ecg_id,
        patient_id=f"{13_000 + patient}.0",
        age="" if recording.age_years is None else f"{recording.age_years:.1f}",
        sex=int(recording.sex == "female"),
        recording_date=str(recording.recorded_at),
        scp_codes=str(dict.fromkeys([*normal, *statements], 100.0)),
        strat_fold=1 + patient // 4 % 10,
        filename_hr=file,
    )


@contextmanager
def published_ptb_xl(folder: Path) -> Iterator[None]:
    """PTB-XL at its address, for the processes that run in `folder`: it is served from this machine to them."""
    with Server() as server:
        archive = folder.parent / f"{folder.name}-published"
        write_ptb_xl(archive)
        server.publish({str(file.relative_to(archive)): file.read_bytes() for file in sorted(archive.rglob("*.*"))})
        # Python imports a module of this name at its start, and PYTHONPATH names the folder
        (folder / "sitecustomize.py").write_text(
            "import os\nfrom dataclasses import replace\nfrom ecgfm.archives import ARCHIVES\n\n"
            "os.environ['no_proxy'] = '127.0.0.1'\n"
            f"ARCHIVES['ptb_xl'] = replace(ARCHIVES['ptb_xl'], base={server.url!r})\n"
        )
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()


@contextmanager
def raw_ptb_xl(folder: Path) -> Iterator[None]:
    """`ptb-xl`, as downloaded, where Dask is installed."""
    pytest.importorskip("prefect_dask", reason="the extra ecgfm[dask] is not installed")
    write_ptb_xl(folder / "ptb-xl")
    yield


@contextmanager
def own_folders(folder: Path) -> Iterator[None]:
    """`our-hospital`: WFDB files of two wards, a table about them; `our-arrays`: an HDF5 file with zeros at the end."""
    lines, tracings = [], []
    for number, (patient, recording) in enumerate(islice(_recordings(), 4)):
        ward, name = f"ward-{1 + number % 2}", f"ecg{number + 1}"
        write_wfdb16(folder / "our-hospital" / ward, name, recording.digital, suffix=".dat", gain_per_mv=200)
        facts = {"filename": f"{ward}/{name}.hea", "mrn_hash": f"{patient:x}", "age_years": 50 + number}
        lines.append(facts | {"sex": recording.sex, "snomed": "426783006;164889003", "ward": ward})
        tracings.append(np.pad(recording.digital.T[:4000] / 200, ((0, 96), (0, 0))))
    pl.DataFrame(lines).write_csv(folder / "our-hospital" / "ecgs.csv")
    (folder / "our-arrays").mkdir()
    with h5py.File(folder / "our-arrays" / "exams.h5", "w") as file:
        file["tracings"] = np.float32(tracings)
        file["exam_id"] = [1001, 1002, 1003, 1004]
    yield
