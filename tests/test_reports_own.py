"""The labeler's own mode. `reports/reviewed.csv` holds reports with what they assert, most specific findings only."""

from __future__ import annotations

import ast
import csv
import random
import re
import string
import time
from collections import Counter
from functools import cache
from pathlib import Path

import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ecgfm.ecg import InputError
from ecgfm.labels import CHALLENGE_2021
from ecgfm.reports.assertion import Assertion
from ecgfm.reports.own import CACHED, OwnLabeler
from ecgfm.reports.vocabulary import Vocabulary
from ecgfm.sources.ptb_xl import codes_of

RANK = {"absent": 0, "uncertain": 1, "present": 2}

STATEMENTS = (
    "Sinus rhythm",
    "Atrial fibrillation with rapid ventricular response",
    "No evidence of acute ischemia or infarction",
    "Possible left ventricular hypertrophy",
    "Inferior infarct, age undetermined",
    "Right and left atrial enlargement",
    "T waves are low or flat in I, aVL, V5,6",
    "ST elevation is no longer present",
    "Lateral ischemia cannot be excluded",
    "Sinusrhythmus, Linkstyp, kein Hinweis auf Hypertrophie",
    "Previous ECG showed atrial flutter",
    "Q waves in II, III, aVF consistent with old inferior infarction",
    "Left bundle branch block or paced rhythm",
)


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary.read()


@cache
def labeler(label_set: str | None = None) -> OwnLabeler:
    return OwnLabeler(vocabulary(), label_set)


def statuses(report: str, label_set: str | None = None) -> dict[str, str]:
    return {assertion.label: assertion.status for assertion in labeler(label_set).read(report)}


def most_specific(assertions: list[Assertion]) -> dict[str, str]:
    """Without what follows from a more specific finding that holds at least as surely."""
    given = {assertion.label: assertion.status for assertion in assertions}
    implied = {
        above
        for label, status in given.items()
        if status != "absent"
        for above in vocabulary().ancestors(label)
        if above != label and given[above] != "absent" and RANK[given[above]] <= RANK[status]
    }
    return {label: status for label, status in given.items() if label not in implied}


