"""One frozen dataclass per stage. An unknown key is an error."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from ecgfm.ecg import LEADS, InputError, Lead

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid")

PROGRESS_BAR: dict[str, Any] = {"disable": None, "delay": 2.0, "leave": False}
"""How tqdm shows progress everywhere: only on a terminal, only after two seconds."""

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]

# Every class may name its operational fields: values that change how a stage runs but not what it writes.
# They stay out of the stage's key.


@dataclass(frozen=True, config=STRICT)
class SyntheticConfig:
    """The embedded source: how many patients, and the seed of everything random in them."""

    n_patients: AtLeastOne = 240  # each with 1 to 4 recordings
    seed: Count = 0  # of everything random


@dataclass(frozen=True, config=STRICT)
class ListConfig:
    """Which source is listed."""

    source: str


@dataclass(frozen=True, config=STRICT)
class PrepareConfig:
    """Raw recordings to shards. The defaults are the published recipe: linear resampling, no filter.

    leads: which of the twelve standard leads, in this order
    resample: `linear`, first and last samples aligned; `polyphase`: anti-aliased
    filter: `none`; `bandpass` at `bandpass_hz`; `notch` at `notch_hz` (the mains); both without delay
    gaps: what becomes of invalid samples: `keep` them as such, `reject` the record, or `bridge` runs of at most
        `bridge_ms` between valid samples by a straight line. A lead that the recording lacks is no gap
    constant_leads: a lead that does not vary becomes 0 when standardised (`zero`), or the record is turned away
    """

    sampling_rate_hz: Positive = 500.0  # to which every record is resampled
    segment_seconds: Positive = 5.0  # length of the windows a record is cut into; the rest is left out
    leads: Annotated[tuple[Lead, ...], Field(min_length=1)] = LEADS
    resample: Literal["linear", "polyphase"] = "linear"
    filter: Literal["none", "bandpass", "notch"] = "none"
    bandpass_hz: tuple[Positive, Positive] = (0.5, 100.0)  # half of the amplitude is left at each
    notch_hz: Literal[50, 60] = 50  # with filter notch
    gaps: Literal["keep", "reject", "bridge"] = "keep"
    bridge_ms: Positive = 20.0  # with gaps bridge
    constant_leads: Literal["zero", "reject"] = "zero"
    max_rejected_share: Share = 0.2  # a source with a larger share of rejected records stops the run
    workers: Count = 0  # processes; 0: one per core
    OPERATIONAL: ClassVar[frozenset[str]] = frozenset({"max_rejected_share", "workers"})

    def __post_init__(self) -> None:
        if len(set(self.leads)) < len(self.leads):
            raise ValueError("leads must name each lead once")
        if self.bandpass_hz[0] >= self.bandpass_hz[1]:
            raise ValueError("bandpass_hz must be a lower and a higher frequency")

    @property
    def departures(self) -> dict[str, Any]:
        """Where the treatment of the signal departs from the published recipe, as JSON: what a shard and a checkpoint
        keep of it beside their rate, leads and segments. Empty where it does not."""
        beside = {"sampling_rate_hz", "segment_seconds", "leads", *self.OPERATIONAL}
        mine, published = to_dict(self), to_dict(PrepareConfig())
        return {name: value for name, value in mine.items() if name not in beside and value != published[name]}


def departures_in_words(departures: Mapping[str, Any]) -> str:
    """`PrepareConfig.departures` as "by the published recipe", or "with filter=bandpass"."""
    if not departures:
        return "by the published recipe"
    return "with " + ", ".join(f"{name}={_plain(value)}" for name, value in sorted(departures.items()))


def _plain(value: Any) -> str:
    return "[" + ", ".join(map(_plain, value)) + "]" if isinstance(value, list) else str(value)


@dataclass(frozen=True, config=STRICT)
class AuditConfig:
    """When two records are the same ECG: see audit.py, with what was measured.

    min_similarity: of the sketches' leads I and II, the less alike of the two
    max_level_spread: by what factor their leads may differ in size beyond a common gain
    """

    min_similarity: Annotated[float, Field(ge=0.9, le=1)] = 0.97  # below 0.9 the search would miss most pairs
    max_level_spread: Annotated[float, Field(ge=1)] = 1.25


@dataclass(frozen=True, config=STRICT)
class SplitsConfig:
    """Who trains, who validates, who tests.

    strategy: `grouped` by patient, `random` by record, `official`: the source's own folds, `temporal`: the earliest
        records train, the latest test; `grouped_temporal`: the same with each patient where their latest record is.
        Dates order patients only where they are true: MIMIC's are shifted by years, patient by patient
    unknown_patients: with a grouped strategy, a record of no known patient is an `error`, or split `alone`
    duplicates: records that are the same ECG are kept together, all of them (`keep`) or the first alone (`drop_copies`)
    """

    strategy: Literal["grouped", "random", "official", "temporal", "grouped_temporal"] = "grouped"
    valid_share: Share = 0.1  # of patients, or of records
    test_share: Share = 0.1  # likewise
    valid_folds: tuple[int, ...] = (9,)  # of the official folds (PTB-XL)
    test_folds: tuple[int, ...] = (10,)  # likewise
    seed: int = 0  # another seed, other patients in each split
    unknown_patients: Literal["error", "alone"] = "error"
    duplicates: Literal["keep", "drop_copies"] = "keep"
    exclude_invalid: bool = True  # leave out records with an invalid sample or a missing lead
    exclude_constant: bool = True  # leave out records with a constant lead

    def __post_init__(self) -> None:
        if self.valid_share + self.test_share >= 1:
            raise ValueError("valid_share + test_share must leave a share for training (less than 1)")
        if set(self.valid_folds) & set(self.test_folds):
            raise ValueError("valid_folds and test_folds must not share a fold")


Task = Literal["multilabel", "multiclass", "regression"]


@dataclass(frozen=True, config=STRICT)
class ReportsConfig:
    """How free-text reports are read (docs/labeler.md). Paths are relative to the pipelines file; what lies there is an
    input of the stage, so that they do not count.

    mode: `own`, by our vocabulary; `ecg-fm`, by ECG-FM's pattern files at `patterns`, as it reads them
    label_set: of our sets of labels, such as `ecg-fm-17`; None: every finding that is known
    rules: a file of one's own whose findings are merged over ours
    mended: with `ecg-fm`: heed descriptors in every report and let "without" deny, where ECG-FM does neither
    """

    mode: Literal["own", "ecg-fm"] = "own"
    label_set: str | None = None
    rules: str | None = None
    patterns: str | None = None  # the folder of ECG-FM's pattern files
    mended: bool = False
    OPERATIONAL: ClassVar[frozenset[str]] = frozenset({"rules", "patterns"})

    def __post_init__(self) -> None:
        if (self.mode == "ecg-fm") != (self.patterns is not None):
            raise ValueError(
                "patterns, the folder of ECG-FM's pattern files, is needed with mode ecg-fm, and only there"
            )
        if self.mode == "ecg-fm" and self.rules is not None:
            raise ValueError("rules are merged over our vocabulary, which mode ecg-fm does not read")
        if self.mode == "own" and self.mended:
            raise ValueError("mended is of mode ecg-fm; our own mode has nothing of the kind to mend")


@dataclass(frozen=True, config=STRICT)
class LabelsConfig:
    """What a record's labels are made of.

    scheme: `challenge_2021`: the 26 scored classes; `scp`: PTB-XL's statements at `scp_level`;
        `codes`: the labels of `codes`, each with the source codes that assert it; `table`: the `columns` of a CSV or
        Parquet table of one's own, joined by its column `record_id`, or else `patient_id`; `columns`: the `columns` of
        the records table itself, such as age_years and sex (data_contracts/records.yaml); `reports`: what the records'
        free-text reports assert, read as `reports` says
    task: `multilabel`: each label is present or absent by itself (binary: one label); `multiclass`: every record has
        exactly one of them; `regression`: numbers
    table: a path; in a pipelines file relative to it. Its content is an input of the stage, so that its path does not
        count
    scp_level: with scheme `scp`
    codes: with scheme `codes`, label -> the source codes that assert it
    columns: label -> column. With `multiclass` there is one, each of whose values is a class
    units: label -> unit of its numbers, with `regression`; nothing is converted
    uncertain: what a label is that a report leaves open ("possible infarct"): ECG-FM's labels are `present` then. What
        is "unlikely" is absent
    unmentioned: what a label is that a report says nothing of; a record without a report has unknown labels
    max_labels: findings that one segment can carry alone; a record's probability is the maximum over its
        segments, where for every other label it is the mean
    """

    scheme: Literal["challenge_2021", "scp", "codes", "table", "columns", "reports"] = "challenge_2021"
    task: Task = "multilabel"
    scp_level: Literal["all", "diagnostic", "subdiagnostic", "superdiagnostic", "form", "rhythm"] = "superdiagnostic"
    codes: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] = dataclasses.field(default_factory=dict)
    table: str | None = None
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    units: dict[str, str] = dataclasses.field(default_factory=dict)
    reports: ReportsConfig | None = None
    uncertain: Literal["present", "absent", "unknown"] = "unknown"
    unmentioned: Literal["absent", "unknown"] = "absent"
    max_labels: tuple[str, ...] = ()
    OPERATIONAL: ClassVar[frozenset[str]] = frozenset({"table"})

    def __post_init__(self) -> None:
        from_columns = self.scheme in ("table", "columns")
        if (self.scheme == "codes") != bool(self.codes):
            raise ValueError("codes is needed with scheme 'codes', and only there")
        if from_columns != bool(self.columns):
            raise ValueError(
                "columns is needed with schemes 'table' and 'columns', and only there: label -> the table's column, "
                "such as {LVEF: lvef_percent}"
            )
        if (self.scheme == "table") != (self.table is not None):
            raise ValueError("table is needed with scheme 'table', and only there")
        if (self.scheme == "reports") != (self.reports is not None):
            raise ValueError("reports is needed with scheme 'reports', and only there")
        if self.task == "regression" and not from_columns:
            raise ValueError("task 'regression' needs numbers: scheme 'table' or 'columns'")
        if self.task == "multiclass" and len(self.columns) > 1:
            raise ValueError(
                f"task 'multiclass' takes one column, whose values are the classes; columns names {len(self.columns)}"
            )
        if self.max_labels and self.task != "multilabel":
            raise ValueError(
                f"max_labels is of task 'multilabel'; a record's answer to {self.task!r} is the mean over its segments"
            )
        if unknown := sorted(self.units.keys() - (self.columns.keys() if self.task == "regression" else set())):
            raise ValueError(f"units names {unknown[0]!r}, which is no label of task 'regression'")


@dataclass(frozen=True, config=STRICT)
class ManifestsConfig:
    """Which segments a training run visits, with which labels.

    rare_labels: what to do with a label that has no positive or no negative record in a split, or, of task
        `regression`, no two different values: `error` or `drop`
    """

    rare_labels: Literal["error", "drop"] = "error"


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The encoder and its pretraining heads. The defaults are the published 90,883,072 parameters."""

    n_leads: AtLeastOne = 12  # of the input
    conv_channels: AtLeastOne = 256  # of the feature extractor
    conv_kernels: tuple[AtLeastOne, ...] = (2, 2, 2, 2)  # of each of its layers
    conv_strides: tuple[AtLeastOne, ...] = (2, 2, 2, 2)  # likewise; their product is a frame's samples
    width: AtLeastOne = 768  # of the transformer and of an embedding
    n_layers: AtLeastOne = 12  # of the transformer
    n_heads: AtLeastOne = 12  # of attention, in each layer
    ffn_width: AtLeastOne = 3072  # of the feed-forward layers
    pos_conv_kernel: AtLeastOne = 128  # frames seen by the convolution that tells positions
    pos_conv_groups: AtLeastOne = 16  # of that convolution
    n_codebooks: AtLeastOne = 2  # of the quantizer
    codebook_entries: AtLeastOne = 320  # of each codebook
    codebook_width: AtLeastOne = 256  # the quantizer's output, all codebooks together
    contrast_width: AtLeastOne = 256  # where context and quantized features are compared

    def __post_init__(self) -> None:
        for whole, part in (("width", "n_heads"), ("width", "pos_conv_groups"), ("codebook_width", "n_codebooks")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole} ({getattr(self, whole)}) must be a multiple of {part}")
        if len(self.conv_kernels) != len(self.conv_strides):
            raise ValueError("conv_kernels and conv_strides must have the same length")


