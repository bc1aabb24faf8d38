"""Files that must be whole: on the disk, and with the bytes that were written; and those that are to go again."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ecgfm.ecg import InputError

KEY_LENGTH = 32  # hex digits: 128 bits

DISK_ERRORS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
        *(errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENODEV, errno.EREMOTEIO, errno.EHOSTDOWN),
    }
)
"""What a person mends at a disk or a network drive, and not in the program."""


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


def digest_of(files: Mapping[str, str]) -> str:
    """One digest for files, from what identifies each: path -> identity."""
    lines = "".join(f"{name}\0{identity}\n" for name, identity in sorted(files.items()))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()[:KEY_LENGTH]


def content_at(directory: Path, *patterns: str) -> tuple[str, str]:
    """What a stage was handed, from within the stage: the name of the output at `directory`, and a digest of its files
    that match one of the patterns, as the stage's key has it.

    The digest is of the hashes that `stage.json` has; of a directory without one, the files are hashed.
    """
    manifest = directory / "stage.json"
    facts = json.loads(manifest.read_bytes()) if manifest.is_file() else None
    recorded = facts["files"] if facts else {}
    names = recorded if facts else (p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    chosen = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    files = {name: recorded[name]["sha256"] if facts else sha256_of(directory / name) for name in chosen}
    return facts["name"] if facts else directory.name, digest_of(files)


@contextmanager
def writing_data_dir() -> Iterator[None]:
    """Around making folders and files in the data directory.

    Raises:
        InputError: that cannot be done there.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"the data directory cannot be written: {error}; choose another with --data-dir") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Around writing: an error of the disk says where, which the error of a write does not by itself."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRORS and error.filename is None:
            error.filename = str(path)
        raise


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
