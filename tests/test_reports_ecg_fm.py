"""The compatible mode of the report labeler with small pattern files of our own: patterns, entities, labels, mistakes.
With the published files: test_reports_ecg_fm_published.py."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecgfm.ecg import InputError
from ecgfm.reports.assertion import Labeler
from ecgfm.reports.ecg_fm import EcgFmLabeler, read_patterns
from ecgfm.reports.ecg_fm_match import Matcher

# A knowledge of hearts small enough to reason about: what a test needs it adds.
SMALL: dict[str, Any] = {
    "entity_tem": [
        {"name": "Harm"},
        {"name": "Damage", "sup": ["Harm"]},
        {"name": "Scar", "sup": ["Damage", "Harm"]},  # two ways up to Harm: one step and two
        {"name": "Front scar", "sup": ["Scar"]},
        {"name": "Wave", "require_descriptors": True, "aka": ["not used"]},
        {"name": "Beat"},
        {"name": "Extra beat", "sup": ["Beat"]},
        {"name": "Needs clinical correlation"},
        {"name": "Rare pair"},
        {"name": "Pair"},
    ],
    "entity_pat": [
        {"pattern": "scar", "entities": [{"tem": "Scar", "descriptors": []}]},
        {"pattern": "wave", "entities": ["Wave"]},
        {"pattern": "tall wave", "entities": [{"tem": "Wave", "descriptors": ["High"]}]},
        {"pattern": "beat", "entities": ["Beat"]},
        {"pattern": "extra beats", "entities": [{"tem": "Extra beat", "descriptors": ["Many"]}]},
        {"pattern": "scarred beat", "entities": ["Scar", "Beat"]},
        {"pattern": "pattern", "entities": []},
    ],
    "desc_tem": [
        {"name": "Possible"},
        {"name": "Probable"},
        {"name": "Check", "create_entities": ["Needs clinical correlation"]},
        {"name": "High"},
        {"name": "Many"},
        {"name": "Front"},
        {"name": "Absence"},
    ],
    "desc_pat": [
        {"pattern": "possible", "descriptors": [{"tem": "Possible", "descriptors": []}]},
        {"pattern": "probable", "descriptors": ["Probable"], "before_after": "b"},
        {"pattern": "check", "descriptors": ["Check"]},
        {"pattern": "front", "descriptors": ["Front"]},
        {"pattern": "without", "descriptors": ["Absence"]},
        {"pattern": ", high", "descriptors": [{"tem": "High", "descriptors": ["Possible"]}], "before_after": "a"},
        {"pattern": "beat by", "descriptors": ["Many"]},
    ],
    "connective": [
        {"pattern": "and", "descriptors": [[], []]},
        {"pattern": "or", "descriptors": [["Probable"], ["Probable"]]},
    ],
    "compound_tem": [
        {"entity": "Pair", "including": ["Scar", "Beat"], "excluding": [{"tem": "Beat", "descriptors": ["Many"]}]},
        {"entity": "Rare pair", "including": [{"tem": "Wave", "descriptors": ["High", "Front"]}]},
    ],
    "attached_desc_tem": [{"entity": "Scar", "descriptor": "Front", "resulting_entity": "Front scar"}] * 2,
    "traveling_desc_tem": [{"entity": "Beat", "descriptors": ["Many"]}],
    "uncertainty_map": {"Possible": 0.5, "Probable": 0.7},
}


def write(folder: Path, **changes: Any) -> Path:
    """The small pattern files with some replaced, or left out where None."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {**SMALL, **changes}.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def with_entry(name: str, entry: Any) -> dict[str, Any]:
    return {name: [*SMALL.get(name, []), entry]}


@pytest.fixture
def small(tmp_path: Path) -> EcgFmLabeler:
    return EcgFmLabeler(read_patterns(write(tmp_path / "patterns")))


@pytest.fixture(scope="module")
def remembering(tmp_path_factory: pytest.TempPathFactory) -> EcgFmLabeler:
    """A labeler of many texts."""
    return EcgFmLabeler(read_patterns(write(tmp_path_factory.mktemp("patterns"))))


def expect(found: dict[str, float], certain: Sequence[str] = (), **doubtful: Sequence[str]) -> None:
    """These labels and no others. certain: of probability 1; doubtful: by their decimals, p65 is 0.65."""
    wanted = dict.fromkeys(certain, 1.0)
    for probability, names in doubtful.items():
        wanted |= dict.fromkeys(names, float("0." + probability.removeprefix("p")))
    assert found == pytest.approx(wanted, abs=1e-9)


