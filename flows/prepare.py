"""One source, slice by slice: a subflow per source, a task per batch of slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prefect import flow

from ecgfm.pipeline import PREPARE, total_counts
from ecgfm.stages import Output, Request
from flows.engine import Work

BATCH_RECORDS = 3000  # 10 s of work or more: a task costs Prefect about 0.1 s
MAX_TASKS = 48  # more nodes than that on one level of the run graph are a smear


def prepare_source(work: Work, group: str, requests: Sequence[Request]) -> list[Output]:
    """Prepare the slices of one source as a subflow; `group` names it ("prepare ptb_xl")."""

    source = group.removeprefix(f"{PREPARE.name} ")

    @flow(name=PREPARE.name, flow_run_name=source)
    def prepare(source: str, slices: int, records: int) -> list[Output]:
        outputs: list[Output] = []
        for batch in batches(requests):
            first, last = len(outputs) + 1, len(outputs) + len(batch)
            which = f"slice {first}" if first == last else f"slices {first}-{last}"
            outputs += work.run_task(
                f"{source}: {which} of {slices} ({sum(one.size for one in batch):,} records)", batch
            )
        work.publish_counts(group, total_counts(outputs))
        return outputs

    records = sum(request.size for request in requests)
    upstream = work.upstream(requests)
    outputs: list[Output] = prepare(source, len(requests), records, wait_for=upstream)  # type: ignore[call-overload]
    work.makers.update((request.name, outputs) for request in requests)
    return outputs


def batches(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Consecutive slices of about `BATCH_RECORDS` records together, at most `MAX_TASKS` batches."""
    enough = max(BATCH_RECORDS, -(-sum(request.size for request in requests) // MAX_TASKS))
    batch: list[Request] = []
    for request in requests:
        batch.append(request)
        if sum(one.size for one in batch) >= enough:
            yield batch
            batch = []
    if batch:
        yield batch
