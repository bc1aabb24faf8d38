"""A checkpoint for those who have not this project: ONNX, a program of torch.export, or the layout of Hugging Face.

What is written is read back and asked the same segments as the checkpoint, random ones and synthetic ECGs; an answer
that differs by more than `BOUND` is an error, and then nothing is written. preprocessing.json (also within the ONNX
file) says in words and numbers what becomes of a recording before and after, and example.py does it with numpy.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ecgfm import checkpoints, inference
from ecgfm.checkpoints import Checkpoint
from ecgfm.config import PrepareConfig, Task, to_dict
from ecgfm.ecg import INVALID, Digital, EcgRecord, InputError
from ecgfm.export_texts import LICENCE, STANDARDISATION, STEPS, example, model_card, steps
from ecgfm.model import Classifier, Encoder, n_frames, pool_nonzero_mean
from ecgfm.prepare import prepare_record
from ecgfm.shards import standardisation
from ecgfm.synthetic_ecg import recordings

_PROBLEM_TYPES: dict[Task, str] = {
    "multilabel": "multi_label_classification",
    "multiclass": "single_label_classification",
    "regression": "regression",
}
"""A task in the words of Hugging Face's configurations."""

BOUND = 1e-4
"""The largest difference from the checkpoint's own logits and embeddings. float32 in another order makes about 1e-6."""

OPSETS = range(18, 25)
"""ONNX operator sets that torch's exporter writes without conversion, and onnxruntime 1.32 runs."""

DEFAULT_OPSET = 18

Format = Literal["onnx", "torch", "huggingface"]
Answers = tuple[np.ndarray, ...]

_N_RANDOM = 4
_INPUT = "signal"


@dataclass(frozen=True)
class Exported:
    """What was written.

    bytes: file -> its size
    differences: `logits` or `scaled_values` (not of an encoder) and `embedding` -> the largest difference from the
        checkpoint's
    compared: the segments that were compared, in words
    """

    directory: Path
    bytes: dict[str, int]
    differences: dict[str, float]
    compared: str
    digest: str
    seconds: float

    def in_words(self) -> list[str]:
        """As lines to print."""
        width = max(map(len, self.bytes))
        files = [f"  {name:{width}}  {size:>13,} bytes" for name, size in self.bytes.items()]
        found = ", ".join(f"{name} {difference:.2g}" for name, difference in self.differences.items())
        return [
            f"exported: {self.directory} in {self.seconds:.1f} s",
            *files,
            f"largest difference from the checkpoint: {found} ({self.compared}; bound {BOUND:g})",
            f"weights: sha256:{self.digest}",
        ]


def export(
    checkpoint: Path,
    to: Path,
    kind: Format,
    opset: int = DEFAULT_OPSET,
    batch: int | None = None,
    evaluation: Path | None = None,
    licence: str = "other",
) -> Exported:
    """Write a checkpoint into the new folder `to`, all of it or nothing.

    Of a finetuned checkpoint the classifier, which gives logits (of numbers: scaled values) and embedding; of a
    pretrained one the encoder, which gives the embedding, the non-zero mean of its frames. Input: (segment, lead, time)
    float32, standardised.
    `huggingface` keeps all weights; its folder is a checkpoint of ours as well.

    checkpoint: as of `inference.load`
    opset: of ONNX, one of `OPSETS`
    batch: segments at once; None: any number, and segments of any length (of `onnx` and `torch`)
    evaluation: the folder of an evaluation's metrics.json, for the model card (of `huggingface`)
    licence: an identifier of Hugging Face's, for the model card

    Raises:
        InputError: no checkpoint, or one that does not name its labels; a folder that is not empty; a missing
            package; an option without effect; an evaluation of another model; a difference above `BOUND`.
    """
    started = time.perf_counter()
    _check_options(kind, opset, batch, evaluation)
    model = inference.load(checkpoint, "cpu")
    found = checkpoints.load(model.path)
    if found.kind == "finetuned":
        model.check_predicts()
    metrics = None if evaluation is None else read_metrics(evaluation, found)
    n_samples = found.meta.segment_samples
    n_frames(found.model_config, n_samples)  # raises where there is none
    about = describe(found, batch)
    names = tuple(about["outputs"])
    with _building(to) as out:
        if kind == "onnx":
            ask = _write_onnx(out / "model.onnx", found, about, opset, batch)
        elif kind == "torch":
            ask = _write_program(out / "model.pt2", found, about, batch)
        else:
            ask = _write_huggingface(out, found, about, metrics, licence)
        if kind != "huggingface":
            _write_json(out / "preprocessing.json", about)
            (out / "example.py").write_text(example(kind), encoding="utf-8")
        segments = np.concatenate([_random(found, n_samples), _synthetic(found, model.preparation)])
        if batch is None:
            batches = [segments[:1], segments[1:], _random(found, 2 * n_samples)]
        else:
            batches = _equal(segments, batch)
        differences = _differences(_asking(_network(found)), ask, batches, names)
        if wrong := [f"{name} differ by {value:.2g}" for name, value in differences.items() if not value <= BOUND]:
            raise InputError(
                f"{checkpoint}: expected answers within {BOUND:g} of the checkpoint's, found that {', '.join(wrong)}; "
                "nothing is written: try another --opset, or other versions of torch and onnxruntime"
            )
    sizes = {path.name: path.stat().st_size for path in sorted(to.iterdir())}
    compared = (
        f"{_N_RANDOM * (2 if batch is None else 1)} random segments, {len(segments) - _N_RANDOM} of synthetic ECGs"
    )
    digest = about["digest"].removeprefix("sha256:")
    return Exported(to, sizes, differences, compared, digest, time.perf_counter() - started)


