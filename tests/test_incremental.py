"""Raw data that grows, shrinks and is corrected: what that costs, what a plan says of it, and who stays where.

What a single change costs is in test_pipeline.py, that splits do not depend on order or number in test_splits.py.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from conftest import write_wfdb16
from test_contracts import table_of
from test_splits import assign, record, split_of

from ecgfm.config import SplitsConfig, from_dict
from ecgfm.contracts import read_table
from ecgfm.pipeline import Selection, plan
from ecgfm.pipelines_file import Pipeline
from ecgfm.runs import run_locally
from ecgfm.stages import Store

CODES = {"sinus rhythm": ["426783006"], "sinus bradycardia": ["426177001"]}
LIGHT = Selection(only=("list", "prepare", "audit", "splits", "labels", "manifests"))
AFTER = ["audit", "splits", "labels", "manifests"]
FOLDERS = ("georgia/g1", "georgia/g2", "ningbo/g1")


def pipeline(**splits: Any) -> Pipeline:
    values = {
        "sources": ["physionet2021"],
        "prepare": {"segment_seconds": 0.5, "workers": 1},
        "splits": {"strategy": "random", "valid_share": 0.3, "test_share": 0.3} | splits,
        "labels": {"scheme": "codes", "codes": CODES},
        "manifests": {"rare_labels": "drop"},
    }
    return from_dict(Pipeline, values, "test")


def write_folder(raw: Path, folder: str, n_records: int = 25) -> None:
    """Records of a folder of the Challenge, whose names and noise are its own."""
    rng = np.random.default_rng(sum(folder.encode()))
    for number in range(n_records):
        digital = rng.integers(-900, 900, (12, 500)).astype(np.int16)
        said = [
            f"Age: {20 + number}",
            "Sex: Male",
            f"Dx: {CODES['sinus rhythm' if number % 2 else 'sinus bradycardia'][0]}",
        ]
        name = f"{folder.replace('/', '')}{number:02d}"
        write_wfdb16(raw / "training" / folder, name, digital, comments=said)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for folder in FOLDERS:
        write_folder(tmp_path / "raw", folder)
    return tmp_path / "raw"


def made(raw: Path, data_dir: Path, config: Pipeline | None = None, selection: Selection = LIGHT) -> list[str]:
    """Run everything before training; the stages that were made."""
    run = run_locally("test", config or pipeline(), {"physionet2021": raw}, Store(data_dir), selection)
    stages = json.loads((run / "run.json").read_bytes())["stages"]
    return [stage["name"].removeprefix("prepare physionet2021 ") for stage in stages if stage["status"] == "made"]


def planned(raw: Path, data_dir: Path, config: Pipeline | None = None) -> dict[str, str]:
    """What a plan says of the stages that are not cached."""
    lines = plan(config or pipeline(), {"physionet2021": raw}, Store(data_dir), LIGHT)
    said = {line.name.removeprefix("prepare physionet2021 "): (line.status, line.why) for line in lines}
    return {name: why for name, (status, why) in said.items() if status == "run"}


def splits_of(data_dir: Path) -> dict[str, str]:
    """Record -> split, as the newest run has it."""
    return split_of(read_table(data_dir / "runs" / "test" / "latest" / "splits" / "splits.parquet", "splits"))


def slice_of(folder: str) -> str:
    return f"training/{folder}"


def test_folder_after_folder_each_costs_itself_and_nobody_moves(tmp_path: Path) -> None:
    raw, data_dir = tmp_path / "raw", tmp_path / "data"
    before: dict[str, str] = {}
    for folder in (*FOLDERS, "cpsc_2018/g1", "georgia/g10"):  # g10 comes between g1 and g2 in order
        write_folder(raw, folder)
        assert planned(raw, data_dir).get(slice_of(folder)) == "new"
        assert made(raw, data_dir) == ["list physionet2021", slice_of(folder), *AFTER]
        now = splits_of(data_dir)
        assert len(now) == len(before) + 25
        assert before.items() <= now.items()
        before = now
    everything = [slice_of(folder) for folder in (*FOLDERS, "cpsc_2018/g1", "georgia/g10")]
    assert made(raw, tmp_path / "at-once") == ["list physionet2021", *sorted(everything), *AFTER]
    assert splits_of(tmp_path / "at-once") == before
    assert made(raw, data_dir, pipeline(seed=1)) == ["splits", "manifests"]
    moved = [one for one, split in splits_of(data_dir).items() if split != before[one]]
    assert len(moved) > len(before) / 4, "asked for by another seed"


def test_a_corrected_and_a_removed_file_are_named_and_cost_their_slices(raw: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    made(raw, data_dir)
    before = splits_of(data_dir)
    header = raw / "training/georgia/g1/georgiag103.hea"
    header.write_text(header.read_text().replace("Age: 23", "Age: 57"))
    for suffix in (".hea", ".mat"):
        (raw / f"training/ningbo/g1/ningbog107{suffix}").unlink()
    changed, removed = slice_of("georgia/g1"), slice_of("ningbo/g1")
    why = planned(raw, data_dir)
    assert why.keys() == {"list physionet2021", changed, removed}
    assert why["list physionet2021"] == f"2 changed folders ({changed}, {removed})"
    assert why[changed].startswith(f"1 changed file ({changed}/georgiag103.hea)")
    assert why[removed].startswith(f"2 removed files ({removed}/ningbog107.hea, {removed}/ningbog107.mat)")
    assert made(raw, data_dir) == ["list physionet2021", changed, removed, *AFTER]
    now = splits_of(data_dir)
    assert set(before) - set(now) == {"physionet2021/ningbog107"}
    assert now.items() <= before.items()
    records = data_dir / "runs/test/latest/prepare" / "physionet2021 training%2Fgeorgia%2Fg1" / "records.parquet"
    ages = dict(read_table(records, "records").select("record_id", "age_years").iter_rows())
    assert ages["physionet2021/georgiag103"] == 57

    shutil.rmtree(raw / "training/georgia/g2")
    assert planned(raw, data_dir)["list physionet2021"] == f"1 removed folder ({slice_of('georgia/g2')})"
    assert made(raw, data_dir) == ["list physionet2021", *AFTER]
    assert splits_of(data_dir).items() <= before.items()


def test_a_file_that_is_written_again_as_it_was_costs_its_slice_and_nothing_after(raw: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    made(raw, data_dir)
    for path in (raw / "training/georgia/g2").iterdir():
        path.write_bytes(path.read_bytes())  # as an archive that is unpacked once more
    why = planned(raw, data_dir)[slice_of("georgia/g2")]
    assert why.startswith("50 changed files (training/georgia/g2/georgiag200.hea, ")
    assert made(raw, data_dir) == ["list physionet2021", slice_of("georgia/g2")]
    assert made(raw, data_dir) == []


def test_real_folders_of_the_challenge_come_one_by_one(shared: Path, tmp_path: Path) -> None:
    raw, data_dir = tmp_path / "raw", tmp_path / "data"
    before: dict[str, str] = {}
    folders = sorted((shared / "data" / "challenge-2021" / "training").glob("*/g*"))
    assert len(folders) > 4
    for folder in folders:
        place = folder.relative_to(shared / "data" / "challenge-2021")
        shutil.copytree(folder, raw / place)
        config = pipeline(valid_share=0.4, test_share=0.4)  # so that few records come to all three
        names = made(raw, data_dir, config, Selection(only=("list", "prepare", "audit", "splits")))
        assert names == ["list physionet2021", str(place), "audit", "splits"]
        now = splits_of(data_dir)
        assert before.items() <= now.items()
        assert len(now) > len(before)
        before = now


# ---- a property: whatever comes, nobody moves whom no new copy ties


def units(records: Sequence[dict[str, Any]], groups: Iterable[Sequence[int]], by_patient: bool) -> dict[str, set[str]]:
    """Record -> the records that must be in one split with it, by brute force."""
    tied = [{f"toy/{number}" for number in group} for group in groups]
    if by_patient:
        patients = {row["patient_id"] for row in records}
        tied += [{row["record_id"] for row in records if row["patient_id"] == patient} for patient in patients]
    found = {row["record_id"]: {row["record_id"]} for row in records}
    changed = True
    while changed:
        changed = False
        for together in tied:
            union = set().union(*(found[one] for one in together))
            for one in union:
                changed |= found[one] != union
                found[one] = union
    return found


@pytest.mark.parametrize("strategy", ["grouped", "random"])
def test_in_any_order_of_arrival_only_who_is_tied_by_a_new_copy_may_move(strategy: Any) -> None:
    """Records of 60 patients come in six lots, 12 pairs of copies among them. When a copy comes that ties a unit to
    another, the two must meet in one split, so one of them may move; and nobody else ever does."""
    rng = random.Random(5)
    config = SplitsConfig(strategy=strategy, valid_share=0.3, test_share=0.3)
    moved_ever = stayed = 0
    for _ in range(25):
        rows = [record(number, rng.randrange(60)) for number in range(150)]
        pairs = [rng.sample(range(150), 2) for _ in range(12)]
        arrival = rng.sample(range(150), 150)
        before: Mapping[str, str] = {}
        old: set[int] = set()
        for lot in range(25, 151, 25):
            here = set(arrival[:lot])
            came = [rows[number] for number in arrival[:lot]]
            copies = [pair for pair in _merged(pairs) if len(here & set(pair)) > 1]
            copies = [sorted(here & set(group)) for group in copies]
            now = split_of(assign(_table(came), config, *copies))
            of_unit = units(came, copies, strategy == "grouped")
            new_copies = {f"toy/{n}" for group in copies if set(group) - old for n in group}
            for one, split in before.items():
                if of_unit[one] & new_copies:
                    moved_ever += now[one] != split
                else:
                    assert now[one] == split, f"{one} moved, whom no new copy ties"
                    stayed += 1
            before, old = now, here
    assert stayed > 1000
    assert moved_ever > 0, "no copy ever moved anyone: the exception is not tested"


def _merged(pairs: Sequence[Sequence[int]]) -> list[set[int]]:
    """Pairs that share a record as one group, as the audit finds them."""
    groups: list[set[int]] = []
    for pair in pairs:
        touching = [group for group in groups if group & set(pair)]
        groups = [group for group in groups if not group & set(pair)] + [set(pair).union(*touching)]
    return groups


def _table(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    return table_of("records", list(rows))
