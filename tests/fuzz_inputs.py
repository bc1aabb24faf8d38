"""Small raw folders of every kind of input, and what can be done to one: tests/fuzzing.py has them prepared."""

from __future__ import annotations

import ast
import importlib.util
import io
import os
import random
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
from test_sources import BUILDERS, write_wfdb
from test_wfdb import write_record

OUTSIDE = "../outside"
LEADS_2 = ("I", "II")
OWN = "name: fuzz\nfiles: {patterns: ['**/*'], suffix_in_ids: true}\n"
OWN_WFDB = "name: fuzz\nfiles: {patterns: ['**/*.hea']}\n"

CONFIGS: list[dict[str, Any]] = [
    {},
    {},
    {"resample": "polyphase"},
    {"sampling_rate_hz": 100.0},
    {"gaps": "bridge", "constant_leads": "reject"},
    {"gaps": "reject", "leads": ("II", "V5")},
]
LATE_IMPORTS = ("wfdb 80", "wfdb flac", "own hdf5")
"""Kinds whose readers import what takes long."""


class Odd(NamedTuple):
    """What is no plain file. text: the target of a link; size: of a sparse file that begins with `content`."""

    is_: Literal["link", "pipe", "folder", "locked", "sparse"]
    text: str = ""
    size: int = 0
    content: bytes = b""


Files = dict[str, "bytes | Odd"]


@dataclass(frozen=True)
class Kind:
    """A raw folder: the source that reads it, and its files by path.

    choose: of folders that are taken one at a time (real files), the others
    mend: what is done to a damaged file so that the damage is seen, and not a checksum
    arrays: HDF5 datasets by their paths
    """

    source: str
    files: Mapping[str, bytes]
    choose: tuple[Mapping[str, bytes], ...] = ()
    mend: Callable[[bytes], bytes] | None = None
    arrays: tuple[str, ...] = ()


# ---- kinds


def kinds(shared: Path | None) -> dict[str, Kind]:
    """By name. Formats whose package is not installed are left out, and real files where they are not there."""
    with tempfile.TemporaryDirectory(prefix="ecgfm-fuzz-") as folder:
        made = _sources(Path(folder)) | _wfdb(Path(folder)) | _arrays(Path(folder))
    if all(map(importlib.util.find_spec, ("pydicom", "edfio", "defusedxml"))):
        made |= _vendors()
    return made | (_real(shared / "data") if shared and (shared / "data").is_dir() else {})


