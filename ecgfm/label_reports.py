"""Many reports to labels: what `ecgfm label` does, and what a pipeline's labels are made of where a source has reports.

A text that occurs twice is read once, by several processes where there are many; results are kept as numbers, and
tables are written block by block, so that memory grows with the distinct texts and not with the labels. No text is
logged or sent anywhere.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl
from tqdm import tqdm

from ecgfm.answer_files import TableWriter, check_outs
from ecgfm.config import PROGRESS_BAR, LabelsConfig, ReportsConfig
from ecgfm.contracts import empty_table
from ecgfm.csv_tables import separator, why
from ecgfm.ecg import InputError
from ecgfm.label_space import Label, LabelSpace
from ecgfm.processes import ordered_map, worthwhile
from ecgfm.reports.assertion import Assertion, Status
from ecgfm.reports.ecg_fm import EcgFmLabeler
from ecgfm.reports.ecg_fm_patterns import read_patterns
from ecgfm.reports.own import OwnLabeler
from ecgfm.reports.vocabulary import Vocabulary

OUTS = (".csv", ".parquet")
TABLES = (".csv", ".tsv", ".parquet")
UNLIKELY = 0.2
"""Below this probability a finding is denied rather than left open: "infarct unlikely"."""
TEXTS_TOGETHER = 4096  # read by a process at a time
ROWS_TOGETHER = 65_536  # of the tables that are written
STATUSES: tuple[Status, ...] = get_args(Status)

_KINDS: dict[str, Any] = {  # of what an assertion is made of
    "label": np.int32, "status": np.int8, "probability": np.float64, "start": np.int64, "end": np.int64,
    "rule": np.int32,
}  # fmt: skip


@cache
def labeler(config: ReportsConfig) -> OwnLabeler | EcgFmLabeler:
    """What reads reports as `config` says; made once in a process.

    Raises:
        InputError: rules or patterns that cannot be used, or no such set of labels.
    """
    if config.patterns is not None:
        return EcgFmLabeler(read_patterns(Path(config.patterns)), gate=config.mended, negation=config.mended)
    return OwnLabeler(Vocabulary.read(Path(config.rules) if config.rules else None), config.label_set)


def labels_of(config: ReportsConfig) -> tuple[str, ...]:
    """The labels in the order of tables. Those of ECG-FM's patterns bear the names that our sets have for them.

    Raises:
        InputError: as `labeler`, or a set of which the patterns make no label.
    """
    if config.mode == "own" or config.label_set is None:
        return tuple(labeler(config).labels)
    wanted = tuple(Vocabulary.read().labels_of(config.label_set))
    known = set(labeler(config).labels)
    if strangers := [label for label in wanted if label not in known]:
        raise InputError(
            f"the patterns in {config.patterns} make no label {strangers[0]!r} of the set {config.label_set}; read "
            "without a set, or with mode own"
        )
    return wanted


@dataclass(frozen=True)
class Readings:
    """What distinct texts assert. Of text i these are the assertions from `first[i]` to `first[i + 1]`.

    labels, rules: what `label` and `rule` count in
    label, status, rule: int32, int8 (of `STATUSES`), int32; probability: float64; start, end: int64, characters
    unmatched: what nothing explains -> in how many reports, counted as often as its text occurs
    """

    labels: Sequence[str]
    rules: Sequence[str]
    first: np.ndarray
    label: np.ndarray
    status: np.ndarray
    probability: np.ndarray
    start: np.ndarray
    end: np.ndarray
    rule: np.ndarray
    unmatched: Counter[str] = field(default_factory=Counter)

    def dense(self, texts: np.ndarray, unmentioned: float = 0.0) -> np.ndarray:
        """(row, label) float64 probabilities: `unmentioned` where a text says nothing of a label, NaN where there is no
        text.

        texts: (row,) number of each row's text, -1 where it has none
        """
        rows, at = self._of(texts)
        table = np.full((len(texts), len(self.labels)), unmentioned)
        table[rows, self.label[at]] = self.probability[at]
        table[texts < 0] = np.nan
        return table

    def long(self, texts: np.ndarray) -> tuple[np.ndarray, pl.DataFrame]:
        """The rows, and beside each an assertion that its text makes: the columns of `report_findings`."""
        rows, at = self._of(texts)
        words = {"label": (self.labels, self.label), "status": (STATUSES, self.status), "rule": (self.rules, self.rule)}
        named = {name: pl.Series(values, dtype=pl.String).gather(of[at]) for name, (values, of) in words.items()}
        numbers = {name: getattr(self, name)[at] for name in ("probability", "start", "end")}
        columns = {**named, **numbers}
        order = [name for name in empty_table("report_findings").columns if name in columns]
        return rows, pl.DataFrame({name: columns[name] for name in order})

    def mentioned(self) -> Readings:
        """The same with the labels alone that some text asserts."""
        kept, label = np.unique(self.label, return_inverse=True)
        return replace(self, labels=[self.labels[k] for k in kept], label=label.astype(np.int32))

    def _of(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For the assertions of all rows, in order: the row, and the place of the assertion."""
        known = np.flatnonzero(texts >= 0)
        first, n = self.first[texts[known]], np.diff(self.first)[texts[known]]
        within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        return np.repeat(known, n), np.repeat(first, n) + within


