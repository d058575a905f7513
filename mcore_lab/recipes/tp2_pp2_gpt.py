"""Tensor and pipeline parallelism: four ranks, a quarter of the model on each.

Why: tensor parallelism inside a machine, where talk is cheap; the pipeline between machines.

What to look at: the first and the last stage both hold the tied embedding, and their gradients are
added up.
"""

from __future__ import annotations

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import DATA, TRAINING, small_gpt

RECIPE = Recipe(
    name="tp2_pp2_gpt",
    layout=ParallelLayout(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        sequence_parallel=True,
    ),
    model=small_gpt(share_embeddings_and_output_weights=True),
    data=DATA,
    training=TRAINING,
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
