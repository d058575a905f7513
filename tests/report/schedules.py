"""Traces of pipelines made by hand: passes of one length each, and messages that take no time."""

from __future__ import annotations

from mcore_lab.layout import ParallelLayout
from mcore_lab.report.rank_trace import NOT_KNOWN, Call, Group, RankTrace, Slice, Step

FORWARD, BACKWARD = 10.0, 20.0
SIZES = {"tp": 1, "cp": 1, "dp": 1, "pp": 1, "ep": 1, "etp": 1, "edp": 1, "vpp": 1}


def trace(rank: int, world_size: int, **fields: object) -> RankTrace:
    """Return a trace of nothing, of one of `world_size` stages, with other fields."""
    layout = ParallelLayout(pipeline_model_parallel_size=world_size)
    usual = {
        "rank": rank,
        "world_size": world_size,
        "coordinates": vars(layout.coordinates(rank, world_size)),
        "sizes": SIZES | {"pp": world_size},
        "microbatches": 1,
        "device": "cpu",
        "backend": "torch",
        "machine": "here",
        "cores": world_size,
        "ranks_here": world_size,
        "megatron_core": "0",
        "torch": "0",
        "clock": "none",
        "steps": [Step(1, 0.0, 100.0)],
        "slices": [],
        "groups": [Group("pp", list(range(world_size)), "1")],
        "calls": [],
        "memory": {"weights": 4, "gradients": 4, "optimizer state": 8, "activations": 2},
    }
    return RankTrace(**(usual | fields))  # type: ignore[arg-type]


def call(op: str, begin: float, done: float, **fields: object) -> Call:
    """Return a call that is waited for at once."""
    usual = Call(1, op, 0, 8, 8, begin, done, -1.0, -1.0, NOT_KNOWN, "", NOT_KNOWN, NOT_KNOWN)
    return usual._replace(**fields)


def one_f_one_b(stages: int, microbatches: int) -> list[RankTrace]:
    """Return the traces of an ideal 1F1B schedule, worked out pass by pass."""
    order = {stage: _order(stage, stages, microbatches) for stage in range(stages)}
    ends: dict[tuple[int, str, int], float] = {}
    free = dict.fromkeys(order, 0.0)
    slices: dict[int, list[Slice]] = {stage: [] for stage in order}
    while any(order.values()):
        for stage, left in order.items():
            if not left:
                continue
            kind, number = left[0]
            neighbour = stage - 1 if kind == "forward" else stage + 1
            is_first = not 0 <= neighbour < stages
            needs = (stage, "forward", number) if is_first else (neighbour, kind, number)
            if needs not in ends and not (is_first and kind == "forward"):
                continue
            begin = max(free[stage], ends.get(needs, 0.0))
            end = begin + (FORWARD if kind == "forward" else BACKWARD)
            slices[stage].append(Slice(kind, 1, 0, number, begin, end))
            ends[stage, kind, number] = free[stage] = end
            left.pop(0)
    last = [Step(1, 0.0, max(free.values()))]
    return [
        trace(stage, stages, slices=slices[stage], microbatches=microbatches, steps=last)
        for stage in order
    ]


def _order(stage: int, stages: int, microbatches: int) -> list[tuple[str, int]]:
    ahead = min(stages - stage - 1, microbatches)
    passes = [("forward", number) for number in range(ahead)]
    for number in range(microbatches - ahead):
        passes += [("forward", number + ahead), ("backward", number)]
    return passes + [("backward", number) for number in range(microbatches - ahead, microbatches)]
