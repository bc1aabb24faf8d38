"""Free text to the words of the ECG-FM patterns: spellings, abbreviations and word orders, rule by rule.

The rules are ours (`ecg_fm_normalise.yaml`); their kinds, order and effect on reports follow the published labeler's.
All are literal or regular with a fixed look around, so that time is linear in the text; what a report has no word for
is not tried on it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from heapq import heappop, heappush
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from ahocorasick_rs import AhoCorasick, MatchKind

from ecgfm.reports.ecg_fm_match import Matcher, is_bordered

RULES = Path(__file__).with_suffix(".yaml")

Edit = tuple[int, int, str]
"""text[start:end] becomes the string."""


class Rewritten:
    """A text through its rewritings, each a list of edits in the order of the text, none overlapping another."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._passes: list[tuple[list[int], list[Edit]]] = []  # where each edit stands once they are made, and they

    def apply(self, edits: list[Edit]) -> None:
        if not edits:
            return
        parts: list[str] = []
        places = []
        done = shift = 0  # shift: new place minus old
        for start, end, new in edits:
            parts += (self.text[done:start], new)
            places.append(start + shift)
            shift += len(new) - (end - start)
            done = end
        parts.append(self.text[done:])
        self.text = "".join(parts)
        self._passes.append((places, edits))

    def original(self, start: int, end: int) -> tuple[int, int]:
        """The span of the text as it was given that text[start:end] was made from.

        Exact where nothing was rewritten. A character that a rule wrote stands for all that the rule replaced:
        "infarct" for "infarction", each word of "premature atrial beats" for "atrial premature complexes".
        """
        for places, edits in reversed(self._passes):
            before, _ = _before(places, edits, start)
            _, end = _before(places, edits, end - 1) if end > start else (before, before)
            start, end = before, max(before, end)
        return start, end


def _before(places: list[int], edits: list[Edit], position: int) -> tuple[int, int]:
    """The span that the character at a position had before the edits."""
    i = bisect_right(places, position) - 1
    if i < 0:
        return position, position + 1
    start, end, new = edits[i]
    if position < places[i] + len(new):
        return start, end
    position += end - (places[i] + len(new))
    return position, position + 1


def normalise(report: str) -> str:
    """A report in the words of the patterns. Any text is taken; one without a word of ECGs comes back in lower case."""
    return rewrite(report).text


def rewrite(report: str) -> Rewritten:
    """`normalise`, with where each character comes from."""
    of = rules()
    text = Rewritten(report)
    of.cut_tail(text)
    _trim(text)
    of.acronyms.rewrite(text)
    text.text = _lower(text.text)  # letter for letter: no edit
    of.phrases.rewrite(text)
    _name_the_ecg(text)
    _clean(text)
    of.inside_words.rewrite(text)
    of.words.rewrite(text)
    _question_marks_and_commas(text)
    of.sentences.rewrite(text)
    _lead_lists(text)
    _join(text)
    for family in of.families:
        family.rewrite(text)
    _trim(text)
    return text


class InOrder:
    """Literal replacements, each over the whole text, one after the other: what one writes the next may rewrite.

    An automaton says which of them the text has, and after each rewriting which came up around what was written; the
    others are not tried. The result is that of trying all.
    """

    def __init__(self, rules: Mapping[str, str], bordered: bool) -> None:
        self.rules = list(rules.items())
        self._reach = max(map(len, rules)) + 1  # what an edit can make stand, or give a border
        self._needs = [(bordered and old[0].isalnum(), bordered and old[-1].isalnum()) for old in rules]
        self._automaton = AhoCorasick(list(rules), matchkind=MatchKind.Standard)

    def rewrite(self, text: Rewritten) -> None:
        waiting = self._standing(text.text)
        queue = sorted(waiting)
        while queue:
            i = heappop(queue)
            edits = self._edits(i, text.text)
            text.apply(edits)
            for j in self._near(edits, text.text):
                if j > i and j not in waiting:
                    waiting.add(j)
                    heappush(queue, j)

    def _standing(self, text: str) -> set[int]:
        standing: set[int] = set()
        for i, start, end in self._automaton.find_matches_as_indexes(text, overlapping=True):
            if i not in standing and is_bordered(text, start, end, *self._needs[i]):
                standing.add(i)
        return standing

    def _near(self, edits: list[Edit], text: str) -> Iterable[int]:
        """The rules whose words stand near what was just written; perhaps others that stand anyway."""
        if len(edits) * 2 * self._reach > len(text):
            return self._standing(text)
        near: set[int] = set()
        shift = 0
        for start, end, new in edits:
            at = start + shift
            near |= self._standing(text[max(0, at - self._reach) : at + len(new) + self._reach])
            shift += len(new) - (end - start)
        return near

    def _edits(self, i: int, text: str) -> list[Edit]:
        old, new = self.rules[i]
        needs_left, needs_right = self._needs[i]
        edits = []
        start = text.find(old)
        while start >= 0:
            end = start + len(old)
            if is_bordered(text, start, end, needs_left, needs_right):
                edits.append((start, end, new))
                start = text.find(old, end)
            else:
                start = text.find(old, start + 1)
        return edits


