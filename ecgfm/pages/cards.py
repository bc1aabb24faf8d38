"""Cards: what a model is and what it was made of, for those who were not there. Facts in, text out; equal facts give
equal bytes.

The model card has the headings of Mitchell et al. 2019 (Model Cards for Model Reporting, arXiv 1810.03993). The data
card is Croissant 1.0 (http://mlcommons.org/croissant/1.0): JSON-LD that names the files of the prepared dataset, with
their SHA-256, and the columns of its tables as data_contracts/ has them.

No card has anything of one person: no id of a record or a patient, ages only as counts of bands, and no score of a part
of the test split with fewer than `FEWEST_PATIENTS`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ecgfm.contracts import contract
from ecgfm.label_space import LabelSpace

NOT_STATED = "not stated"
FEWEST_PATIENTS = 5

METHODS = (
    "McKeen et al. 2025, ECG-FM: an open electrocardiogram foundation model, JAMIA Open, ooaf122 (arXiv 2408.05178)",
    "Baevski et al. 2020, wav2vec 2.0: a framework for self-supervised learning of speech representations "
    "(arXiv 2006.11477)",
    "Kiyasseh et al. 2021, CLOCS: contrastive learning of cardiac signals across space, time, and patients "
    "(arXiv 2005.13249)",
    "Oh et al. 2022, Lead-agnostic self-supervised learning for local and global representations of "
    "electrocardiogram (arXiv 2203.06889)",
)

_FEW = f"< {FEWEST_PATIENTS}"
_OUTPUTS = {
    "multilabel": "a probability per label and segment; a recording's is their mean, or the maximum for labels that "
    "one segment can carry alone",
    "multiclass": "a probability per label and segment, together 1; a recording's are their means",
    "regression": "a number per label and segment; a recording's is their mean",
}
_AREAS = (
    "AUROC: the chance that a record with the label gets a higher probability than one without. AUPRC: average "
    "precision, which depends on how common the label is."
)
_MEASURES = {
    "multilabel": (
        _AREAS,
        "Decisions: at thresholds that were fitted on the valid split and travel with the weights.",
    ),
    "multiclass": (_AREAS, "Decisions: the most probable label is called, for they exclude each other."),
    "regression": (
        "Mean absolute error and mean error, in the label's unit. R2: the share of the variance among these records "
        "that is explained; below 0 is worse than their mean.",
    ),
}
_TASKS = {
    "multilabel": "each of them is present or absent by itself",
    "multiclass": "exactly one of them is present",
    "regression": "each of them is a number",
}


@dataclass(frozen=True)
class TrainingFacts:
    """One training run. facts: what a reader wants first, as (name, value); config: every value"""

    name: str
    facts: Sequence[tuple[str, str]]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class ModelFacts:
    """What a model card is made of, but for the evaluation.

    meta: of the checkpoint, as its meta.json; digest: of its weights
    encoder_data: what the encoder was pretrained on -> digest of its content
    """

    meta: Mapping[str, Any]
    digest: str
    n_parameters: int
    architecture: str
    encoder_data: Mapping[str, str]
    trainings: Sequence[TrainingFacts]


@dataclass(frozen=True)
class DataFacts:
    """What a data card is made of, but for the counts.

    slices: the stage.json of each prepared slice; tables: those of the stages `splits` and `labels`
    columns: of the table of labels; used: those that have records in the splits, with their counts
    """

    slices: Sequence[Mapping[str, Any]]
    tables: Mapping[str, Mapping[str, Any]]
    columns: LabelSpace
    used: LabelSpace


def cards(of_model: ModelFacts, of_data: DataFacts, metrics: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The cards of an evaluation: file name -> (title, content). metrics: as metrics.json"""
    return {
        "model_card.md": ("Model card", model_card(of_model, metrics)),
        "data_card.json": ("Data card: Croissant 1.0", data_card(of_data, metrics["cohort"])),
    }


# ---- of the model -------------------------------------------------------------------------------------------------


