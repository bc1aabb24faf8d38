"""The cohort: numbers that add up, and a drawing of them."""

from __future__ import annotations

import random
import re
from typing import Any
from xml.etree import ElementTree

import polars as pl
import pytest

from ecgfm.cohort import SPLIT_NAMES, cohort_svg, cohort_text, count_cohort
from ecgfm.contracts import table_of


def tables(n_records: int, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """records, rejects, duplicates and splits of two sources, at random; every third record of `b` has no patient."""
    rng = random.Random(seed)
    records, rejects, duplicates, splits = [], [], [], []
    for number in range(n_records):
        source = rng.choice("ab")
        record_id = f"{source}/{number}"
        if rng.random() < 0.1:
            reason = rng.choice(["truncated", "missing_signal"])
            rejects.append({"source": source, "reason": reason})
            continue
        records.append({"record_id": record_id, "source": source})
        excluded = rng.choice([None, None, None, "constant_lead", "duplicate"])
        splits.append(
            {
                "record_id": record_id,
                "patient_id": None if source == "b" and number % 3 == 0 else f"{source}/p{number // 4}",
                "split": None if excluded else rng.choice(SPLIT_NAMES),
                "excluded": excluded,
            }
        )
        if rng.random() < 0.2:
            duplicates.append({"record_id": record_id, "source": source, "group_id": record_id, "n_records": 2})
    schema = {"source": pl.String, "reason": pl.String}
    return (
        pl.DataFrame(records, schema={"record_id": pl.String, "source": pl.String}),
        pl.DataFrame(rejects, schema=schema),
        table_of("duplicates", duplicates),
        table_of("splits", splits),
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_numbers_add_up_in_all_and_in_each_source(seed: int) -> None:
    records, rejects, duplicates, splits = tables(500, seed)
    cohort = count_cohort(records, rejects, duplicates, splits)
    assert cohort["total"]["listed"] == 500
    assert set(cohort["sources"]) == {"a", "b"}
    for counts in (cohort["total"], *cohort["sources"].values()):
        assert counts["listed"] == sum(counts["rejected"].values()) + counts["prepared"]["records"]
        placed = [counts["splits"][split]["records"] for split in SPLIT_NAMES]
        assert counts["prepared"]["records"] == sum(counts["excluded"].values()) + sum(placed)
        assert all(placed)
    for key in ("listed", "with_copies"):
        assert cohort["total"][key] == sum(counts[key] for counts in cohort["sources"].values())
    for key in ("rejected", "excluded"):
        for reason, count in cohort["total"][key].items():
            assert count == sum(counts[key].get(reason, 0) for counts in cohort["sources"].values())
    known = splits.drop_nulls("patient_id")
    assert cohort["total"]["prepared"]["patients"] == len(set(known["patient_id"]))
    assert cohort["total"]["prepared"]["unknown_patients"] == splits["patient_id"].null_count() > 0


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return [str(element.text) for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_drawing_shows_every_number_and_is_the_same_each_time() -> None:
    cohort = count_cohort(*tables(5000))
    svg = cohort_svg(cohort)
    assert svg == cohort_svg(count_cohort(*tables(5000)))
    shown = texts(svg)
    assert [text for text in shown if text in ("All sources", "a", "b")] == ["All sources", "a", "b"]
    assert shown.count("Listed") == shown.count("Train") == 3
    for counts in (cohort["total"], *cohort["sources"].values()):
        assert f"{counts['listed']:,} records" in shown
        assert f"Rejected: {sum(counts['rejected'].values()):,} records" in shown
        assert f"missing signal: {counts['rejected']['missing_signal']:,}" in shown
        assert f"{counts['with_copies']:,} records with a copy" in shown
        for split in SPLIT_NAMES:
            assert f"{counts['splits'][split]['patients']:,} patients" in shown


def test_a_single_source_is_drawn_once() -> None:
    records, rejects, duplicates, splits = (
        table.filter(pl.col("source" if "source" in table.columns else "record_id").str.starts_with("a"))
        for table in tables(300)
    )
    shown = texts(cohort_svg(count_cohort(records, rejects, duplicates, splits)))
    assert shown.count("Listed") == 1
    assert shown[0] == "a"


def boxes(svg: str) -> list[tuple[float, float, float, float]]:
    found = re.findall(r'<rect class="[^"]*box" x="(\d+)" y="(\d+)" width="(\d+)" height="(\d+)"/>', svg)
    return [(float(x), float(y), float(x) + float(w), float(y) + float(h)) for x, y, w, h in found]


def test_boxes_do_not_overlap_and_hold_their_text() -> None:
    """A million records: the widest numbers there will be; a letter of this size is at most 7.5 pixels wide."""
    counts: dict[str, Any] = {
        "listed": 1_234_567,
        "rejected": {"unreadable_signal": 123_456, "no_standard_lead": 7},
        "prepared": {"records": 1_111_104, "patients": 323_232, "unknown_patients": 123_456},
        "with_copies": 123_456,
        "excluded": {"invalid_sample": 1_000},
        "splits": {
            split: {"records": 370_034, "patients": 107_744, "unknown_patients": 123_456} for split in SPLIT_NAMES
        },
    }
    svg = cohort_svg({"total": counts, "sources": {"a": counts, "b": counts}})
    drawn = boxes(svg)
    assert len(drawn) == 3 * 7
    size = ElementTree.fromstring(svg).attrib
    for place, (left, top, right, bottom) in enumerate(drawn):
        assert left >= 0
        assert right <= float(size["width"])
        assert bottom <= float(size["height"])
        for l, t, r, b in drawn[place + 1 :]:  # noqa: E741
            assert right <= l or r <= left or bottom <= t or b <= top
    inside = 0
    for x, y, text in re.findall(r'<text(?: class="head")? x="(\d+)" y="(\d+)">([^<]*)<', svg):
        (box,) = (b for b in drawn if b[0] <= float(x) <= b[2] and b[1] <= float(y) <= b[3])
        assert float(x) + 7.5 * len(text) <= box[2] + 20
        inside += 1
    assert inside > 50


def test_names_are_written_as_text() -> None:
    records, rejects, duplicates, splits = tables(100)
    strange = pl.col("source").replace("a", "<b>&amp;")
    svg = cohort_svg(
        count_cohort(
            records.with_columns(strange), rejects.with_columns(strange), duplicates.with_columns(strange), splits
        )
    )
    assert "<b>&amp;" in texts(svg)


def test_the_table_has_a_row_per_source_and_the_reasons() -> None:
    cohort = count_cohort(*tables(5000))
    text = cohort_text(cohort)
    rows = {
        line.split(" | ")[0]: line.strip("| ").split(" | ")[1:] for line in text.splitlines() if line.startswith("| ")
    }
    assert set(rows) == {"| source", "| a", "| b", "| all"}
    number = {
        name: [int(cell.replace(",", "")) for cell in cells] for name, cells in rows.items() if name != "| source"
    }
    assert [a + b for a, b in zip(number["| a"], number["| b"], strict=True)] == number["| all"]
    assert f"- rejected, truncated: {cohort['total']['rejected']['truncated']:,} records" in text
    assert f"- excluded, duplicate: {cohort['total']['excluded']['duplicate']:,} records" in text
