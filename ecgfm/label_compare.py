"""The two modes of the report labeler side by side: what `ecgfm label compare` tells of a table of reports.

For those who come with labels, or a model, of the ECG-FM labeler: how often our own mode says the same of their own
reports, and every report and label on which it does not, with the words and the rules of both.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ecgfm.answer_files import TableWriter, check_outs
from ecgfm.config import ReportsConfig
from ecgfm.contracts import empty_table
from ecgfm.ecg import InputError
from ecgfm.label_reports import OUTS, ROWS_TOGETHER, Readings, labels_of, number_texts, read_reports, read_texts


@dataclass(frozen=True)
class Agreement:
    """How the modes agree on a label, in reports: both assert it, only one does, neither does."""

    label: str
    both: int
    only_own: int
    only_ecg_fm: int
    neither: int

    @property
    def agreement(self) -> float:
        """Share of the reports on which they say the same; NaN without reports."""
        n = self.both + self.only_own + self.only_ecg_fm + self.neither
        return (self.both + self.neither) / n if n else float("nan")

    @property
    def kappa(self) -> float:
        """Cohen's kappa (Educational and Psychological Measurement 20, 1960): agreement beyond that of two who know
        nothing of each other. NaN where both always, or both never, assert the label."""
        n = self.both + self.only_own + self.only_ecg_fm + self.neither
        own, other = self.both + self.only_own, self.both + self.only_ecg_fm
        by_chance = own * other + (n - own) * (n - other)  # of n * n
        return (n * (self.both + self.neither) - by_chance) / (n * n - by_chance) if by_chance < n * n else float("nan")


@dataclass(frozen=True)
class Comparison:
    """What came of a comparison. reports: rows; empty: rows without a report, which are not compared"""

    reports: int
    empty: int
    labels: tuple[Agreement, ...]
    seconds: float
    out: Path

    def in_words(self) -> list[str]:
        """Lines to print; no text of a report is in them."""
        silent = f", {self.empty:,} of them empty" if self.empty else ""
        width = max(len("label"), *(len(one.label) for one in self.labels))
        lines = [
            f"{self.reports:,} reports{silent}, in {self.seconds:.1f} s",
            f"{'label':{width}}  {'both':>9} {'only own':>9} {'only ecg-fm':>11} {'agreement':>9} {'kappa':>6}",
        ]
        for one in self.labels:
            numbers = f"{one.both:9,} {one.only_own:9,} {one.only_ecg_fm:11,}"
            lines.append(f"{one.label:{width}}  {numbers} {_number(one.agreement, 9)} {_number(one.kappa, 6)}")
        differ = sum(one.only_own + one.only_ecg_fm for one in self.labels)
        return [*lines, f"{differ:,} differences, with the words and rules of both: {self.out}"]


def compare_file(
    reports: Path,
    text_column: str,
    id_column: str,
    out: Path,
    own: ReportsConfig,
    ecg_fm: ReportsConfig,
    above: float = 0.0,
    jobs: int = 0,
) -> Comparison:
    """Read a table of reports in both modes, and write to `out` (.parquet or .csv) a row per report and label on which
    they differ (`report_differences`).

    own, ecg_fm: the two modes; compared are the labels of `own`
    above: a mode asserts a label where its probability is above this: at 0, as ECG-FM's labels were made, whatever is
        said of it and not denied

    Raises:
        InputError: as `ecgfm.label_reports.label_file`, or a label that the patterns do not make.
    """
    started = time.monotonic()
    check_outs([out], OUTS)
    labels = labels_of(own)
    known = set(labels_of(ecg_fm))
    if strangers := [label for label in labels if label not in known]:
        raise InputError(
            f"the patterns in {ecg_fm.patterns} make no label {strangers[0]!r} of the set {own.label_set}; compare "
            "a set that both modes know, such as ecg-fm-17"
        )
    table = read_reports(reports, text_column, id_column)
    numbered = number_texts(table["text"])
    sides = {"own": read_texts(numbered, own, jobs), "ecg_fm": read_texts(numbered, ecg_fm, jobs)}
    order = pl.DataFrame({"label": labels}).with_row_index("place")
    counts = np.zeros((len(labels), 3), np.int64)
    schema = empty_table("report_differences").schema
    with TableWriter(out, schema, "report_differences") as writer:
        for at in range(0, table.height, ROWS_TOGETHER):
            block = slice(at, at + ROWS_TOGETHER)
            said = _side_by_side(sides, numbered.of_row[block], above).join(order, on="label")
            holds = [
                pl.col("own_asserts") & pl.col("ecg_fm_asserts"),
                pl.col("own_asserts") & ~pl.col("ecg_fm_asserts"),
                ~pl.col("own_asserts") & pl.col("ecg_fm_asserts"),
            ]
            for k, one in enumerate(holds):
                counts[:, k] += np.bincount(said.filter(one)["place"].to_numpy(), minlength=len(labels))
            rows = said.filter(pl.col("own_asserts") != pl.col("ecg_fm_asserts")).sort("row", "place")
            texts = table[block].with_row_index("row").with_columns(pl.col("row").cast(pl.Int64))
            rows = rows.join(texts, on="row", how="left", maintain_order="left")
            words = [
                pl.col("text").str.slice(pl.col(f"{side}_start"), pl.col(f"{side}_end") - pl.col(f"{side}_start"))
                for side in sides
            ]
            named = [expression.alias(f"{side}_words") for side, expression in zip(sides, words, strict=True)]
            writer.add_table(rows.with_columns(named))
    n = int((numbered.of_row >= 0).sum())
    counted = zip(labels, counts.tolist(), strict=True)
    return Comparison(
        reports=table.height,
        empty=table.height - n,
        labels=tuple(
            Agreement(label, both, mine, theirs, n - both - mine - theirs) for label, (both, mine, theirs) in counted
        ),
        seconds=time.monotonic() - started,
        out=out,
    )


def _side_by_side(sides: dict[str, Readings], texts: np.ndarray, above: float) -> pl.DataFrame:
    """A row for each row of `texts` and label that a mode speaks of: `row`, `label`, and with each side's name before
    it what that mode says, null where it says nothing, and whether it `asserts` the label."""
    frames = []
    for side, read in sides.items():
        rows, said = read.long(texts)
        said = said.rename({name: f"{side}_{name}" for name in said.columns if name != "label"})
        asserts = (pl.col(f"{side}_probability") > above).alias(f"{side}_asserts")
        frames.append(said.with_columns(asserts).insert_column(0, pl.Series("row", rows, pl.Int64)))
    joined = frames[0].join(frames[1], on=["row", "label"], how="full", coalesce=True)
    return joined.with_columns(pl.col("own_asserts", "ecg_fm_asserts").fill_null(False))


def _number(value: float, width: int) -> str:
    return f"{'-':>{width}}" if np.isnan(value) else f"{value:{width}.3f}"
