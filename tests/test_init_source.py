"""The first look at a folder: the config it writes reads the folder, and its guesses are true of what was built."""

from __future__ import annotations

import io
import shlex
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from conftest import write_wfdb16
from matplotlib import image
from typer.testing import CliRunner

from ecgfm.ecg import LEADS, EcgRecord, InputError
from ecgfm.init_source import draw_records, init_source, units_by_amplitude
from ecgfm.init_tables import guess_metadata
from ecgfm.pipelines_file import load_pipeline
from ecgfm.sources import own
from ecgfm.sources.own_config import UNITS_PER_MV, load
from flows.cli import app
from flows.commands.options import PIPELINES

RNG = np.random.default_rng(0)


def beats_mv(n_leads: int, n_samples: int, rate_hz: float = 250) -> np.ndarray:
    """(lead, time) a spike of 1 mV a second on a little noise: spans what an ECG spans."""
    signal = RNG.normal(0, 0.05, (n_leads, n_samples))
    signal[:, :: int(rate_hz)] += 1.0
    signal[:, 1 :: int(rate_hz)] += 1.0
    signal[:, 2 :: int(rate_hz)] += 1.0
    return signal


def look(folder: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """The config that is written, and the lines."""
    lines = init_source(folder, folder.parent / "five.png", **options)
    return yaml.safe_load((folder / "ecgfm.yaml").read_text()), lines


def wfdb_folder(folder: Path, n_records: int = 7) -> Path:
    for number in range(n_records):
        digital = (beats_mv(12, 1500) * 1000).astype(np.int16)
        comments = ["Age: 60", "Sex: Female", f"Dx: {'AF' if number % 2 else 'NSR'}"]
        write_wfdb16(folder / "set", f"r{number}", digital, suffix=".dat", comments=comments)
    return folder


def test_a_folder_of_records_is_read_with_what_is_written(tmp_path: Path) -> None:
    folder = wfdb_folder(tmp_path / "our ecgs")
    config, lines = look(folder)
    assert config == {"name": "our-ecgs", "files": {"patterns": ["**/*.hea"]}}
    assert load(folder).name == "our-ecgs"
    listed = own.list_records(folder)
    assert listed.height == 7
    assert all(own.read_record(folder, row).n_samples == 1500 for row in listed.to_dicts())
    text = "\n".join(lines)
    assert "read 7 of 7" in text
    assert "500 Hz (7)" in text
    assert "NSR (4); AF (3)" in text


def test_the_next_command_is_one_that_a_shell_and_the_pipeline_take(tmp_path: Path) -> None:
    _, lines = look(wfdb_folder(tmp_path / "our ecgs"))
    assert lines[-2] == "next:"
    words = shlex.split(lines[-1])
    assert words[:3] == ["ecgfm", "run", "own"]
    assert f"own={tmp_path / 'our ecgs'}" in words
    values = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    pipeline = load_pipeline(PIPELINES, "own", values)
    assert pipeline.labels.codes == {"NSR": ("NSR",), "AF": ("AF",)}
    assert pipeline.sources == ("own",)


def test_a_code_of_the_challenge_has_its_name_in_the_next_command(tmp_path: Path) -> None:
    codes = ("426783006", "733534002", "164909002", "999")  # sinus rhythm, two codes of one class, and an unknown one
    signal = np.random.default_rng(0).normal(0, 200, (12, 5000)).astype(np.int16)
    for number, code in enumerate(codes):
        write_wfdb16(tmp_path / "ecgs", f"r{number}", signal, comments=(f"Dx: {code}",))
    _, lines = look(tmp_path / "ecgs")
    assert any("426783006 sinus rhythm (1)" in line for line in lines)
    (labels,) = (word for word in shlex.split(lines[-1]) if word.startswith("labels.codes="))
    assert yaml.safe_load(labels.removeprefix("labels.codes=")) == {
        "sinus rhythm": ["426783006"],
        "left bundle branch block": ["733534002", "164909002"],
        "999": ["999"],
    }


def test_without_codes_the_next_command_prepares_and_splits(tmp_path: Path) -> None:
    write_wfdb16(tmp_path / "x", "r", (beats_mv(12, 500) * 1000).astype(np.int16), suffix=".dat")
    _, lines = look(tmp_path / "x")
    assert lines[-1].endswith("--only list --only prepare --only audit --only splits")


def test_five_records_are_drawn_in_one_picture(tmp_path: Path) -> None:
    folder = wfdb_folder(tmp_path / "x")
    look(folder)
    rows = own.list_records(folder).to_dicts()
    from_first_to_last = [rows[quarter * (len(rows) - 1) // 4] for quarter in range(5)]
    alone = [drawn_size([own.read_record(folder, row)]) for row in from_first_to_last]
    five = image.imread(tmp_path / "five.png").shape
    assert five[:2] == (sum(height for height, _ in alone), max(width for _, width in alone))
    one_lead = EcgRecord("own/s", ("I",), 500.0, beats_mv(1, 500))
    beside = EcgRecord("own/r", LEADS, 500.0, beats_mv(12, 1500))
    parts = [drawn_size([record]) for record in (one_lead, beside)]
    assert parts[0] != parts[1]
    assert drawn_size([one_lead, beside]) == (parts[0][0] + parts[1][0], max(parts[0][1], parts[1][1]))


def drawn_size(records: list[EcgRecord]) -> tuple[int, int]:
    """Height and width."""
    height, width, _ = image.imread(io.BytesIO(draw_records(records))).shape
    return height, width


def test_a_folder_that_cannot_be_written_is_told_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(InputError, match=r"no permission to write ecgfm\.yaml into it, .* or copy the recordings"):
        init_source(tmp_path, tmp_path / "p.png")


def test_what_is_there_is_not_overwritten_without_force(tmp_path: Path) -> None:
    folder = wfdb_folder(tmp_path / "x")
    (folder / "ecgfm.yaml").write_text("mine")
    with pytest.raises(InputError, match="is there already; --force"):
        look(folder)
    assert (folder / "ecgfm.yaml").read_text() == "mine"
    look(folder, force=True)
    assert load(folder).files is not None


@pytest.mark.parametrize("what", ["absent", "empty", "tables", "unreadable"])
def test_a_folder_without_recordings_is_one_clear_line_and_writes_nothing(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "x"
    if what != "absent":
        folder.mkdir()
    if what == "tables":
        (folder / "a.csv").write_text("a,b\n1,2\n")
    if what == "unreadable":
        (folder / "a.hea").write_text("a 12 500 1000\na.dat 16 1000/mV\n")
    with pytest.raises(InputError, match=r"expected|could be read") as error:
        look(folder)
    assert "\n" not in str(error.value)
    assert not (folder / "ecgfm.yaml").exists()


@pytest.mark.parametrize("units", ["V", "mV", "uV"])
@pytest.mark.parametrize("axes", [["record", "time", "lead"], ["record", "lead", "time"]])
def test_an_arrays_axes_units_ids_and_padding_are_found(tmp_path: Path, axes: list[str], units: str) -> None:
    signals = np.stack([beats_mv(12, 2500) for _ in range(20)]) * {"V": 1e-3, "mV": 1.0, "uV": 1e3}[units]
    signals[3, :, 2000:] = 0
    stored = signals if axes[1] == "lead" else signals.swapaxes(1, 2)
    (tmp_path / "x").mkdir()
    with h5py.File(tmp_path / "x/ecgs.hdf5", "w") as file:
        file["signals"], file["exam"] = stored.astype(np.float32), np.arange(100, 120)
        file["signals"].attrs["fs"] = 360
    config, _ = look(tmp_path / "x")
    assert config["array"] == {
        "patterns": ["ecgs.hdf5"],
        "axes": axes,
        "dataset": "signals",
        "ids_dataset": "exam",
        "strip": "zero",
    }
    assert (config["units"], config["sampling_rate_hz"], config["leads"]) == (units, 360.0, list(LEADS))
    rows = own.list_records(tmp_path / "x").to_dicts()
    assert [row["record_id"] for row in rows] == [f"own/{n}" for n in range(100, 120)]
    record = own.read_record(tmp_path / "x", rows[3])
    assert record.n_samples == 2000
    np.testing.assert_allclose(record.signal_mv, signals[3, :, :2000] / UNITS_PER_MV[units], rtol=1e-5)


def test_the_lines_of_a_table_name_the_recordings_of_an_array(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    np.save(tmp_path / "x/X.npy", np.stack([beats_mv(2, 5000) for _ in range(8)]))
    (tmp_path / "x/y.csv").write_text("ecg,age,AF\n" + "".join(f"e{n},{40 + n},{n % 2}\n" for n in range(8)))
    config, lines = look(tmp_path / "x")
    assert config["array"]["axes"] == ["record", "lead", "time"]
    assert (config["array"]["ids_file"], config["array"]["ids_column"]) == ("y.csv", "ecg")
    assert config["sampling_rate_hz"] == 500.0, "5000 samples are 10 s"
    assert config["metadata"] == {"file": "y.csv", "record": "ecg", "age": "age", "code_columns": ["AF"]}
    assert any("AF (4)" in line for line in lines)


@pytest.mark.parametrize(("chunks", "slow"), [((200, 50, 1), True), ((1, 500, 2), False), (None, False)])
def test_an_array_that_is_slow_to_read_from_is_told(tmp_path: Path, chunks: tuple[int, ...] | None, slow: bool) -> None:
    (tmp_path / "x").mkdir()
    with h5py.File(tmp_path / "x/ecgs.h5", "w") as file:
        signals = np.stack([beats_mv(2, 500) for _ in range(200)]).swapaxes(1, 2)
        file.create_dataset("signals", data=signals, chunks=chunks, compression="gzip" if chunks else None)
    _, lines = look(tmp_path / "x")
    assert any("SLOW" in line for line in lines) == slow


def test_every_guess_says_that_it_is_one(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    np.save(tmp_path / "x/X.npy", np.stack([beats_mv(12, 5000) for _ in range(3)]))
    look(tmp_path / "x")
    lines = (tmp_path / "x/ecgfm.yaml").read_text().splitlines()
    guessed = {line.split(":")[0].strip() for line in lines if "guess" in line.lower().partition("#")[2]}
    assert {"axes", "leads", "sampling_rate_hz", "units"} <= guessed


def test_units_are_those_in_which_the_signal_is_an_ecg() -> None:
    signals = [beats_mv(12, 2500) for _ in range(3)]
    assert [units_by_amplitude([s * factor for s in signals])[0] for factor in (1e-3, 1, 1e3)] == ["V", "mV", "uV"]


def test_columns_are_known_by_names_and_values(tmp_path: Path) -> None:
    folder = wfdb_folder(tmp_path / "x", 4)
    lines = [
        "file_name,subject_id,age_at_ecg,is_male,ecg_date,conclusion,LBBB,diagnosis_codes,strat_fold,validated",
        *(f"r{n}.hea,{n},5{n},{n % 2},2020-01-0{n + 1},sinus,{n % 2},AF|PVC,{n},1" for n in range(4)),
    ]
    (folder / "meta.csv").write_text("\n".join(lines) + "\n")
    (folder / "ecgfm.yaml").write_text("name: x\nfiles: {patterns: ['**/*.hea']}\n")
    values, remarks, _ = guess_metadata(folder, ["meta.csv"], own.list_records(folder))
    assert values == {
        "file": "meta.csv",
        "record": "file_name",
        "match": "name",
        "patient": "subject_id",
        "age": "age_at_ecg",
        "sex": "is_male",
        "female": ["0"],
        "male": ["1"],
        "recorded_at": "ecg_date",
        "report": "conclusion",
        "codes": "diagnosis_codes",
        "codes_separator": "|",
        "fold": "strat_fold",
    }
    assert "guess" in remarks["record"]
    config, _ = look(folder, force=True)
    assert config["metadata"] == values
    row = own.list_records(folder).row(1, named=True)
    assert (row["patient_id"], row["sex"], row["age_years"], row["fold"]) == ("own/1", "male", 51.0, 1)
    assert row["codes"] == ["AF", "PVC"]


def test_sexes_that_cannot_be_told_are_asked_for(tmp_path: Path) -> None:
    folder = wfdb_folder(tmp_path / "x", 2)
    (folder / "meta.csv").write_text("file,sex\nset/r0,0\nset/r1,1\n")
    config, lines = look(folder)
    assert "sex" not in config["metadata"]
    assert any("sex has 0, 1: name them" in line for line in lines)


def test_a_german_spreadsheets_table_is_guessed(tmp_path: Path) -> None:
    folder = wfdb_folder(tmp_path / "x", 2)
    (folder / "liste.csv").write_text(
        "Datei;Alter;Geschlecht;Befund\r\nset/r0;67;w;Sinusrhythmus\r\nset/r1;45;m;Vorhofflimmern, möglich\r\n",
        encoding="utf-8-sig",
    )
    config, _ = look(folder)
    columns = ("file", "record", "age", "sex", "report")
    assert [config["metadata"][key] for key in columns] == ["liste.csv", "Datei", "Alter", "Geschlecht", "Befund"]
    assert own.list_records(folder)["sex"].to_list() == ["female", "male"]


@pytest.mark.parametrize("folder", ["ludb", "two-lead", "vendor", "code-15", "code-15-wfdb", "challenge-reduced-leads"])
def test_real_folders_are_looked_at_and_read(shared: Path, tmp_path: Path, folder: str) -> None:
    raw = Path(shutil.copytree(shared / "data" / folder, tmp_path / folder))
    raw.chmod(0o755)
    config, lines = look(raw)
    assert own.list_records(raw).height > 0
    assert lines[-1].strip().startswith("ecgfm run own --raw own=")
    assert (tmp_path / "five.png").stat().st_size > 10_000
    if folder == "code-15":
        assert (config["sampling_rate_hz"], config["units"], config["array"]["strip"]) == (400.0, "mV", "zero")
        assert config["metadata"]["record"] == "exam_id"


def test_the_command_prints_what_it_found_and_a_mistake_is_one_line(tmp_path: Path) -> None:
    folder, picture = wfdb_folder(tmp_path / "x", 2), tmp_path / "x.png"
    words = ["init-source", str(folder), "--picture", str(picture)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    assert "read 2 of 2" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2
    assert again.output.startswith("error: ")
    assert "--force" in again.output
