"""What a statement mentions: its words grouped into findings with what describes them, before any cue is asked.

A statement becomes items: the longest phrases of the vocabulary, left to right, and single words that no phrase has. A
finding is mentioned by a phrase of its own ("atrial fibrillation"), by a part with a quality on either side ("inverted
T waves", "ST segments are depressed in V4-6"), or by half a phrase beside a whole one ("right and left atrial
enlargement"). Sites, ages and details belong to the finding they touch.

Every walk from an item has a bounded length, so that time grows with the length of the text and no faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal, NamedTuple

from ahocorasick_rs import AhoCorasick, Implementation, MatchKind

from ecgfm.reports.statements import Token
from ecgfm.reports.vocabulary import Term, Vocabulary

ItemKind = Literal[
    "finding", "part", "quality", "site", "age", "detail", "cue", "link", "break", "neutral", "number", "unknown"
]
REACH = 25
"""Items that a walk from a part, a finding or a cue goes at most."""

MODIFIERS = frozenset(("site", "age", "detail"))
_LEADS = frozenset(
    ("i", "ii", "iii", "avr", "avl", "avf", *(f"v{n}" for n in range(1, 10)), *(f"v{n}r" for n in range(3, 7)))
)
_JOINS_LEADS = frozenset(("and", "or", ",", "/", "to", "through", "bis", "till", "und", "oder", "och", "+", "&"))
_HALVES = frozenset(("unknown", "neutral", "number", "site", "detail", "quality", "part"))
_SHARED_LINKS = frozenset(("and", "or", "versus", "slash"))


class Item(NamedTuple):
    """A phrase or word with a meaning.

    first, last: its tokens, the last not included
    word: where it is one word, that word
    trailing: see `Term`
    """

    kind: ItemKind
    name: str
    first: int
    last: int
    word: str = ""
    trailing: bool = False


@dataclass
class Mention:
    """One or more findings that the same words mention.

    bases: the findings that the words name, without their sites and ages
    first, last: its items, the last not included
    from_token, to_token: the words themselves
    modifiers: the items that describe it: sites, ages and details
    completed: half a phrase, completed by the one beside it
    or_sites: its sites are alternatives
    """

    bases: list[str]
    first: int
    last: int
    from_token: int
    to_token: int
    modifiers: list[Item] = field(default_factory=list)
    completed: bool = False
    or_sites: bool = False


class Reader:
    """Items and mentions of a statement, by a vocabulary. The automaton is made once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._terms = list(vocabulary.terms.values())
        phrases = list(vocabulary.terms)
        self._above = {name: tuple(vocabulary.ancestors(name)) for name in vocabulary.findings}
        self._lengths = [phrase.count(" ") + 1 for phrase in phrases]
        self._automaton = AhoCorasick(
            [_framed(phrase.split(" ")) for phrase in phrases],
            matchkind=MatchKind.LeftmostLongest,
            implementation=Implementation.ContiguousNFA,
        )

    def items(self, tokens: Sequence[Token]) -> list[Item]:
        """The statement's phrases and words, in order, every token in one."""
        words = [token.word for token in tokens]
        haystack = _framed(words)
        token_at: dict[int, int] = {}
        at = 0
        for k, word in enumerate(words):
            token_at[at] = k
            at += len(word) + 2
        items: list[Item] = []
        done = 0
        for index, start, _ in self._automaton.find_matches_as_indexes(haystack):
            first = token_at[start]
            self._words(words, done, first, items)
            term: Term = self._terms[index]
            done = first + self._lengths[index]
            word = words[first] if done - first == 1 else ""
            items.append(Item(term.kind, term.name, first, done, word, term.trailing))
        self._words(words, done, len(words), items)
        return _leads_joined(self._opened(items, words))

    def _opened(self, items: Sequence[Item], words: Sequence[str]) -> list[Item]:
        """A finding's phrase from a cue to a quality that describes the part behind it, taken apart: "no abnormal" is a
        normal ECG, "no abnormal Q waves" is not. An "s" behind a number is no wave but seconds."""
        found: list[Item] = []
        for item, after in zip_longest(items, items[1:]):
            if item.word == "s" and item.kind == "part" and found and found[-1].kind == "number":
                found.append(item._replace(kind="neutral", name=""))
                continue
            if item.kind == "finding" and after and after.kind == "part" and item.last - item.first > 1:
                head, tail = (self._vocabulary.terms.get(words[at]) for at in (item.first, item.last - 1))
                if head and tail and (head.kind, tail.kind) == ("cue", "quality"):
                    found.append(Item("cue", head.name, item.first, item.last - 1, words[item.first]))
                    found.append(Item("quality", tail.name, item.last - 1, item.last, words[item.last - 1]))
                    continue
            found.append(item)
        return found

    @staticmethod
    def _words(words: Sequence[str], at: int, end: int, items: list[Item]) -> None:
        """Append the words that no phrase has."""
        for k in range(at, end):
            kind, name = _word_alone(words[k])
            items.append(Item(kind, name, k, k + 1, words[k]))

    def mentions(self, items: list[Item], tokens: Sequence[Token], used: set[int]) -> list[Mention]:
        """What the items of a clause mention, in order, with what describes it.

        used: the items that took part are added
        """
        claimed = _claims(items)
        mentions: list[Mention] = []
        waiting: list[int] = []  # parts that share the quality of the next part: "PR and QT intervals are prolonged"
        for k, item in enumerate(items):
            if item.kind == "finding":
                waiting.clear()
                self._finding(k, items, tokens, mentions, used)
            elif item.kind == "part":
                self._part(k, items, claimed, waiting, mentions, used)
        mentions.sort(key=lambda mention: (mention.first, mention.last))
        _describe(items, mentions, used, self.formed)
        return mentions

    def refined(self, base: str, modifiers: Sequence[Item]) -> dict[str, list[Item]]:
        """The findings that modifiers make of a finding, each with those that do; with them the finding itself, where
        they make theirs of what it is a kind of: "acute" of "vorderwandinfarkt"."""
        found: dict[str, list[Item]] = {}
        for modifier in modifiers:
            for name in self._above[base]:
                if made := self.formed(name, modifier.name):
                    for finding in made if name == base else (base, *made):
                        found.setdefault(finding, []).append(modifier)
                    break
        return found

    def formed(self, base: str, modifier: str) -> list[str]:
        """What a part is with a quality, or a finding with a site, age or detail; of what stands for several, each."""
        forms, means = self._vocabulary.forms, self._vocabulary.means
        if (finding := forms.get((base, modifier))) is not None:
            return [finding]
        if modifier in means:
            return list(dict.fromkeys(name for site in means[modifier] for name in self.formed(base, site)))
        if base in means:
            return list(dict.fromkeys(name for part in means[base] for name in self.formed(part, modifier)))
        return []

    def _finding(
        self, k: int, items: list[Item], tokens: Sequence[Token], mentions: list[Mention], used: set[int]
    ) -> None:
        """The mention of a phrase, and those of half phrases beside it."""
        item = items[k]
        phrase = [token.word for token in tokens[item.first : item.last]]
        before: list[Mention] = []
        at = k
        while half := self._completed(items, at, -1, phrase, tokens, used):
            before.insert(0, half)
            at = half.first
        mentions += before
        mentions.append(Mention([item.name], k, k + 1, item.first, item.last))
        used.add(k)
        at = k
        while half := self._completed(items, at, +1, phrase, tokens, used):
            mentions.append(half)
            at = half.last - 1

    def _completed(
        self, items: list[Item], k: int, step: int, phrase: list[str], tokens: Sequence[Token], used: set[int]
    ) -> Mention | None:
        """The half phrase on one side of a finding, linked to it, that the finding's words make whole.

        step: -1 for "right and [left atrial enlargement]", +1 for "[atrial fibrillation] or flutter"
        """
        link = k + step
        if len(phrase) < 2 or not 0 < link < len(items) - 1 or items[link].kind != "link":
            return None
        if items[link].name not in _SHARED_LINKS and items[link].name != "comma":
            return None
        side: list[int] = []
        for n in range(1, 4):
            at = link + step * n
            if not 0 <= at < len(items) or items[at].kind not in _HALVES:
                break
            side.append(at)
        for n in range(len(side), 0, -1):
            chosen = sorted(side[:n])
            if any(at in used for at in chosen):
                continue
            first, last = items[chosen[0]].first, items[chosen[-1]].last
            half = [token.word for token in tokens[first:last]]
            for kept in range(len(phrase) - 1, 0, -1):
                whole = [*half, *phrase[-kept:]] if step < 0 else [*phrase[:kept], *half]
                term = self._vocabulary.terms.get(" ".join(whole))
                if term is not None and term.kind == "finding":
                    used.update(chosen)
                    return Mention([term.name], chosen[0], chosen[-1] + 1, first, last, completed=True)
        return None

    def _part(
        self,
        k: int,
        items: list[Item],
        claimed: Sequence[int],
        waiting: list[int],
        mentions: list[Mention],
        used: set[int],
    ) -> None:
        """The mentions of a part with its qualities, or alone."""
        qualities = [q for q in range(max(0, k - REACH), k) if claimed[q] == k and q not in used]
        if qualities:  # "abnormal ST depression"
            at = k + 1
            while at < len(items) and items[at].kind == "quality" and claimed[at] < 0:
                qualities.append(at)
                at += 1
        else:
            qualities = _qualities_after(k, items, claimed)
            if not qualities and _next_part(k, items):
                waiting.append(k)
                return
        used.update(qualities)
        for part in [*waiting, k]:
            self._compose(part, qualities, items, mentions, used)
        waiting.clear()

    def _compose(
        self, k: int, qualities: Sequence[int], items: list[Item], mentions: list[Mention], used: set[int]
    ) -> None:
        part = items[k].name
        made: dict[str, list[int]] = {}
        telling = [q for q in qualities if items[q].name != "normal" and self.formed(part, items[q].name)]
        for q in telling or qualities:  # "inverted T waves, normal for age"
            for finding in self.formed(part, items[q].name):
                made.setdefault(finding, []).append(q)
        if not made and not any(items[q].name == "normal" for q in qualities):
            made = {finding: [] for finding in self.formed(part, "") or self._by_detail(k, part, items)}
        if made or not qualities or any(items[q].name == "normal" for q in qualities):
            used.add(k)
        for finding, by in made.items():
            span = [k, *by]
            first, last = min(span), max(span)
            mentions.append(Mention([finding], first, last + 1, items[first].first, items[last].last))

    def _by_detail(self, k: int, part: str, items: Sequence[Item]) -> list[str]:
        """What a detail before a part alone makes of it, sites between: "nonspecific inferior T waves"."""
        for at in range(k - 1, max(-1, k - REACH), -1):
            if items[at].kind == "detail" and (findings := self.formed(part, items[at].name)):
                return findings
            if items[at].kind not in (*MODIFIERS, "link"):
                break
        return []


