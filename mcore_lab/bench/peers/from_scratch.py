"""A loop of layers that are written from scratch: the transformer of the lessons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mcore_lab.bench.peers import Batch, Trained, Weights, adamw, train
from mcore_lab.bench.peers.weights import fill
from mcore_lab.config import Recipe
from mcore_lab.lessons.transformer import Config, Transformer
from mcore_lab.runtime import World


def train_from_scratch(
    recipe: Recipe, world: World, weights: Weights, micro_batches: Iterator[Batch]
) -> Trained:
    """Train the recipe's model from these weights."""
    model = transformer(recipe, weights, world.device.type)
    optimizer = adamw(recipe, model)

    def backward(batch: Batch, factor: float) -> Tensor:
        loss = model.loss(batch["tokens"].t(), batch["labels"].t())
        (loss * factor).backward()
        return loss.detach()

    def step() -> None:
        model.clip_gradients(recipe.training.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    return train(recipe, micro_batches, backward, step)


def transformer(recipe: Recipe, weights: Weights, device: str) -> Transformer:
    """Return this rank's part of the model."""
    group, shape = dist.group.WORLD, recipe.model
    assert group and shape.vocab_size
    sizes: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "ffn_hidden_size": shape.ffn_hidden_size or 4 * shape.hidden_size,
        "vocab_size": shape.vocab_size,
    }
    longest = shape.max_sequence_length or recipe.data.sequence_length
    model = Transformer(Config(**sizes, max_sequence_length=longest, causal=True), group)
    model.head.bias = None  # type: ignore[assignment] # as Megatron-Core's
    model.to(device)
    fill(model, weights)
    return model
