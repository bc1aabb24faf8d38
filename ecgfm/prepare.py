"""Raw recordings to shards: list a source, then prepare it slice by slice.

Every record that goes in comes out prepared or rejected with a reason: listed = prepared + rejected.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

from ecgfm.config import PROGRESS_BAR, ListConfig, PrepareConfig
from ecgfm.contracts import read_table, table_of, write_table
from ecgfm.ecg import LEADS, EcgRecord, InputError, Rejected
from ecgfm.shards import ShardWriter, digitise
from ecgfm.signals import cut_segments, lead_statistics, present_leads, resample_linear, to_standard_leads
from ecgfm.sources import SOURCES, Source


def source_named(name: str) -> Source:
    """The source module of that name.

    Raises:
        InputError: there is none.
    """
    if name not in SOURCES:
        raise InputError(f"unknown source {name!r}; known: {', '.join(sorted(SOURCES))}")
    return SOURCES[name]


def list_source(inputs: Mapping[str, Path], config: ListConfig, out: Path) -> dict[str, int]:
    """Write what a source holds, one table per slice: `slices/<slice>.parquet` and their index `slices.json`.

    inputs: `raw`, the source's raw folder

    Raises:
        InputError: a wrong folder, or no record in it.
    """
    listing = source_named(config.source).list_records(inputs["raw"])
    if listing.is_empty():
        raise InputError(f"{config.source}: no record found in {inputs['raw']}")
    (out / "slices").mkdir(exist_ok=True)
    index = {}
    for (slice_id,), rows in sorted(listing.group_by("slice_id"), key=lambda group: str(group[0][0])):
        name = f"slices/{quote(str(slice_id), safe='')}.parquet"
        write_table(rows.sort("record_id"), "listing", out / name)
        index[str(slice_id)] = {"file": name, "records": rows.height}
    (out / "slices.json").write_text(json.dumps(index, indent=1) + "\n")
    return {"listed": listing.height, "slices": len(index)}


def prepare_slice(inputs: Mapping[str, Path], config: PrepareConfig, out: Path) -> dict[str, int]:
    """Write `shard.h5`, `records.parquet`, `segments.parquet` and `rejects.parquet` of one slice.

    inputs: `rows`, the slice's table of the listing; `raw`, the source's raw folder

    Raises:
        InputError: a segment would hold no sample, or a rejected record has an unlisted reason.
    """
    rows = read_table(inputs["rows"], "listing")
    source_name, slice_id = rows["source"][0], rows["slice_id"][0]
    source = source_named(source_name)
    segment_samples = round(config.segment_seconds * config.sampling_rate_hz)
    if segment_samples < 1:
        raise InputError(
            f"prepare.segment_seconds ({config.segment_seconds}) x prepare.sampling_rate_hz "
            f"({config.sampling_rate_hz}) is less than one sample"
        )
    records, segments, rejects = [], [], []
    with ShardWriter(out / "shard.h5", source_name, slice_id, config.sampling_rate_hz, segment_samples) as shard:
        progress = tqdm(rows.iter_rows(named=True), f"prepare {slice_id}", rows.height, unit=" records", **PROGRESS_BAR)
        for row in progress:
            try:
                facts, first_row = prepare_record(source.read_record(inputs["raw"], row), shard, config)
            except Rejected as rejected:
                named = {name: row[name] for name in ("record_id", "source", "slice_id", "raw_path")}
                rejects.append({**named, "reason": rejected.reason, "detail": rejected.detail})
                continue
            records.append({**row, **facts})
            segments += [
                {
                    "record_id": row["record_id"],
                    "segment_index": index,
                    "shard_row": first_row + index,
                    "start_s": index * config.segment_seconds,
                }
                for index in range(facts["n_segments"])
            ]
    record_table = table_of("records", records)
    write_table(record_table, "records", out / "records.parquet")
    write_table(table_of("segments", segments), "segments", out / "segments.parquet", {"records": record_table})
    write_table(table_of("rejects", rejects), "rejects", out / "rejects.parquet")
    assert len(records) + len(rejects) == rows.height
    reasons = Counter(reject["reason"] for reject in rejects)
    return {
        "listed": rows.height,
        "prepared": len(records),
        "rejected": len(rejects),
        "segments": len(segments),
        **{f"rejected: {reason}": count for reason, count in sorted(reasons.items())},
    }


def prepare_record(record: EcgRecord, shard: ShardWriter, config: PrepareConfig) -> tuple[dict[str, Any], int]:
    """Put one record's segments into the shard; returns its columns of `records` and its first row in the shard.

    Raises:
        Rejected: the record cannot be used.
    """
    standard = to_standard_leads(record)
    raw = lead_statistics(standard.signal_mv)
    if np.isnan(raw.mean_mv).all():
        raise Rejected("no_valid_sample", f"all samples of {', '.join(present_leads(record))} are invalid")
    resampled = resample_linear(standard.signal_mv, record.sampling_rate_hz, config.sampling_rate_hz)
    lossless = standard.digital is not None and resampled is standard.signal_mv
    digital = standard.digital if lossless else digitise(resampled)
    assert digital is not None
    at_rate = raw if lossless else lead_statistics(resampled)
    segments = cut_segments(digital.digital, shard.segment_samples)
    rows = shard.append(segments, digital, at_rate.mean_mv, at_rate.std_mv)
    facts = {
        "sampling_rate_hz": record.sampling_rate_hz,
        "n_samples": record.n_samples,
        "n_segments": len(segments),
        "leads": present_leads(record),
        "invalid_leads": _named(raw.invalid),
        "constant_leads": _named(raw.constant),
        "lead_mean_mv": raw.mean_mv.tolist(),
        "lead_std_mv": raw.std_mv.tolist(),
    }
    return facts, rows.start


def _named(flags: Any) -> list[str]:
    return [lead for lead, flag in zip(LEADS, flags, strict=True) if flag]