def _word_alone(word: str) -> tuple[ItemKind, str]:
    """What a word is that no phrase has."""
    if word in _LEADS:
        return "site", "leads"
    if word[0].isdigit():
        return "number", word
    if word == "-":
        return "break", word
    return ("unknown" if word[0].isalpha() else "neutral"), word


def _framed(words: Sequence[str]) -> str:
    """Each word between blanks of its own, so that matches end at words and neighbours share none."""
    return " " + "  ".join(words) + " "


def _leads_joined(items: Sequence[Item]) -> list[Item]:
    """Lists of leads made one item each: "ii, iii and avf", "v2,3,4", "v1-v3"."""
    joined: list[Item] = []
    k = 0
    while k < len(items):
        item = items[k]
        k += 1
        if item.name == "leads" and item.kind == "site" and item.word in _LEADS:
            last = item
            while k < len(items):
                after = k + (items[k].word in _JOINS_LEADS)
                if after >= len(items) or not _continues(last, items[after]):
                    break
                last = items[after]
                k = after + 1
            item = item._replace(last=last.last)
        joined.append(item)
    return joined


def _continues(lead: Item, item: Item) -> bool:
    """Whether a list of leads goes on with an item: a lead, or after a chest lead the number of another."""
    if item.word in _LEADS:
        return True
    return (lead.word[0] == "v" or lead.word.isdigit()) and item.kind == "number" and len(item.word) == 1


