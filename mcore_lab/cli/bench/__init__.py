"""`mcore-lab bench`: measure; medians and ratios of what ran side by side."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mcore_lab.bench.machine import this_machine
from mcore_lab.errors import ConfigError, nearest

if TYPE_CHECKING:
    from mcore_lab.cli.bench.found import Found

BENCHMARKS = {
    "launch": "time until ranks stand in a process group: forked, by torchrun and by spawn",
    "step": "time a recipe's step beside three other loops of the same model",
    "trace": "time steps that --trace records beside steps of the same run that it does not",
    "checkpoint": "time the save and the load of a recipe's checkpoint, with optimizer and hashes",
    "soak": "kill a recipe's ranks again and again, and see that each restart changes nothing",
    "recipes": "time recipes and lessons, as they are, from the command to its end",
    "collectives": "check, count and time collectives in the groups of a layout",
}


def main(argv: Sequence[str]) -> int:
    """Run the benchmark that is named, by the `measure` of the module of that name."""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print("usage: mcore-lab bench BENCHMARK [NAME] [--nproc N] [options]\n")
        print(*(f"  {name:<13}{what}" for name, what in BENCHMARKS.items()), sep="\n")
        print("\nNAME is a recipe: several for recipes, none for launch and collectives.")
        return 0 if argv else 2
    if name not in BENCHMARKS:
        hint = nearest(name, BENCHMARKS) or f"; there is {', '.join(BENCHMARKS)}"
        raise ConfigError(f"no benchmark {name}{hint}")
    machine = this_machine()
    found: Found = importlib.import_module(f"{__name__}.{name}").measure(argv[1:])
    found.show(machine)
    return 0
