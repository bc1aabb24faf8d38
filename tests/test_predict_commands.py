"""`ecgfm predict`, `embed` and `saliency` as a user meets them: tables, pictures, and one line for a mistake."""

from __future__ import annotations

import base64
import csv
import dataclasses
import html.parser
import io
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from conftest import write_wfdb16
from matplotlib.image import imread
from polars.testing import assert_frame_equal
from training_data import TINY
from typer.testing import CliRunner

from ecgfm import checkpoints
from ecgfm.answer_files import ROWS_TOGETHER, ArrayWriter, TableWriter
from ecgfm.checkpoints import Meta
from ecgfm.contracts import check, contract
from ecgfm.drawing import draw_ecg
from ecgfm.ecg import LEADS, REJECT_REASONS
from ecgfm.inference import Prediction, load
from ecgfm.model import Classifier, PretrainModel
from flows.cli import app

LABELS = ("fast", "high, in V1")
RATE_HZ, SEGMENT_SAMPLES = 100.0, 256


def ecgfm(*words: str | Path) -> tuple[int, str]:
    """Exit code and all that was printed."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def mistake(*words: str | Path) -> str:
    """The one line that a user's mistake gets."""
    code, text = ecgfm(*words)
    assert code == 2, text
    assert text.startswith("error: ")
    assert len(text.splitlines()) == 1, text
    return text


def written(folder: Path, pretrained: bool = False, **differences: Any) -> Path:
    """A checkpoint of random weights."""
    meta = Meta("finetuned", TINY, LEADS, RATE_HZ, SEGMENT_SAMPLES, labels=LABELS, thresholds={LABELS[1]: 0.5})
    if pretrained:
        meta = Meta("pretrained", TINY, LEADS, RATE_HZ, SEGMENT_SAMPLES)
    meta = dataclasses.replace(meta, **differences)
    folder.mkdir(exist_ok=True)
    torch.manual_seed(1)
    network = PretrainModel(TINY) if pretrained else Classifier(TINY, len(meta.labels))
    return checkpoints.save(folder, 1, network.state_dict(), None, meta)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("model"))