@dataclass(frozen=True)
class Numbered:
    """Texts by number. distinct: each once, in the order of their first row; of_row: (row,) int64, -1 where null"""

    distinct: pl.Series
    of_row: np.ndarray
    times: np.ndarray


def number_texts(texts: pl.Series) -> Numbered:
    """The distinct texts of a column; one that is null, or blanks alone, is none."""
    texts = texts.cast(pl.String).alias("text")
    written = pl.DataFrame({"text": texts}).with_columns(
        text=pl.when(pl.col("text").str.strip_chars().str.len_bytes() > 0).then(pl.col("text"))
    )
    counted = written.drop_nulls().group_by("text", maintain_order=True).len("times").with_row_index("number")
    of_row = written.join(counted, on="text", how="left", maintain_order="left")["number"]
    return Numbered(
        counted["text"], of_row.cast(pl.Int64).fill_null(-1).to_numpy(), counted["times"].cast(pl.Int64).to_numpy()
    )


def read_texts(texts: Numbered, config: ReportsConfig, jobs: int = 0) -> Readings:
    """What each distinct text asserts. jobs: processes; 0: one per core, where there are many texts

    Raises:
        InputError: as `labeler`.
    """
    labels = labels_of(config)
    blocks = range(0, len(texts.distinct), TEXTS_TOGETHER)
    items = (
        (texts.distinct[at : at + TEXTS_TOGETHER].to_list(), texts.times[at : at + TEXTS_TOGETHER].tolist())
        for at in blocks
    )
    rules: dict[str, int] = {}
    parts: list[_Part] = []
    unmatched: Counter[str] = Counter()
    progress = tqdm(desc="label", total=len(texts.distinct), unit=" reports", **PROGRESS_BAR)
    with progress:
        for part in ordered_map(partial(_read, config), items, worthwhile(len(texts.distinct), jobs)):
            parts.append(part.renumbered("rule", [rules.setdefault(rule, len(rules)) for rule in part.rules]))
            unmatched.update(part.unmatched)
            progress.update(len(part.n))
    n = np.concatenate([np.empty(0, np.int64), *(part.n for part in parts)])
    joined = {
        name: np.concatenate([np.empty(0, kind), *(getattr(part, name) for part in parts)])
        for name, kind in _KINDS.items()
    }
    return Readings(labels, list(rules), np.concatenate([[0], np.cumsum(n)]), **joined, unmatched=unmatched)


@dataclass(frozen=True)
class _Part:
    """`Readings` of some texts, as one process gives them. n: assertions of each text"""

    n: np.ndarray
    label: np.ndarray
    status: np.ndarray
    probability: np.ndarray
    start: np.ndarray
    end: np.ndarray
    rule: np.ndarray
    rules: list[str]
    unmatched: dict[str, int]

    def renumbered(self, name: str, numbers: Sequence[int]) -> _Part:
        """The same with a column of numbers counted otherwise."""
        old: np.ndarray = getattr(self, name)
        new: Any = {name: np.array(numbers, old.dtype)[old] if len(old) else old}
        return replace(self, **new)


def _read(config: ReportsConfig, item: tuple[list[str], list[int]]) -> _Part:
    reader = labeler(config)
    number = {label: place for place, label in enumerate(labels_of(config))}
    rules: dict[str, int] = {}
    unmatched: Counter[str] = Counter()
    n: list[int] = []
    found: list[tuple[int, int, float, int, int, int]] = []
    for text, times in zip(*item, strict=True):
        said, rest = _say(reader, text)
        said = [one for one in said if one.label in number]
        n.append(len(said))
        found += [
            (
                number[one.label],
                STATUSES.index(one.status),
                one.probability,
                one.start,
                one.end,
                rules.setdefault(one.rule, len(rules)),
            )
            for one in said
        ]
        for words in rest:
            unmatched[words] += times
    columns: Sequence[Sequence[Any]] = list(zip(*found, strict=True)) or [()] * len(_KINDS)
    arrays = {name: np.array(values, kind) for (name, kind), values in zip(_KINDS.items(), columns, strict=True)}
    return _Part(np.array(n, np.int64), **arrays, rules=list(rules), unmatched=dict(unmatched))


