"""The timeline of a step as a picture: a row a rank, with what it computed, sent and waited for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mcore_lab.report.communication import KIND_COLOURS, OTHER, colour_of
from mcore_lab.report.matching import MESSAGES, Meeting, Place, blocked, waited
from mcore_lab.report.rank_trace import RankTrace, Step
from mcore_lab.report.svg import (
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    WAIT,
    amount,
    box,
    legend,
    line,
    picture,
    text,
    ticks,
)
from mcore_lab.report.timeline import PASSES, Piece, bubble, timeline

MOST_RANKS = 16
"""Rows that are drawn; of more ranks, those of the first pipelines."""
_WIDTH, _LEFT, _RIGHT, _TOP = 1240, 150, 20, 96
_LANE, _THIN, _GAP = 30, 9, 12
_SHADES = {
    "forward": (SKY, "#2f8fc8", "#1b6a9a", "#0f4d73"),
    "backward": (ORANGE, "#b97f00", "#8f6200", "#6b4900"),
}
"""Of each model chunk, the first the lightest."""
_COLOURS = {"wait": WAIT, "send": GREEN, "receive": PURPLE, "optimizer": "#ffffff"}
_DARK_FROM = 1
"""The chunk from which on the numbers in its passes are white."""
_DIGIT = 7.0


def timeline_svg(
    name: str, traces: Sequence[RankTrace], found: Mapping[Place, Meeting], step: int
) -> str:
    """Return an SVG of one step; `found` is what `meetings` returns."""
    shown = _shown(traces)
    lanes = timeline(traces, found, step)
    span = _span(shown, step)
    scale = (_WIDTH - _LEFT - _RIGHT) / (span.end - span.begin)
    row = _LANE + _THIN + _GAP
    bottom = _TOP + len(shown) * row
    parts = list(_axis(span, scale, bottom))
    for number, trace in enumerate(shown):
        y = _TOP + number * row
        at = trace.coordinates
        parts.append(text(12, y + 14, f"rank {trace.rank}", weight=600))
        where = [f"{axis} {at[axis]}" for axis in ("pp", "dp", "cp", "tp") if trace.sizes[axis] > 1]
        parts.append(text(12, y + 28, "  ".join(where), fill=FAINT))
        parts += _lane(lanes[trace.rank], span, scale, y)
        parts += _collectives(trace, found, span, scale, y + _LANE + 1)
    parts += _legend(shown, step)
    return picture(_WIDTH, bottom + 34, _title(name, traces, step), parts, _remark(traces, found))


def typical_step(traces: Sequence[RankTrace]) -> int:
    """Return the step of median length: what one slow moment has drawn out is not typical."""
    steps = sorted(traces[0].steps, key=lambda step: step.end - step.begin)
    return steps[(len(steps) - 1) // 2].step


def _shown(traces: Sequence[RankTrace]) -> list[RankTrace]:
    """Return the ranks to draw: pipeline by pipeline, its stages in order."""
    axes = ("dp", "cp", "tp", "pp")
    in_order = sorted(traces, key=lambda trace: [trace.coordinates[axis] for axis in axes])
    return in_order[: max(MOST_RANKS, traces[0].sizes["pp"])]


def _span(traces: Sequence[RankTrace], number: int) -> Step:
    steps = [step for trace in traces for step in trace.steps if step.step == number]
    return Step(number, min(step.begin for step in steps), max(step.end for step in steps))


def _title(name: str, traces: Sequence[RankTrace], step: int) -> str:
    sizes, microbatches = traces[0].sizes, traces[0].microbatches
    ranks = f"{len(traces)} rank{'s' * (len(traces) > 1)}"
    stages = f", {sizes['pp']} stages" * (sizes["pp"] > 1)
    chunks = f" of {sizes['vpp']} chunks" * (sizes["vpp"] > 1)
    several = f"{microbatches} micro-batch{'es' * (microbatches > 1)}"
    return f"{name}, step {step}: {ranks}{stages}{chunks}, {several}"


def _remark(traces: Sequence[RankTrace], found: Mapping[Place, Meeting]) -> str:
    if (idle := bubble(traces, found)) is None:
        return "no pipeline: nothing is handed from stage to stage"
    formula = "(p-1)/(m+p-1)" if idle.chunks == 1 else "(p-1)/(v·m+p-1)"
    return (
        f"bubble {idle.measured:.1%} of the pipeline's time, a mean over traced steps; "
        f"{formula} = {idle.ideal:.1%}"
    )


def _axis(span: Step, scale: float, bottom: float) -> Iterator[str]:
    for tick in ticks((span.end - span.begin) / 1e3, 10):
        x = _LEFT + tick * 1e3 * scale
        yield line(x, _TOP - 6, x, bottom)
        yield text(x, bottom + 16, f"{tick:g}", fill=FAINT, anchor="middle")
    yield text(12, bottom + 16, "milliseconds", fill=FAINT)


def _lane(pieces: Sequence[Piece], span: Step, scale: float, y: float) -> Iterator[str]:
    for piece in pieces:
        x, width = _LEFT + (piece.begin - span.begin) * scale, (piece.end - piece.begin) * scale
        told = f"{piece.what}: {(piece.end - piece.begin) / 1e3:.3f} ms"
        if piece.kind not in PASSES:
            edge = FAINT if piece.kind == "optimizer" else "none"
            height = _LANE if piece.kind == "optimizer" else _LANE - 10
            top = y + (_LANE - height) / 2
            yield box(x, top, width, height, _COLOURS[piece.kind], title=told, stroke=edge)
            if piece.kind == "optimizer" and width > 60:
                yield text(x + width / 2, y + 19, "optimizer", size=11, anchor="middle")
            continue
        shades = _SHADES[piece.kind]
        fill = shades[min(piece.chunk, len(shades) - 1)]
        yield box(x, y, width, _LANE, fill, title=told, stroke="white")
        label = str(piece.microbatch)
        if width > _DIGIT * len(label) + 3:
            ink = "#ffffff" if piece.chunk >= _DARK_FROM else INK
            yield text(x + width / 2, y + 19, label, fill=ink, anchor="middle")


def _collectives(
    trace: RankTrace, found: Mapping[Place, Meeting], span: Step, scale: float, y: float
) -> Iterator[str]:
    yield line(_LEFT, y + _THIN, _WIDTH - _RIGHT, y + _THIN)
    for number, call in trace.of_step(span.step):
        group = trace.groups[call.group]
        if (call.op in MESSAGES and call.role) or len(group.ranks) == 1:
            continue
        alone = waited(call, found.get((trace.rank, number))) / 1e3
        for begin, end in blocked(call):
            x = _LEFT + (begin - span.begin) * scale
            told = (
                f"{call.op} of {amount(call.size)} over {group.kind} ({len(group.ranks)} ranks): "
                f"{(end - begin) / 1e3:.3f} ms, of them {alone:.3f} until all ranks were there"
            )
            width = max((end - begin) * scale, 0.4)
            yield box(x, y, width, _THIN - 1, colour_of(group.kind), title=told)


def _legend(traces: Sequence[RankTrace], step: int) -> list[str]:
    chunks = traces[0].sizes["vpp"]
    passes = [
        (kind + (f" of chunk {chunk}" if chunks > 1 else ""), _SHADES[kind][min(chunk, 3)])
        for kind in PASSES
        for chunk in range(chunks)
    ]
    is_pipeline = traces[0].sizes["pp"] > 1
    names = {
        "wait": "waits for the other stage",
        "send": "sends",
        "receive": "receives",
    }
    shown = [(words, _COLOURS[kind]) for kind, words in names.items() if is_pipeline]
    shown.append(("optimizer", _COLOURS["optimizer"]))
    first, _ = legend(_LEFT, 64, [*passes, *shown])
    kinds = {
        trace.groups[call.group].kind
        for trace in traces
        for _, call in trace.of_step(step)
        if not call.role and len(trace.groups[call.group].ranks) > 1
    }
    named = [(kind, KIND_COLOURS[kind]) for kind in KIND_COLOURS if kind in kinds]
    other = [("other groups", OTHER)] if kinds - KIND_COLOURS.keys() else []
    if not named and not other:
        return first
    words = text(_LEFT, 82, "thin, below: collectives over", fill=FAINT)
    second, _ = legend(_LEFT + 178, 82, [*named, *other])
    return [*first, words, *second]