N_GOOD = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine recordings in three folders, one of them of two leads at 200 Hz; a short one, one without its signal, a
    file that is no ECG but is called like one, and notes."""
    raw = tmp_path_factory.mktemp("raw")
    random = np.random.default_rng(0)
    for number in range(N_GOOD):
        leads, rate_hz = (LEADS, RATE_HZ) if number else (LEADS[:2], 200)
        time_s = np.arange(int((6 + number) * rate_hz)) / rate_hz
        digital = 500 * np.sin(2 * np.pi * (1 + number) * time_s) + random.normal(
            scale=90, size=(len(leads), len(time_s))
        )
        write_wfdb16(
            raw / f"{number % 3}", f"r{number}", digital.astype(np.int16), sampling_rate_hz=rate_hz, leads=leads
        )
    write_wfdb16(raw, "short", np.ones((12, 100), np.int16), sampling_rate_hz=RATE_HZ)
    write_wfdb16(raw / "1", "unsigned", np.ones((12, 900), np.int16), sampling_rate_hz=RATE_HZ)
    (raw / "1" / "unsigned.mat").unlink()
    (raw / "broken.dcm").write_bytes(b"no ECG")
    (raw / "notes.txt").write_text("no ECG")
    return raw


def test_every_recording_is_predicted_or_turned_away_and_counted(
    checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    code, text = ecgfm("predict", checkpoint, folder, "--out", tmp_path / "p.parquet", "--segments", tmp_path / "s.csv")
    assert code == 0, text
    lines = text.splitlines()
    assert lines[0] == (
        f"{N_GOOD + 3} listed = {N_GOOD} predicted + 3 rejected (missing_signal 1, too_short 1, unknown_format 1)"
    )
    assert lines[1] == "left aside, no recordings: 1 .txt"
    table = pl.read_parquet(tmp_path / "p.parquet")
    assert table.columns[:6] == ["record_id", "n_segments", *LABELS, "high, in V1 present", "duration_s"]
    assert table["record_id"].to_list() == sorted(f"{n % 3}/r{n}.hea" for n in range(N_GOOD))
    check(table.drop("high, in V1 present"), "record_predictions")
    assert (table["high, in V1 present"] == (table[LABELS[1]] >= 0.5).cast(pl.Int8)).all()
    odd = table.row(by_predicate=pl.col("record_id") == "0/r0.hea", named=True)
    assert odd["missing_leads"] == " ".join(LEADS[2:])
    assert odd["sampling_rate_hz"] == 200
    assert odd["remarks"].startswith(
        "III aVR aVL aVF V1 V2 V3 V4 V5 V6 missing: 0 for the model; resampled from 200 Hz"
    )
    rejects = pl.read_parquet(tmp_path / "p.rejects.parquet")
    check(rejects, "prediction_rejects")
    assert dict(rejects.select("record_id", "reason").iter_rows()) == {
        "1/unsigned.hea": "missing_signal", "broken.dcm": "unknown_format", "short.hea": "too_short",
    }  # fmt: skip
    assert rejects["path"][0] == str(folder / "1/unsigned.hea")
    segments = pl.read_csv(tmp_path / "s.csv")
    assert segments.columns == ["record_id", "segment_index", "start_s", *LABELS]
    of_records = segments.group_by("record_id").agg(pl.len(), pl.col(LABELS).mean()).sort("record_id")
    assert of_records["len"].to_list() == table["n_segments"].to_list()
    np.testing.assert_allclose(of_records[LABELS[0]].to_numpy(), table[LABELS[0]].to_numpy(), atol=1e-8)


def test_the_table_has_the_answers_of_the_python_api(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    ecgfm("predict", checkpoint, folder, "--out", tmp_path / "p.csv")
    model = load(checkpoint, "cpu")
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == N_GOOD
    for row in rows:
        answer = model.predict(folder / row["record_id"])
        assert isinstance(answer, Prediction)
        for label in LABELS:
            assert float(row[label]) == pytest.approx(answer.probabilities[label], abs=1e-6)
        assert row["high, in V1 present"] == str(int(answer.decisions[LABELS[1]] or False))
        assert int(row["n_segments"]) == answer.segments.height


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_same_command_writes_the_same_bytes_whatever_the_batch_and_the_jobs_the_same_numbers(
    checkpoint: Path, folder: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecgfm.processes.RECORDS_PER_PROCESS", 4)  # so few are work for two processes
    outs = [tmp_path / f"{name}{suffix}" for name in ("once", "twice", "one", "many")]
    options = [["--jobs", "1"], ["--jobs", "2"], ["--batch-size", "1"], ["--batch-size", "1000"]]
    for out, more in zip(outs, options, strict=True):
        assert ecgfm("predict", checkpoint, folder, "--out", out, *more)[0] == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    read = pl.read_csv if suffix == ".csv" else pl.read_parquet
    tables = [read(out) for out in outs]
    for other in tables[2:]:
        for label in LABELS:
            np.testing.assert_allclose(other[label].to_numpy(), tables[0][label].to_numpy(), atol=1e-6)
        assert other.drop(LABELS).equals(tables[0].drop(LABELS))


def test_a_csv_has_nine_digits_and_nothing_where_nothing_is_known(
    checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    ecgfm("predict", checkpoint, folder / "0/r0.hea", "--out", tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert re.fullmatch(r"0\.\d{1,9}", row["fast"])
    assert row["duration_s"] == "6"
    assert row["worst_noise_uv"] == "", "below 210 Hz noise cannot be told"
    assert row["suspected_reversal"] == ""


def test_embeddings_are_alike_in_every_format(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    model = load(checkpoint, "cpu")
    for level in ("record", "segment"):
        for suffix in ("parquet", "csv", "npy"):
            code, text = ecgfm("embed", checkpoint, folder, "--out", tmp_path / f"{level}.{suffix}", "--level", level)
            assert code == 0, text
            assert f"{N_GOOD} embedded + 3 rejected" in text
        table = pl.read_parquet(tmp_path / f"{level}.parquet")
        vectors = np.array(table["embedding"].to_list(), np.float32)
        assert vectors.shape == (table.height, TINY.width)
        array = np.load(tmp_path / f"{level}.npy")
        np.testing.assert_array_equal(array, vectors)
        assert array.dtype == np.float32
        rows = pl.read_csv(tmp_path / f"{level}.rows.csv")
        assert_frame_equal(rows, table.drop("embedding"))
        wide = pl.read_csv(tmp_path / f"{level}.csv")
        np.testing.assert_allclose(wide.select(pl.col("^embedding_.*$")).to_numpy(), vectors, rtol=1e-6)
        assert wide["record_id"].to_list() == table["record_id"].to_list()
        for record_id, of_record in table.group_by("record_id", maintain_order=True):
            found = model.embed(folder / str(record_id[0]))
            expected = found.record[None] if level == "record" else found.segments
            np.testing.assert_allclose(np.array(of_record["embedding"].to_list()), expected, atol=1e-6)
    assert pl.read_parquet(tmp_path / "record.parquet").height == N_GOOD


def test_a_pretrained_checkpoint_embeds(folder: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "model", pretrained=True)
    code, text = ecgfm("embed", path, folder, "--out", tmp_path / "e.parquet")
    assert code == 0, text
    assert "has no classifier" in mistake("predict", path, folder, "--out", tmp_path / "p.csv")


# ---- the drawing


def png_size(content: bytes) -> tuple[int, int]:
    assert content.startswith(b"\x89PNG")
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


@pytest.mark.parametrize("method", ["attention", "gradient"])
def test_a_picture_is_drawn_and_alike_twice(checkpoint: Path, folder: Path, tmp_path: Path, method: str) -> None:
    words = ["saliency", checkpoint, folder / "1/r4.hea", "--method", method, "--label", LABELS[1]]
    for name in ("a.png", "b.png"):
        code, text = ecgfm(*words, "--out", tmp_path / name)
        assert code == 0, text
        assert f"{LABELS[1]}: probability " in text
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    width, height = png_size((tmp_path / "a.png").read_bytes())
    assert width > 1000
    assert height > 500


class Page(html.parser.HTMLParser):
    """What a page loads, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("method", ["attention", "gradient"])
