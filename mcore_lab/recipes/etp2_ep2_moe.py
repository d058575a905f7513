"""Expert tensor parallelism: experts over two ranks, and each of them cut in two.

Why: experts that are too large for a rank are cut as any layer is, while expert parallelism spreads
them.

What to look at: `mcore-lab ranks etp2_ep2_moe`: four ranks, of which a pair holds the same two
experts, a half of each.
"""

from __future__ import annotations

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import DATA, TRAINING, small_moe

RECIPE = Recipe(
    name="etp2_ep2_moe",
    layout=ParallelLayout(
        tensor_model_parallel_size=2,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=2,
        sequence_parallel=True,
    ),
    model=small_moe(),
    data=DATA,
    training=TRAINING,
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
