"""Checkpoints: written whole or not at all, read strictly, and the published files."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.metadata
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from ecgfm import checkpoints
from ecgfm.checkpoints import Meta
from ecgfm.config import ModelConfig
from ecgfm.ecg import LEADS, InputError
from ecgfm.model import Classifier, Encoder, PretrainModel

TINY = ModelConfig(
    conv_channels=8,
    conv_kernels=(3, 2),
    conv_strides=(3, 2),
    width=16,
    n_layers=2,
    n_heads=2,
    ffn_width=24,
    pos_conv_kernel=4,
    pos_conv_groups=2,
    codebook_entries=5,
    codebook_width=12,
    contrast_width=6,
)
PRETRAINED = Meta("pretrained", TINY, LEADS, 500.0, 2500, progress={"pairs_seen": 128, "best": 0.5})
FINETUNED = Meta("finetuned", TINY, LEADS, 500.0, 2500, labels=("AF", "VT"), aggregation={"AF": "mean", "VT": "max"})


def model_of(meta: Meta, seed: int = 0) -> PretrainModel | Classifier:
    torch.manual_seed(seed)
    return PretrainModel(TINY) if meta.kind == "pretrained" else Classifier(TINY, len(meta.labels))


def training_state(model: nn.Module) -> dict[str, Any]:
    """An optimizer's state after one step, and a generator's."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"optimizer": optimizer.state_dict(), "generator": torch.Generator().manual_seed(3).get_state()}


def saved(directory: Path, meta: Meta = PRETRAINED, step: int = 200, seed: int = 0) -> Path:
    return checkpoints.save(directory, step, model_of(meta, seed).state_dict(), None, meta)


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# ---- round trips


@pytest.mark.parametrize("meta", [PRETRAINED, FINETUNED], ids=lambda meta: meta.kind)
def test_what_was_saved_is_read_bit_for_bit(tmp_path: Path, meta: Meta) -> None:
    model = model_of(meta)
    state = training_state(model)
    path = checkpoints.save(tmp_path, 200, model.state_dict(), state, meta)
    assert path == tmp_path / "step_0000200"
    assert sorted(file.name for file in path.iterdir()) == ["meta.json", "model.safetensors", "optimizer.pt"]

    found = checkpoints.load(path)
    assert (found.kind, found.model_config, found.meta.step) == (meta.kind, TINY, 200)
    assert dataclasses.replace(found.meta, step=0, versions={}, files={}) == meta
    assert found.meta.versions["torch"] == importlib.metadata.version("torch")  # __version__ may add the build: +cpu
    assert_same(dict(sorted(found.state.items())), dict(sorted(model.state_dict().items())))
    assert_same(checkpoints.load_optimizer(path), state)


@pytest.mark.parametrize("meta", [PRETRAINED, FINETUNED], ids=lambda meta: meta.kind)
def test_the_built_model_computes_what_the_saved_one_did(tmp_path: Path, meta: Meta) -> None:
    model = model_of(meta).eval()
    found = checkpoints.load(checkpoints.save(tmp_path, 1, model.state_dict(), None, meta))
    built = checkpoints.build(found)
    assert type(built) is type(model)
    assert not built.training
    signal = torch.randn(3, 12, 300)
    arguments = (signal, torch.tensor([[1, 5], [2, 3], [0, 9]]), 1.0) if meta.kind == "pretrained" else (signal,)
    for one, other in zip(built(*arguments), model(*arguments), strict=True):
        assert one is other is None or torch.equal(one, other)

    whole = model if isinstance(model, PretrainModel) else model.encoder
    assert torch.equal(checkpoints.build_encoder(found)(signal).frames, Encoder.forward(whole, signal).frames)


def test_a_built_model_can_be_trained_and_leaves_the_checkpoint_alone(tmp_path: Path) -> None:
    found = checkpoints.load(saved(tmp_path, FINETUNED))
    before = {name: tensor.clone() for name, tensor in found.state.items()}
    model = checkpoints.build(found).train()
    model(torch.randn(2, 12, 300)).logits.sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(model.state_dict()["proj.bias"], before["proj.bias"])
    assert_same(found.state, before)


