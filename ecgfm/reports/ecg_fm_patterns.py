"""The pattern files of the ECG-FM labeler (JSON), read and checked.

They come with the ECG-FM code (McKeen et al., arXiv 2408.05178; MIT licence) and are given by the user; none is part of
this project. What the files mean: `Patterns`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ecgfm.ecg import InputError

T = TypeVar("T")

Kind = Literal["entity", "before", "after", "connective"]
"""What a pattern does: names entities; describes the next entity, or the one before it; stands between two."""

logger = logging.getLogger(__name__)

Name = Annotated[str, Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class _Named:
    """A name with descriptors; in the files a bare name stands for one without."""

    tem: Name
    descriptors: tuple[Name, ...] = ()


Named = Annotated[_Named, BeforeValidator(lambda given: {"tem": given} if isinstance(given, str) else given)]


@dataclass(frozen=True)
class _EntityTem:
    name: Name
    sup: tuple[Name, ...] = ()
    require_descriptors: bool = False


@dataclass(frozen=True)
class _EntityPat:
    pattern: Text
    entities: tuple[Named, ...]


@dataclass(frozen=True)
class _DescTem:
    name: Name
    create_entities: tuple[Name, ...] = ()
    attribute_to: tuple[Any, ...] | None = None
    patterns: tuple[Text, ...] = ()


@dataclass(frozen=True)
class _DescPat:
    pattern: Text
    descriptors: tuple[Named, ...]
    before_after: Literal["b", "a"] = "b"
    parse_before_entities: bool = False


@dataclass(frozen=True)
class _Connective:
    pattern: Text
    descriptors: tuple[tuple[Name, ...], tuple[Name, ...]]


@dataclass(frozen=True)
class _CompoundTem:
    entity: Name
    including: Annotated[tuple[Named, ...], Field(min_length=1)]
    excluding: tuple[Named, ...] = ()


@dataclass(frozen=True)
class _AttachedDescTem:
    entity: Name
    descriptor: Name
    resulting_entity: Name


@dataclass(frozen=True)
class _TravelingDescTem:
    entity: Name
    descriptors: tuple[Name, ...]


@dataclass(frozen=True)
class _SplitDescTem:
    name: Name
    split: Annotated[tuple[Name, ...], Field(min_length=1)]
    patterns: tuple[Text, ...] = ()


@dataclass(frozen=True)
class Pattern:
    """One literal pattern.

    group: patterns of a lower group take their words first
    entities: of kind `entity`: each entity with its own descriptors; may be empty: such a pattern still takes what is
        said of the entity before or after
    left, right: of the other kinds: the descriptors of the nearest entity pattern before it, and after it
    """

    text: str
    kind: Kind
    group: int
    entities: tuple[tuple[str, tuple[str, ...]], ...] = ()
    left: tuple[str, ...] = ()
    right: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compound:
    """The entity of a report that holds all of `including` and none of `excluding`: entities with the descriptors that
    they must have."""

    entity: str
    including: tuple[tuple[str, tuple[str, ...]], ...]
    excluding: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Patterns:
    """What the pattern files say, with names resolved and descriptors that stand for several replaced by these.

    supers: of each entity its parents, the more general entities
    requires_descriptors: the entities that are a label only together with a descriptor
    creates: descriptor -> the entities that it brings along
    attached: (entity, descriptors, the entity that they make together)
    traveling: (entity, descriptors that climb to more general entities at or below it)
    probability: descriptor -> the probability of what it describes; 1 where it is not named
    """

    patterns: tuple[Pattern, ...]
    supers: dict[str, tuple[str, ...]]
    requires_descriptors: frozenset[str]
    descriptors: tuple[str, ...]
    creates: dict[str, tuple[str, ...]] = field(default_factory=dict)
    compounds: tuple[Compound, ...] = ()
    attached: tuple[tuple[str, tuple[str, ...], str], ...] = ()
    traveling: tuple[tuple[str, tuple[str, ...]], ...] = ()
    probability: dict[str, float] = field(default_factory=dict)


def read_patterns(folder: Path) -> Patterns:
    """The pattern files of a folder. `entity_tem.json` and `entity_pat.json` must be there; another that is missing is
    empty.

    Raises:
        InputError: no such folder or file, not JSON, an entry of the wrong form, an unknown name, a name or pattern
            that stands twice, or an entity above itself; with the file and the entry.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected the ECG-FM pattern files (entity_pat.json and others)")
    return _Reader(folder).read()


