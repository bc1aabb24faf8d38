"""The command line as a user meets it: plans, up to date, and one line for a mistake."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.commands import runs

PREPARATION = [
    f"--only={stage}" for stage in ("synthesize", "list", "prepare", "audit", "splits", "labels", "manifests")
]
SMALL = ["--set", "synthetic.n_patients=40", "--set", "manifests.rare_labels=drop"]


def ecgfm(*words: str | Path) -> tuple[int, str]:
    """Exit code and all that was printed."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory in which everything before training is made."""
    data_dir = tmp_path_factory.mktemp("data")
    code, text = ecgfm("run", "demo", "--data-dir", data_dir, "--no-prefect", *SMALL, *PREPARATION)
    assert code == 0, text
    return data_dir


def plan_of(data_dir: Path, *words: str | Path) -> dict[str, str]:
    """Stage -> the rest of its line in the plan."""
    code, text = ecgfm("plan", "demo", "--data-dir", data_dir, *SMALL, *words)
    assert code == 0, text
    return {line[2:].split("  ")[0]: " ".join(line[2:].split("  ")[1:]).strip() for line in text.splitlines()[1:]}


def test_a_first_run_says_what_came_of_every_stage(tmp_path: Path) -> None:
    code, text = ecgfm("run", "demo", "--data-dir", tmp_path, "--no-prefect", *SMALL, *PREPARATION)
    assert code == 0
    for stage in ("synthesize", "list synthetic", "prepare synthetic", "audit", "splits", "labels", "manifests"):
        assert f"{stage}: " in text
    assert "3 rejected" in text  # the recordings that are broken on purpose


def test_a_second_run_is_up_to_date_and_imports_neither_prefect_nor_torch(prepared: Path) -> None:
    words = ["run", "demo", "--data-dir", str(prepared), *SMALL, *PREPARATION]
    code = (
        "import sys; sys.argv = ['ecgfm', *sys.argv[1:]]\n"
        "from flows.cli import app\n"
        "try: app()\n"
        "finally: print('heavy:', sorted({'prefect', 'torch', 'polars', 'sklearn'} & set(sys.modules)))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    environment["HOME"] = str(prepared)  # no Prefect profile of the person who runs the tests
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment, check=True
    )
    assert "up to date" in done.stdout
    assert "heavy: []" in done.stdout


