"""The same scores in parts of the test split: by age, sex, source, recorded rate and noise.

A difference between parts may be of the model, of how hard the part is, or of which findings it holds: the macro mean
of a part is over the labels that have both classes in it, and says which.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from ecgfm.scores.metrics import Scores, compare

AGE_BANDS = ((0, 18), (18, 40), (40, 65), (65, 80), (80, math.inf))
"""Years, the lower end in, the upper one out."""

UNKNOWN, OTHERS = "unknown", "all others"
MOST_NAMES = 10  # of sites and devices: a source may have dozens, most with few records


@dataclass(frozen=True)
class Part:
    """Some of the records.

    by: what the records are parted by; name: of this part
    rows: (record,) bool
    """

    by: str
    name: str
    rows: np.ndarray


@dataclass(frozen=True)
class PartScores:
    """The scores of one model on a part; or on all records, when it is shown a part of their leads.

    difference: paired, less the scores with all leads; None of a part of the records, where nothing is paired
    """

    by: str
    name: str
    scores: Scores
    difference: Scores | None = None


def parts(records: pl.DataFrame, quality: pl.DataFrame) -> list[Part]:
    """The parts of some records, by each property that tells at least two of them apart.

    records: contract `records`; quality: contract `quality`; a row per record, in one order
    """
    assert records["record_id"].equals(quality["record_id"])
    columns = {
        "age": records["age_years"].map_elements(_age_band, pl.String, skip_nulls=False),
        "sex": records["sex"].fill_null(UNKNOWN),
        "source": records.select(pl.concat_str(pl.col("source"), pl.col("dataset"), separator=" ", ignore_nulls=True))[
            "source"
        ],
        "site": _most_common(records["site"]),
        "device": _most_common(records["device"]),
        "recorded rate": records["sampling_rate_hz"].map_elements(lambda rate: f"{rate:g} Hz", pl.String),
        "noise from 30 to 100 Hz": _thirds(quality["lead_noise_uv"]),
    }
    found = []
    for by, values in columns.items():
        names = sorted(values.unique().to_list(), key=lambda name: (name == UNKNOWN, name == OTHERS, _in_order(name)))
        if len(names) > 1:
            found += [Part(by, name, (values == name).to_numpy()) for name in names]
    return found


def score_parts(
    found: Sequence[Part],
    truth: np.ndarray,
    probabilities: np.ndarray,
    labels: Sequence[str],
    patients: Sequence[str | None],
    *,
    n_replicates: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[PartScores]:
    """The scores of one model on each part, with intervals as of `metrics.compare`.

    truth, probabilities: (record, label); patients: (record,)
    """
    scored = []
    for part in found:
        whose = [patient for patient, chosen in zip(patients, part.rows.tolist(), strict=True) if chosen]
        scores = compare(
            truth[part.rows],
            {"model": probabilities[part.rows]},
            labels,
            whose,
            n_replicates=n_replicates,
            confidence=confidence,
            seed=seed,
        )
        scored.append(PartScores(part.by, part.name, scores["model"]))
    return scored


def _most_common(names: pl.Series) -> pl.Series:
    """The `MOST_NAMES` names of most records, and all others as one."""
    counted = names.drop_nulls().value_counts(sort=True, name="n").sort(["n", names.name], descending=[True, False])
    kept = set(counted[names.name].head(MOST_NAMES))
    return pl.Series([UNKNOWN if name is None else name if name in kept else OTHERS for name in names], dtype=pl.String)


def _age_band(years: float | None) -> str:
    if years is None:
        return UNKNOWN
    low, high = next(band for band in AGE_BANDS if band[0] <= years < band[1])
    if not low:
        return f"under {high:g} years"
    return f"{low:g} years and over" if math.isinf(high) else f"{low:g} to {high - 1:g} years"


def _thirds(lead_noise_uv: pl.Series) -> pl.Series:
    """The noise of a record, the median over its leads, by thirds of these records; "unknown" where no lead tells."""
    noise = lead_noise_uv.list.eval(pl.element().fill_nan(None)).list.median()
    known = noise.drop_nulls()
    if known.is_empty():
        return pl.Series([UNKNOWN] * len(noise), dtype=pl.String)
    low, high = (float(np.quantile(known.to_numpy(), share)) for share in (1 / 3, 2 / 3))
    names = (f"up to {low:.3g} µV", f"up to {high:.3g} µV", f"above {high:.3g} µV")
    return pl.Series(
        [UNKNOWN if value is None else names[(value > low) + (value > high)] for value in noise], dtype=pl.String
    )


def _in_order(name: str) -> tuple[int, float, str]:
    """Parts that are named by a number stand in its order: "under" first, "over" and "above" last."""
    numbers = [word for word in name.split() if word.replace(".", "", 1).isdigit()]
    if not numbers:
        return 0, 0.0, name
    return (-1 if name.startswith("under") else 1 if name.startswith("above") else 0), float(numbers[0]), name
