"""Tensor and context parallelism: four ranks, each with half the heads of half the tokens.

Why: long sequences of a wide model: weights split by tensor parallelism, activations by both.

What to look at: `mcore-lab ranks tp2_cp2_gpt`: tensor-parallel peers are neighbours, since they
talk most.
"""

from __future__ import annotations

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import DATA, TRAINING, small_gpt

RECIPE = Recipe(
    name="tp2_cp2_gpt",
    layout=ParallelLayout(
        tensor_model_parallel_size=2,
        context_parallel_size=2,
        sequence_parallel=True,
    ),
    model=small_gpt(position_embedding_type="rope"),
    data=DATA,
    training=TRAINING,
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
