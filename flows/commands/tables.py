"""What a person reads on a terminal: columns, lines that are not too long, sizes and times."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import TypeVar

import typer

from ecgfm.pipeline import PREPARE

T = TypeVar("T")
TIED = "\N{NO-BREAK SPACE}"  # in a text to be wrapped: a space at which it is not


def grouped(things: Sequence[T], name_of: Callable[[T], str], every: bool) -> list[tuple[str, list[T]]]:
    """Things by name, slices of a source together; outputs that are no slices each alone."""
    groups: dict[object, tuple[str, list[T]]] = {}
    for number, thing in enumerate(things):
        name = name_of(thing)
        stage, _, subject = name.partition(" ")
        together = stage == PREPARE.name and not every
        label = f"{stage} {subject.partition(' ')[0]}" if together else name
        groups.setdefault(label if together else number, (label, []))[1].append(thing)
    return list(groups.values())


def print_table(heads: Sequence[str], rows: Sequence[tuple[Sequence[str], str | None]], sides: str) -> None:
    """Print `table_lines`; nothing where there are no rows."""
    if rows:
        for line in table_lines(heads, rows, sides):
            typer.echo(line)


def table_lines(heads: Sequence[str], rows: Sequence[tuple[Sequence[str], str | None]], sides: str) -> Iterator[str]:
    """Lines with columns, `l`eft or `r`ight; on a terminal the last is wrapped. A row has its colour."""
    widths = [max(len(row[column]) for row in (heads, *(cells for cells, _ in rows))) for column in range(len(heads))]
    before = sum(widths[:-1]) + 2 * len(widths[:-1])
    for cells, colour in ((heads, None), *rows):
        aligned = zip(cells[:-1], sides, widths, strict=False)
        start = "".join(f"{cell:{'>' if side == 'r' else '<'}{width}}  " for cell, side, width in aligned)
        last, *more = wrapped(cells[-1], before) if sides[-1] == "l" else [cells[-1].rjust(widths[-1])]
        for line in (f"{start}{last}".rstrip(), *(" " * before + line for line in more)):
            yield typer.style(line, dim=True) if cells is heads else typer.style(line, fg=colour) if colour else line


def _width() -> int:
    """Columns of the terminal; of a file or a pipe there are as many as it takes."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000


def cut(line: str) -> str:
    """A line that fits the terminal."""
    width = _width()
    return line if len(line) <= width else line[: width - 3] + "..."


def wrapped(text: str, indent: int) -> list[str]:
    """Lines that fit the terminal when they begin at column `indent`; at least one."""
    width = max(_width() - indent, 40)
    lines = textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)
    return [line.replace(TIED, " ") for line in lines] or [""]


def counted(things: Sized, noun: str) -> str:
    """Such as "1 output" or "1,200 outputs"."""
    return f"{len(things):,} {noun}{'' if len(things) == 1 else 's'}"


def size_of(n_bytes: int) -> str:
    """Such as "984 B" or "45.2 MB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} B"


def lasted(seconds: float | None) -> str:
    """Seconds as a person says them, with two units at most; "" where it is not known."""
    if seconds is None:
        return ""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 and isinstance(seconds, float) else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{round(hours / 24)} days"


def local_time(seconds: float) -> str:
    """Seconds since 1970 as the clock here shows them."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
