"""Sequence parallelism: what tensor parallelism leaves whole is split by sequence too.

Why: between its two matrix products a tensor-parallel layer keeps norms, dropout and the residual
stream whole on every rank. Split by sequence they take half the memory; each all-reduce becomes a
reduce-scatter and an all-gather, which move the same bytes.

What to look at: the losses are those of `tp2_gpt`'s layout on the same model (`--layout.no-sp`).
The norms' gradients are partial sums, which `finalize_model_grads` adds up over the tensor-parallel
ranks.
Source: Korthikanti et al., arXiv:2205.05198.
"""

from __future__ import annotations

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import DATA, TRAINING, small_gpt

RECIPE = Recipe(
    name="sp2_gpt",
    layout=ParallelLayout(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
    ),
    model=small_gpt(),
    data=DATA,
    training=TRAINING,
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
