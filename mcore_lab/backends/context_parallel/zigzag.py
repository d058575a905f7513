"""Which tokens a context-parallel rank holds, and which of them attend to which.

Under a causal mask later tokens have more keys to look at. A sequence is therefore cut into twice as
many chunks as there are ranks, and rank r of R holds chunks r and 2R - 1 - r: the work is the same
everywhere. This is the order of Megatron-Core's `get_batch_on_this_cp_rank` and of its rotary
embedding, and for each document of a packed sequence that of Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mcore_lab.errors import LayoutError


class Tile(NamedTuple):
    """A part of the matrix of scores: some queries against some keys, by place in a rank's tokens."""

    queries: slice
    keys: slice
    causal: bool
    """Whether a query sees the keys up to its own place in the tile, instead of all."""

    def with_keys_at(self, start: int) -> Tile:
        """Return the tile for keys that lie `start` tokens further on."""
        keys = slice(self.keys.start + start, self.keys.stop + start)
        return self._replace(keys=keys)


def zigzag_places(lengths: Sequence[int], rank: int, size: int) -> torch.Tensor:
    """Return where the tokens that a rank holds are in the whole sequence, `[tokens / size]`.

    `lengths` are those of the documents, one after the other, padding included; a sequence that is
    not packed is one document. Raises LayoutError for a length that `2 * size` chunks do not divide.
    """
    check_lengths(lengths, size)
    if size == 1:
        return torch.arange(sum(lengths))
    places, start = [torch.arange(0)], 0
    for length in lengths:
        half = length // (2 * size)
        for chunk in (rank, 2 * size - 1 - rank):
            places.append(torch.arange(start + chunk * half, start + (chunk + 1) * half))
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
    """The documents in a rank's tokens, one after the other, each in zigzag order on its own."""

    stored: tuple[int, ...]
    """Tokens of each that a rank holds, padding included; the same on every rank."""
    lengths: tuple[int, ...]
    """Tokens of each over all ranks, padding left out."""

    def over_fewer_ranks(self, size: int) -> Documents:
        """Return the documents where each rank holds what `size` ranks held before."""
        return Documents(stored=tuple(n * size for n in self.stored), lengths=self.lengths)

    def tiles(self, *, rank: int, source: int, size: int, causal: bool) -> list[Tile]:
        """Return which queries of `rank` see which keys of `source`, of `size` ranks.

        Under a causal mask, all queries of a rank come after the first chunk of an earlier rank and
        before its second; and only the second chunk's queries come after a later rank's, which are
        then both seen. What is hidden is in no tile, so each pair of ranks has the same work.
        """
        tiles, start = [], 0
        for stored, length in zip(self.stored, self.lengths, strict=True):
            half = stored // 2
            mine, theirs = (start + _held(stored, length, r, size) for r in (rank, source))
            first_query, last_key = start, theirs
            if causal and source < rank:
                last_key = min(start + half, theirs)
            elif causal and source > rank:
                first_query = start + half
            if first_query < mine and start < last_key:
                queries, keys = slice(first_query, mine), slice(start, last_key)
                tiles.append(Tile(queries, keys, causal and source == rank))
            start += stored
        return tiles


def _held(stored: int, length: int, rank: int, size: int) -> int:
    """Return how many of a document's tokens that are no padding a rank holds; they come first."""
    if size == 1:
        return min(stored, length)
    half = stored // 2
    chunks = (rank, 2 * size - 1 - rank)
    return sum(min(max(length - chunk * half, 0), half) for chunk in chunks)


def sequence_order(documents: Documents, tokens: int, size: int) -> torch.Tensor:
    """Return the places, in `size` ranks' tokens one after the other, of the sequence in order.

    `tokens` is how many each rank holds; those behind the last document stay behind it.
    """
    lengths = [stored * size for stored in documents.stored]
    lengths.append(tokens * size - sum(lengths))
    held = [
        torch.cat([zigzag_places(lengths[:-1], rank, size), _rest(lengths, rank, size)])
        for rank in range(size)
    ]
    return torch.argsort(torch.cat(held))


def _rest(lengths: Sequence[int], rank: int, size: int) -> torch.Tensor:
    each = lengths[-1] // size
    return sum(lengths[:-1]) + rank * each + torch.arange(each)
