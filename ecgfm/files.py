"""Files that must be whole: on the disk, and with the bytes that were written; and those that are to go again."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ecgfm.ecg import InputError


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_and_hash(path: Path) -> str:
    """`sha256_of` a file that is on the disk: one waits for the disk while the other works."""
    with ThreadPoolExecutor(1) as waiting:
        on_disk = waiting.submit(sync, path)
        sha256 = sha256_of(path)
        on_disk.result()
    return sha256


@contextmanager
def scratch_folder(folder: Path, name: str) -> Iterator[Path]:
    """An empty folder `name` in `folder` (an option --folder), gone in the end with all that was written there.

    Raises:
        InputError: it cannot be made.
    """
    scratch = folder / name
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--folder {folder} cannot be written: {error}; choose another") from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)
