"""`--trace`: what is recorded of a run is what the run did, and the run is the same."""

from __future__ import annotations

import gc
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from small_runs import SMALL, changed, run

from mcore_lab.cli import main
from mcore_lab.config import Recipe, RunArguments, parse_recipe_or_exit
from mcore_lab.errors import ConfigError
from mcore_lab.recipes import load_recipe
from mcore_lab.recipes.start import require_startable, run_rank
from mcore_lab.report.chrome_trace import chrome_trace
from mcore_lab.report.matching import meetings
from mcore_lab.report.rank_trace import Call, RankTrace, Slice
from mcore_lab.report.timeline import bubble, timeline
from mcore_lab.runtime import launch
from mcore_lab.training import RunFolder
from mcore_lab.training.tracing import recorder as tracing

# Four layers of width 32, four heads, a vocabulary of 128; two samples of 16 tokens in each of
# four micro-batches, in fp32.
RECIPE = changed(SMALL, training={"steps": 5}, checkpoint={"save": False})
LAYERS, WIDTH, VOCABULARY, TOKENS, MICROBATCHES = 4, 32, 128, 2 * 16, 4
ACTIVATIONS = TOKENS * WIDTH * 4
PARAMETERS = (
    2 * VOCABULARY * WIDTH  # embedding and output
    + 16 * WIDTH  # positions
    + LAYERS * (12 * WIDTH**2 + 13 * WIDTH)  # the matrices of a layer, its biases and norms
    + 2 * WIDTH  # the last norm
)
TRACED = (3, 4)
LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2 vpp2": {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
    },
    "tp2": {"tensor_model_parallel_size": 2},
    "dp2": {},
    "dp2 distopt": {"use_distributed_optimizer": True},
}


class Traced(NamedTuple):
    """A run of two ranks that was traced."""

    folder: RunFolder
    traces: list[RankTrace]
    held: list[int]
    """Bytes of all tensors that a rank held after its last step."""
    kept: list[bool]
    """Whether a rank found every wrapped name as it was before."""


def on(layout: str) -> Recipe:
    changes: dict[str, Any] = {"layout": LAYOUTS[layout]}
    if layout.startswith("dp2"):
        changes["data"] = {"global_batch_size": 16}
    return changed(RECIPE, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Traced]:
    return {name: traced(on(name), 2, tmp_path_factory.mktemp("run")) for name in LAYOUTS}


def traced(
    recipe: Recipe, nproc: int, folder: Path, rank: Callable[..., Any] | None = None
) -> Traced:
    arguments = RunArguments(
        recipe=recipe, run_dir=folder, json=True, trace=True, trace_steps=len(TRACED)
    )
    require_startable(arguments, nproc)
    seen = launch(rank or looking_rank, nproc, arguments, timeout=120, device="cpu")
    held, kept = zip(*seen, strict=True)
    return Traced(RunFolder(folder), RunFolder(folder).traces(), list(held), list(kept))


def looking_rank(arguments: RunArguments) -> tuple[int, bool]:
    """Run, and return what the rank held at its end, and whether all names are as they were."""
    before = wrapped_names()
    held: list[int] = []

    class Looking(tracing.TracingRecorder):
        def look_at_end(self, *_: Any) -> None:
            held.append(bytes_of_all_tensors())

    # A forked process of its own: nothing is to be put back.
    tracing.TracingRecorder = Looking  # type: ignore[misc]
    run_rank(arguments)
    return held[0], wrapped_names() == before


def wrapped_names() -> list[object]:
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from torch.distributed import ProcessGroup, Work

    owners = (schedules, P2PCommunicator, ProcessGroup, Work)
    return [(name, id(value)) for owner in owners for name, value in vars(owner).items()]


def bytes_of_all_tensors() -> int:
    gc.collect()
    storages = {
        one.untyped_storage()._cdata: one.untyped_storage().nbytes()
        for one in gc.get_objects()
        if isinstance(one, torch.Tensor) and one.layout is torch.strided
    }
    return sum(storages.values())


# The run.


@pytest.mark.parametrize("layout", ["pp2 vpp2", "dp2 distopt"])
def test_a_traced_run_computes_bit_for_bit_what_it_does_untraced(
    layout: str, runs: Mapping[str, Traced], tmp_path: Path
) -> None:
    numbers = ("step", "loss", "grad_norm", "lr")
    alone = [[line[name] for name in numbers] for line in run(on(layout), 2, tmp_path)]
    assert [[line[name] for name in numbers] for line in runs[layout].folder.metrics()] == alone


