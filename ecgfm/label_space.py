"""The labels of a task: their names and order, what asserts them, and how a record's are had from its segments'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from ecgfm.config import Task


@dataclass(frozen=True)
class Label:
    """One label.

    codes: what asserts it: codes of the source, or of a column its name, or of a class the value in the column
    aggregation: over the segments of a record, `mean` or `max`
    records: per split, how many records are positive, negative, unknown, or of a number: how many are known and
        unknown, and the known ones' mean and standard deviation; empty before there are splits
    unit: of its number; "" where it is none, or the unit is not given
    """

    name: str
    codes: tuple[str, ...]
    aggregation: Literal["mean", "max"]
    records: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    unit: str = ""


@dataclass(frozen=True)
class LabelSpace:
    """The labels of a task in their order, and those that were left out: name -> why.

    task: `multilabel`: each label is present, absent or unknown by itself; `multiclass`: exactly one is present, or all
        are unknown; `regression`: each is a number, or unknown
    """

    labels: tuple[Label, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)
    task: Task = "multilabel"

    @property
    def names(self) -> list[str]:
        """The labels' names, in the order of every array that has a label axis."""
        return [label.name for label in self.labels]

    def contract(self, table: str) -> str:
        """The contract of a table with a column per label: of numbers it is another than of 0 and 1."""
        return contract_of(table, self.task)

    def write(self, path: Path) -> None:
        """Write as YAML; `read_label_space` reads it back."""
        labels = [
            {"name": label.name, "codes": list(label.codes), "aggregation": label.aggregation}
            | ({"unit": label.unit} if label.unit else {})
            | ({"records": {split: dict(counts) for split, counts in label.records.items()}} if label.records else {})
            for label in self.labels
        ]
        dropped = [{"name": name, "why": why} for name, why in self.dropped.items()]
        content = {"task": self.task, "labels": labels, "dropped": dropped}
        path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def contract_of(table: str, task: Task) -> str:
    """The contract of a table of labels or answers, whose columns are numbers where the task is `regression`."""
    return f"{table}_values" if task == "regression" else table


def read_label_space(path: Path) -> LabelSpace:
    """The label space that `LabelSpace.write` wrote."""
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    labels = tuple(
        Label(
            label["name"], tuple(label["codes"]), label["aggregation"], label.get("records", {}), label.get("unit", "")
        )
        for label in loaded["labels"]
    )
    dropped = {label["name"]: label["why"] for label in loaded["dropped"]}
    return LabelSpace(labels, dropped, loaded.get("task", "multilabel"))
