"""The benchmark of tracing traces every second step for real; what it measures is not judged."""

from __future__ import annotations

import pytest
from small_runs import SMALL, changed

from mcore_lab.bench.trace import TraceTimes, measure_on_rank
from mcore_lab.cli import main
from mcore_lab.runtime import launch


def test_every_second_step_after_warm_up_is_traced_and_timed_with_the_one_after() -> None:
    recipe = changed(SMALL, training={"steps": 7}, layout={"tensor_model_parallel_size": 2})
    for times in launch(measure_on_rank, 2, recipe, 2, timeout=120):
        assert isinstance(times, TraceTimes)
        # In each of two runs steps 3 and 5, beside 4 and 6; then there is one that has no second.
        assert times.steps == 2 * 2
        # Four micro-batches of 21 all-reduces, three of them for the loss, and five of a step.
        assert times.calls == 4 * 21 + 5
        assert min(times.traced_seconds, times.plain_seconds, times.memory_step_seconds) > 0


def test_a_recipe_with_too_few_steps_is_told_in_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", "trace", "tp2_gpt", "--training.steps", "3"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --training.steps 3: 4 or more") and told.count("\n") == 1
