"""Codes to labels. The judges: the published tables, and loops over codes."""

from __future__ import annotations

import ast
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from conftest import record_row

from ecgfm.config import LabelsConfig, ListConfig
from ecgfm.contracts import check, read_table, table_of, write_table
from ecgfm.ecg import InputError
from ecgfm.label_space import Label, LabelSpace, read_label_space
from ecgfm.labels import CHALLENGE_2021, assign, label_space, make_labels
from ecgfm.prepare import list_source

LEVELS = ("all", "diagnostic", "subdiagnostic", "superdiagnostic", "form", "rhythm")


def records(codes: Iterable[Sequence[str] | None], source: str = "toy") -> pl.DataFrame:
    rows = [
        record_row(f"{source}/{number:03d}", codes=None if of_record is None else list(of_record))
        for number, of_record in enumerate(codes)
    ]
    return table_of("records", rows)


def labelled(table: pl.DataFrame, config: LabelsConfig) -> dict[str, dict[str, int | None]]:
    """record_id -> label -> value."""
    labels = assign(table, label_space(config), f"scheme {config.scheme}")
    check(labels, "labels")
    return {row.pop("record_id"): row for row in labels.iter_rows(named=True)}


OWN = LabelsConfig("codes", codes={"fibrillation": ("AF",), "any block": ("RBBB", "LBBB"), "left": ("LBBB",)})


def test_a_label_is_1_where_one_of_its_codes_is_and_0_where_none_is() -> None:
    found = labelled(records([["AF", "other"], ["LBBB"], ["RBBB", "LBBB"], ["other"], []]), OWN)
    assert list(found.values()) == [
        {"fibrillation": 1, "any block": 0, "left": 0},
        {"fibrillation": 0, "any block": 1, "left": 1},
        {"fibrillation": 0, "any block": 1, "left": 1},
        {"fibrillation": 0, "any block": 0, "left": 0},
        {"fibrillation": 0, "any block": 0, "left": 0},
    ]


def test_without_codes_every_label_is_unknown() -> None:
    found = labelled(records([["AF"], None]), OWN)
    assert set(found["toy/001"].values()) == {None}
    assert set(found["toy/000"].values()) == {0, 1}


def test_a_part_of_a_code_is_not_the_code() -> None:
    config = LabelsConfig("codes", codes={"a": ("59118001",)})
    found = labelled(records([["59118001"], ["591180010"], ["5911800"], [" 59118001"]]), config)
    assert [row["a"] for row in found.values()] == [1, 0, 0, 0]


def test_labels_stand_in_the_order_of_the_config() -> None:
    assert assign(records([["AF"]]), label_space(OWN), "").columns == ["record_id", "fibrillation", "any block", "left"]


# ---- the Challenge 2021


def test_the_challenge_has_26_classes_of_30_codes_of_which_four_pairs_are_one() -> None:
    space = label_space(LabelsConfig())
    assert space.names == [name for name, _ in CHALLENGE_2021]
    assert len(space.labels) == len(set(space.names)) == 26
    codes = [code for label in space.labels for code in label.codes]
    assert len(codes) == len(set(codes)) == 30
    merged = {frozenset(label.codes) for label in space.labels if len(label.codes) > 1}
    assert merged == {
        frozenset({"733534002", "164909002"}),  # complete LBBB, LBBB
        frozenset({"713427006", "59118001"}),  # complete RBBB, RBBB
        frozenset({"284470004", "63593006"}),  # PAC, SVPB
        frozenset({"427172004", "17338001"}),  # PVC, VPB
    }


@pytest.mark.parametrize("code", ["713427006", "59118001"])
def test_either_of_two_merged_codes_asserts_the_label(code: str) -> None:
    (row,) = labelled(records([[code, "999"]]), LabelsConfig()).values()
    assert [name for name, value in row.items() if value] == ["right bundle branch block"]
    assert len(row) == 26


def test_the_challenges_classes_are_the_published_ones(shared: Path) -> None:
    folder = shared / "data" / "metrics" / "evaluation-2021"
    with (folder / "dx_mapping_scored.csv").open() as file:
        published = {row["SNOMEDCTCode"]: row["Dx"] for row in csv.DictReader(file)}
    columns = (folder / "weights.csv").read_text().splitlines()[0].split(",")[1:]
    ours = [frozenset(codes) for _, codes in CHALLENGE_2021]
    assert ours == [frozenset(column.split("|")) for column in columns], "in the order of the score's weights"
    assert {code for codes in ours for code in codes} == set(published)
    for name, codes in CHALLENGE_2021:
        names = {words(published[code]) for code in codes}
        assert any(words(name) <= one or one <= words(name) for one in names), (name, names)


def words(name: str) -> frozenset[str]:
    """A diagnosis without regard to spelling: `prolonged PR interval`, `1st degree av block`."""
    plain = name.lower().replace("-", " ").replace("qwave", "q wave")
    return frozenset(word.removesuffix("s") for word in plain.split())


# ---- PTB-XL