def model_card(of: ModelFacts, metrics: Mapping[str, Any]) -> str:
    """The card of an evaluated classifier, in Markdown."""
    meta = of.meta
    cohort, scores, task = metrics["cohort"], metrics["scores"]["finetuned"], meta["task"]
    of_numbers = task == "regression"
    seconds = meta["segment_samples"] / meta["sampling_rate_hz"]
    test = cohort["splits"]["test"]
    lines = [
        f"# Model card: ECG {'regressor' if of_numbers else 'classifier'} {of.digest.removeprefix('sha256:')[:12]}",
        "",
        "## Model details",
        "",
        f"- What it is: a network that reads an ECG and answers for {len(meta['labels'])} labels, of which "
        f"{_TASKS[task]}.",
        f"- Architecture: {of.architecture}; a linear layer on the mean over frames. {of.n_parameters:,} parameters.",
        f"- Input: {len(meta['leads'])} leads ({' '.join(meta['leads'])}), {seconds:g} s at "
        f"{meta['sampling_rate_hz']:g} Hz, each lead standardised over the whole recording.",
        f"- Output: {_OUTPUTS[task]}.",
        f"- Labels: {', '.join(meta['labels'])}.",
        f"- Weights: `{of.digest}`, update {meta['step']:,}.",
        f"- Licence: {NOT_STATED}. The terms of the training data apply.",
        "- Method:",
        *(f"  - {method}" for method in METHODS),
        "",
        "## Intended use",
        "",
        "- For: research on learning from ECGs; comparing methods on the same recordings; a start for finetuning.",
        "- Not for: diagnosis, triage, monitoring, or any decision about a patient's care. It is not a medical device, "
        "and nobody has examined it as one.",
        "- Not for: recordings unlike those it was trained on (other devices, exercise or Holter ECGs, other "
        "populations) without an evaluation there.",
        "",
        "## Factors",
        "",
        _factors(metrics),
        "",
        "## Metrics",
        "",
        *(f"- {measure}" for measure in _MEASURES[task]),
        f"- Intervals: {100 * metrics['bootstrap']['confidence']:g} %, from "
        f"{metrics['bootstrap']['replicates']:,} replicates: {metrics['bootstrap']['rule']}.",
        "",
        "## Evaluation data",
        "",
        f"- The test split: {scores['n_records']:,} labelled records of {scores['n_patients']:,} "
        f"{'patients' if test['known_patients'] else 'records (patients unknown)'}, of the sources "
        f"{', '.join(cohort['listed'])}.",
        f"- {_leak(metrics)}",
        "- Preprocessing: as in training.",
        "",
        "## Training data",
        "",
        *_split_table(cohort),
        "",
        *_digests("Pretraining", of.encoder_data),
        *_digests("Finetuning", meta["training_data"]),
        "- Digests are of content: the same data are known again by them.",
        *(f"- Left out of the labels: {name} ({why})." for name, why in metrics["dropped"].items()),
        "",
    ]
    for training in of.trainings:
        lines += [f"### {training.name}", "", *(f"- {name}: {value}" for name, value in training.facts), ""]
        if training.config:
            lines += [
                "```yaml",
                yaml.safe_dump(dict(training.config), allow_unicode=True, default_flow_style=None).rstrip(),
                "```",
                "",
            ]
    lines += [
        "## Quantitative analyses",
        "",
        *evaluation_table(metrics),
        "",
        *([] if of_numbers else _decision_table(metrics)),
        *(_part_table_of_numbers(metrics) if of_numbers else _part_table(metrics)),
        "## Ethical considerations",
        "",
        "- ECGs are health data. The weights were learnt from recordings of people; whether something of a single "
        "recording can be drawn out of them has not been examined.",
        "- Labels come from routine reports, machine statements or codes. Their errors, and who was recorded at all, "
        "are in the model.",
        "- Where a part of the population has few test records, its row above says little: read the counts.",
        "",
        "## Caveats and recommendations",
        "",
        "- The intervals cover the chance of having these patients and not others of the same sources; not another "
        "training run, another hospital, or errors in the labels.",
        "- Before any use elsewhere, evaluate on recordings from there"
        + ("." if of_numbers else ", and choose thresholds there."),
        f"- Licence of the weights and of this card: {NOT_STATED}.",
        "",
    ]
    return "\n".join(lines)