def test_a_pretrained_encoder_starts_a_classifier(tmp_path: Path) -> None:
    pretrained = model_of(PRETRAINED)
    found = checkpoints.load(checkpoints.save(tmp_path, 1, pretrained.state_dict(), None, PRETRAINED))
    classifier = model_of(FINETUNED, seed=1)
    head = classifier.proj.weight.clone()
    checkpoints.load_state(classifier.encoder, checkpoints.encoder_state(found), "pretrained")
    for name, tensor in classifier.encoder.state_dict().items():
        assert torch.equal(tensor, pretrained.state_dict()[name])
    assert torch.equal(classifier.proj.weight, head)
    again = dataclasses.replace(found, meta=FINETUNED, state=classifier.state_dict())
    assert_same(checkpoints.encoder_state(again), dict(classifier.encoder.state_dict()))


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        model = model_of(PRETRAINED)
        checkpoints.save(tmp_path / place, 200, model.state_dict(), training_state(model), PRETRAINED)
    assert content(tmp_path / "here") == content(tmp_path / "there")


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    saved(tmp_path)
    path = saved(tmp_path, seed=1)
    assert torch.equal(checkpoints.load(path).state["mask_emb"], model_of(PRETRAINED, seed=1).mask_emb)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_0000200"]


# ---- which one


