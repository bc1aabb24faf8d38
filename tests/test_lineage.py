"""What made a file: told from any place in an output up to the raw folders, also where something is gone since."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from stages_of_runs import request, run
from typer.testing import CliRunner

from ecgfm.ecg import InputError
from ecgfm.fingerprints import RawTree
from ecgfm.lineage import Branch, Leaf, Lineage, lineage_of
from ecgfm.stages import Output, Request, Store
from flows.cli import app

PREPARATION = ("synthesize", "list", "prepare", "audit", "splits", "labels", "manifests")


def said(*words: str | Path) -> str:
    """What a command prints."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def refused(file: Path) -> str:
    """The one line of a command that fails."""
    result = CliRunner().invoke(app, ["lineage", str(file)])
    assert result.exit_code == 2, result.output
    assert len(result.output.splitlines()) == 1
    return result.output


def flat(branch: Branch | Leaf) -> Iterator[Branch | Leaf]:
    """A tree, as it is printed."""
    yield branch
    if isinstance(branch, Branch):
        for one in branch.below:
            yield from flat(one)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory in which everything of the demo before training is made, of a raw folder."""
    folder = tmp_path_factory.mktemp("lineage")
    only = [f"--only={stage}" for stage in PREPARATION]
    common = ["--no-prefect", "--set", "manifests.rare_labels=drop", *only]
    said("run", "demo", "--data-dir", folder / "demo", "--set", "synthetic.n_patients=40", *common)
    raw = next((folder / "demo" / "stages" / "synthesize").glob("*/challenge-2021"))
    shutil.copytree(raw, folder / "raw")
    written = folder / "raw" / "training" / "synthetic" / "g1"
    for number, header in enumerate(sorted(written.glob("*.hea"))):
        dataset = written.parents[1] / ("synthetic", "georgia", "ningbo")[number % 3] / "g1"
        dataset.mkdir(parents=True, exist_ok=True)
        for file in list(written.glob(f"{header.stem}.*")):
            file.rename(dataset / file.name)
    words = ["--raw", f"physionet2021={folder / 'raw'}", "--data-dir", folder / "data", "--set", "splits.seed=3"]
    shares = ["--set", "splits.valid_share=0.3", "--set", "splits.test_share=0.3"]
    said("run", "challenge-2021-small", *words, *shares, *common)
    return folder


def newest(prepared: Path, what: str = "") -> Path:
    return prepared / "data" / "runs" / "challenge-2021-small" / "latest" / what


def test_every_stage_up_to_the_raw_folder_is_there_with_what_made_it(prepared: Path) -> None:
    found = lineage_of(newest(prepared, "manifests") / "cmsc_train.parquet")
    used = {f"{p.parent.parent.name}/{p.parent.name}" for p in prepared.glob("data/stages/*/*/stage.json")}
    assert set(found.made) == used  # all that the run made
    assert found.changed == []
    assert found.code_changed(*found.made.values()) == []
    splits = next(made for made in found.made.values() if made.name == "splits")
    assert splits.config == {
        "seed": (3, 0),
        "strategy": ("random", "grouped"),
        "valid_share": (0.3, 0.1),
        "test_share": (0.3, 0.1),
    }
    assert {"ecgfm.splits", "ecgfm.cohort"} <= set(splits.code)
    leaves = [one for one in flat(found.branch()) if isinstance(one, Leaf)]
    assert {leaf.raw_folder for leaf in leaves} == {str(prepared / "raw")}
    tree = RawTree.scan(prepared / "raw", "physionet2021")
    assert tree.everything().digest in {leaf.digest for leaf in leaves}
    folders = {folder for leaf in leaves for folder in leaf.folders}
    assert {"training/georgia/g1", "training/ningbo/g1", "training/synthetic/g1"} <= folders


def test_slices_are_one_branch_and_nothing_is_gone_into_twice(prepared: Path) -> None:
    shown = [one for one in flat(lineage_of(newest(prepared, "manifests")).branch()) if isinstance(one, Branch)]
    slices = [branch for branch in shown if branch.label == "prepare physionet2021"]
    assert {len(branch.members) for branch in slices} == {3}
    for label in {branch.label for branch in shown}:
        assert sum(not branch.shown_above for branch in shown if branch.label == label) == 1
    assert len([line for line in said("lineage", newest(prepared, "splits")).splitlines() if "prepare" in line]) == 2


def test_one_slice_is_told_with_its_own_folder(prepared: Path) -> None:
    link = next(link for link in newest(prepared, "prepare").iterdir() if "ningbo" in link.name)
    text = said("lineage", link / "shard.h5")
    assert "prepare physionet2021 training/ningbo/g1 " in text
    assert f"{prepared / 'raw'}: training/ningbo/g1, digest " in text
    assert "georgia" not in text


def test_an_embedded_source_ends_at_the_stage_that_wrote_it(prepared: Path) -> None:
    found = lineage_of(prepared / "demo" / "runs" / "demo" / "latest" / "manifests")
    assert [one for one in flat(found.branch()) if isinstance(one, Leaf)] == []
    assert any(made.name == "synthesize" for made in found.made.values())
    synthesized = next(made for made in found.made.values() if made.name == "synthesize")
    assert synthesized.config == {"n_patients": (40, 240)}


def test_any_place_in_an_output_has_the_lineage_of_the_output(prepared: Path) -> None:
    link = newest(prepared, "splits")
    of_output = lineage_of(link).made
    for file in (link.resolve(), link / "splits.parquet", link.resolve() / "stage.json"):
        assert lineage_of(file).made == of_output
    (link.resolve() / "step_0000200").mkdir(exist_ok=True)
    assert lineage_of(link / "step_0000200").output == f"splits/{link.resolve().name}"
    (link.resolve() / "step_0000200").rmdir()


def test_depth_ends_the_tree_and_says_what_comes_next(prepared: Path) -> None:
    for depth, labels in ((0, ["splits"]), (1, ["splits", "audit", "prepare physionet2021"])):
        branch = lineage_of(newest(prepared, "splits")).branch(depth)
        assert [one.label for one in flat(branch)] == labels
    assert "reads audit, prepare physionet2021\n" in said("lineage", newest(prepared, "splits"), "--depth", "0")


def test_json_has_every_stage_with_its_inputs(prepared: Path) -> None:
    found = json.loads(said("lineage", newest(prepared, "manifests"), "--json"))
    stages = found["stages"]
    waiting, seen = [found["output"]], set()
    while waiting:
        place = waiting.pop()
        seen.add(place)
        waiting += [read["found"] for read in stages[place]["reads"] if read["found"]]
        assert all(read["found"] or read["raw_folder"] for read in stages[place]["reads"])
    assert seen == set(stages)
    assert stages[found["output"]]["config"]["rare_labels"] == {"value": "drop", "default": "error"}


def test_a_moved_and_a_copied_data_directory_tell_the_same(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "data", tmp_path / "copy", symlinks=True)
    copied = lineage_of(tmp_path / "copy" / "runs" / "challenge-2021-small" / "latest" / "manifests")
    before = lineage_of(newest(prepared, "manifests"))
    assert copied.data_dir == tmp_path / "copy"
    assert copied.made.keys() == before.made.keys()
    assert all((tmp_path / "copy") in made.directory.parents for made in copied.made.values())
    assert [made.reads for made in copied.made.values()] == [made.reads for made in before.made.values()]


def test_a_raw_folder_that_is_not_there_now_is_said(prepared: Path, tmp_path: Path) -> None:
    (prepared / "raw").rename(tmp_path / "away")
    try:
        assert f"{prepared / 'raw'}, not there now: " in said("lineage", newest(prepared, "splits"))
    finally:
        (tmp_path / "away").rename(prepared / "raw")


def test_a_table_that_labels_were_made_of_is_told_as_a_file(prepared: Path, tmp_path: Path) -> None:
    records = next((prepared / "demo" / "stages" / "prepare").glob("*/records.parquet"))
    table = tmp_path / "outcome.csv"
    pl.read_parquet(records).select("record_id", ill=pl.int_range(pl.len()) % 2).write_csv(table)
    values = ["labels.scheme=table", f"labels.table={table}", 'labels.columns={"ill": "ill"}', "labels.max_labels=[]"]
    sets = [word for value in (*values, "labels.codes={}", "synthetic.n_patients=40") for word in ("--set", value)]
    data = shutil.copytree(prepared / "demo", tmp_path / "data", symlinks=True)
    said("run", "demo", "--data-dir", data, "--no-prefect", "--only=labels", *sets)
    made = data / "runs" / "demo" / "latest" / "labels"
    assert f"labels.table  {table}, digest " in said("lineage", made)
    table.unlink()
    assert f"labels.table  {table}, not there now, digest " in said("lineage", made)


# ---- what is not as it was


@pytest.fixture
def made(tmp_path: Path) -> tuple[Store, Output, Output]:
    """A store, an output, and one that was made of it."""
    store = Store(tmp_path / "data")
    first = store.make(request("a"))
    return store, first, store.make(request("b", "other", [first.select("*")]))


def test_a_file_that_was_changed_since_is_said_first(made: tuple[Store, Output, Output]) -> None:
    _, first, second = made
    assert lineage_of(second.directory).changed == []
    file = second.directory / "word.txt"
    file.write_text("B")  # of the same size
    for asked in (file, second.directory):
        assert lineage_of(asked).changed == ["word.txt has other bytes than were written"]
    assert said("lineage", file).splitlines()[1].endswith("word.txt has other bytes than were written")
    file.write_text("longer")
    assert lineage_of(file).changed == ["word.txt has 6 bytes instead of 1"]
    file.write_text("b")
    (first.directory / "word.txt").unlink()
    assert lineage_of(file).changed == ["toy of a/a b: word.txt is missing"]


def test_a_file_that_the_stage_did_not_write_is_said(made: tuple[Store, Output, Output]) -> None:
    _, first, _ = made
    (first.directory / "notes.txt").write_text("mine")
    (wrong,) = lineage_of(first.directory / "notes.txt").changed
    assert wrong == "notes.txt is not of what the stage wrote: it was added later"
    assert lineage_of(first.directory / "word.txt").changed == []


def same_content_elsewhere(store: Store, word: str) -> Output:
    """An output of the same name and bytes under another key, as an edit of the stage's code leaves one."""
    again = request(word)
    other = Request(again.stage, {}, {**again.config, "unused": "value"}, again.subject)
    return store.make(other)


