"""Labels from columns: joined by id, never by order, and what is not given is unknown. The judges are dictionaries."""

from __future__ import annotations

import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from conftest import record_row

from ecgfm.config import LabelsConfig, from_dict
from ecgfm.contracts import read_table, table_of, write_table
from ecgfm.ecg import InputError
from ecgfm.label_space import Label, LabelSpace, read_label_space
from ecgfm.label_tables import MAX_CLASSES
from ecgfm.labels import make_labels
from ecgfm.pipeline import LABELS, plan
from ecgfm.pipelines_file import Pipeline, load_pipeline
from ecgfm.stages import Store

LVEF = LabelsConfig("table", "regression", table="t.csv", columns={"LVEF": "lvef_percent"}, units={"LVEF": "percent"})


def slices(folder: Path, n: int = 12, **columns: list[Any]) -> list[Path]:
    """Two prepared slices of n records together; two records in a row are one patient's, the last is of nobody."""
    rows = [
        record_row(
            f"toy/{number:03d}",
            patient_id=f"toy/p{number // 2}" if number < n - 1 else None,
            **{name: values[number] for name, values in columns.items()},
        )
        for number in range(n)
    ]
    found = []
    for part in (0, 1):
        found.append(folder / f"slice_{part}")
        found[-1].mkdir(parents=True)
        write_table(table_of("records", rows[part::2]), "records", found[-1] / "records.parquet")
    return found


