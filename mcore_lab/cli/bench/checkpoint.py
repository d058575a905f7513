"""`mcore-lab bench checkpoint`: the save and the load of a recipe's checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mcore_lab.cli.bench.of_recipe import benchmark_arguments, measured
from mcore_lab.report.tables import print_json, print_table


def main(argv: Sequence[str]) -> int:
    """Print how long training waits for a save, and how long a load takes."""
    arguments, nproc = benchmark_arguments("checkpoint", argv)
    times, device = measured("checkpoint", arguments.recipe, nproc)
    if arguments.json:
        print_json(dataclasses.asdict(times) | {"nproc": nproc, "device": device})
        return 0
    columns = ("recipe", "ranks", "rounds", "bytes", "save s", "load s", "async waits s", "disk s")
    took = (times.save_seconds, times.load_seconds, times.blocked_seconds, times.disk_seconds)
    seconds = [f"{number:.3f}" for number in took]
    print_table(columns, [(times.recipe, nproc, times.rounds, f"{times.size:,}", *seconds)])
    return 0
