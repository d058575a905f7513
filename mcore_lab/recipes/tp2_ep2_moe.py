"""Tensor and expert parallelism on the same two ranks.

Why: attention is split by heads over both ranks, and the experts are whole, two on each: each kind
of layer is split in the way that suits it.

What to look at: `expert_tensor_parallel_size=1` is what keeps the experts whole; with experts,
tensor parallelism needs sequence parallelism, so that a rank's tokens are its own.
"""

from __future__ import annotations

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import DATA, TRAINING, small_moe

RECIPE = Recipe(
    name="tp2_ep2_moe",
    layout=ParallelLayout(
        tensor_model_parallel_size=2,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
    ),
    model=small_moe(),
    data=DATA,
    training=TRAINING,
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
