"""The stage store: killed, damaged, moved, contended for; and what its keys are made of.

The stages are those of a toy package in a temporary folder, so that its code can be edited.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ecgfm.ecg import InputError
from ecgfm.fingerprints import Input, RawTree, code_digests
from ecgfm.stages import Output, Request, Stage, StageFailed, Store

TOY = {
    "__init__.py": "",
    "stages.py": '''
        """Toy stages."""
        import os, signal, subprocess, sys, time
        from pathlib import Path
        from ecgfm.ecg import InputError
        from toy.helper import line

        def say(*words):
            with open(os.environ["TOY_LOG"], "a") as log:
                print(*words, file=log, flush=True)

        def write(inputs, config, out):
            """Write."""
            say("write", sorted(path.name for path in out.iterdir()))
            (out / "first.txt").write_text(line(config.word))
            if Path(os.environ.get("TOY_DEADLY", "/nowhere")).exists():
                os.kill(os.getpid(), signal.SIGKILL)
            (out / "below").mkdir(exist_ok=True)
            (out / "below" / "second.bin").write_bytes(bytes(range(100)))
            (out / "times.jsonl").write_text(str(time.time_ns()))
            return {"lines": 1}

        def copy(inputs, config, out):
            say("copy")
            (out / "copy.txt").write_text(inputs["text"].read_text().upper())

        def slow(inputs, config, out):
            say("slow", os.getpid())
            for number in range(20):
                (out / f"{number}.txt").write_text("x")
                time.sleep(0.03)

        def hang(inputs, config, out):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
            say("hang", os.getpid(), child.pid)
            time.sleep(300)

        def refuse(inputs, config, out):
            (out / "half.txt").write_text("half")
            raise InputError("expected a word, found none")

        def crash(inputs, config, out):
            print("up to here")
            raise KeyError("no such word")
    ''',
    "helper.py": '''
        """Words."""
        GREETING = "hello"
        """How a line begins."""

        def line(word: str) -> str:
            """One line."""
            from toy.deep import END

            return f"{GREETING} {word}{END}"
    ''',
    "deep.py": 'END = "\\n"\n',
    "elsewhere.py": "OTHER = 1\n",
}

WRITE = Stage("write", "toy.stages:write", volatile=("times.jsonl",))
RESUMABLE = Stage("resumable", "toy.stages:write", volatile=("times.jsonl",), resumable=True)
COPY = Stage("copy", "toy.stages:copy")
SLOW = Stage("slow", "toy.stages:slow")
HANG = Stage("hang", "toy.stages:hang")
REFUSE = Stage("refuse", "toy.stages:refuse")
CRASH = Stage("crash", "toy.stages:crash")
FILES = {"first.txt": b"hello x\n", "below/second.bin": bytes(range(100))}

PRELUDE = """
import os, sys
from pathlib import Path
from test_stages import *
"""


@dataclass(frozen=True)
class Config:
    """A toy stage's values."""

    word: str = "x"
    rate: float = 500.0
    workers: int = 0
    OPERATIONAL: ClassVar[frozenset[str]] = frozenset({"workers"})


def request(stage: Stage = WRITE, config: Any = Config(), subject: str = "", **inputs: Input) -> Request:
    return Request(stage, inputs, config, subject)


def write_toy(folder: Path) -> None:
    (folder / "toy").mkdir(parents=True)
    for name, text in TOY.items():
        (folder / "toy" / name).write_text(textwrap.dedent(text))


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The toy package, importable in this process."""
    folder = tmp_path_factory.mktemp("package")
    write_toy(folder)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def log(tmp_path: Path, toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the toy stages said so far; they can run here and in processes started from here."""
    monkeypatch.setenv("PYTHONPATH", f"{toy_folder}{os.pathsep}{Path(__file__).parent}")
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("TOY_DEADLY", str(tmp_path / "deadly"))
    return lambda: (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []


@pytest.fixture
def store(tmp_path: Path, log: Any) -> Store:
    return Store(tmp_path / "data")


def start(code: str, **kwargs: Any) -> subprocess.Popen[str]:
    """Python code in a process of its own, with everything of this module in scope."""
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def run(code: str, expect: int = 0, **kwargs: Any) -> str:
    """The last line that the code prints."""
    process = start(code, **kwargs)
    out, err = process.communicate(timeout=60)
    assert process.returncode == expect, err
    return out.strip().rpartition("\n")[2]


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"nothing after {seconds} s")


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file that does not differ from run to run."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("stage.json", "times.jsonl")
    }


