"""Checkpoints: a directory that describes itself, and the published ECG-FM files.

    <directory>/step_0000200/
        model.safetensors   every tensor of the model, under the published names
        optimizer.pt        what resuming needs besides; absent where training is not to go on
        seen.safetensors    digests of the records and patients learnt from (leakage.py); absent where unknown
        meta.json           what the weights are and the hashes of the other files; written last

A checkpoint is complete if `meta.json` is there: it is built in a hidden sibling and renamed into place, so a killed
run leaves all of it or nothing that counts. Equal content gives equal bytes. Loading is strict: every tensor of the
file is used and every tensor of the model is filled, or an `InputError` lists the differences.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from torch import Tensor, nn

from ecgfm import published
from ecgfm.config import STRICT, Finite, ModelConfig, Positive, Share, Task, from_dict, to_dict
from ecgfm.ecg import LEADS, InputError
from ecgfm.files import content_at, digest_of, sha256_of, sync
from ecgfm.leakage import Seen
from ecgfm.model import PRETRAINING_HEADS, Classifier, Encoder, PretrainModel
from ecgfm.published import read_published, torch_load

MODEL, OPTIMIZER, META = "model.safetensors", "optimizer.pt", "meta.json"
SEEN = "seen.safetensors"
BEST = "best.json"

PAIRS = ("cmsc_*",)
LABELLED = ("labelled_*", "label_space.yaml")
"""Which files of the manifests the two kinds of training read."""

Kind = Literal["pretrained", "finetuned"]
Aggregation = Literal["mean", "max"]

_STEP = re.compile(r"step_(\d{7,})")


@dataclass(frozen=True, config=STRICT)
class Meta:
    """What the weights are, and where training stands.

    kind: `pretrained` (encoder and pretraining heads) or `finetuned` (encoder and classifier)
    leads: the leads of the input, in order
    segment_samples: samples per lead of the segments trained on
    departures: where the preparation of the segments departs from the published recipe (`PrepareConfig.departures`)
    standardisation: `record`: each lead minus its mean, divided by its population standard deviation, both over the
        whole record; 0 where it does not vary
    labels: what each logit is, in order; empty where pretrained, and where a published file does not say
    task: what the labels are: each present or absent by itself (`multilabel`), classes of which the most probable is
        called (`multiclass`), or numbers (`regression`)
    aggregation: label -> how a record's probability, or number, comes from its segments'
    temperature: label -> what a record's logit is divided by to give its calibrated probability; 1 where not named. Of
        classes all have the same
    shift: label -> what is added to a record's logit, so divided; 0 where not named. Classes have none
    thresholds: label -> the calibrated probability of a record from which on it is called present; empty where none was
        chosen, and but for task `multilabel`
    units: of numbers, label -> unit, where it was given
    scaling: of numbers, label -> mean and standard deviation of the records trained on: a label's number is the
        network's output times the latter, plus the former
    training_data: what was trained on -> digest of its content (`training_data` below)
    progress: the caller's own, as JSON: position in the data, best score so far
    versions: of the libraries that wrote it; `save` fills them in
    files: sha256 of the files beside meta.json; `save` fills them in
    """

    kind: Kind
    model: ModelConfig
    leads: tuple[str, ...]
    sampling_rate_hz: float
    segment_samples: int
    departures: dict[str, Any] = dataclasses.field(default_factory=dict)
    standardisation: Literal["record"] = "record"
    step: int = 0
    labels: tuple[str, ...] = ()
    task: Task = "multilabel"
    aggregation: dict[str, Aggregation] = dataclasses.field(default_factory=dict)
    temperature: dict[str, Positive] = dataclasses.field(default_factory=dict)
    shift: dict[str, Finite] = dataclasses.field(default_factory=dict)
    thresholds: dict[str, Share] = dataclasses.field(default_factory=dict)
    units: dict[str, str] = dataclasses.field(default_factory=dict)
    scaling: dict[str, tuple[float, Positive]] = dataclasses.field(default_factory=dict)
    training_data: dict[str, str] = dataclasses.field(default_factory=dict)
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    files: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.leads) != self.model.n_leads:
            raise ValueError(f"leads must be {self.model.n_leads}, as the model takes, and are {len(self.leads)}")
        for name in ("aggregation", "temperature", "shift", "thresholds", "units", "scaling"):
            if set(getattr(self, name)) - set(self.labels):
                raise ValueError(f"{name} must be of the labels, and names others")
        if (self.task == "regression") != (bool(self.labels) and set(self.scaling) == set(self.labels)):
            raise ValueError("scaling must be of every label with task 'regression', and of none else")
        if self.thresholds and self.task != "multilabel":
            raise ValueError(f"thresholds must be of task 'multilabel', and the task is {self.task!r}")

    @property
    def scale(self) -> np.ndarray:
        """(mean and standard deviation, label) float64 of `scaling`, in the order of the labels."""
        return np.array([self.scaling[label] for label in self.labels], dtype=np.float64).T


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights that have been checked against their architecture.

    path: where they were read
    state: tensor by published name, on the CPU
    """

    path: Path
    meta: Meta
    state: dict[str, Tensor]

    @property
    def kind(self) -> Kind:
        """`pretrained` or `finetuned`."""
        return self.meta.kind

    @property
    def model_config(self) -> ModelConfig:
        """The architecture."""
        return self.meta.model