def test_nothing_stays_wrapped(runs: Mapping[str, Traced]) -> None:
    assert all(all(one.kept) for one in runs.values())


def test_nothing_stays_wrapped_when_a_traced_step_fails(tmp_path: Path) -> None:
    def failing_rank(arguments: RunArguments) -> tuple[int, bool]:
        from megatron.core.optimizer import ChainedOptimizer

        before = wrapped_names()

        class Failing(tracing.TracingRecorder):
            def look_at_gradients(self, step: int, *rest: Any) -> None:
                super().look_at_gradients(step, *rest)
                if step == TRACED[-1]:
                    assert wrapped_names() != before
                    assert "step" in vars(self._optimizer)
                    raise ConfigError("this step fails")

            def close(self) -> None:
                super().close()
                assert "step" not in vars(self._optimizer)

        tracing.TracingRecorder = Failing  # type: ignore[misc]
        assert ChainedOptimizer
        with pytest.raises(ConfigError, match="this step fails"):
            run_rank(arguments)
        return 0, wrapped_names() == before

    failed = traced(on("dp2"), 1, tmp_path, failing_rank)
    assert failed.kept == [True] and failed.traces == []


# The timeline.


def passes(trace: RankTrace, step: int) -> list[Slice]:
    found = [one for one in trace.slices if one.step == step and one.kind != "optimizer"]
    return sorted(found, key=lambda one: one.begin)


def order(trace: RankTrace, step: int) -> list[str]:
    return [f"{one.kind[0]}{one.chunk}.{one.microbatch}" for one in passes(trace, step)]


def test_the_steps_after_two_of_warm_up_are_traced(runs: Mapping[str, Traced]) -> None:
    for one in runs.values():
        assert [[step.step for step in trace.steps] for trace in one.traces] == [[*TRACED]] * 2


@pytest.mark.parametrize("step", TRACED)
def test_each_stage_takes_each_micro_batch_forward_and_backward_in_1f1b_order(
    runs: Mapping[str, Traced], step: int
) -> None:
    first, second = runs["pp2"].traces
    assert order(first, step) == ["f0.0", "f0.1", "b0.0", "f0.2", "b0.1", "f0.3", "b0.2", "b0.3"]
    assert order(second, step) == ["f0.0", "b0.0", "f0.1", "b0.1", "f0.2", "b0.2", "f0.3", "b0.3"]


@pytest.mark.parametrize("step", TRACED)
def test_with_interleaving_the_order_is_that_of_megatron_s_schedule_table(
    runs: Mapping[str, Traced], step: int
) -> None:
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    table = get_schedule_table(MICROBATCHES, 2, 2)
    forwards = [f"f{chunk}.{number}" for number, chunk in table]
    backwards = [f"b{1 - chunk}.{number}" for number, chunk in table]
    for trace in runs["pp2 vpp2"].traces:
        ahead = 2 * (1 - trace.coordinates["pp"]) + 2
        steady = [one for pair in zip(forwards[ahead:], backwards, strict=False) for one in pair]
        expected = forwards[:ahead] + steady + backwards[len(forwards) - ahead :]
        assert order(trace, step) == expected


def test_passes_and_messages_of_a_rank_do_not_overlap(runs: Mapping[str, Traced]) -> None:
    for one in runs.values():
        found = meetings(one.traces)
        for step in TRACED:
            for lane in timeline(one.traces, found, step).values():
                assert all(piece.end >= piece.begin for piece in lane)
                assert all(after.begin >= before.end for before, after in pairwise(lane))


@pytest.mark.parametrize("layout", ["pp2", "pp2 vpp2"])
def test_stages_come_one_after_the_other_forward_and_the_other_way_round_backward(
    layout: str, runs: Mapping[str, Traced]
) -> None:
    at: dict[tuple[str, int, int, int], Slice] = {}
    for trace in runs[layout].traces:
        for one in trace.slices:
            stage = one.chunk * 2 + trace.coordinates["pp"]
            at[one.kind, one.step, one.microbatch, stage] = one
    last = max(stage for *_, stage in at)
    for step in TRACED:
        for number in range(MICROBATCHES):
            for stage in range(last):
                of = (step, number)
                assert at["forward", *of, stage].end < at["forward", *of, stage + 1].begin
                assert at["backward", *of, stage + 1].end < at["backward", *of, stage].begin


