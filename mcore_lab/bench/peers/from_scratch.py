"""A loop of layers that are written from scratch: the transformer of the lessons."""

from __future__ import annotations

from collections.abc import Iterator

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
    group = dist.group.WORLD
    assert group
    model = Transformer(config_of(recipe), group)
    model.head.bias = None  # type: ignore[assignment] # as Megatron-Core's
    model.to(device)
    fill(model, weights)
    return model


def config_of(recipe: Recipe) -> Config:
    """Return the shape of a recipe's model in the words of the lessons."""
    model, data = recipe.model, recipe.data
    return Config(
        vocab_size=model.vocab_size or data.mock_vocab_size + 1,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.ffn_hidden_size or 4 * model.hidden_size,
        max_sequence_length=model.max_sequence_length or data.sequence_length,
        causal=model.causal_attention,
        initial_std=model.transformer.get("init_method_std", 0.02),
    )
