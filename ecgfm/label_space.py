"""The labels of a task: their names and order, what asserts them, and how a record's are had from its segments'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml


@dataclass(frozen=True)
class Label:
    """One label.

    aggregation: over the segments of a record, `mean` or `max`
    records: per split, how many records are positive, negative, unknown; empty before there are splits
    """

    name: str
    codes: tuple[str, ...]
    aggregation: Literal["mean", "max"]
    records: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelSpace:
    """The labels of a task in their order, and those that were left out: name -> why."""

    labels: tuple[Label, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The labels' names, in the order of every array that has a label axis."""
        return [label.name for label in self.labels]

    def write(self, path: Path) -> None:
        """Write as YAML; `read_label_space` reads it back."""
        labels = [
            {"name": label.name, "codes": list(label.codes), "aggregation": label.aggregation}
            | ({"records": {split: dict(counts) for split, counts in label.records.items()}} if label.records else {})
            for label in self.labels
        ]
        dropped = [{"name": name, "why": why} for name, why in self.dropped.items()]
        text = yaml.safe_dump({"labels": labels, "dropped": dropped}, sort_keys=False, allow_unicode=True)
        path.write_text(text, encoding="utf-8")


def read_label_space(path: Path) -> LabelSpace:
    """The label space that `LabelSpace.write` wrote."""
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    labels = tuple(
        Label(label["name"], tuple(label["codes"]), label["aggregation"], label.get("records", {}))
        for label in loaded["labels"]
    )
    return LabelSpace(labels, {label["name"]: label["why"] for label in loaded["dropped"]})
