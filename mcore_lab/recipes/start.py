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
from mcore_lab.errors import LabError, LayoutError
from mcore_lab.recipes import later_layouts, layers, load_recipe, shown_layer
from mcore_lab.recipes.legs import going_on, legs, legs_left
from mcore_lab.report.tables import print_table
from mcore_lab.training import RunFolder
from mcore_lab.training.rules import require_trainable

if TYPE_CHECKING:
    from mcore_lab.recipes.layers.parts import LayerReport
    from mcore_lab.training.recorder import Summary, SummaryOfLegs


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
    summary = launch(run_rank, nproc, arguments, device=device)[0]
    assert summary is not None, "rank 0 has a part in every leg"
    return dataclasses.asdict(summary)


def require_startable(arguments: RunArguments, world_size: int) -> None:
    """Raise LabError for whatever can be seen to be wrong without starting anything."""
    recipe = arguments.recipe
    if broken := [rule for leg in legs(recipe, world_size) for rule in leg.broken_rules()]:
        raise LayoutError("\n".join(dict.fromkeys(map(str, broken))))
    require_trainable(recipe)
    folder = RunFolder(arguments.run_dir)
    resume = recipe.training.resume
    start = starting_point(recipe.checkpoint.load, resume, folder.checkpoints)
    folder.require_usable(fresh=arguments.fresh, resume=resume, start=start.path if start else None)
    if recipe.data.path is not None:
        text_files(Path(recipe.data.path))


def run_rank(arguments: RunArguments) -> Summary | LayerReport | None:
    """Run the recipe on this rank: what `launch` and torchrun start once a rank.

    Returns how training ended, or what the layer of a recipe that shows one has done; nothing on a
    rank that is needed for no leg.
    """
    if layer := shown_layer(arguments.recipe.name):
        return _show(layer, arguments)
    if not later_layouts(arguments.recipe.name):
        return _train(arguments, arguments)
    return _train_legs(arguments, int(os.environ.get("WORLD_SIZE", "1")))


def _show(layer: str, arguments: RunArguments) -> LayerReport:
    """Show the layer of a recipe that shows one, in a table."""
    from mcore_lab.runtime import RankLog, process_group

    with RankLog(_rank()), process_group() as world:
        show = import_module(f"{layers.__name__}.{layer}").show
        report: LayerReport = show(arguments.recipe, world)
        if world.is_first and not arguments.json:
            columns, rows = list(report.ranks[0]), [row.values() for row in report.ranks]
            print_table(columns, [list(map(_readable, row)) for row in rows])
            print(report.remark)
    return report


def _train(leg: RunArguments, run: RunArguments, ranks: int | None = None) -> Summary:
    """Train on this rank: a run, or a leg of it, on the first `ranks` if not on all."""
    from mcore_lab.runtime import RankLog, process_group
    from mcore_lab.training.console import Console
    from mcore_lab.training.recorder import Recorder

    with (
        RankLog(_rank()) as log,
        process_group(ranks=ranks) as world,
        Console(speaks=world.is_first and not run.json) as console,
    ):
        from mcore_lab.recipes.story import train

        recorder = Recorder(
            RunFolder(run.run_dir),
            log,
            console,
            recipe_toml=recipe_to_toml(run.recipe, base=load_recipe(run.recipe.name)),
            fresh=leg.fresh,
        )
        return train(leg.recipe, world, recorder)


def _train_legs(run: RunArguments, world_size: int) -> SummaryOfLegs | None:
    """Train one leg after the other, as long as this rank is needed; on rank 0, all of them."""
    from mcore_lab.training.recorder import LegSummary, SummaryOfLegs

    ended: list[LegSummary] = []
    how = run
    for leg in legs_left(run, world_size):
        if _rank() >= leg.ranks:
            break
        how = leg.to_run(how)
        summary = _train(how, run, leg.ranks)
        ended.append(LegSummary(**vars(summary), ranks=leg.ranks, layout=leg.layout))
        how = going_on(how, has_saved=summary.checkpoint is not None)
    if is_rank_0() and not run.json:
        rows = [(leg.steps, leg.ranks, leg.layout, leg.loss, leg.checkpoint) for leg in ended]
        print_table(("to step", "ranks", "layout", "loss", "checkpoint"), rows)
    return SummaryOfLegs(**vars(summary), legs=tuple(ended)) if ended else None


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


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
    if arguments.json and summary and is_rank_0():
        print(json.dumps(dataclasses.asdict(summary)))
