"""How fast reports become labels, beside the obvious way: a regular expression for each phrase that is known.

The reports are made of the vocabulary's own phrases, three to eight statements each, drawn by Zipf's law as those of a
machine's statements are: a few are in most reports, most are rare. Hardly any two reports are equal, so that little is
won by reading a text once.
"""

from __future__ import annotations

import multiprocessing
import re
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl

from ecgfm.config import ReportsConfig
from ecgfm.label_reports import label_file
from ecgfm.reports.vocabulary import Vocabulary

OBVIOUS_REPORTS = 200  # that the obvious way reads: it takes seconds already
FRAMES = (
    "{}", "{}", "{}", "possible {}", "probable {}", "borderline {}", "cannot rule out {}", "no evidence of {}",
    "{}, age undetermined", "consider {}", "nonspecific {}",
)  # fmt: skip
STATEMENTS, MOST_COMMON = 4000, 1.1  # how many different ones; the exponent of Zipf's law


def main(reports: int, given: Path | None, text_column: str, id_column: str, jobs: int, repeats: int) -> str:
    """Measure on so many reports, or on those of a table; the lines to print."""
    with tempfile.TemporaryDirectory(prefix="ecgfm-bench-") as scratch:
        folder = Path(scratch)
        table = given or folder / "reports.parquet"
        if given is None:
            text_column, id_column = "report", "record_id"
            texts = made_up(reports)
            ids = pl.int_range(len(texts), eager=True).cast(pl.String)
            pl.DataFrame({id_column: ids, text_column: texts}).write_parquet(table)
        reader = pl.read_parquet if table.suffix == ".parquet" else pl.read_csv
        column = reader(table, columns=[text_column])[text_column].cast(pl.String)
        texts = column.drop_nulls().to_list()
        measured = []
        for _ in range(repeats):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                measured.append(alone.submit(_label, table, text_column, id_column, folder, jobs).result())
        per_s = statistics.median(len(texts) / seconds for seconds, _ in measured)
        obvious_per_s = _obvious(texts[:OBVIOUS_REPORTS])
    peak_mb = max(peak for _, peak in measured)
    n_distinct = column.drop_nulls().n_unique()
    whose = f"of {given.name}" if given else "made of the vocabulary's phrases"
    return "\n".join(
        [
            f"{len(texts):,} reports {whose}, {n_distinct:,} of them distinct, "
            f"{statistics.mean(map(len, texts)):.0f} characters on average; every finding that is known, with spans",
            f"{'ecgfm label, reading and writing included':44} {per_s:12,.0f} reports/s, median of {repeats}, largest "
            f"process {peak_mb:,.0f} MB",
            f"{'a regular expression per phrase, one process':44} {obvious_per_s:12,.1f} reports/s, of "
            f"{min(len(texts), OBVIOUS_REPORTS)} reports, without negation or doubt",
            f"ratio {per_s / obvious_per_s:,.0f}",
        ]
    )


def made_up(n: int, seed: int = 0) -> list[str]:
    """Reports as the module says, the same for the same seed."""
    random = np.random.default_rng(seed)
    phrases = sorted(phrase for phrase, term in Vocabulary.read().terms.items() if term.kind == "finding")
    frames, subjects = random.integers(len(FRAMES), size=STATEMENTS), random.integers(len(phrases), size=STATEMENTS)
    statements = [FRAMES[f].format(phrases[s]) for f, s in zip(frames, subjects, strict=True)]
    weight = 1 / np.arange(1, STATEMENTS + 1) ** MOST_COMMON
    counts = random.integers(3, 9, n)
    drawn = random.choice(STATEMENTS, size=counts.sum(), p=weight / weight.sum())
    ends = np.cumsum(counts)
    return [
        f"Ventricular rate {rate} bpm. {'. '.join(statements[s].capitalize() for s in drawn[end - count : end])}."
        for rate, end, count in zip(random.integers(40, 160, n), ends, counts, strict=True)
    ]


def _label(table: Path, text_column: str, id_column: str, folder: Path, jobs: int) -> tuple[float, float]:
    """In a process of its own: seconds, and the most memory that it or one of its workers held, MB."""
    started = time.monotonic()
    label_file(table, text_column, id_column, folder / "labels.parquet", ReportsConfig(), jobs)
    seconds = time.monotonic() - started
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes here
    held = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return seconds, max(held) / unit


def _obvious(texts: list[str]) -> float:
    """Reports a second by one regular expression for each phrase, compiled before."""
    phrases = [
        re.compile(rf"\b{re.escape(phrase)}\b")
        for phrase, term in Vocabulary.read().terms.items()
        if term.kind == "finding"
    ]
    started = time.monotonic()
    found = sum(phrase.search(text.lower()) is not None for text in texts for phrase in phrases)
    assert found or not texts
    return len(texts) / (time.monotonic() - started)
