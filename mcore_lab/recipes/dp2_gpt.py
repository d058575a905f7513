"""Data parallelism: two replicas of the model, each with half of every batch.

Why: the simplest way to use more ranks: gradients are summed over the replicas before the step.

What to look at: samples are drawn by global index, so that the two replicas together see what one
rank would see, and the loss is a mean over all tokens of the global batch: it is that of `--nproc
1`.
"""

from __future__ import annotations

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import DATA, TRAINING, small_gpt

RANKS = 2
RECIPE = Recipe(
    name="dp2_gpt",
    layout=ParallelLayout(),
    model=small_gpt(),
    data=DATA,
    training=TRAINING,
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
