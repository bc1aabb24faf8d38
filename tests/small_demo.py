"""The whole line in half a minute, for tests that run it as a user does, kill it, or take its disks away.

Run as a script this file is the command line `ecgfm`, except that 20 records are work for a process.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ecgfm.files import sha256_of

PIPELINES = """
small: &small
  sources: [synthetic]
  synthetic: {n_patients: 24}
  prepare: {workers: 2}
  splits: {valid_share: 0.2, test_share: 0.25, seed: 10}
  labels: &labels
    scheme: codes
    codes: {sinus rhythm: ["426783006"], premature ventricular contraction: ["427172004"]}
  manifests: {rare_labels: drop}
  pretrain:
    model: {conv_channels: 8, conv_kernels: [4, 2, 2, 2], conv_strides: [4, 2, 2, 2], width: 32, n_layers: 1,
      n_heads: 2, ffn_width: 32, pos_conv_kernel: 8, pos_conv_groups: 4, codebook_entries: 8, codebook_width: 16,
      contrast_width: 16}
    max_steps: 30
    batch_pairs: 4
    accumulate: 1
    precision: fp32
    span_mask_frames: 5
    n_negatives: 10
    valid_every: 15
    save_every: 5
    device: cpu
  finetune: {precision: fp32, max_epochs: 3, batch_size: 8, device: cpu}
  evaluate: {bootstrap_samples: 50, device: cpu}

other:
  <<: *small
  labels: {<<: *labels, codes: {sinus rhythm: ["426783006"], sinus bradycardia: ["426177001"]}}
"""
"""`other` has labels of its own: everything up to them, and the pretrained encoder, is what `small` has too."""

STAGES = 11  # of either, the two slices counted
MARK = "ECGFM_TEST_MARK"  # environment variable: every process of a run can be known by it


def write_pipelines(folder: Path) -> Path:
    """The pipelines file, in a folder."""
    file = folder / "pipelines.yaml"
    file.write_text(PIPELINES)
    return file


def words(*given: str | Path) -> list[str]:
    """The command line of `ecgfm`, for subprocess."""
    return [sys.executable, __file__, *map(str, given)]


def environment(mark: str = "") -> dict[str, str]:
    """This process's, without what sets Prefect up; every process started with it can be found by its `mark`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    return kept | {MARK: mark}


def marked(mark: str) -> list[int]:
    """The processes that live with this mark."""
    sign = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended just now
            if sign in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def kill_marked(mark: str) -> None:
    """SIGKILL to all of them, until there is none."""
    while found := marked(mark):
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)


def wait_until_gone(mark: str, patience_s: float) -> list[int]:
    """The processes with this mark that still live after a while."""
    deadline = time.monotonic() + patience_s
    while (found := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def outputs(data_dir: Path) -> dict[str, dict[str, str]]:
    """`<name> <key>` -> file -> SHA-256 of what lies there now, of every finished stage; times and logs left out."""
    found = {}
    for manifest in (data_dir / "stages").glob("*/*/stage.json"):
        facts = json.loads(manifest.read_bytes())
        files = {name: sha256_of(manifest.parent / name) for name in facts["files"]}
        assert files == {name: file["sha256"] for name, file in facts["files"].items()}, "the bytes are not as written"
        steady = {name: sha for name, sha in files.items() if not facts["files"][name].get("volatile")}
        found[f"{facts['name']} {facts['key']}"] = steady
    return found


def is_locked(lock: Path) -> bool:
    """Whether somebody holds it."""
    with open(lock, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def locked(data_dir: Path) -> list[Path]:
    """The locks that somebody goes on holding: a killed process lets go of its memory first, and then of these."""
    locks = [*(data_dir / "stages" / ".locks").iterdir(), *(data_dir / "runs").glob("*/*/.lock")]
    deadline = time.monotonic() + 10
    while (held := [lock for lock in locks if is_locked(lock)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return held


def half_made(data_dir: Path) -> list[Path]:
    """What a stage that ended badly would leave."""
    return [*data_dir.glob("stages/*/*.partial"), *data_dir.glob("stages/*/*.stale-*")]


class Run:
    """`ecgfm run` of the small demo, going on."""

    def __init__(self, command: list[str], mark: str = "") -> None:
        self.lines: list[str] = []
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would stop it
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment(mark),
            start_new_session=True,
        )

    def until(self, *words: str) -> bool:
        """Wait until it prints a line with one of these words; whether it did before it ended."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if any(word in line for word in words):
                return True
        return False

    def end(self) -> int:
        """Wait for its end; its exit code."""
        assert self.process.stdout
        self.lines += [line.strip() for line in self.process.stdout]
        return self.process.wait(300)

    def errors(self) -> str:
        """What it has written to standard error."""
        self._errors.seek(0)
        return self._errors.read()

    def one_line(self) -> str:
        """The one line that it ended with; no traceback came before it."""
        said = self.errors()
        assert len(said.splitlines()) == 1, said
        (line,) = said.splitlines()
        assert not any("Traceback" in said for said in self.lines), self.lines
        return line


MOMENTS = {
    "prepare": "prepare synthetic challenge-2021",
    "pretrain": "pretrain: step 0",
    "finetune": "finetune: to make",
    "evaluate": "evaluate: to make",
}
"""Stage -> what a run prints when it is about to make, or has begun to make it."""


class Mounts:
    """A place of one's own for mounts: what is mounted in it nobody else sees, and the kernel takes it away at the end.

    Paths are of a process in it; `seen` gives such a path as everybody sees it.
    """

    def __init__(self) -> None:
        command = ["unshare", "--mount", "--propagation", "private", "sleep", "infinity"]
        self._holder = subprocess.Popen(command)

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command within."""
        return subprocess.run(
            self.within(*command), capture_output=True, text=True, check=check, env=environment(), timeout=300
        )

    def within(self, *command: str | Path) -> list[str]:
        """The words that run a command within."""
        return ["nsenter", "--mount", "--target", str(self._holder.pid), *map(str, command)]

    def seen(self, path: Path) -> Path:
        """A path within as it is seen from without."""
        return Path(f"/proc/{self._holder.pid}/root") / path.relative_to("/")

    def close(self) -> None:
        """Everything that is mounted goes."""
        self._holder.kill()
        self._holder.wait()


@contextmanager
def mounts() -> Iterator[Mounts | None]:
    """A place for mounts; None where this user may have none."""
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("nsenter"):
        yield None
        return
    place = Mounts()
    try:
        time.sleep(0.2)
        allowed = place._holder.poll() is None
        yield place if allowed else None
    finally:
        place.close()


if __name__ in ("__main__", "__mp_main__"):  # this script, or a process that it spawned
    import ecgfm.processes

    ecgfm.processes.RECORDS_PER_PROCESS = 20

if __name__ == "__main__":
    from flows.__main__ import main

    main()
