"""What `--trace` costs: steps that are traced beside steps of the same run that are not."""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from mcore_lab.config import Recipe
from mcore_lab.recipes.story import train
from mcore_lab.runtime import RankLog, process_group
from mcore_lab.training import RunFolder
from mcore_lab.training.console import Console
from mcore_lab.training.tracing.recorder import TracingRecorder


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceTimes:
    """Medians over all timed steps of rank 0, from the end of one step to the end of the next."""

    recipe: str
    steps: int
    """How many of each were timed."""
    traced_seconds: float
    plain_seconds: float
    overhead: float
    """By how much a traced step is longer than the one after it, by the length of a plain step."""
    calls: float
    """Calls of process groups that a step has written down."""
    memory_step_seconds: float
    """The one step of a run in which the memory of activations is counted."""


def measure_on_rank(recipe: Recipe, rounds: int) -> TraceTimes:
    """Trace every second step of the recipe, in `rounds` runs; see `TracingRecorder`."""
    checkpoint = dataclasses.replace(recipe.checkpoint, save=False)
    recipe = dataclasses.replace(recipe, checkpoint=checkpoint)
    pairs: list[tuple[float, float]] = []
    memory_steps, calls = [], []
    with RankLog(int(os.environ.get("RANK", "0"))) as log, process_group() as world:
        for _ in range(rounds):
            with (
                tempfile.TemporaryDirectory(prefix="mcore_lab-") as folder,
                Console(speaks=False) as console,
            ):
                recorder = _EverySecondStep(
                    RunFolder(Path(folder) / "run"), log, console, recipe_toml="", fresh=True
                )
                train(recipe, world, recorder)
            parallel_state.destroy_model_parallel()
            pairs += recorder.pairs()
            memory_steps.append(recorder.ends[1] - recorder.ends[0])
            calls.append(recorder.calls_a_step())
    traced, plain = zip(*pairs, strict=True)
    plain_seconds = statistics.median(plain)
    return TraceTimes(
        recipe=recipe.name,
        steps=len(pairs),
        traced_seconds=statistics.median(traced),
        plain_seconds=plain_seconds,
        overhead=statistics.median(one - other for one, other in pairs) / plain_seconds,
        calls=statistics.median(calls),
        memory_step_seconds=statistics.median(memory_steps),
    )


class _EverySecondStep(TracingRecorder):
    """Traces every second step, of which nothing is written, and notes when each has ended."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, trace_steps=0, **kwargs)
        self.ends: list[float] = []

    def _steps_to_trace(self, first: int, last: int) -> range:
        return range(first, last, 2)

    def step(self, *args: Any, **kwargs: Any) -> None:
        super().step(*args, **kwargs)
        self.ends.append(time.perf_counter())

    def _write(self) -> None:
        self._calls = len(self._events.calls) / len(self._traced)

    def calls_a_step(self) -> float:
        """Return how many calls of process groups a traced step has written down."""
        return self._calls

    def pairs(self) -> list[tuple[float, float]]:
        """Return the seconds of each traced step and of the plain one after it.

        Half of them the other way round would be no fairer: a run's steps are all alike.
        """
        took = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        # The first of `took` is the second step.
        return [(took[step - 2], took[step - 1]) for step in self._traced]