# ---- patterns in a text


def obvious_matches(patterns: Sequence[str], groups: Sequence[int], text: str) -> list[tuple[int, int, int]]:
    """Pattern after pattern over the whole text, as the rules say it."""
    taken: list[int | None] = [None] * len(text)

    def blocks(at: int) -> bool:
        return 0 <= at < len(text) and (taken[at] is not None or text[at].isalnum() or text[at] == "_")

    found = []
    for i in sorted(range(len(patterns)), key=lambda i: (groups[i], -len(patterns[i]), i)):
        pattern = patterns[i]
        here = []
        at = 0
        while at + len(pattern) <= len(text):
            end = at + len(pattern)
            if (
                text[at:end] == pattern
                and all(cell is None for cell in taken[at:end])
                and not (pattern[0].isalnum() and blocks(at - 1))
                and not (pattern[-1].isalnum() and blocks(end))
            ):
                here.append((at, end, i))
                at = end
            else:
                at += 1
        for start, end, _ in here:
            taken[start:end] = [i] * (end - start)
        found += here
    return sorted(found)


@settings(max_examples=400, deadline=None)
@given(
    patterns=st.lists(st.text("ab -'_1é", min_size=1, max_size=4), min_size=1, max_size=12, unique=True),
    groups=st.lists(st.integers(0, 2), min_size=12, max_size=12),
    text=st.text("ab -'_1é", max_size=60),
)
def test_patterns_are_found_as_one_after_the_other_over_the_text_would(
    patterns: list[str], groups: list[int], text: str
) -> None:
    found = Matcher(patterns, groups[: len(patterns)]).find(text)
    assert [tuple(match) for match in found] == obvious_matches(patterns, groups, text)


def test_patterns_in_random_sentences_are_found_as_the_obvious_way_finds_them() -> None:
    # longer texts of words that overlap, where what is taken first decides what is left
    patterns = ["t", "t wave", "tall t", "wave", "wave or", "or", "old", ", old", "r'", "+", "in v1", "in v1 or v2"]
    groups = [1, 1, 1, 1, 2, 3, 2, 2, 1, 3, 2, 2]
    words = ["t", "tall", "wave", "or", "old", "r'", "+", "in", "v1", "v2", ",", "twave", "x_t"]
    draw = random.Random(7)
    n_found = 0
    for _ in range(300):
        text = "".join(draw.choice(words) + draw.choice([" ", " ", "", "-", ", "]) for _ in range(12))
        found = [tuple(match) for match in Matcher(patterns, groups).find(text)]
        assert found == obvious_matches(patterns, groups, text)
        n_found += len(found)
    assert n_found > 1000


def test_a_short_entity_pattern_beats_a_longer_descriptor(small: EcgFmLabeler) -> None:
    assert small.unmatched("beat by and") == " by "  # "beat by" describes, but "beat" is taken


def test_what_is_left_keeps_its_blanks_and_signs(small: EcgFmLabeler) -> None:
    assert small.unmatched("scarred; possible  scar, high.") == "scarred;   ."
    assert small.unmatched("") == ""


def test_equal_patterns_of_a_matcher_are_refused() -> None:
    with pytest.raises(ValueError, match="distinct"):
        Matcher(["a", "a"])
    assert Matcher([]).find("anything") == []


# ---- from patterns to labels


def test_no_entity_no_label(small: EcgFmLabeler) -> None:
    assert small.probabilities("possible or front") == {}
    assert small.probabilities("") == {}
    assert small.probabilities("wave") == {}  # a wave is a label only together with a descriptor


def test_doubt_shrinks_with_every_step_up_and_the_longest_way_counts(small: EcgFmLabeler) -> None:
    found = small.probabilities("possible scar and")
    expect(found, p5=["Scar"], p65=["Damage"], p755=["Harm"], certain=["Scar - Possible"])


def test_without_a_connective_descriptors_are_not_heeded_unless_that_is_mended(tmp_path: Path) -> None:
    patterns = read_patterns(write(tmp_path))
    expect(EcgFmLabeler(patterns).probabilities("possible scar"), certain=["Scar", "Damage", "Harm"])
    mended = EcgFmLabeler(patterns, gate=True)
    assert mended.probabilities("possible scar") == EcgFmLabeler(patterns).probabilities("possible scar and")


def test_a_pattern_keeps_its_own_descriptors_where_no_others_are_heeded(small: EcgFmLabeler) -> None:
    expect(small.probabilities("tall wave"), certain=["Wave - High"])


