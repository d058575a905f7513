"""Data parallelism: each rank has the whole model, and samples of its own.

Why: the samples of a batch do not need each other. Each rank goes forward and backward over its
share, the gradients are averaged by an all-reduce, and all take the same step: that of one rank
with the whole batch. Nobody needs to wait for the end of the backward: the last layer's gradients
are ready first. They lie in buckets in the order in which they become ready, and with `--overlap` a
bucket's all-reduce starts when its last gradient is there, and goes on beside the backward.

What to look at: losses differ from rank to rank, for they are of different samples; their mean is
the loss of one rank with all samples, and the parameters stay equal. Then the time of a step, with
overlap and without. On CPU both need the same cores: only waiting is saved, and nothing where there
is none. On GPUs the links between them would else be idle.
Source: Li et al., "PyTorch Distributed", VLDB 2020, arXiv:2006.15704, section 3.2.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mcore_lab.errors import ConfigError
from mcore_lab.lessons.start import main
from mcore_lab.report.tables import print_table
from mcore_lab.runtime import World


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the lesson can be given."""

    num_layers: int = 8
    """Linear layers, a nonlinearity after each."""
    hidden_size: int = 512
    """h, the width of every layer."""
    batch_size: int = 64
    """b, samples of a step, of all ranks together."""
    steps: int = 5
    """Of gradient descent, towards random targets."""
    lr: float = 0.5  # the learning rate
    overlap: bool = False
    """Train with a reduction that begins while the backward goes on; else it is all after it."""
    bucket_mib: float = 2.0
    """A bucket is full when it has this many MiB of gradients."""
    timed_steps: int = 20
    """How many steps are timed, with overlap and without."""
    seed: int = 42  # decides weights and samples


class Bucket:
    """The gradients of some parameters, one after the other in a flat tensor."""

    def __init__(self, parameters: list[nn.Parameter], group: ProcessGroup) -> None:
        self.group, self.parameters = group, parameters
        self.flat = torch.cat([torch.zeros_like(parameter).view(-1) for parameter in parameters])
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, self.flat.split(sizes), strict=True):
            # The backward adds to a gradient that is there: nothing need be copied.
            parameter.grad = part.view_as(parameter)
        self.begin()

    def begin(self) -> None:
        """Make ready for a backward."""
        self.flat.zero_()
        self.missing = len(self.parameters)
        self.work: dist.Work | None = None

    def one_is_there(self, _: Tensor) -> None:
        """Start to reduce when this gradient was the last that was missing."""
        self.missing -= 1
        if self.missing == 0:
            self.start()

    def start(self) -> None:
        """Start to average the gradients over the ranks."""
        self.flat /= self.group.size()
        self.work = dist.all_reduce(self.flat, group=self.group, async_op=True)

    def finish(self) -> None:
        """Wait until the gradients are averages, after a start if nothing has started it."""
        if self.work is None:
            self.start()
        assert self.work
        self.work.wait()


class Replica:
    """A copy of the model on each rank of a group, which all take the same steps."""

    def __init__(
        self, model: nn.Module, group: ProcessGroup, settings: Settings, overlap: bool
    ) -> None:
        self.model, self.buckets = model, list[Bucket]()
        self.optimizer = torch.optim.SGD(model.parameters(), settings.lr)
        filling: list[nn.Parameter] = []
        # The backward comes to the last layer first.
        for parameter in reversed(list(model.parameters())):
            filling.append(parameter)
            full = sum(other.nbytes for other in filling) >= settings.bucket_mib * 2**20
            if full or parameter is next(model.parameters()):
                self.buckets.append(Bucket(filling, group))
                filling = []
        for bucket in self.buckets if overlap else ():
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(bucket.one_is_there)

    def step(self, x: Tensor, target: Tensor) -> float:
        """Take a step on this rank's samples `[b / n, h]`, and return their loss before it."""
        for bucket in self.buckets:
            bucket.begin()
        loss = F.mse_loss(self.model(x), target)
        loss.backward()
        for bucket in self.buckets:
            bucket.finish()
        self.optimizer.step()
        return loss.item()


def deep_mlp(num_layers: int, hidden_size: int, seed: int) -> nn.Sequential:
    """Return a whole model, with the same weights on all ranks: `[b, h]` to `[b, h]`."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    for _ in range(num_layers):
        linear = nn.Linear(hidden_size, hidden_size)
        nn.init.kaiming_normal_(linear.weight)
        model.extend([linear, nn.GELU()])
    return model


def lesson(settings: Settings, world: World) -> dict[str, Any]:
    """Train on this rank's samples, and alone on all of them; then time steps."""
    n, device, everyone = world.size, world.device.type, dist.group.WORLD
    if settings.batch_size % n:
        raise ConfigError(
            f"{n} ranks cannot share --batch-size {settings.batch_size} evenly; "
            f"{-(-settings.batch_size // n) * n} would do"
        )
    alone, _ = dist.new_subgroups(group_size=1)
    assert everyone

    def replica(group: ProcessGroup, overlap: bool) -> Replica:
        model = deep_mlp(settings.num_layers, settings.hidden_size, settings.seed).to(device)
        return Replica(model, group, settings, overlap)

    split, whole = replica(everyone, settings.overlap), replica(alone, overlap=False)
    draw = torch.Generator().manual_seed(settings.seed + 1)
    shape = 2, settings.batch_size, settings.hidden_size
    x, target = torch.randn(shape, generator=draw).to(device)
    own = x[world.rank :: n], target[world.rank :: n]
    losses: list[list[float]] = []
    for _ in range(settings.steps):
        of_ranks: list[Any] = [None] * n
        dist.all_gather_object(of_ranks, split.step(*own))
        losses.append([*of_ranks, statistics.mean(of_ranks), whole.step(x, target)])
    ours, expected = (nn.utils.parameters_to_vector(r.model.parameters()) for r in (split, whole))
    least, most = ours.detach().clone(), ours.detach().clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    ways = {"after the backward": False, "overlapping it": True}
    replicas = {way: replica(everyone, overlap) for way, overlap in ways.items()}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(settings.timed_steps):
        for way, timed in replicas.items():
            start = time.perf_counter()
            timed.step(*own)  # its loss is a number: the device has come as far
            times[way].append(time.perf_counter() - start)
    found = {
        "losses": losses,
        "parameters_differ_by": (most - least).max().item(),
        "from_one_rank_by": (ours - expected).abs().max().item(),
        "buckets": len(split.buckets),
        "seconds": {way: statistics.median(seconds) for way, seconds in times.items()},
    }
    if world.is_first:
        _tell(found, n)
    return found


def _tell(found: dict[str, Any], n: int) -> None:
    columns = [*(f"rank {rank}'s loss" for rank in range(n)), "their mean", "one rank, all samples"]
    print_table(columns, [[f"{loss:.6f}" for loss in step] for step in found["losses"]])
    print(f"\nThe parameters of the ranks differ by {found['parameters_differ_by']}; from those of")
    print(f"one rank with all samples they differ by {found['from_one_rank_by']:.0e} at most.\n")
    rows = [[way, f"{1000 * median:.2f}"] for way, median in found["seconds"].items()]
    print_table([f"reduction, buckets: {found['buckets']}", "ms a step, median"], rows)


if __name__ == "__main__":
    main(Settings, lesson)
