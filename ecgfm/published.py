"""The published ECG-FM files, as their trainer wrote them with `torch.save`. Nothing in a file is run.

A file's architecture is read from its tensors, because a finetuned one may carry the default architecture in place of
its own; only the number of attention heads leaves no trace in them and comes from the file's configuration, or from
the caller. The strides, which the tensors do not show either, equal the kernels as published.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from ecgfm.config import ModelConfig, from_dict
from ecgfm.ecg import LEADS, InputError

SAMPLING_RATE_HZ = 500.0
SEGMENT_SAMPLES = 2500
DEFAULT_HEADS = 12

# The logits of mimic_iv_ecg_finetuned.pt, in order, and how a record's probability comes from its segments'. Source:
# data/mimic_iv_ecg/labels/label_def.csv and notebooks/infer_quickstart.ipynb of github.com/bowang-lab/ECG-FM, whose
# columns of predictions are named by the one and aggregated by the other.
_MAX: Final = "max"
_MEAN: Final = "mean"
MIMIC_IV_ECG_LABELS: dict[str, Literal["mean", "max"]] = {
    "Poor data quality": _MAX,
    "Sinus rhythm": _MEAN,
    "Premature ventricular contraction": _MAX,
    "Tachycardia": _MEAN,
    "Ventricular tachycardia": _MAX,
    "Supraventricular tachycardia with aberrancy": _MAX,
    "Atrial fibrillation": _MEAN,
    "Atrial flutter": _MEAN,
    "Bradycardia": _MEAN,
    "Accessory pathway conduction": _MEAN,
    "Atrioventricular block": _MEAN,
    "1st degree atrioventricular block": _MEAN,
    "Bifascicular block": _MEAN,
    "Right bundle branch block": _MEAN,
    "Left bundle branch block": _MEAN,
    "Infarction": _MEAN,
    "Electronic pacemaker": _MAX,
}

# What zipfile and torch.load raise for a file that is no checkpoint or a damaged one (found by damaging files at
# random).
_UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,  # NotImplementedError and RecursionError among them
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)

# How files begin that people take for a checkpoint, and what to do about them.
_TAKEN_FOR_ONE = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the file; fetch the file itself with 'git lfs pull'"),
    (b"<", "a web page in place of the file; the site wants a login or a consent first: get the file again"),
    (b"{", "JSON; name a .pt file, or the directory with meta.json in it"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
)


@dataclass(frozen=True)
class Published:
    """A published file.

    step: the optimizer's updates, 0 where the file does not say
    state: tensor by published name, float32; the older names of weight norm have become the newer ones
    """

    finetuned: bool
    model: ModelConfig
    step: int
    state: dict[str, Tensor]


def read_published(path: Path, n_heads: int | None = None) -> Published:
    """Read a published file, pretrained or finetuned.

    Raises:
        InputError: damaged or something else, not an ECG-FM model, not of 12 leads, or its heads cannot be known.
    """
    loaded = torch_load(path)
    tensors, cfg = loaded.get("model"), loaded.get("cfg")
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise InputError(f"{path}: expected a published ECG-FM checkpoint with its tensors under 'model', found none")
    state = {_current_name(str(name)): _dense(path, name, tensor) for name, tensor in tensors.items()}
    cfg_model = cfg.get("model") if isinstance(cfg, dict) else None
    cfg_model = cfg_model if isinstance(cfg_model, dict) else {}
    finetuned = "proj.weight" in state
    try:
        model = _architecture(state, "encoder." if finetuned else "", cfg_model, n_heads, path)
    except KeyError as error:
        raise InputError(f"{path}: its tensors are not an ECG-FM model's: missing {error.args[0]}") from error
    if model.n_leads != len(LEADS):
        raise InputError(f"{path}: expected a model of {len(LEADS)} leads, found {model.n_leads}; which, it cannot say")
    return Published(finetuned, model, _updates(loaded.get("optimizer_history")), state)


def torch_load(path: Path) -> dict[str, Any]:
    """The dict of tensors and plain values that `torch.save` wrote, on the CPU. What it holds besides is not unpickled.

    Raises:
        InputError: damaged, or anything else.
    """
    try:
        _look_at(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles: they are refused anyway
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except _UNREADABLE as error:
        reason = " ".join(str(error).partition("\n")[0].split()) or type(error).__name__
        if "Weights only load failed" in reason:  # its advice is to run what is in the file
            forbidden = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"its pickle asks for {forbidden[1]}, and no code is run" if forbidden else "not of torch.save"
        raise InputError(f"{path}: not a checkpoint, or a damaged one ({reason}); get it again") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: expected a checkpoint (a dict), found {type(loaded).__name__}")
    return loaded


def _look_at(path: Path) -> None:
    """Refuse what is no file of `torch.save`, and damage that torch would not notice: it checks no checksum."""
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise InputError(f"{path}: the file is empty; get it again")
    for beginning, what in _TAKEN_FOR_ONE:
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(beginning):
            raise InputError(f"{path}: not a checkpoint but {what}")
    if head[8:9] == b"{":
        raise InputError(f"{path}: a safetensors file alone; name the directory it lies in, with its meta.json")
    if not head.startswith(b"PK"):
        return  # older than torch 1.6, or something else: torch.load tells
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise InputError(f"{path}: cut short, its end is missing; get it again") from error
    with archive:
        entries = archive.infolist()
        if not any(entry.filename.endswith("/data.pkl") for entry in entries):
            raise InputError(f"{path}: a zip archive without a checkpoint's data.pkl; unpack it and name the .pt file")
        # torch.save stores: a packed entry is not its own, and could be any size
        packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        damaged = packed[0] if packed else archive.testzip()
    if damaged:
        raise InputError(f"{path}: damaged: {damaged!r} in it is not what was written; get it again")


def _dense(path: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor as float32, if it is of floats that lie in the file (a view of few bytes can pose as any size)."""
    if not re.fullmatch(r"[\w.]{1,200}", str(name)):
        raise InputError(f"{path}: its tensors are not an ECG-FM model's: one is named {str(name)[:200]!r}")
    dense = tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()
    if not dense or not 0 < tensor.numel() * tensor.element_size() <= path.stat().st_size:
        raise InputError(
            f"{path}: {name}: expected a dense tensor of floats, found {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    return tensor.float()


def _current_name(name: str) -> str:
    """Weight norm's parameters had other names before torch 2.0."""
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        if name.endswith(f"conv_pos.pos_conv.0.{old}"):
            return name.removesuffix(old) + f"parametrizations.weight.{new}"
    return name


def _updates(history: Any) -> int:
    """The updates done, of the trainer's `optimizer_history`."""
    last = history[-1] if isinstance(history, list) and history else None
    updates = last.get("num_updates") if isinstance(last, dict) else None
    return updates if isinstance(updates, int) and updates > 0 else 0


def _architecture(
    state: Mapping[str, Tensor], prefix: str, cfg_model: Mapping[str, Any], n_heads: int | None, path: Path
) -> ModelConfig:
    """The architecture whose tensors these are.

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
        found = max(numbers, default=-1) + 1
        if found > len(state):
            raise InputError(f"{path}: expected layers numbered from 0, found one numbered {found - 1:,}")
        return found

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
    if not isinstance(heads, int) or heads < 1 or (not its_own and heads == DEFAULT_HEADS):
        raise InputError(
            f"{path}: its configuration is not that of its tensors (width {found['width']}, {found['n_layers']} "
            f"layers), so the number of attention heads is unknown; give n_heads (--heads; "
            f"published: {DEFAULT_HEADS})"
        )
    return heads
