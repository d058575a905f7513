"""`mcore-lab bench trace`: what `--trace` costs a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from mcore_lab.cli.bench.found import Found
from mcore_lab.cli.bench.of_recipe import benchmark_arguments, measured
from mcore_lab.errors import ConfigError
from mcore_lab.report.tables import print_table
from mcore_lab.training.rules import TRACE_WARM_UP


def measure(argv: Sequence[str]) -> Found:
    """Return the times of steps that are traced and of those that are not, and the overhead."""
    arguments, nproc = benchmark_arguments("trace", argv)
    steps, fewest = arguments.recipe.training.steps, TRACE_WARM_UP + 2
    if steps < fewest:
        raise ConfigError(
            f"--training.steps {steps}: {fewest} or more, {TRACE_WARM_UP} of warm-up and one that "
            "is traced beside one that is not"
        )
    times, device = measured("trace", arguments.recipe, nproc)
    columns = ("recipe", "ranks", "steps", "calls", "traced s", "plain s", "overhead", "memory s")
    took = (times.traced_seconds, times.plain_seconds, times.memory_step_seconds)
    traced, plain, memory = (f"{seconds:.4f}" for seconds in took)
    row = (times.steps, f"{times.calls:g}", traced, plain, f"{times.overhead:+.2%}", memory)
    return Found(
        values=dataclasses.asdict(times) | {"nproc": nproc, "device": device},
        as_json=arguments.json,
        tell=partial(print_table, columns, [(times.recipe, nproc, *row)]),
        nproc=nproc,
    )
