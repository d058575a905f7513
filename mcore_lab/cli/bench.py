"""`mcore-lab bench`: measure; medians and ratios of what ran side by side."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_lab import cpu
from mcore_lab.cli.arguments import recipe_arguments
from mcore_lab.cli.check import broken_rules
from mcore_lab.config import LaunchSettings, Recipe, RunArguments
from mcore_lab.errors import ConfigError, LayoutError, nearest
from mcore_lab.report.tables import print_json, print_table

if TYPE_CHECKING:
    from mcore_lab.bench.soak import SoakResult

_WHAT = {
    "step": "time a recipe's step beside the same model in a bare Megatron-Core loop",
    "checkpoint": "time the save and the load of a recipe's checkpoint, with optimizer and hashes",
    "soak": "kill a recipe's ranks again and again, and see that each restart changes nothing",
}
_ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class SoakSettings(LaunchSettings):
    """What the command line of `bench soak` says apart from the recipe."""

    kills: int = 200
    """How often ranks are killed."""
    kill_seed: int = 0
    """Decides when, and which ranks."""


def main(argv: Sequence[str]) -> int:
    """Run the benchmark that is named."""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print("usage: mcore-lab bench BENCHMARK NAME [--nproc N] [options]\n")
        print(*(f"  {name:<12}{what}" for name, what in _WHAT.items()), sep="\n")
        return 0 if argv else 2
    if name not in _WHAT:
        hint = nearest(name, _WHAT) or f"; there is {', '.join(_WHAT)}"
        raise ConfigError(f"no benchmark {name}{hint}")
    what = f"{_WHAT[name].capitalize()}."
    settings = SoakSettings if name == "soak" else LaunchSettings
    arguments, nproc = recipe_arguments(f"bench {name}", what, argv[1:], settings)
    recipe = arguments.recipe
    if broken := recipe.layout.check(recipe.model, recipe.data, nproc):
        raise LayoutError(broken_rules(recipe.name, nproc, broken))
    return _BENCHMARKS[name](arguments, nproc)


def _step(arguments: RunArguments, nproc: int) -> int:
    recipe = arguments.recipe
    if recipe.data.pack_documents or recipe.data.sequence_length % recipe.layout.sequence_multiple:
        raise ConfigError("the bare loop pads and packs nothing: choose sequences that divide")
    times, device = _measured("step", recipe, nproc)
    if arguments.json:
        print_json(dataclasses.asdict(times) | {"nproc": nproc, "device": device})
        return 0
    columns = ("recipe", "ranks", "steps", "recipe s", "bare loop s", "ratio")
    seconds = (f"{times.recipe_seconds:.4f}", f"{times.bare_seconds:.4f}", f"{times.ratio:.3f}")
    print_table(columns, [(recipe.name, nproc, times.steps, *seconds)])
    return 0


def _checkpoint(arguments: RunArguments, nproc: int) -> int:
    times, device = _measured("checkpoint", arguments.recipe, nproc)
    if arguments.json:
        print_json(dataclasses.asdict(times) | {"nproc": nproc, "device": device})
        return 0
    columns = ("recipe", "ranks", "rounds", "bytes", "save s", "load s", "async waits s", "disk s")
    measured = (times.save_seconds, times.load_seconds, times.blocked_seconds, times.disk_seconds)
    seconds = [f"{number:.3f}" for number in measured]
    print_table(columns, [(times.recipe, nproc, times.rounds, f"{times.size:,}", *seconds)])
    return 0


def _soak(arguments: RunArguments, nproc: int) -> int:
    kills, seed = arguments.own["kills"], arguments.own["kill_seed"]
    if kills < 1:
        raise ConfigError(f"--kills must not be below 1; it is {kills}")
    cpu.preload()
    from mcore_lab.bench.soak import soak

    # What a failure has left is there to be looked at.
    folder = Path(tempfile.mkdtemp(prefix="mcore_lab-"))
    result = soak(arguments.recipe, nproc, kills, folder, seed=seed, tell=_tell_of_kills)
    shutil.rmtree(folder)
    if arguments.json:
        print_json(dataclasses.asdict(result))
        return 0
    columns = ("recipe", "ranks", "kills", "in saves", "most steps lost", "whole runs")
    row = (result.kills, result.in_saves, result.most_steps_lost, result.whole_runs)
    print_table(columns, [(result.recipe, nproc, *row)])
    print("every step, and the weights and moments at each end, are those of a run left alone")
    return 0


def _tell_of_kills(result: SoakResult) -> None:
    if result.kills % 10 == 0:
        print(f"{result.kills} kills, {result.whole_runs} whole runs", file=sys.stderr)


_BENCHMARKS = {"step": _step, "checkpoint": _checkpoint, "soak": _soak}


def _measured(name: str, recipe: Recipe, nproc: int) -> tuple[Any, str]:
    """Return what `measure_on_rank` of a benchmark returns on rank 0, and the kind of device."""
    from mcore_lab.runtime import choose_device, launch

    device = choose_device(nproc).type
    if device == "cpu":
        # Before all that imports Megatron-Core: it is done without its warnings and torch.compile.
        cpu.preload()
    benchmark = importlib.import_module(f"mcore_lab.bench.{name}")
    return launch(benchmark.measure_on_rank, nproc, recipe, _ROUNDS, device=device)[0], device