def neighbours(place: Path) -> set[str]:
    """What lies beside an output: nothing, where everything went well."""
    return {path.name for path in place.parent.iterdir()} - {place.name}


# ---- made once


def test_what_is_there_is_not_made_again(store: Store, log: Callable[[], list[str]]) -> None:
    assert store.find(request()) is None
    made = store.make(request())
    assert not made.cached
    assert content(made.directory) == FILES
    assert made.counts == {"lines": 1}
    assert set(made.files) == set(FILES), "volatile files are in no digest"
    again = store.make(request())
    assert again.cached
    assert (again.directory, again.files, again.counts) == (made.directory, made.files, made.counts)
    assert log() == ["write []"]
    assert neighbours(made.directory) == set()


def test_forced_it_is_made_although_it_is_there(store: Store, log: Callable[[], list[str]]) -> None:
    first = store.make(request())
    (first.directory / "first.txt").write_text("hello y\n")  # as large as before: only force or verify help
    assert store.make(request()).cached
    second = store.make(request(), force=True)
    assert not second.cached
    assert second.directory == first.directory
    assert content(second.directory) == FILES
    assert log() == ["write []", "write []"], "forced, it starts from nothing"
    assert neighbours(second.directory) == set()


def test_two_processes_at_once_make_it_once(store: Store, log: Callable[[], list[str]]) -> None:
    code = f"""
        import logging
        logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
        print(Store(Path({str(store.data_dir)!r})).make(request(SLOW)).cached)
        """
    both = [start(code), start(code)]
    said = sorted(process.communicate(timeout=60)[0].strip() for process in both)
    assert said == ["False", f"waiting for another process, which makes slow-{request(SLOW).key}\nTrue"]
    assert len(log()) == 1
    assert len(content(store.place(request(SLOW)))) == 20


def test_a_reader_sees_all_of_it_or_nothing(store: Store, log: Callable[[], list[str]]) -> None:
    place = store.place(request(SLOW))
    writer = start(f"Store(Path({str(store.data_dir)!r})).make(request(SLOW))")
    sizes = set()
    while writer.poll() is None:
        sizes.add(len(os.listdir(place)) if place.exists() else 0)
        found = store.find(request(SLOW))
        assert found is None or len(content(found.directory)) == 20
        if log():
            sizes.add(-1)  # it was being written while we looked
    writer.communicate()
    assert writer.returncode == 0
    assert {0, -1} <= sizes <= {0, -1, 21}


# ---- killed


@pytest.mark.parametrize("stage", [WRITE, RESUMABLE], ids=lambda stage: stage.name)
def test_a_stage_killed_half_way_is_made_whole_by_the_next_run(
    store: Store, log: Callable[[], list[str]], tmp_path: Path, stage: Stage
) -> None:
    (tmp_path / "deadly").touch()
    run(f"Store(Path({str(store.data_dir)!r})).make(request({stage.name.upper()}))", expect=-signal.SIGKILL)
    place = store.place(request(stage))
    assert not place.exists()
    assert store.find(request(stage)) is None
    (tmp_path / "deadly").unlink()
    made = store.make(request(stage))
    assert content(made.directory) == FILES
    assert neighbours(place) == set()
    handed_over = "['first.txt']" if stage.resumable else "[]"
    assert log() == ["write []", f"write {handed_over}"]


def test_forced_even_a_resumable_stage_starts_from_nothing(
    store: Store, log: Callable[[], list[str]], tmp_path: Path
) -> None:
    (tmp_path / "deadly").touch()
    run(f"Store(Path({str(store.data_dir)!r})).make(request(RESUMABLE))", expect=-signal.SIGKILL)
    (tmp_path / "deadly").unlink()
    store.make(request(RESUMABLE), force=True)
    assert log() == ["write []", "write []"]


