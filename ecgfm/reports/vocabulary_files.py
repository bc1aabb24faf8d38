"""The YAML files of a vocabulary, laid over each other: what each says of each name, with the line where it does."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, NamedTuple

import yaml

from ecgfm.ecg import InputError
from ecgfm.reports.statements import pieces

Kind = Literal["finding", "part", "quality", "site", "age", "detail", "cue", "link", "break", "neutral"]

OUR_FILES = ("words.yaml", "findings.yaml", "label_sets.yaml")
MAX_EXPANSIONS = 400
"""Phrases that one phrase with alternatives may stand for."""

LIST_SECTIONS: Mapping[str, Kind] = {"breaks": "break", "neutral": "neutral"}
NAMED_SECTIONS: Mapping[str, Kind] = {
    "findings": "finding",
    "parts": "part",
    "qualities": "quality",
    "sites": "site",
    "ages": "age",
    "details": "detail",
    "cues": "cue",
    "links": "link",
}
_KEYS: Mapping[str, tuple[str, ...]] = {
    "findings": ("snomed", "parents", "phrases", "drop", "made_of", "all_of", "either", "excludes", "normal"),
    "parts": ("phrases", "drop", "means"),
    "qualities": ("phrases", "drop"),
    "sites": ("phrases", "drop", "means"),
    "ages": ("phrases", "drop", "trailing", "past", "means", "probability"),
    "details": ("phrases", "drop", "trailing"),
    "cues": ("phrases", "drop", "acts", "reach", "probability"),
    "links": ("phrases", "drop"),
}


class Place(NamedTuple):
    """Where something was written."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass
class Entry:
    """What the files say of one name of a section; `_read_entry` fills it."""

    place: Place
    phrases: list[tuple[str, Place]] = field(default_factory=list)
    trailing: list[tuple[str, Place]] = field(default_factory=list)
    lists: dict[str, list[tuple[Any, Place]]] = field(default_factory=dict)
    values: dict[str, tuple[str, Place]] = field(default_factory=dict)

    def names(self, key: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(name for name, _ in self.lists.get(key, ())))


class Files:
    """Files laid over each other.

    sections: section -> name -> what is said of it
    listed: the sections that are lists
    words: variant -> what it is read as
    label_sets: set -> label -> the findings that assert it, and those that do not
    """

    def __init__(self) -> None:
        self.sections: dict[str, dict[str, Entry]] = {section: {} for section in NAMED_SECTIONS}
        self.listed: dict[str, list[tuple[str, Place]]] = {section: [] for section in LIST_SECTIONS}
        self.words: dict[str, tuple[str, Place]] = {}
        self.label_sets: dict[str, dict[str, tuple[list[tuple[str, Place]], list[tuple[str, Place]]]]] = {}

    def add(self, file: str, text: str) -> None:
        """Lay one file over what is there."""
        try:
            root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.YAMLError as error:
            line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
            problem = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise InputError(f"{file}:{line}: expected YAML: {problem}") from error
        known = ("words", *NAMED_SECTIONS, *LIST_SECTIONS, "label_sets")
        for section, node, place in _pairs(root, file) if root is not None else ():
            if section not in known:
                raise InputError(
                    f"{place}: unknown section {section}{perhaps(section, known)}; known: {', '.join(known)}"
                )
            if section == "words":
                self._add_words(node, file)
            elif section == "label_sets":
                self._add_label_sets(node, file)
            elif section in LIST_SECTIONS:
                self.listed[section] += _texts(node, file)
            else:
                for name, below, where in _pairs(node, file):
                    self._add_entry(section, name, below, where)

    def _add_words(self, node: yaml.Node, file: str) -> None:
        for word, below, place in _pairs(node, file):
            for written, where in _texts(below, file):
                variant, meant = _one_word(written, where), _one_word(word, place)
                before, at = self.words.setdefault(variant, (meant, where))
                if before != meant:
                    raise InputError(f"{where}: {variant} is read as {meant} here and as {before} at {at}; keep one")

    def _add_entry(self, section: str, name: str, node: yaml.Node, place: Place) -> None:
        entry = self.sections[section].setdefault(name, Entry(place))
        if isinstance(node, yaml.SequenceNode):  # short for its phrases
            entry.phrases += _texts(node, place.file)
            return
        for key, value, where in _pairs(node, place.file):
            if key not in _KEYS[section]:
                known = _KEYS[section]
                raise InputError(
                    f"{where}: {name}: unknown key {key}{perhaps(key, known)}; {section} have {', '.join(known)}"
                )
            if key == "phrases":
                entry.phrases += _texts(value, place.file)
            elif key == "trailing":
                entry.trailing += _texts(value, place.file)
            elif key == "drop":
                entry.phrases = _without(name, entry.phrases, _texts(value, place.file))
            elif key in ("made_of", "all_of"):
                if not isinstance(value, yaml.SequenceNode):
                    raise InputError(f"{where}: {name}: {key}: expected a list of lists of names")
                groups = [tuple(text for text, _ in _texts(below, place.file)) for below in value.value]
                lines = [Place(place.file, below.start_mark.line + 1) for below in value.value]
                entry.lists.setdefault(key, []).extend(zip(groups, lines, strict=True))
            elif key in ("parents", "either", "excludes", "means"):
                entry.lists.setdefault(key, []).extend(_texts(value, place.file))
            elif isinstance(value, yaml.ScalarNode):
                entry.values[key] = (value.value, where)
            else:
                raise InputError(f"{where}: {name}: {key}: expected one value, found a list")

    def _add_label_sets(self, node: yaml.Node, file: str) -> None:
        for set_name, below, _ in _pairs(node, file):
            labels: dict[str, tuple[list[tuple[str, Place]], list[tuple[str, Place]]]] = {}
            for label, rule, place in _pairs(below, file):
                if isinstance(rule, yaml.SequenceNode):
                    labels[label] = (_texts(rule, file), [])
                    continue
                given = {key: (_texts(value, file), where) for key, value, where in _pairs(rule, file)}
                for key, (_, where) in given.items():
                    if key not in ("any_of", "but_not"):
                        raise InputError(f"{where}: {label}: unknown key {key}; a label has any_of and but_not")
                if "any_of" not in given:
                    raise InputError(f"{place}: {label}: expected any_of: the findings that assert the label")
                labels[label] = (given["any_of"][0], given["but_not"][0] if "but_not" in given else [])
            self.label_sets[set_name] = labels


