"""What the reports on findings and on numbers share: records in and out, trainings and their curves, words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from ecgfm.drawing import Panel, Series
from ecgfm.pages.pictures import panel_pictures
from ecgfm.pages.template import COST_MARK, SORT_SCRIPT, STYLE

FEW_PATIENTS = 200
"""Below this a report says in words that the test split is small."""

ACRONYMS = frozenset({"auroc", "auprc", "cmsc"})

NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"

MAX_POINTS = 300  # of a training curve; more than a panel has pixels for


@dataclass(frozen=True)
class SplitCounts:
    """One split. pairs: of CMSC; None where none are made. unknown_patients: records of no known patient."""

    records: int
    known_patients: int
    unknown_patients: int
    segments: int
    pairs: int | None
    labelled_records: int
    labelled_segments: int

    @property
    def patients(self) -> str:
        """In words."""
        if not self.known_patients:
            return "patients unknown"
        more = f", {self.unknown_patients:,} of unknown patients" if self.unknown_patients else ""
        return counted(self.known_patients, "patient") + more


@dataclass(frozen=True)
class Cohort:
    """Records in and out. listed: by source; rejected, excluded: by reason; splits: by name."""

    listed: Mapping[str, int]
    rejected: Mapping[str, int]
    excluded: Mapping[str, int]
    splits: Mapping[str, SplitCounts]


@dataclass(frozen=True)
class Training:
    """One training run.

    facts: what a reader wants first, as (name, value); config: every value
    rows: of its metrics.jsonl: `step`, `split` and measures
    caption: of its curves
    """

    name: str
    facts: Sequence[tuple[str, str]]
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    caption: str


def environment(**filters: Callable[..., str]) -> jinja2.Environment:
    """Where templates are filled in. filters: beside those that every report has"""
    made = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    made.filters |= {
        "count": lambda n: f"{n:,}",
        "counted": counted,
        "percent": lambda value: f"{100 * value:.1f}%",
        "words": lambda name: str(name).replace("_", " "),
        **filters,
    }
    return made


def frame(cohort: Cohort, trainings: Sequence[Training], files: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """What every report fills in. files: as of `findings.render`"""
    n_listed, n_rejected, n_excluded = (
        sum(counts.values()) for counts in (cohort.listed, cohort.rejected, cohort.excluded)
    )
    return {
        "style": Markup(STYLE),
        "script": Markup(SORT_SCRIPT),
        "cost_mark": Markup(COST_MARK),
        "files": files,
        "n_listed": n_listed,
        "n_rejected": n_rejected,
        "n_prepared": n_listed - n_rejected,
        "n_excluded": n_excluded,
        "n_split": n_listed - n_rejected - n_excluded,
        "trainings": [tell_training(run) for run in trainings],
    }


def tell_training(run: Training) -> dict[str, Any]:
    """What the template says of a run."""
    panels = training_panels(run.rows)
    return {
        "name": run.name,
        "facts": run.facts,
        "config": [(name, in_words(value)) for name, value in flatten(run.config)],
        "caption": run.caption,
        "figure": panel_pictures(panels, f"Curves of {run.name.lower()}", (2.5, 1.9)) if panels else "",
    }


def training_panels(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """A panel per measure of a metrics.jsonl, over steps, with a line per split.

    Settings and the gradient's norm are no measures. Long curves are thinned to means of consecutive steps.
    """
    settings = {"step", "epoch", "split", "learning_rate", "quantizer_temperature", "gradient_norm"}
    names = dict.fromkeys(name for row in rows for name in row if name not in settings)
    splits = sorted({str(row["split"]) for row in rows})
    panels = []
    for name in names:
        series = []
        for split in splits:
            points = [(row["step"], row[name]) for row in rows if row["split"] == split and row.get(name) is not None]
            if points:
                x, y = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
                series.append(Series(split, _thinned(x), _thinned(y)))
        if series:
            words = [word.upper() if word in ACRONYMS else word for word in name.split("_")]
            panels.append(Panel(" ".join(words), "step", "", tuple(series)))
    return panels


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested values as (dotted name, value)."""
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        flat += flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return flat


def in_words(value: Any) -> str:
    """A value of a config."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return NONE
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(in_words(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _thinned(values: np.ndarray) -> np.ndarray:
    """At most `MAX_POINTS` means of consecutive values."""
    parts = np.array_split(values, min(MAX_POINTS, len(values)))
    return np.array([part.mean() for part in parts])


def counted(n: int, noun: str) -> str:
    """A number of things, in words.

    >>> counted(1, "record"), counted(2000, "record")
    ('1 record', '2,000 records')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def shortened(label: str, characters: int = 30) -> str:
    """A label as the title of a small picture.

    >>> shortened("premature ventricular contraction")
    'premature ventricular contrac…'
    """
    return label if len(label) <= characters else label[: characters - 1].rstrip() + "…"