Schedule = Literal["constant", "epochs", "cosine"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, config=STRICT)
class AugmentConfig:
    """What is done to a training segment beside masking leads: see augment.py. Nothing, in the published recipe.

    Each augmentation meets a segment with its own probability. Its strength is drawn anew each time, uniformly up to
    the maximum, in millivolt of the leads I, II and V1 to V6; the other limb leads follow from I and II. The default
    strengths are about the reference's, which are half a standard deviation (a whole one for the shift): the median
    lead of PTB-XL has 0.16 mV.

    vcg_max_scale: along each axis, by a factor from 1 to this
    """

    powerline_probability: Share = 0.0  # of a sine of the mains, in phase on all leads
    powerline_max_mv: Positive = 0.1  # its amplitude, at most
    powerline_hz: Annotated[tuple[Positive, ...], Field(min_length=1)] = (50.0, 60.0)  # its frequency is one of these
    emg_probability: Share = 0.0  # of white noise, of each lead its own
    emg_max_sd_mv: Positive = 0.1  # its standard deviation, at most
    baseline_shift_probability: Share = 0.0  # of a step up or down and back
    baseline_shift_max_mv: Positive = 0.2  # its height, at most
    baseline_shift_seconds: tuple[Positive, Positive] = (0.6, 1.4)  # its length: from, to
    baseline_wander_probability: Share = 0.0  # of a sum of slow cosines
    baseline_wander_max_mv: Positive = 0.1  # the amplitude of each, at most
    baseline_wander_hz: tuple[Positive, Positive] = (0.05, 0.5)  # their frequencies: from, to
    baseline_wander_cosines: AtLeastOne = 3  # how many
    vcg_probability: Share = 0.0  # of turning and stretching the heart's dipole (3KG)
    vcg_max_rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 45.0  # about each axis, either way
    vcg_max_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.5

    def __post_init__(self) -> None:
        for name in ("baseline_shift_seconds", "baseline_wander_hz"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be a lower and a higher value")


@dataclass(frozen=True, config=STRICT)
class PretrainConfig:
    """Self-supervised training: wav2vec 2.0 + CMSC + random lead masking. Defaults: the published recipe.

    batch_pairs: of all processes together
    schedule: of the learning rate, after `warmup_steps`: `constant`; `epochs`: what `learning_rate_epochs` says (epoch
        from 1, rate), the paper's by default; `cosine`: half a turn down to 0 at the last step
    learning_rate_epochs: with schedule `epochs`: from which epoch on (the first is 1), at what rate
    precision: of the matrix products; `bf16` halves their memory and more than halves their time where the processor
        has it. Weights, sums and losses are float32 either way
    subset: share of the training patients (records, where patients are unknown); a smaller share is part of a larger
    source_weights: source -> how often its pairs are visited, 1 where not named; 0 leaves a source out
    same_patient_negatives: in CMSC, two ECGs of one patient repel each other (the reference's way)
    across_processes: the objective of one batch, however many processes share it: CMSC's negatives and the quantizer's
        diversity are of all of them. Without it each process sees its own part alone, as in the reference
    processes: of this machine that train together; 0: one per GPU
    compile: let torch.compile fuse the model's kernels: a minute at the start, faster steps after it
    """

    model: ModelConfig = ModelConfig()
    max_steps: AtLeastOne = 329_000  # updates: 240 epochs of 1,405,625 segments, 1,024 segments an update
    batch_pairs: AtLeastOne = 64
    accumulate: AtLeastOne = 8  # batches per update
    learning_rate: Positive = 5e-5  # of AdamW
    schedule: Schedule = "constant"
    learning_rate_epochs: tuple[tuple[AtLeastOne, Positive], ...] = ((1, 1e-4), (6, 8e-5), (201, 5e-5))
    warmup_steps: Count = 0  # in which the learning rate rises from 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01  # decoupled, as AdamW has it
    adam_betas: tuple[float, float] = (0.9, 0.98)  # of AdamW
    adam_eps: Positive = 1e-6  # of AdamW
    precision: Precision = "bf16"
    subset: Annotated[float, Field(gt=0, le=1)] = 1.0
    source_weights: dict[str, Annotated[float, Field(ge=0)]] = dataclasses.field(default_factory=dict)
    dropout: Share = 0.1  # of the transformer's layers and of attention
    feature_grad_scale: Share = 0.1  # factor on the gradient that enters the feature extractor
    lead_mask_probability: Share = 0.5  # of each lead of each segment, to be 0
    augment: AugmentConfig = AugmentConfig()
    span_mask_probability: Share = 0.65  # share of frames in masked spans, before overlaps
    span_mask_frames: AtLeastOne = 10  # frames in a masked span
    n_negatives: AtLeastOne = 100  # other frames that a masked one is told from
    contrastive_temperature: Positive = 0.1  # of wav2vec 2.0's loss
    cmsc_temperature: Positive = 0.1  # of CMSC's loss
    diversity_weight: float = 0.1  # of using all entries of the codebooks
    feature_penalty_weight: float = 10.0  # of the mean square of the extractor's features
    cmsc_weight: float = 1.0  # of CMSC's loss
    same_patient_negatives: bool = False
    across_processes: bool = True
    quantizer_temperature: tuple[float, float, float] = (2.0, 0.5, 0.999995)  # start, end, decay per update
    seed: int = 0  # of weights, order, masks and noise
    valid_every: AtLeastOne = 500  # steps between two looks at the valid loss
    save_every: AtLeastOne = 1000  # steps between two checkpoints
    keep_last: AtLeastOne = 1  # checkpoints; the one of the lowest valid loss stays too
    keep_every: Count = 0  # steps: checkpoints at its multiples stay for good
    device: str = "auto"  # auto: a GPU where there is one
    processes: Count = 1
    compile: bool = False
    tensorboard: bool = False  # the log's numbers as TensorBoard's events too
    loader_workers: Count = 0  # threads that read ahead; 0: none
    OPERATIONAL: ClassVar[frozenset[str]] = frozenset(
        {"device", "processes", "compile", "tensorboard", "loader_workers"}
    )


PUBLISHED: Mapping[str, Any] = {
    "mode": "frozen",
    "max_epochs": 140,
    "learning_rate": 1e-6,
    "layer_decay": 1.0,
    "schedule": "constant",
    "warmup_epochs": 0.0,
    "patience_epochs": 0,
}
"""Where ECG-FM's finetuning differs from FinetuneConfig's defaults (McKeen et al. 2025, JAMIA Open, ooaf122)."""


@dataclass(frozen=True, config=STRICT)
class FinetuneConfig:
    """Supervised training on labelled segments.

    recipe: what the values are that are not given: `layerwise`, those below; `published`, ECG-FM's (`PUBLISHED`): one
        small learning rate for all layers, a frozen extractor, 140 epochs. See docs/training.md for their sources
    mode: what is trained: `full`, everything; `frozen`, all but the convolutional feature extractor; `linear`, the
        classifier alone
    init: start from the pretrained encoder, or from `random` weights (the supervised baseline)
    checkpoint: start from this pretrained checkpoint, and do not pretrain: a directory (a checkpoint, or the output of
        a pretrain stage, of which the last is meant) or a published .pt file; in a pipelines file relative to it.
        Its content is an input of the stage, so that its path does not count
    learning_rate: of the top layer; where not given, 1e-3 (published: 1e-5) with mode `linear`, and, published, 1e-5
        with random weights
    layer_decay: learning rate of each layer relative to the one above it; where not given, 1 with random weights
    schedule: after the warm-up: `constant`, or `cosine`: half a turn down to 0 at the end of the last epoch
    loss: `bce`: cross-entropy, binary of each label, or of all classes together where labels.task is `multiclass`;
        `focal` or `asymmetric`, of task `multilabel`, weigh down what is right already (supervised.py)
    focal_gamma, asymmetric_gamma_positive, asymmetric_gamma_negative: how much less weighs what is right already
    pos_weight: with `bce`, weigh positives by negatives / positives of the train split, and classes by how rare they
        are. Where not given: yes, but for task `regression`, which has no positives
    regression_loss: of task `regression`, on numbers scaled by the train split's mean and standard deviation: `mse`,
        the squared error, where not given; `smooth_l1`: squared below one standard deviation, linear above it
    subset: share of the training patients, as in PretrainConfig; which ones, `subset_seed` says, and a smaller share is
        part of a larger one of the same seed
    """

    recipe: Literal["layerwise", "published"] = "layerwise"
    mode: Literal["full", "frozen", "linear"] = "full"
    init: Literal["pretrained", "random"] = "pretrained"
    checkpoint: str | None = None
    max_epochs: AtLeastOne = 50  # at most
    batch_size: AtLeastOne = 256  # segments
    learning_rate: Positive = 1e-4
    head_learning_rate: Positive | None = None  # of the classifier; null: as learning_rate
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0  # in which the learning rate rises from 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # decoupled, as AdamW has it
    adam_betas: tuple[float, float] = (0.9, 0.98)  # of AdamW
    adam_eps: Positive = 1e-8  # of AdamW
    dropout: Share = 0.0  # of the transformer's layers and of attention
    activation_dropout: Share = 0.1  # inside the feed-forward layers
    lead_mask_probability: Share = 0.0  # of each lead of each segment, to be 0
    subset: Annotated[float, Field(gt=0, le=1)] = 1.0
    subset_seed: Count = 0  # which patients a share below 1 takes
    precision: Precision = "bf16"  # of the matrix products in training, as in PretrainConfig; validation is in fp32
    loss: Literal["bce", "focal", "asymmetric"] = "bce"
    pos_weight: bool | None = None
    regression_loss: Literal["mse", "smooth_l1"] | None = None
    focal_gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    focal_alpha: Share | None = 0.25  # the share of positives in the loss; null: no such weight
    asymmetric_gamma_positive: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    asymmetric_gamma_negative: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 4.0
    asymmetric_margin: Annotated[float, Field(ge=0, lt=1)] = 0.05  # negatives below this probability weigh nothing
    patience_epochs: Count = 10  # stop after so many epochs without a better valid AUPRC; 0: never
    seed: int = 0  # of the classifier's weights, order and dropout
    device: str = "auto"  # auto: a GPU where there is one
    loader_workers: Count = 0  # threads that read ahead; 0: none
    OPERATIONAL: ClassVar[frozenset[str]] = frozenset({"checkpoint", "device", "loader_workers"})

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        if isinstance(given, ArgsKwargs):
            return ArgsKwargs(given.args, _by_recipe(given.kwargs or {}))
        return _by_recipe(given) if isinstance(given, dict) else given

    def misfit(self, task: Task) -> str:
        """What of the losses does not fit a task, in words; "" where all does."""
        if self.regression_loss is not None and task != "regression":
            return f"regression_loss is of task 'regression', and labels.task is {task!r}; leave it away"
        if self.loss != "bce" and task != "multilabel":
            return f"loss {self.loss!r} is of task 'multilabel', and labels.task is {task!r}; leave it away"
        if self.pos_weight and task == "regression":
            return "pos_weight needs labels that are present or absent, and labels.task is 'regression'; leave it away"
        return ""


def _by_recipe(given: dict[str, Any]) -> dict[str, Any]:
    """Of FinetuneConfig: what the recipe, mode and init say where nothing is given, so that a config shows what it
    means."""
    published, random = given.get("recipe") == "published", given.get("init") == "random"
    values: dict[str, Any] = dict(PUBLISHED) if published else {}
    if given.get("mode") == "linear":
        values["learning_rate"] = 1e-5 if published else 1e-3
    if random and published:
        values["learning_rate"] = 1e-5
    elif random:
        values["layer_decay"] = 1.0  # there is nothing in the lower layers to spare
    return values | given


@dataclass(frozen=True, config=STRICT)
class Published:
    """A published number, for the report to show beside ours.

    measure: of `label` alone, `auroc` or `auprc`; of all labels, `macro_auroc`, `macro_auprc` or `challenge_score`
    model: whose number it is; source: where it is published; note: what differs from this pipeline
    ours: which model of this evaluation stands beside it: `finetuned`, `probe`, ...
    test_records: behind the published number, where that is stated
    """

    measure: Literal["macro_auroc", "macro_auprc", "auroc", "auprc", "challenge_score"]
    value: float  # the published number
    model: str
    source: str
    note: str = ""
    label: str | None = None  # of which the number is, where it is of one
    ours: str = "finetuned"
    test_records: AtLeastOne | None = None

    def __post_init__(self) -> None:
        if (self.measure in ("auroc", "auprc")) != (self.label is not None):
            raise ValueError("label is needed with auroc and auprc, and only there")


@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """Record-level evaluation on the test split, and its report.

    published: results of others that the report shows beside these
    """

    bootstrap_samples: AtLeastOne = 1000  # replicates behind each interval
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95  # of the intervals
    probe_random_encoder: bool = True  # the linear probe on a randomly initialised encoder, beside the pretrained
    baseline_records: AtLeastOne = 50_000  # of train, at most, that the baselines but for the probes learn from
    supervised_baseline: bool = True  # a small residual network, trained from random weights on the same labels
    supervised_epochs: AtLeastOne = 15  # of its training
    supervised_learning_rate: Positive = 1e-2  # at its highest, of one cycle
    lead_subsets: bool = True  # ask the finetuned model with 6, 4, 3, 2 and 1 leads too
    drawn_records: Count = 6  # ECGs: in turn a right one, an error with saliency by lead, a normal one
    published: tuple[Published, ...] = ()
    allow_leakage: bool = False  # score records all the same that the checkpoint has learnt from; the report says so
    batch_size: AtLeastOne = 256  # segments
    precision: Precision = "fp32"  # bf16: twice as fast and more, probabilities differ in the third digit
    seed: int = 0  # of the bootstrap and the baselines
    device: str = "auto"  # auto: a GPU where there is one
    OPERATIONAL: ClassVar[frozenset[str]] = frozenset({"device"})


def content_of(config: Any) -> Any:
    """The values of a config that decide a stage's output, as JSON-able data: all but the operational ones.

    A mapping becomes its pairs: the order of `labels.codes` is the order of the labels.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        operational: frozenset[str] = getattr(config, "OPERATIONAL", frozenset())
        return {
            f.name: content_of(getattr(config, f.name)) for f in dataclasses.fields(config) if f.name not in operational
        }
    if isinstance(config, Mapping):
        return [[key, content_of(value)] for key, value in config.items()]
    if isinstance(config, Sequence) and not isinstance(config, str):
        return [content_of(value) for value in config]
    return config


def to_dict(config: Any) -> Any:
    """Every value of a config as plain data, so that `from_dict` gives the same config back.

    >>> to_dict(AuditConfig())
    {'min_similarity': 0.97, 'max_level_spread': 1.25}
    """
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def from_dict(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A config of class `cls` from plain data.

    Raises:
        InputError: an unknown key or a value of the wrong type or range, named with its place.

    >>> from_dict(SplitsConfig, {"strategy": "random"}, "mine.yaml: splits").test_share
    0.1
    >>> from_dict(SplitsConfig, {"stategy": "random"}, "mine.yaml: splits")
    Traceback (most recent call last):
    ecgfm.ecg.InputError: mine.yaml: splits: stategy: unknown key; did you mean 'strategy'?
    """
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}: {path + ': ' if path else ''}{_explain(cls, first)}") from error


def _explain(cls: type, error: Any) -> str:
    """One pydantic error in this project's words: expected, found, what to do."""
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _fields_at(cls, error["loc"][:-1])
        key = str(error["loc"][-1])
        near = difflib.get_close_matches(key, known, n=1)
        below = [f"{section}.{key}" for section in known if key in _fields_at(cls, (*error["loc"][:-1], section))]
        hint = f"did you mean {' or '.join(below or map(repr, near))}?" if below or near else ""
        return f"unknown key; {hint or 'known: ' + ', '.join(sorted(known))}"
    message = error["msg"].removeprefix("Value error, ")
    found = error["input"]
    plain = found is None or isinstance(found, str | int | float | bool | list | tuple)
    return f"{message}, found {found!r}" if plain else message


def _fields_at(cls: type, path: Sequence[int | str]) -> list[str]:
    """The keys that may stand at a place of a config class."""
    for part in path:
        hint = get_type_hints(cls)[str(part)]
        kinds = [kind for kind in get_args(hint) if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
        cls = kinds[0] if kinds else hint  # X | None
    return [f.name for f in dataclasses.fields(cls) if f.init] if dataclasses.is_dataclass(cls) else []
