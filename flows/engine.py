"""Library stage -> Prefect task: named runs, state Cached when it was, an artifact with the counts.

Prefect schedules and shows; what is fresh is decided by the stage store alone. What the library logs is in the
run's log (PREFECT_LOGGING_EXTRA_LOGGERS, set in this package's __init__).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from ecgfm.config import Pipeline
from ecgfm.fingerprints import Input
from ecgfm.pipeline import PREPARE, Selection, make_all
from ecgfm.stages import Output, Request, Store


@dataclass
class Work:
    """What every task of one run shares.

    states: origin ("splits", "prepare ptb_xl records500/00000") -> the Prefect state that made it, for the edges
    """

    pipeline: Pipeline
    store: Store
    selection: Selection
    states: dict[str, State[Any]] = field(default_factory=dict)

    def run_task(self, name: str, requests: Sequence[Request]) -> list[Output]:
        """One task for `requests`; its state is remembered for what reads their outputs."""
        named = make.with_options(name=requests[0].stage.name, task_run_name=name)
        state: State[list[Output]] = named(self, requests, name, self.upstream(requests), return_state=True)
        self.states.update((request.name, state) for request in requests)
        return state.result()

    def upstream(self, requests: Sequence[Request]) -> list[State[Any]]:
        """The states that made what the requests read, each once."""
        found: dict[int, State[Any]] = {}
        for request in requests:
            for given in request.inputs.values():
                for one in [given] if isinstance(given, Input) else given:
                    if state := self.states.get(one.origin.removesuffix(" raw files")):
                        found[id(state)] = state
        return list(found.values())


@task(cache_policy=NO_CACHE, persist_result=False)
def make(work: Work, requests: Sequence[Request], name: str, upstream: Sequence[Any]) -> list[Output]:
    """Make one stage, or a batch of slices. upstream: what they read, for the edges of the run graph."""
    outputs = make_all(work.pipeline, work.store, work.selection, requests, name)
    if requests[0].stage is not PREPARE:  # slices are summed up by source
        publish_counts(name, outputs[0].counts)
        summary = outputs[0].directory / "summary.md"
        if summary.exists():
            create_markdown_artifact(summary.read_text(encoding="utf-8"), artifact_key(f"{name} summary"), name)
    cached = all(output.cached for output in outputs)
    if cached:  # a state that a task returns is the task's state; its data are the result
        return Completed(name="Cached", data=outputs)  # type: ignore[return-value]
    return outputs


def publish_counts(name: str, counts: Mapping[str, int]) -> None:
    """An artifact of a stage's counts: records in and out, rejected by reason."""
    create_table_artifact([{"what": what, "count": count} for what, count in counts.items()], artifact_key(name), name)


def artifact_key(name: str) -> str:
    """A name as Prefect allows it for a key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