def test_an_input_that_is_gone_is_stood_for_by_an_output_with_the_same_content(
    made: tuple[Store, Output, Output],
) -> None:
    store, first, second = made
    other = same_content_elsewhere(store, "a")
    shutil.rmtree(first.directory)
    (read,) = lineage_of(second.directory).made[f"other/{second.directory.name}"].reads
    assert read.elsewhere
    assert read.found == f"toy/{other.directory.name}"
    assert (
        "toy that was read is gone; another output with the same content stands for it: how that was made may differ"
        in said("lineage", second.directory)
    )


def test_of_several_with_the_same_content_the_one_that_was_made_of_the_same_stands_for_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    mine, others = store.make(request("mine")), store.make(request("others"))
    gone = store.make(request("table", "other", [mine.select("*")]))
    nearest = store.make(request("table", "other", [mine.select("*")], unused="value"))
    store.make(request("table", "other", [others.select("*")]))  # newer
    reader = store.make(request("reader", "third", [mine.select("*"), gone.select("*")]))
    shutil.rmtree(gone.directory)
    reads = lineage_of(reader.directory).made[f"third/{reader.directory.name}"].reads
    assert [read.found for read in reads if read.elsewhere] == [f"other/{nearest.directory.name}"]


def test_an_input_that_is_gone_with_its_content_is_said(made: tuple[Store, Output, Output]) -> None:
    store, first, second = made
    shutil.rmtree(first.directory)
    store.make(request("c"))  # of another name
    renamed = same_content_elsewhere(store, "a").directory / "stage.json"
    facts = json.loads(renamed.read_bytes())
    facts["files"]["word.txt"]["sha256"] = "0" * 64  # of that name, with other content
    renamed.write_text(json.dumps(facts))
    text = said("lineage", second.directory)
    assert "toy of a/a b: it is gone, and no output has that content (digest " in text


