"""A whole transformer split over tensor-parallel ranks, which learns a hundred sequences by heart.

Why: the pieces of `tensor_parallel` and `vocabulary_parallel` are all it takes. Attention is split
by heads, which do not need each other: the columns of the first matrix are ordered by head (query,
key and value of the first, then of the second, ...), so that a part of them is so many whole heads.
Norms, positions and the biases after a sum are on every rank, and stay equal: their gradients are
whole on each, because f sums what comes back from the split parts.

What to look at: parameters per rank, and losses that are those of one rank from the same weights,
which are drawn whole and then cut. The norm that clips the gradients is of all ranks' parts, but of
what each of them has a copy of it counts one.
Source: Shoeybi et al., arXiv:1909.08053, section 3; norms first: Xiong et al., arXiv:2002.04745.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mcore_lab.errors import ConfigError
from mcore_lab.lessons.start import main
from mcore_lab.lessons.tensor_parallel import ColumnParallelLinear, ParallelMLP, RowParallelLinear
from mcore_lab.lessons.vocabulary_parallel import VocabParallelEmbedding, parallel_cross_entropy
from mcore_lab.report.tables import print_table
from mcore_lab.runtime import World

SEQUENCES, TOKENS = 100, 32  # what is learned: so many random ones, each of so many words


@dataclass(frozen=True, kw_only=True)
class Config:
    """The model, whole: what each rank holds of it follows from their number."""

    vocab_size: int = 1024
    """v, the number of words; it need not be divisible by the ranks."""
    hidden_size: int = 64
    """h, the width of the model."""
    num_layers: int = 2
    """Blocks of attention and feed-forward."""
    num_attention_heads: int = 4
    """Divisible by the ranks."""
    ffn_hidden_size: int = 128
    """The width inside a feed-forward layer."""
    max_sequence_length: int = 32
    """How many positions there are."""
    causal: bool = False
    """A token sees only those before it."""
    initial_std: float = 0.02
    """Standard deviation of the initial weights."""
    seed: int = 42
    """Decides the weights, and the sequences."""


@dataclass(frozen=True, kw_only=True)
class Settings(Config):
    """What the lesson can be given: the model, and how it is trained."""

    steps: int = 60
    """Of Adam; each token is to be predicted from its own sequence."""
    batch_size: int = 16
    """b, sequences of a step, the same on all ranks."""
    lr: float = 1e-2  # the learning rate
    max_gradient_norm: float = 1.0
    """Larger gradients are clipped to it."""


class ParallelAttention(nn.Module):
    """Self-attention of this rank's heads: `[s, b, h]` to `[s, b, h]`, the same on all ranks."""

    def __init__(self, config: Config, group: ProcessGroup, drawn: Any) -> None:
        super().__init__()
        self.heads, self.causal = config.num_attention_heads // group.size(), config.causal
        self.qkv = ColumnParallelLinear(drawn(3 * config.hidden_size, config.hidden_size), group)
        self.proj = RowParallelLinear(drawn(config.hidden_size, config.hidden_size), group)

    def forward(self, x: Tensor) -> Tensor:
        s, b, _ = x.shape
        # [s, b, 3h / n] to [b, heads, s, 3d], of which d each are query, key and value.
        q, k, v = self.qkv(x).view(s, b, self.heads, -1).permute(1, 2, 0, 3).chunk(3, -1)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(seen.permute(2, 0, 1, 3).reshape(s, b, -1))


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and beside a way around it: `[s, b, h]`."""

    def __init__(self, config: Config, group: ProcessGroup, drawn: Any) -> None:
        super().__init__()
        h, inner = config.hidden_size, config.ffn_hidden_size
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.attention = ParallelAttention(config, group, drawn)
        self.mlp = ParallelMLP(drawn(inner, h), drawn(h, inner), group)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """This rank's part of the model: the same whole weights, however many ranks are in the group.

    Raises ConfigError where the heads or the words do not suffice for the ranks.
    """

    def __init__(self, config: Config, group: ProcessGroup) -> None:
        super().__init__()
        n, v, h = group.size(), config.vocab_size, config.hidden_size
        heads = config.num_attention_heads
        rules = {
            f"--num-attention-heads must be a multiple of {n}, the ranks; it is {heads}": heads % n,
            f"--hidden-size must be a multiple of {heads}, the heads; it is {h}": h % heads,
            f"--vocab-size must not be below {n}, the ranks; it is {v}": v < n,
        }
        if broken := [rule for rule, is_broken in rules.items() if is_broken]:
            raise ConfigError("\n".join(broken))
        draw = torch.Generator().manual_seed(config.seed)

        def drawn(outputs: int, inputs: int) -> Tensor:
            return config.initial_std * torch.randn(outputs, inputs, generator=draw)

        self.group = group
        self.embedding = VocabParallelEmbedding(drawn(v, h), group)
        self.positions = nn.Parameter(drawn(config.max_sequence_length, h))
        self.blocks = nn.ModuleList(Block(config, group, drawn) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(h)
        self.head = ColumnParallelLinear(drawn(v, h), group)

    def forward(self, words: Tensor) -> Tensor:
        """Return this rank's logits `[s, b, v / n]` of words `[s, b]`."""
        x = self.embedding(words) + self.positions[: len(words), None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, words: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of all tokens, the same on all ranks; both are `[s, b]`."""
        return parallel_cross_entropy(self(words), targets, self.embedding.first, self.group).mean()

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale all gradients down to a norm of `max_norm`, of the whole; return what it was."""
        grads: dict[bool, list[Any]] = {True: [], False: []}
        for weight in self.parameters():
            grads[hasattr(weight, "is_part")].append(weight.grad)
        square = nn.utils.get_total_norm(grads[True]) ** 2
        dist.all_reduce(square, group=self.group)
        norm = (square + nn.utils.get_total_norm(grads[False]) ** 2).sqrt()
        nn.utils.clip_grads_with_norm_(self.parameters(), max_norm, norm)
        return norm


def train(settings: Settings, group: ProcessGroup, device: str) -> tuple[list[float], int]:
    """Return the loss of each step, and the number of this rank's parameters."""
    model = Transformer(settings, group).to(device)
    optimizer = torch.optim.Adam(model.parameters(), settings.lr, fused=True)
    draw = torch.Generator().manual_seed(settings.seed)
    sequences = torch.randint(settings.vocab_size, (TOKENS, SEQUENCES), generator=draw).to(device)
    losses = []
    for _ in range(settings.steps):
        words = sequences[:, torch.randint(SEQUENCES, (settings.batch_size,), generator=draw)]
        optimizer.zero_grad()
        loss = model.loss(words, targets=words)
        loss.backward()
        model.clip_gradients(settings.max_gradient_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses, sum(weight.numel() for weight in model.parameters())


def lesson(settings: Settings, world: World) -> dict[str, Any]:
    """Train the model split over all ranks, and the whole of it on each rank."""
    if settings.max_sequence_length < TOKENS:
        given = settings.max_sequence_length
        raise ConfigError(f"--max-sequence-length must not be below {TOKENS}; it is {given}")
    everyone, (alone, _) = dist.group.WORLD, dist.new_subgroups(group_size=1)
    assert everyone
    losses, held = train(settings, everyone, world.device.type)
    expected, of = train(settings, alone, world.device.type)
    each: list[Any] = [None] * world.size
    dist.all_gather_object(each, held)
    if world.is_first:
        parts = ", ".join(f"{held:,}" for held in each)
        print(f"The model has {of:,} parameters; on the ranks there are {parts}.\n")
        rows = [
            [step, f"{ours:.6f}", f"{whole:.6f}", f"{abs(ours - whole):.0e}"]
            for step, (ours, whole) in enumerate(zip(losses, expected, strict=True), start=1)
            if step % 10 == 1 or step == settings.steps
        ]
        print_table(["step", "loss, split", "loss, one rank", "difference"], rows)
    return {"parameters": each, "of": of, "losses": losses, "losses_of_one_rank": expected}


if __name__ == "__main__":
    main(Settings, lesson)
