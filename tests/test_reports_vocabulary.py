"""What the report labeler knows, and the mistakes of a user's own file."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest

from ecgfm.ecg import InputError
from ecgfm.labels import CHALLENGE_2021
from ecgfm.reports.own import OwnLabeler
from ecgfm.reports.statements import fold, split
from ecgfm.reports.vocabulary import Vocabulary
from ecgfm.sources.ptb_xl import STATEMENTS


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.read()


def written(folder: Path, text: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def status(reader: OwnLabeler, report: str, label: str) -> str | None:
    return {assertion.label: assertion.status for assertion in reader.read(report)}.get(label)


# ---- ours


def test_every_snomed_code_is_whole_and_given_once(vocabulary: Vocabulary) -> None:
    codes = [finding.snomed for finding in vocabulary.findings.values() if finding.snomed]
    assert len(codes) > 90
    assert len(set(codes)) == len(codes)
    assert [code for code in codes if not has_check_digit(code)] == []
    assert not has_check_digit("164889004")


def test_the_findings_of_the_challenge_have_its_codes(vocabulary: Vocabulary) -> None:
    labels = vocabulary.label_sets["challenge-2021"]
    for name, codes in CHALLENGE_2021:
        findings = {below for finding in labels[name].any_of for below in vocabulary.descendants(finding)}
        assert {vocabulary.findings[finding].snomed for finding in findings} & set(codes), name


def test_the_statements_of_ptb_xl_are_named_as_it_names_them(vocabulary: Vocabulary) -> None:
    assert set(vocabulary.label_sets["ptb-xl-statements"]) <= {statement.code for statement in STATEMENTS}


def test_every_finding_can_be_said(vocabulary: Vocabulary) -> None:
    said = {term.name for term in vocabulary.terms.values() if term.kind == "finding"} | {*vocabulary.forms.values()}
    silent = set(vocabulary.findings) - said
    assert silent == set()


def test_a_finding_has_no_ancestor_twice_in_a_line(vocabulary: Vocabulary) -> None:
    for name in vocabulary.findings:
        ancestors = vocabulary.ancestors(name)
        assert next(iter(ancestors)) == name
        assert all(parent in ancestors for parents in ancestors.values() for parent in parents)
        assert all(name in vocabulary.descendants(above) for above in ancestors)


def test_an_unknown_finding_is_named_with_one_like_it(vocabulary: Vocabulary) -> None:
    with pytest.raises(InputError, match="no finding is called LBBB; did you mean Left bundle branch block"):
        vocabulary.descendants("LBBB")
    with pytest.raises(InputError, match="no finding is called Atrial fibrilation; did you mean Atrial fibrillation"):
        vocabulary.ancestors("Atrial fibrilation")


def test_it_is_read_at_once() -> None:
    started = time.process_time()
    OwnLabeler(Vocabulary.read())
    assert time.process_time() - started < 1  # 0.2 s on an idle machine


# ---- a user's own


def test_a_users_finding_is_added_and_ours_grow(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        """
        words:
          frobnication: [frobnikation]
        findings:
          Frobnication:
            snomed: "1"
            parents: [Arrhythmia]
            phrases: [<mild |>frobnication]
          Atrial fibrillation:
            phrases: [wobbly atrium]
        cues:
          fairy:
            acts: doubts
            reach: following
            probability: "0.2"
            phrases: [a fairy told me of]
        label_sets:
          mine:
            F: [Frobnication]
            no rhythm: {any_of: [Arrhythmia], but_not: [Frobnication]}
        """,
    )
    reader = OwnLabeler(Vocabulary.read(file))
    assert status(reader, "Frobnikation noted", "Arrhythmia") == "present"
    assert status(reader, "wobbly atrium, afib", "Atrial fibrillation") == "present"
    (assertion,) = [a for a in reader.read("a fairy told me of pericarditis") if a.label == "Pericarditis"]
    assert (assertion.status, assertion.probability) == ("uncertain", 0.2)
    mine = OwnLabeler(Vocabulary.read(file), "mine")
    assert mine.labels == ("F", "no rhythm")
    assert {a.label for a in mine.read("mild frobnication")} == {"F"}


def test_a_phrase_can_be_taken_away_and_given_to_another(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        """
        findings:
          Left axis deviation:
            drop: [lad]
          Myocardial ischemia:
            phrases: [lad]
        """,
    )
    reader = OwnLabeler(Vocabulary.read(file))
    assert status(reader, "LAD", "Left axis deviation") is None
    assert status(reader, "LAD", "Myocardial ischemia") == "present"
    assert status(reader, "marked left axis deviation", "Left axis deviation") == "present"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "findings:\n  A:\n    parents: [B]\n  B:\n    parents: [C]\n  C:\n    parents:\n      - A\n",
            r"mine\.yaml:8: a circle of parents: .* take one of them out",
        ),
        (
            "findings:\n  Arrhythmia:\n    parents: [Atrial fibrillation]\n",
            r"mine\.yaml:3: a circle of parents: .*Atrial arrhythmia",
        ),
        (
            "findings:\n  A:\n    phrases: [aaa]\n    parents:\n      - Arrythmia\n",
            r"mine\.yaml:5: A: parents: no finding is called Arrythmia; did you mean Arrhythmia",
        ),
        (
            "findings:\n  A:\n    phrases:\n      - aaaa\n      - af\n",
            r"mine\.yaml:5: the phrase 'af' .* A, but means the finding Atrial fibrillation at findings\.yaml:\d+",
        ),
        (
            "findings:\n  A:\n    phrases: [qqq]\n  B:\n    phrases: [aaa, qqq]\n",
            r"mine\.yaml:5: the phrase 'qqq' .* at \S*mine\.yaml:3",
        ),
        ("findings:\n  A:\n    phrase: [aaa]\n", r"mine\.yaml:3: A: unknown key phrase; did you mean phrases\?"),
        ("finding:\n  A: [aaa]\n", r"mine\.yaml:1: unknown section finding; did you mean findings\?"),
        ("findings:\n  A: [aaa]\n  A: [bbb]\n", r"mine\.yaml:3: A stands here and at \S*mine\.yaml:2; keep one"),
        ("findings:\n  A:\n    phrases: aaa\n", r"mine\.yaml:3: expected a list"),
        ("findings: [A]\n", r"mine\.yaml:1: expected names with a colon, found a list"),
        ("findings:\n  A:\n    phrases: [<a|b]\n", r"mine\.yaml:3: '<a\|b': expected alternatives as <one\|other>"),
        ("findings:\n  A:\n    phrases: ['" + "<a|b|c>" * 6 + "']\n", r"mine\.yaml:3: .*more than 400 phrases"),
        (
            "findings:\n  A:\n    made_of: [[T wave, inferior]]\n",
            r"mine\.yaml:3: A: made_of: T wave is a part, so expected a quality",
        ),
        (
            "findings:\n  A:\n    made_of: [[T wafe, inverted]]\n",
            r"mine\.yaml:3: .*no part or finding is called T wafe; did you mean T wave",
        ),
        ("findings:\n  A:\n    made_of: [[T wave, inverted]]\n", r"mine\.yaml:3: .*already makes T wave inversion"),
        (
            "cues:\n  c:\n    acts: doubts\n    reach: following\n    phrases: [hm]\n",
            r"mine\.yaml:2: c: probability: expected a number",
        ),
        (
            "cues:\n  c:\n    acts: doubt\n    reach: following\n",
            r"mine\.yaml:3: c: acts: expected one of denies, overrules, doubts",
        ),
        (
            "words:\n  atrial: [ventrikular]\n",
            r"mine\.yaml:2: ventrikular is read as atrial here and as ventricular at words\.yaml",
        ),
        (
            "findings:\n  Left axis deviation:\n    drop: [ladd]\n",
            r"mine\.yaml:3: Left axis deviation: drop: no phrase of it is 'ladd'; did you mean lad",
        ),
        ("words:\n  atrial: [two words]\n", r"mine\.yaml:2: words: expected one word"),
        ("label_sets:\n  s:\n    L: [Nothing]\n", r"mine\.yaml:3: L: no finding is called Nothing"),
        ("label_sets:\n  s:\n    L: {any: [Arrhythmia]}\n", r"mine\.yaml:3: L: unknown key any"),
        ("findings:\n  A: [aaa\n", r"mine\.yaml:\d+: expected YAML"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Vocabulary.read(written(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read: No such file .*; name a YAML file of rules"):
        Vocabulary.read(tmp_path / "none.yaml")


def test_a_file_that_is_not_utf_8_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes("findings:\n  Hüftig:\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"mine\.yaml:2: expected text in UTF-8"):
        Vocabulary.read(tmp_path / "mine.yaml")


def test_an_empty_file_changes_nothing(tmp_path: Path, vocabulary: Vocabulary) -> None:
    assert Vocabulary.read(written(tmp_path, "")).terms == vocabulary.terms


# ---- text


def test_folding_keeps_every_offset() -> None:
    everything = "".join(map(chr, range(1, 0x3000)))
    assert len(fold(everything)) == len(everything)
    assert fold("Äpfel, Größe \u2013 Ångström") == "apfel, große - angstrom"


@pytest.mark.parametrize(
    ("report", "statements"),
    [
        ("Sinus rhythm. Normal ECG.", ["Sinus rhythm", " Normal ECG"]),
        ("QTc 0.44 s; PR 0.2", ["QTc 0.44 s", " PR 0.2"]),
        ("Infarkt alter unbest. t abnorm", ["Infarkt alter unbest. t abnorm"]),
        ("AV-Block 1. Grades. Linkstyp", ["AV-Block 1. Grades", " Linkstyp"]),
        ("Infarct? LVH", ["Infarct?", " LVH"]),
        ("? LVH", ["? LVH"]),
        ("Sinus rhythm.Normal ECG", ["Sinus rhythm", "Normal ECG"]),
        (" . ;; ! ", []),
    ],
)
def test_statements_end_at_signs_but_not_inside_numbers_and_after_abbreviations(
    report: str, statements: list[str]
) -> None:
    spans = list(split(report))
    assert [report[start:end] for start, end in spans] == statements
    assert all(a[1] <= b[0] for a, b in pairwise(spans))


def has_check_digit(code: str) -> bool:
    """Whether the last digit of a SNOMED CT code is that of Verhoeff (1969), as SNOMED CT's technical guide asks.

    The dihedral group of order ten: 0 to 4 are turns, 5 to 9 turns after a flip.
    """

    def after(a: int, b: int) -> int:
        if a < 5:
            return (a + b) % 5 if b < 5 else 5 + (a + b) % 5
        return 5 + (a - b) % 5 if b < 5 else (a - b) % 5

    def moved(digit: int, times: int) -> int:
        for _ in range(times % 8):
            digit = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)[digit]
        return digit

    check = 0
    for place, digit in enumerate(reversed(code)):
        check = after(check, moved(int(digit), place))
    return check == 0
