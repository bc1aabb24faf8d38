"""Tables of reports to tables of labels: every report read as it would be alone, joined by its id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from ecgfm.bench.label import made_up
from ecgfm.bench.label import main as bench
from ecgfm.config import LabelsConfig, ReportsConfig, from_dict
from ecgfm.contracts import empty_table, read_table, write_table
from ecgfm.ecg import InputError
from ecgfm.label_reports import label_file, labeler, number_texts, read_reports, read_texts
from ecgfm.label_space import read_label_space
from ecgfm.labels import make_labels
from ecgfm.processes import RECORDS_PER_PROCESS
from flows.cli import app

OWN = ReportsConfig()
SEVENTEEN = ReportsConfig(label_set="ecg-fm-17")
REPORTS = [
    "Atrial fibrillation with rapid ventricular response.\nPossible anterior infarct.",
    None,
    "Sinus rhythm. No evidence of atrial fibrillation.",
    "   ",
    "Sinus rhythm. No evidence of atrial fibrillation.",
    "Qwertzuiop asdfghjkl.",
]


def written(path: Path, reports: list[str | None] = REPORTS, **columns: list[Any]) -> Path:
    table = pl.DataFrame({"study": [f"s{k}" for k in range(len(reports))], "text": reports, **columns})
    (table.write_parquet if path.suffix == ".parquet" else table.write_csv)(path)
    return path


def labelled(path: Path, out: Path, config: ReportsConfig = SEVENTEEN) -> pl.DataFrame:
    label_file(path, "text", "study", out, config)
    return read_table(out, "report_labels")


def test_each_report_has_a_row_and_each_label_a_column(tmp_path: Path) -> None:
    found = labelled(written(tmp_path / "r.parquet"), tmp_path / "l.parquet")
    assert found["record_id"].to_list() == ["s0", "s1", "s2", "s3", "s4", "s5"]
    assert found.columns[1:] == list(labeler(SEVENTEEN).labels)
    assert found["Atrial fibrillation"].to_list() == [1, None, 0, None, 0, 0]
    assert found["Sinus rhythm"].to_list() == [0, None, 1, None, 1, 0]
    assert 0 < found["Infarction"][0] < 1


def test_what_is_found_is_what_each_report_says_alone(tmp_path: Path) -> None:
    texts = made_up(300)
    label_file(written(tmp_path / "r.parquet", texts), "text", "study", tmp_path / "l.parquet", OWN)
    findings = read_table(tmp_path / "l.findings.parquet", "report_findings")
    labels = read_table(tmp_path / "l.parquet", "report_labels")
    reader = labeler(OWN)
    for k in range(0, 300, 7):
        said = reader.read(texts[k])
        mine = findings.filter(record_id=f"s{k}").drop("record_id").rows()
        assert mine == [(a.label, a.status, a.probability, a.start, a.end, a.rule) for a in said]
        row = labels.row(by_predicate=pl.col("record_id") == f"s{k}", named=True)
        expected = {a.label: a.probability for a in said}
        assert {name: value for name, value in row.items() if name != "record_id" and value} == {
            name: value for name, value in expected.items() if value
        }
    assert findings.height > 1000


def test_several_processes_write_the_same_bytes(tmp_path: Path) -> None:
    path = written(tmp_path / "r.parquet", made_up(2 * RECORDS_PER_PROCESS))
    outs = []
    for jobs in (1, 2):
        out = tmp_path / f"{jobs}.parquet"
        label_file(path, "text", "study", out, SEVENTEEN, jobs)
        outs.append([file.read_bytes() for file in sorted(tmp_path.glob(f"{jobs}.*"))])
    assert len(outs[0]) == 3
    assert outs[0] == outs[1]


def test_a_text_that_occurs_twice_is_read_once() -> None:
    numbered = number_texts(pl.Series(REPORTS))
    assert numbered.distinct.to_list() == [REPORTS[0], REPORTS[2], REPORTS[5]]
    assert numbered.of_row.tolist() == [0, -1, 1, -1, 1, 2]
    assert numbered.times.tolist() == [1, 2, 1]
    read = read_texts(numbered, OWN)
    assert len(read.first) == 4
    assert read.unmatched["Qwertzuiop asdfghjkl"] == 1
    assert np.isnan(read.dense(numbered.of_row)[[1, 3]]).all()


def test_a_span_holds_the_words_that_cause_the_label(tmp_path: Path) -> None:
    label_file(written(tmp_path / "r.csv"), "text", "study", tmp_path / "l.csv", SEVENTEEN)
    rows = {(row["record_id"], row["label"]): row for row in pl.read_csv(tmp_path / "l.findings.csv").to_dicts()}
    infarct = rows["s0", "Infarction"]
    assert "infarct" in REPORTS[0][infarct["start"] : infarct["end"]]  # type: ignore[index]
    assert infarct["status"] == "uncertain"
    assert rows["s2", "Atrial fibrillation"]["status"] == "absent"


def test_what_nothing_explains_is_ranked_by_how_many_reports_have_it(tmp_path: Path) -> None:
    texts: list[str | None] = ["sinus rhythm. foo bar.", "foo bar. foo bar!", "baz quux; sinus rhythm"]
    label_file(written(tmp_path / "r.csv", texts), "text", "study", tmp_path / "l.csv", OWN)
    unmatched = pl.read_csv(tmp_path / "l.unmatched.csv")
    assert unmatched.rows() == [("foo bar", 2), ("baz quux", 1)]


def test_the_same_reports_as_csv_and_as_parquet_have_the_same_labels(tmp_path: Path) -> None:
    as_csv, as_parquet = (
        labelled(written(tmp_path / f"r.{suffix}"), tmp_path / f"{suffix}.parquet") for suffix in ("csv", "parquet")
    )
    assert as_csv.equals(as_parquet)


@pytest.mark.parametrize(("name", "separator"), [("r.csv", ","), ("r.csv", ";"), ("r.csv", "\t"), ("r.tsv", "\t")])
def test_a_spreadsheets_table_is_read_whatever_is_between_its_columns(
    tmp_path: Path, name: str, separator: str
) -> None:
    rows = [("study", "text"), ("s0", "Sinus rhythm; LBBB, old"), ("s1", "Vorhofflimmern, möglich"), ("s2", "")]
    text = "".join(f'{study}{separator}"{said}"\r\n' if said else f"{study}{separator}\r\n" for study, said in rows)
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    table = read_reports(tmp_path / name, "text", "study")
    assert table["text"].to_list() == ["Sinus rhythm; LBBB, old", "Vorhofflimmern, möglich", None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_column": "report"}, "no column 'report'; it has study, text; name one with --text-column"),
        ({"id_column": "id"}, "no column 'id'; .* name one with --id-column"),
        ({"reports": "absent.csv"}, "no such file"),
        ({"reports": "r.xlsx"}, "expected a table named .csv, .tsv or .parquet, found .xlsx"),
        ({"reports": "broken.parquet"}, "cannot be read as a table"),
        ({"reports": "latin1.csv"}, "cannot be read as a table: .*; save it as UTF-8"),
        ({"reports": "twice.csv"}, "rows 1 and 2 have the same study"),
        ({"reports": "without.csv"}, "1 of 2 rows have no study"),
        ({"out": "l.txt"}, "expected a file named .csv or .parquet, found .txt"),
        ({"out": "nowhere/l.csv"}, "no folder .*nowhere"),
        ({"label_set": "eighteen"}, "no label set eighteen"),
    ],
)
def test_a_mistake_is_one_clear_line_and_leaves_nothing(tmp_path: Path, change: dict[str, str], message: str) -> None:
    written(tmp_path / "r.csv")
    (tmp_path / "r.xlsx").write_text("x")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "latin1.csv").write_bytes("study,text\ns0,möglich\n".encode("latin-1"))
    (tmp_path / "twice.csv").write_text("study,text\ns0,a\ns0,b\n")
    (tmp_path / "without.csv").write_text("study,text\ns0,a\n,b\n")
    before = sorted(tmp_path.iterdir())
    given = {"reports": "r.csv", "text_column": "text", "id_column": "study", "out": "l.csv"} | change
    config = ReportsConfig(label_set=given.pop("label_set", "ecg-fm-17"))
    reports, out = tmp_path / given.pop("reports"), tmp_path / given.pop("out")
    with pytest.raises(InputError, match=message):
        label_file(reports, given["text_column"], given["id_column"], out, config)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_reads_a_table_and_prints_no_text(tmp_path: Path) -> None:
    path = written(
        tmp_path / "r.csv", ["Sinus rhythm. Mrs Zyxwvut has palpitations.", "Zyxwvut: flutter", "Zyxwvut: flutter"]
    )
    words = ["label", str(path), "--text-column", "text", "--id-column", "study", "--out", str(tmp_path / "l.csv")]
    done = CliRunner().invoke(app, [*words, "--labels", "ecg-fm-17"])
    assert done.exit_code == 0, done.output
    assert "3 reports, 2 distinct texts" in done.output
    assert "Zyxwvut" not in done.output
    assert "Zyxwvut" in (tmp_path / "l.unmatched.csv").read_text()
    mistaken = CliRunner().invoke(app, [*words[:4], "--id-column", "text", "--out", str(tmp_path / "l.csv")])
    assert mistaken.exit_code == 2
    assert "rows 2 and 3 have the same text" in mistaken.stderr
    assert "Zyxwvut" not in mistaken.output


def test_a_slip_of_a_command_is_no_table_and_a_table_may_have_a_commands_name(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["label", "explian", "Sinus rhythm"])
    assert done.exit_code == 2
    assert "Did you mean 'explain'?" in done.output
    named = written(tmp_path / "table.csv").rename(tmp_path / "explian")
    done = CliRunner().invoke(app, ["label", str(named), "--out", str(tmp_path / "l.csv")])
    assert "expected a table named .csv, .tsv or .parquet, found no suffix" in done.output


def test_explain_shows_statements_cues_and_labels() -> None:
    done = CliRunner().invoke(
        app, ["label", "explain", "--labels", "ecg-fm-17", "Sinus rhythm; no evidence of infarct. Possible LBBB"]
    )
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert any("absent" in line and "'no evidence of'" in line for line in lines)
    assert any("Left bundle branch block" in line and "uncertain" in line for line in lines)
    assert "labels" in lines


def test_graph_draws_what_a_finding_is_a_kind_of() -> None:
    done = CliRunner().invoke(app, ["label", "graph", "Left bundle branch block"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("Left bundle branch block [SNOMED CT 164909002]")
    assert "└─" in done.output
    mistaken = CliRunner().invoke(app, ["label", "graph", "Left bundle branch blok"])
    assert mistaken.exit_code == 2
    assert "Left bundle branch block" in mistaken.stderr


def test_label_sets_are_listed() -> None:
    done = CliRunner().invoke(app, ["label", "sets"])
    listed = dict(line.split(": ", 1) for line in done.output.splitlines())
    assert len(listed["ecg-fm-17"].split(", ")) == 17
    assert len(listed["challenge-2021"].split(", ")) == 26


# ---- the pipeline's labels


def slice_of(directory: Path, reports: list[str | None]) -> Path:
    directory.mkdir()
    records = pl.concat(
        [
            empty_table("records"),
            pl.DataFrame(
                {
                    "record_id": [f"toy/{k}" for k in range(len(reports))],
                    "source": "toy",
                    "slice_id": "s",
                    "raw_path": "x",
                    "report": reports,
                    "sampling_rate_hz": 500.0,
                    "n_samples": 5000,
                    "n_segments": 2,
                    **{name: [[]] * len(reports) for name in ("leads", "invalid_leads", "constant_leads")},
                    **{name: [[0.0]] * len(reports) for name in ("lead_mean_mv", "lead_std_mv")},
                },
                schema_overrides={"report": pl.String},
            ),
        ],
        how="diagonal_relaxed",
    )
    write_table(records, "records", directory / "records.parquet")
    return directory


def config(**values: Any) -> LabelsConfig:
    given = {"scheme": "reports", "reports": {"label_set": "ecg-fm-17"}, **values}
    return from_dict(LabelsConfig, given, "test")


def test_a_pipelines_labels_come_from_its_reports(tmp_path: Path) -> None:
    inputs = {"slices": [slice_of(tmp_path / "slice", REPORTS)]}
    (tmp_path / "out").mkdir()
    counts = make_labels(inputs, config(max_labels=["Premature ventricular contraction"]), tmp_path / "out")
    labels = read_table(tmp_path / "out" / "labels.parquet", "labels")
    assert labels["Atrial fibrillation"].to_list() == [1, None, 0, None, 0, 0]
    assert labels["Infarction"].to_list() == [None, None, 0, None, 0, 0]
    assert counts["records without a report"] == 2
    assert counts["distinct reports"] == 3
    space = read_label_space(tmp_path / "out" / "label_space.yaml")
    assert len(space.names) == 17
    by_name = {label.name: label for label in space.labels}
    assert by_name["Premature ventricular contraction"].aggregation == "max"
    assert "164889003" in by_name["Atrial fibrillation"].codes
    findings = read_table(tmp_path / "out" / "findings.parquet", "report_findings")
    assert set(findings["record_id"]) <= {"toy/0", "toy/2", "toy/4"}


@pytest.mark.parametrize(
    ("values", "infarction", "flutter"),
    [
        ({"uncertain": "present"}, 1, 0),
        ({"uncertain": "absent"}, 0, 0),
        ({"uncertain": "unknown", "unmentioned": "unknown"}, None, None),
    ],
)
def test_doubt_and_silence_are_what_the_config_says(
    tmp_path: Path, values: dict[str, str], infarction: int | None, flutter: int | None
) -> None:
    inputs = {"slices": [slice_of(tmp_path / "slice", REPORTS)]}
    make_labels(inputs, config(**values), tmp_path)
    labels = read_table(tmp_path / "labels.parquet", "labels")
    assert labels["Infarction"][0] == infarction
    assert labels["Atrial flutter"][0] == flutter
    assert labels["Atrial fibrillation"][2] == 0, "what is denied is absent whatever silence means"


def test_what_is_unlikely_is_absent_whatever_doubt_means(tmp_path: Path) -> None:
    inputs = {"slices": [slice_of(tmp_path / "slice", ["Infarct is unlikely.", "Infarct cannot be ruled out."])]}
    make_labels(inputs, config(uncertain="present"), tmp_path)
    assert read_table(tmp_path / "labels.parquet", "labels")["Infarction"].to_list() == [0, 1]


def test_records_without_any_report_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of the 2 records has a report"):
        make_labels({"slices": [slice_of(tmp_path / "slice", [None, " "])]}, config(), tmp_path)


def test_the_benchmark_reads_what_it_makes(tmp_path: Path) -> None:
    assert made_up(50) == made_up(50)
    assert len(set(made_up(50))) == 50
    text = bench(60, None, "report", "record_id", 1, 1)
    assert "60 reports" in text
    assert "ratio" in text
