"""Which chunks of a sequence a rank holds, and which of them see which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """The two of a sequence's 2n chunks that a rank holds, as one of n."""

    rank: int
    size: int
    """n."""
    causal: bool = True
    """Whether a token sees only itself and those before it."""
    zigzag: bool = True
    """Whether rank r holds chunks r and 2n - 1 - r, in place of two that are neighbours."""

    def of(self, rank: int) -> tuple[int, int]:
        """Return the chunks of a rank, the earlier one first."""
        return (rank, 2 * self.size - 1 - rank) if self.zigzag else (2 * rank, 2 * rank + 1)

    def part(self, whole: Tensor) -> Tensor:
        """Return this rank's tokens `[s / n, ...]` of a whole sequence `[s, ...]`."""
        chunks = whole.chunk(2 * self.size)
        return torch.cat([chunks[chunk] for chunk in self.of(self.rank)])

    def tiles(self, step: int, tokens: int) -> Iterator[tuple[slice, slice, bool]]:
        """Yield which of a rank's `tokens` queries see which of the keys that it has at a step.

        At step t those are of the rank t places back. The third value says whether a query sees the
        keys up to its own place only: those are of its own chunk. A chunk that comes later is
        hidden, and in no tile.
        """
        source = (self.rank - step) % self.size
        halves = slice(tokens // 2), slice(tokens // 2, tokens)
        for mine, queries in zip(self.of(self.rank), halves, strict=True):
            for theirs, keys in zip(self.of(source), halves, strict=True):
                if theirs <= mine or not self.causal:
                    yield queries, keys, self.causal and theirs == mine
