"""A loop in plain PyTorch: its own modules, which `parallelize_module` splits over the ranks.

Sequences come first here, `[b, s, h]`; what a rank computes of a split layer are the heads, or the
columns, that it has weights of.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from mcore_lab.bench.peers import Batch, Trained, Weights, adamw, train
from mcore_lab.bench.peers.weights import fill
from mcore_lab.config import Model, Recipe
from mcore_lab.runtime import World


class _Attention(nn.Module):
    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.channels = hidden_size // heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        heads = self.qkv(x).view(b, s, -1, 3 * self.channels).transpose(1, 2)
        query, key, value = heads.chunk(3, -1)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.proj(seen.transpose(1, 2).reshape(b, s, -1))


class _FeedForward(nn.Module):
    def __init__(self, hidden_size: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden_size, inner), nn.Linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, shape: Model) -> None:
        super().__init__()
        h = shape.hidden_size
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.attention = _Attention(h, shape.num_attention_heads)
        self.mlp = _FeedForward(h, shape.ffn_hidden_size or 4 * h)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """The whole model: words `[b, s]` to logits `[b, s, v]`."""

    def __init__(self, shape: Model, longest: int) -> None:
        super().__init__()
        assert shape.vocab_size
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.positions = nn.Embedding(longest, shape.hidden_size)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.hidden_size)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words) + self.positions.weight[: words.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _plan() -> dict[str, ParallelStyle]:
    return {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "blocks.*.attention.qkv": ColwiseParallel(),
        "blocks.*.attention.proj": RowwiseParallel(),
        "blocks.*.mlp.fc1": ColwiseParallel(),
        "blocks.*.mlp.fc2": RowwiseParallel(),
        # Its logits stay split, for a loss that is computed of the parts.
        "head": ColwiseParallel(use_local_output=False),
    }


def train_plain_torch(
    recipe: Recipe, world: World, weights: Weights, micro_batches: Iterator[Batch]
) -> Trained:
    """Train the recipe's model from these weights."""
    device = world.device.type
    longest = recipe.model.max_sequence_length or recipe.data.sequence_length
    model = GPT(recipe.model, longest).to(device)
    parallelize_module(model, init_device_mesh(device, (world.size,)), _plan())
    fill(model, weights)
    optimizer = adamw(recipe, model)

    def backward(batch: Batch, factor: float) -> Tensor:
        with loss_parallel():
            logits = model(batch["tokens"])
            loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
            (loss * factor).backward()
        whole = loss.detach()
        return whole.full_tensor() if isinstance(whole, DTensor) else whole

    def step() -> None:
        _clip(model, recipe.training.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    return train(recipe, micro_batches, backward, step)


def _clip(model: nn.Module, max_norm: float) -> None:
    """Clip the gradients by the norm of all; torch does not add up split ones and whole ones."""
    parameters = list(model.parameters())
    kinds = [
        [one for one in parameters if isinstance(one, DTensor) is is_split]
        for is_split in (True, False)
    ]
    grads = [[one.grad for one in some if one.grad is not None] for some in kinds]
    norms = [nn.utils.get_total_norm(some) for some in grads]
    parts = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = torch.stack(parts).norm()
    for some in kinds:
        nn.utils.clip_grads_with_norm_(some, max_norm, norm)