def evaluation_table(metrics: Mapping[str, Any]) -> list[str]:
    """The scores of metrics.json as a Markdown table, with their intervals and n."""
    scores = metrics["scores"]["finetuned"]
    if metrics.get("task") == "regression":
        lines = [*tested_on(metrics), "| label | unit | n | mean absolute error | mean error | R2 |"]
        lines.append("|---|---|---:|---:|---:|---:|")
        for row in scores["labels"]:
            shown = " | ".join(estimate_text(row[name]) for name in ("mean_absolute_error", "mean_error", "r2"))
            lines.append(f"| {cell(row['label'])} | {cell(row['unit']) or 'not given'} | {row['n']} | {shown} |")
        return lines
    lines = [*tested_on(metrics), "| label | n | positives | AUROC | AUPRC |", "|---|---:|---:|---:|---:|"]
    for row in scores["labels"]:
        shown = f"{estimate_text(row['auroc'])} | {estimate_text(row['auprc'])}"
        lines.append(f"| {cell(row['label'])} | {row['n']} | {row['positives']} | {shown} |")
    macro = f"{estimate_text(scores['macro_auroc'])} | {estimate_text(scores['macro_auprc'])}"
    return [*lines, f"| **macro** | {scores['n_records']} | | {macro} |"]


def tested_on(metrics: Mapping[str, Any]) -> list[str]:
    """What the numbers of metrics.json are of, and an empty line."""
    scores = metrics["scores"]["finetuned"]
    return [
        f"On the {metrics['split']} split: {scores['n_records']} records of {scores['n_patients']} patients. In "
        f"brackets the {100 * metrics['bootstrap']['confidence']:g} % interval ({metrics['bootstrap']['rule']}).",
        "",
    ]


def estimate_text(estimate: Mapping[str, Any] | None) -> str:
    """A number with its interval."""
    if estimate is None:
        return "not scored"
    interval = "" if estimate["low"] is None else f" ({estimate['low']:.3f} to {estimate['high']:.3f})"
    return f"{estimate['value']:.3f}{interval}"


def cell(text: str) -> str:
    """Text as a cell of a Markdown table."""
    return text.replace("|", "\\|")


def _factors(metrics: Mapping[str, Any]) -> str:
    parted = dict.fromkeys(part["by"] for part in _parts(metrics))
    if not parted:
        return "The test records do not differ in any property that they could be parted by."
    return (
        f"Evaluated by {', '.join(parted)} (tables below). Skin tone, ethnicity and illness beside the labels: unknown."
    )


