"""`mcore-lab report`: a run as one page, with its curves, its pictures and what was traced."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mcore_lab.cli.arguments import Parser, require_writable, vocabulary, write_file
from mcore_lab.cli.runs import run_in
from mcore_lab.config import Recipe, recipe_from_toml
from mcore_lab.errors import LayoutError
from mcore_lab.recipes import find_recipe
from mcore_lab.recipes.files import is_file
from mcore_lab.report.run_page import RunReport, run_page
from mcore_lab.report.tables import print_json
from mcore_lab.training import RunFolder


def main(argv: Sequence[str]) -> int:
    """Write one HTML page of a run; what it has no record of, the page says."""
    options = _options(argv)
    folder = run_in(options.run)
    report = _report(folder)
    page = options.out or folder.path / "report.html"
    require_writable("--out", page)
    write_file("--out", page, run_page(report))
    if options.json:
        print_json(_as_json(folder, page, report))
    else:
        print(page)
        for what in report.missing():
            print(f"missing: {what}", file=sys.stderr)
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="mcore-lab report", description=main.__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="the page (default: report.html in the folder)"
    )
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    return parser.parse_args(argv)


def _report(folder: RunFolder) -> RunReport:
    # A recipe of one's own is read as it is, without its module: that is code, which is not run to
    # look at what was.
    file = folder.path / "recipe.toml"
    recipe = recipe_from_toml(file)
    if not is_file(recipe.name):
        recipe = find_recipe(str(file))
    traces = folder.traces()
    return RunReport(
        name=recipe.title,
        layout=recipe.layout,
        model=recipe.model,
        data=recipe.data,
        vocab_size=vocabulary(recipe),
        backend=traces[0].backend if traces else recipe.model.backend,
        world_size=traces[0].world_size if traces else _ranks_of(folder, recipe),
        metrics=folder.metrics(),
        validations=folder.validations(),
        traces=traces,
    )


def _ranks_of(folder: RunFolder, recipe: Recipe) -> int | None:
    """Return how many ranks there were, going by their logs, if the layout can have so many."""
    ranks = folder.ranks_that_logged()
    try:
        recipe.layout.require(recipe.model, recipe.data, ranks)
    except LayoutError:
        return None
    return ranks


def _as_json(folder: RunFolder, page: Path, report: RunReport) -> dict[str, Any]:
    idle = report.bubble
    return {
        "run": str(folder.path),
        "page": str(page),
        "missing": report.missing(),
        "ranks": report.world_size,
        "bubble": asdict(idle) | {"ideal": idle.ideal} if idle else None,
        "communication": [asdict(one) for one in report.traffic],
        "memory": [{"rank": trace.rank} | trace.memory for trace in report.traces],
    }