def _read(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _sources(folder: Path) -> dict[str, Kind]:
    made = {}
    for source, build in BUILDERS.items():
        (folder / source).mkdir()
        build(folder / source)
        arrays = ("exam_id", "tracings") if source == "code15" else ()
        made[source] = Kind(source, _read(folder / source), arrays=arrays)
    return made


def _wfdb(folder: Path) -> dict[str, Kind]:
    """Folders of one record in each storage format that is read here or by the wfdb package."""
    made = {}
    stored = np.random.default_rng(1).bytes(2400)
    for storage in ("16", "212", "8", "80", "310", "24x2"):
        lines = ["R 2 360 200", *(f"R.dat {storage} 200(3)/mV 10 0 5 0 0 {lead}" for lead in LEADS_2)]
        place = folder / f"wfdb {storage}"
        write_record(place, "R", lines, R_dat=stored)
        made[f"wfdb {storage.partition('x')[0]}"] = Kind("own", _read(place) | {"ecgfm.yaml": OWN_WFDB.encode()})
    import wfdb

    flac, segments = folder / "flac", folder / "segments"
    flac.mkdir()
    signal_mv = np.cumsum(np.random.default_rng(0).normal(0, 0.05, (300, 2)), axis=0)
    wfdb.wrsamp(
        "R", 500, ["mV"] * 2, list(LEADS_2), signal_mv, fmt=["516"] * 2, adc_gain=[1000.0] * 2, baseline=[0] * 2,
        write_dir=str(flac),
    )  # fmt: skip
    for number, n_samples in enumerate((60, 40)):
        part = np.random.default_rng(number).integers(-500, 500, (n_samples, 2))
        lines = [f"s{number} 2 250 {n_samples}", *(f"s{number}.dat 16 100/mV 16 0 0 0 0 {lead}" for lead in LEADS_2)]
        write_record(segments, f"s{number}", lines, **{f"s{number}_dat": part})
    write_record(segments, "layout", ["layout 2 250 0", *(f"~ 0 100/mV 16 0 0 0 0 {lead}" for lead in LEADS_2)])
    write_record(segments, "R", ["R/4 2 250 110", "layout 0", "s0 60", "~ 10", "s1 40"])
    for name in ("flac", "segments"):
        made[f"wfdb {name}"] = Kind("own", _read(folder / name) | {"ecgfm.yaml": OWN_WFDB.encode()})
    return made


def _arrays(folder: Path) -> dict[str, Kind]:
    values = (np.random.default_rng(0).normal(0, 0.5, (3, 2, 120))).round(3)
    told = "name: fuzz\nleads: [I, II]\nsampling_rate_hz: 250\nunits: mV\n"
    told += "metadata: {file: about.csv, record: id, age: age, sex: sex, patient: who, codes: codes, fold: fold}\n"
    about = b"id,age,sex,who,codes,fold\n" + b"".join(b"e%d,%d,F,p%d,1;2,%d\n" % (n, 50 + n, n, n) for n in range(3))
    hdf5, npy = folder / "a.h5", folder / "a.npy"
    with h5py.File(hdf5, "w") as file:
        file.create_dataset("group/x", data=values, chunks=(1, 2, 60), compression="gzip")
        file["names"] = [f"e{n}" for n in range(3)]
    np.save(npy, values.astype(np.float32))
    common = {"about.csv": about}
    of_hdf5 = f"{told}array: {{patterns: ['*.h5'], axes: [record, lead, time], dataset: group/x, ids_dataset: names}}\n"
    of_npy = f"{told}array: {{patterns: ['*.npy'], axes: [record, lead, time], ids_file: ids.csv, ids_column: id}}\n"
    return {
        "own hdf5": Kind(
            "own",
            {**common, "a.h5": hdf5.read_bytes(), "ecgfm.yaml": of_hdf5.encode()},
            arrays=("group/x", "names"),
        ),
        "own npy": Kind(
            "own",
            {**common, "a.npy": npy.read_bytes(), "ecgfm.yaml": of_npy.encode(), "ids.csv": b"id\ne2\ne0\ne1\n"},
        ),
    }


def _vendors() -> dict[str, Kind]:
    from scp_writer import resealed
    from test_formats_binary import VALID
    from test_formats_xml import FORMATS, signal

    made = {}
    for name, (_, content, _) in VALID.items():
        files = {f"a/1.{name[:3]}": content, "ecgfm.yaml": OWN.replace("**", "a").encode()}
        made[name] = Kind("own", files, mend=resealed if name.startswith("scp") else None)
    for name, each in FORMATS.items():
        text = each.write(signal(each.leads)).encode("latin-1")
        made[name] = Kind("own", {"a/1.xml": text, "ecgfm.yaml": OWN.replace("**", "a").encode()})
    return made


def _real(data: Path) -> dict[str, Kind]:
    """Real files below 600 KB, each with those that belong to it."""
    yaml = {"ecgfm.yaml": OWN.replace("**", "a").encode()}
    suffixes = (".xml", ".dcm", ".scp", ".edf")
    files = [path for path in sorted((data / "vendor").rglob("*")) if path.suffix.lower() in suffixes]
    vendor = [{**yaml, f"a/{path.name}": path.read_bytes()} for path in files if path.stat().st_size < 600_000]
    wfdb = []
    for header in sorted((data / "wfdb-formats").rglob("*.hea")) + sorted((data / "ludb").rglob("*.hea")):
        named = set(re.findall(r"\S+", header.read_text(errors="replace")))
        named |= {f"{name}.hea" for name in named} | {header.name}
        named |= {word for name in named for word in _words_of(header.parent / name)}
        beside = [path for path in header.parent.iterdir() if path.name in named and path.is_file()]
        if len(beside) > 1 and sum(path.stat().st_size for path in beside) < 600_000:
            wfdb.append({"ecgfm.yaml": OWN_WFDB.encode(), **{path.name: path.read_bytes() for path in beside}})
    return {
        "real vendor": Kind("own", vendor[0], choose=tuple(vendor)),
        "real wfdb": Kind("own", wfdb[-1], choose=tuple(wfdb)),
        "real code15": Kind("code15", _read(data / "code-15"), arrays=("exam_id", "tracings")),
        "real mimic": Kind("mimic_iv_ecg", _read(data / "mimic-iv-ecg")),
    }


def _words_of(header: Path) -> set[str]:
    return set(header.read_text(errors="replace").split()) if header.suffix == ".hea" and header.exists() else set()


def write_outside(folder: Path, mark: bytes) -> None:
    """A folder of good files beside the raw folder, which nobody may open."""
    folder.mkdir()
    digital = np.frombuffer(mark * 100, "<i2").reshape(12, 100)
    write_wfdb(folder, "secret", ".dat", 1000, comments=[f"Dx: {mark.decode()}"])
    (folder / "secret.dat").write_bytes(digital.tobytes())
    (folder / "secret.csv").write_bytes(b"id,who,path\n" + b"1,%s,a/1\n" % mark)
    (folder / "ecgfm.yaml").write_text(f"name: {mark.decode()}\nfiles: {{patterns: ['**/*.hea']}}\n")
    np.save(folder / "secret.npy", np.frombuffer(mark * 60, "<i2").reshape(3, 2, 120))
    with h5py.File(folder / "secret.h5", "w") as file:
        file["group/x"] = file["tracings"] = np.frombuffer(mark * 60, "<i2").reshape(3, 2, 120)
        file["names"] = file["exam_id"] = [mark.decode(), "e0", "e1"]
    if importlib.util.find_spec("pydicom") and importlib.util.find_spec("edfio"):
        from test_formats_binary import VALID

        for name in ("dicom", "edf", "scp"):
            (folder / f"secret.{name[:3]}").write_bytes(VALID[name][1])


# ---- folders on the disk


def write(files: Files, folder: Path) -> None:
    """A folder of these files; names that no file can have, and files below others, are left out."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _put(path, content)
        except (OSError, ValueError):
            continue


def _put(path: Path, content: bytes | Odd) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content.is_ == "link":
        path.symlink_to(content.text)
    elif content.is_ == "pipe":
        os.mkfifo(path)
    elif content.is_ == "folder":
        path.mkdir()
        (path / "1.hea").write_text("1 1 500 10\n")
    else:
        path.write_bytes(content.content)
        if content.is_ == "sparse":
            os.truncate(path, content.size)
        else:
            path.chmod(0)


def remove(path: Path) -> None:
    """Whatever stands at a path, links not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- damage

NUMBERS = (
    *("0", "-1", "1", "2", "12", "1e308", "-1e308", "1e-308", "1e-9", "nan", "inf", "-inf", "1e400", "0.0", "", "0x10"),
    *("99999999999999999999", "2147483647", "2147483648", "4294967296", "-2147483649", "32767", "32768", "65535"),
    *("9" * 400, "1" * 5000, "0.001", "1e6", "12000001", "999999", "200000000", "\u0663", "1_0", "1,5", "--1", "+"),
)
NAMES = (
    *(f"{OUTSIDE}/secret", f"{OUTSIDE}/secret.dat", f"{OUTSIDE}/secret.hea", f"{OUTSIDE}/secret.h5", OUTSIDE),
    *("/etc/passwd", "/dev/zero", "/dev/stdin", "/dev/fd/0", "/proc/self/mem", "/proc/self/environ", "..", ".", "/"),
    *("a\0b", "x" * 300, "x/" * 3000, "~", "~root", "%s%n%x", "a/b", "a\\b", "..\\outside\\secret", "|id", "*", "?"),
    *("file:///etc/passwd", "http://127.0.0.1:9/x", "s3://x/y", "CON", "\u202e", "\ud7ff", "\n", "", " ", '"', "'"),
)
TARGETS = (
    *(f"{OUTSIDE}/secret{suffix}" for suffix in ("", ".hea", ".dat", ".csv", ".h5", ".npy", ".dic", ".edf", ".scp")),
    *(OUTSIDE, f"{OUTSIDE}/ecgfm.yaml", "/dev/zero", "/dev/null", "/etc/passwd", "/proc/self/environ", "nowhere", "."),
)
BYTES = (
    *(b"\0", b"\xff", b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0" * 8, b"\xff" * 8, b"\xff" * 7 + b"\x7f"),
    *(
        b"\x01\0\0\0\0\0\0\0",
        b"\0\0\0\0\x01\0\0\0",
        b"\0\0\0\x40",
        b"\0\x80",
        b"\xff\x7f",
        b"\0\0\x80\x7f",
        b"<",
        b"&x;",
    ),
)
BOMB = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
ENTITIES = (
    f'<!ENTITY a0 "lol">{BOMB}',
    f'<!ENTITY a11 "{"x" * 100_000}">',
    f'<!ENTITY a11 SYSTEM "{OUTSIDE}/secret.csv">',
    '<!ENTITY a11 SYSTEM "file:///dev/zero">',
    '<!ENTITY a11 SYSTEM "http://127.0.0.1:9/x">',
    f'<!ENTITY % p SYSTEM "{OUTSIDE}/secret.csv"> %p;',
)
DEEP = "[" * 20_000
ALIASES = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
_NUMBER, _WORD = re.compile(rb"[-+]?\d+(?:\.\d+)?"), re.compile(rb"[^\s,<>=\"':;\[\]{}]+")


def damage(files: Files, kind: Kind, dice: random.Random, scratch: Path) -> list[str]:
    """Do one to three things to a kind's files, in place; what was done."""
    if kind.choose:
        files.clear()
        files.update(dice.choice(kind.choose))
    done = []
    mended = kind.mend is not None and dice.random() < 0.8
    before = dict(files)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        name = dice.choice(sorted(files))
        if name == "ecgfm.yaml":  # a damaged config mostly ends the run at once
            name = dice.choice(sorted(files))
        way = dice.choices(tuple(WAYS), tuple(WAYS.values()))[0]
        if kind.arrays and isinstance(files[name], bytes) and name.endswith((".h5", ".hdf5")) and dice.random() < 0.5:
            done.append(f"{name}: {_twist(files, name, kind.arrays, dice, scratch)}")
        else:
            done.append(f"{name}: {way.__name__.strip('_')} {way(files, name, dice) or ''}".strip())
    for name, content in files.items() if mended else ():
        if isinstance(content, bytes) and kind.mend and content is not before.get(name) and len(content) > 10:
            files[name] = _mended(kind.mend, content)
    return [each[:200] for each in done]


def _mended(mend: Callable[[bytes], bytes], content: bytes) -> bytes:
    try:
        return mend(content)
    except (struct.error, IndexError, ValueError):  # too damaged to have a checksum
        return content


def _content(files: Files, name: str) -> bytes:
    content = files[name]
    return content if isinstance(content, bytes) else content.content


def _place(content: bytes, dice: random.Random) -> int:
    """Somewhere in a file; in half of the cases where headers are."""
    return dice.randrange(max(1, min(len(content), dice.choice((100, 800, 10**9)))))


def _bits(files: Files, name: str, dice: random.Random) -> str:
    content = bytearray(_content(files, name) or b"\0")
    for _ in range(dice.choice((1, 1, 4, 32))):
        content[_place(content, dice)] ^= 1 << dice.randrange(8)
    files[name] = bytes(content)
    return ""


def _run(files: Files, name: str, dice: random.Random) -> str:
    """A run of bytes put over others, or between them."""
    content = _content(files, name)
    value = dice.choice((*BYTES, dice.randbytes(dice.randrange(1, 40)))) * dice.choice((1, 1, 1, 50))
    at = _place(content, dice)
    files[name] = content[:at] + value + content[at + dice.choice((0, len(value))) :]
    return f"at {at}"


def _cut(files: Files, name: str, dice: random.Random) -> str:
    content = _content(files, name)
    at = _place(content, dice)
    files[name] = content[:at] + dice.choice((b"", content[at + dice.randrange(1, 300) :]))
    return f"at {at}"


def _splice(files: Files, name: str, dice: random.Random) -> str:
    """The beginning of one file, the end of another."""
    other = dice.choice(sorted(files))
    head, tail = _content(files, name), _content(files, other)
    files[name] = head[: _place(head, dice)] + tail[_place(tail, dice) :]
    return f"with {other}"


def _replace(files: Files, name: str, dice: random.Random, what: re.Pattern[bytes], values: tuple[str, ...]) -> str:
    content = _content(files, name)
    found = list(what.finditer(content[: dice.choice((400, 3000, 200_000))]))
    if not found:
        return _run(files, name, dice)
    match, value = dice.choice(found), dice.choice(values)
    new = value.encode("utf-8", "surrogatepass")
    files[name] = content[: match.start()] + new + content[match.end() :]
    if len(new) == 0 or dice.random() < 0.3:  # wherever that word stands
        files[name] = content.replace(match[0], new)
    return f"{match[0][:40]!r} -> {value[:40]!r}"


def _number(files: Files, name: str, dice: random.Random) -> str:
    return _replace(files, name, dice, _NUMBER, NUMBERS)


def _name(files: Files, name: str, dice: random.Random) -> str:
    return _replace(files, name, dice, _WORD, NAMES)


def _file_name(files: Files, name: str, dice: random.Random) -> str:
    """Where a file is named in another one, another name."""
    stems = sorted({Path(path).stem for path in files} | {Path(path).name for path in files})
    value = dice.choice(NAMES)
    stem, new = dice.choice(stems).encode(), value.encode("utf-8", "surrogatepass")
    for path in sorted(files):
        if isinstance(content := files[path], bytes) and stem in content and b"\0" not in content[:100]:
            files[path] = content.replace(stem, new, dice.choice((-1, 1)))
    return f"{stem!r} named {value[:40]!r}"


def _renamed(files: Files, name: str, dice: random.Random) -> str:
    value = dice.choice(("x" * 200, "a b", "\u202e", "-", "{}", "%00", "a\nb", "\udcff", "*", "~", "[x]", "a;b", "1,2"))
    folder, _, last = name.rpartition("/")
    stem, suffix = os.path.splitext(last)
    for path in sorted(files):
        if path.startswith(f"{folder}/{stem}." if folder else f"{stem}."):
            files[os.path.join(folder, value + os.path.splitext(path)[1])] = files.pop(path)
    return f"{stem}{suffix} -> {value!r}"


def _lines(files: Files, name: str, dice: random.Random) -> str:
    lines = _content(files, name).split(b"\n")
    at = dice.randrange(len(lines))
    what = dice.choice(("twice", "gone", "many", "elsewhere", "long"))
    if what == "twice":
        lines.insert(at, lines[at])
    elif what == "gone":
        del lines[at]
    elif what == "many":
        lines[at:at] = [lines[at][:200]] * 2000
    elif what == "long":
        lines[at] = lines[at][:200] * 2000
    else:
        lines.append(lines.pop(at))
    files[name] = b"\n".join(lines)
    return f"{at} {what}"


def _entity(files: Files, name: str, dice: random.Random) -> str:
    """References that stand for gigabytes or for other files: XML entities, YAML aliases."""
    content = _content(files, name)
    if name.endswith(".yaml"):
        bomb = dice.choice((ALIASES, DEEP))
        files[name] = bomb.encode() + content.replace(b"fuzz", b"*a9").replace(b"toy", b"*a9")
        return bomb[:20]
    text = content.decode("latin-1")
    root = re.search(r"<([A-Za-z][\w:.-]*)[\s>]", text)
    if root is None:
        return _run(files, name, dice)
    values = list(re.finditer(r">([^<>]+)<", text)) or [root]
    at = dice.choice(values)
    text = f"{text[: at.start() + 1]}&a11;{text[at.start() + 1 :]}"
    declared = f"<!DOCTYPE {root[1]} [{dice.choice(ENTITIES)}]>"
    files[name] = f"{text[: root.start()]}{declared}{text[root.start() :]}".encode("latin-1")
    return declared[:60]


def _odd(files: Files, name: str, dice: random.Random) -> str:
    """Something in the place of a file that is none, or one that cannot be read."""
    content = _content(files, name)
    what: Odd = dice.choice(
        (
            *(Odd("link", dice.choice(TARGETS)) for _ in range(6)),
            Odd("link", Path(name).name),
            Odd("link", dice.choice(sorted(files))),
            Odd("pipe"),
            Odd("pipe"),
            Odd("folder"),
            Odd("locked", content=content),
            Odd("sparse", size=dice.choice((10**6, 10**8, 2 * 10**9, 10**11)), content=content),
            Odd("sparse", size=dice.choice((10**6, 10**8, 2 * 10**9)), content=content),
        )
    )
    if what.text and not what.text.startswith("/"):
        above = "../" * name.count("/")
        what = what._replace(text=above + what.text if what.text.startswith("..") else what.text)
    files[name] = what
    return f"{what.is_} {what.text} {what.size or ''}".strip()


def _folder_odd(files: Files, name: str, dice: random.Random) -> str:
    """A link in the place of a folder."""
    folder = dice.choice([str(parent) for parent in Path(name).parents])
    if folder == ".":
        folder = "linked"
    for path in [path for path in files if path.startswith(f"{folder}/")]:
        del files[path]
    target = dice.choice((".", "/dev", "/proc/self", "../" * folder.count("/") + OUTSIDE))
    files[folder] = Odd("link", target)
    if dice.random() < 0.3:
        files[f"{folder}2"] = Odd("link", target)  # two circles have 2 ** depth ways
    return f"{folder} -> {target}"


def _gone(files: Files, name: str, dice: random.Random) -> str:
    if len(files) > 1:
        del files[name]
    return ""


def _npy(files: Files, name: str, dice: random.Random) -> str:
    """Another header before the same bytes of a .npy file, or an archive of arrays in its place."""
    content = _content(files, name)
    if not content.startswith(b"\x93NUMPY\x01\0"):
        return _number(files, name, dice)
    end = 10 + struct.unpack_from("<H", content, 8)[0]
    header: dict[str, Any] = _header_of(content[10:end])
    header["descr"] = dice.choice(
        (header.get("descr"), "|O", "<i2", "<f2", ">f8", "<c8", "|b1", "<U4", "|V8", "<M8[s]")
    )
    shapes = ((3, 2, 2**40), (2**62, 2, 1), (0, 2, 9), (3, 2, 0), (-1, 2, 4), (3, 2), (), (3, 120, 2), (1,) * 40)
    header["shape"] = dice.choice((header.get("shape"), *shapes))
    header["fortran_order"] = dice.choice((False, True, 7))
    text = repr(header).encode().ljust(117) + b"\n"
    files[name] = content[:8] + struct.pack("<H", len(text)) + text + content[end:]
    if dice.random() < 0.1:
        archive = io.BytesIO()
        np.savez(archive, x=np.zeros((3, 2, 120)))
        files[name] = archive.getvalue()
    return repr(header)


def _header_of(text: bytes) -> dict[str, Any]:
    try:
        header = ast.literal_eval(text.decode("latin-1"))
    except (ValueError, SyntaxError):
        return {}
    return header if isinstance(header, dict) else {}


WAYS: dict[Callable[[Files, str, random.Random], str], int] = {
    _bits: 3,
    _run: 4,
    _cut: 2,
    _splice: 2,
    _number: 6,
    _name: 3,
    _file_name: 3,
    _renamed: 1,
    _lines: 2,
    _entity: 2,
    _odd: 4,
    _folder_odd: 1,
    _gone: 1,
    _npy: 2,
}
"""What is done to a folder's file, and how often."""


# ---- HDF5 files that are as their writer wants them, and not as anybody expects


def _twist(files: Files, name: str, arrays: tuple[str, ...], dice: random.Random, scratch: Path) -> str:
    """One of the datasets in another way."""
    path, dataset = scratch / "twisted.h5", dice.choice(arrays)
    path.write_bytes(_content(files, name))
    twist = dice.choice(TWISTS)
    try:
        with h5py.File(path, "r+") as file:
            if file[dataset].size > 10**7:  # twisted before
                return "twice"
            old = file[dataset][:]
            del file[dataset]
            twist(file, dataset, old)
    except (OSError, KeyError, ValueError, RuntimeError, TypeError) as error:  # damaged before
        return f"no HDF5 any more: {type(error).__name__}"
    files[name] = path.read_bytes()
    path.unlink()
    return f"{dataset} {twist.__name__.strip('_')}"


def _shape(*shape: int, chunks: Any = None) -> Callable[[h5py.File, str, np.ndarray], None]:
    def of_shape(file: h5py.File, dataset: str, old: np.ndarray) -> None:
        file.create_dataset(dataset, shape, "f4", chunks=chunks)

    of_shape.__name__ = f"shape {shape} chunks {chunks}"
    return of_shape


def _type(dtype: Any) -> Callable[[h5py.File, str, np.ndarray], None]:
    def of_type(file: h5py.File, dataset: str, old: np.ndarray) -> None:
        file.create_dataset(dataset, old.shape, dtype)

    of_type.__name__ = f"type {dtype}"
    return of_type


def _values(value: float) -> Callable[[h5py.File, str, np.ndarray], None]:
    def with_value(file: h5py.File, dataset: str, old: np.ndarray) -> None:
        new = np.zeros(old.shape, "f8") + (old if old.dtype.kind in "iuf" else 0)
        new.flat[new.size // 2 :: 3] = value
        file[dataset] = new

    with_value.__name__ = f"values {value}"
    return with_value


def _linked(link: Any) -> Callable[[h5py.File, str, np.ndarray], None]:
    def linked(file: h5py.File, dataset: str, old: np.ndarray) -> None:
        file[dataset] = link

    linked.__name__ = f"link {type(link).__name__} {link.path}"
    return linked


def _elsewhere(file: h5py.File, dataset: str, old: np.ndarray) -> None:
    """The bytes stand in another file."""
    size = int(np.prod(old.shape)) * 4
    file.create_dataset(dataset, old.shape, "f4", external=[(f"{OUTSIDE}/secret.dat", 0, size)])


def _virtual(file: h5py.File, dataset: str, old: np.ndarray) -> None:
    layout = h5py.VirtualLayout(old.shape, "f4")
    layout[:] = h5py.VirtualSource(f"{OUTSIDE}/secret.h5", "group/x", old.shape)
    file.create_virtual_dataset(dataset, layout)


def _bomb(file: h5py.File, dataset: str, old: np.ndarray) -> None:
    """Chunks of 40 MB that take 40 KB."""
    created = file.create_dataset(dataset, (4, 10**7), "f4", chunks=(1, 10**7), compression="gzip")
    created[0] = 0


def _text(file: h5py.File, dataset: str, old: np.ndarray) -> None:
    values = ["x" * 100_000, "", "a\nb", "../../x", "\u202e"] * (len(old) // 5 + 1)
    file[dataset] = np.array(values[: len(old)], h5py.string_dtype())


def _no_text(file: h5py.File, dataset: str, old: np.ndarray) -> None:
    file[dataset] = np.array([b"\xff\xfe"] * len(old), "S5")


def _group(file: h5py.File, dataset: str, old: np.ndarray) -> None:
    """Groups in one another, and one that holds itself."""
    group = file.create_group(dataset)
    group["self"] = group
    for _ in range(200):
        group = group.create_group("g")


def _null(file: h5py.File, dataset: str, old: np.ndarray) -> None:
    file[dataset] = h5py.Empty("f4")


def _scaled(file: h5py.File, dataset: str, old: np.ndarray) -> None:
    """With filters of HDF5's own."""
    file.create_dataset(dataset, old.shape, "i4", scaleoffset=4, shuffle=True, fletcher32=False, compression="lzf")


TWISTS: tuple[Callable[[h5py.File, str, np.ndarray], None], ...] = (
    _shape(3, 2, 2**40, chunks=(1, 1, 1024)),
    _shape(2**40, 4096, 12, chunks=(1, 64, 12)),
    _shape(2**32),
    _shape(3, 10**8, 12, chunks=(1, 2**20, 12)),
    _shape(3, 990_000, 12, chunks=(1, 2**19, 12)),
    _shape(3, 2, 5_900_000, chunks=(1, 2, 5_900_000)),
    _shape(0, 2, 9, chunks=(1, 2, 9)),
    _shape(3, 0, 2),
    _shape(),
    _shape(*(1,) * 30),
    *(_type(kind) for kind in ("f2", ">f8", "c8", "?", "u1", "i8", "u8", "V5", h5py.ref_dtype)),
    *(_type(kind) for kind in (h5py.vlen_dtype("f4"), h5py.string_dtype(), [("a", "f4"), ("b", "i2")], "S3")),
    *(map(_values, (np.nan, np.inf, -np.inf, 1e308, 1e-310, 1e30, -32768, 9e18))),
    _linked(h5py.ExternalLink(f"{OUTSIDE}/secret.h5", "/group/x")),
    _linked(h5py.ExternalLink("/dev/zero", "/group/x")),
    _linked(h5py.SoftLink("/nowhere")),
    _linked(h5py.SoftLink("/tracings")),
    _elsewhere,
    _virtual,
    _bomb,
    _text,
    _no_text,
    _group,
    _null,
    _scaled,
)
