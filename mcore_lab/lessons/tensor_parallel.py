"""Tensor parallelism: a deep MLP with each weight matrix split over the ranks.

Why: a layer may be too large for one rank, or too slow on it. Split the first matrix of a block by
columns, its outputs, and the second by rows, its inputs: then what is between them stays where it
is, and nothing is gathered. A block needs one all-reduce forward, after the second matrix, and one
backward, before the first: `f` copies forward and sums backward, its conjugate `g` the other way.

What to look at: the shapes that each rank holds, and losses that are those of one rank. And a trap,
a `g` whose backward sums once more: what comes to it is the same on all n ranks already, so that
each block multiplies the gradient by n. Adam, which divides by a gradient's size, hides it.
Source: Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mcore_lab.lessons.start import main
from mcore_lab.report.tables import print_table
from mcore_lab.runtime import World


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the lesson can be given."""

    num_layers: int = 4
    """Blocks of two matrices."""
    hidden_size: int = 64
    """h, the width between the blocks."""
    ffn_hidden_size: int = 256
    """The width inside a block, which the ranks share."""
    batch_size: int = 32
    """b, samples of a step, the same on all ranks."""
    steps: int = 5
    """Of gradient descent, towards random targets."""
    lr: float = 0.5  # the learning rate
    seed: int = 42  # decides weights and samples


class CopyToRanks(torch.autograd.Function):
    """`f`: every rank uses the same x, so that x's gradient is the sum of what they each find."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return summed(gradients[0], ctx.group), None


class SumOverRanks(torch.autograd.Function):
    """`g`: every rank has a term of the sum, and its gradient is the sum's, which all have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class SumBothWays(SumOverRanks):
    """The trap: a `g` that sums the gradient too, and so multiplies it by the number of ranks."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return summed(gradients[0], ctx.group), None


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of x over the ranks; x itself belongs to autograd and stays as it is."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def part_of(whole: Tensor, dim: int, group: ProcessGroup) -> nn.Parameter:
    """Return this rank's part of a weight that all ranks have drawn alike, and let the rest go."""
    part = nn.Parameter(whole.tensor_split(group.size(), dim)[group.rank()].clone())
    part.is_part = True  # type: ignore[attr-defined]
    return part


class ColumnParallelLinear(nn.Module):
    """x A' + b, A and its outputs split: `[..., i]` to this rank's `[..., o / n]`."""

    def __init__(self, whole: Tensor, group: ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.weight = part_of(whole, 0, group)
        self.bias = part_of(torch.zeros(len(whole)), 0, group)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(CopyToRanks.apply(x, self.group), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """x A' + b, A and its inputs split: this rank's `[..., i / n]` to `[..., o]`, as on all."""

    g: type[SumOverRanks] = SumOverRanks

    def __init__(self, whole: Tensor, group: ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.weight = part_of(whole, 1, group)
        self.bias = nn.Parameter(torch.zeros(len(whole)))  # not split: the same on all ranks

    def forward(self, x: Tensor) -> Tensor:
        # The bias comes after the sum: before it, each rank would add its own, and all n be summed.
        return self.g.apply(F.linear(x, self.weight), self.group) + self.bias


class ParallelMLP(nn.Module):
    """The feed-forward half of a block: `[..., h]` to `[..., h]`, the same on all ranks."""

    def __init__(self, widen: Tensor, narrow: Tensor, group: ProcessGroup) -> None:
        super().__init__()
        self.fc1 = ColumnParallelLinear(widen, group)
        self.fc2 = RowParallelLinear(narrow, group)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def deep_mlp(settings: Settings, group: ProcessGroup) -> nn.Sequential:
    """Return this rank's part: of the same weights, however many ranks are in the group."""
    draw = torch.Generator().manual_seed(settings.seed)

    def whole(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, generator=draw) / inputs**0.5

    h, inner, blocks = settings.hidden_size, settings.ffn_hidden_size, range(settings.num_layers)
    return nn.Sequential(*(ParallelMLP(whole(inner, h), whole(h, inner), group) for _ in blocks))


def train(model: nn.Module, x: Tensor, target: Tensor, settings: Settings) -> list[float]:
    """Return the loss of each step of gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), settings.lr)
    losses = []
    for _ in range(settings.steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def lesson(settings: Settings, world: World) -> dict[str, Any]:
    """Step into the trap; then train the MLP split over all ranks, and the whole of it on each."""
    device, everyone = world.device.type, dist.group.WORLD
    alone, _ = dist.new_subgroups(group_size=1)
    assert everyone
    split, trap, whole = (deep_mlp(settings, g).to(device) for g in (everyone, everyone, alone))
    # All ranks see the same samples: what they share is the work on each of them.
    draw = torch.Generator().manual_seed(settings.seed + 1)
    shape = 2, settings.batch_size, settings.hidden_size
    x, target = torch.randn(shape, generator=draw).to(device)
    x.requires_grad_()
    for module in trap.modules():
        if isinstance(module, RowParallelLinear):
            module.g = SumBothWays
    losses = [F.mse_loss(model(x), target) for model in (split, trap)]
    right, wrong = (torch.autograd.grad(loss, x)[0].norm().item() for loss in losses)
    held: list[Any] = [None] * world.size
    shapes = {name: list(weight.shape) for name, weight in split[0].named_parameters()}
    count = sum(weight.numel() for weight in split.parameters())
    dist.all_gather_object(held, shapes | {"parameters": count})
    found = {
        "held": held,
        "losses": train(split, x, target, settings),
        "losses_of_one_rank": train(whole, x, target, settings),
        "gradient_too_large_by": wrong / right,
    }
    if world.is_first:
        print_table(["rank", *held[0]], [[rank, *row.values()] for rank, row in enumerate(held)])
        print()
        pairs = zip(found["losses"], found["losses_of_one_rank"], strict=True)
        rows = [[f"{a:.7f}", f"{b:.7f}", f"{abs(a - b):.0e}"] for a, b in pairs]
        print_table(["loss, split", "loss, one rank", "difference"], rows)
        print("\nIf the backward of g sums once more, the gradient of the input is too large by")
        print(f"{wrong / right:.4f}: {world.size} to the power of {settings.num_layers} blocks.")
    return found


if __name__ == "__main__":
    main(Settings, lesson)
