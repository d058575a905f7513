"""Context parallelism: each sequence is split over two ranks, in every layer.

Why: activations grow with the sequence, and attention with its square. Each rank keeps its tokens
all the way through; only keys and values travel.

What to look at: `mcore-lab ranks cp2_gpt`: a rank holds a chunk from each end of the sequence, so
that under a causal mask all have the same work. `--model.transformer.cp-comm-type` chooses how keys
and values travel: p2p (a ring), all_gather, a2a.
Source: Liu et al., arXiv:2310.01889 (ring attention).
"""

from __future__ import annotations

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import DATA, TRAINING, small_gpt

RECIPE = Recipe(
    name="cp2_gpt",
    layout=ParallelLayout(
        context_parallel_size=2,
    ),
    model=small_gpt(position_embedding_type="rope"),
    data=DATA,
    training=TRAINING,
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
