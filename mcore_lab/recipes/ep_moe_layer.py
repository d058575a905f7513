"""A single layer of four experts on two expert-parallel ranks: which token goes where.

Why: the router sends each token to the experts of its choice, wherever they are. How many come to a
rank is up to the data: balance is what auxiliary losses are for.

What to look at: the tokens that each expert received, from both ranks, and that the output is that
of all experts on one rank.
Source: Lepikhin et al., arXiv:2006.16668 (GShard).
"""

from __future__ import annotations

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import DATA, small_moe

LAYER = "experts"

RECIPE = Recipe(
    name="ep_moe_layer",
    layout=ParallelLayout(
        expert_model_parallel_size=2,
    ),
    model=small_moe(num_layers=1),
    data=DATA,
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
