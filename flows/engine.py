"""Library stage -> Prefect task: named runs, state Cached when it was, an artifact with the counts.

Prefect schedules and shows; what is fresh is decided by the stage store alone. What the library logs is in the
run's log (PREFECT_LOGGING_EXTRA_LOGGERS, set in this package's __init__). Tasks and subflows take what they work on
from a closure: Prefect would send a flow's parameters to its server, and walk through a task's.
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
from ecgfm.pipeline import PREPARE, Selection, make_all
from ecgfm.stages import Output, Request, Store


@dataclass
class Work:
    """What every task of one run shares.

    name: the pipeline's; artifacts of different pipelines have different keys
    makers: origin ("splits", "prepare ptb_xl records500/00000") -> what Prefect knows its maker by, for the edges of
        the run graph: the state of a task, the result of a subflow
    """

    name: str
    pipeline: Pipeline
    store: Store
    selection: Selection
    makers: dict[str, Any] = field(default_factory=dict)

    def run_task(self, name: str, requests: Sequence[Request]) -> list[Output]:
        """Make one stage, or a batch of slices, as one task."""

        def make() -> Any:
            outputs = make_all(self.pipeline, self.store, self.selection, requests, name)
            if requests[0].stage is not PREPARE:  # slices are summed up by source
                self.publish_counts(name, outputs[0].counts)
                self.publish_summary(name, outputs[0])
            if all(output.cached for output in outputs):
                return Completed(name="Cached", data=outputs)  # a state that a task returns is the task's state
            return outputs

        stage = requests[0].stage.name
        named = task(name=stage, task_run_name=name, cache_policy=NO_CACHE, persist_result=False)(make)
        state: State[list[Output]] = named(return_state=True, wait_for=self.upstream(requests))
        self.makers.update((request.name, state) for request in requests)
        return state.result()

    def publish_counts(self, name: str, counts: Mapping[str, int]) -> None:
        """An artifact of a stage's counts: records in and out, rejected by reason."""
        table = [{"what": what, "count": count} for what, count in counts.items()]
        create_table_artifact(table, artifact_key(f"{self.name} {name}"), f"{self.name}: {name}")

    def publish_summary(self, name: str, output: Output) -> None:
        """An artifact of the stage's own summary, where it wrote one."""
        if "summary.md" in output.files:
            text = (output.directory / "summary.md").read_text(encoding="utf-8")
            create_markdown_artifact(text, artifact_key(f"{self.name} {name} summary"), f"{self.name}: {name}")

    def upstream(self, requests: Sequence[Request]) -> list[Any]:
        """The makers of what the requests read, each once."""
        origins = {one.origin for request in requests for _, one in request.each_input()}
        makers = [maker for origin, maker in self.makers.items() if origin in origins]
        return list({id(maker): maker for maker in makers}.values())


def artifact_key(name: str) -> str:
    """A name as Prefect allows it for a key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
