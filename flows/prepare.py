"""One source, slice by slice: a subflow per source, a task per batch of slices, made here or by an engine's workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from prefect import flow
from tqdm import tqdm

from ecgfm.config import PROGRESS_BAR
from ecgfm.pipeline import PREPARE
from ecgfm.stages import Output, Request
from flows.engine import Work
from flows.runners import Engine, engine

BATCH_RECORDS = 3000  # of an engine's worker: seconds of work, where a task costs Prefect about 0.1 s
LOCAL_BATCH_RECORDS = 10_000  # and per process here: each batch starts its processes, which takes them a second or two
MAX_TASKS = 48  # more nodes than that on one level of the run graph are a smear


def prepare_source(work: Work, group: str, requests: Sequence[Request]) -> list[Output]:
    """Prepare the slices of one source as a subflow; `group` names it ("prepare ptb_xl").

    An engine is started or asked only for slices that are not there; those that are, are looked up here.
    """
    source = group.removeprefix(f"{PREPARE.name} ")
    runner, force = work.pipeline.runner, PREPARE.name in work.selection.force
    missing = [
        place
        for place, request in enumerate(requests)
        if runner.kind != "local" and (force or not work.store.find(request))
    ]
    with ExitStack() as running:
        lent = running.enter_context(engine(runner)) if missing else None

        def make() -> list[Output]:
            outputs: dict[int, Output] = {}
            if lent:
                outputs.update(_make_elsewhere(work, lent, source, requests, missing))
            here = [place for place in range(len(requests)) if place not in outputs]
            enough = LOCAL_BATCH_RECORDS * (work.pipeline.prepare.workers or os.cpu_count() or 1)
            for name, batch in _named(source, requests, here, enough, most=1 if lent else MAX_TASKS):
                outputs.update(zip(batch, work.run_task(name, [requests[place] for place in batch]), strict=True))
            ordered = [outputs[place] for place in range(len(requests))]
            work.publish_source(group, requests, ordered)
            return ordered

        body = _Unsent(make)

        @flow(name=PREPARE.name, flow_run_name=source, task_runner=lent.task_runner if lent else None)
        def prepare(source: str, slices: int, records: int) -> list[Output]:
            made: list[Output] = body.held()
            return made

        records = sum(request.size for request in requests)
        upstream = work.upstream(requests)
        outputs: list[Output] = prepare(source, len(requests), records, wait_for=upstream)  # type: ignore[call-overload]
    work.add_maker(requests, outputs)
    return outputs


def _make_elsewhere(
    work: Work, lent: Engine, source: str, requests: Sequence[Request], places: Sequence[int]
) -> dict[int, Output]:
    """Have an engine make the requests at `places`: place -> output."""
    named = dict(_named(source, requests, places, BATCH_RECORDS, MAX_TASKS))
    batches = {name: [requests[place] for place in batch] for name, batch in named.items()}
    outputs: dict[int, Output] = {}
    records = sum(requests[place].size for place in places)
    with tqdm(desc=f"{PREPARE.name} {source}", total=records, unit=" records", **PROGRESS_BAR) as progress:
        for name, made in lent.make(work.store, batches, PREPARE.name in work.selection.force):
            outputs.update(zip(named[name], made, strict=True))
            progress.update(sum(request.size for request in batches[name]))
    return outputs


class _Unsent:
    """Holds a function that stays in this process: with each task Prefect sends its flow, and all that hangs on it."""

    def __init__(self, held: Callable[[], Any]) -> None:
        self.held = held

    def __reduce__(self) -> tuple[Any, ...]:
        return _Unsent, (None,)


def _named(
    source: str, requests: Sequence[Request], places: Sequence[int], enough: int, most: int
) -> Iterator[tuple[str, list[int]]]:
    """The requests at `places` in `batches`, each with its name: the slices in it, counted from 1."""
    for batch in batches([requests[place].size for place in places], enough, most):
        held = [places[index] for index in batch]
        first, last = held[0] + 1, held[-1] + 1
        which = f"slice {first}" if first == last else f"slices {first}-{last}"
        some = "" if last - first + 1 == len(held) else f"{len(held)} of "
        records = sum(requests[place].size for place in held)
        yield f"{source}: {some}{which} of {len(requests)} ({records:,} records)", held


def batches(sizes: Sequence[int], enough: int, most: int) -> Iterator[range]:
    """Consecutive slices of `enough` records together, more where `most` batches would not do; sizes in records."""
    enough = max(enough, -(-sum(sizes) // most))
    first = held = 0
    for place, size in enumerate(sizes):
        held += size
        if held >= enough:
            yield range(first, place + 1)
            first, held = place + 1, 0
    if first < len(sizes):
        yield range(first, len(sizes))
