"""`mcore-lab bench step`: a recipe's step beside a bare Megatron-Core loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from mcore_lab.cli.bench.found import Found
from mcore_lab.cli.bench.of_recipe import benchmark_arguments, measured
from mcore_lab.errors import ConfigError
from mcore_lab.report.tables import print_table


def measure(argv: Sequence[str]) -> Found:
    """Return the times of both, and their ratio."""
    arguments, nproc = benchmark_arguments("step", argv)
    recipe = arguments.recipe
    if recipe.data.pack_documents or recipe.data.sequence_length % recipe.layout.sequence_multiple:
        raise ConfigError("the bare loop pads and packs nothing: choose sequences that divide")
    times, device = measured("step", recipe, nproc)
    columns = ("recipe", "ranks", "steps", "recipe s", "bare loop s", "ratio")
    seconds = (f"{times.recipe_seconds:.4f}", f"{times.bare_seconds:.4f}", f"{times.ratio:.3f}")
    return Found(
        values=dataclasses.asdict(times) | {"nproc": nproc, "device": device},
        as_json=arguments.json,
        tell=partial(print_table, columns, [(recipe.name, nproc, times.steps, *seconds)]),
        nproc=nproc,
    )