# ---- writing -----------------------------------------------------------------------------------------------------


def save(
    directory: Path,
    step: int,
    model_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Any] | None,
    meta: Meta,
    seen: Seen | None = None,
) -> Path:
    """Write `directory/step_<step>`, all of it or nothing, and return it. One of the same step is replaced.

    model_state: `state_dict()` of the model; on any device
    optimizer_state: all that resuming needs besides, of tensors and plain values: optimizer, generators
    seen: the records and patients learnt from; None where they are unknown
    """
    final = directory / f"step_{step:07d}"
    write(final, model_state, optimizer_state, dataclasses.replace(meta, step=step), seen)
    return final


def write(
    final: Path,
    model_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Any] | None,
    meta: Meta,
    seen: Seen | None = None,
) -> None:
    """`save`, with another name than its step: `final` is the checkpoint's directory."""
    partial = final.with_name(f".{final.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()  # not its parents: where a drive is gone, they would be made on another disk
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model_state.items()}
    (partial / MODEL).write_bytes(safetensors.torch.save(state))  # save_file has an error of its own for a full disk
    (partial / MODEL).chmod(partial.stat().st_mode & 0o666)  # it writes 0600: a team shares the data directory
    if optimizer_state is not None:
        with open(partial / OPTIMIZER, "wb") as file:  # given a path, torch says "unexpected pos" for a full disk
            torch.save(dict(optimizer_state), file)
    if seen is not None:
        (partial / SEEN).write_bytes(seen.to_bytes())
    files = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
    for name in files:
        sync(partial / name)
    _write(partial / META, to_dict(dataclasses.replace(meta, versions=_versions(), files=files)))
    sync(partial)
    if final.exists():
        _remove(final)
    partial.rename(final)
    sync(final.parent)


def training_data(inputs: Mapping[str, Any], manifest_files: Sequence[str] = PAIRS) -> dict[str, str]:
    """What a run learns from, for `Meta.training_data`: `manifests` and, of all slices of a source, `prepare <source>`.

    Digests of content, as the run's key has them, rather than the keys of the directories: a key may change and what
    is read stay as it was, and then so must the checkpoint. `ecgfm checkpoint show` finds the keys.

    inputs: of the stage: `manifests`, and `slices`, the directories of the prepared slices
    manifest_files: which files of the manifests it reads
    """
    of_source: dict[str, dict[str, str]] = defaultdict(dict)
    for directory in inputs["slices"]:
        name, digest = content_at(directory, "shard.h5")
        of_source[" ".join(name.split()[:2])][name] = digest
    prepared = {source: digest_of(of_slice) for source, of_slice in sorted(of_source.items())}
    return {"manifests": content_at(inputs["manifests"], *manifest_files)[1], **prepared}


def steps(directory: Path) -> dict[int, Path]:
    """The complete checkpoints below `directory`, by step, in order."""
    found = {
        int(match[1]): path
        for path in (directory.iterdir() if directory.is_dir() else ())
        if (match := _STEP.fullmatch(path.name)) and (path / META).is_file()
    }
    return dict(sorted(found.items()))


def latest(directory: Path) -> Path | None:
    """The complete checkpoint of the highest step below `directory`; None where there is none."""
    return next(reversed(steps(directory).values()), None)


def meant_by(path: Path) -> Path | None:
    """The checkpoint to start from: what lies at `path`, or of a training run's directory the latest; None where that
    has none."""
    return path if path.is_file() or (path / META).is_file() else latest(path)


def mark_best(directory: Path, step: int) -> None:
    """Remember a step that is there as the best so far; `keep_last` spares it."""
    if step not in steps(directory):
        raise InputError(f"{directory}: no complete checkpoint of step {step}; it has {_listed(steps(directory))}")
    temporary = directory / f".{BEST}.partial"
    _write(temporary, {"step": step})
    temporary.rename(directory / BEST)
    sync(directory)