def _claims(items: Sequence[Item]) -> list[int]:
    """For each quality the part that it directly stands before, else -1."""
    claimed = [-1] * len(items)
    part = -1
    for k in range(len(items) - 1, -1, -1):
        item = items[k]
        if item.kind == "part":
            part = k
        elif item.kind == "quality":
            claimed[k] = part
        elif item.kind == "link" and item.name != "in":
            near = k + 1 < len(items) and items[k + 1].kind == "quality" and claimed[k + 1] == part
            part = part if near and item.name in ("and", "or", "comma", "slash") else -1
        elif item.name == "leads" or not (item.kind in MODIFIERS or (item.kind == "neutral" and item.name == "")):
            part = -1
    return claimed


def _qualities_after(k: int, items: Sequence[Item], claimed: Sequence[int]) -> list[int]:
    """The qualities that follow a part and are said of it."""
    found: list[int] = []
    unknown = 0
    linked = measured = False
    for j in range(k + 1, min(len(items), k + 1 + REACH)):
        item = items[j]
        measured |= item.kind == "number"
        if item.kind == "quality":
            if claimed[j] >= 0 and (found or linked or measured):  # "PR 202 ms, abnormal R wave progression"
                break
            found.append(j)
            linked = False
        elif item.kind in ("part", "finding", "break"):
            break
        elif item.kind == "unknown":
            unknown += 1
            if unknown > 2:
                break
        elif item.kind == "link" and item.name in ("and", "or", "comma", "slash", "with"):
            follower = items[j + 1] if j + 1 < len(items) else None
            if follower is None or (item.name == "comma" and not _says_more(follower)):
                break
            linked = True
    return found


