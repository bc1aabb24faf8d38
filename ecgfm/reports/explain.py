"""How a report was read, as lines for people: each statement with what it says, why, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ecgfm.reports.assertion import Assertion
from ecgfm.reports.ecg_fm import EcgFmLabeler
from ecgfm.reports.own import OwnLabeler, Reading
from ecgfm.reports.vocabulary import Vocabulary

_INDENT = "  "


def explain(labeler: OwnLabeler | EcgFmLabeler, report: str, labels: Sequence[str] | None = None) -> list[str]:
    """Lines that tell how `labeler` reads a report, and what comes of it. labels: only these are told; None: all"""
    how = _statements(labeler, report) if isinstance(labeler, OwnLabeler) else _clusters(labeler, report)
    said = [one for one in labeler.read(report) if labels is None or one.label in labels]
    return [*how, "", *(_result(said) if said else ["no label"])]


def _statements(labeler: OwnLabeler, report: str) -> Iterator[str]:
    for statement in labeler.explain(report):
        yield _quoted(report[statement.start : statement.end])
        rows = [(_status(one), one.finding, one.rule) for one in statement.readings]
        yield from _columns(rows)
        if statement.unmatched:
            yield f"{_INDENT}nothing explains: {', '.join(_one_line(text) for text, _, _ in statement.unmatched)}"


def _status(one: Reading) -> str:
    if one.status is None:
        return "set aside"
    return f"uncertain {one.probability:g}" if one.status == "uncertain" else one.status


def _clusters(labeler: EcgFmLabeler, report: str) -> Iterator[str]:
    found = labeler.explain(report)
    yield _quoted(found.normalised)
    rows = []
    for cluster in found.clusters:
        words = _quoted(found.tokens[cluster.token].pattern) if cluster.token is not None else "together"
        for row in cluster.rows:
            why = words if row.source == "text" else f"{row.source}{f' of {row.follows}' if row.follows else ''}"
            described = f", with {', '.join(row.descriptors)}" if row.descriptors else ""
            rows.append((f"{row.probability:g}", row.name, f"{why}{described}"))
    yield from _columns(rows)
    if found.unmatched.strip(" ;,."):
        yield f"{_INDENT}no pattern explains: {_one_line(found.unmatched)}"


def _result(said: list[Assertion]) -> Iterator[str]:
    yield "labels"
    yield from _columns([(f"{one.probability:.3g}", one.label, one.rule) for one in said])


def _columns(rows: list[tuple[str, str, str]]) -> Iterator[str]:
    widths = [max((len(row[k]) for row in rows), default=0) for k in range(2)]
    for first, second, third in rows:
        yield f"{_INDENT}{first:<{widths[0]}}  {second:<{widths[1]}}  {third}".rstrip()


def _quoted(text: str) -> str:
    return f'"{_one_line(text)}"'


def _one_line(text: str) -> str:
    return " ".join(text.split())


def tree(vocabulary: Vocabulary, name: str) -> list[str]:
    """A finding with what it is a kind of, upwards, and what is a kind of it, as lines of a tree.

    A finding above it that is reached on two ways is drawn on both; what lies above it once.

    Raises:
        InputError: no finding has that name.
    """
    above = vocabulary.ancestors(name)
    below = vocabulary.descendants(name)[name]
    finding = vocabulary.findings[name]
    lines = [_named(vocabulary, name)]
    lines += list(_branches(vocabulary, above, finding.parents, "", set()))
    if below:
        lines += ["", f"kinds of it: {', '.join(below)}"]
    for groups in finding.all_of:
        lines.append(f"made by: {' and '.join(groups)}")
    if finding.excludes:
        lines.append(f"excludes: {', '.join(finding.excludes)}")
    return lines


def _branches(
    vocabulary: Vocabulary, above: dict[str, tuple[str, ...]], names: tuple[str, ...], before: str, drawn: set[str]
) -> Iterator[str]:
    for place, name in enumerate(names):
        last = place == len(names) - 1
        known = name in drawn
        again = " (see above)" if known and above[name] else ""
        yield f"{before}{'└─' if last else '├─'} {_named(vocabulary, name)}{again}"
        if not known:
            drawn.add(name)
            yield from _branches(vocabulary, above, above[name], before + ("   " if last else "│  "), drawn)


def _named(vocabulary: Vocabulary, name: str) -> str:
    code = vocabulary.findings[name].snomed
    return f"{name} [SNOMED CT {code}]" if code else name
