"""`mcore-lab run`: train a recipe on ranks of this machine."""

from __future__ import annotations

from collections.abc import Sequence

from mcore_lab.cli.arguments import recipe_arguments
from mcore_lab.cli.check import require_no_broken_rules
from mcore_lab.report.tables import print_json

_WHAT = "Train a recipe on N ranks of this machine: on its GPUs if there are enough, else on CPU."


def main(argv: Sequence[str]) -> int:
    """Check the layout, start the ranks, and return 0 when they have all finished."""
    arguments, nproc = recipe_arguments("run", _WHAT, argv)
    require_no_broken_rules(arguments.recipe, nproc)

    from mcore_lab.recipes.start import launch_recipe

    summary = launch_recipe(arguments, nproc)
    if arguments.json:
        print_json(summary)
    return 0