def test_of_several_doubts_the_strongest_counts(small: EcgFmLabeler) -> None:
    found = small.probabilities("probable possible scar and")
    assert found["Scar"] == 0.5
    assert found["Scar - Probable"] == 1.0


def test_or_puts_doubt_on_both_sides(small: EcgFmLabeler) -> None:
    found = small.probabilities("scar or beat")
    assert (found["Scar"], found["Beat"]) == (0.7, 0.7)


def test_descriptors_reach_across_a_full_stop_to_the_nearest_entity(small: EcgFmLabeler) -> None:
    found = small.probabilities("and front. wave. , high")
    assert {"Wave - Front", "Wave - High"} == found.keys() - {"Rare pair"}


def test_a_descriptor_of_a_descriptor_changes_nothing(small: EcgFmLabeler) -> None:
    assert small.probabilities("and beat, high") == {"Beat": 1.0, "Beat - High": 1.0}  # possibly high


def test_a_pattern_without_entity_takes_what_is_said_of_it(small: EcgFmLabeler) -> None:
    expect(small.probabilities("possible pattern and scar"), certain=["Scar", "Damage", "Harm"])


def test_descriptors_travel_up_and_attach(small: EcgFmLabeler) -> None:
    expect(small.probabilities("extra beats"), certain=["Extra beat", "Extra beat - Many", "Beat", "Beat - Many"])
    found = small.probabilities("possible front scar and")
    # Front scar at 0.5 lifts the scar that it came from
    expect(
        found,
        p5=["Front scar"],
        p65=["Scar"],
        p755=["Damage"],
        p8285=["Harm"],
        certain=["Scar - Possible", "Scar - Front"],
    )


def test_what_a_descriptor_brings_along_is_in_doubt_with_it_but_for_correlation(tmp_path: Path) -> None:
    changes = {
        "desc_tem": [*SMALL["desc_tem"], {"name": "Brings", "create_entities": ["Beat"]}],
        "desc_pat": [*SMALL["desc_pat"], {"pattern": "bring", "descriptors": ["Brings"]}],
    }
    labeler = EcgFmLabeler(read_patterns(write(tmp_path, **changes)))
    found = labeler.probabilities("possible check bring wave and")
    assert found["Needs clinical correlation"] == 1.0
    assert found["Beat"] == 0.5


def test_compounds_are_certain_need_one_cluster_for_descriptors_and_heed_what_excludes_them(
    small: EcgFmLabeler,
) -> None:
    assert small.probabilities("possible scar and beat")["Pair"] == 1.0
    assert "Pair" not in small.probabilities("scar and extra beats")  # many beats
    assert small.probabilities("front tall wave and")["Rare pair"] == 1.0
    assert "Rare pair" not in small.probabilities("front wave and tall wave")


def test_a_pattern_of_two_entities_gives_both_what_is_said(small: EcgFmLabeler) -> None:
    found = small.probabilities("possible scarred beat and")
    assert found["Scar"] == found["Beat"] == 0.5


def test_absence_changes_nothing_unless_that_is_mended(tmp_path: Path) -> None:
    patterns = read_patterns(write(tmp_path))
    published = EcgFmLabeler(patterns).probabilities("without scar and beat")
    assert published == EcgFmLabeler(patterns).probabilities("scar and beat")
    mended = EcgFmLabeler(patterns, negation=True)
    assert mended.probabilities("without scar and beat") == {"Beat": 1.0}
    assert mended.probabilities("without scar and scar") == EcgFmLabeler(patterns).probabilities("scar")
    absent = {a.label: a for a in mended.read("beat and without SCAR")}
    assert (absent["Scar"].status, absent["Scar"].probability) == ("absent", 0.0)
    assert "Harm" not in absent  # no scar is not no harm
    assert {a.status for a in mended.read("without scar and scar")} == {"present"}
    # the gate is shut without a connective, and then nothing is negated
    assert "Scar" in mended.probabilities("without scar")
    assert "Scar" not in EcgFmLabeler(patterns, gate=True, negation=True).probabilities("without scar")


def test_labels_come_by_code_point_and_are_among_those_announced(small: EcgFmLabeler) -> None:
    found = small.probabilities("possible front scar or extra beats, high")
    assert list(found) == sorted(found)
    assert found.keys() <= set(small.labels)
    assert list(small.labels) == sorted(set(small.labels))
    assert "Wave" not in small.labels
    assert not any(label.endswith("Absence") for label in small.labels)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([p["pattern"] for f in SMALL for p in SMALL[f] if "pattern" in p]), max_size=8))
