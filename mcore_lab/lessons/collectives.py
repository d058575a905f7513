"""The collectives: what each rank has before and after, and a ring all-reduce by hand.

Why: every way to train in parallel is made of these few. Whoever knows what each of them moves, and
how much, can read any of the others.

What to look at: the table has two lines a collective, what each rank holds before and after. Rank r
begins with the numbers r0, r1, r2, ... An all-reduce leaves what a reduce-scatter and then an
all-gather leave: so training may do something between the two (see the lesson `zero`). The ring
sends 2 (n - 1) / n of the tensor from each rank, however many ranks there are: hardly more for a
thousand of them than for four. If each rank sent its whole tensor to all others it would be n - 1.
Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
J. Parallel Distrib. Comput. 69 (2009), for the ring; NVIDIA's NCCL documentation for the names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mcore_lab.errors import ConfigError
from mcore_lab.lessons.start import main
from mcore_lab.report.tables import print_table
from mcore_lab.runtime import World


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the lesson can be given."""

    numbers: int = 1_000_000
    """How many numbers each rank brings to the ring all-reduce."""
    seed: int = 42
    """Decides which numbers they are."""


def broadcast(own: torch.Tensor, world: World) -> torch.Tensor:
    """Give everyone what rank 0 has: `[n]` from `[n]`."""
    dist.broadcast(own, src=0)
    return own


def scatter(own: torch.Tensor, world: World) -> torch.Tensor:
    """Give rank r the r-th part of what rank 0 has: `[1]` from `[n]`."""
    part = torch.empty_like(own[:1])
    dist.scatter(part, list(own.split(1)) if world.is_first else None, src=0)
    return part


def gather(own: torch.Tensor, world: World) -> torch.Tensor | None:
    """Give rank 0 what everyone has, one after the other: `[n]` from `[1]`."""
    parts = [torch.empty_like(own) for _ in range(world.size)] if world.is_first else None
    dist.gather(own, parts, dst=0)
    return torch.cat(parts) if parts else None


def reduce(own: torch.Tensor, world: World) -> torch.Tensor | None:
    """Give rank 0 the sum of what everyone has: `[n]` from `[n]`."""
    dist.reduce(own, dst=0)
    # What is left in the tensors of the others is no result; the library may have used them.
    return own if world.is_first else None


def all_gather(own: torch.Tensor, world: World) -> torch.Tensor:
    """Give everyone what everyone has, one after the other: `[n]` from `[1]`."""
    everything = own.new_empty(world.size * own.numel())
    dist.all_gather_into_tensor(everything, own)
    return everything


