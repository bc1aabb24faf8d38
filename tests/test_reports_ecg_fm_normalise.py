"""Free text to the words of the ECG-FM patterns: what each kind of rule does, and that shortcuts change nothing."""

from __future__ import annotations

import random
import re
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ecgfm.reports.ecg_fm_match import Matcher
from ecgfm.reports.ecg_fm_normalise import (
    RULES,
    AtOnce,
    Edit,
    InOrder,
    Rewritten,
    family_rules,
    normalise,
    rewrite,
    rules,
)

EXAMPLES = {
    # the end of a report
    "Sinus rhythm.  CONFIRMED BY Dr Who": "sinus rhythm.",
    "Sinus rhythm. Unconfirmed by x": "sinus rhythm. un",
    "AF. No significant change when compared to the previous ECG of May": "atrial fibrillation.",
    "compared with tracing of May": "compared with tracing of may",
    "Otherwise normal": "otherwise normal ecg",
    "ecg normal": "ecg normal ecg",
    "Otherwise normal.": "otherwise normal.",
    # capitals that mean something
    "AT in AVR": "atrial tachycardia in accelerated ventricular rhythm",
    "at aVR": "at avr",
    "PVC's": "premature ventricular beats",
    # phrases
    "SA block (Mobitz I)": "sinus block (mobitz type 1)",
    "failure to sense and capture": "loss of sensing; loss of capture",
    "Failure to capture": "loss of capture",
    # signs and blanks
    "T-wave  &\tqwave": "t wave and q wave",
    "atrial / septal\ninfarct": "atrial/septal infarct",
    "v2,v3,,v4": "v2, v3, ,v4",
    "?infarct -? old": "<before?> infarct <after?> old",
    "infarct --? age undetermined": "infarct ? age undetermined",
    "PVC(s) & beat(s)": "premature ventricular beats and beats",
    # spellings, stems inside of words included
    "Normal sinus rhtyhm, seotal infract": "normal sinus rhythm, septal infarct",
    "spatial malarial": "spatrial malatrial",
    "partial": "partial",
    # abbreviations, a site before the name that it makes
    "LV strain, 1st deg AV block": "left ventricular strain, 1st degree atrioventricular block",
    "AVB, second-degree": "atrioventricular block, 2nd degree",
    "LBBB w/ AFib": "left bundle branch block with atrial fibrillation",
    "NSVT": "nonsustained supraventricular tachycardia",
    "Mobitz I (Wenckebach)": "mobitz type 1",
    "torsades": "torsade de pointes",
    "2° avb, 1* degree": "2nd degree atrioventricular block, 1st degree",
    "high-degree": "high grade",
    # synonyms
    "broad QRS in extremity leads, chest leads": "wide qrs in limb leads, precordial leads",
    "likely normal but septal wall infarction": "probably normal septal infarct",
    "more likely than not": "morelikelythan not",
    "a rhythm is present. a rhythm present here": "a rhythm is present. a rhythm here",
    "ST segment elevation, ST segment depression": "st elevation, st segment depression",
    "these are probably related to age": "these conceivably related to age",
    # leads
    "Missing lead(s): V1, V2": "missing lead v1; missing lead v2",
    "partial missing lead(s): v1, v2": "partial missing lead v1; missing lead v2",
    "artifact in lead(s) I,aVR; artifact in lead(s) V1": (
        "artifact in lead i; artifact in lead avr; artifact in lead v1; "
        "artifact in lead i; artifact in lead avr; artifact in lead v1"
    ),
    "lead(s) II were not used for morphology analysis": "lead ii not used for morphology analysis",
    "possible sequence error: V2,V3 omitted": (
        "lead v2 omitted due to possible sequence error; lead v3 omitted due to possible sequence error"
    ),
    # words that are joined or cut
    "supra-ventricular, inter atrial": "supraventricular, interatrial",
    "bundle block": "bundle branch block",
    "v-tachycardia, a-v": "ventricular tachycardia, atrioventricular",
    # families
    "atrial premature complexes, junctional ectopy": "premature atrial beats, ectopic junctional beats",
    "atrial fibrillation/flutter": "atrial fibrillation atrial flutter",
    "Dual chamber pacemaker": "dual-chamber pacing",
    "demand ventricular-paced rhythm": "ventricular pacing <demand pacing>",
    "pacemaker spikes": "electronic pacemaker spikes",
    "ST-T change, abnormal T waves": "st-t wave changes, t wave abnormalities",
    "infarct - possible acute, non-acute": "infarct, possibly acute, non, acute",
    "QTc appears long, prolongation of the PR interval": "prolonged qt, prolonged pr",
}


@pytest.mark.parametrize("report", EXAMPLES)
def test_a_report_in_the_words_of_the_patterns(report: str) -> None:
    assert normalise(report) == EXAMPLES[report]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_taken(report: str) -> None:
    rewritten = rewrite(report)
    assert rewritten.text == normalise(report) == rewritten.text.strip()
    for start in range(len(rewritten.text)):
        first, last = rewritten.original(start, start + 1)
        assert 0 <= first <= last <= len(report)


def test_a_letter_with_two_small_ones_moves_nothing() -> None:
    rewritten = rewrite("İ INFARCTION")
    start = rewritten.text.index("infarct")
    assert rewritten.original(start, start + 7) == (2, 12)


# ---- shortcuts against the obvious way


