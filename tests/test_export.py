"""An exported model answers as the checkpoint does, to those who have nothing but numpy and onnxruntime."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from training_data import TINY
from typer.testing import CliRunner

import ecgfm.export
from ecgfm import checkpoints, inference
from ecgfm.checkpoints import Kind, Meta
from ecgfm.ecg import LEADS, InputError
from ecgfm.export import BOUND, Format, Portable, export, read_metrics
from ecgfm.model import Classifier, Encoder, PretrainModel, pool_nonzero_mean
from flows.cli import app

MODEL = dataclasses.replace(TINY, n_layers=1)
LABELS = ("AF", "rhythm | sinus")
FINETUNED = Meta(
    "finetuned", MODEL, LEADS, 100.0, 250, labels=LABELS, aggregation={"AF": "max"}, thresholds={"AF": 0.25},
    temperature={"AF": 2.5}, shift={"AF": -0.7}, training_data={"manifests": "0f" * 16},
)  # fmt: skip
PRETRAINED = Meta("pretrained", MODEL, LEADS, 100.0, 250)


def saved(directory: Path, meta: Meta = FINETUNED, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = Classifier(meta.model, len(LABELS)) if meta.kind == "finetuned" else PretrainModel(meta.model)
    if isinstance(model, Classifier):
        torch.nn.init.normal_(model.proj.weight, std=1.0)  # probabilities that are not all about a half
    return checkpoints.save(directory, 1, model.state_dict(), None, meta)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("finetuned"))


@pytest.fixture(scope="module")
def onnx_folder(finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx", reason="exporting to ONNX needs the extra onnx")
    pytest.importorskip("onnxscript", reason="exporting to ONNX needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="exporting to ONNX needs the extra onnx")
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    export(finetuned, folder, "onnx")
    return folder


@pytest.fixture(scope="module")
def torch_folder(finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "torch"
    export(finetuned, folder, "torch")
    return folder


def waves(rate_hz: float, n_samples: int, n_leads: int = 12) -> np.ndarray:
    """(lead, time), millivolt in whole microvolts: sines of different rates and heights around different levels."""
    time_s = np.arange(n_samples) / rate_hz
    lead = np.arange(n_leads)[:, None]
    return np.round((0.2 + 0.1 * lead) * np.sin(2 * np.pi * (1 + 0.7 * lead) * time_s) + 0.05 * lead, 3)


def example_says(folder: Path, signal_mv: np.ndarray, rate_hz: float, *leads: str) -> Any:
    np.save(folder.parent / "recording.npy", signal_mv)
    command = [sys.executable, "-I", folder / "example.py", folder.parent / "recording.npy", str(rate_hz), *leads]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ours(checkpoint: Path, signal_mv: np.ndarray, rate_hz: float, leads: tuple[str, ...] = LEADS) -> dict[str, float]:
    recording = inference.recording(signal_mv, rate_hz, leads)
    return inference.load(checkpoint, "cpu").predict(recording).probabilities


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is in the graph


@pytest.mark.parametrize("kernels", [((2, 2), (2, 2)), ((5, 2), (3, 2))], ids=["side by side", "overlapping"])
def test_the_portable_network_is_the_network(kernels: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    config = dataclasses.replace(MODEL, conv_kernels=kernels[0], conv_strides=kernels[1])
    built = []
    for _ in range(2):
        torch.manual_seed(3)
        built.append(Classifier(config, 2, dropout=0.3, feature_grad_scale=0.1).eval())
    signal = torch.randn(3, 12, 101)
    signal[1, 4:] = 0
    expected = built[0](signal)
    logits, embedding = Portable(built[1])(signal)
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(embedding, expected.embedding, atol=1e-5, rtol=0)
    assert not any("_ScaleGradient" in str(step) for step in graph_of(logits))
    assert any("_ScaleGradient" in str(step) for step in graph_of(expected.logits))


def graph_of(tensor: torch.Tensor) -> list[Any]:
    """Every step of the backward pass."""
    found, waiting = [], [tensor.grad_fn]
    while waiting:
        step = waiting.pop()
        if step is not None and step not in found:
            found.append(step)
            waiting += [following for following, _ in step.next_functions]
    return found


# ---- onnx


def test_the_file_says_all_that_its_use_needs(onnx_folder: Path, finetuned: Path) -> None:
    import onnx

    model = onnx.load(onnx_folder / "model.onnx")
    says = {fact.key: fact.value for fact in model.metadata_props}
    beside = json.loads((onnx_folder / "preprocessing.json").read_text())
    assert says == {name: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for name, v in beside.items()}
    assert json.loads(says["leads"]) == list(LEADS)
    assert (beside["sampling_rate_hz"], beside["segment_samples"], beside["segment_seconds"]) == (100.0, 250, 2.5)
    assert beside["labels"] == list(LABELS)
    assert beside["aggregation"] == {"AF": "max"}
    assert beside["thresholds"] == {"AF": 0.25}
    assert beside["temperature"] == {"AF": 2.5}
    assert beside["digest"] == f"sha256:{checkpoints.digest(checkpoints.load(finetuned).state)}"
    assert beside["units"].startswith("millivolt")
    assert "standard deviation" in beside["standardisation"]
    assert "training_data" in says["licence"]
    (signal,) = model.graph.input
    named = [place.dim_param or place.dim_value for place in signal.type.tensor_type.shape.dim]
    assert named == ["segment", 12, "time"]
    assert [output.name for output in model.graph.output] == ["logits", "embedding"]


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_no_folder_of_this_machine_is_in_a_file(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue("onnx_folder" if name == "model.onnx" else "torch_folder")
    content = (folder / name).read_bytes()
    assert len(content) > 10_000
    assert str(Path(ecgfm.export.__file__).parent).encode() not in content


@pytest.mark.parametrize(("n_segments", "n_samples"), [(1, 250), (7, 250), (2, 40), (3, 1001)])
def test_any_number_of_segments_of_any_length(
    onnx_folder: Path, finetuned: Path, n_segments: int, n_samples: int
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_folder / "model.onnx", providers=["CPUExecutionProvider"])
    segments = np.random.default_rng(5).standard_normal((n_segments, 12, n_samples), dtype=np.float32)
    logits, embedding = session.run(["logits", "embedding"], {"signal": segments})
    network = checkpoints.build(checkpoints.load(finetuned))
    assert isinstance(network, Classifier)
    with torch.inference_mode():
        expected = network(torch.from_numpy(segments))
    np.testing.assert_allclose(logits, expected.logits, atol=BOUND, rtol=0)
    np.testing.assert_allclose(embedding, expected.embedding, atol=BOUND, rtol=0)
    assert np.ptp(logits) > 100 * BOUND


def test_the_same_checkpoint_gives_the_same_bytes(onnx_folder: Path, finetuned: Path, tmp_path: Path) -> None:
    export(finetuned, tmp_path / "again", "onnx")
    for path in onnx_folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_fixed_number_of_segments_and_another_opset(finetuned: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="exporting to ONNX needs the extra onnx")
    done = export(finetuned, tmp_path / "fixed", "onnx", opset=20, batch=3)
    model = onnx.load(tmp_path / "fixed/model.onnx")
    assert [one.version for one in model.opset_import if not one.domain] == [20]
    assert [place.dim_value for place in model.graph.input[0].type.tensor_type.shape.dim] == [3, 12, 250]
    assert max(done.differences.values()) <= BOUND


# ---- the example


def test_the_example_needs_numpy_and_onnxruntime_alone(onnx_folder: Path) -> None:
    tree = ast.parse((onnx_folder / "example.py").read_text())
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"json", "sys", "pathlib", "numpy", "onnxruntime"}


@pytest.mark.parametrize("name", ["onnx", "torch"])
def test_the_example_gives_our_probabilities(name: str, finetuned: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"{name}_folder")
    signal_mv = waves(100, 1030)  # four segments and a rest
    signal_mv[5] = 0.3
    signal_mv[7, 100:150] = np.nan
    found, expected = example_says(folder, signal_mv, 100), ours(finetuned, signal_mv, 100)
    assert list(found) == list(LABELS)
    assert found == pytest.approx(expected, abs=1e-3)  # we keep 16 bits of a sample
    assert len({round(p, 2) for p in [*found.values(), 0.5]}) == 3  # they are not all alike


def test_the_example_resamples_and_takes_leads_by_name(onnx_folder: Path, finetuned: Path) -> None:
    leads = ("V1", "ii", "I", "aVF", "V6")
    signal_mv = waves(257, 1400, len(leads))
    found = example_says(onnx_folder, signal_mv, 257, *leads)
    assert found == pytest.approx(ours(finetuned, signal_mv, 257, leads), abs=1e-3)
    assert found != pytest.approx(ours(finetuned, signal_mv, 250, leads), abs=2e-3)


@pytest.mark.parametrize(
    ("shape", "given", "said"),
    [
        ((3, 1000), ["recording.npy", "100", "I", "II"], "expected (lead, time) with 2 leads, I II; found (3, 1000)"),
        ((1000, 2), ["recording.npy", "100", "I", "II"], "found (1000, 2)"),
        ((2, 1000), ["recording.npy", "100", "I", "X9"], "the model has no lead X9; its leads: I II"),
        ((2, 1000), ["recording.npy"], "RECORDING.npy RATE_HZ [LEAD...]"),
        ((2, 1000), ["absent.npy", "100"], "absent.npy: expected an array that np.save wrote; [Errno 2]"),
    ],
)
def test_the_example_refuses_what_it_cannot_read_or_name(
    onnx_folder: Path, tmp_path: Path, shape: tuple[int, int], given: list[str], said: str
) -> None:
    np.save(tmp_path / "recording.npy", np.zeros(shape))
    command = [sys.executable, "-I", onnx_folder / "example.py", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_encoder_gives_embeddings(tmp_path: Path) -> None:
    pretrained = saved(tmp_path, PRETRAINED)
    done = export(pretrained, tmp_path / "encoder", "torch")
    assert list(done.differences) == ["embedding"]
    signal_mv = waves(100, 500)
    expected = inference.load(pretrained, "cpu").embed(inference.recording(signal_mv, 100)).record
    np.testing.assert_allclose(example_says(tmp_path / "encoder", signal_mv, 100), expected, atol=1e-3)


def test_the_encoder_asked_is_the_pretrained_models(tmp_path: Path) -> None:
    found = checkpoints.load(saved(tmp_path, PRETRAINED))
    signal = torch.randn(2, 12, 250)
    (embedding,) = Portable(checkpoints.build_encoder(found))(signal)
    built = checkpoints.build(found)
    assert isinstance(built, Encoder)
    expected = pool_nonzero_mean(Encoder.forward(built, signal).frames)
    torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=0)


# ---- hugging face


METRICS: dict[str, Any] = {
    "split": "test",
    "bootstrap": {"confidence": 0.95, "rule": "by patient"},
    "scores": {
        "finetuned": {
            "n_records": 30,
            "n_patients": 20,
            "labels": [{"label": "AF", "n": 30, "positives": 4, "auroc": {"value": 0.75, "low": 0.5, "high": 0.875},
                        "auprc": None}],
            "macro_auroc": {"value": 0.75, "low": 0.5, "high": 0.875},
            "macro_auprc": None,
        }
    },
}  # fmt: skip


def evaluation(folder: Path, **differences: Any) -> Path:
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(METRICS | differences))
    return folder


@pytest.mark.parametrize("kind", ["finetuned", "pretrained"])
def test_a_hugging_face_folder_is_a_checkpoint_of_ours(tmp_path: Path, kind: Kind) -> None:
    source = saved(tmp_path, FINETUNED if kind == "finetuned" else PRETRAINED)
    done = export(source, tmp_path / "hub", "huggingface")
    before, after = checkpoints.load(source), checkpoints.load(tmp_path / "hub")
    assert checkpoints.digest(after.state) == checkpoints.digest(before.state) == done.digest
    assert set(done.differences.values()) == {0.0}
    assert set(done.bytes) == {
        *("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "meta.json"),
    }
    config = json.loads((tmp_path / "hub/config.json").read_text())
    assert config["width"] == MODEL.width
    assert config.get("id2label") == ({"0": "AF", "1": "rhythm | sinus"} if kind == "finetuned" else None)
    shown = CliRunner().invoke(app, ["checkpoint", "show", str(tmp_path / "hub")])
    assert shown.exit_code == 0
    assert done.digest in shown.stdout


def test_the_card_has_the_metrics_of_the_evaluation(finetuned: Path, tmp_path: Path) -> None:
    export(finetuned, tmp_path / "hub", "huggingface", evaluation=evaluation(tmp_path / "evaluate"), licence="mit")
    _, front, text = (tmp_path / "hub/README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert (facts["license"], facts["library_name"]) == ("mit", "ecgfm")
    assert "ecg" in facts["tags"]
    assert facts["training_data"] == {"manifests": "0f" * 16}
    (result,) = facts["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "auroc", "name": "macro AUROC", "value": 0.75}]
    assert "| AF | 30 | 4 | 0.750 (0.500 to 0.875) | not scored |" in text.splitlines()
    assert "| 1 | rhythm \\| sinus | mean | 1 | 0 | not chosen |" in text.splitlines()
    assert "| 0 | AF | max | 2.5 | -0.7 | 0.250 |" in text.splitlines()


def test_an_evaluation_of_another_model_is_refused(finetuned: Path, tmp_path: Path) -> None:
    found = checkpoints.load(finetuned)
    assert "expected a metrics.json" in refusal(lambda: read_metrics(tmp_path, found))
    assert "expected the scores" in refusal(lambda: read_metrics(evaluation(tmp_path / "a", scores={}), found))
    other = {"finetuned": {"labels": [{"label": "VT"}]}}
    assert "labels VT" in refusal(lambda: read_metrics(evaluation(tmp_path / "b", scores=other), found))
    copy = dataclasses.replace(found, path=tmp_path / "stage/step_0000001")
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage/stage.json").write_text(json.dumps({"digest": "one"}))
    own = evaluation(tmp_path / "c")
    for digest in ("one", "another"):
        (own / "stage.json").write_text(json.dumps({"ingredients": {"inputs": {"finetune": {"finetune": digest}}}}))
        if digest == "one":
            assert read_metrics(own, copy) == METRICS
        else:
            assert "of another training" in refusal(lambda: read_metrics(own, copy))


# ---- what is refused


def test_a_difference_is_refused_and_nothing_is_left(
    finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_it_is = Portable.forward

    def a_little_off(self: Portable, signal: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, embedding = as_it_is(self, signal)
        return logits + 2 * BOUND, embedding

    monkeypatch.setattr(Portable, "forward", a_little_off)
    said = refusal(lambda: export(finetuned, tmp_path / "to", "torch"))
    assert "logits differ by 0.0002" in said
    assert "embedding" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("onnx", {"opset": 17}, "--opset 17: expected 18 to 24"),
        ("torch", {"opset": 20}, "--opset is of --format onnx"),
        ("torch", {"batch": 0}, "expected dynamic or at least 1"),
        ("huggingface", {"batch": 2}, "--batch is of"),
        ("torch", {"evaluation": Path()}, "--evaluation is for the model card"),
    ],
)
def test_an_option_without_effect_is_refused(
    finetuned: Path, tmp_path: Path, kind: Format, options: dict[str, Any], message: str
) -> None:
    assert message in refusal(lambda: export(finetuned, tmp_path / "to", kind, **options))


def test_a_folder_with_something_in_it_is_left_alone(finetuned: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert "files in it" in refusal(lambda: export(finetuned, tmp_path, "huggingface"))
    assert "a file" in refusal(lambda: export(finetuned, tmp_path / "mine.txt", "huggingface"))
    assert "no folder" in refusal(lambda: export(finetuned, tmp_path / "not/there", "huggingface"))
    (tmp_path / "empty").mkdir()
    export(finetuned, tmp_path / "empty", "huggingface")
    assert (tmp_path / "empty/config.json").is_file()
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_labels_that_are_not_named_are_refused(tmp_path: Path) -> None:
    nameless = Meta("finetuned", MODEL, LEADS, 100.0, 250)
    torch.manual_seed(0)
    path = checkpoints.save(tmp_path, 1, Classifier(MODEL, 1).state_dict(), None, nameless)
    assert "checkpoint convert" in refusal(lambda: export(path, tmp_path / "to", "torch"))


def test_without_the_package_its_name_is_said(finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = builtins.__import__

    def without_onnx(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return really(name, *rest)

    pytest.importorskip("onnx", reason="exporting to ONNX needs the extra onnx")
    monkeypatch.setattr(builtins, "__import__", without_onnx)
    assert "pip install 'ecgfm[onnx]'" in refusal(lambda: export(finetuned, tmp_path / "to", "onnx"))


def test_the_command_prints_the_difference(finetuned: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(finetuned), "--to", str(tmp_path / "to"), "--format", "huggingface"])
    assert done.exit_code == 0
    assert "largest difference from the checkpoint: logits 0, embedding 0 (8 random segments" in done.stdout
    again = CliRunner().invoke(app, ["export", str(finetuned), "--to", str(tmp_path / "to")])
    assert again.exit_code == 2
    assert again.stderr.count("\n") == 1
    wrong = CliRunner().invoke(app, ["export", str(finetuned), "--to", str(tmp_path / "b"), "--batch", "many"])
    assert "expected dynamic or a number" in wrong.stderr
    no_checkpoint = CliRunner().invoke(app, ["export", str(tmp_path / "none"), "--to", str(tmp_path / "b")])
    assert (no_checkpoint.exit_code, no_checkpoint.stderr.count("\n")) == (2, 1)
