"""`ecgfm peek`: what a file is, and its drawing."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from conftest import write_wfdb16
from scp_writer import ScpFile
from typer.testing import CliRunner

from ecgfm.ecg import LEADS, InputError
from ecgfm.peek import describe, draw, look_at
from flows.cli import app


def beats(n_leads: int, seconds: float = 10, rate_hz: float = 500) -> np.ndarray:
    """(lead, time) int16: a spike a second on a slow wave, larger from lead to lead."""
    time_s = np.arange(round(seconds * rate_hz)) / rate_hz
    wave = 300 * np.sin(2 * np.pi * 1.3 * time_s) + 1000 * (time_s % 1 < 0.05)
    return (wave * (1 + np.arange(n_leads)[:, None] / 10)).astype(np.int16)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """The header of a WFDB record of twelve leads, the last one flat and with a gap."""
    digital = beats(12)
    digital[11] = 7
    digital[10, :500] = -32768
    write_wfdb16(tmp_path / "raw", "r1", digital, suffix=".dat", comments=["Age: 50", "Dx: 426783006"])
    return tmp_path / "raw" / "r1.hea"


def text_of(path: Path) -> str:
    return "\n".join(describe(look_at(path)))


def test_a_look_tells_leads_rate_length_units_remarks_and_quality(record: Path) -> None:
    text = text_of(record)
    assert text.startswith("r1.hea: WFDB\n")
    assert f"leads      12: {', '.join(LEADS)}" in text
    assert "rate       500 Hz" in text
    assert "length     10 s (5,000 samples a lead)" in text
    assert "units      mV; stored as integers, 1 uV a step" in text
    assert "comments   Age: 50\n             Dx: 426783006" in text
    assert "missing" not in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    head = re.split(r"  +", next(line for line in text.splitlines() if "range mV" in line).strip())
    assert head == ["lead", "range mV", "invalid %", "flat %", "clipped %", "powerline uV", "wander uV", "noise uV"]
    assert [rows[lead][4:6] for lead in ("I", "V5", "V6")] == [["0.0", "0.0"], ["10.0", "0.0"], ["0.0", "100.0"]]
    assert rows["V6"][1:4] == ["0.01", "to", "0.01"]


def test_a_signal_file_and_a_name_without_suffix_are_their_headers_record(record: Path) -> None:
    for name in ("r1.dat", "r1"):
        assert text_of(record.with_name(name)) == text_of(record)


def test_leads_are_told_and_drawn_in_standard_order_and_spelling(tmp_path: Path) -> None:
    leads = ("V2", "avf", "MLII", "i", "AVR")
    digital = beats(5)
    write_wfdb16(tmp_path, "r", digital, leads=leads)
    look = look_at(tmp_path / "r.hea")
    assert look.leads == ("I", "aVR", "aVF", "V2", "MLII")
    assert np.array_equal(np.rint(look.signal_mv * 1000), digital[[3, 4, 1, 0, 2]])
    assert "  missing    II, III, aVL, V1, V3, V4, V5, V6" in describe(look)


def test_patient_and_statements_of_a_file_are_told(tmp_path: Path) -> None:
    tags = {2: b"P-17\0", 8: b"\x02", 4: b"\x2a\0\x01", 25: b"\xe4\x07\x05\x1f", 26: b"\x0a\x0b\x0c"}
    written = ScpFile(beats(2), ("I", "II"), tags=tags, statements=["Sinus rhythm", "a \x1b[31mred\nline"])
    (tmp_path / "a.scp").write_bytes(written.content())
    lines = describe(look_at(tmp_path / "a.scp"))
    assert "a.scp: SCP-ECG" in lines
    assert "  patient    P-17, female, 42 years" in lines
    assert "  recorded   2020-05-31 10:11:12" in lines
    assert "  statements Sinus rhythm" in lines
    assert "\x1b" not in "".join(lines)


def test_what_a_file_says_cannot_steer_the_terminal(tmp_path: Path) -> None:
    write_wfdb16(tmp_path, "r", beats(1), leads=["II\x1b]0;title\x07"], comments=["\x1b[2J cleared", "x" * 5000])
    text = text_of(tmp_path / "r.hea")
    assert all(character.isprintable() or character == "\n" for character in text)
    assert max(map(len, text.splitlines())) < 500


def test_crowds_of_remarks_are_cut(tmp_path: Path) -> None:
    write_wfdb16(tmp_path, "r", beats(1), leads=["II"], comments=[f"remark {n}" for n in range(3000)])
    lines = describe(look_at(tmp_path / "r.hea"))
    assert len(lines) < 60
    assert any("... and 2,960 more" in line for line in lines)


@pytest.mark.parametrize("n_leads", [1, 2, 8, 12, 15])
def test_any_number_of_leads_is_drawn(tmp_path: Path, n_leads: int) -> None:
    leads = ("V7", "V8", "V9", *LEADS)[-n_leads:]
    write_wfdb16(tmp_path, "r", beats(n_leads), leads=leads)
    look = look_at(tmp_path / "r.hea")
    left_out = draw(look, tmp_path / "r.svg")
    drawn = {text.text for text in ET.parse(tmp_path / "r.svg").iter("{http://www.w3.org/2000/svg}text")}
    assert set(leads) - set(left_out) <= drawn
    assert left_out == (() if n_leads <= 12 else ("V7", "V8", "V9"))
    draw(look, tmp_path / "r.PNG")
    assert (tmp_path / "r.PNG").read_bytes().startswith(b"\x89PNG")


def test_more_than_twelve_leads_without_a_standard_one_are_drawn_as_the_first_twelve(tmp_path: Path) -> None:
    write_wfdb16(tmp_path, "r", beats(14), leads=[f"E{number}" for number in range(14)])
    assert draw(look_at(tmp_path / "r.hea"), tmp_path / "r.png") == ("E12", "E13")


def test_the_command_prints_draws_and_says_where(record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["peek", str(record)])
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "drawn: r1.hea.png")
    assert done.output.startswith(text_of(record))
    assert Path("r1.hea.png").stat().st_size > 10_000
    done = CliRunner().invoke(app, ["peek", str(record), "--out", "other.svg"])
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "drawn: other.svg")


def test_a_users_mistakes_end_in_one_line_that_says_what_to_do(record: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no ECG")
    (tmp_path / "cut.dcm").touch()
    (tmp_path / "letter.PDF").write_bytes(b"%PDF-1.4")
    (tmp_path / "numbers.csv").write_text("time,II\n0,0.1\n")
    (tmp_path / "alone.dat").write_bytes(bytes(100))
    (tmp_path / "array.npy").write_bytes(bytes(100))
    (tmp_path / "lonely.hea").write_text("lonely 1 500 100\nlonely.dat 16 1000/mV 16 0 0 0 0 II\n")
    for path, message in (
        (record.parent, r"found a folder; name one file in it, such as .*r1\.hea, or .* ecgfm init-source$"),
        (tmp_path / "empty", r"found a folder; name one file in it, or"),
        (tmp_path / "nothing.hea", r"no such file$"),
        (tmp_path / "notes.txt", r"notes\.txt: expected one of WFDB, .*SCP-ECG; found none of them$"),
        (tmp_path / "cut.dcm", r"cut\.dcm: the file is empty$"),
        (tmp_path / "letter.PDF", r"a PDF holds a drawing and not the samples; export .*DICOM"),
        (tmp_path / "numbers.csv", r"a table of samples is not read: .*\.npy"),
        (tmp_path / "alone.dat", r"needs its header alone\.hea beside it$"),
        (tmp_path / "array.npy", r"init-source FOLDER$"),
        (tmp_path / "lonely.hea", r"missing_signal: lonely\.dat: no such file$"),
    ):
        with pytest.raises(InputError, match=message) as error:
            look_at(path)
        assert "\n" not in str(error.value)
        done = CliRunner().invoke(app, ["peek", str(path)])
        assert (done.exit_code, len(done.output.splitlines())) == (2, 1)
    for picture, message in (("r.pdf", "expected a picture named .png or .svg"), ("no/r.png", "no folder .*no")):
        with pytest.raises(InputError, match=message):
            draw(look_at(record), tmp_path / picture)


def test_real_recordings_of_every_folder_are_looked_at_and_drawn(shared: Path, tmp_path: Path) -> None:
    """One of each folder and suffix that there is."""
    chosen: dict[tuple[str, str], Path] = {}
    for path in sorted((shared / "data").rglob("*")):
        if path.suffix.lower() in (".hea", ".xml", ".dcm", ".edf", ".scp"):
            chosen.setdefault((path.relative_to(shared / "data").parts[0], path.suffix.lower()), path)
    assert len(chosen) > 10
    read = 0
    for path in chosen.values():
        try:
            look = look_at(path)
        except InputError:  # a header alone, a file that is invalid on purpose
            continue
        read += 1
        assert len(describe(look)) > len(look.leads)
        draw(look, tmp_path / "picture.png")
    assert read > 8


def test_a_folder_that_cannot_be_written_is_named(
    record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = look_at(record)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(InputError, match=r"p\.png: no permission to write there; name another with --out"):
        draw(look, tmp_path / "p.png")
