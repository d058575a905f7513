"""`mcore-lab bench step`: a recipe's step beside other loops of the same model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from mcore_lab.cli.bench.found import Found
from mcore_lab.cli.bench.of_recipe import benchmark_arguments, measured
from mcore_lab.errors import ConfigError
from mcore_lab.report.tables import print_table

if TYPE_CHECKING:
    from mcore_lab.bench.step import StepTimes


def measure(argv: Sequence[str]) -> Found:
    """Return the times of all loops, and the recipe's ratio to each."""
    arguments, nproc = benchmark_arguments("step", argv)
    recipe = arguments.recipe
    if recipe.data.pack_documents or recipe.data.sequence_length % recipe.layout.sequence_multiple:
        raise ConfigError("the bare loop pads and packs nothing: choose sequences that divide")
    times, device = measured("step", recipe, nproc)
    return Found(
        values=dataclasses.asdict(times) | {"nproc": nproc, "device": device},
        as_json=arguments.json,
        tell=partial(_tell, times, nproc),
        nproc=nproc,
    )


def _tell(times: StepTimes, nproc: int) -> None:
    columns = ("loop", "s", "recipe by it", "losses apart")
    rows = []
    for name, seconds in times.seconds.items():
        ratio, apart = times.ratios.get(name), times.losses_apart.get(name)
        told = "" if ratio is None else f"{ratio:.3f}", "" if apart is None else f"{apart:.0e}"
        rows.append((name, f"{seconds:.4f}", *told))
    print_table(columns, rows)
    ranks = "1 rank" if nproc == 1 else f"{nproc} ranks"
    print(f"\nmedians of {times.steps} steps of {times.recipe} on {ranks}, loop after loop")
    if times.no_peers:
        print(f"no loop without Megatron-Core: {times.no_peers}")
