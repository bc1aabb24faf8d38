"""What a model says about segments: logits, embeddings, and where it looked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor

from ecgfm import model as network
from ecgfm.data import Shards, in_order, load, standardise
from ecgfm.model import Classifier, Encoder, pool_nonzero_mean


@dataclass(frozen=True)
class SegmentOutputs:
    """Of each segment, in the order asked for.

    logits: (segment, label) float32; None of an encoder without classifier
    embeddings: (segment, width) float32, the non-zero mean of the encoder's frames
    """

    logits: np.ndarray | None
    embeddings: np.ndarray


def segment_outputs(
    model: Encoder | Classifier, table: pl.DataFrame, shards: Shards, batch_size: int, device: torch.device
) -> SegmentOutputs:
    """Logits and embeddings of the segments of a manifest: no lead masked, no dropout.

    model: on `device`; of a `PretrainModel` its encoder is asked
    table: with `source`, `slice_id` and `shard_row`
    """
    places = shards.places(table)[:, None]
    logits: list[Tensor] = []
    embeddings: list[Tensor] = []
    with torch.inference_mode(), _evaluating(model):
        for batch in load(shards, places, in_order(len(places), batch_size), device):
            signal = standardise(batch, device)
            if isinstance(model, Classifier):
                classified = model(signal)
                logits.append(classified.logits.float().cpu())
                embeddings.append(classified.embedding.float().cpu())
            else:
                frames = Encoder.forward(model, signal).frames  # of a PretrainModel too, whose own forward masks
                embeddings.append(pool_nonzero_mean(frames).float().cpu())
    return SegmentOutputs(torch.cat(logits).numpy() if logits else None, torch.cat(embeddings).numpy())


def saliency(model: Encoder | Classifier, signal: Tensor) -> Tensor:
    """How much the last layer looks at each sample: attention averaged over heads, its maximum over queries.

    signal: (segment, lead, time) standardised, on the model's device. Returns (segment, time) float32, 0 to 1 in each.
    """
    encoder = model.encoder if isinstance(model, Classifier) else model
    with torch.inference_mode(), _evaluating(encoder):
        attention = Encoder.forward(encoder, signal, need_attention=True).attention
    assert attention is not None
    return network.saliency(attention, signal.shape[2]).float()


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside, as before outside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
