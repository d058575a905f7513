"""`mcore-lab verify --sweep`: every layout that the rules allow, each against one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_lab.cli.arguments import Parser, require_writable, write_file
from mcore_lab.config import parse_recipe
from mcore_lab.errors import ConfigError
from mcore_lab.recipes import find_recipe, shown_layer
from mcore_lab.report.tables import print_json, print_table

if TYPE_CHECKING:
    from mcore_lab.config import Recipe
    from mcore_lab.verify.sweep import Outcome, Sweep

_SMALL = ("dense", "moe")
_WHAT = """Verify every layout up to N ranks that the rules allow: of the recipes that are named, or
of dense and moe, a small model of each kind. What is known already is not run again. The options
of `mcore-lab verify NAME` that name a part of a recipe, such as --model.num-layers 8 or
--training.precision bf16, hold for all of them."""


def main(argv: Sequence[str]) -> int:
    """Tell of each layout in a line, of all of them in a table; return 0 if all agree, else 1."""
    own, laid_over = _apart(argv)
    options = _parser().parse_args(own)
    if min(options.world, options.workers, options.steps) < 1:
        raise ConfigError("--world, --workers and --steps expect 1 or more")
    require_writable("--svg", options.svg)
    named = {
        name: _of_sweep(_whole_model(name), laid_over)
        for name in options.recipes
        if name not in _SMALL
    }

    from mcore_lab.verify.layouts import allowed_layouts
    from mcore_lab.verify.sweep import DENSE, MOE, Outcome, sweep

    named |= {small.name: _of_sweep(small, laid_over) for small in (DENSE, MOE)}
    recipes = [named[name] for name in options.recipes or _SMALL]
    total = sum(len(allowed_layouts(recipe, options.world)[0]) for recipe in recipes)
    found = sweep(
        recipes,
        options.world,
        Path(options.folder),
        steps=options.steps,
        workers=options.workers,
    )
    for number, one in enumerate(found, start=1):
        if isinstance(one, Outcome):
            if not options.json:
                print(_line(number, total, one), flush=True)
        else:
            return _tell(one, laid_over, as_json=options.json, svg=options.svg)
    raise AssertionError("a sweep ends with all of its outcomes")


def _parser() -> Parser:
    parser = Parser(prog="mcore-lab verify --sweep", description=_WHAT)
    what = "recipes, TOML files, dense or moe"
    parser.add_argument("recipes", nargs="*", metavar="NAME", help=what)
    parser.add_argument("--sweep", action="store_true", help="this")
    parser.add_argument("--world", type=int, default=8, metavar="N", help="ranks at most (8)")
    parser.add_argument("--workers", type=int, default=1, help="layouts at a time (1)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps compared (2)")
    parser.add_argument("--folder", default="runs/sweep", help="what is known is kept here")
    parser.add_argument("--svg", metavar="FILE", help="draw the matrix: a square a layout")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _apart(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words for the sweep, and the options of recipes, which name a part: `--data.x`."""
    own: list[str] = []
    laid_over: list[str] = []
    into = own
    for word in argv:
        if word.startswith("--"):
            into = laid_over if "." in word.partition("=")[0] else own
        if word.startswith("--layout."):
            raise ConfigError(f"{word}: a sweep tries every layout; leave it out")
        into.append(word)
    return own, laid_over


def _whole_model(name: str) -> Recipe:
    recipe = find_recipe(name)
    if shown_layer(recipe.name):
        raise ConfigError(f"{name} shows a layer and holds it against one rank itself: run it")
    return recipe


def _of_sweep(recipe: Recipe, laid_over: Sequence[str]) -> Recipe:
    from mcore_lab.layout import ParallelLayout
    from mcore_lab.training.rules import require_trainable
    from mcore_lab.verify.comparable import require_comparable

    recipe = parse_recipe(recipe, laid_over, "mcore-lab verify --sweep").recipe
    recipe = replace(recipe, layout=ParallelLayout())
    require_trainable(recipe)
    require_comparable(recipe)
    return recipe


def _line(number: int, total: int, one: Outcome) -> str:
    where = f"{one.recipe} on {one.world_size} rank{'s' * (one.world_size > 1)}"
    line = f"{number}/{total}  {where}  {one.layout or 'nothing split'}  {one.status}"
    line += f"  {one.seconds:.1f} s"
    return line if one.status == "passed" else f"{line}\n  {one.conclusion}"


def _tell(sweep: Sweep, laid_over: Sequence[str], *, as_json: bool, svg: str | None) -> int:
    result = sweep.as_json()
    result["command"] = " ".join([result["command"], *laid_over])
    if svg:
        from mcore_lab.report.sweep_matrix import sweep_matrix_svg

        write_file("--svg", svg, sweep_matrix_svg([result]))
    if as_json:
        print_json(result)
    else:
        columns = ("model", "passed", "wrong", "failed", "refused by rules")
        rows = [(name, *counts.values()) for name, counts in result["summary"].items()]
        print_table(columns, rows)
    return 0 if all(one.status == "passed" for one in sweep.outcomes) else 1