@pytest.mark.parametrize("nth", [1, 2])
def test_killed_while_it_replaces_an_older_output_it_is_whole_after_the_next_run(store: Store, nth: int) -> None:
    place = store.make(request()).directory
    run(
        f"""
        real, calls = os.rename, []
        def rename(*paths):
            calls.append(paths)
            if len(calls) == {nth}:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*paths)
        os.rename = rename
        Store(Path({str(store.data_dir)!r})).make(request(), force=True)
        """,
        expect=-signal.SIGKILL,
    )
    assert neighbours(place), "it was killed with something beside it"
    found = store.find(request())
    assert (found is not None) == (nth == 1), "the older output stays until the new one is complete"
    made = store.make(request(), force=True)
    assert content(made.directory) == FILES
    assert neighbours(place) == set()


def test_a_killed_holder_of_the_lock_does_not_block_the_next(store: Store, log: Callable[[], list[str]]) -> None:
    holder = start(f"Store(Path({str(store.data_dir)!r})).make(request(SLOW))")
    wait_for(log)
    holder.kill()
    holder.communicate()
    assert len(content(store.make(request(SLOW)).directory)) == 20
    assert len(log()) == 2


def test_a_stage_that_refuses_leaves_nothing_half_written(store: Store) -> None:
    with pytest.raises(InputError, match="expected a word, found none"):
        store.make(request(REFUSE))
    assert list((store.data_dir / "stages" / "refuse").iterdir()) == []


