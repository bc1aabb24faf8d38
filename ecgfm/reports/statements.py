"""A report's text cut into statements and words, so that what is found in the words can be shown in the text.

Nothing here knows a finding. A statement is what stands between two full stops, semicolons or the like: no cue reaches
over that. Words are compared in one spelling: lower case, accents folded, misspellings, plurals and German and Swedish
endings brought to the word that the vocabulary uses; a hyphen inside a word counts as a space.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

_SAME_LENGTH = str.maketrans(
    "\u0130àáâãäåçèéêëìíîïñòóôõöøùúûüýÿÀÁÂÃÄÅÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝ\u2019\u2018`\u00b4\u2032\u201c\u201d\u201e\u2013\u2014\u2212\u2010\u2011\u00a0\u2009\u202f",
    "iaaaaaaceeeeiiiinoooooouuuuyyaaaaaaceeeeiiiinoooooouuuuy'''''\"\"\"-----   ",
)
"""One character for another, so that offsets hold; `str.lower` then lengthens none either."""

_TOKEN = re.compile(
    r"\[[^\[\]\n]{12,200}\]"  # criteria of a device's statement
    r"|v[1-9]r?(?![^\W_])"  # a chest lead, so that "v2,3" is lead, comma, number
    r"|\d+(?:[.:]\d+)+"  # 3.5, 2:1, 10:12:30
    r"|\d+(?:st|nd|rd|th)?(?![^\W\d_])"
    r"|-+>"
    r"|[^\W_]+(?:'[^\W_]*)?"
    r"|(?<=\w)\((?:e?s|e?n|e?r|e|a|or)\)"  # the ending of "contraction(s)", "extrasystole(n)"
    r"|[^\s\w]|_"
)
_BOUNDARY = re.compile(
    # before an empty line, a line that begins as a sentence or list does, or a heading: "ST segments:"
    r"\n(?=[^\S\n]*(?:\n|[A-ZÄÖÜÅ][a-zäöüåß]|\*|(?:IMPRESSION|CONCLUSION)\b|[^\W\d_][\w /-]{0,30}:))"
    r"|[;!](?!\s*I (?:strongly )?disagree)"
    r"|\?(?=\s)(?<=[\w)]\?)"
    r"|\.{4,}"  # before the reason for a statement, to the end of the line
    r"|\.(?!\S)(?!\s*[Gg]rad)"  # "AV-Block 1. Grades" goes on
    r"|\.(?=[^\W\d_]{3})(?![Gg]rad)(?:(?<=[^\W\d_]{3}\.)|(?<=[\d)]\.))"
)
_ABBREVIATIONS = (
    "unbest", "poss", "prob", "mögl", "moegl", "wahrsch", "abn", "intraventr", "suprav", "supravent", "supraventr",
    "vent", "ventr", "extr", "term", "path", "asc", "desc", "isol", "repol", "vs", "approx", "resp", "incl",
    "inkompl", "kompl", "bzw", "ca", "evtl", "v.a", "z.n", "z", "v", "z.b", "i.e", "e.g", "cf", "nr", "ant", "inf",
    "lat", "sept", "post", "a.e", "dr", "pat", "pt", "incompl", "inc", "unspez",
)  # fmt: skip
_ABBREVIATION = re.compile(rf"(?<![^\W_])(?:{'|'.join(map(re.escape, _ABBREVIATIONS))})$", re.IGNORECASE)
_LINE_GOES_ON = re.compile(
    r"(?:[,/&(+-]|(?<![^\W_])(?:and|or|of|with|without|no|not|the|a|an|in|to|for|by|from|is|are|cannot|possible))\s*$",
    re.IGNORECASE,
)
"""How a line ends whose sentence goes on in the next."""
_ABBREVIATED = frozenset(word[-1] if len(word) == 1 else word[-2:] for word in _ABBREVIATIONS)
"""How they end: what ends otherwise needs no search."""
_MEANINGLESS = frozenset(".<>=~\"'|*#•·\\{}[]_^")
ARROW = "\u2192"  # also for "->"
_LONGEST_ABBREVIATION = 10
_LONGEST_MENDED = 30
_REMEMBERED = 50_000
_ENDINGS = ("es", "er", "en", "em", "s", "e", "t", "a", "n")
"""Plurals, and what German and Swedish hang to an adjective. The longest that leaves a known word of four letters."""


class Token(NamedTuple):
    """A word, number or sign: in the vocabulary's spelling, and where it stands in the text."""

    word: str
    start: int
    end: int


def split(report: str) -> Iterator[tuple[int, int]]:
    """Where each statement of a report starts and ends, sign at its end not included but for a question mark.

    In a report of several lines, what follows four dots or more is a device's reason, and is left out.
    """
    start = 0
    last_line = report.rfind("\n")
    for boundary in _BOUNDARY.finditer(report):
        at, after = boundary.span()
        if at < start:
            continue
        sign = report[at]
        if sign == "." and _is_abbreviated(report, start, at):
            continue
        if sign == "\n" and _LINE_GOES_ON.search(report[max(start, at - _LONGEST_ABBREVIATION) : at]):
            continue
        end = after if sign == "?" else at
        if start < end and not report[start:end].isspace():
            yield start, end
        start = after
        if after - at > 1 and last_line >= 0:  # dots before a device's reason
            start = report.find("\n", after) if after <= last_line else len(report)
    if start < len(report) and not report[start:].isspace():
        yield start, len(report)


