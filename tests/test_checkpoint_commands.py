"""`ecgfm checkpoint`: what a checkpoint is, and published files made ours without a bit lost."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_checkpoints import FINETUNED, PRETRAINED, as_published, content, model_of, published, saved, training_state
from typer.testing import CliRunner

from ecgfm import checkpoint_commands, checkpoints
from ecgfm.checkpoint_commands import convert, describe, facts, find, parameters_of_parts, read_labels
from ecgfm.config import ModelConfig
from ecgfm.ecg import LEADS, InputError
from ecgfm.label_space import Label, LabelSpace
from ecgfm.model import Classifier, PretrainModel
from flows.cli import app

MAX_LABELS = {  # findings that one segment can carry alone
    "Poor data quality",
    "Premature ventricular contraction",
    "Ventricular tachycardia",
    "Supraventricular tachycardia with aberrancy",
    "Electronic pacemaker",
}


def ecgfm(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- show


def test_the_published_layout_has_90_883_072_parameters() -> None:
    with torch.device("meta"):
        pretrained, finetuned = PretrainModel(ModelConfig()), Classifier(ModelConfig(), 17)
    parts = parameters_of_parts(pretrained.state_dict(), "pretrained")
    assert sum(parts.values()) == 90_883_072
    assert parts == {
        "feature extractor": (12 + 3 * 256) * 256 * 2 + 2 * 256,
        "projection": 2 * 256 + 256 * 768 + 768,
        "positional convolution": 768 * 48 * 128 + 128 + 768,
        "transformer": 12 * (4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768) + 2 * 768,
        "pretraining heads": 768 + 640 * 128 + 256 * 640 + 640 + 256 * 256 + 256 + 768 * 256 + 256,
    }
    of_finetuned = parameters_of_parts(finetuned.state_dict(), "finetuned")
    assert of_finetuned.pop("classifier") == 768 * 17 + 17
    assert of_finetuned == {part: count for part, count in parts.items() if part != "pretraining heads"}


@pytest.mark.parametrize("meta", [PRETRAINED, FINETUNED], ids=lambda meta: meta.kind)
def test_a_published_file_and_the_same_weights_as_ours_are_shown_alike(tmp_path: Path, meta: checkpoints.Meta) -> None:
    theirs = facts(published(tmp_path, as_published(meta)))
    ours = facts(saved(tmp_path, meta))
    for name in ("kind", "parameters", "parameters_of", "tensors", "leads", "digest", "n_logits"):
        assert theirs[name] == ours[name], name
    assert theirs["parameters"] == sum(p.numel() for p in model_of(meta).parameters())
    assert json.loads(json.dumps(ours)) == ours
    assert ("n_codebooks" in ours["model"]) == (meta.kind == "pretrained")
    assert {line.split(maxsplit=1)[0] for line in describe(theirs)[1:]} >= {"kind", "parameters", "step", "digest"}


def test_what_is_shown_is_what_is_there(tmp_path: Path) -> None:
    meta = dataclasses.replace(FINETUNED, thresholds={"VT": 0.125}, training_data={"manifests": "0f" * 16})
    path = saved(tmp_path, meta, step=12_345)
    code, shown, _ = ecgfm("show", path)
    assert code == 0
    lines = {line.strip() for line in shown.splitlines()}
    digest = checkpoints.digest(model_of(FINETUNED).state_dict())
    for line in (
        "kind         finetuned, ecgfm checkpoint",
        "transformer  2 layers, post-norm, 16 wide, 2 heads, feed-forward 24",
        "step         12,345",
        f"leads        12, in this order: {' '.join(LEADS)}",
        "rate         500 Hz",
        "2 labels     AF  mean over segments",
        "VT  max  over segments, called from 0.125",
        f"trained on   manifests {'0f' * 16}",
        f"digest       sha256:{digest}",
    ):
        assert line in lines
    code, as_json, _ = ecgfm("show", path, "--json")
    assert (code, json.loads(as_json)["digest"], json.loads(as_json)["thresholds"]) == (0, digest, {"VT": 0.125})


def test_of_a_stage_the_best_checkpoint_is_shown_or_the_latest(tmp_path: Path) -> None:
    saved(tmp_path, step=100)
    assert find(tmp_path) == (tmp_path / "step_0000100", "")
    saved(tmp_path, step=200)
    assert find(tmp_path) == (tmp_path / "step_0000200", "the latest of 2")
    checkpoints.mark_best(tmp_path, 100)
    assert ecgfm("show", tmp_path)[1].splitlines()[0] == f"{tmp_path}/step_0000100 (the best of 2)"
    assert find(tmp_path / "step_0000200") == (tmp_path / "step_0000200", "")


def test_the_keys_of_what_was_trained_on_are_found(tmp_path: Path) -> None:
    """As the store lays it out; through a run's link too."""
    stages = tmp_path / "stages"

    def stage(name: str, key: str, stage_name: str, files: dict[str, str]) -> Path:
        place = stages / stage_name / key
        place.mkdir(parents=True)
        recorded = {file: {"bytes": 1, "sha256": sha256} for file, sha256 in files.items()}
        recorded["timings.jsonl"] = {"bytes": 1, "sha256": "x", "volatile": True}
        ingredients = {"stage": stage_name}
        described = {"name": name, "key": key, "files": recorded, "ingredients": ingredients}
        (place / "stage.json").write_text(json.dumps(described))
        return place

    pairs = {"cmsc_train.parquet": "aa", "cmsc_valid.parquet": "bb"}
    manifests = stage("manifests", "key-of-manifests", "manifests", {**pairs, "label_space.yaml": "cc"})
    stage("manifests", "key-of-others", "manifests", {**pairs, "cmsc_train.parquet": "ee"})
    slices = [
        stage(f"prepare {source} {slice_id}", f"{source}{slice_id}", "prepare", {"shard.h5": f"{source}{slice_id}"})
        for source, slice_id in (("ptb_xl", "a"), ("ptb_xl", "b"), ("code15", "a"))
    ]
    data = checkpoints.training_data({"manifests": manifests, "slices": slices})
    assert list(data) == ["manifests", "prepare code15", "prepare ptb_xl"]
    assert data == checkpoints.training_data({"manifests": manifests, "slices": slices[::-1]})
    # labels that change leave what pretraining reads as it is
    relabelled = stage("manifests", "new-labels", "manifests", {**pairs, "label_space.yaml": "dd"})
    assert data == checkpoints.training_data({"manifests": relabelled, "slices": slices})
    labelled = [
        checkpoints.training_data({"manifests": m, "slices": slices}, checkpoints.LABELLED)
        for m in (manifests, relabelled)
    ]
    assert labelled[0]["manifests"] != labelled[1]["manifests"]
    assert len({*data.values()}) == 3
    fewer = checkpoints.training_data({"manifests": manifests, "slices": slices[1:]})
    assert fewer["prepare ptb_xl"] != data["prepare ptb_xl"]
    assert fewer["prepare code15"] == data["prepare code15"]

    out = stage("pretrain", "key-of-pretrain", "pretrain", {})
    saved(out, dataclasses.replace(PRETRAINED, training_data=data))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/pretrain").symlink_to(out)
    for path in (out, tmp_path / "runs/pretrain"):
        keys = facts(path)["training_data_keys"]
        assert keys.pop("manifests") in ("key-of-manifests", "new-labels")
        assert keys == {"pretrain": "key-of-pretrain"}
        shown = "\n".join(describe(facts(path)))
        assert f"manifests {data['manifests']} (key " in shown
        assert "pretrain, key key-of-pretrain" in shown