def _says_more(item: Item) -> bool:
    """Whether what follows a comma may still be said of the part before it."""
    return item.kind in ("quality", "detail", "site", "cue") or item.word in ("which", "damit")


def _next_part(k: int, items: Sequence[Item]) -> bool:
    """Whether a part is linked to a next one: "PR and QT", "neither the PR nor the QT"."""
    linked = False
    for item in items[k + 1 : k + 5]:
        if item.kind == "part":
            return linked
        if item.kind == "quality":  # "no P waves, peaked T waves"
            return False
        linked |= item.name in ("and", "or", "comma", "slash") or item.word == "nor"
        if not (linked or (item.kind == "neutral" and item.name == "")):
            return False
    return False


def _describe(
    items: Sequence[Item], mentions: Sequence[Mention], used: set[int], formed: Callable[[str, str], list[str]]
) -> None:
    """Give each mention its sites, ages and details: those before it that touch it, and what is left behind it.

    formed: as `Reader.formed`
    """
    previous: Mention | None = None
    done = 0
    for mention in mentions:
        own = _start_of_description(items, mention, done)
        if previous is not None and own > done and items[own - 1].name == "in":
            # "ST elevation in V1-V3, LBBB" has its site from before; "ST depression in inferior infarct" has not
            touching = items[own : mention.first]
            if not any(formed(base, item.name) for base in mention.bases for item in touching):
                own = mention.first
        if previous is not None:
            _take(items, range(done, min(own, done + REACH)), previous, used)
        _take(items, range(own, mention.last), mention, used)
        mention.or_sites = any(
            items[at].name == "or" and items[at - 1].kind == "site" == items[at + 1].kind
            for at in range(max(own, 1), mention.last - 1)
        )
        previous = mention
        done = max(done, mention.last)
    if previous is not None:
        _take(items, range(done, min(len(items), done + REACH)), previous, used)


def _start_of_description(items: Sequence[Item], mention: Mention, start: int) -> int:
    """Where the sites, ages and details that touch a mention begin before it; the mention's first item if none do."""
    own = mention.first
    while own > start and mention.first - own < REACH:
        item = items[own - 1]
        describes = (item.kind in MODIFIERS and not item.trailing) or item.kind == "quality"
        leads_on = item.kind == "link" and item.name in ("and", "or", "slash", "comma") and own < mention.first
        if not (describes or leads_on or (item.kind == "neutral" and item.name == "")):
            break
        own -= 1
    while own < mention.first and items[own].kind not in MODIFIERS:
        own += 1  # a link or word that only led to it is not its own
    return own


def _take(items: Sequence[Item], at: range, mention: Mention, used: set[int]) -> None:
    """Give a mention what describes it among some items."""
    for k in at:
        if k and items[k].kind == "cue" and items[k - 1].name == "comma":  # "old infarct, no acute changes"
            break
        if items[k].kind in MODIFIERS and k not in used:
            mention.modifiers.append(items[k])
            used.add(k)
