"""What a rank sends in a step, by kind of group and by collective, and how long it takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mcore_lab.report.matching import Meeting, Place, blocked, waited
from mcore_lab.report.rank_trace import RankTrace
from mcore_lab.report.svg import (
    BLACK,
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    amount,
    box,
    legend,
    line,
    picture,
    text,
    ticks,
    width_of,
)

KIND_COLOURS = {
    "tp": BLUE,
    "cp": VERMILION,
    "ep": YELLOW,
    "etp": SKY,
    "etp-ep": ORANGE,
    "pp": PURPLE,
    "dp": BLACK,
    "edp": GREEN,
}
OTHER = "#9aa5b1"
"""Of groups that span several dimensions, and of all ranks."""
_DARK = (BLACK, BLUE, GREEN, VERMILION)
_WIDTH, _LEFT, _MIDDLE, _TOP, _BAR, _GAP = 1240, 150, 60, 104, 20, 8
MOST_RANKS = 16


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one kind of group and collective took, per step and rank."""

    group: str
    ranks: int
    """In each group."""
    op: str
    calls: float
    size: float
    """Bytes, by NCCL-tests' definition."""
    sent: float
    """Bytes that a rank has to send."""
    seconds: float
    """That the rank did nothing else."""
    waiting: float
    """Of these, before all ranks of the operation were there."""


def traffic(trace: RankTrace, found: Mapping[Place, Meeting]) -> list[Traffic]:
    """Return what one rank communicated, per step; groups of one rank alone are left out."""
    sums: dict[tuple[str, int, str], list[float]] = defaultdict(lambda: [0.0] * 5)
    for number, call in enumerate(trace.calls):
        group = trace.groups[call.group]
        # Between two interleaved stages half of the messages go over the group of all ranks.
        kind, ranks = ("pp", trace.sizes["pp"]) if call.role else (group.kind, len(group.ranks))
        if ranks == 1:
            continue
        seconds = sum(end - begin for begin, end in blocked(call)) / 1e6
        waiting = waited(call, found.get((trace.rank, number))) / 1e6
        numbers = (1, call.size, call.sent, seconds, waiting)
        of_kind = sums[kind, ranks, call.op]
        for place, added in enumerate(numbers):
            of_kind[place] += added / len(trace.steps)
    return [
        Traffic(
            group=kind,
            ranks=ranks,
            op=op,
            calls=calls,
            size=size,
            sent=sent,
            seconds=seconds,
            waiting=waiting,
        )
        for (kind, ranks, op), (calls, size, sent, seconds, waiting) in sorted(sums.items())
    ]


def mean_traffic(traces: Sequence[RankTrace], found: Mapping[Place, Meeting]) -> list[Traffic]:
    """Return the mean over all ranks, the most bytes first."""
    of_kinds: dict[tuple[str, int, str], list[Traffic]] = defaultdict(list)
    for trace in traces:
        for one in traffic(trace, found):
            of_kinds[one.group, one.ranks, one.op].append(one)
    numbers = ("calls", "size", "sent", "seconds", "waiting")
    means = [
        Traffic(
            group=group,
            ranks=ranks,
            op=op,
            **{name: sum(getattr(one, name) for one in some) / len(traces) for name in numbers},
        )
        for (group, ranks, op), some in of_kinds.items()
    ]
    return sorted(means, key=lambda one: -one.sent)


def colour_of(kind: str) -> str:
    """Return the colour of a kind of group."""
    return KIND_COLOURS.get(kind, OTHER)


def communication_svg(
    name: str, traces: Sequence[RankTrace], found: Mapping[Place, Meeting]
) -> str:
    """Return an SVG of bars: what each rank sends in a step, and the time it takes, by group."""
    shown = traces[:MOST_RANKS]
    of_ranks = [traffic(trace, found) for trace in shown]
    kinds = [kind for kind in KIND_COLOURS if any(one.group == kind for t in of_ranks for one in t)]
    has_other = any(one.group not in KIND_COLOURS for t in of_ranks for one in t)
    names = [(kind, KIND_COLOURS[kind]) for kind in kinds]
    parts, _ = legend(_LEFT, 66, names + [("other groups", OTHER)] * has_other)
    width = (_WIDTH - _LEFT - _MIDDLE - 40) / 2
    bottom = _TOP + len(shown) * (_BAR + _GAP)
    for number, trace in enumerate(shown):
        y = _TOP + number * (_BAR + _GAP) + 14
        parts.append(text(12, y, f"rank {trace.rank}", weight=600))
    for place, (field, title) in enumerate({"sent": "bytes sent", "seconds": "time"}.items()):
        left = _LEFT + place * (width + _MIDDLE)
        parts.append(text(left, _TOP - 12, f"{title} a step", fill=FAINT))
        parts += _bars(of_ranks, field, left, width, bottom)
    title = f"{name}: what ranks send each other in a step"
    remark = (
        "bytes: the least that the operation takes; "
        "time: that in which a rank does nothing else, waiting for others included"
    )
    return picture(_WIDTH, bottom + 34, title, parts, remark)


def _bars(
    of_ranks: Sequence[Sequence[Traffic]], field: str, left: float, width: float, bottom: float
) -> Iterator[str]:
    most = max((sum(getattr(one, field) for one in some) for some in of_ranks), default=0)
    scale = width / most if most else 0
    for tick in ticks(most, 5):
        x = left + tick * scale
        yield line(x, _TOP - 4, x, bottom)
        yield text(x, bottom + 16, _told(tick, field), fill=FAINT, anchor="middle")
    order = [*KIND_COLOURS]
    for number, some in enumerate(of_ranks):
        x, y = left, _TOP + number * (_BAR + _GAP)
        for one in sorted(some, key=lambda t: order.index(t.group) if t.group in order else 99):
            long = getattr(one, field) * scale
            told = (
                f"{one.group} ({one.ranks} ranks), {one.op}: {one.calls:g} calls, "
                f"{amount(one.sent)} sent, {one.seconds * 1e3:.3g} ms of which "
                f"{one.waiting * 1e3:.3g} ms until all ranks were there"
            )
            fill = colour_of(one.group)
            yield box(x, y, long, _BAR, fill, title=told, stroke="white")
            if width_of(one.op, 11) + 6 < long:
                ink = "#ffffff" if fill in _DARK else INK
                yield text(x + long / 2, y + 14, one.op, size=11, fill=ink, anchor="middle")
            x += long


def _told(value: float, field: str) -> str:
    return amount(value) if field == "sent" else f"{value * 1e3:g} ms"
