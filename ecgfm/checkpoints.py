"""Checkpoints: a directory that describes itself, and the published ECG-FM files.

    <directory>/step_0000200/
        model.safetensors   every tensor of the model, under the published names
        optimizer.pt        what resuming needs besides; absent where training is not to go on
        meta.json           what the weights are and the hashes of the other files; written last

A checkpoint is complete if `meta.json` is there: it is built in a hidden sibling and renamed into place, so a killed
run leaves all of it or nothing that counts. Equal content gives equal bytes. Loading is strict: every tensor of the
file is used and every tensor of the model is filled, or an `InputError` lists the differences.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import pickle
import platform
import re
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from torch import Tensor, nn

from ecgfm.config import STRICT, ModelConfig, from_dict, to_dict
from ecgfm.ecg import LEADS, InputError
from ecgfm.files import sha256_of, sync
from ecgfm.model import PRETRAINING_HEADS, Classifier, Encoder, PretrainModel

MODEL, OPTIMIZER, META = "model.safetensors", "optimizer.pt", "meta.json"
BEST = "best.json"

PUBLISHED_SAMPLING_RATE_HZ = 500.0
PUBLISHED_SEGMENT_SAMPLES = 2500
PUBLISHED_DEFAULT_HEADS = 12

_STEP = re.compile(r"step_(\d{7,})")

# What torch.load raises for a file that is no checkpoint or a damaged one (found by damaging files at random).
_UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    struct.error,
    pickle.UnpicklingError,
)


@dataclass(frozen=True, config=STRICT)
class Meta:
    """What the weights are, and where training stands.

    kind: `pretrained` (encoder and pretraining heads) or `finetuned` (encoder and classifier)
    leads: the leads of the input, in order
    segment_samples: samples per lead of the segments trained on
    labels: what each logit is, in order; empty where pretrained, and where a published file does not say
    aggregation: label -> how a record's probability comes from its segments'
    progress: the caller's own, as JSON: position in the data, best score so far
    versions: of the libraries that wrote it; `save` fills them in
    files: sha256 of the files beside meta.json; `save` fills them in
    """

    kind: Literal["pretrained", "finetuned"]
    model: ModelConfig
    leads: tuple[str, ...]
    sampling_rate_hz: float
    segment_samples: int
    step: int = 0
    labels: tuple[str, ...] = ()
    aggregation: dict[str, Literal["mean", "max"]] = dataclasses.field(default_factory=dict)
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    files: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.leads) != self.model.n_leads:
            raise ValueError(f"leads must be {self.model.n_leads}, as the model takes, and are {len(self.leads)}")
        if set(self.aggregation) - set(self.labels):
            raise ValueError("aggregation must be of the labels, and names others")


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
    def kind(self) -> Literal["pretrained", "finetuned"]:
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
) -> Path:
    """Write `directory/step_<step>`, all of it or nothing, and return it. One of the same step is replaced.

    model_state: `state_dict()` of the model; on any device
    optimizer_state: all that resuming needs besides, of tensors and plain values: optimizer, generators
    """
    final = directory / f"step_{step:07d}"
    partial = directory / f".{final.name}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model_state.items()}
    safetensors.torch.save_file(state, partial / MODEL)
    (partial / MODEL).chmod(partial.stat().st_mode & 0o666)  # it writes 0600: a team shares the data directory
    if optimizer_state is not None:
        torch.save(dict(optimizer_state), partial / OPTIMIZER)
    files = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
    described = dataclasses.replace(meta, step=step, versions=_versions(), files=files)
    for name in files:
        sync(partial / name)
    _write(partial / META, to_dict(described))
    sync(partial)
    if final.exists():
        _remove(final)
    partial.rename(final)
    sync(directory)
    return final


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


def keep_last(directory: Path, n: int) -> None:
    """Remove all complete checkpoints but the last `n` and the best, and what killed runs have left."""
    complete = list(steps(directory).values())
    spared = {*complete[len(complete) - n :], best(directory)} if n < len(complete) else set(complete)
    for path in complete:
        if path not in spared:
            _remove(path)
    for leftover in directory.glob(".step_*"):
        shutil.rmtree(leftover)


# ---- reading -----------------------------------------------------------------------------------------------------


def load(path: Path, n_heads: int | None = None) -> Checkpoint:
    """Read a checkpoint: a directory of ours (`.../step_0000200`) or a published ECG-FM file (`.pt`).

    A published file's architecture is read from its tensors, because a finetuned one may carry the default architecture
    in place of its own; only the number of attention heads leaves no trace in them and comes from the file's
    configuration, or from `n_heads`. Published files are of 12 leads, 500 Hz and 5 s, and name no labels.

    Raises:
        InputError: not there, damaged, or its tensors are not exactly those of the architecture.
    """
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint")
    checkpoint = _load_directory(path) if path.is_dir() else _load_published(path, n_heads)
    _check(_without_weights(checkpoint), checkpoint.state, str(path))
    return checkpoint


def load_optimizer(path: Path) -> dict[str, Any]:
    """What `save` was given as `optimizer_state`, tensors on the CPU. `path` is the checkpoint's directory.

    Raises:
        InputError: not there or damaged.
    """
    meta = _read_meta(path)
    if OPTIMIZER not in meta.files:
        raise InputError(f"{path}: holds no {OPTIMIZER}, so training cannot go on from it; name it as a start instead")
    _verify(path, meta, OPTIMIZER)
    return _torch_load(path / OPTIMIZER)


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
    return Checkpoint(path, meta, state)


def _read_meta(path: Path) -> Meta:
    if not (path / META).is_file():
        inside = steps(path)
        hint = f"name one of {_listed(inside)} in it" if inside else "it was not finished, or is something else"
        raise InputError(f"{path}: not a checkpoint, it has no {META}; {hint}")
    return from_dict(Meta, _read_json(path / META), str(path / META))


def _verify(path: Path, meta: Meta, name: str) -> None:
    """A file must be, byte for byte, what `save` wrote."""
    if not (path / name).is_file() or name not in meta.files:
        raise InputError(f"{path}: expected {name}, found none; the checkpoint is damaged: remove {path}")
    if sha256_of(path / name) != meta.files[name]:
        raise InputError(f"{path / name}: its content is not what was saved; the checkpoint is damaged: remove {path}")


def _load_published(path: Path, n_heads: int | None) -> Checkpoint:
    loaded = _torch_load(path)
    tensors, cfg = loaded.get("model"), loaded.get("cfg")
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"{path}: expected a published ECG-FM checkpoint with its tensors under 'model', found none")
    cfg_model = cfg.get("model") if isinstance(cfg, dict) else None
    state = {_current_name(name): tensor.float() for name, tensor in tensors.items()}
    finetuned = "proj.weight" in state
    try:
        model = _architecture(state, "encoder." if finetuned else "", cfg_model or {}, n_heads, path)
    except KeyError as error:
        raise InputError(f"{path}: its tensors are not an ECG-FM model's: missing {error.args[0]}") from error
    if model.n_leads != len(LEADS):
        raise InputError(f"{path}: expected a model of {len(LEADS)} leads, found {model.n_leads}; which, it cannot say")
    meta = Meta(
        kind="finetuned" if finetuned else "pretrained",
        model=model,
        leads=LEADS,
        sampling_rate_hz=PUBLISHED_SAMPLING_RATE_HZ,
        segment_samples=PUBLISHED_SEGMENT_SAMPLES,
    )
    return Checkpoint(path, meta, state)


def _current_name(name: str) -> str:
    """Weight norm's parameters had other names before torch 2.0."""
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        if name.endswith(f"conv_pos.pos_conv.0.{old}"):
            return name.removesuffix(old) + f"parametrizations.weight.{new}"
    return name