def _say(reader: OwnLabeler | EcgFmLabeler, text: str) -> tuple[list[Assertion], set[str]]:
    """What a text asserts, and the pieces of it that nothing explains."""
    if isinstance(reader, OwnLabeler):
        said, rest = reader.read_all(text)
        return said, {words for words, _, _ in rest}
    left = re.split(r"[;,.:()]|\s\s+", reader.unmatched(reader.normalise(text)))
    return reader.read(text), {words.strip() for words in left if words.strip()}


# ---- the command


@dataclass(frozen=True)
class Summary:
    """What became of a table of reports.

    reports: rows; empty: rows without a report; distinct: texts; mentions: label -> rows that assert it, by status
    """

    reports: int
    empty: int
    distinct: int
    mentions: dict[str, dict[str, int]]
    unmatched: int
    seconds: float
    files: tuple[Path, ...]

    def in_words(self) -> list[str]:
        """Lines to print; no text of a report is in them."""
        silent = f", {self.empty:,} of them empty" if self.empty else ""
        lines = [
            f"{self.reports:,} reports{silent}, {self.distinct:,} distinct texts, in {self.seconds:.1f} s "
            f"({self.reports / max(self.seconds, 1e-9):,.0f} a second)"
        ]
        width = max((len(label) for label in self.mentions), default=0)
        if self.mentions:
            lines.append(f"{'label':{width}}  {'present':>9} {'uncertain':>9} {'absent':>9}")
        for label, counts in self.mentions.items():
            shown = " ".join(f"{counts.get(status, 0):9,}" for status in ("present", "uncertain", "absent"))
            lines.append(f"{label:{width}}  {shown}")
        if self.unmatched:
            pieces = f"{self.unmatched:,} different piece{'' if self.unmatched == 1 else 's'} of text"
            lines.append(f"{pieces} that nothing explains: the most frequent first in {self.files[-1].name}")
        return [*lines, *map(str, self.files)]


def label_file(
    reports: Path, text_column: str, id_column: str, out: Path, config: ReportsConfig, jobs: int = 0
) -> Summary:
    """Read a table of reports and write, as `.parquet` or `.csv`: `out`, a column per label; beside it
    `<out>.findings`, a row per report and label with the words that cause it, and `<out>.unmatched.csv`, what nothing
    explains, by how many reports have it, to extend the vocabulary by.

    Raises:
        InputError: a table that cannot be read, columns that it has not, an id that is missing or there twice, an
            output that cannot be written, or what `labeler` raises.
    """
    started = time.monotonic()
    findings = out.with_name(f"{out.stem}.findings{out.suffix}")
    unmatched = out.with_name(f"{out.stem}.unmatched.csv")
    check_outs([out, findings, unmatched], OUTS)
    table = read_reports(reports, text_column, id_column)
    numbered = number_texts(table["text"])
    read = read_texts(numbered, config, jobs)
    if config.mode == "ecg-fm" and config.label_set is None:
        read = read.mentioned()  # of some 10,000 labels a table has room for those that occur
    write_labels(table["record_id"], numbered.of_row, read, out)
    write_findings(table["record_id"], numbered.of_row, read, findings, unmatched)
    return Summary(
        reports=table.height,
        empty=int((numbered.of_row < 0).sum()),
        distinct=len(numbered.distinct),
        mentions=count_mentions(read, numbered.times),
        unmatched=len(read.unmatched),
        seconds=time.monotonic() - started,
        files=(out, findings, unmatched),
    )


def from_reports(
    records: pl.DataFrame, config: LabelsConfig, out: Path
) -> tuple[pl.DataFrame, LabelSpace, dict[str, int]]:
    """The labels of records by their reports, and how many records have none; beside them, in `out`, what asserts them.

    records: with `record_id` and `report`

    Raises:
        InputError: no record has a report, `max_labels` names an unknown label, or what `labeler` raises.
    """
    assert config.reports is not None
    numbered = number_texts(records["report"])
    if numbered.distinct.is_empty():
        raise InputError(
            f"labels: none of the {records.height} records has a report; choose another labels.scheme, or for own data "
            "name the reports' column in ecgfm.yaml"
        )
    read = read_texts(numbered, config.reports)
    if unknown := [name for name in config.max_labels if name not in read.labels]:
        raise InputError(f"labels.max_labels: no label {', '.join(unknown)}; labels: {', '.join(read.labels)}")
    values = {"present": 1.0, "absent": 0.0, "unknown": np.nan}
    said = read.dense(numbered.of_row, values[config.unmentioned])
    said[said < UNLIKELY] = 0.0
    said[(said > 0) & (said < 1)] = values[config.uncertain]
    columns = {label: pl.Series(said[:, k]).fill_nan(None).cast(pl.Int8) for k, label in enumerate(read.labels)}
    write_findings(records["record_id"], numbered.of_row, read, out / "findings.parquet", out / "unmatched.csv")
    space = LabelSpace(
        tuple(
            Label(label, codes, "max" if label in config.max_labels else "mean")
            for label, codes in codes_of(config.reports, read.labels).items()
        ),
        {},
        config.task,
    )
    counts = {"records without a report": int((numbered.of_row < 0).sum()), "distinct reports": len(numbered.distinct)}
    return pl.DataFrame({"record_id": records["record_id"], **columns}), space, counts


