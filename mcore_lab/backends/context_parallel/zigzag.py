"""Which tokens a context-parallel rank holds, and which of them attend to which.

Under a causal mask later tokens have more keys to look at. A sequence is therefore cut into twice
as many chunks as there are ranks, and rank r of R holds chunks r and 2R - 1 - r: the work is the
same everywhere. This is the order of Megatron-Core's `get_batch_on_this_cp_rank` and of its rotary
embedding, and for each document of a packed sequence that of Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mcore_lab.errors import LayoutError


class Tile(NamedTuple):
    """A part of the matrix of scores: some queries against some keys, by place on their ranks."""

    queries: slice
    keys: slice
    causal: bool
    """Whether a query sees the keys up to its own place in the tile, instead of all."""


def zigzag_places(lengths: Sequence[int], rank: int, size: int) -> torch.Tensor:
    """Return where the tokens that a rank holds are in the whole sequence, `[tokens / size]`.

    `lengths` are those of the documents, one after the other, padding included; a sequence that is
    not packed is one document. Raises LayoutError for one that `2 * size` chunks do not divide.
    """
    check_lengths(lengths, size)
    if size == 1:
        return torch.arange(sum(lengths))
    places, start = [torch.arange(0)], 0
    for length in lengths:
        half = length // (2 * size)
        firsts = (start + chunk * half for chunk in (rank, 2 * size - 1 - rank))
        places.extend(torch.arange(first, first + half) for first in firsts)
        start += length
    return torch.cat(places)


def check_lengths(lengths: Sequence[int], size: int) -> None:
    """Raise LayoutError unless each document can be cut into `2 * size` chunks."""
    chunks = 2 * size
    uneven = sorted({length for length in lengths if length % chunks}) if size > 1 else []
    if uneven:
        raise LayoutError(
            f"context parallelism over {size} ranks cuts each sequence, and each document of a "
            f"packed one, into 2·{size} = {chunks} chunks, which lengths {uneven} do not allow; "
            f"pad them to {[-(-length // chunks) * chunks for length in uneven]}"
        )


@dataclass(frozen=True, kw_only=True)
class Documents:
    """What the tokens are that ranks share: documents, each in zigzag order on its own."""

    ranks: int
    """How many share them."""
    tokens: int
    """Tokens that each rank holds; those behind the last document see nothing."""
    stored: tuple[int, ...]
    """Tokens of each document that a rank holds, padding included; the same on every rank."""
    lengths: tuple[int, ...]
    """Tokens of each document over all ranks, padding left out."""

    @classmethod
    def one_sequence(cls, tokens: int, ranks: int) -> Documents:
        """Return the one document of a sequence of which each rank holds `tokens`.

        Raises LayoutError for an odd number of tokens, which zigzag order cannot be.
        """
        check_lengths([tokens * ranks], ranks)
        return cls(ranks=ranks, tokens=tokens, stored=(tokens,), lengths=(tokens * ranks,))

    def tiles(
        self, of_queries: Sequence[int], of_keys: Sequence[int], *, causal: bool
    ) -> list[Tile]:
        """Return which queries see which keys, the tokens of some ranks against those of others.

        Several ranks' tokens lie one after the other. What is hidden is in no tile.
        """
        return [
            tile
            for row, rank in enumerate(of_queries)
            for column, source in enumerate(of_keys)
            for tile in self._pair(rank, source, causal, row * self.tokens, column * self.tokens)
        ]

    def _pair(
        self, rank: int, source: int, causal: bool, first_query: int, first_key: int
    ) -> Iterator[Tile]:
        """Yield a tile a document.

        Under a causal mask, all queries of a rank come after the first chunk of an earlier rank and
        before its second; and only those of its own second chunk come after a later rank's chunks,
        and see both. So each pair of ranks has the same work.
        """
        for stored, length in zip(self.stored, self.lengths, strict=True):
            half = stored // 2
            mine, theirs = (_held(stored, length, r, self.ranks) for r in (rank, source))
            hidden_queries = half if causal and source > rank else 0
            seen_keys = min(half, theirs) if causal and source < rank else theirs
            if hidden_queries < mine and seen_keys:
                yield Tile(
                    slice(first_query + hidden_queries, first_query + mine),
                    slice(first_key, first_key + seen_keys),
                    causal and source == rank,
                )
            first_query += stored
            first_key += stored


def _held(stored: int, length: int, rank: int, ranks: int) -> int:
    """Return how many of a document's tokens that are no padding a rank holds; they come first."""
    if ranks == 1:
        return min(stored, length)
    half = stored // 2
    chunks = (rank, 2 * ranks - 1 - rank)
    return sum(min(max(length - chunk * half, 0), half) for chunk in chunks)
