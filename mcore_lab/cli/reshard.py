"""`mcore-lab checkpoint reshard`: write a checkpoint as another layout would have written it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mcore_lab.checkpoint.folders import require_checkpoint
from mcore_lab.cli.arguments import smallest_world
from mcore_lab.cli.check import broken_rules
from mcore_lab.config import LaunchSettings, parse_recipe
from mcore_lab.errors import ConfigError, LayoutError
from mcore_lab.report.tables import print_json

_PROG = "mcore-lab checkpoint reshard"
_USAGE = f"""\
usage: {_PROG} SRC DST [--nproc N] [--layout.tp N ...] [--module FILE.py] [--json]

Write the checkpoint SRC as another layout would have written it, into DST/step-N.

SRC is a checkpoint, or a run's folder for its latest. The layout is the one that SRC was written
on, with what is said of it here. Its ranks are processes of this machine, on CPU: N of them, or as
few as hold the model once. They take no step and read no data. A model of your own also takes
--module FILE.py, the file that builds it: a checkpoint alone runs no code."""


@dataclass(frozen=True, kw_only=True)
class ReshardSettings(LaunchSettings):
    """What `mcore-lab checkpoint reshard` says apart from the recipe."""

    module: str | None = None
    """The file of Python that builds the model, if it is one of your own."""


def main(argv: Sequence[str]) -> int:
    """Write the checkpoint, say where it is, and return 0."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    if len(argv) < 2 or any(word.startswith("-") for word in argv[:2]):
        raise ConfigError(f"two folders come first: {_PROG} SRC DST ...")
    source, target = require_checkpoint(Path(argv[0])), Path(argv[1])

    from mcore_lab.recipes.carried import recipe_in, with_named_module
    from mcore_lab.recipes.reshard import reshard

    arguments = parse_recipe(recipe_in(source), argv[2:], _PROG, ReshardSettings)
    recipe = with_named_module(arguments.recipe, source, arguments.own["module"])
    nproc = smallest_world(recipe.layout) if arguments.nproc is None else arguments.nproc
    if broken := recipe.layout.check(recipe.model, recipe.data, nproc):
        raise LayoutError(broken_rules(recipe.name, nproc, broken))
    written = reshard(source, target, recipe, nproc)
    if arguments.json:
        print_json({"checkpoint": str(written), "nproc": nproc})
    else:
        print(f"checkpoint {written}, of {nproc} rank{'s' * (nproc > 1)}")
    return 0
