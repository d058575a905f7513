"""`mcore-lab bench`: measure; medians and ratios of what ran side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mcore_lab import cpu
from mcore_lab.cli.arguments import recipe_arguments
from mcore_lab.cli.check import broken_rules
from mcore_lab.errors import ConfigError, LayoutError, nearest
from mcore_lab.report.tables import print_json, print_table

_WHAT = "Time a recipe's step beside the same model in a bare Megatron-Core loop."
_ROUNDS = 4
_USAGE = """\
usage: mcore-lab bench step NAME [--nproc N] [options]

  step    a recipe's step beside the same model in a bare Megatron-Core loop"""


def main(argv: Sequence[str]) -> int:
    """Run the benchmark that is named."""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    if name != "step":
        raise ConfigError(f"no benchmark {name}{nearest(name, ['step']) or '; there is step'}")
    return _step(argv[1:])


def _step(argv: Sequence[str]) -> int:
    arguments, nproc = recipe_arguments("bench step", _WHAT, argv)
    recipe = arguments.recipe
    if broken := recipe.layout.check(recipe.model, recipe.data, nproc):
        raise LayoutError(broken_rules(recipe, nproc, broken))
    if recipe.data.pack_documents or recipe.data.sequence_length % recipe.layout.sequence_multiple:
        raise ConfigError("the bare loop pads and packs nothing: choose sequences that divide")

    from mcore_lab.runtime import choose_device, launch

    device = choose_device(nproc).type
    if device == "cpu":
        # Before all that imports Megatron-Core: it is done without its warnings and torch.compile.
        cpu.preload()
    from mcore_lab.bench.step import measure_on_rank

    times = launch(measure_on_rank, nproc, recipe, _ROUNDS, device=device)[0]
    if arguments.json:
        print_json(dataclasses.asdict(times) | {"nproc": nproc, "device": device})
        return 0
    columns = ("recipe", "ranks", "steps", "recipe s", "bare loop s", "ratio")
    seconds = (f"{times.recipe_seconds:.4f}", f"{times.bare_seconds:.4f}", f"{times.ratio:.3f}")
    print_table(columns, [(recipe.name, nproc, times.steps, *seconds)])
    return 0
