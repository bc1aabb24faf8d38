"""What `ecgfm predict`, `ecgfm embed` and `ecgfm saliency` do: answers about recordings, as files.

Every recording that is listed is answered or turned away with a reason: listed = predicted + rejected. Rows are in the
order of the recordings' ids and written as they come, so memory does not grow with their number; a file is there under
its name when it is whole.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
from tqdm import tqdm

from ecgfm.answer_files import ArrayWriter, TableWriter, check_outs
from ecgfm.config import PROGRESS_BAR, Task
from ecgfm.contracts import empty_table
from ecgfm.drawing import AGAINST_AND_FOR, LONG_SECONDS, draw_ecg
from ecgfm.ecg import InputError
from ecgfm.files import naming
from ecgfm.pages.saliency import page
from ecgfm.recordings import (
    Found,
    Prepared,
    Refused,
    count_records,
    find_recordings,
    find_slices,
    prepare_files,
    read_slices,
)

if TYPE_CHECKING:
    from ecgfm.inference import Method, Model, Outputs, Prediction, Saliency

PRESENT = " present"
"""What is put behind a label's name for the column of its decision."""

MOST_PROBABLE = "most_probable"
"""The column of the decision between labels that exclude each other."""

TABLES, VECTORS, PICTURES = (".parquet", ".csv"), (".parquet", ".npy", ".csv"), (".png", ".html")


@dataclass(frozen=True)
class Summary:
    """What became of the recordings. rejected: reason -> how many; others: files that are no recordings, by suffix"""

    listed: int
    answered: int
    segments: int
    rejected: Counter[str]
    others: Counter[str]
    seconds: float
    files: tuple[Path, ...]

    def in_words(self, verb: str) -> list[str]:
        """Lines to print. verb: `predicted` or `embedded`"""
        n_rejected = self.rejected.total()
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in sorted(self.rejected.items()))
        lines = [
            f"{self.listed:,} listed = {self.answered:,} {verb} + {n_rejected:,} rejected"
            + (f" ({reasons})" if reasons else "")
        ]
        if self.others:
            most = sorted(self.others.items(), key=lambda item: (-item[1], item[0]))
            shown = [f"{n:,} {suffix or 'without suffix'}" for suffix, n in most[:6]]
            shown += [f"{sum(n for _, n in most[6:]):,} of other kinds"] if len(most) > 6 else []
            lines += [f"left aside, no recordings: {', '.join(shown)}"]
        rate = self.segments / max(self.seconds, 1e-9)
        return [
            *lines,
            f"{self.segments:,} segments in {self.seconds:.1f} s, {rate:,.1f} a second",
            *map(str, self.files),
        ]


def predict(
    model: Model, inputs: Sequence[Path], out: Path, segments_out: Path | None, batch_size: int, jobs: int
) -> Summary:
    """Write a table of predictions, a row per recording, `.parquet` or `.csv`; beside it the rejected.

    Columns: data_contracts/record_predictions.yaml; behind the labels' probabilities a column `<label> present` of 1 or
    0 for each label that has a threshold. Of labels that exclude each other `most_probable` instead
    (record_predictions_classes.yaml), of numbers neither (record_predictions_values.yaml). segments_out: a row per
    segment, if wanted

    Raises:
        InputError: a path that cannot be written, no recording or none that can be predicted, or a checkpoint that does
            not predict.
    """
    model.check_predicts()
    files = [out, rejects_of(out), *([segments_out] if segments_out else [])]
    check_outs(files, TABLES)
    columns = prediction_columns(model)
    labels: dict[str, Any] = dict.fromkeys(model.labels, pl.Float64())
    of_segments = {"record_id": pl.String(), "segment_index": pl.Int64(), "start_s": pl.Float64(), **labels}
    with ExitStack() as stack:
        records = stack.enter_context(TableWriter(out, columns, contract_of_predictions(model.meta.task)))
        segments = stack.enter_context(TableWriter(segments_out, of_segments)) if segments_out else None

        def write(outputs: Outputs) -> None:
            prediction = model.prediction(outputs)
            records.add(prediction_row(prediction, len(outputs.embeddings)))
            if segments:
                for row in prediction.segments.iter_rows(named=True):
                    segments.add({"record_id": prediction.record_id, **row})

        return _answer(model, inputs, batch_size, jobs, write, files)


