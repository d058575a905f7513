"""What a rank's memory is taken by, as bars: weights, gradients, optimizer state, activations."""

from __future__ import annotations

from collections.abc import Sequence

from mcore_lab.report.rank_trace import MEMORY_KINDS, RankTrace
from mcore_lab.report.svg import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    SKY,
    amount,
    box,
    legend,
    line,
    picture,
    text,
    ticks,
    width_of,
)

MOST_RANKS = 16
_COLOURS = dict(zip(MEMORY_KINDS, (BLUE, SKY, GREEN, ORANGE), strict=True))
_LIGHT = (SKY, ORANGE)
_WIDTH, _LEFT, _RIGHT, _TOP, _BAR, _GAP = 1240, 150, 110, 92, 24, 10


def memory_svg(name: str, traces: Sequence[RankTrace]) -> str:
    """Return an SVG with a bar a rank of what its tensors take, by kind."""
    shown = traces[:MOST_RANKS]
    most = max(sum(trace.memory.values()) for trace in shown)
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    bottom = _TOP + len(shown) * (_BAR + _GAP)
    kinds = [kind for kind in MEMORY_KINDS if kind in shown[0].memory]
    words = {"activations": "activations, at most"}
    parts, _ = legend(_LEFT, 66, [(words.get(kind, kind), _COLOURS[kind]) for kind in kinds])
    for tick in ticks(most):
        x = _LEFT + tick * scale
        parts.append(line(x, _TOP - 6, x, bottom))
        parts.append(text(x, bottom + 16, amount(tick), fill=FAINT, anchor="middle"))
    for number, trace in enumerate(shown):
        x, y = float(_LEFT), _TOP + number * (_BAR + _GAP)
        parts.append(text(12, y + 16, f"rank {trace.rank}", weight=600))
        for kind in kinds:
            size = trace.memory[kind]
            parts.append(
                box(x, y, size * scale, _BAR, _COLOURS[kind], title=f"{kind}: {size:,} bytes")
            )
            if size * scale > width_of(amount(size)) + 6:
                ink = INK if _COLOURS[kind] in _LIGHT else "#ffffff"
                middle = x + size * scale / 2
                parts.append(text(middle, y + 16, amount(size), fill=ink, anchor="middle"))
            x += size * scale
        parts.append(text(x + 8, y + 16, amount(sum(trace.memory.values())), weight=600))
    remark = "bytes of tensors: what an allocator or a library takes besides is not counted"
    return picture(_WIDTH, bottom + 34, f"{name}: memory of each rank", parts, remark)