def _parts(metrics: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The parts of the test split, where an evaluation of its task has them."""
    found: Sequence[Mapping[str, Any]] = metrics.get("assessment", metrics)["parts"]
    return found


def _leak(metrics: Mapping[str, Any]) -> str:
    """Without the ids that metrics.json has."""
    if metrics["leakage"]:
        return "**The model has learnt from test records, their copies or their patients: the numbers are too good.**"
    if not metrics["training_is_known"]:
        return "What the encoder was pretrained on is not known: it may have seen these records."
    return "No training step has seen these records, copies of them, or other records of their patients."


def _split_table(cohort: Mapping[str, Any]) -> Iterator[str]:
    yield "| split | records | known patients | segments | labelled records |"
    yield "|---|---:|---:|---:|---:|"
    for split, counts in cohort["splits"].items():
        numbers = [counts[name] for name in ("records", "known_patients", "segments", "labelled_records")]
        yield f"| {split} | {' | '.join(f'{number:,}' for number in numbers)} |"


def _digests(what: str, data: Mapping[str, str]) -> Iterator[str]:
    if not data:
        yield f"- {what}: the checkpoint does not say from what."
    for source, digest in data.items():
        yield f"- {what}, from {source}: `{digest}`"


def _decision_table(metrics: Mapping[str, Any]) -> Iterator[str]:
    yield "| label | threshold | sensitivity | specificity | PPV | NPV |"
    yield "|---|---:|---:|---:|---:|---:|"
    for row in metrics["assessment"]["decisions"]:
        shown = " | ".join(estimate_text(row[name]) for name in ("sensitivity", "specificity", "ppv", "npv"))
        threshold = row["point"]["threshold"]  # none where the most probable of several is called
        yield f"| {cell(row['label'])} | {'none' if threshold is None else f'{threshold:.3f}'} | {shown} |"
    yield ""


def _part_table(metrics: Mapping[str, Any]) -> Iterator[str]:
    if not _parts(metrics):
        return
    yield "| by | part | records | patients | labels | macro AUROC | macro AUPRC |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for part in _parts(metrics):
        scores = part["scores"]
        if scores["n_patients"] < FEWEST_PATIENTS:
            yield f"| {cell(part['by'])} | {cell(part['name'])} | | {_FEW} | | not shown | not shown |"
            continue
        n_labels = len(scores["labels"]) - len(scores["left_out"])
        shown = " | ".join(estimate_text(scores[name]) for name in ("macro_auroc", "macro_auprc"))
        counts = f"{scores['n_records']} | {scores['n_patients']} | {n_labels}"
        yield f"| {cell(part['by'])} | {cell(part['name'])} | {counts} | {shown} |"
    yield ""


def _part_table_of_numbers(metrics: Mapping[str, Any]) -> Iterator[str]:
    if not _parts(metrics):
        return
    yield "| by | part | label | records | patients | mean absolute error | R2 |"
    yield "|---|---|---|---:|---:|---:|---:|"
    for part in _parts(metrics):
        if part["scores"]["n_patients"] < FEWEST_PATIENTS:
            yield f"| {cell(part['by'])} | {cell(part['name'])} | | | {_FEW} | not shown | not shown |"
            continue
        for row in part["scores"]["labels"]:
            shown = " | ".join(estimate_text(row[name]) for name in ("mean_absolute_error", "r2"))
            counts = f"{row['n']} | {part['scores']['n_patients']}"
            yield f"| {cell(part['by'])} | {cell(part['name'])} | {cell(row['label'])} | {counts} | {shown} |"
    yield ""


# ---- of the data --------------------------------------------------------------------------------------------------

_FORMATS = {".parquet": "application/x-parquet", ".h5": "application/x-hdf5"}
_DATA_TYPES = {
    "string": "sc:Text",
    "int8": "sc:Integer",
    "int64": "sc:Integer",
    "float32": "sc:Float",
    "float64": "sc:Float",
    "datetime": "sc:DateTime",
}
_TABLES = ("records", "segments", "splits", "labels")
_OF_SLICES = {
    "records.parquet": "the prepared records of each slice",
    "segments.parquet": "the segments of each slice",
    "shard.h5": "the signals of each slice",
}

_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def data_card(of: DataFacts, cohort: Mapping[str, Any]) -> str:
    """The card of a prepared dataset as Croissant 1.0, in JSON.

    Its files are named as they lie in the folder of a run, beside which the card lies.

    cohort: as metrics.json has it
    """
    sources = list(cohort["listed"])
    prepared = sum(cohort["listed"].values()) - sum(cohort["rejected"].values())
    splits = ", ".join(f"{name} {counts['records']:,} records" for name, counts in cohort["splits"].items())
    counts = {label.name: label.records for label in of.used.labels}
    card = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": "ecgfm-" + "-".join(sources).replace("_", "-"),
        "description": (
            f"ECGs of {', '.join(sources)}, prepared for training by ecgfm: {prepared:,} records in "
            f"{sum(split['segments'] for split in cohort['splits'].values()):,} segments that are in a split "
            f"({splits}). Tables are joined by record_id; signals are rows of the HDF5 shards (segment, lead, time), "
            "16-bit integers with a gain and a baseline per lead. Personal health data: the terms of the sources apply."
        ),
        "license": f"{NOT_STATED}: the recordings are under the terms of their sources",
        "citeAs": "; ".join(METHODS[:1]),
        "keywords": ["ECG", "electrocardiogram", "health", *sources],
        "isLiveDataset": False,
        "distribution": [
            *(_file(stage, output) for stage, output in of.tables.items()),
            *(_file_set(name, what, of.slices) for name, what in _OF_SLICES.items()),
        ],
        "recordSet": [_record_set(table, of.columns, counts) for table in _TABLES],
    }
    return json.dumps(card, indent=1, ensure_ascii=False) + "\n"


def _file(stage: str, output: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a stage that has one."""
    name = f"{stage}/{stage}.parquet"
    file = output["files"][f"{stage}.parquet"]
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{file['bytes']} B",
        "encodingFormat": _FORMATS[".parquet"],
        "sha256": file["sha256"],
    }


