"""The DAG: which stages a pipeline has, what each reads, and how to plan or run them.

    raw -> list -> prepare (a slice each) -> audit -> splits, labels -> manifests -> pretrain -> finetune -> evaluate

With `finetune.checkpoint` there is no pretrain: finetuning and the probe start from that checkpoint.

The order stands once, in `walk`. What happens at each stage is the walker's affair: `plan` looks, `runs.run_locally`
makes, and flows/ makes under Prefect.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from ecgfm.config import PROGRESS_BAR, ListConfig, ReportsConfig
from ecgfm.ecg import InputError
from ecgfm.files import digest_of, sha256_of
from ecgfm.fingerprints import Input, RawTree
from ecgfm.own_process import Facts
from ecgfm.pipelines_file import Pipeline
from ecgfm.processes import worthwhile
from ecgfm.stages import Output, Request, Stage, Store

logger = logging.getLogger(__name__)

SOURCE_TABLE = frozenset({"ecgfm.sources"})  # imports every source; a request names the one it uses
TRAINING_FILES = ("timings.jsonl", "tensorboard/*")

SYNTHESIZE = Stage("synthesize", "ecgfm.synthesize:synthesize")
LIST = Stage("list", "ecgfm.prepare:list_source", chosen_code=SOURCE_TABLE)
PREPARE = Stage("prepare", "ecgfm.prepare:prepare_slice", many=True, chosen_code=SOURCE_TABLE)
AUDIT = Stage("audit", "ecgfm.audit:audit")
SPLITS = Stage("splits", "ecgfm.splits:make_splits")
LABELS = Stage("labels", "ecgfm.labels:make_labels", chosen_code=SOURCE_TABLE)
MANIFESTS = Stage("manifests", "ecgfm.manifests:make_manifests")
PRETRAIN = Stage("pretrain", "ecgfm.pretrain:pretrain", volatile=TRAINING_FILES, resumable=True, own_process=True)
FINETUNE = Stage("finetune", "ecgfm.finetune:finetune", volatile=TRAINING_FILES, resumable=True, own_process=True)
EVALUATE = Stage("evaluate", "ecgfm.evaluate:evaluate", own_process=True)
STAGES = (SYNTHESIZE, LIST, PREPARE, AUDIT, SPLITS, LABELS, MANIFESTS, PRETRAIN, FINETUNE, EVALUATE)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


@dataclass(frozen=True)
class Pending:
    """The output of a stage that is not made: what reads it has no key yet."""

    name: str

    def select(self, *patterns: str) -> Input:
        """Files that are not there yet."""
        return Input(Path(), "", self.name)

    file = select


Made = Output | Pending
Execute = Callable[[Sequence[Request], str], Sequence[Made]]


@dataclass(frozen=True)
class Selection:
    """Which stages a run may make: all; or `only` some; or those `start` and after.

    force: make them anew. go_on: this is another try, and what the last one left of a forced stage is not old
    """

    only: tuple[str, ...] = ()
    start: str | None = None
    force: tuple[str, ...] = ()
    go_on: bool = False

    def __post_init__(self) -> None:
        for option, names in (
            ("only", self.only),
            ("from", (self.start,) if self.start else ()),
            ("force", self.force),
        ):
            for name in names:
                if name not in STAGE_NAMES:
                    raise InputError(f"--{option} {name}: no such stage; stages: {', '.join(STAGE_NAMES)}")

    def allows(self, stage: Stage) -> bool:
        """Whether this run may make the stage."""
        late_enough = self.start is None or STAGE_NAMES.index(stage.name) >= STAGE_NAMES.index(self.start)
        return late_enough and (not self.only or stage.name in self.only)

    def why(self, store: Store, request: Request) -> str:
        """Why a request is to be made, in a user's words; "" where it is there."""
        return "forced" if request.stage.name in self.force else store.explain(request)


