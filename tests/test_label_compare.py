"""The labeler's two modes side by side, with a pattern set of our own: every difference is shown, and nothing else."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sklearn.metrics import cohen_kappa_score
from typer.testing import CliRunner

from ecgfm.config import ReportsConfig
from ecgfm.contracts import read_table
from ecgfm.ecg import InputError
from ecgfm.label_compare import Agreement, Comparison, compare_file
from ecgfm.label_reports import label_file
from ecgfm.reports.vocabulary import Vocabulary
from flows.cli import app

REPORTS = {
    "both": "Sinus rhythm, old infarction",
    "not here": "Without infarction and in sinus rhythm",
    "denied": "Kein Infarkt. Sinusrhythmus.",
    "flutter": "Atrial flutter",
    "doubt": "Infarction\nmay be excluded; sinus rhythm",
    "nothing": "Qwertz",
    "empty": None,
    "again": "Atrial flutter",
}
LABELS = ("Sinus rhythm", "Infarction", "Tachycardia")


def entity(name: str, *above: str) -> dict[str, Any]:
    return {"name": name, "sup": list(above)}


def pattern(text: str, name: str) -> dict[str, Any]:
    return {"pattern": text, "entities": [{"tem": name, "descriptors": []}]}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Patterns (flutter is a kind of tachycardia in them), a set of the three labels, and the reports."""
    folder = tmp_path / "patterns"
    folder.mkdir()
    names = [entity("Sinus rhythm"), entity("Infarction"), entity("Tachycardia"), entity("Flutter", "Tachycardia")]
    patterns = [("sinus rhythm", "Sinus rhythm"), ("infarct", "Infarction"), ("atrial flutter", "Flutter")]
    texts = {
        "entity_tem": names,
        "entity_pat": [pattern(*one) for one in patterns],
        "connective": [{"pattern": "and", "descriptors": [[], []]}],
    }
    for name, content in texts.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    rules = "\n".join(f"    {label}: [{label}]" for label in LABELS)
    (tmp_path / "mine.yaml").write_text(f"label_sets:\n  three:\n{rules}\n")
    pl.DataFrame({"record_id": list(REPORTS), "report": list(REPORTS.values())}).write_parquet(tmp_path / "r.parquet")
    return tmp_path


def compared(files: Path, out: str = "d.parquet", label_set: str = "three", above: float = 0.0) -> Comparison:
    own = ReportsConfig(label_set=label_set, rules=str(files / "mine.yaml"))
    ecg_fm = ReportsConfig(mode="ecg-fm", patterns=str(files / "patterns"))
    return compare_file(files / "r.parquet", "report", "record_id", files / out, own, ecg_fm, above)


def test_every_difference_has_a_row_with_both_readings(files: Path) -> None:
    compared(files)
    rows = read_table(files / "d.parquet", "report_differences").rows(named=True)
    shown = [(row["record_id"], row["label"], row["own_status"], row["ecg_fm_status"]) for row in rows]
    assert shown == [
        ("not here", "Infarction", "absent", "present"),
        ("denied", "Sinus rhythm", "present", None),
        ("flutter", "Tachycardia", None, "present"),
        ("doubt", "Infarction", "absent", "present"),
        ("again", "Tachycardia", None, "present"),
    ]
    denied, foreign, flutter = rows[0], rows[1], rows[2]
    assert (denied["own_words"], denied["own_probability"], denied["ecg_fm_probability"]) == ("infarction", 0, 1)
    assert "denied by 'Without'" in denied["own_rule"]
    assert (foreign["own_words"], foreign["ecg_fm_words"]) == ("Sinusrhythmus", None)
    assert (flutter["ecg_fm_words"], flutter["ecg_fm_rule"]) == ("Atrial flutter", "above Flutter; 'atrial flutter'")


def test_what_is_counted_is_what_each_mode_says_alone(files: Path) -> None:
    """Against two tables of labels, each made by `label_file`, and the kappa of scikit-learn."""
    own = ReportsConfig(label_set="three", rules=str(files / "mine.yaml"))
    ecg_fm = ReportsConfig(mode="ecg-fm", patterns=str(files / "patterns"))
    columns = []
    for name, config in (("own", own), ("ecg-fm", ecg_fm)):
        label_file(files / "r.parquet", "report", "record_id", files / f"{name}.parquet", config)
        columns.append(read_table(files / f"{name}.parquet", "report_labels").filter(pl.col("record_id") != "empty"))
    found = compared(files)
    assert (found.reports, found.empty, [one.label for one in found.labels]) == (8, 1, list(LABELS))
    for one in found.labels:
        a, b = ((table[one.label] > 0 if one.label in table.columns else [False] * 7) for table in columns)
        pairs = list(zip(a, b, strict=True))
        counts = [pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]
        assert [one.both, one.only_own, one.only_ecg_fm, one.neither] == counts
        assert one.agreement == pytest.approx(sum(x == y for x, y in pairs) / 7)
        assert one.kappa == pytest.approx(cohen_kappa_score(list(a), list(b)))