def test_training_data_without_a_store_is_known_by_its_content(tmp_path: Path) -> None:
    for place, content_of_shard in (("one", b"a"), ("same", b"a"), ("other", b"b")):
        (tmp_path / place / "slice").mkdir(parents=True)
        (tmp_path / place / "slice/shard.h5").write_bytes(content_of_shard)
        (tmp_path / place / "cmsc_train.parquet").write_bytes(b"pairs")
    one, same, other = (
        checkpoints.training_data({"manifests": tmp_path / place, "slices": [tmp_path / place / "slice"]})
        for place in ("one", "same", "other")
    )
    assert one == same
    assert (one["manifests"], one["slice"]) != (other["manifests"], other["slice"])
    assert one["manifests"] == other["manifests"]


# ---- convert


@pytest.mark.parametrize("meta", [PRETRAINED, FINETUNED], ids=lambda meta: meta.kind)
def test_a_converted_file_computes_bit_for_bit_the_same(tmp_path: Path, meta: checkpoints.Meta) -> None:
    source = published(tmp_path, as_published(meta))
    labels = ",".join(meta.labels) or None
    converted = convert(source, tmp_path / "ours", labels, ["VT=max"] if labels else [], ["AF=0.25"] if labels else [])
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == ["meta.json", "model.safetensors"]
    before, after = checkpoints.load(source), checkpoints.load(tmp_path / "ours")
    assert after.meta == converted.meta
    assert checkpoints.digest(before.state) == checkpoints.digest(after.state)
    signal = torch.randn(3, 12, 300)
    frames = [checkpoints.build_encoder(found)(signal).frames for found in (before, after)]
    assert torch.equal(*frames)
    assert (after.meta.leads, after.meta.sampling_rate_hz, after.meta.standardisation) == (LEADS, 500, "record")
    assert (after.model_config.n_heads, after.meta.step) == (2, before.meta.step)
    if labels:
        logits = [checkpoints.build(found)(signal).logits for found in (before, after)]
        assert torch.equal(*logits)
        assert (after.meta.labels, after.meta.aggregation) == (("AF", "VT"), {"AF": "mean", "VT": "max"})
        assert after.meta.thresholds == {"AF": 0.25}


