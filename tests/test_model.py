"""The network: its size, its parts against obvious computations, and the reference's outputs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training_data import GOLDEN

from ecgfm.config import ModelConfig
from ecgfm.ecg import InputError
from ecgfm.model import (
    Classifier,
    Encoder,
    FeatureExtractor,
    GumbelQuantizer,
    PositionalConv,
    PretrainModel,
    SelfAttention,
    n_frames,
    pool_nonzero_mean,
    saliency,
)

SMALL = ModelConfig(
    n_leads=3,
    conv_channels=8,
    conv_kernels=(3, 2),
    conv_strides=(2, 2),
    width=16,
    n_layers=2,
    n_heads=4,
    ffn_width=32,
    pos_conv_kernel=6,
    pos_conv_groups=2,
    n_codebooks=2,
    codebook_entries=5,
    codebook_width=12,
    contrast_width=6,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def signals(batch: int = 4, n_samples: int = 100) -> Tensor:
    return torch.randn(batch, SMALL.n_leads, n_samples)


def test_the_published_model_has_90_883_072_parameters() -> None:
    with torch.device("meta"):
        model = PretrainModel(ModelConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 90_883_072


def test_parameters_bear_the_published_names() -> None:
    names = set(PretrainModel(SMALL).state_dict())
    encoder = {
        "feature_extractor.conv_layers.0.0.weight",
        "feature_extractor.conv_layers.0.2.weight",
        "feature_extractor.conv_layers.0.2.bias",
        "feature_extractor.conv_layers.1.0.weight",
        "layer_norm.weight",
        "layer_norm.bias",
        "post_extract_proj.weight",
        "post_extract_proj.bias",
        "conv_pos.pos_conv.0.bias",
        "conv_pos.pos_conv.0.parametrizations.weight.original0",
        "conv_pos.pos_conv.0.parametrizations.weight.original1",
        "encoder.layer_norm.weight",
        "encoder.layer_norm.bias",
    } | {
        f"encoder.layers.{layer}.{part}.{kind}"
        for layer in range(2)
        for part in (
            *(f"self_attn.{which}_proj" for which in ("q", "k", "v", "out")),
            *("self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"),
        )
        for kind in ("weight", "bias")
    }
    heads = {"mask_emb", "quantizer.vars", "quantizer.weight_proj.weight", "quantizer.weight_proj.bias"} | {
        f"{part}.{kind}" for part in ("project_q", "final_proj") for kind in ("weight", "bias")
    }
    assert names == encoder | heads
    assert set(Classifier(SMALL, 7).state_dict()) == {f"encoder.{name}" for name in encoder} | {
        "proj.weight",
        "proj.bias",
    }


def test_weights_start_as_in_the_reference() -> None:
    config = ModelConfig(conv_channels=128, width=256, n_layers=1, n_heads=4, ffn_width=512, pos_conv_kernel=32)
    model = PretrainModel(config)
    spread = {name: parameter.std().item() for name, parameter in model.named_parameters() if parameter.numel() > 1000}
    assert spread["encoder.layers.0.fc1.weight"] == pytest.approx(0.02, rel=0.03)
    assert spread["encoder.layers.0.self_attn.q_proj.weight"] == pytest.approx(0.02, rel=0.03)
    assert spread["feature_extractor.conv_layers.1.0.weight"] == pytest.approx(math.sqrt(2 / 256), rel=0.03)
    assert spread["conv_pos.pos_conv.0.parametrizations.weight.original1"] == pytest.approx(
        math.sqrt(4 / (32 * 256)), rel=0.03
    )
    assert spread["post_extract_proj.weight"] == pytest.approx(1 / math.sqrt(3 * 128), rel=0.03)
    assert spread["quantizer.weight_proj.weight"] == pytest.approx(1, rel=0.03)
    codebook = model.quantizer.vars
    assert codebook.min() >= 0
    assert codebook.max() <= 1
    assert codebook.mean().item() == pytest.approx(0.5, abs=0.02)
    assert not any(
        p.any()
        for name, p in model.named_parameters()
        if name.startswith("encoder.") and "fc" in name and "bias" in name
    )


@pytest.mark.parametrize(("n_samples", "frames"), [(2500, 156), (5000, 312), (16, 1), (31, 1), (32, 2)])
def test_published_frames_are_16_samples(n_samples: int, frames: int) -> None:
    assert n_frames(ModelConfig(), n_samples) == frames


def test_n_frames_is_what_the_extractor_makes() -> None:
    extractor = FeatureExtractor(SMALL)
    for n_samples in range(20, 60):
        assert extractor(signals(1, n_samples)).shape == (1, n_frames(SMALL, n_samples), SMALL.conv_channels)


def test_a_segment_too_short_for_a_frame_is_named() -> None:
    with pytest.raises(InputError, match="segment of 15 samples makes no frame"):
        n_frames(ModelConfig(), 15)


@pytest.mark.parametrize("shape", [(2, 4, 100), (3, 100), (2, 100, 3)])
def test_a_signal_of_other_leads_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a signal \(batch, 3 leads, time\), found"):
        Encoder(SMALL)(torch.zeros(shape))


def test_the_first_layer_is_normalised_over_time_in_each_channel() -> None:
    conv, _, norm, _ = FeatureExtractor(SMALL).conv_layers[0]
    convolved = conv(signals())
    expected = (convolved - convolved.mean(2, keepdim=True)) / (
        convolved.var(2, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    torch.testing.assert_close(norm(convolved), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [6, 7])
def test_the_positional_convolution_sees_its_neighbours_and_keeps_the_frames(kernel: int) -> None:
    config = ModelConfig(width=4, n_heads=1, pos_conv_kernel=kernel, pos_conv_groups=2)
    conv = PositionalConv(config)
    x = torch.randn(2, 20, 4)
    weight = conv.pos_conv[0].weight  # (4, 2, kernel)
    padded = F.pad(x, (0, 0, kernel // 2, kernel // 2))
    for frame in (0, 9, 19):
        window = padded[:, frame : frame + kernel]
        by_group = [
            torch.einsum("bkc,ock->bo", window[..., 2 * g : 2 * g + 2], weight[2 * g : 2 * g + 2]) for g in range(2)
        ]
        torch.testing.assert_close(conv(x)[:, frame], F.gelu(torch.cat(by_group, dim=1)))


def test_attention_is_the_same_with_and_without_its_weights() -> None:
    attention = SelfAttention(SMALL, dropout=0.0)
    x = torch.randn(2, 9, 16)
    visible = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    visible[1, ..., 5:] = False
    for mask in (None, visible):
        fused, none = attention(x, mask, False)
        explicit, weights = attention(x, mask, True)
        assert none is None
        torch.testing.assert_close(fused, explicit)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9))
    assert not weights[1, :, 5:].any()


def test_attention_against_loops() -> None:
    attention = SelfAttention(SMALL, dropout=0.0).double()
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    q, k, v = (p(x)[0].view(5, 4, 4) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    attended = torch.zeros(5, 4, 4, dtype=torch.float64)
    for head in range(4):
        for query in range(5):
            scores = torch.stack([q[query, head] @ k[key, head] / 2 for key in range(5)])  # 2: root of the head's width
            attended[query, head] = sum(w * v[key, head] for key, w in enumerate(scores.exp() / scores.exp().sum()))
    torch.testing.assert_close(attention(x, None, False)[0][0], attention.out_proj(attended.reshape(5, 16)))


@pytest.mark.parametrize("rates", [(0.5, 0.0), (0.0, 0.5)])
def test_dropout_acts_in_training_only(rates: tuple[float, float]) -> None:
    encoder = Encoder(SMALL, dropout=rates[0], activation_dropout=rates[1])
    x = signals()
    assert not torch.equal(encoder(x).frames, encoder(x).frames)
    encoder.eval()
    assert torch.equal(encoder(x).frames, encoder(x).frames)


def test_without_dropout_training_and_eval_agree() -> None:
    encoder = Encoder(SMALL)
    x = signals()
    torch.testing.assert_close(encoder(x).frames, encoder.eval()(x).frames)


def test_a_segment_does_not_depend_on_its_batch() -> None:
    encoder = Encoder(SMALL).eval()
    x = signals()
    for i in range(len(x)):
        torch.testing.assert_close(encoder(x).frames[i], encoder(x[i : i + 1]).frames[0], rtol=1e-4, atol=1e-5)


def test_the_transformer_is_blind_to_padding() -> None:
    encoder = Encoder(SMALL).eval()
    x = torch.randn(2, 25, 16)
    padding = torch.zeros(2, 25, dtype=torch.bool)
    padding[1, 18:] = True
    whole = encoder.contextualise(x, padding, need_attention=True)
    x[1, 18:] = 1e3  # whatever stands there
    changed = encoder.contextualise(x, padding)
    alone = encoder.contextualise(x[1:, :18])
    assert torch.equal(whole.frames[1, 18:], torch.zeros(7, 16))
    torch.testing.assert_close(whole.frames, changed.frames)
    torch.testing.assert_close(whole.frames[1:, :18], alone.frames)
    torch.testing.assert_close(pool_nonzero_mean(whole.frames, padding)[1], pool_nonzero_mean(alone.frames)[0])
    assert whole.attention is not None
    assert not whole.attention[1, ..., 18:].any()


def test_padded_segments_go_through_encoder_and_classifier() -> None:
    classifier = Classifier(SMALL, 3).eval()
    padding = torch.zeros(4, n_frames(SMALL, 100), dtype=torch.bool)
    padding[2, n_frames(SMALL, 60) :] = True
    x = signals()
    x[2, :, 60:] = 0
    padded, plain = classifier(x, padding), classifier(x)
    torch.testing.assert_close(padded.logits[[0, 1, 3]], plain.logits[[0, 1, 3]])
    assert padded.logits.isfinite().all()
    assert not torch.allclose(padded.logits[2], plain.logits[2])


def test_a_missing_lead_is_a_masked_lead_and_changes_the_outcome() -> None:
    encoder = Encoder(SMALL).eval()
    x = signals()
    missing = x.clone()
    missing[:, 1] = 0
    assert encoder(missing).frames.isfinite().all()
    assert not torch.allclose(encoder(missing).frames, encoder(x).frames)


def test_pooling_divides_by_the_count_of_nonzero_values() -> None:
    frames = torch.tensor([[[2.0, 0.0, 0.0], [4.0, 3.0, 0.0], [0.0, 6.0, 0.0], [9.0, 9.0, 9.0]]])
    padding = torch.tensor([[False, False, False, True]])
    assert pool_nonzero_mean(frames, padding).tolist() == [[3.0, 4.5, 0.0]]
    assert frames[0, 3].tolist() == [9.0, 9.0, 9.0]  # the caller's frames are as they were
    dense = torch.rand(3, 7, 5) + 0.1
    torch.testing.assert_close(pool_nonzero_mean(dense), dense.mean(dim=1))


def test_saliency_is_the_most_any_query_of_the_last_layer_looks_at_a_key() -> None:
    attention = torch.rand(2, 3, 4, 4)
    attention[0, -1, :, 2] = torch.tensor([0.1, 5.0, 0.1, 0.1])
    shown = saliency(attention, 40)
    assert shown.shape == (2, 40)
    assert shown.amin(dim=1).tolist() == [0, 0]
    assert shown.amax(dim=1).tolist() == [1, 1]
    assert 20 <= shown[0].argmax() < 30
    assert saliency(torch.full((1, 1, 4, 4), 0.25), 16).tolist() == [[0.0] * 16]


@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_the_gradient_into_the_extractor_is_scaled_and_no_other(scale: float) -> None:
    plain, scaled = Encoder(SMALL), Encoder(SMALL, feature_grad_scale=scale)
    scaled.load_state_dict(plain.state_dict())
    x = signals()
    outputs = [encoder(x).frames for encoder in (plain, scaled)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        factor = scale if name.startswith("feature_extractor.") else 1.0
        torch.testing.assert_close(one.grad * factor, other.grad)
    first = plain.feature_extractor.conv_layers[0][0].weight.grad
    assert first.abs().max() > 0


def test_a_frozen_extractor_gets_no_gradient_and_all_else_does() -> None:
    classifier = Classifier(SMALL, 3)
    classifier(signals()).logits.sum().backward()
    for name, parameter in classifier.named_parameters():
        assert (parameter.grad is None) == name.startswith("encoder.feature_extractor."), name
        assert parameter.requires_grad == (parameter.grad is not None), name


def test_masked_frames_are_hidden_and_the_others_are_not() -> None:
    model = PretrainModel(SMALL).eval()
    frames = n_frames(SMALL, 100)
    masked = torch.tensor([[0, 3, 4], [5, 9, 22]])
    seen: list[Tensor] = []
    model.conv_pos.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = signals(2)
    model(x, masked, 1.0)
    unmasked = model.project(model.layer_norm(model.extract(x)))
    for b in range(2):
        for f in range(frames):
            expected = model.mask_emb if f in masked[b] else unmasked[b, f]
            torch.testing.assert_close(seen[0][b, f], expected)


def test_targets_come_from_the_unmasked_features_of_the_masked_frames() -> None:
    model = PretrainModel(SMALL).eval()
    masked = torch.tensor([[0, 3, 4], [5, 9, 22]])
    x = signals(2)
    output = model(x, masked, 1.0)
    features = model.extract(x)
    normalised = model.layer_norm(features)
    picked = torch.stack([normalised[b, masked[b]] for b in range(2)])
    quantized = model.quantizer(picked, 1.0)
    torch.testing.assert_close(output.quantized, model.project_q(quantized.frames))
    assert torch.equal(output.codes, quantized.codes)
    assert output.codes.shape == (2, 3, 2)
    assert output.context.shape == output.quantized.shape == (2, 3, SMALL.contrast_width)
    assert output.pooled.shape == (2, SMALL.width)
    torch.testing.assert_close(output.features, features)


def test_every_parameter_of_the_pretraining_model_is_trained() -> None:
    model = PretrainModel(SMALL, dropout=0.1, feature_grad_scale=0.1)
    output = model(signals(2), torch.tensor([[0, 3, 4], [5, 9, 22]]), 2.0)
    sum(tensor.square().sum() for tensor in (output.context, output.quantized, output.pooled)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_the_quantizer_takes_the_most_probable_entry_of_each_codebook() -> None:
    quantizer = GumbelQuantizer(SMALL).eval()
    features = torch.randn(2, 6, 8)
    found = quantizer(features, 2.0)
    logits = quantizer.weight_proj(features)
    mean = torch.zeros(2, 5)
    for b in range(2):
        for m in range(6):
            for group in range(2):
                own = logits[b, m, 5 * group : 5 * group + 5]
                entry = int(own.argmax())
                mean[group] += own.softmax(0) / 12
                assert found.codes[b, m, group] == entry
                expected = quantizer.vars[0, 5 * group + entry]
                torch.testing.assert_close(found.frames[b, m, 6 * group : 6 * group + 6], expected)
    torch.testing.assert_close(found.probabilities, mean)


def test_in_training_entries_are_drawn_by_their_probability() -> None:
    quantizer = GumbelQuantizer(SMALL)
    features = torch.randn(1, 1, 8)
    logits = quantizer.weight_proj(features)[0, 0].view(2, 5)
    found = quantizer(features.expand(1, 20_000, 8), 0.7)
    frequency = F.one_hot(found.codes[0], 5).double().mean(dim=0)
    # The temperature sharpens the gradient's soft choice, not the draw.
    torch.testing.assert_close(frequency, logits.softmax(-1).double(), atol=0.02, rtol=0)
    chosen = quantizer.vars[0].view(2, 5, 6)[0][found.codes[0, :, 0]]
    torch.testing.assert_close(found.frames[0, :, :6], chosen)


def test_the_quantizers_logits_learn_only_in_training() -> None:
    quantizer = GumbelQuantizer(SMALL)
    for training in (True, False):
        quantizer.train(training).zero_grad()
        quantizer(torch.randn(2, 6, 8), torch.tensor(2.0)).frames.square().sum().backward()
        assert quantizer.vars.grad is not None
        assert (quantizer.weight_proj.weight.grad is not None) == training


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    with np.load(shared / "golden/model/tiny.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if arrays[name].dtype.kind != "U"}


def published(shared: Path, name: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(shared / f"golden/model/{name}.pt", weights_only=True)["model"]
    return state


def test_the_finetuned_reference_is_reproduced(shared: Path, golden: dict[str, Tensor]) -> None:
    model = Classifier(GOLDEN, 17).eval()
    model.load_state_dict(published(shared, "tiny_finetuned"))
    with torch.no_grad():
        explicit, fused = model(golden["source"], need_attention=True), model(golden["source"])
        frames = model.encoder(golden["source"]).frames
    for found, expected in (
        (explicit.logits, "ft_logits"),
        (fused.logits, "ft_logits"),
        (explicit.embedding, "ft_embedding"),
        (fused.embedding, "ft_embedding"),
        (explicit.attention, "ft_saliency"),
        (frames, "ft_encoder_out"),
    ):
        print(f"{expected}: {float((found - golden[expected]).abs().max()):.1e} at most, of {found.numel()} values")
        torch.testing.assert_close(found, golden[expected], rtol=0, atol=1e-5)


def test_the_pretrained_reference_is_reproduced(shared: Path, golden: dict[str, Tensor]) -> None:
    state = published(shared, "tiny_pretrained")
    model = PretrainModel(GOLDEN).eval()
    model.load_state_dict(state)
    encoder = Encoder(GOLDEN).eval()
    encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})
    span_mask = golden["mask_indices"]
    with torch.no_grad():
        frames = encoder(golden["source"]).frames
        print(f"pre_encoder_out: {float((frames - golden['pre_encoder_out']).abs().max()):.1e} at most")
        torch.testing.assert_close(frames, golden["pre_encoder_out"], rtol=0, atol=1e-5)
        masked = span_mask.nonzero()[:, 1].view(len(span_mask), -1)
        output = model(golden["source"], masked, 2.0)
    # pre_features are the reference's contextual frames behind the span mask.
    torch.testing.assert_close(output.pooled, pool_nonzero_mean(golden["pre_features"]), rtol=0, atol=1e-5)
    behind = golden["pre_features"][span_mask].view(len(span_mask), -1, GOLDEN.width)
    torch.testing.assert_close(output.context, model.final_proj(behind), rtol=0, atol=1e-5)