def test_a_remembered_meaning_is_that_of_a_first_reading(remembering: EcgFmLabeler, words: list[str]) -> None:
    text = " ".join(words)
    found = remembering.probabilities(text)
    assert found == EcgFmLabeler(remembering.patterns).probabilities(text)
    assert found == {a.label: a.probability for a in remembering.read(text)}


# ---- raw reports


def test_spans_are_of_the_report_as_it_was_given(small: EcgFmLabeler) -> None:
    report = "  Old &  POSSIBLE   Front-Scar , high and EXTRA\n contractions."
    found = {a.label: a for a in small.read(report)}
    assert report[found["Scar"].start : found["Scar"].end] == "Scar"
    assert report[found["Extra beat"].start : found["Extra beat"].end] == "EXTRA\n contractions"


def test_what_is_asserted_says_why(small: EcgFmLabeler) -> None:
    found = {a.label: a for a in small.read("possible front scar and check beat")}
    assert (found["Scar - Front"].status, found["Front scar"].status) == ("present", "uncertain")
    assert found["Front scar"].rule == "Scar - Front; 'scar', described by 'possible', 'front'"
    assert found["Harm"].rule == "above Front scar; 'scar', described by 'possible', 'front'"
    assert found["Needs clinical correlation"].rule == "brought along by Check; 'beat', described by 'check'"
    pair = found["Pair"]
    assert (pair.rule, pair.start, pair.end) == ("made of 'scar' and 'beat'", 15, 34)


def test_an_explanation_has_the_tokens_and_where_each_row_comes_from(small: EcgFmLabeler) -> None:
    explained = small.explain("Possible  Scar, and beat")
    assert explained.normalised == "possible scar, and beat"
    assert [(t.pattern, t.kind) for t in explained.tokens] == [
        ("possible", "before"),
        ("scar", "entity"),
        ("and", "connective"),
        ("beat", "entity"),
    ]
    assert [explained.report[start:end] for start, end in explained.spans] == ["Possible", "Scar", "and", "beat"]
    assert [cluster.token for cluster in explained.clusters] == [1, 3, None]
    assert explained.clusters[0].described_by == (0,)
    assert explained.clusters[2].parts == (0, 1)
    assert [row.source for row in explained.clusters[0].rows] == ["text", "super", "super"]


def test_equal_reports_and_missing_ones_are_read(small: EcgFmLabeler) -> None:
    found = small.read_all(["Scar", None, "beat", "Scar", ""])
    assert found[0] is found[3]
    assert found[1].probabilities == found[4].probabilities == {}
    assert found[2].probabilities == small.probabilities("beat") == {"Beat": 1.0}


def test_a_labeler_is_a_labeler(small: EcgFmLabeler) -> None:
    labeler: Labeler = small
    found = labeler.read("possible scar and beat")
    assert [a.label for a in found] == [label for label in labeler.labels if label in {a.label for a in found}]


@pytest.mark.parametrize(
    "piece", ["scar ", "possible ", "a-", "possible scar or ", "t", " ", "premature ", "pvc ", ", high"]
)
def test_a_hundred_thousand_letters_take_no_time_worth_speaking_of(small: EcgFmLabeler, piece: str) -> None:
    report = (piece * 100_000)[:100_000]
    small.read("warm")
    begun = time.process_time()
    small.read_all([report])
    assert time.process_time() - begun < 2  # 0.5 at most on a machine that has nothing else to do


# ---- pattern files


def test_a_folder_without_patterns_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        read_patterns(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"entity_pat\.json: no such file"):
        read_patterns(write(tmp_path / "a", entity_pat=None))


