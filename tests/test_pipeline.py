"""The DAG: what runs, what stays cached, and why. PTB-XL's layout with tiny records; training is stood in for."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import write_wfdb16
from test_sources import ptb_xl_line, write_csv

from ecgfm.config import from_dict
from ecgfm.ecg import InputError
from ecgfm.pipeline import STAGE_NAMES, STAGES, Made, Selection, Walker, make_all, plan, summary, walk
from ecgfm.pipelines_file import Pipeline
from ecgfm.stages import Output, Request, Store

LIGHT = ("list", "prepare", "audit", "splits", "labels", "manifests")
VALUES: dict[str, Any] = {
    "sources": ["ptb_xl"],
    "prepare": {"segment_seconds": 0.1},
    "splits": {"valid_share": 0.3, "test_share": 0.3},
    "labels": {"scheme": "scp"},
    "manifests": {"rare_labels": "drop"},
}
SLICES = [f"records500/{folder:02d}000" for folder in range(3)]
ALL = ["list", *(["prepare"] * 3), "audit", "splits", "labels", "manifests", "pretrain", "finetune", "evaluate"]
everything = Selection()


def pipeline(**sections: Any) -> Pipeline:
    return from_dict(Pipeline, VALUES | sections, "test")


def write_folder(raw: Path, folder: int, n_records: int = 40) -> list[dict[str, object]]:
    """Records of one folder; their lines of ptbxl_database.csv."""
    rng = random.Random(folder)
    lines = []
    for number in range(1, n_records + 1):
        ecg_id = 1000 * folder + number
        file = f"records500/{folder:02d}000/{ecg_id:05d}_hr"
        digital = np.random.default_rng(ecg_id).integers(-900, 900, (12, 120)).astype(np.int16)
        write_wfdb16((raw / file).parent, f"{ecg_id:05d}_hr", digital, suffix=".dat")
        codes = {rng.choice(["NORM", "IMI", "LVH", "CRBBB", "NDT"]): 100.0, "SR": 0.0}
        lines.append(
            ptb_xl_line(
                ecg_id,
                patient_id=f"{ecg_id // 2}.0",
                scp_codes=str(codes),
                strat_fold=number % 10 + 1,
                filename_hr=file,
            )
        )
    return lines


def write_raw(raw: Path, folders: Sequence[int] = range(3)) -> Path:
    write_csv(raw / "ptbxl_database.csv", [line for folder in folders for line in write_folder(raw, folder)])
    return raw


def train(inputs: Mapping[str, Any], config: Any, out: Path) -> None:
    """In place of a stage that needs torch: writes the files that the next one reads."""
    (out / "model.safetensors").write_text(f"{config}")


@pytest.fixture(autouse=True)
def _light_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torch. The keys are those of the real stages: code is read, not run."""
    for stage in STAGES:
        module, _, function = stage.function.partition(":")
        if stage.own_process:
            monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{function: train}))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fresh_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("fresh"))


