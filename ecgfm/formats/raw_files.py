"""Files below a raw folder: names that a header or a table holds cannot lead out of it, nor can links.

Plain strings: this is asked for every file of every record, and a `Path` costs more than the answer.
"""

from __future__ import annotations

import errno
import os
import stat
from functools import lru_cache
from pathlib import Path

from ecgfm.ecg import InputError, Rejected, RejectReason

_OF_THE_FILE = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO),
        None,  # a library's own error
    }
)
"""What opening or reading says of a file that is damaged, absent or none; all else is the drive's or the user's."""


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


def rejected(error: Exception, reason: RejectReason, file: str) -> Rejected:
    """What a failure to open or read a record's file says of the record, to be raised.

    Raises:
        InputError: as `check_drive`.
    """
    check_drive(error, file)
    return Rejected(reason, f"{file}: {getattr(error, 'strerror', None) or error}")


def check_drive(error: Exception, file: str) -> None:
    """A failure to open or read a file is the file's own.

    Raises:
        InputError: its drive fails or is gone, or it may not be read. No record may be turned away for that, for ever.
    """
    if isinstance(error, OSError) and error.errno not in _OF_THE_FILE:
        why = error.strerror or error
        raise InputError(
            f"{error.filename or file} cannot be read: {why}; see to its drive and its permissions, then run the same "
            "command again"
        ) from error


@lru_cache(64)  # the records of a folder come one after the other
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _is_link(path: str) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(path).st_mode)
    except OSError:  # not there, or a name no file can have: opening it says so
        return False
