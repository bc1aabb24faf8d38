"""What `ecgfm checkpoint` does: a look at a checkpoint, and one of ours made of a published file."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ecgfm import checkpoints
from ecgfm.checkpoints import Aggregation, Checkpoint, Kind
from ecgfm.config import Task, departures_in_words, to_dict
from ecgfm.ecg import InputError
from ecgfm.files import content_at, sha256_of
from ecgfm.label_space import read_label_space
from ecgfm.model import PRETRAINING_HEADS, n_frames
from ecgfm.published import MIMIC_IV_ECG_LABELS

BUILT_IN_LABELS = {"mimic_iv_ecg": MIMIC_IV_ECG_LABELS}
"""The published label sets whose order is known: name -> label -> aggregation."""

_AGGREGATIONS: dict[str, Aggregation] = {"mean": "mean", "max": "max"}
_TASKS: dict[Task, str] = {
    "multilabel": "multilabel: each label is present or absent by itself",
    "multiclass": "multiclass: of the labels exactly one is present, the most probable",
    "regression": "regression: each label is a number, the mean of the segments' numbers",
}
_HEADS_FIELDS = ("n_codebooks", "codebook_entries", "codebook_width", "contrast_width")
_PARTS = {
    "feature_extractor": "feature extractor",
    "layer_norm": "projection",
    "post_extract_proj": "projection",
    "conv_pos": "positional convolution",
    "encoder": "transformer",
    "proj": "classifier",
} | dict.fromkeys(PRETRAINING_HEADS, "pretraining heads")


def find(path: Path) -> tuple[Path, str]:
    """The checkpoint meant by a path, and in words which of several it is.

    path: a published file; a directory of ours; or the output of a training stage, of which the best is meant, or the
        latest where none is marked
    """
    inside = checkpoints.steps(path)
    if not inside or (path / checkpoints.META).exists():
        return path, ""
    marked = checkpoints.best(path)
    chosen = marked or checkpoints.latest(path)
    assert chosen is not None
    which = "the best" if marked else "the latest"
    return chosen, f"{which} of {len(inside)}" if len(inside) > 1 else ""


def facts(path: Path, n_heads: int | None = None) -> dict[str, Any]:
    """All there is to say about a checkpoint, as JSON. Raises InputError as `checkpoints.load` does."""
    chosen, which = find(path)
    found = checkpoints.load(chosen, n_heads)
    meta = found.meta
    files = sorted(chosen.iterdir()) if chosen.is_dir() else [chosen]
    # of a finetuned model the pretraining heads are not there: what its architecture says of them is no fact
    unknown = _HEADS_FIELDS if found.kind == "finetuned" else ()
    parts = parameters_of_parts(found.state, found.kind)
    return {
        "path": str(chosen),
        "which": which,
        "format": "ecgfm checkpoint" if chosen.is_dir() else "published ECG-FM file",
        "kind": found.kind,
        "model": {name: value for name, value in to_dict(meta.model).items() if name not in unknown},
        "parameters": sum(parts.values()),
        "parameters_of": parts,
        "tensors": len(found.state),
        "step": meta.step,
        "leads": list(meta.leads),
        "sampling_rate_hz": meta.sampling_rate_hz,
        "segment_samples": meta.segment_samples,
        "frames": n_frames(meta.model, meta.segment_samples),
        "departures": dict(meta.departures),
        "standardisation": meta.standardisation,
        "n_logits": len(found.state["proj.bias"]) if found.kind == "finetuned" else 0,
        "labels": list(meta.labels),
        "task": meta.task,
        "units": dict(meta.units),
        "scaling": {label: list(both) for label, both in meta.scaling.items()},
        "aggregation": dict(meta.aggregation),
        "temperature": dict(meta.temperature),
        "shift": dict(meta.shift),
        "thresholds": dict(meta.thresholds),
        "training_data": dict(meta.training_data),
        "training_data_keys": _keys(chosen, found),
        "converted_from_sha256": meta.progress.get("converted_from_sha256"),
        "versions": dict(meta.versions),
        "bytes": {file.name: file.stat().st_size for file in files},
        "digest": checkpoints.digest(found.state),
    }


def parameters_of_parts(state: Mapping[str, Tensor], kind: Kind) -> dict[str, int]:
    """How many parameters each part of the network has, in the order of the signal's way; parts that are not there are
    left out."""
    counts = dict.fromkeys(_PARTS.values(), 0)
    for name, tensor in state.items():
        stem = name.removeprefix("encoder.") if kind == "finetuned" else name
        counts[_PARTS[stem.partition(".")[0]]] += tensor.numel()
    return {part: count for part, count in counts.items() if count}


def describe(found: Mapping[str, Any]) -> list[str]:
    """`facts` as lines to print."""
    model, n_leads = found["model"], len(found["leads"])
    kernels, strides = model["conv_kernels"], model["conv_strides"]
    seconds = found["segment_samples"] / found["sampling_rate_hz"]
    rows = [("kind", f"{found['kind']}, {found['format']}")]
    rows += [("parameters", f"{found['parameters']:,} in {found['tensors']} tensors")]
    widest = max(len(f"{count:,}") for count in found["parameters_of"].values())
    rows += [("", f"{count:>{widest},}  {part}") for part, count in found["parameters_of"].items()]
    rows += [
        ("extractor", f"{len(kernels)} convolutions of {model['conv_channels']} channels, kernels {_listed(kernels)}, "
         f"strides {_listed(strides)}: a frame every {math.prod(strides)} samples"),
        ("position", f"a convolution over {model['pos_conv_kernel']} frames in {model['pos_conv_groups']} groups"),
        ("transformer", f"{model['n_layers']} layers, post-norm, {model['width']} wide, {model['n_heads']} heads, "
         f"feed-forward {model['ffn_width']:,}"),
    ]  # fmt: skip
    if found["kind"] == "pretrained":
        rows += [
            ("quantizer", f"{model['n_codebooks']} codebooks of {model['codebook_entries']} entries, together "
             f"{model['codebook_width']} wide; compared in {model['contrast_width']} dimensions"),
        ]  # fmt: skip
    rows += [
        ("step", f"{found['step']:,}" if found["step"] else "not known"),
        ("leads", f"{n_leads}, in this order: {' '.join(found['leads'])}"),
        ("rate", f"{found['sampling_rate_hz']:g} Hz"),
        ("segment", f"{found['segment_samples']:,} samples, {seconds:g} s, {found['frames']} frames"),
        ("prepared", departures_in_words(found["departures"])),
        ("scale", "each lead minus its mean, divided by its standard deviation, over the whole record"),
    ]
    rows += _label_rows(found)
    rows += _training_rows(found)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    rows += [("written by", versions)] if versions else []
    rows += [("size", ", ".join(f"{name} {_size(size)}" for name, size in found["bytes"].items()))]
    rows += [("digest", f"sha256:{found['digest']}")]
    width = max(len(word) for word, _ in rows)
    heading = found["path"] + (f" ({found['which']})" if found["which"] else "")
    return [heading, *(f"  {word:{width}}  {text}".rstrip() for word, text in rows)]


def convert(
    source: Path,
    target: Path,
    labels: str | None = None,
    aggregation: Sequence[str] = (),
    thresholds: Sequence[str] = (),
    n_heads: int | None = None,
) -> Checkpoint:
    """Write `source` as a checkpoint of ours, `target`, with what its use needs; all of it or nothing.

    A checkpoint of ours may be the source too: it keeps its labels, and what resuming needs is left behind.

    labels: what each logit is, for `read_labels`
    aggregation: LABEL=mean or LABEL=max, where it is not what the labels came with, or the mean
    thresholds: LABEL=PROBABILITY

    Raises:
        InputError: the target is there, or labels that are not the model's, beside what `checkpoints.load` raises.
    """
    check_target(target)
    chosen, _ = find(source)
    found = checkpoints.load(chosen, n_heads)
    names, of_label = _labels_of(found, labels)
    chosen_aggregation = of_label | {
        label: _one_of(value, f"--aggregation {label}={value}") for label, value in _by_label(aggregation, names)
    }
    chosen_thresholds = dict(found.meta.thresholds) | {
        label: _probability(value, f"--threshold {label}={value}") for label, value in _by_label(thresholds, names)
    }
    if thresholds and found.meta.task != "multilabel":
        raise InputError(f"--threshold: labels of task {found.meta.task!r} have none; leave it away")
    progress = {} if chosen.is_dir() else {"converted_from_sha256": sha256_of(chosen)}
    meta = dataclasses.replace(
        found.meta, labels=names, aggregation=chosen_aggregation, thresholds=chosen_thresholds, progress=progress
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write(target, found.state, None, meta, checkpoints.seen(found))
    return checkpoints.load(target)


def check_target(target: Path) -> None:
    """Whether a checkpoint can be written there, before anything is fetched or read for it.

    Raises:
        InputError: something is there already, or no folder to write into.
    """
    if os.path.lexists(target):
        raise InputError(f"{target}: is there already; name a new directory")
    if not target.absolute().parent.is_dir():
        raise InputError(f"{target}: no folder {target.parent} to write into; make it first")


def read_labels(given: str) -> dict[str, Aggregation]:
    """Labels in the order of the logits, each with its aggregation, `mean` where that is not said.

    given: the name of a published set (`mimic_iv_ecg`); a file: our `label_space.yaml`, a .csv with a column `name`, or
        one label a line; or the labels themselves, with commas between

    Raises:
        InputError: no such file, one that cannot be read, or a label twice.
    """
    if given in BUILT_IN_LABELS:
        return dict(BUILT_IN_LABELS[given])
    path = Path(given)
    try:
        if path.suffix in (".yaml", ".yml"):
            pairs = [(label.name, label.aggregation) for label in read_label_space(path).labels]
        elif path.suffix == ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                pairs = [(row["name"], "mean") for row in csv.DictReader(file, restval="")]
        else:
            text = path.read_text(encoding="utf-8-sig") if path.suffix or path.is_file() else given.replace(",", "\n")
            pairs = [(line, "mean") for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"--labels {given}: cannot be read ({error.strerror})") from error
    except (ValueError, LookupError, TypeError, csv.Error, yaml.YAMLError) as error:
        raise InputError(
            f"--labels {given}: expected a label_space.yaml, a .csv with a column 'name', or one label a line"
        ) from error
    names = [" ".join(str(name).split()) for name, _ in pairs]
    twice = {name for name in names if names.count(name) > 1}
    if twice or not all(names):
        raise InputError(
            f"--labels {given}: expected each label once, found {', '.join(sorted(twice)) or 'an empty one'}"
        )
    return {name: _one_of(how, f"--labels {given}: {name}") for name, (_, how) in zip(names, pairs, strict=True)}


# ---- the parts ---------------------------------------------------------------------------------------------------


def _labels_of(found: Checkpoint, given: str | None) -> tuple[tuple[str, ...], dict[str, Aggregation]]:
    """The labels of a converted checkpoint, and their aggregation."""
    if found.kind == "pretrained":
        if given:
            raise InputError(f"{found.path}: is pretrained and has no logits; leave --labels away")
        return (), {}
    if found.meta.labels:
        if given:
            raise InputError(f"{found.path}: names its labels itself; leave --labels away")
        return found.meta.labels, dict(found.meta.aggregation)
    n_logits = len(found.state["proj.bias"])
    if given is None:
        raise InputError(
            f"{found.path}: has {n_logits} logits and does not say of what; name them with --labels (a file with one "
            "label a line, or mimic_iv_ecg for the published model of that name)"
        )
    labels = read_labels(given)
    if len(labels) != n_logits:
        no_file = "" if len(labels) > 1 or Path(given).is_file() else ", for there is no file of that name"
        raise InputError(
            f"--labels {given}: expected {n_logits} labels, one for each logit, found {len(labels)}{no_file}"
        )
    return tuple(labels), labels


def _by_label(given: Sequence[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """LABEL=VALUE texts, of labels that are there."""
    pairs = []
    for text in given:
        label, equals, value = text.rpartition("=")
        if not equals:
            raise InputError(f"{text}: expected LABEL=VALUE, such as 'Atrial fibrillation=max'")
        if label not in names:
            near = difflib.get_close_matches(label, names, 1)
            hint = f"did you mean {near[0]!r}" if near else f"its labels: {', '.join(names) or 'none'}"
            raise InputError(f"{text}: the model has no label {label!r}; {hint}")
        pairs.append((label, value))
    return pairs


def _one_of(value: str, where: str) -> Aggregation:
    if value not in _AGGREGATIONS:
        raise InputError(f"{where}: expected mean or max, found {value!r}")
    return _AGGREGATIONS[value]


def _probability(value: str, where: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise InputError(f"{where}: expected a probability from 0 to 1, found {value!r}")
    return number


def _keys(path: Path, found: Checkpoint) -> dict[str, str]:
    """Where a training stage's checkpoint lies in its data directory: the keys of the stage and of its manifests.

    Of several manifests with the same files, which is one content under several keys, any will do.
    """
    stage = path.resolve().parent / "stage.json"  # a run's folder has links to the stages
    if not stage.is_file():
        return {}
    of_stage = json.loads(stage.read_bytes())
    keys = {of_stage["ingredients"]["stage"]: of_stage["key"]}
    patterns = checkpoints.PAIRS if found.kind == "pretrained" else checkpoints.LABELLED
    for manifests in sorted(stage.parents[2].glob("manifests/*/stage.json")):
        if content_at(manifests.parent, *patterns)[1] == found.meta.training_data.get("manifests"):
            keys["manifests"] = manifests.parent.name
    return keys


def _label_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    labels, aggregation, thresholds = found["labels"], found["aggregation"], found["thresholds"]
    temperature, shift = found["temperature"], found["shift"]
    if found["kind"] == "pretrained":
        return [("labels", "none: pretrained without any")]
    if not labels:
        return [("labels", f"{found['n_logits']}, not named in the file: 'ecgfm checkpoint convert' names them")]
    width = max(map(len, labels))
    rows = [("task", _TASKS[found["task"]])]
    if found["task"] == "regression":
        for number, label in enumerate(labels):
            mean, deviation = found["scaling"][label]
            text = f"{label:{width}}  {mean:.4g} ± {deviation:.4g} {found['units'].get(label, '')}".rstrip()
            rows.append((f"{len(labels)} labels" if number == 0 else "", f"{text} where it was trained on"))
        return rows
    for number, label in enumerate(labels):
        how = f"{aggregation.get(label, 'mean'):4} over segments"
        call = f", called from {thresholds[label]:.3f}" if label in thresholds else ""
        at = f", temperature {temperature[label]:.3g}" if label in temperature else ""
        at += f", shift {shift[label]:+.3g}" if label in shift else ""
        rows.append((f"{len(labels)} labels" if number == 0 else "", f"{label:{width}}  {how}{at}{call}"))
    return rows


def _training_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    keys = found["training_data_keys"]
    data = [
        f"the weights sha256:{digest}, from which it started"
        if name == "pretrain"
        else f"{name} {digest}" + (f" (key {keys[name]})" if name in keys else "")
        for name, digest in found["training_data"].items()
    ]
    origin = found["converted_from_sha256"]
    if not data:
        data = [
            f"not known: converted from a file of sha256 {origin}" if origin else "not known: the file does not say"
        ]
    rows = [("trained on" if number == 0 else "", text) for number, text in enumerate(data)]
    return rows + [("stage", f"{name}, key {key}") for name, key in keys.items() if name != "manifests"]


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e5 else f"{n_bytes:,} bytes"
