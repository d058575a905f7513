"""The benchmark of a step runs both loops for real; what it measures is not a test's to judge."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from small_runs import SMALL, changed

from mcore_lab.bench.step import StepTimes, measure_on_rank
from mcore_lab.runtime import launch


def test_both_loops_take_the_steps_that_are_timed() -> None:
    recipe = changed(SMALL, training={"steps": 4}, layout={"tensor_model_parallel_size": 2})
    for times in launch(measure_on_rank, 2, recipe, 2, timeout=120):
        assert isinstance(times, StepTimes)
        assert times.steps == 2 * 1
        assert times.recipe_seconds > 0 < times.bare_seconds
        assert times.ratio == pytest.approx(times.recipe_seconds / times.bare_seconds)


def test_a_benchmark_that_there_is_not_is_told_in_a_line() -> None:
    words = [sys.executable, "-m", "mcore_lab", "bench", "stpe", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: no benchmark stpe; did you mean step?\n"
    assert json.loads(done.stdout) == {"error": "no benchmark stpe; did you mean step?"}