def reviewed() -> list[tuple[str, dict[str, str]]]:
    with (Path(__file__).parent / "reports" / "reviewed.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["report"], row["expected"]) for row in csv.DictReader(file)]
    return [(report, dict(e.rsplit("=", 1) for e in expected.split("; ") if e)) for report, expected in rows]


def test_every_reviewed_report_is_read_as_reviewed() -> None:
    rows = reviewed()
    assert len(rows) >= 300
    named = {label for _, expected in rows for label in expected}
    assert named <= set(vocabulary().findings)
    assert len(named) > 100
    wrong = {
        report: (expected, got)
        for report, expected in rows
        if (got := most_specific(labeler().read(report))) != expected
    }
    assert wrong == {}


def test_the_reviewed_reports_have_every_status_and_every_act_of_a_cue() -> None:
    rows = reviewed()
    for status in RANK:
        assert sum(status in expected.values() for _, expected in rows) > 30
    did = {did for report, _ in rows for s in labeler().explain(report) for r in s.readings for did, _ in r.cues}
    assert did >= {"denied by", "doubted by", "affirmed by", "only supposed:", "of an earlier time:", "asked about:"}


@pytest.mark.parametrize(
    ("report", "label", "words"),
    [
        ("Sinus rhythm. No evidence of Atrial  Fibrillation", "Atrial fibrillation", "Atrial  Fibrillation"),
        ("linkstyp. VENTRIKULÄRE EXTRASYSTOLE(N)", "Premature ventricular contraction", "VENTRIKULÄRE EXTRASYSTOLE"),
        ("x; ST segments are depressed in V4,5,6", "ST depression", "ST segments are depressed"),
        ("\u0130 Größe \u2013 possible LVH", "Left ventricular hypertrophy", "LVH"),
    ],
)  # fmt: skip
def test_the_span_is_that_of_the_words_in_the_report_as_given(report: str, label: str, words: str) -> None:
    (assertion,) = [a for a in labeler().read(report) if a.label == label]
    assert report[assertion.start : assertion.end] == words


def test_labels_come_in_the_order_of_the_set_and_each_once() -> None:
    for label_set in (None, *vocabulary().label_sets):
        reader = labeler(label_set)
        for report in STATEMENTS:
            at = [reader.labels.index(assertion.label) for assertion in reader.read(report)]
            assert at == sorted(set(at))


def test_parents_follow_what_is_present_or_uncertain_but_not_what_is_absent() -> None:
    assert statuses("Sinus bradycardia")["Bradycardia"] == "present"
    assert statuses("Possible sinus bradycardia")["Bradycardia"] == "uncertain"
    assert statuses("No sinus bradycardia") == {"Sinus bradycardia": "absent"}
    for report in STATEMENTS:
        got = statuses(report)
        for label, status in got.items():
            for above in vocabulary().ancestors(label) if status != "absent" else ():
                assert RANK[got[above]] >= RANK[status]


def test_what_is_overruled_takes_nothing_else_with_it() -> None:
    """Neither what another finding of the same statement is a kind of, nor that finding."""
    for machine in ("Septal infarct, inferior infarct", "Septal infarct; inferior infarct"):
        got = statuses(f"{machine}. Disagree with septal infarct")
        assert (got["Septal infarction"], got["Inferior infarction"], got["Infarction"]) == (
            "absent",
            "present",
            "present",
        )
    assert "Infarction" not in statuses("Septal infarct. Disagree with septal infarct")


def test_present_holds_over_uncertain_and_uncertain_over_absent() -> None:
    said = {"present": "Atrial fibrillation.", "uncertain": "Possible atrial fibrillation.", "absent": "No AF."}
    for a, first in said.items():
        for b, second in said.items():
            assert statuses(f"{first} {second}")["Atrial fibrillation"] == max(a, b, key=RANK.__getitem__)


def test_of_two_doubts_the_more_probable_holds() -> None:
    def probability(report: str) -> float:
        return {a.label: a.probability for a in labeler().read(report)}["Pericarditis"]

    assert probability("Possible pericarditis") < probability("Probable pericarditis")
    assert probability("Probable pericarditis. Possible pericarditis.") == probability("Probable pericarditis")
    assert probability("Cannot rule out pericarditis") < probability("Possible pericarditis")
    assert probability("Pericarditis") == 1
    assert probability("No pericarditis") == 0


def test_findings_that_others_make_together_are_as_sure_as_the_least_sure() -> None:
    assert statuses("RBBB. Left anterior fascicular block.")["Bifascicular block"] == "present"
    assert statuses("RBBB. Possible left anterior fascicular block.")["Bifascicular block"] == "uncertain"
    assert "Bifascicular block" not in statuses("RBBB. No left anterior fascicular block.")
    assert statuses("RBBB; LAFB", "ecg-fm-17")["Bifascicular block"] == "present"


def test_in_a_label_set_an_absent_finding_denies_the_labels_below_it() -> None:
    got = statuses("No bundle branch block", "ecg-fm-17")
    assert got == {"Right bundle branch block": "absent", "Left bundle branch block": "absent"}
    assert statuses("No incomplete right bundle branch block", "ecg-fm-17") == {}


def test_a_label_may_leave_out_kinds_of_its_findings() -> None:
    assert statuses("Sinus rhythm", "challenge-2021") == {"sinus rhythm": "present"}
    assert "sinus rhythm" not in statuses("Sinus bradycardia", "challenge-2021")
    assert statuses("Incomplete RBBB", "challenge-2021").keys() == {
        "incomplete right bundle branch block",
        "bundle branch block",
    }


def test_the_label_sets_have_the_labels_they_are_named_for() -> None:
    assert len(vocabulary().label_sets["ecg-fm-17"]) == 17
    assert list(vocabulary().label_sets["challenge-2021"]) == [name for name, _ in CHALLENGE_2021]
    assert list(vocabulary().label_sets["ptb-xl-super"]) == ["NORM", "MI", "STTC", "CD", "HYP"]
    names = "|".join(labeler("ecg-fm-17").labels).lower().split("|")
    for name in names:
        assert {label.lower(): s for label, s in statuses(name, "ecg-fm-17").items()}[name] == "present"
    for name, _ in CHALLENGE_2021:
        assert statuses(name, "challenge-2021")[name] == "present"


def test_an_unknown_label_set_is_named() -> None:
    with pytest.raises(InputError, match="no label set challenge; label sets: ecg-fm-17"):
        OwnLabeler(vocabulary(), "challenge")


def test_what_nothing_explains_is_reported_where_it_stands() -> None:
    report = "Sinus rhythm with frobnicated zyxwv, and no quuxly ischemia."
    assert labeler().unmatched(report) == [("frobnicated zyxwv", 18, 35), ("quuxly", 44, 50)]
    assert labeler().unmatched("Sinus rhythm, possible old inferior infarct.") == []


def test_an_explanation_names_the_words_the_cue_and_what_they_made() -> None:
    (statement,) = labeler().explain("Cannot rule out old inferior infarct")
    by_name = {reading.finding: reading for reading in statement.readings}
    assert by_name.keys() == {"Old infarction", "Inferior infarction"}
    assert by_name["Old infarction"].cues == (("doubted by", "Cannot rule out"),)
    assert by_name["Old infarction"].describing == ("old", "inferior")
    assert by_name["Old infarction"].rule == ("'infarct' (old, inferior): Old infarction; doubted by 'Cannot rule out'")
    (above,) = [a for a in labeler().read("Cannot rule out old inferior infarct") if a.label == "Infarction"]
    assert above.rule.endswith("a kind of Infarction")


def test_what_a_verb_says_of_a_part_is_no_cue() -> None:
    """As "is negative" once was one, so that "T waves are inverted", the same word here, was denied."""
    terms = vocabulary().terms
    qualities = {phrase for phrase, term in terms.items() if term.kind == "quality"}
    assert not [
        f"{verb} {quality}"
        for verb in ("is", "are", "was", "were")
        for quality in qualities
        if f"{verb} {quality}" in terms
    ]
    assert statuses("T waves are inverted in V1 through V3")["T wave inversion"] == "present"


def test_a_misspelt_word_is_read_as_the_one_it_is_a_slip_from() -> None:
    for report in ("atrial fibrilation", "atrial fibrillatoin", "atrial fibrillaton", "atriel fibrillation"):
        expected = "atriel" not in report  # short words are left as they are
        assert ("Atrial fibrillation" in statuses(report)) == expected
    assert statuses("functional rhythm") == {}  # another word, though one letter from "junctional"


# ---- properties


@given(st.permutations(STATEMENTS))
@settings(max_examples=50, deadline=None)
def test_the_order_of_statements_does_not_matter(statements: list[str]) -> None:
    assert statuses(". ".join(statements)) == statuses(". ".join(STATEMENTS))


@given(st.lists(st.sampled_from(STATEMENTS), min_size=1, max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_case_blanks_and_the_last_sign_do_not_matter(statements: list[str], rng: random.Random) -> None:
    report = "; ".join(statements)
    """A line that begins as a sentence does begins a statement; any other goes on."""
    cased = "".join(rng.choice((c.lower(), c.upper())) for c in report)
    blanks = re.sub(" (.)", lambda blank: rng.choice((" ", "  ", "\t ", "\n", "\r\n")) + blank[1], cased)
    blanks = re.sub(r"(?<=\n)\w+", lambda word: rng.choice((word[0].lower(), word[0].upper())), blanks)
    assert statuses(rng.choice(("", " ", "\n")) + blanks + rng.choice(("", ".", ";", "!", " . ", "\n"))) == statuses(
        report
    )


@given(
    st.lists(st.sampled_from(STATEMENTS), max_size=4),
    st.sampled_from(("No {}", "no evidence of {}", "{} is not seen", "{} is ruled out", "without {}", "kein {}")),
    st.sampled_from(("atrial flutter", "LBBB", "pericarditis", "old anterior MI", "T wave inversion", "RVH or AF")),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_a_denied_finding_adds_no_label_that_holds(statements: list[str], denial: str, finding: str) -> None:
    before, after = ". ".join(statements), ". ".join([*statements, denial.format(finding)])
    for label_set in (None, "ecg-fm-17"):
        held = {label: status for label, status in statuses(before, label_set).items() if status != "absent"}
        holds = {label: status for label, status in statuses(after, label_set).items() if status != "absent"}
        assert holds == held


@given(
    st.lists(st.text(string.ascii_lowercase, min_size=5, max_size=12), max_size=12), st.sampled_from((" ", ", ", ". "))
)
@settings(max_examples=200, deadline=None)
def test_unknown_words_assert_nothing(words: list[str], between: str) -> None:
    spelling = vocabulary().spelling
    assume(not any(spelling.word(word) in spelling.known for word in words))
    assert labeler().read(between.join(words)) == []


@given(st.text(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_text_can_be_read_and_spans_lie_in_it(text: str) -> None:
    for assertion in labeler().read(text):
        assert 0 <= assertion.start < assertion.end <= len(text)
    for words, start, end in labeler().unmatched(text):
        assert text[start:end] == words


@given(st.lists(st.sampled_from(sorted(vocabulary().terms)), max_size=8), st.sampled_from((" ", ", ", "; ")))
@settings(max_examples=300, deadline=None)
def test_any_phrases_can_be_read_together_and_reading_again_says_the_same(phrases: list[str], between: str) -> None:
    report = between.join(phrases)
    first = OwnLabeler(vocabulary(), "ecg-fm-17") if len(phrases) == 8 else labeler("ecg-fm-17")
    assert first.read(report) == first.read(report) == labeler("ecg-fm-17").read(report)


# ---- speed

_RNG = random.Random(0)
ADVERSARIAL = {
    "denials": "no " * 33_000,
    "a part and no quality": "t wave " * 14_000,
    "parts linked": "pr and " * 14_000,
    "alternatives": "atrial fibrillation or " * 4_500,
    "a list": "infarct, " * 11_000,
    "leads": "v1,2,3," * 14_000,
    "conditions": "if infarct " * 9_000,
    "halves": "left or " * 12_500,
    "ages": "old and " * 12_500,
    "commas": "," * 100_000,
    "questions": "?" * 100_000,
    "brackets": "(" * 100_000,
    "hyphens": "a-" * 50_000,
    "line ends": "\n" * 100_000,
    "one word": "a" * 100_000,
    "ratios": "1:1." * 25_000,
    "misspelt": " ".join("".join(_RNG.choices(string.ascii_lowercase, k=9)) for _ in range(10_000)),
    "all sorts": " ".join(_RNG.choices([w for s in STATEMENTS for w in (*s.split(), "no", ",")], k=16_000)),
}  # fmt: skip


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_time_grows_with_the_length_of_a_text_and_no_faster(name: str) -> None:
    text = ADVERSARIAL[name][:100_000]
    started = time.process_time()
    OwnLabeler(vocabulary()).read(text)
    assert time.process_time() - started < 1


def test_what_was_read_is_kept_only_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CACHED > 1000
    monkeypatch.setattr("ecgfm.reports.own.CACHED", 10)
    reader = OwnLabeler(vocabulary())
    for k in range(35):
        assert reader.read(f"Sinus rhythm at {k} per minute")
        assert len(reader._known) <= 10
    reader.read("sinus rhythm " * 1000)
    assert max(map(len, reader._known)) < 1000


# ---- real reports

NEUTRAL = {"delete", "delete_all"}
"""What MIMIC-IV-ECG's statements hold that asserts nothing."""


def test_every_statement_of_mimic_iv_ecg_is_understood(shared: Path) -> None:
    table = pl.read_csv(shared / "data" / "reports" / "mimic_statements_total_label_set.csv")
    statements = [statement.strip() for statement in table["total_label"]]
    assert len(statements) == 345
    assert {statement for statement in statements if not labeler().read(statement)} == NEUTRAL
    assert {statement: left for statement in statements if (left := labeler().unmatched(statement))} == {}


# superclass: (precision, recall, F1 on texts that four or more records share) that must be reached; docs/labeler.md has
# what was measured, and says what the reference is
PTB_XL = {
    "NORM": (0.50, 0.38, 0.52),
    "MI": (0.83, 0.83, 0.83),
    "STTC": (0.69, 0.80, 0.79),
    "CD": (0.76, 0.73, 0.55),
    "HYP": (0.53, 0.65, 0.66),
}


def test_ptb_xl_superclasses_are_found_in_its_reports(shared: Path) -> None:
    """Reports in German, English and Swedish; the text after "Edit:", where the codes stand by hand, is cut."""
    table = pl.read_csv(shared / "data" / "reports" / "ptbxl_reports.csv")
    texts = [(report or "").partition("Edit:")[0] for report in table["report"]]
    times = Counter(texts)
    assert sum(n >= 4 for n in times.values()) == 207
    reader = labeler("ptb-xl-super")
    counts, shared_counts = ({name: [0, 0, 0] for name in PTB_XL} for _ in range(2))
    for text, codes in zip(texts, table["scp_codes"], strict=True):
        found = {assertion.label for assertion in reader.read(text) if assertion.status != "absent"}
        given = {code.partition(":")[2] for code in codes_of(ast.literal_eval(codes)) if code.startswith("superdiag")}
        for one in (counts, shared_counts) if times[text] >= 4 else (counts,):
            for name, count in one.items():
                count[0] += name in found and name in given
                count[1] += name in found
                count[2] += name in given
    reached = {}
    for name, (both, found_in, given_in) in counts.items():
        both_shared, *either = shared_counts[name]
        reached[name] = (both / found_in, both / given_in, 2 * both_shared / sum(either))
    short = {
        name: reached[name]
        for name, least in PTB_XL.items()
        if any(value < floor for value, floor in zip(reached[name], least, strict=True))
    }
    assert short == {}