def test_the_latest_is_the_highest_complete_step(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path / "nothing") is None
    for step in (9_999_999, 300, 10_000_000):
        saved(tmp_path, step=step)
    (tmp_path / "step_99999999").mkdir()  # no meta.json: not complete
    (tmp_path / "step_last").mkdir()
    assert list(checkpoints.steps(tmp_path)) == [300, 9_999_999, 10_000_000]
    assert checkpoints.latest(tmp_path) == tmp_path / "step_10000000"


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        saved(tmp_path, step=step)
    assert checkpoints.best(tmp_path) is None
    checkpoints.mark_best(tmp_path, 200)
    (tmp_path / ".step_0000500.partial").mkdir()
    checkpoints.keep_last(tmp_path, 9)
    assert list(checkpoints.steps(tmp_path)) == [100, 200, 300, 400]
    checkpoints.keep_last(tmp_path, 1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["best.json", "step_0000200", "step_0000400"]
    assert checkpoints.best(tmp_path) == tmp_path / "step_0000200"


def test_only_a_complete_step_can_be_the_best(tmp_path: Path) -> None:
    saved(tmp_path, step=100)
    with pytest.raises(InputError, match="no complete checkpoint of step 200; it has step_0000100"):
        checkpoints.mark_best(tmp_path, 200)
    (tmp_path / "best.json").write_text('{"step": 200}')
    with pytest.raises(InputError, match="marks step 200 as best, and there is only step_0000100"):
        checkpoints.best(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from ecgfm import checkpoints
from tests_of_checkpoints import saved
real, left = checkpoints.sync, [int(sys.argv[2])]
def sync(path):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(path)
checkpoints.sync = sync
saved(Path(sys.argv[1]), step=200, seed=1)
"""


@pytest.mark.parametrize("survived_syncs", [0, 1, 2, 3])
def test_a_killed_save_leaves_the_checkpoints_before_it(tmp_path: Path, survived_syncs: int) -> None:
    before = saved(tmp_path, step=100)
    (tmp_path / "code").mkdir()
    (tmp_path / "code/tests_of_checkpoints.py").symlink_to(Path(__file__).resolve())
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "code")}
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(survived_syncs)]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    committed = survived_syncs == 3  # killed after the rename, while waiting for the disk
    assert list(checkpoints.steps(tmp_path)) == ([100, 200] if committed else [100])
    checkpoints.load(before)
    path = saved(tmp_path, step=200, seed=1)  # what it left is not in the way
    assert torch.equal(checkpoints.load(path).state["mask_emb"], model_of(PRETRAINED, seed=1).mask_emb)
    checkpoints.keep_last(tmp_path, 2)
    assert not list(tmp_path.glob(".step*"))


# ---- damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) * 2 // 3] ^= 1
    path.write_bytes(damaged)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_damaged_file_stops_the_reader(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    model = model_of(PRETRAINED)
    path = checkpoints.save(tmp_path, 1, model.state_dict(), training_state(model), PRETRAINED)
    read = checkpoints.load if name == "model.safetensors" else checkpoints.load_optimizer
    read(path)
    damage(path / name)
    with pytest.raises(InputError, match=rf"{name}.*damaged"):
        read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-40], "not JSON"),
        (lambda _: "[]", "expected a JSON object, found list"),
        (lambda text: text.replace('"n_heads": 2', '"n_heads": 3'), r"width \(16\) must be a multiple of n_heads"),
        (lambda text: text.replace('"n_layers": 2', '"n_layers": 2000000000'), "n_layers is 2,000,000,000, there are"),
        (lambda text: text.replace('"n_heads"', '"heads"'), "model.heads: unknown key; did you mean 'n_heads'"),
        (lambda text: text.replace('"pretrained"', '"trained"'), "kind"),
        (lambda text: text.replace('  "V6"', '  "V6", "V7"'), "leads must be 12"),
    ],
)
def test_a_damaged_meta_stops_the_reader(tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    path = saved(tmp_path)
    text = (path / "meta.json").read_text()
    assert change(text) != text
    (path / "meta.json").write_text(change(text))
    with pytest.raises(InputError, match=rf"meta.json.*{message}"):
        checkpoints.load(path)


def test_a_meta_of_another_architecture_stops_the_reader(tmp_path: Path) -> None:
    path = saved(tmp_path)
    text = (path / "meta.json").read_text()
    (path / "meta.json").write_text(text.replace('"ffn_width": 24', '"ffn_width": 32'))
    with pytest.raises(InputError, match=r"layers.0.fc1.bias: expected shape \(32,\), found \(24,\)"):
        checkpoints.load(path)


def test_all_differences_are_listed_at_once() -> None:
    model = model_of(PRETRAINED)
    state = model.state_dict()
    state["ghost"] = state.pop("mask_emb")
    state["project_q.bias"] = torch.zeros(7)
    state["final_proj.bias"] = state["final_proj.bias"].half()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        checkpoints.load_state(model, state, "somewhere")
    message = str(caught.value)
    assert message.startswith("somewhere: ")
    for difference in (
        "missing mask_emb",
        "not of this model ghost",
        "project_q.bias: expected shape (6,), found (7,)",
        "final_proj.bias: expected torch.float32, found torch.float16",
    ):
        assert difference in message
    assert message.count(";") == 4
    assert "\n" not in message
    assert_same(dict(model.state_dict()), before)  # nothing was loaded in part


@pytest.mark.parametrize("extra", [True, False], ids=["extra", "missing"])
def test_a_file_with_a_tensor_too_many_or_too_few_is_refused(tmp_path: Path, extra: bool) -> None:
    state = model_of(FINETUNED).state_dict()
    if extra:
        state["ghost"] = torch.zeros(1)
    else:
        del state["proj.weight"]
    path = checkpoints.save(tmp_path, 1, state, None, FINETUNED)
    with pytest.raises(InputError, match="not of this model ghost" if extra else "missing proj.weight"):
        checkpoints.load(path)


def test_the_number_of_labels_must_be_that_of_the_logits(tmp_path: Path) -> None:
    meta = dataclasses.replace(FINETUNED, labels=("AF", "VT", "PVC"))
    path = checkpoints.save(tmp_path, 1, model_of(FINETUNED).state_dict(), None, meta)
    with pytest.raises(InputError, match=r"proj.bias: expected shape \(3,\), found \(2,\)"):
        checkpoints.load(path)


def test_aggregation_must_be_of_the_labels() -> None:
    with pytest.raises(ValueError, match="aggregation must be of the labels"):
        dataclasses.replace(FINETUNED, aggregation={"PVC": "mean"})


def test_what_is_not_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint"):
        checkpoints.load(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"it has no meta.json; it was not finished"):
        checkpoints.load(tmp_path)
    path = saved(tmp_path)
    with pytest.raises(InputError, match="name one of step_0000200"):
        checkpoints.load(tmp_path)
    with pytest.raises(InputError, match=r"holds no optimizer.pt"):
        checkpoints.load_optimizer(path)


# ---- published files


def as_published(meta: Meta, heads: int = 2) -> dict[str, Any]:
    """A checkpoint as the reference's trainer writes it. Its convolutions' strides equal their kernels."""
    cfg = {"encoder_embed_dim": 16, "encoder_layers": 2, "encoder_ffn_embed_dim": 24, "encoder_attention_heads": heads}
    return {
        "args": None,
        "cfg": {"model": cfg, "task": {}},
        "model": dict(model_of(meta).state_dict()),
        "extra_state": {},
    }


def published(path: Path, contents: Any) -> Path:
    torch.save(contents, path / "published.pt")
    return path / "published.pt"


@pytest.mark.parametrize("meta", [PRETRAINED, FINETUNED], ids=lambda meta: meta.kind)
def test_a_published_file_is_read_by_its_tensors(tmp_path: Path, meta: Meta) -> None:
    contents = as_published(meta)
    found = checkpoints.load(published(tmp_path, contents))
    heads = {"codebook_entries", "codebook_width", "contrast_width"} if meta.kind == "finetuned" else set()
    for field in dataclasses.fields(ModelConfig):
        if field.name not in heads:
            assert getattr(found.model_config, field.name) == getattr(TINY, field.name), field.name
    assert (found.kind, found.meta.leads, found.meta.sampling_rate_hz) == (meta.kind, LEADS, 500)
    assert found.meta.labels == ()
    assert_same(dict(checkpoints.build(found).state_dict()), contents["model"])
    # and can be kept as one of ours
    again = checkpoints.load(checkpoints.save(tmp_path, 0, found.state, None, found.meta))
    assert_same(dict(sorted(again.state.items())), dict(sorted(found.state.items())))


def test_the_older_names_of_weight_norm_are_read(tmp_path: Path) -> None:
    contents = as_published(FINETUNED)
    stem = "encoder.conv_pos.pos_conv.0."
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        contents["model"][stem + old] = contents["model"].pop(f"{stem}parametrizations.weight.{new}")
    expected = model_of(FINETUNED).state_dict()
    found = checkpoints.load(published(tmp_path, contents))
    assert_same(dict(sorted(found.state.items())), dict(sorted(expected.items())))


def test_a_configuration_of_the_default_architecture_is_not_trusted(tmp_path: Path) -> None:
    contents = as_published(FINETUNED)
    contents["cfg"]["model"] |= {"encoder_embed_dim": 768, "encoder_layers": 12, "encoder_ffn_embed_dim": 3072}
    # Heads that are not the default's were set by someone.
    assert checkpoints.load(published(tmp_path, contents)).model_config == dataclasses.replace(
        TINY,
        **{name: getattr(ModelConfig(), name) for name in ("codebook_entries", "codebook_width", "contrast_width")},
    )
    contents["cfg"]["model"]["encoder_attention_heads"] = 12
    path = published(tmp_path, contents)
    with pytest.raises(InputError, match="number of attention heads is unknown; give n_heads"):
        checkpoints.load(path)
    assert checkpoints.load(path, n_heads=4).model_config.n_heads == 4
    with pytest.raises(InputError, match="must be a multiple of n_heads"):
        checkpoints.load(path, n_heads=5)


@pytest.mark.parametrize("cfg", [None, {}, {"model": None}])
def test_without_a_configuration_the_heads_must_be_given(tmp_path: Path, cfg: Any) -> None:
    path = published(tmp_path, as_published(PRETRAINED) | {"cfg": cfg})
    with pytest.raises(InputError, match="give n_heads"):
        checkpoints.load(path)
    assert checkpoints.load(path, n_heads=2).model_config == TINY


def test_a_published_file_of_another_network_is_refused(tmp_path: Path) -> None:
    def message(change: Callable[[dict[str, Any]], Any]) -> str:
        contents = as_published(FINETUNED)
        change(contents)
        with pytest.raises(InputError) as caught:
            checkpoints.load(published(tmp_path, contents))
        return str(caught.value)

    fc1 = "encoder.encoder.layers.0.fc1.weight"
    conv = "encoder.feature_extractor.conv_layers.0.0.weight"
    assert f"missing {fc1}" in message(lambda c: c["model"].pop(fc1))
    assert "expected 3 dimensions, found (8, 12)" in message(lambda c: c["model"].update({conv: torch.zeros(8, 12)}))
    assert "expected a model of 12 leads, found 8" in message(lambda c: c["model"].update({conv: torch.zeros(8, 8, 3)}))
    assert "missing encoder.layer_norm.bias" in message(lambda c: c["model"].pop("encoder.layer_norm.bias"))
    assert "not of this model ghost" in message(lambda c: c["model"].update(ghost=torch.zeros(1)))
    assert "layer_norm_first" in message(lambda c: c["cfg"]["model"].update(layer_norm_first=True))
    assert "under 'model'" in message(lambda c: c.pop("model"))
    assert "under 'model'" in message(lambda c: c.update(model=[1]))
    # a layer left out is a layer missing
    dropped = message(lambda c: [c["model"].pop(name) for name in list(c["model"]) if ".layers.0." in name])
    assert "missing encoder.encoder.layers.0." in dropped


def refusal(path: Path) -> str:
    """The line with which a file is refused."""
    with pytest.raises(InputError) as caught:
        checkpoints.load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert "\x1b" not in message
    return message


def test_a_published_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = published(tmp_path, as_published(PRETRAINED))
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for length in (1, 3, 63, 64, len(whole) - 1, *generator.integers(5, len(whole), 60)):
        path.write_bytes(whole[:length])
        assert re.search("cut short|not a checkpoint", refusal(path))
    path.write_bytes(whole)
    checkpoints.load(path)


def test_a_flipped_bit_anywhere_in_the_content_of_a_published_file_is_noticed(tmp_path: Path) -> None:
    path = published(tmp_path, as_published(PRETRAINED))
    whole = path.read_bytes()
    generator = np.random.default_rng(1)
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.file_size]
    for entry in generator.permutation(np.array(entries, dtype=object))[:40]:
        at = whole.index(entry.filename.encode(), entry.header_offset) + len(entry.filename)
        padding = int.from_bytes(whole[entry.header_offset + 28 : entry.header_offset + 30], "little")
        damaged = bytearray(whole)
        damaged[at + padding + generator.integers(entry.file_size)] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        assert f"damaged: '{entry.filename}' in it is not what was written" in refusal(path)


def test_bytes_written_over_a_published_file_never_change_what_is_read(tmp_path: Path) -> None:
    """Headers of the archive included: what is not refused is read as it was."""
    path = published(tmp_path, as_published(PRETRAINED))
    whole, before = path.read_bytes(), checkpoints.load(path).state
    generator = np.random.default_rng(2)
    refused = 0
    for trial in range(120):
        damaged = bytearray(whole)
        start = len(whole) - 6000 if trial % 2 else 0
        for place in generator.integers(start, start + 6000, int(generator.integers(1, 10))):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            found = checkpoints.load(path)
        except InputError:
            refused += 1
        else:
            assert_same(found.state, before)
    assert refused > 60


def test_what_people_take_for_a_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mimic_iv_ecg_finetuned.pt"

    def message(content: bytes) -> str:
        path.write_bytes(content)
        return refusal(path)

    assert "the file is empty" in message(b"")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1090000000\n"
    assert "Git LFS pointer" in message(pointer)
    assert "git lfs pull" in message(pointer)
    for page in (b"<!DOCTYPE html><html><title>Log in</title>", b"\n <html>", b"\xef\xbb\xbf<?xml version='1.0'?>"):
        assert "a web page in place of the file" in message(page)
    assert "JSON" in message(b'{"error": "Invalid username or password."}')
    assert "gzip" in message(gzip.compress(b"weights"))
    for noise in (b"\0", b"\x80\x02}q\0.", b"abc", bytes(1000), np.random.default_rng(0).bytes(5000)):
        assert re.search("not a checkpoint|expected a published", message(noise))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("checkpoints/best.pt", b"weights")
    assert "a zip archive without a checkpoint's data.pkl" in refusal(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10_000_000))
    assert "'a/data.pkl' in it is not what was written" in refusal(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    assert "a safetensors file alone" in refusal(path)


def test_a_part_of_a_checkpoint_names_the_whole(tmp_path: Path) -> None:
    path = saved(tmp_path)
    for name in ("model.safetensors", "meta.json"):
        assert f"name the directory, {path}" in refusal(path / name)


class Malicious:
    """Unpickled, it would make a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.made),)


