"""`mcore-lab bench trace`: what `--trace` costs a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mcore_lab.cli.bench.of_recipe import benchmark_arguments, measured
from mcore_lab.report.tables import print_json, print_table
from mcore_lab.training.rules import require_traceable


def main(argv: Sequence[str]) -> int:
    """Print the times of steps that are traced and of those that are not, and the overhead."""
    arguments, nproc = benchmark_arguments("trace", argv)
    # The last step is a plain one.
    require_traceable(arguments.recipe.training.steps - 1)
    times, device = measured("trace", arguments.recipe, nproc)
    if arguments.json:
        print_json(dataclasses.asdict(times) | {"nproc": nproc, "device": device})
        return 0
    columns = ("recipe", "ranks", "steps", "calls", "traced s", "plain s", "overhead", "memory s")
    took = (times.traced_seconds, times.plain_seconds, times.memory_step_seconds)
    traced, plain, memory = (f"{seconds:.4f}" for seconds in took)
    row = (times.steps, f"{times.calls:g}", traced, plain, f"{times.overhead:+.2%}", memory)
    print_table(columns, [(times.recipe, nproc, *row)])
    return 0
