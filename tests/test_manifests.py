"""Manifests: which examples a training run visits. The judge is a loop over records and segments."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from test_splits import record

from ecgfm.config import ManifestsConfig
from ecgfm.contracts import read_table, table_of, write_table
from ecgfm.ecg import InputError
from ecgfm.label_space import Label, LabelSpace, read_label_space
from ecgfm.manifests import cmsc_pairs, make_manifests, split_segments

SPLITS = ("train", "valid", "test")
DROP = ManifestsConfig(rare_labels="drop")


class World:
    """Prepared records of two sources in four slices, their splits and their labels, with stages' directories."""

    def __init__(self, root: Path, n_records: int = 400, labels: tuple[str, ...] = ("AF", "rare", "block")) -> None:
        rng = random.Random(0)
        self.root = root
        self.n_segments = {}
        self.place: dict[tuple[str, int], tuple[str, str, int]] = {}
        self.patient, self.split, self.values = {}, {}, {}
        by_slice: dict[str, list[tuple[dict[str, Any], list[dict[str, Any]]]]] = defaultdict(list)
        used: dict[str, int] = defaultdict(int)
        for number in range(n_records):
            source, slice_id = ("toy", "other")[number % 2], f"folder {number % 4}"
            n = rng.choice([0, 1, 2, 2, 3, 7])
            row = record(number, number // 3 if source == "toy" else None, source, slice_id=slice_id, n_segments=n)
            name = row["record_id"]
            segments = []
            for index in range(n):
                shard_row = used[slice_id]
                used[slice_id] += 1
                self.place[name, index] = (source, slice_id, shard_row)
                segments.append(
                    {"record_id": name, "segment_index": index, "shard_row": shard_row, "start_s": 5.0 * index}
                )
            by_slice[slice_id].append((row, segments))
            self.n_segments[name], self.patient[name] = n, row["patient_id"]
            self.split[name] = None if n == 0 or rng.random() < 0.2 else rng.choice(["train", "train", "valid", "test"])
            self.values[name] = {label: rng.choice([0, 1, 1, None]) for label in labels}
            if "rare" in labels:
                self.values[name]["rare"] = int(number == 1)
            if number % 5 == 0:
                self.values[name] = dict.fromkeys(labels)
        self.slices = []
        for number, rows in enumerate(by_slice.values()):
            self.slices.append(root / f"slice_{number}")
            self.slices[-1].mkdir(parents=True)
            write_table(table_of("records", [r for r, _ in rows]), "records", self.slices[-1] / "records.parquet")
            flat = [segment for _, segments in rows for segment in segments]
            write_table(table_of("segments", flat), "segments", self.slices[-1] / "segments.parquet")
        self.write_splits()
        self.write_labels(labels)

    def write_splits(self) -> None:
        (self.root / "splits").mkdir(exist_ok=True)
        rows = [
            {
                "record_id": name,
                "patient_id": self.patient[name],
                "split": split,
                "excluded": None if split else "too_short" if self.n_segments[name] == 0 else "constant_lead",
            }
            for name, split in self.split.items()
        ]
        write_table(table_of("splits", rows), "splits", self.root / "splits" / "splits.parquet")

    def write_labels(self, labels: tuple[str, ...]) -> None:
        (self.root / "labels").mkdir(exist_ok=True)
        columns = {label: [self.values[name].get(label) for name in self.values] for label in labels}
        table = pl.DataFrame(
            {"record_id": list(self.values), **columns}, {"record_id": pl.String, **dict.fromkeys(labels, pl.Int8)}
        )
        write_table(table, "labels", self.root / "labels" / "labels.parquet")
        space = LabelSpace(tuple(Label(label, (label,), "max" if label == "block" else "mean") for label in labels))
        space.write(self.root / "labels" / "label_space.yaml")

    def make(self, config: ManifestsConfig = DROP, out: str = "out") -> tuple[dict[str, int], Path]:
        (self.root / out).mkdir()
        inputs = {"slices": self.slices, "splits": self.root / "splits", "labels": self.root / "labels"}
        return make_manifests(inputs, config, self.root / out), self.root / out

    def of_split(self, split: str) -> list[str]:
        return sorted(name for name in self.split if self.split[name] == split)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_pairs_are_the_adjacent_segments_of_one_record(world: World) -> None:
    counts, out = world.make()
    for split in ("train", "valid"):
        expected = []
        for name in world.of_split(split):
            first = 0
            while first + 1 < world.n_segments[name]:
                source, slice_id, row = world.place[name, first]
                second_row = world.place[name, first + 1][2]
                expected.append((name, world.patient[name], source, slice_id, first, first + 1, row, second_row))
                first += 2
        pairs = read_table(out / f"cmsc_{split}.parquet", "pairs")
        assert pairs.rows() == sorted(expected)
        assert counts[f"pairs: {split}"] == len(expected) > 20
        assert {pair[4] for pair in expected} == {0, 2, 4}
    assert not (out / "cmsc_test.parquet").exists()


def test_a_segment_is_in_one_pair_at_most(world: World) -> None:
    _, out = world.make()
    pairs = read_table(out / "cmsc_train.parquet", "pairs")
    used = [
        (row["slice_id"], row[which]) for row in pairs.iter_rows(named=True) for which in ("first_row", "second_row")
    ]
    assert len(used) == len(set(used))


def test_labelled_segments_are_those_of_the_split_with_their_records_labels(world: World) -> None:
    counts, out = world.make()
    for split in SPLITS:
        expected = [
            (name, world.patient[name], *world.place[name, index][:2], index, world.place[name, index][2],
             world.values[name]["AF"], world.values[name]["block"])
            for name in world.of_split(split)
            if world.values[name]["AF"] is not None or world.values[name]["block"] is not None
            for index in range(world.n_segments[name])
        ]  # fmt: skip
        table = read_table(out / f"labelled_{split}.parquet", "labelled_segments")
        assert table.columns[-2:] == ["AF", "block"]
        assert table.rows() == expected
        assert counts[f"labelled segments: {split}"] == len(expected)
        assert counts[f"labelled records: {split}"] == len({row[0] for row in expected}) > 20
        assert table["AF"].null_count() > 0, "a record with one label known is kept, the other stays unknown"


def test_no_segment_of_an_excluded_record_is_anywhere(world: World) -> None:
    _, out = world.make()
    excluded = {name for name, split in world.split.items() if split is None}
    seen: dict[str, set[str]] = defaultdict(set)
    for path in out.glob("*.parquet"):
        for name in pl.read_parquet(path)["record_id"]:
            seen[name].add(path.stem.rpartition("_")[2])
    assert not excluded & seen.keys()
    assert any(world.n_segments[name] for name in excluded)
    assert all(splits == {world.split[name]} for name, splits in seen.items())


def test_other_labels_leave_the_pairs_as_they_are(world: World) -> None:
    _, before = world.make()
    world.write_labels(("block",))
    _, after = world.make(out="again")
    for split in ("train", "valid"):
        name = f"cmsc_{split}.parquet"
        assert (after / name).read_bytes() == (before / name).read_bytes()
    assert (after / "labelled_train.parquet").read_bytes() != (before / "labelled_train.parquet").read_bytes()


def test_the_same_bytes_come_out_twice_whatever_the_order_of_the_slices(world: World) -> None:
    counts, one = world.make()
    world.slices.reverse()
    again, other = world.make(out="again")
    assert again == counts
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in other.iterdir())
    assert len(files) == 6
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes()


