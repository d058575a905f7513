"""From a command line to ranks that tell the story. Imports torch only when they start."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import socket
import sys
import uuid
from collections.abc import Callable
from contextlib import closing
from functools import partial
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
from mcore_lab.errors import ConfigError, LabError, LayoutError, RankFailedError
from mcore_lab.recipes import later_layouts, layers, load_recipe, shown_layer
from mcore_lab.recipes.legs import going_on, legs, legs_left
from mcore_lab.report.tables import print_table
from mcore_lab.training import RunFolder
from mcore_lab.training.rules import require_traceable, require_trainable
from mcore_lab.training.track import find_tracker

if TYPE_CHECKING:
    from mcore_lab.recipes.layers.parts import LayerReport
    from mcore_lab.training.recorder import Summary, SummaryOfLegs


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
            summary = launch(run_rank, nproc, arguments, device=device)[0]
            assert summary is not None, "rank 0 has a part in every leg"
            return dataclasses.asdict(summary)
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
    if broken := [rule for leg in legs(recipe, world_size) for rule in leg.broken_rules()]:
        raise LayoutError("\n".join(dict.fromkeys(map(str, broken))))
    require_trainable(recipe)
    if arguments.trace:
        _require_traceable(arguments)
    if arguments.track is not None:
        _require_trackable(arguments, arguments.track)
    folder = RunFolder(arguments.run_dir)
    resume = recipe.training.resume
    start = starting_point(recipe.checkpoint.load, resume, folder.checkpoints)
    folder.require_usable(fresh=arguments.fresh, resume=resume, start=start.path if start else None)
    if recipe.data.path is not None:
        text_files(Path(recipe.data.path))


def _require_traceable(arguments: RunArguments) -> None:
    """Raise ConfigError for a run of which nothing can be traced."""
    recipe = arguments.recipe
    if arguments.trace_steps < 1:
        raise ConfigError(f"--trace-steps must not be below 1; it is {arguments.trace_steps}")
    if shown_layer(recipe.name):
        raise ConfigError(f"{recipe.name} shows a layer and takes no step that --trace could see")
    if later_layouts(recipe.name):
        raise ConfigError(
            f"{recipe.name} goes through several layouts, and a trace is of one: trace a recipe "
            "that stays on one (mcore-lab run tp2_gpt --trace)"
        )
    if recipe.training.resume == "none":
        require_traceable(recipe.training.steps)


def _require_trackable(arguments: RunArguments, tracker: str) -> None:
    """Raise LabError for a run that cannot be tracked, or a tracker that is not there."""
    if shown_layer(arguments.recipe.name):
        raise ConfigError(f"{arguments.recipe.name} shows a layer: there is no step to --track")
    find_tracker(tracker)


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

    timeout = arguments.recipe.training.collective_timeout
    with RankLog(_rank()), process_group(timeout_seconds=timeout) as world:
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
    from mcore_lab.training.stop import stop_on_signals

    recorder_class: Callable[..., Recorder] = Recorder
    if run.trace:
        from mcore_lab.training.tracing.recorder import TracingRecorder

        recorder_class = partial(TracingRecorder, trace_steps=run.trace_steps)

    with (
        stop_on_signals() as stop,
        RankLog(_rank()) as log,
        process_group(ranks=ranks, timeout_seconds=run.recipe.training.collective_timeout) as world,
        Console(speaks=world.is_first and not run.json) as console,
    ):
        from mcore_lab.recipes.story import train

        recorder = recorder_class(
            RunFolder(run.run_dir),
            log,
            console,
            recipe_toml=recipe_to_toml(run.recipe, base=load_recipe(run.recipe.name)),
            fresh=leg.fresh,
            launch=run.launch,
            track=run.track,
        )
        with closing(recorder):
            return train(leg.recipe, world, recorder, stop=stop)


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
    arguments = dataclasses.replace(parse_recipe_or_exit(recipe), launch=_torchrun_launch())
    try:
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
            arguments = restarted(arguments)
        require_startable(arguments, int(os.environ.get("WORLD_SIZE", "1")))
        summary = run_rank(arguments)
    except LabError as error:
        exit_with(error)
    if arguments.json and summary and is_rank_0():
        print(json.dumps(dataclasses.asdict(summary)))


def _torchrun_launch() -> str:
    """Return what all ranks of one torchrun's, or of one on each node, have alike, and no others.

    They keep it when they are started again, and also where another launch had the same --rdzv-id.
    """
    named = os.environ.get("TORCHELASTIC_RUN_ID", "none") != "none"
    if not named and os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # Without a rendezvous of its own, torchrun is this process's parent on the only node.
        return f"{socket.gethostname()}-{os.getppid()}"
    from mcore_lab.runtime.parallel import agreed_on

    return agreed_on("launch", uuid.uuid4().hex)
