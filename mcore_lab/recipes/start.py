"""From a command line to ranks that tell the story. Imports torch only when they start."""

from __future__ import annotations

import dataclasses
import json
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_lab.checkpoint import starting_point
from mcore_lab.config import (
    Recipe,
    RunArguments,
    exit_with,
    is_rank_0,
    parse_recipe_or_exit,
    recipe_to_toml,
)
from mcore_lab.data import text_files
from mcore_lab.errors import LabError
from mcore_lab.recipes import layers, load_recipe, shown_layer
from mcore_lab.report.tables import print_table
from mcore_lab.training import RunFolder
from mcore_lab.training.rules import require_trainable

if TYPE_CHECKING:
    from mcore_lab.recipes.layers.parts import LayerReport
    from mcore_lab.training.recorder import Summary


def launch_recipe(arguments: RunArguments, nproc: int) -> dict[str, Any]:
    """Run a recipe on `nproc` ranks of this machine and return how it ended.

    On this machine's GPUs if there is one a rank, else on CPU. Raises LabError with what is wrong,
    before any process starts where that can be known.
    """
    require_startable(arguments, nproc)
    # A thread that waits for one whose core another program has taken would burn its own; OpenMP
    # reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from mcore_lab.runtime import choose_device, launch

    device = choose_device(nproc).type
    return dataclasses.asdict(launch(run_rank, nproc, arguments, device=device)[0])


def require_startable(arguments: RunArguments, world_size: int) -> None:
    """Raise LabError for whatever can be seen to be wrong without starting anything."""
    recipe = arguments.recipe
    recipe.layout.require(recipe.model, recipe.data, world_size)
    require_trainable(recipe)
    folder = RunFolder(arguments.run_dir)
    resume = recipe.training.resume
    start = starting_point(recipe.checkpoint.load, resume, folder.checkpoints)
    folder.require_usable(fresh=arguments.fresh, resume=resume, start=start.path if start else None)
    if recipe.data.path is not None:
        text_files(Path(recipe.data.path))


def run_rank(arguments: RunArguments) -> Summary | LayerReport:
    """Run the recipe on this rank: what `launch` and torchrun start once a rank.

    Returns how training ended, or what the layer of a recipe that shows one has done.
    """
    from mcore_lab.runtime import RankLog, process_group
    from mcore_lab.training.console import Console
    from mcore_lab.training.recorder import Recorder

    recipe = arguments.recipe
    with (
        RankLog(int(os.environ.get("RANK", "0"))) as log,
        process_group() as world,
        Console(speaks=world.is_first and not arguments.json) as console,
    ):
        if layer := shown_layer(recipe.name):
            report: LayerReport = import_module(f"{layers.__name__}.{layer}").show(recipe, world)
            if world.is_first and not arguments.json:
                columns, rows = list(report.ranks[0]), [row.values() for row in report.ranks]
                print_table(columns, [list(map(_readable, row)) for row in rows])
                print(report.remark)
            return report

        from mcore_lab.recipes.story import train

        recorder = Recorder(
            RunFolder(arguments.run_dir),
            log,
            console,
            recipe_toml=recipe_to_toml(recipe, base=load_recipe(recipe.name)),
            fresh=arguments.fresh,
        )
        return train(recipe, world, recorder)


def _readable(value: object) -> object:
    return f"{value:.0e}" if isinstance(value, float) and value < 1e-3 else value


def main(recipe: Recipe) -> None:
    """Run a recipe's module: under torchrun as one of its ranks, else as the only one."""
    arguments = parse_recipe_or_exit(recipe)
    try:
        require_startable(arguments, int(os.environ.get("WORLD_SIZE", "1")))
        summary = run_rank(arguments)
    except LabError as error:
        exit_with(error)
    if arguments.json and is_rank_0():
        print(json.dumps(dataclasses.asdict(summary)))