def embed(
    model: Model, inputs: Sequence[Path], out: Path, level: Literal["record", "segment"], batch_size: int, jobs: int
) -> Summary:
    """Write embeddings, a row per recording or per segment, `.parquet`, `.csv` or `.npy`; beside them the rejected.

    Parquet has the vector as a list; CSV in columns `embedding_0`, ...; .npy (row, width) float32, whose rows the table
    `<out>.rows.csv` names. Raises as `predict`, but of any checkpoint.
    """
    files = [out, rejects_of(out)]
    check_outs(files[:1], VECTORS)
    keys: dict[str, Any] = {"record_id": pl.String()}
    keys |= {"segment_index": pl.Int64(), "start_s": pl.Float64()} if level == "segment" else {"n_segments": pl.Int64()}
    width = model.meta.model.width
    segment_s = model.preparation.segment_seconds
    with ExitStack() as stack:
        vectors: dict[str, Any] = {}
        array: ArrayWriter | None = None
        if out.suffix.lower() == ".npy":
            files.insert(1, out.with_suffix(".rows.csv"))
            array = stack.enter_context(ArrayWriter(out, width))
        elif out.suffix.lower() == ".csv":
            vectors = {f"embedding_{k}": pl.Float32() for k in range(width)}
        else:
            vectors = {"embedding": pl.List(pl.Float32())}
        table = stack.enter_context(TableWriter(files[1] if array else out, keys | vectors))

        def write(outputs: Outputs) -> None:
            found = model.embedding(outputs)
            rows = found.record[None] if level == "record" else found.segments
            for index, vector in enumerate(rows):
                place = [index, index * segment_s] if level == "segment" else [len(found.segments)]
                if array:
                    array.add(vector)
                values = [vector] if "embedding" in vectors else vector.tolist() if vectors else []
                table.add(dict(zip(keys | vectors, [found.record_id, *place, *values], strict=True)))

        return _answer(model, inputs, batch_size, jobs, write, files)


def draw_saliency(
    model: Model, file: Path, out: Path, label: str | None, method: Method, segment: int | None
) -> Saliency:
    """Draw one recording with its saliency: a picture (`.png`), or a page with a picture of each segment (`.html`).

    A picture with attention has up to the 10 s of an ECG's paper; with `gradient` one segment: `segment`, or that of
    the label's highest probability; of a number the one that is furthest from the baseline's.

    Raises:
        InputError, Rejected: as `Model.saliency`; a segment that is not there.
    """
    check_outs([out], PICTURES)
    found = model.saliency(file, label, method)
    n_segments = len(found.signal_mv)
    if segment is not None and not 0 <= segment < n_segments:
        raise InputError(f"--segment {segment}: the recording has {n_segments}, numbered from 0")
    if out.suffix.lower() == ".html":
        chosen = range(n_segments) if segment is None else [segment]
        pictures = [(index, draw_segments(found, [index])) for index in chosen]
        content = page(found, model.meta, pictures).encode()
    elif method == "attention" and segment is None:
        seconds = found.signal_mv.shape[2] / found.sampling_rate_hz
        content = draw_segments(found, range(min(n_segments, max(round(LONG_SECONDS / seconds), 1))))
    else:
        told = np.abs(found.logits - found.baseline_logit) if found.value is not None else found.probabilities
        content = draw_segments(found, [int(np.argmax(told)) if segment is None else segment])
    with naming(out):
        out.write_bytes(content)
    return found


def draw_segments(found: Saliency, segments: Sequence[int]) -> bytes:
    """A PNG of adjacent segments on ECG paper with their saliency."""
    chosen = list(segments)
    signal_mv = np.concatenate(found.signal_mv[chosen], axis=1)
    shown = np.concatenate(found.shown[chosen], axis=1)
    seconds = found.signal_mv.shape[2] / found.sampling_rate_hz
    where = "" if len(found.signal_mv) == len(chosen) else f", from {chosen[0] * seconds:g} s"
    is_number = found.value is not None
    what = "" if found.label is None else f": {found.label}{'' if is_number else ','} {found.answer}"
    return draw_ecg(
        signal_mv,
        found.sampling_rate_hz,
        shown[0] if found.method == "attention" else shown,
        title=f"{found.record_id}{where}{what}",
        leads=found.leads,
        signs=("lowers the number", "raises it") if is_number else AGAINST_AND_FOR,
    )


# ---- the tables


