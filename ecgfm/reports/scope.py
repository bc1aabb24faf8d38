"""Which findings of a clause a cue reaches, and what they are after it: present, absent, uncertain, or set aside.

A cue acts on the finding nearest to it on its side and on those that "and", "or" or a list join to that one. Mere
neighbours are not joined: after "possible LVH sinus rhythm", the rhythm is certain. Nor do commas without an "and" or
"or" at their end join, but for what is denied: "no PVCs, PACs" denies what is alike and not described by itself, "no
acute ST changes, old infarct" and "no ischemia, LBBB" leave the second as stated.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from ecgfm.reports.assertion import Status
from ecgfm.reports.mentions import MODIFIERS, REACH, Item, Mention
from ecgfm.reports.statements import ARROW
from ecgfm.reports.vocabulary import Acts, Cue

_WIDE = 8
"""Findings that a condition or an earlier time reaches where nothing joins them."""
_TWO_SIDED = frozenset(("replaces", "replaced by", "prefers"))
_JOINS = frozenset(("and", "or", "versus", "slash", "same"))


class Hit(NamedTuple):
    """A cue that reached a mention.

    joined: how the mention is joined to the one that the cue reached first; "" for that one itself
    """

    item: Item
    acts: Acts
    probability: float
    joined: str = ""


class Said(NamedTuple):
    """A mention with what is said of it; None where it was set aside.

    link: how the next mention is joined to it, see `links_between`
    """

    mention: Mention
    status: Status | None
    probability: float
    hits: Sequence[Hit]
    link: str

    @property
    def overruled(self) -> bool:
        return any(hit.acts == "overrules" for hit in self.hits)


def judge(
    items: Sequence[Item],
    mentions: Sequence[Mention],
    cues: Mapping[str, Cue],
    normal: Collection[str],
    past: Collection[int],
    alike: Callable[[str, str], bool],
) -> list[Said]:
    """What a clause says of each of its mentions.

    mentions: in the order of their first items
    normal: the findings that say that something is as it should be; "and" joins none of them to one that does not
    past: the mentions, by number, whose own words tell of an earlier time
    alike: whether two findings are such as one lists together
    """
    scope = _Scope(items, mentions, normal, alike)
    hits: list[list[Hit]] = [[] for _ in mentions]
    compared = False
    for k, item in enumerate(items):
        if item.kind == "link" and item.name == "comma":
            compared = False
        if item.kind != "cue":
            continue
        cue = cues[item.name]
        if cue.acts == "compares":
            compared = True
        elif cue.acts != "shows" or compared:
            for m, hit in _reached(k, item, cue, scope):
                hits[m].append(hit)
    return [
        Said(mention, *_settled(found, m in past), found, scope.links[m])
        for m, (mention, found) in enumerate(zip(mentions, hits, strict=True))
    ]


def links_between(items: Sequence[Item], mentions: Sequence[Mention]) -> list[str]:
    """How each mention is joined to the next: "and", "or", "versus", "slash", "same" (they share words), "comma" for a
    list without an end, "with", "verb", "colon", "" for
    not at all. The commas of "A, B or C" are "or"."""
    links = [_link(items, a, b) for a, b in pairwise(mentions)]
    if links and links[-1] == "comma" and _ends_otherwise(items, mentions[-1].last):
        links[-1] = "or"
    for m in range(len(links) - 2, -1, -1):
        if links[m] == "comma" and links[m + 1] in ("and", "or"):
            links[m] = links[m + 1]
    return [*links, ""]


def _ends_otherwise(items: Sequence[Item], at: int) -> bool:
    """Whether a list ends, at an item, with "or" and a word that nothing explains: "no ischaemia, infarct or xyz"."""
    after = at + (at < len(items) and items[at].name == "comma")
    return after + 1 < len(items) and items[after].name == "or" and items[after + 1].kind == "unknown"


def _link(items: Sequence[Item], a: Mention, b: Mention) -> str:
    if b.first < a.last:
        return "same"
    if b.first - a.last > REACH:
        return ""
    link = ""
    unknown = 0
    for item in items[a.last : b.first]:
        if item.kind == "link":
            if item.name in ("with", "verb", "colon"):
                return item.name
            if item.name in ("and", "or", "versus", "slash") and link not in ("or", "versus"):
                link = item.name
            elif item.name == "comma" and not link:
                link = "comma"
        elif item.kind in ("cue", "finding", "part", "break") or item.word == "either":
            return ""
        elif item.kind == "unknown":
            unknown += 1
            if unknown > 2:
                return ""
    return link


class _Scope:
    """The mentions of a clause, as seen from its items."""

    def __init__(
        self,
        items: Sequence[Item],
        mentions: Sequence[Mention],
        normal: Collection[str],
        alike: Callable[[str, str], bool],
    ) -> None:
        self._alike = alike
        self.items = items
        self.mentions = mentions
        self.links = links_between(items, mentions)
        self._normal = [any(base in normal for base in mention.bases) for mention in mentions]
        self._firsts = [mention.first for mention in mentions]
        self._before = [-1] * (len(items) + 1)  # at an item: the mention that ended last before it
        self._around: dict[int, list[int]] = {}
        for m, mention in enumerate(mentions):
            self._before[mention.last] = m
            if mention.last - mention.first > 1:
                for k in range(mention.first, mention.last):
                    self._around.setdefault(k, []).append(m)
        for k in range(1, len(self._before)):
            self._before[k] = max(self._before[k], self._before[k - 1])

    def around(self, k: int) -> list[int]:
        """The mentions whose words stand on both sides of an item."""
        return self._around.get(k, [])

    def ahead(self, k: int) -> int:
        """The first mention after an item that is in its reach, or -1."""
        m = bisect_right(self._firsts, k)
        if m == len(self.mentions) or self._firsts[m] - k > REACH:
            return -1
        unknown = 0
        for at in range(k + 1, self._firsts[m]):
            item = self.items[at]
            if item.kind == "unknown":
                unknown += 1
                if unknown > 6:
                    return -1
            elif item.kind == "link" and item.name == "comma":
                before = self.items[at - 1]
                describes = before.kind in MODIFIERS or (before.kind == "quality" and before.name != "abnormal")
                if not describes:  # "no acute changes, LVH"
                    return -1
        return m

    def all_ahead(self, k: int) -> range:
        """Every mention after an item, as far as walks go."""
        m = bisect_right(self._firsts, k)
        return range(m, min(len(self.mentions), m + REACH))

    def at_once(self, k: int, m: int) -> bool:
        """Whether a mention follows an item with nothing but what describes it between."""
        unknown = 0
        for item in self.items[k + 1 : self.mentions[m].first]:
            if item.kind in ("link", "cue", "number"):
                return False
            unknown += item.kind == "unknown"
        return unknown < 2

    def behind(self, k: int) -> int:
        """The last mention before an item that reaches so far, or -1."""
        m = self._before[k]
        if m < 0 or k - self.mentions[m].last > REACH:
            return -1
        unknown = commas = 0
        for item in self.items[self.mentions[m].last : k]:
            if item.kind == "unknown":
                unknown += 1
            elif item.kind == "link" and item.name == "comma":
                commas += 1
            elif item.kind == "part" or (item.kind == "link" and item.name in ("and", "or", "slash")):
                return -1  # "tall T waves, P waves not seen"
        return m if unknown <= 3 and commas <= 1 else -1

    def chain(
        self, m: int, step: int, through: Collection[str] = _JOINS, longest: int = REACH
    ) -> list[tuple[int, str]]:
        """A mention and those joined to it on one side, each with how it is joined."""
        found = [(m, "")]
        for _ in range(longest):
            link = self.links[m if step > 0 else m - 1] if 0 <= m + step < len(self.mentions) else None
            if link == "comma" and "comma" in through:
                if not self._goes_on(m, m + step):
                    break
            elif link is None or link not in through:
                break
            if link == "and" and self._normal[m] != self._normal[m + step]:
                break
            m += step
            found.append((m, link))
        return found

    def chain_or_none(self, m: int, step: int) -> list[tuple[int, str]]:
        """`chain`; nothing where there is no mention (-1)."""
        return self.chain(m, step) if m >= 0 else []

    def compared_with(self, m: int) -> int:
        """The mention after one, where "over", "from", "than" or the like stands between: "VT over SVT"; else -1."""
        if not 0 <= m < len(self.mentions) - 1:
            return -1
        between = self.items[self.mentions[m].last : self.mentions[m + 1].first]
        compared = any(item.word in ("over", "from", "than", "als") for item in between)
        return m + 1 if compared and len(between) <= 3 else -1

    def _goes_on(self, m: int, after: int) -> bool:
        """Whether a list without an end goes on with a mention: one like the last, and not described by itself."""
        a, b = self.mentions[m], self.mentions[after]
        return not b.modifiers and all(any(self._alike(one, other) for one in a.bases) for other in b.bases)


def _reached(k: int, item: Item, cue: Cue, scope: _Scope) -> list[tuple[int, Hit]]:
    """The mentions that a cue reaches."""
    inside = scope.around(k)
    if inside and cue.acts not in _TWO_SIDED:
        return [(m, Hit(item, cue.acts, cue.probability)) for m in inside]
    ahead, behind = scope.ahead(k), scope.behind(k)
    if cue.acts in _TWO_SIDED:
        return _on_both_sides(item, cue, scope, ahead, behind)
    if cue.acts == "asks":
        return [(m, Hit(item, "asks", 0.0)) for m in scope.all_ahead(k)]
    if k + 1 < len(scope.items) and scope.items[k + 1].name == "colon" and ahead >= 0 > behind:
        forward = True  # "not excluded: ..."
    elif cue.reach == "either":
        forward = ahead >= 0 and (behind < 0 or scope.at_once(k, ahead))
    else:
        forward = cue.reach == "following"
    start = ahead if forward else behind
    if start < 0:
        return []
    if cue.acts == "affirms" or (cue.acts == "overrules" and not forward):
        chain = [(start, "")]
    elif cue.acts in ("supposes", "recalls", "shows") and forward:
        chain = scope.chain(start, 1, (*_JOINS, "", "with", "verb"), _WIDE)
    elif cue.acts == "denies" and forward:
        chain = scope.chain(start, 1, (*_JOINS, "comma"))
    else:
        chain = scope.chain(start, 1 if forward else -1)
    return [(m, Hit(item, cue.acts, cue.probability, joined)) for m, joined in chain]


def _on_both_sides(item: Item, cue: Cue, scope: _Scope, ahead: int, behind: int) -> list[tuple[int, Hit]]:
    """The mentions that a cue says one thing of, and those that it says another of."""
    first: Acts
    second: Acts
    if cue.acts == "prefers":
        first = second = "doubts"
        nearer = scope.chain_or_none(ahead, 1) if cue.reach == "following" else scope.chain_or_none(behind, -1)
        other = scope.compared_with(nearer[-1][0] if nearer else -1) if cue.reach == "following" else ahead
        probabilities = cue.probability, 1 - cue.probability
    else:
        if item.word == ARROW and ahead < 0:  # "STEMI -> cath lab"
            return []
        first, second = ("affirms", "denies") if cue.acts == "replaces" else ("denies", "affirms")
        nearer, other, probabilities = scope.chain_or_none(behind, -1), ahead, (0.0, 0.0)
    found = [(m, Hit(item, first, probabilities[0], how)) for m, how in nearer]
    return found + [(m, Hit(item, second, probabilities[1], how)) for m, how in scope.chain_or_none(other, 1)]


def _settled(hits: Sequence[Hit], past: bool) -> tuple[Status | None, float]:
    """What the cues that reached a mention make of it together."""
    acts = {hit.acts for hit in hits}
    affirmed = "affirms" in acts
    if "overrules" in acts:
        return "absent", 0.0
    if "supposes" in acts or "asks" in acts:
        return None, 0.0
    # "no ischaemia and atrial fibrillation is present": said of the second itself, so the list before it does not count
    itself = affirmed or any(hit.acts == "doubts" and not hit.joined for hit in hits)
    if any(hit.acts == "denies" and not (itself and hit.joined == "and") for hit in hits):
        return "absent", 0.0
    if not affirmed and (past or "recalls" in acts or "shows" in acts):
        return None, 0.0
    doubts = [hit.probability for hit in hits if hit.acts == "doubts"]
    return ("uncertain", min(doubts)) if doubts else ("present", 1.0)
