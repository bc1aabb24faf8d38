"""Where recordings come from: one module per published archive, each with the same three names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from ecgfm.ecg import EcgRecord
from ecgfm.sources import code15, mimic_iv_ecg, own, physionet2021, ptb_xl, synthetic


class Source(Protocol):
    """What a module of this package offers."""

    NAME: str

    def list_records(self, raw_dir: Path) -> pl.DataFrame:
        """The records below `raw_dir` (data_contracts/listing.yaml), ordered by record_id; reads no signal.

        What `read_record` needs beside the files of the record's slice is in the row: the slices' keys see no more.

        Raises:
            InputError: `raw_dir` does not hold this source.
        """
        ...

    def read_record(self, raw_dir: Path, row: Mapping[str, Any]) -> EcgRecord:
        """The record of one row of the listing.

        Raises:
            Rejected: the record cannot be read; the reason says why.
        """
        ...


SOURCES: dict[str, Source] = {m.NAME: m for m in (synthetic, physionet2021, ptb_xl, mimic_iv_ecg, code15, own)}