def prediction_columns(model: Model) -> dict[str, Any]:
    """The columns of the table of predictions, in order, with their types.

    Raises:
        InputError: a label is called like one of the other columns.
    """
    fixed = dict(empty_table(contract_of_predictions(model.meta.task)).schema)
    names = [*model.labels, *(f"{label}{PRESENT}" for label in model.labels if label in model.meta.thresholds)]
    if taken := sorted({name for name in names if name in fixed or names.count(name) > 1}):
        raise InputError(f"{model.path}: the label {taken[0]!r} is called like another column; convert it with others")
    of_labels = {name: pl.Float64() if name in model.labels else pl.Int8() for name in names}
    first = {name: fixed.pop(name) for name in ("record_id", "n_segments")}
    last = {MOST_PROBABLE: fixed.pop(MOST_PROBABLE)} if MOST_PROBABLE in fixed else {}
    return first | of_labels | last | fixed


def contract_of_predictions(task: Task) -> str:
    """The contract of the table of predictions by a checkpoint of a task."""
    return {"multiclass": "record_predictions_classes", "regression": "record_predictions_values"}.get(
        task, "record_predictions"
    )


def prediction_row(prediction: Prediction, n_segments: int) -> dict[str, Any]:
    """A prediction as a row of the table of predictions; it may have more than the table has columns."""
    called = {label: decision for label, decision in prediction.decisions.items() if decision is not None}
    decided: dict[str, Any] = {f"{label}{PRESENT}": int(decision) for label, decision in called.items()}
    decided |= {MOST_PROBABLE: next((label for label, decision in called.items() if decision), None)}
    return {
        "record_id": prediction.record_id,
        "n_segments": n_segments,
        **prediction.probabilities,
        **prediction.values,
        **decided,
        "duration_s": prediction.duration_s,
        "sampling_rate_hz": prediction.sampling_rate_hz,
        "missing_leads": " ".join(prediction.missing_leads),
        "invalid_leads": " ".join(prediction.invalid_leads),
        "constant_leads": " ".join(prediction.constant_leads),
        **prediction.quality,
        "remarks": "; ".join(prediction.remarks),
    }


def rejects_of(out: Path) -> Path:
    """Where the rejected of `out` are written: beside it, Parquet with Parquet and else CSV."""
    return out.with_suffix(".rejects.parquet" if out.suffix.lower() == ".parquet" else ".rejects.csv")


# ---- the parts


def _answer(
    model: Model,
    inputs: Sequence[Path],
    batch_size: int,
    jobs: int,
    write: Callable[[Outputs], None],
    files: Sequence[Path],
) -> Summary:
    """Ask the model about all recordings, in order; what was turned away goes to the table of the rejected."""
    started = time.perf_counter()
    n_listed, recordings, others = _listed(model, inputs, jobs)
    n_answered, n_segments = 0, 0
    rejected: Counter[str] = Counter()
    first = ""
    rejects = next(path for path in files if path.suffixes[-2:-1] == [".rejects"])
    with (
        TableWriter(rejects, empty_table("prediction_rejects").schema, "prediction_rejects") as refused,
        tqdm(desc="records", total=n_listed, unit=" records", **PROGRESS_BAR) as bar,
    ):
        for outputs in model.outputs(recordings, batch_size):
            if isinstance(outputs, Refused):
                rejected[outputs.why.reason] += 1
                first = first or f"{outputs.record_id}: {outputs.why}"
                row = (outputs.record_id, outputs.path, outputs.why.reason, outputs.why.detail)
                refused.add(dict(zip(("record_id", "path", "reason", "detail"), row, strict=True)))
            else:
                n_answered += 1
                n_segments += len(outputs.embeddings)
                write(outputs)
            bar.update()
    assert n_listed == n_answered + rejected.total()
    if not n_answered:
        raise InputError(
            f"none of {n_listed:,} recording{'s' * (n_listed != 1)} can be used; {first}"
            + f"; all in {rejects}" * (n_listed > 1)
        )
    return Summary(n_listed, n_answered, n_segments, rejected, others, time.perf_counter() - started, tuple(files))


def _listed(model: Model, inputs: Sequence[Path], jobs: int) -> tuple[int, Iterator[Prepared | Refused], Counter[str]]:
    """How many recordings there are, each of them prepared, and the files that are none."""
    slices = [find_slices(given) for given in inputs]
    if any(slices):
        if not all(slices):
            raw = next(given for given, found in zip(inputs, slices, strict=True) if not found)
            raise InputError(f"{raw}: expected prepared records as in the other inputs, found none; ask about it alone")
        chosen = list(dict.fromkeys(path for found in slices for path in found))
        return count_records(chosen), read_slices(chosen, model.preparation), Counter()
    found: Found = find_recordings(inputs)
    return len(found.recordings), prepare_files(found.recordings, model.preparation, jobs), found.others
