"""What a model has seen: records, patients, and copies under other names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_data import write_inputs

from ecgfm.contracts import empty_table, read_table
from ecgfm.ecg import InputError
from ecgfm.leakage import UNKNOWN, Leak, Seen, find_leak, seen_in

IDS = st.lists(st.text(min_size=1, max_size=6), max_size=12, unique=True)


def copies(*groups: list[str]) -> pl.DataFrame:
    """A table of duplicates: each group is the same ECG."""
    rows = [(name, min(group)) for group in groups for name in group]
    table = pl.DataFrame(rows, schema={"record_id": pl.String, "group_id": pl.String}, orient="row")
    return pl.concat([empty_table("duplicates"), table], how="diagonal")


@given(IDS, IDS)
def test_a_record_leaks_exactly_if_it_was_seen(seen: list[str], asked: list[str]) -> None:
    leak = find_leak(Seen.of(seen, []), asked, [None] * len(asked), copies())
    assert leak == Leak(sorted(set(seen) & set(asked)), [], [])


def test_a_record_and_a_patient_of_one_name_are_not_one() -> None:
    seen = Seen.of(["ptb_xl/1"], ["ptb_xl/2"])
    assert not find_leak(seen, ["ptb_xl/2", "ptb_xl/3"], [None, "ptb_xl/1"], copies())


def test_each_leaking_record_is_told_once_by_its_closest_tie() -> None:
    seen = Seen.of(["a", "b"], ["anna", "bea"])
    asked = {"a": "anna", "copy of b": "bea", "other of anna": "anna", "fresh": "carl", "unknown": None}
    leak = find_leak(seen, list(asked), list(asked.values()), copies(["b", "copy of b"], ["x", "y"]))
    assert leak == Leak(["a"], ["copy of b"], ["other of anna"])
    assert leak.in_words(5) == (
        "of 5 records 1 learnt from (a); 1 the same ECG as one learnt from, under another name (copy of b); "
        "1 of a patient learnt from (other of anna)"
    )


@given(IDS, IDS, IDS)
def test_a_finetuned_model_knows_what_its_encoder_knew(
    first: list[str], second: list[str], patients: list[str]
) -> None:
    together = Seen.of(first, patients) | Seen.of(second, [None])
    whole = Seen.of([*first, *second], patients)
    assert together.to_bytes() == whole.to_bytes()


@given(IDS, IDS)
def test_what_is_written_is_read_and_names_nobody(records: list[str], patients: list[str]) -> None:
    content = Seen.of(records, patients).to_bytes()
    read = Seen.from_bytes(content, "here")
    assert np.array_equal(read.records, Seen.of(records, []).records)
    assert np.array_equal(read.patients, Seen.of([], patients).patients)
    assert len(content) < 200 + 8 * (len(records) + len(patients))


def test_what_is_damaged_is_one_line() -> None:
    with pytest.raises(InputError, match="here: not the digests of records and patients"):
        Seen.from_bytes(b"nothing", "here")


def test_training_knows_train_and_valid(tmp_path: Path) -> None:
    manifests = write_inputs(tmp_path)["manifests"]
    for kind, contract in (("cmsc", "pairs"), ("labelled", "labelled_segments")):
        tables = [read_table(manifests / f"{kind}_{split}.parquet", contract) for split in ("train", "valid")]
        asked = [record_id for table in tables for record_id in table["record_id"].unique()]
        leak = find_leak(seen_in(manifests, kind), [*asked, "fresh"], [None] * (len(asked) + 1), copies())
        assert leak.records == sorted(asked)


def test_what_cannot_be_known_stays_unknown() -> None:
    known = Seen.of(["a"], [])
    assert known.whole
    both = Seen.from_bytes((known | UNKNOWN).to_bytes(), "here")
    assert not both.whole
    assert find_leak(both, ["a"], [None], copies()).records == ["a"]