def obvious_in_order(table: list[tuple[str, str]], text: str, bordered: bool) -> str:
    for old, new in table:
        left = r"(?<!\w)" if bordered and old[0].isalnum() else ""
        right = r"(?!\w)" if bordered and old[-1].isalnum() else ""
        text = re.sub(left + re.escape(old) + right, lambda _, new=new: new, text)  # type: ignore[misc]
    return text


@settings(max_examples=400, deadline=None)
@given(
    table=st.dictionaries(
        st.text("ab -1", min_size=1, max_size=3), st.text("ab -1", max_size=4), min_size=1, max_size=9
    ),
    text=st.text("ab -1", max_size=40),
    bordered=st.booleans(),
)
def test_rules_in_order_do_what_each_over_the_whole_text_would(
    table: dict[str, str], text: str, bordered: bool
) -> None:
    rewritten = Rewritten(text)
    InOrder(table, bordered).rewrite(rewritten)
    assert rewritten.text == obvious_in_order(list(table.items()), text, bordered)


@pytest.mark.parametrize("name", ["words", "inside_words", "phrases", "sentences"])
def test_our_rules_in_order_do_what_each_over_the_whole_text_would(name: str) -> None:
    table: InOrder = getattr(rules(), name)
    draw = random.Random(3)
    n_rewritten = 0
    for _ in range(40):
        chosen = [draw.choice(draw.choice(table.rules)) for _ in range(draw.choice([3, 60]))]
        text = "".join(word + draw.choice([" ", " ", " ", "-", ", ", "/", ""]) for word in chosen)
        rewritten = Rewritten(text)
        table.rewrite(rewritten)
        assert rewritten.text == obvious_in_order(table.rules, text, bordered=name == "words")
        n_rewritten += rewritten.text != text
    assert n_rewritten > 20


def test_rules_at_once_do_not_rewrite_what_they_wrote() -> None:
    rewritten = Rewritten("a b, b a")
    AtOnce({"a": "b", "b": "a", "b a": "x a"}).rewrite(rewritten)
    assert rewritten.text == "b a, x a"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_places_are_carried_back_as_if_each_letter_knew_where_it_came_from(data: st.DataObject) -> None:
    text = data.draw(st.text("abc ", min_size=1, max_size=20))
    rewritten = Rewritten(text)
    knows = [(i, i + 1) for i in range(len(text))]
    for _ in range(data.draw(st.integers(0, 4))):
        length = len(rewritten.text)
        cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=6, unique=True)))
        edits: list[Edit] = [
            (start, end, data.draw(st.text("xyz", max_size=3)))
            for start, end in zip(cuts[::2], cuts[1::2], strict=False)
        ]
        rewritten.apply(edits)
        for start, end, new in reversed(edits):
            knows[start:end] = [(knows[start][0], knows[end - 1][1])] * len(new)
    assert len(knows) == len(rewritten.text)
    for start in range(len(knows)):
        for end in range(start + 1, len(knows) + 1):
            assert rewritten.original(start, end) == (knows[start][0], knows[end - 1][1])


def test_long_texts_of_all_our_words_take_no_time_worth_speaking_of() -> None:
    words = [old for old, _ in rules().words.rules]
    draw = random.Random(5)
    mixed = " ".join(draw.choice(words) for _ in range(9000))
    for report in (mixed, " ".join(words) + " a-" * 30_000, "missing lead(s): " + "v1, " * 25_000, " /" * 50_000):
        normalise("warm")
        begun = time.process_time()
        normalise(report)
        assert time.process_time() - begun < 2  # 0.4 at most on a machine that has nothing else to do


# ---- the table of rules


def test_no_key_of_the_table_stands_twice() -> None:
    # a second one would silently replace the first
    def keys(node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value]
            assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1]
            for _, value in node.value:
                keys(value)
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                keys(value)
        else:
            assert node.tag == "tag:yaml.org,2002:str", f"{node.value} is not text; quote it"

    with RULES.open(encoding="utf-8") as file:
        keys(yaml.compose(file, yaml.SafeLoader))


def test_a_word_that_a_rule_writes_does_not_hold_what_the_rule_looks_for() -> None:
    # "bundle" -> "bundle branch" would make "bundle branch branch"
    for old, new in rules().words.rules:
        assert not Matcher([old]).find(new), (old, new)


def test_every_spelling_is_still_there_when_its_turn_comes_and_ends_as_its_word_does() -> None:
    table = rules().words.rules
    for i, (old, new) in enumerate(table):
        rewritten = Rewritten(old)
        InOrder(dict(table[:i] or [("nothing", "")]), bordered=True).rewrite(rewritten)
        assert rewritten.text == old
        if old.strip() == old:
            assert normalise(old) == normalise(new), (old, new)


def test_a_family_has_every_choice_of_words() -> None:
    family = {
        "slots": {
            "site": {"atrial": ["atrial", "auricular"]},
            "noun": {"beat": ["beat"], "beats": ["beats", "ectopy"]},
        },
        "templates": {"{site} early {noun}": "early {site} {noun}", "early {noun}": "early {noun}"},
    }
    found = family_rules(family)
    assert len(found) == 2 * 3 + 3
    assert found["auricular early ectopy"] == "early atrial beats"


def test_a_family_that_contradicts_itself_is_refused() -> None:
    family = {"slots": {"noun": {"beat": ["beat"]}}, "templates": {"{noun}": "x", "beat": "y"}}
    with pytest.raises(ValueError, match="'beat' is to become 'x' and 'y'"):
        family_rules(family)