def test_an_output_that_was_made_again_with_other_content_is_not_what_was_read(
    made: tuple[Store, Output, Output],
) -> None:
    _, first, second = made
    facts = json.loads((first.directory / "stage.json").read_bytes())
    facts["files"]["word.txt"]["sha256"] = "1" * 64
    (first.directory / "stage.json").write_text(json.dumps(facts))
    (read,) = lineage_of(second.directory).made[f"other/{second.directory.name}"].reads
    assert not read.found


def test_code_that_is_not_what_it_was_is_named_for_the_outputs_that_it_made(
    made: tuple[Store, Output, Output],
) -> None:
    _, first, second = made
    facts = json.loads((first.directory / "stage.json").read_bytes())
    facts["ingredients"]["code"]["ecgfm.splits"] = "of another day"
    (first.directory / "stage.json").write_text(json.dumps(facts))
    found: Lineage = lineage_of(second.directory)
    of_first, of_second = (found.made[f"{o.directory.parent.name}/{o.directory.name}"] for o in (first, second))
    assert found.code_changed(of_first) == ["ecgfm.splits"]
    assert found.code_changed(of_second) == []
    assert said("lineage", second.directory).count("ecgfm.splits") == 2  # at its stage, and in the end


def test_versions_are_said_once_and_where_they_differ(made: tuple[Store, Output, Output]) -> None:
    _, first, second = made
    facts = json.loads((first.directory / "stage.json").read_bytes())
    facts["versions"]["numpy"] = "1.0.0"
    (first.directory / "stage.json").write_text(json.dumps(facts))
    text = said("lineage", second.directory)
    assert text.count("with     numpy 1.0.0") == 1
    assert text.count("polars ") == 1
    assert "torch" not in text  # no model is part of it


