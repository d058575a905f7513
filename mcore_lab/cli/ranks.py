"""`mcore-lab ranks`: who is who, and what each rank holds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mcore_lab.cli.arguments import recipe_arguments, vocabulary, write_file
from mcore_lab.cli.check import require_no_broken_rules
from mcore_lab.config import LaunchSettings, Recipe
from mcore_lab.layout import RankShare, rank_shares
from mcore_lab.layout.matrices import matrix_cuts
from mcore_lab.recipes.legs import legs
from mcore_lab.report import rank_map_svg
from mcore_lab.report.matrices_svg import matrices_svg
from mcore_lab.report.rank_map import spans
from mcore_lab.report.tables import print_json, print_table

_WHAT = "Show which rank is where in each parallel dimension, what it holds, and the groups."

_KINDS = ("tp", "cp", "pp", "dp", "dp-cp", "ep", "etp", "edp")
_OF_EXPERTS = ("ep", "etp", "edp")


@dataclass(frozen=True, kw_only=True)
class RanksSettings(LaunchSettings):
    """What `mcore-lab ranks` says apart from the recipe."""

    svg: str | None = None
    """Draw the map of ranks as a picture, too, into this file."""
    matrices: str | None = None
    """Draw how each matrix of a layer is cut, too, into this file."""


def main(argv: Sequence[str]) -> int:
    """Print the map of ranks as a table, as JSON or, with `--svg FILE`, as a picture."""
    arguments, nproc = recipe_arguments("ranks", _WHAT, argv, RanksSettings)
    recipe, layout, picture = arguments.recipe, arguments.recipe.layout, arguments.own["svg"]
    require_no_broken_rules(recipe, nproc)
    shares = rank_shares(layout, recipe.model, recipe.data, nproc)
    kinds = [kind for kind in _KINDS if recipe.model.num_moe_experts or kind not in _OF_EXPERTS]
    groups = {kind: layout.groups(kind, nproc) for kind in kinds}
    then = [leg.place for leg in legs(recipe, nproc)[1:]]
    if picture:
        write_file("--svg", picture, rank_map_svg(f"{recipe.title} on {nproc} ranks", shares))
    if matrices := arguments.own["matrices"]:
        write_file("--matrices", matrices, _matrices(recipe, nproc))
    if arguments.json:
        ranks = [asdict(share) for share in shares]
        answer = {"recipe": recipe.name, "nproc": nproc, "ranks": ranks, "groups": groups}
        print_json(answer | ({"then": then} if then else {}))
    else:
        print_table(_columns(kinds), [_row(share, kinds) for share in shares])
        print()
        print_table(("groups", "ranks"), _group_rows(groups))
        if then:
            print(f"\nand then {', then '.join(then)}")
        if written := [file for file in (picture, matrices) if file]:
            print(f"\nwritten to {' and '.join(written)}", file=sys.stderr)
    return 0


def _matrices(recipe: Recipe, nproc: int) -> str:
    layout, longest = recipe.layout, recipe.layout.padded(recipe.data.sequence_length)
    cuts = matrix_cuts(layout, recipe.model, vocabulary(recipe), longest, recipe.model.backend)
    return matrices_svg(recipe.title, layout, cuts, nproc)


def _columns(kinds: Sequence[str]) -> tuple[str, ...]:
    axes = [kind for kind in kinds if "-" not in kind]
    held = ("layers", "tokens", "experts") if "ep" in kinds else ("layers", "tokens")
    return ("rank", *axes, *held)


def _row(share: RankShare, kinds: Sequence[str]) -> tuple[object, ...]:
    axes = [getattr(share.coordinates, kind) for kind in kinds if "-" not in kind]
    tokens = spans(share.sequence) or "of each document"
    row = (share.rank, *axes, spans(share.layers), tokens)
    return (*row, spans([share.experts])) if share.experts else row


def _group_rows(groups: dict[str, list[tuple[int, ...]]]) -> list[tuple[str, str]]:
    return [
        (kind, "  ".join(" ".join(map(str, ranks)) for ranks in members))
        for kind, members in groups.items()
    ]