class _Reader:
    """One reading of a folder: what its checks share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entities: dict[str, _EntityTem] = {}
        self.descriptors: dict[str, _DescTem] = {}
        self.splits: dict[str, _SplitDescTem] = {}

    def read(self) -> Patterns:
        self.entities = self.by_name("entity_tem", self.entries("entity_tem", _EntityTem, required=True))
        self.descriptors = self.by_name("desc_tem", self.entries("desc_tem", _DescTem))
        self.splits = self.by_name("split_desc_tem", self.entries("split_desc_tem", _SplitDescTem))
        self.check_supers()
        self.check_splits()
        for tem in self.descriptors.values():
            if tem.attribute_to:
                logger.warning("%s: %r: attribute_to is not supported and changes nothing", "desc_tem.json", tem.name)
        return Patterns(
            patterns=self.patterns(),
            supers={name: tem.sup for name, tem in self.entities.items()},
            requires_descriptors=frozenset(tem.name for tem in self.entities.values() if tem.require_descriptors),
            descriptors=tuple(name for name in self.descriptors if name not in self.splits),
            creates={name: self.created(tem) for name, tem in self.descriptors.items() if tem.create_entities},
            compounds=self.compounds(),
            attached=self.attached(),
            traveling=self.traveling(),
            probability=self.probability(),
        )

    def load(self, name: str, required: bool) -> Any:
        """What a file holds; None where a file that need not be there is missing."""
        path = self.folder / f"{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            if not required:
                return None
            raise InputError(f"{path}: no such file; expected it among the ECG-FM pattern files") from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: not JSON: {error}") from error

    def entries(self, name: str, kind: type[T], required: bool = False) -> list[T]:
        loaded = self.load(name, required)
        if loaded is None:
            return []
        if not isinstance(loaded, list):
            raise InputError(f"{self.folder / name}.json: expected a list of entries, found {type(loaded).__name__}")
        adapter = TypeAdapter(kind)
        found = []
        for number, entry in enumerate(loaded, start=1):
            try:
                found.append(adapter.validate_python(entry))
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(str(part) for part in first["loc"])
                message = f"{place}: {first['msg']}" if place else first["msg"]
                raise self.wrong(name, self.title(entry, number), message) from error
        return found

    def title(self, entry: Any, number: int) -> str:
        keys = ("pattern", "name", "entity")
        named = [entry[key] for key in keys if isinstance(entry.get(key), str)] if isinstance(entry, dict) else []
        return f"entry {number}" + (f" ({named[0]!r})" if named else "")

    def wrong(self, name: str, entry: str, message: str) -> InputError:
        return InputError(f"{self.folder / name}.json: {entry}: {message}")

    def by_name(self, file: str, entries: Iterable[T]) -> dict[str, T]:
        found: dict[str, T] = {}
        for number, entry in enumerate(entries, start=1):
            name: str = entry.name  # type: ignore[attr-defined]
            if name in found:
                raise self.wrong(file, f"entry {number} ({name!r})", "this name stands in the file already")
            found[name] = entry
        return found

    # names

    def entity(self, file: str, entry: str, name: str) -> str:
        if name not in self.entities:
            raise self.wrong(file, entry, f"no entity {name!r} in entity_tem.json")
        return name

    def parts(self, file: str, entry: str, names: Iterable[str]) -> tuple[str, ...]:
        """The descriptors of these names, each once; those that stand for several replaced by them."""
        found: dict[str, None] = {}
        for name in names:
            if name in self.splits:
                found |= dict.fromkeys(self.parts(file, entry, self.splits[name].split))
            elif name in self.descriptors:
                found[name] = None
            else:
                raise self.wrong(file, entry, f"no descriptor {name!r} in desc_tem.json")
        return tuple(found)

    def named(self, file: str, entry: str, given: Iterable[_Named]) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return tuple((self.entity(file, entry, n.tem), self.parts(file, entry, n.descriptors)) for n in given)

    def check_supers(self) -> None:
        for tem in self.entities.values():
            for name in tem.sup:
                self.entity("entity_tem", repr(tem.name), name)
        self.check_no_circle("entity_tem", {name: tem.sup for name, tem in self.entities.items()})

    def check_splits(self) -> None:
        self.check_no_circle("split_desc_tem", {name: tem.split for name, tem in self.splits.items()})
        for name, tem in self.splits.items():
            self.parts("split_desc_tem", repr(name), tem.split)

    def check_no_circle(self, file: str, graph: Mapping[str, tuple[str, ...]]) -> None:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = " -> ".join(error.args[1])
            raise self.wrong(file, repr(error.args[1][0]), f"stands above itself: {circle}") from error

    # what the files say

    def patterns(self) -> tuple[Pattern, ...]:
        found: dict[str, tuple[Pattern, str]] = {}

        def add(file: str, pattern: Pattern) -> None:
            if pattern.text in found:
                raise self.wrong(file, repr(pattern.text), f"this pattern stands in {found[pattern.text][1]} already")
            found[pattern.text] = (pattern, f"{file}.json")

        for pat in self.entries("entity_pat", _EntityPat, required=True):
            entities = self.named("entity_pat", repr(pat.pattern), pat.entities)
            add("entity_pat", Pattern(pat.pattern, "entity", 1, entities=entities))
        for said in self.entries("desc_pat", _DescPat):
            # Descriptors of descriptors ("probably acute": Acute, itself Probable) are read and have no effect.
            names = self.parts("desc_pat", repr(said.pattern), [named.tem for named in said.descriptors])
            for named in said.descriptors:
                self.parts("desc_pat", repr(said.pattern), named.descriptors)
            group = 0 if said.parse_before_entities else 2
            if said.before_after == "b":
                add("desc_pat", Pattern(said.pattern, "before", group, right=names))
            else:
                add("desc_pat", Pattern(said.pattern, "after", group, left=names))
        tables: tuple[tuple[str, Iterable[_DescTem | _SplitDescTem]], ...] = (
            ("desc_tem", self.descriptors.values()),
            ("split_desc_tem", self.splits.values()),
        )
        for file, tems in tables:
            for tem in tems:
                for text in tem.patterns:
                    add(file, Pattern(text, "before", 2, right=self.parts(file, repr(tem.name), [tem.name])))
        for between in self.entries("connective", _Connective):
            left, right = (self.parts("connective", repr(between.pattern), names) for names in between.descriptors)
            add("connective", Pattern(between.pattern, "connective", 3, left=left, right=right))
        return tuple(pattern for pattern, _ in found.values())

    def created(self, tem: _DescTem) -> tuple[str, ...]:
        return tuple(self.entity("desc_tem", repr(tem.name), name) for name in tem.create_entities)

    def compounds(self) -> tuple[Compound, ...]:
        def compound(tem: _CompoundTem) -> Compound:
            including = self.named("compound_tem", repr(tem.entity), tem.including)
            excluding = self.named("compound_tem", repr(tem.entity), tem.excluding)
            return Compound(self.entity("compound_tem", repr(tem.entity), tem.entity), including, excluding)

        return tuple(map(compound, self.entries("compound_tem", _CompoundTem)))

    def attached(self) -> tuple[tuple[str, tuple[str, ...], str], ...]:
        found: dict[tuple[str, tuple[str, ...], str], None] = {}  # the published file has an entry twice
        for tem in self.entries("attached_desc_tem", _AttachedDescTem):
            title = repr(tem.resulting_entity)
            needs = self.parts("attached_desc_tem", title, [tem.descriptor])
            entity, result = (self.entity("attached_desc_tem", title, n) for n in (tem.entity, tem.resulting_entity))
            found[entity, needs, result] = None
        return tuple(found)

    def traveling(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        def climb(tem: _TravelingDescTem) -> tuple[str, tuple[str, ...]]:
            entity = self.entity("traveling_desc_tem", repr(tem.entity), tem.entity)
            return entity, self.parts("traveling_desc_tem", repr(tem.entity), tem.descriptors)

        return tuple(map(climb, self.entries("traveling_desc_tem", _TravelingDescTem)))

    def probability(self) -> dict[str, float]:
        loaded = self.load("uncertainty_map", required=False)
        path = self.folder / "uncertainty_map.json"
        if loaded is None:
            return {}
        if not isinstance(loaded, dict):
            raise InputError(f"{path}: expected descriptors with their probabilities, found {type(loaded).__name__}")
        found: dict[str, float] = {}
        for name, value in loaded.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise self.wrong("uncertainty_map", repr(name), f"expected a probability, 0 to 1, found {value!r}")
            for part in self.parts("uncertainty_map", repr(name), [name]):
                found[part] = min(float(value), found.get(part, 1.0))
        return found
