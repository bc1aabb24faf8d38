"""CSV tables as people save them: what stands between the columns, and why one cannot be read."""

from __future__ import annotations

from pathlib import Path

_FIRST_LINE_BYTES = 65_536


def separator(path: Path) -> str:
    """What stands between the columns by the first line: a comma, or a semicolon or tab where there are more of them.

    Spreadsheets write semicolons where the comma is the decimal sign. A packed table is taken to have commas.

    Raises:
        OSError: the file cannot be read.
    """
    if path.suffix == ".gz":
        return ","
    with open(path, "rb") as file:
        first = file.readline(_FIRST_LINE_BYTES)
    return max(",", ";", "\t", key=lambda character: first.count(character.encode()))


def why(error: Exception) -> str:
    """The first line of what a reader of tables says, with what to do where it is known."""
    said = str(error).splitlines()[0]
    if "utf-8" in said:
        return f"{said}; save it as UTF-8 (in a spreadsheet 'CSV UTF-8', or iconv -f latin1 -t utf-8)"
    return said