def describe(found: Checkpoint, batch: int | None) -> dict[str, Any]:
    """All that the use of an exported model needs, as JSON: the content of preprocessing.json."""
    meta, width = found.meta, found.model_config.width
    values = to_dict(meta)
    outputs = {"embedding": f"(segment, {width}) float32: the non-zero mean of the encoder's frames"}
    if found.kind == "finetuned":
        name = "scaled_values" if meta.task == "regression" else "logits"
        outputs = {name: f"(segment, {len(meta.labels)}) float32: of each label, in the order of `labels`"} | outputs
    number = "any number of segments, of any length" if batch is None else f"{batch} segments"
    written = ("model", "versions", "files", "progress", "standardisation", "units")
    return {
        "made_by": f"ecgfm {importlib.metadata.version('ecgfm')}",
        **{name: value for name, value in values.items() if name not in written},
        "label_units": values["units"],
        "segment_seconds": meta.segment_samples / meta.sampling_rate_hz,
        "input": {_INPUT: f"(segment, {len(meta.leads)} leads, time) float32, standardised; {number}"},
        "outputs": outputs,
        "units": "millivolt, before standardisation",
        "standardisation": STANDARDISATION,
        "steps": [*steps(meta.departures), *STEPS[meta.task if found.kind == "finetuned" else "pretrained"]],
        "digest": f"sha256:{checkpoints.digest(found.state)}",
        "licence": LICENCE,
    }


def read_metrics(evaluation: Path, found: Checkpoint) -> dict[str, Any]:
    """metrics.json of an evaluation of this very training.

    Raises:
        InputError: there is none, it has no score of a finetuned model, or is of another training.
    """
    path = evaluation / "metrics.json"
    try:
        metrics = json.loads(path.read_bytes())
        scores = metrics["scores"]["finetuned"]
        labels = [row["label"] for row in scores["labels"]]
    except OSError as error:
        raise InputError(f"--evaluation {evaluation}: expected a metrics.json in it ({error.strerror})") from error
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: expected the scores of a finetuned model, as `evaluate` writes them") from error
    stages = [evaluation / "stage.json", found.path.resolve().parent / "stage.json"]
    if all(stage.is_file() for stage in stages):
        evaluated, trained = (json.loads(stage.read_bytes()) for stage in stages)
        if trained["digest"] not in evaluated["ingredients"]["inputs"].get("finetune", {}).values():
            raise InputError(f"--evaluation {evaluation}: is of another training than {found.path}; name its own")
    if found.kind == "pretrained" or set(labels) - set(found.meta.labels):
        raise InputError(
            f"--evaluation {evaluation}: is of a model with the labels {', '.join(labels)}, found a {found.kind} "
            f"checkpoint with {', '.join(found.meta.labels) or 'none'}; name the evaluation of this checkpoint"
        )
    return cast(dict[str, Any], metrics)


# ---- the network without what only training needs


class Portable(nn.Module):
    """A network as it answers: plain operations, with the weight norm multiplied out and no trace of the gradient's
    scaling. The network is changed, and must not be used any more.

    The extractor is run as convolutions, for frames laid side by side need a length that is known.
    """

    def __init__(self, network: Classifier | Encoder) -> None:
        super().__init__()
        self.proj = network.proj if isinstance(network, Classifier) else None
        self.encoder = network.encoder if isinstance(network, Classifier) else network
        conv = self.encoder.conv_pos.pos_conv[0]
        parametrize.remove_parametrizations(conv, "weight")

    def forward(self, signal: Tensor) -> tuple[Tensor, ...]:
        """(segment, lead, time) standardised -> logits (segment, label), of a classifier; embedding (segment, width)"""
        x = signal
        for layer in self.encoder.feature_extractor.conv_layers:
            x = layer(x)
        features = self.encoder.layer_norm(x.transpose(1, 2))
        embedding = pool_nonzero_mean(self.encoder.contextualise(self.encoder.project(features)).frames)
        return (embedding,) if self.proj is None else (self.proj(embedding), embedding)


