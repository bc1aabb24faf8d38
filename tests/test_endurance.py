"""Killed at random moments, and several at once: in the end the same bytes, no lock held, no process left.

ECGFM_ENDURANCE=20 kills twenty times instead of four, ECGFM_ENDURANCE_PREFECT=1 under Prefect's own temporary server
(10 to 20 s a run), and ECGFM_ENDURANCE_TABLE=FILE writes down what was seen.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import small_demo
from small_demo import Run, half_made, locked, outputs

from ecgfm.runs import find_runs

KILLS = int(os.environ.get("ECGFM_ENDURANCE", "4"))
A_ROUND = 4  # kills of one data directory before its last run is left alone
PREFECT = bool(os.environ.get("ECGFM_ENDURANCE_PREFECT"))
PATIENCE_S = 45  # until the children of a killed parent are gone: training saves first, for 30 s at most


@dataclass
class Kill:
    """What was seen of one kill. left: half-made; found: what the run after it found whole"""

    number: int
    who: str
    after_s: float
    stage: str
    left: str
    found: str

    def row(self) -> str:
        """A row of a table in Markdown."""
        cells = (self.number, self.who, f"{self.after_s:.1f}", self.stage, self.left, self.found)
        return f"| {' | '.join(map(str, cells))} |"


STAGES = ("synthesize", "list synthetic", "prepare synthetic", "audit", "manifests", "pretrain", "finetune", "evaluate")


BEGUN = {
    "pretrain": ("pretrain: step", "pretrain: going on", "pretrain: cached"),
    "finetune": ("finetune: epoch", "finetune: going on", "finetune: cached"),
}
"""Stage -> what a run prints when it is in the midst of it; of the others, and of evaluate, their name will do."""


def making(run: Run) -> str:
    """What a run was making, from what it printed."""
    begun = [line for line in run.lines if ": to make:" in line or ": made in" in line]
    name, _, rest = begun[-1].partition(": ") if begun else ("start", "", "")
    name = "prepare" if "prepare" in name else name.split()[0]
    return f"after {name}" if rest.startswith("made") else name


@pytest.mark.timeout(300 + 60 * KILLS)  # of which half a minute a kill on two quiet cores
def test_killed_at_random_moments_the_next_run_ends_at_the_same_bytes(tmp_path: Path, undisturbed: Path) -> None:
    """SIGKILL to every process of a run, or to its parent alone, whose children then end by themselves."""
    facts = json.loads((undisturbed / "runs" / "small" / "latest" / "run.json").read_bytes())
    seconds = {name: sum(s.get("seconds", 0) for s in facts["stages"] if s["name"].startswith(name)) for name in STAGES}
    expected = outputs(undisturbed)
    assert len(expected) == small_demo.STAGES
    rng = random.Random(20)
    kills: list[Kill] = []
    file = small_demo.write_pipelines(tmp_path)
    rounds = 0
    while len(kills) < KILLS:
        rounds += 1
        data_dir = tmp_path / f"data{rounds}"
        how = [] if PREFECT else ["--no-prefect"]
        command = small_demo.words("run", "small", "--pipelines", file, "--data-dir", data_dir, *how)
        unseen: list[Kill] = []
        for stage in sorted(rng.sample(STAGES, A_ROUND), key=STAGES.index):
            mark = f"{data_dir}-{len(kills)}"
            run, started = Run(command, mark), time.monotonic()
            if not run.until(*BEGUN.get(stage, (stage,))):
                continue  # it was made before the kill before
            time.sleep(rng.uniform(0, 1.2 * seconds[stage] + 0.5) * (0.4 if stage in BEGUN else 1.0))
            after_s, alone = time.monotonic() - started, len(kills) % 2 == 1
            if alone:
                run.process.send_signal(signal.SIGKILL)
            else:
                small_demo.kill_marked(mark)
            was_killed = run.end() == -signal.SIGKILL
            assert small_demo.wait_until_gone(mark, PATIENCE_S) == [], f"orphans of a run killed while making {stage}"
            assert locked(data_dir) == []
            assert {one.state for one in find_runs(data_dir)} <= {"killed", "completed"}
            whole = outputs(data_dir)
            assert whole.items() <= expected.items()
            unseen = _seen_by(run, unseen)
            if was_killed:
                left = ", ".join(sorted(path.parent.name for path in half_made(data_dir))) or "nothing"
                found = f"{len(whole)} of {small_demo.STAGES} stages"
                kills.append(Kill(len(kills) + 1, "parent" if alone else "all", after_s, making(run), left, found))
                unseen.append(kills[-1])
        last = Run(command, f"{data_dir}-last")
        assert last.end() == 0, last.errors()
        _seen_by(last, unseen)
        assert outputs(data_dir) == expected
        assert (half_made(data_dir), locked(data_dir)) == ([], [])
        assert small_demo.wait_until_gone(f"{data_dir}-last", PATIENCE_S) == []
        # killed after its last stage a run leaves nothing to do: the next one is no run
        assert {one.state for one in find_runs(data_dir)} <= {"killed", "completed"}
        if table := os.environ.get("ECGFM_ENDURANCE_TABLE"):
            Path(table).write_text("".join(f"{kill.row()}\n" for kill in kills))


def _seen_by(run: Run, unseen: list[Kill]) -> list[Kill]:
    """Note where training went on after the kills before; those of which no run has told yet."""
    gone_on = [line.replace("going on", "goes on") for line in run.lines if "going on after step" in line]
    for kill in unseen if gone_on else []:
        kill.found += f"; {gone_on[0]}"
    return [] if gone_on else [kill for kill in unseen if kill.stage in ("pretrain", "finetune")]


def test_two_users_run_different_pipelines_and_one_of_them_twice_on_one_data_directory(
    tmp_path: Path, undisturbed: Path
) -> None:
    """What both need is made once; all come to what each comes to alone."""
    file = small_demo.write_pipelines(tmp_path)
    together = tmp_path / "together"
    runs = [
        Run(small_demo.words("run", name, "--pipelines", file, "--data-dir", together, "--no-prefect"), str(together))
        for name in ("small", "other", "small")
    ]
    for run in runs:
        assert run.end() == 0, run.errors()
        assert run.errors() == ""
    made = [line.split(": made in")[0] for run in runs for line in run.lines if ": made in" in line]
    assert sorted(made) == sorted(
        [
            *("synthesize", "list synthetic", "audit", "splits", "pretrain"),
            *(2 * ("labels", "manifests", "finetune", "evaluate")),
        ]
    )
    alone = tmp_path / "alone"
    shutil.copytree(undisturbed, alone, symlinks=True)
    other = Run(small_demo.words("run", "other", "--pipelines", file, "--data-dir", alone, "--no-prefect"))
    assert other.end() == 0, other.errors()
    assert "pretrain" not in {line.split(": made in")[0] for line in other.lines if ": made in" in line}
    assert outputs(together) == outputs(alone)
    assert len(outputs(together)) == small_demo.STAGES + 4
    assert (half_made(together), locked(together)) == ([], [])
    assert {run.state for run in find_runs(together)} == {"completed"}
    assert len(find_runs(together)) == 3
    assert small_demo.wait_until_gone(str(together), 5) == []


def test_under_prefect_the_keys_and_the_bytes_are_those_of_a_run_without_it(tmp_path: Path, undisturbed: Path) -> None:
    """Under the temporary server of the run, which ends with it."""
    command = ["run", "small", "--pipelines", small_demo.write_pipelines(tmp_path), "--data-dir", tmp_path / "data"]
    run = Run(small_demo.words(*command), str(tmp_path))
    assert run.end() == 0, run.errors()
    assert outputs(tmp_path / "data") == outputs(undisturbed)
    assert (half_made(tmp_path / "data"), locked(tmp_path / "data")) == ([], [])
    assert small_demo.wait_until_gone(str(tmp_path), PATIENCE_S) == []
