"""Each collective as `torch.distributed` has it, and what it must leave on a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

_ROOT = 0
"""The rank of its group that a collective with a root has for one."""
_VALUES = 1024
"""Inputs are whole numbers below this: fp32 sums those of up to 2**24 / 1024 ranks exactly, in any
order."""
_UNWRITTEN = float("nan")


@dataclass(frozen=True)
class Buffers:
    """A rank's memory for the collectives of its group: two tensors of `[elements]`, fp32.

    `elements` is a multiple of the group's ranks; some collectives take or leave an n-th of it.
    """

    group: dist.ProcessGroup
    ranks: tuple[int, ...]
    """Of the world, in the group's order."""
    place: int
    """This rank's among them."""
    source: torch.Tensor
    result: torch.Tensor

    @classmethod
    def of(
        cls, group: dist.ProcessGroup, ranks: tuple[int, ...], elements: int, device: str
    ) -> Buffers:
        """Allocate both, with zeros."""
        source, result = torch.zeros(2, elements, device=device)
        return cls(group, ranks, dist.get_rank(group), source, result)

    @property
    def is_root(self) -> bool:
        """Whether this rank is the root."""
        return self.place == _ROOT

    def parts(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return a part of the tensor for each rank, `[elements / n]`."""
        return list(tensor.chunk(len(self.ranks)))

    def neighbours(self) -> tuple[int, int]:
        """Return the places before and after this rank's, in a ring."""
        return (self.place - 1) % len(self.ranks), (self.place + 1) % len(self.ranks)

    def given(self, place: int) -> torch.Tensor:
        """Return what the rank at a place of the group begins with, `[elements]`.

        No other rank of the world has the same, so that what came from another group is seen.
        """
        generator = torch.Generator().manual_seed(self.ranks[place])
        numbers = torch.randint(
            _VALUES, self.source.shape, generator=generator, dtype=self.source.dtype
        )
        return numbers.to(self.source.device)

    def everyones(self) -> Iterator[torch.Tensor]:
        """Yield what each rank of the group begins with, in their order."""
        return map(self.given, range(len(self.ranks)))

    def fill(self) -> None:
        """Begin anew."""
        self.source.copy_(self.given(self.place))
        self.result.fill_(_UNWRITTEN)

    def zero(self) -> None:
        """Have numbers that stay as they are when they are summed in place, again and again."""
        self.source.zero_()
        self.result.zero_()


class Operation(NamedTuple):
    """A collective: a call that returns what it has left on this rank, and what that must be.

    Both are None on a rank that it leaves nothing on.
    """

    run: Callable[[Buffers], torch.Tensor | None]
    must_leave: Callable[[Buffers], torch.Tensor | None]


def _broadcast(on: Buffers) -> torch.Tensor:
    dist.broadcast(on.source, group=on.group, group_src=_ROOT)
    return on.source


def _scatter(on: Buffers) -> torch.Tensor:
    part = on.parts(on.result)[on.place]
    parts = on.parts(on.source) if on.is_root else None
    dist.scatter(part, parts, group=on.group, group_src=_ROOT)
    return part


def _gather(on: Buffers) -> torch.Tensor | None:
    parts = on.parts(on.result) if on.is_root else None
    dist.gather(on.parts(on.source)[on.place], parts, group=on.group, group_dst=_ROOT)
    return on.result if on.is_root else None


def _reduce(on: Buffers) -> torch.Tensor | None:
    dist.reduce(on.source, group=on.group, group_dst=_ROOT)
    return on.source if on.is_root else None


def _all_gather(on: Buffers) -> torch.Tensor:
    return _gathered(on, on.parts(on.source)[on.place])


def _all_reduce(on: Buffers) -> torch.Tensor:
    dist.all_reduce(on.source, group=on.group)
    return on.source


def _reduce_scatter(on: Buffers) -> torch.Tensor:
    part = on.parts(on.result)[on.place]
    # torch 2.13 has renamed it.
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(part, on.source, group=on.group)
    return part


def _all_to_all(on: Buffers) -> torch.Tensor:
    dist.all_to_all_single(on.result, on.source, group=on.group)
    return on.result


def _send_recv(on: Buffers) -> torch.Tensor:
    """Every rank sends to the one after it, and receives from the one before it."""
    before, after = on.neighbours()
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, on.source, group=on.group, group_peer=after),
            dist.P2POp(dist.irecv, on.result, group=on.group, group_peer=before),
        ]
    )
    for work in works:
        work.wait()
    return on.result


def _gathered(on: Buffers, part: torch.Tensor) -> torch.Tensor:
    # torch 2.13 has renamed it.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(on.result, part, group=on.group)
    return on.result


def _both_halves(on: Buffers) -> torch.Tensor:
    """Sum a part on each rank, and gather the parts on all: what an all-reduce does."""
    return _gathered(on, _reduce_scatter(on))


def _sum(on: Buffers) -> torch.Tensor:
    total = torch.zeros_like(on.source)
    for given in on.everyones():
        total += given
    return total


def _all_reduced(on: Buffers) -> torch.Tensor:
    total = on.given(on.place)
    dist.all_reduce(total, group=on.group)
    return total


def _own_parts(on: Buffers) -> torch.Tensor:
    """Return the n-th of each rank that is at its own place, one after the other."""
    return torch.cat([on.parts(given)[place] for place, given in enumerate(on.everyones())])


OPERATIONS = {
    "broadcast": Operation(_broadcast, lambda on: on.given(_ROOT)),
    "scatter": Operation(_scatter, lambda on: on.parts(on.given(_ROOT))[on.place]),
    "gather": Operation(_gather, lambda on: _own_parts(on) if on.is_root else None),
    "reduce": Operation(_reduce, lambda on: _sum(on) if on.is_root else None),
    "all-gather": Operation(_all_gather, _own_parts),
    "all-reduce": Operation(_all_reduce, _sum),
    "reduce-scatter": Operation(_reduce_scatter, lambda on: on.parts(_sum(on))[on.place]),
    "all-to-all": Operation(
        _all_to_all,
        lambda on: torch.cat([on.parts(given)[on.place] for given in on.everyones()]),
    ),
    "send-recv": Operation(_send_recv, lambda on: on.given(on.neighbours()[0])),
}
"""By the names of `bandwidth.BUS_FACTORS`."""

BOTH_HALVES = Operation(_both_halves, _all_reduced)
"""A reduce-scatter and an all-gather after it, which must leave what an all-reduce does."""
