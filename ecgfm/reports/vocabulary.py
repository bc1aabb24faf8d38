"""The words that the report labeler knows, read from YAML: findings, what describes them, and what bends their meaning.

Our own stand beside this module: `findings.yaml` (findings, and the parts of an ECG with the qualities that make
findings of them), `words.yaml` (spelling, sites, ages, cues, links) and `label_sets.yaml`. All have the same sections,
and a user's file has too; it is merged over ours: what is new is added, a list grows, a single value is replaced, and
`drop` takes phrases away. docs/labeler.md shows one.

A phrase may hold alternatives, `<atrial|auricular> <fib|flutter|>`, an empty one for what may be left out. Each phrase
means one thing; to give it to two is a mistake, named with its line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from ecgfm.ecg import InputError
from ecgfm.reports.statements import Spelling, pieces
from ecgfm.reports.vocabulary_files import (
    LIST_SECTIONS,
    NAMED_SECTIONS,
    OUR_FILES,
    Entry,
    Files,
    Kind,
    Place,
    expanded,
    perhaps,
)

Acts = Literal[
    "denies",
    "overrules",
    "doubts",
    "asks",
    "supposes",
    "recalls",
    "affirms",
    "replaces",
    "replaced by",
    "prefers",
    "compares",
    "shows",
]
Reach = Literal["following", "preceding", "either"]


class Term(NamedTuple):
    """What a phrase means.

    trailing: of an age or detail: the phrase describes only what stands before it, as "age undetermined" does
    """

    kind: Kind
    name: str
    trailing: bool = False


@dataclass(frozen=True)
class Finding:
    """One thing that a report can assert.

    snomed: its SNOMED CT code; "" where there is none that fits
    parents: what holds wherever this does
    either: where this is stated, one of them holds, and it is not said which
    all_of: where all of one of these groups hold, this does
    excludes: what does not hold where this does
    normal: it says that something is as it should be
    """

    name: str
    snomed: str = ""
    parents: tuple[str, ...] = ()
    either: tuple[str, ...] = ()
    all_of: tuple[tuple[str, ...], ...] = ()
    excludes: tuple[str, ...] = ()
    normal: bool = False


@dataclass(frozen=True)
class Cue:
    """What bends the meaning of findings near it. docs/labeler.md has the table of probabilities.

    acts:
        denies: the finding is absent
        overrules: it is absent, whatever else the report says of it: another reader, a machine, was wrong
        doubts: it is uncertain, at `probability`
        asks: what the ECG was made for; nothing is said of what follows
        supposes: a condition; nothing is said here and now
        recalls: an earlier time; nothing is said, unless another cue says what became of the finding
        affirms: it is present now, whatever was recalled, or denied in the list before it
        replaces: what stands before the cue holds, what follows no longer; "replaced by" is the other way
        prefers: of two findings the first is uncertain at `probability`, the second at what is left of 1; `either`:
            the cue stands between them, "A more likely than B"; `following`: before them, "favor A over B"
        compares: names an earlier ECG
        shows: recalls what follows where an earlier ECG was named
    reach: where the findings stand that it acts on; `either`: following where one follows at once, else preceding
    """

    name: str
    acts: Acts
    reach: Reach
    probability: float


@dataclass(frozen=True)
class LabelRule:
    """What asserts a label: any of these findings, or what is a kind of them, but for the kinds of `but_not`."""

    any_of: tuple[str, ...]
    but_not: tuple[str, ...] = ()


class Vocabulary:
    """What the labeler knows; made by `Vocabulary.read`.

    findings, cues: by name
    terms: what a phrase means, phrases in the vocabulary's spelling, words joined by a blank
    forms: the finding that a part with a quality makes, or a finding at a site or of an age: (part, quality) -> finding
    means: what a site, part or age stands for, if another or several: anteroseptal -> anterior, septal
    past: the ages that tell of an earlier time
    doubtful: how probable an age is that is itself in doubt: "possibly acute"
    label_sets: name -> label -> what asserts it
    """

    def __init__(self, files: Files) -> None:
        self.label_sets = _label_sets(files)
        self.findings = _findings(files)
        self.cues = _cues(files)
        self.means = _means(files)
        self.past = frozenset(name for name, entry in files.sections["ages"].items() if _is_true(entry, "past"))
        self.doubtful = {
            name: _probability(name, entry)
            for name, entry in files.sections["ages"].items()
            if "probability" in entry.values
        }
        self.forms = _forms(files, self.means)
        self.spelling, self.terms = _terms(files)
        self._children: dict[str, list[str]] = {name: [] for name in self.findings}
        for finding in self.findings.values():
            for parent in finding.parents:
                self._children[parent].append(finding.name)

    @classmethod
    def read(cls, user_file: Path | None = None) -> Vocabulary:
        """Our vocabulary, and a user's merged over it.

        Raises:
            InputError: the user's file is missing or no YAML, or has an unknown section, key, parent or other name, a
                circle of parents, or a phrase that already means something else; with file and line.
        """
        files = Files()
        ours = resources.files("ecgfm.reports")
        for name in OUR_FILES:
            files.add(name, (ours / name).read_text(encoding="utf-8"))
        if user_file is not None:
            try:
                text = user_file.read_text(encoding="utf-8")
            except OSError as error:
                raise InputError(f"{user_file}: cannot be read: {error.strerror}; name a YAML file of rules") from error
            except UnicodeDecodeError as error:
                line = error.object.count(b"\n", 0, error.start) + 1
                raise InputError(f"{user_file}:{line}: expected text in UTF-8; save it as UTF-8") from error
            files.add(str(user_file), text)
        return cls(files)

    def ancestors(self, name: str) -> dict[str, tuple[str, ...]]:
        """A finding and everything above it, nearest first, each with its parents.

        Raises:
            InputError: no finding has that name.

        >>> list(Vocabulary.read().ancestors("Left anterior fascicular block"))[:2]
        ['Left anterior fascicular block', 'Fascicular block']
        """
        return self._reached(name, lambda at: self.findings[at].parents)

    def descendants(self, name: str) -> dict[str, tuple[str, ...]]:
        """A finding and everything that is a kind of it, nearest first, each with its children.

        Raises:
            InputError: no finding has that name.
        """
        return self._reached(name, lambda at: tuple(self._children[at]))

    def labels_of(self, label_set: str) -> Mapping[str, LabelRule]:
        """The labels of a set, in its order.

        Raises:
            InputError: no set has that name.

        >>> list(Vocabulary.read().labels_of("ptb-xl-super"))
        ['NORM', 'MI', 'STTC', 'CD', 'HYP']
        """
        if label_set not in self.label_sets:
            raise InputError(f"no label set {label_set}; label sets: {', '.join(self.label_sets)}")
        return self.label_sets[label_set]

    def _reached(self, name: str, step: Callable[[str], tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        """A finding and all that steps lead to, nearest first, each with where it leads."""
        self._require(name)
        found: dict[str, tuple[str, ...]] = {}
        waiting = [name]
        for at in waiting:
            if at not in found:
                found[at] = step(at)
                waiting.extend(found[at])
        return found

    def _require(self, name: str) -> None:
        if name not in self.findings:
            raise InputError(f"no finding is called {name}{self._meant(name) or perhaps(name, self.findings)}")

    def _meant(self, phrase: str) -> str:
        """The finding that a phrase names, as in a report: "LBBB"."""
        term = self.terms.get(" ".join(token.word for token in self.spelling.tokens(phrase)))
        return f"; did you mean {term.name}?" if term is not None and term.kind == "finding" else ""


def _is_true(entry: Entry, key: str) -> bool:
    value, place = entry.values.get(key, ("false", entry.place))
    if value not in ("true", "false"):
        raise InputError(f"{place}: {key}: expected true or false, found {value!r}")
    return value == "true"


def _findings(files: Files) -> dict[str, Finding]:
    """The findings, their names resolved and free of circles."""
    entries = files.sections["findings"]
    for name, entry in entries.items():
        for key in ("parents", "either", "excludes"):
            for other, place in entry.lists.get(key, ()):
                _require(other, entries, f"{place}: {name}: {key}: no finding is called")
        for group, place in entry.lists.get("all_of", ()):
            for other in group:
                _require(other, entries, f"{place}: {name}: all_of: no finding is called")
    _check_circles(files)
    return {
        name: Finding(
            name,
            entry.values.get("snomed", ("", None))[0],
            entry.names("parents"),
            entry.names("either"),
            entry.names("all_of"),
            entry.names("excludes"),
            _is_true(entry, "normal"),
        )
        for name, entry in entries.items()
    }


def _check_circles(files: Files) -> None:
    entries = files.sections["findings"]
    try:
        TopologicalSorter({name: entry.names("parents") for name, entry in entries.items()}).prepare()
    except CycleError as error:
        circle = error.args[1][::-1]  # each is followed by its parent
        given = [
            place
            for child, parent in pairwise(circle)
            for name, place in entries[child].lists["parents"]
            if name == parent
        ]
        last = max(given, key=lambda place: (place.file not in OUR_FILES, place.line))
        raise InputError(f"{last}: a circle of parents: {' > '.join(circle)}; take one of them out") from error


def _probability(name: str, entry: Entry) -> float:
    text, place = entry.values.get("probability", ("", entry.place))
    try:
        probability = float(text)
    except ValueError:
        probability = math.nan
    if not 0 < probability < 1:
        raise InputError(f"{place}: {name}: probability: expected a number between 0 and 1, found {text!r}")
    return probability


def _cues(files: Files) -> dict[str, Cue]:
    found = {}
    for name, entry in files.sections["cues"].items():
        for key, allowed in (("acts", get_args(Acts)), ("reach", get_args(Reach))):
            value, place = entry.values.get(key, ("", entry.place))
            if value not in allowed:
                raise InputError(f"{place}: {name}: {key}: expected one of {', '.join(allowed)}, found {value!r}")
        acts = entry.values["acts"][0]
        probability = (
            _probability(name, entry) if acts in ("doubts", "prefers") or "probability" in entry.values else 0.0
        )
        found[name] = Cue(name, acts, entry.values["reach"][0], probability)  # type: ignore[arg-type]
    return found


def _means(files: Files) -> dict[str, tuple[str, ...]]:
    """What a site, part or age stands for, all the way down."""
    found = {}
    for section in ("parts", "sites", "ages"):
        entries = files.sections[section]
        for name, entry in entries.items():
            for other, place in entry.lists.get("means", ()):
                _require(other, entries, f"{place}: {name}: means: none of the {section} is called")
                if entries[other].names("means"):
                    raise InputError(f"{place}: {name}: means: {other} means others itself; name those")
            found[name] = entry.names("means")
    return {name: others for name, others in found.items() if others}


def _forms(files: Files, means: Mapping[str, tuple[str, ...]]) -> dict[tuple[str, str], str]:
    """(part, quality) and (finding, site, age or detail) -> finding; (part, "") where the part alone makes it, and
    (part, detail) where a detail before the part alone does."""
    modifiers: dict[str, str] = {}
    for section in ("qualities", "sites", "ages", "details"):
        for name, entry in files.sections[section].items():
            if name in modifiers:
                raise InputError(f"{entry.place}: {name} is among {section} and among {modifiers[name]}; rename one")
            modifiers[name] = section
    found: dict[tuple[str, str], str] = {}
    for name, entry in files.sections["findings"].items():
        for group, place in entry.lists.get("made_of", ()):
            base, modifier = (*group, "", "")[:2]
            is_part = base in files.sections["parts"]
            if len(group) not in (1, 2) or (len(group) == 1 and not is_part):
                raise InputError(
                    f"{place}: {name}: made_of: expected [part], [part, quality] or [finding, site or age]"
                )
            bases = {**files.sections["parts"], **files.sections["findings"]}
            _require(base, bases, f"{place}: {name}: made_of: no part or finding is called")
            if modifier:
                _require(modifier, modifiers, f"{place}: {name}: made_of: no quality, site, age or detail is called")
            if is_part and modifier and modifiers[modifier] not in ("qualities", "details"):
                raise InputError(f"{place}: {name}: made_of: {base} is a part, so expected a quality or detail")
            if not is_part and modifiers[modifier] == "qualities":
                raise InputError(f"{place}: {name}: made_of: {base} is a finding, so expected a site, age or detail")
            other = found.setdefault((base, modifier), name)
            if other != name:
                raise InputError(f"{place}: {name}: made_of: {base} {modifier} already makes {other}")
    return found


def _label_sets(files: Files) -> dict[str, dict[str, LabelRule]]:
    entries = files.sections["findings"]
    for labels in files.label_sets.values():
        for label, rule in labels.items():
            for name, place in (*rule[0], *rule[1]):
                _require(name, entries, f"{place}: {label}: no finding is called")
    return {
        set_name: {
            label: LabelRule(tuple(n for n, _ in any_of), tuple(n for n, _ in but_not))
            for label, (any_of, but_not) in labels.items()
        }
        for set_name, labels in files.label_sets.items()
    }


def _terms(files: Files) -> tuple[Spelling, dict[str, Term]]:
    """The spelling of all phrases together, and what each phrase means."""
    given = [
        ([piece for piece, _, _ in pieces(phrase)], term, place)
        for text, term, place in _phrases(files)
        for phrase in expanded(text, place)
    ]
    words = {variant: meant for variant, (meant, _) in files.words.items()}
    spelling = Spelling(words, (words.get(word, word) for phrase, _, _ in given for word in phrase))
    terms: dict[str, Term] = {}
    places: dict[str, Place] = {}
    for phrase, term, place in given:
        key = " ".join([spelling.settled(word) for word in phrase])
        if not key:
            raise InputError(f"{place}: {term.name}: expected a phrase, found nothing that can be read")
        before = terms.setdefault(key, term)
        at = places.setdefault(key, place)
        if before != term:
            raise InputError(
                f"{place}: the phrase {' '.join(phrase)!r} is given to the {term.kind} {term.name}, "
                f"but means the {before.kind} {before.name} at {at}; keep one (drop: takes a phrase away)"
            )
    return spelling, terms


def _phrases(files: Files) -> Iterator[tuple[str, Term, Place]]:
    for section, kind in NAMED_SECTIONS.items():
        for name, entry in files.sections[section].items():
            yield from ((text, Term(kind, name), place) for text, place in entry.phrases)
            yield from ((text, Term(kind, name, trailing=True), place) for text, place in entry.trailing)
    for section, kind in LIST_SECTIONS.items():
        yield from ((text, Term(kind, ""), place) for text, place in files.listed[section])


def _require(name: str, known: Iterable[str], problem: str) -> None:
    if name not in known:
        raise InputError(f"{problem} {name}{perhaps(name, known)}")
