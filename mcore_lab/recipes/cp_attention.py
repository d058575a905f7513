"""A single attention layer over a long sequence, split over four context-parallel ranks.

Why: one rank holds the activations of the whole sequence; with four each holds a quarter of them,
and of the others' keys and values no more than two blocks at a time (`p2p`, a ring).

What to look at: the peak memory of a rank against one rank's, and that output and gradient are the
same. `--model.transformer.cp-comm-type a2a` (or all_gather) trades memory for fewer messages.
Source: Liu et al., arXiv:2310.01889 (ring attention).
"""

from __future__ import annotations

from mcore_lab.config import Data, Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import small_gpt

LAYER = "attention"

RECIPE = Recipe(
    name="cp_attention",
    layout=ParallelLayout(
        context_parallel_size=4,
    ),
    model=small_gpt(num_layers=1, position_embedding_type="none"),
    data=Data(sequence_length=8192, micro_batch_size=1, global_batch_size=1),
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
