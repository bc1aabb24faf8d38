"""Dask and Ray: batches of slices made by the workers of an engine, in the data directory that all machines see.

What is fresh is decided by the stage store, here and again on the worker: an engine only lends its cores. It is
imported when a pipeline asks for it (`runner` in pipelines.yaml; docs/runners.md).
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import pickle
import platform
import queue
import secrets
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from typing import Any

from prefect import get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed
from prefect.task_runners import TaskRunner

from ecgfm.config import PROGRESS_BAR
from ecgfm.ecg import InputError
from ecgfm.files import digest_of
from ecgfm.fingerprints import differences
from ecgfm.pipeline import PREPARE, summary
from ecgfm.pipelines_file import RunnerConfig
from ecgfm.stages import Output, Request, StageFailed, Store

logger = logging.getLogger("ecgfm.runners")  # below the library's logger, whose lines are in the run's log

LOOK_S = 2.0  # how often an engine is asked whether it still has workers
BLAS_THREADS = 1  # of a worker, which is one of several on its machine
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": str(BLAS_THREADS),
    "OPENBLAS_NUM_THREADS": str(BLAS_THREADS),
    "MKL_NUM_THREADS": str(BLAS_THREADS),
    "POLARS_MAX_THREADS": "2",  # fixed once polars is loaded: only here can it be set
}


@dataclass(frozen=True)
class Engine:
    """A Dask or Ray that answers.

    name: in words, with its address
    task_runner: of the flow whose tasks it runs
    count_workers: how many it has now; 0 also where it does not answer any more
    losses: what the result of a task raises whose workers died, or whose engine
    patience_s: how long it may be without a worker
    """

    name: str
    task_runner: TaskRunner[Any]
    count_workers: Callable[[], int]
    losses: tuple[type[Exception], ...]
    patience_s: float

    def wait_for_workers(self) -> int:
        """How many workers there are, once there is one.

        Raises:
            InputError: there is none within `patience_s`.
        """
        deadline = time.monotonic() + self.patience_s
        while not (workers := self.count_workers()):
            if time.monotonic() > deadline:
                raise InputError(f"{self.name} has had no worker for {self.patience_s:g} s (runner.patience_s)")
            time.sleep(0.2)
        return workers

    def make(
        self, store: Store, batches: Mapping[str, Sequence[Request]], force: bool
    ) -> Iterator[tuple[str, list[Output]]]:
        """Inside a flow: each batch as a task of its name; yields name and outputs as they come.

        Raises:
            InputError: as a stage raised it on a worker; a worker that does not see our folders, or has another ecgfm.
            StageFailed: workers died at a batch again and again, or none is left. What is made stays made.
        """
        finished: queue.SimpleQueue[PrefectFuture[list[Output]]] = queue.SimpleQueue()
        names = {}
        with get_client(sync_client=True) as client:
            server = str(client.api_url)
        with temporary_settings({PREFECT_API_URL: server}):  # the workers report there, whoever started it
            for name, requests in batches.items():
                ordered = task(name=PREPARE.name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False)
                future = ordered(make_ordered).submit(order_for(store, requests, force))
                names[future.task_run_id] = name
                future.add_done_callback(finished.put)
        while names:
            try:
                future = finished.get(timeout=LOOK_S)
            except queue.Empty:
                if not self.count_workers():
                    try:
                        self.wait_for_workers()
                    except InputError as error:
                        raise StageFailed(f"{len(names)} of {len(batches)} batches are not made: {error}") from error
                continue
            name = names.pop(future.task_run_id)
            try:
                outputs = future.result()
            except self.losses as error:
                raise StageFailed(f"{name}: {self.name} lost it: {_one_line(error)}") from error
            except RuntimeError as error:
                if "Failed to reach API" not in str(error):  # Prefect's words on the worker, before a line of ours runs
                    raise
                raise InputError(
                    f"a worker of {self.name} does not reach the Prefect server at {server}; "
                    "set PREFECT_API_URL to one that it reaches"
                ) from error
            for request in batches[name]:
                self._wait_until_seen(store, request)
            logger.info("%s: %s", name, summary(outputs))
            yield name, outputs

    def _wait_until_seen(self, store: Store, request: Request) -> None:
        """What a worker made is there for us: a network file system may take a while to tell."""
        deadline = time.monotonic() + self.patience_s
        while not store.find(request):
            if time.monotonic() > deadline:
                raise InputError(
                    f"a worker of {self.name} made {request.name}, but {store.place(request)} does not exist here: "
                    f"{store.data_dir} must be one folder that every worker sees at the same place"
                )
            time.sleep(0.5)


@contextmanager
def engine(config: RunnerConfig) -> Iterator[Engine]:
    """The engine of a pipeline while the context lasts: the one at its address, or one started on this machine.

    Raises:
        InputError: its extra is not installed, its address does not answer, or it has no worker, all within
            `config.patience_s`.
    """
    if config.address:
        _knock(config)
    with _dask(config) if config.kind == "dask" else _ray(config) as found:
        logger.info("%s: workers: %d", found.name, found.wait_for_workers())
        yield found


def order_for(store: Store, requests: Sequence[Request], force: bool) -> bytes:
    """What `make_ordered` makes. As bytes: Prefect walks through the parameters of a task."""
    return pickle.dumps((store, [(request, request.ingredients, _sight(request)) for request in requests], force))


def make_ordered(order: bytes) -> Any:
    """On a worker, as a Prefect task: the outputs of a batch of slices, one after the other.

    Raises:
        InputError: the worker does not see what the slices are made from, or has another ecgfm; or as a stage raises.
    """
    from threadpoolctl import threadpool_limits

    PROGRESS_BAR["disable"] = True  # the client shows one for all
    try:
        store, given, force = pickle.loads(order)
        importlib.import_module(given[0][0].stage.function.partition(":")[0])  # limits hold for what is loaded
        with _log_in_run(), threadpool_limits(BLAS_THREADS):
            requests = [_as_ours(*one) for one in given]
            outputs: list[Output] = [store.make(request, force) for request in requests]
            logger.info("on %s: %s", platform.node(), summary(outputs))
    except InputError as error:
        raise InputError(f"on worker {platform.node()}: {error}") from error
    return Completed(name="Cached", data=outputs) if all(output.cached for output in outputs) else outputs


def _as_ours(request: Request, ingredients: Mapping[str, Any], sight: Mapping[str, str]) -> Request:
    """A request as this worker makes it: in this one process, the engine's others being lent too.

    ingredients, sight: what the request is made of, and what its inputs look like, where it comes from

    Raises:
        InputError: this worker does not see the same inputs, or would make something else under the same key.
    """
    ours = replace(request, config=replace(request.config, workers=1))
    if ours.ingredients != ingredients:  # the code of this process is among them
        raise InputError(
            f"its ecgfm is another one ({'; '.join(differences(ingredients, ours.ingredients, {}, {}))}); "
            "install the same version there and start the worker anew"
        )
    for place, seen in _sight(request).items():
        if seen != sight[place]:
            raise InputError(
                f"{place} {'does not exist' if not seen else 'holds something else'} there; the data directory and the "
                "raw folders must be seen by every worker at the same places"
            )
    return ours


def _sight(request: Request) -> dict[str, str]:
    """What a glance at a request's inputs shows: place -> its size, or a digest of the names in it; "" if missing.

    An empty mount point must not pass for the raw folder: its slices would be committed with every record rejected.
    """
    sights = {}
    for _, one in request.each_input():
        for place in [one.path / folder for folder in one.folders] or [one.path]:
            if place.is_dir():
                sights[str(place)] = digest_of(dict.fromkeys(os.listdir(place), ""))
            else:
                sights[str(place)] = str(place.stat().st_size) if place.exists() else ""
    return sights


@contextmanager
def _log_in_run() -> Iterator[None]:
    """What the library logs goes to the run's log, also from a worker that was started without our settings."""
    library = logging.getLogger("ecgfm")
    there = any(isinstance(handler, APILogHandler) for handler in library.handlers)
    handler, level = APILogHandler(), library.level
    library.setLevel(logging.INFO)
    if not there:
        library.addHandler(handler)
    try:
        yield
    finally:
        library.removeHandler(handler)
        library.setLevel(level)


