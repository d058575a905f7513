"""`mcore-lab recipes`: what there is to run."""

from __future__ import annotations

from collections.abc import Sequence

from mcore_lab.cli.arguments import Parser, usual_world
from mcore_lab.config.tables import TABLES
from mcore_lab.config.values import metavar
from mcore_lab.recipes import describe, load_recipe, recipe_names
from mcore_lab.report.tables import print_json, print_table


def main(argv: Sequence[str]) -> int:
    """List the recipes, or the fields that `--model.transformer.FIELD` can set."""
    parser = Parser(prog="mcore-lab recipes", description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--transformer-fields",
        nargs="?",
        const="",
        metavar="WORD",
        help="list the fields of the installed TransformerConfig, or those with WORD in them",
    )
    options = parser.parse_args(argv)
    if options.transformer_fields is None:
        columns, rows = ("recipe", "ranks", "what it shows"), _recipes()
    else:
        columns, rows = ("field", "value", "what it is"), _fields(options.transformer_fields)
    if options.json:
        names = [column.split()[0] for column in columns]
        print_json([dict(zip(names, row, strict=True)) for row in rows])
    else:
        print_table(columns, rows)
    return 0


def _recipes() -> list[tuple[str, int | str, str]]:
    return [(name, usual_world(load_recipe(name)), describe(name)) for name in recipe_names()]


def _fields(word: str) -> list[tuple[str, int | str, str]]:
    return [
        (name, metavar(field.annotation), field.doc.partition("\n")[0])
        for name, field in TABLES["model.transformer"].known().items()
        if word.lower().replace("-", "_") in f"{name} {field.doc}".lower()
    ]
