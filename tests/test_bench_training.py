"""The benchmarks of the model measure what a run does, and print what they say they print."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from training_data import PRETRAIN, TINY
from typer.testing import CliRunner

from ecgfm.bench import training as bench_training
from ecgfm.bench.training import bench_encode, bench_pretrain, made_up
from ecgfm.config import ModelConfig
from ecgfm.data import standardise
from ecgfm.model import Encoder, flops_per_segment
from flows.cli import app

CPU = torch.device("cpu")


def test_the_published_model_takes_87_7_gflop_a_segment() -> None:
    assert flops_per_segment(ModelConfig(), 2500) == pytest.approx(87.7e9, rel=1e-3)


def test_operations_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(n_layers=2, width=64, n_heads=4, ffn_width=128, pos_conv_groups=4, conv_channels=32)
    encoder = Encoder(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.zeros(3, 12, 2500), need_attention=True)  # the fused kernel is not counted on a CPU
    assert flops_per_segment(config, 2500) == pytest.approx(3 * counter.get_total_flops() / 3, rel=0.01)


def test_what_is_made_up_is_standardised() -> None:
    signal = standardise(made_up(4, 12), CPU)
    assert signal.shape == (4, 12, 2500)
    assert float(signal.std()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_benchmark_tells_speed_share_and_parts(precision: str) -> None:
    config = replace(PRETRAIN, batch_pairs=2, precision=precision)
    said = bench_pretrain(config, 2)
    assert re.search(r"steps of 4 segments, CPU, \d+ threads?, " + precision, said)
    for part in ("feature extractor", "transformer", "losses", "backward", "optimizer"):
        assert re.search(rf"\d ms {part}\n|\d ms {part}$", said), part
    said = bench_encode(TINY, 4, 2, "cpu", "fp32")
    assert re.search(r"embeddings of 4 segments", said)
    assert re.search(r"\d+\.\d% of \d\.\d{3} TFLOP/s", said)


def test_the_measured_step_is_a_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[float] = []
    whole = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *given: object) -> object:
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        done = whole(self, *given)
        after = [p for group in self.param_groups for p in group["params"]]
        moved.append(max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)))
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    bench_training.bench_pretrain(replace(PRETRAIN, batch_pairs=2), 2)
    assert len(moved) == 1 + 2 + 2, "one to warm up, two timed, two in parts"
    assert min(moved) > 0


def test_the_command_takes_another_model() -> None:
    small = ["--model", "n_layers=1", "--model", "width=32", "--model", "n_heads=2", "--model", "ffn_width=32"]
    done = CliRunner().invoke(app, ["bench", "encode", "--batch", "2", "--steps", "1", *small])
    assert done.exit_code == 0, done.output
    assert "segments/s" in done.output
    wrong = CliRunner().invoke(app, ["bench", "encode", "--model", "n_layers"])
    assert wrong.exit_code == 2
    assert "--model n_layers: expected KEY=VALUE" in wrong.output
