"""The labeler's own mode: what a report asserts, denies and leaves open, statement by statement.

`mentions.py` finds what a statement mentions, `scope.py` what its cues make of that; no cue crosses a statement. Beside
what is stated:

- What a finding is a kind of holds with it: present with present, uncertain with uncertain. That a finding is absent
  says nothing of what it is a kind of; in a label set, it makes those labels absent that are kinds of it.
- Of "A or B" each is uncertain, and what both are kinds of is as certain as the statement.
- A finding denied at one site or of one age alone ("no inferior infarct") is denied there alone.
- Where statements differ, present holds over uncertain, uncertain over absent; of two uncertain the more probable. What
  a reader overrules ("disagree with LBBB") is absent, whatever a machine's statement before it says.
- A finding that others make together (`all_of`) holds as surely as the least sure of them.
- What a present finding excludes is absent, where nothing else is said of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ecgfm.reports.assertion import Assertion, Status
from ecgfm.reports.mentions import Item, Mention, Reader
from ecgfm.reports.scope import Said, judge, links_between
from ecgfm.reports.statements import Token, split
from ecgfm.reports.vocabulary import LabelRule, Vocabulary

CACHED = 200_000
"""Statements whose reading is kept; when they are as many, all are forgotten."""
LONGEST_CACHED = 600
"""Characters of a statement whose reading is kept."""
EITHER = 0.5
"""The probability of each finding of "A or B"."""

_RANK: dict[Status, float] = {"present": 2.0, "uncertain": 1.0, "absent": 0.0}
_DID = {
    "denies": "denied by",
    "overrules": "overruled by",
    "doubts": "doubted by",
    "asks": "asked about:",
    "supposes": "only supposed:",
    "recalls": "of an earlier time:",
    "shows": "of an earlier ECG:",
    "affirms": "affirmed by",
}


@dataclass(frozen=True)
class Reading:
    """One finding that a statement mentions, and how it was read.

    status: None where nothing is said of the finding here and now
    start, end: the words that mention it, in the report
    describing: its sites, ages and details, as written
    cues: what acted on it, with the words that did: ("denied by", "no evidence of")
    rule: all of it in words
    """

    finding: str
    status: Status | None
    probability: float
    start: int
    end: int
    describing: tuple[str, ...]
    cues: tuple[tuple[str, str], ...]
    rule: str


@dataclass(frozen=True)
class StatementReading:
    """One statement of a report: where it stands, what was read in it, and what nothing explains (text, start, end)."""

    start: int
    end: int
    readings: tuple[Reading, ...]
    unmatched: tuple[tuple[str, int, int], ...]


class _Vote(NamedTuple):
    """What a statement says of a label; offsets in the statement."""

    label: int
    finding: str
    rank: float
    status: Status
    probability: float
    start: int
    end: int
    rule: str


class _Read(NamedTuple):
    """What comes of a statement: the best vote on each label, what is overruled with its kinds, and what nothing
    explains (text, start, end)."""

    votes: list[_Vote]
    overruled: frozenset[str]
    unmatched: list[tuple[str, int, int]]


class OwnLabeler:
    """Reads reports by a vocabulary. It holds its automaton and what it has read; each process makes its own.

    label_set: the labels to give, a name of `vocabulary.label_sets`; without, every finding is a label

    Raises:
        InputError: there is no such label set.

    >>> labeler = OwnLabeler(Vocabulary.read(), "ecg-fm-17")
    >>> for found in labeler.read("Sinus rhythm, possible left bundle branch block."):
    ...     print(found.label, found.status, found.probability, found.start)
    Sinus rhythm present 1.0 0
    Left bundle branch block uncertain 0.5 23
    """

    def __init__(self, vocabulary: Vocabulary, label_set: str | None = None) -> None:
        self.vocabulary = vocabulary
        self._reader = Reader(vocabulary)
        self._normal = {name for name, finding in vocabulary.findings.items() if finding.normal}
        parents = {name: frozenset(finding.parents) for name, finding in vocabulary.findings.items()}
        self._near = {name: (mine, frozenset().union(*(parents[of] for of in mine))) for name, mine in parents.items()}
        every = {name: LabelRule((name,)) for name in vocabulary.findings}
        rules = every if label_set is None else dict(vocabulary.labels_of(label_set))
        self.labels: tuple[str, ...] = tuple(rules)
        together = [finding for finding in vocabulary.findings.values() if finding.all_of]
        parts = list(dict.fromkeys(name for finding in together for group in finding.all_of for name in group))
        # what is needed to know what findings make together is a label too, behind those that are given
        number = {name: len(rules) + k for k, name in enumerate(parts)}
        self._together = [
            (finding.name, " and ".join(group), tuple(number[name] for name in group))
            for finding in together
            for group in finding.all_of
        ]
        self._present: dict[str, list[int]] = {name: [] for name in every}
        self._absent: dict[str, list[int]] = {name: [] for name in every}
        for k, rule in enumerate([*rules.values(), *(LabelRule((name,)) for name in parts)]):
            below = {name for asserting in rule.any_of for name in vocabulary.descendants(asserting)}
            for name in sorted(below - {name for other in rule.but_not for name in vocabulary.descendants(other)}):
                self._present[name].append(k)
            if label_set is None or k >= len(rules):
                self._absent[rule.any_of[0]].append(k)
            else:
                for name in sorted(set.intersection(*(set(vocabulary.ancestors(of)) for of in rule.any_of))):
                    self._absent[name].append(k)
        self._titles = (*rules, *parts)
        self._known: dict[str, _Read] = {}

    def read(self, report: str) -> list[Assertion]:
        """What a report asserts: at most one assertion of a label, in the order of `labels`; spans in the report."""
        return self.read_all(report)[0]

    def read_all(self, report: str) -> tuple[list[Assertion], list[tuple[str, int, int]]]:
        """`read` and `unmatched` at once."""
        best: dict[int, tuple[_Vote, int]] = {}
        unmatched: list[tuple[str, int, int]] = []
        known = self._known
        statements = [(at, report[at:end]) for at, end in split(report)]
        reads = [known.get(text) or self._read(text) for _, text in statements]
        overruled = frozenset[str]().union(*(read.overruled for read in reads))
        if overruled:
            reads = [self._read_anew(text, overruled) for _, text in statements]
        for (at, _), read in zip(statements, reads, strict=True):
            for vote in read.votes:
                before = best.get(vote.label)
                if before is None or vote.rank > before[0].rank:
                    best[vote.label] = (vote, at)
            if read.unmatched:
                unmatched += [(words, first + at, last + at) for words, first, last in read.unmatched]
        self._add_together(best)
        labels, given = self._titles, len(self.labels)
        said = [
            Assertion(labels[k], vote.status, vote.probability, vote.start + at, vote.end + at, vote.rule)
            for k, (vote, at) in sorted(best.items())
            if k < given
        ]
        return said, unmatched

    def explain(self, report: str) -> list[StatementReading]:
        """How each statement of a report was read, for people to see; `read` says what becomes of it all together."""
        return [self._explained(report[start:end], start) for start, end in split(report)]

    def unmatched(self, report: str) -> list[tuple[str, int, int]]:
        """The words that nothing explains, run by run: (text, start, end).

        >>> OwnLabeler(Vocabulary.read()).unmatched("Sinus rhythm with funny squiggles")
        [('funny squiggles', 18, 33)]
        """
        return self.read_all(report)[1]

    def _read(self, text: str) -> _Read:
        """What comes of a statement; kept for the next time."""
        read = self._read_anew(text)
        if len(text) <= LONGEST_CACHED:
            if len(self._known) >= CACHED:
                self._known.clear()
            self._known[text] = read
        return read

    def _read_anew(self, text: str, taken_back: Collection[str] = ()) -> _Read:
        """What comes of a statement, but for findings that another statement takes back."""
        tokens = self.vocabulary.spelling.tokens(text)
        best: dict[int, _Vote] = {}
        clauses, unexplained = self._clauses(tokens)
        overruled: set[str] = set()
        for said in clauses:
            for one in said:
                if one.overruled:
                    for reading in self._readings(one, tokens, text):
                        overruled.update(self.vocabulary.descendants(reading.finding))
            for vote in self._of_clause(said, tokens, text):
                if vote.status != "absent" and vote.finding in taken_back:
                    continue
                before = best.get(vote.label)
                if before is None or vote.rank > before.rank:
                    best[vote.label] = vote
        return _Read(list(best.values()), frozenset(overruled), _runs(unexplained, tokens, text))

    def _clauses(self, tokens: Sequence[Token]) -> tuple[list[list[Said]], list[Item]]:
        """What each clause of a statement says, and the items that nothing explains."""
        items = self._reader.items(tokens)
        clauses: list[list[Said]] = []
        unexplained: list[Item] = []
        start = 0
        for end in [*(k for k, item in enumerate(items) if item.kind == "break"), len(items)]:
            clause = items[start:end]
            used: set[int] = set()
            mentions = self._reader.mentions(clause, tokens, used)
            past = {m for m, mention in enumerate(mentions) if self._is_past(mention)}
            self._share_ages(clause, mentions)
            clauses.append(judge(clause, mentions, self.vocabulary.cues, self._normal, past, self._alike))
            unexplained += [item for k, item in enumerate(clause) if k not in used and _needs_a_use(item)]
            start = end + 1
        return clauses, unexplained

    def _alike(self, a: str, b: str) -> bool:
        """Whether two findings have a parent in common, or a parent's parent: of a list's members, one denial."""
        return any(mine & theirs for mine, theirs in zip(self._near[a], self._near[b], strict=True))

    def _share_ages(self, items: Sequence[Item], mentions: Sequence[Mention]) -> None:
        """Give the age before the first of a list to those after it that have no description of their own: "acute
        ischaemia or infarction" """
        for a, b, link in zip(mentions, mentions[1:], links_between(items, mentions), strict=False):
            if link in ("and", "or") and not b.modifiers:
                ages = [item for item in a.modifiers if item.kind == "age" and item.last <= a.from_token]
                b.modifiers += [age for age in ages if any(self._reader.formed(base, age.name) for base in b.bases)]

    def _is_past(self, mention: Mention) -> bool:
        """Whether an age that tells of the past makes no finding of what it describes: "previous AF" is not now, a
        previous infarct is."""
        ages = [item for item in mention.modifiers if item.kind == "age" and item.name in self.vocabulary.past]
        return any(not self._reader.refined(base, [age]) for age in ages for base in mention.bases)

    def _of_clause(self, clause: Sequence[Said], tokens: Sequence[Token], text: str) -> Iterator[_Vote]:
        """The votes of a clause: each mention by itself, and alternatives for what they have in common."""
        m = 0
        while m < len(clause):
            last = m
            while _is_alternative(clause, last):
                last += 1
            if last > m:
                yield from self._alternatives(clause[m : last + 1], tokens, text)
            else:
                yield from self._of_mention(clause[m], tokens, text)
            m = last + 1

    def _of_mention(self, said: Said, tokens: Sequence[Token], text: str) -> Iterator[_Vote]:
        if said.status is not None:
            for reading in self._readings(said, tokens, text):
                if reading.status is not None:
                    yield from self._of_reading(reading)

    def _of_reading(self, reading: Reading) -> Iterator[_Vote]:
        finding, status = self.vocabulary.findings[reading.finding], reading.status
        assert status is not None
        if status == "absent":
            for denied in (finding.name, *finding.either):
                yield from self._ballot(self._absent[denied], reading, "absent", 0.0)
            return
        yield from self._ballot(self._present[finding.name], reading, status, reading.probability)
        for other in finding.either:
            yield from self._ballot(self._present[other], reading, "uncertain", min(EITHER, reading.probability))
        if status == "present":
            for other in finding.excludes:
                yield from self._ballot(self._absent[other], reading, "absent", 0.0)

    def _alternatives(self, clause: Sequence[Said], tokens: Sequence[Token], text: str) -> Iterator[_Vote]:
        """Votes for each of several findings of which one holds, and for what all are kinds of."""
        common: set[int] | None = None
        readings: list[Reading] = []
        for said in clause:
            own = [reading for reading in self._readings(said, tokens, text) if reading.status is not None]
            readings += own
            labels = {k for reading in own for k in self._present[reading.finding]}
            common = labels if common is None else common & labels
        for reading in readings:
            yield from self._ballot(
                self._present[reading.finding], reading, "uncertain", min(EITHER, reading.probability), "one of several"
            )
        least = min(readings, key=lambda reading: reading.probability)
        assert least.status is not None
        span = min(reading.start for reading in readings), max(reading.end for reading in readings)
        for k in sorted(common or ()):
            yield _Vote(
                k, "", _RANK[least.status] + least.probability / 2, least.status, least.probability, *span,
                f"whichever of {_listed(readings)} it is, it is {self._titles[k]}",
            )  # fmt: skip

    def _ballot(
        self, labels: Iterable[int], reading: Reading, status: Status, probability: float, remark: str = ""
    ) -> Iterator[_Vote]:
        rank = _RANK[status] + probability / 2
        rule = f"{reading.rule}; {remark}" if remark else reading.rule
        for k in labels:
            title = self._titles[k]
            why = rule if title == reading.finding else f"{rule}; {_leads_to(status, reading.status)} {title}"
            yield _Vote(k, reading.finding, rank, status, probability, reading.start, reading.end, why)

    def _readings(self, said: Said, tokens: Sequence[Token], text: str) -> list[Reading]:
        """The findings of a mention with its sites and ages, and its status."""
        mention = said.mention
        words = text[tokens[mention.from_token].start : tokens[mention.to_token - 1].end]
        start, end = tokens[mention.from_token].start, tokens[mention.to_token - 1].end
        describing = tuple(_written(item, tokens, text) for item in mention.modifiers)
        cues = tuple((_DID[hit.acts], _written(hit.item, tokens, text)) for hit in said.hits)
        restricting = [item for item in mention.modifiers if _restricts(item, mention)]
        doubtful = self.vocabulary.doubtful
        readings = []
        for base in mention.bases:
            refined = self._reader.refined(base, mention.modifiers)
            status, probability = said.status, said.probability
            findings = list(refined) or [base]
            remark = ""
            if status == "absent" and restricting and not said.overruled:
                found = [name for name, by in refined.items() if len(by) == len(restricting)]
                if len(found) != len(findings) or not refined or base in refined:
                    status, remark = None, f"; denied only where {', '.join(describing)}"
            limits: dict[str, tuple[float, str]] = {}  # of findings that are less sure than the mention itself
            if status in ("present", "uncertain"):
                for name, by in refined.items():
                    if name != base and mention.or_sites:
                        limits[name] = EITHER, "; at one of several sites"
                    elif name != base and (doubts := [doubtful[item.name] for item in by if item.name in doubtful]):
                        limits[name] = min(doubts), "; of an age that is in doubt"
                if limits and limits.keys() >= set(findings):
                    findings.append(base)
            for name in findings:
                limit, why = limits.get(name, (1.0, remark))
                status_of = "uncertain" if name in limits else status
                readings.append(
                    _reading(name, status_of, min(limit, probability), start, end, words, describing, cues, why)
                )
        return readings

    def _add_together(self, best: dict[int, tuple[_Vote, int]]) -> None:
        """The findings that others make together."""
        for name, names, group in self._together:
            members = [best[k] for k in group if k in best and best[k][0].status != "absent"]
            if len(members) == len(group):
                vote, at = min(members, key=lambda member: member[0].rank)
                for k in self._present[name]:
                    if k not in best or vote.rank > best[k][0].rank:
                        best[k] = (vote._replace(label=k, rule=f"{names} together are {name}"), at)

    def _explained(self, text: str, at: int) -> StatementReading:
        tokens = self.vocabulary.spelling.tokens(text)
        clauses, unexplained = self._clauses(tokens)
        readings = [reading for clause in clauses for said in clause for reading in self._readings(said, tokens, text)]
        moved = (
            Reading(r.finding, r.status, r.probability, r.start + at, r.end + at, r.describing, r.cues, r.rule)
            for r in readings
        )
        unmatched = tuple((words, start + at, end + at) for words, start, end in _runs(unexplained, tokens, text))
        return StatementReading(at, at + len(text), tuple(moved), unmatched)


