"""Points in time of this rank that can be compared with those of others."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mcore_lab.runtime import World

Mark = Any
"""A point in time: what `Clock.now` returns."""


class Clock:
    """Takes marks, and says how many microseconds after the trace's beginning each was.

    On CPU a mark is a reading of CLOCK_MONOTONIC, which all processes of a machine share. On CUDA
    it is an event on the current stream, as the CPU is ahead of the GPU; it is brought to the CPU's
    clock at the beginning, where the GPU has nothing else to do. Ranks of several machines take the
    end of a barrier for the same moment.

    All ranks make theirs together.
    """

    now: Callable[[], Mark]
    """Takes a mark."""

    def __init__(self, world: World) -> None:
        self._base: Any = None
        if world.device.type == "cuda":
            self.now = _event
            torch.cuda.synchronize()
            self._base = _event()
            self._base.synchronize()
        else:
            self.now = time.perf_counter_ns
        here = time.perf_counter_ns()
        dist.barrier()
        is_one_machine = world.local_size == world.size
        origin = [time.perf_counter_ns()]
        if is_one_machine:
            dist.broadcast_object_list(origin)
        self._offset = here - origin[0]
        self._origin = origin[0]
        self.words = "CUDA events" if self._base else "CLOCK_MONOTONIC"
        self.words += (
            ", of one machine" if is_one_machine else ", of several machines aligned by a barrier"
        )

    def microseconds(self, mark: Mark) -> float:
        """Return when a mark was; on CUDA, all that came before it must be done."""
        if self._base is None:
            return (mark - self._origin) / 1e3
        return float(self._base.elapsed_time(mark)) * 1e3 + self._offset / 1e3


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
