"""Files that must be whole: on the disk, and with the bytes that were written."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


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