def _architecture(
    state: Mapping[str, Tensor], prefix: str, cfg_model: Mapping[str, Any], n_heads: int | None, path: Path
) -> ModelConfig:
    """The architecture whose tensors these are. The strides, which they do not show, equal the kernels as published.

    Raises:
        KeyError: a tensor that tells the architecture is missing.
        InputError: the number of heads cannot be known, or the numbers do not fit each other.
    """
    if cfg_model.get("layer_norm_first"):
        raise InputError(f"{path}: expected a post-norm transformer, found layer_norm_first; it cannot be loaded")

    def shape(name: str, dimensions: int) -> torch.Size:
        tensor = state[prefix + name]
        if tensor.ndim != dimensions:
            raise InputError(f"{path}: {prefix + name}: expected {dimensions} dimensions, found {tuple(tensor.shape)}")
        return tensor.shape

    def count(pattern: str) -> int:
        numbers = [int(m[1]) for name in state if (m := re.match(re.escape(prefix) + pattern, name))]
        return max(numbers, default=-1) + 1

    n_convs = count(r"feature_extractor\.conv_layers\.(\d+)\.")
    kernels = [shape(f"feature_extractor.conv_layers.{i}.0.weight", 3)[2] for i in range(n_convs)]
    channels, n_leads, _ = shape("feature_extractor.conv_layers.0.0.weight", 3)
    width, group_width, pos_kernel = shape("conv_pos.pos_conv.0.parametrizations.weight.original1", 3)
    found: dict[str, Any] = {
        "n_leads": n_leads,
        "conv_channels": channels,
        "conv_kernels": kernels,
        "conv_strides": kernels,
        "width": width,
        "n_layers": count(r"encoder\.layers\.(\d+)\."),
        "ffn_width": shape("encoder.layers.0.fc1.weight", 2)[0],
        "pos_conv_kernel": pos_kernel,
        "pos_conv_groups": width // group_width,
    }
    if not prefix:
        _, all_entries, entry_width = shape("quantizer.vars", 3)
        contrast_width, codebook_width = shape("project_q.weight", 2)
        found |= {
            "n_codebooks": codebook_width // entry_width,
            "codebook_entries": all_entries * entry_width // codebook_width,
            "codebook_width": codebook_width,
            "contrast_width": contrast_width,
        }
    return from_dict(ModelConfig, found | {"n_heads": n_heads or _heads(cfg_model, found, path)}, str(path))


def _heads(cfg_model: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> int:
    """The number of heads as the file's configuration has it, if that can be this model's."""
    heads = cfg_model.get("encoder_attention_heads")
    theirs = {"width": "encoder_embed_dim", "n_layers": "encoder_layers", "ffn_width": "encoder_ffn_embed_dim"}
    its_own = all(cfg_model.get(key, found[ours]) == found[ours] for ours, key in theirs.items())
    # A configuration of another architecture is the default one, and then so are its heads.
    if not isinstance(heads, int) or heads < 1 or (not its_own and heads == PUBLISHED_DEFAULT_HEADS):
        raise InputError(
            f"{path}: its configuration is not that of its tensors (width {found['width']}, {found['n_layers']} "
            f"layers), so the number of attention heads is unknown; give n_heads"
        )
    return heads


def _torch_load(path: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{path}: not a checkpoint, or a damaged one ({reason}); get it again") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: expected a checkpoint (a dict), found {type(loaded).__name__}")
    return loaded


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
