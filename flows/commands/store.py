"""Looking back, and making room: runs, what lies in a data directory, what made a file. Imports neither prefect nor
torch."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ecgfm import housekeeping
from ecgfm.ecg import InputError
from ecgfm.housekeeping import Lying, Removable, seconds_of
from ecgfm.lineage import Branch, Leaf, Lineage, Made, lineage_of
from ecgfm.pipeline import STAGE_NAMES
from ecgfm.runs import Run, find_run, find_runs, keep, links_below
from ecgfm.stages import Store
from flows.commands.options import DataDir, Debug, complete_runs, complete_stages, one_line_errors
from flows.commands.tables import (
    TIED,
    counted,
    cut,
    grouped,
    lasted,
    local_time,
    print_table,
    size_of,
    table_lines,
    wrapped,
)

app = typer.Typer()

SHORT_KEY = 8  # hex digits of a key or digest that are shown
STATE_COLOURS = {"running": "cyan", "completed": "green", "failed": "red", "stopped": "yellow", "killed": "red"}

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
All = Annotated[bool, typer.Option("--all", help="Every slice on a line of its own.")]


@app.command("runs")
def show_runs(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[PIPELINE | RUN]",
            help="Of one pipeline; or one run, such as demo/latest.",
            autocompletion=complete_runs,
        ),
    ] = None,
    data_dir: DataDir = Path("ecgfm-data"),
    keep_run: Annotated[
        str | None,
        typer.Option("--keep", metavar="RUN", help="From now on gc keeps it.", autocompletion=complete_runs),
    ] = None,
    release: Annotated[
        str | None,
        typer.Option("--release", metavar="RUN", help="gc may remove it again.", autocompletion=complete_runs),
    ] = None,
    every: All = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the runs of a data directory, newest first; or show one, stage by stage.

    Examples:

      ecgfm runs

      ecgfm runs demo/latest

      ecgfm runs --keep demo/2026-03-04T12-00-00Z
    """
    with one_line_errors(debug):
        store = _store(data_dir)
        for pinned, kept in ((keep_run, True), (release, False)):
            if pinned:
                run = find_run(store.data_dir, pinned)
                keep(store, run, kept)
                typer.echo(f"{run.name}: {'kept, whatever its age' if kept else 'kept no longer than others'}")
        if keep_run or release:
            return
        if name and "/" in name:
            run = find_run(store.data_dir, name)
            typer.echo(json.dumps(_run_facts(store, run), indent=1)) if as_json else _show_run(store, run, every)
            return
        runs = find_runs(store.data_dir, name)
        if as_json:
            typer.echo(json.dumps([_run_facts(store, run) for run in runs], indent=1))
        elif runs:
            _list_runs(store, runs)
        elif name:
            find_run(store.data_dir, f"{name}/latest")  # says which pipelines have runs
        else:
            typer.echo(f"no runs in {store.data_dir}")