class AtOnce:
    """Bordered literal replacements made in one go, longer ones first: none rewrites what another wrote."""

    def __init__(self, rules: Mapping[str, str]) -> None:
        self._new = list(rules.values())
        self._old = list(rules)
        self._matcher = Matcher(self._old)

    def rewrite(self, text: Rewritten) -> None:
        found = self._matcher.find(text.text)
        text.apply([(start, end, self._new[i]) for start, end, i in found if self._new[i] != self._old[i]])


@dataclass(frozen=True)
class Rules:
    """The table of rules, compiled: see ecg_fm_normalise.yaml."""

    tails: tuple[str, ...]
    acronyms: InOrder
    phrases: InOrder
    inside_words: InOrder
    words: InOrder
    sentences: InOrder
    families: tuple[AtOnce, ...]

    def cut_tail(self, text: Rewritten) -> None:
        lowered = _lower(text.text)
        for tail in self.tails:
            start = lowered.find(tail)
            if start >= 0:
                text.apply([(start, len(lowered), "")])
                lowered = lowered[:start]


@cache
def rules() -> Rules:
    """The rules of the file; it is part of the package, so that a mistake in it is a mistake of ours.

    Raises:
        ValueError: a spelling that is to become two things.
    """
    with RULES.open(encoding="utf-8") as file:
        given: dict[str, Any] = yaml.safe_load(file)
    inside = _by_spelling([given["inside_words"]])
    return Rules(
        tails=tuple(sorted(given["tails"], key=len, reverse=True)),
        acronyms=InOrder(_by_spelling([given["acronyms"]]), bordered=True),
        phrases=InOrder(_by_spelling([given["phrases"]]), bordered=False),
        inside_words=InOrder(dict(sorted(inside.items(), key=lambda rule: -len(rule[0]))), bordered=False),
        words=InOrder(_by_spelling(given["words"].values()), bordered=True),
        sentences=InOrder(_by_spelling([given["sentences"]]), bordered=False),
        families=tuple(AtOnce(family_rules(family)) for family in given["families"].values()),
    )


def _by_spelling(tables: Iterable[Mapping[str, Sequence[str]]]) -> dict[str, str]:
    """`word: [spellings]` as spelling -> word, in the order of the file."""
    found: dict[str, str] = {}
    for table in tables:
        for word, spellings in table.items():
            for spelling in spellings:
                if spelling in found:
                    raise ValueError(f"{RULES.name}: {spelling!r} stands twice")
                found[spelling] = word
    return found


def family_rules(family: Mapping[str, Any]) -> dict[str, str]:
    """Every rule of a family: each template with each choice of words for its slots.

    family: `slots`, name -> {word: [spellings]}; `templates`, what stands -> what it becomes, with {slot} in both. The
        first takes each spelling, the second the word that it stands for.

    Raises:
        ValueError: two choices give one text different replacements.
    """
    slots = {name: _by_spelling([table]) for name, table in family["slots"].items()}
    found: dict[str, str] = {}
    for old, new in family["templates"].items():
        names = re.findall(r"\{(\w+)\}", old)
        for chosen in product(*(slots[name] for name in names)):
            spelled = dict(zip(names, chosen, strict=True))
            text = old.format(**spelled)
            replacement = new.format(**{name: slots[name][spelling] for name, spelling in spelled.items()})
            if found.setdefault(text, replacement) != replacement:
                raise ValueError(f"{RULES.name}: {text!r} is to become {found[text]!r} and {replacement!r}")
    return found


def _lower(text: str) -> str:
    """In lower case, letter for letter: a letter that has two for it (U+0130) stays as it is."""
    lowered = text.lower()
    return lowered if len(lowered) == len(text) else "".join(low if len(low := c.lower()) == 1 else c for c in text)


def _trim(text: Rewritten) -> None:
    whole = text.text
    kept = len(whole.rstrip())
    if kept < len(whole):
        text.apply([(kept, len(whole), "")])
    first = len(text.text) - len(text.text.lstrip())
    if first:
        text.apply([(0, first, "")])


def _regular(pattern: str, new: Callable[[re.Match[str]], str] | str, *needs: str) -> Callable[[Rewritten], None]:
    """A rewriting of all matches of a pattern. needs: words without one of which it cannot match."""
    compiled = re.compile(pattern)

    def rewrite(text: Rewritten) -> None:
        if needs and not any(word in text.text for word in needs):
            return
        edits = []
        for match in compiled.finditer(text.text):
            written = new if isinstance(new, str) else new(match)
            if written != match[0]:
                edits.append((*match.span(), written))
        text.apply(edits)

    return rewrite


def _name_the_ecg(text: Rewritten) -> None:
    """A report that ends in what the ECG is gets the word: "otherwise normal" -> "otherwise normal ecg"."""
    for ending in (" normal", " abnormal", " borderline"):
        if text.text.endswith(ending):
            end = len(text.text)
            text.apply([(end - len(ending) + 1, end, f"{ending[1:]} ecg")])
            return


