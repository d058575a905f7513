"""What each rank holds of a model and of a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from mcore_lab.layout.rules.case import Case, DataShape, ModelShape
from mcore_lab.layout.rules.pipeline import layer_counts

if TYPE_CHECKING:
    from mcore_lab.layout.grid import Coordinates
    from mcore_lab.layout.parallel import ParallelLayout

Span = tuple[int, int]
"""From the first to before the last, counted from 0."""


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """What one rank holds."""

    rank: int
    coordinates: Coordinates
    layers: tuple[Span, ...]
    """Its layers, a span for each of its model chunks."""
    experts: Span | None
    """Its experts of each mixture-of-experts layer; None in a dense model."""
    sequence: tuple[Span, ...]
    """Its tokens of each sequence: one span, or under context parallelism one from each end.
    Empty where documents are packed: then each of them is split so."""


def rank_shares(
    layout: ParallelLayout, model: ModelShape, data: DataShape, world_size: int
) -> list[RankShare]:
    """Return what each rank holds, in order of rank; the layout must break no rule."""
    case = Case(layout=layout, model=model, data=data, world_size=world_size)
    spans = list(_layer_spans(case))
    shares = []
    for rank in range(world_size):
        at = layout.coordinates(rank, world_size)
        shares.append(
            RankShare(
                rank=rank,
                coordinates=at,
                layers=tuple(spans[chunk * layout.pp + at.pp] for chunk in range(layout.vpp)),
                experts=_part(model.num_moe_experts, at.ep, layout.ep),
                sequence=() if data.pack_documents else _sequence(layout, data, at.cp),
            )
        )
    return shares


def _layer_spans(case: Case) -> Iterator[Span]:
    """Yield each stage's layers, in the order in which a micro-batch goes through the stages."""
    ends = list(accumulate(layer_counts(case), initial=0))
    yield from pairwise(ends)


def _part(whole: int | None, index: int, parts: int) -> Span | None:
    if not whole:
        return None
    size = whole // parts
    return index * size, (index + 1) * size


def _sequence(layout: ParallelLayout, data: DataShape, index: int) -> tuple[Span, ...]:
    """Return a context-parallel rank's chunks of a sequence: number `index` from either end.

    Under a causal mask the first chunk is little work and the last is much: together, all ranks
    have the same. Padding, at the sequence's end, is left out.
    Source: `get_batch_on_this_cp_rank` of megatron/core/utils.py.
    """
    cp, length = layout.cp, data.sequence_length
    if cp == 1:
        return ((0, length),)
    chunk = layout.padded(length) // (2 * cp)
    chunks = ((n * chunk, (n + 1) * chunk) for n in (index, 2 * cp - 1 - index))
    return tuple((min(first, length), min(end, length)) for first, end in chunks)
