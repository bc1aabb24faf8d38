"""What a run survives: SIGKILL at any moment, a full disk, a directory that cannot be written."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import write_wfdb16

from ecgfm.files import digest_of
from ecgfm.stages import Store

RUN = """
import sys
from pathlib import Path
import ecgfm.processes
ecgfm.processes.RECORDS_PER_PROCESS = 20  # so that this little is work for several processes
from ecgfm.config import Pipeline, PrepareConfig
from ecgfm.pipeline import Selection
from ecgfm.runs import run_locally
from ecgfm.stages import Store
if __name__ == "__main__":
    raw, data_dir = map(Path, sys.argv[1:])
    pipeline = Pipeline(sources=("physionet2021",), prepare=PrepareConfig(workers=2))
    run_locally("kill", pipeline, {"physionet2021": raw}, Store(data_dir), Selection(only=("list", "prepare")))
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folders: one large for several processes within, two small."""
    folder = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    for dataset, n_records in (("georgia", 160), ("ningbo", 30), ("ptb", 30)):
        for number in range(n_records):
            digital = rng.integers(-900, 900, (12, 5000)).astype(np.int16)
            write_wfdb16(folder / "training" / dataset / "g1", f"{dataset[0]}{dataset[1]}{number:03d}", digital)
    return folder


def run(script: Path, raw: Path, data_dir: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(script), str(raw), str(data_dir)],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def outputs(data_dir: Path) -> dict[str, str]:
    """Key -> digest of every finished stage, each file hashed."""
    found = {}
    for manifest in (data_dir / "stages").glob("*/*/stage.json"):
        facts = Store(data_dir, verify=True)._facts(manifest.parent)
        assert not isinstance(facts, str), facts
        found[f"{manifest.parent.parent.name}/{manifest.parent.name}"] = facts["digest"]
    return found


def test_killed_at_random_moments_and_run_again_the_bytes_are_the_same(raw: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    started = time.monotonic()
    undisturbed = run(script, raw, tmp_path / "once")
    assert undisturbed.wait(120) == 0, undisturbed.stderr.read() if undisturbed.stderr else ""
    whole_s = time.monotonic() - started
    expected = outputs(tmp_path / "once")
    assert len(expected) == 4  # the list and three slices

    moments = random.Random(4)
    killed = 0
    for _ in range(4):
        child = run(script, raw, tmp_path / "killed")
        time.sleep(moments.uniform(0.4, 1.0) * whole_s)
        if child.poll() is None:
            killed += 1
            child.send_signal(signal.SIGKILL)  # the parent alone: its workers must notice
        child.wait()
    last = run(script, raw, tmp_path / "killed")
    assert last.wait(120) == 0
    assert killed, "every run ended before it was killed"
    assert outputs(tmp_path / "killed") == expected
    assert digest_of(expected)
    assert not list((tmp_path / "killed").rglob("*.partial"))


def limited_run(raw: Path, data_dir: Path, max_bytes: int) -> subprocess.CompletedProcess[str]:
    """`ecgfm run` where no file may grow beyond `max_bytes`: what a full disk does, without one."""
    command = [sys.executable, "-m", "flows.cli", "run", "challenge-2021-small", "--raw", f"physionet2021={raw}"]
    return subprocess.run(
        [*command, "--data-dir", str(data_dir), "--no-prefect", "--only", "list", "--only", "prepare"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes)),
    )


@pytest.mark.parametrize("max_bytes", [1_000, 1_000_000])
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing_half_made(
    raw: Path, tmp_path: Path, max_bytes: int
) -> None:
    stopped = limited_run(raw, tmp_path, max_bytes)
    assert stopped.returncode == 1, stopped.stderr
    assert len(stopped.stderr.splitlines()) == 1
    assert "File too large" in stopped.stderr
    assert "run the same command again" in stopped.stderr
    assert not list(tmp_path.rglob("*.partial"))
    kept = outputs(tmp_path)
    again = limited_run(raw, tmp_path, 100_000_000)
    assert again.returncode == 0, again.stderr
    assert kept.items() <= outputs(tmp_path).items()
    assert len(outputs(tmp_path)) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_data_directory_that_cannot_be_written_is_one_line(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o500)
    stopped = limited_run(raw, tmp_path / "data", 100_000_000)
    assert stopped.returncode == 2
    assert "cannot be written" in stopped.stderr
