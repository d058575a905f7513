"""From a command line to ranks that tell the story. Imports torch only when they start."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import socket
import sys
import uuid
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
from mcore_lab.errors import LabError, RankFailedError
from mcore_lab.recipes import layers, load_recipe, shown_layer
from mcore_lab.report.tables import print_table
from mcore_lab.training import RunFolder
from mcore_lab.training.rules import require_trainable

if TYPE_CHECKING:
    from mcore_lab.recipes.layers.parts import LayerReport
    from mcore_lab.training.recorder import Summary


def launch_recipe(arguments: RunArguments, nproc: int, max_restarts: int = 0) -> dict[str, Any]:
    """Run a recipe on `nproc` ranks of this machine and return how it ended.

    On this machine's GPUs if there is one a rank, else on CPU. When a rank fails, all of them start
    again from the last checkpoint, up to `max_restarts` times. Raises LabError with what is wrong,
    before any process starts where that can be known.
    """
    arguments = dataclasses.replace(arguments, launch=uuid.uuid4().hex)
    require_startable(arguments, nproc)
    # A thread that waits for one whose core another program has taken would burn its own; OpenMP
    # reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from mcore_lab.runtime import choose_device, launch

    device = choose_device(nproc).type
    for restart in itertools.count(1):
        try:
            return dataclasses.asdict(launch(run_rank, nproc, arguments, device=device)[0])
        except RankFailedError as error:
            if restart > max_restarts:
                raise
            arguments = restarted(arguments)
            start = starting_point(
                arguments.recipe.checkpoint.load,
                arguments.recipe.training.resume,
                RunFolder(arguments.run_dir).checkpoints,
            )
            where = f"from {start.path}" if start else "from the beginning"
            what, _, _ = str(error).partition("\n")
            print(f"{what}: restart {restart} of {max_restarts}, {where}", file=sys.stderr)
    raise AssertionError("a launch ends, or its restarts do")


def restarted(arguments: RunArguments) -> RunArguments:
    """Return what a restart of this launch runs: the rest of what it had begun."""
    folder = RunFolder(arguments.run_dir)
    recipe = arguments.recipe
    if not folder.was_begun_by(arguments.launch):
        return arguments
    if folder.has_saved:
        training = dataclasses.replace(recipe.training, resume="auto")
        recipe = dataclasses.replace(recipe, training=training)
        return dataclasses.replace(arguments, recipe=recipe, fresh=False)
    return dataclasses.replace(arguments, fresh=recipe.training.resume == "none")


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
    from mcore_lab.training.stop import stop_on_signals

    recipe = arguments.recipe
    with (
        stop_on_signals() as stop,
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
            launch=arguments.launch,
        )
        return train(recipe, world, recorder, stop=stop)


def _readable(value: object) -> object:
    return f"{value:.0e}" if isinstance(value, float) and value < 1e-3 else value


def main(recipe: Recipe) -> None:
    """Run a recipe's module: under torchrun as one of its ranks, else as the only one."""
    arguments = dataclasses.replace(parse_recipe_or_exit(recipe), launch=_torchrun_launch())
    try:
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
            arguments = restarted(arguments)
        require_startable(arguments, int(os.environ.get("WORLD_SIZE", "1")))
        summary = run_rank(arguments)
    except LabError as error:
        exit_with(error)
    if arguments.json and is_rank_0():
        print(json.dumps(dataclasses.asdict(summary)))


def _torchrun_launch() -> str:
    """Return what all ranks that one torchrun has started have alike, and no others."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    # Without a rendezvous of its own, torchrun is this process's parent on the only machine.
    return run_id if run_id != "none" else f"{socket.gethostname()}-{os.getppid()}"