@pytest.mark.parametrize("layout", ["pp2", "pp2 vpp2"])
def test_the_measured_bubble_is_a_share_and_stands_beside_the_formula_s(
    layout: str, runs: Mapping[str, Traced]
) -> None:
    traces = runs[layout].traces
    found = bubble(traces, meetings(traces))
    assert found is not None
    chunks = 2 if "vpp" in layout else 1
    assert found.ideal == 1 / (chunks * MICROBATCHES + 1)
    assert 0 < found.measured < 1 and len(found.by_stage) == 2
    assert found.waiting + found.moving < found.measured


# Bytes.


def calls_over(trace: RankTrace, kind: str, step: int, op: str = "") -> list[Call]:
    return [
        call
        for _, call in trace.of_step(step)
        if trace.groups[call.group].kind == kind and call.op == (op or call.op)
    ]


def test_tensor_parallel_ranks_reduce_activations_twice_a_layer_and_direction(
    runs: Mapping[str, Traced],
) -> None:
    # Forward after the embedding, each attention and each feed-forward layer, backward before the
    # output and before each of those; of the loss the largest logit, the label's and the sum; and
    # once a step the norm of the gradient.
    of_activations = 2 * (2 * LAYERS + 1)
    for trace in runs["tp2"].traces:
        for step in TRACED:
            sizes = [call.size for call in calls_over(trace, "tp", step, "all-reduce")]
            assert sizes.count(ACTIVATIONS) == MICROBATCHES * of_activations
            assert sizes.count(TOKENS * 4) == MICROBATCHES * 3
            assert sum(sizes) == MICROBATCHES * (of_activations * ACTIVATIONS + 3 * TOKENS * 4) + 4


def test_data_parallel_ranks_reduce_every_gradient_once(runs: Mapping[str, Traced]) -> None:
    for trace in runs["dp2"].traces:
        for step in TRACED:
            # And the number of tokens, of four bytes.
            sizes = sorted(call.size for call in calls_over(trace, "dp", step, "all-reduce"))
            assert sizes == [4, PARAMETERS * 4]
            (gradients,) = (c for c in calls_over(trace, "dp", step) if c.size == PARAMETERS * 4)
            assert gradients.sent == 2 * gradients.size // 2


def test_the_distributed_optimizer_scatters_gradients_and_gathers_parameters(
    runs: Mapping[str, Traced],
) -> None:
    for trace in runs["dp2 distopt"].traces:
        buffer = trace.memory["gradients"]
        assert PARAMETERS * 4 <= buffer < PARAMETERS * 4 * 1.1
        for step in TRACED:
            for op in ("reduce-scatter", "all-gather"):
                (call,) = calls_over(trace, "dp", step, op)
                assert (call.size, call.sent) == (buffer, buffer // 2)


@pytest.mark.parametrize(("layout", "boundaries"), [("pp2", 1), ("pp2 vpp2", 3)])
def test_stages_send_the_activations_of_each_micro_batch_and_their_gradients_back(
    layout: str, boundaries: int, runs: Mapping[str, Traced]
) -> None:
    for step in TRACED:
        sent: dict[str, list[Call]] = defaultdict(list)
        for trace in runs[layout].traces:
            for _, call in trace.of_step(step):
                if call.op == "send":
                    sent[call.role].append(call)
        assert sent.keys() == {"forward", "backward"}
        for messages in sent.values():
            assert len(messages) == boundaries * MICROBATCHES
            assert {call.size for call in messages} == {ACTIVATIONS}
            numbers = sorted(call.microbatch for call in messages)
            assert numbers == sorted([*range(MICROBATCHES)] * boundaries)


def test_every_message_and_collective_has_its_other_ends(runs: Mapping[str, Traced]) -> None:
    for one in runs.values():
        found = meetings(one.traces)
        for trace in one.traces:
            for place, call in enumerate(trace.calls):
                if len(trace.groups[call.group].ranks) > 1:
                    meeting = found[trace.rank, place]
                    assert call.begin <= meeting.met
                    if meeting.partner:
                        assert meeting.partner.size == call.size


# Memory.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kinds_of_memory_are_what_all_tensors_of_a_rank_take(
    layout: str, runs: Mapping[str, Traced]
) -> None:
    for trace, held in zip(runs[layout].traces, runs[layout].held, strict=True):
        between_steps = sum(trace.memory.values()) - trace.memory["activations"]
        # The rest is the data, positions, the attention mask and the last micro-batch.
        assert between_steps <= held < between_steps * 1.1