def test_a_run_is_recorded_with_its_config_its_log_and_relative_links(prepared: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(prepared)  # another path to the same data
    run = moved / "runs" / "demo" / "latest"
    assert "n_patients: 40" in (run / "config.yaml").read_text()
    assert "splits: made in" in (run / "log.txt").read_text()
    assert (run / "splits" / "splits.parquet").is_file()
    assert not os.readlink(run / "splits").startswith("/")


def test_an_audit_shows_the_duplicates_and_the_cohort(prepared: Path) -> None:
    code, text = ecgfm("audit", "demo", "--data-dir", prepared, *SMALL)
    assert code == 0, text
    assert "# The same ECG under several names" in text
    assert re.search(r"No two of \d+ records are the same ECG", text), "several recordings of a patient are several"
    (row,) = (line for line in text.splitlines() if line.startswith("| synthetic |"))
    listed, rejected, kept, _, excluded, *splits = (
        int(cell.replace(",", "")) for cell in row.strip("| ").split(" | ")[1:]
    )
    assert listed == rejected + kept
    assert kept == excluded + sum(splits)
    assert "- rejected, truncated: 1 record" in text
    files = [Path(line) for line in text.splitlines() if line.startswith("/")]
    assert [file.name for file in files] == ["duplicates.parquet", "summary.md", "splits.parquet", "cohort.svg"]
    assert all(file.is_file() for file in files)


def test_a_plan_says_why(prepared: Path) -> None:
    plan = plan_of(prepared)
    assert plan["prepare synthetic"].startswith("cached")
    assert plan["manifests"].startswith("cached")
    assert plan["pretrain"].startswith("run")

    changed = plan_of(prepared, "--set", "prepare.segment_seconds=4")
    assert "config prepare.segment_seconds 5 -> 4" in changed["prepare synthetic"]
    assert changed["splits"].startswith("maybe")

    changed = plan_of(prepared, "--set", "splits.seed=7")
    assert changed["prepare synthetic"].startswith("cached")
    assert changed["labels"].startswith("cached")
    assert changed["splits"].endswith("config splits.seed 10 -> 7")

    assert plan_of(prepared, "--force", "labels")["labels"].endswith("forced")
    assert plan_of(prepared, "--only", "splits")["labels"].startswith("skip")
    until = {name: line.partition(" ")[0] for name, line in plan_of(prepared, "--until", "labels").items()}
    assert until["prepare synthetic"] == until["splits"] == until["labels"] == "cached"
    assert until["manifests"] == until["pretrain"] == until["evaluate"] == "skip"
    assert plan_of(prepared, "--until", "pretrain")["pretrain"].startswith("run")


def test_what_a_run_may_be_told_a_plan_may_be_told_too() -> None:
    """Else there would be no way to see what such a run does."""
    run, plan = (set(inspect.signature(command).parameters) for command in (runs.run, runs.show))
    assert run - plan == {"dry_run", "no_prefect"}
    assert plan <= run


def test_a_dry_run_and_a_plan_write_nothing(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    for words in (["plan", "demo"], ["run", "demo", "--dry-run"]):
        code, text = ecgfm(*words, "--data-dir", data_dir)
        assert code == 0
        assert "synthesize" in text
        assert not data_dir.exists()


def mistake(*words: str | Path) -> str:
    """The one line that a user's mistake gets."""
    code, text = ecgfm(*words)
    assert code == 2, text
    progress, error = text.split("error: ")
    assert all(line.startswith("  ") for line in progress.splitlines()), text
    assert len(error.splitlines()) == 1, text
    return error


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "nonsense"], "no pipeline 'nonsense'; it has challenge-2021, challenge-2021-small, code-15, "),
        (["run", "ptb-xl"], "source ptb_xl needs its raw folder: give --raw ptb_xl=PATH"),
        (["run", "ptb-xl", "--raw", "ptb_xl"], "expected SOURCE=PATH"),
        (["run", "ptb-xl", "--raw", "ptbxl=/tmp"], "this pipeline has no source 'ptbxl'"),
        (["run", "ptb-xl", "--raw", "ptb_xl=/nowhere/at/all"], "no such folder: /nowhere/at/all"),
        (["run", "demo", "--set", "pretrain.max_stepz=3"], "did you mean 'max_steps'?"),
        (["run", "demo", "--set", "pretrain.max_steps=many"], "pretrain.max_steps"),
        (["run", "demo", "--set", "pretrain.max_steps"], "expected KEY=VALUE"),
        (["run", "demo", "--only", "train"], "no such stage; stages: synthesize, list"),
        (["run", "demo", "--from", "training"], "no such stage"),
        (["run", "demo", "--until", "train"], "--until train: no such stage; stages: synthesize, list"),
        (["plan", "demo", "--until", "splits", "--only", "list"], "--until splits and --only: expected one of them"),
        (["plan", "demo", "--until", "splits", "--from", "list"], "--until splits and --from: expected one of them"),
        (["run", "demo", "--only", "finetune", "--no-prefect"], "is not made yet"),
        (["run", "demo", "--pipelines", "/nowhere/pipelines.yaml"], "no such file"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(words: Sequence[str], expected: str, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    assert expected in mistake(*words, "--data-dir", data_dir)
    assert not list(data_dir.rglob("*.partial"))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("{scheme: reports, reports: {label_set: eighteen}}", "no label set eighteen; label sets: ecg-fm-17"),
        ("{scheme: table, table: TABLE, columns: {a: pacd}}", "no column 'pacd'; did you mean 'paced'"),
        ("{scheme: table, table: TABLE.gone, columns: {a: paced}}", "labels.table: no such file"),
    ],
)
def test_a_slip_in_what_labels_are_made_of_is_told_before_anything_is_made(
    tmp_path: Path, labels: str, expected: str
) -> None:
    table = tmp_path / "outcome.csv"
    table.write_text("record_id;paced\nr;1\n")
    file = tmp_path / "study.yaml"
    file.write_text(f"study: {{sources: [synthetic], labels: {labels.replace('TABLE', str(table))}}}\n")
    data_dir = tmp_path / "data"
    assert expected in mistake("run", "study", "--pipelines", file, "--data-dir", data_dir, "--no-prefect")
    assert not (data_dir / "stages").exists()


