"""Pretraining learns, and stops and goes on as if it had never stopped."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from training_data import PRETRAIN, SEGMENT_SAMPLES, digests, rows, write_inputs

from ecgfm import checkpoints
from ecgfm import pretrain as stage
from ecgfm.config import AugmentConfig, PretrainConfig, to_dict
from ecgfm.data import Shards, load, standardise, visits_from
from ecgfm.distributed import World
from ecgfm.ecg import InputError
from ecgfm.fingerprints import Input
from ecgfm.losses import apply_lead_mask, sample_lead_mask
from ecgfm.model import PretrainModel
from ecgfm.pipeline import PRETRAIN as PRETRAIN_STAGE
from ecgfm.pretrain import hidden_frames, learning_rate, objective, pretrain, quantizer_temperature
from ecgfm.stages import Request, Store
from ecgfm.training import Randomness

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def unbroken(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of PRETRAIN that never stopped."""
    out = tmp_path_factory.mktemp("unbroken")
    pretrain(inputs, PRETRAIN, out)
    return out


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Act once, in the middle of the update after `step` updates."""
    whole = quantizer_temperature

    def acting(now: int, config: PretrainConfig) -> float:
        if now == step:
            act()
        return whole(now, config)

    monkeypatch.setattr(stage, "quantizer_temperature", acting)


def test_two_runs_write_the_same_bytes(inputs: dict[str, Any], unbroken: Path, tmp_path: Path) -> None:
    counts = pretrain(inputs, PRETRAIN, tmp_path)
    assert digests(tmp_path) == digests(unbroken)
    saved = {f"step_0000006/{name}" for name in ("model.safetensors", "optimizer.pt", "seen.safetensors", "meta.json")}
    assert set(digests(tmp_path)) == saved | {"metrics.jsonl", "config.yaml", "best.json"}
    assert counts["steps"] == 6
    assert counts["pairs"] == 20


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_sigterm_saves_and_the_next_run_ends_as_if_it_had_never_stopped(
    inputs: dict[str, Any], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        if step == PRETRAIN.max_steps - 1:  # the last update: nothing is left to stop
            pretrain(inputs, PRETRAIN, tmp_path)
        else:
            with pytest.raises(SystemExit) as left:
                pretrain(inputs, PRETRAIN, tmp_path)
            assert left.value.code == 128 + signal.SIGTERM
            assert max(checkpoints.steps(tmp_path)) == step + 1
    pretrain(inputs, PRETRAIN, tmp_path)
    assert digests(tmp_path) == digests(unbroken)


def test_a_checkpoint_made_by_sigterm_does_not_stay(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(PRETRAIN, keep_last=2)
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            pretrain(inputs, config, tmp_path)
    assert list(checkpoints.steps(tmp_path)) == [2, 4, 5]
    pretrain(inputs, config, tmp_path)
    assert list(checkpoints.steps(tmp_path)) == [4, 6]


@pytest.mark.parametrize("step", [0, 1, 4, 5])
def test_a_run_that_breaks_anywhere_goes_on_from_its_last_checkpoint(
    inputs: dict[str, Any], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        at_step(patch, step, fail)
        with pytest.raises(ZeroDivisionError):
            pretrain(inputs, PRETRAIN, tmp_path)
    assert len(rows(tmp_path, "train")) == step
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 5, "split": "tr')  # a row that was being written
    pretrain(inputs, PRETRAIN, tmp_path)
    assert digests(tmp_path) == digests(unbroken)
    timed = [json.loads(line)["step"] for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert timed == [1, 2, 3, 4, 5, 6]


def test_killed_in_the_store_and_run_again_gives_the_bytes_of_one_run(inputs: dict[str, Any], tmp_path: Path) -> None:
    given = {
        "manifests": Input(inputs["manifests"], "m", "manifests"),
        "slices": [Input(path, path.name, path.name) for path in inputs["slices"]],
    }
    config = replace(PRETRAIN, max_steps=30, save_every=3, valid_every=7)
    request = Request(PRETRAIN_STAGE, given, config)
    (tmp_path / "order").write_bytes(pickle.dumps((Store(tmp_path / "killed"), request)))
    code = "import pickle, sys; store, request = pickle.load(open(sys.argv[1], 'rb')); store.make(request)"
    partial = Store(tmp_path / "killed").place(request).with_suffix(".partial")
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "order")], stdout=subprocess.DEVNULL) as child:
        try:
            while not checkpoints.steps(partial):
                assert child.poll() is None, "it ended before it could be killed"
                time.sleep(0.002)
        finally:
            child.kill()
    reached = max(checkpoints.steps(partial))
    assert 0 < reached < config.max_steps
    again = Store(tmp_path / "killed").make(request)
    once = Store(tmp_path / "once").make(request)
    assert len(once.files) == 7
    assert again.files == once.files
    assert digests(again.directory) == digests(once.directory)


def test_the_loss_falls_on_waves(inputs: dict[str, Any], tmp_path: Path) -> None:
    changes = {"max_steps": 80, "batch_pairs": 8, "accumulate": 1, "learning_rate": 1e-2, "dropout": 0.0}
    config = replace(PRETRAIN, **changes, valid_every=80, save_every=80)
    pretrain(inputs, config, tmp_path)
    before, after = rows(tmp_path, "valid")
    assert after["contrastive"] < before["contrastive"] - 1
    assert after["cmsc"] < before["cmsc"] - 0.5
    assert after["accuracy"] > before["accuracy"] + 0.2


def test_the_gradient_is_that_of_the_summed_loss_over_masked_frames(inputs: dict[str, Any], tmp_path: Path) -> None:
    config = replace(PRETRAIN, max_steps=1, dropout=0.0)
    pretrain(inputs, config, tmp_path)
    shards = Shards(inputs["slices"])
    train = stage._read_pairs(inputs["manifests"], "train", shards)
    torch.manual_seed(config.seed)
    model = PretrainModel(config.model, dropout=0.0, feature_grad_scale=config.feature_grad_scale)
    visits = visits_from(20, config.batch_pairs, config.seed, 0, 2)
    batches = list(load(shards, train.places, visits, CPU))
    randomness = Randomness(config.seed, CPU)
    randomness.begin(0)
    total, count = torch.zeros(()), 0
    hidden = [hidden_frames(2 * len(b.numbers), config, SEGMENT_SAMPLES, randomness) for b in batches]
    for batch, places in zip(batches, hidden, strict=True):
        signal_ = standardise(batch, CPU)
        mask = sample_lead_mask(len(signal_), 12, config.lead_mask_probability, randomness.device)
        masked, patients = apply_lead_mask(signal_, mask), train.patients[batch.numbers]
        loss = objective(model, masked, patients, places, 2.0, config=config, randomness=randomness, world=ALONE)
        total, count = total + loss.total, count + loss.count
    (total / count).backward()
    norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters() if p.grad is not None))
    (row,) = rows(tmp_path, "train")
    assert row["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert row["loss"] == pytest.approx(float(total.detach()) / count / math.log(2), rel=1e-4)


def test_the_parts_of_every_row_add_up_to_its_loss(unbroken: Path) -> None:
    found = rows(unbroken, "train") + rows(unbroken, "valid")
    assert [row["step"] for row in rows(unbroken, "train")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(unbroken, "valid")] == [0, 3, 6]
    for row in found:
        parts = sum(row[part] for part in ("contrastive", "diversity", "feature_penalty", "cmsc"))
        assert row["loss"] == pytest.approx(parts, rel=1e-4)
        assert 0 <= row["accuracy"] <= 1
        assert 2 <= row["code_perplexity"] <= 16


def test_leads_are_masked_and_features_dropped_in_training_only(
    inputs: dict[str, Any], unbroken: Path, tmp_path: Path
) -> None:
    pretrain(inputs, replace(PRETRAIN, lead_mask_probability=1.0, dropout=0.9, max_steps=1), tmp_path)
    assert rows(tmp_path, "valid")[0] == rows(unbroken, "valid")[0]
    assert rows(tmp_path, "train")[0]["loss"] != rows(unbroken, "train")[0]["loss"]
    assert rows(tmp_path, "train")[0]["feature_penalty"] == 0  # GELU and GroupNorm of nothing but zeros: nothing


def test_loader_workers_change_no_byte(inputs: dict[str, Any], unbroken: Path, tmp_path: Path) -> None:
    pretrain(inputs, replace(PRETRAIN, loader_workers=1), tmp_path)
    assert digests(tmp_path) == digests(unbroken)


def test_ecgs_of_one_patient_repel_each_other_only_if_asked_to(
    inputs: dict[str, Any], unbroken: Path, tmp_path: Path
) -> None:
    pretrain(inputs, replace(PRETRAIN, same_patient_negatives=True, max_steps=1), tmp_path)
    theirs, ours = rows(tmp_path, "valid")[0], rows(unbroken, "valid")[0]
    assert theirs["cmsc"] > ours["cmsc"]  # more negatives
    assert theirs["contrastive"] == ours["contrastive"]


def test_a_record_of_no_known_patient_is_nobodys_relative(inputs: dict[str, Any]) -> None:
    pairs = stage._read_pairs(inputs["manifests"], "train", Shards(inputs["slices"]))
    patients = pl.read_parquet(inputs["manifests"] / "cmsc_train.parquet")["patient_id"].to_list()
    assert None in patients
    for i, one in enumerate(patients):
        for j, other in enumerate(patients):
            same = bool(pairs.patients[i] == pairs.patients[j]) and int(pairs.patients[i]) >= 0
            assert same == (one is not None and one == other), (i, j)


def test_checkpoints_are_kept_as_asked(inputs: dict[str, Any], tmp_path: Path) -> None:
    pretrain(inputs, replace(PRETRAIN, max_steps=5, keep_last=2), tmp_path)
    assert list(checkpoints.steps(tmp_path)) == [4, 5]


def test_the_best_by_valid_loss_and_those_at_multiples_stay(inputs: dict[str, Any], tmp_path: Path) -> None:
    config = replace(PRETRAIN, max_steps=12, save_every=1, valid_every=1, learning_rate=0.1, keep_every=5)
    pretrain(inputs, config, tmp_path)
    losses = {row["step"]: row["loss"] for row in rows(tmp_path, "valid") if row["step"] > 0}
    best = min(losses, key=lambda step: losses[step])
    assert best not in (5, 10, 12), "of these the test would tell nothing"
    assert list(checkpoints.steps(tmp_path)) == sorted({5, 10, 12, best})
    assert checkpoints.best(tmp_path) == checkpoints.steps(tmp_path)[best]


def test_a_checkpoint_says_where_training_stands(unbroken: Path) -> None:
    meta = checkpoints.load(unbroken / "step_0000006").meta
    assert (meta.kind, meta.step, meta.sampling_rate_hz, meta.segment_samples) == ("pretrained", 6, 100.0, 256)
    assert meta.model == PRETRAIN.model
    assert meta.progress["epochs"] == pytest.approx(6 * 2 / 5)  # 12 batches, 5 an epoch


def test_schedules_are_what_the_log_says(inputs: dict[str, Any], tmp_path: Path) -> None:
    config = replace(PRETRAIN, max_steps=4, warmup_steps=3, learning_rate=3e-4, quantizer_temperature=(2.0, 0.9, 0.5))
    pretrain(inputs, config, tmp_path)
    found = rows(tmp_path, "train")
    assert [row["learning_rate"] for row in found] == pytest.approx([1e-4, 2e-4, 3e-4, 3e-4])
    assert [row["quantizer_temperature"] for row in found] == [2.0, 1.0, 0.9, 0.9]


def test_a_loss_that_is_not_finite_stops_with_step_and_records(
    inputs: dict[str, Any], unbroken: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"the loss of step 2 is (nan|inf).*the step read toy/\d{3}"):
        pretrain(inputs, replace(PRETRAIN, learning_rate=1e30), tmp_path)
    assert len(rows(tmp_path, "train")) == 1


def test_a_damaged_checkpoint_stops_the_next_run(inputs: dict[str, Any], unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "out")
    weights = tmp_path / "out" / "step_0000006" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match="damaged"):
        pretrain(inputs, PRETRAIN, tmp_path / "out")


def test_a_checkpoint_of_another_config_stops_the_run(inputs: dict[str, Any], unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "out")
    with pytest.raises(InputError, match="another config"):
        pretrain(inputs, replace(PRETRAIN, learning_rate=1e-5), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_pairs": 1}, "at least 2 pairs.*batch_pairs 1"),
        ({"model": replace(PRETRAIN.model, n_leads=8)}, "n_leads is 8, the shards have 12"),
        ({"span_mask_frames": 15}, "256 samples make 16 frames, too few for 2 masked spans of 15"),
        ({"device": "cuda:77"}, "cuda:77"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    inputs: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        pretrain(inputs, replace(PRETRAIN, **changes), tmp_path)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_an_empty_manifest_and_a_single_pair_are_refused(inputs: dict[str, Any], tmp_path: Path) -> None:
    manifests = tmp_path / "manifests"
    shutil.copytree(inputs["manifests"], manifests)
    table = pl.read_parquet(manifests / "cmsc_train.parquet")
    for height, message in ((0, r"no record has two adjacent segments; is .*\(2\.56\)"), (1, "found .* 1 pair to")):
        table.head(height).write_parquet(manifests / "cmsc_train.parquet")
        with pytest.raises(InputError, match=message):
            pretrain({**inputs, "manifests": manifests}, PRETRAIN, tmp_path)


def test_fewer_pairs_than_a_batch_are_all_used(inputs: dict[str, Any], tmp_path: Path) -> None:
    pretrain(inputs, replace(PRETRAIN, batch_pairs=1000, max_steps=1, accumulate=1), tmp_path)
    (timing,) = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert timing["segments_per_second"] * timing["seconds"] == pytest.approx(40, rel=0.05)
    assert np.isfinite(rows(tmp_path, "train")[0]["loss"])


# ---- several processes

SHARED = replace(PRETRAIN, max_steps=3, dropout=0.0, save_every=3)


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    path = checkpoints.latest(out)
    assert path is not None
    return checkpoints.load(path).state


@pytest.fixture(scope="module")
def alone(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SHARED by one process."""
    out = tmp_path_factory.mktemp("alone")
    pretrain(inputs, SHARED, out)
    return out


