"""The cohort: how many records were listed, rejected, excluded and split, and the diagram that a paper shows.

The form is that of the flow diagrams of STARD 2015 and CONSORT 2010: a box for what is left, a box beside for what is
lost and why. Drawn by hand as SVG, so that equal counts give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import polars as pl

SPLIT_NAMES = ("train", "valid", "test")

_WIDTH, _MARGIN, _GAP = 800, 20, 34  # pixels
_LINE, _PADDING = 18, 10
_MAIN, _SIDE, _SPLIT = 280, 230, 236  # widths of boxes


def count_cohort(
    records: pl.DataFrame, rejects: pl.DataFrame, duplicates: pl.DataFrame, splits: pl.DataFrame
) -> dict[str, Any]:
    """The counts of all records (`total`) and of each source (`sources`), as JSON-able data.

    records: record_id, source of the prepared records; rejects: source, reason; duplicates, splits: the tables

    Each has `listed`, `rejected` by reason, `prepared`, `with_copies`, `excluded` by reason and `splits`; where records
    remain, `records`, `patients` (known ones, each once) and `unknown_patients` (records).
    """
    placed = splits.join(records, on="record_id")
    names = sorted({*records["source"].unique(), *rejects["source"].unique()})
    sources = {}
    for name in names:
        of_source = pl.col("source") == name
        sources[name] = _counts(placed.filter(of_source), rejects.filter(of_source), duplicates.filter(of_source))
    return {"total": _counts(placed, rejects, duplicates), "sources": sources}


def _counts(placed: pl.DataFrame, rejects: pl.DataFrame, duplicates: pl.DataFrame) -> dict[str, Any]:
    return {
        "listed": placed.height + rejects.height,
        "rejected": _by_reason(rejects["reason"]),
        "prepared": _people(placed),
        "with_copies": duplicates.height,
        "excluded": _by_reason(placed["excluded"].drop_nulls()),
        "splits": {split: _people(placed.filter(pl.col("split") == split)) for split in SPLIT_NAMES},
    }


def _by_reason(reasons: pl.Series) -> dict[str, int]:
    """The most frequent first."""
    counted = reasons.value_counts().sort(["count", reasons.name], descending=[True, False])
    return dict(counted.iter_rows())


def _people(placed: pl.DataFrame) -> dict[str, int]:
    known = placed["patient_id"].drop_nulls()
    return {
        "records": placed.height,
        "patients": known.n_unique(),
        "unknown_patients": placed.height - known.len(),
    }


def cohort_text(cohort: Mapping[str, Any]) -> str:
    """The counts as a Markdown table, a row per source, with the reasons below it; ends with a line break."""
    sources = cohort["sources"]
    rows = [*sources.items(), *([("all", cohort["total"])] if len(sources) > 1 else [])]
    lines = [
        "| source | listed | rejected | prepared | with a copy | excluded | train | valid | test |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, counts in rows:
        numbers = [
            counts["listed"],
            sum(counts["rejected"].values()),
            counts["prepared"]["records"],
            counts["with_copies"],
            sum(counts["excluded"].values()),
            *(counts["splits"][split]["records"] for split in SPLIT_NAMES),
        ]
        lines.append(f"| {name} | {' | '.join(f'{number:,}' for number in numbers)} |")
    total = cohort["total"]
    lines += [""] if total["rejected"] or total["excluded"] else []
    lines += [
        f"- {kind}, {reason.replace('_', ' ')}: {_records(count)}"
        for kind in ("rejected", "excluded")
        for reason, count in total[kind].items()
    ]
    return "\n".join(lines) + "\n"


def cohort_svg(cohort: Mapping[str, Any]) -> str:
    """The flow diagram of all records, and below it that of each source where there are several."""
    sources = cohort["sources"]
    panels = [("All sources" if len(sources) > 1 else next(iter(sources), ""), cohort["total"])]
    if len(sources) > 1:
        panels += list(sources.items())
    y, parts = _MARGIN, []
    for title, counts in panels:
        drawn, y = _panel(title, counts, y)
        parts += drawn
        y += _GAP
    height = y - _GAP + _MARGIN
    style = (
        "text{font:13px Helvetica,Arial,sans-serif;fill:#1a1a1a}.head{font-weight:bold}"
        ".title{font-size:16px;font-weight:bold}.box{fill:#fff;stroke:#444}.lost{fill:#f4f4f4}"
        ".arrow{fill:none;stroke:#444;marker-end:url(#head)}.line{fill:none;stroke:#444}"
    )
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#444"/></marker>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" role="img">\n<title>Cohort: from the listed records to the splits</title>\n'
        f"<style>{style}</style>\n<defs>{head}</defs>\n"
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(title: str, counts: Mapping[str, Any], y: int) -> tuple[list[str], int]:
    """The elements of one diagram whose top is at `y`, and where its bottom is."""
    centre, side_x = _WIDTH // 2, _WIDTH - _MARGIN - _SIDE
    main_x = centre - _MAIN // 2
    rejected, excluded = sum(counts["rejected"].values()), sum(counts["excluded"].values())
    prepared = counts["prepared"]
    copies = [f"{_records(counts['with_copies'])} with a copy"] if counts["with_copies"] else []
    parts = [f'<text class="title" x="{_MARGIN}" y="{y + 14}">{escape(title)}</text>']
    y += 30
    for head, lines, lost_head, lost in (
        ("Listed", [_records(counts["listed"])], f"Rejected: {_records(rejected)}", counts["rejected"]),
        ("Prepared", [*_people_lines(prepared), *copies], f"Excluded: {_records(excluded)}", counts["excluded"]),
    ):
        box, bottom = _box(main_x, y, _MAIN, head, lines)
        lost_lines = [f"{reason.replace('_', ' ')}: {count:,}" for reason, count in lost.items()]
        side, side_bottom = _box(side_x, bottom + _GAP // 2, _SIDE, lost_head, lost_lines, "lost ")
        branch = bottom + _GAP // 2 + (_LINE + 2 * _PADDING) // 2
        y = side_bottom + _GAP // 2
        parts += [*box, *side, _path("arrow", centre, branch, f"H{side_x}")]
        down = "arrow" if head == "Listed" else "line"
        parts.append(_path(down, centre, bottom, f"V{y}"))
    fork, y = y, y + _GAP // 2
    bottoms = []
    for place, split in enumerate(SPLIT_NAMES):
        x = _MARGIN + place * (_WIDTH - 2 * _MARGIN - _SPLIT) // 2
        box, bottom = _box(x, y, _SPLIT, split.capitalize(), _people_lines(counts["splits"][split]))
        parts += [*box, _path("arrow", centre, fork, f"H{x + _SPLIT // 2}V{y}")]
        bottoms.append(bottom)
    return parts, max(bottoms)


def _people_lines(counts: Mapping[str, int]) -> list[str]:
    lines = [_records(counts["records"])]
    if counts["patients"]:
        lines.append(f"{counts['patients']:,} patient{'s' * (counts['patients'] != 1)}")
        if counts["unknown_patients"]:
            lines.append(f"and {counts['unknown_patients']:,} of unknown patients")
    elif counts["records"]:
        lines.append("patients unknown")
    return lines


def _records(count: int) -> str:
    return f"{count:,} record{'s' * (count != 1)}"


def _box(x: int, y: int, width: int, head: str, lines: Sequence[str], style: str = "") -> tuple[list[str], int]:
    """A box with its text, and where its bottom is."""
    height = 2 * _PADDING + _LINE * (1 + len(lines))
    parts = [f'<rect class="{style}box" x="{x}" y="{y}" width="{width}" height="{height}"/>']
    for number, text in enumerate([head, *lines]):
        kind = ' class="head"' if not number else ""
        parts.append(f'<text{kind} x="{x + _PADDING}" y="{y + _PADDING + 13 + _LINE * number}">{escape(text)}</text>')
    return parts, y + height


def _path(kind: str, x: int, y: int, rest: str) -> str:
    return f'<path class="{kind}" d="M{x} {y}{rest}"/>'
