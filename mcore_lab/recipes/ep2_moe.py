"""Expert parallelism: four experts a layer, two on each rank; tokens travel to them.

Why: a mixture of experts has many more weights than a token uses. Split over the data-parallel
ranks, each rank holds some experts and all-to-all takes each token to those of its router's choice.

What to look at: the world is two ranks, not four: expert parallelism folds into data parallelism.
"""

from __future__ import annotations

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import DATA, TRAINING, small_moe

RECIPE = Recipe(
    name="ep2_moe",
    layout=ParallelLayout(
        expert_model_parallel_size=2,
    ),
    model=small_moe(),
    data=DATA,
    training=TRAINING,
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
