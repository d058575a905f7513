"""Pipeline parallelism: the layers are split over two ranks, and micro-batches flow through.

Why: a rank holds half the layers, with their weights and optimizer state, and sends one activation
a micro-batch to the next. One forward and one backward take turns (1F1B), so that no more
micro-batches are under way than there are stages.

What to look at: the bubble. With p stages and m micro-batches, (p - 1) / (m + p - 1) of the time
nothing is done on a rank: compare the tokens a second of `--data.global-batch-size 2` and `32`.
Source: Narayanan et al., arXiv:2104.04473.
"""

from __future__ import annotations

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import DATA, TRAINING, small_gpt

RECIPE = Recipe(
    name="pp2_gpt",
    layout=ParallelLayout(
        pipeline_model_parallel_size=2,
    ),
    model=small_gpt(share_embeddings_and_output_weights=True),
    data=DATA,
    training=TRAINING,
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
