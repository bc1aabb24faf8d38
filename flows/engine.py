"""Library stage -> Prefect task: named runs, state Cached when it was, retries, progress, artifacts to look at.

Prefect schedules and shows; what is fresh is decided by the stage store alone. What the library logs is in the
run's log (PREFECT_LOGGING_EXTRA_LOGGERS, set in this package's __init__). Tasks and subflows take what they work on
from a closure: Prefect would send a flow's parameters to its server, and walk through a task's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefect import get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import State
from prefect.concurrency.sync import concurrency
from prefect.events.worker import EventsWorker
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.logging.handlers import APILogWorker
from prefect.states import Completed

from ecgfm.pipeline import PREPARE, Selection, make_all
from ecgfm.pipelines_file import Pipeline
from ecgfm.stages import Output, Request, StageFailed, Store
from flows import server
from flows.artifacts import Progress, publish

logger = logging.getLogger("ecgfm.engine")  # below the library's logger, whose lines are in the run's log

SEND_PATIENCE_S = 10.0
LEASE_S = 60.0  # of a concurrency slot: so long after the death of its holder it is free again


@dataclass
class Work:
    """What every task of one run shares.

    name: the pipeline's; artifacts of different pipelines have different keys
    makers: origin ("splits", "prepare ptb_xl records500/00000") -> what Prefect knows its maker by, for the edges of
        the run graph: the state of a task, the result of a subflow
    after: identity of a maker -> those of all makers before it
    reasons: the walker's: name of a request -> why it is to be made; the others are there
    """

    name: str
    pipeline: Pipeline
    store: Store
    selection: Selection
    reasons: Mapping[str, str] = field(default_factory=dict)
    makers: dict[str, Any] = field(default_factory=dict)
    after: dict[int, set[int]] = field(default_factory=dict)

    def run_task(self, name: str, requests: Sequence[Request]) -> list[Output]:
        """Make one stage, or a batch of slices, as one task."""
        deployment = self.pipeline.deployment
        tries = 0

        def make() -> Any:
            nonlocal tries
            tries += 1
            selection = replace(self.selection, go_on=tries > 1)
            progress = Progress(self.name, name)
            with self._gpu(requests[0]):
                outputs = make_all(self.pipeline, self.store, selection, requests, name, progress.show)
            if requests[0].stage is not PREPARE:  # slices are summed up by source
                reports = server.reports_address(self.store.data_dir)
                publish(self.name, name, outputs, [self.reasons.get(requests[0].name)], reports)
            if all(output.cached for output in outputs):
                return Completed(name="Cached", data=outputs)  # a state that a task returns is the task's state
            return outputs

        there = not any(request.name in self.reasons for request in requests)
        named = task(
            name=requests[0].stage.name,
            task_run_name=f"{name} (cached)" if there else name,
            cache_policy=NO_CACHE,
            persist_result=False,
            retries=deployment.retries,
            retry_delay_seconds=deployment.retry_delay_s,
            retry_condition_fn=_crashed,
        )(make)
        state: State[list[Output]] = named(return_state=True, wait_for=self.upstream(requests))
        self.add_maker(requests, state)
        return state.result()

    def publish_source(self, group: str, requests: Sequence[Request], outputs: Sequence[Output]) -> None:
        """A page of what became of a source's slices, all together."""
        publish(self.name, group, outputs, [self.reasons.get(request.name) for request in requests])

    def upstream(self, requests: Sequence[Request]) -> list[Any]:
        """The makers that the run graph draws edges from: of what the requests read, but for those that another of
        them came after. All edges would be a tangle: evaluation reads something of nearly every stage."""
        read = self._read(requests)
        earlier = set().union(*(self.after[one] for one in read))
        return [maker for one, maker in read.items() if one not in earlier]

    def add_maker(self, requests: Sequence[Request], maker: Any) -> None:
        """Remember what Prefect knows the maker of these requests by."""
        read = self._read(requests)
        self.after[id(maker)] = set(read).union(*(self.after[one] for one in read))
        self.makers.update((request.name, maker) for request in requests)

    def _read(self, requests: Sequence[Request]) -> dict[int, Any]:
        """The makers of what the requests read, each once, by its identity."""
        origins = {one.origin for request in requests for _, one in request.each_input()}
        return {id(maker): maker for origin, maker in self.makers.items() if origin in origins}

    @contextmanager
    def _gpu(self, request: Request) -> Iterator[None]:
        """A slot of the concurrency limit for GPUs, where the request trains on one."""
        deployment = self.pipeline.deployment
        device = getattr(request.config, "device", "cpu")
        wanted = deployment.gpu == "always" or (deployment.gpu == "auto" and device != "cpu" and count_gpus() > 0)
        if not (request.stage.own_process and wanted) or request.name not in self.reasons or server.is_temporary():
            yield
            return
        ensure_limit(deployment.gpu_limit, max(1, count_gpus()))
        logger.info("%s: waits for a slot of the concurrency limit %s", request.name, deployment.gpu_limit)
        # a server that is away for a while must not end a training: its lease goes on when it is back
        with concurrency(
            deployment.gpu_limit, lease_duration=LEASE_S, strict=True, raise_on_lease_renewal_failure=False
        ):
            yield


def count_gpus() -> int:
    """How many GPUs this machine has, without asking torch, whose import takes seconds."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def ensure_limit(name: str, slots: int) -> None:
    """Make a global concurrency limit where there is none of that name."""
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):  # another run was quicker
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=slots))
                logger.info("made the concurrency limit %s with %d slots", name, slots)


def send_what_waits() -> None:
    """Wait until the server has all logs and states: Prefect sends them in the background, as late as at exit."""
    APILogWorker.drain_all(timeout=SEND_PATIENCE_S)
    EventsWorker.drain_all(timeout=SEND_PATIENCE_S)


def _crashed(task: Any, run: Any, state: State[Any]) -> bool:
    """Whether a failure is worth another try: a process that died is, a mistake is not."""
    return isinstance(state.result(raise_on_failure=False), StageFailed)
