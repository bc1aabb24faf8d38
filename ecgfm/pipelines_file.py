"""A pipeline of pipelines.yaml: the values of its stages (config.py), where it runs, and when."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from cronsim import CronSim, CronSimError
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from ecgfm.config import (
    STRICT,
    AuditConfig,
    Count,
    EvaluateConfig,
    FinetuneConfig,
    LabelsConfig,
    ManifestsConfig,
    Positive,
    PrepareConfig,
    PretrainConfig,
    SplitsConfig,
    SyntheticConfig,
    from_dict,
)
from ecgfm.ecg import InputError


@dataclass(frozen=True, config=STRICT)
class RunnerConfig:
    """Where the slices of prepare are made. `runner: dask` is short for `runner: {kind: dask}`.

    kind: `local`: processes on this machine; `dask`, `ray`: the workers of such an engine, which see the data
        directory and the raw folders at the same places. All other stages run on this machine
    address: of an engine that runs already, such as tcp://HOST:8786 (Dask) or ray://HOST:10001 (Ray); None: one is
        started on this machine for the run
    workers: processes of an engine that is started for the run; 0: one per core
    patience_s: how long to wait for the engine to answer and for its first worker, also when all have gone
    """

    kind: Literal["local", "dask", "ray"] = "local"
    address: str | None = None
    workers: Count = 0
    patience_s: Positive = 60.0

    def __post_init__(self) -> None:
        if self.kind == "local" and (self.address or self.workers):
            raise ValueError("address and workers need kind dask or ray; the local runner has prepare.workers")
        if self.address and self.workers:
            raise ValueError("workers are started where no address is given; an engine at an address has its own")
        schemes, example = {
            "ray": ("ray://", "ray://HOST:10001"),
            "dask": ("((tcp|tls|ws|wss)://)?", "tcp://HOST:8786"),
        }.get(self.kind, ("", ""))
        if self.address and not re.fullmatch(rf"{schemes}[^/\s]+:\d+", self.address):
            raise ValueError(f"the address of {self.kind} must be like {example}, found {self.address!r}")


def _runner(given: Any) -> Any:
    return {"kind": given} if isinstance(given, str) else given


@dataclass(frozen=True, config=STRICT)
class ScheduleConfig:
    """When a deployed pipeline runs by itself: by `cron` or every `interval_s` seconds.

    name: tells it from the pipeline's other schedules
    cron: five fields, such as "0 2 * * *"; timezone: an IANA name, in which the cron is meant, and from whose
        midnight an interval counts
    set: values for its runs alone, as of --set: ["pretrain.max_steps=200"]
    only: the stages that its runs make, as of --only; all where none is named
    """

    name: str = "schedule"
    cron: str | None = None
    interval_s: Positive | None = None  # seconds between two runs
    timezone: str = "UTC"
    set: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.cron is None) == (self.interval_s is None):
            raise ValueError("a schedule has either cron or interval_s")
        if self.cron is not None:
            try:
                CronSim(self.cron, datetime(2020, 1, 1))
                understood = len(self.cron.split()) == 5  # with a sixth it would be seconds
            except CronSimError:
                understood = False
            if not understood:
                raise ValueError(f"cannot read cron {self.cron!r}; expected five fields, such as 0 2 * * *")
        try:
            ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError):
            raise ValueError(f"unknown timezone {self.timezone!r}; expected one such as Europe/Berlin") from None


@dataclass(frozen=True, config=STRICT)
class DeploymentConfig:
    """How a pipeline runs under Prefect, by itself and beside others (docs/orchestration.md).

    schedules: when it runs by itself; a pipeline without one is deployed all the same, to be started by hand
    overlap: what becomes of a run that is due while one of the same pipeline goes on: `skip` it, or let it `wait`
    missed: what becomes of runs that could not start when they were due: `once`: the first to start stands for all
        that were due by then; `never`: one that starts more than `late_s` late does nothing
    tags: on its runs
    retries, retry_delay_s: of a stage whose process crashed or was killed; training goes on from its last checkpoint
    gpu: whether a training takes a slot of Prefect's concurrency limit `gpu_limit`: `auto`, where it uses a GPU
    """

    schedules: tuple[ScheduleConfig, ...] = ()
    overlap: Literal["skip", "wait"] = "skip"
    missed: Literal["once", "never"] = "once"
    late_s: Positive = 3600.0  # with missed never: how late a run may start
    tags: tuple[str, ...] = ()
    retries: Count = 0
    retry_delay_s: Annotated[float, Field(ge=0)] = 10.0
    gpu: Literal["auto", "always", "never"] = "auto"
    gpu_limit: str = "gpu"  # the name of that limit on the Prefect server

    def __post_init__(self) -> None:
        names = [schedule.name for schedule in self.schedules]
        if len(set(names)) < len(names):
            raise ValueError("schedules need different names")


@dataclass(frozen=True, config=STRICT)
class Pipeline:
    """One named pipeline of pipelines.yaml.

    raw: source -> its raw folder, where the command line gives none; relative to the pipelines file

    `runner` and `deployment` are in no stage's key: the bytes are the same everywhere.
    """

    sources: Annotated[tuple[str, ...], Field(min_length=1)]  # what it reads, such as ptb_xl
    description: str = ""  # a line about it, for ecgfm pipelines
    raw: Mapping[str, str] = field(default_factory=dict)
    synthetic: SyntheticConfig = SyntheticConfig()
    prepare: PrepareConfig = PrepareConfig()
    audit: AuditConfig = AuditConfig()
    splits: SplitsConfig = SplitsConfig()
    labels: LabelsConfig = LabelsConfig()
    manifests: ManifestsConfig = ManifestsConfig()
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    runner: Annotated[RunnerConfig, BeforeValidator(_runner)] = RunnerConfig()
    deployment: DeploymentConfig = DeploymentConfig()

    def __post_init__(self) -> None:
        if len(set(self.sources)) < len(self.sources):
            raise ValueError("sources must name each source once")
        if unknown := sorted(self.raw.keys() - set(self.sources)):
            raise ValueError(f"raw names {unknown[0]!r}, which is not among the sources: {', '.join(self.sources)}")
        if misfit := self.finetune.misfit(self.labels.task):
            raise ValueError(f"finetune.{misfit}")


def read_pipelines(path: Path) -> dict[str, dict[str, Any]]:
    """The pipelines of a pipelines.yaml, unchecked: a mapping of name to values.

    Raises:
        InputError: no such file, one that cannot be read, or no YAML of this form.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; name one with --pipelines FILE") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict) or not all(isinstance(values, dict) for values in loaded.values()):
        raise InputError(f"{path}: expected a mapping of pipeline names to their values")
    return loaded