def _file_set(name: str, what: str, slices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A file of every slice. Not one by one: a slice is a folder, and of one's own recordings its name may be a
    person's."""
    files = [one["files"][name] for one in slices]
    lines = "".join(f"{sha256}\n" for sha256 in sorted(file["sha256"] for file in files))
    return {
        "@type": "cr:FileSet",
        "@id": _id("all", name),
        "name": f"all {name}",
        "description": (
            f"{what}: {len(files):,} files, {sum(file['bytes'] for file in files):,} bytes. The sha256 is that of the "
            "files' own, sorted, in hexadecimal and a line each."
        ),
        "encodingFormat": _FORMATS[name[name.rindex(".") :]],
        "includes": f"prepare/*/{name}",
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
    }


def _id(*parts: str) -> str:
    """An `@id`, in which Croissant's validator takes no white space."""
    return "/".join(re.sub(r"\s+", "_", part) for part in parts)


def _record_set(
    table: str, space: LabelSpace, counts: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> dict[str, Any]:
    """A table with its columns, as its contract has them."""
    rules = contract(space.contract(table) if table == "labels" else table)
    columns = dict(rules["columns"])
    for label in space.labels if table == "labels" else ():
        said = rules["other_columns"]["description"] + (f" ({label.unit})" if label.unit else "")
        for split, of_split in counts.get(label.name, {}).items():
            said += f"; {split}: {', '.join(f'{n:g} {what}' for what, n in of_split.items())}"
        columns[label.name] = {**rules["other_columns"], "description": said}
    file = f"{table}.parquet"
    place = {"fileSet": {"@id": _id("all", file)}} if file in _OF_SLICES else {"fileObject": {"@id": _id(table, file)}}
    return {
        "@type": "cr:RecordSet",
        "@id": table,
        "name": table,
        "description": rules["description"],
        "key": [{"@id": _id(table, name)} for name in rules["key"]],
        "field": [_field(table, name, rule, place, rules.get("references", {})) for name, rule in columns.items()],
    }


def _field(
    table: str, name: str, rule: Mapping[str, Any], place: Mapping[str, Any], references: Mapping[str, str]
) -> dict[str, Any]:
    kind, is_list = rule["type"].removeprefix("list[").removesuffix("]"), rule["type"].startswith("list[")
    words = [rule.get("description", ""), rule.get("unit", "")]
    if rule.get("nullable") and "null" not in words[0]:
        words.append("null where unknown")
    if kind == "string" and "allowed" in rule:
        words.append("one of " + ", ".join(str(value) for value in rule["allowed"]))
    described = "; ".join(word for word in words if word)
    other = references.get(name)
    return {
        "@type": "cr:Field",
        "@id": _id(table, name),
        "name": name,
        **({"description": described} if described else {}),
        "dataType": _DATA_TYPES[kind],
        **({"repeated": True} if is_list else {}),
        "source": {**place, "extract": {"column": name}},
        **({"references": {"field": {"@id": _id(*other.split("."))}}} if other else {}),
    }
