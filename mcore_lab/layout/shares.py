"""What each rank holds of a model and of a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from mcore_lab.layout.rules.case import Case, DataShape, ModelShape
from mcore_lab.layout.rules.pipeline import decoder_layers, stages_of

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
    ends = list(accumulate(_layer_counts(case), initial=0))
    yield from pairwise(ends)


def _layer_counts(case: Case) -> Sequence[int]:
    """Return the layers of each stage, as `get_num_layers_to_build` counts them.

    Source: megatron/core/transformer/transformer_block.py, 0.16.1 to 0.19.
    """
    pp, vpp = case.layout.pp, case.layout.vpp
    written = case.of_model("pipeline_model_parallel_layout")
    if written:
        return [decoder_layers(stage) for stage in stages_of(written)]
    first = case.of_model("num_layers_in_first_pipeline_stage")
    last = case.of_model("num_layers_in_last_pipeline_stage")
    embedding = bool(case.of_model("account_for_embedding_in_pipeline_split"))
    loss = bool(case.of_model("account_for_loss_in_pipeline_split"))
    between = pp - (first is not None) - (last is not None)
    rest = case.model.num_layers - (first or 0) - (last or 0) + embedding + loss
    even = rest // between if between else 0
    ranks = [even] * pp
    if first is not None:
        ranks[0] = first
    if last is not None:
        ranks[-1] = last
    counts = [layers // vpp for layers in ranks] * vpp
    counts[0] -= embedding
    counts[-1] -= loss
    return counts


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
