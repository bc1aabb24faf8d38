"""The ECG-FM network: wav2vec 2.0 on 12 leads, its pretraining heads, and a classifier on top.

Letters: B batch (segments), L leads, T samples, F frames, C conv channels, D width, H heads, N layers, M masked frames
of a segment, G codebooks (groups), V codebook entries.

Sources: McKeen et al. 2024 (arXiv 2408.05178), the network and its objective; Baevski et al. 2020 (arXiv 2006.11477),
wav2vec 2.0; Devlin et al. 2018 (arXiv 1810.04805), the transformer's initialisation. Parameters bear the names of the
published checkpoints, so that loading one is a strict `load_state_dict`.

A lead that is missing is a row of zeros, which is also what a masked lead looks like: the network has seen both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ecgfm.config import ModelConfig
from ecgfm.ecg import InputError

PRETRAINING_HEADS = ("mask_emb", "quantizer", "project_q", "final_proj")
"""The attributes of `PretrainModel` that are not the encoder's."""


class Encoded(NamedTuple):
    """What the encoder makes of a batch.

    frames: (B, F, D) contextual frames; zero where padded
    attention: (B, N, F, F) attention of each layer, averaged over its heads, [.., query, key]; None unless asked for
    """

    frames: Tensor
    attention: Tensor | None


class Classified(NamedTuple):
    """What the classifier makes of a batch.

    logits: (B, labels)
    embedding: (B, D) the pooled frames the logits are read from
    attention: as in `Encoded`
    """

    logits: Tensor
    embedding: Tensor
    attention: Tensor | None


class PretrainOutput(NamedTuple):
    """All that the pretraining objective needs (`losses.pretraining_loss`).

    pooled: (B, D) pooled contextual frames, one per segment
    context: (B, M, contrast_width) contextual frames at the masked places
    quantized: (B, M, contrast_width) what was there: the quantized features, the contrastive targets
    codes: (B, M, G) int64, the codebook entry chosen by each group
    code_probabilities: (G, V) mean softmax over the batch's masked frames
    features: (B, F, C) extractor output before its LayerNorm
    """

    pooled: Tensor
    context: Tensor
    quantized: Tensor
    codes: Tensor
    code_probabilities: Tensor
    features: Tensor


def n_frames(config: ModelConfig, n_samples: int) -> int:
    """Frames that the feature extractor makes of `n_samples` samples: 2,500 -> 156 as published.

    Raises:
        InputError: too few samples for one frame.
    """
    frames = n_samples
    for kernel, stride in zip(config.conv_kernels, config.conv_strides, strict=True):
        frames = (frames - kernel) // stride + 1
    if frames < 1:
        raise InputError(
            f"a segment of {n_samples} samples makes no frame (one frame takes about "
            f"{math.prod(config.conv_strides)} samples); use longer segments"
        )
    return frames


def flops_per_segment(config: ModelConfig, n_samples: int) -> float:
    """Floating-point operations of the encoder's products for one segment, forward and backward: 87.7e9 as published.

    A multiplication and an addition are two; the backward pass of a product is two products. Norms, activations and
    the heads, under 1 % together, are left out.
    """
    products = 0
    frames, channels = n_samples, config.n_leads
    for kernel, stride in zip(config.conv_kernels, config.conv_strides, strict=True):
        frames = (frames - kernel) // stride + 1
        products += frames * config.conv_channels * channels * kernel
        channels = config.conv_channels
    products += frames * channels * config.width
    products += frames * config.width * config.width // config.pos_conv_groups * config.pos_conv_kernel
    attention = 4 * frames * config.width**2 + 2 * frames**2 * config.width
    products += config.n_layers * (attention + 2 * frames * config.width * config.ffn_width)
    return 3 * 2.0 * products


