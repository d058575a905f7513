"""Where a step's time goes: by phase, on rank 0, and to the end of the step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_runs import SMALL, changed, run

from mcore_lab import cpu

cpu.preload()

from mcore_lab.training.phases import Phases  # noqa: E402

PHASES = ["data", "forward", "backward", "gradients", "optimizer", "other"]


@pytest.mark.parametrize(
    ("layout", "nproc", "phases"),
    [
        ({}, 1, PHASES),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            2,
            [*PHASES[:3], "pipeline", *PHASES[3:]],
        ),
    ],
    ids=["one rank", "interleaved pipeline"],
)
def test_the_phases_of_a_step_add_up_to_it(
    tmp_path: Path, layout: dict[str, Any], nproc: int, phases: list[str]
) -> None:
    lines = run(changed(SMALL, layout=layout), nproc, tmp_path / "run")
    for line in lines:
        seconds = line["seconds_by_phase"]
        assert list(seconds) == phases
        assert sum(seconds.values()) == pytest.approx(line["step_seconds"])
        # What is there to be done takes time; only the rest may be nothing.
        assert all(seconds[name] > 0 for name in PHASES[:-1])
        assert seconds["other"] < line["step_seconds"] / 2


def test_a_pass_does_not_pay_for_its_batch_and_the_pipeline_is_what_no_pass_takes() -> None:
    seconds = 0.0

    def take(more: float) -> None:
        nonlocal seconds
        seconds += more

    def batches() -> Iterator[int]:
        for batch in range(2):
            take(3)
            yield batch

    phases = Phases(lambda: seconds)
    config: Any = SimpleNamespace(
        pipeline_model_parallel_size=2, finalize_model_grads_func=lambda: take(7)
    )
    phases.watch(config, "cpu")
    with phases.of("data"):
        take(100)  # Of a validation before the step.
    phases.begin()
    # As Megatron-Core's schedules do.
    config.timers("forward-backward", log_level=1).start(barrier=True)
    read = phases.reading(batches())
    for batch in range(2):
        config.timers("forward-compute", log_level=2).start()
        assert next(read) == batch
        take(10)
        config.timers("forward-compute").stop()
        take(5)
        config.timers("backward-compute", log_level=2).start()
        take(20)
        config.timers("backward-compute").stop()
    config.finalize_model_grads_func()
    config.timers("forward-backward").stop()
    take(1)
    with phases.of_optimizer():
        take(4)
    assert phases.take(seconds - 100) == {
        "data": 6,
        "forward": 20,
        "backward": 40,
        "pipeline": 10,
        "gradients": 7,
        "optimizer": 4,
        "other": 1,
    }


def test_a_rank_that_is_not_watched_has_no_phases() -> None:
    phases = Phases()
    with phases.of("data"), phases.of_optimizer():
        assert list(phases.reading(iter("ab"))) == ["a", "b"]
    assert phases.take(1.0) is None
