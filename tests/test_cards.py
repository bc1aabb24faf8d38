"""Cards: the numbers that they were given, nothing of one person, and Croissant as it is specified."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from typing import Any

import pytest

from ecgfm.contracts import CONTRACTS, contract
from ecgfm.label_space import Label, LabelSpace
from ecgfm.pages.cards import DataFacts, ModelFacts, TrainingFacts, cards, data_card, evaluation_table, model_card

NAMES = ["atrial fibrillation", "left | right", "sinus  rhythm"]
COUNTS = {
    "train": {"positive": 30, "negative": 70, "unknown": 1},
    "test": {"positive": 4, "negative": 36, "unknown": 0},
}
SPACE = LabelSpace(tuple(Label(name, ("1",), "mean") for name in [*NAMES, "atrial flutter"]))
USED = LabelSpace(tuple(Label(name, ("1",), "mean", COUNTS) for name in NAMES), {"atrial flutter": "too rare"})


def estimate(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "replicates": 100, "left_out": 0}


def metrics() -> dict[str, Any]:
    """As metrics.json; the record ids in it are of a leak."""
    labels = [
        {"label": name, "n": 40, "positives": 4 + k, "auroc": estimate(0.8 + k / 50), "auprc": estimate(0.5)}
        for k, name in enumerate(NAMES)
    ]
    labels[2]["auroc"] = None
    scores = {"n_records": 40, "n_patients": 21, "labels": labels, "macro_auroc": estimate(0.81), "left_out": []}
    scores["macro_auprc"] = {**estimate(0.5), "low": None, "high": None}
    measures = dict.fromkeys(("sensitivity", "specificity", "ppv", "npv"), estimate(0.7))
    decisions = [{"label": name, "point": {"threshold": 0.25}, **measures} for name in NAMES]
    split = {"records": 50, "known_patients": 30, "segments": 100, "labelled_records": 40}
    return {
        "split": "test",
        "leakage": None,
        "training_is_known": True,
        "bootstrap": {"replicates": 100, "confidence": 0.95, "rule": "patients drawn with replacement"},
        "scores": {"finetuned": scores},
        "assessment": {"decisions": decisions, "parts": [{"by": "age", "name": "40 to 64 years", "scores": scores}]},
        "cohort": {
            "listed": {"ptb_xl": 160},
            "rejected": {"truncated": 10},
            "splits": {"train": split, "valid": split, "test": split},
        },
        "dropped": {"atrial flutter": "too rare"},
    }


def model() -> ModelFacts:
    meta = {
        "task": "multilabel",
        "labels": NAMES,
        "leads": ["I", "II"],
        "sampling_rate_hz": 500.0,
        "segment_samples": 2500,
        "step": 1204,
        "training_data": {"manifests": "abc1", "prepare ptb_xl": "abc2"},
    }
    trainings = [
        TrainingFacts("Pretraining", [("updates", "300")], {}),
        TrainingFacts(
            "Finetuning", [("objective", "cross-entropy")], {"learning_rate": 1e-3, "adam_betas": [0.9, 0.98]}
        ),
    ]
    return ModelFacts(meta, "sha256:" + "5" * 64, 566442, "4 convolutions", {"prepare ptb_xl": "abc3"}, trainings)


def output(stage: str, subject: str, *names: str) -> dict[str, Any]:
    """As a stage.json, of which the card needs little."""
    files = {
        name: {"bytes": 10 + len(name), "sha256": hashlib.sha256(f"{subject}{name}".encode()).hexdigest()}
        for name in names
    }
    return {"ingredients": {"stage": stage, "subject": subject}, "files": files}


def data() -> DataFacts:
    made = ("quality.parquet", "records.parquet", "segments.parquet", "shard.h5")
    slices = [output("prepare", f"own Jane Doe/{number}", *made) for number in range(3)]
    tables = {
        "splits": output("splits", "", "splits.parquet", "cohort.svg"),
        "labels": output("labels", "", "labels.parquet"),
    }
    return DataFacts(slices, tables, SPACE, USED)


def croissant() -> dict[str, Any]:
    card: dict[str, Any] = json.loads(data_card(data(), metrics()["cohort"]))
    return card


# ---- of the model -------------------------------------------------------------------------------------------------


def test_the_model_card_has_the_headings_of_mitchell_2019_in_their_order() -> None:
    found = re.findall(r"^## (.+)$", model_card(model(), metrics()), re.MULTILINE)
    assert found == [
        "Model details",
        "Intended use",
        "Factors",
        "Metrics",
        "Evaluation data",
        "Training data",
        "Quantitative analyses",
        "Ethical considerations",
        "Caveats and recommendations",
    ]


def test_every_number_has_its_interval_and_its_n() -> None:
    card = model_card(model(), metrics())
    assert "| atrial fibrillation | 40 | 4 | 0.800 (0.750 to 0.850) | 0.500 (0.450 to 0.550) |" in card
    assert "| left \\| right | 40 | 5 |" in card
    assert "| sinus  rhythm | 40 | 6 | not scored |" in card
    assert "| **macro** | 40 | | 0.810 (0.760 to 0.860) | 0.500 |" in card
    assert "| age | 40 to 64 years | 40 | 21 | 3 | 0.810 (0.760 to 0.860) | 0.500 |" in card
    assert "| atrial fibrillation | 0.250 | 0.700 (0.650 to 0.750) |" in card
    assert "\n".join(evaluation_table(metrics())) in card


def test_the_card_says_from_what_and_how_it_was_trained() -> None:
    card = model_card(model(), metrics())
    for fact in (
        "566,442 parameters",
        "`abc1`",
        "`abc2`",
        "`abc3`",
        "objective: cross-entropy",
        "learning_rate: 0.001",
    ):
        assert fact in card
    assert "Left out of the labels: atrial flutter (too rare)." in card
    assert card.count("not stated") == 2
    assert "the checkpoint does not say from what" in model_card(replace(model(), encoder_data={}), metrics())


@pytest.mark.parametrize(
    ("leakage", "known", "said"),
    [
        (None, True, "No training step has seen these records"),
        (None, False, "is not known: it may have seen these records"),
        ("of 40 records 1 learnt from (ptb_xl/00017)", True, "has learnt from test records"),
    ],
)
def test_what_the_model_knows_is_said_without_naming_a_record(leakage: str | None, known: bool, said: str) -> None:
    card = model_card(model(), {**metrics(), "leakage": leakage, "training_is_known": known})
    assert said in card
    assert "00017" not in card


def test_a_model_of_numbers_has_errors_and_no_decisions() -> None:
    row = {"label": "age", "unit": "years", "n": 40, "mean_error": estimate(0.5), "r2": None}
    scores = {"n_records": 40, "n_patients": 21, "labels": [{**row, "mean_absolute_error": estimate(9.0)}]}
    given = {name: value for name, value in metrics().items() if name not in ("assessment", "scores")}
    given |= {"task": "regression", "scores": {"finetuned": scores}}
    given |= {"parts": [{"by": "sex", "name": "female", "scores": {**scores, "n_patients": 11}}]}
    card = model_card(replace(model(), meta={**model().meta, "task": "regression", "labels": ["age"]}), given)
    assert "| age | years | 40 | 9.000 (8.950 to 9.050) | 0.500 (0.450 to 0.550) | not scored |" in card
    assert "| sex | female | age | 40 | 11 | 9.000 (8.950 to 9.050) | not scored |" in card
    assert "AUROC" not in card
    assert "threshold" not in card


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_a_part_of_few_patients_has_no_score_on_the_card(task: str) -> None:
    given = {**metrics(), "task": task}
    scores = {**given["scores"]["finetuned"], "n_patients": 4}
    part = {"by": "age", "name": "80 years and over", "scores": scores}
    given["assessment"] = {**given["assessment"], "parts": [part]}
    given["scores"] = {"finetuned": {**scores, "labels": []}}
    card = model_card(replace(model(), meta={**model().meta, "task": task}), given)
    (row,) = (line for line in card.splitlines() if "80 years and over" in line)
    assert row.split("|")[3:] in (
        [" ", " < 5 ", " ", " not shown ", " not shown ", ""],
        [" ", " ", " < 5 ", " not shown ", " not shown ", ""],
    )


# ---- of the data --------------------------------------------------------------------------------------------------


def test_the_data_card_has_what_croissant_asks_for() -> None:
    card = croissant()
    assert card["@type"] == "sc:Dataset"
    assert card["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    assert re.fullmatch(r"[\w-]+", card["name"])
    assert "150 records" in card["description"]
    assert card["license"].startswith("not stated")
    resources = {one["@id"] for one in card["distribution"]}
    fields = {field["@id"] for records in card["recordSet"] for field in records["field"]}
    every = [*card["distribution"], *card["recordSet"], *(f for records in card["recordSet"] for f in records["field"])]
    assert len({one["@id"] for one in every}) == len(every)
    for one in every:
        assert one["name"]
        assert not re.search(r"\s", one["@id"]), "the validator takes no white space"
    for one in card["distribution"]:
        assert one["encodingFormat"] in ("application/x-parquet", "application/x-hdf5")
        assert re.fullmatch("[0-9a-f]{64}", one["sha256"])
        assert ("contentUrl" in one, "includes" in one) == (
            one["@type"] == "cr:FileObject",
            one["@type"] == "cr:FileSet",
        )
    for records in card["recordSet"]:
        assert {key["@id"] for key in records["key"]} <= fields
        for field in records["field"]:
            assert field["dataType"] in ("sc:Text", "sc:Integer", "sc:Float", "sc:DateTime")
            (place,) = (field["source"][name]["@id"] for name in ("fileObject", "fileSet") if name in field["source"])
            assert place in resources
            assert field["source"]["extract"]["column"] == field["name"]
            if "references" in field:
                assert field["references"]["field"]["@id"] in fields


def test_the_columns_are_those_of_the_contracts_and_of_the_labels() -> None:
    columns = {records["name"]: [field["name"] for field in records["field"]] for records in croissant()["recordSet"]}
    for table in ("records", "segments", "splits"):
        assert columns[table] == list(contract(table)["columns"])
        assert (CONTRACTS / f"{table}.yaml").is_file()
    assert columns["labels"] == ["record_id", *SPACE.names]
    fields = {field["@id"]: field for records in croissant()["recordSet"] for field in records["field"]}
    assert fields["records/lead_mean_mv"]["repeated"] is True
    assert "repeated" not in fields["records/record_id"]
    assert "train: 30 positive, 70 negative, 1 unknown" in fields["labels/atrial_fibrillation"]["description"]
    assert "positive" not in fields["labels/atrial_flutter"]["description"]  # in no split: not counted


def test_numbers_are_numbers() -> None:
    space = LabelSpace((Label("age_years", ("age_years",), "mean", {}, "years"),), {}, "regression")
    card = json.loads(data_card(replace(data(), columns=space, used=space), metrics()["cohort"]))
    (field,) = (one for records in card["recordSet"] for one in records["field"] if one["@id"] == "labels/age_years")
    assert field["dataType"] == "sc:Float"
    assert "(years)" in field["description"]


def test_the_digest_of_many_files_is_that_of_theirs_whatever_their_names() -> None:
    given = data()
    hashes = sorted(one["files"]["shard.h5"]["sha256"] for one in given.slices)
    assert len(hashes) == 3
    (shards,) = (one for one in croissant()["distribution"] if one["@id"] == "all/shard.h5")
    assert shards["sha256"] == hashlib.sha256("".join(f"{one}\n" for one in hashes).encode()).hexdigest()
    assert shards["includes"] == "prepare/*/shard.h5"
    assert "3 files, 54 bytes" in shards["description"]
    (splits,) = (
        one
        for one in croissant()["distribution"]
        if one["contentUrl" if "contentUrl" in one else "@id"] == "splits/splits.parquet"
    )
    assert splits["sha256"] == given.tables["splits"]["files"]["splits.parquet"]["sha256"]


def test_no_card_names_a_folder_of_recordings_which_may_be_a_persons() -> None:
    for _, content in cards(model(), data(), metrics()).values():
        assert "Jane" not in content


def test_equal_facts_give_equal_bytes_in_another_order_of_slices_too() -> None:
    once, again = cards(model(), data(), metrics()), cards(model(), data(), metrics())
    assert once == again
    turned = replace(data(), slices=data().slices[::-1])
    assert data_card(turned, metrics()["cohort"]) == once["data_card.json"][1]
    assert list(once) == ["model_card.md", "data_card.json"]
    assert not re.search(r"20\d\d-\d\d-\d\d", once["data_card.json"][1])