def pool_nonzero_mean(frames: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """One vector per segment: per feature, the sum over frames divided by the count of *non-zero* values.

    That divisor is the published model's way to leave padded frames out, and its checkpoints depend on it; without
    padding it is the mean, but for features that happen to be exactly 0 in some frame. A feature that is 0 everywhere
    gives 0 (where the reference gives NaN).

    frames: (B, F, D); padding_mask: (B, F) bool, True where padded. Returns (B, D) float32.
    """
    frames = frames.float()
    if padding_mask is not None:
        frames = frames.masked_fill(padding_mask[..., None], 0)
    return frames.sum(dim=1) / (frames != 0).sum(dim=1).clamp_min(1)


def saliency(attention: Tensor, n_samples: int) -> Tensor:
    """How much the last layer looks at each sample, for display: the maximum over queries, stretched to samples.

    attention: (B, N, F, F) of `Encoded`. Returns (B, n_samples), 0 to 1 in each segment.
    """
    per_frame = attention[:, -1].amax(dim=1)
    per_sample = F.interpolate(per_frame[:, None], n_samples, mode="linear", align_corners=False)[:, 0]
    low, high = per_sample.aminmax(dim=1, keepdim=True)
    return (per_sample - low) / (high - low).clamp_min(torch.finfo(per_sample.dtype).tiny)


class _ScaleGradient(torch.autograd.Function):
    """The identity, with its gradient multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.scale, None


def drop_out(x: Tensor, rate: float) -> Tensor:
    """`F.dropout`, from torch's global generator; on a CPU four times as fast.

    There torch draws a number per element, one after the other, which takes as long as the products around it. Four
    elements share one number of 64 bits: 16 bits for each, a rate exact to 1 in 65,536, for which the scale makes up.
    """
    dropped = round(rate * 65536)
    if not dropped:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, rate)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = (bits[: x.numel()] >= dropped - 32768).view(x.shape).to(x.dtype)
    return x * kept.mul_(65536 / (65536 - dropped) if dropped < 65536 else 0.0)


class Dropout(nn.Module):
    """`drop_out` while training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)"""
        return drop_out(x, self.rate) if self.training else x


class FeatureExtractor(nn.Module):
    """Strided convolutions, each followed by GELU: samples to frames.

    Only the first layer is normalised, each channel over the segment's whole time (GroupNorm with a group a channel).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.conv_channels
        layers: list[nn.Sequential] = []
        for kernel, stride in zip(config.conv_kernels, config.conv_strides, strict=True):
            conv = nn.Conv1d(channels if layers else config.n_leads, channels, kernel, stride, bias=False)
            nn.init.kaiming_normal_(conv.weight)
            # The identity keeps the published name of the GroupNorm, conv_layers.0.2: a dropout of rate 0 stood there.
            between = [] if layers else [nn.Identity(), nn.GroupNorm(channels, channels)]
            layers.append(nn.Sequential(conv, *between, nn.GELU()))
        self.conv_layers = nn.ModuleList(layers)

    def forward(self, signal: Tensor) -> Tensor:
        """(B, L, T) standardised signal -> (B, F, C)"""
        x = signal.transpose(1, 2)
        for layer in self.conv_layers:
            conv, *normed, activation = cast(nn.Sequential, layer)
            x = _strided_conv(x, cast(nn.Conv1d, conv))
            for module in normed:
                x = module(x.transpose(1, 2)).transpose(1, 2)
            x = activation(x)
        return x


def _strided_conv(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """`conv` over (B, T, channels) in place of (B, channels, T). Where no two frames share a sample, as published,
    it is one matrix product over frames laid side by side, for which every processor is made."""
    width, channels, kernel = conv.weight.shape
    if kernel != conv.stride[0]:
        strided: Tensor = conv(x.transpose(1, 2))
        return strided.transpose(1, 2)
    frames = x.shape[1] // kernel
    side_by_side = x[:, : frames * kernel].reshape(len(x), frames, kernel * channels)
    return F.linear(side_by_side, conv.weight.transpose(1, 2).reshape(width, kernel * channels))


class PositionalConv(nn.Module):
    """The position of a frame, from the frames around it: one wide grouped convolution."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, kernel = config.width, config.pos_conv_kernel
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=config.pos_conv_groups)
        nn.init.normal_(conv.weight, std=math.sqrt(4 / (kernel * width)))
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.pos_conv = nn.Sequential(weight_norm(conv, dim=2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, D) -> (B, F, D)"""
        frames = x.shape[1]
        # An even kernel, padded by half of it on both sides, makes one frame too many: the last is dropped.
        return F.gelu(self.pos_conv(x.transpose(1, 2))[..., :frames]).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, visible: Tensor | None, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """(B, F, D) -> (B, F, D), and the weights (B, F, F) averaged over heads where they are needed.

        visible: (B, 1, 1, F) bool, False where a frame is padding and no query may see it
        """
        batch, frames, width = x.shape
        q, k, v = (
            proj(x).view(batch, frames, self.n_heads, -1).transpose(1, 2)  # (B, H, F, D/H)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        mean_weights = None
        if need_weights or (dropout and x.device.type == "cpu"):
            # The fused kernels do not give their weights away, and on a CPU there is none with dropout.
            scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
            if visible is not None:
                scores = scores.masked_fill(~visible, -math.inf)
            weights = scores.softmax(dim=-1)
            attended = drop_out(weights, dropout) @ v
            mean_weights = weights.mean(dim=1) if need_weights else None
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).reshape(batch, frames, width)), mean_weights


