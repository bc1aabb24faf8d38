"""The compatible mode of the report labeler: what the ECG-FM labeler would say, label by label.

A report is rewritten into the words of the pattern files (`ecg_fm_normalise`), patterns are found in it
(`ecg_fm_match`), patterns become entities, entities bring their more general ones along, and all are named. It follows
the published labeler (McKeen et al., arXiv 2408.05178) with its faults, so that labels can be compared with those that
ECG-FM was finetuned on. The two that hurt most can be mended, see `EcgFmLabeler`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from ecgfm.reports.assertion import Assertion, Status
from ecgfm.reports.ecg_fm_match import Match, Matcher
from ecgfm.reports.ecg_fm_normalise import normalise, rewrite
from ecgfm.reports.ecg_fm_patterns import Kind, Pattern, Patterns, read_patterns

__all__ = ["Cluster", "EcgFmLabeler", "Explanation", "Patterns", "Reading", "Row", "Token", "read_patterns"]

CLIMB = 0.3
"""Of the doubt in an entity, the share that goes with each step to a more general one."""

CERTAIN = "Needs clinical correlation"
"""The entity that is certain whatever brought it along."""

ABSENT = "Absence"
"""The descriptor that says an entity is not there; as published it changes nothing."""

N_REMEMBERED = 50_000
"""Entities with their descriptors whose meaning is kept for the next report, some kB each. Real texts have hundreds."""

RowSource = Literal["text", "created", "attached", "compound", "super"]


class Token(NamedTuple):
    """A pattern where it stands: text[start:end] of the normalised report."""

    pattern: str
    kind: Kind
    start: int
    end: int


@dataclass(frozen=True)
class Row:
    """An entity of a cluster.

    source: it stands in the `text`; a descriptor `created` it; a descriptor `attached` to another entity made it; it is
        a `compound` of other clusters; or it is above another row of the cluster, a `super`
    follows: what it follows from: a descriptor (created), an entity and descriptor (attached), an entity (super)
    """

    name: str
    probability: float
    descriptors: tuple[str, ...]
    source: RowSource
    follows: str = ""


@dataclass(frozen=True)
class Cluster:
    """An entity of the text, or a compound, with everything that follows from it.

    token: position of its pattern among the tokens; None for a compound
    described_by: positions of the tokens that gave it descriptors
    parts: of a compound, positions of the clusters that it is made of
    negated: the text says that it is absent, and the labeler minds (see `EcgFmLabeler`): its row has probability 0
    """

    token: int | None
    rows: tuple[Row, ...]
    described_by: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()
    negated: bool = False


@dataclass(frozen=True)
class Explanation:
    """How a report was read.

    tokens: with their places in `normalised`
    spans: of each token, the span (start, end) of the report that it was made from
    """

    report: str
    normalised: str
    unmatched: str
    tokens: tuple[Token, ...]
    spans: tuple[tuple[int, int], ...]
    clusters: tuple[Cluster, ...]


class Reading(NamedTuple):
    """A report's labels: name -> probability, by code point. unmatched: see `EcgFmLabeler.unmatched`."""

    normalised: str
    unmatched: str
    probabilities: dict[str, float]


class _Instance(NamedTuple):
    """An entity of the text with its own and its given descriptors; tokens as in `Cluster`."""

    entity: str
    descriptors: tuple[str, ...]
    token: int
    described_by: tuple[int, ...]


class _Meaning(NamedTuple):
    """All that follows from an entity with its descriptors; it depends on nothing else in the report.

    labels: name -> probability, the highest of the rows
    holds: a bit for each condition of compounds that the rows fulfil
    """

    rows: tuple[Row, ...]
    labels: dict[str, float]
    holds: int


