"""Each recipe trains, and from one initial checkpoint it computes what one rank computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from one_rank import OneRank
from small_runs import changed, grad_norms, losses, run

from mcore_lab.cli.arguments import usual_world
from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes import later_layouts, load_recipe, recipe_names, shown_layer

# A recipe of several layouts goes on from checkpoints of its own: see test_reshard_gpt.py. That of
# 18 M parameters is in test_sequence_memory.py, at another size.
STRATEGIES = [
    name
    for name in recipe_names()
    if name not in ("text_gpt", "sequence_memory")
    and not shown_layer(name)
    and not later_layouts(name)
]
STEPS = 3


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], OneRank]:
    """Return what gives a model's training on one rank, run once for the recipes that share it."""
    known: dict[str, OneRank] = {}

    def of(recipe: Recipe) -> OneRank:
        alone = replace(recipe, layout=ParallelLayout())
        shared = repr(replace(alone, name=""))
        if shared not in known:
            known[shared] = OneRank(alone, tmp_path_factory.mktemp(recipe.name))
        return known[shared]

    return of


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "tp2_gpt"])
def test_from_one_checkpoint_a_recipe_computes_what_one_rank_computes(
    name: str, one_rank: Callable[[Recipe], OneRank], tmp_path: Path
):
    """Losses to 1e-5 and gradient norms to 1e-4, relative: fp32 sums in another order."""
    recipe = changed(load_recipe(name), training={"steps": STEPS})
    one = one_rank(recipe)
    loaded = replace(recipe, checkpoint=one.recipe.checkpoint)
    many = run(loaded, usual_world(recipe), tmp_path, timeout=120)
    assert losses(many) == pytest.approx(losses(one.metrics), rel=1e-5)
    assert grad_norms(many) == pytest.approx(grad_norms(one.metrics), rel=1e-4)
    assert losses(many)[-1] < losses(many)[0]