def _knock(config: RunnerConfig) -> None:
    """The address takes connections: an engine's own client may wait for minutes, or end this process."""
    host, _, port = str(config.address).rpartition("//")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=config.patience_s).close()
    except OSError as error:
        raise InputError(
            f"no {config.kind} answers at {config.address} (runner.address): {error}; start it, or leave the address "
            "out to have one started for the run"
        ) from error


@contextmanager
def _dask(config: RunnerConfig) -> Iterator[Engine]:
    try:
        from distributed import CancelledError, Client, KilledWorker, LocalCluster
        from distributed.comm.core import CommClosedError, connect
        from prefect_dask.task_runners import DaskTaskRunner
    except ImportError as error:
        raise InputError("the runner dask needs prefect-dask: pip install 'ecgfm[dask]'") from error

    @contextmanager
    def scheduler() -> Iterator[str]:
        if config.address:
            yield config.address
            return
        workers = config.workers or os.cpu_count() or 1
        with LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=workers, threads_per_worker=1, dashboard_address=None, env=WORKER_ENVIRONMENT
        ) as cluster:
            yield cluster.scheduler_address

    async def shake_hands(address: str) -> None:
        comm = await asyncio.wait_for(connect(address), config.patience_s)  # type: ignore[no-untyped-call]
        await comm.close()

    with scheduler() as address:
        try:  # a client would wait for ever for a server that takes connections and is no Dask
            asyncio.run(shake_hands(address))
        except (OSError, TimeoutError, ValueError, MemoryError) as error:
            raise InputError(f"what answers at {address} (runner.address) is no Dask scheduler") from error
        client = Client(address, timeout=config.patience_s, set_as_default=False)  # type: ignore[no-untyped-call]

        def count_workers() -> int:
            try:
                return len(client.nthreads())  # type: ignore[no-untyped-call]
            except (OSError, CommClosedError):
                return 0

        with client:
            runner = DaskTaskRunner(
                address=address, client_kwargs={"timeout": config.patience_s, "set_as_default": False}
            )
            # a worker that cannot load what it is sent would end, and the next one, without a word
            for worker, answer in client.run(resolve_name, f"{__name__}:BLAS_THREADS", on_error="return").items():
                if isinstance(answer, Exception):
                    raise InputError(
                        f"worker {worker} has no ecgfm of our version: {_one_line(answer)}; install it there"
                    )
            losses = (KilledWorker, CancelledError, CommClosedError)
            yield Engine(f"dask at {address}", runner, count_workers, losses, config.patience_s)


