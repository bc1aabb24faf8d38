"""What a run cost: for each stage the seconds, and as far as the machine told them memory and energy of its making,
whichever run made it.

That is of one machine and one day, so it stands in the run's own folder and page and not in a stage's output, which
must be equal wherever it is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from markupsafe import Markup

from ecgfm.pages.template import COST_MARK
from ecgfm.stages import Output, Request

_NOT_KNOWN = "\N{EN DASH}"


@dataclass(frozen=True)
class Spent:
    """What the making of a stage cost, or of all slices of a source together.

    n: outputs; made: those of them that this run made; made_at: of the last of them, ISO 8601
    seconds: of all; of slices, several of which may be made at a time, the sum
    counts: of what was made, in words
    device: names of GPUs, or CPU; peak_memory_bytes: that the process held at most; None where not told
    energy_j: by `processor` and `gpu`, of the whole of these whatever else ran; None where not told
    """

    stage: str
    n: int
    made: int
    made_at: str
    seconds: float
    counts: Mapping[str, int]
    device: str | None
    peak_memory_bytes: int | None
    energy_j: Mapping[str, float] | None


def ledger(outputs: Sequence[tuple[Request, Output]]) -> list[Spent]:
    """What the outputs of a run cost, in its order."""
    together: dict[str, list[Output]] = {}
    for request, output in outputs:
        source = request.subject.partition(" ")[0]
        together.setdefault(f"{request.stage.name} {source}".strip() if request.stage.many else output.name, []).append(
            output
        )
    return [_spent(stage, some) for stage, some in together.items()]


def _spent(stage: str, outputs: Sequence[Output]) -> Spent:
    counts: dict[str, int] = {}
    for output in outputs:
        for what, n in output.counts.items():
            counts[what] = counts.get(what, 0) + n
    devices = dict.fromkeys(output.cost["device"] for output in outputs if "device" in output.cost)
    peaks = [output.cost["peak_memory_bytes"] for output in outputs if "peak_memory_bytes" in output.cost]
    energies = [output.cost["energy_j"] for output in outputs if "energy_j" in output.cost]
    parts = sorted({part for energy in energies for part in energy})
    return Spent(
        stage,
        len(outputs),
        sum(not output.cached for output in outputs),
        max(output.made_at for output in outputs),
        round(sum(output.seconds for output in outputs), 3),
        counts,
        ", ".join(devices) or None,
        max(peaks, default=None),
        # of some of them alone it would be too little
        {part: round(sum(energy.get(part, 0.0) for energy in energies), 1) for part in parts}
        if parts and len(energies) == len(outputs)
        else None,
    )


def as_json(spent: Sequence[Spent], run_seconds: float) -> dict[str, Any]:
    """The ledger as plain data. run_seconds: of the run, from its begin to its end"""
    return {"run_seconds": run_seconds, "stages": [asdict(one) for one in spent]}


def put_in(page: str, spent: Sequence[Spent], run_seconds: float) -> str:
    """A report with what it cost at its `COST_MARK`."""
    return page.replace(COST_MARK, section(spent, run_seconds))


def section(spent: Sequence[Spent], run_seconds: float) -> Markup:
    """The ledger as a section of the report."""
    made_now = sum(one.seconds for one in spent if one.made == one.n)
    rows = Markup("\n").join(_row(one) for one in spent)
    return Markup("""<section>
<h2>What it cost</h2>
<div class="wide"><table>
<thead><tr><th>stage</th><th>seconds</th><th class="text">in this run</th><th class="text">made, UTC</th>
<th class="words">of what</th><th class="words">device</th><th>peak memory, GB</th><th>energy, Wh</th></tr></thead>
<tbody>
{rows}
<tr class="macro"><td>all</td><td>{seconds:,.1f}</td><td></td><td></td><td></td><td></td><td></td><td>{energy}</td></tr>
</tbody></table></div>
<p class="note">Seconds, memory and energy are of the making, whichever run made it: this run took {run:,.1f} s and made
stages of {made:,.1f} s. Of slices the seconds are added up, though several may be made at a time. Memory is the most
that the process held. Energy is of the whole processor and of whole GPUs, whatever else ran, where the machine tells it
(RAPL, NVML); of slices that are made at a time it is not told. {none} is not known.</p>
</section>""").format(
        rows=rows,
        seconds=sum(one.seconds for one in spent),
        energy=_total_energy(spent),
        run=run_seconds,
        made=made_now,
        none=_NOT_KNOWN,
    )


def _row(one: Spent) -> Markup:
    how = "made" if one.made == one.n else "was there" if not one.made else f"{one.made:,} of {one.n:,} made"
    name = f"{one.stage}: {one.n:,} slices" if one.n > 1 else one.stage
    memory = _NOT_KNOWN if one.peak_memory_bytes is None else f"{one.peak_memory_bytes / 1e9:.2f}"
    of_what = ", ".join(_main_counts(one.counts))
    cells = Markup(
        '<tr><td>{}</td><td>{:,.1f}</td><td class="text">{}</td><td class="text">{}</td><td class="words">{}</td>'
        '<td class="words">{}</td><td>{}</td><td>{}</td></tr>'
    )
    made_at = one.made_at[:16].replace("T", " ")
    return cells.format(name, one.seconds, how, made_at, of_what, one.device or _NOT_KNOWN, memory, _watt_hours([one]))


def _main_counts(counts: Mapping[str, int], most: int = 3) -> Iterator[str]:
    """What the work was of, without reasons."""
    work = ("steps", "segments", "records", "prepared", "listed", "epochs", "test records", "embeddings")
    known = [what for what in work if what in counts]
    for what in (known or [what for what in counts if ":" not in what])[:most]:
        yield f"{counts[what]:,} {what}"


def _total_energy(spent: Sequence[Spent]) -> Markup:
    """Of the stages that know it, and how many these are."""
    known = [one for one in spent if one.energy_j is not None]
    of = f"of {len(known)} of {len(spent)} stages" if 0 < len(known) < len(spent) else ""
    return Markup("{}<small>{}</small>").format(_watt_hours(known), of)


def _watt_hours(spent: Sequence[Spent]) -> str:
    """All parts together."""
    energies = [one.energy_j for one in spent if one.energy_j is not None]
    return f"{sum(sum(energy.values()) for energy in energies) / 3600:,.3g}" if energies else _NOT_KNOWN
