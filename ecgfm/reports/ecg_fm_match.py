"""Many literal patterns in one text at once, by the rules of the ECG-FM labeler.

A pattern is found where it stands letter by letter. Where its first character is alphanumeric, no word character
(letter, digit or `_`) may stand before it; where its last is, none after it. Hyphens and apostrophes are no word
characters.
Of patterns that overlap the one of the earlier group wins, of one group the longer, of one length the earlier in the
list; what is taken is taken: to the patterns that come later it is one opaque word character.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ahocorasick_rs import AhoCorasick, MatchKind


class Match(NamedTuple):
    """Where a pattern stands: text[start:end]; `pattern` by its place in the list that was given."""

    start: int
    end: int
    pattern: int


def is_word(character: str) -> bool:
    """Whether a pattern's end may not touch this character: a letter, a digit or `_` (as `\\w` of `re`)."""
    return character.isalnum() or character == "_"


def is_bordered(text: str, start: int, end: int, needs_left: bool, needs_right: bool) -> bool:
    """Whether text[start:end] touches no word character at the ends that must not."""
    if needs_left and start and is_word(text[start - 1]):
        return False
    return not (needs_right and end < len(text) and is_word(text[end]))


class Matcher:
    """All patterns of a list, found in time linear in the text.

    One automaton gives every place of every pattern; only these are then weighed against each other. A text of n
    characters has at most n times as many places as patterns of the list end in one another, whatever the text is.
    """

    def __init__(self, patterns: Sequence[str], groups: Sequence[int] | None = None) -> None:
        """patterns: distinct, none empty. groups: of each pattern, its group; all of one group where left out."""
        if not all(patterns) or len(set(patterns)) < len(patterns):
            raise ValueError("patterns must be distinct and not empty")
        of_group = groups if groups is not None else [0] * len(patterns)
        # by rank: who comes first takes first
        self._index = sorted(range(len(patterns)), key=lambda i: (of_group[i], -len(patterns[i]), i))
        ranked = [patterns[i] for i in self._index]
        self._needs_left = [pattern[0].isalnum() for pattern in ranked]
        self._needs_right = [pattern[-1].isalnum() for pattern in ranked]
        self._automaton = AhoCorasick(ranked, matchkind=MatchKind.Standard) if ranked else None

    def find(self, text: str) -> list[Match]:
        """The patterns that stand in the text, in the order of the text; no two overlap."""
        if self._automaton is None:
            return []
        needs_left, needs_right, last = self._needs_left, self._needs_right, len(text)
        places = []
        for place in self._automaton.find_matches_as_indexes(text, overlapping=True):
            rank, start, end = place
            # is_bordered, written out: this is where the time goes
            if needs_left[rank] and start and ((before := text[start - 1]).isalnum() or before == "_"):
                continue
            if needs_right[rank] and end < last and ((after := text[end]).isalnum() or after == "_"):
                continue
            places.append(place)
        if len(places) < 2:
            return [Match(start, end, self._index[rank]) for rank, start, end in places]
        places.sort()
        taken = bytearray(last + 2)  # shifted by one, so that the characters at both ends have neighbours
        found, of_rank, own_end = [], -1, -1
        for rank, start, end in places:
            if rank != of_rank:
                of_rank, own_end = rank, -1
            if taken.find(1, start + 1, end + 1) >= 0:
                continue
            # The places of one pattern are taken at once: its own last place is no border to it.
            if taken[start] and needs_left[rank] and start != own_end:
                continue
            if taken[end + 1] and needs_right[rank]:
                continue
            taken[start + 1 : end + 1] = b"\1" * (end - start)
            own_end = end
            found.append(Match(start, end, self._index[rank]))
        found.sort()
        return found