@contextmanager
def _ray(config: RunnerConfig) -> Iterator[Engine]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # its telemetry
    if not config.address:  # an engine of our own takes orders from us alone; Ray would write a token into the home
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
        from grpc import RpcError
        from prefect_ray.task_runners import RayTaskRunner
    except ImportError as error:
        raise InputError("the runner ray needs prefect-ray: pip install 'ecgfm[ray]'") from error

    address = config.address or "local"
    try:
        with warnings.catch_warnings(action="ignore"):  # the error says it
            ray.init(
                address,
                num_cpus=None if config.address else config.workers or os.cpu_count(),
                include_dashboard=None if config.address else False,
                runtime_env={"env_vars": WORKER_ENVIRONMENT},
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise InputError(f"ray at {address} does not answer: {_one_line(error)}") from error

    def count_workers() -> int:
        try:
            return int(ray.cluster_resources().get("CPU", 0))  # type: ignore[no-untyped-call]
        except (RpcError, ConnectionError, ValueError, ray.exceptions.RayError):  # ValueError: a closed channel
            return 0

    try:  # the task runner takes the ray that this process has joined
        losses = (RpcError, ConnectionError, ray.exceptions.RayError)
        yield Engine(f"ray at {address}", RayTaskRunner(), count_workers, losses, config.patience_s)
    finally:
        ray.shutdown()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