def test_conversion_gives_equal_bytes(tmp_path: Path) -> None:
    source = published(tmp_path, as_published(FINETUNED))
    for target in ("one", "other"):
        convert(source, tmp_path / target, "AF,VT")
    assert content(tmp_path / "one") == content(tmp_path / "other")


def test_a_checkpoint_of_ours_is_copied_without_what_resuming_needs(tmp_path: Path) -> None:
    model = model_of(FINETUNED)
    (tmp_path / "run").mkdir()
    checkpoints.save(tmp_path / "run", 7, model.state_dict(), training_state(model), FINETUNED)
    converted = convert(tmp_path / "run", tmp_path / "ours", thresholds=["AF=0.5"])
    assert not (tmp_path / "ours/optimizer.pt").exists()
    assert checkpoints.digest(converted.state) == checkpoints.digest(model.state_dict())
    assert (converted.meta.step, converted.meta.labels) == (7, FINETUNED.labels)
    assert (converted.meta.aggregation, converted.meta.thresholds) == (FINETUNED.aggregation, {"AF": 0.5})
    again = refusal(lambda: convert(tmp_path / "run", tmp_path / "again", labels="AF,VT"))
    assert "names its labels itself" in again


def test_what_breaks_off_leaves_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = published(tmp_path, as_published(PRETRAINED))

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as broken:
        broken.setattr(checkpoints, "sync", full)
        with pytest.raises(OSError, match="No space left"):
            convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    convert(source, tmp_path / "ours")
    assert [path.name for path in tmp_path.glob("*ours*")] == ["ours"]


def test_a_target_that_is_there_is_left_alone(tmp_path: Path) -> None:
    source = published(tmp_path, as_published(PRETRAINED))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        assert "is there already" in refusal(lambda name=name: convert(source, tmp_path / name))
    assert "no folder" in refusal(lambda: convert(source, tmp_path / "file/deep"))
    assert "no folder" in refusal(lambda: convert(source, tmp_path / "missing/deep"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "has 2 logits and does not say of what; name them with --labels"),
        (["--labels", "AF"], "--labels AF: expected 2 labels, one for each logit, found 1, for there is no file"),
        (["--labels", "mimic_iv_ecg"], "--labels mimic_iv_ecg: expected 2 labels, one for each logit, found 17"),
        (["--labels", "AF,AF"], "expected each label once, found AF"),
        (["--labels", "labels.txt"], "--labels labels.txt: cannot be read (No such file or directory)"),
        (["--labels", "AF,VT", "--aggregation", "VF=max"], "the model has no label 'VF'; its labels: AF, VT"),
        (["--labels", "Sinus rhythm,VT", "--aggregation", "sinus rythm=max"], "did you mean 'Sinus rhythm'"),
        (["--labels", "AF,VT", "--aggregation", "VT=median"], "VT=median: expected mean or max, found 'median'"),
        (["--labels", "AF,VT", "--aggregation", "max"], "max: expected LABEL=VALUE"),
        (["--labels", "AF,VT", "--threshold", "VT=50"], "VT=50: expected a probability from 0 to 1, found '50'"),
        (["--labels", "AF,VT", "--threshold", "VT=nan"], "expected a probability from 0 to 1"),
        (["--labels", "AF,VT", "--heads", "5"], "width (16) must be a multiple of n_heads"),
    ],
)
def test_what_does_not_fit_the_model_is_told_in_a_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    source = published(tmp_path, as_published(FINETUNED))
    code, out, error = ecgfm("convert", source, tmp_path / "ours", *arguments)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "ours").exists()