def test_a_page_is_self_contained_and_says_how_to_read_it(tmp_path: Path, folder: Path, method: str) -> None:
    path = written(tmp_path / "model", labels=("<b>bold</b>", "other"), thresholds={"<b>bold</b>": 0.25})
    words = ["saliency", path, folder / "1/r4.hea", "--method", method, "--label", "<b>bold</b>"]
    code, text = ecgfm(*words, "--out", tmp_path / "page.html")
    assert code == 0, text
    page = Page()
    page.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    answer = load(path, "cpu").predict(folder / "1/r4.hea")
    assert len(page.sources) == answer.segments.height == 3
    for source in page.sources:
        png_size(base64.b64decode(source.removeprefix("data:image/png;base64,")))
    text = " ".join(page.text.split())
    assert "<b>bold</b>: probability" in text
    assert f"{answer.probabilities['<b>bold</b>']:.3f}" in text
    assert "threshold of 0.250" in text
    assert ("Attention is no explanation" in text) == (method == "attention")
    assert ("Integrated gradients" in text or "integrated gradients" in text) == (method == "gradient")


def test_one_segment_can_be_chosen(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    words = ["saliency", checkpoint, folder / "1/r4.hea", "--method", "gradient", "--out", tmp_path / "one.html"]
    assert ecgfm(*words, "--segment", "2")[0] == 0
    assert "From 5.12 to 7.68 s" in (tmp_path / "one.html").read_text()
    assert "the recording has 3, numbered from 0" in mistake(*words, "--segment", "3")


# ---- mistakes


def test_a_mistake_gets_one_line(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("x")
    (tmp_path / "run").mkdir()
    shutil.copytree(checkpoint, tmp_path / "run/finetune/step_0000001")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/meta.json").write_text('{"model_type": "bert"}')
    good = folder / "1/r4.hea"
    expected = {
        "no such checkpoint": ("predict", tmp_path / "nowhere", good, "--out", out),
        "no such file or folder": ("predict", checkpoint, tmp_path / "nothing.dcm", "--out", out),
        "found nothing": ("predict", checkpoint, tmp_path / "empty", "--out", out),
        "found 1 file (1 .txt) of other kinds": ("predict", checkpoint, tmp_path / "notes", "--out", out),
        "none of 1 recording can be used; a.txt: unknown_format": (
            "predict", checkpoint, tmp_path / "notes/a.txt", "--out", out),
        "expected a file named .parquet or .csv, found .xlsx": (
            "predict", checkpoint, good, "--out", tmp_path / "p.xlsx"),
        "found no suffix": ("embed", checkpoint, good, "--out", tmp_path / "vectors"),
        "expected a file named .png or .html": ("saliency", checkpoint, good, "--out", tmp_path / "p.jpg"),
        "no folder": ("predict", checkpoint, good, "--out", tmp_path / "nowhere/p.csv"),
        "two outputs cannot be one file": ("predict", checkpoint, good, "--out", out, "--segments", out),
        "no label 'slow'; its labels: fast, high, in V1": (
            "saliency", checkpoint, good, "--label", "slow", "--out", tmp_path / "p.png"),
        f"a run's are {tmp_path}/run/finetune": ("predict", tmp_path / "run", good, "--out", out),
        "not a checkpoint of ecgfm": ("embed", tmp_path / "foreign", good, "--out", tmp_path / "e.csv"),
        "did you mean 'fast'": ("saliency", checkpoint, good, "--label", "Fast", "--out", tmp_path / "p.png"),
        "broken.dcm: unknown_format: expected": (
            "saliency", checkpoint, folder / "broken.dcm", "--out", tmp_path / "p.png"),
        "expected auto, cpu, cuda": ("predict", checkpoint, good, "--out", out, "--device", "gpu"),
        "ask about it alone": ("predict", checkpoint, good, _slice(tmp_path), "--out", out),
    }  # fmt: skip
    for text, words in expected.items():
        assert text in mistake(*words)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    assert not out.exists()


def _slice(folder: Path) -> Path:
    (folder / "slice").mkdir()
    (folder / "slice" / "shard.h5").write_bytes(b"")
    return folder / "slice"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "no permission" in mistake("predict", checkpoint, folder, "--out", tmp_path / "locked/p.csv")


def test_an_answer_that_is_not_finite_leaves_no_half_table(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Classifier(TINY, 2)
    with torch.no_grad():
        network.proj.weight.fill_(3e38)
    meta = Meta("finetuned", TINY, LEADS, RATE_HZ, SEGMENT_SAMPLES, labels=LABELS)
    path = checkpoints.save(tmp_path, 1, network.state_dict(), None, meta)
    assert "is not finite" in mistake("predict", path, folder, "--out", tmp_path / "p.csv")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["step_0000001"]


def test_a_label_called_like_a_column_is_refused(folder: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "model", labels=("remarks", "b"), thresholds={})
    assert "label 'remarks' is called like another column" in mistake(
        "predict", path, folder, "--out", tmp_path / "p.csv"
    )


def test_the_reasons_of_the_contract_are_those_of_the_house() -> None:
    assert contract("prediction_rejects")["columns"]["reason"]["allowed"] == list(REJECT_REASONS)


# ---- the writers


@pytest.mark.parametrize("n_rows", [0, 1, 4096, 9001])
def test_rows_come_back_as_they_were_given(tmp_path: Path, n_rows: int) -> None:
    columns = {"a": pl.String(), "x": pl.Float64(), "n": pl.Int64(), "v": pl.List(pl.Float32())}
    with TableWriter(tmp_path / "t.parquet", columns) as table, ArrayWriter(tmp_path / "t.npy", 3) as array:
        for number in range(n_rows):
            vector = np.full(3, number, np.float32)
            table.add({"a": f"r{number}", "x": np.nan if number == 7 else number / 3, "n": number, "v": vector})
            array.add(vector)
    found = pl.read_parquet(tmp_path / "t.parquet")
    assert dict(found.schema) == columns
    assert found["n"].to_list() == list(range(n_rows))
    assert found["x"].null_count() == (n_rows > 7)
    assert np.load(tmp_path / "t.npy").shape == (n_rows, 3)
    np.testing.assert_array_equal(np.load(tmp_path / "t.npy")[:, 0], np.arange(n_rows))


def test_a_table_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    for name in ("t.csv", "t.parquet"):
        writer = TableWriter(tmp_path / name, {"a": pl.Int64()})
        writer.add({"a": 1})
        with pytest.raises(KeyboardInterrupt), writer:
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    with TableWriter(tmp_path / "t.csv", {"a": pl.Int64()}) as table:
        for number in range(3 * ROWS_TOGETHER):
            table.add({"a": number})
            assert len(table._rows) < ROWS_TOGETHER


def test_every_vendor_file_is_answered_or_has_a_reason(checkpoint: Path, shared: Path, tmp_path: Path) -> None:
    code, text = ecgfm("predict", checkpoint, shared / "data/vendor", "--out", tmp_path / "p.parquet")
    assert code == 0, text
    table, rejects = (pl.read_parquet(tmp_path / name) for name in ("p.parquet", "p.rejects.parquet"))
    assert table.height >= 20
    answered = set(table["record_id"])
    assert {"Refactoring/Example.dcm", "Refactoring/Example.scp", "RigacciOrg/0000050.ECG.edf"} <= answered
    reasons = dict(rejects.select("record_id", "reason").iter_rows())
    assert reasons["sixlettervariables/invalid-doc-type.xml"] == "unknown_format"
    on_disk = {str(p.relative_to(shared / "data/vendor")) for p in (shared / "data/vendor").rglob("*") if p.is_file()}
    one_ecg = ["FDA/subject1_0.xml", "Refactoring/Example.dcm", "Refactoring/Example.scp", "marianux/ecg_hl7.xml"]
    answers = table.filter(pl.col("record_id").is_in(one_ecg)).select(LABELS)
    assert answers.height == 4, "the same ECG as HL7 aECG, DICOM and SCP-ECG"
    assert answers.max().to_numpy() == pytest.approx(answers.min().to_numpy(), abs=1e-4)
    assert np.ptp(table["fast"].to_numpy()) > 0.01
    aside = on_disk - answered - set(reasons)
    assert {Path(name).suffix for name in aside} <= {".txt", ".xsd", ".json"}


def test_each_leads_own_shading_lies_behind_it_alone() -> None:
    """Twelve leads of 2 s are drawn in six rows of two: V1 is the first on the right."""
    random = np.random.default_rng(0)
    signal_mv, nothing = random.normal(scale=0.1, size=(12, 1000)), np.zeros((12, 1000), np.float32)
    pictures = {}
    for name, size in (("none", 0.0), ("for", 1.0), ("against", -1.0)):
        shading = nothing.copy()
        shading[LEADS.index("V1")] = size
        pictures[name] = imread(io.BytesIO(draw_ecg(signal_mv, 500, shading)))[..., :3]
    height, width = pictures["none"].shape[:2]
    for name, strongest in (("for", 2), ("against", 0)):
        rows, columns = np.nonzero((pictures[name] != pictures["none"]).any(axis=2))
        assert rows.max() < 0.3 * height
        assert columns.min() > 0.45 * width
        tint = (pictures[name] - pictures["none"])[rows, columns].mean(axis=0)
        assert tint.argmax() == strongest, "blue speaks for the label, orange against it"
    with pytest.raises(ValueError, match=r"a saliency \(time,\) or \(12, time\)"):
        draw_ecg(signal_mv, 500, nothing[:3])