class EncoderLayer(nn.Module):
    """One transformer layer, post-norm: the LayerNorm stands after each residual sum."""

    def __init__(self, config: ModelConfig, dropout: float, activation_dropout: float) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, dropout)
        self.self_attn_layer_norm = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, config.ffn_width)
        self.fc2 = nn.Linear(config.ffn_width, config.width)
        self.final_layer_norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(dropout)
        self.activation_dropout = Dropout(activation_dropout)

    def forward(self, x: Tensor, visible: Tensor | None, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """(B, F, D) -> (B, F, D), and the attention weights (B, F, F) where they are needed"""
        attended, weights = self.self_attn(x, visible, need_weights)
        x = self.self_attn_layer_norm(x + self.dropout(attended))
        hidden = self.activation_dropout(F.gelu(self.fc1(x)))
        return self.final_layer_norm(x + self.dropout(self.fc2(hidden))), weights


class Transformer(nn.Module):
    """LayerNorm, then the layers."""

    def __init__(self, config: ModelConfig, dropout: float, activation_dropout: float) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(EncoderLayer(config, dropout, activation_dropout) for _ in range(config.n_layers))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, visible: Tensor | None, need_attention: bool) -> Encoded:
        """(B, F, D) -> frames (B, F, D), attention (B, N, F, F)"""
        x = self.dropout(self.layer_norm(x))
        attention = []
        for layer in self.layers:
            x, weights = layer(x, visible, need_attention)
            attention.append(weights)
        return Encoded(x, torch.stack(attention, dim=1) if need_attention else None)


