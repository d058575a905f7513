"""`mcore-lab check`: whether a layout fits, before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mcore_lab.cli.arguments import recipe_arguments
from mcore_lab.config import Recipe
from mcore_lab.layout import BrokenRule
from mcore_lab.report.tables import print_json, print_table

_WHAT = "Hold a recipe's layout against its model, its data and the number of ranks; start nothing."

_MEANING = {
    "tp": "ranks that split each weight matrix",
    "cp": "ranks that split each sequence",
    "pp": "ranks that split the layers",
    "vpp": "model chunks of a pipeline rank",
    "dp": "replicas of the model",
    "ep": "ranks that split the experts",
    "etp": "ranks that split each expert's weights",
    "edp": "replicas of each expert",
    "micro_batches": "in a step, for each replica",
}
_OF_EXPERTS = ("ep", "etp", "edp")


def main(argv: Sequence[str]) -> int:
    """Print the layout's sizes, or every rule that it breaks; return 0 or 2."""
    arguments, nproc = recipe_arguments("check", _WHAT, argv)
    recipe = arguments.recipe
    broken = recipe.layout.check(recipe.model, recipe.data, nproc)
    sizes = {} if broken else layout_sizes(recipe, nproc)
    if arguments.json:
        result = {"recipe": recipe.name, "nproc": nproc, "ok": not broken}
        print_json(result | {"sizes": sizes, "broken": [asdict(rule) for rule in broken]})
    elif broken:
        print(broken_rules(recipe, nproc, broken))
    else:
        print(f"{recipe.name} on {_ranks(nproc)}: ok")
        print_table(("name", "size", "meaning"), _rows(recipe, sizes))
    return 2 if broken else 0


def broken_rules(recipe: Recipe, nproc: int, broken: Sequence[BrokenRule]) -> str:
    """Return all broken rules, one a line, under a line that counts them."""
    rules = "1 broken rule" if len(broken) == 1 else f"{len(broken)} broken rules"
    return "\n  ".join([f"{recipe.name} on {_ranks(nproc)}: {rules}", *map(str, broken)])


def layout_sizes(recipe: Recipe, nproc: int) -> dict[str, int]:
    """Return the sizes of a layout that breaks no rule, and the micro-batches of a step."""
    layout, data = recipe.layout, recipe.data
    dp = layout.data_parallel_size(nproc)
    return {
        **{name: getattr(layout, name) for name in ("tp", "cp", "pp", "vpp")},
        "dp": dp,
        "ep": layout.ep,
        "etp": layout.etp,
        "edp": layout.expert_data_parallel_size(nproc),
        "micro_batches": data.global_batch_size // (data.micro_batch_size * dp),
    }


def _rows(recipe: Recipe, sizes: dict[str, int]) -> list[tuple[Any, ...]]:
    shown = sizes if recipe.model.num_moe_experts else sizes.keys() - set(_OF_EXPERTS)
    return [(name, size, _MEANING[name]) for name, size in sizes.items() if name in shown]


def _ranks(nproc: int) -> str:
    return "1 rank" if nproc == 1 else f"{nproc} ranks"
