"""What decides content: digests of files, of raw folders and of code, and their differences in words."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ecgfm.ecg import InputError
from ecgfm.files import digest_of, sha256_of

SECTIONS = {"synthesize": "synthetic"}
"""Stage -> its section of a pipelines file, where that has another name."""


@dataclass(frozen=True)
class Input:
    """Files that a stage reads.

    path: a directory or a file, handed to the stage's function
    digest: of the content of those files that the stage reads
    origin: where they come from, in words ("prepare ptb_xl records500/00000")
    folders: for raw files, a digest per folder, so that `explain` can name the folder that changed
    patterns: of an earlier stage's output, which of its files
    looked: for raw files, how they looked when they were scanned
    files: of a slice, its raw files: path -> what identifies the content, so that `explain` can name one that changed
    """

    path: Path
    digest: str
    origin: str
    folders: Mapping[str, str] = field(default_factory=dict)
    patterns: tuple[str, ...] = ()
    looked: Look | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Nobody has touched the raw files since they were scanned.

        A drive that vanishes makes every record of it a missing one, and a file that is replaced is not what the key
        was made of: what was read meanwhile must not be kept under that key.

        Raises:
            InputError: files were added, removed or written to, or cannot be looked at.
        """
        if self.looked:
            self.looked.check(self.origin)


@dataclass(frozen=True)
class Look:
    """One look at the files at or below a place of a raw folder: nothing of them is opened.

    place: path below the root; "." is the root
    apart: paths below the place, whose files are somebody else's
    digest: of their sizes and modification times
    """

    root: Path
    place: str
    apart: frozenset[str]
    digest: str

    def check(self, origin: str) -> None:
        """A second look finds the same; see `Input.check`.

        Where the first look found nothing, as of a part of an archive that was not downloaded, there may be nothing.
        """
        where = self.root if self.place == "." else self.root / self.place
        nothing_was_there = self.digest == digest_of({}) and self.root.is_dir()
        try:
            found = self._again()
        except FileNotFoundError as error:
            if nothing_was_there:
                return
            raise InputError(f"{origin}: {error.filename} {_GONE}") from error
        except OSError as error:
            raise InputError(f"{origin}: cannot read {error.filename}: {error.strerror}; {_AGAIN}") from error
        if not found and not nothing_was_there:
            raise InputError(f"{origin}: what was in {where} {_GONE}")
        if digest_of(found) != self.digest:
            raise InputError(
                f"{origin}: files in {where} were added, removed or written to while they were read; wait until nobody "
                "copies into it, then run the same command again"
            )

    def _again(self) -> dict[str, str]:
        top = os.path.join(self.root, "" if self.place == "." else self.place)
        if os.path.isfile(top):  # a slice may be a file
            return {self.place: _size_and_time(os.stat(top))}
        below = "" if self.place == "." else f"{self.place}/"
        return {path: _size_and_time(entry.stat()) for path, entry in _walk(top, below, self.apart)}


_AGAIN = "mend that, then run the same command again"
_GONE = "is not there any more; is its drive still mounted? When it is back, run the same command again"


