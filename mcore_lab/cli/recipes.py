"""`mcore-lab recipes`: what there is to run, recipes and lessons."""

from __future__ import annotations

from collections.abc import Sequence

from mcore_lab import lessons
from mcore_lab.cli.arguments import Parser, usual_world
from mcore_lab.config.tables import TABLES
from mcore_lab.config.values import metavar
from mcore_lab.recipes import describe, load_recipe, recipe_names
from mcore_lab.report.tables import print_json, print_table

Row = tuple[str, int | str, str]


def main(argv: Sequence[str]) -> int:
    """List the recipes and the lessons, or the fields that `--model.transformer.FIELD` can set."""
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
        tables = [
            (("recipe", "ranks", "what it shows"), _recipes()),
            (("lesson", "ranks", "what it teaches"), _lessons()),
        ]
    else:
        tables = [(("field", "value", "what it is"), _fields(options.transformer_fields))]
    if options.json:
        print_json([_named(columns, row) for columns, rows in tables for row in rows])
        return 0
    for number, (columns, rows) in enumerate(tables):
        if number:
            print()
        print_table(columns, rows)
    return 0


def _named(columns: tuple[str, ...], row: Row) -> dict[str, int | str]:
    names = [column.split()[0] for column in columns]
    return dict(zip(names, row, strict=True))


def _recipes() -> list[Row]:
    return [(name, usual_world(load_recipe(name)), describe(name)) for name in recipe_names()]


def _lessons() -> list[Row]:
    return [(name, ranks, lessons.describe(name)) for name, ranks in lessons.LESSONS.items()]


def _fields(word: str) -> list[Row]:
    return [
        (name, metavar(field.annotation), field.doc.partition("\n")[0])
        for name, field in TABLES["model.transformer"].known().items()
        if word.lower().replace("-", "_") in f"{name} {field.doc}".lower()
    ]