def test_kappa_is_that_of_its_definition_and_of_nothing_where_there_is_nothing() -> None:
    for counts in product((0, 1, 7), repeat=4):
        one = Agreement("x", *counts)
        raters = [pair for pair, n in zip(((1, 1), (1, 0), (0, 1), (0, 0)), counts, strict=True) for _ in range(n)]
        a, b = [x for x, _ in raters], [y for _, y in raters]
        if len({*a, *b}) < 2:
            assert math.isnan(one.kappa)
        else:
            assert one.kappa == pytest.approx(cohen_kappa_score(a, b))


def test_above_a_probability_doubts_are_no_longer_asserted(files: Path) -> None:
    reports = {"record_id": ["a"], "report": ["Possible infarction"]}
    pl.DataFrame(reports).write_parquet(files / "r.parquet")
    assert sum(one.only_ecg_fm for one in compared(files).labels) == 0
    assert sum(one.only_ecg_fm for one in compared(files, above=0.5).labels) == 1


def test_tables_longer_than_a_block_are_compared_whole(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compared(files, "whole.csv")
    monkeypatch.setattr("ecgfm.label_compare.ROWS_TOGETHER", 3)
    assert compared(files, "parts.csv").labels == whole.labels
    assert (files / "parts.csv").read_bytes() == (files / "whole.csv").read_bytes()


def test_a_label_that_the_patterns_do_not_make_is_named(files: Path) -> None:
    with pytest.raises(InputError, match=r"make no label 'Poor data quality' of the set ecg-fm-17"):
        compared(files, label_set="ecg-fm-17")
    assert not (files / "d.parquet").exists()


def test_the_command_prints_the_table_and_no_text(files: Path) -> None:
    options = [str(files / "r.parquet"), "--patterns", str(files / "patterns"), "--rules", str(files / "mine.yaml")]
    done = CliRunner().invoke(app, ["label", "compare", *options, "--labels", "three", "--out", str(files / "d.csv")])
    assert done.exit_code == 0, done.output
    line = next(line for line in done.output.splitlines() if line.startswith("Infarction"))
    assert line.split() == ["Infarction", "1", "0", "2", "0.714", "0.364"]
    assert "Qwertz" not in done.output
    assert "flutter" not in done.output.lower()
    assert len((files / "d.csv").read_text().splitlines()) == 6


def test_explain_of_a_set_tells_none_but_its_labels_in_either_mode(tmp_path: Path) -> None:
    set_of_ours = Vocabulary.read().labels_of("ecg-fm-17")
    above = [entity(name, "Injury") if name == "Infarction" else entity(name) for name in set_of_ours]
    (tmp_path / "entity_tem.json").write_text(json.dumps([entity("Injury"), *above]))
    (tmp_path / "entity_pat.json").write_text(json.dumps([pattern("infarct", "Infarction")]))
    ecg_fm = ["--mode", "ecg-fm", "--patterns", str(tmp_path)]
    for mode, labels in ((ecg_fm, ["Infarction", "Injury"]), ([*ecg_fm, "--labels", "ecg-fm-17"], ["Infarction"])):
        done = CliRunner().invoke(app, ["label", "explain", "An infarct", *mode])
        assert done.exit_code == 0, done.output
        told = done.output.partition("\nlabels\n")[2].splitlines()
        assert [line.split()[1] for line in told] == labels


def test_on_real_reports_the_modes_agree_where_nothing_sets_them_apart(shared: Path, tmp_path: Path) -> None:
    """Labels on which ECG-FM's graph and ours mean the same."""
    table = pl.read_csv(shared / "golden/labeler/reports.csv", infer_schema=False)
    table.select(record_id="report_id", report="report").write_csv(tmp_path / "r.csv")
    ecg_fm = ReportsConfig(mode="ecg-fm", patterns=str(shared / "labeler/ecgfm-patterns"))
    own = ReportsConfig(label_set="ecg-fm-17")
    found = compare_file(tmp_path / "r.csv", "report", "record_id", tmp_path / "d.csv", own, ecg_fm)
    of = {one.label: one for one in found.labels}
    for label in (
        "Ventricular tachycardia",
        "Atrial flutter",
        "1st degree atrioventricular block",
        "Bifascicular block",
    ):
        assert (of[label].only_own, of[label].only_ecg_fm) == (0, 0)
        assert of[label].both > 5
    assert of["Infarction"].kappa > 0.98
    assert of["Accessory pathway conduction"].only_ecg_fm > 50  # all of atrial fibrillation, in ECG-FM's graph