def test_a_published_file_that_would_run_code_runs_nothing(tmp_path: Path) -> None:
    path, made = tmp_path / "published.pt", tmp_path / "made"
    pickle.loads(pickle.dumps(Malicious(made)))
    assert made.is_dir()  # it would
    made.rmdir()
    contents = as_published(PRETRAINED) | {"args": Malicious(made)}
    torch.save(contents, path)
    assert "asks for posix.mkdir, and no code is run" in refusal(path)
    torch.save(contents, path, _use_new_zipfile_serialization=False)
    assert "not a checkpoint" in refusal(path)
    path.write_bytes(pickle.dumps(Malicious(made)))
    assert "not a checkpoint" in refusal(path)
    assert not made.exists()


def test_a_published_file_of_an_older_torch_is_read(tmp_path: Path) -> None:
    contents = as_published(PRETRAINED)
    torch.save(contents, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(checkpoints.load(tmp_path / "old.pt").state, contents["model"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    contents = as_published(FINETUNED)
    contents["model"]["proj.bias"][1] = value
    assert "1 of its" in (message := refusal(published(tmp_path, contents)))
    assert "proj.bias" in message
    ours = checkpoints.save(tmp_path, 1, contents["model"], None, FINETUNED)
    assert "hold NaN or infinity, the first is proj.bias" in refusal(ours)


def test_tensors_that_are_not_dense_floats_are_refused(tmp_path: Path) -> None:
    name = "post_extract_proj.weight"
    small = torch.zeros(1)
    for tensor in (
        torch.zeros(16, 8, dtype=torch.int64),
        torch.zeros(16, 8, dtype=torch.complex64),
        torch.zeros(16, 8).to_sparse(),
        torch.zeros(16, 8, device="meta"),
        torch.zeros(0, 8),
        small.expand(100_000, 100_000),  # 40 GB, were it copied
    ):
        contents = as_published(PRETRAINED)
        contents["model"][name] = tensor
        assert f"{name}: expected a dense tensor of floats" in refusal(published(tmp_path, contents))


@pytest.mark.parametrize("name", ["mask\nemb", "", "\x1b[2J", 7, "x" * 300])
def test_names_that_are_none_are_refused(tmp_path: Path, name: Any) -> None:
    contents = as_published(PRETRAINED)
    contents["model"][name] = torch.zeros(1)
    message = refusal(published(tmp_path, contents))
    assert "one is named" in message or name == 7
    assert len(message) < 500


def test_layers_without_end_are_refused_at_once(tmp_path: Path) -> None:
    contents = as_published(PRETRAINED)
    contents["model"]["encoder.layers.999999999.fc1.weight"] = torch.zeros(1)
    assert "found one numbered 999,999,999" in refusal(published(tmp_path, contents))


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    contents = as_published(PRETRAINED)
    contents["model"] = {name: tensor.half() for name, tensor in contents["model"].items()}
    found = checkpoints.load(published(tmp_path, contents))
    assert_same(found.state, {name: tensor.float() for name, tensor in contents["model"].items()})


# ---- digest


def test_equal_weights_have_equal_digests_in_whatever_file(tmp_path: Path) -> None:
    contents = as_published(FINETUNED)
    new = checkpoints.load(published(tmp_path, contents))
    stem = "encoder.conv_pos.pos_conv.0."
    for now, then in (("original0", "weight_g"), ("original1", "weight_v")):
        contents["model"][stem + then] = contents["model"].pop(f"{stem}parametrizations.weight.{now}")
    old = checkpoints.load(published(tmp_path, contents))
    ours = checkpoints.load(saved(tmp_path, FINETUNED))
    assert list(old.state) != list(new.state)
    assert len({checkpoints.digest(found.state) for found in (new, old, ours)}) == 1


def test_any_other_weights_have_another_digest() -> None:
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)}
    others = [
        {"a": state["a"]},
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"].view(3, 2), "b": state["b"]},
        {"a": state["a"], "b": state["b"].int()},
        {"a": state["a"], "b": torch.tensor([0.0, 1e-45])},
        {"a": state["a"], "b": torch.tensor([0.0, -0.0])},
    ]
    found = {checkpoints.digest(one) for one in (state, *others)}
    assert len(found) == 1 + len(others)
    assert checkpoints.digest(dict(reversed(state.items()))) == checkpoints.digest(state)
    assert checkpoints.digest({"a": state["a"].t().contiguous().t(), "b": state["b"]}) == checkpoints.digest(state)


# ---- what travels with the weights


def test_what_is_needed_to_use_the_weights_travels_with_them(tmp_path: Path) -> None:
    meta = dataclasses.replace(FINETUNED, thresholds={"AF": 0.25}, training_data={"manifests": "0f" * 16})
    found = checkpoints.load(saved(tmp_path, meta)).meta
    assert (found.labels, found.aggregation) == (("AF", "VT"), {"AF": "mean", "VT": "max"})
    assert (found.thresholds, found.training_data) == (meta.thresholds, meta.training_data)
    assert (found.leads, found.sampling_rate_hz, found.standardisation) == (LEADS, 500, "record")


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_is_a_positive_number_of_a_label(tmp_path: Path, temperature: float) -> None:
    meta = dataclasses.replace(FINETUNED, temperature={"VT": 1.5})
    assert checkpoints.load(saved(tmp_path, meta)).meta.temperature == {"VT": 1.5}
    with pytest.raises(ValueError, match="temperature"):
        dataclasses.replace(FINETUNED, temperature={"AF": temperature})
    with pytest.raises(ValueError, match="temperature must be of the labels"):
        dataclasses.replace(FINETUNED, temperature={"PVC": 2.0})


def test_a_path_means_itself_or_the_latest_below_it(tmp_path: Path) -> None:
    saved(tmp_path, step=1000)
    later = saved(tmp_path, step=20_000_000)
    assert checkpoints.meant_by(tmp_path) == later
    assert checkpoints.meant_by(later) == later
    (tmp_path / "file.pt").touch()
    assert checkpoints.meant_by(tmp_path / "file.pt") == tmp_path / "file.pt"
    assert checkpoints.meant_by(tmp_path / "nowhere") is None


@pytest.mark.parametrize("shift", [math.inf, math.nan])
def test_a_shift_is_a_number_of_a_label(tmp_path: Path, shift: float) -> None:
    meta = dataclasses.replace(FINETUNED, shift={"VT": -1.5})
    assert checkpoints.load(saved(tmp_path, meta)).meta.shift == {"VT": -1.5}
    with pytest.raises(ValueError, match="shift"):
        dataclasses.replace(FINETUNED, shift={"AF": shift})
    with pytest.raises(ValueError, match="shift must be of the labels"):
        dataclasses.replace(FINETUNED, shift={"PVC": 2.0})


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_a_threshold_is_a_probability_of_a_label(threshold: float) -> None:
    with pytest.raises(ValueError, match="thresholds"):
        dataclasses.replace(FINETUNED, thresholds={"AF": threshold})
    with pytest.raises(ValueError, match="thresholds must be of the labels"):
        dataclasses.replace(FINETUNED, thresholds={"PVC": 0.5})


def test_a_meta_written_before_there_were_thresholds_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path, FINETUNED)
    written = json.loads((path / "meta.json").read_text())
    for name in ("standardisation", "temperature", "thresholds", "training_data"):
        del written[name]
    (path / "meta.json").write_text(json.dumps(written))
    found = checkpoints.load(path).meta
    assert (found.standardisation, found.thresholds, found.training_data) == ("record", {}, {})
    assert found.temperature == {}


