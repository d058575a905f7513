"""The distributed optimizer: two replicas share the optimizer's state between them.

Why: Adam keeps two moments a parameter, and under bf16 a main weight: more than the model itself.
Each replica keeps its half, updates that half of the weights and gathers the rest.

What to look at: gradients are reduce-scattered in the place of all-reduced. The losses are those of
`dp2_gpt`.
Source: Rajbhandari et al., arXiv:1910.02054 (ZeRO, stage 1).
"""

from __future__ import annotations

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import DATA, TRAINING, small_gpt

RANKS = 2
RECIPE = Recipe(
    name="dp2_distopt_gpt",
    layout=ParallelLayout(
        use_distributed_optimizer=True,
    ),
    model=small_gpt(),
    data=DATA,
    training=TRAINING,
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
