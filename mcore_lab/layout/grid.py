"""Where each rank stands: one array of ranks with an axis for each parallel dimension."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from mcore_lab.errors import LayoutError, nearest

_EXPERT_AXES = {"tp": "etp", "dp": "edp"}
"""What the axes of `order` are called in the expert grid, where they have other sizes."""


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Where a rank stands in the dense grid (tp, cp, dp, pp) and in the expert grid (…, pp)."""

    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    etp: int
    edp: int


@dataclass(frozen=True, kw_only=True)
class RankGrid:
    """Ranks 0 to world size - 1 in one array; its last axis is that of neighbouring ranks."""

    axes: tuple[str, ...]
    ranks: npt.NDArray[np.int_]

    @classmethod
    def in_order(cls, order: str, sizes: dict[str, int]) -> RankGrid:
        """Lay the ranks out in `order`, closest first, with an axis for each of `sizes`.

        Raises LayoutError where a dimension of more than one rank has no place, or several.
        """
        names = order.split("-")
        if "etp" in sizes:
            names = [_EXPERT_AXES.get(name, name) for name in names]
        if any(names.count(axis) != 1 for axis, size in sizes.items() if size > 1):
            raise LayoutError(f"order {order!r} must name each of tp, cp, ep, dp and pp once")
        known = [name for name in dict.fromkeys([*names, *sizes]) if name in sizes]
        axes = tuple(reversed(known))
        ranks = np.arange(prod(sizes.values())).reshape([sizes[axis] for axis in axes])
        return cls(axes=axes, ranks=ranks)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the position of `rank` on each axis."""
        if not 0 <= rank < self.ranks.size:
            raise LayoutError(f"rank {rank} is not one of 0 to {self.ranks.size - 1}")
        position = np.unravel_index(rank, self.ranks.shape)
        return {axis: int(index) for axis, index in zip(self.axes, position, strict=True)}

    def rank_of(self, **position: int) -> int:
        """Return the rank at `position`, which names every axis."""
        for axis, size in zip(self.axes, self.ranks.shape, strict=True):
            if not 0 <= position[axis] < size:
                raise LayoutError(f"{axis} {position[axis]} is not one of 0 to {size - 1}")
        return int(self.ranks[tuple(position[axis] for axis in self.axes)])

    def groups(self, *axes: str) -> list[tuple[int, ...]]:
        """Return the ranks that differ on `axes` only, a tuple for each position on the others."""
        inner = [i for i, axis in enumerate(self.axes) if axis in axes]
        outer = [i for i, axis in enumerate(self.axes) if axis not in axes]
        size = prod(self.ranks.shape[i] for i in inner)
        rows = self.ranks.transpose(outer + inner).reshape(-1, size)
        return [tuple(row) for row in rows.tolist()]


def groups_of_kind(kind: str, dense: RankGrid, experts: RankGrid) -> list[tuple[int, ...]]:
    """Return the groups of `kind`, from the grid that has all of its axes."""
    if kind == "embedding":
        # A set, as one stage is both the first and the last.
        return [tuple(sorted({stages[0], stages[-1]})) for stages in dense.groups("pp")]
    if kind == "position-embedding":
        return [stages[:1] for stages in dense.groups("pp")]
    axes = kind.split("-")
    for grid in (dense, experts):
        if set(axes) <= set(grid.axes):
            return grid.groups(*axes)
    known = {*dense.axes, *experts.axes, "embedding", "position-embedding"}
    raise LayoutError(f"there are no groups of kind {kind!r}{nearest(kind, sorted(known))}")
