"""Configs: what pipelines.yaml may say, and how a mistake is told."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest

from ecgfm.config import (
    EvaluateConfig,
    FinetuneConfig,
    LabelsConfig,
    PrepareConfig,
    PretrainConfig,
    SplitsConfig,
    content_of,
    from_dict,
    to_dict,
)
from ecgfm.ecg import InputError
from ecgfm.pipelines_file import Pipeline, load_pipeline, read_pipelines

PIPELINES = """
small:
  description: a few records
  sources: [ptb_xl]
  prepare: {sampling_rate_hz: 250}
  splits: {strategy: official}
  labels:
    scheme: codes
    codes: {second: ['2', '3'], first: ['1']}
  pretrain:
    max_steps: 10
    model: {n_layers: 2, width: 64, n_heads: 4}
other:
  sources: [ptb_xl, physionet2021]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "pipelines.yaml").write_text(PIPELINES)
    return tmp_path / "pipelines.yaml"


def test_values_are_read_and_the_rest_has_defaults(path: Path) -> None:
    pipeline = load_pipeline(path, "small")
    assert pipeline.sources == ("ptb_xl",)
    assert pipeline.prepare == PrepareConfig(sampling_rate_hz=250.0)
    assert list(pipeline.labels.codes.items()) == [("second", ("2", "3")), ("first", ("1",))]
    assert (pipeline.pretrain.max_steps, pipeline.pretrain.model.n_layers) == (10, 2)
    assert pipeline.pretrain.model.ffn_width == 3072
    assert pipeline.finetune == FinetuneConfig()


def test_set_puts_values_in_and_leaves_the_rest(path: Path) -> None:
    pipeline = load_pipeline(
        path,
        "small",
        [
            "pretrain.max_steps=200",
            "finetune.learning_rate=1e-4",  # YAML 1.1 reads this as a string
            "finetune.head_learning_rate=null",
            "splits.exclude_invalid=false",
            "splits.valid_folds=[8, 9]",
            "pretrain.model.width=32",
            "pretrain.device=cuda:1",
        ],
    )
    assert pipeline.pretrain.max_steps == 200
    assert (pipeline.pretrain.model.width, pipeline.pretrain.model.n_layers) == (32, 2)
    assert pipeline.pretrain.device == "cuda:1"
    assert (pipeline.finetune.learning_rate, pipeline.finetune.head_learning_rate) == (1e-4, None)
    assert (pipeline.splits.exclude_invalid, pipeline.splits.valid_folds) == (False, (8, 9))
    assert pipeline.prepare.sampling_rate_hz == 250.0
    assert load_pipeline(path, "small").pretrain.max_steps == 10


MISTAKES = {
    "pretrain.max_step=9": "pretrain.max_step: unknown key; did you mean 'max_steps'?",
    "pretrain.model.layers=9": "pretrain.model.layers: unknown key; did you mean 'n_layers'?",
    "finetun.max_epochs=9": "finetun: unknown key; did you mean 'finetune'?",
    "manifests.xyz=9": "manifests.xyz: unknown key; known: rare_labels",
    "max_steps=9": "max_steps: unknown key; did you mean pretrain.max_steps?",
    "learning_rate=9": "learning_rate: unknown key; did you mean pretrain.learning_rate or finetune.learning_rate?",
    "pretrain.max_steps=many": "pretrain.max_steps: Input should be a valid integer, .*, found 'many'",
    "pretrain.max_steps=0": "pretrain.max_steps: Input should be greater than or equal to 1, found 0",
    "pretrain.max_steps=": "pretrain.max_steps: Input should be a valid integer, found None",
    "pretrain.max_steps=1.5": "pretrain.max_steps: Input should be a valid integer, .*, found 1.5",
    "prepare.sampling_rate_hz=-1": "prepare.sampling_rate_hz: Input should be greater than 0, found -1",
    "prepare.sampling_rate_hz=.inf": "prepare.sampling_rate_hz: Input should be a finite number, found inf",
    "prepare.sampling_rate_hz=.nan": "prepare.sampling_rate_hz: Input should be a finite number, found nan",
    "prepare.max_rejected_share=.nan": "prepare.max_rejected_share: Input should be .*, found nan",
    "prepare=9": "prepare: .*, found 9",
    "prepare.workers.more=9": "prepare.workers: Input should be a valid integer",
    "splits.strategy=patient": "splits.strategy: Input should be 'grouped', .*, found 'patient'",
    "splits.valid_share=0.9": r"splits: valid_share \+ test_share must leave a share for training",
    "splits.valid_folds=[10]": "splits: valid_folds and test_folds must not share a fold",
    "labels.scheme=scp": "labels: codes is needed with scheme 'codes', and only there",
    "labels.codes={first: []}": r"labels.codes.first: .* at least 1 item .*, found \[\]",
    "labels.codes={first: [1]}": "labels.codes.first.0: Input should be a valid string, found 1",
    "sources=[]": r"sources: .* at least 1 item .*, found \[\]",
    "sources=[ptb_xl, ptb_xl]": "sources must name each source once",
    "pretrain.model.n_heads=5": "pretrain.model: width \\(64\\) must be a multiple of n_heads",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_line_that_names_its_place(path: Path, override: str) -> None:
    with pytest.raises(InputError, match=f"^pipelines.yaml: small: {MISTAKES[override]}") as refused:
        load_pipeline(path, "small", [override])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrain.max_steps", "--set pretrain.max_steps: expected KEY=VALUE, such as pretrain.max_steps=200"),
        ("description.length=3", "--set description.length=3: description holds a value, not a section"),
        ("splits.valid_folds=[9", "--set splits.valid_folds=[9: the value is not YAML: "),
    ],
)
def test_a_set_that_cannot_be_put_in_is_one_line(path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        load_pipeline(path, "small", [override])
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; name one with --pipelines FILE"),
        ("a: [1", "not YAML"),
        ("- a\n- b\n", "expected a mapping of pipeline names to their values"),
        ("a: 3\n", "expected a mapping of pipeline names to their values"),
        ("", "expected a mapping of pipeline names to their values"),
    ],
)
def test_a_file_that_is_no_pipelines_is_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=f"mine.yaml: {message}") as refused:
        read_pipelines(path)
    assert "\n" not in str(refused.value)