@pytest.fixture(scope="module")
def made_once(fresh_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory in which every stage of `fresh_raw` is made. Not to be written to."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def raw(fresh_raw: Path, tmp_path: Path) -> Path:
    """A raw folder of one's own. A copy with its times is the same raw folder."""
    return Path(shutil.copytree(fresh_raw, tmp_path / "raw"))


@pytest.fixture
def store(made_once: Path, fresh_raw: Path, tmp_path: Path) -> Store:
    """A data directory of one's own in which every stage is made."""
    if not (made_once / "stages").exists():
        run(Store(made_once), fresh_raw)
    return Store(Path(shutil.copytree(made_once, tmp_path / "data")))


def run(
    store: Store, raw: Path | None, config: Pipeline | None = None, selection: Selection = everything, **kwargs: Any
) -> list[tuple[Request, Made]]:
    """Every stage looked at, made in this process."""

    def execute(requests: Sequence[Request], group: str) -> list[Made]:
        return [store.make(request, request.stage.name in selection.force) for request in requests]

    walker = Walker(store, execute, selection)
    walk(config or pipeline(), {"ptb_xl": raw} if raw else {}, walker, **kwargs)
    return walker.made


def made_now(walked: list[tuple[Request, Made]]) -> list[str]:
    """The names of the stages that were made and not found."""
    return [request.name for request, made in walked if isinstance(made, Output) and not made.cached]


def planned(
    store: Store, raw: Path, config: Pipeline | None = None, selection: Selection = everything
) -> dict[str, str]:
    """Name -> "status: why"."""
    lines = plan(config or pipeline(), {"ptb_xl": raw}, store, selection)
    return {line.name: f"{line.status}: {line.why}".removesuffix(": ") for line in lines}


def not_cached(lines: Mapping[str, str]) -> dict[str, str]:
    return {name: line for name, line in lines.items() if not line.startswith("cached: unchanged since 20")}


# ---- a second run


def test_the_stages_run_in_order_and_a_second_time_nothing_does(tmp_path: Path, raw: Path) -> None:
    store = Store(tmp_path / "data")
    first = run(store, raw)
    assert [request.stage.name for request, _ in first] == ALL
    assert made_now(first) == ["list ptb_xl", *(f"prepare ptb_xl {s}" for s in SLICES), *ALL[4:]]
    assert made_now(run(store, raw)) == []
    lines = planned(store, raw)
    assert len(lines) == len(ALL)
    assert not_cached(lines) == {}


def test_in_several_processes_the_bytes_are_the_same(tmp_path: Path, store: Store, raw: Path) -> None:
    other = Store(tmp_path / "other")
    config, selection = pipeline(prepare={"segment_seconds": 0.1, "workers": 2}), Selection(only=LIGHT)
    walker = Walker(other, lambda requests, group: make_all(config, other, selection, requests, group), selection)
    walk(config, {"ptb_xl": raw}, walker)
    assert tree(other.data_dir) == {name: c for name, c in tree(store.data_dir).items() if name.split("/")[0] in LIGHT}


def tree(data_dir: Path) -> dict[str, bytes]:
    """Every file of every stage, but for the record of how it was made."""
    stages = data_dir / "stages"
    return {
        path.relative_to(stages).as_posix(): path.read_bytes()
        for path in stages.rglob("*")
        if path.is_file() and path.name != "stage.json" and ".locks" not in path.parts
    }


def test_elsewhere_the_same_raw_files_give_the_same_keys_and_bytes(tmp_path: Path, store: Store, raw: Path) -> None:
    copy = Path(shutil.copytree(raw, tmp_path / "another" / "place"))
    other = Store(tmp_path / "another" / "data")
    run(other, copy)
    assert tree(other.data_dir) == tree(store.data_dir)
    assert len(tree(other.data_dir)) > 20


def test_a_plan_writes_nothing(tmp_path: Path, raw: Path) -> None:
    lines = planned(Store(tmp_path / "data"), raw)
    assert not (tmp_path / "data").exists()
    assert lines == {
        "list ptb_xl": "run: new",
        **{f"prepare ptb_xl {slice_id}": "run: new" for slice_id in SLICES},
        **dict.fromkeys(ALL[4:], "run: never made"),
    }


def test_the_plan_of_the_embedded_source_names_every_stage_before_anything_is_made(tmp_path: Path) -> None:
    config = from_dict(Pipeline, {"sources": ["synthetic"]}, "test")
    lines = plan(config, {}, Store(tmp_path / "data"))
    assert [line.kind for line in lines] == list(STAGE_NAMES)
    assert {line.status for line in lines} == {"run"}
    assert not (tmp_path / "data").exists()


def test_what_another_pipeline_made_of_other_records_explains_nothing(store: Store) -> None:
    config = from_dict(Pipeline, {"sources": ["synthetic"]}, "test")
    lines = {line.name: line for line in plan(config, {}, store)}
    assert (lines["audit"].status, lines["audit"].why) == ("run", "never made of prepare synthetic")
    assert {line.status for line in lines.values()} <= {"run", "maybe"}
    assert not [line for line in lines.values() if "removed input" in line.why]


def test_what_came_of_a_stage_is_told_in_sum_and_as_one_says_it(tmp_path: Path) -> None:
    counts = {"excluded: constant_lead": 2, "excluded: too_short": 1, "slices": 1, "best epoch": 5}
    made = Output(tmp_path, "toy", {}, counts, 0.1, "", cached=True)
    assert summary([made]) == "cached: 1 slice, best epoch 5, 3 excluded"


# ---- what a change costs


def test_a_finetuning_value_costs_finetuning_and_what_reads_it(store: Store, raw: Path) -> None:
    changed = pipeline(finetune={"learning_rate": 3e-4})
    assert not_cached(planned(store, raw, changed)) == {
        "finetune": "run: config finetune.learning_rate 0.0001 -> 0.0003",
        "evaluate": "maybe: only if finetune comes out different",
    }
    assert made_now(run(store, raw, changed)) == ["finetune", "evaluate"]


def test_a_touched_raw_file_costs_its_slice(store: Store, raw: Path) -> None:
    (raw / SLICES[1] / "01007_hr.dat").touch()
    slow = f"prepare ptb_xl {SLICES[1]}"
    lines = not_cached(planned(store, raw))
    assert lines.pop("list ptb_xl") == f"run: 1 changed folder ({SLICES[1]})"
    assert lines.pop(slow) == f"run: 1 changed file ({SLICES[1]}/01007_hr.dat)"
    assert lines.pop("audit") == f"maybe: only if {slow} comes out different"
    assert all(line.startswith("maybe: only if ") for line in lines.values())
    assert made_now(run(store, raw)) == ["list ptb_xl", slow], "its content is as it was: nothing after it runs"
    assert not_cached(planned(store, raw)) == {}


def test_known_by_content_a_touched_raw_file_costs_nothing(store: Store, raw: Path) -> None:
    run(store, raw, hash_raw=True)
    (raw / SLICES[1] / "01007_hr.dat").touch()
    assert made_now(run(store, raw, hash_raw=True)) == []


def test_a_new_folder_costs_itself_and_what_is_made_of_all(store: Store, raw: Path) -> None:
    lines_of_old = [line for folder in range(3) for line in write_folder(raw.parent / "aside", folder)]
    write_csv(raw / "ptbxl_database.csv", lines_of_old + write_folder(raw, 3))
    new = "prepare ptb_xl records500/03000"
    lines = not_cached(planned(store, raw))
    assert lines["list ptb_xl"] == "run: 1 new folder (records500/03000); 1 changed folder (.)"
    assert lines[new] == "run: new"
    assert not any(f"prepare ptb_xl {slice_id}" in lines for slice_id in SLICES)
    assert made_now(run(store, raw)) == ["list ptb_xl", new, *ALL[4:]]


def test_other_labels_leave_the_pretrained_encoder(store: Store, raw: Path) -> None:
    """The pairs do not know of labels."""
    assert made_now(run(store, raw, pipeline(labels={"scheme": "scp", "scp_level": "diagnostic"}))) == [
        "labels",
        "manifests",
        "finetune",
        "evaluate",
    ]


def test_a_damaged_output_is_made_again_alone(store: Store, raw: Path) -> None:
    (path,) = (store.data_dir / "stages" / "splits").glob("*/splits.parquet")
    path.write_bytes(path.read_bytes()[:-1])
    lines = not_cached(planned(store, raw))
    assert lines.pop("splits").startswith("run: output damaged: splits.parquet has ")
    assert set(lines) == {"manifests", "pretrain", "finetune", "evaluate"}
    assert made_now(run(store, raw)) == ["splits"]


def test_operational_values_cost_nothing(store: Store, raw: Path) -> None:
    changed = pipeline(
        prepare={"segment_seconds": 0.1, "workers": 7, "max_rejected_share": 0.5}, pretrain={"device": "cpu"}
    )
    assert made_now(run(store, raw, changed)) == []


def test_the_code_of_a_stage_is_what_it_runs_and_not_more(store: Store, raw: Path) -> None:
    code = {request.stage.name: set(request.ingredients["code"]) for request, _ in run(store, raw)}

    def stages_with(module: str) -> set[str]:
        return {stage for stage, modules in code.items() if f"ecgfm.{module}" in modules}

    assert stages_with("signals") == {"list", "prepare"}
    assert stages_with("shards") == {"list", "prepare", "pretrain", "finetune", "evaluate"}
    assert {"list", "prepare"} <= stages_with("formats.wfdb")
    assert "splits" not in stages_with("sources.ptb_xl") | stages_with("labels")
    assert stages_with("sources.physionet2021") == stages_with("sources.mimic_iv_ecg") == set()
    assert stages_with("losses") == {"pretrain", "finetune"}
    assert "pretrain" not in stages_with("labels") | stages_with("manifests") | stages_with("metrics")
    for module in ("config", "stages", "pipeline", "fingerprints", "runs"):
        assert stages_with(module) == set()


# ---- choosing stages


def test_only_some_stages(store: Store, raw: Path) -> None:
    changed = pipeline(splits={"seed": 1, "valid_share": 0.3, "test_share": 0.3})
    selection = Selection(only=("splits",))
    lines = planned(store, raw, changed, selection)
    assert {name: line for name, line in lines.items() if line != "skip: not selected"} == {
        "splits": "run: config splits.seed 0 -> 1"
    }
    assert made_now(run(store, raw, changed, selection)) == ["splits"]
    assert made_now(run(store, raw, changed)) == ["manifests", "pretrain", "finetune", "evaluate"]


def test_from_a_stage_on(store: Store, raw: Path) -> None:
    (raw / SLICES[0] / "00001_hr.dat").touch()  # the listing would run; it is not asked to
    with pytest.raises(InputError, match=r"labels reads prepare ptb_xl, which is not made yet; run without"):
        run(store, raw, selection=Selection(start="labels"))
    run(store, raw, selection=Selection(only=("list", "prepare")))
    assert made_now(run(store, raw, selection=Selection(start="labels"))) == []
    changed = pipeline(finetune={"seed": 1}, splits={"seed": 1})
    with pytest.raises(InputError, match=r"manifests reads splits, which is not made yet; .* --only splits"):
        run(store, raw, changed, Selection(start="manifests"))


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("prepare", "prepare ptb_xl reads list ptb_xl, which is not made yet; .* with --only list"),
        ("splits", "splits reads prepare ptb_xl, which is not made yet; .* with --only list --only prepare"),
        ("manifests", "manifests reads prepare ptb_xl, which is not made yet; .* --only prepare .* --only labels"),
        ("evaluate", "evaluate reads prepare ptb_xl, which is not made yet; .* --only prepare .* --only finetune"),
    ],
)
def test_a_stage_whose_input_is_not_made_says_so(tmp_path: Path, raw: Path, only: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(Store(tmp_path / "data"), raw, selection=Selection(only=(only,)))
    assert not list(tmp_path.glob("data/stages/*/*"))


def test_forced_stages_are_made_anew_and_no_others(store: Store, raw: Path) -> None:
    before = tree(store.data_dir)
    selection = Selection(force=("prepare", "manifests"))
    lines = not_cached(planned(store, raw, selection=selection))
    assert {name for name, line in lines.items() if line == "run: forced"} == {
        *(f"prepare ptb_xl {slice_id}" for slice_id in SLICES),
        "manifests",
    }
    assert made_now(run(store, raw, selection=selection)) == [
        *(f"prepare ptb_xl {slice_id}" for slice_id in SLICES),
        "manifests",
    ]
    assert tree(store.data_dir) == before


@pytest.mark.parametrize("option", ["only", "start", "force"])
def test_an_unknown_stage_is_one_clear_line(option: str) -> None:
    given: Any = "pretraining" if option == "start" else ("splits", "pretraining")
    shown = "from" if option == "start" else option
    with pytest.raises(InputError, match=f"--{shown} pretraining: no such stage; stages: synthesize, list, prepare, "):
        Selection(**{option: given})


# ---- bad input


def signals_of(raw: Path, n: int) -> list[Path]:
    """The signal files of the first n records."""
    return sorted(raw.rglob("*.dat"))[:n]


def test_too_many_rejected_records_stop_the_run_with_the_counts(tmp_path: Path, raw: Path) -> None:
    for number, path in enumerate(signals_of(raw, 30)):
        path.unlink() if number % 3 else path.write_bytes(b"cut")
    store = Store(tmp_path / "data")
    with pytest.raises(InputError) as refused:
        run(store, raw)
    assert str(refused.value) == (
        "ptb_xl: 30 of 120 records were rejected (missing_signal: 20, truncated: 10), more than "
        f"prepare.max_rejected_share (0.2); see rejects.parquet in {store.data_dir}/stages/prepare; "
        "where that is as it should be, allow it: --set prepare.max_rejected_share=1"
    )
    tolerant = pipeline(prepare={"segment_seconds": 0.1, "max_rejected_share": 0.25})
    walked = run(store, raw, tolerant)
    assert made_now(walked) == ALL[4:], "what was prepared stays prepared"
    manifests = next(made for request, made in walked if request.stage.name == "manifests")
    assert isinstance(manifests, Output)


def test_a_source_of_which_nothing_is_left_stops_whatever_the_share(tmp_path: Path, raw: Path) -> None:
    for path in signals_of(raw, 120):
        path.unlink()
    with pytest.raises(InputError, match=r"120 of 120 records were rejected \(missing_signal: 120\), none is left"):
        run(Store(tmp_path / "data"), raw, pipeline(prepare={"segment_seconds": 0.1, "max_rejected_share": 1}))


def test_a_plan_judges_a_source_only_when_all_of_it_is_prepared(store: Store, raw: Path) -> None:
    for path in sorted((raw / SLICES[0]).glob("*.dat"))[:20]:
        path.unlink()
    run(store, raw, selection=Selection(only=("list", "prepare")))
    for slice_id in SLICES[1:]:
        (raw / slice_id / sorted((raw / slice_id).iterdir())[0].name).touch()
    assert planned(store, raw)["splits"].startswith("maybe")


@pytest.mark.parametrize(
    ("sources", "given", "message"),
    [
        (["ptb_xl"], None, "source ptb_xl needs its raw folder: give --raw ptb_xl=PATH"),
        (["ptbxl"], None, r"unknown source 'ptbxl'; known: .*physionet2021, ptb_xl"),
        (["ptb_xl"], "absent", r"ptb_xl: no such folder: .*absent; give the raw folder with --raw ptb_xl=PATH"),
        (["ptb_xl"], "empty", r"ptb_xl: the folder .*empty is empty"),
        (["ptb_xl"], "wrong", r"wrong: expected PTB-XL's ptbxl_database.csv and records500/, found notes.txt"),
    ],
)
def test_a_raw_folder_that_is_not_the_sources_is_one_clear_line(
    tmp_path: Path, sources: list[str], given: str | None, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "notes.txt").touch()
    store = Store(tmp_path / "data")
    config, place = pipeline(sources=sources), tmp_path / given if given else None
    with pytest.raises(InputError, match=message) as refused:
        run(store, place, config)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match=message):
        plan(config, {"ptb_xl": place} if place else {}, store)
    assert not list(tmp_path.glob("data/stages/[a-z]*/*")), "nothing is half-written"