@dataclass(frozen=True)
class RawTree:
    """The files of a raw folder: path below the root -> what identifies the content.

    origin: where they come from, in words ("ptb_xl raw files")
    looks: path below the root -> size and modification time, where these are not what identifies the content
    """

    root: Path
    files: Mapping[str, str]
    origin: str
    looks: Mapping[str, str] | None = None

    @classmethod
    def scan(cls, root: Path, source: str, hash_content: bool = False) -> RawTree:
        """Every file below a source's raw folder with size and modification time, or with its content's hash.

        Raises:
            InputError: no such folder, no file in it, one that cannot be looked at, or a folder that is a link: its
                files would lie outside, or be there twice, and links in a circle have no end.
        """
        if not root.is_dir():
            raise InputError(f"{source}: no such folder: {root}; give the raw folder with --raw {source}=PATH")
        files: dict[str, str] = {}
        looks: dict[str, str] = {}
        try:
            real_root = os.path.join(os.path.realpath(root), "")
            for path, entry in _walk(str(root), ""):
                stat = entry.stat()
                looks[path] = _size_and_time(stat)
                if not hash_content:
                    continue
                if entry.is_symlink() and not os.path.realpath(entry.path).startswith(real_root):
                    content = "outside"  # readers turn it away, whatever it holds
                else:
                    content = sha256_of(Path(entry.path))
                files[path] = f"{stat.st_size}:{content}"
        except OSError as error:  # no permission; a link in a circle
            raise InputError(f"{source}: cannot read {error.filename}: {error.strerror}") from error
        if not looks:
            raise InputError(f"{source}: the folder {root} is empty")
        if hash_content:
            return cls(root, files, f"{source} raw files", looks)
        return cls(root, looks, f"{source} raw files")

    def everything(self) -> Input:
        """All files below the root."""
        look = Look(self.root, ".", frozenset(), digest_of(self.looks or self.files))
        return Input(self.root, digest_of(self.files), self.origin, self._folders(), looked=look)

    def by_slice(self, slice_ids: Sequence[str]) -> dict[str, Input]:
        """For each slice (a folder or a file of the tree) the files at or below it; the stage gets the root.

        The slice "." has the files that are in no other.
        """
        wanted = set(slice_ids)
        paths: dict[str, list[str]] = {slice_id: [] for slice_id in slice_ids}
        for path in self.looks or self.files:
            if (place := _nearest(path, wanted)) in wanted:
                paths[place].append(path)
        apart: dict[str, set[str]] = {slice_id: set() for slice_id in slice_ids}
        for slice_id in wanted - {"."}:
            if (place := _nearest(slice_id.rpartition("/")[0], wanted)) in wanted:
                apart[place].add(slice_id)
        found = {}
        for slice_id, held in paths.items():
            files = {path: self.files[path] for path in held if path in self.files}
            digest = digest_of(files)
            looked = digest_of({path: self.looks[path] for path in held}) if self.looks else digest
            look = Look(self.root, slice_id, frozenset(apart[slice_id]), looked)
            found[slice_id] = Input(self.root, digest, self.origin, {slice_id: digest}, looked=look, files=files)
        return found

    def _folders(self, max_depth: int = 3, max_folders: int = 5000) -> dict[str, str]:
        grouped: dict[str, dict[str, str]] = defaultdict(dict)
        for path, identity in self.files.items():
            grouped["/".join(path.split("/")[:-1][:max_depth]) or "."][path] = identity
        if len(grouped) > max_folders and max_depth > 1:
            return self._folders(max_depth - 1, max_folders)
        return {folder: digest_of(files) for folder, files in sorted(grouped.items())}


