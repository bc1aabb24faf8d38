"""For mkdocs: the reference, from the code. Docstrings become Markdown for mkdocstrings (an extension of griffe), and
comments in a page become tables:

    <!-- keys: pretrain.model -->   the keys of a section of pipelines.yaml: what they take, default, meaning
    <!-- tables -->                 the tables of data_contracts/, column by column

How our docstrings are written: sentences; a paragraph of `name: meaning` lines, each of a parameter or an attribute;
`Raises:` with such lines of errors; examples that begin with >>>.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import reduce
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types
import griffe
import yaml
from pydantic.fields import FieldInfo

from ecgfm.config import to_dict
from ecgfm.contracts import CONTRACTS, contract
from ecgfm.ecg import LEADS
from ecgfm.pipelines_file import Pipeline

_NAMES = r"(?:\w+, )*\w+"
_OWN_ERRORS = {"InputError": "ecgfm.ecg.InputError", "Rejected": "ecgfm.ecg.Rejected"}

# ---- docstrings


def items_of(paragraph: str, names: Collection[str]) -> list[tuple[str, str]] | None:
    """(names, meaning) of each line `names: meaning` of a paragraph; None where it is another.

    A meaning goes on in lines further to the right. Two may share a line: "low: where it begins; high: where it ends".
    """
    lines: list[str] = []
    for line in paragraph.splitlines():
        if line.startswith(" ") and lines:
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    found: list[tuple[str, str]] = []
    for line in lines:
        for number, part in enumerate(re.split(rf"; (?={_NAMES}: )", line)):
            match = re.fullmatch(rf"({_NAMES}): (.*)", part, re.DOTALL)
            if match and (number == 0 or set(match[1].split(", ")) <= set(names)):
                found.append((match[1], match[2]))
            elif number:
                found[-1] = (found[-1][0], f"{found[-1][1]}; {part}")
            else:
                return None
    return found if any(set(given.split(", ")) <= set(names) for given, _ in found) else None


def as_markdown(text: str, names: Collection[str], links: Mapping[str, str] = types.MappingProxyType({})) -> str:
    """A docstring as Markdown: the lines of parameters, attributes and errors as lists, examples as code.

    names: what the lines of the docstring may be about; links: name of an error -> what the site calls it
    """
    return "\n\n".join(_paragraph(one, names, links) for one in re.split(r"\n\s*\n", inspect.cleandoc(text)))


def _paragraph(text: str, names: Collection[str], links: Mapping[str, str]) -> str:
    if text.startswith(">>> "):
        return f"```pycon\n{text}\n```"
    if raises := re.fullmatch(r"(.*?)(?:^|(?<=\s))Raises:\s(.*)", text, re.DOTALL):
        errors = items_of(textwrap.dedent(raises[2]), re.findall(r"\w+", raises[2]))
        before = [_escaped(raises[1].strip())] if raises[1].strip() else []
        return "\n\n".join([*before, "Raises:", _listed(errors or [], links)])
    if items := items_of(text, names):
        return _listed(items, {})
    return _escaped(text)


def _listed(items: list[tuple[str, str]], links: Mapping[str, str]) -> str:
    named = {
        name: f"[`{name}`][{links[name]}]" if name in links else f"`{name}`"
        for item in items
        for name in item[0].split(", ")
    }
    return "\n".join(
        f"- {', '.join(named[name] for name in given.split(', '))}: {_escaped(meaning)}" for given, meaning in items
    )


def _escaped(text: str) -> str:
    """What stands outside of `code` and would be taken for HTML or emphasis."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if number % 2 else re.sub(r"([<*|])", r"\\\1", part) for number, part in enumerate(parts))


class OurDocstrings(griffe.Extension):
    """Docstrings as Markdown, before mkdocstrings shows them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            names = {parameter.name for parameter in obj.parameters} if obj.is_function else set(obj.members)
            if obj.is_class and "__init__" in obj.members:
                names |= {parameter.name for parameter in obj["__init__"].parameters}
            text = as_markdown(obj.docstring.value, names, _OWN_ERRORS)
            if obj.is_class and any(str(base) == "NamedTuple" for base in obj.bases):
                text += (
                    f"\n\nA tuple: {', '.join(f'`{name}`' for name, one in obj.members.items() if one.is_attribute)}."
                )
            obj.docstring.value = text


# ---- the keys of pipelines.yaml


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a section. default: as YAML; "" where it must be given"""

    name: str
    takes: str
    default: str
    meaning: str


def section(path: str) -> Any:
    """The config class of a section of pipelines.yaml, such as `pretrain.model`; of "" a pipeline's own."""
    return reduce(_class_of, filter(None, path.split(".")), Pipeline)


def sections(cls: Any = Pipeline, path: str = "") -> Iterator[str]:
    """Every section of pipelines.yaml, in order."""
    yield path
    for field in dataclasses.fields(cls):
        if below := _class_of(cls, field.name):
            yield from sections(below, f"{path}.{field.name}".lstrip("."))


def _class_of(cls: Any, name: str) -> Any:
    """The config class of a key's value, or of each of its values; None where it is no section."""
    return _config_in(get_type_hints(cls, include_extras=False)[name])


