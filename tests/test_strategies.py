"""Each recipe trains, and from one initial checkpoint it computes what one rank computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import changed, grad_norms, losses, run

from mcore_lab.cli.arguments import usual_world
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes import load_recipe, recipe_names, shown_layer

STRATEGIES = [name for name in recipe_names() if name != "text_gpt" and not shown_layer(name)]
STEPS = 10


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "tp2_gpt"])
def test_from_one_checkpoint_a_recipe_computes_what_one_rank_computes(name: str, tmp_path: Path):
    """Losses to 1e-5 and gradient norms to 1e-4, relative: fp32 sums in another order."""
    recipe = changed(load_recipe(name), training={"steps": STEPS})
    begun = changed(replace(recipe, layout=ParallelLayout()), training={"steps": 0})
    run(begun, 1, tmp_path / "initial")
    loaded = changed(recipe, checkpoint={"load": str(tmp_path / "initial"), "save": False})
    one = run(replace(loaded, layout=ParallelLayout()), 1, tmp_path / "one")
    many = run(loaded, usual_world(recipe), tmp_path / "many", timeout=120)
    assert losses(many) == pytest.approx(losses(one), rel=1e-5)
    assert grad_norms(many) == pytest.approx(grad_norms(one), rel=1e-4)
    assert losses(many)[-1] < losses(many)[0]