def differences(
    past: Mapping[str, Any],
    now: Mapping[str, Any],
    past_raw: Mapping[str, Mapping[str, str]],
    now_raw: Mapping[str, Mapping[str, str]],
    noun: str = "folder",
) -> list[str]:
    """What changed between the ingredients of two keys, one phrase each.

    past_raw, now_raw: of raw inputs, by name: folder or file (`noun`) -> what identifies its content
    """
    reasons = []
    section = SECTIONS.get(now["stage"], now["stage"])
    if past["version"] != now["version"]:
        reasons.append(f"stage version {past['version']} -> {now['version']}")
    before, after = _flat(past["config"]), _flat(now["config"])
    reasons += [
        f"config {section}.{name} {_shown(before.get(name))} -> {_shown(after.get(name))}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    for name in sorted(past["inputs"].keys() | now["inputs"].keys()):
        old, new = past["inputs"].get(name, {}), now["inputs"].get(name, {})
        if old == new:
            continue
        if name in past_raw or name in now_raw:
            reasons += _set_difference(past_raw.get(name, {}), now_raw.get(name, {}), noun)
        else:
            reasons += _set_difference(old, new, "input", "{names} came out different")
    changed = [name for name in now["code"] if past["code"].get(name) != now["code"][name]]
    changed += [name for name in past["code"] if name not in now["code"]]
    if changed:
        reasons.append(f"code of {', '.join(sorted(changed))} changed")
    return reasons


def code_digests(module: str, also: Sequence[str] = (), chosen: frozenset[str] = frozenset()) -> dict[str, str]:
    """A digest per module that `module` (and `also`) imports of its own package, itself included.

    Comments, docstrings and layout do not count. Imports inside functions count; so do those of imported modules.
    The imports of a module in `chosen` do not: it is a table of alternatives. Nor does `config`: its values are
    ingredients of their own, and a new default for one stage must not remake all the others.
    """
    waiting, digests = [module, *also], {}
    while waiting:
        name = waiting.pop()
        path = _source_of(name)
        if path is None or name in digests or name == "ecgfm.config":
            continue
        digests[name], imports = _parse(path, name)
        if name not in chosen:
            waiting += imports
    return dict(sorted(digests.items()))


@cache
def _source_of(module: str) -> Path | None:
    """The file of a module, without importing it. A package's __init__ counts only below the top level."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations or not rest:
        return None
    base = Path(spec.submodule_search_locations[0], *rest)
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


@cache
def _parse(path: Path, module: str) -> tuple[str, tuple[str, ...]]:
    """The digest of a module's code and the modules of its own package that it may import."""
    tree = ast.parse(path.read_bytes())
    top = module.partition(".")[0]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    imports: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            named = [f"{base}.{alias.name}" for alias in node.names]
            modules = [name for name in named if _source_of(name)]
            # a package of which only modules are imported gives no code of its own: its table of them may grow
            imports += modules if len(modules) == len(named) else [base, *modules]
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [line for line in node.body if not _is_docstring(line)] or [ast.Pass()]
    # unparse rather than dump: the dump of one source differs between Python versions
    digest = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]
    return digest, tuple(sorted({name for name in imports if name.partition(".")[0] == top}))


def _is_docstring(line: ast.stmt) -> bool:
    """A string alone on its line: of a module, a class, a function, or of the attribute above it."""
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def looks_below(folder: Path) -> dict[str, str]:
    """Size and modification time of every file below a folder, by path."""
    return {path: _size_and_time(entry.stat()) for path, entry in _walk(str(folder), "")}


def _nearest(path: str, places: Set[str]) -> str:
    """The place that is the path or the nearest above it; "." where none is."""
    while path and path not in places:
        path = path.rpartition("/")[0]
    return path or "."


def _size_and_time(stat: os.stat_result) -> str:
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def _walk(folder: str, below: str, apart: Set[str] = frozenset()) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All files but those in hidden folders, where tools such as `ecgfm download` keep what is theirs.

    apart: paths, below the root, that are left out
    """
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            path = f"{below}{entry.name}"
            if path in apart:
                continue
            if entry.is_dir():
                if entry.is_symlink():
                    raise InputError(f"{entry.path}: expected a folder, found a link to one; move its files here")
                if not entry.name.startswith("."):
                    yield from _walk(entry.path, path + "/", apart)
            elif entry.is_file():
                yield path, entry


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping):
        return {prefix: config} if prefix else {}
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return flat


def _shown(value: Any) -> str:
    text = "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _set_difference(old: Mapping[str, str], new: Mapping[str, str], noun: str, changed: str = "") -> list[str]:
    """Phrases such as "3 new folders (a, b, c)"; `changed` with the names, where that is no phrase for what changed."""
    groups = {
        "new": [name for name in new if name not in old],
        "changed": [name for name in new if name in old and old[name] != new[name]],
        "removed": [name for name in old if name not in new],
    }
    phrases = []
    for word, names in groups.items():
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            counted = f"{len(names)} {word} {noun}{'s' if len(names) > 1 else ''} ({shown})"
            phrases.append(changed.format(names=shown) if changed and word == "changed" else counted)
    return phrases