# ---- labels without both classes


def test_the_label_space_counts_records_by_split(world: World) -> None:
    _, out = world.make()
    space = read_label_space(out / "label_space.yaml")
    assert [(label.name, label.aggregation) for label in space.labels] == [("AF", "mean"), ("block", "max")]
    for label in space.labels:
        for split in SPLITS:
            values = [world.values[name][label.name] for name in world.of_split(split)]
            assert label.records[split] == {
                "positive": values.count(1),
                "negative": values.count(0),
                "unknown": values.count(None),
            }


def test_counts_beyond_the_range_of_a_label_column_are_right(tmp_path: Path) -> None:
    """int8 holds up to 127."""
    world = World(tmp_path, n_records=2000)
    _, out = world.make()
    af = read_label_space(out / "label_space.yaml").labels[0]
    assert af.records["train"]["positive"] == sum(world.values[name]["AF"] == 1 for name in world.of_split("train"))
    assert af.records["train"]["positive"] > 200


def test_a_label_without_both_classes_is_refused_or_left_out_as_asked(world: World) -> None:
    lacking = ", ".join(f"no positive record in {split}" for split in SPLITS if world.split["other/1"] != split)
    with pytest.raises(InputError) as refused:
        world.make(ManifestsConfig())
    assert str(refused.value) == (
        f"manifests: label 'rare' has {lacking}; give more records, another splits.seed, "
        "or set manifests.rare_labels=drop to go on without"
    )
    counts, out = world.make(out="dropped")
    assert (counts["labels"], counts["labels dropped"]) == (2, 1)
    assert read_label_space(out / "label_space.yaml").dropped == {"rare": lacking}
    for split in SPLITS:
        assert "rare" not in pl.read_parquet(out / f"labelled_{split}.parquet").columns


def test_a_label_everybody_has_is_refused_too(world: World) -> None:
    for values in world.values.values():
        values["AF"] = 1
    world.write_labels(("AF", "rare"))
    with pytest.raises(InputError, match=r"label 'AF' has no negative record in train, .* \(and 1 more labels\)"):
        world.make(ManifestsConfig())


def test_without_any_label_left_it_stops(world: World) -> None:
    world.write_labels(("rare",))
    with pytest.raises(InputError, match=r"no label has a positive and a negative record in every split \(1 labels"):
        world.make()


# ---- no pairs


def test_no_pair_is_one_clear_line(world: World) -> None:
    for name, n in world.n_segments.items():
        if n > 1 and world.split[name] == "valid":
            world.split[name] = "test"
    world.write_splits()
    with pytest.raises(InputError) as refused:
        world.make()
    assert str(refused.value) == (
        "manifests: cmsc_valid would be empty: no record has two adjacent segments; "
        "is prepare.segment_seconds more than half the records?"
    )