def test_an_unknown_pipeline_is_told_which_it_may_be(path: Path) -> None:
    with pytest.raises(InputError, match=r"pipelines\.yaml: no pipeline 'smal'; did you mean 'small'\?$"):
        load_pipeline(path, "smal")
    with pytest.raises(InputError, match=r"pipelines\.yaml: no pipeline 'ptb-xl'; it has other, small$"):
        load_pipeline(path, "ptb-xl")


def test_a_pipeline_without_sources_is_one_line() -> None:
    with pytest.raises(InputError, match="here: sources: "):
        from_dict(Pipeline, {}, "here")


def test_as_plain_data_and_back_a_config_is_the_same(path: Path) -> None:
    for name in ("small", "other"):
        pipeline = load_pipeline(path, name)
        assert from_dict(Pipeline, to_dict(pipeline), "here") == pipeline
        assert pickle.loads(pickle.dumps(pipeline)) == pipeline


def fields_of(content: Any) -> set[str]:
    return {name for name, value in content.items()} | {
        f"{name}.{below}" for name, value in content.items() if isinstance(value, dict) for below in fields_of(value)
    }


def test_operational_values_and_no_others_stay_out_of_the_content() -> None:
    for config, left_out in (
        (PrepareConfig(), {"max_rejected_share", "workers"}),
        (PretrainConfig(), {"device", "loader_workers", "processes", "compile", "tensorboard"}),
        (FinetuneConfig(), {"checkpoint", "device", "loader_workers"}),  # its content is an input
        (EvaluateConfig(), {"device"}),
        (SplitsConfig(), set()),
    ):
        named = {field.name for field in dataclasses.fields(config)}
        assert set(content_of(config)) == named - left_out
        assert left_out <= named
    assert "model.n_layers" in fields_of(content_of(PretrainConfig()))


def test_equal_values_written_differently_are_equal_content() -> None:
    one = from_dict(PrepareConfig, {"sampling_rate_hz": 250, "segment_seconds": "5"}, "here")
    other = from_dict(PrepareConfig, {"segment_seconds": 5.0, "sampling_rate_hz": 250.0}, "here")
    assert content_of(one) == content_of(other)


def test_the_order_of_labels_is_content() -> None:
    one = LabelsConfig("codes", codes={"a": ("1",), "b": ("2",)})
    other = LabelsConfig("codes", codes={"b": ("2",), "a": ("1",)})
    assert content_of(one) != content_of(other)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"cron": "0 2 * *"}, "cannot read cron '0 2 * *'; expected five fields, such as 0 2 * * *"),
        ({"cron": "0 25 * * *"}, "cannot read cron '0 25 * * *'"),
        ({"cron": "0 0 2 * * *"}, "cannot read cron"),  # seconds: Prefect would not read it
        ({"cron": "0 2 * * *", "interval_s": 5}, "either cron or interval_s"),
        ({}, "either cron or interval_s"),
        ({"cron": "0 2 * * *", "timezone": "Berlin"}, "unknown timezone 'Berlin'; expected one such as Europe/Berlin"),
        ({"interval_s": 0}, "interval_s"),
    ],
)
def test_a_schedule_that_means_nothing_is_one_line(schedule: dict[str, Any], message: str) -> None:
    values = {"sources": ["ptb_xl"], "deployment": {"schedules": [schedule]}}
    with pytest.raises(InputError, match=r"p\.yaml: deployment\.schedules\.0") as told:
        from_dict(Pipeline, values, "p.yaml")
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_two_schedules_of_one_name_are_refused() -> None:
    twice = [{"name": "nightly", "cron": "0 2 * * *"}, {"name": "nightly", "cron": "0 3 * * *"}]
    with pytest.raises(InputError, match="schedules need different names"):
        from_dict(Pipeline, {"sources": ["ptb_xl"], "deployment": {"schedules": twice}}, "p.yaml")
