"""Every dimension at once on eight ranks: tensor, context, pipeline and expert parallelism.

Why: what the largest mixtures of experts are trained with, at its smallest.

What to look at: experts are spread over tensor-parallel ranks and context-parallel ones: the expert
grid of `mcore-lab ranks tp2_cp2_pp2_moe` is another view of the same eight ranks.
"""

from __future__ import annotations

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import DATA, TRAINING, small_moe

RECIPE = Recipe(
    name="tp2_cp2_pp2_moe",
    layout=ParallelLayout(
        tensor_model_parallel_size=2,
        context_parallel_size=2,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
    ),
    model=small_moe(position_embedding_type="rope"),
    data=DATA,
    training=TRAINING,
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