def _restricts(item: Item, mention: Mention) -> bool:
    """Whether with an item a denial is of a part of what is mentioned: one site, one age, or what is new. "No ST shift
    throughout" denies all of it."""
    if item.name == "diffuse":
        return item.last <= mention.from_token
    return item.kind in ("site", "age") or (item.name == "new" and item.last <= mention.from_token)


def _runs(unexplained: Iterable[Item], tokens: Sequence[Token], text: str) -> list[tuple[str, int, int]]:
    """Items that stand side by side as one: (text, start, end)."""
    runs: list[tuple[int, int]] = []
    for item in unexplained:
        if runs and runs[-1][1] == item.first:
            runs[-1] = (runs[-1][0], item.last)
        else:
            runs.append((item.first, item.last))
    spans = [(tokens[first].start, tokens[last - 1].end) for first, last in runs]
    return [(text[start:end], start, end) for start, end in spans]


def _needs_a_use(item: Item) -> bool:
    """Whether an item that took no part in a finding is left unexplained."""
    return item.kind in ("unknown", "part") or (item.kind == "quality" and item.name not in ("normal", "abnormal"))


def _is_alternative(clause: Sequence[Said], m: int) -> bool:
    """Whether a mention and the next are alternatives. A slash between two whole findings only lists them."""
    if m + 1 >= len(clause) or clause[m].status in (None, "absent") or clause[m + 1].status in (None, "absent"):
        return False
    a, b = clause[m], clause[m + 1]
    return a.link in ("or", "versus") or (a.link == "slash" and (a.mention.completed or b.mention.completed))


def _reading(
    finding: str,
    status: Status | None,
    probability: float,
    start: int,
    end: int,
    words: str,
    describing: tuple[str, ...],
    cues: tuple[tuple[str, str], ...],
    remark: str,
) -> Reading:
    also = f" ({', '.join(describing)})" if describing else ""
    acted = "".join(f"; {did} {by!r}" for did, by in cues)
    rule = f"{words!r}{also}: {finding}{acted}{remark}"
    return Reading(finding, status, probability, start, end, describing, cues, rule)


def _written(item: Item, tokens: Sequence[Token], text: str) -> str:
    return text[tokens[item.first].start : tokens[item.last - 1].end]


def _listed(readings: Sequence[Reading]) -> str:
    return " and ".join(dict.fromkeys(reading.finding for reading in readings))


def _leads_to(status: Status, stated: Status | None) -> str:
    if status == "absent":
        return "so there is no" if stated == "absent" else "which excludes"
    return "which may be" if status != stated else "a kind of"
