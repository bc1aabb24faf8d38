"""What a run cost: added up, told apart from what it did not make, and put into its page and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from test_pages_findings import Page

from ecgfm import energy
from ecgfm.cost import as_json, ledger, put_in, section
from ecgfm.ecg import InputError
from ecgfm.energy import Counter
from ecgfm.fingerprints import Input
from ecgfm.lineage import lineage_of
from ecgfm.pages.template import COST_MARK
from ecgfm.pipeline import Made, Selection, Walker
from ecgfm.pipelines_file import Pipeline
from ecgfm.runs import find_runs, recorded_run, report_of
from ecgfm.stages import Output, Request, Stage, Store

SLICE, TRAIN = Stage("prepare", "test_cost:write", many=True), Stage("pretrain", "test_cost:write")
EVALUATE = Stage("evaluate", "test_cost:write_report")


@dataclass(frozen=True)
class Word:
    """A config."""

    word: str


def write(inputs: Mapping[str, Any], config: Word, out: Path) -> dict[str, int]:
    """A word in a file."""
    (out / "word.txt").write_text(config.word)
    return {"records": 7, "rejected: truncated": 1}


def write_report(inputs: Mapping[str, Any], config: Word, out: Path) -> dict[str, int]:
    """A page as the evaluation writes it, and cards."""
    (out / "report.html").write_text(f"<html><body><p>{config.word}</p>{COST_MARK}</body></html>")
    (out / "model_card.md").write_text("# A model\n")
    (out / "data_card.json").write_text("{}\n")
    return {"test records": 3}


def output(
    name: str, seconds: float, cached: bool = False, cost: Mapping[str, Any] | None = None, **counts: int
) -> Output:
    return Output(Path(), name, {}, counts, seconds, f"2026-01-0{len(name) % 9 + 1}T00:00:00Z", cached, cost or {})


def outputs() -> list[tuple[Request, Output]]:
    """Of two slices, one of which was there, and of two stages."""
    gpu = {"device": "GPU <A>", "peak_memory_bytes": 3_000_000_000, "energy_j": {"gpu": 3600.0, "processor": 1800.0}}
    return [
        (Request(SLICE, {}, None, "own a"), output("prepare own a", 2.0, cached=True, records=10)),
        (Request(SLICE, {}, None, "own b"), output("prepare own b", 3.0, records=5)),
        (Request(TRAIN, {}), output("pretrain", 1000.5, cost=gpu, steps=300, records=4)),
        (Request(EVALUATE, {}), output("evaluate", 20.0, cached=True)),
    ]


def execute(store: Store) -> Any:
    return lambda requests, group: [store.make(request) for request in requests]


def run(data_dir: Path, word: str, *more: str) -> Path:
    """A recorded run: two slices, a training, and where `more` says so its evaluation."""
    store = Store(data_dir)
    walker = Walker(store, execute(store), Selection())
    with recorded_run(data_dir, "p", Pipeline(sources=("synthetic",)), walker, {}) as directory:
        slices = walker.many([Request(SLICE, {}, Word(one), f"own {one}") for one in "ab"], "prepare own")
        trained = walker.one(Request(TRAIN, {"slices": _inputs(slices)}, Word(word)))
        if "evaluate" in more:
            walker.one(Request(EVALUATE, {"pretrain": trained.select("*")}, Word(word)))
    return directory


def _inputs(made: Sequence[Made]) -> list[Input]:
    return [one.select("*") for one in made]


def test_slices_are_one_row_with_what_this_run_made_of_them() -> None:
    slices, trained, evaluated = ledger(outputs())
    assert (slices.stage, slices.n, slices.made, slices.seconds) == ("prepare own", 2, 1, 5.0)
    assert slices.counts == {"records": 15}
    assert (trained.made, evaluated.made) == (1, 0)
    assert (trained.device, trained.peak_memory_bytes) == ("GPU <A>", 3_000_000_000)
    assert trained.energy_j == {"gpu": 3600.0, "processor": 1800.0}
    assert (slices.energy_j, slices.device, evaluated.energy_j) == (None, None, None)


def test_energy_that_some_outputs_do_not_know_is_not_known_of_all() -> None:
    known = {"energy_j": {"processor": 5.0}}
    of_two = [(request, replace(one, cost=known)) for request, one in outputs()[:2]]
    (both,) = ledger(of_two)
    assert both.energy_j == {"processor": 10.0}
    (one,) = ledger([of_two[0], outputs()[1]])
    assert one.energy_j is None


def test_the_section_says_seconds_energy_and_what_was_there() -> None:
    page = Page(section(ledger(outputs()), 1010.25))
    text = page.text
    assert "prepare own: 2 slices 5.0 1 of 2 made" in text
    assert "pretrain 1,000.5 made" in text
    assert "300 steps, 4 records GPU <A> 3.00 1.5" in text
    assert "evaluate 20.0 was there" in text
    assert "this run took 1,010.2 s and made stages of 1,000.5 s" in text
    assert "all 1,025.5 1.5 of 1 of 3 stages" in text
    assert "\N{EN DASH} is not known" in text


def test_the_ledger_is_json_and_adds_up() -> None:
    found = json.loads(json.dumps(as_json(ledger(outputs()), 1010.25)))
    assert found["run_seconds"] == 1010.25
    assert sum(stage["seconds"] for stage in found["stages"]) == 1025.5
    assert [stage["stage"] for stage in found["stages"]] == ["prepare own", "pretrain", "evaluate"]


def test_a_page_without_a_place_for_it_stays_as_it_is() -> None:
    assert put_in("<html></html>", ledger(outputs()), 1.0) == "<html></html>"


def test_a_run_has_the_page_with_what_it_cost_and_the_stage_has_it_without(tmp_path: Path) -> None:
    first, second = run(tmp_path, "a", "evaluate"), run(tmp_path, "a", "evaluate")
    (stored,) = tmp_path.glob("stages/evaluate/*/report.html")
    assert "What it cost" not in stored.read_text()
    for directory, status in ((first, "made"), (second, "was there")):
        text = Page((directory / "report.html").read_text()).text
        assert "What it cost" in text
        assert f"prepare own: 2 slices 0.0 {status}" in text
        assert COST_MARK not in (directory / "report.html").read_text()
        found = json.loads((directory / "cost.json").read_text())
        assert [stage["made"] for stage in found["stages"]] == ([2, 1, 1] if status == "made" else [0, 0, 0])
        assert found["stages"][0]["counts"] == {"records": 14, "rejected: truncated": 2}
        assert (directory / "model_card.md").read_text() == "# A model\n"
        assert (directory / "data_card.json").samefile(stored.parent / "data_card.json")
    latest = tmp_path / "runs" / "p" / "latest" / "report.html"
    assert latest.read_text() == (second / "report.html").read_text()
    newest, oldest = find_runs(tmp_path)
    assert newest.uses() == oldest.uses()


def test_a_run_without_an_evaluation_has_no_page_but_what_it_cost(tmp_path: Path) -> None:
    directory = run(tmp_path, "a")
    assert not (directory / "report.html").exists()
    assert len(json.loads((directory / "cost.json").read_text())["stages"]) == 2


def test_the_page_of_an_evaluation_is_that_of_the_newest_run_that_used_it(tmp_path: Path) -> None:
    first, other = run(tmp_path, "a", "evaluate"), run(tmp_path, "b", "evaluate")
    again = run(tmp_path, "a", "evaluate")
    of_a, of_b = ((directory / "evaluate").resolve() for directory in (first, other))
    assert report_of(tmp_path, "p", of_a) == again / "report.html"
    assert report_of(tmp_path, "p", of_b) == other / "report.html"
    assert report_of(tmp_path, "another", of_b) == of_b / "report.html"


def test_what_made_a_runs_page_is_what_made_its_evaluation(tmp_path: Path) -> None:
    directory = run(tmp_path, "a", "evaluate")
    found = lineage_of(directory / "report.html")
    assert found.file == (directory / "evaluate" / "report.html").resolve()
    assert not found.changed
    assert {one.name for one in found.made.values()} == {"evaluate", "pretrain", "prepare own a", "prepare own b"}
    with pytest.raises(InputError, match="of a run, which uses many stages"):
        lineage_of(directory / "cost.json")


def test_what_the_machine_tells_is_beside_the_digest_of_a_stage_and_not_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter([10.0, 15.5])
    monkeypatch.setattr(energy, "processor_counters", lambda: [Counter("processor", lambda: next(states))])
    measured = Store(tmp_path / "one").make(Request(TRAIN, {}, Word("a")))
    assert measured.cost["energy_j"] == {"processor": 5.5}
    assert measured.cost["device"] == "CPU"
    monkeypatch.setattr(energy, "processor_counters", list)
    untold = Store(tmp_path / "two").make(Request(TRAIN, {}, Word("a")))
    assert "energy_j" not in untold.cost
    facts = [json.loads((one.directory / "stage.json").read_text()) for one in (measured, untold)]
    assert facts[0]["cost"] == measured.cost
    assert {name: facts[0][name] for name in ("key", "digest", "files")} == {
        name: facts[1][name] for name in ("key", "digest", "files")
    }
    found = Store(tmp_path / "one").find(Request(TRAIN, {}, Word("a")))
    assert found is not None
    assert found.cost == measured.cost


def test_slices_that_are_made_at_a_time_do_not_claim_the_whole_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "processor_counters", lambda: [Counter("processor", lambda: 1.0)])
    made = Store(tmp_path).make(Request(SLICE, {}, Word("a"), "own a"))
    assert "energy_j" not in made.cost


def test_an_output_of_an_earlier_version_has_no_cost_that_is_known(tmp_path: Path) -> None:
    request = Request(TRAIN, {}, Word("a"))
    store = Store(tmp_path)
    manifest = store.make(request).directory / "stage.json"
    facts = json.loads(manifest.read_text())
    del facts["cost"]
    manifest.write_text(json.dumps(facts))
    found = store.find(request)
    assert found is not None
    assert found.cost == {}
    (spent,) = ledger([(request, found)])
    assert (spent.device, spent.peak_memory_bytes, spent.energy_j) == (None, None, None)
