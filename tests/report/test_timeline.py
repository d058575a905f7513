"""What is made of traces: who waited for whom, and how much of a pipeline's time was idle."""

from __future__ import annotations

from dataclasses import replace

import pytest
from schedules import SIZES, call, one_f_one_b, trace

from mcore_lab.errors import RunFolderError
from mcore_lab.report.communication import mean_traffic, traffic
from mcore_lab.report.matching import meetings
from mcore_lab.report.rank_trace import Group, RankTrace, Step
from mcore_lab.report.timeline import Bubble, bubble, timeline

TWO = [Group("pp", [0, 1], "1")]


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 1), (2, 8), (3, 4), (4, 8), (8, 8)])
def test_the_bubble_of_an_ideal_schedule_is_the_formula_s(stages: int, microbatches: int) -> None:
    traces = one_f_one_b(stages, microbatches)
    found = bubble(traces, meetings(traces))
    assert found is not None
    assert found.ideal == (stages - 1) / (microbatches + stages - 1)
    assert found.measured == pytest.approx(found.ideal, rel=1e-9)
    assert found.by_stage == pytest.approx([found.ideal] * stages, rel=1e-9)


def test_with_interleaving_the_formula_counts_the_chunks() -> None:
    fields = {"measured": 0.0, "by_stage": (), "waiting": 0.0, "moving": 0.0}
    found = Bubble(stages=4, chunks=2, microbatches=8, **fields)
    assert found.ideal == 3 / (2 * 8 + 3)


def test_without_a_pipeline_there_is_no_bubble() -> None:
    assert bubble([trace(0, 1)], {}) is None


def test_a_slower_stage_has_less_bubble_than_the_others() -> None:
    first, second = one_f_one_b(2, 2)
    # The second stage's passes are as they were, and the first's are cut to nothing.
    shorter = replace(first, slices=[one._replace(end=one.begin) for one in first.slices])
    found = bubble([shorter, second], {})
    assert found is not None and found.by_stage[0] == 1.0 > found.by_stage[1]


# Messages.


def test_a_receive_waits_until_the_send_has_begun_and_then_the_message_moves() -> None:
    of_send = {"peer": 1, "role": "forward", "chunk": 0, "microbatch": 5}
    of_receive = {"peer": 0, "role": "forward"}
    traces = [
        trace(0, 2, calls=[call("send", 30.0, 36.0, **of_send)]),
        trace(1, 2, calls=[call("receive", 10.0, 37.0, **of_receive)]),
    ]
    lanes = timeline(traces, meetings(traces), 1)
    assert [(p.kind, p.begin, p.end, p.microbatch) for p in lanes[0]] == [("send", 30.0, 36.0, 5)]
    assert [(p.kind, p.begin, p.end, p.microbatch) for p in lanes[1]] == [
        ("wait", 10.0, 30.0, 5),
        ("receive", 30.0, 37.0, 5),
    ]


def test_between_two_ranks_messages_of_each_role_arrive_in_order() -> None:
    sent = [
        call("send", 1.0, 2.0, peer=1, role="backward", chunk=1, microbatch=7),
        call("send", 3.0, 4.0, peer=1, role="forward", chunk=0, microbatch=1),
        call("send", 5.0, 6.0, peer=1, role="forward", chunk=0, microbatch=2),
    ]
    came = [
        call("receive", 3.0, 4.0, peer=0, role="forward"),
        call("receive", 5.0, 6.0, peer=0, role="forward"),
        call("receive", 6.0, 7.0, peer=0, role="backward"),
    ]
    traces = [trace(0, 2, calls=sent), trace(1, 2, calls=came)]
    lane = timeline(traces, meetings(traces), 1)[1]
    assert [piece.microbatch for piece in lane] == [1, 2, 7]


def test_a_message_whose_other_end_has_left_no_trace_is_all_on_its_way() -> None:
    alone = [trace(1, 2, calls=[call("receive", 1.0, 9.0, peer=0, role="forward")])]
    assert [piece.kind for piece in timeline(alone, meetings(alone), 1)[1]] == ["receive"]


# Collectives.


def test_the_last_rank_of_a_collective_waits_for_none_and_the_others_for_it() -> None:
    sizes = SIZES | {"tp": 2}
    groups = [Group("tp", [0, 1], "1")]
    traces = [
        trace(0, 2, sizes=sizes, groups=groups, calls=[call("all-reduce", 10.0, 40.0)]),
        trace(1, 2, sizes=sizes, groups=groups, calls=[call("all-reduce", 35.0, 41.0)]),
    ]
    found = meetings(traces)
    first, second = (traffic(one, found)[0] for one in traces)
    assert (first.seconds, first.waiting) == pytest.approx((30e-6, 25e-6))
    assert (second.seconds, second.waiting) == pytest.approx((6e-6, 0.0))


def test_traffic_is_per_step_and_a_mean_over_all_ranks() -> None:
    steps = [Step(1, 0.0, 1.0), Step(2, 1.0, 2.0)]
    calls = [call("all-reduce", 1.0, 2.0, size=100, sent=100) for _ in range(4)]
    busy = trace(0, 2, steps=steps, calls=calls)
    idle = trace(1, 2, steps=steps)
    (one,) = mean_traffic([busy, idle], {})
    assert (one.calls, one.size, one.sent) == (1.0, 100.0, 100.0)


def test_what_a_rank_does_while_a_collective_is_on_its_way_is_not_counted() -> None:
    late = call("all-reduce", 10.0, 12.0, wait_begin=500.0, wait_end=503.0)
    never = call("all-reduce", 20.0, 21.0)
    (one,) = traffic(trace(0, 2, groups=TWO, calls=[late, never]), {})
    assert one.seconds == pytest.approx((2 + 3 + 1) * 1e-6)


# As a file.


def test_a_trace_is_read_as_it_was_written() -> None:
    written = trace(
        0, 2, calls=[call("send", 1.0, 2.0, peer=1)], slices=one_f_one_b(2, 2)[0].slices
    )
    assert RankTrace.from_json(written.to_json()) == written


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"columns": {}}', trace(0, 1).to_json().replace("steps", "stepz")]
)
def test_what_is_no_trace_is_refused(text: str) -> None:
    with pytest.raises(RunFolderError, match="not a rank's trace"):
        RankTrace.from_json(text)