def test_an_unknown_source_in_the_pipelines_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "pipelines.yaml"
    file.write_text("mine: {sources: [ptbxl]}\n")
    line = mistake("run", "mine", "--pipelines", file, "--raw", f"ptbxl={tmp_path}", "--data-dir", tmp_path / "data")
    assert "unknown source 'ptbxl'" in line
    assert "ptb_xl" in line


def test_a_wrong_folder_is_named_with_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "notes.txt").write_text("no ECG")
    words = ["--data-dir", tmp_path / "data", "--no-prefect"]
    assert "ptbxl_database.csv" in mistake("run", "ptb-xl", "--raw", f"ptb_xl={tmp_path / 'raw'}", *words)
    line = mistake("run", "challenge-2021", "--raw", f"physionet2021={tmp_path / 'raw'}", *words)
    assert "training" in line


def test_a_grouped_split_without_patients_names_the_source(prepared: Path, tmp_path: Path) -> None:
    raw = next((prepared / "stages" / "synthesize").glob("*/challenge-2021"))
    line = mistake(
        "run", "challenge-2021", "--raw", f"physionet2021={raw}", "--data-dir", tmp_path, "--no-prefect",
        "--set", "splits.strategy=grouped",
    )  # fmt: skip
    assert "source physionet2021 gives no patient ids" in line
    assert "use splits.strategy random" in line


def test_too_many_rejected_records_stop_the_run_with_the_counts(prepared: Path, tmp_path: Path) -> None:
    line = mistake(
        "run", "demo", "--data-dir", prepared, "--no-prefect", *SMALL, "--set", "prepare.max_rejected_share=0.01"
    )
    assert "3 of" in line
    assert "truncated: 1" in line
    assert "max_rejected_share (0.01)" in line


def test_segments_longer_than_half_the_records_leave_no_pair(prepared: Path) -> None:
    line = mistake(
        "run",
        "demo",
        "--data-dir",
        prepared,
        "--no-prefect",
        *SMALL,
        *PREPARATION,
        "--set",
        "prepare.segment_seconds=20",
    )
    assert "segment" in line


def test_a_data_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = mistake("run", "demo", "--data-dir", tmp_path / "file" / "data", "--no-prefect")
    assert "cannot be written" in line
    assert "--data-dir" in line


def test_help_shows_examples() -> None:
    code, text = ecgfm("run", "--help")
    assert code == 0
    assert "ptb_xl=/data/ptb-xl" in text


TINY = [
    "--set", "synthetic.n_patients=60",
    "--set", "manifests.rare_labels=drop",
    "--set", "pretrain.model={conv_channels: 8, width: 32, n_layers: 1, n_heads: 2, ffn_width: 32, pos_conv_kernel: 8, "
    "pos_conv_groups: 4, codebook_entries: 8, codebook_width: 16, contrast_width: 16}",
    "--set", "pretrain.max_steps=2",
    "--set", "finetune.max_epochs=1",
    "--set", "evaluate.bootstrap_samples=50",
]  # fmt: skip


def test_the_whole_line_ends_at_a_report_and_a_finetune_value_costs_finetuning_alone(tmp_path: Path) -> None:
    words = ["run", "demo", "--data-dir", tmp_path, "--no-prefect", *TINY]
    code, text = ecgfm(*words)
    assert code == 0, text
    first = text.splitlines()[-1]
    assert first.startswith(f"report: {tmp_path}/runs/demo/")
    page = Path(first.removeprefix("report: ")).read_text(encoding="utf-8")
    assert "Records in and out" in page

    code, text = ecgfm(*words, "--set", "finetune.learning_rate=5.0e-4")
    assert code == 0, text
    made = [line.split(":")[0].strip() for line in text.splitlines() if ": made in" in line]
    assert made == ["finetune", "evaluate"]

    code, text = ecgfm(*words)
    assert "up to date" in text
    assert text.splitlines()[-1] == first  # not the report of the run between


def test_the_pipelines_of_a_file_are_listed() -> None:
    code, text = ecgfm("pipelines")
    assert code == 0
    assert any(line.startswith("ptb-xl ") and "ptb_xl: PTB-XL" in line for line in text.splitlines())
