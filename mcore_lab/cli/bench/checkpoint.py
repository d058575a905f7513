"""`mcore-lab bench checkpoint`: the save and the load of a recipe's checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from mcore_lab.cli.bench.found import Found
from mcore_lab.cli.bench.of_recipe import benchmark_arguments, measured
from mcore_lab.report.tables import print_table


def measure(argv: Sequence[str]) -> Found:
    """Return how long training waits for a save, and how long a load takes."""
    arguments, nproc = benchmark_arguments("checkpoint", argv)
    times, device = measured("checkpoint", arguments.recipe, nproc)
    columns = ("recipe", "ranks", "rounds", "bytes", "save s", "load s", "async waits s", "disk s")
    took = (times.save_seconds, times.load_seconds, times.blocked_seconds, times.disk_seconds)
    row = (times.recipe, nproc, times.rounds, f"{times.size:,}", *(f"{one:.3f}" for one in took))
    return Found(
        values=dataclasses.asdict(times) | {"nproc": nproc, "device": device},
        as_json=arguments.json,
        tell=partial(print_table, columns, [row]),
        nproc=nproc,
    )
