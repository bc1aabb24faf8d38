"""Whether what is evaluated was learnt from: by record, by patient, and by the copies that the audit found.

A checkpoint carries the digests of the records and patients that its training visited, those that chose its epoch and
thresholds among them, and no names: eight bytes each, of a salted hash, sorted. Of a million records one pair agrees
by chance once in 37 million such sets.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import polars as pl
import safetensors.numpy
from safetensors import SafetensorError

from ecgfm.contracts import read_tables
from ecgfm.ecg import InputError

_RECORD, _PATIENT = b"ecgfm record", b"ecgfm patient"  # what the digests are salted with: 16 bytes at most


@dataclass(frozen=True)
class Seen:
    """Whom a checkpoint knows.

    records, patients: (n,) uint64, digests, ascending, each once
    whole: False where something was learnt from that cannot be known, such as a published encoder's data
    """

    records: np.ndarray
    patients: np.ndarray
    whole: bool = True

    @classmethod
    def of(cls, record_ids: Iterable[str], patient_ids: Iterable[str | None]) -> Seen:
        """The digests of records and of those patients that are known."""
        return cls(_digests(record_ids, _RECORD), _digests((p for p in patient_ids if p is not None), _PATIENT))

    def __or__(self, other: Seen) -> Seen:
        """Both together: a finetuned model knows also what its encoder was pretrained on."""
        whole = self.whole and other.whole
        return Seen(np.union1d(self.records, other.records), np.union1d(self.patients, other.patients), whole)

    def to_bytes(self) -> bytes:
        """Equal sets give equal bytes."""
        metadata = {"whole": str(self.whole).lower()}
        return safetensors.numpy.save({"patients": self.patients, "records": self.records}, metadata)

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Seen:
        """What `to_bytes` gave.

        Raises:
            InputError: it is something else.
        """
        try:
            arrays = safetensors.numpy.load(content)
            length = int.from_bytes(content[:8], "little")  # of the header, which has the metadata
            whole = json.loads(content[8 : 8 + length])["__metadata__"]["whole"] == "true"
            return cls(arrays["records"], arrays["patients"], whole)
        except (SafetensorError, KeyError) as error:
            raise InputError(f"{where}: not the digests of records and patients ({error}); train again") from error


@dataclass(frozen=True)
class Leak:
    """Records that are evaluated and known to the model, each in one of the three; by id, ascending.

    records: learnt from themselves; copies: the same ECG as one that was, under another name; patients: of a patient
    one of whose other records was
    """

    records: Sequence[str]
    copies: Sequence[str]
    patients: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.records or self.copies or self.patients)

    def in_words(self, n_evaluated: int) -> str:
        """What leaks, with one of each."""
        kinds = {
            "learnt from": self.records,
            "the same ECG as one learnt from, under another name": self.copies,
            "of a patient learnt from": self.patients,
        }
        found = [f"{len(ids):,} {how} ({ids[0]}{', ...' if len(ids) > 1 else ''})" for how, ids in kinds.items() if ids]
        return f"of {n_evaluated:,} records {'; '.join(found)}"


UNKNOWN = Seen(np.empty(0, np.uint64), np.empty(0, np.uint64), whole=False)
"""Of weights that say nothing of what they were trained on."""


def seen_in(manifests: Path, kind: str) -> Seen:
    """Whom a training that reads these manifests knows: all of train and valid, also where it takes a share of them.

    kind: `cmsc` (pretraining) or `labelled` (finetuning)
    """
    contract = {"cmsc": "pairs", "labelled": "labelled_segments"}[kind]
    tables = [manifests / f"{kind}_{split}.parquet" for split in ("train", "valid")]
    known = pl.concat(read_tables([table], contract, ("record_id", "patient_id")) for table in tables)
    return Seen.of(known["record_id"].unique(), known["patient_id"].unique())


def find_leak(seen: Seen, record_ids: Sequence[str], patients: Sequence[str | None], duplicates: pl.DataFrame) -> Leak:
    """Which of the records that are evaluated the model knows.

    record_ids, patients: (record,), patients None where unknown
    duplicates: contract `duplicates`: records that are the same ECG
    """
    groups = dict(duplicates.select("record_id", "group_id").iter_rows())
    known_groups = {groups[name] for name, known in _known(list(groups), seen.records, _RECORD).items() if known}
    records = _known(record_ids, seen.records, _RECORD)
    of_patients = _known([p for p in patients if p is not None], seen.patients, _PATIENT)
    leak: dict[str, list[str]] = {"records": [], "copies": [], "patients": []}
    for record_id, patient in sorted(zip(record_ids, patients, strict=True), key=lambda pair: pair[0]):
        if records[record_id]:
            leak["records"].append(record_id)
        elif groups.get(record_id) in known_groups:
            leak["copies"].append(record_id)
        elif patient is not None and of_patients[patient]:
            leak["patients"].append(record_id)
    return Leak(**leak)


def _known(ids: Sequence[str], digests: np.ndarray, salt: bytes) -> dict[str, bool]:
    asked = np.array([_digest(one, salt) for one in ids], dtype=np.uint64)
    return dict(zip(ids, np.isin(asked, digests).tolist(), strict=True))


def _digests(ids: Iterable[str], salt: bytes) -> np.ndarray:
    return np.unique(np.array([_digest(one, salt) for one in ids], dtype=np.uint64))


def _digest(identity: str, salt: bytes) -> int:
    return int.from_bytes(blake2b(identity.encode(), digest_size=8, salt=salt).digest())
