"""Every collective at every size, in all groups of a kind at once: checked, counted and timed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from mcore_lab.bench.collectives.bandwidth import (
    algorithm_bandwidth,
    bus_bandwidth,
    bytes_per_rank,
)
from mcore_lab.bench.collectives.groups import GroupKind
from mcore_lab.bench.collectives.operations import BOTH_HALVES, OPERATIONS, Buffers, Operation
from mcore_lab.bench.collectives.results import CollectiveTimes, Halves, Measurement, Plan
from mcore_lab.bench.collectives.traffic import Connection, among_ranks, bytes_sent
from mcore_lab.errors import BackendError, RankFailedError
from mcore_lab.runtime import RankLog, World, process_group
from mcore_lab.runtime.together import fail_together

_ALL_REDUCE, _HALVES = "all-reduce", ("reduce-scatter", "all-gather")
_BOTH = " + ".join(_HALVES)
_ELEMENT = 4
"""Bytes of a number in fp32."""
_COPIES = 6
"""Tensors as large as a collective that a rank has at most: its buffers, those that what they hold
is checked with, and those of the library."""
_ROUND_SECONDS = 0.01
"""How long a round is to be at least, so that the barrier before it does not count."""
_MOST_CALLS = 20


class CollectiveError(RankFailedError):
    """A collective that left something else than it must."""


def measure_on_rank(plan: Plan) -> CollectiveTimes:
    """Check, count and time what the plan says, in the process group that is joined for it.

    Raises CollectiveError on every rank if a collective has left a wrong value on one of them, and
    BackendError where the memory is too small.
    """
    found = CollectiveTimes(measurements=[], halves=[])
    with RankLog(int(os.environ.get("RANK", "0"))), process_group() as world:
        with fail_together():
            _require_memory(plan, world)
        for kind in plan.kinds:
            group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in kind.groups])
            for size in dict.fromkeys(rounded_up(size, kind.ranks) for size in plan.sizes):
                bench = Bench(plan, world, kind, group, size)
                bench.require_values()
                counted, seconds = bench.bytes_counted(), bench.seconds()
                found.measurements.extend(
                    _measurement(kind, name, size, seconds[name], counted.get(name))
                    for name in plan.collectives
                )
                if _BOTH in seconds:
                    found.halves.append(_halves(kind, size, seconds))
    # All sizes of one collective, before those of the next.
    order = [(kind.name, name) for kind in plan.kinds for name in plan.collectives]
    found.measurements.sort(key=lambda one: order.index((one.kind, one.collective)))
    return found


def rounded_up(size: int, ranks: int) -> int:
    """Return the bytes of the next fp32 tensor that so many ranks can share evenly."""
    multiple = ranks * _ELEMENT
    return -(-size // multiple) * multiple


class Bench:
    """The collectives of one size in the groups of a kind.

    Every rank of the world takes part in each step, those too that are in no group of the kind.
    """

    def __init__(
        self,
        plan: Plan,
        world: World,
        kind: GroupKind,
        group: dist.ProcessGroup | None,
        size: int,
    ) -> None:
        self._operations = {name: OPERATIONS[name] for name in plan.collectives}
        if {_ALL_REDUCE, *_HALVES} <= self._operations.keys():
            self._operations[_BOTH] = BOTH_HALVES
        self._world, self._kind, self._rounds = world, kind, plan.rounds
        self._buffers: Buffers | None = None
        if group is not None:
            own = next(ranks for ranks in kind.groups if world.rank in ranks)
            self._buffers = Buffers.of(group, own, size // _ELEMENT, world.device.type)

    def require_values(self) -> None:
        """Raise CollectiveError if one of them leaves a wrong value on a rank."""
        for name, operation in self._operations.items():
            left = must = None
            if self._buffers:
                self._buffers.fill()
                left = operation.run(self._buffers)
                must = operation.must_leave(self._buffers)
            with fail_together():
                if left is not None and must is not None:
                    self._compare(name, left, must)

    def _compare(self, name: str, left: torch.Tensor, must: torch.Tensor) -> None:
        wrong = (left != must).nonzero()
        if len(wrong):
            first = int(wrong[0])
            raise CollectiveError(
                f"{name} in the {self._kind.name} groups of {self._kind.ranks} ranks left "
                f"{len(wrong)} of {len(left)} values wrong on rank {self._world.rank}: "
                f"{left[first]:g} at place {first}, where {must[first]:g} must be"
            )

    def bytes_counted(self) -> dict[str, int]:
        """Return for each what the busiest rank sends or receives in a call, if that is counted."""
        if self._world.device.communication != "gloo" or bytes_sent() is None:
            return {}
        sent = [self._sent(operation) for operation in (None, *self._operations.values())]
        sent_by: list[Any] = [None] * self._world.size
        dist.all_gather_object(sent_by, sent)
        barrier, *counted = map(among_ranks, zip(*sent_by, strict=True))
        return {
            name: max(
                max(one.sent - alone.sent, one.received - alone.received)
                for one, alone in zip(ranks, barrier, strict=True)
            )
            for name, ranks in zip(self._operations, counted, strict=True)
        }

    def _sent(self, operation: Operation | None) -> dict[Connection, int]:
        """Return the bytes that this rank sends of a call, and of a barrier after it."""
        dist.barrier()
        before = bytes_sent() or {}
        self._call(operation)
        dist.barrier()  # Every rank has received what was sent to it.
        after = bytes_sent() or {}
        return {
            connection: count - before.get(connection, 0) for connection, count in after.items()
        }

    def seconds(self) -> dict[str, float]:
        """Return how long a call of each takes, side by side in each round.

        Checks and counts come before, so that no connection is new and no memory untouched.
        """
        if self._buffers:
            self._buffers.zero()
        once = torch.tensor([self._seconds(one, 1) for one in self._operations.values()])
        calls = {
            name: max(1, min(_MOST_CALLS, int(_ROUND_SECONDS / seconds)))
            for name, seconds in zip(self._operations, self._largest(once).tolist(), strict=True)
        }
        rounds = []
        for turn in range(self._rounds):
            order = list(self._operations) if turn % 2 == 0 else list(self._operations)[::-1]
            took = {name: self._seconds(self._operations[name], calls[name]) for name in order}
            rounds.append([took[name] for name in self._operations])
        slowest = self._largest(torch.tensor(rounds, dtype=torch.float64)).T.tolist()
        return {
            name: statistics.median(each)
            for name, each in zip(self._operations, slowest, strict=True)
        }

    def _seconds(self, operation: Operation, calls: int) -> float:
        dist.barrier()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            self._call(operation)
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / calls

    def _call(self, operation: Operation | None) -> None:
        if operation and self._buffers:
            operation.run(self._buffers)

    def _largest(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return each number as the rank has it that has the largest."""
        numbers = numbers.to(self._world.device.type)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return numbers