@dataclass
class Walker:
    """Hands requests to `execute`, as far as the selection allows and what they read is there.

    claim: is told what is about to be looked for and used, so that nobody removes it meanwhile
    made: every request that was looked at, with its output
    reasons: name of a request -> why it had to be made; of those only that were not there
    """

    store: Store
    execute: Execute
    selection: Selection = Selection()
    planning: bool = False
    claim: Callable[[Sequence[Request]], None] = lambda requests: None
    made: list[tuple[Request, Made]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    def one(self, request: Request) -> Made:
        """The output of one request."""
        return self.many([request], "")[0]

    def many(self, requests: Sequence[Request], group: str) -> list[Made]:
        """The outputs of independent requests; `group` is what they are together ("prepare ptb_xl")."""
        self.claim(requests)
        outputs: dict[int, Made] = {}
        ready = []
        for place, request in enumerate(requests):
            missing = [one.origin for _, one in request.each_input() if not one.digest]
            allowed = self.selection.allows(request.stage)
            if missing and allowed and not self.planning:
                before = dict.fromkeys(one.stage.name for one, made in self.made if isinstance(made, Pending))
                raise InputError(
                    f"{request.name} reads {missing[0]}, which is not made yet; run without --only and --from, or make "
                    f"it first with {' '.join(f'--only {name}' for name in before)}"
                )
            if missing or not allowed:
                found = None if missing else self.store.find(request)
                outputs[place] = found or Pending(request.name)
            else:
                ready.append(place)
        if ready:
            if not self.planning:
                self._say_why([requests[place] for place in ready])
            outputs.update(zip(ready, self.execute([requests[place] for place in ready], group), strict=True))
        ordered = [outputs[place] for place in range(len(requests))]
        self.made += zip(requests, ordered, strict=True)
        return ordered

    def _say_why(self, requests: Sequence[Request]) -> None:
        """Work out why each request is to be made, and log it, of slices together."""
        whys = {request.name: self.selection.why(self.store, request) for request in requests}
        self.reasons.update((name, why) for name, why in whys.items() if why)
        missing = {name: why for name, why in whys.items() if why}
        if requests[0].stage is not PREPARE:
            for name, why in missing.items():
                logger.info("%s: to make: %s", name, why)
            return
        for why, count in Counter(missing.values()).items():
            first = next(name for name, one in missing.items() if one == why)
            what = first if count == 1 else f"{count} of {len(requests)} slices ({first}, ...)"
            logger.info("%s: to make: %s", what, why)


def walk(pipeline: Pipeline, raw: Mapping[str, Path], walker: Walker, hash_raw: bool = False) -> None:
    """Every stage of a pipeline in order.

    raw: source -> its raw folder; the synthetic source needs none
    hash_raw: raw files are known by content instead of size and modification time

    Raises:
        InputError: an unknown source, a missing raw folder, too many rejected records, or what a stage raises.
    """
    start = None if pipeline.finetune.checkpoint is None else _checkpoint(pipeline.finetune.checkpoint)
    read = {} if pipeline.labels.table is None else {"table": _table(pipeline.labels.table)}
    read |= {} if pipeline.labels.reports is None else _rules(pipeline.labels.reports)
    slices: list[Made] = []
    for source in pipeline.sources:
        slices += _prepared(pipeline, source, raw, walker, hash_raw)
    records = [made.select("records.parquet") for made in slices]
    shards = [made.select("shard.h5") for made in slices]

    compared = [made.select("records.parquet", "sketches.parquet") for made in slices]
    audited = walker.one(Request(AUDIT, {"slices": compared}, pipeline.audit))
    counted = [made.select("records.parquet", "rejects.parquet") for made in slices]
    splits, labels = walker.many(
        [
            Request(SPLITS, {"slices": counted, "audit": audited.select("duplicates.parquet")}, pipeline.splits),
            Request(LABELS, {"slices": records, **read}, pipeline.labels),
        ],
        "",
    )
    tables = [made.select("records.parquet", "segments.parquet") for made in slices]
    split_table, label_tables = splits.select("splits.parquet"), labels.select("labels.parquet", "label_space.yaml")
    manifests = walker.one(
        Request(MANIFESTS, {"slices": tables, "splits": split_table, "labels": label_tables}, pipeline.manifests)
    )
    if start is None:
        # each stage reads only the files it names: new labels leave the pairs, and so the pretrained encoder, alone
        pretrained = walker.one(
            Request(PRETRAIN, {"manifests": manifests.select("cmsc_*"), "slices": shards}, pipeline.pretrain)
        )
        start = pretrained.select("*")
    labelled = manifests.select("labelled_*", "label_space.yaml")
    finetuned = walker.one(
        Request(
            FINETUNE,
            {"manifests": labelled, "slices": shards, "pretrain": start},
            pipeline.finetune,
        )
    )
    walker.one(
        Request(
            EVALUATE,
            {
                "slices": [made.select("*") for made in slices],
                "splits": splits.select("splits.parquet", "cohort.json"),
                "labels": labels.select("labels.parquet", "label_space.yaml"),
                "audit": audited.select("duplicates.parquet"),
                "manifests": manifests.select("*"),
                "pretrain": start,
                "finetune": finetuned.select("*"),
            },
            pipeline.evaluate,
        )
    )


def _checkpoint(given: str) -> Input:
    """`finetune.checkpoint`, known by its content: a copy elsewhere gives the same keys.

    Of a checkpoint's directory that is its meta.json, which has the hashes of the other files.

    Raises:
        InputError: there is none.
    """
    origin = "finetune.checkpoint"
    path = Path(given).expanduser().absolute()
    if path.is_file():
        return Input(path, sha256_of(path), origin)
    if not path.is_dir():
        raise InputError(f"{origin}: no such file or directory: {path}; name a checkpoint, or leave it out to pretrain")
    described = path / "meta.json"
    if not described.is_file():
        inside = sorted(path.glob("step_*/meta.json"), key=lambda found: (len(str(found)), found))
        if not inside:
            raise InputError(
                f"{origin}: {path} holds no complete checkpoint; name a checkpoint's directory, the output of a "
                "pretrain stage, or a published .pt file"
            )
        described = inside[-1]
    return Input(described.parent, sha256_of(described), origin)


def _table(given: str) -> Input:
    """`labels.table`, known by its content: a copy elsewhere gives the same key.

    Raises:
        InputError: there is none.
    """
    path = Path(given).expanduser().absolute()
    if not path.is_file():
        raise InputError(f"labels.table: no such file: {path}; name a CSV or Parquet table with a column per label")
    return Input(path, sha256_of(path), "labels.table")


def _rules(config: ReportsConfig) -> dict[str, Input]:
    """What reports are read by: our vocabulary, and the user's rules or patterns, known by their content.

    Raises:
        InputError: they are not there.
    """
    ours = Path(__file__).parent / "reports"
    found = {"vocabulary": Input(ours, digest_of({path.name: sha256_of(path) for path in ours.glob("*.yaml")}), "ours")}
    if config.rules is not None:
        path = Path(config.rules).expanduser().absolute()
        if not path.is_file():
            raise InputError(f"labels.reports.rules: no such file: {path}; name a vocabulary of your own")
        found["rules"] = Input(path, sha256_of(path), "labels.reports.rules")
    if config.patterns is not None:
        folder = Path(config.patterns).expanduser().absolute()
        files = {path.name: sha256_of(path) for path in folder.glob("*.json")}
        if not files:
            raise InputError(f"labels.reports.patterns: no pattern file in {folder}; name ECG-FM's folder of them")
        found["patterns"] = Input(folder, digest_of(files), "labels.reports.patterns")
    return found


def _prepared(
    pipeline: Pipeline, source: str, raw: Mapping[str, Path], walker: Walker, hash_raw: bool
) -> Sequence[Made]:
    """List one source and prepare its slices."""
    module = f"ecgfm.sources.{source}"
    if source == "synthetic" and source not in raw:
        synthesized = walker.one(Request(SYNTHESIZE, {}, pipeline.synthetic))
        tree = None if isinstance(synthesized, Pending) else synthesized.as_raw()
        everything = tree.everything() if tree else synthesized.select("*")
    else:
        if source not in raw:
            from ecgfm.prepare import source_named

            source_named(source)  # a misspelt one is told as such
            raise InputError(f"source {source} needs its raw folder: give --raw {source}=PATH")
        tree = RawTree.scan(raw[source], source, hash_raw)
        everything = tree.everything()
    listing = walker.one(Request(LIST, {"raw": everything}, ListConfig(source), source, (module,)))
    if isinstance(listing, Pending) or tree is None:  # the slices are unknown: one stands for all
        return [walker.one(Request(PREPARE, {"rows": listing.file("*")}, pipeline.prepare, source, (module,)))]
    index = json.loads((listing.directory / "slices.json").read_bytes())
    of_slice = tree.by_slice(list(index))
    requests = [
        Request(
            PREPARE,
            {"rows": listing.file(entry["file"]), "raw": of_slice[slice_id]},
            pipeline.prepare,
            f"{source} {slice_id}",
            (module,),
            entry["records"],
        )
        for slice_id, entry in index.items()
    ]
    slices = walker.many(requests, f"prepare {source}")
    made = [output for output in slices if isinstance(output, Output)]
    if len(made) == len(slices):
        _check_rejects(source, made, pipeline.prepare.max_rejected_share)
    return slices


def _check_rejects(source: str, slices: Sequence[Output], max_share: float) -> None:
    counts = total_counts(slices)
    too_many = counts["rejected"] > max_share * counts["listed"]
    if too_many or (slices and not counts["prepared"]):
        reasons = ", ".join(
            f"{n.removeprefix('rejected: ')}: {c}" for n, c in counts.items() if n.startswith("rejected: ")
        )
        raise InputError(
            f"{source}: {counts['rejected']} of {counts['listed']} records were rejected ({reasons}), "
            f"{f'more than prepare.max_rejected_share ({max_share:g})' if too_many else 'none is left'}; "
            f"see rejects.parquet in {slices[0].directory.parent}"
            + ("; where that is as it should be, allow it: --set prepare.max_rejected_share=1" if too_many else "")
        )


@dataclass(frozen=True)
class PlannedStage:
    """A line of a plan.

    status: `cached`, `run`, `maybe` (an input is made anew) or `skip` (not selected)
    directory: of a cached stage's output
    """

    name: str
    status: str
    why: str = ""
    directory: Path | None = None

    @property
    def kind(self) -> str:
        """The stage, whatever its subject."""
        return self.name.partition(" ")[0]


def plan(
    pipeline: Pipeline,
    raw: Mapping[str, Path],
    store: Store,
    selection: Selection = Selection(),
    hash_raw: bool = False,
) -> list[PlannedStage]:
    """What `run` would do at each stage, and why. Writes nothing below the data directory."""
    with tempfile.TemporaryDirectory(prefix="ecgfm-plan-") as scratch:
        aside = Store(Path(scratch))

        def look(requests: Sequence[Request], group: str) -> list[Made]:
            looked: list[Made] = []
            for request in requests:
                found = store.find(request) if request.stage.name not in selection.force else None
                if found is None and request.stage is LIST:
                    found = aside.make(request)  # cheap, and without it the slices are unknown
                looked.append(found or Pending(request.name))
            return looked

        walker = Walker(store, look, selection, planning=True)
        walk(pipeline, raw, walker, hash_raw)
        return [_planned(store, selection, request, made) for request, made in walker.made]


def _planned(store: Store, selection: Selection, request: Request, made: Made) -> PlannedStage:
    missing = sorted({one.origin for _, one in request.each_input() if not one.digest})
    if not selection.allows(request.stage):
        return PlannedStage(request.name, "skip", "not selected")
    if missing and request.stage.name not in selection.force:
        if never := store.never_made(request):
            return PlannedStage(request.name, "run", never)
        others = len(missing) - 1
        more = f" or {others} other{'s' if others > 1 else ''}" if others else ""
        return PlannedStage(request.name, "maybe", f"only if {missing[0]}{more} comes out different")
    if isinstance(made, Output) and made.directory == store.place(request):  # not a listing made aside
        return PlannedStage(request.name, "cached", f"unchanged since {made.made_at}", made.directory)
    return PlannedStage(request.name, "run", selection.why(store, request))


def make_all(
    pipeline: Pipeline,
    store: Store,
    selection: Selection,
    requests: Sequence[Request],
    group: str,
    on_facts: Callable[[Facts], None] | None = None,
) -> list[Output]:
    """The outputs of independent requests, in order: slices on several cores, training in its own process.

    Says in the log what came of each, of slices together as `group`. on_facts: gets what a training process tells.
    """
    outputs = []
    if all(request.stage is PREPARE for request in requests):
        records = sum(request.size for request in requests)
        workers = min(worthwhile(records, pipeline.prepare.workers), len(requests))
        within = (pipeline.prepare.workers or os.cpu_count() or 1) // workers  # of few large slices, several each
        shared = [replace(request, config=replace(request.config, workers=within)) for request in requests]
        progress = tqdm(desc=group, total=records, unit=" records", **PROGRESS_BAR)
        with progress:
            for request, output in zip(
                requests, store.make_many(shared, workers, PREPARE.name in selection.force), strict=True
            ):
                outputs.append(output)
                progress.update(request.size)
        logger.info("%s: %s", group, summary(outputs))
        return outputs
    for request in requests:
        force = request.stage.name in selection.force
        own = request.stage.own_process
        go_on = selection.go_on
        outputs.append(
            store.make_in_own_process(request, force, go_on, on_facts) if own else store.make(request, force, go_on)
        )
        logger.info("%s: %s", request.name, summary(outputs[-1:]))
    return outputs


def summary(outputs: Sequence[Output]) -> str:
    """What came of some outputs, in one line."""
    made = [output for output in outputs if not output.cached]
    counts = total_counts(outputs)
    for what, count in list(counts.items()):  # "excluded: too_short" is told in sum
        total, colon, _ = what.partition(": ")
        if colon and not any(total in output.counts for output in outputs):
            counts[total] += count
    shown = ", ".join(_counted(what, count) for what, count in counts.items() if ":" not in what)
    how = f"made in {sum(output.seconds for output in made):.1f} s" if made else "cached"
    if made and len(outputs) > 1:
        how = f"{len(made)} of {len(outputs)} {how}"
    return f"{how}: {shown}" if shown else how


def _counted(what: str, count: int) -> str:
    """As one says it.

    >>> [_counted("slices", 1), _counted("copies", 1), _counted("steps", 2000), _counted("best epoch", 5)]
    ['1 slice', '1 copy', '2,000 steps', 'best epoch 5']
    """
    if what.startswith("best "):
        return f"{what} {count:,}"
    noun, space, more = what.partition(" ")
    return f"{count:,} {re.sub('ies$', 'y', noun).removesuffix('s') if count == 1 else noun}{space}{more}"


def total_counts(outputs: Sequence[Output]) -> Counter[str]:
    """The counts of some outputs, summed."""
    counts: Counter[str] = Counter()
    for output in outputs:
        counts.update(output.counts)
    return counts
