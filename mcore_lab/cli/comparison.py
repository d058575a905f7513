"""`mcore-lab run NAME --compare`: a recipe in all the ways that it compares, side by side."""

from __future__ import annotations

import dataclasses
import json
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_lab import cpu
from mcore_lab.config import RunArguments
from mcore_lab.errors import BackendError, ConfigError
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes import compares, recipe_names
from mcore_lab.report.tables import print_json, print_table

if TYPE_CHECKING:
    from mcore_lab.bench.sequence_memory import Trained

_RESULT, _CURVES = "comparison.json", "losses.svg"
_COLUMNS = (
    "implementation",
    "ranks",
    "parameters a rank",
    "peak MiB a rank",
    "saved",
    "first loss",
    "last loss",
    "apart",
)


def show(arguments: RunArguments) -> int:
    """Run them all, and print a table, or JSON; both are kept in the run folder as well."""
    recipe, folder = arguments.recipe, arguments.run_dir
    if not compares(recipe.name):
        known = ", ".join(filter(compares, recipe_names()))
        raise ConfigError(f"{recipe.name} compares nothing: --compare is for {known}")
    if arguments.nproc is not None or recipe.layout != ParallelLayout():
        raise ConfigError("--compare has numbers of ranks and layouts of its own: leave them out")
    if recipe.training.steps < 1:
        raise ConfigError("--compare needs a step or more: --training.steps 1")
    if (folder / _RESULT).exists() and not arguments.fresh:
        raise ConfigError(
            f"the folder {folder} holds a comparison: --fresh makes it anew, "
            "--run-dir names another"
        )

    from mcore_lab.runtime import choose_device

    if choose_device(1).type == "cpu":
        # Before all that imports Megatron-Core: it is done without its warnings.
        cpu.preload()
    from mcore_lab.bench.sequence_memory import REPORTED, compare

    found: list[Trained] = []
    for trained in compare(recipe, folder):
        found.append(trained)
        if not arguments.json:
            _tell(trained)
    rows = [dataclasses.asdict(trained) for trained in found]
    (folder / _RESULT).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if arguments.json:
        print_json(rows)
        return 0
    print_table(_COLUMNS, [*map(_row, found), *REPORTED])
    print(_drawn(folder, found))
    return 0


def _tell(trained: Trained) -> None:
    loss = f"loss {trained.losses[-1]:.4f} after {len(trained.losses)} steps"
    print(f"{trained.implementation} on {_ranks(trained)}: {loss}", flush=True)


def _ranks(trained: Trained) -> str:
    return "1 rank" if trained.ranks == 1 else f"{trained.ranks} ranks"


def _row(trained: Trained) -> tuple[object, ...]:
    return (
        trained.implementation,
        trained.ranks,
        f"{trained.parameters:,}",
        f"{trained.peak_bytes / 2**20:.2f}",
        f"{trained.saved:.2%}" if trained.ranks > 1 else "",
        f"{trained.losses[0]:.4f}",
        f"{trained.losses[-1]:.6f}",
        f"{trained.apart:.1e}" if trained.ranks > 1 else "",
    )


def _drawn(folder: Path, found: list[Trained]) -> str:
    """Draw the curves, if there is what draws; return what is said of them."""
    from mcore_lab.report.loss_curves import plot_losses

    families = {
        family: {f"{one.implementation}, {_ranks(one)}": one.losses for one in of_family}
        for family, of_family in groupby(found, lambda one: one.implementation.partition(",")[0])
    }
    try:
        plot_losses(folder / _CURVES, families)
    except BackendError as error:
        return f"all losses are in {folder / _RESULT}; {error}"
    return f"all losses are in {folder / _RESULT}, and drawn in {folder / _CURVES}"
