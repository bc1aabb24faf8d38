"""What the Prefect UI shows of a stage: why it ran, its counts as a table, its summary, its pictures, its progress."""

from __future__ import annotations

import base64
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from ecgfm.pipeline import summary, total_counts
from ecgfm.stages import Output

logger = logging.getLogger("ecgfm.artifacts")  # below the library's logger, whose lines are in the run's log

UPDATE_S = 10.0  # how often progress is sent


def publish_output(pipeline: str, name: str, output: Output, why: str | None, reports: str | None) -> None:
    """What one stage made or found: its counts, its own summary, its pictures.

    why: it was made; None where it was there. reports: where reports are served, for a link
    """
    publish_counts(pipeline, name, [output], [why])
    if "summary.md" in output.files:
        text = (output.directory / "summary.md").read_text(encoding="utf-8")
        create_markdown_artifact(text, artifact_key(f"{pipeline} {name} summary"), f"{pipeline}: {name}")
    for picture, svg in _pictures(output).items():
        address = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
        create_image_artifact(address, artifact_key(f"{pipeline} {name} {picture}"), f"{pipeline}: {picture}")
    if "report.html" in output.files and reports:
        link = f"{reports}/stages/{output.directory.parent.name}/{output.directory.name}/report.html"
        create_link_artifact(link, "The report", artifact_key(f"{pipeline} report"), f"{pipeline}: the report")


def publish_counts(pipeline: str, name: str, outputs: Sequence[Output], whys: Sequence[str | None]) -> None:
    """A table of counts, of slices summed; its description says why they were made.

    whys: of each output; None where it was there
    """
    table = [{"what": what, "count": count} for what, count in total_counts(outputs).items()]
    reasons = Counter(why for why in whys if why)
    because = "; ".join(why if len(outputs) == 1 else f"{count}: {why}" for why, count in reasons.most_common())
    there = f"unchanged since {max(output.made_at for output in outputs)}"
    made = summary(outputs).partition(": ")[0]
    create_table_artifact(
        table,
        artifact_key(f"{pipeline} {name}"),
        f"{pipeline}: {name}: {made}, {f'because: {because}' if because else there}",
    )


class Progress:
    """How far a training is, as a progress artifact that is updated while it goes on."""

    def __init__(self, pipeline: str, name: str) -> None:
        self._title = f"{pipeline}: {name}"
        self._key = artifact_key(f"{pipeline} {name} progress")
        self._artifact: UUID | None = None
        self._first: tuple[float, int] | None = None
        self._sent = 0.0

    def show(self, facts: Mapping[str, Any]) -> None:
        """Take what the training process tells: `step`, `max_steps`, `loss`, `segments_per_second`."""
        now, step, steps = time.monotonic(), int(facts["step"]), int(facts["max_steps"])
        self._first = self._first or (now, step)
        if now - self._sent < UPDATE_S and step < steps:
            return
        self._sent = now
        since, first = self._first
        left = (steps - step) * (now - since) / (step - first) if step > first else None
        text = (
            f"{self._title}: step {step:,} of {steps:,}, loss {facts['loss']:.4g}, "
            f"{facts['segments_per_second']:,.0f} segments/s" + (f", {duration(left)} left" if left is not None else "")
        )
        share = 100.0 * step / steps
        try:
            if self._artifact is None:
                made = create_progress_artifact(share, self._key, text)
                assert isinstance(made, UUID)
                self._artifact = made
            else:
                update_progress_artifact(self._artifact, share, text)
        except httpx.HTTPError as error:  # a server that is away must not end a training
            logger.warning("the Prefect server did not take the progress: %s", error)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min, 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def artifact_key(name: str) -> str:
    """A name as Prefect allows it for a key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _pictures(output: Output) -> dict[str, str]:
    """Name -> SVG: those that the stage drew; of a training, its curves."""
    pictures = {
        name.removesuffix(".svg"): (output.directory / name).read_text(encoding="utf-8")
        for name in output.files
        if name.endswith(".svg")
    }
    if "metrics.jsonl" in output.files:
        from ecgfm.drawing import draw_panels
        from ecgfm.html_report import training_panels

        lines = (output.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        pictures["curves"] = draw_panels(training_panels([json.loads(line) for line in lines]))
    return pictures
