"""The timeline of a step: what each rank did when, and how much of the time it did nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

from mcore_lab.report.matching import MESSAGES, Meeting, Place, blocked, microbatch_of
from mcore_lab.report.rank_trace import Call, RankTrace, Slice

KINDS = ("forward", "backward", "wait", "send", "receive", "optimizer")
PASSES = ("forward", "backward")
_OF_PIPELINES = ("tp", "cp", "dp")


class Piece(NamedTuple):
    """What a rank did for a while; times in microseconds."""

    kind: str
    """One of KINDS. A message is `wait` as long as its other end has not come, and then `send` or
    `receive`."""
    begin: float
    end: float
    chunk: int
    microbatch: int
    what: str
    """In words."""


@dataclass(frozen=True, kw_only=True)
class Bubble:
    """How much of the time between a pipeline's first forward and last backward pass is idle.

    A share of all its ranks' time, a mean over pipelines and steps. Idle is all but forward and
    backward passes; what these contain, collectives too, counts as work.
    """

    stages: int
    chunks: int
    """Model chunks of each rank."""
    microbatches: int
    measured: float
    by_stage: tuple[float, ...]
    waiting: float
    """The part of it that ranks waited for another stage to come to a message."""
    moving: float
    """The part of it in which messages were on their way."""

    @property
    def ideal(self) -> float:
        """Return (p-1)/(v*m+p-1): stages of one length, and messages that take no time.

        Source: Narayanan et al., arXiv:2104.04473; v is 1 without interleaving.
        """
        return (self.stages - 1) / (self.chunks * self.microbatches + self.stages - 1)


def timeline(
    traces: Sequence[RankTrace], found: Mapping[Place, Meeting], step: int
) -> dict[int, list[Piece]]:
    """Return what each rank did in a step, in order of time; `found` is what `meetings` returns."""
    return {trace.rank: sorted(_pieces(trace, found, step), key=_begin) for trace in traces}


def bubble(traces: Sequence[RankTrace], found: Mapping[Place, Meeting]) -> Bubble | None:
    """Return what was idle of the pipelines' time; None where there is no pipeline."""
    stages = max(trace.sizes["pp"] for trace in traces)
    if stages == 1:
        return None
    pipelines: dict[object, list[RankTrace]] = defaultdict(list)
    for trace in traces:
        pipelines[tuple(trace.coordinates[axis] for axis in _OF_PIPELINES)].append(trace)
    whole = [ranks for ranks in pipelines.values() if len(ranks) == stages]
    shares = [
        share
        for ranks in whole
        for step in {number for number, _, _ in ranks[0].steps}
        for share in _shares(sorted(ranks, key=lambda t: t.coordinates["pp"]), found, step)
    ]
    if not shares:
        return None
    of_stage = [[share for share in shares if share.stage == stage] for stage in range(stages)]
    return Bubble(
        stages=stages,
        chunks=traces[0].sizes["vpp"],
        microbatches=traces[0].microbatches,
        measured=mean(share.idle for share in shares),
        by_stage=tuple(mean(share.idle for share in some) for some in of_stage),
        waiting=mean(share.waiting for share in shares),
        moving=mean(share.moving for share in shares),
    )


class _Share(NamedTuple):
    """Of one stage in one step: parts of the time from its pipeline's begin to its end."""

    stage: int
    idle: float
    waiting: float
    moving: float


def _shares(
    ranks: Sequence[RankTrace], found: Mapping[Place, Meeting], step: int
) -> Iterator[_Share]:
    """Yield the share of each stage of a pipeline, whose `ranks` are in order."""
    lanes = timeline(ranks, found, step)
    passes = [piece for lane in lanes.values() for piece in lane if piece.kind in PASSES]
    begin, end = min(map(_begin, passes)), max(piece.end for piece in passes)
    for stage, lane in enumerate(lanes.values()):
        spent: dict[str, float] = defaultdict(float)
        for piece in lane:
            # Messages of the next step, and the optimizer, are outside.
            within = min(piece.end, end) - max(piece.begin, begin)
            spent[piece.kind] += max(0.0, within) / (end - begin)
        idle = 1 - spent["forward"] - spent["backward"]
        yield _Share(stage, idle, spent["wait"], spent["send"] + spent["receive"])


def _pieces(trace: RankTrace, found: Mapping[Place, Meeting], step: int) -> Iterator[Piece]:
    for one in trace.slices:
        if one.step == step:
            yield Piece(one.kind, one.begin, one.end, one.chunk, one.microbatch, _words(one))
    for number, call in trace.of_step(step):
        if call.op in MESSAGES and call.role:
            yield from _of_message(call, found.get((trace.rank, number)))


def _of_message(call: Call, meeting: Meeting | None) -> Iterator[Piece]:
    microbatch = microbatch_of(call, meeting)
    way = "to" if call.op == "send" else "from"
    carried = {"forward": "activations", "backward": "gradients", "shape": "shape"}[call.role]
    what = f"{carried} of micro-batch {microbatch} {way} rank {call.peer}, {call.size:,} bytes"
    for begin, end in blocked(call):
        met = min(max(meeting.met, begin), end) if meeting else begin
        if met > begin:
            yield Piece("wait", begin, met, call.chunk, microbatch, f"{call.op} {what}")
        if end > met:
            yield Piece(call.op, met, end, call.chunk, microbatch, what)


def _words(one: Slice) -> str:
    if one.kind not in PASSES:
        return one.kind
    return f"{one.kind} of micro-batch {one.microbatch}, model chunk {one.chunk}"


def _begin(piece: Piece) -> float:
    return piece.begin
