"""The pipeline as a Prefect flow, and each of its stages as a flow that runs alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefect import Flow, flow

from ecgfm.config import load_pipeline
from ecgfm.pipeline import PREPARE, STAGE_NAMES, Made, Selection, Walker, walk
from ecgfm.runs import recorded_run
from ecgfm.stages import Request, Store
from flows.engine import Work
from flows.prepare import prepare_source


@flow(name="ecgfm", flow_run_name="{pipeline}")
def run_pipeline(
    pipeline: str,
    data_dir: str,
    pipelines_file: str,
    raw: dict[str, str],
    overrides: list[str],
    only: list[str],
    start: str | None,
    force: list[str],
    verify: bool = False,
    hash_raw: bool = False,
) -> str:
    """Every stage of one pipeline of pipelines.yaml; returns the directory that records the run.

    raw: source -> raw folder. overrides: such as `pretrain.max_steps=200`. only, start, force: as on the command line.
    """
    config = load_pipeline(Path(pipelines_file), pipeline, overrides)
    work = Work(pipeline, config, Store(Path(data_dir), verify), Selection(tuple(only), start, tuple(force)))

    def execute(requests: Sequence[Request], group: str) -> Sequence[Made]:
        if requests[0].stage is PREPARE:
            return prepare_source(work, group, requests)
        return [work.run_task(request.name, [request])[0] for request in requests]

    walker = Walker(work.store, execute, work.selection)
    work.reasons = walker.reasons
    folders = {source: Path(path) for source, path in raw.items()}
    with recorded_run(work.store.data_dir, pipeline, config, walker, folders) as directory:
        walk(config, folders, walker, hash_raw)
    return str(directory)


def stage_flow(stage: str) -> Flow[..., str]:
    """One stage of a pipeline as a flow of its own: it runs alone on what the earlier stages left."""

    @flow(name=f"ecgfm {stage}", flow_run_name=f"{{pipeline}}: {stage}")
    def run_one(
        pipeline: str,
        data_dir: str,
        pipelines_file: str,
        raw: dict[str, str],
        overrides: list[str],
        force: list[str],
        verify: bool = False,
        hash_raw: bool = False,
    ) -> str:
        return run_pipeline.fn(
            pipeline, data_dir, pipelines_file, raw, overrides, [stage], None, force, verify, hash_raw
        )

    return run_one


run_stage = {stage: stage_flow(stage) for stage in STAGE_NAMES}
