"""A single feed-forward layer, split over two tensor-parallel ranks.

Why: the first matrix is split by columns and the second by rows, so that what is between them needs
no communication: one all-reduce at the end adds up the partial sums.

What to look at: the shapes of the two weights on each rank, and that output and gradient are those
of the whole layer. `--layout.tp 4 --nproc 4` halves the shapes again.
Source: Shoeybi et al., arXiv:1909.08053, section 3.
"""

from __future__ import annotations

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import DATA, small_gpt

LAYER = "mlp"

RECIPE = Recipe(
    name="tp_mlp",
    layout=ParallelLayout(
        tensor_model_parallel_size=2,
    ),
    model=small_gpt(num_layers=1),
    data=DATA,
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
