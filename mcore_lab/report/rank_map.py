"""The map of ranks: a box a rank, by pipeline stage and by replica, with what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mcore_lab.layout import RankShare

_BOX_WIDTH, _LINE, _PAD, _GAP = 190, 17, 10, 14
_LEFT, _TOP = 70, 64
COLOURS = ("#dbeafe", "#dcfce7", "#fef3c7", "#fce7f3", "#ede9fe", "#ffedd5", "#cffafe", "#e2e8f0")


def rank_map_svg(title: str, shares: Sequence[RankShare]) -> str:
    """Return an SVG of the ranks: a column a pipeline stage, a row each of the other ranks.

    Boxes of one colour hold the same slice of the weights (the same tensor-parallel rank).
    """
    stages = max(share.coordinates.pp for share in shares) + 1
    columns = [[s for s in shares if s.coordinates.pp == stage] for stage in range(stages)]
    lines = max(len(_lines(share)) for share in shares)
    height = lines * _LINE + 2 * _PAD
    width = _LEFT + stages * (_BOX_WIDTH + _GAP)
    total = _TOP + max(map(len, columns)) * (height + _GAP) + _PAD
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{total}" '
        f'viewBox="0 0 {width} {total}" font-family="ui-sans-serif, sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_PAD}" y="24" font-size="16" font-weight="600">{escape(title)}</text>',
    ]
    for stage, column in enumerate(columns):
        x = _LEFT + stage * (_BOX_WIDTH + _GAP)
        parts.append(f'<text x="{x}" y="{_TOP - 12}" fill="#475569">pipeline stage {stage}</text>')
        parts += [
            _box(share, x, _TOP + row * (height + _GAP), height) for row, share in enumerate(column)
        ]
    for row, share in enumerate(columns[0]):
        y = _TOP + row * (height + _GAP) + height / 2
        parts.append(f'<text x="{_PAD}" y="{y}" fill="#475569">dp {share.coordinates.dp}</text>')
        parts.append(
            f'<text x="{_PAD}" y="{y + _LINE}" fill="#475569">cp {share.coordinates.cp}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def _box(share: RankShare, x: int, y: int, height: int) -> str:
    colour = COLOURS[share.coordinates.tp % len(COLOURS)]
    head, *rest = _lines(share)
    texts = [
        f'<text x="{x + _PAD}" y="{y + _PAD + 12}" font-weight="600">{escape(head)}</text>',
        *(
            f'<text x="{x + _PAD}" y="{y + _PAD + 12 + (n + 1) * _LINE}">{escape(text)}</text>'
            for n, text in enumerate(rest)
        ),
    ]
    frame = (
        f'<rect x="{x}" y="{y}" width="{_BOX_WIDTH}" height="{height}" rx="6" '
        f'fill="{colour}" stroke="#94a3b8"/>'
    )
    return "\n".join([frame, *texts])


def _lines(share: RankShare) -> list[str]:
    at = share.coordinates
    lines = [
        f"rank {share.rank}",
        f"tp {at.tp}  cp {at.cp}  dp {at.dp}  pp {at.pp}",
        f"layers {spans(share.layers)}",
        f"tokens {spans(share.sequence) or 'of each document'}",
    ]
    if share.experts:
        lines.insert(2, f"ep {at.ep}  etp {at.etp}  edp {at.edp}")
        lines.append(f"experts {spans([share.experts])}")
    return lines


def spans(several: Sequence[tuple[int, int]]) -> str:
    """Return spans as a person reads them: `0-4, 20-24`, the last one included."""
    return ", ".join(
        "none" if first == end else f"{first}" if end - first == 1 else f"{first}-{end - 1}"
        for first, end in several
    )
