"""Three dimensions on eight ranks: tensor, pipeline and data parallelism.

Why: the layout that most dense models are trained with, at its smallest.

What to look at: `mcore-lab ranks tp2_pp2_dp2_gpt`: data-parallel size 2 is what the eight ranks
leave over.
"""

from __future__ import annotations

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import DATA, TRAINING, small_gpt

RANKS = 8
RECIPE = Recipe(
    name="tp2_pp2_dp2_gpt",
    layout=ParallelLayout(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        sequence_parallel=True,
        use_distributed_optimizer=True,
    ),
    model=small_gpt(),
    data=DATA,
    training=TRAINING,
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