def _without(
    name: str, phrases: Iterable[tuple[str, Place]], dropped: Iterable[tuple[str, Place]]
) -> list[tuple[str, Place]]:
    """Phrases but for those that are dropped, each of which has to be there."""
    left = [(_plain(one), one, at) for text, at in phrases for one in expanded(text, at)]
    known = {plain for plain, _, _ in left}
    gone: set[str] = set()
    for text, at in dropped:
        given = {_plain(one) for one in expanded(text, at)}
        if not given & known:
            raise InputError(f"{at}: {name}: drop: no phrase of it is {text!r}{perhaps(text, known)}")
        gone |= given
    return [(one, at) for plain, one, at in left if plain not in gone]


def _plain(phrase: str) -> str:
    return " ".join(piece for piece, _, _ in pieces(phrase))


def perhaps(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def _pairs(node: yaml.Node, file: str) -> Iterator[tuple[str, yaml.Node, Place]]:
    """The keys of a mapping, each once, with what is below them."""
    if not isinstance(node, yaml.MappingNode):
        found = "a list" if isinstance(node, yaml.SequenceNode) else repr(node.value)
        raise InputError(f"{file}:{node.start_mark.line + 1}: expected names with a colon, found {found}")
    seen: dict[str, Place] = {}
    for key, value in node.value:
        place = Place(file, key.start_mark.line + 1)
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"{place}: expected a name, found a list or names")
        if key.value in seen:
            raise InputError(f"{place}: {key.value} stands here and at {seen[key.value]}; keep one")
        seen[key.value] = place
        yield key.value, value, place


def _texts(node: yaml.Node, file: str) -> list[tuple[str, Place]]:
    """The texts of a list."""
    if not isinstance(node, yaml.SequenceNode):
        raise InputError(f"{file}:{node.start_mark.line + 1}: expected a list, [...], found {node.value!r}")
    texts = []
    for below in node.value:
        place = Place(file, below.start_mark.line + 1)
        if not isinstance(below, yaml.ScalarNode) or not below.value.strip():
            raise InputError(
                f"{place}: expected a text, found {'nothing' if isinstance(below, yaml.ScalarNode) else 'a list'}"
            )
        texts.append((below.value, place))
    return texts


def _one_word(text: str, place: Place) -> str:
    found = pieces(text)
    if len(found) != 1:
        raise InputError(
            f"{place}: words: expected one word, found {text!r}; phrases belong to a finding or another section"
        )
    return found[0][0]


def expanded(text: str, place: Place) -> list[str]:
    """The phrases that a phrase with alternatives stands for.

    >>> expanded("<st|st-t> elevation<s|>", Place("", 1))
    ['st elevations', 'st elevation', 'st-t elevations', 'st-t elevation']
    """
    if "<" not in text and ">" not in text:
        return [text]
    choices: list[list[str]] = []
    rest = text
    count = 1
    while rest:
        before, opened, rest = rest.partition("<")
        inside, closed, after = rest.partition(">")
        if ">" in before or bool(opened) != bool(closed) or "<" in inside:
            raise InputError(f"{place}: {text!r}: expected alternatives as <one|other>, not nested")
        choices.append([before])
        if opened:
            choices.append(inside.split("|"))
            count *= len(choices[-1])
        rest = after
        if count > MAX_EXPANSIONS:
            raise InputError(f"{place}: {text!r} stands for more than {MAX_EXPANSIONS} phrases; write several")
    return ["".join(parts) for parts in product(*choices)]
