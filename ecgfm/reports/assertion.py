"""What a report says of a label, and what reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

Status = Literal["present", "absent", "uncertain"]


class Assertion(NamedTuple):
    """One label of one report.

    probability: that the label holds, in the writer's view: 1 of what is stated, 0 of what is negated, between them
        what is uncertain
    start, end: the span of characters that caused it, in the text that was given
    rule: what read it so, in words
    """

    label: str
    status: Status
    probability: float
    start: int
    end: int
    rule: str


class Labeler(Protocol):
    """A mode of the labeler."""

    @property
    def labels(self) -> Sequence[str]:
        """Every label that it can give, in the order of tables."""
        ...

    def read(self, report: str) -> list[Assertion]:
        """What a report asserts: at most one assertion of a label, in the order of `labels`."""
        ...