def _tighten_slashes(text: Rewritten) -> None:
    # by hand: of many blanks a regular expression would look at each run once per blank
    edits: list[Edit] = []
    at = text.text.find("/")
    while at >= 0:
        start, end = at, at + 1
        while start > (edits[-1][1] if edits else 0) and text.text[start - 1].isspace():
            start -= 1
        while end < len(text.text) and text.text[end].isspace():
            end += 1
        if end - start > 1:
            edits.append((start, end, "/"))
        at = text.text.find("/", end)
    text.apply(edits)


def _commas(text: Rewritten) -> None:
    """A blank after a comma; of two commas side by side only after the first, as published."""
    text.apply([(match.start(), match.start() + 1, ", ") for match in re.finditer(r",\S", text.text)])


_backticks = _regular("`", " ", "`")
_waves = _regular(r"(?<!\w)([a-z])[ -]?(waves?)(?!\w)", lambda found: f"{found[1]} {found[2]}", "wave")
_ampersands = _regular("&", " and ", "&")
_blanks = _regular(r"\s{2,}|[^\S ]", " ")
_degrees = _regular(r"(?<!\w)deg(?!\w)", "degree", "deg")
_question_of_age = _regular(r"-{0,2}\? ?age(?!\w)", " ? age ", "?")
_question_before = _regular(r"(?<!\S)\?(?! ?age(?!\w)) ?(?=\w)", "<before?> ", "?")
_question_after = _regular(r"--?\?", " <after?> ", "?")
_ventricular_joins = _regular(
    r"(?<!\w)(supra|intra)(?: ?- ?| )(?=ventricular)", lambda found: found[1], "supra", "intra"
)
_atrial_joins = _regular(r"(?<!\w)(intra|inter)(?: ?- ?| )(?=atrial)", lambda found: found[1], "intra", "inter")
_asterisks = _regular(r"\*", " ", "*")
_ventricular = _regular(r"(?<!\w)v-(?=\w\w)", "ventricular ", "v-")
_atrial = _regular(r"(?<!\w)a-(?=\w\w)", "atrial ", "a-")
_bundles = _regular(r"(?<!\w)bundle(?!\w)(?! branch)", "bundle branch", "bundle")
_hyphens = _regular(r"-(?=(?:sensing|pacing)(?!\w))", " ", "-sensing", "-pacing")


def _in_turn(*steps: Callable[[Rewritten], None]) -> Callable[[Rewritten], None]:
    def rewrite(text: Rewritten) -> None:
        for step in steps:
            step(text)

    return rewrite


_clean = _in_turn(_backticks, _tighten_slashes, _waves, _ampersands, _blanks, _degrees)
_question_marks_and_commas = _in_turn(_question_of_age, _question_before, _question_after, _commas, _blanks)
_join = _in_turn(_ventricular_joins, _atrial_joins, _asterisks, _ventricular, _atrial, _bundles, _hyphens)

_LEAD = r"(?:iii|ii|i|av[rlf]|v[1-6])(?!\w)"
_LEADS = rf"({_LEAD}(?:[, ]+{_LEAD})*)"
_OF_LEADS = r"leads?(?:\(s\))?:? "
_LEAD_SENTENCES = tuple(
    (needs, re.compile(rf"(?<!\w){pattern}"), sentence)
    for needs, pattern, sentence in (
        ("unsuitable", rf"{_OF_LEADS}unsuitable for analysis:? {_LEADS}", "lead {} unsuitable for analysis"),
        ("missing", rf"missing {_OF_LEADS}{_LEADS}", "missing lead {}"),
        ("artifact", rf"artifact in {_OF_LEADS}{_LEADS}", "artifact in lead {}"),
        ("wander", rf"baseline wander in {_OF_LEADS}{_LEADS}", "baseline wander in lead {}"),
        (
            "morphology",
            rf"{_OF_LEADS}{_LEADS} (?:were )?not used for morphology analysis",
            "lead {} not used for morphology analysis",
        ),
        (
            "sequence",
            rf"possible sequence error: {_LEADS} omitted",
            "lead {} omitted due to possible sequence error",
        ),
        ("sequence", rf"sequence error: {_LEADS} omitted", "lead {} omitted due to sequence error"),
    )
)
"""Sentences about several leads and the sentence about one. "partial missing leads" reads as "missing leads"."""


def _lead_lists(text: Rewritten) -> None:
    """One sentence for each lead: "missing lead(s): v1, v2" -> "missing lead v1; missing lead v2". Of two lists of one
    kind in a report, each becomes the leads of both, as published."""
    for needs, pattern, sentence in _LEAD_SENTENCES:
        if needs not in text.text:
            continue
        found = list(pattern.finditer(text.text))
        leads = dict.fromkeys(lead for match in found for lead in re.split("[, ]+", match[1]))
        written = "; ".join(sentence.format(lead) for lead in leads)
        text.apply([(*match.span(), written) for match in found if match[0] != written])