def test_a_pretrained_model_has_no_labels(tmp_path: Path) -> None:
    source = published(tmp_path, as_published(PRETRAINED))
    assert "has no logits" in refusal(lambda: convert(source, tmp_path / "ours", "AF,VT"))
    assert "no label 'AF'; its labels: none" in refusal(lambda: convert(source, tmp_path / "ours", None, ["AF=max"]))


def test_labels_are_read_from_what_people_have(tmp_path: Path) -> None:
    LabelSpace((Label("AF", ("1",), "mean"), Label("VT, fast", ("2",), "max"))).write(tmp_path / "label_space.yaml")
    (tmp_path / "label_def.csv").write_text('\ufeffname,pos_weight\nAF,1.5\n"VT, fast",2\n', encoding="utf-8")
    (tmp_path / "labels.txt").write_text("AF\r\n\n VT, fast \n")
    (tmp_path / "labels").write_text("AF\nVT, fast")
    assert read_labels(str(tmp_path / "label_space.yaml")) == {"AF": "mean", "VT, fast": "max"}
    for name in ("label_def.csv", "labels.txt", "labels"):
        assert read_labels(str(tmp_path / name)) == {"AF": "mean", "VT, fast": "mean"}, name
    assert list(read_labels("VT, AF")) == ["VT", "AF"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", b"label\nAF\n"),
        ("l.csv", b"\xff\xfe\x00"),
        ("l.csv", b"a,name\n1\n"),
        ("l.csv", b'name\n"' + b"x" * 200_000 + b'"\n'),
        ("l.yaml", b"labels: [AF, VT]"),
        ("l.yaml", b"- AF"),
        ("l.yaml", b"{"),
        ("l.yaml", b""),
        ("l.yaml", b"dropped: []\nlabels: [{name: AF, codes: [], aggregation: sum}]"),
        ("l.txt", b"\xff\xff"),
        ("l.txt", b"AF\nVT\nAF\n"),
    ],
)
def test_labels_that_cannot_be_read_are_told_in_a_line(tmp_path: Path, name: str, text: bytes) -> None:
    (tmp_path / name).write_bytes(text)
    assert refusal(lambda: read_labels(str(tmp_path / name))).startswith(f"--labels {tmp_path / name}: ")


def test_the_published_labels_are_those_of_the_published_predictions() -> None:
    labels = read_labels("mimic_iv_ecg")
    assert len(labels) == 17
    assert {label for label, how in labels.items() if how == "max"} == MAX_LABELS


# ---- the reference's own files


@pytest.mark.parametrize("kind", ["pretrained", "finetuned"])
def test_the_reference_files_are_shown_and_converted(shared: Path, tmp_path: Path, kind: str) -> None:
    source = shared / f"golden/model/tiny_{kind}.pt"
    code, shown, _ = ecgfm("show", source)
    assert code == 0
    assert "2 layers, post-norm, 64 wide, 4 heads, feed-forward 128" in shown
    assert f"step         {20 if kind == 'pretrained' else 10}\n" in shown
    labels = ["--labels", "mimic_iv_ecg"] if kind == "finetuned" else []
    code, converted, error = ecgfm("convert", source, tmp_path / "ours", *labels)
    assert (code, error) == (0, "")
    assert shown.splitlines()[-1] == converted.splitlines()[-1]  # the digest
    found = checkpoints.load(tmp_path / "ours")
    if kind == "finetuned":
        with np.load(shared / "golden/model/tiny.npz") as arrays, torch.no_grad():
            logits = checkpoints.build(found)(torch.from_numpy(arrays["source"])).logits
            torch.testing.assert_close(logits, torch.from_numpy(arrays["ft_logits"]), rtol=0, atol=1e-5)
        assert found.meta.labels == tuple(checkpoint_commands.BUILT_IN_LABELS["mimic_iv_ecg"])
