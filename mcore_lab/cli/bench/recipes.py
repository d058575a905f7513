"""`mcore-lab bench recipes`: how long each recipe and each lesson takes on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mcore_lab.bench.recipes import Timed, time_lesson, time_run
from mcore_lab.cli.arguments import Parser, usual_world
from mcore_lab.cli.bench.found import Found
from mcore_lab.errors import ConfigError, nearest
from mcore_lab.lessons import LESSONS
from mcore_lab.recipes import load_recipe, recipe_names

_WHAT = "Run recipes and lessons as they are, one after the other, and say how long each took."


def measure(argv: Sequence[str]) -> Found:
    """Run recipes and lessons as they are, one after the other, and return how long each took."""
    parser = Parser(prog="mcore-lab bench recipes", description=_WHAT)
    parser.add_argument(
        "names",
        metavar="NAME",
        nargs="*",
        help="a recipe or a lesson; all if none is named, which takes a quarter of an hour",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    known = [*recipe_names(), *LESSONS]
    for name in options.names:
        if name not in known:
            hint = nearest(name, known) or f"; there is {', '.join(known)}"
            raise ConfigError(f"no recipe or lesson {name}{hint}")
    found = []
    names = options.names or known
    width = max(map(len, names)) + 2
    with tempfile.TemporaryDirectory(prefix="mcore_lab-") as folder:
        for name in names:
            found.append(_timed(name, Path(folder)))
            if not options.json:
                # As they come: all of them take a quarter of an hour.
                print(f"{name:<{width}}{_said(found[-1])}", flush=True)
    return Found(
        values={"runs": [asdict(one) for one in found]},
        as_json=options.json,
        tell=lambda: None,  # It has been told as it came.
    )


def _said(one: Timed) -> str:
    return f"{one.ranks} {'rank ' if one.ranks == 1 else 'ranks'} {one.seconds:7.1f} s"


def _timed(name: str, folder: Path) -> Timed:
    if name in LESSONS:
        return time_lesson(name, LESSONS[name])
    return time_run(name, usual_world(load_recipe(name)), folder)
