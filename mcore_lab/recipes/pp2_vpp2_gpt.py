"""Interleaved pipeline: each of two ranks holds two chunks of layers, taken in turn.

Why: with v chunks a rank the bubble is v times smaller, for v times as many messages.

What to look at: `mcore-lab ranks pp2_vpp2_gpt` shows layers 0 and 2 on one rank, 1 and 3 on the
other. The layout sets `overlap_p2p_comm=True, batch_p2p_comm=False`: with Megatron-Core's defaults
two stages pair their messages wrongly, and the gradients are wrong without an error.
Source: Narayanan et al., arXiv:2104.04473.
"""

from __future__ import annotations

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import DATA, TRAINING, small_gpt

RECIPE = Recipe(
    name="pp2_vpp2_gpt",
    layout=ParallelLayout(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
    ),
    model=small_gpt(),
    data=DATA,
    training=TRAINING,
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