def _config_in(hint: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return hint
    return next((found for part in get_args(hint) if (found := _config_in(part))), None)


def keys_of(cls: Any) -> list[Key]:
    """The keys of a config class that are no sections: their meaning is a line of its docstring, or a comment."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    said = meanings(cls)
    hints = get_type_hints(cls, include_extras=True)
    aside: frozenset[str] = getattr(cls, "OPERATIONAL", frozenset())
    keys = []
    for name, field in fields.items():
        if _class_of(cls, name) and takes(hints[name]) != "list of sections":
            continue
        meaning = re.sub(r"\bNone\b", "null", said.get(name, "")) + (
            ". Not in the stage's key" if name in aside else ""
        )
        keys.append(Key(name, takes(hints[name]), _default(field), meaning))
    return keys


def meanings(cls: Any) -> dict[str, str]:
    """Field -> what is said of it, in the docstring of its class or in the comment at the end of its line."""
    names = [field.name for field in dataclasses.fields(cls)]
    said = {}
    source = textwrap.dedent(inspect.getsource(cls))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        field = re.match(r"    (\w+): ", token.line)
        if token.type == tokenize.COMMENT and field:
            said[field[1]] = token.string.removeprefix("#").strip()
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(cls.__doc__)):
        for given, meaning in items_of(paragraph, names) or ():
            for name in given.split(", "):
                said[name] = f"{meaning}; {said[name]}" if name in said else meaning
    return said


_PLAIN = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", types.NoneType: "null"}


def takes(hint: Any) -> str:
    """A type in words: "whole number, 1 or more"."""
    origin, of = get_origin(hint), get_args(hint)
    words = _PLAIN.get(hint, "sections")
    if origin is Annotated:
        words = ", ".join(filter(None, (takes(of[0]), _range(of[1:]))))
    elif origin is Literal:
        words = "leads" if set(of) == set(LEADS) else ", ".join(f"`{value}`" for value in of)
    elif origin in (Union, types.UnionType):
        words = " or ".join(map(takes, of))
    elif origin is tuple:
        kinds = dict.fromkeys(map(takes, of))  # each once
        words = f"list of {takes(of[0])}" if of[-1] is Ellipsis else f"list of {len(of)}: {'; '.join(kinds)}"
    elif origin:
        words = f"mapping to {takes(of[1])}"
    return words


def _range(rules: tuple[Any, ...]) -> str:
    """What `Field` says of a number."""
    found: dict[type, Any] = {}
    for rule in rules:
        for one in rule.metadata if isinstance(rule, FieldInfo) else ():
            found[type(one)] = one
    low, above = found.get(annotated_types.Ge), found.get(annotated_types.Gt)
    high, below = found.get(annotated_types.Le), found.get(annotated_types.Lt)
    if low and high:
        return f"{low.ge:g} to {high.le:g}"
    words = [f"{low.ge:g} or more" if low else "", f"above {above.gt:g}" if above else ""]
    return " and ".join(
        filter(None, [*words, f"at most {high.le:g}" if high else "", f"below {below.lt:g}" if below else ""])
    )


def _default(field: Any) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is dataclasses.MISSING:
        return ""
    else:
        value = field.default
    text = yaml.safe_dump(
        to_dict(value) if dataclasses.is_dataclass(value) else _plain(value), default_flow_style=True, width=10_000
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _key_table(path: str) -> str:
    """What a section is for, and its keys."""
    cls = section(path)
    names = [field.name for field in dataclasses.fields(cls)]
    about = [one for one in re.split(r"\n\s*\n", inspect.cleandoc(cls.__doc__)) if not items_of(one, names)]
    rows = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for key in keys_of(cls):
        default = f"`{key.default}`" if key.default else "required"
        rows.append(f"| `{key.name}` | {key.takes} | {default} | {_cell(key.meaning)} |")
    return "\n\n".join([*map(_escaped, about), "\n".join(rows)])


# ---- the tables of data_contracts/


def _tables() -> str:
    parts = []
    for path in sorted(CONTRACTS.glob("*.yaml")):
        rules = contract(path.stem)
        columns = {f"`{name}`": rule for name, rule in rules["columns"].items()}
        if "other_columns" in rules:
            columns["any other"] = rules["other_columns"]
        rows = [
            f"| {name} | {rule['type']} | {rule.get('unit', '')} | {_about(rule)} |" for name, rule in columns.items()
        ]
        key = ", ".join(f"`{name}`" for name in rules["key"])
        parts += [f"### {path.stem}", _escaped(rules["description"]), f"Key: {key}."]
        parts.append("\n".join(["| column | type | unit | meaning |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _about(rule: Mapping[str, Any]) -> str:
    """What a contract says of a column, in the cell of a table."""
    notes = [rule.get("description", "")]
    if "allowed" in rule:
        notes.append("one of " + ", ".join(f"`{value}`" for value in rule["allowed"]))
    if rule.get("nullable") and "null" not in notes[0]:
        notes.append("may be null")
    return _cell("; ".join(filter(None, notes)))


def _cell(text: str) -> str:
    """Markdown in a cell of a table."""
    text = _escaped(" ".join(text.split()))
    return re.sub(r"`[^`]*`", lambda code: code[0].replace("|", "\\|"), text)


_MADE: Mapping[str, Callable[[str], str]] = {"keys": _key_table, "tables": lambda _: _tables()}


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put the tables where the comments of a page want them."""
    wanted = rf"^<!-- ({'|'.join(_MADE)})(?:: (\S*))? -->$"
    return re.sub(wanted, lambda found: _MADE[found[1]](found[2] or ""), markdown, flags=re.MULTILINE)