def test_a_table_in_is_a_table_out() -> None:
    segments = pl.DataFrame(
        {"record_id": ["a", "a", "a", "b"], "segment_index": [0, 1, 2, 0], "shard_row": [5, 6, 7, 8], "start_s": 0.0}
    )
    records = pl.DataFrame({"record_id": ["a", "b"], "source": "toy", "slice_id": "s"})
    splits = pl.DataFrame({"record_id": ["b", "a"], "patient_id": ["q", None], "split": ["valid", "train"]})
    of_splits = split_segments(segments, records, splits)
    assert of_splits["split"].to_list() == ["train"] * 3 + ["valid"]
    expected = pl.DataFrame(
        [("a", None, "toy", "s", 0, 1, 5, 6)],
        ["record_id", "patient_id", "source", "slice_id", "first_segment", "second_segment", "first_row", "second_row"],
        orient="row",
    )
    assert_frame_equal(cmsc_pairs(of_splits), expected, check_dtypes=False)


# ---- classes that exclude each other, and numbers


class Tasks(World):
    """The same records with labels of another task. values: record_id -> label -> value"""

    def write_task(self, space: LabelSpace, values: dict[str, dict[str, Any]]) -> None:
        self.values = values
        kind = pl.Float64 if space.task == "regression" else pl.Int8
        table = pl.DataFrame(
            [{"record_id": name, **row} for name, row in sorted(values.items())], infer_schema_length=None
        )
        table = table.with_columns(pl.col(space.names).cast(kind))
        write_table(table, space.contract("labels"), self.root / "labels" / "labels.parquet")
        space.write(self.root / "labels" / "label_space.yaml")


def test_records_of_a_class_that_is_dropped_are_unknown(tmp_path: Path) -> None:
    world = Tasks(tmp_path)
    rng = random.Random(1)
    values: dict[str, dict[str, Any]] = {}
    for name, split in world.split.items():
        # class c is in train alone
        called = rng.choice(["a", "b", "c", None] if split == "train" else ["a", "b", None])
        values[name] = {label: None if called is None else int(label == called) for label in "abc"}
    world.write_task(LabelSpace(tuple(Label(label, (label,), "mean") for label in "abc"), {}, "multiclass"), values)
    with pytest.raises(InputError, match="label 'c' has no positive record in valid, no positive record in test"):
        world.make(ManifestsConfig(), "refused")
    _, out = world.make(DROP, "dropped")
    space = read_label_space(out / "label_space.yaml")
    assert (space.task, space.names, list(space.dropped)) == ("multiclass", ["a", "b"], ["c"])
    for split in SPLITS:
        table = read_table(out / f"labelled_{split}.parquet", "labelled_segments")
        assert (table["a"] + table["b"] == 1).all(), "exactly one class each"
        expected = {name for name in world.of_split(split) if values[name]["c"] != 1 and values[name]["a"] is not None}
        assert set(table["record_id"]) == expected
        of_class = sum(values[name]["a"] == 1 for name in world.of_split(split))
        assert space.labels[0].records[split]["positive"] == of_class > 0
        assert space.labels[0].records[split]["negative"] == len(expected) - of_class
    assert any(values[name]["c"] == 1 for name in world.of_split("train"))


def test_numbers_need_two_different_values_in_every_split(tmp_path: Path) -> None:
    world = Tasks(tmp_path)
    rng = random.Random(2)
    values: dict[str, dict[str, Any]] = {
        name: {
            "age": rng.uniform(20, 90) if rng.random() < 0.8 else None,
            "same": 7.5 if split == "valid" else rng.uniform(0, 1),
        }
        for name, split in world.split.items()
    }
    space = LabelSpace((Label("age", ("x",), "mean", unit="years"), Label("same", ("y",), "mean")), {}, "regression")
    world.write_task(space, values)
    with pytest.raises(InputError, match="label 'same' has no two different values in valid; give more records"):
        world.make(ManifestsConfig(), "refused")
    _, out = world.make(DROP, "dropped")
    kept = read_label_space(out / "label_space.yaml")
    assert (kept.task, kept.names, kept.labels[0].unit) == ("regression", ["age"], "years")
    for split in SPLITS:
        table = read_table(out / f"labelled_{split}.parquet", "labelled_segments_values")
        known = {name: values[name]["age"] for name in world.of_split(split) if values[name]["age"] is not None}
        assert dict(table.select("record_id", "age").iter_rows()) == known
        counts = kept.labels[0].records[split]
        assert counts["known"] == len(known)
        assert counts["unknown"] == len(world.of_split(split)) - len(known) > 0
        assert counts["mean"] == pytest.approx(sum(known.values()) / len(known))
    lone = {name: {**row, "age": 1.0} for name, row in values.items()}
    world.write_task(space, {name: {**row, "same": 1.0} for name, row in lone.items()})
    with pytest.raises(InputError, match="no label has two different values in every split"):
        world.make(DROP, "nothing")
