"""What the stages of a pipeline did: recorded while they run, drawn as a timeline afterwards."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class StageRecord:
    """What one stage ran, in its order, and how many micro-batches it held at most."""

    passes: list[str] = field(default_factory=list)
    """`F3` and `B3` are micro-batch 3's way forward and back."""
    busy_seconds: float = 0.0
    most_held: int = 0

    @contextmanager
    def runs(self, name: str, device: torch.device) -> Iterator[None]:
        """Record a pass, and the time that its computation took."""
        started = now(device)
        yield
        self.busy_seconds += now(device) - started
        self.passes.append(name)


def now(device: torch.device) -> float:
    """Return the time in seconds once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def in_slots(passes: Sequence[Sequence[str]]) -> list[list[str]]:
    """Put what each stage ran into slots; a slot in which it waited is empty.

    A pass takes one slot, and starts once its stage is free and the stage that it gets its input
    from has run it. Raises ValueError for passes that wait for each other.
    """
    waiting = [deque(of_stage) for of_stage in passes]
    lines: list[list[str]] = [[] for _ in passes]
    done: set[tuple[int, str]] = set()
    while any(waiting):
        running = [
            left.popleft() if left and _has_input(stage, left[0], len(passes), done) else ""
            for stage, left in enumerate(waiting)
        ]
        if not any(running):
            raise ValueError(f"these passes wait for each other: {list(map(list, waiting))}")
        done.update(enumerate(running))
        for line, name in zip(lines, running, strict=True):
            line.append(name)
    return lines


def _has_input(stage: int, name: str, stages: int, done: set[tuple[int, str]]) -> bool:
    source = stage - 1 if name.startswith("F") else stage + 1
    return not 0 <= source < stages or (source, name) in done


def idle_share(slots: Sequence[Sequence[str]]) -> float:
    """Return which part of all stages' slots is empty."""
    return sum(line.count("") for line in slots) / sum(map(len, slots))


def drawn(slots: Sequence[Sequence[str]]) -> str:
    """Return the timeline as text, a line a stage; a dot is an empty slot."""
    width = max(len(name) for line in slots for name in line)
    lines = (" ".join((name or ".").ljust(width) for name in line) for line in slots)
    return "\n".join(f"stage {stage}  {line}".rstrip() for stage, line in enumerate(lines))