def test_weights_gradients_and_adam_s_moments_are_counted_to_the_byte(
    runs: Mapping[str, Traced],
) -> None:
    for trace in runs["dp2"].traces:
        assert trace.memory["weights"] == trace.memory["gradients"] == PARAMETERS * 4
        moments = 2 * PARAMETERS * 4
        # And a number of steps for each parameter: 12 a layer, five without.
        assert trace.memory["optimizer state"] == moments + 4 * (12 * LAYERS + 5)
    halves = [trace.memory["weights"] for trace in runs["pp2"].traces]
    assert sum(halves) == PARAMETERS * 4
    # Of each moment, either rank has its half of the buffer, which may cut a parameter in two.
    both = sum(trace.memory["optimizer state"] for trace in runs["dp2 distopt"].traces)
    assert moments + 4 * (12 * LAYERS + 5) <= both <= moments + 4 * (12 * LAYERS + 5 + 1)


def test_activations_of_a_stage_that_is_ahead_are_the_more(runs: Mapping[str, Traced]) -> None:
    """1F1B: of two stages the first has two micro-batches under way, the second one."""
    first, second = (trace.memory["activations"] for trace in runs["pp2"].traces)
    # An embedding, two layers, two micro-batches: more than 34 activations a layer of one.
    assert first > second > 34 * ACTIVATIONS / 4


# The Chrome trace.


def test_the_chrome_trace_is_one_that_viewers_load(runs: Mapping[str, Traced]) -> None:
    for name, one in runs.items():
        written = json.loads((one.folder.trace / "chrome_trace.json").read_text())
        assert written == json.loads(chrome_trace(RECIPE.name, one.traces, meetings(one.traces)))
        events = written["traceEvents"]
        rows = [event for event in events if event["ph"] == "X"]
        named = {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "process_name"}
        assert {pid for pid, _ in named} == {0, 1} and len(named) == 2
        threads = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
        assert {(event["pid"], event["tid"]) for event in rows} <= threads
        for event in events:
            assert event["ph"] in ("M", "X", "s", "f") and isinstance(event["name"], str)
            if event["ph"] != "M":
                assert event["ts"] >= 0 and isinstance(event["cat"], str)
        for row in threads:
            assert_nested(sorted(spans(rows, row)))
        assert_arrows(events, rows, of_pipeline="pp" in name)


def spans(rows: list[dict[str, Any]], row: tuple[int, int]) -> Iterator[tuple[float, float]]:
    for event in rows:
        if (event["pid"], event["tid"]) == row:
            assert event["dur"] >= 0
            yield event["ts"], event["ts"] + event["dur"]


def assert_nested(in_order: list[tuple[float, float]]) -> None:
    for (_, end), (begin, _) in pairwise(in_order):
        assert begin >= end - 1e-3


def assert_arrows(
    events: list[dict[str, Any]], rows: list[dict[str, Any]], of_pipeline: bool
) -> None:
    """Each arrow has two ends, both within a slice, and leads forward in time."""
    begins = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert begins.keys() == ends.keys() and bool(begins) == of_pipeline
    for number, begin in begins.items():
        assert begin["pid"] != ends[number]["pid"]
        for end in (begin, ends[number]):
            row = (end["pid"], end["tid"])
            assert any(first <= end["ts"] <= last + 1e-3 for first, last in spans(rows, row))


# What is asked for, and what cannot be: that is told in a line.


def test_a_recipe_s_module_takes_the_options_too() -> None:
    """What torchrun starts, as `mcore-lab run` does."""
    said = parse_recipe_or_exit(RECIPE, ["--trace", "--trace-steps", "7"])
    assert (said.trace, said.trace_steps) == (True, 7)
    assert not parse_recipe_or_exit(RECIPE, []).trace


def test_a_comparison_is_not_traced(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "sequence_memory", "--compare", "--trace"]) == 2
    assert capsys.readouterr().err.startswith("error: --compare runs several layouts")


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        (
            changed(SMALL, training={"steps": 2}),
            {},
            "--training.steps 2 there is none: .* 3 or more",
        ),
        (SMALL, {"trace_steps": 0}, "--trace-steps must not be below 1; it is 0"),
        (load_recipe("tp_mlp"), {}, "tp_mlp shows a layer and takes no step"),
        (load_recipe("reshard_gpt"), {}, "reshard_gpt goes through several layouts"),
    ],
)
def test_a_run_of_which_nothing_can_be_traced_is_refused_before_it_starts(
    recipe: Recipe, more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    arguments = RunArguments(recipe=recipe, run_dir=tmp_path / "run", trace=True)
    with pytest.raises(ConfigError, match=message) as refused:
        require_startable(replace(arguments, **more), 2)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()