# ---- what has no lineage


def test_a_file_in_no_data_directory_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("")
    assert "is in no data directory" in refused(tmp_path / "file.txt")
    assert "no such file" in refused(tmp_path / "nothing")


def test_a_copy_of_an_output_outside_is_in_no_data_directory(
    made: tuple[Store, Output, Output], tmp_path: Path
) -> None:
    shutil.copytree(made[1].directory, tmp_path / "copy")
    assert "is in no data directory" in refused(tmp_path / "copy" / "word.txt")


def test_a_run_and_a_link_that_leads_nowhere_and_a_half_get_one_line_each(tmp_path: Path) -> None:
    directory = run(tmp_path / "data", "a")
    assert "is of a run, which uses many stages; name one of them: together, toy" in refused(directory)
    assert "is of a run" in refused(directory / "config.yaml")
    (link,) = (directory / "toy").iterdir()
    half = link.resolve().rename(f"{link.resolve()}.partial")
    assert "which is not there: it was removed, or never finished" in refused(link)
    assert "belongs to a stage that is not finished" in refused(half / "word.txt")
    with pytest.raises(InputError, match="no such file"):
        lineage_of(link / "word.txt")


def test_an_output_of_an_earlier_version_gets_one_line(made: tuple[Store, Output, Output]) -> None:
    _, first, _ = made
    facts = json.loads((first.directory / "stage.json").read_bytes())
    del facts["made_from"]
    (first.directory / "stage.json").write_text(json.dumps(facts))
    assert "make it anew with --force toy" in refused(first.directory)
