"""The traced steps as a Chrome trace, which chrome://tracing and https://ui.perfetto.dev show.

A process a rank, and in it rows for its steps, for what it computes and hands on, and for its
collectives; arrows lead from where a message is sent to where it has come.
Format: "Trace Event Format", the JSON object form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mcore_lab.report.matching import MESSAGES, Meeting, Place, blocked, waited
from mcore_lab.report.rank_trace import RankTrace
from mcore_lab.report.timeline import timeline

_ROWS = ("step", "schedule", "collectives")
_NAMES = {"cp": "cp", "dp": "dp", "pp": "pp", "tp": "tp"}

Event = dict[str, Any]


def chrome_trace(name: str, traces: Sequence[RankTrace], found: Mapping[Place, Meeting]) -> str:
    """Return the JSON of the trace; `found` is what `meetings` returns."""
    events: list[Event] = []
    for trace in traces:
        events += _processes(trace)
        events += _steps(trace)
        events += _collectives(trace, found)
    for step in {step.step for trace in traces for step in trace.steps}:
        events += _lanes(traces, found, step)
    events += _arrows(traces, found)
    about = {"recipe": name, "ranks": len(traces), "clock": traces[0].clock}
    whole = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}
    return json.dumps(whole, separators=(",", ":"))


def _processes(trace: RankTrace) -> Iterator[Event]:
    where = " ".join(
        f"{axis} {trace.coordinates[axis]}" for axis in _NAMES if trace.sizes[axis] > 1
    )
    described = {"name": f"rank {trace.rank}" + f" ({where})" * bool(where)}
    yield {"ph": "M", "name": "process_name", "pid": trace.rank, "args": described}
    order = {"sort_index": trace.rank}
    yield {"ph": "M", "name": "process_sort_index", "pid": trace.rank, "args": order}
    for tid, row in enumerate(_ROWS):
        yield _of_row(trace, tid, "thread_name", {"name": row})
        yield _of_row(trace, tid, "thread_sort_index", {"sort_index": tid})


def _of_row(trace: RankTrace, tid: int, name: str, args: Event) -> Event:
    return {"ph": "M", "name": name, "pid": trace.rank, "tid": tid, "args": args}


def _steps(trace: RankTrace) -> Iterator[Event]:
    for step in trace.steps:
        yield _slice(f"step {step.step}", "step", trace.rank, 0, step.begin, step.end)


def _lanes(
    traces: Sequence[RankTrace], found: Mapping[Place, Meeting], step: int
) -> Iterator[Event]:
    for rank, lane in timeline(traces, found, step).items():
        for piece in lane:
            name = piece.kind if piece.microbatch < 0 else f"{piece.kind} {piece.microbatch}"
            args = {"step": step, "chunk": piece.chunk, "what": piece.what}
            yield _slice(name, piece.kind, rank, 1, piece.begin, piece.end) | {"args": args}


def _collectives(trace: RankTrace, found: Mapping[Place, Meeting]) -> Iterator[Event]:
    for number, call in enumerate(trace.calls):
        if call.op in MESSAGES and call.role:
            continue
        group = trace.groups[call.group]
        args = {
            "step": call.step,
            "group": group.kind,
            "ranks": group.ranks,
            "bytes": call.size,
            "waited_us": round(waited(call, found.get((trace.rank, number))), 3),
        }
        for begin, end in blocked(call):
            name = f"{call.op} {group.kind}"
            yield _slice(name, group.kind, trace.rank, 2, begin, end) | {"args": args}


def _arrows(traces: Sequence[RankTrace], found: Mapping[Place, Meeting]) -> Iterator[Event]:
    """Yield the two ends of each message between stages, in rows of what is handed on."""
    number = 0
    for trace in traces:
        for place, call in enumerate(trace.calls):
            meeting = found.get((trace.rank, place))
            if call.op != "send" or not call.role or not meeting or not meeting.partner:
                continue
            received = meeting.partner
            (leaves, *_), (*_, comes) = blocked(call), blocked(received)
            ends = (("s", trace.rank, _middle(leaves)), ("f", call.peer, _middle(comes)))
            for phase, rank, at in ends:
                arrow = _event(phase, call.role, "message", rank, 1, at) | {"id": number}
                yield arrow | ({"bp": "e"} if phase == "f" else {})
            number += 1


def _middle(span: tuple[float, float]) -> float:
    return sum(span) / 2


def _slice(name: str, kind: str, rank: int, tid: int, begin: float, end: float) -> Event:
    event = _event("X", name, kind, rank, tid, begin)
    # By its rounded ends: by a rounded length one could reach into the next.
    return event | {"dur": round(round(end, 3) - event["ts"], 3)}


def _event(phase: str, name: str, kind: str, rank: int, tid: int, at: float) -> Event:
    head = {"ph": phase, "name": name, "cat": kind}
    return head | {"pid": rank, "tid": tid, "ts": round(at, 3)}