def test_the_steps_of_a_published_file_are_its_optimizers(tmp_path: Path) -> None:
    history = [{"num_updates": 7}, {"num_updates": 20}]
    assert (
        checkpoints.load(published(tmp_path, as_published(PRETRAINED) | {"optimizer_history": history})).meta.step == 20
    )
    for unknown in (None, [], [None], [{"num_updates": "20"}], {"num_updates": 20}):
        contents = as_published(PRETRAINED) | {"optimizer_history": unknown}
        assert checkpoints.load(published(tmp_path, contents)).meta.step == 0


def test_the_reference_files_are_read_and_computed(shared: Path) -> None:
    folder = shared / "golden/model"
    with np.load(folder / "tiny.npz") as arrays:
        source, frames, logits = (torch.from_numpy(arrays[k]) for k in ("source", "pre_encoder_out", "ft_logits"))
    pretrained, finetuned = (checkpoints.load(folder / f"tiny_{kind}.pt") for kind in ("pretrained", "finetuned"))
    assert (pretrained.kind, finetuned.kind) == ("pretrained", "finetuned")
    assert (pretrained.model_config.n_heads, pretrained.model_config.codebook_entries) == (4, 20)
    with torch.no_grad():
        found = checkpoints.build_encoder(pretrained)(source).frames
        torch.testing.assert_close(found, frames, rtol=0, atol=1e-5)
        torch.testing.assert_close(checkpoints.build(finetuned)(source).logits, logits, rtol=0, atol=1e-5)