@pytest.mark.parametrize("level", LEVELS)
def test_ptb_xl_labels_are_those_of_its_own_table(shared: Path, tmp_path: Path, level: Any) -> None:
    raw = shared / "data" / "ptb-xl"
    with (raw / "scp_statements.csv").open() as file:
        statements = {row[""]: row for row in csv.DictReader(file)}
    with (raw / "ptbxl_database.csv").open() as file:
        codes = {f"ptb_xl/{int(row['ecg_id']):05d}": ast.literal_eval(row["scp_codes"]) for row in csv.DictReader(file)}

    def name_at(code: str) -> str | None:
        line = statements[code]
        if level == "all":
            return code
        if level == "subdiagnostic":
            return line["diagnostic_subclass"] or None
        if level == "superdiagnostic":
            return line["diagnostic_class"] or None
        return code if line[level] == "1.0" else None

    list_source({"raw": raw}, ListConfig("ptb_xl"), tmp_path)
    listing = pl.concat(read_table(path, "listing") for path in (tmp_path / "slices").iterdir())
    found = labelled(listing, LabelsConfig("scp", scp_level=level))
    assert found.keys() == codes.keys()
    assert set(next(iter(found.values()))) == {name for code in statements if (name := name_at(code))}
    for record_id, row in found.items():
        expected = {name for code in codes[record_id] if (name := name_at(code))}
        assert {name for name, value in row.items() if value} == expected, record_id
        assert None not in row.values()
    assert sum(sum(row.values()) for row in found.values()) > 50  # type: ignore[arg-type]


def test_the_levels_of_ptb_xl_have_the_published_numbers_of_labels() -> None:
    """Strodthoff et al. 2021, table II."""
    sizes = {level: len(label_space(LabelsConfig("scp", scp_level=level)).labels) for level in LEVELS}  # type: ignore[arg-type]
    assert sizes == {
        "all": 71,
        "diagnostic": 44,
        "subdiagnostic": 23,
        "superdiagnostic": 5,
        "form": 19,
        "rhythm": 12,
    }


def test_a_name_that_is_both_sub_and_superclass_is_told_apart() -> None:
    table = records([["all:NST_", "superdiagnostic:STTC", "subdiagnostic:NST_"], ["subdiagnostic:STTC"]])
    sub = labelled(table, LabelsConfig("scp", scp_level="subdiagnostic"))
    assert [row["STTC"] for row in sub.values()] == [0, 1]


# ---- the label space


def test_findings_that_one_segment_can_carry_alone_are_marked() -> None:
    space = label_space(LabelsConfig(max_labels=("premature ventricular contraction", "pacing rhythm")))
    assert {label.name for label in space.labels if label.aggregation == "max"} == {
        "premature ventricular contraction",
        "pacing rhythm",
    }
    assert {label.aggregation for label in space.labels} == {"mean", "max"}


def test_a_label_space_comes_back_as_it_was_written(tmp_path: Path) -> None:
    counts = {split: {"positive": 1, "negative": 2, "unknown": 3} for split in ("train", "valid", "test")}
    space = LabelSpace(
        (Label("yes", ("1", "007"), "max", counts), Label('Übergang: "no"', ("2",), "mean")),
        {"null": "no positive record in valid"},
    )
    space.write(tmp_path / "label_space.yaml")
    assert read_label_space(tmp_path / "label_space.yaml") == space
    assert space.names == ["yes", 'Übergang: "no"']


# ---- mistakes


def test_codes_of_another_vocabulary_are_told() -> None:
    table = pl.concat([records([["426783006"]]), records([[], ["superdiagnostic:MI"], None], "ptb_xl")])
    with pytest.raises(InputError) as refused:
        assign(table, label_space(LabelsConfig()), "scheme challenge_2021")
    assert str(refused.value) == (
        "labels: none of the 1 records of ptb_xl has a code of scheme challenge_2021 "
        "(theirs look like superdiagnostic:MI); choose another labels.scheme"
    )


def test_no_code_at_all_is_told() -> None:
    with pytest.raises(InputError, match="none of the 2 records has a diagnostic code; scheme scp needs some"):
        assign(records([None, []]), label_space(LabelsConfig("scp")), "scheme scp")


def test_an_unknown_label_in_max_labels_is_told() -> None:
    with pytest.raises(
        InputError, match=r"labels\.max_labels: no label AF; labels: atrial fibrillation, atrial flutter"
    ):
        label_space(LabelsConfig(max_labels=("AF",)))


@pytest.mark.parametrize("name", ["record_id", "patient_id", "split", "n_segments", "shard_row"])
def test_a_label_may_not_be_called_as_a_column_beside_it(name: str) -> None:
    with pytest.raises(InputError, match=f"labels: {name}: a column of the tables has that name"):
        label_space(LabelsConfig("codes", codes={"AF": ("1",), name: ("2",)}))


# ---- the stage


def test_the_stage_writes_labels_and_their_space(tmp_path: Path) -> None:
    for number, codes in enumerate(([["AF"], None] * 200, [["LBBB", "AF"], []])):
        (tmp_path / f"slice_{number}").mkdir()
        write_table(records(codes, f"toy{number}"), "records", tmp_path / f"slice_{number}" / "records.parquet")
    (tmp_path / "out").mkdir()
    counts = make_labels({"slices": [tmp_path / "slice_0", tmp_path / "slice_1"]}, OWN, tmp_path / "out")
    assert counts == {
        "records": 402,
        "labels": 3,
        "records without codes": 200,
        "positive: fibrillation": 201,
        "positive: any block": 1,
        "positive: left": 1,
    }
    labels = read_table(tmp_path / "out" / "labels.parquet", "labels")
    assert labels["fibrillation"].null_count() == 200
    assert read_label_space(tmp_path / "out" / "label_space.yaml") == label_space(OWN)