def best(directory: Path) -> Path | None:
    """The checkpoint marked as best; None where none is marked.

    Raises:
        InputError: the marked one is not there, or the mark cannot be read.
    """
    mark = directory / BEST
    if not mark.exists():
        return None
    step = _read_json(mark).get("step")
    found = steps(directory)
    if step not in found:
        raise InputError(f"{mark}: marks step {step} as best, and there is only {_listed(found)}; finetune again")
    return found[step]


def keep_last(directory: Path, n: int, every: int = 0) -> None:
    """Remove all complete checkpoints but the last `n`, the best, and those whose step is a multiple of `every` (0:
    none), and what killed runs have left."""
    complete = steps(directory)
    spared = {*list(complete.values())[-n:], best(directory)}
    for step, path in complete.items():
        if path not in spared and not (every and step % every == 0):
            _remove(path)
    for leftover in directory.glob(".step_*"):
        shutil.rmtree(leftover)


# ---- reading -----------------------------------------------------------------------------------------------------


def load(path: Path, n_heads: int | None = None) -> Checkpoint:
    """Read a checkpoint: a directory of ours (`.../step_0000200`) or a published ECG-FM file (`.pt`).

    Published files are of 12 leads, 500 Hz and 5 s, and name no labels. Their number of attention heads comes from
    their configuration, or from `n_heads` (`published.read_published`).

    Raises:
        InputError: not there, damaged, its tensors are not exactly those of the architecture, or hold NaN or infinity.
    """
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint")
    checkpoint = _load_directory(path) if path.is_dir() else _load_published(path, n_heads)
    _check(_without_weights(checkpoint), checkpoint.state, str(path))
    broken = [name for name, tensor in checkpoint.state.items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(
            f"{path}: {len(broken)} of its {len(checkpoint.state)} tensors hold NaN or infinity, the first is "
            f"{broken[0]}; the training that wrote it had failed: take an earlier checkpoint"
        )
    return checkpoint


def digest(state: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors: their names, types, shapes and values. Equal weights have equal digests, in whatever
    file they lie."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def load_optimizer(path: Path) -> dict[str, Any]:
    """What `save` was given as `optimizer_state`, tensors on the CPU. `path` is the checkpoint's directory.

    Raises:
        InputError: not there or damaged.
    """
    meta = _read_meta(path)
    if OPTIMIZER not in meta.files:
        raise InputError(f"{path}: holds no {OPTIMIZER}, so training cannot go on from it; name it as a start instead")
    _verify(path, meta, OPTIMIZER)
    return torch_load(path / OPTIMIZER)


def seen(checkpoint: Checkpoint) -> Seen | None:
    """The records and patients that the weights have learnt from; None where they do not say.

    Raises:
        InputError: damaged.
    """
    if SEEN not in checkpoint.meta.files:
        return None
    _verify(checkpoint.path, checkpoint.meta, SEEN)
    return Seen.from_bytes((checkpoint.path / SEEN).read_bytes(), str(checkpoint.path / SEEN))


def build(checkpoint: Checkpoint) -> PretrainModel | Classifier:
    """The model of a checkpoint with its weights, on the CPU, in eval mode, without dropout.

    Raises:
        InputError: the tensors are not exactly those of the architecture; all differences are listed.
    """
    model = _without_weights(checkpoint)
    _fill(model, checkpoint.state, str(checkpoint.path))
    return model.eval()


def build_encoder(checkpoint: Checkpoint) -> Encoder:
    """The encoder alone of a checkpoint of either kind, as `build` makes it: for embeddings."""
    with torch.device("meta"):
        encoder = Encoder(checkpoint.model_config)
    _fill(encoder, encoder_state(checkpoint), str(checkpoint.path))
    return encoder.eval()


def encoder_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of the encoder alone, by the names they have in `Encoder`."""
    if checkpoint.kind == "finetuned":
        prefix = "encoder."
        return {
            name.removeprefix(prefix): tensor for name, tensor in checkpoint.state.items() if name.startswith(prefix)
        }
    return {
        name: tensor for name, tensor in checkpoint.state.items() if name.partition(".")[0] not in PRETRAINING_HEADS
    }


def load_state(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copy `state` into `module`, strictly. `where` names the state in an error.

    Raises:
        InputError: tensors missing, not of the module, or of another shape or type; all of them are listed.
    """
    _check(module, state, where)
    module.load_state_dict(state)


# ---- the parts ---------------------------------------------------------------------------------------------------


def _without_weights(checkpoint: Checkpoint) -> PretrainModel | Classifier:
    """The model of a checkpoint without storage: no weight is drawn at random, so none can be left random."""
    with torch.device("meta"):
        if checkpoint.kind == "pretrained":
            return PretrainModel(checkpoint.model_config)
        # A published file names no labels; without the tensor either, what is missing is said by the check.
        n_labels = len(checkpoint.meta.labels) or len(checkpoint.state.get("proj.weight", ()))
        return Classifier(checkpoint.model_config, n_labels)


def _fill(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """`load_state` for a module without storage (torch's meta device): its parameters become copies of the tensors"""
    _check(module, state, where)
    module.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)


def _check(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Raise one InputError that lists every difference between a state and a module."""
    expected = module.state_dict()
    differences = [f"missing {name}" for name in expected if name not in state]
    differences += [f"not of this model {name}" for name in state if name not in expected]
    for name in expected.keys() & state.keys():
        ours, theirs = expected[name], state[name]
        if ours.shape != theirs.shape:
            differences.append(f"{name}: expected shape {tuple(ours.shape)}, found {tuple(theirs.shape)}")
        elif ours.dtype != theirs.dtype:
            differences.append(f"{name}: expected {ours.dtype}, found {theirs.dtype}")
    if differences:
        raise InputError(
            f"{where}: its {len(state)} tensors are not those of this model's {len(expected)}: "
            f"{'; '.join(sorted(differences))}; is it a checkpoint of another architecture?"
        )


def _load_directory(path: Path) -> Checkpoint:
    meta = _read_meta(path)
    _verify(path, meta, MODEL)
    try:
        state = safetensors.torch.load_file(path / MODEL)
    except SafetensorError as error:
        raise InputError(f"{path / MODEL}: not a safetensors file ({error}); remove {path}") from error
    if meta.model.n_layers > len(state):
        raise InputError(
            f"{path / META}: model.n_layers is {meta.model.n_layers:,}, there are {len(state)} tensors; remove {path}"
        )
    return Checkpoint(path, meta, state)


def _read_meta(path: Path) -> Meta:
    if not (path / META).is_file():
        inside = steps(path)
        hint = f"name one of {_listed(inside)} in it" if inside else "it was not finished, or is something else"
        if trained := [stage for stage in ("finetune", "pretrain") if latest(path / stage)]:
            hint = f"a run's are {' and '.join(str(path / stage) for stage in trained)}"
        raise InputError(f"{path}: not a checkpoint, it has no {META}; {hint}")
    values = _read_json(path / META)
    if not {"kind", "model"} <= values.keys():
        raise InputError(f"{path}: not a checkpoint of ecgfm: its {META} has no kind and model")
    return from_dict(Meta, values, str(path / META))


def _verify(path: Path, meta: Meta, name: str) -> None:
    """A file must be, byte for byte, what `save` wrote."""
    if not (path / name).is_file() or name not in meta.files:
        raise InputError(f"{path}: expected {name}, found none; the checkpoint is damaged: remove {path}")
    if sha256_of(path / name) != meta.files[name]:
        raise InputError(f"{path / name}: its content is not what was saved; the checkpoint is damaged: remove {path}")


def _load_published(path: Path, n_heads: int | None) -> Checkpoint:
    if path.name in (MODEL, OPTIMIZER, SEEN, META) and (path.parent / META).is_file():
        raise InputError(f"{path}: a part of a checkpoint; name the directory, {path.parent}")
    found = read_published(path, n_heads)
    meta = Meta(
        kind="finetuned" if found.finetuned else "pretrained",
        model=found.model,
        leads=LEADS,
        sampling_rate_hz=published.SAMPLING_RATE_HZ,
        segment_samples=published.SEGMENT_SAMPLES,
        step=found.step,
    )
    return Checkpoint(path, meta, found.state)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise InputError(f"{path}: not JSON ({error}); the file is damaged: remove it") from error
    if not isinstance(loaded, dict):
        raise InputError(
            f"{path}: expected a JSON object, found {type(loaded).__name__}; the file is damaged: remove it"
        )
    return loaded


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    sync(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint so that half of it does not count as one."""
    removed = path.with_name(f".{path.name}.removed")
    if removed.exists():
        shutil.rmtree(removed)
    path.rename(removed)
    shutil.rmtree(removed)


def _listed(found: Mapping[int, Path]) -> str:
    return ", ".join(path.name for path in found.values()) or "none"


def _versions() -> dict[str, str]:
    libraries = ("ecgfm", "torch", "safetensors", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in libraries}
