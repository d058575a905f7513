"""`mcore-lab check`: whether a layout fits, before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mcore_lab.cli.arguments import recipe_arguments
from mcore_lab.config import Recipe
from mcore_lab.errors import LayoutError
from mcore_lab.layout import BrokenRule
from mcore_lab.recipes.legs import Leg, legs
from mcore_lab.report.tables import print_json, print_table

_WHAT = "Hold a recipe's layout against its model, its data and the number of ranks; start nothing."

MEANING = {
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
"""What each size of a layout counts."""
_OF_EXPERTS = ("ep", "etp", "edp")


def main(argv: Sequence[str]) -> int:
    """Print the layout's sizes, or every rule that it breaks; return 0 or 2."""
    arguments, nproc = recipe_arguments("check", _WHAT, argv)
    parts = legs(arguments.recipe, nproc)
    found = [leg.broken_rules() for leg in parts]
    if arguments.json:
        results = [_result(leg, broken) for leg, broken in zip(parts, found, strict=True)]
        # A recipe of several layouts has a result for each, beside that of the one it begins in.
        more = {"legs": results} if len(parts) > 1 else {}
        print_json(results[0] | {"ok": not any(found)} | more)
    else:
        for leg, broken in zip(parts, found, strict=True):
            _tell(leg, broken)
    return 2 if any(found) else 0


def require_no_broken_rules(recipe: Recipe, nproc: int) -> None:
    """Raise LayoutError with the rules that the recipe's layout breaks, or one of its layouts."""
    reports = [
        broken_rules(leg.name, leg.ranks, broken)
        for leg in legs(recipe, nproc)
        if (broken := leg.broken_rules())
    ]
    if reports:
        raise LayoutError("\n".join(reports))


def broken_rules(name: str, nproc: int, broken: Sequence[BrokenRule]) -> str:
    """Return all broken rules, one a line, under a line that counts them."""
    rules = "1 broken rule" if len(broken) == 1 else f"{len(broken)} broken rules"
    return "\n  ".join([f"{name} on {_ranks(nproc)}: {rules}", *map(str, broken)])


def _result(leg: Leg, broken: Sequence[BrokenRule]) -> dict[str, Any]:
    return {
        "recipe": leg.recipe.name,
        "nproc": leg.ranks,
        "ok": not broken,
        "sizes": {} if broken else layout_sizes(leg.recipe, leg.ranks),
        "broken": [asdict(rule) for rule in broken],
    }


def _tell(leg: Leg, broken: Sequence[BrokenRule]) -> None:
    if broken:
        print(broken_rules(leg.name, leg.ranks, broken))
        return
    print(f"{leg.name} on {_ranks(leg.ranks)}: ok")
    print_table(("name", "size", "meaning"), _rows(leg.recipe, layout_sizes(leg.recipe, leg.ranks)))


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
    return [(name, size, MEANING[name]) for name, size in sizes.items() if name in shown]


def _ranks(nproc: int) -> str:
    return "1 rank" if nproc == 1 else f"{nproc} ranks"
