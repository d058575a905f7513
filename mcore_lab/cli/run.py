"""`mcore-lab run`: train a recipe on ranks of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mcore_lab.cli.arguments import recipe_arguments
from mcore_lab.cli.check import require_no_broken_rules
from mcore_lab.config import LaunchSettings
from mcore_lab.errors import ConfigError
from mcore_lab.report.tables import print_json

_WHAT = "Train a recipe on N ranks of this machine: on its GPUs if there are enough, else on CPU."


@dataclass(frozen=True, kw_only=True)
class RunSettings(LaunchSettings):
    """What the command line of `run` says apart from the recipe."""

    max_restarts: int = 0
    """How many times the ranks are started again, from the last checkpoint, when one of them has
    failed."""


def main(argv: Sequence[str]) -> int:
    """Check the layout, start the ranks, and return 0 when they have all finished."""
    arguments, nproc = recipe_arguments("run", _WHAT, argv, RunSettings)
    require_no_broken_rules(arguments.recipe, nproc)

    from mcore_lab.recipes.start import launch_recipe

    max_restarts = arguments.own["max_restarts"]
    if max_restarts < 0:
        raise ConfigError(f"--max-restarts must not be below 0; it is {max_restarts}")
    summary = launch_recipe(arguments, nproc, max_restarts)
    if arguments.json:
        print_json(summary)
    return 0
