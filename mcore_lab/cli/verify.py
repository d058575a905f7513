"""`mcore-lab verify`: whether a layout computes what one rank computes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mcore_lab.cli.arguments import recipe_arguments, require_writable, write_file
from mcore_lab.cli.check import broken_rules
from mcore_lab.config import LaunchSettings, RunArguments
from mcore_lab.errors import ConfigError, LayoutError
from mcore_lab.recipes import later_layouts, shown_layer
from mcore_lab.report.tables import print_json, print_table

if TYPE_CHECKING:
    from mcore_lab.verify import VerificationReport

_WHAT = """Train a recipe on one rank and on its layout, from the same weights, and compare them.
`mcore-lab verify --sweep --help` tells of every layout at once."""


@dataclass(frozen=True, kw_only=True)
class VerifySettings(LaunchSettings):
    """What `mcore-lab verify` says apart from the recipe."""

    steps: int = 3
    """Optimizer steps that are compared."""
    html: str | None = None
    """Write everything that was found, too, into this file: one page, with a heat map."""


def main(argv: Sequence[str]) -> int:
    """Print what was compared and what is off; return 0 if all agrees, else 1."""
    if "--sweep" in argv:
        from mcore_lab.cli import sweep

        return sweep.main(argv)
    if argv and argv[0] in ("--world", "--workers", "--folder", "--svg"):
        raise ConfigError(f"{argv[0]} is of a sweep: mcore-lab verify --sweep {' '.join(argv)}")
    arguments, nproc = recipe_arguments("verify", _WHAT, argv, VerifySettings)
    _require_verifiable(arguments, nproc)

    from mcore_lab.verify import verify

    report = verify(arguments.recipe, arguments.recipe.layout, nproc, steps=arguments.own["steps"])
    result = report.as_json()
    if arguments.json:
        print_json(result)
    else:
        _tell(report, result)
    if page := arguments.own["html"]:
        from mcore_lab.report.verification_page import verification_page

        write_file("--html", page, verification_page(result))
        print(f"written to {page}", file=sys.stderr)
    return 0 if report.passed else 1


def _require_verifiable(arguments: RunArguments, nproc: int) -> None:
    """Raise LabError for whatever can be seen to be in the way without starting anything."""
    from mcore_lab.training.rules import require_trainable
    from mcore_lab.verify.comparable import require_comparable

    recipe = arguments.recipe
    if shown_layer(recipe.name):
        raise ConfigError(
            f"{recipe.name} shows a layer and holds it against one rank itself: run it"
        )
    if later_layouts(recipe.name):
        raise ConfigError(
            f"{recipe.name} goes through several layouts, and its losses are to be one rank's: "
            "run it, or verify one of them (mcore-lab verify tp2_gpt)"
        )
    if arguments.own["steps"] < 1:
        raise ConfigError(f"--steps expects 1 or more; got {arguments.own['steps']}")
    require_writable("--html", arguments.own["html"])
    if broken := recipe.layout.check(recipe.model, recipe.data, nproc):
        raise LayoutError(broken_rules(recipe.title, nproc, broken))
    require_trainable(recipe)
    require_comparable(recipe)


def _tell(report: VerificationReport, result: Mapping[str, Any]) -> None:
    columns = ("kind", "comparisons", "off", "worst error", "tolerance", "where")
    print_table(columns, [_row(**summary) for summary in result["kinds"]])
    print(f"\n{report.conclusion}")
    for hint in report.hints:
        print(f"hint: {hint}")


def _row(kind: str, comparisons: int, off: int, worst: Mapping[str, Any]) -> tuple[object, ...]:
    error, tolerance = (f"{float(worst[name]):.1e}" for name in ("error", "tolerance"))
    return kind, comparisons, off, error, tolerance, worst["name"]
