"""Files below a raw folder: names that a header or a table holds cannot lead out of it, nor can links.

Plain strings: this is asked for every file of every record, and a `Path` costs more than the answer.
"""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from pathlib import Path

from ecgfm.ecg import Rejected


def inside(raw_dir: Path | str, path: str) -> str:
    """The whole path of the file `path` (below `raw_dir`), which still lies below `raw_dir` once links are followed.

    Raises:
        Rejected: `unreadable_header`, it leads out of the raw folder.
    """
    whole = os.path.join(raw_dir, path)
    folder, name = os.path.split(whole)
    if "\0" not in whole and name not in ("", ".", ".."):
        # a folder above may be a link; of the file itself one look says whether it is one
        real = os.path.realpath(whole) if _is_link(whole) else _real_folder(folder)
        root = _real_folder(os.fspath(raw_dir))
        if real == root or real.startswith(os.path.join(root, "")):
            return whole
    raise Rejected("unreadable_header", f"expected a file in the raw folder, found that {path!r} leads out of it")


def beside(raw_dir: Path | str, file: str, name: str) -> str:
    """The whole path of the file `name` in the folder of `file`, of which `inside` has been asked.

    Raises:
        Rejected: `unreadable_header`, `name` is no plain name, or a link out of the raw folder.
    """
    if "/" in name or "\\" in name or "\0" in name or name in ("", ".", ".."):
        shown = repr(name if len(name) <= 80 else name[:77] + "...")
        raise Rejected("unreadable_header", f"expected a file in the record's folder, found the name {shown}")
    path = os.path.join(os.path.dirname(file), name)
    whole = os.path.join(raw_dir, path)
    return inside(raw_dir, path) if _is_link(whole) else whole


@lru_cache(64)  # the records of a folder come one after the other
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _is_link(path: str) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(path).st_mode)
    except OSError:  # not there, or a name no file can have: opening it says so
        return False
