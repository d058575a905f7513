"""What the benchmarks of a recipe share: its command line, and the ranks that measure it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from mcore_lab import cpu
from mcore_lab.cli.arguments import recipe_arguments
from mcore_lab.cli.bench import BENCHMARKS
from mcore_lab.cli.check import broken_rules
from mcore_lab.config import LaunchSettings, Recipe, RunArguments
from mcore_lab.errors import LayoutError

_ROUNDS = 4


def benchmark_arguments(
    name: str, argv: Sequence[str], settings: type[LaunchSettings] = LaunchSettings
) -> tuple[RunArguments, int]:
    """Return what `mcore-lab bench BENCHMARK NAME [options]` says, and the number of ranks.

    Raises LayoutError with the rules that the recipe's layout breaks.
    """
    what = BENCHMARKS[name]
    arguments, nproc = recipe_arguments(
        f"bench {name}", f"{what[0].upper()}{what[1:]}.", argv, settings
    )
    recipe = arguments.recipe
    if broken := recipe.layout.check(recipe.model, recipe.data, nproc):
        raise LayoutError(broken_rules(recipe.name, nproc, broken))
    return arguments, nproc


def measured(name: str, recipe: Recipe, nproc: int) -> tuple[Any, str]:
    """Return what `measure_on_rank` of a benchmark returns on rank 0, and the kind of device."""
    from mcore_lab.runtime import choose_device, launch

    device = choose_device(nproc).type
    if device == "cpu":
        # Before all that imports Megatron-Core: it is done without its warnings and torch.compile.
        cpu.preload()
    benchmark = importlib.import_module(f"mcore_lab.bench.{name}")
    return launch(benchmark.measure_on_rank, nproc, recipe, _ROUNDS, device=device)[0], device
