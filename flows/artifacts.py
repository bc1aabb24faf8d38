"""What the Prefect UI shows of a stage: a page with why it ran, its summary, pictures and counts; its progress."""

from __future__ import annotations

import base64
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact

from ecgfm.pipeline import summary, total_counts
from ecgfm.stages import Output

logger = logging.getLogger("ecgfm.artifacts")  # below the library's logger, whose lines are in the run's log

UPDATE_S = 10.0  # how often progress is sent
MOST_REASONS = 20


def publish(
    pipeline: str, name: str, outputs: Sequence[Output], whys: Sequence[str | None], reports: str | None = None
) -> None:
    """One page of what became of a stage, or of all slices of a source: why, summary, pictures, counts, where it lies.

    whys: why each output was made; None where it was there. reports: where reports are served, for a link
    """
    said = summary(outputs).partition(": ")[0]
    reasons = Counter(why for why in whys if why)
    title = f"{pipeline}: {name}: {said}" + (f"; {'; '.join(list(reasons)[:3])}" if reasons else "")
    headline = f"**{said[0].upper()}{said[1:]}**"
    counts = ["| what | count |", "|---|---:|", *(f"| {what} | {n:,} |" for what, n in total_counts(outputs).items())]
    if len(outputs) == 1:
        (output,), why = outputs, whys[0]
        headline += f", because: {why}." if why else f", unchanged since {output.made_at}."
        lines = [headline, *_of_stage(output, reports), "", *counts, "", f"`{output.directory}`"]
    else:
        listed = [f"- {n} of {len(outputs)}, because: {why}" for why, n in reasons.most_common(MOST_REASONS)]
        lines = [headline, *listed, "", *counts, "", f"`{outputs[0].directory.parent}`"]
    create_markdown_artifact("\n".join(lines), artifact_key(f"{pipeline} {name}"), title)


def _of_stage(output: Output, reports: str | None) -> Iterator[str]:
    """What one stage has beside its counts: a link to its report, its summary, its pictures."""
    if "report.html" in output.files and reports:
        place = f"stages/{output.directory.parent.name}/{output.directory.name}"
        yield from ("", f"[Open the report]({reports}/{place}/report.html)")
    if "summary.md" in output.files:
        yield from ("", (output.directory / "summary.md").read_text(encoding="utf-8"))
    for picture, svg in _pictures(output).items():
        data = base64.b64encode(svg.encode()).decode()
        yield from ("", f"![{picture}](data:image/svg+xml;base64,{data})")


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
        from ecgfm.pages.parts import training_panels

        lines = (output.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        pictures["curves"] = draw_panels(training_panels([json.loads(line) for line in lines]))
    return pictures
