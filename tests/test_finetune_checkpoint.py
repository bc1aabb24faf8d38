"""Finetuning from a checkpoint that is named: nothing is pretrained; the key knows its content and not its place."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ecgfm import checkpoints
from ecgfm.checkpoints import Meta
from ecgfm.config import ModelConfig, from_dict
from ecgfm.ecg import LEADS, InputError
from ecgfm.model import Classifier, PretrainModel
from ecgfm.pipeline import Selection, plan
from ecgfm.pipelines_file import Pipeline, load_pipeline
from ecgfm.runs import run_locally
from ecgfm.stages import Store

TINY = ModelConfig(
    conv_channels=8, width=32, n_layers=2, n_heads=2, ffn_width=64, pos_conv_kernel=8, pos_conv_groups=4,
    codebook_entries=8, codebook_width=16, contrast_width=16,
)  # fmt: skip
VALUES: dict[str, Any] = {
    "sources": ["synthetic"],
    "synthetic": {"n_patients": 50},
    "prepare": {"workers": 1},
    "splits": {"valid_share": 0.25, "test_share": 0.25},
    "labels": {"scheme": "codes", "codes": {"sinus rhythm": ["426783006"], "left bundle branch block": ["164909002"]}},
    "manifests": {"rare_labels": "drop"},
    "pretrain": {"max_steps": 1},
    "finetune": {"max_epochs": 1, "batch_size": 32, "precision": "fp32", "device": "cpu"},
    "evaluate": {"bootstrap_samples": 20, "device": "cpu"},
}
everything = Selection()


def pipeline(checkpoint: Path | None) -> Pipeline:
    finetune = VALUES["finetune"] | ({} if checkpoint is None else {"checkpoint": str(checkpoint)})
    return from_dict(Pipeline, VALUES | {"finetune": finetune}, "test")


def saved(directory: Path, seed: int = 0, **differences: Any) -> Path:
    """A pretrained checkpoint for the twelve leads at 500 Hz, or one that differs from it."""
    torch.manual_seed(seed)
    meta = replace(Meta("pretrained", TINY, LEADS, 500.0, 2500), **differences)
    model = PretrainModel(TINY) if meta.kind == "pretrained" else Classifier(TINY, len(meta.labels))
    directory.mkdir(parents=True, exist_ok=True)
    return checkpoints.save(directory, 7, model.state_dict(), None, meta)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A checkpoint, a data directory, and the run in it that began with the checkpoint."""
    folder = tmp_path_factory.mktemp("done")
    checkpoint = saved(folder / "elsewhere")
    return checkpoint, folder / "data", run_locally("toy", pipeline(checkpoint), {}, Store(folder / "data"), everything)


def statuses(config: Pipeline, data_dir: Path) -> dict[str, str]:
    return {stage.name: stage.status for stage in plan(config, {}, Store(data_dir)) if stage.kind != "prepare"}


def test_a_named_checkpoint_is_the_start_and_nothing_is_pretrained(done: tuple[Path, Path, Path]) -> None:
    checkpoint, data_dir, run = done
    found = statuses(pipeline(checkpoint), data_dir)
    assert "pretrain" not in found
    assert set(found.values()) == {"cached"}
    assert not (data_dir / "stages" / "pretrain").exists()
    best = checkpoints.best(run / "finetune")
    assert best is not None
    expected = checkpoints.digest(checkpoints.load(checkpoint).state)
    assert checkpoints.load(best).meta.training_data["pretrain"] == expected
    assert str(checkpoint.parent) not in (run / "finetune" / "config.yaml").read_text()
    # the probe is of that encoder, and the report is whole
    scores = json.loads((run / "evaluate" / "metrics.json").read_text())["scores"]
    assert {"finetuned", "probe"} <= set(scores)
    assert "the checkpoint" in (run / "evaluate" / "report.html").read_text()


def test_without_it_the_pipeline_pretrains(done: tuple[Path, Path, Path]) -> None:
    _, data_dir, _ = done
    found = statuses(pipeline(None), data_dir)
    assert found["pretrain"] == "run"
    assert found["manifests"] == "cached"
    assert found["finetune"] == "run", "of no pretraining yet"


def test_a_copy_elsewhere_gives_the_same_keys_and_another_one_others(
    done: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    checkpoint, data_dir, _ = done
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy" / checkpoint.name))
    assert set(statuses(pipeline(copy), data_dir).values()) == {"cached"}
    assert set(statuses(pipeline(copy.parent), data_dir).values()) == {"cached"}, "the latest of a run's directory"
    other = statuses(pipeline(saved(tmp_path / "other", seed=1)), data_dir)
    assert other["manifests"] == "cached"
    assert (other["finetune"], other["evaluate"]) == ("run", "maybe")


def test_a_published_file_is_a_start(done: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Known by its bytes."""
    _, data_dir, _ = done
    file = tmp_path / "published.pt"
    file.write_bytes(b"one")
    one = [stage for stage in plan(pipeline(file), {}, Store(data_dir)) if stage.name == "finetune"]
    assert [stage.status for stage in one] == ["run"]
    with pytest.raises(InputError, match=r"published\.pt") as told:
        run_locally("toy", pipeline(file), {}, Store(data_dir), everything)
    assert "\n" not in str(told.value)


def test_a_checkpoint_that_is_not_there_is_a_line_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^finetune\.checkpoint: no such file or directory: .*/nowhere; name a "):
        run_locally("toy", pipeline(tmp_path / "nowhere"), {}, Store(tmp_path / "data"), everything)
    assert not list((tmp_path / "data").glob("stages/*/*/stage.json"))
    with pytest.raises(InputError, match=r"^finetune\.checkpoint: .* holds no complete checkpoint; name a "):
        plan(pipeline(tmp_path), {}, Store(tmp_path / "data"))


@pytest.mark.parametrize(
    ("differences", "message"),
    [
        (
            {"kind": "finetuned", "labels": ("a",)},
            "expected a pretrained checkpoint, found a finetuned one; it was trained on labels",
        ),
        ({"sampling_rate_hz": 250.0}, "expected 250 Hz as the model was trained on, found 500 Hz in the shards"),
    ],
)
def test_an_unsuitable_checkpoint_is_a_line(
    done: tuple[Path, Path, Path], tmp_path: Path, differences: dict[str, Any], message: str
) -> None:
    _, data_dir, _ = done
    checkpoint = saved(tmp_path, **differences)
    with pytest.raises(InputError, match=message) as told:
        run_locally("toy", pipeline(checkpoint), {}, Store(data_dir), everything)
    assert str(checkpoint) in str(told.value)
    assert "\n" not in str(told.value)


def test_in_a_pipelines_file_the_path_is_relative_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "pipelines.yaml"
    file.write_text("toy: {sources: [synthetic], finetune: {checkpoint: models/ecg-fm}}\n")
    assert load_pipeline(file, "toy").finetune.checkpoint == str(tmp_path / "models" / "ecg-fm")
    assert load_pipeline(file, "toy", ["finetune.checkpoint=here"]).finetune.checkpoint == "here"