def load_pipeline(path: Path, name: str, overrides: Sequence[str] = ()) -> Pipeline:
    """The pipeline `name` of the file `path`, with `overrides` such as `pretrain.max_steps=200` put in.

    The paths of `finetune.checkpoint`, `labels.table` and `labels.reports` are relative to the file, or, among the
    overrides, to the working directory.

    Raises:
        InputError: no such pipeline, an unknown key, a wrong value.

    >>> pipeline = load_pipeline(Path("pipelines.yaml"), "demo", ["pretrain.max_steps=200"])
    >>> pipeline.sources, pipeline.pretrain.max_steps
    (('synthetic',), 200)
    """
    pipelines = read_pipelines(path)
    if name not in pipelines:
        near = difflib.get_close_matches(name, pipelines, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(pipelines))}"
        raise InputError(f"{path.name}: no pipeline {name!r}; {hint}")
    values = pipelines[name]
    labels = values.get("labels")
    reports = labels.get("reports") if isinstance(labels, dict) else None
    for within, key in (
        (values.get("finetune"), "checkpoint"),
        (labels, "table"),
        (reports, "rules"),
        (reports, "patterns"),
    ):
        if isinstance(within, dict) and isinstance(within.get(key), str):
            within[key] = str(path.absolute().parent / Path(within[key]).expanduser())
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise InputError(f"--set {override}: expected KEY=VALUE, such as pretrain.max_steps=200")
        *parents, leaf = key.strip().split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise InputError(f"--set {override}: {parent} holds a value, not a section")
        try:
            place[leaf] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--set {override}: the value is not YAML: {' '.join(str(error).split())}") from error
    return from_dict(Pipeline, values, f"{path.name}: {name}")
