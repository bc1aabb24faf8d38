"""Files that answers are written to, row by row: memory does not grow with their number, and a file is there under its
name when it is whole.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import numpy as np
import polars as pl

from ecgfm.contracts import check
from ecgfm.ecg import InputError
from ecgfm.files import naming

ROWS_TOGETHER = 4096  # a row group of Parquet; whatever the batch, so that the bytes do not depend on it


def check_outs(paths: Sequence[Path], suffixes: Sequence[str]) -> None:
    """Before anything is asked: that the answers can be written, in files of these suffixes.

    Raises:
        InputError: a suffix that is not known, a folder that is not there or cannot be written, a file twice.
    """
    if len(set(paths)) < len(paths):
        twice = next(path for place, path in enumerate(paths) if path in paths[:place])
        raise InputError(f"{twice}: two outputs cannot be one file; name another")
    for path in paths:
        if path.suffix.lower() not in suffixes:
            expected = " or ".join(suffixes)
            raise InputError(f"{path}: expected a file named {expected}, found {path.suffix or 'no suffix'}")
        folder = path.absolute().parent
        if not folder.is_dir():
            raise InputError(f"{path}: no folder {path.parent} to write into; make it first")
        if path.is_dir() or not os.access(folder, os.W_OK):
            raise InputError(f"{path}: cannot be written ({'a folder' if path.is_dir() else 'no permission'})")


class _Sink(Protocol):
    def write(self, table: pl.DataFrame) -> None: ...

    def close(self) -> None: ...


class TableWriter:
    """A Parquet or CSV table, row by row. Use as a context manager; without an error the file is whole at the end.

    Numbers of a CSV have 9 significant digits; what is null or NaN is empty. Null for NaN in Parquet too.
    """

    def __init__(self, path: Path, columns: Mapping[str, Any], contract: str = "") -> None:
        self.path = path
        self._columns = dict(columns)
        self._contract = contract
        self._rows: list[Mapping[str, Any]] = []
        self._partial = path.with_name(f".{path.name}.partial")
        self._sink: _Sink = (_Parquet if path.suffix.lower() == ".parquet" else _Csv)(self._partial, self._columns)

    def add(self, row: Mapping[str, Any]) -> None:
        """One more row, of all columns."""
        self._rows.append(row)
        if len(self._rows) >= ROWS_TOGETHER:
            self._write()

    def add_table(self, table: pl.DataFrame) -> None:
        """Many more rows at once: a row group of their own."""
        if self._rows:
            self._write()
        self._put(table.select(list(self._columns)))

    def _write(self) -> None:
        names = list(self._columns)
        self._put(pl.DataFrame({name: [row[name] for row in self._rows] for name in names}, schema=self._columns))
        self._rows.clear()

    def _put(self, table: pl.DataFrame) -> None:
        table = table.with_columns(pl.selectors.float().fill_nan(None))
        if self._contract:
            check(table.drop(name for name in table.columns if self._columns[name] == pl.Int8()), self._contract)
        with naming(self.path):
            self._sink.write(table)

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._rows:
                self._write()
        finally:
            with naming(self.path):
                self._sink.close()
            _keep(self._partial, self.path, kind is None)


class _Parquet:
    def __init__(self, path: Path, columns: Mapping[str, Any]) -> None:
        import pyarrow.parquet  # type: ignore[import-untyped]

        schema = pl.DataFrame(schema=dict(columns)).to_arrow(compat_level=pl.CompatLevel.oldest()).schema
        self._writer: Any = pyarrow.parquet.ParquetWriter(path, schema, compression="zstd")
        self._schema = schema

    def write(self, table: pl.DataFrame) -> None:
        self._writer.write_table(table.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(self._schema))

    def close(self) -> None:
        self._writer.close()


class _Csv:
    def __init__(self, path: Path, columns: Mapping[str, Any]) -> None:
        self._file: IO[str] = open(path, "w", encoding="utf-8", newline="")  # noqa: SIM115 - closed by `close`
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(columns)

    def write(self, table: pl.DataFrame) -> None:
        for row in table.iter_rows():
            self._writer.writerow(["" if x is None else f"{x:.9g}" if isinstance(x, float) else x for x in row])

    def close(self) -> None:
        self._file.close()


class ArrayWriter:
    """A .npy file, (row, width) float32, row by row; its head is written again when the rows are counted."""

    def __init__(self, path: Path, width: int) -> None:
        self.path = path
        self._width, self._n_rows = width, 0
        self._partial = path.with_name(f".{path.name}.partial")
        self._file = open(self._partial, "wb")  # noqa: SIM115 - closed by `__exit__`
        self._file.write(self._head())

    def _head(self) -> bytes:
        """numpy leaves room in it for a first axis that grows."""
        head = io.BytesIO()
        described = {"descr": "<f4", "fortran_order": False, "shape": (self._n_rows, self._width)}
        np.lib.format.write_array_header_1_0(head, described)
        return head.getvalue()

    def add(self, vector: np.ndarray) -> None:
        """One more row, (width,)."""
        with naming(self.path):
            self._file.write(np.ascontiguousarray(vector, "<f4").tobytes())
        self._n_rows += 1

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with naming(self.path):
            self._file.seek(0)
            self._file.write(self._head())
            self._file.close()
        _keep(self._partial, self.path, kind is None)


def _keep(partial: Path, path: Path, whole: bool) -> None:
    if whole:
        os.replace(partial, path)
    else:
        with suppress(FileNotFoundError):
            partial.unlink()