def _is_abbreviated(report: str, start: int, at: int) -> bool:
    """Whether the full stop at `at` is an abbreviation's."""
    last = report[max(start, at - 2) : at].lower()
    if last not in _ABBREVIATED and last[-1:] not in _ABBREVIATED:
        return False
    return _ABBREVIATION.search(report[max(start, at - _LONGEST_ABBREVIATION) : at]) is not None


def fold(text: str) -> str:
    """The text in lower case without accents, as long as it was."""
    return text.translate(_SAME_LENGTH).lower()


def pieces(text: str) -> list[tuple[str, int, int]]:
    """The words, numbers and signs of a text, folded: (piece, start, end). Hyphens inside words are left out; one that
    stands free is a piece. A word broken over two lines at a hyphen gives its two halves.

    >>> [piece for piece, _, _ in pieces("Non-specific ST-T changes (s) - V2,3; PVC(s)")]
    ['non', 'specific', 'st', 't', 'changes', '(', 's', ')', '-', 'v2', ',', '3', ';', 'pvc']
    """
    folded = fold(text)
    found: list[tuple[str, int, int]] = []
    for match in _TOKEN.finditer(folded):
        piece, start, end = match[0], match.start(), match.end()
        if piece[0] in "([" and len(piece) > 1:
            continue
        if piece[-1] == ">" and len(piece) > 1:
            piece = ARROW
        if piece in _MEANINGLESS or (found and piece == found[-1][0] and not piece[0].isalnum()):
            continue
        if piece == "-":
            touches_left = start > 0 and not folded[start - 1].isspace()
            touches_right = end < len(folded) and not folded[end].isspace()
            if touches_left or (touches_right and found and found[-1][0] == "/"):
                continue
        found.append((piece, start, end))
    return found


class Spelling:
    """One spelling for each word of a vocabulary.

    words: what is read as what: variant -> word, each folded
    known: the words that the vocabulary uses
    """

    def __init__(self, words: Mapping[str, str], known: Iterable[str]) -> None:
        self._words = dict(words)
        self._meant = set(self._words.values())
        self._base = {*known, *self._meant}
        self._near: dict[str, list[str]] | None = None
        self._read: dict[str, str] = {}
        self.known = {self.settled(word) for word in self._base}

    def settled(self, piece: str) -> str:
        """The word for a piece, endings dropped where a known word is left; the piece itself where there is none."""
        if piece in self._words:
            return self._words[piece]
        if piece in self._meant:
            return piece
        for ending in _ENDINGS:
            stem = piece[: -len(ending)]
            if len(stem) >= 4 and piece.endswith(ending) and (stem in self._words or stem in self._base):
                return self.settled(stem)
        return piece

    def word(self, piece: str) -> str:
        """`settled`, and where that is not known: without an apostrophe, or the known word one slip away."""
        word = self._read.get(piece)
        if word is None:
            if len(self._read) >= _REMEMBERED:
                self._read.clear()
            word = self._read[piece] = self._understood(piece)
        return word

    def _understood(self, piece: str) -> str:
        settled = self.settled(piece)
        if settled in self.known or not settled[0].isalpha():
            return settled
        if "'" in settled:
            return self.word(settled.partition("'")[0])
        for written, meant in (("ae", "a"), ("oe", "o"), ("ue", "u"), ("ß", "ss")):
            if written in settled and (other := self.settled(settled.replace(written, meant))) in self.known:
                return other
        return self._mended(settled) if 7 <= len(settled) <= _LONGEST_MENDED else settled

    def tokens(self, text: str) -> list[Token]:
        """The text's words in the vocabulary's spelling."""
        tokens: list[Token] = []
        for piece, start, end in pieces(text):
            if tokens and text[start - 1 : start].isspace() and text[tokens[-1].end : tokens[-1].end + 1] in "-\u2010":
                whole = self.settled(fold(text[tokens[-1].start : tokens[-1].end]) + piece)
                if whole in self.known and text[tokens[-1].end : start].strip() != "":
                    tokens[-1] = Token(whole, tokens[-1].start, end)
                    continue
            tokens.append(Token(self.word(piece), start, end))
        return tokens

    def _mended(self, piece: str) -> str:
        """The known word of seven letters or more and the same first letter, or one that is read as it, that is one
        slip away: a letter left out, put in, changed, or two exchanged. Where there are two such, the piece itself."""
        if self._near is None:
            self._near = {}
            for word in {*self.known, *self._words}:
                if len(word) >= 7 and word.isalpha():
                    for shorter in _shortened(word):
                        self._near.setdefault(shorter, []).append(word)
        near = {word for shorter in _shortened(piece) for word in self._near.get(shorter, ())}
        meant = {self.settled(word) for word in near if _one_slip(piece, word)}
        return meant.pop() if len(meant) == 1 else piece


def _shortened(word: str) -> set[str]:
    """The word, and the word without one of its letters but the first."""
    return {word, *(word[:at] + word[at + 1 :] for at in range(1, len(word)))}


def _one_slip(written: str, meant: str) -> bool:
    """Whether the two, of which letters left out agree, are one slip apart."""
    at = next((k for k, (a, b) in enumerate(zip(written, meant, strict=False)) if a != b), None)
    if at is None or written[at:] == meant[at + 1 :] or written[at + 1 :] == meant[at:]:
        return True
    exchanged = written[at : at + 2] == meant[at : at + 2][::-1] and written[at + 2 :] == meant[at + 2 :]
    return exchanged or written[at + 1 :] == meant[at + 1 :]