def _measurement(
    kind: GroupKind, name: str, size: int, seconds: float, counted: int | None
) -> Measurement:
    return Measurement(
        collective=name,
        kind=kind.name,
        groups=len(kind.groups),
        ranks=kind.ranks,
        size=size,
        bytes_per_rank=bytes_per_rank(name, kind.ranks, size),
        bytes_counted=counted,
        seconds=seconds,
        algorithm_bandwidth=algorithm_bandwidth(size, seconds),
        bus_bandwidth=bus_bandwidth(name, kind.ranks, size, seconds),
    )


def _halves(kind: GroupKind, size: int, seconds: Mapping[str, float]) -> Halves:
    reduce_scatter, all_gather = (seconds[name] for name in _HALVES)
    return Halves(
        kind=kind.name,
        ranks=kind.ranks,
        size=size,
        all_reduce_seconds=seconds[_ALL_REDUCE],
        reduce_scatter_seconds=reduce_scatter,
        all_gather_seconds=all_gather,
        both_seconds=seconds[_BOTH],
        ratio=seconds[_BOTH] / seconds[_ALL_REDUCE],
    )


def _require_memory(plan: Plan, world: World) -> None:
    largest = max(plan.sizes)
    # The ranks of a machine share its memory, and have a GPU's each for themselves.
    sharing = world.local_size if world.device.type == "cpu" else 1
    needed, (free, _) = largest * _COPIES * sharing, torch.cuda.mem_get_info()
    if needed > free:
        raise BackendError(
            f"collectives of {largest:,} bytes need {needed:,} bytes of memory, and {free:,} are "
            f"free; the largest that fits is {free // (_COPIES * sharing):,} bytes"
        )