def _network(found: Checkpoint) -> Classifier | Encoder:
    """With storage of its own, in eval mode."""
    if found.kind == "pretrained":
        return checkpoints.build_encoder(found)
    built = checkpoints.build(found)
    assert isinstance(built, Classifier)
    return built


def _asking(network: Classifier | Encoder) -> Callable[[np.ndarray], Answers]:
    """Our own answers."""

    def ask(segments: np.ndarray) -> Answers:
        with torch.inference_mode():
            signal = torch.from_numpy(segments)
            if isinstance(network, Classifier):
                classified = network(signal)
                return classified.logits.numpy(), classified.embedding.numpy()
            return (pool_nonzero_mean(network(signal).frames).numpy(),)

    return ask


def _program(found: Checkpoint, batch: int | None) -> torch.export.ExportedProgram:
    config, meta = found.model_config, found.meta
    network = Portable(_network(found)).eval().requires_grad_(False)
    shortest = 2  # frames: of one alone the exporter takes another way
    for kernel, stride in zip(reversed(config.conv_kernels), reversed(config.conv_strides), strict=True):
        shortest = (shortest - 1) * stride + kernel
    dimensions = {0: torch.export.Dim("segment", min=1), 2: torch.export.Dim("time", min=shortest)}
    # of two segments, for a dimension of one would be taken for a fixed one
    like = torch.zeros(batch or 2, config.n_leads, max(meta.segment_samples, shortest))
    with _quiet():
        program = torch.export.export(network, (like,), dynamic_shapes=None if batch else (dimensions,), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    return program


# ---- the formats


def _write_program(
    path: Path, found: Checkpoint, about: Mapping[str, Any], batch: int | None
) -> Callable[[np.ndarray], Answers]:
    """`path`, a program of torch.export, and what it answers once it is read back."""
    texts = {"preprocessing.json": json.dumps(about, indent=1, ensure_ascii=False)}
    with _quiet():
        torch.export.save(_program(found, batch), path, extra_files=texts)
        loaded = torch.export.load(path).module()

    def ask(segments: np.ndarray) -> Answers:
        with torch.inference_mode():
            return tuple(answer.numpy() for answer in loaded(torch.from_numpy(segments)))

    return ask


def _write_onnx(
    path: Path, found: Checkpoint, about: Mapping[str, Any], opset: int, batch: int | None
) -> Callable[[np.ndarray], Answers]:
    """`path` with its metadata, and what onnxruntime answers with it."""
    import onnx
    import onnxruntime

    names = list(about["outputs"])
    with _quiet():
        made = torch.onnx.export(
            _program(found, batch), dynamo=True, opset_version=opset, input_names=[_INPUT], output_names=names,
            verbose=False,
        )  # fmt: skip
    assert made is not None
    proto = made.model_proto
    written = next(one.version for one in proto.opset_import if not one.domain)
    if written != opset:
        raise InputError(f"--opset {opset}: torch {torch.__version__} wrote opset {written}; ask for that one")
    # where each operation came from is of no use there, and tells of folders of this machine
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del proto.graph.value_info[:]
    dimensions = ("segment", "", "time") if batch is None else ("", "", "")
    for value in (*proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]
        for place, dimension in zip(value.type.tensor_type.shape.dim, dimensions, strict=False):
            if dimension and place.dim_param:
                place.dim_param = dimension
    del proto.metadata_props[:]
    for name, fact in about.items():
        text = fact if isinstance(fact, str) else json.dumps(fact, ensure_ascii=False)
        proto.metadata_props.add(key=name, value=text)
    proto.producer_name, proto.producer_version = "ecgfm", importlib.metadata.version("ecgfm")
    onnx.save(proto, path)
    onnx.checker.check_model(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda segments: tuple(session.run(names, {_INPUT: segments}))


def _write_huggingface(
    out: Path, found: Checkpoint, about: Mapping[str, Any], metrics: Mapping[str, Any] | None, licence: str
) -> Callable[[np.ndarray], Answers]:
    """A folder in Hugging Face's layout that is a checkpoint of ours too, and what it answers once it is read back."""
    checkpoints.write(out, found.state, None, found.meta)
    labels = found.meta.labels
    of_labels = {
        "problem_type": _PROBLEM_TYPES[found.meta.task],
        "num_labels": len(labels),
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    config = {
        "model_type": "ecgfm",
        "architectures": ["Classifier" if labels else "PretrainModel"],
        "torch_dtype": "float32",
        **to_dict(found.model_config),
        **(of_labels if labels else {}),
        "weights_digest": about["digest"],
    }
    _write_json(out / "config.json", config)
    _write_json(out / "preprocessor_config.json", {"feature_extractor_type": "ecgfm", **about})
    n_parameters = sum(tensor.numel() for tensor in found.state.values())
    (out / "README.md").write_text(model_card(about, n_parameters, metrics, licence), encoding="utf-8")
    read_back = checkpoints.load(out)
    assert f"sha256:{checkpoints.digest(read_back.state)}" == about["digest"]
    return _asking(_network(read_back))


# ---- the comparison


def _random(found: Checkpoint, n_samples: int) -> np.ndarray:
    """(segment, lead, time) float32; one lacks a lead, and the last is of zeros alone."""
    shape = (_N_RANDOM, len(found.meta.leads), n_samples)
    segments = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    segments[1, -1] = 0
    segments[-1] = 0
    return segments


def _synthetic(found: Checkpoint, preparation: PrepareConfig) -> np.ndarray:
    """(segment, lead, time) float32, standardised: an ECG as each of the two kinds of synthetic ones is recorded."""
    segments = []
    for patient in (0, 1):
        one = next(recordings(seed=0, number=patient))
        repeats = math.ceil(preparation.segment_seconds * one.sampling_rate_hz / one.digital.shape[1]) + 1
        n_leads = len(one.leads)
        digital = Digital(
            np.tile(one.digital, repeats), np.full(n_leads, one.adc_gain_per_mv, float), np.zeros(n_leads)
        )
        record = EcgRecord(f"synthetic/{patient}", one.leads, float(one.sampling_rate_hz), digital)
        prepared = prepare_record(record, preparation)
        scale, offset, _ = standardisation(prepared.per_lead)
        standardised = prepared.segments * scale[:, None] + offset[:, None]
        segments.append(np.where(prepared.segments == INVALID, np.float32(0), standardised)[:2])
    return np.concatenate(segments)


def _equal(segments: np.ndarray, batch: int) -> list[np.ndarray]:
    """Batches of one size that hold all segments, the first ones twice if need be."""
    n_batches = math.ceil(len(segments) / batch)
    return np.split(segments[np.arange(n_batches * batch) % len(segments)], n_batches)


def _differences(
    ours: Callable[[np.ndarray], Answers],
    theirs: Callable[[np.ndarray], Answers],
    batches: Sequence[np.ndarray],
    names: Sequence[str],
) -> dict[str, float]:
    """Of each output the largest difference; NaN where there is one."""
    largest = dict.fromkeys(names, 0.0)
    for segments in batches:
        for name, expected, found in zip(names, ours(segments), theirs(segments), strict=True):
            if expected.shape != found.shape:
                raise InputError(f"{name}: expected an answer of shape {expected.shape}, found {found.shape}")
            largest[name] = float(np.maximum(largest[name], np.abs(expected - found).max()))
    return largest


# ---- the parts


def _check_options(kind: Format, opset: int, batch: int | None, evaluation: Path | None) -> None:
    if opset not in OPSETS:
        raise InputError(
            f"--opset {opset}: expected {OPSETS[0]} to {OPSETS[-1]}, which torch writes without conversion"
        )
    if batch is not None and batch < 1:
        raise InputError(f"--batch {batch}: expected dynamic or at least 1")
    if kind != "onnx" and opset != DEFAULT_OPSET:
        raise InputError(f"--opset is of --format onnx; leave it away with {kind}")
    if kind == "huggingface" and batch is not None:
        raise InputError("--batch is of --format onnx and torch: these weights take any number; leave it away")
    if kind != "huggingface" and evaluation is not None:
        raise InputError(f"--evaluation is for the model card of --format huggingface; leave it away with {kind}")
    if kind == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401 - torch's exporter needs it
        except ImportError as error:
            raise InputError(
                f"exporting to ONNX needs onnx, onnxscript and onnxruntime ({error}): pip install 'ecgfm[onnx]'"
            ) from error


@contextmanager
def _building(to: Path) -> Iterator[Path]:
    """A folder beside `to` that becomes `to` in the end, or is gone if that fails.

    Raises:
        InputError: `to` is there and not empty, or the folder it is to lie in is not there.
    """
    final = to.absolute()
    if os.path.lexists(final) and not (final.is_dir() and not any(final.iterdir())):
        raise InputError(
            f"{to}: expected a new or an empty folder, found {'files in it' if final.is_dir() else 'a file'}"
        )
    if not final.parent.is_dir():
        raise InputError(f"{to}: no folder {to.parent} to write into; make it first")
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says of packages that are not needed and of its own deprecations."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.setLevel(before)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
