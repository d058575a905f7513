"""`mcore-lab run`: train a recipe, or give a lesson, on ranks of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mcore_lab.cli.arguments import recipe_arguments
from mcore_lab.cli.check import require_no_broken_rules
from mcore_lab.cli.machines import require_one_machine
from mcore_lab.config import LaunchSettings, TraceSettings
from mcore_lab.errors import ConfigError, nearest
from mcore_lab.lessons import LESSONS
from mcore_lab.recipes import recipe_names
from mcore_lab.report.tables import print_json

_WHAT = f"""\
Train a recipe on N ranks of this machine: on its GPUs if there are enough, else on CPU.
Or give a lesson on them: {", ".join(LESSONS)}."""


@dataclass(frozen=True, kw_only=True)
class RunSettings(TraceSettings, LaunchSettings):
    """What the command line of `run` says apart from the recipe."""

    max_restarts: int = 0
    """How many times the ranks are started again, from the last checkpoint, when one of them has
    failed."""
    compare: bool = False
    """Run the recipe in all the ways that it compares, and show them side by side."""


def main(argv: Sequence[str]) -> int:
    """Check the layout, start the ranks, and return 0 when they have all finished."""
    _require_known(argv)
    if argv:
        require_one_machine(argv, _WHAT, RunSettings)
    if argv and argv[0] in LESSONS:
        from mcore_lab.lessons.start import launch_lesson

        launch_lesson(argv[0], argv[1:])
        return 0
    arguments, nproc = recipe_arguments("run", _WHAT, argv, RunSettings)
    if arguments.own["compare"]:
        if arguments.trace:
            raise ConfigError("--compare runs several layouts: --trace one of them without it")
        if arguments.track is not None:
            raise ConfigError("--compare runs several layouts: --track one of them without it")
        from mcore_lab.cli.comparison import show

        return show(arguments)
    require_no_broken_rules(arguments.recipe, nproc)

    from mcore_lab.recipes.start import launch_recipe

    max_restarts = arguments.own["max_restarts"]
    if max_restarts < 0:
        raise ConfigError(f"--max-restarts must not be below 0; it is {max_restarts}")
    summary = launch_recipe(arguments, nproc, max_restarts)
    if arguments.json:
        print_json(summary)
    return 0


def _require_known(argv: Sequence[str]) -> None:
    """Raise ConfigError with the near names for a name that is no recipe's and no lesson's."""
    known = [*recipe_names(), *LESSONS]
    name = argv[0] if argv else "-h"
    if name not in known and not name.startswith("-") and not name.endswith((".toml", ".py")):
        hint = nearest(name, known) or f"; there is {', '.join(known)}"
        raise ConfigError(f"no recipe or lesson {name}{hint}")
