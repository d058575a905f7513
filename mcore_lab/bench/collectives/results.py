"""What is measured of collectives, and what is found. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_lab.bench.collectives.groups import GroupKind


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured."""

    kinds: tuple[GroupKind, ...]
    collectives: tuple[str, ...]
    sizes: tuple[int, ...]
    """Bytes of the larger buffer of a rank; rounded up to what the ranks of a group can share."""
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A collective of one size, in all groups of a kind at once."""

    collective: str
    kind: str
    groups: int
    ranks: int
    """Of each group."""
    size: int
    """Bytes of the larger buffer of a rank: S of the definitions in `bandwidth`."""
    bytes_per_rank: int
    """What the busiest rank sends or receives, by those definitions."""
    bytes_counted: int | None
    """What it sent or received, as the kernel counts it; None where it does not: under NCCL."""
    seconds: float
    """Of a call: the median over rounds, of the slowest rank in each."""
    algorithm_bandwidth: float
    """Bytes a second."""
    bus_bandwidth: float
    """Bytes a second."""


@dataclass(frozen=True, kw_only=True)
class Halves:
    """An all-reduce beside a reduce-scatter and an all-gather, which leave the same: seconds."""

    kind: str
    ranks: int
    size: int
    all_reduce_seconds: float
    reduce_scatter_seconds: float
    all_gather_seconds: float
    both_seconds: float
    """Of the two halves, one after the other."""
    ratio: float
    """Theirs by the all-reduce's."""


@dataclass(frozen=True, kw_only=True)
class CollectiveTimes:
    """All that was measured."""

    measurements: list[Measurement]
    halves: list[Halves]