class EcgFmLabeler:
    """Labels of reports by the rules of the ECG-FM labeler. A `Labeler`.

    Labels are entities ("Infarction") and entities with a descriptor ("Infarction - Possible"), as the pattern files
    name them. The probability of an entity comes from the words of doubt about it; a label with a descriptor always
    has 1, as published.

    patterns: of `read_patterns`
    gate: as published, a report without a single connective ("with", "and", "or", "to" ...) has none of its descriptors
        heeded: "possible infarct" is a certain infarct. True: they are heeded in every report
    negation: as published, "without infarct" is an infarct. True: an entity that is said to be absent gives no label
        and nothing follows from it; `read` states it as absent. A "without" that `gate` does not heed negates nothing,
        so the two belong together
    """

    def __init__(self, patterns: Patterns, *, gate: bool = False, negation: bool = False) -> None:
        self.patterns = patterns
        self.gate = gate
        self.negation = negation
        self._matcher = Matcher([p.text for p in patterns.patterns], [p.group for p in patterns.patterns])
        self._above = _steps_to_supers(patterns.supers)
        conditions = [c for compound in patterns.compounds for c in (*compound.including, *compound.excluding)]
        self._condition_bits = {condition: 1 << i for i, condition in enumerate(dict.fromkeys(conditions))}
        self._compounds = [
            (
                sum({self._condition_bits[c] for c in compound.including}),
                sum({self._condition_bits[c] for c in compound.excluding}),
                self._meaning_of([Row(compound.entity, 1.0, (), "compound")]),
            )
            for compound in patterns.compounds
        ]
        self._meanings: dict[tuple[str, tuple[str, ...]], _Meaning] = {}

    @cached_property
    def labels(self) -> Sequence[str]:
        """Every label it can give, by code point: each entity that needs no descriptor, and each that stands in a
        pattern, or that descriptors climb to, with each of these. Some 10,000 with the published files."""
        names = {name for name in self.patterns.supers if name not in self.patterns.requires_descriptors}
        descriptors = [name for name in self.patterns.descriptors if name != ABSENT]
        in_patterns = {entity for pattern in self.patterns.patterns for entity, _ in pattern.entities}
        names |= {f"{entity} - {descriptor}" for entity in in_patterns for descriptor in descriptors}
        for root, climbing in self.patterns.traveling:
            below = [entity for entity, above in self._above.items() if entity == root or root in above]
            names |= {f"{entity} - {descriptor}" for entity in below for descriptor in climbing}
        return sorted(names)

    def normalise(self, report: str) -> str:
        """A raw report in the words of the patterns, by the rules of `ecg_fm_normalise`."""
        return normalise(report)

    def probabilities(self, normalised: str) -> dict[str, float]:
        """The labels of a normalised report with their probabilities, by code point; empty where it has none."""
        return self._merge(self._instances(self._matcher.find(normalised)))

    def unmatched(self, normalised: str) -> str:
        """What of a normalised report is part of no pattern, blanks and punctuation included."""
        return _without(normalised, self._matcher.find(normalised))

    def read_all(self, reports: Iterable[str | None]) -> list[Reading]:
        """The labels of raw reports, in their order. Equal reports are read once; one that is missing has no label."""
        by_text: dict[str, Reading] = {}
        readings = []
        for report in reports:
            text = report or ""
            if text not in by_text:
                normalised = normalise(text)
                matches = self._matcher.find(normalised)
                found = self._merge(self._instances(matches))
                by_text[text] = Reading(normalised, _without(normalised, matches), found)
            readings.append(by_text[text])
        return readings

    def read(self, report: str) -> list[Assertion]:
        """What a raw report asserts: present at probability 1, uncertain below; absent only with `negation`.

        A label's span is that of the pattern whose entity gives it its probability, the first such in the text; of a
        compound, the span from its first part to its last. Patterns stand in the normalised text. Their spans are
        carried back through every rewriting (`ecg_fm_normalise.Rewritten.original`): to the letter where nothing was
        rewritten, else to the whole of what the rule replaced.
        """
        explained = self.explain(report)
        found: dict[str, Assertion] = {}
        for cluster in explained.clusters:
            start, end = _span(explained, cluster)
            for row in cluster.rows:
                rule = _rule(explained, cluster, row)
                for label, probability in self._named(row):
                    if label not in found or probability > found[label].probability:
                        status: Status = "absent" if cluster.negated else "present" if probability == 1 else "uncertain"
                        found[label] = Assertion(label, status, probability, start, end, rule)
        return [found[label] for label in sorted(found)]

    def explain(self, report: str) -> Explanation:
        """How a raw report is read: its tokens, clusters and rows, and what each comes from."""
        rewritten = rewrite(report)
        matches = self._matcher.find(rewritten.text)
        clusters = []
        holds = []
        for instance in self._instances(matches):
            negated = self._is_negated(instance)
            meaning = self._meaning(instance)
            rows = (Row(instance.entity, 0.0, (), "text"),) if negated else meaning.rows
            clusters.append(Cluster(instance.token, rows, instance.described_by, negated=negated))
            holds.append(meaning.holds)
        for including, meaning in self._made(holds):
            parts = tuple(i for i, held in enumerate(holds) if held & including)
            clusters.append(Cluster(None, meaning.rows, parts=parts))
        patterns = self.patterns.patterns
        return Explanation(
            report=report,
            normalised=rewritten.text,
            unmatched=_without(rewritten.text, matches),
            tokens=tuple(Token(patterns[m.pattern].text, patterns[m.pattern].kind, m.start, m.end) for m in matches),
            spans=tuple(rewritten.original(match.start, match.end) for match in matches),
            clusters=tuple(clusters),
        )

    def _instances(self, matches: Sequence[Match]) -> list[_Instance]:
        """The entities of the text with what is said of each: by the patterns between it and the entities beside it."""
        patterns = [self.patterns.patterns[match.pattern] for match in matches]
        heeded = self.gate or any(pattern.kind == "connective" for pattern in patterns)
        about: list[tuple[int, Pattern, list[int], list[str]]] = []  # an entity pattern; who describes it; as what
        tokens: list[int] = []  # what is said of the next entity
        given: list[str] = []
        for i, pattern in enumerate(patterns):
            if pattern.kind == "entity":
                about.append((i, pattern, tokens, given))
                tokens, given = [], []
            elif heeded:
                if pattern.left and about:
                    about[-1][2].append(i)
                    about[-1][3].extend(pattern.left)
                if pattern.right:
                    tokens.append(i)
                    given.extend(pattern.right)
        return [
            _Instance(entity, tuple(dict.fromkeys((*own, *said))) if said else own, i, tuple(described_by))
            for i, pattern, described_by, said in about
            for entity, own in pattern.entities
        ]

    def _is_negated(self, instance: _Instance) -> bool:
        return self.negation and ABSENT in instance.descriptors

    def _meaning(self, instance: _Instance) -> _Meaning:
        key = instance.entity, instance.descriptors
        known = self._meanings.get(key)
        if known is None:
            if len(self._meanings) >= N_REMEMBERED:
                self._meanings.clear()
            known = _Meaning((), {}, 0) if self._is_negated(instance) else self._meaning_of(self._stated(*key))
            self._meanings[key] = known
        return known

    def _stated(self, entity: str, descriptors: tuple[str, ...]) -> list[Row]:
        """What a text says outright: the entity, and the entities that its descriptors bring along."""
        doubts = [self.patterns.probability[name] for name in descriptors if name in self.patterns.probability]
        probability = min(doubts, default=1.0)
        kept = tuple(name for name in descriptors if name != ABSENT)
        created = [
            (name, descriptor) for descriptor in descriptors for name in self.patterns.creates.get(descriptor, ())
        ]
        rows = [Row(entity, 1.0 if entity == CERTAIN else probability, kept, "text")]
        rows += [Row(name, 1.0 if name == CERTAIN else probability, (), "created", origin) for name, origin in created]
        return rows

    def _meaning_of(self, stated: list[Row]) -> _Meaning:
        rows = stated + self._supers(stated)
        described = [dict.fromkeys(row.descriptors) for row in rows]
        for root, climbing in self.patterns.traveling:
            tree = [i for i, row in enumerate(rows) if row.name == root or root in self._above[row.name]]
            for i in tree:
                carried = dict.fromkeys(name for name in climbing if name in described[i])
                for j in tree:
                    if rows[j].name in self._above[rows[i].name]:
                        described[j] |= carried
        rows = [
            Row(row.name, row.probability, tuple(said), row.source, row.follows)
            for row, said in zip(rows, described, strict=True)
        ]
        attached = [
            Row(result, row.probability, (), "attached", f"{entity} - {', '.join(needs)}")
            for entity, needs, result in self.patterns.attached
            for row in rows
            if row.name == entity and set(needs) <= set(row.descriptors)
        ]
        rows += attached + self._supers(attached)
        labels: dict[str, float] = {}
        for row in rows:
            for label, probability in self._named(row):
                labels[label] = max(probability, labels.get(label, 0.0))
        return _Meaning(tuple(rows), labels, self._holds(rows))

    def _supers(self, rows: Iterable[Row]) -> list[Row]:
        """The more general entities of each row. Of several ways up the longest counts: it gives the most."""
        return [
            Row(name, 1 - (1 - row.probability) * (1 - CLIMB) ** steps, (), "super", row.name)
            for row in rows
            for name, steps in self._above[row.name].items()
        ]

    def _holds(self, rows: Iterable[Row]) -> int:
        of_name: dict[str, set[str]] = {}
        for row in rows:
            of_name.setdefault(row.name, set()).update(row.descriptors)
        return sum(
            bit
            for (name, needs), bit in self._condition_bits.items()
            if name in of_name and of_name[name].issuperset(needs)
        )

    def _made(self, holds: Iterable[int]) -> list[tuple[int, _Meaning]]:
        """The compounds of a report whose clusters hold these conditions; compounds do not make compounds."""
        held = 0
        for bits in holds:
            held |= bits
        return [(inc, meaning) for inc, exc, meaning in self._compounds if held & inc == inc and not held & exc]

    def _merge(self, instances: Iterable[_Instance]) -> dict[str, float]:
        meanings = [self._meaning(instance) for instance in instances]
        meanings += [meaning for _, meaning in self._made(meaning.holds for meaning in meanings)]
        merged: dict[str, float] = {}
        for meaning in meanings:
            for label, probability in meaning.labels.items():
                if probability > merged.get(label, -1.0):
                    merged[label] = probability
        return dict(sorted(merged.items()))

    def _named(self, row: Row) -> Iterator[tuple[str, float]]:
        """The labels of a row with their probabilities."""
        if row.name not in self.patterns.requires_descriptors:
            yield row.name, row.probability
        for descriptor in row.descriptors:
            yield f"{row.name} - {descriptor}", 1.0