@app.command("stages")
def show_stages(
    data_dir: DataDir = Path("ecgfm-data"),
    stage: Annotated[
        str | None,
        typer.Option(
            "--stage", metavar="STAGE", help="Of this stage alone, such as prepare.", autocompletion=complete_stages
        ),
    ] = None,
    unused: Annotated[bool, typer.Option("--unused", help="Just what no run uses.")] = False,
    every: All = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List what the stages of a data directory left on the disk, how large it is and how many runs use it.

    Examples:

      ecgfm stages --unused

      ecgfm stages --stage prepare --all
    """
    with one_line_errors(debug):
        store = _store(data_dir)
        if stage and stage not in STAGE_NAMES:
            raise InputError(f"--stage {stage}: no such stage; stages: {', '.join(STAGE_NAMES)}")
        runs = find_runs(store.data_dir)
        users, names = housekeeping.users(runs), _names(runs)
        lying = housekeeping.survey(store.data_dir, stage)
        shown = [thing for thing in lying if not (unused and thing.place in users)]
        if as_json:
            typer.echo(json.dumps([_thing_facts(store, thing, users) for thing in shown], indent=1))
            return
        print_table(
            ("STAGE", "KEY", "SIZE", "MADE", "TOOK", "RUNS", ""),
            _thing_rows(store, shown, users, names, every),
            "llrlrrl",
        )
        idle = [thing for thing in lying if thing.place not in users]
        used_by_none = f"; {_outputs(idle)} of that {'is' if len(idle) == 1 else 'are'} used by no run" if idle else ""
        where = store.data_dir / "stages" / (stage or "")
        typer.echo(f"{chr(10) if shown else ''}{_outputs(lying)} in {where}{used_by_none}")
        if idle:
            typer.echo("to make room: ecgfm gc")


@app.command()
def gc(
    data_dir: DataDir = Path("ecgfm-data"),
    keep_runs: Annotated[
        int, typer.Option("--keep-runs", metavar="N", min=0, help="The newest runs of each pipeline that are kept.")
    ] = housekeeping.KEEP_RUNS,
    older_than: Annotated[
        float,
        typer.Option("--older-than", metavar="DAYS", min=0, help="What is younger than so many days is kept too."),
    ] = 0,
    delete: Annotated[bool, typer.Option("--delete", help="Remove it. Without this, only say what would go.")] = False,
    every: All = False,
    debug: Debug = False,
) -> None:
    """Make room: remove runs that are not kept, and what no kept run uses. Without --delete only says what would go.

    Kept are runs that go on, the newest of each pipeline, the latest that ended, and those of `ecgfm runs --keep`. What
    a kept run uses and what somebody makes now is never removed.

    Examples:

      ecgfm gc --keep-runs 2

      ecgfm gc --older-than 30 --delete
    """
    with one_line_errors(debug):
        store = _store(data_dir)
        names = _names(find_runs(store.data_dir))
        if delete:
            _show_removable(store, housekeeping.remove(store, keep_runs, older_than), names, every, done=True)
        else:
            _show_removable(store, housekeeping.find_removable(store, keep_runs, older_than), names, every, done=False)


@app.command("lineage")
def show_lineage(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Anything that a stage made, or a run's link to it.", show_default=False),
    ],
    depth: Annotated[
        int | None, typer.Option("--depth", metavar="N", min=0, help="Just so many stages up.", show_default="all")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what made a file: the stages up to the raw folders, with their config, code and versions.

    Examples:

      ecgfm lineage ecgfm-data/runs/demo/latest/report.html

      ecgfm lineage ecgfm-data/runs/demo/latest/pretrain/step_0000300
    """
    with one_line_errors(debug):
        found = lineage_of(file)
        if as_json:
            typer.echo(json.dumps(_lineage_facts(found), indent=1))
        else:
            _show_lineage(found, depth)


def _store(data_dir: Path) -> Store:
    """The store of a data directory that is there: a misspelt one is no empty one."""
    place = data_dir.absolute()
    if not (place / "stages").is_dir() and not (place / "runs").is_dir():
        raise InputError(f"{place} is no data directory: it has neither stages nor runs; name another with --data-dir")
    return Store(place)


# ---- runs


def _list_runs(store: Store, runs: Sequence[Run]) -> None:
    rows, notes = [], []
    for run in runs:
        stages = housekeeping.stages_of(store, run)
        counts = Counter(stage["status"] for stage in stages)
        pinned = "kept" if run.kept else ""
        colour = STATE_COLOURS[run.state]
        ago = f"{lasted(round(time.time() - seconds_of(run.started_at)))} ago"
        row = (run.name, run.state, ago, lasted(_run_seconds(run)), str(counts["made"]), str(counts["cached"]), pinned)
        rows.append((row, colour))
        notes.append((_note(run, stages), run.state))
    lines = list(table_lines(("RUN", "STATE", "STARTED", "TOOK", "MADE", "CACHED", ""), rows, "lllrrrl"))
    typer.echo(lines[0])
    for line, (note, state) in zip(lines[1:], notes, strict=True):
        typer.echo(line)
        if note:
            typer.secho(cut(f"    {note}"), fg="red" if state == "failed" else None, dim=state != "failed")


def _note(run: Run, stages: Sequence[Mapping[str, Any]]) -> str:
    """What is worth knowing of a run, in one line: why it failed, or what was new."""
    if error := run.facts.get("error"):
        return str(error)
    unfinished = [stage for stage in stages if stage["status"] not in ("made", "cached")]
    if unfinished:
        word = "at" if run.state == "running" else "ended at"
        return f"{word} {unfinished[0]['name']}: {unfinished[0]['status']}"
    made = [stage for stage in stages if stage["status"] == "made"]
    if made:
        return f"{made[0]['name']}: {made[0].get('why') or 'made'}"
    return "everything was there" if stages else ""


def _show_run(store: Store, run: Run, every: bool) -> None:
    facts = run.facts
    typer.secho(f"{run.name}  {run.state}{'  (kept)' if run.kept else ''}", fg=STATE_COLOURS[run.state], bold=True)
    seconds = _run_seconds(run)
    took = "" if seconds is None else f", {'for' if run.state == 'running' else 'took'} {lasted(seconds)}"
    where = f"{facts['host']} (process {facts['process']})"
    lines = [("started", f"{local_time(seconds_of(run.started_at))}{took}, on {where}")]
    if error := facts.get("error"):
        lines.append(("error", error))
    lines += [(f"raw {source}", folder) for source, folder in facts["raw"].items()]
    lines += [(name, value if isinstance(value, str) else ", ".join(value)) for name, value in _chosen(facts)]
    lines += [("in", str(run.directory))]
    width = max(len(name) for name, _ in lines) + 2
    for name, text in lines:
        for number, line in enumerate(wrapped(text, width + 2)):
            typer.secho(f"  {'' if number else name:{width}}{line}", fg="red" if name == "error" else None)
    typer.echo()
    rows = []
    for name, stages in grouped(housekeeping.stages_of(store, run), lambda stage: str(stage["name"]), every):
        each = [stage["seconds"] for stage in stages if "seconds" in stage]
        whys = Counter(stage["why"] for stage in stages if stage.get("why"))
        statuses = Counter(stage["status"] for stage in stages)
        many = len(stages) > 1
        status = ", ".join(f"{count:,} {word}" if many else word for word, count in statuses.items())
        why = "; ".join(f"{count} {text}" if many and len(whys) > 1 else text for text, count in whys.items())
        key = f"{len(stages):,} slices" if many else stages[0]["key"][:SHORT_KEY]
        dim = "cyan" if "being made" in statuses else "red" if "not finished" in statuses else None
        rows.append(((name, key, status, lasted(sum(each)) if each else "", why), dim))
    print_table(("STAGE", "KEY", "STATUS", "TOOK", "WHY"), rows, "lllrl")


def _chosen(facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What the run was told to make."""
    names = {"only": "--only", "start": "--from", "force": "--force"}
    yield from ((names[name], value) for name, value in facts["selection"].items() if name in names)


def _run_facts(store: Store, run: Run) -> dict[str, Any]:
    mine = {"name": run.name, "state": run.state, "kept": run.kept, "directory": str(run.directory)}
    return {**run.facts, **mine, "stages": housekeeping.stages_of(store, run)}


def _run_seconds(run: Run) -> float | None:
    if run.state == "running":
        return time.time() - seconds_of(run.started_at)
    return run.seconds


# ---- what lies in stages/


def _names(runs: Iterable[Run]) -> dict[str, str]:
    """`<stage>/<key>` -> name, as runs call it: of what is not finished nothing else tells."""
    return {place: name for run in runs for name, place in links_below(run.directory).items()}


def _thing_rows(
    store: Store, things: Sequence[Lying], users: Mapping[str, Sequence[str]], names: Mapping[str, str], every: bool
) -> list[tuple[tuple[str, ...], str | None]]:
    """A line for each; slices of a source in one. Of the stages in their order, the newest first."""
    finished = [thing for thing in things if thing.what == "output"]
    finished.sort(key=lambda thing: (_stage_number(thing.stage), thing.name if every else "", -thing.made_at))
    rows: list[tuple[tuple[str, ...], str | None]] = []
    for name, some in grouped(finished, lambda thing: thing.name, every):
        slices = len({thing.name for thing in some})
        many = f"{slices:,} slice{'s' if slices > 1 else ''}" + (
            f", {len(some):,} outputs" if len(some) > slices else ""
        )
        counts = sorted(len(users.get(thing.place, ())) for thing in some)
        runs = str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]}-{counts[-1]}"
        took = lasted(sum(thing.seconds or 0 for thing in some))
        key = many if len(some) > 1 else some[0].key[:SHORT_KEY]
        made = local_time(max(thing.made_at for thing in some))
        rows.append(((name, key, size_of(_bytes(some)), made, took, runs, ""), None if counts[0] else "yellow"))
    for thing in sorted((thing for thing in things if thing.what != "output"), key=lambda t: _stage_number(t.stage)):
        what, colour = _unfinished(store, thing)
        runs, made = str(len(users.get(thing.place, ()))), local_time(thing.made_at)
        name = names.get(thing.place, thing.name)
        rows.append(((name, thing.key[:SHORT_KEY], size_of(thing.n_bytes), made, "", runs, what), colour))
    return rows


def _unfinished(store: Store, thing: Lying) -> tuple[str, str]:
    """What a thing is that is no output, and its colour."""
    if thing.what == "damaged":
        return "damaged", "red"
    if thing.what == "stale":
        return "replaced", "yellow"
    return ("being made", "cyan") if store.is_made_now(thing.path.with_suffix("")) else ("not finished", "yellow")


def _thing_facts(store: Store, thing: Lying, users: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    facts = {**asdict(thing), "path": str(thing.path), "runs": users.get(thing.place, [])}
    return facts | ({"being_made": store.is_made_now(thing.path.with_suffix(""))} if thing.what == "partial" else {})


def _outputs(things: Sequence[Lying]) -> str:
    return f"{counted(things, 'output')} ({size_of(_bytes(things))})"


def _bytes(things: Iterable[Lying]) -> int:
    return sum(thing.n_bytes for thing in things)


def _stage_number(stage: str) -> int:
    return STAGE_NAMES.index(stage) if stage in STAGE_NAMES else len(STAGE_NAMES)


# ---- gc


def _show_removable(store: Store, found: Removable, names: Mapping[str, str], every: bool, done: bool) -> None:
    where = store.data_dir
    kept = ", ".join(f"{count} {reason}" for reason, count in Counter(found.kept.values()).items()) or "none"
    if found:
        typer.secho(f"{'removed from' if done else 'would remove from'} {where}", bold=True)
    for folder in found.runs:
        typer.echo(f"  run   {folder.parent.name}/{folder.name}")
    rows = [((*row[:5], row[6]), colour) for row, colour in _thing_rows(store, found.things, {}, names, every)]
    for line in table_lines(("STAGE", "KEY", "SIZE", "MADE", "TOOK", ""), [(row, None) for row, _ in rows], "llrlrl"):
        if rows:
            typer.echo(f"  {line}".rstrip())
    if found.locks:
        typer.echo(f"  {counted(found.locks, 'lock file')} of keys that are gone")
    for folder in found.leftovers:
        why = "could not be deleted yet; the next gc goes on with it" if done else "left by a gc that was killed"
        typer.echo(f"  {folder}: {why}")
    for thing in found.busy:
        typer.secho(f"  stays, because somebody makes it now: {names.get(thing.place, thing.name)}", fg="cyan")
    if found:
        typer.echo()
    typer.echo(f"runs that are kept: {kept}")
    if not found:
        typer.echo(f"nothing to remove in {where}")
    elif done:
        typer.echo(f"room made: {size_of(found.n_bytes)}")
    else:
        typer.echo(f"room to make: {size_of(found.n_bytes)}; nothing is removed without --delete")


# ---- lineage


def _show_lineage(found: Lineage, depth: int | None) -> None:
    typer.secho(str(found.file), bold=True)
    for wrong in found.changed:
        typer.secho(f"changed since it was made: {wrong}", fg="red", bold=True)
    typer.echo()
    root = found.made[found.output]
    for line in _branch_lines(found, found.branch(depth), _versions(root)):
        typer.echo(line.rstrip())
    typer.echo("\nversions: " + ", ".join(f"{name} {version}" for name, version in _versions(root).items()))
    if changed := found.code_changed(*found.made.values()):
        typer.secho("\n".join(wrapped(f"code: changed since then: {', '.join(changed)}", 0)), fg="yellow")
    else:
        typer.echo("code: as it is now")


def _branch_lines(found: Lineage, branch: Branch, versions: Mapping[str, str], indent: int = 0) -> Iterator[str]:
    """A branch of the tree, `indent` columns from the left, its first line not indented."""
    members = branch.members
    seconds, made = sum(one.seconds for one in members), sorted(local_time(seconds_of(one.made_at)) for one in members)
    when = made[0] if made[0] == made[-1] else f"{made[0]} to {made[-1]}"
    yield f"{typer.style(_branch_name(branch), bold=True)}  made {when} in {lasted(seconds)}"
    above = [one for one in branch.below if isinstance(one, Branch) and one.shown_above]
    below: list[Branch | Leaf | str] = [one for one in branch.below if one not in above]
    if branch.hidden:
        below.append(typer.style(f"reads {', '.join(branch.hidden)}", dim=True))
    elif above:
        also = "also " if below else ""
        below.append(typer.style(f"{also}reads {', '.join(_branch_name(one) for one in above)}: see above", dim=True))
    bar = "│  " if below else "   "
    for name, text in _about(found, members, versions):
        for number, line in enumerate(wrapped(text, indent + 12)):
            yield bar + typer.style(f"{'' if number else name:9}{line}", dim=True)
    for number, one in enumerate(below):
        first, rest = ("└─ ", "   ") if number == len(below) - 1 else ("├─ ", "│  ")
        if isinstance(one, str):
            yield first + one
        elif isinstance(one, Leaf):
            yield first + _leaf_line(one)
        else:
            lines = _branch_lines(found, one, versions, indent + 3)
            yield from ((rest if place else first) + line for place, line in enumerate(lines))


def _branch_name(branch: Branch) -> str:
    if len(branch.members) > 1:
        return f"{branch.label} ({len(branch.members):,} slices)"
    return f"{branch.label} {branch.members[0].directory.name[:SHORT_KEY]}"


def _about(found: Lineage, members: Sequence[Made], versions: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What is worth saying of some outputs: values that are not the defaults, code, other versions, content found
    elsewhere."""
    configs = [one.config for one in members]
    if any(configs):
        items = [f"{name} {_value(value)} ({_value(default)})" for name, (value, default) in configs[0].items()]
        items[0] = items[0].replace("(", "(default ", 1)
        varies = "" if all(config == configs[0] for config in configs) else "; not the same for all"
        yield "config", ", ".join(item.replace(" ", TIED) for item in items) + varies
    if changed := found.code_changed(*members):
        yield "code", f"changed since: {', '.join(changed)}"
    differing = {pair for one in members for pair in _versions(one).items() if versions.get(pair[0]) != pair[1]}
    if differing:
        yield "with", ", ".join(f"{name} {version}" for name, version in sorted(differing))
    elsewhere: dict[str, set[str]] = {}
    for read in (read for one in members for read in one.reads if read.elsewhere):
        elsewhere.setdefault(read.origin.partition(" ")[0], set()).add(read.found)
    for stage, others in elsewhere.items():
        other = "another output" if len(others) == 1 else f"{len(others)} other outputs"
        stands = "stands for it: how that" if len(others) == 1 else "stand for it: how they"
        was = "was" if len(others) == 1 else "were"
        yield "note", f"{stage} that was read is gone; {other} with the same content {stands} {was} made may differ"


def _leaf_line(leaf: Leaf) -> str:
    if not leaf.raw_folder:
        gone = "it is gone" if len(leaf.reads) == 1 else f"{len(leaf.reads)} of its outputs are gone"
        return typer.style(f"{leaf.label}: {gone}, and no output has that content (digest {leaf.digest[:8]})", fg="red")
    there = "" if Path(leaf.raw_folder).exists() else ", not there now"
    folders = leaf.folders  # none of a file, such as a table of labels, and of a checkpoint: read as a whole
    which = next(iter(folders)) if len(folders) == 1 else counted(folders, "folder")
    of_it = f": {which}," if folders else ","
    return f"{typer.style(leaf.label, fg='green')}  {leaf.raw_folder}{there}{of_it} digest {leaf.digest[:SHORT_KEY]}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, bool) or not isinstance(value, int):
        text = "unset" if value is None else str(value)
    else:
        text = f"{value:,}"
    return text if len(text) <= 60 else text[:57] + "..."


def _versions(made: Made) -> dict[str, str]:
    """The versions that mattered: torch only where there is a model."""
    return {n: v for n, v in made.versions.items() if n != "torch" or "ecgfm.model" in made.code}


def _lineage_facts(found: Lineage) -> dict[str, Any]:
    stages = {}
    for place, made in found.made.items():
        config = {name: {"value": value, "default": default} for name, (value, default) in made.config.items()}
        stages[place] = {**asdict(made), "directory": str(made.directory), "config": config}
    return {
        "file": str(found.file),
        "output": found.output,
        "data_dir": str(found.data_dir),
        "changed": list(found.changed),
        "code_changed": found.code_changed(*found.made.values()),
        "stages": stages,
    }
