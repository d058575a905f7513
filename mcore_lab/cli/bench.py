"""`mcore-lab bench`: measure; medians and ratios of what ran side by side."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

from mcore_lab import cpu
from mcore_lab.cli.arguments import recipe_arguments
from mcore_lab.cli.check import broken_rules
from mcore_lab.config import Recipe, RunArguments
from mcore_lab.errors import ConfigError, LayoutError, nearest
from mcore_lab.report.tables import print_json, print_table

_WHAT = {
    "step": "time a recipe's step beside the same model in a bare Megatron-Core loop",
    "checkpoint": "time the save and the load of a recipe's checkpoint, with optimizer and hashes",
}
_ROUNDS = 4


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
    arguments, nproc = recipe_arguments(f"bench {name}", what, argv[1:])
    recipe = arguments.recipe
    if broken := recipe.layout.check(recipe.model, recipe.data, nproc):
        raise LayoutError(broken_rules(recipe.name, nproc, broken))
    return (_step if name == "step" else _checkpoint)(arguments, nproc)


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
    columns = ("recipe", "ranks", "rounds", "bytes", "save s", "load s")
    seconds = (f"{times.save_seconds:.3f}", f"{times.load_seconds:.3f}")
    print_table(columns, [(times.recipe, nproc, times.rounds, f"{times.size:,}", *seconds)])
    return 0


def _measured(name: str, recipe: Recipe, nproc: int) -> tuple[Any, str]:
    """Return what `measure_on_rank` of a benchmark returns on rank 0, and the kind of device."""
    from mcore_lab.runtime import choose_device, launch

    device = choose_device(nproc).type
    if device == "cpu":
        # Before all that imports Megatron-Core: it is done without its warnings and torch.compile.
        cpu.preload()
    benchmark = importlib.import_module(f"mcore_lab.bench.{name}")
    return launch(benchmark.measure_on_rank, nproc, recipe, _ROUNDS, device=device)[0], device
