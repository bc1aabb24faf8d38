"""What made a file: the stages up to the raw folders, with their config, code and versions.

Everything is read from the `stage.json` of the outputs, which name their inputs by place and by digest. The place of an
input may be gone, or hold other content since; then another output of that name with the same content stands for it.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ecgfm.config import content_of
from ecgfm.ecg import InputError
from ecgfm.files import digest_of, sha256_of
from ecgfm.fingerprints import code_digests
from ecgfm.pipeline import EVALUATE, PREPARE, SOURCE_TABLE, STAGE_NAMES, SYNTHESIZE
from ecgfm.pipelines_file import Pipeline
from ecgfm.runs import FACTS, REPORT

_BESIDE = ("stage.json", "raw_files.json")  # what the store writes beside what the stage wrote


@dataclass(frozen=True)
class Read:
    """One input of a stage.

    input: its name in the stage; origin: what made it, in words
    digest: of the files that were read
    found: the output that holds them, `<stage>/<key>`; "" for raw files, and where no output has that content any more
    elsewhere: it is not the one that was read, but another with the same content
    raw_folder: where raw files lay; folders: of them, path below it -> digest
    """

    input: str
    origin: str
    digest: str
    found: str = ""
    elsewhere: bool = False
    raw_folder: str = ""
    folders: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """One output on the way.

    config: the values that differ from the defaults -> (value, default)
    code: modules -> digest of their syntax tree when it was made
    damage: what is wrong with its files now, "" where nothing is
    """

    directory: Path
    name: str
    made_at: str
    seconds: float
    config: Mapping[str, tuple[Any, Any]]
    code: Mapping[str, str]
    versions: Mapping[str, str]
    counts: Mapping[str, int]
    damage: str
    reads: Sequence[Read]

    @property
    def place(self) -> str:
        """`<stage>/<key>`."""
        return f"{self.directory.parent.name}/{self.directory.name}"

    @property
    def label(self) -> str:
        """The name; of slices that of their source: "prepare ptb_xl"."""
        return _label(self.name)


@dataclass(frozen=True)
class Lineage:
    """What made a file.

    file: as it was found, without links; output: `<stage>/<key>` that it belongs to
    changed: what is not as it was written, of the file and of the outputs on the way
    made: `<stage>/<key>` -> the output, of all on the way
    """

    file: Path
    data_dir: Path
    output: str
    changed: Sequence[str]
    made: Mapping[str, Made]

    @cached_property
    def _code_now(self) -> dict[str, str]:
        modules = sorted({module for made in self.made.values() for module in made.code})
        return code_digests(modules[0], modules[1:], SOURCE_TABLE) if modules else {}

    def code_changed(self, *some: Made) -> list[str]:
        """Modules that are not any more what they were when some of the outputs were made."""
        then = {pair for made in some for pair in made.code.items()}
        return sorted({module for module, digest in then if self._code_now.get(module) != digest})

    def branch(self, depth: int | None = None) -> Branch:
        """The tree, from the output to the raw folders, or `depth` stages up."""
        return self._branch([self.made[self.output]], depth, set())

    def _branch(self, members: Sequence[Made], depth: int | None, above: set[str]) -> Branch:
        """Outputs of one name as one, with what they read; what was shown above is not gone into again."""
        if all(made.place in above for made in members):
            return Branch(members, shown_above=True)
        above |= {made.place for made in members}
        if depth == 0:
            hidden = {_label(read.origin): None for made in members for read in made.reads}
            return Branch(members, hidden=tuple(sorted(hidden, key=lambda label: _order(("", label, False)))))
        reads: dict[tuple[str, str, bool], list[Read]] = {}
        for read in (read for made in members for read in made.reads):
            gone = not read.found and not read.raw_folder
            reads.setdefault((read.raw_folder, _label(read.origin), gone), []).append(read)
        below: list[Branch | Leaf] = []
        for (raw_folder, label, _), some in sorted(reads.items(), key=lambda item: _order(item[0])):
            places = dict.fromkeys(read.found for read in some if read.found)
            if places:
                below.append(self._branch([self.made[place] for place in places], depth and depth - 1, above))
            else:
                below.append(Leaf(label, raw_folder, some))
        return Branch(members, below)


@dataclass(frozen=True)
class Branch:
    """Outputs of one name (slices of a source, or one) in the tree, and what they read.

    hidden: labels of what they read, where the tree ends before it
    """

    members: Sequence[Made]
    below: Sequence[Branch | Leaf] = ()
    hidden: Sequence[str] = ()
    shown_above: bool = False

    @property
    def label(self) -> str:
        """The name; of several slices that of their source."""
        return self.members[0].label if len(self.members) > 1 else self.members[0].name


@dataclass(frozen=True)
class Leaf:
    """The end of a branch: a raw folder, or (`raw_folder` is "") content that no output has any more."""

    label: str
    raw_folder: str
    reads: Sequence[Read]

    @property
    def folders(self) -> dict[str, str]:
        """Of a raw folder, what was read of it: path below -> digest."""
        return {folder: digest for read in self.reads for folder, digest in read.folders.items()}

    @property
    def digest(self) -> str:
        """Of all that was read."""
        digests = {read.digest for read in self.reads}
        return digests.pop() if len(digests) == 1 else digest_of(self.folders)


def lineage_of(path: Path) -> Lineage:
    """What made a file or directory: anything in an output of a stage, or a link to it.

    Raises:
        InputError: there is no such file, it is in no output of a data directory, or an earlier version made that.
    """
    file = Path(os.path.realpath(path))
    if file.name == REPORT and (file.parent / FACTS).is_file():  # a run's page is that of its evaluation
        file = Path(os.path.realpath(file.parent / EVALUATE.name / REPORT))
    directory = _output_of(path, file)
    data_dir = directory.parents[2]
    reader = _Reader(data_dir)
    output = f"{directory.parent.name}/{directory.name}"
    waiting, made = [output], {}
    while waiting:
        place = waiting.pop()
        if place not in made:
            made[place] = reader.made(place)
            waiting += [read.found for read in made[place].reads if read.found]
    changed = _changed(file, directory, reader.facts(output))
    changed += [f"{one.name}: {one.damage}" for one in made.values() if one.damage and one.place != output]
    return Lineage(file, data_dir, output, changed, made)


class _Reader:
    """The `stage.json` of the outputs of a data directory, each read once."""

    def __init__(self, data_dir: Path) -> None:
        self.stages = data_dir / "stages"
        self.data_dir = data_dir
        self._facts: dict[str, dict[str, Any]] = {}
        self._named: dict[str, dict[str, list[str]]] = {}  # stage -> name -> places

    def facts(self, place: str) -> dict[str, Any]:
        """What an output says of itself; nothing where it is gone or cannot be read."""
        if place not in self._facts:
            try:
                self._facts[place] = json.loads((self.stages / place / "stage.json").read_bytes())
            except (FileNotFoundError, NotADirectoryError, ValueError):
                self._facts[place] = {}
        return self._facts[place]

    def made(self, place: str) -> Made:
        """An output with what it read, as far as that is found."""
        facts, directory = self.facts(place), self.stages / place
        if "made_from" not in facts:
            raise InputError(
                f"{directory} does not say what it was made from: an earlier version of ecgfm made it; make it anew "
                f"with --force {directory.parent.name}"
            )
        ingredients = facts["ingredients"]
        reads = [
            self._read(name, given, facts["folders"].get(name, {}), _origins(facts))
            for name, some in facts["made_from"].items()
            for given in some
        ]
        return Made(
            directory,
            facts["name"],
            facts["made_at"],
            facts["seconds"],
            _not_default(ingredients["stage"], ingredients["config"]),
            ingredients["code"],
            facts["versions"],
            facts["counts"],
            "; ".join(_wrong_sizes(directory, facts["files"])),
            reads,
        )

    def _read(self, name: str, given: Mapping[str, Any], folders: Mapping[str, str], beside: frozenset[str]) -> Read:
        """An input, by what its reader says of it. beside: all that the reader read, by name."""
        origin, digest = given["origin"], given["digest"]
        if os.path.isabs(given["place"]):
            return Read(name, origin, digest, raw_folder=given["place"], folders=folders)
        stage, key = Path(given["place"]).parts[1:3]
        if self._holds(f"{stage}/{key}", given, folders):
            return Read(name, origin, digest, f"{stage}/{key}")
        same = [place for place in self._places(stage, origin) if self._holds(place, given, folders)]
        if same:  # an empty table is the same for all data: rather one that was made of what its reader read too
            nearest = max(same, key=lambda place: len(beside & _origins(self.facts(place))))
            return Read(name, origin, digest, nearest, elsewhere=True)
        return Read(name, origin, digest)

    def _holds(self, place: str, given: Mapping[str, Any], folders: Mapping[str, str]) -> bool:
        """Whether an output has the content that was read."""
        facts = self.facts(place)
        if not facts or facts["name"] != given["origin"]:
            return False
        files = {name: file["sha256"] for name, file in facts["files"].items() if not file.get("volatile")}
        patterns = given["patterns"]
        if not patterns:  # what `synthesize` wrote, read as a raw folder: all of it, or the folders of one slice
            return given["digest"] == digest_of(files) or any(_is_slice(files, *one) for one in folders.items())
        chosen = {name: sha for name, sha in files.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}
        return given["digest"] in (digest_of(chosen), *(files[name] for name in patterns if name in files))

    def _places(self, stage: str, name: str) -> list[str]:
        """The outputs of a name, newest first."""
        if stage not in self._named:
            named: dict[str, list[tuple[str, str]]] = {}
            for manifest in (self.stages / stage).glob("*/stage.json"):
                if facts := self.facts(f"{stage}/{manifest.parent.name}"):
                    named.setdefault(facts["name"], []).append((facts["made_at"], f"{stage}/{manifest.parent.name}"))
            self._named[stage] = {
                one: [place for _, place in sorted(some, reverse=True)] for one, some in named.items()
            }
        return self._named[stage].get(name, [])


def _output_of(path: Path, file: Path) -> Path:
    """The directory of the output that a file belongs to.

    Raises:
        InputError: it is in none.
    """
    if not file.exists():
        if path.is_symlink():
            raise InputError(f"{path} leads to {file}, which is not there: it was removed, or never finished")
        raise InputError(f"no such file: {path}")
    for folder in (file, *file.parents):
        if len(folder.parts) > 3 and folder.parents[1].name == "stages":
            if folder.name.endswith(".partial"):
                raise InputError(f"{path} belongs to a stage that is not finished: {folder.parent.name} in {folder}")
            if (folder / "stage.json").is_file():
                return folder
    for folder in (file, *file.parents):
        if len(folder.parts) > 3 and folder.parents[1].name == "runs" and (folder / "run.json").is_file():
            links = sorted(
                entry.name for entry in folder.iterdir() if not entry.name.startswith(".") and entry.is_dir()
            )
            raise InputError(f"{path} is of a run, which uses many stages; name one of them: {', '.join(links)}")
    raise InputError(
        f"{path} is in no data directory: expected it below DATA_DIR/stages/STAGE/KEY, or a run's link there"
    )


def _changed(file: Path, directory: Path, facts: Mapping[str, Any]) -> list[str]:
    """What of a file, or of the files in a directory of an output, is not as the stage wrote it. Hashes them."""
    below = file.relative_to(directory).as_posix()
    files: Mapping[str, Mapping[str, Any]] = facts["files"]
    asked = {name: wrote for name, wrote in files.items() if below in (".", name) or name.startswith(f"{below}/")}
    wrong = list(_wrong_sizes(directory, asked))
    if wrong:
        return wrong
    if file.is_file() and not asked and below not in _BESIDE:
        return [f"{below} is not of what the stage wrote: it was added later"]
    return [
        f"{name} has other bytes than were written"
        for name, wrote in asked.items()
        if sha256_of(directory / name) != wrote["sha256"]
    ]


def _wrong_sizes(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, wrote in files.items():
        try:
            size = os.stat(directory / name).st_size
        except (FileNotFoundError, NotADirectoryError):
            yield f"{name} is missing"
            continue
        if size != wrote["bytes"]:
            yield f"{name} has {size:,} bytes instead of {wrote['bytes']:,}"


def _not_default(stage: str, config: Any) -> dict[str, tuple[Any, Any]]:
    """The values of a stage's config that are not what they are by default: name -> (value, default)."""
    section = "synthetic" if stage == SYNTHESIZE.name else stage
    default = content_of(getattr(Pipeline(sources=("any",)), section, None))
    if default is None:  # a listing has no values but its source, which is in its name
        return {}
    values, defaults = dict(_flat(config)), dict(_flat(default))
    return {name: (value, defaults.get(name)) for name, value in values.items() if value != defaults.get(name)}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _is_slice(files: Mapping[str, str], folder: str, digest: str) -> bool:
    """Whether the files at or below a folder have a digest; "." has those that are in no other slice: not known."""
    below = {name: sha for name, sha in files.items() if name == folder or name.startswith(f"{folder}/")}
    return folder == "." or digest_of(below) == digest


def _origins(facts: Mapping[str, Any]) -> frozenset[str]:
    """What an output was made of, by name."""
    return frozenset(origin for some in facts["ingredients"]["inputs"].values() for origin in some)


def _label(name: str) -> str:
    stage, _, subject = name.partition(" ")
    return f"{stage} {subject.partition(' ')[0]}" if stage == PREPARE.name else name


def _order(read: tuple[str, str, bool]) -> tuple[int, str]:
    """Late stages first: what was shown above is then what others read too. Raw folders last."""
    raw_folder, label, _ = read
    stage = label.partition(" ")[0]
    return (1, label) if raw_folder or stage not in STAGE_NAMES else (-STAGE_NAMES.index(stage), label)