def codes_of(config: ReportsConfig, labels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The SNOMED CT codes of what asserts each label, where there are any."""
    reader = labeler(config)
    if not isinstance(reader, OwnLabeler):
        return dict.fromkeys(labels, ())
    findings = reader.vocabulary.findings
    rules = reader.vocabulary.labels_of(config.label_set) if config.label_set else {}
    of_label = {label: rules[label].any_of if label in rules else (label,) for label in labels}
    return {
        label: tuple(findings[name].snomed for name in of if findings[name].snomed) for label, of in of_label.items()
    }


def read_reports(path: Path, text_column: str, id_column: str) -> pl.DataFrame:
    """`record_id` and `text` of a CSV or Parquet table, both as text, in its order.

    Raises:
        InputError: see `label_file`.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a .csv, .tsv or .parquet table of reports")
    if path.suffix.lower() not in TABLES:
        raise InputError(f"{path}: expected a table named .csv, .tsv or .parquet, found {path.suffix or 'no suffix'}")
    try:
        lazy = (
            pl.scan_parquet(path)
            if path.suffix.lower() == ".parquet"
            else pl.scan_csv(path, infer_schema=False, separator=separator(path))
        )
        columns = lazy.collect_schema().names()
        for option, column in (("--id-column", id_column), ("--text-column", text_column)):
            if column not in columns:
                raise InputError(f"{path}: no column {column!r}; it has {', '.join(columns)}; name one with {option}")
        table = lazy.select(
            record_id=pl.col(id_column).cast(pl.String), text=pl.col(text_column).cast(pl.String)
        ).collect()
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path}: cannot be read as a table: {why(error)[:300]}") from error
    if missing := table["record_id"].null_count():
        raise InputError(f"{path}: {missing} of {table.height} rows have no {id_column}; every report needs one")
    ids = table.with_row_index("row").filter(pl.col("record_id").is_duplicated())
    if not ids.is_empty():
        rows = ids.filter(pl.col("record_id") == ids["record_id"][0])["row"]
        raise InputError(
            f"{path}: rows {rows[0] + 1} and {rows[1] + 1} have the same {id_column} ({ids['record_id'].n_unique():,} "
            "such); give each report an id of its own, or join the texts of one record first"
        )
    return table


def write_labels(record_ids: pl.Series, texts: np.ndarray, read: Readings, out: Path) -> None:
    """Write `report_labels`, block by block. texts: as in `Readings.dense`"""
    columns = {"record_id": pl.String(), **dict.fromkeys(read.labels, pl.Float64())}
    with TableWriter(out, columns, "report_labels") as table:
        for ids, block in _blocks(record_ids, texts):
            table.add_table(pl.DataFrame(read.dense(block), schema=list(read.labels)).insert_column(0, ids))


def write_findings(record_ids: pl.Series, texts: np.ndarray, read: Readings, findings: Path, unmatched: Path) -> None:
    """Write `report_findings`, block by block, and what nothing explains, the most frequent first."""
    with TableWriter(findings, empty_table("report_findings").schema, "report_findings") as table:
        for ids, block in _blocks(record_ids, texts):
            rows, said = read.long(block)
            table.add_table(said.insert_column(0, ids.gather(rows)))
    ranked = sorted(read.unmatched.items(), key=lambda item: (-item[1], item[0]))
    columns = {"text": pl.String(), "reports": pl.Int64()}
    with TableWriter(unmatched, columns) as table:
        table.add_table(pl.DataFrame(ranked, schema=columns, orient="row"))


def _blocks(record_ids: pl.Series, texts: np.ndarray) -> Iterator[tuple[pl.Series, np.ndarray]]:
    for at in range(0, len(texts), ROWS_TOGETHER):
        yield record_ids[at : at + ROWS_TOGETHER].alias("record_id"), texts[at : at + ROWS_TOGETHER]


def count_mentions(read: Readings, times: np.ndarray) -> dict[str, dict[str, int]]:
    """Label -> status -> how many reports, of labels that are mentioned. times: how often each text occurs"""
    text = np.repeat(np.arange(len(times)), np.diff(read.first))
    counted = np.zeros((len(read.labels), len(STATUSES)), np.int64)
    np.add.at(counted, (read.label, read.status), times[text])
    return {
        label: {status: int(n) for status, n in zip(STATUSES, row, strict=True) if n}
        for label, row in zip(read.labels, counted, strict=True)
        if row.any()
    }
