"""Published weights from the Hugging Face hub, as it tells their size and hash.

`huggingface_hub` does the transfer, so its environment variables hold: HF_ENDPOINT (a mirror), HF_HUB_OFFLINE (the
cache alone), HF_HOME and HF_HUB_CACHE (where the cache lies), HF_TOKEN. It checks sizes; hashes are checked here.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ecgfm.ecg import InputError
from ecgfm.files import DISK_ERRORS, sha256_of


@dataclass(frozen=True)
class PublishedWeights:
    """Where published weights lie, and under what terms.

    repository: on the hub; pretrained, finetuned: names of files in it
    labels: what the finetuned file's logits are, for `checkpoint_commands.read_labels`
    """

    repository: str
    pretrained: str
    finetuned: str
    labels: str
    licence: str
    citation: str


PUBLISHED = {
    # Repository and files: README.md of github.com/bowang-lab/ECG-FM ("Model checkpoints have been made publicly
    # available"), whose licence is MIT. What they were trained on: the same page; its terms: physionet.org.
    "ecg-fm": PublishedWeights(
        repository="wanglab/ecg-fm",
        pretrained="mimic_iv_ecg_physionet_pretrained.pt",
        finetuned="mimic_iv_ecg_finetuned.pt",
        labels="mimic_iv_ecg",
        licence="MIT, as ECG-FM's authors publish it; learnt from MIMIC-IV-ECG 1.0 (ODbL 1.0) and the PhysioNet/CinC "
        "Challenge 2021 1.0.3 (CC BY 4.0). Not a medical device.",
        citation="McKeen K, Masood S, Toma A, Rubin B, Wang B. ECG-FM: an open electrocardiogram foundation model. "
        "JAMIA Open 2025;8(5):ooaf122. doi:10.1093/jamiaopen/ooaf122",
    ),
}


@dataclass(frozen=True)
class Brought:
    """A file that is here.

    commit: of the repository, as the hub has it
    verified: whether its SHA-256 is what the hub says; where the hub does not say, only the size is known to be right
    """

    path: Path
    commit: str
    n_bytes: int
    sha256: str
    verified: bool


def published(name: str) -> PublishedWeights:
    """The entry of that name. Raises InputError where there is none."""
    if name not in PUBLISHED:
        raise InputError(f"{name}: no published weights of that name are known; known: {', '.join(PUBLISHED)}")
    return PUBLISHED[name]


def bring(repository: str, file: str) -> Brought:
    """A file of a repository of the hub in the hub's own cache, from where it comes the next time.

    A transfer that breaks off goes on where it was: by itself as long as it gets any further (huggingface_hub 2), or
    when this is called again (the versions before).

    Raises:
        InputError: huggingface_hub is not installed; no answer, no such repository or file, or nothing in the cache
            when offline; a transfer that does not get any further; bytes that are not those of the hub.
        OSError: the disk is full or cannot be written.
    """
    # The plain transfer is the one that goes on where it was and asks nothing of other servers; read at the import.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise InputError(
            "downloading published weights needs huggingface_hub: pip install 'ecgfm[huggingface]'"
        ) from error

    where = f"{repository}/{file}"
    # errors of the connection are those of requests, httpx or httpx2, by the version of huggingface_hub, whose own are
    # made of them
    of_connection: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)
    try:
        path = Path(hf_hub_download(repository, file))
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                f"{where}: HF_HUB_OFFLINE is set and the file is not in the cache {constants.HF_HUB_CACHE}; unset it, "
                "or copy the cache of a machine that has the file"
            ) from error
        cause = _line(error.__cause__ or error)
        raise InputError(
            f"{where}: no answer from {constants.ENDPOINT} ({cause}), and the file is not in the cache; is the network "
            "up? HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{where}: {constants.ENDPOINT} has no repository {repository}, or shows it only to some (HF_TOKEN)"
        ) from error
    except EntryNotFoundError as error:
        raise InputError(f"{where}: {constants.ENDPOINT} has no file {file} in {repository}") from error
    except of_connection as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        raise InputError(
            f"{where}: the transfer from {constants.ENDPOINT} failed ({_line(error)}); run the same command again"
        ) from error
    return _verified(path, where)


def _verified(path: Path, where: str) -> Brought:
    """Compare a file of the hub's cache with its hash.

    Raises:
        InputError: it is not; it is removed from the cache.
    """
    # the documented layout: snapshots/<commit>/<file> is a link to blobs/<etag>, and a large file's etag is its SHA-256
    blob = Path(os.readlink(path)) if path.is_symlink() else Path()
    told = blob.name if re.fullmatch("[0-9a-f]{64}", blob.name) else ""
    found = sha256_of(path)
    if told and found != told:
        (path.parent / blob).unlink()
        path.unlink()
        raise InputError(
            f"{where}: expected SHA-256 {told}, found {found}: damaged on the way; it is removed, run the same command "
            "again"
        )
    return Brought(path, path.parent.name, path.stat().st_size, found, bool(told))


def _line(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
