"""Raw folders as ingredients of keys: a change is seen in the slice where it happened, and nowhere else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ecgfm.ecg import InputError
from ecgfm.fingerprints import RawTree, code_digests


def slices_of(raw: Path, *slice_ids: str) -> dict[str, str]:
    return {name: given.digest for name, given in RawTree.scan(raw, "toy").by_slice(slice_ids).items()}


def test_a_touched_raw_file_changes_its_slice_alone(raw_tree: Path) -> None:
    before, whole = slices_of(raw_tree, "a", "b", "a/deep"), RawTree.scan(raw_tree, "toy").everything().digest
    os.utime(raw_tree / "a/deep/3.dat", ns=(1, 1))
    after = slices_of(raw_tree, "a", "b", "a/deep")
    assert {name for name in before if before[name] != after[name]} == {"a/deep"}, "a file is in its innermost slice"
    assert RawTree.scan(raw_tree, "toy").everything().digest != whole
    assert slices_of(raw_tree, "a")["a"] != slices_of(raw_tree, "a", "a/deep")["a"]


def test_a_file_added_removed_renamed_or_resized_changes_its_slice(raw_tree: Path) -> None:
    seen = [slices_of(raw_tree, "a", "b")]
    for change in (
        lambda: (raw_tree / "a/new.dat").write_text("new"),
        lambda: (raw_tree / "a/new.dat").rename(raw_tree / "a/newer.dat"),
        lambda: (raw_tree / "a/newer.dat").write_text("longer"),
        lambda: (raw_tree / "a/newer.dat").unlink() or (raw_tree / "a/1.dat").unlink(),
    ):
        change()
        seen.append(slices_of(raw_tree, "a", "b"))
    assert len({slices["a"] for slices in seen}) == len(seen)
    assert len({slices["b"] for slices in seen}) == 1


def test_hidden_folders_are_no_raw_files(raw_tree: Path) -> None:
    """`ecgfm download` remembers things in one; that must not make a source new."""
    before, whole = slices_of(raw_tree, "a", "b"), RawTree.scan(raw_tree, "toy").everything().digest
    for hidden in (".ecgfm-download", "a/.cache/deep"):
        (raw_tree / hidden).mkdir(parents=True)
        (raw_tree / hidden / "state.dat").write_text("state")
    assert slices_of(raw_tree, "a", "b") == before
    assert RawTree.scan(raw_tree, "toy").everything().digest == whole
    (raw_tree / "a/.hidden.dat").write_text("a file counts")
    assert slices_of(raw_tree, "a", "b") != before


def test_by_content_a_touched_file_is_the_same_and_a_flipped_bit_is_not(raw_tree: Path) -> None:
    def digest() -> str:
        return RawTree.scan(raw_tree, "toy", hash_content=True).everything().digest

    before = digest()
    os.utime(raw_tree / "a/1.dat", ns=(1, 1))
    assert digest() == before
    (raw_tree / "a/1.dat").write_text("a/1.dot")
    assert digest() != before


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (shutil.rmtree, r"toy: no such folder: .*raw; give the raw folder with --raw toy=PATH"),
        (lambda raw: shutil.rmtree(raw) or raw.mkdir(), r"toy: the folder .*raw is empty"),
        (lambda raw: (raw / "circle").symlink_to("circle"), r"toy: cannot read .*circle: Too many levels"),
    ],
)
def test_a_raw_folder_that_cannot_be_used_is_one_clear_line(
    raw_tree: Path, prepare: Callable[[Path], object], message: str
) -> None:
    prepare(raw_tree)
    with pytest.raises(InputError, match=message):
        RawTree.scan(raw_tree, "toy")


def test_another_file_format_is_no_new_code_for_a_source_that_does_not_read_it() -> None:
    table = frozenset({"ecgfm.sources"})
    of_ptb_xl = code_digests("ecgfm.prepare", ("ecgfm.sources.ptb_xl",), table)
    assert {"ecgfm.formats.wfdb", "ecgfm.signals", "ecgfm.sources.ptb_xl"} <= set(of_ptb_xl)
    assert not {"ecgfm.formats", "ecgfm.formats.muse", "ecgfm.sources.own"} & set(of_ptb_xl)
    of_own = code_digests("ecgfm.prepare", ("ecgfm.sources.own",), table)
    assert {"ecgfm.formats", "ecgfm.formats.muse", "ecgfm.formats.scp"} <= set(of_own), "it reads any of them"
