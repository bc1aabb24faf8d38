"""The compatible mode of the report labeler with the published pattern files: the reference's own output on 1,351
reports, and cases worked by hand. Skipped where these are not at hand."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from ecgfm.reports.ecg_fm import EcgFmLabeler, read_patterns

FINETUNED_ON = (
    "Poor data quality",
    "Sinus rhythm",
    "Premature ventricular contraction",
    "Tachycardia",
    "Ventricular tachycardia",
    "Supraventricular tachycardia with aberrancy",
    "Atrial fibrillation",
    "Atrial flutter",
    "Bradycardia",
    "Accessory pathway conduction",
    "Atrioventricular block",
    "1st degree atrioventricular block",
    "Bifascicular block",
    "Right bundle branch block",
    "Left bundle branch block",
    "Infarction",
    "Electronic pacemaker",
)
"""The 17 labels of MIMIC-IV-ECG that the published model has."""


@pytest.fixture(scope="module")
def labeler(shared: Path) -> EcgFmLabeler:
    return EcgFmLabeler(read_patterns(shared / "labeler" / "ecgfm-patterns"))


@pytest.fixture(scope="module")
def reports(shared: Path) -> list[dict[str, str]]:
    """report_id, report, normalised, unmatched: of the reference."""
    with (shared / "golden" / "labeler" / "reports.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def golden(shared: Path, reports: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    """report_id -> label -> probability, of the reference; empty where it gave none."""
    found: dict[str, dict[str, float]] = {row["report_id"]: {} for row in reports}
    with (shared / "golden" / "labeler" / "labels.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found[row["report_id"]][row["name"]] = float(row["prob"])
    return found


def equal(found: dict[str, float], expected: dict[str, float]) -> bool:
    return found == pytest.approx(expected, abs=1e-9)


def labels(certain: str = "", **doubtful: str) -> dict[str, float]:
    """Names with a semicolon between them: certain those of probability 1; others by their decimals, p65 is 0.65."""
    found = dict.fromkeys(filter(None, certain.split("; ")), 1.0)
    for probability, names in doubtful.items():
        found |= dict.fromkeys(names.split("; "), float("0." + probability.removeprefix("p")))
    return found


def test_every_normalised_report_has_the_labels_of_the_reference(
    labeler: EcgFmLabeler, reports: list[dict[str, str]], golden: dict[str, dict[str, float]]
) -> None:
    differ = [
        r["report_id"] for r in reports if not equal(labeler.probabilities(r["normalised"]), golden[r["report_id"]])
    ]
    assert differ == []
    assert len(reports) == 1351
    assert sum(map(len, golden.values())) > 10_000
    assert sum(not found for found in golden.values()) == 52


def test_what_no_pattern_matches_is_that_of_the_reference(labeler: EcgFmLabeler, reports: list[dict[str, str]]) -> None:
    assert [labeler.unmatched(row["normalised"]) for row in reports] == [row["unmatched"] for row in reports]


def test_raw_reports_get_the_labels_of_the_reference_by_rules_of_our_own(
    labeler: EcgFmLabeler, reports: list[dict[str, str]], golden: dict[str, dict[str, float]]
) -> None:
    found = labeler.read_all(row["report"] for row in reports)
    expected = [golden[row["report_id"]] for row in reports]
    same_text = [reading.normalised == row["normalised"] for reading, row in zip(found, reports, strict=True)]
    same = [equal(reading.probabilities, wanted) for reading, wanted in zip(found, expected, strict=True)]

    def of_17(given: dict[str, float]) -> dict[str, float]:
        return {name: p for name, p in given.items() if name in FINETUNED_ON}

    same_17 = [equal(of_17(r.probabilities), of_17(wanted)) for r, wanted in zip(found, expected, strict=True)]
    assert sum(same_17) == len(reports)
    assert sum(same) >= 0.995 * len(reports)
    assert sum(same_text) >= 0.995 * len(reports)
    assert all(any(name in wanted for wanted in expected) for name in set(FINETUNED_ON) - {"Bifascicular block"})


def test_reading_with_spans_gives_the_same_labels_and_spans_within_the_report(
    labeler: EcgFmLabeler, reports: list[dict[str, str]]
) -> None:
    for row in reports[::9]:
        found = labeler.read(row["report"])
        assert {a.label: a.probability for a in found} == labeler.probabilities(labeler.normalise(row["report"]))
        assert all(0 <= a.start < a.end <= len(row["report"]) for a in found)
        assert {a.label for a in found} <= set(labeler.labels)


TACHYCARDIA = "Tachycardia; High heart rate; Arrhythmia"
EXTRA_BEATS = (
    "Premature ventricular contraction; Ectopic ventricular contraction; Premature contraction; Ectopic contraction"
)
MULTIPLE_EXTRA_BEATS = "; ".join(f"{name} - Multiple" for name in EXTRA_BEATS.split("; "))

TRACES: dict[str, dict[str, float]] = {
    # doubt that nothing heeds, as there is no connective
    "0": labels("Sinus rhythm; Right atrial abnormality; Abnormal electrocardiogram"),
    # "with" heeds it; many beats climb; an attached infarct lifts the infarct it is of
    "4": labels(
        f"Infarction - Possible; Infarction - Septal; Sinus tachycardia; Sinus rhythm; {TACHYCARDIA}; {EXTRA_BEATS}; "
        f"{MULTIPLE_EXTRA_BEATS}; Ectopy",
        p5="Septal infarction",
        p65="Infarction; Septal injury",
        p755="Injury; Septal ischemia",
        p8285="Ischemia",
    ),
    # an entity that is a label only with descriptors, its own and others'
    "38": labels("R wave - Long; R wave - Probable; R wave - V1; R wave - V2"),
    "220": labels(
        "T wave abnormality; Nonspecific T wave abnormality; T wave abnormality - Multiple; "
        "T wave abnormality - Nonspecific; T wave abnormality - Inferior; T wave abnormality - Lateral"
    ),
    # what cannot be ruled out needs correlation, for certain
    "512": labels(
        "ST-T wave abnormality - Rule out; ST-T wave abnormality - Inferior; ST-T wave abnormality - Anterior; "
        "Needs clinical correlation; Slow ventricular response",
        p5="ST-T wave abnormality",
        p65="ST wave abnormality; T wave abnormality",
    ),
    # acute climbs from the infarct to what is above it
    "522": labels(
        "Needs clinical correlation; Infarction - Acute; Infarction - Anterior; Infarction - Lateral; "
        "Infarction - Rule out; Injury - Acute; Ischemia - Acute; T wave abnormality; T wave abnormality - Acute; "
        "T wave abnormality - Inferior; T wave abnormality - Anterior; T wave abnormality - Multiple",
        p5="Infarction, acute; Anterior infarction; Lateral infarction",
        p65="Infarction; Acute coronary syndrome; Anterior injury; Lateral injury",
        p755="Anterior ischemia; Lateral ischemia; Injury",
        p8285="Ischemia",
    ),
    # a place that jumps over a full stop to the next entity
    "796": labels(
        "Atrioventricular sequential pacing; Atrioventricular sequential pacing - Precordial lead; "
        "Q wave - Multiple; Q wave - Probable; Q wave - Septal; Low QRS voltage; Dual-chamber pacing; Atrial pacing; "
        "Ventricular pacing; Electronic pacemaker; ST-T wave abnormality; ST-T wave abnormality - Severe; "
        "ST wave abnormality; T wave abnormality"
    ),
    # of patterns of one length the earlier in the file: "t wave" before "tall t"
    "842": labels(
        "4:1 conduction ratio; High grade atrioventricular block; Incomplete atrioventricular block; "
        "2nd degree atrioventricular block; Atrioventricular block; Atrioventricular conduction delay; "
        "Conduction block; Conduction delay; Conduction defect; Slow ventricular response"
    ),
    # the absence of an ECG, and hypertrophy in two doubts
    "1037": labels(
        f"Ventricular hypertrophy - Possible; Ventricular hypertrophy - Probable; Ischemia - Probable; Sinus rhythm; "
        f"Prolonged QT interval; {EXTRA_BEATS}; Ectopy",
        p5="Ventricular hypertrophy",
        p65="Hypertrophy",
        p7="Ischemia",
    ),
    # "or" doubts the sinus rhythm at the other end of the report
    "1298": labels(
        "Ischemia - Possible; Ischemia - Probable; Ischemia - Ventricular; Sinus rhythm - Probable",
        p5="Ischemia",
        p7="Sinus rhythm",
    ),
}


@pytest.mark.parametrize("report_id", TRACES)
def test_a_report_worked_by_hand(labeler: EcgFmLabeler, reports: list[dict[str, str]], report_id: str) -> None:
    [normalised] = [row["normalised"] for row in reports if row["report_id"] == report_id]
    assert labeler.probabilities(normalised) == pytest.approx(TRACES[report_id], abs=1e-9)


def test_what_is_said_goes_to_the_neighbours_and_not_to_others(
    labeler: EcgFmLabeler, reports: list[dict[str, str]]
) -> None:
    text = {row["report_id"]: row["normalised"] for row in reports}
    found = labeler.probabilities(text["1084"])
    waves = {name for name in found if name.startswith("T wave")}
    assert waves == {f"T wave - {said}" for said in ("Probable", "Normal", "Variant", "Nonspecific", "V2")}
    assert set(found.values()) == {1.0}
    assert len(found) == 20
    found = labeler.probabilities(text["1094"])
    assert (found["Bifascicular block"], found["Fascicular block"], found["Atrioventricular block"]) == (1, 1, 1)
    assert len(found) == 14
    assert labeler.unmatched(text["38"]) == "   '  leads"


INFARCT = "Infarction; Injury; Ischemia"

CASES: dict[str, dict[str, float]] = {
    # the super of an infarct that is said to be absent outbids a possible ischemia
    "without infarct and possible ischemia": labels(f"{INFARCT}; Ischemia - Possible"),
    "possible pattern with infarct": labels(INFARCT),
    "possible; sinus rhythm. with infarct": labels(f"Sinus rhythm - Possible; {INFARCT}", p5="Sinus rhythm"),
    "infarct or": labels("Infarction - Probable", p7="Infarction", p79="Injury", p853="Ischemia"),
    "check ischemia with infarct": labels(f"Ischemia - Assess; Needs clinical correlation; {INFARCT}"),
    "biatrial enlargement or infarct": labels(
        "Left atrial enlargement - Probable; Right atrial enlargement - Probable; Infarction - Probable",
        p7="Left atrial enlargement; Right atrial enlargement; Infarction",
        p79="Injury",
        p853="Ischemia",
    ),
    "right bundle branch block with possible sinus tachycardia": labels(
        f"Sinus tachycardia - Possible; Supraventricular tachycardia with aberrancy; {TACHYCARDIA}; "
        "Supraventricular rhythm",
        p5="Sinus tachycardia",
        p65="Sinus rhythm",
    ),
    "possible variable atrioventricular block with ischemia": labels(
        "",
        p5="Variable atrioventricular block",
        p65="2nd degree atrioventricular block",
        p755="Incomplete atrioventricular block",
        p8285="Atrioventricular block",
        p87995="Conduction block",
        p915965="Conduction defect",
    ),
}


@pytest.mark.parametrize("text", CASES)
def test_a_case_that_no_golden_report_has(labeler: EcgFmLabeler, text: str) -> None:
    found = labeler.probabilities(text)
    if text.startswith(("right bundle", "possible variable", "biatrial")):  # what else follows is not at stake
        found = {name: probability for name, probability in found.items() if name in CASES[text]}
    assert found == pytest.approx(CASES[text], abs=1e-9)


def test_a_paroxysm_is_heeded_only_with_a_connective(labeler: EcgFmLabeler) -> None:
    name = "Paroxysmal supraventricular tachycardia"
    assert name not in labeler.probabilities("paroxysmal supraventricular tachycardia")
    assert labeler.probabilities("paroxysmal supraventricular tachycardia with ischemia")[name] == 1.0


def test_descriptors_alone_give_nothing(labeler: EcgFmLabeler) -> None:
    assert labeler.probabilities("ecg with possible") == {}


def test_both_mends_together_take_denied_findings_away(labeler: EcgFmLabeler) -> None:
    mended = EcgFmLabeler(labeler.patterns, gate=True, negation=True)
    assert mended.probabilities("sinus rhythm. without infarct.") == {"Sinus rhythm": 1.0}
    assert mended.probabilities("possible infarct")["Infarction"] == 0.5
    assert labeler.probabilities("possible infarct")["Infarction"] == 1.0