def made(
    folder: Path, config: LabelsConfig, inputs: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], LabelSpace, dict[str, int]]:
    """record_id -> label -> value; the space; the counts."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    counts = make_labels(inputs, config, out)
    space = read_label_space(out / "label_space.yaml")
    table = read_table(out / "labels.parquet", space.contract("labels"))
    assert table.columns == ["record_id", *space.names]
    return {row.pop("record_id"): row for row in table.iter_rows(named=True)}, space, counts


def csv(folder: Path, *lines: str, name: str = "t.csv") -> Path:
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def test_numbers_are_joined_by_record_whatever_the_order_of_rows(tmp_path: Path) -> None:
    values = {f"toy/{number:03d}": 30.5 + number for number in range(9)}
    rows = [f"{name},{value},x" for name, value in values.items()]
    inputs = {"slices": slices(tmp_path)}
    found = []
    for seed in (0, 1):
        random.Random(seed).shuffle(rows)
        path = csv(tmp_path, "record_id,lvef_percent,other", *rows)
        labels, space, counts = made(tmp_path, LVEF, {**inputs, "table": path})
        assert {name: row["LVEF"] for name, row in labels.items()} == {
            f"toy/{number:03d}": values.get(f"toy/{number:03d}") for number in range(12)
        }
        found.append((tmp_path / "out" / "labels.parquet").read_bytes())
    assert found[0] == found[1]
    assert space == LabelSpace((Label("LVEF", ("lvef_percent",), "mean", unit="percent"),), {}, "regression")
    assert counts == {
        "records": 12, "labels": 1, "rows that match no record": 0, "records without a row": 3, "known: LVEF": 9,
    }  # fmt: skip


def test_a_patients_value_is_that_of_all_records_of_the_patient(tmp_path: Path) -> None:
    path = csv(tmp_path, "lvef_percent,patient_id", "55,toy/p1", "40,toy/p0", "61,toy/p5")
    labels, _, counts = made(tmp_path, LVEF, {"slices": slices(tmp_path), "table": path})
    values = [row["LVEF"] for row in labels.values()]
    assert values == [40.0, 40.0, 55.0, 55.0, *[None] * 6, 61.0, None], "the last record is of no known patient"
    assert counts["records without a row"] == 7


def test_parquet_says_the_same_as_csv(tmp_path: Path) -> None:
    inputs = {"slices": slices(tmp_path)}
    table = pl.DataFrame({"record_id": ["toy/003", "toy/001", "toy/002"], "lvef_percent": [1.25, None, float("nan")]})
    table.write_csv(tmp_path / "t.csv")
    table.write_parquet(tmp_path / "t.parquet")
    both = [made(tmp_path, LVEF, {**inputs, "table": tmp_path / name})[0] for name in ("t.csv", "t.parquet")]
    assert both[0] == both[1]
    assert {name for name, row in both[0].items() if row["LVEF"] is not None} == {"toy/003"}


@pytest.mark.parametrize("nothing", ["", "NA", "nan", " unknown ", "?"])
def test_what_is_not_given_is_unknown(tmp_path: Path, nothing: str) -> None:
    path = csv(tmp_path, "record_id,lvef_percent", f"toy/000,{nothing}", "toy/001,50")
    labels, _, counts = made(tmp_path, LVEF, {"slices": slices(tmp_path), "table": path})
    assert (labels["toy/000"]["LVEF"], labels["toy/001"]["LVEF"]) == (None, 50.0)
    assert counts["known: LVEF"] == 1


def test_ids_that_match_nothing_are_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = csv(tmp_path, "record_id,lvef_percent", "toy/000,50", "toy/900,51", "toy/901,52", ",53")
    with caplog.at_level(logging.INFO):
        _, _, counts = made(tmp_path, LVEF, {"slices": slices(tmp_path), "table": path})
    assert counts["rows that match no record"] == 2
    assert "labels: 2 of 3 record_id of t.csv match no record (toy/900, toy/901)" in caplog.text


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (["record_id,lvef_percent", "1,50", "2,60"],
         "none of its 2 record_id is that of a record: its own are like 1, 2, those of the records like toy/000, toy/"),
        (["patient_id,lvef_percent", "p1,50"],
         "none of its 1 patient_id is that of a record: its own are like p1, those of the records like toy/p0, toy/p1"),
        (["id,lvef_percent", "toy/000,50"],
         "expected a column record_id or patient_id to join by, found id, lvef_percent"),
        (["record_id,LVEF_percent", "toy/000,50"], "no column 'lvef_percent'; did you mean 'LVEF_percent'"),
        (["record_id,lvef_percent", "toy/000,50", "toy/000,51"],
         "expected one row per record_id, found different ones of toy/000; keep one"),
        (["record_id,lvef_percent", "toy/000,normal"],
         "expected finite numbers for task 'regression', or nothing, found 'normal' (1 such)"),
        (["record_id,lvef_percent", "toy/000,inf"], "expected finite numbers for task 'regression', or nothing, found"),
        (["record_id,lvef_percent", "toy/000,"], "of 12 records none has a known label"),
        (["record_id;LVEF_percent", "toy/000;50"], "no column 'lvef_percent'; did you mean 'LVEF_percent'"),
        (["record_id", "toy/000,50,60"], "expected a CSV table (.csv, .tsv) or Parquet (.parquet)"),
    ],
)  # fmt: skip
def test_a_table_that_does_not_fit_is_told_in_one_line(tmp_path: Path, lines: list[str], why: str) -> None:
    path = csv(tmp_path, *lines)
    with pytest.raises(InputError) as told:
        made(tmp_path, LVEF, {"slices": slices(tmp_path), "table": path})
    assert why in str(told.value)


def test_the_same_row_twice_is_one(tmp_path: Path) -> None:
    path = csv(tmp_path, "record_id,lvef_percent,visit", "toy/000,50,1", "toy/000,50,2", "toy/001,60,1")
    labels, _, _ = made(tmp_path, LVEF, {"slices": slices(tmp_path), "table": path})
    assert (labels["toy/000"]["LVEF"], labels["toy/001"]["LVEF"]) == (50.0, 60.0)


def test_binary_columns_become_present_and_absent(tmp_path: Path) -> None:
    config = LabelsConfig("table", table="t.csv", columns={"low": "low", "dead": "died"}, max_labels=("dead",))
    path = csv(tmp_path, "record_id,low,died", "toy/000,1,yes", "toy/001,0,No", "toy/002,TRUE,", "toy/003,0.0,false")
    labels, space, counts = made(tmp_path, config, {"slices": slices(tmp_path), "table": path})
    assert [tuple(row.values()) for row in labels.values()][:5] == [(1, 1), (0, 0), (1, None), (0, 0), (None, None)]
    assert (space.task, [label.aggregation for label in space.labels]) == ("multilabel", ["mean", "max"])
    assert (counts["positive: low"], counts["positive: dead"]) == (2, 1)
    csv(tmp_path, "record_id,low,died", "toy/000,2,1")
    with pytest.raises(InputError, match=r"low: expected 1, 0 or nothing .* found '2' \(1 such\)"):
        made(tmp_path, config, {"slices": slices(tmp_path / "more"), "table": path})


def test_each_value_of_a_column_is_a_class(tmp_path: Path) -> None:
    config = LabelsConfig("table", "multiclass", table="t.csv", columns={"rhythm": "r"})
    path = csv(tmp_path, "record_id,r", "toy/000,sinus", "toy/001,AF", "toy/002,sinus", "toy/003,paced", "toy/004,")
    labels, space, _ = made(tmp_path, config, {"slices": slices(tmp_path), "table": path})
    assert space.names == ["AF", "paced", "sinus"]
    called = {name: [label for label, value in row.items() if value == 1] for name, row in labels.items()}
    assert list(called.values())[:4] == [["sinus"], ["AF"], ["sinus"], ["paced"]]
    assert all(set(row.values()) == {None} for row in list(labels.values())[4:])
    assert all(sum(row.values()) == 1 for row in list(labels.values())[:4])


@pytest.mark.parametrize("values", [["0", "1", "2"], ["0.0", "1.0", "10.0"], [2, 10, 1], [3.0, 1.0, 20.0]])
def test_classes_that_are_numbers_are_named_by_their_column_in_their_order(tmp_path: Path, values: list[Any]) -> None:
    config = LabelsConfig("table", "multiclass", table="t", columns={"NYHA": "nyha"})
    table = pl.DataFrame({"record_id": ["toy/000", "toy/001", "toy/002"], "nyha": values})
    table.write_parquet(tmp_path / "t.parquet")
    labels, space, _ = made(tmp_path, config, {"slices": slices(tmp_path), "table": tmp_path / "t.parquet"})
    text = [str(int(value)) if isinstance(value, float) else str(value) for value in values]
    assert set(space.names) == {f"NYHA {value}" for value in text}
    assert space.names == [f"NYHA {value}" for value in sorted(text, key=float)]
    assert [next(k for k, v in row.items() if v == 1) for row in list(labels.values())[:3]] == [
        f"NYHA {value}" for value in text
    ]


@pytest.mark.parametrize(("n", "found"), [(1, "found 1"), (MAX_CLASSES + 1, f"found {MAX_CLASSES + 1}")])
def test_too_many_or_too_few_classes_are_told(tmp_path: Path, n: int, found: str) -> None:
    config = LabelsConfig("columns", "multiclass", columns={"age": "age_years"})
    ages = [float(20 + number % n) for number in range(60)]
    with pytest.raises(InputError, match=f"age_years: expected 2 to {MAX_CLASSES} different values.*{found}"):
        made(tmp_path, config, {"slices": slices(tmp_path, 60, age_years=ages)})


def test_columns_of_the_records_themselves(tmp_path: Path) -> None:
    ages, sexes = [float(20 + n) for n in range(11)] + [None], ["female", "male", None] * 4
    inputs = {"slices": slices(tmp_path, age_years=ages, sex=sexes)}
    config = LabelsConfig("columns", "regression", columns={"age": "age_years"}, units={"age": "years"})
    labels, space, _ = made(tmp_path, config, inputs)
    assert [row["age"] for row in labels.values()] == ages
    assert space.labels[0].unit == "years"
    labels, space, _ = made(tmp_path, LabelsConfig("columns", "multiclass", columns={"sex": "sex"}), inputs)
    assert space.names == ["female", "male"]
    assert [tuple(row.values()) for row in labels.values()][:3] == [(1, 0), (0, 1), (None, None)]
    with pytest.raises(InputError, match="a record has no column 'age_year'; did you mean 'age_years'"):
        made(tmp_path, replace(config, columns={"age": "age_year"}), inputs)
    with pytest.raises(InputError, match="sex: expected finite numbers for task 'regression', or nothing, found 'fem"):
        made(tmp_path, replace(config, columns={"age": "sex"}), inputs)
    with pytest.raises(InputError, match="no column 'record_id'"):
        made(tmp_path, replace(config, columns={"age": "record_id"}), inputs)


def test_of_codes_a_record_with_several_or_no_class_is_unknown_and_counted(tmp_path: Path) -> None:
    codes = [["A"], ["B", "x"], ["A", "B"], ["x"], None, ["B"], [], *[["A"]] * 5]
    config = LabelsConfig("codes", "multiclass", codes={"a": ("A",), "b": ("B",)})
    labels, space, counts = made(tmp_path, config, {"slices": slices(tmp_path, codes=codes)})
    assert [tuple(row.values()) for row in labels.values()][:7] == [
        (1, 0), (0, 1), (None, None), (None, None), (None, None), (0, 1), (None, None),
    ]  # fmt: skip
    assert space.task == "multiclass"
    assert (counts["records of several classes"], counts["records of no class"]) == (1, 2)
    assert (counts["positive: a"], counts["records without codes"]) == (6, 1)


# ---- the config, and the key


@pytest.mark.parametrize(
    ("labels", "finetune", "why"),
    [
        ({"task": "regression"}, {}, "task 'regression' needs numbers: scheme 'table' or 'columns'"),
        ({"scheme": "columns"}, {}, "columns is needed with schemes 'table' and 'columns'"),
        ({"scheme": "table", "columns": {"a": "a"}}, {}, "table is needed with scheme 'table'"),
        (
            {"scheme": "columns", "columns": {"a": "a"}, "table": "t.csv"},
            {},
            "table is needed with scheme 'table', and",
        ),
        ({"scheme": "columns", "task": "multiclass", "columns": {"a": "a", "b": "b"}}, {}, "takes one column"),
        ({"scheme": "columns", "columns": {"a": "a"}, "units": {"a": "kg"}}, {}, "no label of task 'regression'"),
        ({"scheme": "columns", "task": "regression", "columns": {"a": "a"}, "max_labels": ["a"]}, {}, "max_labels is"),
        (
            {"scheme": "columns", "task": "regression", "columns": {"a": "a"}},
            {"loss": "focal"},
            "loss 'focal' is of task",
        ),
        ({"scheme": "columns", "task": "regression", "columns": {"a": "a"}}, {"pos_weight": True}, "pos_weight needs"),
        (
            {"scheme": "columns", "task": "multiclass", "columns": {"a": "a"}},
            {"loss": "asymmetric"},
            "loss 'asymmetric'",
        ),
        ({}, {"regression_loss": "mse"}, "regression_loss is of task 'regression', and labels.task is 'multilabel'"),
    ],
)
def test_values_that_do_not_fit_the_task_are_told_before_anything_is_made(
    labels: dict[str, Any], finetune: dict[str, Any], why: str
) -> None:
    with pytest.raises(InputError) as told:
        from_dict(Pipeline, {"sources": ["synthetic"], "labels": labels, "finetune": finetune}, "here")
    assert why in str(told.value)
    assert "\n" not in str(told.value)


def test_the_content_of_the_table_is_in_the_key_and_its_path_is_not(tmp_path: Path) -> None:
    values = {
        "sources": ["synthetic"],
        "labels": {"scheme": "table", "task": "regression", "columns": {"LVEF": "lvef_percent"}},
    }

    def key(path: Path) -> str:
        config = from_dict(Pipeline, {**values, "labels": {**values["labels"], "table": str(path)}}, "here")  # type: ignore[dict-item]
        from ecgfm.pipeline import _table
        from ecgfm.stages import Request

        return Request(LABELS, {"slices": [], "table": _table(str(path))}, config.labels).key

    first = csv(tmp_path, "record_id,lvef_percent", "a,1")
    (tmp_path / "elsewhere").mkdir()
    copy = csv(tmp_path / "elsewhere", "record_id,lvef_percent", "a,1", name="other.csv")
    other = csv(tmp_path, "record_id,lvef_percent", "a,2", name="changed.csv")
    assert key(first) == key(copy) != key(other)
    gone = from_dict(Pipeline, {**values, "labels": {**values["labels"], "table": str(tmp_path / "no.csv")}}, "here")  # type: ignore[dict-item]
    with pytest.raises(InputError, match=r"labels\.table: no such file: .*no\.csv; name a CSV or Parquet table"):
        plan(gone, {}, Store(tmp_path / "data"))


def test_the_path_of_the_table_is_relative_to_the_pipelines_file(tmp_path: Path) -> None:
    file = tmp_path / "pipelines.yaml"
    file.write_text(
        "own: {sources: [synthetic], labels: {scheme: table, table: tables/own.csv, columns: {a: a}}}", encoding="utf-8"
    )
    assert load_pipeline(file, "own").labels.table == str(tmp_path / "tables" / "own.csv")
    assert load_pipeline(file, "own", ["labels.table=here.csv"]).labels.table == "here.csv"
