"""ZeRO, first stage: data parallelism with the optimizer's state split over the ranks.

Why: in data parallelism all ranks hold the same parameters, the same averaged gradients and the
same state of Adam, two moments a parameter, and they all compute the same step. It is enough that
each rank takes the step for its n-th part of the parameters, and holds the state of that part. The
all-reduce of the gradients becomes its two halves: a reduce-scatter brings each rank the averages
of its part, and after the step an all-gather gives everyone the new parameters. Together they move
what the all-reduce did (see the lesson `collectives`): the memory costs nothing. That is so with
NCCL. Gloo reduces everything to everyone and throws away what a rank did not ask for, so that on
CPU half as much again is moved.

What to look at: the bytes of Adam's state on each rank, and that the parameters after all steps are
those of plain data parallelism. ZeRO's second stage splits the gradients as well, its third the
parameters.
Source: Rajbhandari et al., "ZeRO", arXiv:1910.02054, section 5.
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
from mcore_lab.lessons.data_parallel import deep_mlp
from mcore_lab.lessons.start import main
from mcore_lab.report.tables import print_table
from mcore_lab.runtime import World


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the lesson can be given."""

    num_layers: int = 4
    """Linear layers, a nonlinearity after each."""
    hidden_size: int = 256
    """h, the width of every layer."""
    batch_size: int = 64
    """b, samples of a step, of all ranks together."""
    steps: int = 10
    """Of Adam, towards random targets."""
    lr: float = 1e-3
    """The learning rate."""
    seed: int = 42
    """Decides weights and samples."""


class PlainAdam:
    """Adam as in plain data parallelism: every rank averages, holds and computes everything."""

    def __init__(self, model: nn.Module, group: ProcessGroup, lr: float) -> None:
        self.group = group
        self.parameters = list(model.parameters())
        self.adam = torch.optim.Adam(self.parameters, lr)

    def step(self) -> None:
        """Take a step; then there are no gradients."""
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad /= self.group.size()
            dist.all_reduce(parameter.grad, group=self.group)
        self.adam.step()
        self.adam.zero_grad()


class ShardedAdam:
    """Adam with an n-th of the state: each rank takes the step for its part of the parameters."""

    def __init__(self, model: nn.Module, group: ProcessGroup, lr: float) -> None:
        self.group = group
        count = sum(parameter.numel() for parameter in model.parameters())
        # All parameters one after the other, and zeros until the length divides by n.
        length = -(-count // group.size()) * group.size()
        self.weights = torch.zeros(length, device=next(model.parameters()).device)
        self.gradients = torch.zeros_like(self.weights)
        end = 0
        for parameter in model.parameters():
            start, end = end, end + parameter.numel()
            self.weights[start:end] = parameter.detach().view(-1)
            # The model computes with what lies here, and its backward adds to what lies here.
            parameter.data = self.weights[start:end].view_as(parameter)
            parameter.grad = self.gradients[start:end].view_as(parameter)
        self.own = nn.Parameter(self.weights.chunk(group.size())[group.rank()])
        self.own.grad = torch.zeros_like(self.own)
        self.adam = torch.optim.Adam([self.own], lr)

    def step(self) -> None:
        """Take a step; then the gradients are zero."""
        assert self.own.grad is not None
        dist.reduce_scatter_tensor(self.own.grad, self.gradients, group=self.group)
        self.own.grad /= self.group.size()
        self.adam.step()
        dist.all_gather_into_tensor(self.weights, self.own.detach().clone(), group=self.group)
        self.gradients.zero_()


def train(
    optimizer: type[PlainAdam | ShardedAdam], settings: Settings, world: World
) -> tuple[Tensor, dict[str, int]]:
    """Return the parameters after all steps, and the bytes of what this rank holds."""
    group, device = dist.group.WORLD, world.device.type
    assert group
    model = deep_mlp(settings.num_layers, settings.hidden_size, settings.seed).to(device)
    chosen = optimizer(model, group, settings.lr)
    draw = torch.Generator().manual_seed(settings.seed + 1)
    shape = 2, settings.batch_size, settings.hidden_size
    x, target = torch.randn(shape, generator=draw)[:, world.rank :: world.size].to(device)
    for _ in range(settings.steps):
        F.mse_loss(model(x), target).backward()
        chosen.step()
    state = [value for of_one in chosen.adam.state.values() for value in of_one.values()]
    held = {
        "parameters": sum(parameter.nbytes for parameter in model.parameters()),
        "Adam's state": sum(value.nbytes for value in state if value.dim()),
    }
    return nn.utils.parameters_to_vector(model.parameters()).detach(), held


def lesson(settings: Settings, world: World) -> dict[str, Any]:
    """Train with the whole of Adam's state on each rank, then with a part of it; compare."""
    if settings.batch_size % world.size:
        raise ConfigError(
            f"{world.size} ranks cannot share --batch-size {settings.batch_size} evenly; "
            f"{-(-settings.batch_size // world.size) * world.size} would do"
        )
    expected, plain = train(PlainAdam, settings, world)
    ours, sharded = train(ShardedAdam, settings, world)
    each: list[Any] = [None] * world.size
    dist.all_gather_object(each, {"plain": plain, "sharded": sharded})
    difference = (ours - expected).abs().max().item()
    if world.is_first:
        rows = [
            [rank, way, *(f"{count:,}" for count in held.values())]
            for rank, ways in enumerate(each)
            for way, held in ways.items()
        ]
        print_table(["rank", "Adam", *(f"{name}, bytes" for name in plain)], rows)
        print(f"\nAfter {settings.steps} steps the parameters differ by {difference:.1e} at most.")
    return {"bytes": each, "parameters_differ_by": difference}


if __name__ == "__main__":
    main(Settings, lesson)
