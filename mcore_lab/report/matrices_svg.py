"""How each matrix of a layer is cut, as a picture: a card a matrix, a band a rank of its group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mcore_lab.layout import ParallelLayout
from mcore_lab.layout.matrices import MatrixCut
from mcore_lab.report.rank_map import COLOURS, spans
from mcore_lab.report.svg import FAINT, LINE, box, picture, text, width_of

_PLACES = {
    "embedding": "first stage",
    "attention": "each layer",
    "mlp": "each layer",
    "experts": "each layer",
    "output": "last stage",
}
"""Where in the pipeline a part of the model is."""
_WIDTH, _PAD, _ACROSS, _GAP = 1240, 12, 4, 10
_CARD, _HEIGHT, _DRAWN, _TALLEST = 296, 224, 240, 100
_SHORTEST, _VECTOR, _BAND = 44, 10, 12
_MOST_TOLD = 4
"""Parts whose rows or columns are written out; of more, the rule is."""
_MOST_EXPERT_RANKS = 8
_WHOLE = "#e9edf2"


def matrices_svg(
    name: str, layout: ParallelLayout, cuts: Sequence[MatrixCut], world_size: int
) -> str:
    """Return an SVG of the matrices that `layout.matrices.matrix_cuts` returns.

    The longer side of each is drawn in full and the other to scale, but for those that would be too
    thin to see.
    """
    parts = list(_who(layout, cuts, world_size))
    top = 62 + 18 * len(parts)
    vectors = [cut for cut in cuts if not cut.columns]
    cards = [_card(cut, layout) for cut in cuts if cut.columns] + [_norms(vectors)]
    for number, card in enumerate(cards):
        x = _PAD + number % _ACROSS * (_CARD + _GAP)
        y = top + number // _ACROSS * (_HEIGHT + _GAP)
        parts += [f'<g transform="translate({x} {y})">', *card, "</g>"]
    bottom = top + -(-len(cards) // _ACROSS) * (_HEIGHT + _GAP) + 4
    ranks = f"{world_size} rank{'s' * (world_size > 1)}"
    remark = "stored as [outputs, inputs]; a bias is cut where the rows are, and else whole"
    if layout.use_distributed_optimizer:
        remark += "; Adam's state of each part is shared out over its data-parallel ranks"
    title = f"{name} on {ranks}: who holds what of each matrix"
    return picture(_WIDTH, bottom, title, parts, remark)


def _who(layout: ParallelLayout, cuts: Sequence[MatrixCut], world_size: int) -> Iterator[str]:
    """Yield a line for each dimension that matrices are cut by: which ranks its parts are."""
    y = 66
    dimensions = [by for by in ("tp", "etp") if any(cut.by == by and cut.bands for cut in cuts)]
    if any(cut.experts for cut in cuts) and layout.ep > 1:
        dimensions.append("ep")
    for by in dimensions:
        size = getattr(layout, by)
        ranks: list[list[int]] = [[] for _ in range(size)]
        for rank in range(world_size):
            ranks[getattr(layout.coordinates(rank, world_size), by)].append(rank)
        told = ";  ".join(f"{by} {part}: {_listed(some)}" for part, some in enumerate(ranks))
        if width_of(told) > _WIDTH - 100:
            told = f"{by} 0: {_listed(ranks[0])};  …  {by} {size - 1}: {_listed(ranks[-1])}"
        yield text(_PAD, y, told)
        y += 18


def _card(cut: MatrixCut, layout: ParallelLayout) -> Iterator[str]:
    yield box(0, 0, _CARD, _HEIGHT, "white", stroke=LINE, radius=6)
    yield text(10, 20, cut.name.removesuffix(".weight"), weight=600)
    yield text(10, 37, cut.what, fill=FAINT, size=11)
    yield text(_CARD - 10, 55, _PLACES[cut.where], fill=FAINT, size=11, anchor="end")
    count = f"{cut.experts} of them, each " if cut.experts else ""
    yield text(10, 55, f"{count}{list(cut.shape)}")
    if cut.experts and layout.ep > 1:
        yield from _of_experts(cut, layout, 10, 64)
    else:
        yield from _matrix(cut, 10, 64, *_size(cut))
    for number, words in enumerate(_told(cut, layout)):
        yield text(10, 182 + 15 * number, words, size=11)


def _norms(cuts: Sequence[MatrixCut]) -> Iterator[str]:
    """Yield a card of the norms: vectors, which every rank that has their layer has whole."""
    yield box(0, 0, _CARD, _HEIGHT, "white", stroke=LINE, radius=6)
    yield text(10, 20, "norms", weight=600)
    yield text(10, 37, "whole on every rank that has their layer", fill=FAINT, size=11)
    for number, cut in enumerate(cuts):
        y = 58 + number * 32
        name = cut.name.removesuffix(".weight")
        yield text(10, y, f"{name} {list(cut.shape)}", size=11)
        yield text(_CARD - 10, y, _PLACES[cut.where], fill=FAINT, size=11, anchor="end")
        yield box(10, y + 5, _DRAWN, _VECTOR, _WHOLE, stroke=FAINT)


def _size(cut: MatrixCut) -> tuple[float, float]:
    """Return how wide and how high a matrix is drawn."""
    longest, parts = max(cut.shape), len(cut.bands)
    across, along = (parts * _BAND * (cut.axis == axis) for axis in (1, 0))
    width = max(_SHORTEST, across, _DRAWN * cut.columns / longest)
    return width, max(_SHORTEST, along, _TALLEST * cut.rows / longest)


def _matrix(cut: MatrixCut, x: float, y: float, width: float, height: float) -> Iterator[str]:
    if cut.axis is None:
        yield box(x, y, width, height, _WHOLE, stroke=FAINT, title=f"all of it: {list(cut.shape)}")
        if height >= 2.5 * _VECTOR:
            yield text(x + width / 2, y + height / 2 + 4, "whole", anchor="middle")
        return
    length = cut.shape[cut.axis]
    for band in cut.bands:
        start, size = band.first / length, (band.end - band.first) / length
        told = f"{cut.by} {band.part}: {_axis(cut)} {spans([(band.first, band.end)])}"
        place = (
            (x, y + start * height, width, size * height)
            if cut.axis == 0
            else (x + start * width, y, size * width, height)
        )
        yield box(*place, COLOURS[band.part % len(COLOURS)], stroke=FAINT, title=told)
        label, of_width, of_height = f"{cut.by} {band.part}", place[2], place[3]
        label = label if width_of(label, 11) + 4 < of_width else f"{band.part}"
        if of_height >= 11 and width_of(label, 11) < of_width:
            middle = (place[0] + of_width / 2, place[1] + of_height / 2 + 4)
            yield text(*middle, label, size=11, anchor="middle")


def _of_experts(cut: MatrixCut, layout: ParallelLayout, x: float, y: float) -> Iterator[str]:
    """Yield a small matrix for each expert-parallel rank, which stands for those that it holds."""
    each = cut.experts // layout.ep
    shown = min(layout.ep, _MOST_EXPERT_RANKS)
    across = 2 if shown <= 4 else 4
    width, height = (_CARD - 20) / across - 8, _TALLEST / (-(-shown // across)) - 16
    for rank in range(shown):
        left = x + rank % across * (width + 8)
        top = y + rank // across * (height + 16)
        which = spans([(rank * each, (rank + 1) * each)])
        told = f"ep {rank}: experts {which}" if across == 2 else f"ep {rank}: {which}"
        yield text(left, top + 9, told, size=11)
        yield from _matrix(cut, left, top + 13, width, height - 2)


def _told(cut: MatrixCut, layout: ParallelLayout) -> Iterator[str]:
    if cut.axis is None and cut.experts:
        yield f"each ep rank has {cut.experts // layout.ep} of them, whole"
        return
    if cut.axis is None:
        group = layout.tp
        yield "whole" + (f" on each of the {group} {cut.by} ranks" if group > 1 else " on its rank")
        return
    parts = getattr(layout, cut.by)
    yield f"each {cut.by} rank has {list(cut.local_shape)}"
    if parts <= _MOST_TOLD:
        for first in range(0, parts, 2):
            yield ";  ".join(
                f"{cut.by} {part}: {_axis(cut)} {spans(cut.held(part))}"
                for part in range(first, min(first + 2, parts))
            )
    else:
        size = cut.bands[0].end
        yield f"{size} {_axis(cut)} each, in the order of {cut.by}"
        yield f"{cut.by} 0: {spans(cut.held(0))};  {cut.by} 1: {spans(cut.held(1))};  …"


def _axis(cut: MatrixCut) -> str:
    return "rows" if cut.axis == 0 else "columns"


def _listed(ranks: Sequence[int]) -> str:
    """Return ranks as a person reads them: `ranks 0, 2, 4, 6`, and of many how many there are."""
    few = ranks if len(ranks) <= 8 else ranks[:6]
    told = ", ".join(map(str, few)) + ("" if few is ranks else f", … ({len(ranks)})")
    return f"rank{'s' * (len(ranks) > 1)} {told}"