class Encoder(nn.Module):
    """Signal to contextual frames: all that finetuning, embedding and prediction take over from pretraining.

    Args:
        dropout: after the input projection, the transformer's LayerNorm and each residual branch, and on attention
        activation_dropout: inside the feed-forward layers
        feature_grad_scale: factor on the gradient that enters the feature extractor; 0 freezes its parameters
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dropout: float = 0.0,
        activation_dropout: float = 0.0,
        feature_grad_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.feature_grad_scale = feature_grad_scale
        self.feature_extractor = FeatureExtractor(config)
        self.layer_norm = nn.LayerNorm(config.conv_channels)
        self.post_extract_proj = nn.Linear(config.conv_channels, config.width)
        self.dropout = Dropout(dropout)
        self.conv_pos = PositionalConv(config)
        self.encoder = Transformer(config, dropout, activation_dropout)
        if feature_grad_scale == 0:
            self.feature_extractor.requires_grad_(False)

    def forward(self, signal: Tensor, padding_mask: Tensor | None = None, need_attention: bool = False) -> Encoded:
        """(B, L, T) standardised signal -> contextual frames (B, F, D).

        padding_mask: (B, F) bool, True for the frames behind a shorter segment's end (from `n_frames` of its length).
            The transformer then computes what it would without them. The extractor's GroupNorm does not: like the
            reference's it takes its mean and variance over the padding too. Any length T is accepted, so segments of
            one length are best a batch of their own, with no padding at all. A segment of nothing but padding is not
            supported (NaN).

        Raises:
            ValueError: the signal has other dimensions, or not the model's leads.
        """
        features = self.layer_norm(self.extract(signal))
        return self.contextualise(self.project(features), padding_mask, need_attention)

    def extract(self, signal: Tensor) -> Tensor:
        """(B, L, T) -> (B, F, C), the features before their LayerNorm; the gradient is scaled here"""
        if signal.ndim != 3 or signal.shape[1] != self.config.n_leads:
            raise ValueError(
                f"expected a signal (batch, {self.config.n_leads} leads, time), found {tuple(signal.shape)}"
            )
        features: Tensor = self.feature_extractor(signal)
        if self.feature_grad_scale in (0, 1):
            return features
        scaled: Tensor = _ScaleGradient.apply(features, self.feature_grad_scale)  # type: ignore[no-untyped-call]
        return scaled

    def project(self, features: Tensor) -> Tensor:
        """(B, F, C) normalised features -> (B, F, D)"""
        projected: Tensor = self.dropout(self.post_extract_proj(features))
        return projected

    def contextualise(self, x: Tensor, padding_mask: Tensor | None = None, need_attention: bool = False) -> Encoded:
        """(B, F, D) -> (B, F, D), each frame seeing all others; what padded frames hold has no influence"""
        visible = None
        if padding_mask is not None:
            x = x.masked_fill(padding_mask[..., None], 0)
            visible = ~padding_mask[:, None, None, :]
        encoded: Encoded = self.encoder(x + self.conv_pos(x), visible, need_attention)
        if padding_mask is not None:
            encoded = encoded._replace(frames=encoded.frames.masked_fill(padding_mask[..., None], 0))
        return encoded


class Quantized(NamedTuple):
    """frames: (B, M, codebook_width); codes: (B, M, G) int64; probabilities: (G, V) mean softmax over all frames"""

    frames: Tensor
    codes: Tensor
    probabilities: Tensor


def sample_gumbel(shape: Sequence[int], device: torch.device, generator: Generator | None = None) -> Tensor:
    """Standard Gumbel variates, float32."""
    # Minus the log of an exponential variate is a Gumbel variate; 0 would make it infinite.
    exponential = torch.empty(tuple(shape), device=device).exponential_(generator=generator)
    return -exponential.clamp_min_(torch.finfo(torch.float32).tiny).log_()


class _StraightThrough(torch.autograd.Function):
    """Entries of codebooks by their numbers, with the gradient of the soft choice among all of them.

    The straight-through estimator multiplies a one-hot choice with the codebooks; here the entries are fetched, and the
    codebooks' gradient is added up where they were, so that only the choice's own gradient is a product.
    """

    @staticmethod
    def forward(ctx: Any, soft: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
        """soft: (B, M, G, V); codes: (B, M, G); codebooks: (G, V, width). Returns (B, M, G, width)."""
        ctx.save_for_backward(codes, codebooks)
        group = torch.arange(codebooks.shape[0], device=codes.device)
        return codebooks[group, codes]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        codes, codebooks = ctx.saved_tensors
        (gradient,) = gradients
        of_soft = torch.einsum("bmgd,gvd->bmgv", gradient, codebooks)
        groups, entries, width = codebooks.shape
        places = codes + entries * torch.arange(groups, device=codes.device)
        of_codebooks = codebooks.new_zeros(groups * entries, width)
        of_codebooks.index_add_(0, places.flatten(), gradient.reshape(-1, width).to(codebooks.dtype))
        return of_soft, None, of_codebooks.view_as(codebooks)


class GumbelQuantizer(nn.Module):
    """Each frame becomes one entry of each of G codebooks, put side by side (Gumbel-softmax, straight-through)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        groups, entries = config.n_codebooks, config.codebook_entries
        self.n_groups = groups
        self.vars = nn.Parameter(torch.empty(1, groups * entries, config.codebook_width // groups))
        self.weight_proj = nn.Linear(config.conv_channels, groups * entries)
        nn.init.uniform_(self.vars)
        nn.init.normal_(self.weight_proj.weight)
        nn.init.zeros_(self.weight_proj.bias)

    def forward(self, features: Tensor, temperature: float | Tensor, gumbel: Tensor | None = None) -> Quantized:
        """(B, M, C) -> (B, M, codebook_width).

        In training an entry is drawn by its probability at `temperature`, and the gradient is that of the soft choice;
        in eval mode the most probable entry is taken.

        gumbel: (B, M, G, V) of `sample_gumbel`; None: drawn here, from torch's global generator
        """
        batch, frames, _ = features.shape
        logits = self.weight_proj(features).float().view(batch, frames, self.n_groups, -1)
        probabilities = logits.softmax(dim=-1).mean(dim=(0, 1))
        if self.training:
            gumbel = sample_gumbel(logits.shape, logits.device) if gumbel is None else gumbel
            soft = ((logits + gumbel) / temperature).softmax(dim=-1)
        else:
            soft = logits.detach()
        codes = soft.argmax(dim=-1)
        codebooks = self.vars.view(self.n_groups, -1, self.vars.shape[-1])  # (G, V, codebook_width / G)
        entries: Tensor = _StraightThrough.apply(soft, codes, codebooks)  # type: ignore[no-untyped-call]
        return Quantized(entries.flatten(start_dim=2), codes, probabilities)


class PretrainModel(Encoder):
    """The encoder and its pretraining heads, side by side as in the published files (hence a subclass).

    Args: see `Encoder`; `dropout` also stands before the quantizer.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dropout: float = 0.0,
        activation_dropout: float = 0.0,
        feature_grad_scale: float = 1.0,
    ) -> None:
        super().__init__(
            config, dropout=dropout, activation_dropout=activation_dropout, feature_grad_scale=feature_grad_scale
        )
        self.mask_emb = nn.Parameter(torch.empty(config.width))
        nn.init.uniform_(self.mask_emb)
        self.quantizer = GumbelQuantizer(config)
        self.project_q = nn.Linear(config.codebook_width, config.contrast_width)
        self.final_proj = nn.Linear(config.width, config.contrast_width)

    # Not a stand-in for an encoder: the objective needs other inputs and outputs.
    def forward(  # type: ignore[override]
        self, signal: Tensor, masked_frames: Tensor, temperature: float | Tensor, gumbel: Tensor | None = None
    ) -> PretrainOutput:
        """Hide the masked frames of (B, L, T) and return what was there and what the context says was there.

        masked_frames: (B, M) int64, the hidden frames of each segment (`losses.masked_frames`). Places rather than a
            (B, F) mask, so that M is known without waiting for the device.
        temperature, gumbel: of the quantizer; without effect in eval mode
        """
        features = self.extract(signal)
        normalised = self.layer_norm(features)
        span_mask = torch.zeros(normalised.shape[:2], dtype=torch.bool, device=signal.device)
        span_mask = span_mask.scatter(1, masked_frames, True)
        x = self.project(normalised)
        x = torch.where(span_mask[..., None], self.mask_emb.to(x.dtype), x)
        frames = self.contextualise(x).frames
        quantized = self.quantizer(self.dropout(_take_frames(normalised, masked_frames)), temperature, gumbel)
        return PretrainOutput(
            pooled=pool_nonzero_mean(frames),
            context=self.final_proj(_take_frames(frames, masked_frames)),
            quantized=self.project_q(quantized.frames),
            codes=quantized.codes,
            code_probabilities=quantized.probabilities,
            features=features,
        )


def _take_frames(frames: Tensor, places: Tensor) -> Tensor:
    """(B, F, D) at places (B, M) -> (B, M, D)"""
    return frames.gather(1, places[..., None].expand(-1, -1, frames.shape[-1]))


class Classifier(nn.Module):
    """The encoder, the non-zero mean over frames, and one linear layer: a logit per label.

    Args: see `Encoder`; `feature_grad_scale=0` (frozen extractor) is the published recipe.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_labels: int,
        *,
        dropout: float = 0.0,
        activation_dropout: float = 0.0,
        feature_grad_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(
            config, dropout=dropout, activation_dropout=activation_dropout, feature_grad_scale=feature_grad_scale
        )
        self.proj = nn.Linear(config.width, n_labels)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, signal: Tensor, padding_mask: Tensor | None = None, need_attention: bool = False) -> Classified:
        """(B, L, T) standardised signal -> logits (B, labels); `padding_mask` as in `Encoder.forward`"""
        encoded: Encoded = self.encoder(signal, padding_mask, need_attention)
        embedding = pool_nonzero_mean(encoded.frames, padding_mask)
        with torch.autocast(signal.device.type, enabled=False):  # logits of eight bits would make ties
            logits = self.proj(embedding)
        return Classified(logits, embedding, encoded.attention)