# ---- damaged


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "deleted": (lambda place: (place / "first.txt").unlink(), "output damaged: first.txt is missing"),
    "truncated": (
        lambda place: os.truncate(place / "below/second.bin", 60),
        "output damaged: below/second.bin has 60 bytes instead of 100",
    ),
    "folder gone": (lambda place: shutil.rmtree(place / "below"), "output damaged: below/second.bin is missing"),
    "manifest gone": (lambda place: (place / "stage.json").unlink(), "output damaged: stage.json is missing"),
    "manifest cut": (lambda place: os.truncate(place / "stage.json", 50), "output damaged: stage.json does not parse"),
    "all gone": (shutil.rmtree, "never made"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_output_is_made_again_and_what_reads_it_is_not(
    store: Store, log: Callable[[], list[str]], damage: str
) -> None:
    first = store.make(request())
    store.make(request(COPY, text=first.file("first.txt")))
    harm, why = DAMAGES[damage]
    harm(first.directory)
    assert store.find(request()) is None
    assert store.explain(request()) == why
    mended = store.make(request())
    assert not mended.cached
    assert content(mended.directory) == FILES
    assert store.make(request(COPY, text=mended.file("first.txt"))).cached, "equal content: nothing to do downstream"
    assert log() == ["write []", "copy", "write []"]
    assert store.explain(request()) == ""


def test_a_flipped_bit_is_found_on_request(store: Store) -> None:
    place = store.make(request()).directory
    flipped = bytearray((place / "below/second.bin").read_bytes())
    flipped[7] ^= 1
    (place / "below/second.bin").write_bytes(flipped)
    assert store.find(request()) is not None, "sizes alone do not tell"
    careful = Store(store.data_dir, verify=True)
    assert careful.find(request()) is None
    assert careful.explain(request()) == "output damaged: below/second.bin has other bytes than were written"
    assert content(careful.make(request()).directory) == FILES
    assert careful.make(request()).cached


def test_a_file_of_the_manifests_name_in_a_subfolder_is_a_file_like_any_other(tmp_path: Path, store: Store) -> None:
    made = store.make(Request(Stage("nested", "test_stages:write_nested"), {}))
    assert set(made.files) == {"below/stage.json"}


def write_nested(inputs: object, config: object, out: Path) -> None:
    (out / "below").mkdir()
    (out / "below" / "stage.json").write_text("{}")


def test_a_data_directory_may_be_moved(store: Store, tmp_path: Path) -> None:
    first = store.make(request())
    second = store.make(request(COPY, text=first.file("first.txt")))
    moved = Store(tmp_path / "elsewhere" / "data", verify=True)
    moved.data_dir.parent.mkdir()
    store.data_dir.rename(moved.data_dir)
    found = moved.make(request())
    assert found.cached
    assert found.files == first.files
    assert moved.make(request(COPY, text=found.file("first.txt"))).cached
    for output in (first, second):
        facts = (moved.place(request()).parent.parent / output.directory.parent.name / output.directory.name).glob("*")
        assert not any(str(tmp_path).encode() in path.read_bytes() for path in facts if path.is_file())


@pytest.mark.parametrize("in_the_way", ["data", "data/stages", "data/stages/write", "data/stages/.locks"])
def test_a_data_directory_that_cannot_be_written_is_one_clear_line(store: Store, in_the_way: str) -> None:
    path = store.data_dir.parent / in_the_way
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file in the way")
    with pytest.raises(InputError, match=r"the data directory cannot be written: .*; choose another with --data-dir"):
        store.make(request())
    assert store.explain(request()) == "never made"


# ---- keys


def key_of_copy(path: Path) -> str:
    return run("print(request().key)", env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{Path(__file__).parent}"})


EDITS: dict[str, tuple[str, str, str, bool]] = {
    "a comment": ("helper.py", "def line", "# said first\ndef line", False),
    "layout": ("helper.py", 'GREETING = "hello"', "GREETING = (\n    'hello'\n)", False),
    "the module's docstring": ("helper.py", '"""Words."""', '"""Other words."""', False),
    "a function's docstring": ("helper.py", '"""One line."""', '"""A line."""', False),
    "a docstring less": ("helper.py", '"""One line."""', "", False),
    "an attribute's docstring": ("helper.py", '"""How a line begins."""', '"""The beginning."""', False),
    "a module that is not imported": ("elsewhere.py", "OTHER = 1", "OTHER = 2", False),
    "the stage": ("stages.py", '{"lines": 1}', '{"lines": 2}', True),
    "a helper": ("helper.py", '"hello"', '"good day"', True),
    "a helper's helper, imported in a function": ("deep.py", r'"\n"', r'"\n\n"', True),
}


@pytest.mark.parametrize("what", EDITS)
def test_the_key_changes_with_code_that_is_used_and_with_nothing_else(
    tmp_path: Path, log: object, toy_folder: Path, what: str
) -> None:
    file, before, after, matters = EDITS[what]
    write_toy(tmp_path)
    text = (tmp_path / "toy" / file).read_text()
    assert text.count(before) == 1
    (tmp_path / "toy" / file).write_text(text.replace(before, after))
    assert (key_of_copy(tmp_path) != request().key) == matters


def test_of_a_table_of_alternatives_only_the_chosen_ones_code_counts(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = frozenset({"toy.stages"})
    without = code_digests("toy.stages", (), table)
    assert set(without) == {"toy.stages"}
    assert set(code_digests("toy.stages", ("toy.helper",), table)) == {"toy.stages", "toy.helper", "toy.deep"}
    assert set(code_digests("toy.stages")) == {"toy.stages", "toy.helper", "toy.deep"}


def test_the_key_is_the_same_in_another_process_and_at_another_place(
    tmp_path: Path, store: Store, toy_folder: Path
) -> None:
    keys = set()
    for seed, place in (("0", "here"), ("1", "there/deeper")):
        root = tmp_path / place
        write_toy(root)
        for folder in ("b", "a"):
            (root / "raw" / folder).mkdir(parents=True)
            (root / "raw" / folder / "one.dat").write_bytes(b"123")
            os.utime(root / "raw" / folder / "one.dat", ns=(10**18, 10**18))
        keys.add(
            run(
                f"""
                raw = RawTree.scan(Path({str(root)!r}) / "raw", "toy")
                made = Store(Path({str(root)!r}) / "data").make(request(text=raw.everything()))
                copied = Request(COPY, {{"text": [made.file("first.txt"), raw.by_slice(["a"])["a"]]}}, Config())
                print(request(text=raw.everything()).key, copied.key)
                """,
                cwd=root,
                env={
                    **os.environ,
                    "PYTHONHASHSEED": seed,
                    "PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parent}",
                },
            )
        )
    assert len(keys) == 1
    assert re.fullmatch("[0-9a-f]{32} [0-9a-f]{32}", keys.pop())


def test_the_key_has_the_values_that_decide_the_content_and_no_others() -> None:
    key = request().key
    assert request(config=Config(workers=8)).key == key
    assert request(config=Config(word="y")).key != key
    assert request(config=Config(rate=250.0)).key != key
    assert request(subject="a").key != key
    assert request(Stage("write", "toy.stages:write", version=2)).key != key


def test_the_order_of_a_mapping_is_in_the_key() -> None:
    """The order of `labels.codes` is the order of the label columns."""
    assert request(config={"a": 1, "b": 2}).key != request(config={"b": 2, "a": 1}).key


def test_equal_content_from_another_key_leaves_what_reads_it_cached(store: Store, log: Callable[[], list[str]]) -> None:
    first, other_rate = store.make(request()), store.make(request(config=Config(rate=250.0)))
    assert first.directory != other_rate.directory
    store.make(request(COPY, text=first.file("first.txt")))
    assert store.make(request(COPY, text=other_rate.file("first.txt"))).cached
    other_word = store.make(request(config=Config(word="y")))
    assert not store.make(request(COPY, text=other_word.file("first.txt"))).cached
    assert first.select("*").digest == other_rate.select("*").digest, "times differ, content does not"
    assert first.select("below/*").digest == other_word.select("below/*").digest
    assert first.select("*").digest != other_word.select("*").digest


def test_a_file_that_no_stage_wrote_cannot_be_read(store: Store) -> None:
    with pytest.raises(InputError, match=r"no file matches cmsc_\*"):
        store.make(request()).select("cmsc_*")


def test_what_a_stage_wrote_is_another_ones_raw_folder(store: Store) -> None:
    made = store.make(request())
    of_slice = made.as_raw().by_slice(["below"])["below"]
    assert of_slice.path == made.directory
    other = store.make(request(config=Config(word="y")))
    assert other.as_raw().by_slice(["below"])["below"].digest == of_slice.digest
    assert other.as_raw().everything().digest != made.as_raw().everything().digest


# ---- why


def test_why_a_stage_is_to_run_is_said_in_words(store: Store, raw_tree: Path) -> None:
    def with_raw(config: Config = Config(), stage: Stage = WRITE) -> Request:
        return request(stage, config, text=RawTree.scan(raw_tree, "toy").everything())

    assert store.explain(with_raw()) == "never made"
    assert store.explain(request(subject="slice a")) == "new"
    store.make(with_raw())
    assert store.explain(with_raw()) == ""
    assert store.explain(with_raw(Config(rate=250.0))) == "config write.rate 500 -> 250"
    assert store.explain(with_raw(Config("y", 250.0))) == "config write.rate 500 -> 250; config write.word x -> y"
    assert store.explain(with_raw(stage=Stage("write", "toy.stages:write", version=2))) == "stage version 1 -> 2"
    assert store.explain(with_raw(stage=Stage("write", "toy.helper:line"))) == "code of toy.stages changed"
    for name in "defg":
        (raw_tree / name).mkdir()
        (raw_tree / name / "9.dat").touch()
    assert store.explain(with_raw()) == "4 new folders (d, e, f, ...)"
    os.utime(raw_tree / "a/deep/3.dat", ns=(1, 1))
    shutil.rmtree(raw_tree / "b")
    shutil.rmtree(raw_tree / "e")
    assert store.explain(with_raw()) == "3 new folders (d, f, g); 1 changed folder (a/deep); 1 removed folder (b)"
    store.make(with_raw(Config("z")))
    assert store.explain(with_raw()) == "config write.word z -> x", "compared with the nearest of the past"


def test_a_changed_input_is_named(store: Store) -> None:
    first, other = store.make(request()), store.make(request(config=Config(word="y")))
    store.make(request(COPY, text=first.file("first.txt")))
    assert store.explain(request(COPY, text=other.file("first.txt"))) == "write came out different"


def test_changed_code_is_named(store: Store, log: object, tmp_path: Path) -> None:
    store.make(request())
    write_toy(tmp_path)
    (tmp_path / "toy" / "deep.py").write_text('END = "!"\n')
    why = run(
        f"print(Store(Path({str(store.data_dir)!r})).explain(request()))",
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parent}"},
    )
    assert why == "code of toy.deep changed"


# ---- processes


def test_a_stage_in_a_process_of_its_own_gives_the_same(store: Store, tmp_path: Path) -> None:
    made = store.make_in_own_process(request())
    assert not made.cached
    assert content(made.directory) == FILES
    assert store.make_in_own_process(request()).cached
    here = Store(tmp_path / "other").make(request())
    assert (here.files, here.directory.name) == (made.files, made.directory.name)


def test_what_it_refuses_arrives_as_it_was_said(store: Store) -> None:
    with pytest.raises(InputError) as refused:
        store.make_in_own_process(request(REFUSE))
    assert str(refused.value) == "expected a word, found none"


def test_a_crash_and_a_kill_are_told_apart(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="crash: its process ended with exit code 1: KeyError: 'no such word'"):
        store.make_in_own_process(request(CRASH))
    (tmp_path / "deadly").touch()
    with pytest.raises(StageFailed, match="write: its process was killed by SIGKILL"):
        store.make_in_own_process(request())
    (tmp_path / "deadly").unlink()
    assert content(store.make_in_own_process(request()).directory) == FILES


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_no_process_of_a_stage_outlives_its_parent(
    store: Store, log: Callable[[], list[str]], how: signal.Signals
) -> None:
    parent = start(
        f"""
        import polars as pl
        pl.DataFrame({{"a": [1]}}).lazy().select("a").collect()  # from here on SIGINT is handled by Polars first
        Store(Path({str(store.data_dir)!r})).make_in_own_process(request(HANG))
        """
    )
    said = wait_for(log)[0]
    family = [int(pid) for pid in said.split()[1:]]
    assert len(family) == 2
    assert all(alive(pid) for pid in family)
    parent.send_signal(how)
    parent.communicate(timeout=30)
    wait_for(lambda: not any(alive(pid) for pid in family))


def test_several_processes_give_the_same_bytes_as_one(
    store: Store, tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    requests = [request(config=Config(word), subject=word) for word in ("p", "q", "r", "s")]
    alone = list(Store(tmp_path / "alone").make_many(requests, workers=1))
    store.make(requests[1])
    together = list(store.make_many(requests, workers=2))
    assert [output.cached for output in together] == [False, True, False, False]
    assert [output.name for output in together] == [request.name for request in requests]
    for one, other in zip(alone, together, strict=True):
        assert one.directory.name == other.directory.name
        assert one.files == other.files
        assert content(one.directory) == content(other.directory)
    assert len(log()) == 8
    assert all(output.cached for output in store.make_many(requests, workers=2))
    assert not any(output.cached for output in store.make_many(requests, workers=2, force=True))


def test_what_one_of_several_processes_refuses_arrives_as_it_was_said(store: Store) -> None:
    requests = [request(), request(REFUSE, subject="a"), request(REFUSE, subject="b")]
    with pytest.raises(InputError, match="expected a word, found none"):
        list(store.make_many(requests, workers=2))


def test_the_facts_of_an_output_stand_beside_it(store: Store) -> None:
    made: Output = store.make(request())
    facts = json.loads((made.directory / "stage.json").read_bytes())
    assert facts["key"] == made.directory.name == request().key
    assert facts["ingredients"] == json.loads(json.dumps(request().ingredients))
    assert facts["files"]["first.txt"]["bytes"] == len(FILES["first.txt"])
    assert facts["files"]["times.jsonl"]["volatile"]
    assert facts["counts"] == {"lines": 1}
    assert {"python", "ecgfm", "numpy"} <= set(facts["versions"])