def reduce_scatter(own: torch.Tensor, world: World) -> torch.Tensor:
    """Give rank r the r-th part of the sum of what everyone has: `[1]` from `[n]`."""
    part = own.new_empty(own.numel() // world.size)
    dist.reduce_scatter_tensor(part, own)
    return part


def all_reduce(own: torch.Tensor, world: World) -> torch.Tensor:
    """Give everyone the sum of what everyone has: `[n]` from `[n]`."""
    dist.all_reduce(own)
    return own


def all_to_all(own: torch.Tensor, world: World) -> torch.Tensor:
    """Give rank r the r-th part of what each has: `[n]` from `[n]`, a transpose over the ranks."""
    parts = torch.empty_like(own)
    dist.all_to_all_single(parts, own)
    return parts


def send_and_receive(own: torch.Tensor, world: World) -> torch.Tensor:
    """Give everyone what the rank to its left has: `[n]` from `[n]`."""
    incoming = torch.empty_like(own)
    exchange(own, incoming, world)
    return incoming


def exchange(outgoing: torch.Tensor, incoming: torch.Tensor, world: World) -> None:
    """Send to the right, receive from the left, both at once: nobody waits for somebody who waits.

    To the right of the last rank is the first.
    """
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    if world.size == 1:
        incoming.copy_(outgoing)
        return
    both = [dist.P2POp(dist.isend, outgoing, right), dist.P2POp(dist.irecv, incoming, left)]
    for work in dist.batch_isend_irecv(both):
        work.wait()


def ring_all_reduce(tensor: torch.Tensor, world: World) -> int:
    """Sum a contiguous tensor over all ranks, in its place; return the bytes this rank has sent.

    The tensor is cut into n chunks. In each of n - 1 steps a rank sends one chunk and adds the one
    that comes to its own: after them rank r has the whole sum of chunk r + 1, which is a
    reduce-scatter. In n - 1 more steps the finished chunks go round, which is an all-gather.
    """
    rank, n, sent = world.rank, world.size, 0
    chunks = tensor.view(-1).tensor_split(n)
    for step in range(n - 1):
        outgoing, own = chunks[(rank - step) % n], chunks[(rank - step - 1) % n]
        incoming = torch.empty_like(own)
        exchange(outgoing, incoming, world)
        own += incoming
        sent += outgoing.nbytes
    for step in range(n - 1):
        outgoing, own = chunks[(rank - step + 1) % n], chunks[(rank - step) % n]
        exchange(outgoing, own, world)
        sent += outgoing.nbytes
    return sent


Collective = Callable[[torch.Tensor, World], torch.Tensor | None]
FROM_ONE_NUMBER: list[Collective] = [gather, all_gather]
FROM_A_NUMBER_FOR_EACH: list[Collective] = [
    *(broadcast, scatter, reduce, reduce_scatter, all_reduce, all_to_all, send_and_receive)
]


def lesson(settings: Settings, world: World) -> dict[str, Any]:
    """Show each collective on a few numbers, and hold the ring to the library's all-reduce."""
    if settings.numbers < world.size:
        raise ConfigError(
            f"a ring of {world.size} ranks cuts the tensor into {world.size} chunks: "
            f"--numbers must not be below {world.size}; it is {settings.numbers}"
        )
    shown: dict[str, list[Any]] = {}
    for collective in (*FROM_A_NUMBER_FOR_EACH, *FROM_ONE_NUMBER):
        count = 1 if collective in FROM_ONE_NUMBER else world.size
        own = torch.arange(count, device=world.device.type) + 10 * world.rank
        before, after = own.tolist(), collective(own, world)
        each: list[Any] = [None] * world.size
        dist.all_gather_object(each, (before, None if after is None else after.tolist()))
        shown[collective.__name__] = each

    draw = torch.Generator().manual_seed(settings.seed + world.rank)
    own = torch.randn(settings.numbers, generator=draw).to(world.device.type)
    expected = all_reduce(own.clone(), world)
    # The parts of a reduce-scatter are of one size: zeros make up what is missing.
    padded = torch.nn.functional.pad(own, (0, -settings.numbers % world.size))
    in_two = all_gather(reduce_scatter(padded, world), world)[: settings.numbers]
    by_ring = own.clone()
    sent = ring_all_reduce(by_ring, world)
    found = {
        "collectives": shown,
        "bytes": own.nbytes,
        "difference_in_two": (in_two - expected).abs().max().item(),
        "difference_by_ring": (by_ring - expected).abs().max().item(),
        "bytes_sent_by_ring": sent,
    }
    if world.is_first:
        _tell(found, world.size)
    return found


def _tell(found: dict[str, Any], n: int) -> None:
    rows: list[list[Any]] = []
    for name, each in found["collectives"].items():
        before, after = zip(*each, strict=True)
        rows += [[name, *map(_plain, before)], ["  after", *map(_plain, after)]]
    print_table(["", *(f"rank {rank}" for rank in range(n))], rows)
    size, sent = found["bytes"], found["bytes_sent_by_ring"]
    print(f"\nOn {size:,} bytes of random numbers, the largest difference from all_reduce:")
    print(f"  reduce_scatter, then all_gather: {found['difference_in_two']:.1e}")
    print(f"  the ring of sends and receives:  {found['difference_by_ring']:.1e}")
    print(f"Rank 0 sent {sent:,} bytes in the ring, {sent / size:.3f} of the tensor;")
    print(f"2 (n - 1) / n is {2 * (n - 1) / n:.3f}.")


def _plain(numbers: list[int] | None) -> str:
    return "-" if numbers is None else " ".join(f"{number:02}" for number in numbers)


if __name__ == "__main__":
    main(Settings, lesson)
