"""Which calls of different ranks are one operation, and since when all of its ranks were there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

from mcore_lab.report.rank_trace import NOT_KNOWN, Call, RankTrace

MESSAGES = ("send", "receive")

Place = tuple[int, int]
"""A rank, and which of its calls."""


class Meeting(NamedTuple):
    """What the other ranks of an operation say of a call."""

    met: float
    """When the last of them called, in microseconds: before, there was nothing to do but wait."""
    partner: Call | None
    """Of a message, the call at its other end."""


def meetings(traces: Sequence[RankTrace]) -> dict[Place, Meeting]:
    """Return for each call when its operation could begin; calls of one rank alone are left out.

    Ranks call the collectives of a group in one order, and messages of one role between two ranks
    arrive in the order in which they were sent: the n-th is the n-th.
    """
    found: dict[Place, Meeting] = {}
    for ranks in _collectives(traces).values():
        for together in zip_longest(*ranks):
            if None not in together:
                met = max(call.begin for _, call in together)
                found |= {place: Meeting(met, None) for place, _ in together}
    sent, received = (_messages(traces, op) for op in MESSAGES)
    for key in sent.keys() & received.keys():
        for (here, one), (there, other) in zip(sent[key], received[key], strict=False):
            met = max(one.begin, other.begin)
            found[here], found[there] = Meeting(met, other), Meeting(met, one)
    return found


def blocked(call: Call) -> Iterator[tuple[float, float]]:
    """Yield from when to when the rank did nothing but this call, in microseconds."""
    if call.wait_begin == NOT_KNOWN:
        yield call.begin, call.end
    else:
        yield call.begin, call.end
        yield call.wait_begin, call.wait_end


def waited(call: Call, meeting: Meeting | None) -> float:
    """Return how long the rank was blocked before all ranks were there, in microseconds."""
    if meeting is None:
        return 0.0
    return sum(max(0.0, min(end, meeting.met) - begin) for begin, end in blocked(call))


def microbatch_of(call: Call, meeting: Meeting | None) -> int:
    """Return the micro-batch of a message; only who sends it knows."""
    if call.op == "receive" and meeting and meeting.partner:
        return meeting.partner.microbatch
    return call.microbatch


_Calls = list[tuple[Place, Call]]


def _collectives(traces: Sequence[RankTrace]) -> Mapping[object, list[_Calls]]:
    """Return the calls of each group: a list for each of its ranks that recorded any."""
    found: dict[object, dict[int, _Calls]] = defaultdict(lambda: defaultdict(list))
    for trace in traces:
        for number, call in enumerate(trace.calls):
            group = trace.groups[call.group]
            if call.op not in MESSAGES and len(group.ranks) > 1:
                key = (group.name, tuple(group.ranks), call.step)
                found[key][trace.rank].append(((trace.rank, number), call))
    return {key: list(ranks.values()) for key, ranks in found.items() if len(ranks) == len(key[1])}  # type: ignore[index]


def _messages(traces: Sequence[RankTrace], op: str) -> dict[object, _Calls]:
    """Return the ends of messages, by who sends, who receives, what for, and the step."""
    found: dict[object, _Calls] = defaultdict(list)
    for trace in traces:
        for number, call in enumerate(trace.calls):
            if call.op == op:
                pair = (trace.rank, call.peer) if op == "send" else (call.peer, trace.rank)
                found[*pair, call.role, call.step].append(((trace.rank, number), call))
    return found