def _steps_to_supers(supers: dict[str, tuple[str, ...]]) -> dict[str, dict[str, int]]:
    """Of each entity, every more general one with the steps of the longest way to it. supers: without a circle."""
    above: dict[str, dict[str, int]] = {}

    def of(name: str) -> dict[str, int]:
        if name not in above:
            steps: dict[str, int] = {}
            for parent in supers[name]:
                for ancestor, further in {parent: 0, **of(parent)}.items():
                    steps[ancestor] = max(steps.get(ancestor, 0), further + 1)
            above[name] = steps
        return above[name]

    for name in supers:
        of(name)
    return above


def _without(text: str, matches: Sequence[Match]) -> str:
    kept = []
    done = 0
    for match in matches:
        kept.append(text[done : match.start])
        done = match.end
    kept.append(text[done:])
    return "".join(kept)


def _span(explained: Explanation, cluster: Cluster) -> tuple[int, int]:
    if cluster.token is not None:
        return explained.spans[cluster.token]
    spans = [_span(explained, explained.clusters[part]) for part in cluster.parts]
    return min(start for start, _ in spans), max(end for _, end in spans)


def _rule(explained: Explanation, cluster: Cluster, row: Row) -> str:
    """What gave a row, in words: `above Infarction; 'infarct', described by 'possible'`."""
    if cluster.token is None:
        parts = [explained.clusters[part].token for part in cluster.parts]
        origin = "made of " + " and ".join(repr(explained.tokens[part].pattern) for part in parts if part is not None)
    else:
        origin = repr(explained.tokens[cluster.token].pattern)
        if cluster.described_by:
            said = ", ".join(repr(explained.tokens[token].pattern) for token in cluster.described_by)
            origin += f", described by {said}"
    match row.source:
        case "created":
            return f"brought along by {row.follows}; {origin}"
        case "attached":
            return f"{row.follows}; {origin}"
        case "super":
            return f"above {row.follows}; {origin}"
        case "text" | "compound":
            return origin
