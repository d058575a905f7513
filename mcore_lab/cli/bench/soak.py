"""`mcore-lab bench soak`: kill a recipe's ranks again and again."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_lab import cpu
from mcore_lab.cli.bench.found import Found
from mcore_lab.cli.bench.of_recipe import benchmark_arguments
from mcore_lab.config import LaunchSettings
from mcore_lab.errors import ConfigError
from mcore_lab.report.tables import print_table

if TYPE_CHECKING:
    from mcore_lab.bench.soak import SoakResult


@dataclass(frozen=True, kw_only=True)
class SoakSettings(LaunchSettings):
    """What the command line of `bench soak` says apart from the recipe."""

    kills: int = 200
    """How often ranks are killed."""
    kill_seed: int = 0
    """Decides when, and which ranks."""


def measure(argv: Sequence[str]) -> Found:
    """Kill, and return what became of the runs; what a failed soak has left is kept."""
    arguments, nproc = benchmark_arguments("soak", argv, SoakSettings)
    kills, seed = arguments.own["kills"], arguments.own["kill_seed"]
    if kills < 1:
        raise ConfigError(f"--kills must not be below 1; it is {kills}")
    cpu.preload()
    from mcore_lab.bench.soak import soak

    # What a failure has left is there to be looked at.
    folder = Path(tempfile.mkdtemp(prefix="mcore_lab-"))
    result = soak(arguments.recipe, nproc, kills, folder, seed=seed, tell=_tell_of_kills)
    shutil.rmtree(folder)
    return Found(
        values=dataclasses.asdict(result),
        as_json=arguments.json,
        tell=partial(_tell, result),
        nproc=nproc,
    )


def _tell(result: SoakResult) -> None:
    columns = ("recipe", "ranks", "kills", "in saves", "most steps lost", "whole runs")
    row = (result.kills, result.in_saves, result.most_steps_lost, result.whole_runs)
    print_table(columns, [(result.recipe, result.nproc, *row)])
    print("every step, and the weights and moments at each end, are those of a run left alone")


def _tell_of_kills(result: SoakResult) -> None:
    if result.kills % 10 == 0:
        print(f"{result.kills} kills, {result.whole_runs} whole runs", file=sys.stderr)