def test_two_processes_with_half_of_each_batch_do_what_one_does(
    inputs: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    # 8 valid pairs in batches of 4 make two, one each; of the shared batches each takes two pairs
    pretrain(inputs, replace(SHARED, processes=2), tmp_path)
    one, two = weights_of(alone), weights_of(tmp_path)
    start = at_start()
    # a key's bias moves all scores of a query alike: it has no gradient but rounding
    one = {name: weight for name, weight in one.items() if not name.endswith("k_proj.bias")}
    moved = {name: float((weight - start[name]).abs().max()) for name, weight in one.items()}
    assert min(moved.values()) > 1e-5, "an update that moves nothing would prove nothing"
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=5e-6, msg=name)
    assert_same_log(alone, tmp_path)


def assert_same_log(one: Path, other: Path) -> None:
    for split in ("train", "valid"):
        for ours, theirs in zip(rows(one, split), rows(other, split), strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours.keys() - {"split", "code_perplexity"}:  # the codes are each process's own
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (split, ours["step"], name)


def at_start() -> dict[str, torch.Tensor]:
    torch.manual_seed(SHARED.seed)
    return PretrainModel(SHARED.model).state_dict()


def test_without_the_others_negatives_the_processes_do_something_else(
    inputs: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    pretrain(inputs, replace(SHARED, processes=2, across_processes=False), tmp_path)
    together, apart = rows(alone, "train")[0], rows(tmp_path, "train")[0]
    assert apart["cmsc"] < 0.8 * together["cmsc"]  # 2 pairs in place of 4: half of the negatives and fewer
    assert apart["contrastive"] == pytest.approx(together["contrastive"], rel=1e-3)


def test_a_process_without_a_valid_batch_waits_for_the_others(inputs: dict[str, Any], tmp_path: Path) -> None:
    config = replace(SHARED, processes=2, max_steps=1, batch_pairs=8)
    pretrain(inputs, config, tmp_path)
    (tmp_path / "alone").mkdir()
    pretrain(inputs, replace(config, processes=1), tmp_path / "alone")
    assert rows(tmp_path, "valid")[0]["loss"] == pytest.approx(rows(tmp_path / "alone", "valid")[0]["loss"], rel=1e-5)


def test_a_killed_run_of_two_processes_goes_on_to_the_same_bytes(
    inputs: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = replace(PRETRAIN, processes=2, save_every=1)
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    pretrain(inputs, config, tmp_path / "whole")
    order = tmp_path / "order.pickle"
    order.write_bytes(pickle.dumps((inputs, config, tmp_path / "killed")))
    code = "import pickle, sys; from ecgfm.pretrain import pretrain; pretrain(*pickle.load(open(sys.argv[1], 'rb')))"
    child = subprocess.Popen([sys.executable, "-c", code, str(order)], start_new_session=True)
    deadline = time.monotonic() + 120
    while not checkpoints.steps(tmp_path / "killed") and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    stopped_at = max(checkpoints.steps(tmp_path / "killed"))
    assert 1 <= stopped_at < 6
    capfd.readouterr()
    pretrain(inputs, config, tmp_path / "killed")
    assert capfd.readouterr().out.count("going on after step") == 1, "one of the two says so"
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_sigterm_ends_two_processes_at_one_saved_step(inputs: dict[str, Any], tmp_path: Path) -> None:
    config = replace(PRETRAIN, processes=2, max_steps=100_000, save_every=100_000, valid_every=100_000)
    order = tmp_path / "order.pickle"
    out = tmp_path / "out"
    out.mkdir()
    order.write_bytes(pickle.dumps((inputs, config, out)))
    code = "import pickle, sys; from ecgfm.pretrain import pretrain; pretrain(*pickle.load(open(sys.argv[1], 'rb')))"
    child = subprocess.Popen([sys.executable, "-c", code, str(order)], start_new_session=True)
    deadline = time.monotonic() + 120
    while not (out / "timings.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(child.pid, signal.SIGTERM)
    assert child.wait(60) == 128 + signal.SIGTERM
    (step,) = checkpoints.steps(out)
    assert 0 < step < 100_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_pairs": 3}, "a batch of 3 cannot be shared by 2 processes"),
        ({"learning_rate": 1e30}, "the loss of step 2 is"),
    ],
)
def test_what_one_of_two_processes_refuses_is_one_line(
    inputs: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pretrain(inputs, replace(PRETRAIN, processes=2, **changes), tmp_path)


def test_torchrun_starts_it_too(inputs: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(to_dict(SHARED)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "ecgfm.pretrain", "--manifests", str(inputs["manifests"]), "--config", str(config)]
    command += ["--slices", *map(str, inputs["slices"]), "--out", str(out)]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    assert [row["step"] for row in rows(out, "train")] == [1, 2, 3]
    assert_same_log(alone, out)


# ---- options


def test_bf16_computes_the_same_within_its_eight_bits(inputs: dict[str, Any], unbroken: Path, tmp_path: Path) -> None:
    pretrain(inputs, replace(PRETRAIN, precision="bf16", max_steps=1), tmp_path)
    found, exact = rows(tmp_path, "valid")[0], rows(unbroken, "valid")[0]
    assert found["loss"] != exact["loss"], "nothing was computed in bf16"
    for part in ("loss", "contrastive", "diversity", "feature_penalty", "cmsc"):
        assert found[part] == pytest.approx(exact[part], rel=2e-2), part


def test_the_papers_steps_hold_from_their_epochs_on(inputs: dict[str, Any], tmp_path: Path) -> None:
    rates = ((1, 1e-4), (2, 5e-5), (4, 1e-5))
    config = replace(PRETRAIN, max_steps=8, batch_pairs=10, accumulate=1, schedule="epochs", learning_rate_epochs=rates)
    pretrain(inputs, config, tmp_path)  # 2 batches an epoch
    found = [row["learning_rate"] for row in rows(tmp_path, "train")]
    assert found == pytest.approx([1e-4, 1e-4, 5e-5, 5e-5, 5e-5, 5e-5, 1e-5, 1e-5])


def test_a_cosine_falls_from_the_end_of_the_warm_up_to_nothing() -> None:
    config = replace(PRETRAIN, max_steps=110, warmup_steps=10, schedule="cosine", learning_rate=1.0)
    rates = [learning_rate(step, 1, config) for step in range(110)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[60] == pytest.approx(0.5)
    assert (np.diff(rates[10:]) < 0).all()
    assert 0 < rates[-1] < 1e-3


def test_a_source_of_weight_0_is_not_visited(inputs: dict[str, Any], tmp_path: Path) -> None:
    manifests = tmp_path / "manifests"
    shutil.copytree(inputs["manifests"], manifests)
    shards = Shards(inputs["slices"])
    table = pl.read_parquet(manifests / "cmsc_train.parquet")
    config = replace(PRETRAIN, source_weights={"toy": 2.0})
    pairs = stage._read_pairs(manifests, "train", shards, config)
    assert pairs.weights is not None
    assert pairs.weights.tolist() == [2.0] * table.height
    with pytest.raises(InputError, match="names elsewhere; the pairs are of toy"):
        stage._read_pairs(manifests, "train", shards, replace(PRETRAIN, source_weights={"elsewhere": 1.0}))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="have weight 0"):
        pretrain(inputs, replace(PRETRAIN, source_weights={"toy": 0.0}), tmp_path / "out")


def test_a_subset_trains_on_whole_patients(inputs: dict[str, Any]) -> None:
    shards = Shards(inputs["slices"])
    whole = stage._read_pairs(inputs["manifests"], "train", shards, PRETRAIN)
    half = stage._read_pairs(inputs["manifests"], "train", shards, replace(PRETRAIN, subset=0.5))
    assert 0 < len(half.record_ids) < len(whole.record_ids)
    patient = dict(pl.read_parquet(inputs["manifests"] / "cmsc_train.parquet").select("record_id", "patient_id").rows())
    chosen = {patient[record_id] for record_id in half.record_ids} - {None}
    for record_id in whole.record_ids:
        if patient[record_id] in chosen:
            assert record_id in half.record_ids


def test_augmentations_change_what_is_trained_on(inputs: dict[str, Any], unbroken: Path, tmp_path: Path) -> None:
    louder = AugmentConfig(emg_probability=1.0)
    pretrain(inputs, replace(PRETRAIN, augment=louder, max_steps=1), tmp_path)
    assert rows(tmp_path, "train")[0]["loss"] != rows(unbroken, "train")[0]["loss"]
    assert rows(tmp_path, "valid")[0] == rows(unbroken, "valid")[0]


def test_memory_that_runs_out_names_the_batch_that_fits(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = PretrainModel.forward

    def small(self: PretrainModel, signal_: torch.Tensor, *rest: Any) -> Any:
        if len(signal_) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, signal_, *rest)

    monkeypatch.setattr(PretrainModel, "forward", small)
    monkeypatch.setattr(stage, "validate", lambda *_: {"loss": 0.0})
    with pytest.raises(InputError, match=r"7 pairs at once .* 3 fit: use pretrain.batch_pairs=3 and .*accumulate=6"):
        pretrain(inputs, replace(PRETRAIN, batch_pairs=8), tmp_path)


def test_tensorboard_gets_the_logs_numbers(inputs: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(inputs, replace(PRETRAIN, tensorboard=True), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx([row["loss"] for row in rows(tmp_path, "train")], rel=1e-5)