def test_files_that_need_not_be_there(tmp_path: Path) -> None:
    only = {name: None for name in SMALL if name not in ("entity_tem", "entity_pat")}
    plain = [{"pattern": "scar", "entities": ["Scar"]}]
    labeler = EcgFmLabeler(read_patterns(write(tmp_path, **{**only, "entity_pat": plain})))
    expect(labeler.probabilities("possible scar or beat"), certain=["Scar", "Damage", "Harm"])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "not a list": ({"desc_tem": {}}, r"desc_tem\.json: expected a list of entries, found dict"),
    "an entry of the wrong form": (
        with_entry("entity_pat", {"pattern": "new", "entities": [{"descriptors": []}]}),
        r"entity_pat\.json: entry 8 \('new'\): entities\.0\.tem: ",
    ),
    "an entity twice": (
        with_entry("entity_tem", {"name": "Beat"}),
        r"entity_tem\.json: entry 11 \('Beat'\): .*already",
    ),
    "a descriptor twice": (with_entry("desc_tem", {"name": "Many"}), r"desc_tem\.json: entry 8 \('Many'\): .*already"),
    "a pattern in two files": (
        with_entry("connective", {"pattern": "scar", "descriptors": [[], []]}),
        r"connective\.json: 'scar': this pattern stands in entity_pat\.json already",
    ),
    "an unknown super": (
        with_entry("entity_tem", {"name": "New", "sup": ["Nothing"]}),
        r"entity_tem\.json: 'New': no entity 'Nothing'",
    ),
    "an entity above itself": (
        with_entry("entity_tem", {"name": "Circle", "sup": ["Circle"]}),
        r"entity_tem\.json: 'Circle': stands above itself: Circle -> Circle",
    ),
    "an unknown entity": (
        with_entry("entity_pat", {"pattern": "new", "entities": ["Nothing"]}),
        r"entity_pat\.json: 'new': no entity 'Nothing' in entity_tem\.json",
    ),
    "an unknown descriptor": (
        with_entry("desc_pat", {"pattern": "new", "descriptors": ["Nothing"]}),
        r"desc_pat\.json: 'new': no descriptor 'Nothing' in desc_tem\.json",
    ),
    "an unknown nested descriptor": (
        with_entry("desc_pat", {"pattern": "new", "descriptors": [{"tem": "Many", "descriptors": ["Nothing"]}]}),
        r"desc_pat\.json: 'new': no descriptor 'Nothing'",
    ),
    "an unknown compound": (
        with_entry("compound_tem", {"entity": "Nothing", "including": ["Beat"]}),
        r"compound_tem\.json: 'Nothing': no entity 'Nothing'",
    ),
    "a descriptor to both sides": (
        with_entry("desc_pat", {"pattern": "new", "descriptors": ["Many"], "before_after": "ab"}),
        r"desc_pat\.json: entry 8 \('new'\): before_after: ",
    ),
    "no probability": (
        {"uncertainty_map": {"Possible": 2}},
        r"uncertainty_map\.json: 'Possible': expected a probability",
    ),
    "an empty pattern": (
        with_entry("desc_pat", {"pattern": "", "descriptors": ["Many"]}),
        r"desc_pat\.json: entry 8 \(''\): pattern: ",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_the_files_is_named_with_file_and_entry(tmp_path: Path, name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        read_patterns(write(tmp_path, **changes))


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (write(tmp_path) / "desc_pat.json").write_text("{")
    with pytest.raises(InputError, match=r"desc_pat\.json: not JSON: "):
        read_patterns(tmp_path)


def test_descriptors_that_stand_for_several_are_replaced_everywhere(tmp_path: Path) -> None:
    changes = {
        "split_desc_tem": [
            {"name": "Front and many", "split": ["Front", "Many"], "patterns": ["frontmost"]},
            {"name": "All", "split": ["Front and many", "High"]},
        ],
        "desc_pat": [*SMALL["desc_pat"], {"pattern": "all", "descriptors": ["All"]}],
        "entity_pat": [
            *SMALL["entity_pat"],
            {"pattern": "big wave", "entities": [{"tem": "Wave", "descriptors": ["All"]}]},
        ],
    }
    labeler = EcgFmLabeler(read_patterns(write(tmp_path, **changes)))
    three = {"Wave - Front", "Wave - Many", "Wave - High", "Rare pair"}
    assert labeler.probabilities("big wave").keys() == three
    assert labeler.probabilities("all wave and").keys() == three
    assert labeler.probabilities("frontmost wave and").keys() == {"Wave - Front", "Wave - Many"}


def test_a_descriptor_that_is_parsed_before_entities_takes_their_words(tmp_path: Path) -> None:
    early = {"pattern": "scar tissue", "descriptors": ["Many"], "parse_before_entities": True}
    labeler = EcgFmLabeler(read_patterns(write(tmp_path, **with_entry("desc_pat", early))))
    assert labeler.probabilities("scar tissue beat and").keys() == {"Beat", "Beat - Many"}


def test_an_attribution_that_does_nothing_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_patterns(write(tmp_path, **with_entry("desc_tem", {"name": "New", "attribute_to": ["Beat"]})))
    assert "'New': attribute_to is not supported" in caplog.text
